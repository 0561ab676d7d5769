package app

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

// newPairingEnvironment starts a manager, a worker and a simulator with a fault of pairings.
func newPairingEnvironment(t *testing.T, fault simulator.FaultKind) *environment {
	t.Helper()
	s := newEnvironment(t, "")
	s.manager()
	s.worker("worker-1")
	_, err := s.simulator.Inject(simulator.Fault{Kind: fault})
	s.Expect(err).NotTo(HaveOccurred())
	return s
}

// annotate writes an annotation of a session, as a person does.
func (s *environment) annotate(name, annotation, value string) {
	s.t.Helper()
	s.change(name, func(o *v1alpha1.WhatsAppSession) { metav1.SetMetaDataAnnotation(&o.ObjectMeta, annotation, value) })
}

// passkeyRequest waits for a request for the passkey that is not the one before.
func (s *environment) passkeyRequest(name, before string) (options string) {
	s.t.Helper()
	s.Eventually(func() string {
		if p := s.get(name).Status.Passkey; p != nil {
			options = p.RequestOptions
		}
		return options
	}).ShouldNot(BeElementOf("", before))
	return options
}

func (s *environment) passkeyAnswer(phone, request string) string {
	s.t.Helper()
	answer, err := s.simulator.AnswerPasskey(phone, []byte(request))
	s.Expect(err).NotTo(HaveOccurred())
	return string(answer)
}

// readyMessage returns the reason and the message of a session's Ready condition.
func (s *environment) readyMessage(name string) string {
	c := meta.FindStatusCondition(s.get(name).Status.Conditions, v1alpha1.ConditionReady)
	if c == nil {
		return ""
	}
	return c.Reason + ": " + c.Message
}

// events counts the Events of a session by reason, with the repetitions that the API server
// keeps as one.
func (s *environment) events(name string) map[string]int {
	var all eventsv1.EventList
	s.Expect(s.client.List(s.t.Context(), &all, client.InNamespace(s.namespace))).To(Succeed())
	counts := map[string]int{}
	for _, e := range all.Items {
		if e.Regarding.Name == name {
			counts[e.Reason]++
			if e.Series != nil {
				counts[e.Reason] += int(e.Series.Count) - 1
			}
		}
	}
	return counts
}

// TestBadAnswersOfAPasskey gives answers that cannot be right. Each is refused with a sentence
// that says what to change, and removed; the right one links the device afterwards.
func TestBadAnswersOfAPasskey(t *testing.T) {
	s := newPairingEnvironment(t, simulator.FaultPasskey)
	const phone = "+34600444011"
	s.apply("shop")
	s.scan("shop", phone)
	request := s.passkeyRequest("shop", "")
	right := s.passkeyAnswer(phone, request)

	var options map[string]any
	s.Expect(json.Unmarshal([]byte(request), &options)).To(Succeed())
	delete(options, "allowCredentials")
	forAnyone, err := json.Marshal(options)
	s.Expect(err).NotTo(HaveOccurred())
	options["challenge"] = "AAAA"
	forAnother, err := json.Marshal(options)
	s.Expect(err).NotTo(HaveOccurred())
	elsewhere := strings.Replace(request, "whatsapp.com", "example.com", 1)
	onPage := func(page string) string {
		var a map[string]any
		s.Expect(json.Unmarshal([]byte(right), &a)).To(Succeed())
		response := a["response"].(map[string]any)
		data, err := base64.RawURLEncoding.DecodeString(response["clientDataJSON"].(string))
		s.Expect(err).NotTo(HaveOccurred())
		response["clientDataJSON"] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(data), "https://web.whatsapp.com", page, 1)))
		changed, err := json.Marshal(a)
		s.Expect(err).NotTo(HaveOccurred())
		return string(changed)
	}
	for name, bad := range map[string]struct{ answer, want string }{
		"no JSON":                        {"yes", "copy the whole answer"},
		"cut off":                        {right[:len(right)-10], "copy the whole answer"},
		"with something after it":        {right + "}", "copy the whole answer"},
		"only spaces":                    {"   ", "copy the whole answer"},
		"another object":                 {"{}", "rawId is missing"},
		"too large":                      {right + strings.Repeat(" ", 100_000), "more than 8192 characters"},
		"for another challenge":          {s.passkeyAnswer(phone, string(forAnother)), "it answers another request; ask the passkey again"},
		"for another site":               {s.passkeyAnswer(phone, elsewhere), "another site than WhatsApp; ask the passkey again"},
		"made on another page":           {onPage("https://example.com"), "another page than https://web.whatsapp.com; ask the passkey again"},
		"of another account's passkey":   {s.passkeyAnswer("+34600444012", string(forAnyone)), "choose the one of the phone that was linked"},
		"made on a page that ends alike": {onPage("https://web.whatsapp.com.example.com"), "another page than https://web.whatsapp.com"},
	} {
		t.Log(name)
		s.annotate("shop", v1alpha1.PasskeyResponseAnnotation, bad.answer)
		s.Eventually(func() string { return s.readyMessage("shop") }).Should(And(
			HavePrefix(v1alpha1.ReasonPasskeyRequired+": the annotation "+v1alpha1.PasskeyResponseAnnotation+" was not used"), ContainSubstring(bad.want)), name)
		s.Eventually(func() string { return s.get("shop").PasskeyResponse() }).Should(BeEmpty(), name)
		obj := s.get("shop")
		s.Expect(obj.Status.Phase).To(Equal(v1alpha1.PhasePairing), name)
		s.Expect(obj.Status.Passkey.RequestOptions).To(Equal(request), "the request stays")
	}
	s.Expect(s.event("shop", v1alpha1.ReasonPasskeyRefused)).To(ContainSubstring("was not used"))

	t.Log("WhatsApp itself refuses the signature")
	var forged map[string]any
	s.Expect(json.Unmarshal([]byte(right), &forged)).To(Succeed())
	var other map[string]any
	s.Expect(json.Unmarshal([]byte(s.passkeyAnswer(phone, request)), &other)).To(Succeed())
	forged["response"].(map[string]any)["signature"] = other["response"].(map[string]any)["signature"]
	text, err := json.Marshal(forged)
	s.Expect(err).NotTo(HaveOccurred())
	s.annotate("shop", v1alpha1.PasskeyResponseAnnotation, string(text))
	s.Eventually(func() string { return s.readyMessage("shop") }).Should(And(ContainSubstring("WhatsApp did not accept it"), ContainSubstring("give the new answer")))

	s.annotate("shop", v1alpha1.PasskeyResponseAnnotation, s.passkeyAnswer(phone, request))
	s.Expect(s.phase("shop", v1alpha1.PhaseConnected).Status.PhoneNumber).To(Equal(phone))
	s.Eventually(func() string { return s.get("shop").PasskeyResponse() }).Should(BeEmpty())
}

// TestAServerThatAsksForThePasskeyAgain: the request that is shown last can be answered, and too
// many end the pairing with a reason, with few Events and writes.
func TestAServerThatAsksForThePasskeyAgain(t *testing.T) {
	s := newPairingEnvironment(t, simulator.FaultPasskey)
	ask := func(options string) {
		_ = s.simulator.PlayPasskeyRequest(options) // the connection may have ended
	}

	t.Log("twice: the second request is answered")
	const phone = "+34600444021"
	s.apply("shop")
	s.scan("shop", phone)
	first := s.passkeyRequest("shop", "")
	again := strings.Replace(first, `"timeout":600000`, `"timeout":500000`, 1)
	s.Expect(again).NotTo(Equal(first))
	ask(again)
	s.Expect(s.passkeyRequest("shop", first)).To(MatchJSON(again))
	s.annotate("shop", v1alpha1.PasskeyResponseAnnotation, s.passkeyAnswer(phone, again))
	s.phase("shop", v1alpha1.PhaseConnected)

	for name, bad := range map[string]struct{ options, want string }{
		"a-megabyte":   {`{"challenge":"` + strings.Repeat("A", 1<<20) + `"}`, "more than 8192 characters"},
		"another-site": {`{"challenge":"AAAA","rpId":"bank.example"}`, "another site than WhatsApp"},
		"nested":       {`{"challenge":"AAAA","extensions":` + strings.Repeat(`{"a":`, 1000) + "1" + strings.Repeat("}", 1000) + "}", "nested more than"},
	} {
		t.Log(name)
		s.apply(name)
		s.Eventually(func() *v1alpha1.QRStatus { return s.get(name).Status.QR }).ShouldNot(BeNil())
		ask(bad.options)
		s.Expect(s.event(name, v1alpha1.ReasonPasskeyFailed)).To(And(ContainSubstring(bad.want), ContainSubstring("scan the next code")))
		s.Eventually(func() *v1alpha1.QRStatus { return s.get(name).Status.QR }).ShouldNot(BeNil(), "codes are offered again")
		s.Expect(s.client.Delete(t.Context(), s.get(name))).To(Succeed())
		s.gone(name)
	}

	t.Log("a hundred times")
	s.apply("till")
	s.scan("till", "+34600444022")
	s.passkeyRequest("till", "")
	for n := range 100 {
		ask(fmt.Sprintf(`{"challenge":"AAAA","timeout":%d}`, 100_000+n))
	}
	s.Expect(s.event("till", v1alpha1.ReasonPasskeyFailed)).To(ContainSubstring("asked for the passkey 4 times on one connection"))
	s.Eventually(func() *v1alpha1.QRStatus { return s.get("till").Status.QR }).ShouldNot(BeNil(), "codes are offered again")
	counts := s.events("till")
	t.Log("Events:", counts)
	// Some of the hundred may have come to the next connection.
	s.Expect(counts[v1alpha1.ReasonPasskeyFailed]).To(BeNumerically("<=", 3))
	s.Expect(counts[v1alpha1.ReasonPasskeyRequired]).To(BeNumerically("<=", session.MaxPasskeyRequests*counts[v1alpha1.ReasonPasskeyFailed]+1))
}

// TestARetiredCode: a phone scans a code that WhatsApp retires. The session shows the next one
// at once and says that it must be scanned; the retired one links nothing.
func TestARetiredCode(t *testing.T) {
	s := newPairingEnvironment(t, simulator.FaultRetireCode)
	const phone = "+34600444031"
	s.apply("shop")
	var old string
	s.Eventually(func() string {
		if qr := s.get("shop").Status.QR; qr != nil {
			old = qr.Code
		}
		return old
	}).ShouldNot(BeEmpty())
	_, err := s.simulator.Scan(t.Context(), old, phone)
	s.Expect(err).To(MatchError(simulator.ErrNotNow))
	s.Expect(s.event("shop", v1alpha1.ReasonCodeReplaced)).To(ContainSubstring("must scan the new one"))
	s.Eventually(func() string { return s.readyMessage("shop") }).Should(HavePrefix(v1alpha1.ReasonWaitingForScan + ": WhatsApp has replaced the code"))
	shown := s.get("shop").Status.QR
	s.Expect(shown.Code).NotTo(Equal(old))
	s.Eventually(func() (string, error) { return s.redis.Get(t.Context(), "session:shop:qr").Result() }).Should(ContainSubstring(secretOf(shown.Code)))
	s.Eventually(func() string { return s.laravel.Code("shop").QR }).Should(ContainSubstring(secretOf(shown.Code)), "Laravel does not show the old one for 30 s more")

	for range 2 {
		_, err = s.simulator.Scan(t.Context(), old, phone)
		s.Expect(err).To(MatchError(ContainSubstring("was retired")))
	}
	s.Expect(s.get("shop").Status.Phase).To(Equal(v1alpha1.PhasePairing))
	s.scan("shop", phone)
	s.Expect(s.phase("shop", v1alpha1.PhaseConnected).Status.PhoneNumber).To(Equal(phone))
	s.Expect(s.events("shop")[v1alpha1.ReasonCodeReplaced]).To(Equal(1))
	s.expectPublished("shop", delivery.Active, v1alpha1.PhaseConnected)
}

// secretOf is the part of a code that WhatsApp replaces, without characters that JSON escapes.
func secretOf(code string) string {
	parts := strings.Split(code, ",")
	return strings.FieldsFunc(parts[len(parts)-2], func(r rune) bool { return r == '+' || r == '/' || r == '=' })[0]
}

// workerWithoutProof is the command of a worker whose clients have spent the proof that they
// showed the code that was scanned, when they give a passkey's answer. A real client has none
// when a person answers five minutes after WhatsApp's request: then a person compares codes.
const workerWithoutProof = "worker-without-proof"

type accountsWithoutProof struct{ worker.Accounts }

func (a accountsWithoutProof) Take(ctx context.Context, uid types.UID, epoch int64) (worker.Account, error) {
	taken, err := a.Accounts.Take(ctx, uid, epoch)
	if err != nil {
		return nil, err
	}
	return accountWithoutProof{taken}, nil
}

type accountWithoutProof struct{ worker.Account }

func (a accountWithoutProof) Dial(ctx context.Context, o worker.DialOptions) (worker.Connection, error) {
	c := &connectionWithoutProof{agreed: make(chan struct{}, 1)}
	report := o.Events
	o.Events = func(e session.Event) {
		if e.Type == session.EventPasskeyConfirmation && e.Code == "" {
			select {
			case c.agreed <- struct{}{}:
			default:
			}
			return
		}
		report(e)
	}
	var err error
	c.Connection, err = a.Account.Dial(ctx, o)
	return c, err
}

type connectionWithoutProof struct {
	worker.Connection
	agreed chan struct{}
}

// AnswerPasskey gives the answer twice: the client sends the proof only once.
func (c *connectionWithoutProof) AnswerPasskey(ctx context.Context, response string) error {
	if err := c.Connection.AnswerPasskey(ctx, response); err != nil {
		return err
	}
	select {
	case <-c.agreed:
	case <-ctx.Done():
		return ctx.Err()
	}
	return c.Connection.AnswerPasskey(ctx, response)
}

// TestAPersonComparesTheCodes links two accounts whose phones show a code to compare. What is
// not the code that the session shows is refused, and removed.
func TestAPersonComparesTheCodes(t *testing.T) {
	s := newEnvironment(t, "")
	s.manager()
	s.workerAs(workerWithoutProof, "worker-1")
	_, err := s.simulator.Inject(simulator.Fault{Kind: simulator.FaultPasskey})
	s.Expect(err).NotTo(HaveOccurred())
	phones := map[string]string{"shop": "+34600444041", "till": "+34600444042"}
	codes := map[string]string{}
	for name, phone := range phones {
		s.apply(name)
		s.scan(name, phone)
		request := s.passkeyRequest(name, "")
		if name == "shop" {
			t.Log("before WhatsApp has shown a code")
			s.annotate(name, v1alpha1.PasskeyConfirmAnnotation, "ABCD-1234")
			s.Eventually(func() string { return s.readyMessage(name) }).Should(ContainSubstring("has not asked for a confirmation"))
			s.Eventually(func() string { return s.get(name).PasskeyConfirmation() }).Should(BeEmpty())
		}
		s.annotate(name, v1alpha1.PasskeyResponseAnnotation, s.passkeyAnswer(phone, request))
		s.Eventually(func() string {
			if p := s.get(name).Status.Passkey; p != nil {
				codes[name] = p.ConfirmationCode
			}
			return codes[name]
		}).Should(MatchRegexp("^[1-9A-Z]{4}-[1-9A-Z]{4}$"))
		s.Expect(s.simulator.ConfirmationCode(phone)).To(Equal(codes[name]), "the phone shows the same")
		s.Eventually(func() string { return s.readyMessage(name) }).Should(ContainSubstring("compare status.passkey.confirmationCode with the code on the phone"))
		s.Eventually(func() *delivery.Passkey { return s.laravel.Code(name).Passkey }).Should(HaveField("ConfirmationCode", codes[name]))
	}
	for name, wrong := range map[string]string{
		"of another session": codes["till"], "before this one": "ABCD-1234", "one character too many": codes["shop"] + "A", "half": codes["shop"][:4], "no code": "yes",
	} {
		t.Log(name)
		s.annotate("shop", v1alpha1.PasskeyConfirmAnnotation, wrong)
		s.Eventually(func() string { return s.readyMessage("shop") }).Should(ContainSubstring("it is not the present status.passkey.confirmationCode"), name)
		s.Eventually(func() string { return s.get("shop").PasskeyConfirmation() }).Should(BeEmpty(), name)
		s.Expect(s.get("shop").Status.Passkey.ConfirmationCode).To(Equal(codes["shop"]))
	}
	s.annotate("shop", v1alpha1.PasskeyConfirmAnnotation, strings.ToLower(codes["shop"]))
	s.annotate("till", v1alpha1.PasskeyConfirmAnnotation, strings.ReplaceAll(codes["till"], "-", ""))
	for name, phone := range phones {
		s.Expect(s.phase(name, v1alpha1.PhaseConnected).Status.PhoneNumber).To(Equal(phone))
		s.Eventually(func() string { return s.get(name).PasskeyConfirmation() }).Should(BeEmpty())
	}
}

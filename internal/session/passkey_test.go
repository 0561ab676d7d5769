package session

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	wapasskey "github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
)

const challenge = "0123456789abcdef0123456789abcdef"

// account is a WhatsApp account with a passkey.
type account struct {
	t   *testing.T
	key *wapasskey.Passkey
}

func newAccount(t *testing.T) account {
	t.Helper()
	key, err := wapasskey.New()
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	return account{t: t, key: key}
}

// request is what WhatsApp asks the account's passkey.
func (a account) request(challenge string) string {
	a.t.Helper()
	request, err := a.key.Request([]byte(challenge), 5*time.Minute)
	NewWithT(a.t).Expect(err).NotTo(HaveOccurred())
	return string(request)
}

// answer is what a browser makes of the passkey's answer.
func (a account) answer(request, origin string) string {
	a.t.Helper()
	answer, err := a.key.Answer([]byte(request), origin)
	NewWithT(a.t).Expect(err).NotTo(HaveOccurred())
	return string(answer)
}

func TestCheckPasskeyResponse(t *testing.T) {
	mine, other := newAccount(t), newAccount(t)
	request := mine.request(challenge)
	right := mine.answer(request, wapasskey.Origin)
	with := func(field string, value any) string {
		var a map[string]any
		NewWithT(t).Expect(json.Unmarshal([]byte(right), &a)).To(Succeed())
		in := a
		if name, nested := strings.CutPrefix(field, "response."); nested {
			in, field = a["response"].(map[string]any), name
		}
		if in[field] = value; value == nil {
			delete(in, field)
		}
		text, err := json.Marshal(a)
		NewWithT(t).Expect(err).NotTo(HaveOccurred())
		return string(text)
	}
	without := func(field string) string { return with(field, nil) }
	for name, tt := range map[string]struct{ request, response, want string }{
		"right":                        {response: right},
		"right, with spaces and lines": {response: "\n " + right + "\n"},
		"right, for any passkey":       {request: `{"rpId":"whatsapp.com","challenge":"` + encoded(challenge) + `"}`, response: right},
		"for another request":          {response: mine.answer(mine.request("another"), wapasskey.Origin), want: "another request"},
		"on another page":              {response: mine.answer(request, "https://example.com"), want: "another page"},
		"of another account":           {response: other.answer(request, wapasskey.Origin), want: "another account"},
		"nothing":                      {response: "null", want: "rawId"},
		"a list":                       {response: "[]", want: "not the JSON"},
		"cut off":                      {response: right[:len(right)-3], want: "not the JSON"},
		"twice":                        {response: right + right, want: "not the JSON"},
		"no id":                        {response: without("rawId"), want: "rawId"},
		"no type":                      {response: without("type"), want: "type"},
		"no signature":                 {response: without("response.signature"), want: "response.signature"},
		"no authenticator data":        {response: without("response.authenticatorData"), want: "response.authenticatorData"},
		"no client data":               {response: without("response.clientDataJSON"), want: "response.clientDataJSON"},
		"no id of the credential":      {response: without("id"), want: "id and rawId differ"},
		"for another site":             {response: mine.answer(strings.Replace(request, wapasskey.RelyingParty, "example.com", 1), wapasskey.Origin), want: "another site"},
		"authenticator data cut off":   {response: with("response.authenticatorData", "AAAA"), want: "another site"},
		"a user handle of two kinds":   {response: with("response.userHandle", "="), want: "userHandle"},
		"padded":                       {response: with("response.signature", "AAA="), want: "response.signature"},
		"of another type":              {response: with("rawId", 7), want: "not the JSON"},
		"an id twice":                  {response: strings.Replace(right, "{", `{"rawId":"AAAA",`, 1)},
		"with more fields":             {response: with("authenticatorAttachment", map[string]any{"a": []int{1}})},
		"deeply nested":                {response: strings.Repeat("[", 8192), want: "not the JSON"},
		"empty":                        {response: "", want: "not the JSON"},
		"a megabyte":                   {response: strings.Repeat(" ", 1<<20) + right, want: "more than 8192"},
		"a request that is broken":     {request: "{", response: right, want: "requestOptions"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			if tt.request == "" {
				tt.request = request
			}
			err := CheckPasskeyResponse(tt.request, tt.response)
			if tt.want == "" {
				g.Expect(err).NotTo(HaveOccurred())
				return
			}
			g.Expect(err).To(MatchError(ContainSubstring(tt.want)))
			g.Expect(err.Error()).NotTo(ContainSubstring(encoded(challenge)), "nothing of the text")
		})
	}
}

func encoded(s string) string {
	text, _ := json.Marshal([]byte(s))
	return strings.TrimRight(strings.NewReplacer("+", "-", "/", "_", `"`, "").Replace(string(text)), "=")
}

func FuzzCheckPasskeyResponse(f *testing.F) {
	f.Add(`{"challenge":"AAAA","allowCredentials":[{"id":"AAAA"}]}`, `{"rawId":"AAAA","type":"public-key","response":{"clientDataJSON":"e30","authenticatorData":"AA","signature":"AA"}}`)
	f.Add(`{}`, `{"response":null}`)
	f.Fuzz(func(_ *testing.T, options, response string) { _ = CheckPasskeyResponse(options, response) })
}

// asked is a session whose code was scanned, and whose passkey WhatsApp asks for.
func asked(t *testing.T, request string) *machineTest {
	t.Helper()
	g := NewWithT(t)
	p := newMachineTest(session(), func() float64 { return 0.5 })
	op, _ := p.goOn(Device{Starts: 1})
	g.Expect(op).To(Equal(OpDial))
	p.Step(Dialed{}, p.now)
	p.Step(Event{Type: EventQR, Codes: []string{"code 1", "code 2", "code 3"}}, p.now)
	p.next()
	p.write()
	p.Step(Settled{}, p.now) // see trial_test.go
	p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: request}, p.now)
	return p
}

// annotate writes an annotation, as a person does.
func (p *machineTest) annotate(name, value string) {
	p.change(func(s *v1alpha1.WhatsAppSession) {
		if s.Annotations == nil {
			s.Annotations = map[string]string{}
		}
		s.Annotations[name] = value
	})
}

// reported returns the reasons and messages of the Events of one step.
func (p *machineTest) reported() (operation Operation, events string) {
	d := p.Next(p.now)
	for _, e := range d.Events {
		events += e.Reason + ": " + e.Message + "\n"
	}
	return d.Operation, events
}

func TestAPasskeyIsAskedFor(t *testing.T) {
	g := NewWithT(t)
	mine := newAccount(t)
	request := mine.request(challenge)
	p := asked(t, request)
	d := p.Next(p.now)
	g.Expect(d.Publication.QR.Passkey.RequestOptions).To(MatchJSON(request))
	g.Expect(d.Publication.QR.QR).To(BeEmpty())
	g.Expect(d.Publication.QR.ReplacesInvalid).To(BeTrue(), "the code that Laravel shows cannot be scanned any more")
	item, err := d.Publication.QR.Item()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(item.Payload)).To(ContainSubstring(`"passkey":{"request_options":{"challenge":`))
	g.Expect(string(item.Payload)).NotTo(ContainSubstring(`"qr"`))
	s, _ := p.wantedStatus(p.now)
	g.Expect(s.Phase).To(Equal(v1alpha1.PhasePairing))
	g.Expect(p.reason).To(Equal(v1alpha1.ReasonPasskeyRequired))
	g.Expect(s.QR).To(BeNil())
	g.Expect(s.Passkey.RequestOptions).To(Equal(request))
	g.Expect(s.Passkey.ExpiresAt.Time).To(BeTemporally("==", p.now.Add(passkeyTimeout)))
	p.write()

	t.Log("the codes do not run out meanwhile")
	p.now = p.now.Add(5 * time.Minute)
	g.Expect(p.next()).To(Equal(OpNone))
	g.Expect(p.socket).To(Equal(socketPairing))

	t.Log("an answer that cannot be right is refused, once, and the request stays")
	p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(mine.request("another"), wapasskey.Origin))
	op, events := p.reported()
	g.Expect(op).To(Equal(OpNone))
	g.Expect(events).To(HavePrefix("PasskeyRefused: the annotation whatsapp-operator.io/passkey-response was not used: it answers another request"))
	p.write()
	g.Expect(p.Object().Status.Passkey.ObservedResponse).To(Equal(Digest(p.Object().PasskeyResponse())), "the manager removes it")
	_, events = p.reported()
	g.Expect(events).To(BeEmpty())

	t.Log("the right one is sent, once")
	answer := mine.answer(request, wapasskey.Origin)
	p.annotate(v1alpha1.PasskeyResponseAnnotation, answer)
	d = p.Next(p.now)
	g.Expect(d.Operation).To(Equal(OpPasskeyAnswer))
	g.Expect(d.PasskeyResponse).To(Equal(answer))
	p.Step(PasskeyAnswered{}, p.now)
	p.write()
	g.Expect(p.next()).To(Equal(OpNone))

	t.Log("WhatsApp knows that it is the phone that scanned: nobody has to confirm")
	p.Step(Event{Type: EventPasskeyConfirmation}, p.now)
	g.Expect(p.next()).To(Equal(OpPasskeyConfirm))
	p.Step(PasskeyConfirmed{}, p.now)
	g.Expect(p.next()).To(Equal(OpNone))
	p.Step(Event{Type: EventPairSuccess, JID: jid, PhoneNumber: phone}, p.now)
	s, _ = p.wantedStatus(p.now)
	g.Expect(s.Passkey).To(BeNil())
	g.Expect(s.JID).To(Equal(jid))
	d = p.Next(p.now)
	g.Expect(d.Publication.QRGone).To(BeTrue())
}

func TestAPasskeyIsConfirmed(t *testing.T) {
	g := NewWithT(t)
	mine := newAccount(t)
	request := mine.request(challenge)
	p := asked(t, request)
	p.annotate(v1alpha1.PasskeyConfirmAnnotation, "ABCD-EFGH")
	_, events := p.reported()
	g.Expect(events).To(ContainSubstring("has not asked for a confirmation"))
	p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(request, wapasskey.Origin))
	g.Expect(p.next()).To(Equal(OpPasskeyAnswer))
	p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now) // before the answer's own result
	p.Step(PasskeyAnswered{}, p.now)
	d := p.Next(p.now)
	g.Expect(d.Operation).To(Equal(OpNone))
	g.Expect(d.Publication.QR.Passkey.ConfirmationCode).To(Equal("WXYZ-1234"))
	p.write()
	g.Expect(p.Object().Status.Passkey.ConfirmationCode).To(Equal("WXYZ-1234"))
	g.Expect(p.message).To(ContainSubstring("status.passkey.confirmationCode"))

	p.annotate(v1alpha1.PasskeyConfirmAnnotation, "ABCD-EFGH2")
	op, events := p.reported()
	g.Expect(op).To(Equal(OpNone))
	g.Expect(events).To(ContainSubstring("it is not the present status.passkey.confirmationCode"))
	p.write()
	p.annotate(v1alpha1.PasskeyConfirmAnnotation, " wxyz-1234 ")
	g.Expect(p.next()).To(Equal(OpPasskeyConfirm))
	p.Step(PasskeyConfirmed{Why: "server returned error 400"}, p.now)
	g.Expect(p.reason).To(Equal(v1alpha1.ReasonPasskeyFailed))
	g.Expect(p.next()).To(Equal(OpClose), "the exchange cannot be taken up again")
}

func TestAPasskeyThatIsNotAnswered(t *testing.T) {
	request := newAccount(t).request(challenge)
	for name, tt := range map[string]struct {
		do     func(g Gomega, p *machineTest)
		reason string
		event  string
	}{
		"within WhatsApp's own time": {func(_ Gomega, p *machineTest) {
			p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: request, Until: p.now.Add(time.Minute)}, p.now)
			p.now = p.now.Add(time.Minute)
		}, v1alpha1.ReasonPasskeyExpired, "not answered in time"},
		"though WhatsApp asks again and again": {func(_ Gomega, p *machineTest) {
			for range MaxPasskeyRequests {
				p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: request}, p.now)
			}
		}, v1alpha1.ReasonPasskeyFailed, "asked for the passkey 4 times"},
		"because it is asked for with a megabyte": {func(_ Gomega, p *machineTest) {
			p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: `"` + strings.Repeat("a", 1<<20) + `"`}, p.now)
		}, v1alpha1.ReasonPasskeyFailed, "cannot be used"},
		"because the request is no JSON": {func(_ Gomega, p *machineTest) {
			p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: "{"}, p.now)
		}, v1alpha1.ReasonPasskeyFailed, "cannot be used"},
		"because the connection is lost": {func(_ Gomega, p *machineTest) {
			p.Step(Event{Type: EventDisconnected, Reason: EndSocketClosed, Message: "the network"}, p.now)
		}, v1alpha1.ReasonReconnecting, v1alpha1.ReasonPasskeyExpired + ": the connection that asked"},
		"because WhatsApp offers new codes, and they run out": {func(_ Gomega, p *machineTest) {
			p.Step(Event{Type: EventQR, Codes: []string{"another"}}, p.now)
			p.now = p.now.Add(firstCode)
		}, v1alpha1.ReasonWaitingForScan, v1alpha1.ReasonPasskeyExpired + ": the connection that asked"},
		"because the client cannot go on": {func(_ Gomega, p *machineTest) {
			p.Step(Event{Type: EventPasskeyFailed, Message: "WhatsApp's continuation of the passkey cannot be read"}, p.now)
		}, v1alpha1.ReasonPasskeyFailed, "cannot be read"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			p := asked(t, request)
			tt.do(g, p)
			op, events := p.reported()
			g.Expect(op).To(Equal(OpClose))
			g.Expect(events).To(ContainSubstring(tt.event))
			g.Expect(p.reason).To(Equal(tt.reason))
			g.Expect(p.want.Passkey).To(BeNil())
			p.Step(Closed{}, p.now)
			p.now = p.now.Add(backoffMax)
			g.Expect(p.next()).To(Equal(OpDial), "codes are offered again")
		})
	}
	t.Run("the time for pairing does not end meanwhile, and not much later", func(t *testing.T) {
		g := NewWithT(t)
		p := asked(t, request)
		p.now = p.now.Add(passkeyTimeout - time.Minute)
		for range MaxPasskeyRequests - 1 {
			p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: request}, p.now)
		}
		g.Expect(p.next()).To(Equal(OpNone))
		p.now = p.now.Add(time.Minute)
		g.Expect(p.next()).To(Equal(OpClose), "asking again does not prolong it")
		p.Step(Closed{}, p.now)
		g.Expect(p.next()).To(Equal(OpNone))
		g.Expect(p.want.Phase).To(Equal(v1alpha1.PhasePairingExpired))
	})
}

func TestAPasskeyAnswerThatWhatsAppRefuses(t *testing.T) {
	g := NewWithT(t)
	mine := newAccount(t)
	request := mine.request(challenge)
	p := asked(t, request)
	p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(request, wapasskey.Origin))
	g.Expect(p.next()).To(Equal(OpPasskeyAnswer))
	p.Step(PasskeyAnswered{Why: "server returned error 401"}, p.now)
	op, events := p.reported()
	g.Expect(op).To(Equal(OpNone))
	g.Expect(events).To(ContainSubstring("WhatsApp did not accept it (server returned error 401)"))
	p.write()
	t.Log("another answer is sent")
	p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(request, wapasskey.Origin))
	g.Expect(p.next()).To(Equal(OpPasskeyAnswer))
	p.Step(PasskeyAnswered{}, p.now)
	p.write()
	p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(request, wapasskey.Origin))
	op, events = p.reported()
	g.Expect(op).To(Equal(OpNone))
	g.Expect(events).To(ContainSubstring("an answer was given before"))
}

// The session moves while a passkey is asked for: the worker that it leaves reports it, once.
func TestAPasskeyIsLostWithAMove(t *testing.T) {
	g := NewWithT(t)
	p := asked(t, newAccount(t).request(challenge))
	p.next()
	p.write()
	p.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
	var events string
	for range 6 {
		op, reported := p.reported()
		events += reported
		if op == OpClose {
			p.Step(Closed{}, p.now)
		}
		p.Step(Published{}, p.now)
		p.write()
	}
	g.Expect(events).To(Equal(v1alpha1.ReasonPasskeyExpired + ": " + PasskeyLostMessage + "\n"))
	g.Expect(p.Object().Status.HeldBy).To(BeEmpty())
	g.Expect(p.Object().Status.Passkey).To(BeNil())
}

// A process dies while a passkey is asked for.
func TestAPasskeyIsLostWithItsProcess(t *testing.T) {
	g := NewWithT(t)
	mine := newAccount(t)
	request := mine.request(challenge)
	p := asked(t, request)
	p.next()
	p.write()
	left := p.Object().DeepCopy()
	g.Expect(left.Status.Passkey).NotTo(BeNil())
	left.Annotations = map[string]string{v1alpha1.PasskeyResponseAnnotation: mine.answer(request, wapasskey.Origin)}
	left.Status.HolderStart = "died"
	next := newMachineTest(left, func() float64 { return 0.5 })
	var events string
	for range 8 {
		d := next.Next(next.now)
		for _, e := range d.Events {
			events += e.Reason + "\n"
		}
		switch d.Operation {
		case OpToken:
			next.Step(TokenResult{Granted: true}, next.now)
		case OpTake:
			next.Step(Taken{Epoch: next.Object().Status.Epoch, Device: Device{Starts: 2}}, next.now)
		}
		next.write()
	}
	g.Expect(events).To(Equal("PasskeyExpired\n"))
	g.Expect(next.Object().Status.Passkey).To(BeNil())

	t.Log("the answer that was given meanwhile is for a request that is gone")
	next.Step(Dialed{}, next.now)
	next.Step(Event{Type: EventQR, Codes: []string{"code"}}, next.now)
	next.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: mine.request("another challenge")}, next.now)
	op, refused := next.reported()
	g.Expect(op).To(Equal(OpNone))
	g.Expect(refused).To(ContainSubstring("it answers another request"))
}

package whatsapp

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waCompanionReg"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// recentStanzas are the nodes that WhatsApp has sent since 2026, by name. FuzzNodes has them
// as seeds, too.
func recentStanzas() map[string]waBinary.Node {
	const at = "1700000000"
	notification := func(kind string, children ...waBinary.Node) waBinary.Node {
		return element("notification", attrs{"from": types.ServerJID, "id": "1", "type": kind, "t": at}, children...)
	}
	mex := func(operation, data string) waBinary.Node {
		return notification("mex", waBinary.Node{Tag: "update", Attrs: attrs{"op_name": operation}, Content: []byte(data)})
	}
	marshal := func(message proto.Message) []byte {
		content, err := proto.Marshal(message)
		if err != nil {
			panic(err)
		}
		return content
	}
	continuation := marshal(&waCompanionReg.PrimaryEphemeralIdentity{PublicKey: append([]byte{9}, make([]byte, 31)...), Nonce: make([]byte, 32)})
	lid := types.NewJID("1", types.HiddenUserServer)
	token := waBinary.Node{Tag: "token", Attrs: attrs{"jid": itself, "type": "trusted_contact", "t": at}, Content: []byte{1}}
	private := notification("privacy_token", element("tokens", nil, token))
	private.Attrs["from"], private.Attrs["sender_lid"] = someone, lid
	return map[string]waBinary.Node{
		"refresh of the codes":  notification("companion_reg_refresh", element("companion_reg_refresh", nil)),
		"rotation of the codes": notification("companion_reg_refresh", element("pair-device-rotate-qr", nil)),
		"passkey's request": notification("passkey_prologue_request", leaf("passkey_request_options",
			[]byte(`{"challenge":"AAAA","timeout":60000,"rpId":"whatsapp.com","allowCredentials":[{"id":"AAAA","type":"public-key","transports":["hybrid"]}],"userVerification":"required","extensions":{"uvm":true}}`))),
		"passkey's continuation with a weak key": notification("crsc_continuation", leaf("primary_ephemeral_identity",
			marshal(&waCompanionReg.PrimaryEphemeralIdentity{PublicKey: make([]byte, 32), Nonce: make([]byte, 32)}))),
		"passkey's continuation": notification("crsc_continuation", leaf("primary_ephemeral_identity", continuation)),
		"codes":                  element("iq", attrs{"from": types.ServerJID, "id": "1", "type": "set"}, element("pair-device", nil, leaf("ref", []byte("a")), leaf("ref", []byte("b")))),
		"end of a pairing": element("iq", attrs{"from": types.ServerJID, "id": "1", "type": "set"}, element("pair-success", nil, leaf("device-identity", []byte{10, 1, 1}),
			element("biz", attrs{"name": "x"}), element("device", attrs{"jid": types.JID{User: "1", Device: 1, Server: types.DefaultUserServer}, "lid": types.JID{User: "2", Device: 1, Server: types.HiddenUserServer}}),
			element("platform", attrs{"name": "android"}), leaf("client-props", marshal(&waCompanionReg.ClientPairingProps{IsChatDbLidMigrated: proto.Bool(true)})))),
		"unified session":      element("ib", attrs{"from": types.ServerJID}, element("unified_session", attrs{"id": "1"})),
		"old phone":            element("ib", attrs{"from": types.ServerJID}, element("downgrade_webclient", nil)),
		"privacy token":        private,
		"reach-out lock":       mex("NotificationUserReachoutTimelockUpdate", `{"data":{"xwa2_notify_account_reachout_timelock":{"is_active":true,"time_enforcement_ends":"1700000000","enforcement_type":"x"}}}`),
		"status of a channel":  element("status", attrs{"from": types.NewJID("1", types.NewsletterServer), "id": "1", "t": at, "server_id": "1", "type": "text"}, leaf("plaintext", []byte{10, 1, 65}), element("meta", attrs{"msg_edit_t": at})),
		"status of a contact":  element("status", attrs{"from": someone, "id": "1", "t": at, "type": "text"}, element("enc", attrs{"v": "2", "type": "msg"})),
		"login with a LID":     element("success", attrs{"t": at, "lid": lid, "location": "x", "props": "2", "creation": at}),
		"answer to a question": element("iq", attrs{"from": types.ServerJID, "id": "nobody asked", "type": "result"}, leaf("ref", []byte("x"))),
	}
}

const megabyte = 1 << 20

// wrongForms are the frames of a node with one thing wrong: what variants makes of it, a
// megabyte in the place of each content and attribute, many children in the place of one,
// other senders, an attribute twice, and the right node, twice.
func wrongForms(node waBinary.Node) (frames [][]byte) {
	all := append(variants(node), enlarged(node)...)
	for _, from := range []types.JID{someone, itself, group, types.NewJID("1", types.NewsletterServer), types.StatusBroadcastJID, {}} {
		other := clone(node)
		other.Attrs["from"] = from
		all = append(all, other)
	}
	for _, wrong := range all {
		frames = append(frames, encode(wrong))
	}
	for key := range node.Attrs {
		for _, value := range []any{"another", someone} {
			frames = append(frames, doubled(node, key, value))
		}
	}
	return append(frames, encode(node), encode(node))
}

// enlarged are variants with something huge in the place of each part.
func enlarged(node waBinary.Node) (out []waBinary.Node) {
	for key := range node.Attrs {
		huge := clone(node)
		huge.Attrs[key] = strings.Repeat("1", megabyte)
		out = append(out, huge)
	}
	children := node.GetChildren()
	if len(children) == 0 {
		for _, content := range []any{bytes.Repeat([]byte("1"), megabyte), bytes.Repeat([]byte(`{"a":`), megabyte/5), []byte(`{"challenge":"` + strings.Repeat("A", megabyte) + `"}`)} {
			huge := clone(node)
			huge.Content = content
			out = append(out, huge)
		}
		return out
	}
	for i, child := range children {
		many := clone(node)
		for range 1000 {
			many.Content = append(many.GetChildren(), clone(child))
		}
		out = append(out, many)
		for _, huge := range enlarged(child) {
			copied := clone(node)
			copied.GetChildren()[i] = huge
			out = append(out, copied)
		}
	}
	return out
}

// doubled is the frame of a node that has an attribute once more, with another value.
func doubled(node waBinary.Node, key string, value any) []byte {
	tag := encode(waBinary.Node{Tag: node.Tag})[3:] // after the flags, the kind of list and its size
	pair := encode(waBinary.Node{Tag: node.Tag, Attrs: attrs{key: value}})[3+len(tag):]
	frame := encode(node)
	frame[2] += 2
	return bytes.Join([][]byte{frame[:3+len(tag)], pair, frame[3+len(tag):]}, nil)
}

func TestDoubledAttribute(t *testing.T) {
	g := NewWithT(t)
	node, err := decodeNode(doubled(element("ib", attrs{"from": types.ServerJID}, element("x", nil)), "from", "another"))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(node.Tag).To(Equal("ib"))
	g.Expect(node.Attrs).To(HaveKey("from"))
	g.Expect(node.GetChildren()).To(HaveLen(1))
}

// longestLine is the longest line of a log.
type longestLine struct {
	mu   sync.Mutex
	line string
}

func (l *longestLine) logger() logr.Logger {
	return funcr.New(func(_, args string) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(args) > len(l.line) {
			l.line = args
		}
	}, funcr.Options{Verbosity: clientVerbosity})
}

func (l *longestLine) expectBounded(g *WithT) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g.Expect(len(l.line)).To(BeNumerically("<=", 16<<10), "a line of the log: %.200s", l.line)
}

// expectBounded checks that no field of an event is longer than the API allows, or has
// characters that a terminal would obey.
func expectBounded(g *WithT, e Event) {
	bound := func(what, text string, limit int) {
		g.Expect(len(text)).To(BeNumerically("<=", limit), "%s of %s", what, e.Type)
		g.Expect(status.Clean(text, limit)).To(Equal(text), "%s of %s", what, e.Type)
	}
	bound("the message", e.Message, maxMessage)
	bound("the reason", e.Reason, maxReason)
	bound("the passkey's request", e.PasskeyOptions, session.MaxPasskeyJSON)
	bound("the code to compare", e.Code, 16)
	for _, code := range e.Codes {
		bound("a code", code, maxCode)
	}
	g.Expect(len(e.Codes)).To(BeNumerically("<=", maxCodes), "codes")
	for what, text := range map[string]string{"the JID": e.JID, "the LID": e.LID, "the phone number": e.PhoneNumber, "the name": e.PushName} {
		bound(what, text, maxName)
	}
}

// TestTodaysStanzasInEveryWrongForm plays every wrong form of every stanza to a real client in
// each state of its life. The client handles what comes next, or has ended with a reason;
// what it reports and logs is bounded. TestMain fails if a goroutine is left.
func TestTodaysStanzasInEveryWrongForm(t *testing.T) {
	for name, mode := range map[string]hostileMode{
		"linked": linkedClient, "offering codes": scanningClient, "asked for a passkey": askedClient, "waiting to be linked": answeredClient,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHostile(t, mode)
			defer h.close()
			var log longestLine
			h.log = log.logger()
			for name, node := range recentStanzas() {
				t.Run(name, func(t *testing.T) {
					g := wait(t)
					frames := wrongForms(node)
					for n := 0; n < len(frames); n += 10 {
						s := h.connect(g)
						h.play(g, frames[n:min(n+10, len(frames))]...)
						for _, e := range s.events() {
							expectBounded(g, e)
						}
					}
					log.expectBounded(g)
				})
			}
		})
	}
}

// TestTodaysAnswersInEveryWrongForm answers what a client asks while it is linked with a
// passkey with every wrong form of the answer. Each step ends with an error or a success, and
// the right answers still link the device afterwards.
func TestTodaysAnswersInEveryWrongForm(t *testing.T) {
	h := newHostile(t, askedClient)
	defer h.close()
	var log longestLine
	h.log = log.logger()
	fromServer := func(kind string, children ...waBinary.Node) waBinary.Node {
		return element("iq", attrs{"type": kind, "from": types.ServerJID}, children...)
	}
	unreadable := encode(element("notification", attrs{"from": types.ServerJID, "id": "1", "type": "passkey_prologue_request"}, leaf("passkey_request_options", []byte("{"))))
	answer := func(g *WithT) error {
		s := h.connect(g)
		return s.AnswerPasskey(t.Context(), h.answer(g))
	}
	confirmation := func(g *WithT) {
		s := h.connect(g)
		before := len(s.events())
		g.Expect(s.AnswerPasskey(t.Context(), h.answer(g))).To(Succeed())
		g.Eventually(func() []Event { return s.events()[before:] }).Should(ContainElement(HaveField("Type", BeElementOf(EventPasskeyConfirmation, EventPasskeyFailed))))
	}
	for tag, step := range map[string]struct {
		right waBinary.Node
		do    func(g *WithT)
	}{
		"ref":                     {fromServer("result", leaf("ref", []byte("x"))), func(g *WithT) { _ = answer(g) }},
		"passkey_prologue":        {fromServer("result"), func(g *WithT) { _ = answer(g) }},
		"companion_nonce":         {fromServer("result"), confirmation},
		"passkey_request_options": {fromServer("result", leaf("passkey_request_options", []byte(`{"challenge":"AAAA"}`))), func(g *WithT) { h.play(g, unreadable) }},
		"encrypted_pairing_request": {fromServer("result"), func(g *WithT) {
			_ = h.connect(g).ConfirmPasskey(t.Context())
		}},
	} {
		t.Run(tag, func(t *testing.T) {
			g := wait(t)
			if tag == "encrypted_pairing_request" {
				confirmation(g)
			}
			wrong := append(append(variants(step.right), enlarged(step.right)...),
				fromServer("error"), fromServer("error", element("error", nil)), fromServer("error", element("error", attrs{"code": "401", "text": strings.Repeat("x", megabyte)})),
				fromServer("error", waBinary.Node{Tag: "error", Content: bytes.Repeat([]byte("x"), megabyte)}))
			for _, wrong := range wrong {
				if kind, _ := wrong.Attrs["type"].(string); kind == "result" && tag == "encrypted_pairing_request" {
					continue // a success ends the exchange
				}
				h.w.simulator.AnswerWith(func(request *waBinary.Node) *waBinary.Node {
					if _, ok := request.GetOptionalChildByTag(tag); !ok {
						return nil
					}
					copied := clone(wrong)
					return &copied
				})
				step.do(g)
				for _, e := range h.session.events() {
					expectBounded(g, e)
				}
				if h.session.ctx.Err() != nil {
					h.close()
				}
			}
			h.w.simulator.AnswerWith(nil)
			log.expectBounded(g)
		})
	}
	t.Run("right again", func(t *testing.T) {
		g := wait(t)
		h.close()
		confirmation(g)
		g.Expect(h.session.ConfirmPasskey(t.Context())).To(Succeed())
		g.Eventually(h.session.events).Should(ContainElement(HaveField("Type", EventPairSuccess)))
	})
}

// TestErrorsOfAnswersAreBounded: what WhatsApp writes into an answer is not written into a log.
func TestErrorsOfAnswersAreBounded(t *testing.T) {
	w := newEnvironment(t)
	w.hostile = true
	s := w.connect(w.take())
	s.event(EventQR)
	for name, content := range map[string]waBinary.Node{
		"a text":          element("error", attrs{"code": "401", "text": strings.Repeat("x", megabyte)}),
		"no code":         element("error", attrs{"text": strings.Repeat("x", megabyte)}),
		"another element": element("other", attrs{"text": strings.Repeat("\x1b[2J", megabyte/4)}),
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			w.simulator.AnswerWith(func(*waBinary.Node) *waBinary.Node {
				answer := element("iq", attrs{"type": "error", "from": types.ServerJID}, clone(content))
				return &answer
			})
			err := s.AnswerPasskey(t.Context(), "{}")
			g.Expect(err).To(HaveOccurred())
			g.Expect(len(err.Error())).To(BeNumerically("<", 1000))
			g.Expect(err.Error()).NotTo(ContainSubstring("\x1b"))
		})
	}
}

// TestALinkedDeviceIsNotLinkedAgain: nothing that belongs to a pairing changes a linked device.
func TestALinkedDeviceIsNotLinkedAgain(t *testing.T) {
	w, _, s := linked(t)
	w.hostile = true
	secret, id := bytes.Clone(s.options.Device.AdvSecretKey), *s.options.Device.ID
	for _, name := range []string{"refresh of the codes", "rotation of the codes", "passkey's request", "codes", "end of a pairing"} {
		w.g.Expect(w.simulator.Play(phone, encode(recentStanzas()[name]))).To(Succeed())
	}
	w.send("after")
	w.g.Eventually(s.texts).Should(Equal([]string{"after"}))
	w.g.Expect(s.options.Device.AdvSecretKey).To(Equal(secret))
	w.g.Expect(*s.options.Device.ID).To(Equal(id))
	for _, e := range s.events() {
		w.g.Expect(e.Type).To(BeElementOf(EventConnected, EventPushName))
	}
}

// TestOnlyWhatsAppReplacesTheCodes: a contact, or nobody, does not.
func TestOnlyWhatsAppReplacesTheCodes(t *testing.T) {
	w := newEnvironment(t)
	s := w.connect(w.take())
	codes := s.event(EventQR).Codes
	for _, from := range []any{someone, group, nil, "s.whatsapp.net.example"} {
		node := clone(recentStanzas()["refresh of the codes"])
		if node.Attrs["from"] = from; from == nil {
			delete(node.Attrs, "from")
		}
		w.g.Expect(w.simulator.Play("", encode(node))).To(Succeed())
	}
	w.g.Expect(w.simulator.Play("", encode(recentStanzas()["refresh of the codes"]))).To(Succeed())
	replaced := s.event(EventCodesReplaced).Codes
	w.g.Expect(replaced).NotTo(Equal(codes))
	w.g.Expect(s.events()).To(HaveLen(2), "once")
	_, err := w.simulator.Scan(t.Context(), replaced[0], phone)
	w.g.Expect(err).NotTo(HaveOccurred())
}

// askForPasskey scans a code of a session whose server asks for a passkey.
func askForPasskey(t *testing.T) (*environment, *testSession, Event) {
	t.Helper()
	w := newEnvironment(t)
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultPasskey})
	w.g.Expect(err).NotTo(HaveOccurred())
	s := w.connect(w.take())
	_, err = w.simulator.Scan(t.Context(), s.event(EventQR).Codes[0], phone)
	w.g.Expect(err).NotTo(HaveOccurred())
	request := s.event(EventPasskeyRequest)
	return w, s, request
}

// TestARepeatedRequestCanBeAnswered: the client proves with the secret of the code that was
// scanned that it showed it, also after further requests.
func TestARepeatedRequestCanBeAnswered(t *testing.T) {
	w, s, asked := askForPasskey(t)
	for range 2 {
		w.g.Expect(w.simulator.Play("", encode(element("notification", attrs{"from": types.ServerJID, "id": "1", "type": "passkey_prologue_request"},
			leaf("passkey_request_options", []byte(asked.PasskeyOptions)))))).To(Succeed())
	}
	w.g.Eventually(s.events).Should(HaveLen(4))
	answer, err := w.simulator.AnswerPasskey(phone, []byte(asked.PasskeyOptions))
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.AnswerPasskey(t.Context(), string(answer))).To(Succeed())
	s.event(EventPasskeyConfirmation)
	w.g.Expect(s.ConfirmPasskey(t.Context())).To(Succeed())
	s.event(EventPairSuccess)
}

// TestAPersonComparesTheCodes: whatsmeow proves once to each request that it showed the code
// that was scanned. An answer without that proof, as after five minutes, needs a person.
func TestAPersonComparesTheCodes(t *testing.T) {
	w, s, asked := askForPasskey(t)
	answer, err := w.simulator.AnswerPasskey(phone, []byte(asked.PasskeyOptions))
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.AnswerPasskey(t.Context(), string(answer))).To(Succeed())
	w.g.Expect(s.event(EventPasskeyConfirmation).Code).To(BeEmpty(), "the first answer has the proof")
	w.g.Expect(s.AnswerPasskey(t.Context(), string(answer))).To(Succeed())
	var code string
	w.g.Eventually(func() string { code = s.events()[len(s.events())-1].Code; return code }).Should(MatchRegexp("^[1-9A-Z]{4}-[1-9A-Z]{4}$"))
	w.g.Expect(w.simulator.ConfirmationCode(phone)).To(Equal(code), "the phone shows it")
	w.g.Expect(s.ConfirmPasskey(t.Context())).To(Succeed())
	s.event(EventPairSuccess)
}

// TestContinuationsWhileThePasskeyIsConfirmed: each changes what the confirmation reads.
func TestContinuationsWhileThePasskeyIsConfirmed(t *testing.T) {
	w, s, asked := askForPasskey(t)
	w.hostile = true
	answer, err := w.simulator.AnswerPasskey(phone, []byte(asked.PasskeyOptions))
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.AnswerPasskey(t.Context(), string(answer))).To(Succeed())
	s.event(EventPasskeyConfirmation)
	w.simulator.AnswerWith(func(request *waBinary.Node) *waBinary.Node {
		answer := element("iq", attrs{"type": "result", "from": types.ServerJID})
		if _, ok := request.GetOptionalChildByTag("encrypted_pairing_request"); ok {
			answer.Attrs["type"] = "error" // the exchange goes on
		}
		return &answer
	})
	for range 20 {
		w.g.Expect(w.simulator.Play("", encode(recentStanzas()["passkey's continuation"]))).To(Succeed())
		w.g.Expect(s.ConfirmPasskey(t.Context())).To(MatchError(ContainSubstring("confirming the passkey")))
	}
	w.g.Eventually(func() int { return len(s.events()) }).Should(BeNumerically(">=", 20))
}

// TestARefreshAfterARequestIsNotUndone: the next request is proved with the secret of the
// codes that are on show now.
func TestARefreshAfterARequestIsNotUndone(t *testing.T) {
	w := newEnvironment(t)
	s := w.connect(w.take())
	s.event(EventQR)
	secret := func() []byte { return s.options.Device.AdvSecretKey }
	play := func(name string) {
		g := NewWithT(t)
		before := s.received.Load()
		g.Expect(w.simulator.Play("", encode(recentStanzas()[name]))).To(Succeed())
		w.g.Eventually(func() bool { return s.received.Load() > before && s.queue.wait() == nil }).Should(BeTrue())
	}
	shown := bytes.Clone(secret())
	play("passkey's request")
	w.g.Expect(s.scanned).To(Equal(shown))
	for _, renewal := range []string{"refresh of the codes", "codes"} {
		play(renewal)
		w.g.Expect(s.scanned).To(BeNil())
		shown = bytes.Clone(secret())
		play("passkey's request")
		w.g.Expect(s.scanned).To(Equal(shown))
	}
}

// A step whose answer does not come ends with its context, and the next one succeeds.
func TestAStepOfAPasskeyWithoutAnAnswer(t *testing.T) {
	w, s, asked := askForPasskey(t)
	answer, err := w.simulator.AnswerPasskey(phone, []byte(asked.PasskeyOptions))
	w.g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	w.simulator.AnswerWith(func(*waBinary.Node) *waBinary.Node { return &waBinary.Node{Tag: "ignored"} })
	w.g.Expect(s.AnswerPasskey(ctx, string(answer))).To(MatchError(context.DeadlineExceeded))
	w.simulator.AnswerWith(nil)
	w.g.Expect(s.AnswerPasskey(t.Context(), string(answer))).To(Succeed())
}

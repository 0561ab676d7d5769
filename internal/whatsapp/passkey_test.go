package whatsapp

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
)

func TestPairingWithAPasskey(t *testing.T) {
	for _, method := range []string{"after a scan", "after a code was typed"} {
		t.Run(method, func(t *testing.T) {
			w := newEnvironment(t)
			_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultPasskey})
			w.g.Expect(err).NotTo(HaveOccurred())
			taking := w.take()
			var jid string
			var s *testSession
			if method == "after a scan" {
				s = w.connect(taking)
				jid, err = w.simulator.Scan(t.Context(), s.event(EventQR).Codes[0], phone)
			} else {
				s = w.connect(taking, func(o *Options) { o.PairPhone = "+" + phone })
				jid, err = w.simulator.EnterCode(t.Context(), phone, s.event(EventPairingCode).Code)
			}
			w.g.Expect(err).NotTo(HaveOccurred())
			asked := s.event(EventPasskeyRequest)
			w.g.Expect(asked.Until).To(BeTemporally("~", time.Now().Add(10*time.Minute), time.Minute))

			answer := func(phone, request string) string {
				answer, err := w.simulator.AnswerPasskey(phone, []byte(request))
				w.g.Expect(err).NotTo(HaveOccurred())
				return string(answer)
			}
			for name, wrong := range map[string]string{
				"another account's passkey": answer("34600999888", asked.PasskeyOptions),
				"another challenge":         answer(phone, `{"challenge":"AAAA","rpId":"whatsapp.com"}`),
				"another relying party":     answer(phone, strings.Replace(asked.PasskeyOptions, "whatsapp.com", "example.com", 1)),
				"nothing":                   `{}`,
			} {
				w.g.Expect(s.AnswerPasskey(t.Context(), wrong)).To(MatchError(ContainSubstring("sending the answer of the passkey")), name)
			}
			right := answer(phone, asked.PasskeyOptions)
			w.g.Expect(session.CheckPasskeyResponse(asked.PasskeyOptions, right)).To(Succeed())
			w.g.Expect(s.AnswerPasskey(t.Context(), right)).To(Succeed())
			w.g.Expect(s.event(EventPasskeyConfirmation).Code).To(BeEmpty(), "WhatsApp has seen the proof that it is the client that was scanned")
			w.g.Expect(w.simulator.ConfirmationCode(phone)).To(MatchRegexp("^[1-9A-Z]{4}-[1-9A-Z]{4}$"))
			w.g.Expect(s.ConfirmPasskey(t.Context())).To(Succeed())
			w.g.Expect(s.event(EventPairSuccess).JID).To(Equal(jid))
			w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("StreamError515"))
			s.Close()

			s = w.connect(taking)
			w.g.Expect(s.event(EventConnected).JID).To(Equal(jid))
		})
	}
}

// Each request is reported, the one that replaces another too.
func TestAPasskeyIsAskedForTwice(t *testing.T) {
	w := newEnvironment(t)
	s := w.connect(w.take())
	s.event(EventQR)
	ask := func(challenge string) {
		w.g.Expect(w.simulator.Play("", encode(element("notification", attrs{"from": types.ServerJID, "id": challenge, "type": "passkey_prologue_request"},
			leaf("passkey_request_options", []byte(`{"challenge":"`+challenge+`"}`)))))).To(Succeed())
	}
	ask("AAAA")
	first := s.event(EventPasskeyRequest)
	w.g.Expect(first.PasskeyOptions).To(MatchJSON(`{"challenge":"AAAA"}`))
	w.g.Expect(first.Until).To(BeZero())
	ask("BBBB")
	w.g.Eventually(s.events).Should(ContainElement(HaveField("PasskeyOptions", `{"challenge":"BBBB"}`)))
}

// nested is an object with as many objects in one another.
func nested(levels int) map[string]any {
	value := map[string]any{}
	for range levels {
		value = map[string]any{"a": value}
	}
	return value
}

func TestPasskeyRequest(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for name, tt := range map[string]struct {
		in   *types.WebAuthnPublicKey
		want string // JSON; empty: it fails
		ends time.Time
	}{
		"nothing":      {},
		"no challenge": {in: &types.WebAuthnPublicKey{RelyingPartID: "whatsapp.com"}},
		"a challenge":  {in: &types.WebAuthnPublicKey{Challenge: []byte("a")}, want: `{"challenge":"YQ"}`},
		"all": {in: &types.WebAuthnPublicKey{
			Challenge: []byte("a"), Timeout: 60000, RelyingPartID: "whatsapp.com", UserVerification: "required", Extensions: map[string]any{"uvm": true},
			AllowCredentials: []types.AllowedCredential{{ID: []byte("b"), Type: "public-key", Transports: []string{"hybrid"}}, {ID: []byte("c"), Type: "public-key"}},
		}, want: `{"challenge":"YQ","timeout":60000,"rpId":"whatsapp.com","userVerification":"required","extensions":{"uvm":true},
			"allowCredentials":[{"id":"Yg","type":"public-key","transports":["hybrid"]},{"id":"Yw","type":"public-key"}]}`, ends: now.Add(time.Minute)},
		"a time that cannot be":       {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), Timeout: -1}, want: `{"challenge":"YQ"}`},
		"a time of years":             {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), Timeout: 1 << 60}, want: `{"challenge":"YQ","timeout":86400000}`, ends: now.Add(24 * time.Hour)},
		"the page itself":             {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), RelyingPartID: "web.whatsapp.com"}, want: `{"challenge":"YQ","rpId":"web.whatsapp.com"}`},
		"another site":                {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), RelyingPartID: "bank.example"}},
		"a site that ends alike":      {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), RelyingPartID: "notwhatsapp.com"}},
		"all sites":                   {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), RelyingPartID: "com"}},
		"control characters":          {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), UserVerification: "\u009b2J\u202e"}},
		"a zero in a text":            {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), UserVerification: "\x00"}, want: `{"challenge":"YQ","userVerification":"\u0000"}`},
		"nested as deep as real ones": {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), Extensions: nested(2)}, want: `{"challenge":"YQ","extensions":{"a":{"a":{}}}}`},
		"deeply nested":               {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), Extensions: nested(600)}},
		"a megabyte":                  {in: &types.WebAuthnPublicKey{Challenge: make([]byte, 1<<20)}},
		"many credentials":            {in: &types.WebAuthnPublicKey{Challenge: []byte("a"), AllowCredentials: make([]types.AllowedCredential, 10000)}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			e, ok := Translate(&events.PairPasskeyRequest{PublicKey: tt.in}, now)
			g.Expect(ok).To(BeTrue())
			if tt.want == "" {
				g.Expect(e.Type).To(Equal(EventPasskeyFailed))
				g.Expect(e.Message).NotTo(BeEmpty())
				return
			}
			g.Expect(e.Type).To(Equal(EventPasskeyRequest))
			g.Expect(e.PasskeyOptions).To(MatchJSON(tt.want))
			g.Expect(json.Valid([]byte(e.PasskeyOptions))).To(BeTrue())
			g.Expect(e.Until).To(Equal(tt.ends))
		})
	}
}

// A continuation that nobody asked for, and steps without a request, end no process.
func TestPasskeyStepsOutOfOrder(t *testing.T) {
	w := newEnvironment(t)
	s := w.connect(w.take())
	s.event(EventQR)
	w.g.Expect(w.simulator.Play("", encode(element("notification", attrs{"from": types.ServerJID, "id": "1", "type": "crsc_continuation"},
		leaf("primary_ephemeral_identity", []byte("x")))))).To(Succeed())
	w.g.Expect(s.event(EventPasskeyFailed).Message).To(ContainSubstring("passkey"))
	w.g.Expect(s.ConfirmPasskey(t.Context())).To(MatchError(ContainSubstring("confirming the passkey")))
	w.g.Expect(s.AnswerPasskey(t.Context(), "[]")).To(MatchError(ContainSubstring("cannot be read")))
}

// A request that cannot be read is asked for again, and the pairing goes on without waiting
// for a time-out where WhatsApp does not answer that either.
func TestAPasskeyRequestThatCannotBeRead(t *testing.T) {
	for name, content := range map[string]string{"no JSON": "{", "another form": `{"challenge":7}`, "nothing": ""} {
		t.Run(name, func(t *testing.T) {
			w := newEnvironment(t)
			w.hostile = true // the simulator counts the question, because it has asked for no passkey
			s := w.connect(w.take())
			s.event(EventQR)
			w.g.Expect(w.simulator.Play("", encode(element("notification", attrs{"from": types.ServerJID, "id": "1", "type": "passkey_prologue_request"},
				leaf("passkey_request_options", []byte(content)))))).To(Succeed())
			w.g.Expect(s.event(EventPasskeyFailed).Message).To(ContainSubstring("passkey"))
		})
	}
}

// TestACheckedAnswerCanBeRead: what session.CheckPasskeyResponse lets through, whatsmeow reads.
// Otherwise the person would hear from WhatsApp, later, without a sentence that says what to change.
func TestACheckedAnswerCanBeRead(t *testing.T) {
	g := NewWithT(t)
	key, err := passkey.New()
	g.Expect(err).NotTo(HaveOccurred())
	request, err := key.Request([]byte("0123456789abcdef"), time.Minute)
	g.Expect(err).NotTo(HaveOccurred())
	right, err := key.Answer(request, passkey.Origin)
	g.Expect(err).NotTo(HaveOccurred())
	checked, read := 0, 0
	check := func(a map[string]any) {
		text, err := json.Marshal(a)
		g.Expect(err).NotTo(HaveOccurred())
		checked++
		if session.CheckPasskeyResponse(string(request), string(text)) != nil {
			return
		}
		read++
		var r types.WebAuthnResponse
		g.Expect(json.Unmarshal(text, &r)).To(Succeed(), string(text))
	}
	parse := func() (all, response map[string]any) {
		g.Expect(json.Unmarshal(right, &all)).To(Succeed())
		return all, all["response"].(map[string]any)
	}
	all, response := parse()
	check(all)
	for _, value := range []any{nil, "", "=", "AA==", "A", "AA A", "AA\nAA", "+/", 7, true, []any{}, map[string]any{}, []any{"AA"}} {
		for field := range all {
			changed, _ := parse()
			changed[field] = value
			check(changed)
		}
		for field := range response {
			changed, inner := parse()
			inner[field] = value
			check(changed)
		}
	}
	g.Expect(read).To(BeNumerically(">", 1))
	g.Expect(read).To(BeNumerically("<", checked))
}

package passkey_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
)

func TestVerify(t *testing.T) {
	challenge, other := []byte("0123456789abcdef0123456789abcdef"), []byte("fedcba9876543210fedcba9876543210")
	key, err := passkey.New()
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := passkey.New()
	if err != nil {
		t.Fatal(err)
	}
	answer := func(t *testing.T, p *passkey.Passkey, challenge []byte, origin string) []byte {
		t.Helper()
		g := NewWithT(t)
		request, err := p.Request(challenge, time.Minute)
		g.Expect(err).NotTo(HaveOccurred())
		answer, err := p.Answer(request, origin)
		g.Expect(err).NotTo(HaveOccurred())
		return answer
	}
	// with replaces a field of the answer.
	with := func(t *testing.T, answer []byte, field string, value any) []byte {
		t.Helper()
		g := NewWithT(t)
		var a map[string]any
		g.Expect(json.Unmarshal(answer, &a)).To(Succeed())
		in := a
		if name, nested := strings.CutPrefix(field, "response."); nested {
			in, field = a["response"].(map[string]any), name
		}
		in[field] = value
		changed, err := json.Marshal(a)
		g.Expect(err).NotTo(HaveOccurred())
		return changed
	}
	for name, tt := range map[string]struct {
		answer func(t *testing.T) []byte
		want   string // part of the error; empty: no error
	}{
		"right":           {answer: func(t *testing.T) []byte { return answer(t, key, challenge, passkey.Origin) }},
		"other challenge": {func(t *testing.T) []byte { return answer(t, key, other, passkey.Origin) }, "challenge"},
		"other page":      {func(t *testing.T) []byte { return answer(t, key, challenge, "https://web.whatsapp.example") }, "origin"},
		"other account":   {func(t *testing.T) []byte { return answer(t, stranger, challenge, passkey.Origin) }, "another passkey"},
		"other key": {func(t *testing.T) []byte {
			a := answer(t, stranger, challenge, passkey.Origin)
			var mine map[string]any
			if err := json.Unmarshal(answer(t, key, challenge, passkey.Origin), &mine); err != nil {
				t.Fatal(err)
			}
			return with(t, with(t, a, "id", mine["id"]), "rawId", mine["rawId"])
		}, "signature"},
		"other relying party": {func(t *testing.T) []byte {
			g := NewWithT(t)
			request, err := key.Request(challenge, time.Minute)
			g.Expect(err).NotTo(HaveOccurred())
			a, err := key.Answer([]byte(strings.Replace(string(request), passkey.RelyingParty, "example.com", 1)), passkey.Origin)
			g.Expect(err).NotTo(HaveOccurred())
			return a
		}, "RP Hash"},
		"no signature": {func(t *testing.T) []byte {
			return with(t, answer(t, key, challenge, passkey.Origin), "response.signature", "")
		}, "signature"},
		"not JSON": {func(*testing.T) []byte { return []byte("{") }, "reading the answer"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			err := key.Verify(challenge, tt.answer(t))
			if tt.want == "" {
				g.Expect(err).NotTo(HaveOccurred())
				return
			}
			g.Expect(err).To(MatchError(ContainSubstring(tt.want)))
		})
	}
}

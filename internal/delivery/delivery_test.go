package delivery

import (
	"cmp"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

func TestNumbers(t *testing.T) {
	tests := []struct {
		name string
		a, b Numbers
		want int
	}{
		{"the same", Numbers{1, 1}, Numbers{1, 1}, 0},
		{"a later update of one placement", Numbers{1, 2}, Numbers{1, 1}, 1},
		{"a later placement with a lower count", Numbers{2, 1}, Numbers{1, 9}, 1},
		{"a restart in place: the start rises, the count begins again", Numbers{1, FirstSeq(2) + 1}, Numbers{1, FirstSeq(1) + 4_000_000_000}, 1},
		{"the manager publishes under a higher epoch", Numbers{2, FirstSeq(0) + 1}, Numbers{1, FirstSeq(9)}, 1},
		{"larger than Lua's exact numbers", Numbers{1 << 53, 1<<53 + 1}, Numbers{1 << 53, 1 << 53}, 1},
		{"the largest", Numbers{math.MaxInt64, math.MaxInt64}, Numbers{math.MaxInt64, math.MaxInt64 - 1}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			g.Expect(tt.a.Newer(tt.b)).To(Equal(tt.want > 0))
			g.Expect(tt.b.Newer(tt.a)).To(BeFalse())
			g.Expect(cmp.Compare(tt.a.String(), tt.b.String())).To(Equal(tt.want), "scripts compare the text")
			g.Expect(tt.a.String()).To(HaveLen(NumbersWidth))
		})
	}
}

func TestJSONForLaravel(t *testing.T) {
	g := NewWithT(t)
	madrid := time.FixedZone("CET", 3600)
	at := Time{time.Date(2026, 3, 1, 13, 0, 0, 1_500_000, madrid)}

	item, err := StatusItem{
		SessionID: "shop", Status: Pending, Phase: "Pairing", Priority: Normal, OccurredAt: at, Numbers: Numbers{100, FirstSeq(1) + 2},
	}.Item()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(item.Payload)).To(MatchJSON(`{"session_id":"shop","status":"pending","phase":"Pairing","priority":"normal",
		"occurred_at":"2026-03-01T12:00:00.001Z","epoch":100,"seq":4294967298}`), "unknown fields are omitted")
	g.Expect(item.ExpiresAt).To(BeZero(), "a status never expires")

	item, err = QRItem{SessionID: "shop", QR: "code", Attempt: 1, GeneratedAt: at, ExpiresAt: Time{at.Add(time.Minute)}, Numbers: Numbers{100, 1}}.Item()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(item.Payload)).To(MatchJSON(`{"session_id":"shop","qr":"code","attempt":1,
		"generated_at":"2026-03-01T12:00:00.001Z","expires_at":"2026-03-01T12:01:00.001Z","epoch":100,"seq":1}`))
	g.Expect(item.ExpiresAt).To(BeTemporally("==", at.Add(time.Minute)))
	g.Expect(item.Priority).To(Equal(Normal))

	item, err = QRItem{SessionID: "shop", PairingCode: "ABCD-1234", Attempt: 1, GeneratedAt: at, ExpiresAt: at, ReplacesInvalid: true}.Item()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(item.Payload)).To(MatchJSON(`{"session_id":"shop","pairing_code":"ABCD-1234","attempt":1,
		"generated_at":"2026-03-01T12:00:00.001Z","expires_at":"2026-03-01T12:00:00.001Z","epoch":0,"seq":0}`))
	g.Expect(item.Priority).To(Equal(High))

	passkey := QRItem{SessionID: "shop", Passkey: &Passkey{RequestOptions: json.RawMessage(`{"challenge": "AAAA"}`)}, Attempt: 1, GeneratedAt: at, ExpiresAt: at}
	item, err = passkey.Item()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(item.Payload)).To(MatchJSON(`{"session_id":"shop","passkey":{"request_options":{"challenge":"AAAA"}},"attempt":1,
		"generated_at":"2026-03-01T12:00:00.001Z","expires_at":"2026-03-01T12:00:00.001Z","epoch":0,"seq":0}`))
	content, err := passkey.Content()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(item.Payload)).To(ContainSubstring(content), "the cache looks for it in the stored text")
}

func FuzzTime(f *testing.F) {
	for _, seed := range []string{`"2026-03-01T12:00:00.001Z"`, `"2026-03-01T13:00:00+01:00"`, `""`, `null`, `12`, `"yesterday"`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var at Time
		if json.Unmarshal([]byte(text), &at) != nil || at.UTC().Year() < 0 || at.UTC().Year() > 9999 {
			return
		}
		written, err := json.Marshal(at)
		if err != nil {
			t.Fatal(err)
		}
		var again Time
		if err := json.Unmarshal(written, &again); err != nil || !strings.HasSuffix(string(written), `Z"`) {
			t.Fatalf("%s became %s: %v", text, written, err)
		}
		if d := at.Sub(again.Time); d < 0 || d >= time.Millisecond {
			t.Fatalf("%s lost %s", text, d)
		}
	})
}

// The next claim of a kind uses the token of one that had no answer; a claim of another kind does not.
func TestTokens(t *testing.T) {
	g := NewWithT(t)
	var tokens Tokens
	next := func(kind Kind) string {
		token, used := tokens.Next(kind)
		g.Expect(used).To(BeFalse())
		return token
	}
	first, second := next(KindQR), next(KindQR)
	g.Expect(first).NotTo(Equal(second))
	tokens.Keep(KindQR, first)
	tokens.Keep(KindQR, second)
	next(KindStatus)
	for _, want := range []string{first, second} {
		token, used := tokens.Next(KindQR)
		g.Expect(used).To(BeTrue())
		g.Expect(token).To(Equal(want))
	}
	next(KindQR)
}

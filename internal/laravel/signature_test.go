package laravel

import (
	"cmp"
	"net/http"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

// The example is from the specification's reference libraries: so signatures of other
// libraries are accepted here, and ours are accepted there.
const (
	vectorSecret    = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	vectorID        = "msg_p5jXN8AQM9LWM0D4loKWxJek"
	vectorTime      = 1614265330
	vectorBody      = `{"test": 2432232314}`
	vectorSignature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
)

func secret(t *testing.T, text string) Secret {
	t.Helper()
	s, err := ParseSecret(text)
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	return s
}

func TestVectorOfTheSpecification(t *testing.T) {
	g := NewWithT(t)
	h := http.Header{}
	Sign(h, []Secret{secret(t, vectorSecret)}, vectorID, time.Unix(vectorTime, 0), []byte(vectorBody))
	g.Expect(h.Get(HeaderSignature)).To(Equal(vectorSignature))
}

func TestVerify(t *testing.T) {
	at := time.Unix(vectorTime, 0)
	old, fresh := secret(t, vectorSecret), secret(t, strings.Repeat("plain text ", 3))
	for _, row := range []struct {
		name    string
		signers []Secret
		known   []Secret
		change  func(http.Header)
		body    string
		now     time.Time
		want    error
	}{
		{name: "signed", signers: []Secret{old}, known: []Secret{old}},
		{name: "rotation, the receiver has the old secret", signers: []Secret{old, fresh}, known: []Secret{old}},
		{name: "rotation, the receiver has the new secret", signers: []Secret{old, fresh}, known: []Secret{fresh}},
		{name: "rotation, the receiver has both secrets already", signers: []Secret{old}, known: []Secret{fresh, old}},
		{name: "another secret", signers: []Secret{fresh}, known: []Secret{old}, want: ErrSignature},
		{name: "another body", signers: []Secret{old}, known: []Secret{old}, body: "{}", want: ErrSignature},
		{name: "another id", signers: []Secret{old}, known: []Secret{old}, change: func(h http.Header) { h.Set(HeaderID, "msg_x") }, want: ErrSignature},
		{name: "another time", signers: []Secret{old}, known: []Secret{old}, change: func(h http.Header) { h.Set(HeaderTimestamp, "1614265331") }, want: ErrSignature},
		{name: "no signature", signers: []Secret{old}, known: []Secret{old}, change: func(h http.Header) { h.Del(HeaderSignature) }, want: ErrSignature},
		{name: "only a signature of an unknown version", signers: []Secret{old}, known: []Secret{old}, change: func(h http.Header) { h.Set(HeaderSignature, "v2"+vectorSignature[2:]) }, want: ErrSignature},
		{name: "garbage next to the signature", signers: []Secret{old}, known: []Secret{old}, change: func(h http.Header) { h.Set(HeaderSignature, "v1,? v1a,x "+vectorSignature) }},
		{name: "no time", signers: []Secret{old}, known: []Secret{old}, change: func(h http.Header) { h.Del(HeaderTimestamp) }, want: ErrTimestamp},
		{name: "too old", signers: []Secret{old}, known: []Secret{old}, now: at.Add(DefaultTolerance + time.Second), want: ErrTimestamp},
		{name: "from the future", signers: []Secret{old}, known: []Secret{old}, now: at.Add(-DefaultTolerance - time.Second), want: ErrTimestamp},
	} {
		t.Run(row.name, func(t *testing.T) {
			h := http.Header{}
			Sign(h, row.signers, vectorID, at, []byte(vectorBody))
			if row.change != nil {
				row.change(h)
			}
			err := Verify(h, row.known, cmp.Or(row.now, at), DefaultTolerance, []byte(cmp.Or(row.body, vectorBody)))
			if row.want == nil {
				NewWithT(t).Expect(err).NotTo(HaveOccurred())
			} else {
				NewWithT(t).Expect(err).To(MatchError(row.want))
			}
		})
	}
}

func TestParseSecret(t *testing.T) {
	for _, row := range []struct {
		name, text string
		ok         bool
	}{
		{"whsec_", vectorSecret, true},
		{"plain text", strings.Repeat("x", minSecret), true},
		{"plain text, too short", "hunter2", false},
		{"whsec_, too short", "whsec_aHVudGVyMg==", false},
		{"whsec_, not base64", "whsec_" + strings.Repeat("?", 40), false},
		{"nothing", "", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			_, err := ParseSecret(row.text)
			if row.ok {
				g.Expect(err).NotTo(HaveOccurred())
				return
			}
			g.Expect(err).To(MatchError(ErrSecret))
			if row.text != "" {
				g.Expect(err.Error()).NotTo(ContainSubstring(row.text))
			}
		})
	}
}

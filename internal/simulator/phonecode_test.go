package simulator

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/types/events"
	clocktesting "k8s.io/utils/clock/testing"
)

const (
	codePhone = "15551234567"
	// browser is a display name that WhatsApp accepts.
	browser = "Chrome (Linux)"
)

// showCode connects a client that is not paired and makes it show a code for the phone.
func showCode(t *testing.T, c *client, phone string) string {
	t.Helper()
	codes(t, c)
	code, err := c.PairPhone(t.Context(), phone, true, whatsmeow.PairClientChrome, browser)
	wait(t).Expect(err).NotTo(HaveOccurred())
	return code
}

// wrong returns a different code in the right format.
func wrong(code string) string {
	first := "1"
	if code[0] == '1' {
		first = "2"
	}
	return first + code[1:]
}

// The real client shows a code, a person mistypes it, types it again, and the
// device logs in.
func TestPairingByCode(t *testing.T) {
	g := wait(t)
	s := serve(t)
	inner := &http.Transport{}
	t.Cleanup(inner.CloseIdleConnections)
	control := Control{URL: s.ControlURL(), HTTP: &http.Client{Transport: inner}}
	c := newClient(t, s, newDevice())
	code := showCode(t, c, "+"+codePhone)
	g.Expect(code).To(MatchRegexp(`^[1-9A-HJ-NP-TV-Z]{4}-[1-9A-HJ-NP-TV-Z]{4}$`))

	for range 2 {
		_, err := s.EnterCode(t.Context(), codePhone, wrong(code))
		g.Expect(err).To(MatchError(ErrBadInput))
		g.Expect(err).To(MatchError(ContainSubstring("not the code that the client shows")))
	}
	g.Expect(s.Devices()).To(BeEmpty())
	g.Expect(of[*events.PairError](c)).To(BeEmpty(), "the client is not informed of a wrong code")

	// As people type it.
	jid, err := control.EnterCode(t.Context(), "+"+codePhone, " "+strings.ToLower(strings.Replace(code, "-", " ", 1)))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(jid).To(Equal(codePhone + ":1@s.whatsapp.net"))
	g.Expect(first[*events.PairSuccess](t, c).ID.String()).To(Equal(jid))
	first[*events.Connected](t, c)
	g.Expect(s.Stats().Pairings).To(BeEquivalentTo(1))

	id, err := s.Send(t.Context(), jid, "", "hello")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(first[*events.Message](t, c).Info.ID).To(Equal(id))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())

	_, err = s.EnterCode(t.Context(), codePhone, code)
	g.Expect(err).To(MatchError(ErrNotNow), "a code is used once")
}

func TestEnterCodeRefuses(t *testing.T) {
	clock := clocktesting.NewFakeClock(time.Now())
	s := serve(t, func(o *Options) { o.Clock, o.CodeLifetime = clock, time.Minute })
	c := newClient(t, s, newDevice())
	code := showCode(t, c, codePhone)
	for _, row := range []struct {
		name, phone, code string
		kind              error
		sentence          string
	}{
		{"nothing", codePhone, "", ErrBadInput, "8 letters and digits"},
		{"too short", codePhone, "WXYZ-987", ErrBadInput, "8 letters and digits"},
		{"letters that no code has", codePhone, "OOOO-IIII", ErrBadInput, "8 letters and digits"},
		{"a QR code", codePhone, "2@ref,noise,identity,adv", ErrBadInput, "8 letters and digits"},
		{"an invalid number", "call me", code, ErrBadInput, "7 to 15 digits"},
		{"no number", "", code, ErrBadInput, "7 to 15 digits"},
		{"another phone", "15557654321", code, ErrNotNow, "no client shows a code for this number"},
		{"another code", codePhone, wrong(code), ErrBadInput, "not the code that the client shows"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			_, err := s.EnterCode(t.Context(), row.phone, row.code)
			g.Expect(err).To(MatchError(row.kind))
			g.Expect(err).To(MatchError(ContainSubstring(row.sentence)))
			if row.code != "" {
				g.Expect(err.Error()).NotTo(ContainSubstring(row.code), "a code is a secret")
			}
			g.Expect(s.Devices()).To(BeEmpty())
		})
	}
	t.Run("a newer code replaces the old one", func(t *testing.T) {
		g := wait(t)
		newer, err := c.PairPhone(t.Context(), codePhone, true, whatsmeow.PairClientChrome, browser)
		g.Expect(err).NotTo(HaveOccurred())
		_, err = s.EnterCode(t.Context(), codePhone, code)
		g.Expect(err).To(MatchError(ErrBadInput))
		code = newer
	})
	t.Run("an expired code", func(t *testing.T) {
		g := wait(t)
		clock.Step(time.Minute)
		_, err := s.EnterCode(t.Context(), codePhone, code)
		g.Expect(err).To(MatchError(ErrNotNow))
		g.Expect(err).To(MatchError(ContainSubstring("expired")))
	})
	t.Run("a disconnected client", func(t *testing.T) {
		g := wait(t)
		c.Disconnect()
		g.Eventually(func() int { return s.Stats().Pairing }).Should(BeZero())
		_, err := s.EnterCode(t.Context(), codePhone, code)
		g.Expect(err).To(MatchError(ErrNotNow))
		g.Expect(err).To(MatchError(ContainSubstring("no client shows")))
	})
}

// A failure during the entry of a code ends only that entry.
func TestEnterCodeInterrupted(t *testing.T) {
	for _, row := range []struct {
		name string
		act  func(g *WithT, s *Server, c *client, code string) error
		kind error
	}{
		{"the client does not answer", func(g *WithT, s *Server, _ *client, code string) error {
			_, err := s.Inject(Fault{Kind: FaultFreeze})
			g.Expect(err).NotTo(HaveOccurred())
			ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
			defer cancel()
			_, err = s.EnterCode(ctx, codePhone, code)
			return err
		}, context.DeadlineExceeded},
		{"the identity has a bad HMAC", func(g *WithT, s *Server, _ *client, code string) error {
			_, err := s.Inject(Fault{Kind: FaultBadHMAC})
			g.Expect(err).NotTo(HaveOccurred())
			_, err = s.EnterCode(context.Background(), codePhone, code)
			return err
		}, ErrNotNow},
		{"it was scanned meanwhile", func(g *WithT, s *Server, c *client, code string) error {
			_, err := s.Scan(context.Background(), of[*events.QR](c)[0].Codes[0], codePhone)
			g.Expect(err).NotTo(HaveOccurred())
			_, err = s.EnterCode(context.Background(), codePhone, code)
			return err
		}, ErrNotNow},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			c := newClient(t, s, newDevice())
			c.EnableAutoReconnect, c.DisableLoginAutoReconnect = false, true
			code := showCode(t, c, codePhone)
			g.Expect(row.act(g, s, c, code)).To(MatchError(row.kind))
			_, err := s.Clear("", "")
			g.Expect(err).NotTo(HaveOccurred())
		})
	}
}

// WhatsApp refuses codes with the error texts that clients know.
func TestCodesAreRefused(t *testing.T) {
	s := serve(t)
	c := newClient(t, s, newDevice())
	codes(t, c)
	for _, row := range []struct {
		name, phone, display string
		fault                int
		want                 error
	}{
		{name: "asked too often", phone: codePhone, display: browser, fault: 429, want: whatsmeow.ErrIQRateOverLimit},
		{name: "a number that cannot exist", phone: "1555123456789012", display: browser, want: whatsmeow.ErrIQBadRequest},
		{name: "not a browser", phone: codePhone, display: "Shop of Sevilla", want: whatsmeow.ErrIQBadRequest},
		{name: "an unknown system", phone: codePhone, display: "Chrome (TempleOS)", want: whatsmeow.ErrIQBadRequest},
		{name: "accepted", phone: codePhone, display: "Safari (Mac OS)"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			if row.fault != 0 {
				_, err := s.Inject(Fault{Kind: FaultRefuseCode, Reason: row.fault})
				g.Expect(err).NotTo(HaveOccurred())
			}
			code, err := c.PairPhone(t.Context(), row.phone, false, whatsmeow.PairClientChrome, row.display)
			if row.want != nil {
				g.Expect(err).To(MatchError(row.want))
			} else {
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(code).NotTo(BeEmpty())
			}
			_, err = s.Clear("", "")
			g.Expect(err).NotTo(HaveOccurred())
		})
	}
}

func FuzzParseLinkCode(f *testing.F) {
	for _, seed := range []string{"", "ABCD-1234", "abcd1234", "OOOO-0000", "ABCD-1234-5678", "ÀBCD-1234"} {
		f.Add(seed)
	}
	_, want := parseLinkCode("")
	f.Fuzz(func(t *testing.T, typed string) {
		code, err := parseLinkCode(typed)
		switch {
		case err == nil && (len(code) != linkCodeLength || strings.Trim(code, linkAlphabet) != ""):
			t.Errorf("%q became %q", typed, code)
		case err != nil && err.Error() != want.Error():
			t.Errorf("the error for %q depends on the input: %v", typed, err)
		}
	})
}

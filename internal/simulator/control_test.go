package simulator

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
)

// Another process can use every function of the Go API.
func TestControl(t *testing.T) {
	g := wait(t)
	s := serve(t)
	inner := &http.Transport{}
	t.Cleanup(inner.CloseIdleConnections)
	control := Control{URL: s.ControlURL(), HTTP: &http.Client{Transport: inner}}
	ctx := t.Context()

	info, err := control.Info(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(info).To(Equal(s.Info()))
	g.Expect(info.NoiseRoot).To(HaveLen(64))

	c := newClient(t, s, newDevice())
	jid, err := control.Scan(ctx, codes(t, c)[0], "+15551234567")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(jid).To(Equal("15551234567:1@s.whatsapp.net"))
	first[*events.Connected](t, c)
	devices, err := control.Devices(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(devices).To(ConsistOf(And(HaveField("JID", jid), HaveField("Connected", true))))

	id, err := control.Send(ctx, jid, "15557654321", "hello")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(first[*events.Message](t, c).Info.ID).To(Equal(id))
	c.write(t, types.NewJID("15557654321", types.DefaultUserServer), "hello yourself")
	messages, err := control.Received(ctx, jid)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(messages).To(ConsistOf(HaveField("Text", "hello yourself")))

	n, err := control.Inject(ctx, Fault{Kind: FaultDrop, Device: jid})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(n).To(Equal(1))
	_, err = control.Inject(ctx, Fault{Kind: FaultMute, For: d(time.Hour)})
	g.Expect(err).NotTo(HaveOccurred())
	faults, err := control.Faults(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(faults).To(Equal([]Fault{{Kind: FaultMute, For: d(time.Hour)}}))
	n, err = control.Clear(ctx, FaultMute, "")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(n).To(Equal(1))

	g.Expect(control.SetAlias(ctx, "551187654321", "5511987654321")).To(Succeed())
	g.Expect(control.SetAlias(ctx, "551187654321", "15551234567")).To(MatchError(ErrNotNow), "an account's own number")
	g.Expect(control.SetAlias(ctx, "551187654321", "x")).To(MatchError(ErrBadInput))

	stats, err := control.Stats(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(stats.Pairings).To(BeEquivalentTo(1))
	g.Expect(stats.Received).To(BeEquivalentTo(1))
	doubled, err := control.Doubled(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(doubled).To(BeEmpty())
	unknown, err := control.Unknown(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(unknown).To(BeEmpty())

	// The same kinds of errors as in one process.
	_, err = control.Scan(ctx, "garbage", "")
	g.Expect(err).To(MatchError(ErrBadInput))
	g.Expect(err).To(MatchError(ContainSubstring("not a WhatsApp QR code")))
	_, err = control.Send(ctx, "15559999999", "", "hello")
	g.Expect(err).To(MatchError(ErrNotFound))
	_, err = control.Send(ctx, jid, "15551234567", "to myself")
	g.Expect(err).To(MatchError(ErrBadInput))
	_, err = control.Send(ctx, jid, "", "")
	g.Expect(err).To(MatchError(ErrBadInput))
	_, err = control.Received(ctx, "15559999999")
	g.Expect(err).To(MatchError(ErrNotFound))
	_, err = control.Clear(ctx, "", "nobody")
	g.Expect(err).To(MatchError(ErrBadInput))
	_, err = Control{URL: "http://127.0.0.1:1"}.Info(ctx)
	g.Expect(err).To(HaveOccurred())
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	_, err = control.Stats(cancelled)
	g.Expect(err).To(MatchError(context.Canceled))
	_, err = s.Send(cancelled, jid, "", "hello")
	g.Expect(err).To(MatchError(context.Canceled))
}

func TestControlRefusesBadBodies(t *testing.T) {
	s := serve(t)
	inner := &http.Transport{}
	t.Cleanup(inner.CloseIdleConnections)
	for _, row := range []struct {
		name, method, path, body string
		status                   int
	}{
		{"no JSON", "POST", "/scan", "qr=1", http.StatusBadRequest},
		{"a field that does not exist", "POST", "/fault", `{"kind":"drop","jid":"x"}`, http.StatusBadRequest},
		{"a duration without a unit", "POST", "/fault", `{"kind":"mute","for":5}`, http.StatusBadRequest},
		{"too much", "POST", "/send", `{"text":"` + strings.Repeat("x", maxBody) + `"}`, http.StatusBadRequest},
		{"the wrong method", "GET", "/scan", "", http.StatusMethodNotAllowed},
		{"the wrong path", "GET", "/nothing", "", http.StatusNotFound},
		{"a duration as people write it", "POST", "/fault", `{"kind":"mute","for":"5s"}`, http.StatusOK},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			request, err := http.NewRequestWithContext(t.Context(), row.method, s.ControlURL()+row.path, strings.NewReader(row.body))
			g.Expect(err).NotTo(HaveOccurred())
			response, err := inner.RoundTrip(request)
			g.Expect(err).NotTo(HaveOccurred())
			defer func() { _ = response.Body.Close() }()
			body, err := io.ReadAll(response.Body)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(response.StatusCode).To(Equal(row.status), string(body))
		})
	}
}

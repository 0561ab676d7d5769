package whatsapp

import (
	"net"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	wastore "go.mau.fi/whatsmeow/store"
	"k8s.io/utils/clock"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// The connection is over when nothing has come for three periods, and not
// before, whatever the library and the socket say of it.
func TestSilenceEndsTheConnection(t *testing.T) {
	for _, fault := range []simulator.FaultKind{simulator.FaultMute, simulator.FaultFreeze} {
		t.Run(string(fault), func(t *testing.T) {
			w := newEnvironment(t)
			taking := w.take()
			w.pair(taking, phone)
			clock := clocktesting.NewFakeClock(time.Now())
			w.newFactory(func(f *Factory) { f.clock = clock })
			s := w.connect(taking)
			s.event(EventConnected)
			_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultMute})
			w.g.Expect(err).NotTo(HaveOccurred())

			clock.Step(silence() - time.Millisecond)
			_, err = w.simulator.Send(t.Context(), phone, "", "a sign of life")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Eventually(s.texts).Should(HaveLen(1))
			w.settled()
			if fault == simulator.FaultFreeze {
				_, err = w.simulator.Inject(simulator.Fault{Kind: fault})
				w.g.Expect(err).NotTo(HaveOccurred())
			}
			clock.Step(time.Millisecond) // it looks, and sees the message
			w.g.Eventually(clock.HasWaiters).Should(BeTrue())
			w.g.Expect(s.events()).To(HaveExactElements(HaveField("Type", EventConnected)))

			clock.Step(silence())
			end := s.event(EventDisconnected)
			w.g.Expect(end.Reason).To(Equal("KeepAliveTimeout"))
			w.g.Expect(end.Message).To(HavePrefix("nothing has come from WhatsApp for"))
			w.g.Expect(end.Ours).To(BeFalse())
			w.g.Eventually(func() bool { return s.socket.Load().isClosed.Load() }).Should(BeTrue(), "whatever the socket says")
			s.Close()
			w.g.Eventually(clock.HasWaiters).Should(BeFalse(), "no check is left")
			_, err = w.simulator.Clear("", "")
			w.g.Expect(err).NotTo(HaveOccurred())
		})
	}
}

// A living connection stays, though it has nothing to say but keep-alives.
func TestKeepAlivesAreSignsOfLife(t *testing.T) {
	w := newEnvironment(t)
	taking := w.take()
	w.pair(taking, phone)
	w.newFactory(func(f *Factory) { f.clock = clock.RealClock{} })
	s := w.connect(taking)
	s.event(EventConnected)
	w.g.Consistently(func() int { return w.simulator.Stats().Connected }, silence()+time.Second, "50ms").Should(Equal(1))
	w.g.Expect(s.events()).To(HaveExactElements(HaveField("Type", EventConnected)))
	w.g.Expect(time.Since(s.LastSeen())).To(BeNumerically("<", silence()))
}

// A wall clock that is set must not end every connection at once.
func TestLastSeenIgnoresChangesOfTheWallClock(t *testing.T) {
	g := NewWithT(t)
	client, server := net.Pipe()
	defer func() { g.Expect(client.Close()).To(Succeed()) }()
	l := newMonitoredConn(client, time.Now, func() error { return nil }, func() {})
	born := l.lastSeen()
	go func() { _, _ = server.Write([]byte("x")); _ = server.Close() }()
	_, err := l.Read(make([]byte, 1))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(l.lastSeen()).To(BeTemporally(">", born))
	g.Expect(l.lastSeen().String()).To(ContainSubstring(" m=+"), "it keeps the monotonic clock")
}

// The end of a pairing (515) whose node can be lost with its socket, at
// whichever moment: the connection is over and the device can log in.
func TestAClose515IsAnEnd(t *testing.T) {
	for range 2 { // the library loses the node in most runs, not in all
		w := newEnvironment(t)
		_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultCloseAtOnce})
		w.g.Expect(err).NotTo(HaveOccurred())
		taking := w.take()
		s := w.connect(taking)
		_, err = w.simulator.Scan(t.Context(), s.event(EventQR).Codes[0], phone)
		w.g.Expect(err).NotTo(HaveOccurred())
		s.event(EventPairSuccess)
		w.g.Expect(s.event(EventDisconnected).Reason).To(Or(Equal("StreamError515"), Equal(session.EndSocketClosed)))
		s.Close()
		w.connect(taking).event(EventConnected)
	}
}

// If the last node of a displaced session is lost, it looks like any broken connection.
func TestALostReplacedIsAnEnd(t *testing.T) {
	w, _, s := linked(t)
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultLoseEnd})
	w.g.Expect(err).NotTo(HaveOccurred())
	_, err = w.simulator.Inject(simulator.Fault{Kind: simulator.FaultStreamError, Code: "replaced"})
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.event(EventDisconnected).Reason).To(Equal(session.EndSocketClosed))
}

func TestTheNewestVersion(t *testing.T) {
	w := newEnvironment(t, func(o *simulator.Options) { o.TLS = true })
	taking := w.take()
	w.pair(taking, phone)
	newest := wastore.GetWAVersion()[2] + 10
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultMinVersion, Version: newest})
	w.g.Expect(err).NotTo(HaveOccurred())
	s := w.connect(taking)
	w.g.Expect(s.event(EventOutdated).Reason).To(Equal("ClientOutdated"))
	s.Close()

	w.g.Expect(w.factory.RefreshVersion(t.Context())).To(BeFalse(), "the page names the present one")
	w.simulator.SetWebVersion(newest - 100)
	w.g.Expect(w.factory.RefreshVersion(t.Context())).To(BeFalse(), "an older one is not taken")
	w.simulator.SetWebVersion(newest)
	w.g.Expect(w.factory.RefreshVersion(t.Context())).To(BeTrue())
	w.connect(taking).event(EventConnected)
}

func TestAVersionPageThatIsUnavailable(t *testing.T) {
	w := newEnvironment(t)
	w.factory.endpoint.Host = "127.0.0.1:1"
	_, err := w.factory.RefreshVersion(t.Context())
	w.g.Expect(err).To(MatchError(ContainSubstring("asking for WhatsApp's web version")))
}

// What the library would do by itself and must not.
func TestWhatIsLeftToOthers(t *testing.T) {
	w := newEnvironment(t)
	device, err := w.take().Open(t.Context(), func(error) {})
	w.g.Expect(err).NotTo(HaveOccurred())
	c, err := w.factory.New(Options{Device: device, Events: func(Event) {}})
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(c.client.ManualHistorySyncDownload).To(BeTrue(), "the phone's history is not downloaded")
	w.g.Expect(c.client.EnableAutoReconnect).To(BeFalse(), "the supervisor decides when to connect again")
	w.g.Expect(c.client.DisableLoginAutoReconnect).To(BeTrue(), "also after the 515")
}

package simulator

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/coder/websocket"
	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clocktesting "k8s.io/utils/clock/testing"
)

func d(x time.Duration) metav1.Duration { return metav1.Duration{Duration: x} }

// Each fault, as the client sees it. Every row runs for all devices, and for one named
// device while another device is not affected.
func TestFaultsOfAConnection(t *testing.T) {
	reconnects := func(t *testing.T, c *client) {
		wait(t).Eventually(func() []*events.Connected { return of[*events.Connected](c) }).ShouldNot(BeEmpty())
	}
	for _, row := range []struct {
		name  string
		fault Fault
		see   func(t *testing.T, s *Server, c *client)
	}{
		{"drop", Fault{Kind: FaultDrop}, func(t *testing.T, _ *Server, c *client) {
			first[*events.Disconnected](t, c)
			reconnects(t, c)
		}},
		{"freeze", Fault{Kind: FaultFreeze}, func(t *testing.T, s *Server, c *client) {
			first[*events.KeepAliveTimeout](t, c)
			wait(t).Expect(of[*events.Disconnected](c)).To(BeEmpty())
			n, err := s.Clear(FaultFreeze, c.jid())
			wait(t).Expect(err).NotTo(HaveOccurred())
			wait(t).Expect(n).To(Equal(1))
			first[*events.KeepAliveRestored](t, c)
		}},
		{"freeze for a time", Fault{Kind: FaultFreeze, For: d(time.Second)}, func(t *testing.T, _ *Server, c *client) {
			first[*events.KeepAliveTimeout](t, c)
			first[*events.KeepAliveRestored](t, c)
		}},
		{"mute", Fault{Kind: FaultMute}, func(t *testing.T, s *Server, c *client) {
			first[*events.KeepAliveTimeout](t, c)
			_, err := s.Send(t.Context(), c.jid(), "", "still here")
			wait(t).Expect(err).NotTo(HaveOccurred())
			first[*events.Message](t, c)
			_, err = s.Clear("", "")
			wait(t).Expect(err).NotTo(HaveOccurred())
			first[*events.KeepAliveRestored](t, c)
		}},
		{"515", Fault{Kind: FaultStreamError, Code: "515"}, func(t *testing.T, _ *Server, c *client) {
			reconnects(t, c)
			wait(t).Expect(of[*events.Disconnected](c)).To(BeEmpty())
		}},
		{"503", Fault{Kind: FaultStreamError, Code: "503"}, func(t *testing.T, _ *Server, c *client) {
			first[*events.Disconnected](t, c)
			reconnects(t, c)
		}},
		{"replaced", Fault{Kind: FaultStreamError, Code: "replaced"}, func(t *testing.T, _ *Server, c *client) {
			first[*events.StreamReplaced](t, c)
		}},
		{"a stanza without an acknowledgement", Fault{Kind: FaultStreamError, Code: "unacknowledged"}, func(t *testing.T, _ *Server, c *client) {
			ended := first[*events.StreamError](t, c)
			wait(t).Expect(ended.Code).To(BeEmpty())
			wait(t).Expect(ended.Raw.GetChildByTag("ack").Attrs).To(HaveKeyWithValue("class", "status"))
			first[*events.Disconnected](t, c)
			reconnects(t, c)
		}},
		{"device removed", Fault{Kind: FaultStreamError, Code: "device_removed"}, func(t *testing.T, s *Server, c *client) {
			wait(t).Expect(first[*events.LoggedOut](t, c).OnConnect).To(BeFalse())
			wait(t).Expect(s.Devices()).To(HaveLen(1), "the other device")
		}},
		{"failure 401", Fault{Kind: FaultFailure, Reason: 401}, loggedOut(events.ConnectFailureLoggedOut)},
		{"failure 403", Fault{Kind: FaultFailure, Reason: 403}, loggedOut(events.ConnectFailureMainDeviceGone)},
		{"failure 406", Fault{Kind: FaultFailure, Reason: 406}, loggedOut(events.ConnectFailureUnknownLogout)},
		{"failure 402", Fault{Kind: FaultFailure, Reason: 402, Expire: d(90 * time.Minute)}, func(t *testing.T, _ *Server, c *client) {
			wait(t).Expect(first[*events.TemporaryBan](t, c).Expire).To(Equal(90 * time.Minute))
		}},
		{"failure 405", Fault{Kind: FaultFailure, Reason: 405}, func(t *testing.T, _ *Server, c *client) {
			first[*events.ClientOutdated](t, c)
		}},
		{"failure 503", Fault{Kind: FaultFailure, Reason: 503, For: d(time.Second)}, func(t *testing.T, s *Server, c *client) {
			reconnects(t, c)
			wait(t).Expect(s.Stats().Refused).NotTo(BeZero())
		}},
		{"refuse for a time", Fault{Kind: FaultRefuse, For: d(time.Second)}, func(t *testing.T, s *Server, c *client) {
			first[*events.Disconnected](t, c)
			reconnects(t, c)
			wait(t).Expect(s.Stats().Refused).NotTo(BeZero())
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := wait(t)
			s := serve(t)
			c, bystander := paired(t, s, "15551234567"), paired(t, s, "15557654321")
			c.forget()
			bystander.forget()
			row.fault.Device = "15551234567"
			_, err := s.Inject(row.fault)
			g.Expect(err).NotTo(HaveOccurred())
			row.see(t, s, c)
			g.Expect(of[*events.Disconnected](bystander)).To(BeEmpty())
			g.Expect(s.Stats().Doubled).To(BeZero())
		})
	}
}

func loggedOut(reason events.ConnectFailureReason) func(*testing.T, *Server, *client) {
	return func(t *testing.T, _ *Server, c *client) {
		evt := first[*events.LoggedOut](t, c)
		wait(t).Expect(evt.Reason).To(Equal(reason))
		wait(t).Expect(evt.OnConnect).To(BeTrue())
	}
}

func TestFaultsForAll(t *testing.T) {
	g := wait(t)
	s := serve(t)
	a, b := paired(t, s, ""), paired(t, s, "")
	n, err := s.Inject(Fault{Kind: FaultDrop})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(n).To(Equal(2))
	first[*events.Disconnected](t, a)
	first[*events.Disconnected](t, b)
	g.Eventually(func() int { return s.Stats().Connected }).Should(Equal(2))
}

// TLS sends nothing through a frozen connection, and the end of the server does not
// wait for it.
func TestFreezeUnderTLS(t *testing.T) {
	g := wait(t)
	s := serve(t, func(o *Options) { o.TLS = true })
	c := paired(t, s, "")
	for range 2 {
		c.forget()
		n, err := s.Inject(Fault{Kind: FaultFreeze})
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(n).To(Equal(1))
		first[*events.KeepAliveTimeout](t, c)
		_, err = s.Send(t.Context(), c.jid(), "", "through the ice")
		g.Expect(err).NotTo(HaveOccurred())
		_, err = s.Clear(FaultFreeze, "")
		g.Expect(err).NotTo(HaveOccurred())
		first[*events.Message](t, c)
		first[*events.KeepAliveRestored](t, c)
	}
	_, err := s.Inject(Fault{Kind: FaultFreeze})
	g.Expect(err).NotTo(HaveOccurred())
}

// The slow faults delay the client by the configured time.
func TestSlowFaults(t *testing.T) {
	for _, row := range []struct {
		name  string
		fault Fault
	}{
		{"upgrade", Fault{Kind: FaultSlowUpgrade, Delay: d(time.Hour)}},
		{"handshake of all", Fault{Kind: FaultSlowHandshake, Delay: d(time.Hour)}},
		{"handshake of one device", Fault{Kind: FaultSlowHandshake, Device: "15551234567", Delay: d(time.Hour)}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			clock := clocktesting.NewFakeClock(time.Now())
			s := serve(t, func(o *Options) { o.Clock = clock })
			c := newClient(t, s, newDevice())
			_, err := s.Scan(t.Context(), codes(t, c)[0], "15551234567")
			g.Expect(err).NotTo(HaveOccurred())
			first[*events.Connected](t, c)
			c.Disconnect()
			g.Eventually(clock.HasWaiters).Should(BeFalse())
			c.forget()

			_, err = s.Inject(row.fault)
			g.Expect(err).NotTo(HaveOccurred())
			connected := make(chan error, 1)
			go func() { connected <- c.Connect() }()
			if row.fault.Device != "" {
				// Not the handshake's own timer: the handshake is over.
				g.Eventually(connected).Should(Receive(BeNil()))
				g.Eventually(func() bool { return handshakes(s) == 0 }).Should(BeTrue())
				connected <- nil
			}
			g.Eventually(clock.HasWaiters).Should(BeTrue())
			g.Expect(of[*events.Connected](c)).To(BeEmpty())
			clock.Step(time.Hour)
			g.Eventually(connected).Should(Receive(BeNil()))
			first[*events.Connected](t, c)
		})
	}
}

// handshakes counts the connections with a running timer.
func handshakes(s *Server) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.conns {
		if c.timer != nil {
			n++
		}
	}
	return n
}

// A slow server that ends releases the waiting clients.
func TestEndDuringSlowFaults(t *testing.T) {
	for _, kind := range []FaultKind{FaultSlowUpgrade, FaultSlowHandshake} {
		t.Run(string(kind), func(t *testing.T) {
			g := wait(t)
			clock := clocktesting.NewFakeClock(time.Now())
			s := serve(t, func(o *Options) { o.Clock = clock })
			_, err := s.Inject(Fault{Kind: kind, Delay: d(time.Hour)})
			g.Expect(err).NotTo(HaveOccurred())
			ended := make(chan error, 1)
			go func() {
				ws, _, err := websocket.Dial(t.Context(), s.Endpoint()+chatPath, nil)
				if err == nil {
					_, _, err = ws.Read(t.Context())
					_ = ws.CloseNow()
				}
				ended <- err
			}()
			g.Eventually(clock.HasWaiters).Should(BeTrue())
			g.Expect(s.Close()).To(Succeed())
			g.Eventually(ended).Should(Receive(HaveOccurred()))
		})
	}
}

// The last node of a pairing can be lost: then the client is paired and has no
// connection, and it receives no event for that.
func TestLostEndOfPairing(t *testing.T) {
	g := wait(t)
	s := serve(t)
	_, err := s.Inject(Fault{Kind: FaultLoseEnd, Device: "15551234567"})
	g.Expect(err).NotTo(HaveOccurred())
	c := newClient(t, s, newDevice())
	_, err = s.Scan(t.Context(), codes(t, c)[0], "15551234567")
	g.Expect(err).NotTo(HaveOccurred())
	first[*events.PairSuccess](t, c)
	g.Eventually(func() int { return s.Stats().Pairing }).Should(BeZero())
	g.Consistently(func() []*events.Disconnected { return of[*events.Disconnected](c) }, 300*time.Millisecond).Should(BeEmpty())
	g.Expect(c.IsLoggedIn()).To(BeFalse())
	c.Disconnect() // what a watchdog does; IsConnected would race with the library's own goroutine
	g.Expect(c.Connect()).To(Succeed())
	first[*events.Connected](t, c)
}

func TestCloseAtOnce(t *testing.T) {
	g := wait(t)
	s := serve(t, func(o *Options) { o.CloseDelay = time.Hour })
	c := paired(t, s, "") // its 515 connection is closed by the client itself
	_, err := s.Inject(Fault{Kind: FaultCloseAtOnce})
	g.Expect(err).NotTo(HaveOccurred())
	c.forget()
	_, err = s.Inject(Fault{Kind: FaultStreamError, Code: "503"})
	g.Expect(err).NotTo(HaveOccurred())
	first[*events.Disconnected](t, c)
}

func TestBadFaults(t *testing.T) {
	s := serve(t)
	for name, f := range map[string]Fault{
		"no kind":                     {},
		"an unknown kind":             {Kind: "explode"},
		"a stream error without code": {Kind: FaultStreamError},
		"a failure without reason":    {Kind: FaultFailure},
		"slow without delay":          {Kind: FaultSlowHandshake},
		"a slow upgrade of a device":  {Kind: FaultSlowUpgrade, Device: "15551234567", Delay: d(1)},
		"a bad hmac of a device":      {Kind: FaultBadHMAC, Device: "15551234567"},
		"no code without reason":      {Kind: FaultRefuseCode},
		"no code for a device":        {Kind: FaultRefuseCode, Device: "15551234567", Reason: 429},
		"malformed without a code":    {Kind: FaultMalformed},
		"no minimum version":          {Kind: FaultMinVersion},
		"a negative time":             {Kind: FaultMute, For: d(-1)},
		"an invalid device name":      {Kind: FaultDrop, Device: "nobody"},
		"a group":                     {Kind: FaultDrop, Device: "123@g.us"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.Inject(f)
			wait(t).Expect(err).To(MatchError(ErrBadInput))
		})
	}
	wait(t).Expect(s.Faults()).To(BeEmpty())
}

func TestLastingFaultsEnd(t *testing.T) {
	g := wait(t)
	clock := clocktesting.NewFakeClock(time.Now())
	s := serve(t, func(o *Options) { o.Clock = clock })
	for _, f := range []Fault{
		{Kind: FaultMute, For: d(time.Minute)},
		{Kind: FaultMute, For: d(time.Hour)}, // replaces the first
		{Kind: FaultMute, Device: "15551234567"},
		{Kind: FaultRefuse, For: d(time.Minute)},
	} {
		_, err := s.Inject(f)
		g.Expect(err).NotTo(HaveOccurred())
	}
	g.Expect(s.Faults()).To(HaveLen(3))
	clock.Step(time.Minute)
	g.Expect(s.Faults()).To(ConsistOf(HaveField("Device", ""), HaveField("Device", "15551234567")))
	n, err := s.Clear(FaultMute, "15551234567")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(n).To(Equal(1))
	n, err = s.Clear("", "")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(n).To(Equal(1))
	_, err = s.Clear("", "nobody")
	g.Expect(err).To(MatchError(ErrBadInput))
}

// Faults of a pairing may name the phone that scans. The delays are those of the server's
// clock.
func TestFaultsOfAPairing(t *testing.T) {
	const phone, other = "15551234567", "15557654321"
	for _, row := range []struct {
		name   string
		faults []Fault
		see    func(t *testing.T, s *Server, c *client, code string, clk *clocktesting.FakeClock)
	}{
		{"the 515 comes late", []Fault{{Kind: FaultSlowEnd, Delay: d(time.Minute)}}, func(t *testing.T, s *Server, _ *client, code string, clk *clocktesting.FakeClock) {
			g, start := wait(t), clk.Now()
			_, err := s.Scan(t.Context(), code, phone)
			g.Expect(err).NotTo(HaveOccurred())
			g.Eventually(s.Devices).Should(HaveLen(1))
			g.Expect(s.Stats().Logins).To(BeZero())
			g.Eventually(func() int64 { clk.Step(time.Second); return s.Stats().Logins }).Should(BeEquivalentTo(1))
			g.Expect(clk.Since(start)).To(BeNumerically(">=", time.Minute))
		}},
		{"the answer to a scan is lost", []Fault{{Kind: FaultLosePairing}}, func(t *testing.T, s *Server, c *client, code string, _ *clocktesting.FakeClock) {
			g := wait(t)
			_, err := s.Scan(t.Context(), code, phone)
			g.Expect(err).To(MatchError(ErrNotNow))
			first[*events.PairSuccess](t, c)
			g.Expect(s.Devices()).To(BeEmpty())
			g.Expect(s.Stats().Pairings).To(BeZero())
		}},
		{"a code is retired", []Fault{{Kind: FaultRetireCode}}, func(t *testing.T, s *Server, c *client, code string, _ *clocktesting.FakeClock) {
			g := wait(t)
			_, err := s.Scan(t.Context(), code, phone)
			g.Expect(err).To(MatchError(ErrNotNow))
			first[*events.RotateADVSecret](t, c)
		}},
		{"the phone continues late after its passkey", []Fault{{Kind: FaultPasskey}, {Kind: FaultSlowPasskey, Delay: d(time.Minute)}}, func(t *testing.T, s *Server, c *client, code string, clk *clocktesting.FakeClock) {
			g, start := wait(t), clk.Now()
			_, err := s.Scan(t.Context(), code, phone)
			g.Expect(err).NotTo(HaveOccurred())
			request, err := json.Marshal(first[*events.PairPasskeyRequest](t, c).PublicKey)
			g.Expect(err).NotTo(HaveOccurred())
			answer, err := s.AnswerPasskey(phone, request)
			g.Expect(err).NotTo(HaveOccurred())
			var response types.WebAuthnResponse
			g.Expect(json.Unmarshal(answer, &response)).To(Succeed())
			g.Expect(c.SendPasskeyResponse(t.Context(), &response)).To(Succeed())
			g.Expect(of[*events.PairPasskeyConfirmation](c)).To(BeEmpty())
			g.Eventually(func() []*events.PairPasskeyConfirmation {
				clk.Step(time.Second)
				return of[*events.PairPasskeyConfirmation](c)
			}).ShouldNot(BeEmpty())
			g.Expect(clk.Since(start)).To(BeNumerically(">=", time.Minute))
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			clk := clocktesting.NewFakeClock(time.Now())
			s := serve(t, func(o *Options) { o.Clock = clk })
			for _, f := range row.faults {
				f.Device = other
				_, err := s.Inject(f)
				g.Expect(err).NotTo(HaveOccurred())
			}
			unaffected := newClient(t, s, newDevice())
			_, err := s.Scan(t.Context(), codes(t, unaffected)[0], phone)
			g.Expect(err).NotTo(HaveOccurred(), "the fault is for another phone")
			g.Eventually(func() int64 { return s.Stats().Logins }).Should(BeEquivalentTo(1))
		})
		t.Run(row.name+", for the phone that scans", func(t *testing.T) {
			g := wait(t)
			clk := clocktesting.NewFakeClock(time.Now())
			s := serve(t, func(o *Options) { o.Clock = clk })
			for _, f := range row.faults {
				f.Device = phone
				_, err := s.Inject(f)
				g.Expect(err).NotTo(HaveOccurred())
			}
			c := newClient(t, s, newDevice())
			row.see(t, s, c, codes(t, c)[0], clk)
		})
	}
}

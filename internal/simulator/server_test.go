package simulator

import (
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	clocktesting "k8s.io/utils/clock/testing"
	_ "modernc.org/sqlite"
)

// The whole life cycle of a device, with the store of the library.
func TestDeviceLifecycle(t *testing.T) {
	for name, withTLS := range map[string]bool{"ws": false, "wss": true} {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			s := serve(t, func(o *Options) { o.TLS = withTLS })
			g.Expect(s.Endpoint()).To(HavePrefix(name + "://"))

			// Prekeys in SQLite take seconds under the race detector: one round is enough.
			device, again := newDevice(), func(c *client) *store.Device { return c.Store }
			if !withTLS {
				container := database(t)
				device = container.NewDevice()
				again = func(*client) *store.Device {
					d, err := container.GetFirstDevice(t.Context())
					g.Expect(err).NotTo(HaveOccurred())
					return d
				}
			}

			// QR, scan, 515, login.
			c := pairedOn(t, s, device, "+15551234567")
			g.Expect(c.jid()).To(Equal("15551234567:1@s.whatsapp.net"))
			g.Expect(of[*events.Disconnected](c)).To(BeEmpty(), "the reconnect after 515 is not reported as a disconnect")
			stats := s.Stats()
			g.Expect(stats.Pairings).To(BeEquivalentTo(1))
			g.Expect(stats.Logins).To(BeEquivalentTo(1))
			g.Expect(stats.Connected).To(Equal(1))
			g.Expect(s.Devices()).To(HaveLen(1))

			// Messages both ways, in the session that the contact began.
			id, err := s.Send(t.Context(), "15551234567", "15557654321", "hello")
			g.Expect(err).NotTo(HaveOccurred())
			m := first[*events.Message](t, c)
			g.Expect(m.Info.ID).To(Equal(id))
			g.Expect(m.Message.GetConversation()).To(Equal("hello"))
			g.Expect(m.Info.Sender.User).To(Equal("15557654321"))
			g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero(), "receipts")
			c.write(t, m.Info.Chat, "hello yourself")
			g.Eventually(func() ([]Message, error) { return s.Received(c.jid()) }).Should(ConsistOf(And(
				HaveField("Text", "hello yourself"), HaveField("To", m.Info.SenderAlt.String()), HaveField("Problem", ""))))
			g.Expect(first[*events.Receipt](t, c).Chat).To(Equal(m.Info.SenderAlt), "the contact's phone has received it")
			g.Expect(s.Stats().Undecryptable).To(BeZero())

			// A second process of the same device, after the first has ended.
			g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
			c.Disconnect()
			g.Eventually(func() int { return s.Stats().Connected }).Should(BeZero())
			_, err = s.Send(t.Context(), c.jid(), "", "while you were away")
			g.Expect(err).NotTo(HaveOccurred())
			c = newClient(t, s, again(c))
			g.Expect(c.Connect()).To(Succeed())
			first[*events.Connected](t, c)
			g.Eventually(func() []string { return texts(c) }).Should(Equal([]string{"while you were away"}))
			g.Expect(first[*events.OfflineSyncCompleted](t, c).Count).To(Equal(1))
			g.Expect(s.Stats().Doubled).To(BeZero())

			// Logout: the device is unlinked, and its keys are no longer valid.
			noise := *c.Store
			c.Store.Container = keptContainer{c.Store.Container}
			g.Expect(c.Logout(t.Context())).To(MatchError(errKept))
			g.Expect(s.Devices()).To(BeEmpty())
			unlinked := newClient(t, s, &noise)
			g.Expect(unlinked.Connect()).To(Succeed())
			g.Expect(first[*events.LoggedOut](t, unlinked).Reason).To(Equal(events.ConnectFailureLoggedOut))
		})
	}
}

// keptContainer deletes nothing: the library would clear the stores of a deleted device
// while its goroutines still read them (whatsmeow's store/store.go, Device.Delete).
type keptContainer struct{ store.DeviceContainer }

var errKept = errors.New("the device is kept")

func (keptContainer) DeleteDevice(context.Context, *store.Device) error { return errKept }

// database is the library's own store.
func database(t *testing.T) *sqlstore.Container {
	t.Helper()
	g := wait(t)
	db, err := sql.Open("sqlite", "file:"+filepath.Join(t.TempDir(), "devices.db")+"?_pragma=foreign_keys(1)&_pragma=busy_timeout(10000)&_pragma=synchronous(0)")
	g.Expect(err).NotTo(HaveOccurred())
	db.SetMaxOpenConns(1)
	container := sqlstore.NewWithDB(db, "sqlite3", nil)
	g.Expect(container.Upgrade(t.Context())).To(Succeed())
	t.Cleanup(func() { g.Expect(container.Close()).To(Succeed()) })
	return container
}

// waiting counts the stanzas that a client has not acknowledged, receipts included.
func waiting(s *Server, c *client) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.deviceLocked(c.jid())
	if err != nil {
		return -1
	}
	return len(d.queue.waiting)
}

// A message without a receipt is sent again at the next login, and not before.
func TestMessageWithoutReceiptIsSentAgain(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	c.setNoReceipts(true)
	for _, text := range []string{"one", "two"} {
		_, err := s.Send(t.Context(), c.jid(), "", text)
		g.Expect(err).NotTo(HaveOccurred())
	}
	g.Eventually(func() []string { return texts(c) }).Should(Equal([]string{"one", "two"}))
	g.Expect(s.Stats().Unacknowledged).To(Equal(2))
	g.Expect(s.Devices()[0].Waiting).To(Equal(2))
	g.Expect(s.Stats().Redelivered).To(BeZero())

	// The client recognises them by their counters, drops them and sends the receipts.
	c.Disconnect()
	c.forget()
	c.setNoReceipts(false)
	g.Expect(c.Connect()).To(Succeed())
	g.Eventually(func() int64 { return s.Stats().Redelivered }).Should(BeEquivalentTo(2))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
}

// A device that lost its session asks for the message again, and gets it in a
// new session unless the sender is offline.
func TestRetry(t *testing.T) {
	for name, offline := range map[string]bool{"sender answers": false, "sender is offline": true} {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			c := paired(t, s, "15551234567")
			_, err := s.Inject(Fault{Kind: FaultPhoneOffline})
			g.Expect(err).NotTo(HaveOccurred())
			_, err = s.Send(t.Context(), c.jid(), "", "first")
			g.Expect(err).NotTo(HaveOccurred())
			first[*events.Message](t, c)
			c.write(t, types.NewJID(DefaultContact, types.DefaultUserServer), "answer") // from now on it is not a pkmsg
			if offline {
				_, err = s.Inject(Fault{Kind: FaultSenderOffline})
				g.Expect(err).NotTo(HaveOccurred())
			}
			g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
			c.Store.Container.(*memory).dropSessions()
			_, err = s.Send(t.Context(), c.jid(), "", "second")
			g.Expect(err).NotTo(HaveOccurred())
			first[*events.UndecryptableMessage](t, c)
			g.Eventually(func() int64 { return s.Stats().Retries }).Should(BeEquivalentTo(1))
			g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
			if offline {
				g.Expect(texts(c)).To(Equal([]string{"first"}))
			} else {
				g.Eventually(func() []string { return texts(c) }).Should(Equal([]string{"first", "second"}))
			}
		})
	}
}

// Two linked devices write to each other, and the other devices of the sender's account
// receive a copy.
func TestMessagesBetweenDevices(t *testing.T) {
	g := wait(t)
	s := serve(t)
	a, b := paired(t, s, "15551111111"), paired(t, s, "15552222222")
	a2 := paired(t, s, "15551111111")
	g.Expect(a2.jid()).To(Equal("15551111111:2@s.whatsapp.net"))
	a.write(t, types.NewJID("15552222222", types.DefaultUserServer), "from a")
	g.Expect(first[*events.Message](t, b).Message.GetConversation()).To(Equal("from a"))
	copied := first[*events.Message](t, a2)
	g.Expect(copied.Info.IsFromMe).To(BeTrue())
	g.Expect(copied.Info.Chat).To(Equal(b.Store.GetLID().ToNonAD()))
	b.write(t, types.NewJID("15551111111", types.DefaultUserServer), "from b")
	g.Expect(first[*events.Message](t, a).Message.GetConversation()).To(Equal("from b"))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	all, err := s.Received("")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(all).To(HaveLen(2))
}

// A device with few one-time keys left is asked for more.
func TestPreKeysAreRefilled(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	left := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		d, err := s.deviceLocked(c.jid())
		g.Expect(err).NotTo(HaveOccurred())
		return len(d.preKeys)
	}
	g.Expect(left()).To(Equal(30))
	for i := range 26 {
		_, err := s.Send(t.Context(), c.jid(), "1555000"+string(rune('1'+i/10))+string(rune('0'+i%10)), "hello")
		g.Expect(err).NotTo(HaveOccurred())
	}
	g.Eventually(left).Should(BeNumerically(">", lowPreKeys))
	g.Eventually(func() []string { return texts(c) }).Should(HaveLen(26))
}

func TestScanRefuses(t *testing.T) {
	clock := clocktesting.NewFakeClock(time.Now())
	s := serve(t, func(o *Options) { o.Clock = clock })
	other := serve(t)
	c := newClient(t, s, newDevice())
	qr := codes(t, c)
	wait(t).Expect(qr).To(HaveLen(6))
	foreign := codes(t, newClient(t, other, newDevice()))[0]
	part := func(i int, value string) string {
		parts := strings.Split(qr[0], ",")
		parts[i] = value
		return strings.Join(parts, ",")
	}
	key := base64.StdEncoding.EncodeToString(make([]byte, 32))
	for _, row := range []struct {
		name, qr, phone string
		kind            error
		sentence        string
	}{
		{"nothing", "", "", ErrBadInput, "not a WhatsApp QR code"},
		{"garbage", "https://example.com/menu", "", ErrBadInput, "not a WhatsApp QR code"},
		{"four parts of garbage", "a,b,c,d", "", ErrBadInput, "its part 2"},
		{"five parts of garbage", codePrefix + "a,b,c,d,9", "", ErrBadInput, "its part 2"},
		{"no client type", part(4, ""), "", ErrBadInput, "not a WhatsApp QR code"},
		{"a client type without the link", strings.TrimPrefix(qr[0], codePrefix), "", ErrBadInput, "not a WhatsApp QR code"},
		{"a short key", part(3, "AAAA"), "", ErrBadInput, "its part 4"},
		{"another server's code", foreign, "", ErrBadInput, "not made by this server"},
		{"a forged ref", part(0, codePrefix+"2@"+base64.StdEncoding.EncodeToString(make([]byte, refLength))), "", ErrBadInput, "not made by this server"},
		{"another noise key", part(1, key), "", ErrBadInput, "not those of the client"},
		{"another identity key", part(2, key), "", ErrBadInput, "not those of the client"},
		{"a bad phone number", qr[0], "call me", ErrBadInput, "7 to 15 digits"},
		{"a number without a country code", qr[0], "0155512345", ErrBadInput, "7 to 15 digits"},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := s.Scan(t.Context(), row.qr, row.phone)
			g := wait(t)
			g.Expect(err).To(MatchError(row.kind))
			g.Expect(err).To(MatchError(ContainSubstring(row.sentence)))
			if secret := strings.TrimPrefix(row.qr, codePrefix); len(secret) > 20 {
				g.Expect(err.Error()).NotTo(ContainSubstring(secret[:20]), "a code is a secret")
			}
		})
	}
	t.Run("an expired code", func(t *testing.T) {
		g := wait(t)
		clock.Step(61 * time.Second)
		_, err := s.Scan(t.Context(), qr[0], "")
		g.Expect(err).To(MatchError(ErrNotNow))
		g.Expect(err).To(MatchError(ContainSubstring("expired")))
	})
	t.Run("all codes have expired", func(t *testing.T) {
		g := wait(t)
		g.Eventually(func() int { clock.Step(20 * time.Second); return s.Stats().Pairing }).Should(BeZero())
		first[*events.Disconnected](t, c)
		_, err := s.Scan(t.Context(), qr[5], "")
		g.Expect(err).To(MatchError(ErrNotNow))
		g.Expect(err).To(MatchError(ContainSubstring("gone")))
	})
	t.Run("the format of older clients", func(t *testing.T) {
		g := wait(t)
		c := newClient(t, other, newDevice())
		parts := strings.Split(strings.TrimPrefix(codes(t, c)[0], codePrefix), ",")
		_, err := other.Scan(t.Context(), strings.Join(parts[:4], ","), "")
		g.Expect(err).NotTo(HaveOccurred())
		first[*events.Connected](t, c)
	})
	t.Run("scanned twice", func(t *testing.T) {
		g := wait(t)
		c := newClient(t, other, newDevice())
		qr := codes(t, c)
		_, err := other.Scan(t.Context(), qr[1], "")
		g.Expect(err).NotTo(HaveOccurred())
		_, err = other.Scan(t.Context(), qr[2], "")
		g.Expect(err).To(MatchError(ErrNotNow))
		first[*events.Connected](t, c)
	})
	t.Run("a client that does not answer", func(t *testing.T) {
		g := wait(t)
		c := newClient(t, other, newDevice())
		qr := codes(t, c)
		_, err := other.Inject(Fault{Kind: FaultFreeze})
		g.Expect(err).NotTo(HaveOccurred())
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err = other.Scan(ctx, qr[0], "")
		g.Expect(err).To(MatchError(context.DeadlineExceeded))
		_, err = other.Clear("", "")
		g.Expect(err).NotTo(HaveOccurred())
		first[*events.PairSuccess](t, c)
	})
}

// A client must refuse a pairing with an identity that its code does not
// authenticate.
func TestClientRefusesBadIdentity(t *testing.T) {
	for kind, sentence := range map[FaultKind]string{
		FaultBadHMAC:      "hmac-mismatch",
		FaultBadSignature: "signature-mismatch",
	} {
		t.Run(string(kind), func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			_, err := s.Inject(Fault{Kind: kind})
			g.Expect(err).NotTo(HaveOccurred())
			c := newClient(t, s, newDevice())
			_, err = s.Scan(t.Context(), codes(t, c)[0], "")
			g.Expect(err).To(MatchError(ErrNotNow))
			g.Expect(err).To(MatchError(ContainSubstring(sentence)))
			first[*events.PairError](t, c)
			g.Expect(c.Store.ID).To(BeNil())
			g.Expect(s.Devices()).To(BeEmpty())
		})
	}
}

// A doubled connection is a second login while the first is still being read.
func TestDoubledConnections(t *testing.T) {
	for _, row := range []struct {
		name    string
		before  func(g *WithT, s *Server, c *client)
		doubled int64
	}{
		{"the first is alive", func(*WithT, *Server, *client) {}, 1},
		{"the first has disconnected", func(_ *WithT, _ *Server, c *client) { c.Disconnect() }, 0},
		{"the first is unreachable", func(g *WithT, s *Server, _ *client) {
			n, err := s.Inject(Fault{Kind: FaultFreeze})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(n).To(Equal(1))
		}, 0},
		{"the first is ending", func(g *WithT, s *Server, _ *client) {
			_, err := s.Inject(Fault{Kind: FaultStreamError, Code: "replaced"})
			g.Expect(err).NotTo(HaveOccurred())
		}, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			c := newClient(t, s, newDevice())
			c.EnableAutoReconnect = false
			pair(t, s, c, "")
			row.before(g, s, c)
			copied := *c.Store
			second := newClient(t, s, &copied)
			second.EnableAutoReconnect = false
			g.Expect(second.Connect()).To(Succeed())
			first[*events.Connected](t, second)
			if row.doubled > 0 {
				first[*events.StreamReplaced](t, c)
				g.Expect(s.Doubled()).To(ConsistOf(HaveField("Device", copied.ID.String())))
			}
			g.Eventually(func() int { return s.Stats().Connected }).Should(Equal(1))
			g.Expect(s.Stats().Doubled).To(Equal(row.doubled))
			g.Expect(of[*events.StreamReplaced](second)).To(BeEmpty())
		})
	}
}

// Unknown requests are refused, so that no client waits, and counted.
func TestUnknownRequestsAreCounted(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "")
	_, err := c.DangerousInternals().SendIQ(t.Context(), whatsmeow.DangerousInfoQuery{ //nolint:staticcheck // the only way to send this request
		Namespace: "w:strange", Type: "get", To: types.ServerJID, Content: []waBinary.Node{{Tag: "question"}},
	})
	g.Expect(err).To(MatchError(ContainSubstring("501")))
	g.Expect(s.Stats().Unknown).To(Equal(map[string]int64{"w:strange/get/question": 1}))
	s.mu.Lock()
	clear(s.unknown) // otherwise serve fails the test at its end
	s.mu.Unlock()
}

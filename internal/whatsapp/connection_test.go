package whatsapp

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	wastore "go.mau.fi/whatsmeow/store"
	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

// rootKey signs the certificates of all simulators but one: a process trusts one root.
var rootKey = [32]byte{4, 5, 6}

func TestMain(m *testing.M) {
	// Globals of the library, read by goroutines of its clients: set once, before the first.
	whatsmeow.KeepAliveIntervalMin = 100 * time.Millisecond
	// Three of these are the proof of life: long enough for a machine that is busy.
	whatsmeow.KeepAliveIntervalMax = 2 * time.Second
	whatsmeow.KeepAliveResponseDeadline = 400 * time.Millisecond
	// A request that the end of its connection has interrupted waits for 5 s for another connection.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.mau.fi/whatsmeow.(*Client).WaitForConnection"))
}

func init() { SetDefaultEventuallyTimeout(time.Minute) }

func wait(t testing.TB) *WithT {
	t.Helper()
	g := NewWithT(t)
	g.SetDefaultEventuallyPollingInterval(5 * time.Millisecond)
	return g
}

// environment is a simulated WhatsApp, a store and a factory.
type environment struct {
	t         testing.TB
	g         *WithT
	simulator *simulator.Server
	// url is that of the store's database.
	url     string
	store   *store.Store
	config  Config
	factory *Factory
	log     logr.Logger
	// hostile: the server sends data that makes the client log useless lines.
	hostile bool
}

func newEnvironment(t testing.TB, change ...func(*simulator.Options)) *environment {
	t.Helper()
	return newEnvironmentOn(t, filepath.Join(t.TempDir(), "keys.db"), change...)
}

// newEnvironmentOn is newEnvironment with the keys in another database.
func newEnvironmentOn(t testing.TB, url string, change ...func(*simulator.Options)) *environment {
	t.Helper()
	w := &environment{t: t, g: wait(t), url: url, log: logr.Discard()}
	options := simulator.Options{RootKey: &rootKey, CloseDelay: 200 * time.Millisecond}
	for _, f := range change {
		f(&options)
	}
	var err error
	w.simulator, err = simulator.New(options)
	w.g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.simulator.Run(ctx) }()
	t.Cleanup(func() {
		if !w.hostile {
			w.g.Expect(w.simulator.Stats().Unknown).To(BeEmpty())
		}
		cancel()
		w.g.Eventually(ended).Should(Receive(BeNil()))
	})

	w.store, err = store.Open(t.Context(), store.Config{URL: url}, logr.Discard())
	w.g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { w.g.Expect(w.store.Close()).To(Succeed()) })
	w.g.Expect(w.store.Migrate(t.Context())).To(Succeed())
	_, err = w.store.Claim(t.Context(), store.Claimant{SessionID: "shop", Namespace: "a", UID: "u"}, nil)
	w.g.Expect(err).NotTo(HaveOccurred())

	cfg := Config{DeviceName: "Test", Endpoint: w.simulator.Endpoint(), NoiseRoot: root(w.simulator)}
	if ca := w.simulator.CA(); ca != nil {
		cfg.CAFile = filepath.Join(t.TempDir(), "ca.pem")
		w.g.Expect(os.WriteFile(cfg.CAFile, ca, 0o600)).To(Succeed())
	}
	w.config = cfg
	w.newFactory(func(*Factory) {})
	return w
}

// newFactory makes another factory, which no goroutine of an older connection reads. Its
// connections do not end because they are silent, unless change sets another clock: with the
// short intervals of TestMain a busy machine looks like a silent server.
func (w *environment) newFactory(change func(*Factory)) {
	w.t.Helper()
	factory, err := Setup(w.config, logr.Discard())
	w.g.Expect(err).NotTo(HaveOccurred())
	factory.clock = fixedClock{at: time.Now()}
	change(factory)
	w.factory = factory
}

func root(s *simulator.Server) string {
	key := s.NoiseRoot()
	return hex.EncodeToString(key[:])
}

// testSession is a connection with its events and messages.
type testSession struct {
	*Connection
	w  *environment
	mu sync.Mutex
	// reported are the events, items what was accepted.
	reported []Event
	items    []delivery.MessageItem
}

func (s *testSession) events() []Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Event(nil), s.reported...)
}

// accepted are the items that were accepted.
func (s *testSession) accepted() []delivery.MessageItem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.items)
}

// texts are those of the messages that were accepted.
func (s *testSession) texts() []string { return textsOf(s.accepted()) }

func textsOf(items []delivery.MessageItem) (texts []string) {
	for _, item := range items {
		if item.Type == delivery.TypeText {
			texts = append(texts, item.Text)
		}
	}
	return texts
}

// event waits for one of that type.
func (s *testSession) event(kind EventType) (found Event) {
	s.w.t.Helper()
	s.w.g.Eventually(func() bool {
		for _, e := range s.events() {
			if e.Type == kind {
				found = e
				return true
			}
		}
		return false
	}).Should(BeTrue(), func() string { return fmt.Sprintf("waiting for %s, reported %v", kind, s.events()) })
	return found
}

// settled waits until every message has its receipt.
func (w *environment) settled() {
	w.t.Helper()
	w.g.Eventually(func() int { return w.simulator.Stats().Unacknowledged }).Should(BeZero())
}

// take makes the test the owner of the session.
func (w *environment) take() *store.Taking {
	w.t.Helper()
	r, err := w.store.Record(w.t.Context(), "u")
	w.g.Expect(err).NotTo(HaveOccurred())
	taking, err := w.store.Take(w.t.Context(), "u", r.Epoch+1)
	w.g.Expect(err).NotTo(HaveOccurred())
	return taking
}

// prepare makes a connection as the worker does, without connecting it.
func (w *environment) prepare(taking *store.Taking, change ...func(*Options)) (*testSession, context.Context) {
	w.t.Helper()
	ctx, cancel := context.WithCancelCause(context.Background())
	device, err := taking.Open(w.t.Context(), cancel)
	w.g.Expect(err).NotTo(HaveOccurred())
	s := &testSession{w: w}
	o := Options{Device: device, Log: func() logr.Logger { return w.log }, Events: func(e Event) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reported = append(s.reported, e)
	}, SessionID: "shop", Accept: func(_ context.Context, item delivery.MessageItem) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.items = append(s.items, item)
		return nil
	}}
	for _, f := range change {
		f(&o)
	}
	s.Connection, err = w.factory.New(o)
	w.g.Expect(err).NotTo(HaveOccurred())
	w.t.Cleanup(func() {
		s.Close()
		cancel(nil)
	})
	return s, ctx
}

// connect makes a connection and opens it.
func (w *environment) connect(taking *store.Taking, change ...func(*Options)) *testSession {
	w.t.Helper()
	s, ctx := w.prepare(taking, change...)
	w.g.Expect(s.Connect(ctx)).To(Succeed())
	return s
}

// pair links a device and ends the connection that did it.
func (w *environment) pair(taking *store.Taking, phone string, change ...func(*Options)) {
	w.t.Helper()
	s := w.connect(taking, change...)
	_, err := w.simulator.Scan(w.t.Context(), s.event(EventQR).Codes[0], phone)
	w.g.Expect(err).NotTo(HaveOccurred())
	s.event(EventDisconnected)
	s.Close()
}

// linked is a session that has been paired and is connected.
func linked(t *testing.T, change ...func(*simulator.Options)) (*environment, *store.Taking, *testSession) {
	t.Helper()
	w := newEnvironment(t, change...)
	taking := w.take()
	w.pair(taking, phone)
	s := w.connect(taking)
	s.event(EventConnected)
	return w, taking, s
}

const phone = "15551234567"

func TestFromTheCodeToTheFirstMessage(t *testing.T) {
	for name, withTLS := range map[string]bool{"ws": false, "wss": true} {
		t.Run(name, func(t *testing.T) {
			w := newEnvironment(t, func(o *simulator.Options) { o.TLS = withTLS })
			taking := w.take()
			s := w.connect(taking)
			w.g.Expect(s.Paired()).To(BeFalse())
			codes := s.event(EventQR).Codes
			w.g.Expect(codes).To(HaveLen(6))
			jid, err := w.simulator.Scan(t.Context(), codes[0], "+"+phone)
			w.g.Expect(err).NotTo(HaveOccurred())
			scanned := s.event(EventPairSuccess)
			lid := w.simulator.Devices()[0].LID
			w.g.Expect(lid).To(HaveSuffix(":1@lid"))
			w.g.Expect(scanned).To(Equal(Event{Type: EventPairSuccess, JID: jid, LID: lid, PhoneNumber: "+" + phone}))
			w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("StreamError515"))
			s.Close()
			r, err := w.store.Record(t.Context(), "u")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Expect(r.JID).To(Equal(jid))

			s = w.connect(taking)
			w.g.Expect(s.Paired()).To(BeTrue())
			w.g.Expect(s.event(EventConnected)).To(Equal(Event{Type: EventConnected, JID: jid, LID: lid, PhoneNumber: "+" + phone}))
			_, err = w.simulator.Send(t.Context(), phone, "", "hello")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Eventually(s.texts).Should(Equal([]string{"hello"}))
			w.settled()
			w.g.Expect(s.LastSeen()).To(BeTemporally("~", time.Now(), time.Minute))
			s.Close()

			// Another process, later.
			s = w.connect(w.take())
			s.event(EventConnected)
			_, err = w.simulator.Send(t.Context(), phone, "", "again")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Eventually(s.texts).Should(Equal([]string{"again"}))
			w.settled()
			w.g.Expect(w.simulator.Stats().Doubled).To(BeZero())
		})
	}
}

func TestEnds(t *testing.T) {
	w, taking, s := linked(t)
	s.Close()
	for name, row := range map[string]struct {
		fault simulator.Fault
		// login: the fault meets the login, not the connection.
		login  bool
		kind   EventType
		reason string
		// gone: the device is marked.
		gone bool
	}{
		"dropped":              {fault: simulator.Fault{Kind: simulator.FaultDrop}, kind: EventDisconnected, reason: "SocketClosed"},
		"the server restarts":  {fault: simulator.Fault{Kind: simulator.FaultStreamError, Code: "503"}, kind: EventDisconnected, reason: "StreamError503"},
		"unlinked":             {fault: simulator.Fault{Kind: simulator.FaultStreamError, Code: "device_removed"}, kind: EventLoggedOut, reason: "DeviceRemoved", gone: true},
		"replaced":             {fault: simulator.Fault{Kind: simulator.FaultStreamError, Code: "replaced"}, kind: EventReplaced, reason: "Replaced"},
		"515 later on":         {fault: simulator.Fault{Kind: simulator.FaultStreamError, Code: "515"}, kind: EventDisconnected, reason: "StreamError515"},
		"no keep-alive answer": {fault: simulator.Fault{Kind: simulator.FaultFreeze}, kind: EventDisconnected, reason: "KeepAliveTimeout"},
		"logged out":           {fault: simulator.Fault{Kind: simulator.FaultFailure, Reason: 401}, login: true, kind: EventLoggedOut, reason: "LoggedOut", gone: true},
		"locked":               {fault: simulator.Fault{Kind: simulator.FaultFailure, Reason: 403}, login: true, kind: EventLoggedOut, reason: "AccountLocked", gone: true},
		"banned for good":      {fault: simulator.Fault{Kind: simulator.FaultFailure, Reason: 406}, login: true, kind: EventLoggedOut, reason: "AccountBanned", gone: true},
		"banned":               {fault: simulator.Fault{Kind: simulator.FaultFailure, Reason: 402, Expire: metav1.Duration{Duration: time.Hour}}, login: true, kind: EventBanned, reason: "TemporaryBan101"},
		"outdated":             {fault: simulator.Fault{Kind: simulator.FaultFailure, Reason: 405}, login: true, kind: EventOutdated, reason: "ClientOutdated"},
		"unavailable":          {fault: simulator.Fault{Kind: simulator.FaultFailure, Reason: 503}, login: true, kind: EventDisconnected, reason: "ConnectFailure503"},
		"an unknown failure":   {fault: simulator.Fault{Kind: simulator.FaultFailure, Reason: 418}, login: true, kind: EventDisconnected, reason: "ConnectFailure418"},
		"the login is refused": {fault: simulator.Fault{Kind: simulator.FaultRefuse, Device: phone}, login: true, kind: EventDisconnected, reason: "SocketClosed"},
	} {
		t.Run(name, func(t *testing.T) {
			w.newFactory(func(f *Factory) {
				if row.fault.Kind == simulator.FaultFreeze {
					f.clock = clock.RealClock{}
				}
			})
			var s *testSession
			if !row.login {
				s = w.connect(taking)
				s.event(EventConnected)
			}
			_, err := w.simulator.Inject(row.fault)
			w.g.Expect(err).NotTo(HaveOccurred())
			if row.login {
				s = w.connect(taking)
			}
			end := s.event(row.kind)
			w.g.Expect(end.Reason).To(Equal(row.reason))
			w.g.Expect(end.Message).NotTo(BeEmpty())
			if row.kind == EventBanned {
				w.g.Expect(end.Until).To(BeTemporally("~", time.Now().Add(time.Hour), time.Minute))
			}

			// When the end is reported, the device has been kept or marked.
			r, err := w.store.Record(t.Context(), "u")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Expect(r.JID == "").To(Equal(row.gone))
			w.g.Consistently(s.events, "100ms").Should(ContainElement(HaveField("Type", row.kind)))
			ends := 0
			for _, e := range s.events() {
				if e.Over() {
					ends++
				}
			}
			w.g.Expect(ends).To(Equal(1), "%v", s.events())

			// The session can connect again.
			_, err = w.simulator.Clear("", "")
			w.g.Expect(err).NotTo(HaveOccurred())
			s.Close()
			if row.gone {
				w.pair(taking, phone)
			}
			s = w.connect(taking)
			s.event(EventConnected)
			s.Close()
		})
	}
}

// WhatsApp retires a code when a phone has scanned it: the new one is reported at once, and
// links the device.
func TestACodeThatIsReplaced(t *testing.T) {
	w := newEnvironment(t)
	s := w.connect(w.take())
	before := s.event(EventQR).Codes
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultRetireCode})
	w.g.Expect(err).NotTo(HaveOccurred())
	_, err = w.simulator.Scan(t.Context(), before[0], phone)
	w.g.Expect(err).To(MatchError(simulator.ErrNotNow))
	after := s.event(EventCodesReplaced).Codes
	w.g.Expect(after).To(HaveLen(len(before)))
	for i := range after {
		old, renewed := strings.Split(before[i], ","), strings.Split(after[i], ",")
		w.g.Expect(renewed[3]).NotTo(Equal(old[3]))
		w.g.Expect(renewed[3]).To(Equal(strings.Split(after[0], ",")[3]), "one secret in all")
		renewed[3] = old[3]
		w.g.Expect(renewed).To(Equal(old), "nothing else changes")
	}
	_, err = w.simulator.Scan(t.Context(), before[0], phone)
	w.g.Expect(err).To(MatchError(simulator.ErrNotNow), "the phone scans the retired one again")
	jid, err := w.simulator.Scan(t.Context(), after[0], phone)
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.event(EventPairSuccess).JID).To(Equal(jid))
}

// A write that fails may have been received: the device is kept until WhatsApp says at its
// login that it is not linked.
func TestTheAnswerToAScanCannotBeWritten(t *testing.T) {
	w := newEnvironment(t)
	taking := w.take()
	s := w.connect(taking, func(o *Options) {
		o.Allowed = func() error {
			if r, err := w.store.Record(context.Background(), "u"); err != nil || r.JID != "" {
				return errors.New("nothing may be written when the device is stored")
			}
			return nil
		}
	})
	_, err := w.simulator.Scan(t.Context(), s.event(EventQR).Codes[0], phone)
	w.g.Expect(err).To(MatchError(simulator.ErrNotNow))
	s.event(EventDisconnected)
	s.Close()
	r, err := w.store.Record(t.Context(), "u")
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(r.JID).NotTo(BeEmpty())

	s = w.connect(taking)
	s.event(EventLoggedOut)
	s.Close()
	w.pair(taking, phone)
	s = w.connect(taking)
	s.event(EventConnected)
	w.g.Expect(w.simulator.Devices()).To(HaveLen(1))
}

func TestPairingByCode(t *testing.T) {
	w := newEnvironment(t)
	taking := w.take()
	byCode := func(o *Options) { o.PairPhone = "+" + phone }
	s := w.connect(taking, byCode)
	shown := s.event(EventPairingCode)
	w.g.Expect(shown.Until).To(BeTemporally("~", time.Now().Add(codeLifetime), 20*time.Second))

	// The right code in the wrong place, and a wrong code: no device is linked.
	_, err := w.simulator.EnterCode(t.Context(), "15557654321", shown.Code)
	w.g.Expect(err).To(MatchError(simulator.ErrNotNow))
	wrong := "1111-1111"
	w.g.Expect(shown.Code).NotTo(Equal(wrong))
	_, err = w.simulator.EnterCode(t.Context(), phone, wrong)
	w.g.Expect(err).To(MatchError(simulator.ErrBadInput))
	w.g.Expect(s.events()).To(HaveExactElements(shown), "no QR code is shown, and the wrong codes are not reported")

	jid, err := w.simulator.EnterCode(t.Context(), phone, shown.Code)
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.event(EventPairSuccess)).To(Equal(Event{Type: EventPairSuccess, JID: jid, LID: w.simulator.Devices()[0].LID, PhoneNumber: "+" + phone}))
	w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("StreamError515"))
	s.Close()

	s = w.connect(taking, byCode) // a linked device asks for no code
	s.event(EventConnected)
	_, err = w.simulator.Send(t.Context(), phone, "", "hello")
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Eventually(s.texts).Should(Equal([]string{"hello"}))
	w.settled()
	w.g.Expect(s.events()).To(HaveExactElements(HaveField("Type", EventConnected)))
}

// If WhatsApp refuses a code, the connection ends with a sentence for people.
func TestNoPairingCode(t *testing.T) {
	w := newEnvironment(t)
	taking := w.take()
	for name, row := range map[string]struct {
		phone  string
		fault  int
		kind   EventType
		reason string
	}{
		"asked too often":           {phone: "+" + phone, fault: 429, kind: EventCodeRefused, reason: "PairingCodeRefused429"},
		"a number without WhatsApp": {phone: "+" + phone, fault: 404, kind: EventCodeRefused, reason: "PairingCodeRefused404"},
		"a bad number":              {phone: "+1555123456789012", kind: EventCodeRefused, reason: "PairingCodeRefused400"},
		"a number that is none":     {phone: "+123", kind: EventCodeRefused, reason: "PhoneNumberInvalid"},
		"an outage":                 {phone: "+" + phone, fault: 503, kind: EventDisconnected, reason: "PairingCodeFailed"},
	} {
		t.Run(name, func(*testing.T) {
			if row.fault != 0 {
				_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultRefuseCode, Reason: row.fault})
				w.g.Expect(err).NotTo(HaveOccurred())
			}
			s := w.connect(taking, func(o *Options) { o.PairPhone = row.phone })
			end := s.event(row.kind)
			w.g.Expect(end.Reason).To(Equal(row.reason))
			w.g.Expect(end.Message).NotTo(BeEmpty())
			w.g.Expect(end.Over()).To(BeTrue())
			w.g.Eventually(func() int { return w.simulator.Stats().Pairing }).Should(BeZero(), "the socket is closed")
			w.g.Expect(s.events()).To(HaveExactElements(end), "the end is reported once")
			_, err := w.simulator.Clear("", "")
			w.g.Expect(err).NotTo(HaveOccurred())
		})
	}
}

// A failure of our own store must not be taken for WhatsApp's, which would count against the session.
func TestTheStoreFailsWhileACodeIsAskedFor(t *testing.T) {
	w := newEnvironment(t)
	var fail context.CancelCauseFunc
	opened := make(chan struct{})
	s, ctx := w.prepare(w.take(), func(o *Options) {
		o.PairPhone = "+" + phone
		o.Allowed = func() error {
			if w.simulator.Stats().Pairing > 0 { // the codes have come; this is an answer or the question
				<-opened
				fail(errors.New("the database is away"))
			}
			return nil
		}
	})
	ctx, fail = context.WithCancelCause(ctx)
	defer fail(nil)
	w.g.Expect(s.Connect(ctx)).To(Succeed())
	close(opened)
	end := s.event(EventDisconnected)
	w.g.Expect(end.Reason).To(Equal("StoreFailed"))
	w.g.Expect(end.Ours).To(BeTrue())
}

// A panic of the library in one session must not end the worker's other sessions.
func TestAPanicWhileACodeIsAskedFor(t *testing.T) {
	var reported []Event
	c := &Connection{
		client: &whatsmeow.Client{}, ctx: t.Context(), // it has no store and no socket
		options: Options{PairPhone: "+" + phone, Log: logr.Discard, Events: func(e Event) { reported = append(reported, e) }},
	}
	g := NewWithT(t)
	g.Expect(func() { c.askForCode(time.Now()) }).NotTo(Panic())
	g.Expect(reported).To(BeEmpty())
}

func TestDroppedWhileACodeIsShown(t *testing.T) {
	w := newEnvironment(t)
	s := w.connect(w.take(), func(o *Options) { o.PairPhone = "+" + phone })
	s.event(EventPairingCode)
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultDrop})
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("SocketClosed"))
}

// Nothing waits for a code after Close; the check for leaks is in TestMain.
func TestClosedWhileACodeIsAskedFor(t *testing.T) {
	w := newEnvironment(t)
	taking := w.take()
	for range 5 {
		s := w.connect(taking, func(o *Options) { o.PairPhone = "+" + phone })
		s.Close()
		before := s.events()
		w.g.Eventually(func() int { return w.simulator.Stats().Pairing }).Should(BeZero())
		w.g.Expect(s.events()).To(Equal(before), "nothing is reported after Close")
	}
}

// whatsmeow reports nothing when the last node of a pairing is lost with its socket.
func TestALost515IsAnEnd(t *testing.T) {
	w := newEnvironment(t)
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultLoseEnd})
	w.g.Expect(err).NotTo(HaveOccurred())
	taking := w.take()
	s := w.connect(taking)
	_, err = w.simulator.Scan(t.Context(), s.event(EventQR).Codes[0], phone)
	w.g.Expect(err).NotTo(HaveOccurred())
	s.event(EventPairSuccess)
	w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("SocketClosed"))
	s.Close()
	_, err = w.simulator.Clear("", "")
	w.g.Expect(err).NotTo(HaveOccurred())
	w.connect(taking).event(EventConnected)
}

func TestCodesRunOut(t *testing.T) {
	w := newEnvironment(t, func(o *simulator.Options) { o.RefLifetime = 20 * time.Millisecond })
	s := w.connect(w.take())
	s.event(EventQR)
	w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("SocketClosed"))
}

func TestABadPairingIsRefused(t *testing.T) {
	for kind, message := range map[simulator.FaultKind]string{
		simulator.FaultBadHMAC:      "invalid device identity HMAC",
		simulator.FaultBadSignature: "invalid device signature",
	} {
		t.Run(string(kind), func(t *testing.T) {
			w := newEnvironment(t)
			_, err := w.simulator.Inject(simulator.Fault{Kind: kind})
			w.g.Expect(err).NotTo(HaveOccurred())
			s := w.connect(w.take())
			_, err = w.simulator.Scan(t.Context(), s.event(EventQR).Codes[0], phone)
			w.g.Expect(err).To(HaveOccurred())
			w.g.Expect(s.event(EventPairError).Message).To(ContainSubstring(message))
			s.event(EventDisconnected)
			w.g.Expect(w.store.Records(t.Context())).To(HaveExactElements(HaveField("JID", BeEmpty())))
			w.g.Expect(w.store.Marked(t.Context())).To(BeEmpty())
		})
	}
}

func TestLogout(t *testing.T) {
	w, taking, s := linked(t)
	w.g.Expect(s.Logout(t.Context())).To(Succeed())
	w.g.Expect(w.simulator.Devices()).To(BeEmpty())
	s.Close()
	w.g.Expect(s.events()).To(HaveExactElements(HaveField("Type", EventConnected)))
	w.g.Expect(taking.Forget(t.Context())).To(Succeed())
	w.g.Expect(w.store.Records(t.Context())).To(BeEmpty())
	w.g.Expect(w.store.Marked(t.Context())).To(BeEmpty())
}

func TestLogoutOfADeviceThatIsUnlinked(t *testing.T) {
	w, _, s := linked(t)
	// The answer to the logout is lost with the socket: the stream error says it.
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultStreamError, Code: "device_removed"})
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.Logout(t.Context())).To(Succeed())
}

func TestLogoutThatFails(t *testing.T) {
	w, _, s := linked(t)
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultFreeze})
	w.g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	w.g.Expect(s.Logout(ctx)).To(MatchError(context.DeadlineExceeded))
	r, err := w.store.Record(t.Context(), "u")
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(r.JID).NotTo(BeEmpty(), "the keys stay for the next attempt")
}

// A successor takes the session while a message is on its way: the old owner
// must neither move the ratchet nor acknowledge, and the successor gets it.
func TestTheFenceInTheMiddleOfAMessage(t *testing.T) {
	w, _, old := linked(t)
	successor := w.take()
	_, err := w.simulator.Send(t.Context(), phone, "", "for the successor")
	w.g.Expect(err).NotTo(HaveOccurred())
	end := old.event(EventDisconnected)
	w.g.Expect(end.Reason).To(Equal("StoreFailed"))
	w.g.Expect(end.Message).To(ContainSubstring("another process has taken the session"))
	w.g.Expect(old.texts()).To(BeEmpty())
	w.g.Expect(w.simulator.Stats().Unacknowledged).To(Equal(1))
	w.g.Expect(w.simulator.Stats().Retries).To(BeZero(), "no request to encrypt it again")
	old.Close()

	s := w.connect(successor)
	s.event(EventConnected)
	w.g.Eventually(s.texts).Should(Equal([]string{"for the successor"}))
	w.settled()
	w.g.Expect(w.simulator.Stats().Redelivered).To(BeEquivalentTo(1))
	w.g.Expect(w.simulator.Stats().Retries).To(BeZero())
}

func TestCloseDoesNotWaitForADeadPeer(t *testing.T) {
	w, taking, s := linked(t)
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultFreeze})
	w.g.Expect(err).NotTo(HaveOccurred())
	closed := make(chan struct{})
	go func() { s.Close(); close(closed) }()
	w.g.Eventually(closed, "4s").Should(BeClosed()) // whatsmeow's own Disconnect takes 5 s
	_, err = w.simulator.Clear("", "")
	w.g.Expect(err).NotTo(HaveOccurred())

	_, err = w.simulator.Inject(simulator.Fault{Kind: simulator.FaultSlowUpgrade, Delay: metav1.Duration{Duration: time.Hour}})
	w.g.Expect(err).NotTo(HaveOccurred())
	hanging, ctx := w.prepare(taking)
	result := make(chan error, 1)
	go func() { result <- hanging.Connect(ctx) }()
	w.g.Eventually(func() bool { return hanging.socket.Load() != nil }).Should(BeTrue())
	w.g.Consistently(result, "50ms").ShouldNot(Receive())
	hanging.Close()
	w.g.Eventually(result).Should(Receive(MatchError(context.Canceled)))
	w.g.Expect(hanging.events()).To(BeEmpty())
	_, err = w.simulator.Clear("", "")
	w.g.Expect(err).NotTo(HaveOccurred())
}

func TestTheEndOfItsContextClosesTheSocket(t *testing.T) {
	w := newEnvironment(t)
	taking := w.take()
	w.pair(taking, phone)
	s, _ := w.prepare(taking)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w.g.Expect(s.Connect(ctx)).To(Succeed())
	s.event(EventConnected)
	cancel()
	w.g.Eventually(func() int { return w.simulator.Stats().Connected }).Should(BeZero())
	w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("Cancelled"))
	w.g.Expect(s.Connect(t.Context())).NotTo(Succeed(), "it is used once")
}

func TestAServerThatRefuses(t *testing.T) {
	w := newEnvironment(t)
	_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultRefuse})
	w.g.Expect(err).NotTo(HaveOccurred())
	s, ctx := w.prepare(w.take())
	err = s.Connect(ctx)
	var refused *ConnectError
	w.g.Expect(errors.As(err, &refused)).To(BeTrue(), "%v", err)
	w.g.Expect(refused.Reason).To(Equal("Refused"))
	w.g.Expect(err).To(MatchError("WhatsApp refused the connection with HTTP status 503"))
	w.g.Expect(s.events()).To(BeEmpty(), "the error says it")
}

func TestAnotherRootIsRefused(t *testing.T) {
	w := newEnvironment(t)
	other := newSimulator(t, &[32]byte{9})
	_, err := Setup(Config{Endpoint: other.Endpoint(), NoiseRoot: root(other)}, logr.Discard())
	w.g.Expect(err).To(MatchError(ContainSubstring("trusts another")))

	w.factory.endpoint, err = parseEndpoint(other.Endpoint())
	w.g.Expect(err).NotTo(HaveOccurred())
	s, ctx := w.prepare(w.take())
	err = s.Connect(ctx)
	var refused *ConnectError
	w.g.Expect(errors.As(err, &refused)).To(BeTrue(), "%v", err)
	w.g.Expect(refused.Reason).To(Equal("CertificateRefused"))
}

func newSimulator(t *testing.T, key *[32]byte) *simulator.Server {
	t.Helper()
	g := wait(t)
	s, err := simulator.New(simulator.Options{RootKey: key})
	g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		g.Expect(s.Stats().Unknown).To(BeEmpty())
		cancel()
		g.Eventually(ended).Should(Receive(BeNil()))
	})
	return s
}

func TestAnotherAuthorityIsRefused(t *testing.T) {
	w := newEnvironment(t, func(o *simulator.Options) { o.TLS = true })
	var err error
	w.factory, err = Setup(Config{Endpoint: w.simulator.Endpoint(), NoiseRoot: root(w.simulator)}, logr.Discard())
	w.g.Expect(err).NotTo(HaveOccurred())
	s, ctx := w.prepare(w.take())
	w.g.Expect(s.Connect(ctx)).To(MatchError(ContainSubstring("certificate")))
}

func TestTheLogHoldsNoSecret(t *testing.T) {
	w := newEnvironment(t)
	var mu sync.Mutex
	var lines string
	w.log = funcr.New(func(prefix, args string) {
		mu.Lock()
		defer mu.Unlock()
		lines += prefix + args + "\n"
	}, funcr.Options{Verbosity: 9})
	taking := w.take()
	s := w.connect(taking)
	code := s.event(EventQR).Codes[0]
	_, err := w.simulator.Scan(t.Context(), code, phone)
	w.g.Expect(err).NotTo(HaveOccurred())
	s.event(EventDisconnected)
	s.Close()
	s = w.connect(taking)
	s.event(EventConnected)
	_, err = w.simulator.Send(t.Context(), phone, "", "a secret text")
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Eventually(s.texts).Should(HaveLen(1))
	w.settled()
	s.Close()
	mu.Lock()
	defer mu.Unlock()
	w.g.Expect(lines).To(ContainSubstring("Successfully authenticated"))
	w.g.Expect(lines).NotTo(Or(ContainSubstring(code[:20]), ContainSubstring("a secret text"), ContainSubstring("<iq")))
}

func TestTheNameThatThePhoneShows(t *testing.T) {
	w := newEnvironment(t)
	device, err := w.take().Open(t.Context(), func(error) {})
	w.g.Expect(err).NotTo(HaveOccurred())
	for want, name := range map[string]string{"Test": "", "Shop 1": "Shop 1"} {
		c, err := w.factory.New(Options{Device: device, DeviceName: name, Events: func(Event) {}})
		w.g.Expect(err).NotTo(HaveOccurred())
		w.g.Expect(string(c.payload().DevicePairingData.DeviceProps)).To(ContainSubstring(want))
	}
	newer := wastore.WAVersionContainer{2, 3000, 4_000_000_000}
	w.factory.version.Store(&newer)
	c, err := w.factory.New(Options{Device: device, Events: func(Event) {}})
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(c.payload().UserAgent.AppVersion.GetTertiary()).To(Equal(uint32(4_000_000_000)))

	_, err = w.factory.New(Options{Device: device})
	w.g.Expect(err).To(HaveOccurred())
	_, err = w.factory.New(Options{Device: device, Events: func(Event) {}, Proxy: &url.URL{Scheme: "gopher"}})
	w.g.Expect(err).To(MatchError(ErrBadProxy))
}

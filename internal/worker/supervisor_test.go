package worker

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// world stands for all that a supervisor touches, and keeps a diary in which
// the order of things can be read.
type world struct {
	mu      sync.Mutex
	diary   []string
	obj     *v1alpha1.WhatsAppSession
	version int

	apiDown    bool // nothing reaches the API server
	answerLost int  // so many writes reach it, but their answers are lost
	redisDown  bool
	redisEpoch int64 // Redis has something newer, of this epoch
	takeErr    error
	dialErr    error
	logoutErr  error
	forgetErr  error
	same       bool // WhatsApp's answer to whose account a number is
	sameErr    error
	numbers    []string // that it was asked for
	proxyDown  int      // so many times the proxy's Secret cannot be read

	proxy       *url.URL
	logins      []Login // that waited for a token
	forgetCalls int

	starts int64
	// settled are the takings that were settled, by their starts.
	settled []int64
	device  account
	events  func(session.Event)
	open    int
	told    []session.Publication
	// pairPhones are the phones that codes were to be typed on, of each connection.
	pairPhones []string
}

var errDown = errors.New("connection refused")

func (w *world) note(format string, args ...any) {
	w.diary = append(w.diary, fmt.Sprintf(format, args...))
}

func (w *world) locked(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *world) Get(context.Context, types.NamespacedName) (*v1alpha1.WhatsAppSession, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.apiDown:
		return nil, errDown
	case w.obj == nil:
		return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "whatsappsessions"}, "shop")
	}
	return w.obj.DeepCopy(), nil
}

func (w *world) HeldNotPlaced(_ context.Context, worker string) ([]v1alpha1.WhatsAppSession, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.apiDown:
		return nil, errDown
	case w.obj == nil || w.obj.Status.HeldBy != worker || w.obj.Status.Worker == worker:
		return nil, nil
	}
	return []v1alpha1.WhatsAppSession{*w.obj.DeepCopy()}, nil
}

func (w *world) PatchStatus(_ context.Context, base *v1alpha1.WhatsAppSession, s v1alpha1.WhatsAppSessionStatus) (*v1alpha1.WhatsAppSession, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	resource := schema.GroupResource{Resource: "whatsappsessions"}
	switch {
	case w.apiDown:
		return nil, errDown
	case w.obj == nil:
		return nil, apierrors.NewNotFound(resource, "shop")
	case base.ResourceVersion != w.obj.ResourceVersion:
		w.note("conflict")
		return nil, apierrors.NewConflict(resource, "shop", errors.New("the object has changed"))
	}
	if s.HeldBy != w.obj.Status.HeldBy {
		w.note("heldBy=%q", s.HeldBy)
	}
	w.obj = w.obj.DeepCopy()
	w.obj.Status = *s.DeepCopy()
	w.bump()
	if w.answerLost > 0 {
		w.answerLost--
		return nil, context.DeadlineExceeded
	}
	return w.obj.DeepCopy(), nil
}

func (w *world) bump() {
	w.version++
	w.obj.ResourceVersion = strconv.Itoa(w.version)
}

func (w *world) Take(_ context.Context, _ types.UID, epoch int64) (Account, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.takeErr != nil {
		return nil, w.takeErr
	}
	w.starts++
	w.note("take %d", epoch)
	a := w.device
	a.starts = w.starts
	return &liveAccount{account: a, w: w}, nil
}

type liveAccount struct {
	account
	w *world
}

func (a *liveAccount) Dial(_ context.Context, o DialOptions) (Connection, error) {
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	if a.w.dialErr != nil {
		return nil, a.w.dialErr
	}
	a.w.open++
	a.w.events = o.Events
	a.w.pairPhones = append(a.w.pairPhones, o.PairPhone)
	a.w.note("dial")
	return &liveConnection{w: a.w, paired: a.w.device.jid != ""}, nil
}

func (a *liveAccount) Settle(context.Context) error {
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	a.w.settled = append(a.w.settled, a.starts)
	return nil
}

func (a *liveAccount) RecordTrial(_ context.Context, size int32) error {
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	a.w.note("trial %d", size)
	return nil
}

func (a *liveAccount) Forget(context.Context) error {
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	a.w.forgetCalls++
	if a.w.forgetErr != nil {
		return a.w.forgetErr
	}
	a.w.note("forget")
	return nil
}

type liveConnection struct {
	w      *world
	paired bool
}

func (c *liveConnection) Paired() bool { return c.paired }

func (c *liveConnection) SameAccount(_ context.Context, number string) (bool, error) {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.w.numbers = append(c.w.numbers, number)
	return c.w.same, c.w.sameErr
}

func (c *liveConnection) Logout(context.Context) error {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	if c.w.logoutErr != nil {
		return c.w.logoutErr
	}
	c.w.note("logout")
	c.w.device = account{}
	return nil
}

func (c *liveConnection) Close() {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.w.open--
	c.w.note("close")
}

func (w *world) Proxy(context.Context, *v1alpha1.WhatsAppSession) (*url.URL, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.proxyDown > 0 {
		w.proxyDown--
		return nil, errDown
	}
	return w.proxy, nil
}

func (w *world) Publish(_ context.Context, a session.Publication) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.redisDown {
		return errDown
	}
	if a.Status.Epoch <= w.redisEpoch {
		return fmt.Errorf("enqueueing: %w", &StaleError{Epoch: w.redisEpoch})
	}
	w.told = append(w.told, a)
	return nil
}

func (w *world) Refresh(context.Context, []session.Publication) error { return nil }

func (w *world) Wait(ctx context.Context, login Login) error {
	w.locked(func() { w.logins = append(w.logins, login) })
	return ctx.Err()
}
func (w *world) Free() int { return 1 }

func (w *world) Event(_ *v1alpha1.WhatsAppSession, _, reason, _ string) {
	w.locked(func() { w.note("event %s", reason) })
}

// stage is a world with a supervisor and a clock in it.
type stage struct {
	*WithT
	*world
	s     *supervisor
	clock *clocktesting.FakeClock
}

func newStage(t *testing.T, obj *v1alpha1.WhatsAppSession, device account, before ...func(*world)) *stage {
	g := NewWithT(t)
	w := &world{obj: obj, device: device, version: 1}
	for _, f := range before {
		f(w)
	}
	fake := clocktesting.NewFakeClock(noon)
	s := newSupervisor(dependencies{
		Sessions: w, Accounts: w, Proxies: w, Publisher: w, Limiter: w, Events: w, Clock: fake, Dials: new(atomic.Int64), Health: NewHealth(fake, testr.New(t)),
		Fleet: newFleet(Outdated{}, nil, fake, testr.New(t), func() int { return 100 }, func() int { return 100 }, func() {}, func(map[types.UID]bool) {}),
	}, testr.NewWithOptions(t, testr.Options{Verbosity: 1}), obj, me, process, nil)
	ctx, cancel := context.WithCancel(t.Context())
	go s.run(ctx)
	t.Cleanup(func() {
		cancel()
		<-s.finished
		w.mu.Lock()
		defer w.mu.Unlock()
		g.Expect(w.open).To(BeZero(), "a socket was left open")
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	st := &stage{WithT: g, world: w, s: s, clock: fake}
	st.see()
	return st
}

// see shows the supervisor the object as it is, as a watch would.
func (st *stage) see() {
	var obj *v1alpha1.WhatsAppSession
	st.locked(func() {
		if st.obj != nil {
			obj = st.obj.DeepCopy()
		}
	})
	st.s.post(func() {
		if obj == nil {
			st.s.step(session.Vanished{})
			return
		}
		st.s.observe(obj)
	})
}

// change is a write by somebody else, which the watch shows.
func (st *stage) change(f func(*v1alpha1.WhatsAppSession)) {
	st.locked(func() {
		st.obj = st.obj.DeepCopy()
		f(st.obj)
		st.bump()
	})
	st.see()
}

func (st *stage) happens(e session.Event) {
	var events func(session.Event)
	st.locked(func() { events = st.events })
	events(e)
}

func (st *stage) status() v1alpha1.WhatsAppSessionStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	return *st.obj.Status.DeepCopy()
}

func (st *stage) eventually(p v1alpha1.Phase) {
	st.Eventually(func() v1alpha1.Phase { return st.status().Phase }).WithTimeout(10 * time.Second).Should(Equal(p))
}

func (st *stage) dials(n int) {
	st.Eventually(func() (count int) {
		for _, line := range st.lines() {
			if line == "dial" {
				count++
			}
		}
		return count
	}).WithTimeout(10 * time.Second).Should(Equal(n))
}

func (st *stage) lines() []string {
	st.mu.Lock()
	defer st.mu.Unlock()
	return slices.Clone(st.diary)
}

func (st *stage) words() (words []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, a := range st.told {
		words = append(words, string(a.Status.Status)+"/"+a.Status.Phase)
	}
	return words
}

// connect brings a session with a device to Connected.
func (st *stage) connect() {
	st.dials(1)
	st.happens(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventually(v1alpha1.PhaseConnected)
	st.Eventually(st.words).Should(ContainElement("active/Connected"))
}

func TestFromPlacementToConnected(t *testing.T) {
	st := newStage(t, newSession(), account{})
	st.dials(1)
	st.happens(session.Event{Type: session.EventQR, Codes: []string{"one", "two"}})
	st.Eventually(func() *v1alpha1.QRStatus { return st.status().QR }).ShouldNot(BeNil())
	st.Expect(st.status().QR.Code).To(Equal("one"))
	st.Eventually(func() bool { return st.clock.HasWaiters() }).Should(BeTrue())
	st.clock.Step(time.Minute)
	st.Eventually(func() string { return st.status().QR.Code }).Should(Equal("two"))

	st.locked(func() { st.device = account{jid: jid, phone: phone} })
	st.happens(session.Event{Type: session.EventPairSuccess, JID: jid, PhoneNumber: phone})
	st.happens(session.Event{Type: session.EventDisconnected, Reason: "StreamError515"})
	st.dials(2)
	st.happens(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone, PushName: "The shop"})
	st.eventually(v1alpha1.PhaseConnected)

	status := st.status()
	st.Expect(status.PhoneNumber).To(Equal(phone))
	st.Expect(status.PushName).To(Equal("The shop"))
	st.Expect(status.QR).To(BeNil())
	st.Expect(status.HeldBy).To(Equal(me))
	st.Expect(st.lines()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Paired", "close", "dial", "event Connected"))
	st.Eventually(func() string {
		words := st.words()
		return words[len(words)-1]
	}).Should(Equal("active/Connected"))
	st.locked(func() {
		for i := 1; i < len(st.told); i++ {
			st.Expect(st.told[i].Status.Newer(st.told[i-1].Status.Numbers)).To(BeTrue(), "numbers must rise")
		}
	})
}

func TestAMoveClosesTheSocketBeforeTheRelease(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.lines()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Connected", "close", `heldBy=""`))
	st.Expect(st.words()).To(ContainElement("pending/Disconnected"))
	st.Expect(st.status().Epoch).To(BeEquivalentTo(101))
}

func TestAMoveToItselfTakesTheKeysAnew(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.dials(2)
	st.Expect(st.lines()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Connected",
		"close", `heldBy=""`, `heldBy="worker-a"`, "take 101", "dial"))
}

func TestARestartInPlaceWritesOneClaim(t *testing.T) {
	st := newStage(t, newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Status.HeldBy, s.Status.HolderStart, s.Status.Phase = me, "p0", v1alpha1.PhaseConnected
	}), account{jid: jid, phone: phone})
	st.connect()
	st.Expect(st.lines()).To(HaveExactElements("take 100", "dial", "event Connected"), "the hold is never given up")
	st.Expect(st.status().HolderStart).To(Equal(process))
}

func TestAForgetThatFailsIsRepeated(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.forgetErr = errDown })
	st.change(deleted)
	st.Eventually(st.lines).Should(ContainElement("close"))
	st.Eventually(func() int32 { return int32(st.forgets()) }).Should(BeNumerically(">=", 1))
	st.locked(func() { st.forgetErr = nil })
	st.Eventually(func() string { st.clock.Step(time.Second); return st.status().HeldBy }).Should(BeEmpty())
	st.Expect(st.forgets()).To(BeNumerically("<", 50), "with pauses in between")
}

func (st *stage) forgets() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.forgetCalls
}

func TestAConflictIsReadAndDecidedAgain(t *testing.T) {
	obj := newSession()
	st := newStage(t, obj, account{jid: jid, phone: phone})
	st.connect()
	// Somebody writes and the watch is late: the supervisor's next write is refused.
	st.locked(func() {
		st.obj = st.obj.DeepCopy()
		st.obj.Spec.DeviceName = "till"
		st.obj.Generation = 2
		st.bump()
	})
	st.happens(session.Event{Type: session.EventPushName, PushName: "The shop"})
	st.Eventually(func() string { return st.status().PushName }).Should(Equal("The shop"))
	st.Expect(st.lines()).To(ContainElement("conflict"))
	st.Expect(st.status().ObservedGeneration).To(BeEquivalentTo(2))
}

func TestAClaimWhoseAnswerIsLost(t *testing.T) {
	obj := newSession()
	st := newStage(t, obj, account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.answerLost = 1 })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.dials(2)
	st.Expect(st.lines()).To(ContainElements("take 100", "take 101"))
}

func TestAnAPIServerOutageDropsNoConnection(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.apiDown = true })
	st.happens(session.Event{Type: session.EventPushName, PushName: "The shop"})
	st.happens(session.Event{Type: session.EventDisconnected, Message: "the socket closed"})
	st.Eventually(func() bool { return st.clock.HasWaiters() }).Should(BeTrue())
	st.Eventually(func() []string { st.clock.Step(time.Second); return st.lines() }).Should(ContainElement("close"))
	st.Eventually(func() int { st.clock.Step(time.Second); return st.countDials() }).Should(Equal(2))
	st.happens(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.Eventually(func() int { return len(st.words()) }).Should(BeNumerically(">=", 3))
	st.locked(func() { st.apiDown = false })
	st.Eventually(func() int64 { st.clock.Step(time.Second); return st.status().Reconnects }).Should(BeEquivalentTo(1))
	st.Expect(st.status().Phase).To(Equal(v1alpha1.PhaseConnected))
	st.Expect(st.status().PushName).To(Equal("The shop"))
}

func (st *stage) countDials() (n int) {
	for _, line := range st.lines() {
		if line == "dial" {
			n++
		}
	}
	return n
}

func TestRedisOutageKeepsTheNewestState(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	before := len(st.words())
	st.locked(func() { st.redisDown = true })
	st.happens(session.Event{Type: session.EventLoggedOut, Message: "unlinked on the phone"})
	st.eventually(v1alpha1.PhaseLoggedOut)
	st.Expect(st.words()).To(HaveLen(before))
	st.locked(func() { st.redisDown = false })
	st.Eventually(func() []string { st.clock.Step(time.Second); return st.words()[before:] }).Should(Equal([]string{"inactive/LoggedOut"}))
}

func TestDeletionLogsOutAndForgets(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.logoutErr = errors.New("no answer") })
	st.change(deleted)
	st.eventually(v1alpha1.PhaseTerminating)
	st.Eventually(func() bool { return st.clock.HasWaiters() }).Should(BeTrue())
	st.locked(func() { st.logoutErr = nil })
	st.Eventually(func() string { st.clock.Step(time.Second); return st.status().HeldBy }).Should(BeEmpty())
	st.Expect(st.lines()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Connected", "logout", "close", "forget", `heldBy=""`))
	st.Expect(st.status().JID).To(BeEmpty())
	st.locked(func() { st.obj = nil })
	st.see()
	st.Eventually(st.s.finished).Should(BeClosed())
}

func TestWrongPhoneIsLoggedOutAndPairedAnewOnRequest(t *testing.T) {
	st := newStage(t, newSession(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34999999999" }), account{jid: jid, phone: phone})
	st.dials(1)
	st.happens(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventually(v1alpha1.PhaseLoggedOut)
	st.Expect(st.status().PhoneNumber).To(BeEmpty())
	st.Expect(st.lines()).To(ContainElements("logout", "event WrongPhone"))
	st.change(func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "1"}
	})
	st.dials(2)
	st.happens(session.Event{Type: session.EventQR, Codes: []string{"one"}})
	st.eventually(v1alpha1.PhasePairing)
}

// The owner's own phone may have another number at WhatsApp.
func TestOnlyAClearNoIsAWrongPhone(t *testing.T) {
	const written = "+5511987654321"
	st := newStage(t, newSession(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = written }),
		account{jid: "551187654321:3@s.whatsapp.net", phone: "+551187654321"}, func(w *world) { w.sameErr = errDown })
	st.dials(1)
	st.happens(session.Event{Type: session.EventConnected, JID: "551187654321:3@s.whatsapp.net", PhoneNumber: "+551187654321"})
	questions := func() (n int) { st.locked(func() { n = len(st.numbers) }); return n }
	st.Eventually(func() int { st.clock.Step(100 * time.Millisecond); return questions() }).Should(BeNumerically(">=", 2), "it is asked again")
	st.Expect(st.status().Phase).To(Equal(v1alpha1.PhaseConnecting), "not Ready for a phone that may be wrong")
	st.Expect(st.lines()).NotTo(ContainElement("logout"))
	st.locked(func() { st.same, st.sameErr = true, nil })
	st.Eventually(func() v1alpha1.Phase { st.clock.Step(100 * time.Millisecond); return st.status().Phase }).Should(Equal(v1alpha1.PhaseConnected))
	st.Expect(st.lines()).NotTo(ContainElement("logout"))
	st.locked(func() { st.Expect(st.numbers[0]).To(Equal(written)) })
}

func TestAStoreThatKnowsAHigherEpoch(t *testing.T) {
	obj := newSession()
	st := newStage(t, obj, account{})
	st.dials(1)
	st.locked(func() { st.takeErr = &EpochBehindError{Stored: 900} })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.Eventually(func() int64 { return st.status().StoredEpoch }).Should(BeEquivalentTo(900))
	st.Eventually(func() string { return st.status().HeldBy }).Should(BeEmpty())
	st.locked(func() { st.takeErr = nil })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 901 })
	st.dials(2)
	st.Expect(st.lines()).To(ContainElement("take 901"))
}

func TestARedisThatKnowsAHigherEpoch(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone}, func(w *world) { w.redisEpoch = 900 })
	st.Eventually(func() int64 { return st.status().StoredEpoch }).Should(BeEquivalentTo(900))
	st.Eventually(func() string { return st.status().HeldBy }).Should(BeEmpty())
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 901 })
	st.Eventually(st.lines).Should(ContainElement("take 901"))
	st.Eventually(func() int { return len(st.words()) }).Should(BeNumerically(">", 0), "Laravel hears of it again")
}

func TestATakingIsSettledBeforeTheRelease(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.locked(func() { st.Expect(st.settled).To(Equal([]int64{1})) })
}

func TestASessionThatEndsItsWorkerIsNotConnected(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone, unsettled: 9, trial: 1})
	st.eventually(v1alpha1.PhaseFailed)
	st.Eventually(st.lines).Should(ContainElement("event EndsItsWorker"))
	st.Expect(st.lines()).NotTo(ContainElement("dial"))
	st.locked(func() { st.Expect(st.settled).To(BeEmpty()) })
}

func TestATrialIsRecordedBeforeTheConnection(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone, unsettled: 4, trial: 100})
	st.connect()
	lines := st.lines()
	st.Expect(lines).To(ContainElements("trial 13", "dial"))
	st.Expect(slices.Index(lines, "trial 13")).To(BeNumerically("<", slices.Index(lines, "dial")))
	st.Eventually(func() []string { st.clock.Step(time.Second); return st.lines() }).Should(ContainElement("trial 0"))
}

func TestAnUnreachableStoreIsTriedAgain(t *testing.T) {
	obj := newSession()
	st := newStage(t, obj, account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.takeErr = errDown })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.eventually(v1alpha1.PhaseDisconnected)
	st.locked(func() { st.takeErr = nil })
	st.Eventually(func() int { st.clock.Step(time.Second); return st.countDials() }).Should(Equal(2))
}

func TestShutdownGivesTheDeviceUp(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.s.post(func() { st.s.step(session.Drain{}) })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.status().HeldBy).To(BeEmpty())
	lines := st.lines()
	st.Expect(slices.Index(lines, "close")).To(BeNumerically("<", slices.Index(lines, `heldBy=""`)))
}

func TestAtTheEndOfTheGraceNobodyIsWaitedFor(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.s.post(func() { st.s.step(session.Drain{}) })
	st.Consistently(st.s.finished, "100ms").ShouldNot(BeClosed())
	st.s.post(func() { st.s.step(session.Evict{}) })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.status().HeldBy).To(BeEmpty())
	st.Expect(st.status().Worker).To(Equal(me), "worker is the manager's")
}

func TestEventsOfAnOldConnectionAreIgnored(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	var old func(session.Event)
	st.locked(func() { old = st.events })
	st.happens(session.Event{Type: session.EventDisconnected, Message: "the socket closed"})
	st.Eventually(func() int { st.clock.Step(time.Second); return st.countDials() }).Should(Equal(2))
	old(session.Event{Type: session.EventLoggedOut, Message: "late"})
	st.happens(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventually(v1alpha1.PhaseConnected)
}

func TestFromAPhoneCodeToConnected(t *testing.T) {
	st := newStage(t, newSession(byCode), account{})
	st.dials(1)
	st.locked(func() { st.Expect(st.pairPhones).To(Equal([]string{phone})) })
	until := noon.Add(time.Minute)
	st.happens(session.Event{Type: session.EventPairingCode, Code: typed, Until: until})
	st.Eventually(func() string { return st.status().PairingCode }).Should(Equal(typed))
	st.Eventually(st.words).Should(ContainElement("pending/Pairing"))

	st.Eventually(func() bool { return st.clock.HasWaiters() }).Should(BeTrue())
	st.clock.Step(time.Minute)
	st.dials(2)
	st.Eventually(func() string { return st.status().PairingCode }).Should(BeEmpty())
	st.happens(session.Event{Type: session.EventPairingCode, Code: "WXYZ-9876", Until: until.Add(time.Minute)})
	st.Eventually(func() string { return st.status().PairingCode }).Should(Equal("WXYZ-9876"))

	st.locked(func() { st.device = account{jid: jid, phone: phone} })
	st.happens(session.Event{Type: session.EventPairSuccess, JID: jid, PhoneNumber: phone})
	st.happens(session.Event{Type: session.EventDisconnected, Reason: "StreamError515"})
	st.dials(3)
	st.happens(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventually(v1alpha1.PhaseConnected)
	st.Expect(st.status().PairingCode).To(BeEmpty())
	st.Eventually(func() string {
		words := st.words()
		return words[len(words)-1]
	}).Should(Equal("active/Connected"))
	st.locked(func() {
		st.Expect(slices.ContainsFunc(st.told, func(a session.Publication) bool { return a.QR != nil || a.NewQR })).To(BeFalse(), "Laravel's batch of QR codes has no place for it")
	})
}

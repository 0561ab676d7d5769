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
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
)

// environment is a fake of everything that a supervisor uses: the API server, the
// store, Redis, WhatsApp and the limiter. It logs the calls in their order.
type environment struct {
	mu      sync.Mutex
	log     []string
	obj     *v1alpha1.WhatsAppSession
	version int

	apiDown       bool // no request reaches the API server
	lostAnswers   int  // how many further writes reach it, but lose their answers
	redisDown     bool
	redisEpoch    int64 // Redis has something newer, with this epoch
	takeErr       error
	dialErr       error
	logoutErr     error
	forgetErr     error
	same          bool // what SameAccount returns
	sameErr       error
	numbers       []string // the numbers that SameAccount was called with
	proxyFailures int      // how many further reads of the proxy's Secret fail

	proxy       *url.URL
	logins      []Login // the logins that waited for a token
	forgetCalls int

	inbox    fakeInbox
	pushed   []delivery.Item
	pushOver string // the bound that every push goes over
	// accept is that of the present connection.
	accept func(context.Context, delivery.MessageItem) error

	starts int64
	// settled has the starts of the takings that were settled.
	settled     []int64
	device      account
	events      func(session.Event)
	openSockets int
	published   []session.Publication
	// pairPhones has the PairPhone of each connection.
	pairPhones []string
}

var errDown = errors.New("connection refused")

func (env *environment) record(format string, args ...any) {
	env.log = append(env.log, fmt.Sprintf(format, args...))
}

func (env *environment) locked(f func()) {
	env.mu.Lock()
	defer env.mu.Unlock()
	f()
}

func (env *environment) Get(context.Context, types.NamespacedName) (*v1alpha1.WhatsAppSession, error) {
	env.mu.Lock()
	defer env.mu.Unlock()
	switch {
	case env.apiDown:
		return nil, errDown
	case env.obj == nil:
		return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "whatsappsessions"}, "shop")
	}
	return env.obj.DeepCopy(), nil
}

func (env *environment) HeldNotPlaced(_ context.Context, worker string) ([]v1alpha1.WhatsAppSession, error) {
	env.mu.Lock()
	defer env.mu.Unlock()
	switch {
	case env.apiDown:
		return nil, errDown
	case env.obj == nil || env.obj.Status.HeldBy != worker || env.obj.Status.Worker == worker:
		return nil, nil
	}
	return []v1alpha1.WhatsAppSession{*env.obj.DeepCopy()}, nil
}

func (env *environment) PatchStatus(_ context.Context, base *v1alpha1.WhatsAppSession, s v1alpha1.WhatsAppSessionStatus) (*v1alpha1.WhatsAppSession, error) {
	env.mu.Lock()
	defer env.mu.Unlock()
	resource := schema.GroupResource{Resource: "whatsappsessions"}
	switch {
	case env.apiDown:
		return nil, errDown
	case env.obj == nil:
		return nil, apierrors.NewNotFound(resource, "shop")
	case base.ResourceVersion != env.obj.ResourceVersion:
		env.record("conflict")
		return nil, apierrors.NewConflict(resource, "shop", errors.New("the object has changed"))
	}
	if s.HeldBy != env.obj.Status.HeldBy {
		env.record("heldBy=%q", s.HeldBy)
	}
	env.obj = env.obj.DeepCopy()
	env.obj.Status = *s.DeepCopy()
	env.raiseVersion()
	if env.lostAnswers > 0 {
		env.lostAnswers--
		return nil, context.DeadlineExceeded
	}
	return env.obj.DeepCopy(), nil
}

func (env *environment) raiseVersion() {
	env.version++
	env.obj.ResourceVersion = strconv.Itoa(env.version)
}

func (env *environment) Take(_ context.Context, _ types.UID, epoch int64) (Account, error) {
	env.mu.Lock()
	defer env.mu.Unlock()
	if env.takeErr != nil {
		return nil, env.takeErr
	}
	env.starts++
	env.record("take %d", epoch)
	a := env.device
	a.starts = env.starts
	return &liveAccount{account: a, env: env}, nil
}

type liveAccount struct {
	account
	env *environment
}

func (a *liveAccount) Dial(_ context.Context, o DialOptions) (Connection, error) {
	a.env.mu.Lock()
	defer a.env.mu.Unlock()
	if a.env.dialErr != nil {
		return nil, a.env.dialErr
	}
	a.env.openSockets++
	a.env.events, a.env.accept = o.Events, o.Accept
	a.env.pairPhones = append(a.env.pairPhones, o.PairPhone)
	a.env.record("dial")
	return &liveConnection{env: a.env, paired: a.env.device.jid != ""}, nil
}

func (a *liveAccount) Settle(context.Context) error {
	a.env.mu.Lock()
	defer a.env.mu.Unlock()
	a.env.settled = append(a.env.settled, a.starts)
	return nil
}

func (a *liveAccount) RecordTrial(_ context.Context, size int32) error {
	a.env.mu.Lock()
	defer a.env.mu.Unlock()
	a.env.record("trial %d", size)
	return nil
}

func (a *liveAccount) Forget(context.Context) error {
	a.env.mu.Lock()
	defer a.env.mu.Unlock()
	a.env.forgetCalls++
	if a.env.forgetErr != nil {
		return a.env.forgetErr
	}
	a.env.record("forget")
	return nil
}

func (a *liveAccount) Push(_ context.Context, item delivery.Item) (string, error) {
	a.env.mu.Lock()
	defer a.env.mu.Unlock()
	a.env.pushed = append(a.env.pushed, item)
	return a.env.pushOver, nil
}

// fakeInbox is what the database answers about messages.
type fakeInbox struct {
	probeErr error
	room     bool
	bound    string // the last one that HasRoom was called with
	asked    int
}

func (env *environment) Probe(context.Context) error {
	env.mu.Lock()
	defer env.mu.Unlock()
	env.inbox.asked++
	return env.inbox.probeErr
}

func (env *environment) HasRoom(_ context.Context, _, _, bound string) (bool, error) {
	env.mu.Lock()
	defer env.mu.Unlock()
	env.inbox.asked++
	env.inbox.bound = bound
	return env.inbox.room, nil
}

// pushedItems is a copy of what was pushed.
func (st *supervisorTest) pushedItems() []delivery.Item {
	st.mu.Lock()
	defer st.mu.Unlock()
	return slices.Clone(st.pushed)
}

type liveConnection struct {
	env    *environment
	paired bool
}

func (c *liveConnection) Paired() bool { return c.paired }

func (c *liveConnection) AnswerPasskey(_ context.Context, response string) error {
	c.env.mu.Lock()
	defer c.env.mu.Unlock()
	c.env.record("passkey %d", len(response))
	return nil
}

func (c *liveConnection) ConfirmPasskey(context.Context) error {
	c.env.mu.Lock()
	defer c.env.mu.Unlock()
	c.env.record("confirm passkey")
	return nil
}

func (c *liveConnection) SameAccount(_ context.Context, number string) (bool, error) {
	c.env.mu.Lock()
	defer c.env.mu.Unlock()
	c.env.numbers = append(c.env.numbers, number)
	return c.env.same, c.env.sameErr
}

func (c *liveConnection) Logout(context.Context) error {
	c.env.mu.Lock()
	defer c.env.mu.Unlock()
	if c.env.logoutErr != nil {
		return c.env.logoutErr
	}
	c.env.record("logout")
	c.env.device = account{}
	return nil
}

func (c *liveConnection) Close() {
	c.env.mu.Lock()
	defer c.env.mu.Unlock()
	c.env.openSockets--
	c.env.record("close")
}

func (env *environment) Proxy(context.Context, *v1alpha1.WhatsAppSession) (*url.URL, error) {
	env.mu.Lock()
	defer env.mu.Unlock()
	if env.proxyFailures > 0 {
		env.proxyFailures--
		return nil, errDown
	}
	return env.proxy, nil
}

func (env *environment) Publish(_ context.Context, a session.Publication) error {
	env.mu.Lock()
	defer env.mu.Unlock()
	if env.redisDown {
		return errDown
	}
	if a.Status.Epoch <= env.redisEpoch {
		return fmt.Errorf("enqueueing: %w", &StaleError{Epoch: env.redisEpoch})
	}
	env.published = append(env.published, a)
	return nil
}

func (env *environment) Refresh(context.Context, []session.Publication) error { return nil }

func (env *environment) Wait(ctx context.Context, login Login) error {
	env.locked(func() { env.logins = append(env.logins, login) })
	return ctx.Err()
}
func (env *environment) Free() int { return 1 }

func (env *environment) Event(_ *v1alpha1.WhatsAppSession, _, reason, _ string) {
	env.locked(func() { env.record("event %s", reason) })
}

// supervisorTest is a supervisor with a fake environment and a fake clock.
type supervisorTest struct {
	*WithT
	*environment
	s     *supervisor
	clock *clocktesting.FakeClock
}

func newSupervisorTest(t *testing.T, obj *v1alpha1.WhatsAppSession, device account, before ...func(*environment)) *supervisorTest {
	g := NewWithT(t)
	env := &environment{obj: obj, device: device, version: 1}
	for _, f := range before {
		f(env)
	}
	fake := clocktesting.NewFakeClock(noon)
	health := NewHealth(fake, testr.New(t))
	inbox := newInboxWatch(env, health, fake, testr.New(t))
	s := newSupervisor(dependencies{
		Inbox: inbox, Sessions: env, Accounts: env, Proxies: env, Publisher: env, Limiter: env, Events: env, Clock: fake, Dials: new(atomic.Int64), Health: health,
		Fleet: newFleet(Outdated{}, nil, fake, testr.New(t), func() int { return 100 }, func() int { return 100 }, func() {}, func(map[types.UID]bool) {}),
	}, testr.NewWithOptions(t, testr.Options{Verbosity: 1}), obj, me, process, nil)
	ctx, cancel := context.WithCancel(t.Context())
	go s.run(ctx)
	watched := make(chan struct{})
	go func() { defer close(watched); inbox.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-s.finished
		<-watched
		env.mu.Lock()
		defer env.mu.Unlock()
		g.Expect(env.openSockets).To(BeZero(), "a socket was left open")
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	st := &supervisorTest{WithT: g, environment: env, s: s, clock: fake}
	st.observe()
	return st
}

// observe gives the present object to the supervisor, as a watch does.
func (st *supervisorTest) observe() {
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

// change changes the object as another writer does; the watch then shows the change.
func (st *supervisorTest) change(f func(*v1alpha1.WhatsAppSession)) {
	st.locked(func() {
		st.obj = st.obj.DeepCopy()
		f(st.obj)
		st.raiseVersion()
	})
	st.observe()
}

// emit makes the present connection emit an event.
func (st *supervisorTest) emit(e session.Event) {
	var events func(session.Event)
	st.locked(func() { events = st.events })
	events(e)
}

func (st *supervisorTest) status() v1alpha1.WhatsAppSessionStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	return *st.obj.Status.DeepCopy()
}

// step lets time pass. It does so between two steps of the supervisor: a timer that is set while
// the time changes would be late by all of it.
func (st *supervisorTest) step(d time.Duration) {
	done := make(chan struct{})
	st.s.post(func() { st.clock.Step(d); close(done) })
	<-done
}

func (st *supervisorTest) eventuallyPhase(p v1alpha1.Phase) {
	st.Eventually(func() v1alpha1.Phase { return st.status().Phase }).Should(Equal(p))
}

func (st *supervisorTest) eventuallyDials(n int) {
	st.Eventually(st.dialCount).Should(Equal(n))
}

// calls is a copy of the log.
func (st *supervisorTest) calls() []string {
	st.mu.Lock()
	defer st.mu.Unlock()
	return slices.Clone(st.log)
}

// publishedStates has the word for Laravel and the phase of each publication.
func (st *supervisorTest) publishedStates() (states []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, p := range st.published {
		states = append(states, string(p.Status.Status)+"/"+p.Status.Phase)
	}
	return states
}

// connect brings a session with a device to Connected.
func (st *supervisorTest) connect() {
	st.eventuallyDials(1)
	st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventuallyPhase(v1alpha1.PhaseConnected)
	st.Eventually(st.publishedStates).Should(ContainElement("active/Connected"))
}

func TestFromPlacementToConnected(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{})
	st.eventuallyDials(1)
	st.emit(session.Event{Type: session.EventQR, Codes: []string{"one", "two"}})
	st.Eventually(func() *v1alpha1.QRStatus { return st.status().QR }).ShouldNot(BeNil())
	st.Expect(st.status().QR.Code).To(Equal("one"))
	st.step(time.Minute)
	st.Eventually(func() string { return st.status().QR.Code }).Should(Equal("two"))

	st.locked(func() { st.device = account{jid: jid, phone: phone} })
	st.emit(session.Event{Type: session.EventPairSuccess, JID: jid, PhoneNumber: phone})
	st.emit(session.Event{Type: session.EventDisconnected, Reason: "StreamError515"})
	st.eventuallyDials(2)
	st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone, PushName: "The shop"})
	st.eventuallyPhase(v1alpha1.PhaseConnected)

	status := st.status()
	st.Expect(status.PhoneNumber).To(Equal(phone))
	st.Expect(status.PushName).To(Equal("The shop"))
	st.Expect(status.QR).To(BeNil())
	st.Expect(status.HeldBy).To(Equal(me))
	st.Expect(st.calls()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Paired", "close", "dial", "event Connected"))
	st.Eventually(func() string {
		states := st.publishedStates()
		return states[len(states)-1]
	}).Should(Equal("active/Connected"))
	st.locked(func() {
		for i := 1; i < len(st.published); i++ {
			st.Expect(st.published[i].Status.Newer(st.published[i-1].Status.Numbers)).To(BeTrue(), "numbers must rise")
		}
	})
}

func TestAMoveClosesTheSocketBeforeTheRelease(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.calls()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Connected", "close", `heldBy=""`))
	st.Expect(st.publishedStates()).To(ContainElement("pending/Disconnected"))
	st.Expect(st.status().Epoch).To(BeEquivalentTo(101))
}

func TestAMoveToTheSameWorkerTakesTheKeysAgain(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.eventuallyDials(2)
	st.Expect(st.calls()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Connected",
		"close", `heldBy=""`, `heldBy="worker-a"`, "take 101", "dial"))
}

func TestARestartInPlaceWritesOneClaim(t *testing.T) {
	st := newSupervisorTest(t, newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Status.HeldBy, s.Status.HolderStart, s.Status.Phase = me, "p0", v1alpha1.PhaseConnected
	}), account{jid: jid, phone: phone})
	st.connect()
	st.Expect(st.calls()).To(HaveExactElements("take 100", "dial", "event Connected"), "the session is never released")
	st.Expect(st.status().HolderStart).To(Equal(process))
}

func TestAFailedDeletionOfTheKeysIsRepeated(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.forgetErr = errDown })
	st.change(deleted)
	st.Eventually(st.calls).Should(ContainElement("close"))
	st.Eventually(func() int32 { return int32(st.forgetCount()) }).Should(BeNumerically(">=", 1))
	st.locked(func() { st.forgetErr = nil })
	st.Eventually(func() string { st.clock.Step(time.Second); return st.status().HeldBy }).Should(BeEmpty())
	st.Expect(st.forgetCount()).To(BeNumerically("<", 50), "with pauses in between")
}

func (st *supervisorTest) forgetCount() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.forgetCalls
}

func TestAfterAConflictTheObjectIsReadAgain(t *testing.T) {
	obj := newSession()
	st := newSupervisorTest(t, obj, account{jid: jid, phone: phone})
	st.connect()
	// Another writer changes the object and the watch is late: the supervisor's next write is refused.
	st.locked(func() {
		st.obj = st.obj.DeepCopy()
		st.obj.Spec.DeviceName = "till"
		st.obj.Generation = 2
		st.raiseVersion()
	})
	st.emit(session.Event{Type: session.EventPushName, PushName: "The shop"})
	st.Eventually(func() string { return st.status().PushName }).Should(Equal("The shop"))
	st.Expect(st.calls()).To(ContainElement("conflict"))
	st.Expect(st.status().ObservedGeneration).To(BeEquivalentTo(2))
}

func TestAClaimWithALostAnswer(t *testing.T) {
	obj := newSession()
	st := newSupervisorTest(t, obj, account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.lostAnswers = 1 })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.eventuallyDials(2)
	st.Expect(st.calls()).To(ContainElements("take 100", "take 101"))
}

func TestAnOutageOfTheAPIServerEndsNoConnection(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.apiDown = true })
	st.emit(session.Event{Type: session.EventPushName, PushName: "The shop"})
	st.emit(session.Event{Type: session.EventDisconnected, Message: "the socket closed"})
	st.Eventually(func() bool { return st.clock.HasWaiters() }).Should(BeTrue())
	st.Eventually(func() []string { st.clock.Step(time.Second); return st.calls() }).Should(ContainElement("close"))
	st.Eventually(func() int { st.clock.Step(time.Second); return st.dialCount() }).Should(Equal(2))
	st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.Eventually(func() int { return len(st.publishedStates()) }).Should(BeNumerically(">=", 3))
	st.locked(func() { st.apiDown = false })
	st.Eventually(func() int64 { st.clock.Step(time.Second); return st.status().Reconnects }).Should(BeEquivalentTo(1))
	st.Expect(st.status().Phase).To(Equal(v1alpha1.PhaseConnected))
	st.Expect(st.status().PushName).To(Equal("The shop"))
}

func (st *supervisorTest) dialCount() (n int) {
	for _, line := range st.calls() {
		if line == "dial" {
			n++
		}
	}
	return n
}

func TestAfterAnOutageOfRedisTheNewestStateIsPublished(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	before := len(st.publishedStates())
	st.locked(func() { st.redisDown = true })
	st.emit(session.Event{Type: session.EventLoggedOut, Message: "unlinked on the phone"})
	st.eventuallyPhase(v1alpha1.PhaseLoggedOut)
	st.Expect(st.publishedStates()).To(HaveLen(before))
	st.locked(func() { st.redisDown = false })
	st.Eventually(func() []string { st.clock.Step(time.Second); return st.publishedStates()[before:] }).Should(Equal([]string{"inactive/LoggedOut"}))
}

func TestADeletionLogsOutAndDeletesTheKeys(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.logoutErr = errors.New("no answer") })
	st.change(deleted)
	st.eventuallyPhase(v1alpha1.PhaseTerminating)
	st.Eventually(func() bool { return st.clock.HasWaiters() }).Should(BeTrue())
	st.locked(func() { st.logoutErr = nil })
	st.Eventually(func() string { st.clock.Step(time.Second); return st.status().HeldBy }).Should(BeEmpty())
	st.Expect(st.calls()).To(HaveExactElements(`heldBy="worker-a"`, "take 100", "dial", "event Connected", "logout", "close", "forget", `heldBy=""`))
	st.Expect(st.status().JID).To(BeEmpty())
	st.locked(func() { st.obj = nil })
	st.observe()
	st.Eventually(st.s.finished).Should(BeClosed())
}

func TestAWrongPhoneIsLoggedOutAndPairedAgainOnRequest(t *testing.T) {
	st := newSupervisorTest(t, newSession(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34999999999" }), account{jid: jid, phone: phone})
	st.eventuallyDials(1)
	st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventuallyPhase(v1alpha1.PhaseLoggedOut)
	st.Expect(st.status().PhoneNumber).To(BeEmpty())
	st.Expect(st.calls()).To(ContainElements("logout", "event WrongPhone"))
	st.change(func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "1"}
	})
	st.eventuallyDials(2)
	st.emit(session.Event{Type: session.EventQR, Codes: []string{"one"}})
	st.eventuallyPhase(v1alpha1.PhasePairing)
}

// WhatsApp may know the owner's phone by another number than the owner wrote.
func TestAPhoneIsWrongOnlyIfWhatsAppSaysSo(t *testing.T) {
	const written = "+5511987654321"
	st := newSupervisorTest(t, newSession(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = written }),
		account{jid: "551187654321:3@s.whatsapp.net", phone: "+551187654321"}, func(env *environment) { env.sameErr = errDown })
	st.eventuallyDials(1)
	st.emit(session.Event{Type: session.EventConnected, JID: "551187654321:3@s.whatsapp.net", PhoneNumber: "+551187654321"})
	questions := func() (n int) { st.locked(func() { n = len(st.numbers) }); return n }
	st.Eventually(func() int { st.clock.Step(100 * time.Millisecond); return questions() }).Should(BeNumerically(">=", 2), "WhatsApp is asked again")
	st.Expect(st.status().Phase).To(Equal(v1alpha1.PhaseConnecting), "not Ready while the phone may be wrong")
	st.Expect(st.calls()).NotTo(ContainElement("logout"))
	st.locked(func() { st.same, st.sameErr = true, nil })
	st.Eventually(func() v1alpha1.Phase { st.clock.Step(100 * time.Millisecond); return st.status().Phase }).Should(Equal(v1alpha1.PhaseConnected))
	st.Expect(st.calls()).NotTo(ContainElement("logout"))
	st.locked(func() { st.Expect(st.numbers[0]).To(Equal(written)) })
}

func TestTheStoreKnowsAHigherEpoch(t *testing.T) {
	obj := newSession()
	st := newSupervisorTest(t, obj, account{})
	st.eventuallyDials(1)
	st.locked(func() { st.takeErr = &EpochBehindError{Stored: 900} })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.Eventually(func() int64 { return st.status().StoredEpoch }).Should(BeEquivalentTo(900))
	st.Eventually(func() string { return st.status().HeldBy }).Should(BeEmpty())
	st.locked(func() { st.takeErr = nil })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 901 })
	st.eventuallyDials(2)
	st.Expect(st.calls()).To(ContainElement("take 901"))
}

func TestRedisKnowsAHigherEpoch(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone}, func(env *environment) { env.redisEpoch = 900 })
	st.Eventually(func() int64 { return st.status().StoredEpoch }).Should(BeEquivalentTo(900))
	st.Eventually(func() string { return st.status().HeldBy }).Should(BeEmpty())
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 901 })
	st.Eventually(st.calls).Should(ContainElement("take 901"))
	st.Eventually(func() int { return len(st.publishedStates()) }).Should(BeNumerically(">", 0), "it is published to Laravel again")
}

func TestATakingIsSettledBeforeTheRelease(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.locked(func() { st.Expect(st.settled).To(Equal([]int64{1})) })
}

func TestASessionThatEndsItsWorkerIsNotConnected(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone, unsettled: 9, trial: -1})
	st.eventuallyPhase(v1alpha1.PhaseFailed)
	st.Eventually(st.calls).Should(ContainElement("event EndsItsWorker"))
	st.Expect(st.calls()).NotTo(ContainElement("dial"))
	st.locked(func() { st.Expect(st.settled).To(BeEmpty()) })
}

func TestAPasskeyIsAnsweredAndConfirmed(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{})
	key, err := passkey.New()
	st.Expect(err).NotTo(HaveOccurred())
	request, err := key.Request([]byte("challenge"), time.Minute)
	st.Expect(err).NotTo(HaveOccurred())
	response, err := key.Answer(request, passkey.Origin)
	st.Expect(err).NotTo(HaveOccurred())
	st.eventuallyDials(1)
	st.emit(session.Event{Type: session.EventPasskeyRequest, PasskeyOptions: string(request)})
	st.Eventually(func() *v1alpha1.PasskeyStatus { return st.status().Passkey }).ShouldNot(BeNil())
	st.change(func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.PasskeyResponseAnnotation: string(response)}
	})
	st.Eventually(st.calls).Should(ContainElement(fmt.Sprintf("passkey %d", len(response))))
	st.emit(session.Event{Type: session.EventPasskeyConfirmation, Code: "ABCD-1234"})
	st.Eventually(func() string { return st.status().Passkey.ConfirmationCode }).Should(Equal("ABCD-1234"))
	st.change(func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.PasskeyConfirmAnnotation: "ABCD-1234"}
	})
	st.Eventually(st.calls).Should(ContainElement("confirm passkey"))
}

func TestATrialIsRecordedBeforeTheConnection(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone, unsettled: 4, trial: 100})
	st.connect()
	calls := st.calls()
	st.Expect(calls).To(ContainElements("trial 13", "dial"))
	st.Expect(slices.Index(calls, "trial 13")).To(BeNumerically("<", slices.Index(calls, "dial")))
	st.Eventually(func() []string { st.clock.Step(time.Second); return st.calls() }).Should(ContainElement("trial 0"))
}

func TestAnUnreachableStoreIsTriedAgain(t *testing.T) {
	obj := newSession()
	st := newSupervisorTest(t, obj, account{jid: jid, phone: phone})
	st.connect()
	st.locked(func() { st.takeErr = errDown })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 })
	st.eventuallyPhase(v1alpha1.PhaseDisconnected)
	st.locked(func() { st.takeErr = nil })
	st.Eventually(func() int { st.clock.Step(time.Second); return st.dialCount() }).Should(Equal(2))
}

func TestAShutdownReleasesTheDevice(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.s.post(func() { st.s.step(session.Drain{}) })
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.status().HeldBy).To(BeEmpty())
	calls := st.calls()
	st.Expect(slices.Index(calls, "close")).To(BeNumerically("<", slices.Index(calls, `heldBy=""`)))
}

func TestAnEvictedSessionDoesNotWaitForItsSuccessor(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.s.post(func() { st.s.step(session.Drain{}) })
	st.Consistently(st.s.finished, "100ms").ShouldNot(BeClosed())
	st.s.post(func() { st.s.step(session.Evict{}) })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.status().HeldBy).To(BeEmpty())
	st.Expect(st.status().Worker).To(Equal(me), "only the manager writes status.worker")
}

func TestEventsOfAnOldConnectionAreIgnored(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	var old func(session.Event)
	st.locked(func() { old = st.events })
	st.emit(session.Event{Type: session.EventDisconnected, Message: "the socket closed"})
	st.Eventually(func() int { st.clock.Step(time.Second); return st.dialCount() }).Should(Equal(2))
	old(session.Event{Type: session.EventLoggedOut, Message: "late"})
	st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventuallyPhase(v1alpha1.PhaseConnected)
}

func TestFromAPhoneCodeToConnected(t *testing.T) {
	st := newSupervisorTest(t, newSession(byCode), account{})
	st.eventuallyDials(1)
	st.locked(func() { st.Expect(st.pairPhones).To(Equal([]string{phone})) })
	until := noon.Add(time.Minute)
	st.emit(session.Event{Type: session.EventPairingCode, Code: pairingCode, Until: until})
	st.Eventually(func() string { return st.status().PairingCode }).Should(Equal(pairingCode))
	st.Eventually(st.publishedStates).Should(ContainElement("pending/Pairing"))

	st.step(time.Minute)
	st.eventuallyDials(2)
	st.Eventually(func() string { return st.status().PairingCode }).Should(BeEmpty())
	st.emit(session.Event{Type: session.EventPairingCode, Code: "WXYZ-9876", Until: until.Add(time.Minute)})
	st.Eventually(func() string { return st.status().PairingCode }).Should(Equal("WXYZ-9876"))

	st.locked(func() { st.device = account{jid: jid, phone: phone} })
	st.emit(session.Event{Type: session.EventPairSuccess, JID: jid, PhoneNumber: phone})
	st.emit(session.Event{Type: session.EventDisconnected, Reason: "StreamError515"})
	st.eventuallyDials(3)
	st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventuallyPhase(v1alpha1.PhaseConnected)
	st.Expect(st.status().PairingCode).To(BeEmpty())
	st.Eventually(func() string {
		states := st.publishedStates()
		return states[len(states)-1]
	}).Should(Equal("active/Connected"))
	st.locked(func() {
		var codes []string
		for _, p := range st.published {
			if p.QR != nil && p.NewQR {
				codes = append(codes, p.QR.PairingCode)
			}
		}
		st.Expect(codes).To(Equal([]string{pairingCode, "WXYZ-9876"}))
	})
}

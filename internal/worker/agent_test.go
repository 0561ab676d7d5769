package worker

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

func TestTheEndOfABurstOfLogins(t *testing.T) {
	g := NewWithT(t)
	b := loginBurst{}
	ticks := []struct {
		dials int64
		ended bool
	}{{0, false}, {0, false}, {900, false}, {1000, false}, {1000, true}, {1000, false}, {1001, false}, {1001, true}}
	for i, tick := range ticks {
		g.Expect(b.ended(tick.dials)).To(Equal(tick.ended), "tick %d", i)
	}
}

// placedCache is the agent's cache: it has only the sessions that are placed on the worker.
type placedCache struct{ *environment }

func (c placedCache) Get(_ context.Context, _ client.ObjectKey, into client.Object, _ ...client.GetOption) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.obj == nil || c.obj.Status.Worker != me {
		return apierrors.NewNotFound(schema.GroupResource{}, "shop")
	}
	c.obj.DeepCopyInto(into.(*v1alpha1.WhatsAppSession))
	return nil
}

func (c placedCache) List(_ context.Context, into client.ObjectList, _ ...client.ListOption) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := into.(*v1alpha1.WhatsAppSessionList)
	if c.obj != nil && c.obj.Status.HeldBy == me {
		list.Items = append(list.Items, *c.obj.DeepCopy())
	}
	return nil
}

// membership is a fake Membership. It joins at once, unless neverJoins is set.
type membership struct {
	lost       chan struct{}
	neverJoins bool
	// ends gets the error with which Run ends.
	ends     chan error
	mu       sync.Mutex
	draining bool
	left     bool
}

func (m *membership) Run(ctx context.Context, joined func(), _ func() (int, int)) error {
	if !m.neverJoins {
		joined()
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-m.ends:
		return err
	}
}

func (m *membership) Lost() <-chan struct{} { return m.lost }

func (m *membership) Drain(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.draining = true
	return nil
}

func (m *membership) Leave(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left = true
	return nil
}

// isSet returns a function that reads a field under the lock.
func (m *membership) isSet(field *bool) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return *field
	}
}

// agentTest is an agent with one session, a fake environment and a fake clock.
type agentTest struct {
	*WithT
	*environment
	agent      *Agent
	membership *membership
	clock      *clocktesting.FakeClock
	stop       func()
	ended      chan error
}

// newConnectedAgentTest starts an agent and connects its session.
func newConnectedAgentTest(t *testing.T) *agentTest {
	at := newAgentTest(t, newSession())
	at.start(t)
	at.Eventually(func() string { at.reconcile(); return at.status().HeldBy }).Should(Equal(me))
	at.Eventually(func() func(session.Event) {
		at.reconcile()
		at.mu.Lock()
		defer at.mu.Unlock()
		return at.events
	}).ShouldNot(BeNil())
	at.mu.Lock()
	events := at.events
	at.mu.Unlock()
	events(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	at.Eventually(func() v1alpha1.Phase { return at.status().Phase }).Should(Equal(v1alpha1.PhaseConnected))
	return at
}

// newAgentTest returns an agent that is not started yet.
func newAgentTest(t *testing.T, obj *v1alpha1.WhatsAppSession) *agentTest {
	at := &agentTest{
		WithT: NewWithT(t), environment: &environment{obj: obj, device: account{jid: jid, phone: phone}, version: 1},
		membership: &membership{lost: make(chan struct{}), ends: make(chan error, 1)}, clock: clocktesting.NewFakeClock(noon), ended: make(chan error, 1),
	}
	stop := make(chan struct{})
	at.stop = sync.OnceFunc(func() { close(stop) })
	at.agent = NewAgent(Options{
		Worker: me, Process: process, Stop: stop, DrainTimeout: time.Minute, Membership: at.membership,
		Sessions: at.environment, Accounts: at.environment, Proxies: at.environment, Publisher: at.environment, Limiter: at.environment, Events: at.environment,
		Clock: at.clock, Log: testr.New(t),
	}, placedCache{at.environment})
	return at
}

// start starts the agent; it ends with the test.
func (at *agentTest) start(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		at.ended <- at.agent.Start(ctx)
		close(at.ended)
	}()
	t.Cleanup(func() {
		cancel()
		at.stop()
		at.Eventually(func() bool {
			at.clock.Step(time.Second)
			select {
			case _, open := <-at.ended:
				return !open
			default:
				return false
			}
		}).Should(BeTrue())
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
}

// reconcile makes the agent reconcile the session, as a watch does.
func (at *agentTest) reconcile() {
	_, err := at.agent.Reconcile(context.Background(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(newSession())})
	at.Expect(err).NotTo(HaveOccurred())
}

func (at *agentTest) status() v1alpha1.WhatsAppSessionStatus {
	at.mu.Lock()
	defer at.mu.Unlock()
	return *at.obj.Status.DeepCopy()
}

func (at *agentTest) sockets() int {
	at.mu.Lock()
	defer at.mu.Unlock()
	return at.openSockets
}

// place places the session on a worker, with a higher epoch.
func (at *agentTest) place(worker string) {
	at.locked(func() {
		at.obj = at.obj.DeepCopy()
		at.obj.Status.Worker = worker
		at.obj.Status.Epoch++
		at.raiseVersion()
	})
	at.reconcile()
}

func TestADrainWaitsForTheSuccessor(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.stop()
	at.Eventually(at.membership.isSet(&at.membership.draining)).Should(BeTrue())
	for range 20 {
		at.clock.Step(time.Second)
	}
	at.Expect(at.status().HeldBy).To(Equal(me), "no successor is named yet")
	at.Expect(at.sockets()).To(Equal(1))

	at.place("worker-b")
	at.Eventually(func() string { at.clock.Step(time.Second); return at.status().HeldBy }).Should(BeEmpty())
	at.Eventually(func() bool {
		at.reconcile()
		at.clock.Step(time.Second)
		return at.membership.isSet(&at.membership.left)()
	}).Should(BeTrue())
	at.Expect(at.ended).To(Receive(BeNil()))
	at.Expect(at.sockets()).To(BeZero())
}

func TestADrainWithoutAnAnswerReleasesAllSessions(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.stop()
	at.Eventually(at.membership.isSet(&at.membership.draining)).Should(BeTrue())
	begun := at.clock.Now()
	at.Eventually(func() string { at.reconcile(); at.clock.Step(time.Second); return at.status().HeldBy }).Should(BeEmpty())
	at.Expect(at.clock.Since(begun)).To(BeNumerically(">=", answerTimeout))
	at.Eventually(at.membership.isSet(&at.membership.left)).Should(BeTrue())
}

func TestADrainThatCannotReleaseKeepsItsHeartbeats(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.locked(func() { at.apiDown = true })
	at.stop()
	at.Eventually(func() bool {
		at.clock.Step(time.Second)
		return len(at.ended) > 0
	}).Should(BeTrue())
	at.Expect(at.ended).To(Receive(BeNil()))
	at.Expect(at.membership.isSet(&at.membership.left)()).To(BeFalse(), "it still holds the session, so the manager must wait for the time-out of its heartbeats")
	at.Expect(at.sockets()).To(BeZero())
	at.Expect(at.status().HeldBy).To(Equal(me))
}

func TestAWorkerThatIsDeclaredDeadClosesAllConnectionsAtOnce(t *testing.T) {
	for _, draining := range []bool{false, true} {
		at := newConnectedAgentTest(t)
		if draining {
			at.stop()
			at.Eventually(at.membership.isSet(&at.membership.draining)).Should(BeTrue())
		}
		close(at.membership.lost)
		at.Eventually(at.sockets).Should(BeZero())
		at.Eventually(at.ended).Should(Receive())
		at.Expect(at.membership.isSet(&at.membership.left)()).To(BeFalse())
		at.Expect(at.status().HeldBy).To(Equal(me), "the manager clears heldBy when it declares the worker dead")
	}
}

// A process that has not joined must not release what another incarnation of the same
// name holds.
func TestAProcessThatHasNotJoinedReleasesNothing(t *testing.T) {
	at := newAgentTest(t, newSession(func(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy, s.Status.HolderStart = me, "theirs" }))
	at.membership.neverJoins = true
	at.start(t)
	at.stop()
	at.Eventually(func() bool { at.clock.Step(time.Second); return len(at.ended) > 0 }).Should(BeTrue())
	at.Expect(at.status().HeldBy).To(Equal(me))
	at.Expect(at.membership.isSet(&at.membership.left)()).To(BeFalse())
}

func TestADrainDoesNotWaitForRedis(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.locked(func() { at.redisDown = true })
	at.stop()
	at.Eventually(at.membership.isSet(&at.membership.draining)).Should(BeTrue())
	begun := at.clock.Now()
	at.place("worker-b")
	at.Eventually(func() bool {
		at.reconcile()
		at.clock.Step(100 * time.Millisecond)
		return at.membership.isSet(&at.membership.left)()
	}).Should(BeTrue())
	at.Expect(at.clock.Since(begun)).To(BeNumerically("<", answerTimeout))
}

func TestADrainEndsWithTheMembership(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.stop()
	at.Eventually(at.membership.isSet(&at.membership.draining)).Should(BeTrue())
	at.membership.ends <- errDown
	at.Eventually(at.sockets).Should(BeZero())
	at.Eventually(func() int { return len(at.ended) }).Should(Equal(1))
	at.Expect(at.membership.isSet(&at.membership.left)()).To(BeFalse())
}

// Another installation may have a worker of the same name.
func TestSessionsOfAnotherInstallationAreLeftAlone(t *testing.T) {
	at := newAgentTest(t, newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Installation, s.Status.HeldBy, s.Status.HolderStart = "elsewhere", me, "theirs"
	}))
	at.start(t)
	at.Eventually(at.agent.Joined).Should(BeTrue())
	at.reconcile()
	at.Consistently(func() string { at.clock.Step(time.Second); return at.status().HolderStart }, "200ms").Should(Equal("theirs"))
	at.stop()
	at.Eventually(func() bool { at.clock.Step(time.Second); return len(at.ended) > 0 }).Should(BeTrue())
	at.Expect(at.status().HeldBy).To(Equal(me))
}

// The cache may not show yet the last write of a supervisor that has ended.
func TestAStaleCacheStartsNoSupervisor(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.mu.Lock()
	old := at.obj.DeepCopy()
	at.mu.Unlock()
	at.place("worker-b")
	at.Eventually(func() string { at.clock.Step(100 * time.Millisecond); return at.status().HeldBy }).Should(BeEmpty())
	key := client.ObjectKeyFromObject(old)
	at.Eventually(func() int { return len(at.agent.all()) }).Should(BeZero())
	at.Expect(at.agent.supervisor(key, old)).To(BeNil())

	t.Log("a newer object starts one")
	at.place(me)
	at.Eventually(func() string { at.reconcile(); return at.status().HeldBy }).Should(Equal(me))
}

// What an agent keeps of sessions that have left does not grow forever.
func TestTheStateOfASessionThatHasLeftIsRemoved(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.place("worker-b")
	at.Eventually(func() string { at.clock.Step(100 * time.Millisecond); return at.status().HeldBy }).Should(BeEmpty())
	at.Eventually(func() int { return len(at.agent.all()) }).Should(BeZero())
	kept := func() (lastKnown, paces int) {
		at.agent.mu.Lock()
		defer at.agent.mu.Unlock()
		return len(at.agent.lastKnown), len(at.agent.paces)
	}
	at.Eventually(func() int { at.reconcile(); lastKnown, _ := kept(); return lastKnown }).Should(BeZero())

	_, paces := kept()
	at.Expect(paces).To(Equal(1), "the session may return")
	at.clock.Step(time.Hour)
	at.agent.mu.Lock()
	at.agent.keepPace("another", &session.Pace{})
	at.agent.mu.Unlock()
	_, paces = kept()
	at.Expect(paces).To(BeZero())
}

// newAgentTestWithFormerHold starts an agent whose former process held a session that
// was moved while the process was dead. The API server cannot be reached yet.
func newAgentTestWithFormerHold(t *testing.T) *agentTest {
	at := newAgentTest(t, newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Worker, s.Status.HeldBy, s.Status.HolderStart = "worker-b", me, "before"
	}))
	at.apiDown = true
	at.start(t)
	at.Eventually(at.agent.Joined).Should(BeTrue())
	return at
}

// The session was moved while the former process was dead, so the cache of the sessions
// that are placed here does not have it.
func TestASessionThatAFormerProcessHeldIsReleased(t *testing.T) {
	at := newAgentTestWithFormerHold(t)
	at.Eventually(at.clock.HasWaiters).Should(BeTrue())
	at.Expect(at.status().HeldBy).To(Equal(me))
	at.locked(func() { at.apiDown = false })
	at.Eventually(func() string { at.clock.Step(time.Second); return at.status().HeldBy }).Should(BeEmpty())
	at.Expect(at.sockets()).To(BeZero())
}

// This worker may still hold a session of a former process. It becomes free only when the
// heartbeats time out.
func TestADrainThatCouldNotListTheHeldSessionsKeepsItsHeartbeats(t *testing.T) {
	at := newAgentTestWithFormerHold(t)
	at.stop()
	at.Eventually(func() bool { at.clock.Step(time.Second); return len(at.ended) > 0 }).Should(BeTrue())
	at.Expect(at.membership.isSet(&at.membership.left)()).To(BeFalse())
	at.Expect(at.status().HeldBy).To(Equal(me))
}

func TestLiveness(t *testing.T) {
	at := newConnectedAgentTest(t)
	at.Expect(at.agent.Alive()).To(Succeed())
	for range 100 { // the loop runs while time passes
		at.clock.Step(loopInterval)
		at.Eventually(at.agent.Alive).Should(Succeed())
	}
	at.Eventually(func() error {
		at.agent.lastRun.Store(at.clock.Now().Add(-2 * stuckTimeout).UnixNano())
		return at.agent.Alive()
	}).
		Should(MatchError(ContainSubstring("has not run for")))
}

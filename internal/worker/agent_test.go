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

func TestTheEndOfABurst(t *testing.T) {
	g := NewWithT(t)
	b := burst{}
	looks := []struct {
		dials int64
		over  bool
	}{{0, false}, {0, false}, {900, false}, {1000, false}, {1000, true}, {1000, false}, {1001, false}, {1001, true}}
	for i, look := range looks {
		g.Expect(b.isOver(look.dials)).To(Equal(look.over), "look %d", i)
	}
}

// shown is a world as an agent's cache shows it: only what is placed on the worker.
type shown struct{ *world }

func (s shown) Get(_ context.Context, _ client.ObjectKey, into client.Object, _ ...client.GetOption) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.obj == nil || s.obj.Status.Worker != me {
		return apierrors.NewNotFound(schema.GroupResource{}, "shop")
	}
	s.obj.DeepCopyInto(into.(*v1alpha1.WhatsAppSession))
	return nil
}

func (s shown) List(_ context.Context, into client.ObjectList, _ ...client.ListOption) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := into.(*v1alpha1.WhatsAppSessionList)
	if s.obj != nil && s.obj.Status.HeldBy == me {
		list.Items = append(list.Items, *s.obj.DeepCopy())
	}
	return nil
}

// membership joins at once, unless it waits for another incarnation.
type membership struct {
	lost     chan struct{}
	waits    bool
	taken    chan error
	mu       sync.Mutex
	draining bool
	left     bool
}

func (m *membership) Run(ctx context.Context, joined func(), _ func() (int, int)) error {
	if !m.waits {
		joined()
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-m.taken:
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

func (m *membership) is(what *bool) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return *what
	}
}

// workplace is an agent with one session, which is connected.
type workplace struct {
	*WithT
	*world
	agent      *Agent
	membership *membership
	clock      *clocktesting.FakeClock
	stop       func()
	ended      chan error
}

func newWorkplace(t *testing.T) *workplace {
	p := prepare(t, newSession())
	p.begin(t)
	p.Eventually(func() string { p.look(); return p.status().HeldBy }).Should(Equal(me))
	p.Eventually(func() func(session.Event) {
		p.look()
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.events
	}).ShouldNot(BeNil())
	p.mu.Lock()
	events := p.events
	p.mu.Unlock()
	events(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	p.Eventually(func() v1alpha1.Phase { return p.status().Phase }).Should(Equal(v1alpha1.PhaseConnected))
	return p
}

// prepare makes an agent that is not started yet.
func prepare(t *testing.T, obj *v1alpha1.WhatsAppSession) *workplace {
	p := &workplace{
		WithT: NewWithT(t), world: &world{obj: obj, device: account{jid: jid, phone: phone}, version: 1},
		membership: &membership{lost: make(chan struct{}), taken: make(chan error, 1)}, clock: clocktesting.NewFakeClock(noon), ended: make(chan error, 1),
	}
	stop := make(chan struct{})
	p.stop = sync.OnceFunc(func() { close(stop) })
	p.agent = NewAgent(Options{
		Worker: me, Process: process, Stop: stop, DrainTimeout: time.Minute, Membership: p.membership,
		Sessions: p.world, Accounts: p.world, Proxies: p.world, Publisher: p.world, Limiter: p.world, Events: p.world,
		Clock: p.clock, Log: testr.New(t),
	}, shown{p.world})
	return p
}

// begin starts the agent; it ends with the test.
func (p *workplace) begin(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		p.ended <- p.agent.Start(ctx)
		close(p.ended)
	}()
	t.Cleanup(func() {
		cancel()
		p.stop()
		p.Eventually(func() bool {
			p.clock.Step(time.Second)
			select {
			case _, open := <-p.ended:
				return !open
			default:
				return false
			}
		}).Should(BeTrue())
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
}

// look has the agent look at the session as a watch would.
func (p *workplace) look() {
	_, err := p.agent.Reconcile(context.Background(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(newSession())})
	p.Expect(err).NotTo(HaveOccurred())
}

func (p *workplace) status() v1alpha1.WhatsAppSessionStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return *p.obj.Status.DeepCopy()
}

func (p *workplace) sockets() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open
}

func (p *workplace) place(worker string) {
	p.locked(func() {
		p.obj = p.obj.DeepCopy()
		p.obj.Status.Worker = worker
		p.obj.Status.Epoch++
		p.bump()
	})
	p.look()
}

func TestADrainWaitsForTheSuccessor(t *testing.T) {
	p := newWorkplace(t)
	p.stop()
	p.Eventually(p.membership.is(&p.membership.draining)).Should(BeTrue())
	for range 20 {
		p.clock.Step(time.Second)
	}
	p.Expect(p.status().HeldBy).To(Equal(me), "nobody can take it yet")
	p.Expect(p.sockets()).To(Equal(1))

	p.place("worker-b")
	p.Eventually(func() string { p.clock.Step(time.Second); return p.status().HeldBy }).Should(BeEmpty())
	p.Eventually(func() bool { p.look(); p.clock.Step(time.Second); return p.membership.is(&p.membership.left)() }).Should(BeTrue())
	p.Expect(p.ended).To(Receive(BeNil()))
	p.Expect(p.sockets()).To(BeZero())
}

func TestADrainThatNobodyAnswersGivesUpEverything(t *testing.T) {
	p := newWorkplace(t)
	p.stop()
	p.Eventually(p.membership.is(&p.membership.draining)).Should(BeTrue())
	begun := p.clock.Now()
	p.Eventually(func() string { p.look(); p.clock.Step(time.Second); return p.status().HeldBy }).Should(BeEmpty())
	p.Expect(p.clock.Since(begun)).To(BeNumerically(">=", answerTimeout))
	p.Eventually(p.membership.is(&p.membership.left)).Should(BeTrue())
}

func TestADrainThatCannotReleaseLeavesItsHeartbeats(t *testing.T) {
	p := newWorkplace(t)
	p.locked(func() { p.apiDown = true })
	p.stop()
	p.Eventually(func() bool {
		p.clock.Step(time.Second)
		return len(p.ended) > 0
	}).WithTimeout(10 * time.Second).Should(BeTrue())
	p.Expect(p.ended).To(Receive(BeNil()))
	p.Expect(p.membership.is(&p.membership.left)()).To(BeFalse(), "what it holds is not free: the others wait for its silence")
	p.Expect(p.sockets()).To(BeZero())
	p.Expect(p.status().HeldBy).To(Equal(me))
}

func TestAWorkerThatLosesItsRightClosesEverythingAtOnce(t *testing.T) {
	for _, draining := range []bool{false, true} {
		p := newWorkplace(t)
		if draining {
			p.stop()
			p.Eventually(p.membership.is(&p.membership.draining)).Should(BeTrue())
		}
		close(p.membership.lost)
		p.Eventually(p.sockets).Should(BeZero())
		p.Eventually(p.ended).Should(Receive())
		p.Expect(p.membership.is(&p.membership.left)()).To(BeFalse())
		p.Expect(p.status().HeldBy).To(Equal(me), "whoever declares it dead takes it")
	}
}

// TestWhoHasNotJoinedReleasesNothing: what another incarnation of the name holds is not
// this process's to give up.
func TestWhoHasNotJoinedReleasesNothing(t *testing.T) {
	p := prepare(t, newSession(func(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy, s.Status.HolderStart = me, "theirs" }))
	p.membership.waits = true
	p.begin(t)
	p.stop()
	p.Eventually(func() bool { p.clock.Step(time.Second); return len(p.ended) > 0 }).Should(BeTrue())
	p.Expect(p.status().HeldBy).To(Equal(me))
	p.Expect(p.membership.is(&p.membership.left)()).To(BeFalse())
}

func TestADrainDoesNotWaitForRedis(t *testing.T) {
	p := newWorkplace(t)
	p.locked(func() { p.redisDown = true })
	p.stop()
	p.Eventually(p.membership.is(&p.membership.draining)).Should(BeTrue())
	begun := p.clock.Now()
	p.place("worker-b")
	p.Eventually(func() bool {
		p.look()
		p.clock.Step(100 * time.Millisecond)
		return p.membership.is(&p.membership.left)()
	}).Should(BeTrue())
	p.Expect(p.clock.Since(begun)).To(BeNumerically("<", answerTimeout))
}

func TestADrainEndsWithTheMembership(t *testing.T) {
	p := newWorkplace(t)
	p.stop()
	p.Eventually(p.membership.is(&p.membership.draining)).Should(BeTrue())
	p.membership.taken <- errDown
	p.Eventually(p.sockets).Should(BeZero())
	p.Eventually(func() int { return len(p.ended) }).Should(Equal(1))
	p.Expect(p.membership.is(&p.membership.left)()).To(BeFalse())
}

// TestAnothersWorkerOfTheSameName leaves alone what another installation manages.
func TestAnothersWorkerOfTheSameName(t *testing.T) {
	p := prepare(t, newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Installation, s.Status.HeldBy, s.Status.HolderStart = "elsewhere", me, "theirs"
	}))
	p.begin(t)
	p.Eventually(p.agent.Joined).Should(BeTrue())
	p.look()
	p.Consistently(func() string { p.clock.Step(time.Second); return p.status().HolderStart }, "200ms").Should(Equal("theirs"))
	p.stop()
	p.Eventually(func() bool { p.clock.Step(time.Second); return len(p.ended) > 0 }).Should(BeTrue())
	p.Expect(p.status().HeldBy).To(Equal(me))
}

// TestASupervisorThatHasEndedKnowsBetterThanTheCache, which is behind its last write.
func TestASupervisorThatHasEndedKnowsBetterThanTheCache(t *testing.T) {
	p := newWorkplace(t)
	p.mu.Lock()
	old := p.obj.DeepCopy()
	p.mu.Unlock()
	p.place("worker-b")
	p.Eventually(func() string { p.clock.Step(100 * time.Millisecond); return p.status().HeldBy }).Should(BeEmpty())
	key := client.ObjectKeyFromObject(old)
	p.Eventually(func() int { return len(p.agent.all()) }).Should(BeZero())
	p.Expect(p.agent.supervisor(key, old)).To(BeNil())

	t.Log("but not better than what comes after it")
	p.place(me)
	p.Eventually(func() string { p.look(); return p.status().HeldBy }).Should(Equal(me))
}

// What an agent remembers of sessions that have left does not grow for ever.
func TestASessionThatHasLeftIsForgotten(t *testing.T) {
	p := newWorkplace(t)
	p.place("worker-b")
	p.Eventually(func() string { p.clock.Step(100 * time.Millisecond); return p.status().HeldBy }).Should(BeEmpty())
	p.Eventually(func() int { return len(p.agent.all()) }).Should(BeZero())
	remembered := func() (over, paces int) {
		p.agent.mu.Lock()
		defer p.agent.mu.Unlock()
		return len(p.agent.over), len(p.agent.paces)
	}
	p.Eventually(func() int { p.look(); over, _ := remembered(); return over }).Should(BeZero())

	_, paces := remembered()
	p.Expect(paces).To(Equal(1), "it may come back")
	p.clock.Step(time.Hour)
	p.agent.mu.Lock()
	p.agent.rememberPace("another", &session.Pace{})
	p.agent.mu.Unlock()
	_, paces = remembered()
	p.Expect(paces).To(BeZero())
}

// prepareLeft is an agent that cannot ask yet what a former process held: a
// session that was moved while that was dead.
func prepareLeft(t *testing.T) *workplace {
	p := prepare(t, newSession(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Worker, s.Status.HeldBy, s.Status.HolderStart = "worker-b", me, "before"
	}))
	p.apiDown = true
	p.begin(t)
	p.Eventually(p.agent.Joined).Should(BeTrue())
	return p
}

// TestWhatAFormerProcessHeldIsReleased: the session was moved while the process was dead, so
// no cache of what is placed here shows it.
func TestWhatAFormerProcessHeldIsReleased(t *testing.T) {
	p := prepareLeft(t)
	p.Eventually(p.clock.HasWaiters).Should(BeTrue())
	p.Expect(p.status().HeldBy).To(Equal(me))
	p.locked(func() { p.apiDown = false })
	p.Eventually(func() string { p.clock.Step(time.Second); return p.status().HeldBy }).Should(BeEmpty())
	p.Expect(p.sockets()).To(BeZero())
}

// TestADrainThatDoesNotKnowWhatIsLeftKeepsItsHeartbeats: a former process's session may still
// be held in this worker's name, and only its silence makes it free.
func TestADrainThatDoesNotKnowWhatIsLeftKeepsItsHeartbeats(t *testing.T) {
	p := prepareLeft(t)
	p.stop()
	p.Eventually(func() bool { p.clock.Step(time.Second); return len(p.ended) > 0 }).Should(BeTrue())
	p.Expect(p.membership.is(&p.membership.left)()).To(BeFalse())
	p.Expect(p.status().HeldBy).To(Equal(me))
}

func TestLiveness(t *testing.T) {
	p := newWorkplace(t)
	p.Expect(p.agent.Alive()).To(Succeed())
	for range 100 { // it goes round as time passes
		p.clock.Step(beatInterval)
		p.Eventually(p.agent.Alive).Should(Succeed())
	}
	p.Eventually(func() error {
		p.agent.beat.Store(p.clock.Now().Add(-2 * stuckAfter).UnixNano())
		return p.agent.Alive()
	}).
		Should(MatchError(ContainSubstring("has not run for")))
}

package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

func TestBreaker(t *testing.T) {
	refused := func(uids ...types.UID) func(b *versionBreaker) {
		return func(b *versionBreaker) {
			for i, uid := range uids {
				b.outdated(uid, 100, noon.Add(time.Duration(i)*time.Second))
			}
		}
	}
	admitted := func(uid types.UID) func(b *versionBreaker) { return func(b *versionBreaker) { b.admits(uid) } }
	for _, tt := range []struct {
		name  string
		steps []func(b *versionBreaker)
		state breakerState
		// admits are the sessions that may connect then.
		admits, holds []types.UID
	}{
		{name: "nothing happened", state: breakerClosed, admits: []types.UID{"a", "b"}},
		{name: "two were refused", steps: []func(*versionBreaker){refused("a", "b")}, state: breakerClosed, admits: []types.UID{"a", "c"}},
		{name: "one was refused three times", steps: []func(*versionBreaker){refused("a", "a", "a")}, state: breakerClosed, admits: []types.UID{"a"}},
		{
			name: "three were refused, over a long time",
			steps: []func(*versionBreaker){refused("a", "b"), func(b *versionBreaker) {
				b.outdated("c", 100, noon.Add(DefaultOutdatedWithin+2*time.Second))
			}},
			state: breakerClosed, admits: []types.UID{"a"},
		},
		{
			name:  "three were refused within a minute: all are held back",
			steps: []func(*versionBreaker){refused("a", "b", "c")}, state: breakerRefreshing, holds: []types.UID{"a", "d"},
		},
		{
			name:  "a worker with two sessions needs two",
			steps: []func(*versionBreaker){func(b *versionBreaker) { b.outdated("a", 2, noon); b.outdated("b", 2, noon) }},
			state: breakerRefreshing, holds: []types.UID{"a"},
		},
		{
			name:  "the version was refreshed: the first who asks may try, alone",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x")},
			state: breakerProbing, admits: []types.UID{"x"}, holds: []types.UID{"a", "y"},
		},
		{
			name:  "it gets through: all may",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x"), func(b *versionBreaker) { b.through("x") }},
			state: breakerClosed, admits: []types.UID{"x", "a", "y"},
		},
		{
			name:  "another gets through, whose attempt was older: that says nothing",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x"), func(b *versionBreaker) { b.through("y") }},
			state: breakerProbing, holds: []types.UID{"y"},
		},
		{
			name:  "others are refused meanwhile, whose attempts were older: the same",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x"), refused("d", "e", "f")},
			state: breakerProbing, admits: []types.UID{"x"}, holds: []types.UID{"d"},
		},
		{
			name:  "it ends without a verdict: another may try",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x"), func(b *versionBreaker) { b.gone("y"); b.gone("x") }},
			state: breakerProbing, admits: []types.UID{"y"}, holds: []types.UID{"x"},
		},
		{
			name:  "it is refused: a long pause",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x"), refused("x"), func(b *versionBreaker) { b.gone("x"); b.tick(noon.Add(DefaultOutdatedPause - time.Second)) }},
			state: breakerStale, holds: []types.UID{"x", "a"},
		},
		{
			name:  "the pause is over",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x"), refused("x"), func(b *versionBreaker) { b.tick(noon.Add(DefaultOutdatedPause)) }},
			state: breakerRefreshing, holds: []types.UID{"x"},
		},
		{
			name:  "a person ends the pause",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).refreshed, admitted("x"), refused("x"), (*versionBreaker).again},
			state: breakerRefreshing, holds: []types.UID{"x"},
		},
		{name: "a person asks for nothing while all is well", steps: []func(*versionBreaker){(*versionBreaker).again, (*versionBreaker).refreshed}, state: breakerClosed, admits: []types.UID{"x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			b := newVersionBreaker(Outdated{})
			for _, step := range tt.steps {
				step(b)
			}
			g.Expect(b.state).To(Equal(tt.state))
			for _, uid := range tt.admits {
				g.Expect(b.admits(uid)).To(BeTrue(), "%s", uid)
			}
			for _, uid := range tt.holds {
				g.Expect(b.admits(uid)).To(BeFalse(), "%s", uid)
			}
		})
	}
}

// errNotNewer has a page answer with the version that is known.
var errNotNewer = errors.New("not newer")

// page stands for WhatsApp's page, which names the version.
type page struct {
	mu    sync.Mutex
	asked int
	// answer is what the next question waits for.
	answer chan error
}

func (p *page) RefreshVersion(ctx context.Context) (bool, error) {
	p.mu.Lock()
	p.asked++
	p.mu.Unlock()
	select {
	case err := <-p.answer:
		if errors.Is(err, errNotNewer) {
			return false, nil
		}
		return err == nil, err
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

func (p *page) questions() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked
}

// port is a fleet and the sessions that want to leave.
type port struct {
	*WithT
	*fleet
	page    *page
	clock   *clocktesting.FakeClock
	ctx     context.Context
	work    sync.WaitGroup
	mu      sync.Mutex
	left    []types.UID
	retries int
	// forward are the sessions that were told of the end of a common trouble.
	forward []types.UID
}

func newPort(t *testing.T) *port {
	p := &port{WithT: NewWithT(t), page: &page{answer: make(chan error)}, clock: clocktesting.NewFakeClock(noon)}
	p.fleet = newFleet(Outdated{}, p.page, p.clock, testr.New(t), func() int { return 100 }, func() int { return 100 }, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.retries++
	}, func(sessions map[types.UID]bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		for uid := range sessions {
			p.forward = append(p.forward, uid)
		}
	})
	var cancel context.CancelFunc
	p.ctx, cancel = context.WithCancel(context.Background())
	p.work.Go(func() { p.run(p.ctx) })
	t.Cleanup(func() {
		cancel()
		p.work.Wait()
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	return p
}

func (p *port) goes(uid types.UID) {
	p.work.Go(func() {
		if _, err := p.wait(p.ctx, uid); err == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.left = append(p.left, uid)
		}
	})
}

func (p *port) gone() []types.UID {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]types.UID{}, p.left...)
}

func (p *port) retried() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.retries
}

func (p *port) broughtForward() []types.UID {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]types.UID{}, p.forward...)
}

func (p *port) trip() {
	for i := range DefaultOutdatedSessions {
		p.onEvent(types.UID(fmt.Sprint("early-", i)), session.Event{Type: session.EventOutdated})
	}
}

func TestAFleetWithANewVersion(t *testing.T) {
	p := newPort(t)
	p.Eventually(p.page.questions).Should(Equal(1), "at the start, in the background")
	p.goes("first")
	p.Eventually(p.gone).Should(HaveLen(1), "nobody waits for it")
	p.page.answer <- errors.New("the page is away")

	p.trip()
	p.Eventually(p.page.questions).Should(Equal(2))
	for i := range 5 {
		p.goes(types.UID(fmt.Sprint(i)))
	}
	p.Consistently(p.gone, "50ms").Should(HaveLen(1), "held back")
	p.page.answer <- nil
	p.Eventually(p.gone).Should(HaveLen(2), "one tries")
	p.Eventually(p.retried).Should(Equal(1), "also those who were refused stand in the queue now")
	p.Consistently(p.gone, "50ms").Should(HaveLen(2))

	p.fleet.gone(p.gone()[1])
	p.Eventually(p.gone).Should(HaveLen(3), "its connection broke: another tries")
	p.onEvent(p.gone()[2], session.Event{Type: session.EventConnected})
	p.Eventually(p.gone).Should(HaveLen(6), "it is through")
	p.Eventually(p.retried).Should(Equal(2))
	p.Expect(p.page.questions()).To(Equal(2), "asked once")
	p.Expect(p.HoldsBack()).To(BeFalse())
}

func TestAFleetWhoseNewestVersionIsRefused(t *testing.T) {
	p := newPort(t)
	p.page.answer <- nil
	p.trip()
	p.goes("a")
	p.goes("b")
	p.page.answer <- nil
	p.Eventually(p.gone).Should(HaveLen(1))
	p.onEvent(p.gone()[0], session.Event{Type: session.EventOutdated})
	p.fleet.gone(p.gone()[0])
	p.Eventually(p.clock.HasWaiters).Should(BeTrue())
	p.Consistently(p.gone, "50ms").Should(HaveLen(1), "the others stay")

	p.clock.Step(DefaultOutdatedPause)
	p.page.answer <- nil
	p.Eventually(p.gone).Should(HaveLen(2), "after the pause it is tried again")
	p.onEvent(p.gone()[1], session.Event{Type: session.EventOutdated})
	p.goes("c")
	p.fleet.again()
	p.page.answer <- nil
	p.Eventually(p.gone).Should(HaveLen(3), "and at once when a person asks for it")
	p.onEvent("c", session.Event{Type: session.EventQR})
	p.Eventually(p.HoldsBack).Should(BeFalse(), "codes come to clients that are accepted")
}

// Sessions that are refused one by one never open the breaker.
func TestATrickleOfRefusalsHeals(t *testing.T) {
	outdated := session.Event{Type: session.EventOutdated}
	p := newPort(t)
	p.page.answer <- errors.New("the page is away")
	p.Eventually(func() bool {
		p.fleet.mu.Lock()
		defer p.fleet.mu.Unlock()
		return p.askedAt.Equal(noon)
	}).Should(BeTrue())
	p.onEvent("a", outdated)
	p.onEvent("a", outdated)
	p.Eventually(p.clock.HasWaiters).Should(BeTrue())
	p.Consistently(p.page.questions, "50ms").Should(Equal(1), "asked a moment ago")
	p.clock.Step(askInterval)
	p.page.answer <- errNotNewer
	p.Consistently(p.retried, "50ms").Should(BeZero(), "the version is the same")
	p.clock.Step(askInterval)
	p.Consistently(p.page.questions, "50ms").Should(Equal(2), "not again and again")
	p.clock.Step(DefaultOutdatedPause)
	p.page.answer <- nil
	p.Eventually(p.retried).Should(Equal(1), "WhatsApp's page has named a newer one meanwhile")

	// Its attempt was on its way with the old version.
	p.onEvent("b", outdated)
	p.Eventually(p.clock.HasWaiters).Should(BeTrue())
	p.clock.Step(askInterval)
	p.page.answer <- errNotNewer
	p.Eventually(p.retried).Should(Equal(2))
	p.Expect(p.HoldsBack()).To(BeFalse())
}

// One of the refused sessions of a worker, seen from its supervisor.
func TestAnOutdatedSessionIsHeldBackAndComesBack(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.dials(1)
	st.happens(session.Event{Type: session.EventOutdated, Reason: "ClientOutdated"})
	st.eventually(v1alpha1.PhaseOutdated)
	fleet := st.s.Fleet
	fleet.change(func(b *versionBreaker) { b.outdated("b", 2, noon) })
	st.Expect(fleet.HoldsBack()).To(BeTrue())
	st.s.post(func() { st.s.step(session.RetryOutdated{}) })
	st.Eventually(st.running).Should(Equal(session.OpDial))
	st.Consistently(st.countDials, "50ms").Should(Equal(1), "it waits for its chance")

	fleet.change((*versionBreaker).refreshed)
	st.dials(2)
	st.happens(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventually(v1alpha1.PhaseConnected)
	st.Expect(fleet.HoldsBack()).To(BeFalse())
}

func TestAProbeThatCannotBeDialledMakesRoom(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	fleet := st.s.Fleet
	st.connect()
	fleet.change(func(b *versionBreaker) { b.outdated("b", 1, noon) })
	st.happens(session.Event{Type: session.EventDisconnected, Reason: "SocketClosed"})
	st.Eventually(func() string { st.clock.Step(time.Second); return string(st.running()) }).Should(Equal("dial"))
	st.Eventually(func() string { return st.message() }).Should(ContainSubstring("newest is tried"))
	st.locked(func() { st.dialErr = errDown })
	fleet.change((*versionBreaker).refreshed)
	st.Eventually(func() bool { ok, _ := fleet.admits("other"); return ok }).Should(BeTrue())
	st.locked(func() { st.dialErr = nil })
}

func (st *stage) running() (op session.Operation) {
	done := make(chan struct{})
	st.s.post(func() { op = st.s.machine.Running(); close(done) })
	<-done
	return op
}

func (st *stage) message() string {
	for _, c := range st.status().Conditions {
		if c.Type == v1alpha1.ConditionReady {
			return c.Message
		}
	}
	return ""
}

// The hold of a session that waits for the breaker is given up at once.
func TestAHeldBackSessionMovesAway(t *testing.T) {
	st := newStage(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.s.Fleet.change(func(b *versionBreaker) { b.outdated("b", 1, noon) })
	st.happens(session.Event{Type: session.EventDisconnected, Reason: "SocketClosed"})
	st.Eventually(func() session.Operation { st.clock.Step(time.Second); return st.running() }).Should(Equal(session.OpDial))
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.status().HeldBy).To(BeEmpty())
}

// queue is a Limiter that nobody gets through until it is open.
type queue struct {
	opened chan struct{}
	// waiting counts those who stand in it, and spent those who got through.
	waiting, spent atomic.Int32
}

func (q *queue) Free() int { return 0 }

func (q *queue) Wait(ctx context.Context, _ Login) error {
	q.waiting.Add(1)
	defer q.waiting.Add(-1)
	select {
	case <-q.opened:
		q.spent.Add(1)
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// The breaker opens while a session queues for its login token.
func TestWhoQueuesIsHeldBackToo(t *testing.T) {
	g := NewWithT(t)
	q := &queue{opened: make(chan struct{})}
	fleet := newFleet(Outdated{}, nil, clocktesting.NewFakeClock(noon), testr.New(t), func() int { return 1 }, func() int { return 1 }, func() {}, func(map[types.UID]bool) {})
	s := &supervisor{dependencies: dependencies{Limiter: q, Fleet: fleet}, uid: "a"}
	through := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { through <- s.turn(ctx, Login{}, false) }()
	g.Eventually(q.waiting.Load).Should(BeEquivalentTo(1))

	fleet.change(func(b *versionBreaker) { b.outdated("b", 1, noon) })
	g.Eventually(q.waiting.Load).Should(BeZero(), "it leaves the queue")
	close(q.opened)
	g.Consistently(through, "50ms").ShouldNot(Receive())
	g.Expect(q.spent.Load()).To(BeZero(), "its token is another's")

	fleet.change((*versionBreaker).refreshed)
	g.Eventually(through).Should(Receive(BeNil()))
	g.Expect(q.spent.Load()).To(BeEquivalentTo(1))
	fleet.change(func(b *versionBreaker) { b.through("a") })
	g.Expect(s.turn(ctx, Login{}, true)).To(Succeed())
	g.Expect(q.spent.Load()).To(BeEquivalentTo(1), "it had one in hand")
}

// What changes while a dial waits for its turn.
func TestADialThatWaitsIsCalledOff(t *testing.T) {
	waits := func(t *testing.T, obj *v1alpha1.WhatsAppSession, device account) (*stage, *fleet) {
		st := newStage(t, obj, device)
		fleet := st.s.Fleet
		st.dials(1)
		fleet.change(func(b *versionBreaker) { b.outdated("b", 1, noon) })
		st.happens(session.Event{Type: session.EventDisconnected, Reason: "SocketClosed"})
		st.Eventually(func() session.Operation { st.clock.Step(time.Second); return st.running() }).Should(Equal(session.OpDial))
		return st, fleet
	}
	now := func(st *stage) (spec session.DialSpec, attempts int) {
		done := make(chan struct{})
		st.s.post(func() { spec, attempts = st.s.machine.Dialing(), st.s.machine.Attempts(); close(done) })
		<-done
		return spec, attempts
	}
	t.Run("the number is corrected", func(t *testing.T) {
		st, fleet := waits(t, newSession(byCode), account{})
		_, failures := now(st)
		st.change(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34600111333" })
		st.Eventually(func() string { spec, _ := now(st); return spec.PairPhone }).Should(Equal("+34600111333"))
		_, attempts := now(st)
		st.Expect(attempts).To(Equal(failures), "it was no failure")
		fleet.change((*versionBreaker).refreshed)
		st.dials(2)
		st.locked(func() { st.Expect(st.pairPhones).To(Equal([]string{phone, "+34600111333"})) })
	})
	t.Run("the proxy is corrected", func(t *testing.T) {
		st, fleet := waits(t, newSession(), account{jid: jid, phone: phone})
		st.change(func(s *v1alpha1.WhatsAppSession) {
			s.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "out"}}
		})
		st.Eventually(func() string { spec, _ := now(st); return spec.ProxySecret }).Should(Equal("out"))
		fleet.change((*versionBreaker).refreshed)
		st.dials(2)
	})
	t.Run("the time for pairing is over", func(t *testing.T) {
		st, fleet := waits(t, newSession(func(s *v1alpha1.WhatsAppSession) {
			s.Status.PairingDeadline = &metav1.Time{Time: noon.Add(10 * time.Minute)}
		}), account{})
		st.clock.Step(10 * time.Minute)
		st.eventually(v1alpha1.PhasePairingExpired)
		st.Eventually(st.running).Should(Equal(session.OpNone))
		fleet.change((*versionBreaker).refreshed)
		st.Consistently(st.countDials, "50ms").Should(Equal(1))
	})
	t.Run("an unpaired session is deleted", func(t *testing.T) {
		st, _ := waits(t, newSession(), account{})
		st.change(deleted)
		st.Eventually(func() string { return st.status().HeldBy }).Should(BeEmpty())
		st.Expect(st.lines()).To(ContainElement("forget"))
	})
}

// The first session that is well again speaks for those that failed with it.
func TestTheFirstStableSessionBringsTheOthersForward(t *testing.T) {
	p := newPort(t)
	p.page.answer <- nil
	for i := range 3 {
		p.Failed(types.UID(fmt.Sprint(i)), noon)
	}
	p.fleet.left("2") // it was logged out, or has moved away
	p.onEvent("0", session.Event{Type: session.EventConnected})
	p.Recovered("0", noon)
	p.Eventually(p.broughtForward).Should(Equal([]types.UID{"1"}))
	p.Recovered("1", noon)
	p.Consistently(p.broughtForward, "50ms").Should(HaveLen(1), "nobody is left")
}

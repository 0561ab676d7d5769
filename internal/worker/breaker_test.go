package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/testr"
	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

func TestBreaker(t *testing.T) {
	refused := func(uids ...types.UID) func(b *versionBreaker) {
		return func(b *versionBreaker) {
			for i, uid := range uids {
				b.onRefused(uid, 100, noon.Add(time.Duration(i)*time.Second))
			}
		}
	}
	admitted := func(uid types.UID) func(b *versionBreaker) { return func(b *versionBreaker) { b.admits(uid) } }
	for _, tt := range []struct {
		name  string
		steps []func(b *versionBreaker)
		state breakerState
		// admits are the sessions that may connect after the steps, holds those that may not.
		admits, holds []types.UID
	}{
		{name: "nothing happened", state: breakerClosed, admits: []types.UID{"a", "b"}},
		{name: "two sessions were refused", steps: []func(*versionBreaker){refused("a", "b")}, state: breakerClosed, admits: []types.UID{"a", "c"}},
		{name: "one session was refused three times", steps: []func(*versionBreaker){refused("a", "a", "a")}, state: breakerClosed, admits: []types.UID{"a"}},
		{
			name: "three sessions were refused, but not within a minute",
			steps: []func(*versionBreaker){refused("a", "b"), func(b *versionBreaker) {
				b.onRefused("c", 100, noon.Add(DefaultOutdatedWithin+2*time.Second))
			}},
			state: breakerClosed, admits: []types.UID{"a"},
		},
		{
			name:  "three sessions were refused within a minute: all are held back",
			steps: []func(*versionBreaker){refused("a", "b", "c")}, state: breakerRefreshing, holds: []types.UID{"a", "d"},
		},
		{
			name:  "two sessions were refused on a worker with two",
			steps: []func(*versionBreaker){func(b *versionBreaker) { b.onRefused("a", 2, noon); b.onRefused("b", 2, noon) }},
			state: breakerRefreshing, holds: []types.UID{"a"},
		},
		{
			name:  "the version was refreshed: only the first session that asks may connect",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x")},
			state: breakerProbing, admits: []types.UID{"x"}, holds: []types.UID{"a", "y"},
		},
		{
			name:  "the probe is accepted: all sessions may connect",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x"), func(b *versionBreaker) { b.onAccepted("x") }},
			state: breakerClosed, admits: []types.UID{"x", "a", "y"},
		},
		{
			name:  "an older attempt of another session is accepted: the breaker stays as it is",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x"), func(b *versionBreaker) { b.onAccepted("y") }},
			state: breakerProbing, holds: []types.UID{"y"},
		},
		{
			name:  "older attempts of other sessions are refused: the breaker stays as it is",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x"), refused("d", "e", "f")},
			state: breakerProbing, admits: []types.UID{"x"}, holds: []types.UID{"d"},
		},
		{
			name:  "the probe ends without a result: another session may connect",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x"), func(b *versionBreaker) { b.onAttemptEnded("y"); b.onAttemptEnded("x") }},
			state: breakerProbing, admits: []types.UID{"y"}, holds: []types.UID{"x"},
		},
		{
			name:  "the probe is refused: a long pause",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x"), refused("x"), func(b *versionBreaker) { b.onAttemptEnded("x"); b.tick(noon.Add(DefaultOutdatedPause - time.Second)) }},
			state: breakerStale, holds: []types.UID{"x", "a"},
		},
		{
			name:  "the pause is over",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x"), refused("x"), func(b *versionBreaker) { b.tick(noon.Add(DefaultOutdatedPause)) }},
			state: breakerRefreshing, holds: []types.UID{"x"},
		},
		{
			name:  "a person ends the pause",
			steps: []func(*versionBreaker){refused("a", "b", "c"), (*versionBreaker).onRefreshed, admitted("x"), refused("x"), (*versionBreaker).endPause},
			state: breakerRefreshing, holds: []types.UID{"x"},
		},
		{name: "a person asks for an attempt while the breaker is closed", steps: []func(*versionBreaker){(*versionBreaker).endPause, (*versionBreaker).onRefreshed}, state: breakerClosed, admits: []types.UID{"x"}},
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

// errNotNewer makes a versionPage answer with the known version.
var errNotNewer = errors.New("not newer")

// versionPage is a fake of WhatsApp's page that names the newest version.
type versionPage struct {
	mu       sync.Mutex
	requests int
	// answer is what the next request waits for.
	answer chan error
}

func (p *versionPage) RefreshVersion(ctx context.Context) (bool, error) {
	p.mu.Lock()
	p.requests++
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

func (p *versionPage) requestCount() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.requests
}

// fleetTest is a fleet, and the sessions that connect through it. Its tests run in a
// synctest bubble: time passes only while every goroutine waits, so that no step of the clock
// comes between the moment that run reads the time and the moment that it sets its timer.
type fleetTest struct {
	*WithT
	t *testing.T
	*fleet
	page    *versionPage
	ctx     context.Context
	work    sync.WaitGroup
	mu      sync.Mutex
	passed  []types.UID // the sessions that were admitted
	retries int         // calls of fleet.retry
	// resumedUIDs are the sessions that fleet.resume was called with.
	resumedUIDs []types.UID
}

func newFleetTest(t *testing.T) *fleetTest {
	ft := &fleetTest{WithT: NewWithT(t), t: t, page: &versionPage{answer: make(chan error)}}
	ft.fleet = newFleet(Outdated{}, ft.page, clock.RealClock{}, testr.New(t), func() int { return 100 }, func() int { return 100 }, func() {
		ft.mu.Lock()
		defer ft.mu.Unlock()
		ft.retries++
	}, func(sessions map[types.UID]bool) {
		ft.mu.Lock()
		defer ft.mu.Unlock()
		for uid := range sessions {
			ft.resumedUIDs = append(ft.resumedUIDs, uid)
		}
	})
	var cancel context.CancelFunc
	ft.ctx, cancel = context.WithCancel(context.Background())
	ft.work.Go(func() { ft.run(ft.ctx) })
	t.Cleanup(func() {
		cancel()
		ft.work.Wait()
	})
	return ft
}

// answers answers the request for the version that waits now.
func (ft *fleetTest) answers(err error) {
	ft.t.Helper()
	synctest.Wait()
	select {
	case ft.page.answer <- err:
	default:
		ft.t.Fatal("No request for the version waits for an answer")
	}
	synctest.Wait()
}

// passes lets time pass.
func (ft *fleetTest) passes(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // the bubble's clock is fake
	synctest.Wait()
}

// connect starts a session that waits until the fleet admits it.
func (ft *fleetTest) connect(uid types.UID) {
	ft.work.Go(func() {
		if _, err := ft.wait(ft.ctx, uid); err == nil {
			ft.mu.Lock()
			defer ft.mu.Unlock()
			ft.passed = append(ft.passed, uid)
		}
	})
}

func (ft *fleetTest) admitted() []types.UID {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	return append([]types.UID{}, ft.passed...)
}

func (ft *fleetTest) retryCount() int {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	return ft.retries
}

func (ft *fleetTest) resumed() []types.UID {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	return append([]types.UID{}, ft.resumedUIDs...)
}

// openBreaker makes WhatsApp refuse as many sessions as open the breaker.
func (ft *fleetTest) openBreaker() {
	for i := range DefaultOutdatedSessions {
		ft.onEvent(types.UID(fmt.Sprint("early-", i)), session.Event{Type: session.EventOutdated})
	}
}

func TestTheBreakerClosesWithANewVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ft := newFleetTest(t)
		ft.Eventually(ft.page.requestCount).Should(Equal(1), "requested at the start")
		ft.connect("first")
		ft.Eventually(ft.admitted).Should(HaveLen(1), "no session waits for the answer")
		ft.answers(errors.New("the page cannot be reached"))

		ft.openBreaker()
		ft.Eventually(ft.page.requestCount).Should(Equal(2))
		for i := range 5 {
			ft.connect(types.UID(fmt.Sprint(i)))
		}
		ft.Consistently(ft.admitted, "50ms").Should(HaveLen(1), "held back")
		ft.answers(nil)
		ft.Eventually(ft.admitted).Should(HaveLen(2), "one session is the probe")
		ft.Eventually(ft.retryCount).Should(Equal(1), "the refused sessions wait to connect, too")
		ft.Consistently(ft.admitted, "50ms").Should(HaveLen(2))

		ft.fleet.onAttemptEnded(ft.admitted()[1])
		ft.Eventually(ft.admitted).Should(HaveLen(3), "the probe ended without a result: another session tries")
		ft.onEvent(ft.admitted()[2], session.Event{Type: session.EventConnected})
		ft.Eventually(ft.admitted).Should(HaveLen(6), "the probe is accepted")
		ft.Eventually(ft.retryCount).Should(Equal(2))
		ft.Expect(ft.page.requestCount()).To(Equal(2), "the version is requested once")
		ft.Expect(ft.HoldsBack()).To(BeFalse())
	})
}

func TestWhatsAppRefusesTheNewestVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ft := newFleetTest(t)
		ft.answers(nil)
		ft.openBreaker()
		ft.connect("a")
		ft.connect("b")
		ft.answers(nil)
		ft.Eventually(ft.admitted).Should(HaveLen(1))
		ft.onEvent(ft.admitted()[0], session.Event{Type: session.EventOutdated})
		ft.fleet.onAttemptEnded(ft.admitted()[0])
		ft.Consistently(ft.admitted, "50ms").Should(HaveLen(1), "the other sessions are held back")

		ft.passes(DefaultOutdatedPause)
		ft.answers(nil)
		ft.Eventually(ft.admitted).Should(HaveLen(2), "a probe after the pause")
		ft.onEvent(ft.admitted()[1], session.Event{Type: session.EventOutdated})
		ft.connect("c")
		ft.fleet.endPause()
		ft.answers(nil)
		ft.Eventually(ft.admitted).Should(HaveLen(3), "a probe at once when a person asks for it")
		ft.onEvent("c", session.Event{Type: session.EventQR})
		ft.Eventually(ft.HoldsBack).Should(BeFalse(), "WhatsApp sends codes only to a client that it accepts")
	})
}

// Refusals with long times between them never open the breaker.
func TestAFewRefusalsRefreshTheVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		outdated := session.Event{Type: session.EventOutdated}
		ft := newFleetTest(t)
		ft.answers(errors.New("the page cannot be reached"))
		ft.onEvent("a", outdated)
		ft.onEvent("a", outdated)
		ft.Consistently(ft.page.requestCount, "50ms").Should(Equal(1), "the last request was a moment ago")
		ft.passes(refreshInterval)
		ft.answers(errNotNewer)
		ft.Consistently(ft.retryCount, "50ms").Should(BeZero(), "the version is the same")
		ft.passes(refreshInterval)
		ft.Consistently(ft.page.requestCount, "50ms").Should(Equal(2), "the version has not changed, so the next request waits for the pause")
		ft.passes(DefaultOutdatedPause - refreshInterval)
		ft.answers(nil)
		ft.Eventually(ft.retryCount).Should(Equal(1), "the page names a newer version now")

		// The attempt began with the old version.
		ft.onEvent("b", outdated)
		ft.passes(refreshInterval)
		ft.answers(errNotNewer)
		ft.Eventually(ft.retryCount).Should(Equal(2))
		ft.Expect(ft.HoldsBack()).To(BeFalse())
	})
}

func TestTheVersionIsRequestedDaily(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ft := newFleetTest(t)
		ft.answers(errors.New("the page cannot be reached"))
		for requests := 1; requests < 4; requests++ {
			ft.Eventually(ft.page.requestCount).Should(Equal(requests))
			ft.passes(dailyInterval)
			ft.answers(errNotNewer)
		}
		ft.Expect(ft.retryCount()).To(BeZero(), "no session was refused")
	})
}

func TestTheBreakerHoldsASessionBackUntilItIsTheProbe(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.eventuallyDials(1)
	st.emit(session.Event{Type: session.EventOutdated, Reason: "ClientOutdated"})
	st.eventuallyPhase(v1alpha1.PhaseOutdated)
	fleet := st.s.Fleet
	fleet.change(func(b *versionBreaker) { b.onRefused("b", 2, noon) })
	st.Expect(fleet.HoldsBack()).To(BeTrue())
	st.s.post(func() { st.s.step(session.RetryOutdated{}) })
	st.Eventually(st.running).Should(Equal(session.OpDial))
	st.Consistently(st.dialCount, "50ms").Should(Equal(1), "held back")

	fleet.change((*versionBreaker).onRefreshed)
	st.eventuallyDials(2)
	st.emit(session.Event{Type: session.EventConnected, JID: jid, PhoneNumber: phone})
	st.eventuallyPhase(v1alpha1.PhaseConnected)
	st.Expect(fleet.HoldsBack()).To(BeFalse())
}

func TestAProbeThatCannotDialIsReplaced(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	fleet := st.s.Fleet
	st.connect()
	fleet.change(func(b *versionBreaker) { b.onRefused("b", 1, noon) })
	st.emit(session.Event{Type: session.EventDisconnected, Reason: "SocketClosed"})
	st.Eventually(func() string { st.clock.Step(time.Second); return string(st.running()) }).Should(Equal("dial"))
	st.Eventually(func() string { return st.message() }).Should(ContainSubstring("tries the newest version"))
	st.locked(func() { st.dialErr = errDown })
	fleet.change((*versionBreaker).onRefreshed)
	st.Eventually(func() bool { ok, _ := fleet.admits("other"); return ok }).Should(BeTrue())
	st.locked(func() { st.dialErr = nil })
}

func (st *supervisorTest) running() (op session.Operation) {
	done := make(chan struct{})
	st.s.post(func() { op = st.s.machine.Running(); close(done) })
	<-done
	return op
}

func (st *supervisorTest) message() string {
	for _, c := range st.status().Conditions {
		if c.Type == v1alpha1.ConditionReady {
			return c.Message
		}
	}
	return ""
}

// A session that waits for the breaker is released at once when it is moved.
func TestASessionThatIsHeldBackMovesAway(t *testing.T) {
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone})
	st.connect()
	st.s.Fleet.change(func(b *versionBreaker) { b.onRefused("b", 1, noon) })
	st.emit(session.Event{Type: session.EventDisconnected, Reason: "SocketClosed"})
	st.Eventually(func() session.Operation { st.clock.Step(time.Second); return st.running() }).Should(Equal(session.OpDial))
	st.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
	st.Eventually(st.s.finished).Should(BeClosed())
	st.Expect(st.status().HeldBy).To(BeEmpty())
}

// closedLimiter is a Limiter that grants no token until it is opened.
type closedLimiter struct {
	opened chan struct{}
	// waiting counts the logins that wait, and spent the granted tokens.
	waiting, spent atomic.Int32
}

func (limiter *closedLimiter) Free() int { return 0 }

func (limiter *closedLimiter) Wait(ctx context.Context, _ Login) error {
	limiter.waiting.Add(1)
	defer limiter.waiting.Add(-1)
	select {
	case <-limiter.opened:
		limiter.spent.Add(1)
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// The breaker opens while a session waits for its login token.
func TestASessionThatWaitsForATokenIsHeldBackToo(t *testing.T) {
	g := NewWithT(t)
	limiter := &closedLimiter{opened: make(chan struct{})}
	fleet := newFleet(Outdated{}, nil, clocktesting.NewFakeClock(noon), testr.New(t), func() int { return 1 }, func() int { return 1 }, func() {}, func(map[types.UID]bool) {})
	s := &supervisor{dependencies: dependencies{Limiter: limiter, Fleet: fleet}, uid: "a"}
	through := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { through <- s.waitForTurn(ctx, Login{}, false) }()
	g.Eventually(limiter.waiting.Load).Should(BeEquivalentTo(1))

	fleet.change(func(b *versionBreaker) { b.onRefused("b", 1, noon) })
	g.Eventually(limiter.waiting.Load).Should(BeZero(), "it no longer waits for a token")
	close(limiter.opened)
	g.Consistently(through, "50ms").ShouldNot(Receive())
	g.Expect(limiter.spent.Load()).To(BeZero(), "it used no token")

	fleet.change((*versionBreaker).onRefreshed)
	g.Eventually(through).Should(Receive(BeNil()))
	g.Expect(limiter.spent.Load()).To(BeEquivalentTo(1))
	fleet.change(func(b *versionBreaker) { b.onAccepted("a") })
	g.Expect(s.waitForTurn(ctx, Login{}, true)).To(Succeed())
	g.Expect(limiter.spent.Load()).To(BeEquivalentTo(1), "it had a token already")
}

// The spec may change while a dial waits for its turn.
func TestADialThatWaitsIsCancelled(t *testing.T) {
	waits := func(t *testing.T, obj *v1alpha1.WhatsAppSession, device account) (*supervisorTest, *fleet) {
		st := newSupervisorTest(t, obj, device)
		fleet := st.s.Fleet
		st.eventuallyDials(1)
		fleet.change(func(b *versionBreaker) { b.onRefused("b", 1, noon) })
		st.emit(session.Event{Type: session.EventDisconnected, Reason: "SocketClosed"})
		st.Eventually(func() session.Operation { st.clock.Step(time.Second); return st.running() }).Should(Equal(session.OpDial))
		return st, fleet
	}
	now := func(st *supervisorTest) (spec session.DialSpec, attempts int) {
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
		st.Expect(attempts).To(Equal(failures), "a cancelled dial is no failure")
		fleet.change((*versionBreaker).onRefreshed)
		st.eventuallyDials(2)
		st.locked(func() { st.Expect(st.pairPhones).To(Equal([]string{phone, "+34600111333"})) })
	})
	t.Run("the proxy is corrected", func(t *testing.T) {
		st, fleet := waits(t, newSession(), account{jid: jid, phone: phone})
		st.change(func(s *v1alpha1.WhatsAppSession) {
			s.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "out"}}
		})
		st.Eventually(func() string { spec, _ := now(st); return spec.ProxySecret }).Should(Equal("out"))
		fleet.change((*versionBreaker).onRefreshed)
		st.eventuallyDials(2)
	})
	t.Run("the time for pairing is over", func(t *testing.T) {
		st, fleet := waits(t, newSession(func(s *v1alpha1.WhatsAppSession) {
			s.Status.PairingDeadline = &metav1.Time{Time: noon.Add(10 * time.Minute)}
		}), account{})
		st.step(10 * time.Minute)
		st.eventuallyPhase(v1alpha1.PhasePairingExpired)
		st.Eventually(st.running).Should(Equal(session.OpNone))
		fleet.change((*versionBreaker).onRefreshed)
		st.Consistently(st.dialCount, "50ms").Should(Equal(1))
	})
	t.Run("an unpaired session is deleted", func(t *testing.T) {
		st, _ := waits(t, newSession(), account{})
		st.change(deleted)
		st.Eventually(func() string { return st.status().HeldBy }).Should(BeEmpty())
		st.Expect(st.calls()).To(ContainElement("forget"))
	})
}

func TestTheFirstStableSessionResumesTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ft := newFleetTest(t)
		ft.answers(nil)
		for i := range 3 {
			ft.Failed(types.UID(fmt.Sprint(i)), noon)
		}
		ft.fleet.forget("2") // logged out, or moved away
		ft.onEvent("0", session.Event{Type: session.EventConnected})
		ft.Recovered("0", noon)
		ft.Eventually(ft.resumed).Should(Equal([]types.UID{"1"}))
		ft.Recovered("1", noon)
		ft.Consistently(ft.resumed, "50ms").Should(HaveLen(1), "no session is left")
	})
}

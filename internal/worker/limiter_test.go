package worker

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	"k8s.io/utils/clock"
	clocktesting "k8s.io/utils/clock/testing"
)

// group is a number of waiters of one namespace, for stable or unstable sessions.
type group struct {
	namespace string
	unstable  bool
	n         int
}

func TestTokensAreSharedFairly(t *testing.T) {
	tests := []struct {
		name   string
		groups []group
		tokens int
		// granted is how many waiters of each group get a token.
		granted []int
	}{
		{name: "one namespace gets all tokens", groups: []group{{"a", false, 10}}, tokens: 8, granted: []int{8}},
		{name: "no waiters", tokens: 8},
		{name: "two namespaces take turns, however many waiters each has", groups: []group{{"a", false, 1000}, {"b", false, 10}}, tokens: 20, granted: []int{10, 10}},
		{name: "a namespace without further waiters leaves its turns to the others", groups: []group{{"a", false, 1000}, {"b", false, 3}, {"c", false, 10}}, tokens: 20, granted: []int{9, 3, 8}},
		{name: "unstable sessions get a quarter while stable ones wait", groups: []group{{"a", true, 1000}, {"b", false, 1000}}, tokens: 40, granted: []int{10, 30}},
		{name: "unstable sessions get a quarter also within a namespace", groups: []group{{"a", true, 1000}, {"a", false, 1000}}, tokens: 40, granted: []int{10, 30}},
		{name: "unstable sessions get all tokens when no stable one waits", groups: []group{{"a", true, 1000}}, tokens: 40, granted: []int{40}},
		{name: "unstable sessions of two namespaces take turns, too", groups: []group{{"a", true, 1000}, {"b", true, 2}, {"c", false, 1000}}, tokens: 40, granted: []int{8, 2, 30}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			b := newBucket(float64(tt.tokens), tt.tokens, noon)
			b.tokens = 0
			waiting := make([][]*waiter, len(tt.groups))
			for i, c := range tt.groups {
				for range c.n {
					waiting[i] = append(waiting[i], b.enqueue(c.namespace, c.unstable))
				}
			}
			b.grant(noon)
			for i := range waiting {
				g.Expect(served(waiting[i])).To(BeZero())
			}
			b.grant(noon.Add(time.Second))
			for i := range waiting {
				g.Expect(served(waiting[i])).To(Equal(tt.granted[i]), "%+v", tt.groups[i])
				for j := range tt.granted[i] {
					g.Expect(waiting[i][j].hasToken).To(BeTrue(), "in the order in which they came")
				}
			}
		})
	}
}

// served counts the waiters that have a token.
func served(waiting []*waiter) (n int) {
	for _, w := range waiting {
		if w.hasToken {
			n++
		}
	}
	return n
}

func TestABucketFillsAndOverflows(t *testing.T) {
	g := NewWithT(t)
	b := newBucket(10, 5, noon)
	for range 5 {
		b.enqueue("a", false)
	}
	b.grant(noon)
	g.Expect(b.tokens).To(BeZero())
	g.Expect(b.untilNextToken(noon)).To(BeNumerically("~", 100*time.Millisecond, time.Millisecond))
	g.Expect(b.full(noon.Add(400 * time.Millisecond))).To(BeFalse())
	g.Expect(b.full(noon.Add(time.Hour))).To(BeTrue())
	g.Expect(b.tokens).To(BeEquivalentTo(5), "not more than the burst")
	b.grant(noon)
	g.Expect(b.tokens).To(BeEquivalentTo(5), "a clock that goes back takes no tokens away")
}

// A thousand sessions of one tenant that fail and retry at once must leave the fair
// share of the tokens to the ten sessions of another tenant.
func TestAThousandFailingSessionsDoNotDelayTenOthers(t *testing.T) {
	for name, row := range map[string]struct {
		unstable bool
		// within is how many tokens may be granted until the ten are served.
		within int
	}{
		"failing for the first time": {within: 20},
		"known to fail":              {unstable: true, within: 14},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			b := newBucket(100, 1, noon)
			b.tokens = 0
			var failing []*waiter
			for range 1000 {
				failing = append(failing, b.enqueue("noisy", row.unstable))
			}
			now, granted := noon, 0
			step := func() {
				now = now.Add(10*time.Millisecond + time.Microsecond)
				b.grant(now)
				granted++
				for i, w := range failing { // the session fails and waits for its next token
					if w.hasToken {
						failing[i] = b.enqueue("noisy", row.unstable)
					}
				}
			}
			for range 500 {
				step()
			}
			granted = 0
			var ten []*waiter
			for range 10 {
				ten = append(ten, b.enqueue("quiet", false))
			}
			for served(ten) < len(ten) {
				step()
				g.Expect(granted).To(BeNumerically("<=", row.within))
			}
		})
	}
}

// newLimiter returns a limiter with a fake clock.
func newLimiter(t *testing.T, pace Pace) (*PerEgress, *clocktesting.FakeClock) {
	t.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	fake := clocktesting.NewFakeClock(noon)
	return NewPerEgress(pace, fake), fake
}

// logins starts logins, each in a goroutine that ends with the test, and counts how
// many of each namespace got a token.
type logins struct {
	ctx     context.Context
	p       *PerEgress
	work    sync.WaitGroup
	mu      sync.Mutex
	granted map[string]int
}

func newLogins(t *testing.T, p *PerEgress) *logins {
	ctx, cancel := context.WithCancel(context.Background())
	a := &logins{ctx: ctx, p: p, granted: map[string]int{}}
	t.Cleanup(func() { cancel(); a.work.Wait() })
	return a
}

func (a *logins) start(login Login) {
	a.work.Go(func() {
		if a.p.Wait(a.ctx, login) == nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.granted[login.Namespace]++
		}
	})
}

func (a *logins) count(namespace string) func() int {
	return func() int {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.granted[namespace]
	}
}

func (a *logins) waiting() int {
	a.p.mu.Lock()
	defer a.p.mu.Unlock()
	n := 0
	for _, e := range a.p.egresses {
		for _, l := range []*waitList{&e.logins.stable, &e.logins.unstable, &e.pairings.stable} {
			for _, w := range l.waiters {
				n += len(w)
			}
		}
	}
	return n
}

func TestWaitingForATurn(t *testing.T) {
	g := NewWithT(t)
	p, fake := newLimiter(t, Pace{LoginsPerSecond: 1, LoginBurst: 2, PairingsPerSecond: 1, PairingBurst: 1})
	g.Expect(p.Free()).To(Equal(2))
	a := newLogins(t, p)
	for range 4 {
		a.start(Login{Namespace: "a"})
	}
	g.Eventually(a.count("a")).Should(Equal(2))
	g.Eventually(a.waiting).Should(Equal(2))
	g.Expect(p.Free()).To(BeZero())
	a.start(Login{Namespace: "elsewhere", Egress: "a/proxy"})
	g.Eventually(a.count("elsewhere")).Should(Equal(1), "another egress has its own bucket")
	a.start(Login{Namespace: "new", Pairing: true})
	g.Eventually(a.count("new")).Should(Equal(1), "pairings have their own")

	a.start(Login{Namespace: "b"})
	g.Eventually(a.waiting).Should(Equal(3))
	for i, want := range []int{1, 2, 3} { // after each token another waiter becomes the timekeeper
		g.Eventually(fake.HasWaiters).Should(BeTrue())
		fake.Step(time.Second + time.Millisecond)
		g.Eventually(func() int { return a.count("a")() + a.count("b")() - 2 }).Should(Equal(want), "second %d", i)
	}
	g.Expect(a.count("b")()).To(Equal(1))
	g.Eventually(fake.HasWaiters).Should(BeFalse(), "without waiters there is no timer")
}

func TestAWaiterThatGivesUpUsesNoToken(t *testing.T) {
	g := NewWithT(t)
	p, fake := newLimiter(t, Pace{LoginsPerSecond: 1, LoginBurst: 1, PairingsPerSecond: 1, PairingBurst: 1})
	g.Expect(p.Wait(t.Context(), Login{})).To(Succeed())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Wait(ctx, Login{Namespace: "a"}) }() // the first waiter is the timekeeper
	a := newLogins(t, p)
	g.Eventually(a.waiting).Should(Equal(1))
	a.start(Login{Namespace: "b"})
	g.Eventually(a.waiting).Should(Equal(2))
	cancel()
	g.Eventually(ended).Should(Receive(MatchError(context.Canceled)))
	g.Expect(a.waiting()).To(Equal(1))
	g.Eventually(fake.HasWaiters).Should(BeTrue(), "the other waiter is the timekeeper now")
	fake.Step(time.Second + time.Millisecond)
	g.Eventually(a.count("b")).Should(Equal(1))

	g.Expect(p.Wait(ctx, Login{})).To(MatchError(context.Canceled))
	fake.Step(time.Hour)
	g.Expect(p.Free()).To(Equal(1), "a wait whose context has ended takes no token")

	b := newBucket(1, 1, noon)
	w := b.enqueue("a", false)
	b.grant(noon)
	b.withdraw(w)
	g.Expect(b.tokens).To(BeEquivalentTo(1), "a token that was granted in the same moment is given back")
}

// Many logins wait and give up at once, on the real clock: each token goes to one of them.
func TestTheLimiterUnderLoad(t *testing.T) {
	g := NewWithT(t)
	t.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	p := NewPerEgress(Pace{LoginsPerSecond: 5000, LoginBurst: 10, PairingsPerSecond: 1, PairingBurst: 1}, clock.RealClock{})
	a := newLogins(t, p)
	for i := range 400 {
		login := Login{Namespace: fmt.Sprint(i % 7), Unstable: i%3 == 0}
		if i%4 != 0 {
			a.start(login)
			continue
		}
		a.work.Go(func() {
			ctx, cancel := context.WithTimeout(a.ctx, time.Duration(i%20)*time.Millisecond)
			defer cancel()
			_ = p.Wait(ctx, login) // the token or the time-out
		})
	}
	g.Eventually(func() (n int) {
		for i := range 7 {
			n += a.count(fmt.Sprint(i))()
		}
		return n
	}).Should(Equal(300))
	g.Eventually(a.waiting).Should(BeZero())
}

func TestEgressesWithFullBucketsAreRemoved(t *testing.T) {
	g := NewWithT(t)
	p, fake := newLimiter(t, Pace{LoginsPerSecond: 1, LoginBurst: 1, PairingsPerSecond: 1, PairingBurst: 1})
	g.Expect(p.Wait(t.Context(), Login{Egress: "one"})).To(Succeed())
	g.Expect(p.Wait(t.Context(), Login{Egress: "two"})).To(Succeed())
	g.Expect(p.egresses).To(HaveLen(2), "the buckets of the first are not full yet")
	fake.Step(time.Minute)
	g.Expect(p.Wait(t.Context(), Login{Egress: "three"})).To(Succeed())
	g.Expect(p.egresses).To(HaveLen(1))
}

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

// crowd asks for tokens: so many of a namespace, proven or not.
type crowd struct {
	namespace string
	unproven  bool
	n         int
}

func TestTheDealingOfTokens(t *testing.T) {
	tests := []struct {
		name   string
		crowds []crowd
		tokens int
		// given is how many of each crowd have a token then.
		given []int
	}{
		{name: "one namespace gets all", crowds: []crowd{{"a", false, 10}}, tokens: 8, given: []int{8}},
		{name: "nobody waits: the tokens stay", tokens: 8},
		{name: "two namespaces take turns, whatever their numbers", crowds: []crowd{{"a", false, 1000}, {"b", false, 10}}, tokens: 20, given: []int{10, 10}},
		{name: "who is served leaves its turns to the others", crowds: []crowd{{"a", false, 1000}, {"b", false, 3}, {"c", false, 10}}, tokens: 20, given: []int{9, 3, 8}},
		{name: "the unproven get a quarter while proven wait", crowds: []crowd{{"a", true, 1000}, {"b", false, 1000}}, tokens: 40, given: []int{10, 30}},
		{name: "also within a namespace", crowds: []crowd{{"a", true, 1000}, {"a", false, 1000}}, tokens: 40, given: []int{10, 30}},
		{name: "and all when no proven one waits", crowds: []crowd{{"a", true, 1000}}, tokens: 40, given: []int{40}},
		{name: "the unproven take turns, too", crowds: []crowd{{"a", true, 1000}, {"b", true, 2}, {"c", false, 1000}}, tokens: 40, given: []int{8, 2, 30}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			d := newDealer(float64(tt.tokens), tt.tokens, noon)
			d.tokens = 0
			waiting := make([][]*waiter, len(tt.crowds))
			for i, c := range tt.crowds {
				for range c.n {
					waiting[i] = append(waiting[i], d.ask(c.namespace, c.unproven))
				}
			}
			d.deal(noon)
			for i := range waiting {
				g.Expect(served(waiting[i])).To(BeZero())
			}
			d.deal(noon.Add(time.Second))
			for i := range waiting {
				g.Expect(served(waiting[i])).To(Equal(tt.given[i]), "%+v", tt.crowds[i])
				for j := range tt.given[i] {
					g.Expect(waiting[i][j].has).To(BeTrue(), "who came first is served first")
				}
			}
		})
	}
}

func served(waiting []*waiter) (n int) {
	for _, w := range waiting {
		if w.has {
			n++
		}
	}
	return n
}

func TestABucketFillsAndOverflows(t *testing.T) {
	g := NewWithT(t)
	d := newDealer(10, 5, noon)
	for range 5 {
		d.ask("a", false)
	}
	d.deal(noon)
	g.Expect(d.tokens).To(BeZero())
	g.Expect(d.next(noon)).To(BeNumerically("~", 100*time.Millisecond, time.Millisecond))
	g.Expect(d.full(noon.Add(400 * time.Millisecond))).To(BeFalse())
	g.Expect(d.full(noon.Add(time.Hour))).To(BeTrue())
	g.Expect(d.tokens).To(BeEquivalentTo(5), "not more than the burst")
	d.deal(noon)
	g.Expect(d.tokens).To(BeEquivalentTo(5), "a clock that goes back takes nothing")
}

// One tenant's thousand sessions that fail and come back at once must not cost
// another's ten more than the share that everybody has.
func TestAThousandFailingSessionsDoNotDelayAnothersTen(t *testing.T) {
	for name, row := range map[string]struct {
		unproven bool
		// within is how many tokens may be dealt until the ten are served.
		within int
	}{
		"failing for the first time": {within: 20},
		"known to fail":              {unproven: true, within: 14},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			d := newDealer(100, 1, noon)
			d.tokens = 0
			var failing []*waiter
			for range 1000 {
				failing = append(failing, d.ask("noisy", row.unproven))
			}
			now, dealt := noon, 0
			step := func() {
				now = now.Add(10*time.Millisecond + time.Microsecond)
				d.deal(now)
				dealt++
				for i, w := range failing { // it fails and asks again
					if w.has {
						failing[i] = d.ask("noisy", row.unproven)
					}
				}
			}
			for range 500 {
				step()
			}
			dealt = 0
			var ten []*waiter
			for range 10 {
				ten = append(ten, d.ask("quiet", false))
			}
			for served(ten) < len(ten) {
				step()
				g.Expect(dealt).To(BeNumerically("<=", row.within))
			}
		})
	}
}

// limited is a limiter on a clock that stands still.
func limited(t *testing.T, pace Pace) (*PerEgress, *clocktesting.FakeClock) {
	t.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	fake := clocktesting.NewFakeClock(noon)
	return NewPerEgress(pace, fake), fake
}

// asks has logins wait, each in a goroutine that the test's end waits for.
type asks struct {
	ctx  context.Context
	p    *PerEgress
	work sync.WaitGroup
	mu   sync.Mutex
	done map[string]int
}

func askers(t *testing.T, p *PerEgress) *asks {
	ctx, cancel := context.WithCancel(context.Background())
	a := &asks{ctx: ctx, p: p, done: map[string]int{}}
	t.Cleanup(func() { cancel(); a.work.Wait() })
	return a
}

func (a *asks) wait(login Login) {
	a.work.Go(func() {
		if a.p.Wait(a.ctx, login) == nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.done[login.Namespace]++
		}
	})
}

func (a *asks) of(namespace string) func() int {
	return func() int {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.done[namespace]
	}
}

func (a *asks) waiting() int {
	a.p.mu.Lock()
	defer a.p.mu.Unlock()
	n := 0
	for _, e := range a.p.by {
		for _, l := range []*waitList{&e.logins.proven, &e.logins.unproven, &e.pairings.proven} {
			for _, w := range l.by {
				n += len(w)
			}
		}
	}
	return n
}

func TestWaitingForATurn(t *testing.T) {
	g := NewWithT(t)
	p, fake := limited(t, Pace{LoginsPerSecond: 1, LoginBurst: 2, PairingsPerSecond: 1, PairingBurst: 1})
	g.Expect(p.Free()).To(Equal(2))
	a := askers(t, p)
	for range 4 {
		a.wait(Login{Namespace: "a"})
	}
	g.Eventually(a.of("a")).Should(Equal(2))
	g.Eventually(a.waiting).Should(Equal(2))
	g.Expect(p.Free()).To(BeZero())
	a.wait(Login{Namespace: "elsewhere", Egress: "a/proxy"})
	g.Eventually(a.of("elsewhere")).Should(Equal(1), "another egress has its own bucket")
	a.wait(Login{Namespace: "new", Pairing: true})
	g.Eventually(a.of("new")).Should(Equal(1), "pairings have their own")

	a.wait(Login{Namespace: "b"})
	g.Eventually(a.waiting).Should(Equal(3))
	for i, want := range []int{1, 2, 3} { // those who wait pass the watch over the clock on
		g.Eventually(fake.HasWaiters).Should(BeTrue())
		fake.Step(time.Second + time.Millisecond)
		g.Eventually(func() int { return a.of("a")() + a.of("b")() - 2 }).Should(Equal(want), "second %d", i)
	}
	g.Expect(a.of("b")()).To(Equal(1))
	g.Eventually(fake.HasWaiters).Should(BeFalse(), "nobody watches the clock when nobody waits")
}

func TestWhoGivesUpCostsNothing(t *testing.T) {
	g := NewWithT(t)
	p, fake := limited(t, Pace{LoginsPerSecond: 1, LoginBurst: 1, PairingsPerSecond: 1, PairingBurst: 1})
	g.Expect(p.Wait(t.Context(), Login{})).To(Succeed())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Wait(ctx, Login{Namespace: "a"}) }() // the first watches the clock
	a := askers(t, p)
	g.Eventually(a.waiting).Should(Equal(1))
	a.wait(Login{Namespace: "b"})
	g.Eventually(a.waiting).Should(Equal(2))
	cancel()
	g.Eventually(ended).Should(Receive(MatchError(context.Canceled)))
	g.Expect(a.waiting()).To(Equal(1))
	g.Eventually(fake.HasWaiters).Should(BeTrue(), "the other watches now")
	fake.Step(time.Second + time.Millisecond)
	g.Eventually(a.of("b")).Should(Equal(1))

	g.Expect(p.Wait(ctx, Login{})).To(MatchError(context.Canceled))
	fake.Step(time.Hour)
	g.Expect(p.Free()).To(Equal(1), "a waiter that came too late took nothing")

	d := newDealer(1, 1, noon)
	w := d.ask("a", false)
	d.deal(noon)
	d.withdraw(w)
	g.Expect(d.tokens).To(BeEquivalentTo(1), "a token that came with the end is given back")
}

// Many come and go at once, on the real clock: each token goes to one of them.
func TestTheLimiterUnderLoad(t *testing.T) {
	g := NewWithT(t)
	t.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreCurrent()) })
	p := NewPerEgress(Pace{LoginsPerSecond: 5000, LoginBurst: 10, PairingsPerSecond: 1, PairingBurst: 1}, clock.RealClock{})
	a := askers(t, p)
	for i := range 400 {
		login := Login{Namespace: fmt.Sprint(i % 7), Unproven: i%3 == 0}
		if i%4 != 0 {
			a.wait(login)
			continue
		}
		a.work.Go(func() {
			ctx, cancel := context.WithTimeout(a.ctx, time.Duration(i%20)*time.Millisecond)
			defer cancel()
			_ = p.Wait(ctx, login) // whichever comes first
		})
	}
	g.Eventually(func() (n int) {
		for i := range 7 {
			n += a.of(fmt.Sprint(i))()
		}
		return n
	}).WithTimeout(10 * time.Second).Should(Equal(300))
	g.Eventually(a.waiting).WithTimeout(10 * time.Second).Should(BeZero())
}

func TestEgressesThatAreFullAreForgotten(t *testing.T) {
	g := NewWithT(t)
	p, fake := limited(t, Pace{LoginsPerSecond: 1, LoginBurst: 1, PairingsPerSecond: 1, PairingBurst: 1})
	g.Expect(p.Wait(t.Context(), Login{Egress: "one"})).To(Succeed())
	g.Expect(p.Wait(t.Context(), Login{Egress: "two"})).To(Succeed())
	g.Expect(p.by).To(HaveLen(2), "one is not full yet")
	fake.Step(time.Minute)
	g.Expect(p.Wait(t.Context(), Login{Egress: "three"})).To(Succeed())
	g.Expect(p.by).To(HaveLen(1))
}

package worker

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/utils/clock"
)

// Login is an attempt that waits for its turn.
type Login struct {
	// Egress names the proxy; empty: the worker's own address.
	Egress string
	// Namespace is whose session it is: turns go round by namespace.
	Namespace string
	// Pairing: a new device is to be linked; pairings have a pace of their own.
	Pairing bool
	// Unproven: the session has never stayed up, or has failed since it last did.
	Unproven bool
}

// Pace is how many attempts a second, and how many at once, one egress makes.
type Pace struct {
	LoginsPerSecond, PairingsPerSecond float64
	LoginBurst, PairingBurst           int
}

// PerEgress is a Limiter with a pair of token buckets for each egress, because
// WhatsApp sees addresses, not sessions. The tokens of a bucket are dealt fairly,
// see dealer. It has no goroutine: of those who wait for a bucket, one watches
// its clock for all.
type PerEgress struct {
	pace  Pace
	clock clock.Clock
	mu    sync.Mutex
	by    map[string]*egress
}

type egress struct{ logins, pairings *dealer }

// NewPerEgress returns a limiter of the given pace.
func NewPerEgress(pace Pace, clock clock.Clock) *PerEgress {
	return &PerEgress{pace: pace, clock: clock, by: map[string]*egress{}}
}

// Wait implements Limiter.
func (p *PerEgress) Wait(ctx context.Context, login Login) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("waiting for a login token: %w", err)
	}
	p.mu.Lock()
	d := p.dealer(login)
	w := d.ask(login.Namespace, login.Unproven)
	d.deal(p.clock.Now())
	watches := d.watch(w)
	p.mu.Unlock()

	err := p.await(ctx, d, w, watches)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		d.withdraw(w)
		err = fmt.Errorf("waiting for a login token: %w", err)
	}
	d.deal(p.clock.Now())
	d.passWatch(w)
	return err
}

// await returns when w has its token, or with ctx's error. While it watches the
// clock it deals to all.
func (p *PerEgress) await(ctx context.Context, d *dealer, w *waiter, watches bool) error {
	for !watches {
		select {
		case <-w.granted:
			return nil
		case <-w.watch:
			watches = true
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for {
		p.mu.Lock()
		now := p.clock.Now()
		d.deal(now)
		pause := d.next(now)
		p.mu.Unlock()
		timer := p.clock.NewTimer(pause)
		select {
		case <-w.granted:
			timer.Stop()
			return nil
		case <-timer.C():
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// Free implements Limiter.
func (p *PerEgress) Free() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.dealer(Login{})
	d.deal(p.clock.Now())
	return int(d.tokens)
}

// dealer finds the bucket that a login draws from. The caller holds p.mu.
func (p *PerEgress) dealer(login Login) *dealer {
	now := p.clock.Now()
	e, ok := p.by[login.Egress]
	if !ok {
		for other, e := range p.by { // a full bucket is as good as a new one
			if e.logins.full(now) && e.pairings.full(now) {
				delete(p.by, other)
			}
		}
		e = &egress{
			logins:   newDealer(p.pace.LoginsPerSecond, p.pace.LoginBurst, now),
			pairings: newDealer(p.pace.PairingsPerSecond, p.pace.PairingBurst, now),
		}
		p.by[login.Egress] = e
	}
	if login.Pairing {
		return e.pairings
	}
	return e.logins
}

// provenShare is how many tokens in a row the proven get while unproven wait as
// well, which leaves a quarter to the unproven (docs/architecture.md, "A session's life").
const provenShare = 3

// dealer is a token bucket and those who wait for it. It is pure: the time is
// given to it, and nothing in it blocks.
type dealer struct {
	perSecond, burst float64
	tokens           float64
	at               time.Time // what tokens were counted at
	proven, unproven waitList
	// streak counts the tokens that the proven got while unproven waited.
	streak int
	// watcher is the waiter that watches the clock; nil while nobody waits.
	watcher *waiter
}

func newDealer(perSecond float64, burst int, now time.Time) *dealer {
	return &dealer{perSecond: perSecond, burst: float64(burst), tokens: float64(burst), at: now}
}

// waiter is one who waits for a token.
type waiter struct {
	namespace string
	list      *waitList
	// granted is closed when the token is its own.
	granted chan struct{}
	// watch gets a value when it is to watch the clock.
	watch chan struct{}
	has   bool
}

// ask puts a new waiter into its list.
func (d *dealer) ask(namespace string, unproven bool) *waiter {
	w := &waiter{namespace: namespace, list: &d.proven, granted: make(chan struct{}), watch: make(chan struct{}, 1)}
	if unproven {
		w.list = &d.unproven
	}
	w.list.push(w)
	return w
}

// deal gives the tokens of now to those whose turn it is.
func (d *dealer) deal(now time.Time) {
	d.refill(now)
	for d.tokens >= 1 {
		w := d.turn()
		if w == nil {
			return
		}
		d.tokens--
		w.has = true
		close(w.granted)
	}
}

func (d *dealer) refill(now time.Time) {
	if passed := now.Sub(d.at).Seconds(); passed > 0 {
		d.tokens = min(d.tokens+passed*d.perSecond, d.burst)
		d.at = now
	}
}

// turn takes whose turn it is out of its list; nil: nobody waits.
func (d *dealer) turn() *waiter {
	switch {
	case d.unproven.empty():
		d.streak = 0
		return d.proven.pop()
	case d.proven.empty(), d.streak >= provenShare:
		d.streak = 0
		return d.unproven.pop()
	default:
		d.streak++
		return d.proven.pop()
	}
}

// next is how long it takes until there is a token again.
func (d *dealer) next(now time.Time) time.Duration {
	d.refill(now)
	missing := (1 - d.tokens) / d.perSecond * float64(time.Second)
	return max(time.Duration(missing), 0) + time.Microsecond // not a rounding error too early
}

// withdraw takes a waiter out, or its token back.
func (d *dealer) withdraw(w *waiter) {
	if w.has {
		w.has = false
		d.tokens = min(d.tokens+1, d.burst)
		return
	}
	w.list.remove(w)
}

// watch makes w the one who watches the clock, if nobody does and it must wait.
func (d *dealer) watch(w *waiter) bool {
	if w.has || d.watcher != nil {
		return false
	}
	d.watcher = w
	return true
}

// passWatch has another waiter watch the clock when w goes.
func (d *dealer) passWatch(w *waiter) {
	if d.watcher != w {
		return
	}
	if d.watcher = d.proven.first(); d.watcher == nil {
		d.watcher = d.unproven.first()
	}
	if d.watcher != nil {
		d.watcher.watch <- struct{}{}
	}
}

func (d *dealer) full(now time.Time) bool {
	d.refill(now)
	return d.tokens >= d.burst && d.proven.empty() && d.unproven.empty()
}

// waitList is a queue in which the namespaces take turns: of each the first waits
// for its turn, then the namespace goes to the end.
type waitList struct {
	turns []string
	by    map[string][]*waiter
}

func (l *waitList) empty() bool { return len(l.turns) == 0 }

func (l *waitList) push(w *waiter) {
	if l.by == nil {
		l.by = map[string][]*waiter{}
	}
	if len(l.by[w.namespace]) == 0 {
		l.turns = append(l.turns, w.namespace)
	}
	l.by[w.namespace] = append(l.by[w.namespace], w)
}

func (l *waitList) first() *waiter {
	if l.empty() {
		return nil
	}
	return l.by[l.turns[0]][0]
}

func (l *waitList) pop() *waiter {
	w := l.first()
	if w == nil {
		return nil
	}
	l.turns = l.turns[1:]
	if rest := l.by[w.namespace][1:]; len(rest) > 0 {
		l.by[w.namespace] = rest
		l.turns = append(l.turns, w.namespace)
	} else {
		delete(l.by, w.namespace)
	}
	return w
}

func (l *waitList) remove(w *waiter) {
	waiting := l.by[w.namespace]
	for i := range waiting {
		if waiting[i] == w {
			waiting = append(waiting[:i:i], waiting[i+1:]...)
			break
		}
	}
	if len(waiting) > 0 {
		l.by[w.namespace] = waiting
		return
	}
	delete(l.by, w.namespace)
	for i, namespace := range l.turns {
		if namespace == w.namespace {
			l.turns = append(l.turns[:i:i], l.turns[i+1:]...)
			return
		}
	}
}

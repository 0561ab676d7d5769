package worker

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/utils/clock"
)

// Login is an attempt that waits for a token.
type Login struct {
	// Egress is the name of the egress; empty: the worker's own address.
	Egress string
	// Namespace is the session's namespace: the namespaces take turns.
	Namespace string
	// Pairing: the attempt links a new device. Pairings have their own pace.
	Pairing bool
	// Unstable: the session has never been stable, or has failed since it last was.
	Unstable bool
}

// Pace is how many attempts each egress may make in a second, and how many at once.
type Pace struct {
	LoginsPerSecond, PairingsPerSecond float64
	LoginBurst, PairingBurst           int
}

// PerEgress is a Limiter with two token buckets for each egress, one for logins and
// one for pairings, because WhatsApp sees addresses, not sessions. It starts no
// goroutine: one of the waiters of a bucket, the timekeeper, grants the tokens to all.
type PerEgress struct {
	pace     Pace
	clock    clock.Clock
	mu       sync.Mutex
	egresses map[string]*egressBuckets
}

type egressBuckets struct{ logins, pairings *bucket }

// NewPerEgress returns a limiter with the given pace.
func NewPerEgress(pace Pace, clock clock.Clock) *PerEgress {
	return &PerEgress{pace: pace, clock: clock, egresses: map[string]*egressBuckets{}}
}

// Wait implements Limiter.
func (p *PerEgress) Wait(ctx context.Context, login Login) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("waiting for a login token: %w", err)
	}
	p.mu.Lock()
	b := p.bucket(login)
	w := b.enqueue(login.Namespace, login.Unstable)
	b.grant(p.clock.Now())
	isTimekeeper := b.becomeTimekeeper(w)
	p.mu.Unlock()

	err := p.await(ctx, b, w, isTimekeeper)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		b.withdraw(w)
		err = fmt.Errorf("waiting for a login token: %w", err)
	}
	b.grant(p.clock.Now())
	b.replaceTimekeeper(w)
	return err
}

// await returns when w has its token, or with ctx's error. While w is the
// timekeeper, it grants the tokens to all waiters of the bucket.
func (p *PerEgress) await(ctx context.Context, b *bucket, w *waiter, isTimekeeper bool) error {
	for !isTimekeeper {
		select {
		case <-w.granted:
			return nil
		case <-w.timekeeper:
			isTimekeeper = true
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for {
		p.mu.Lock()
		now := p.clock.Now()
		b.grant(now)
		pause := b.untilNextToken(now)
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
	b := p.bucket(Login{})
	b.grant(p.clock.Now())
	return int(b.tokens)
}

// bucket returns the bucket from which a login takes its token. The caller holds p.mu.
func (p *PerEgress) bucket(login Login) *bucket {
	now := p.clock.Now()
	e, ok := p.egresses[login.Egress]
	if !ok {
		for other, e := range p.egresses { // a full bucket is the same as a new one
			if e.logins.full(now) && e.pairings.full(now) {
				delete(p.egresses, other)
			}
		}
		e = &egressBuckets{
			logins:   newBucket(p.pace.LoginsPerSecond, p.pace.LoginBurst, now),
			pairings: newBucket(p.pace.PairingsPerSecond, p.pace.PairingBurst, now),
		}
		p.egresses[login.Egress] = e
	}
	if login.Pairing {
		return e.pairings
	}
	return e.logins
}

// stableShare is how many tokens in a row stable sessions get while unstable ones
// wait too, so that a quarter is left for the unstable ones (docs/architecture.md,
// "A session's life").
const stableShare = 3

// bucket is a token bucket and its waiters. It is pure: the time is an argument,
// and no method blocks.
type bucket struct {
	perSecond, burst float64
	tokens           float64
	refilledAt       time.Time
	stable, unstable waitList
	// streak counts the tokens in a row that stable sessions got while unstable ones waited.
	streak int
	// timekeeper is the waiter that grants the tokens to all; nil while nobody waits.
	timekeeper *waiter
}

func newBucket(perSecond float64, burst int, now time.Time) *bucket {
	return &bucket{perSecond: perSecond, burst: float64(burst), tokens: float64(burst), refilledAt: now}
}

// waiter is an attempt that waits for a token.
type waiter struct {
	namespace string
	list      *waitList
	// granted is closed when the waiter has got its token.
	granted chan struct{}
	// timekeeper gets a value when the waiter becomes the timekeeper.
	timekeeper chan struct{}
	hasToken   bool
}

// enqueue puts a new waiter into its list.
func (b *bucket) enqueue(namespace string, unstable bool) *waiter {
	w := &waiter{namespace: namespace, list: &b.stable, granted: make(chan struct{}), timekeeper: make(chan struct{}, 1)}
	if unstable {
		w.list = &b.unstable
	}
	w.list.push(w)
	return w
}

// grant gives the tokens that there are now to the next waiters.
func (b *bucket) grant(now time.Time) {
	b.refill(now)
	for b.tokens >= 1 {
		w := b.popNext()
		if w == nil {
			return
		}
		b.tokens--
		w.hasToken = true
		close(w.granted)
	}
}

func (b *bucket) refill(now time.Time) {
	if passed := now.Sub(b.refilledAt).Seconds(); passed > 0 {
		b.tokens = min(b.tokens+passed*b.perSecond, b.burst)
		b.refilledAt = now
	}
}

// popNext removes the next waiter from its list and returns it; nil: nobody waits.
func (b *bucket) popNext() *waiter {
	switch {
	case b.unstable.empty():
		b.streak = 0
		return b.stable.pop()
	case b.stable.empty(), b.streak >= stableShare:
		b.streak = 0
		return b.unstable.pop()
	default:
		b.streak++
		return b.stable.pop()
	}
}

// untilNextToken is how long it takes until the bucket has a token.
func (b *bucket) untilNextToken(now time.Time) time.Duration {
	b.refill(now)
	missing := (1 - b.tokens) / b.perSecond * float64(time.Second)
	return max(time.Duration(missing), 0) + time.Microsecond // so that a rounding error does not make it too short
}

// withdraw removes a waiter, or takes its token back.
func (b *bucket) withdraw(w *waiter) {
	if w.hasToken {
		w.hasToken = false
		b.tokens = min(b.tokens+1, b.burst)
		return
	}
	w.list.remove(w)
}

// becomeTimekeeper makes w the timekeeper if it must wait and there is none. It
// reports whether w is the timekeeper.
func (b *bucket) becomeTimekeeper(w *waiter) bool {
	if w.hasToken || b.timekeeper != nil {
		return false
	}
	b.timekeeper = w
	return true
}

// replaceTimekeeper makes another waiter the timekeeper if w was it and leaves.
func (b *bucket) replaceTimekeeper(w *waiter) {
	if b.timekeeper != w {
		return
	}
	if b.timekeeper = b.stable.first(); b.timekeeper == nil {
		b.timekeeper = b.unstable.first()
	}
	if b.timekeeper != nil {
		b.timekeeper.timekeeper <- struct{}{}
	}
}

func (b *bucket) full(now time.Time) bool {
	b.refill(now)
	return b.tokens >= b.burst && b.stable.empty() && b.unstable.empty()
}

// waitList is a queue in which the namespaces take turns: the first waiter of a
// namespace is served, then the namespace goes to the end.
type waitList struct {
	turns   []string
	waiters map[string][]*waiter
}

func (l *waitList) empty() bool { return len(l.turns) == 0 }

func (l *waitList) push(w *waiter) {
	if l.waiters == nil {
		l.waiters = map[string][]*waiter{}
	}
	if len(l.waiters[w.namespace]) == 0 {
		l.turns = append(l.turns, w.namespace)
	}
	l.waiters[w.namespace] = append(l.waiters[w.namespace], w)
}

func (l *waitList) first() *waiter {
	if l.empty() {
		return nil
	}
	return l.waiters[l.turns[0]][0]
}

func (l *waitList) pop() *waiter {
	w := l.first()
	if w == nil {
		return nil
	}
	l.turns = l.turns[1:]
	if rest := l.waiters[w.namespace][1:]; len(rest) > 0 {
		l.waiters[w.namespace] = rest
		l.turns = append(l.turns, w.namespace)
	} else {
		delete(l.waiters, w.namespace)
	}
	return w
}

func (l *waitList) remove(w *waiter) {
	waiting := l.waiters[w.namespace]
	for i := range waiting {
		if waiting[i] == w {
			waiting = append(waiting[:i:i], waiting[i+1:]...)
			break
		}
	}
	if len(waiting) > 0 {
		l.waiters[w.namespace] = waiting
		return
	}
	delete(l.waiters, w.namespace)
	for i, namespace := range l.turns {
		if namespace == w.namespace {
			l.turns = append(l.turns[:i:i], l.turns[i+1:]...)
			return
		}
	}
}

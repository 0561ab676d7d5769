package membership

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/utils/clock"
)

const (
	// FenceAfter is how long a worker may hold connections without a renewal of either
	// heartbeat. Whoever has declared it dead has seen no change for Silence, of a renewal
	// that was counted from its sending, so it had given up 5 s before (DESIGN section 3.6).
	FenceAfter = 10 * time.Second
	// guardInterval is how often the gap is looked at where nobody dials or writes.
	guardInterval = 500 * time.Millisecond
)

// ErrFenced says that this process may hold no connection any more.
var ErrFenced = errors.New("neither the API server nor Redis was reached for 10 s: this worker must take itself for declared dead")

// errNotJoined: no heartbeat has been renewed yet.
var errNotJoined = errors.New("the worker has not joined yet")

// started is the origin of Go's monotonic clock for this package.
var started = time.Now()

// Guard is a process's right to hold connections. It begins with the first
// renewal and ends for good with the first gap of more than FenceAfter between
// two, even if the next renewal succeeds: a process that was stopped wakes up
// believing. It may be used by many goroutines; Check costs a few nanoseconds.
type Guard struct {
	elapsed func() time.Duration
	// last is when the newest successful renewal was sent; -1: there was none.
	last     atomic.Int64
	lost     chan struct{}
	loseOnce sync.Once
}

// NewGuard returns a guard that reads the time from elapsed; see Elapsed.
func NewGuard(elapsed func() time.Duration) *Guard {
	g := &Guard{elapsed: elapsed, lost: make(chan struct{})}
	g.last.Store(-1)
	return g
}

// Sending is the time to hand to Renewed: it is taken before a renewal is sent.
func (g *Guard) Sending() time.Duration { return g.elapsed() }

// Renewed takes note of a renewal that was sent then and has succeeded.
func (g *Guard) Renewed(sent time.Duration) {
	for {
		last := g.last.Load()
		if last >= int64(sent) {
			return
		}
		if last >= 0 && sent-time.Duration(last) > FenceAfter {
			g.lose()
			return
		}
		if g.last.CompareAndSwap(last, int64(sent)) {
			return
		}
	}
}

// Check is nil while connections may be held. It is asked before every dial and
// every write to WhatsApp.
func (g *Guard) Check() error {
	select {
	case <-g.lost:
		return ErrFenced
	default:
	}
	last := g.last.Load()
	if last < 0 {
		return errNotJoined
	}
	if g.elapsed()-time.Duration(last) > FenceAfter {
		g.lose()
		return ErrFenced
	}
	return nil
}

// Lost is closed when the right has ended.
func (g *Guard) Lost() <-chan struct{} { return g.lost }

// Run looks at the gap until ctx ends, so that connections on which nobody
// writes end as well. It returns ErrFenced when the right has ended.
func (g *Guard) Run(ctx context.Context, ticks clock.WithTicker) error {
	ticker := ticks.NewTicker(guardInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-g.lost:
			return ErrFenced
		case <-ticker.C():
			_ = g.Check() // closes lost
		}
	}
}

func (g *Guard) lose() { g.loseOnce.Do(func() { close(g.lost) }) }

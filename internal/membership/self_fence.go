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
	// SelfFenceTimeout is how long a worker may hold connections without a renewal of either
	// heartbeat. An observer that declares it dead has seen no change for SilenceTimeout, and
	// a renewal counts from when it was sent, so the worker has ended its connections 5 s
	// before (docs/architecture.md, "Ownership").
	SelfFenceTimeout = 10 * time.Second
	// selfFenceInterval is how often the gap is checked while nothing is dialled or written.
	selfFenceInterval = 500 * time.Millisecond
)

// ErrFenced says that this process may not hold connections any more.
var ErrFenced = errors.New("neither the API server nor Redis was reached for 10 s: this worker must assume that it was declared dead")

// errNotJoined says that no heartbeat has been renewed yet.
var errNotJoined = errors.New("the worker has not joined yet")

// started is the origin of Go's monotonic clock for this package.
var started = time.Now()

// SelfFence decides whether this process may hold connections. The permission
// begins with the first renewal and ends for good with the first gap of more than
// SelfFenceTimeout between two renewals, even if the next renewal succeeds: a process
// that was stopped and continues does not know what happened in between. It may be used
// by many goroutines; Check takes a few nanoseconds.
type SelfFence struct {
	elapsed func() time.Duration
	// last is when the newest successful renewal was sent; -1: none has succeeded yet.
	last     atomic.Int64
	lost     chan struct{}
	loseOnce sync.Once
}

// NewSelfFence returns a self-fence that reads the time from elapsed; see Elapsed.
func NewSelfFence(elapsed func() time.Duration) *SelfFence {
	f := &SelfFence{elapsed: elapsed, lost: make(chan struct{})}
	f.last.Store(-1)
	return f
}

// Sending returns the time to pass to Renewed; call it before a renewal is sent.
func (f *SelfFence) Sending() time.Duration { return f.elapsed() }

// Renewed records a successful renewal that was sent at that time.
func (f *SelfFence) Renewed(sent time.Duration) {
	for {
		last := f.last.Load()
		if last >= int64(sent) {
			return
		}
		if last >= 0 && sent-time.Duration(last) > SelfFenceTimeout {
			f.lose()
			return
		}
		if f.last.CompareAndSwap(last, int64(sent)) {
			return
		}
	}
}

// Check returns nil while connections may be held. It is called before every dial and
// every write to WhatsApp.
func (f *SelfFence) Check() error {
	select {
	case <-f.lost:
		return ErrFenced
	default:
	}
	last := f.last.Load()
	if last < 0 {
		return errNotJoined
	}
	if f.elapsed()-time.Duration(last) > SelfFenceTimeout {
		f.lose()
		return ErrFenced
	}
	return nil
}

// Lost is closed when the permission has ended.
func (f *SelfFence) Lost() <-chan struct{} { return f.lost }

// Run checks the gap until ctx ends, so that idle connections, on which nothing is
// written, end too. It returns ErrFenced when the permission has ended.
func (f *SelfFence) Run(ctx context.Context, ticks clock.WithTicker) error {
	ticker := ticks.NewTicker(selfFenceInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.lost:
			return ErrFenced
		case <-ticker.C():
			_ = f.Check() // closes lost
		}
	}
}

func (f *SelfFence) lose() { f.loseOnce.Do(func() { close(f.lost) }) }

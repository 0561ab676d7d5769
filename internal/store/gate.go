package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const (
	// slowCall is how long a call may take before the gate probes the database.
	slowCall = 500 * time.Millisecond
	// probeTimeout is the time-out of a probe.
	probeTimeout = time.Second
	// probeInterval is how often a database that did not answer is probed again.
	probeInterval = time.Second
)

// ErrAway: the database did not answer the last probe, so no query was sent.
var ErrAway = errors.New("the database does not answer")

// Gate keeps the manager's reconcilers from waiting for a database that does not
// answer: a few dozen of them reconcile all sessions, and most of their work needs
// no database. When a call fails or is slow, the gate probes the database. If it does
// not answer, the calls in flight end, and later calls fail at once with ErrAway until
// it answers again. A single call that waits for a lock does not close the gate.
type Gate struct {
	// Ping checks whether the database answers and takes writes.
	Ping func(ctx context.Context) error
	Log  logr.Logger
	// OnChange is called when the gate opens (nil), and when it closes, with the reason. It may
	// be nil, and must not block.
	OnChange func(reason error)

	mu      sync.Mutex
	decided chan struct{} // closed when the gate has been opened or closed for the first time
	// period ends when the gate closes; nil: the gate is closed.
	period context.Context
	end    context.CancelCauseFunc
	reason error
	// probing is closed when the running probe has ended; nil: no probe is running.
	probing chan struct{}
}

// first returns the channel that the first decision closes. It is called with mu held.
func (g *Gate) first() chan struct{} {
	if g.decided == nil {
		g.decided = make(chan struct{})
	}
	return g.decided
}

// Open allows calls.
func (g *Gate) Open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.period != nil {
		return
	}
	if g.reason != nil {
		g.Log.Info("The database answers again")
	}
	g.period, g.end = context.WithCancelCause(context.Background())
	g.change(nil)
}

// Close ends the calls in flight and refuses later ones.
func (g *Gate) Close(reason error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.period == nil && g.reason != nil {
		return
	}
	g.reason = reason
	g.Log.Error(reason, "The database does not answer, what needs it waits")
	if g.period != nil {
		g.end(fmt.Errorf("%w: %w", ErrAway, reason))
		g.period, g.end = nil, nil
	}
	g.change(reason)
}

// change reports that the gate was opened (nil), or closed for a reason. It is called with mu
// held.
func (g *Gate) change(reason error) {
	select {
	case <-g.first():
	default:
		close(g.decided)
	}
	if g.OnChange != nil {
		g.OnChange(reason)
	}
}

// Do calls fn if the gate is open. It waits for the first decision.
func (g *Gate) Do(ctx context.Context, fn func(ctx context.Context) error) error {
	g.mu.Lock()
	decided := g.first()
	g.mu.Unlock()
	select {
	case <-decided:
	case <-ctx.Done():
		return fmt.Errorf("waiting for the store: %w", context.Cause(ctx))
	}
	g.mu.Lock()
	period, reason := g.period, g.reason
	g.mu.Unlock()
	if period == nil {
		return fmt.Errorf("%w: %w", ErrAway, reason)
	}

	bounded, cancel := within(ctx, QueryTimeout)
	defer cancel()
	bounded, abort := context.WithCancelCause(bounded)
	defer abort(nil)
	defer context.AfterFunc(period, func() { abort(context.Cause(period)) })()
	defer time.AfterFunc(slowCall, func() { g.probe(period) }).Stop()
	err := fn(bounded)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if cause := context.Cause(bounded); errors.Is(cause, ErrAway) {
		return fmt.Errorf("%w (%s)", cause, err.Error())
	}
	err = late(bounded, err) // before the probe: if the probe closes the gate, bounded ends too
	if !isAnswer(err) {
		<-g.probe(period)
	}
	return err
}

// isAnswer reports whether the database has answered, with a refusal.
func isAnswer(err error) bool {
	return errors.Is(err, ErrNoRecord) || errors.Is(err, ErrTaken) || errors.Is(err, delivery.ErrClaimLost) || errors.Is(err, delivery.ErrDeadLettersFull)
}

// probe checks whether the database answers, and closes the gate if it does not.
// The returned channel is closed when the probe has ended.
func (g *Gate) probe(period context.Context) <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.probing != nil {
		return g.probing
	}
	done := make(chan struct{})
	if g.period != period { // closed meanwhile
		close(done)
		return done
	}
	g.probing = done
	go func() {
		defer close(done)
		ctx, cancel := within(period, probeTimeout)
		defer cancel()
		err := g.Ping(ctx)
		g.mu.Lock()
		g.probing = nil
		g.mu.Unlock()
		if err != nil && period.Err() == nil {
			g.Close(late(ctx, err))
		}
	}()
	return done
}

// Run opens the gate again whenever the database answers, until ctx ends.
func (g *Gate) Run(ctx context.Context) {
	again := time.NewTicker(probeInterval)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
		g.mu.Lock()
		closed := g.period == nil
		g.mu.Unlock()
		if !closed {
			continue
		}
		probing, cancel := within(ctx, probeTimeout)
		if g.Ping(probing) == nil {
			g.Open()
		}
		cancel()
	}
}

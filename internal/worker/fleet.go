package worker

import (
	"context"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

// refreshPatience bounds one question for the web version.
const refreshPatience = 30 * time.Second

// Version is the client's version as all connections name it.
type Version interface {
	// RefreshVersion asks WhatsApp for the newest version, and reports whether it is newer
	// than before.
	RefreshVersion(ctx context.Context) (changed bool, err error)
}

// around is what a session's model asks of the other sessions of its worker.
type around interface {
	// failed takes note that a session has failed.
	failed(uid types.UID, now time.Time)
	// common reports whether most sessions fail at present.
	common(now time.Time) bool
}

// alone is a session without others.
type alone struct{}

func (alone) failed(types.UID, time.Time) {}
func (alone) common(time.Time) bool       { return false }

// fleet is what the sessions of a worker share: the breaker for an outdated
// client, and the knowledge of how the others fare.
type fleet struct {
	version Version // nil: it cannot be asked for
	clock   clock.Clock
	log     logr.Logger
	// sessions counts those of this worker.
	sessions func() int
	// retry has the sessions that WhatsApp refused try again.
	retry func()
	// due gets a value when run has something to do.
	due chan struct{}

	mu       sync.Mutex
	breaker  *breaker
	troubles troubles
	// changed is closed, and made anew, when a session that waits may have a chance.
	changed chan struct{}
}

func newFleet(settings Outdated, version Version, clock clock.Clock, log logr.Logger, sessions func() int, retry func()) *fleet {
	metrics.VersionBreaker(string(breakerClosed), breakerStates)
	return &fleet{
		version: version, clock: clock, log: log, sessions: sessions, retry: retry,
		due: make(chan struct{}, 1), breaker: newBreaker(settings), changed: make(chan struct{}),
	}
}

// run asks for the web version once at the start, and whenever the breaker wants
// it, until ctx ends.
func (f *fleet) run(ctx context.Context) {
	f.ask(ctx)
	timer := f.clock.NewTimer(time.Hour)
	defer timer.Stop()
	was := breakerClosed
	for {
		var state breakerState
		var until time.Time
		f.change(func(b *breaker) {
			b.tick(f.clock.Now())
			state, until = b.state, b.until
		})
		timer.Stop()
		switch {
		case state == breakerRefreshing:
			was = state
			f.ask(ctx)
			f.change((*breaker).refreshed)
			f.retry() // one of them gets in and tries, the others wait
			continue
		case state == breakerStale:
			timer.Reset(until.Sub(f.clock.Now()))
		case state == breakerClosed && was != breakerClosed:
			f.retry()
		}
		was = state
		select {
		case <-ctx.Done():
			return
		case <-f.due:
		case <-timer.C():
		}
	}
}

// ask asks for the newest version; without an answer the old one is kept.
func (f *fleet) ask(ctx context.Context) {
	if f.version == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, refreshPatience)
	defer cancel()
	switch changed, err := f.version.RefreshVersion(ctx); {
	case err != nil:
		f.log.Info("WhatsApp's newest version could not be asked for: the present one is kept", "reason", err.Error())
	case changed:
		f.log.Info("WhatsApp has a newer version, which all connections name from now on")
	}
}

// change lets the breaker do something, and tells everybody if it has changed.
func (f *fleet) change(do func(b *breaker)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	state, probe := f.breaker.state, f.breaker.probe
	do(f.breaker)
	if f.breaker.state == state && (f.breaker.probe == probe || f.breaker.probe != "") {
		return
	}
	close(f.changed)
	f.changed = make(chan struct{})
	if f.breaker.state == state {
		return
	}
	f.log.Info("The breaker for an outdated client has changed", "from", state, "to", f.breaker.state)
	metrics.VersionBreaker(string(f.breaker.state), breakerStates)
	select {
	case f.due <- struct{}{}:
	default:
	}
}

// admits reports whether a session may connect; while it may not, it is held
// back until the channel is closed.
func (f *fleet) admits(uid types.UID) (bool, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.breaker.admits(uid), f.changed
}

// wait returns when a session may connect, or with ctx's error. waited: it was held back.
func (f *fleet) wait(ctx context.Context, uid types.UID) (waited bool, err error) {
	for {
		ok, changed := f.admits(uid)
		if ok {
			return waited, nil
		}
		waited = true
		select {
		case <-changed:
		case <-ctx.Done():
			return waited, ctx.Err()
		}
	}
}

// holdsBack: sessions are held back at present.
func (f *fleet) holdsBack() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.breaker.state != breakerClosed
}

// heard takes note of what happened on a session's connection.
func (f *fleet) heard(uid types.UID, e whatsapp.Event) {
	switch e.Type {
	case whatsapp.EventOutdated:
		sessions := f.sessions()
		f.change(func(b *breaker) { b.outdated(uid, sessions, f.clock.Now()) })
	case whatsapp.EventConnected, whatsapp.EventQR, whatsapp.EventPairingCode: // codes come to clients that are accepted
		f.change(func(b *breaker) { b.through(uid) })
	}
}

// gone takes note that a session's connection, or its attempt, is over.
func (f *fleet) gone(uid types.UID) { f.change(func(b *breaker) { b.gone(uid) }) }

// again has the newest version tried at once: a person asks for it.
func (f *fleet) again() { f.change((*breaker).again) }

// failed implements around.
func (f *fleet) failed(uid types.UID, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.troubles.note(uid, now)
}

// common implements around.
func (f *fleet) common(now time.Time) bool {
	sessions := f.sessions()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.troubles.common(sessions, now)
}

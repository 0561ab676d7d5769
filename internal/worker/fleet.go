package worker

import (
	"context"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

const (
	// refreshTimeout bounds one question for the web version.
	refreshTimeout = 30 * time.Second
	// askInterval is how often the version is asked for at most because a session was refused.
	askInterval = time.Minute
	// changeCounts is how long after a change of the version a refusal may be the old
	// one's: the attempt was on its way, and the question had to wait.
	changeCounts = 2*time.Minute + askInterval
)

// Version is the client's version as all connections name it.
type Version interface {
	// RefreshVersion asks WhatsApp for the newest version, and reports whether it is newer
	// than before.
	RefreshVersion(ctx context.Context) (changed bool, err error)
}

// fleet is what the sessions of a worker share: the breaker for an outdated
// client, and which of them fail at present. It implements session.Fleet.
type fleet struct {
	version Version // nil: it cannot be asked for
	clock   clock.Clock
	log     logr.Logger
	// sessions counts those of this worker that have a supervisor, placed all of them.
	sessions, placed func() int
	// retry has the sessions that WhatsApp refused try again.
	retry func()
	// resume has those sessions try soon: what failed them all is over.
	resume func(sessions map[types.UID]bool)
	// due gets a value when run has something to do.
	due chan struct{}

	mu       sync.Mutex
	breaker  *versionBreaker
	failures session.FailureTracker
	trials   session.Trials
	// changed is closed, and made anew, when a session that waits may have a chance.
	changed chan struct{}
	// closed ends when the breaker, which is closed, opens.
	closed context.Context
	open   context.CancelFunc
	// askAt is when the version is to be asked for because a session was refused; zero:
	// none was since it last changed. askedAt and changedAt are when it was asked for, and
	// changed, last.
	askAt, askedAt, changedAt time.Time
	// shared are the sessions that are to try soon.
	shared map[types.UID]bool
}

func newFleet(settings Outdated, version Version, clock clock.Clock, log logr.Logger, sessions, placed func() int, retry func(), resume func(map[types.UID]bool)) *fleet {
	metrics.VersionBreaker(string(breakerClosed), breakerStates)
	f := &fleet{
		version: version, clock: clock, log: log, sessions: sessions, placed: placed, retry: retry, resume: resume,
		due: make(chan struct{}, 1), breaker: newVersionBreaker(settings), changed: make(chan struct{}),
	}
	f.closed, f.open = context.WithCancel(context.Background())
	return f
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
		var until, askAt time.Time
		var shared map[types.UID]bool
		now := f.clock.Now()
		f.change(func(b *versionBreaker) {
			b.tick(now)
			state, until, askAt = b.state, b.until, f.askAt
			shared, f.shared = f.shared, nil
		})
		if shared != nil {
			f.resume(shared)
		}
		timer.Stop()
		switch {
		case state == breakerClosed && was == breakerClosed && !askAt.IsZero() && !now.Before(askAt):
			if f.ask(ctx) {
				f.retry()
			}
			continue
		case state == breakerRefreshing:
			was = state
			f.ask(ctx)
			f.change((*versionBreaker).refreshed)
			f.retry() // one of them gets in and tries, the others wait
			continue
		case state == breakerStale:
			timer.Reset(until.Sub(f.clock.Now()))
		case state == breakerClosed && was != breakerClosed:
			f.retry()
			was = state
			continue
		case state == breakerClosed && !askAt.IsZero():
			timer.Reset(askAt.Sub(now))
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

// ask asks for the newest version; without an answer the old one is kept. It
// reports whether a session that was refused before may get through now.
func (f *fleet) ask(ctx context.Context) (newer bool) {
	if f.version == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	changed, err := f.version.RefreshVersion(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.clock.Now()
	newer = changed || !f.changedAt.IsZero() && now.Sub(f.changedAt) <= changeCounts
	f.askedAt = now
	switch {
	case changed:
		f.changedAt, f.askAt = now, time.Time{}
	case f.askAt.IsZero():
	case newer:
		f.askAt = time.Time{}
	case err != nil:
		f.askAt = now.Add(askInterval)
	default:
		f.askAt = now.Add(f.breaker.settings.Pause)
	}
	switch {
	case err != nil:
		f.log.Info("Failed to ask for WhatsApp's newest version; the present one is kept", "reason", err.Error())
	case changed:
		f.log.Info("Found a newer version of WhatsApp Web, which all connections name from now on")
	}
	return newer
}

// refused has the version asked for because a session was refused, soon, but not
// again and again. The caller holds f.mu.
func (f *fleet) refused(now time.Time) {
	at := now
	if soonest := f.askedAt.Add(askInterval); !f.askedAt.IsZero() && soonest.After(at) {
		at = soonest
	}
	if f.version == nil || !f.askAt.IsZero() && !at.Before(f.askAt) {
		return
	}
	f.askAt = at
	f.wake()
}

// wake has run look at what is to be done.
func (f *fleet) wake() {
	select {
	case f.due <- struct{}{}:
	default:
	}
}

// change changes the breaker, and wakes all sessions that wait if its state is another.
func (f *fleet) change(do func(b *versionBreaker)) {
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
	f.log.Info("Changed the state of the breaker for an outdated client", "from", state, "to", f.breaker.state)
	metrics.VersionBreaker(string(f.breaker.state), breakerStates)
	switch breakerClosed {
	case state:
		f.open()
	case f.breaker.state:
		f.closed, f.open = context.WithCancel(context.Background())
	}
	f.wake()
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

// whileAdmitted returns a context that ends with ctx, and earlier when the
// breaker opens for a session that it admits because it is closed.
func (f *fleet) whileAdmitted(ctx context.Context, uid types.UID) (context.Context, context.CancelFunc) {
	f.mu.Lock()
	closed := f.closed
	probes := f.breaker.state != breakerClosed && f.breaker.admits(uid)
	f.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	if probes {
		return ctx, cancel
	}
	stop := context.AfterFunc(closed, cancel)
	return ctx, func() { stop(); cancel() }
}

// HoldsBack implements session.Fleet.
func (f *fleet) HoldsBack() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.breaker.state != breakerClosed
}

// onEvent takes note of what happened on a session's connection.
func (f *fleet) onEvent(uid types.UID, e session.Event) {
	switch e.Type {
	case session.EventOutdated:
		sessions := f.sessions()
		f.change(func(b *versionBreaker) {
			now := f.clock.Now()
			b.outdated(uid, sessions, now)
			f.refused(now)
			f.failures.Forget(uid)
		})
	case session.EventConnected, session.EventQR, session.EventPairingCode: // codes come to clients that are accepted
		f.change(func(b *versionBreaker) {
			b.through(uid)
			if e.Type == session.EventConnected {
				f.failures.Connected(uid)
			}
		})
	case session.EventLoggedOut, session.EventReplaced, session.EventBanned: // it has an end of its own, and rests
		f.left(uid)
	}
}

// gone takes note that a session's connection, or its attempt, is over.
func (f *fleet) gone(uid types.UID) {
	f.change(func(b *versionBreaker) {
		b.gone(uid)
		f.failures.Ended(uid, f.clock.Now())
	})
}

// left takes note that a session has left, or rests: it does not count any more.
func (f *fleet) left(uid types.UID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures.Forget(uid)
}

// again has the newest version tried at once, because a person asks for it.
func (f *fleet) again() { f.change((*versionBreaker).again) }

// Failed implements session.Fleet.
func (f *fleet) Failed(uid types.UID, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures.Failed(uid, now)
}

// Recovered implements session.Fleet. The first session that is stable again
// after most had failed brings the others forward.
func (f *fleet) Recovered(uid types.UID, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failures.Common(now) {
		if f.shared == nil {
			f.shared = map[types.UID]bool{}
		}
		for _, other := range f.failures.Failing() {
			if other != uid {
				f.shared[other] = true
			}
		}
		f.wake()
	}
	f.failures.Recovered(uid)
}

// Common implements session.Fleet.
func (f *fleet) Common(now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failures.Common(now)
}

// Sessions implements session.Fleet.
func (f *fleet) Sessions() int { return f.placed() }

// Trial implements session.Fleet.
func (f *fleet) Trial(uid types.UID, size int32, lasts time.Duration, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trials.Begin(uid, size, lasts, now)
}

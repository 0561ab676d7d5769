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
	// dailyInterval is how often the newest version is requested although no session was
	// refused: WhatsApp refuses old ones in the end.
	dailyInterval = 24 * time.Hour
	// refreshTimeout bounds one request for the newest version.
	refreshTimeout = 30 * time.Second
	// refreshInterval is the shortest time between two requests for the newest version
	// because a session was refused.
	refreshInterval = time.Minute
	// oldVersionTimeout is how long after a change of the version a refusal may concern the
	// old version: the attempt may have begun before the change, and the request after the
	// refusal may have had to wait for refreshInterval.
	oldVersionTimeout = 2*time.Minute + refreshInterval
)

// Version is the version of the client that all connections send to WhatsApp.
type Version interface {
	// RefreshVersion asks WhatsApp for the newest version, and reports whether it has
	// changed.
	RefreshVersion(ctx context.Context) (changed bool, err error)
}

// fleet is what the sessions of a worker share: the breaker for an outdated
// client, and the record of which sessions fail at present. It implements
// session.Fleet.
type fleet struct {
	version Version // nil: the newest version cannot be requested
	clock   clock.Clock
	log     logr.Logger
	// sessions counts the sessions of this worker that have a supervisor, and placed all
	// sessions that are placed on it.
	sessions, placed func() int
	// retry makes the sessions whose client WhatsApp refused try again.
	retry func()
	// resume makes these sessions try soon, because their common failure is over.
	resume func(sessions map[types.UID]bool)
	// due gets a value when run has something to do.
	due chan struct{}

	mu       sync.Mutex
	breaker  *versionBreaker
	failures session.FailureTracker
	trials   session.Trials
	// changed is closed and replaced when the sessions that wait should ask again whether
	// they may connect.
	changed chan struct{}
	// closedCtx is cancelled by cancelClosed when the breaker opens.
	closedCtx    context.Context
	cancelClosed context.CancelFunc
	// refreshAt is when to request the newest version because a session was refused; zero:
	// no session was refused since the version last changed. refreshedAt is when it was last
	// requested, and changedAt when it last changed.
	refreshAt, refreshedAt, changedAt time.Time
	// toResume are the sessions that should try soon.
	toResume map[types.UID]bool
}

func newFleet(settings Outdated, version Version, clock clock.Clock, log logr.Logger, sessions, placed func() int, retry func(), resume func(map[types.UID]bool)) *fleet {
	metrics.SetVersionBreaker(string(breakerClosed), breakerStates)
	f := &fleet{
		version: version, clock: clock, log: log, sessions: sessions, placed: placed, retry: retry, resume: resume,
		due: make(chan struct{}, 1), breaker: newVersionBreaker(settings), changed: make(chan struct{}),
	}
	f.closedCtx, f.cancelClosed = context.WithCancel(context.Background())
	return f
}

// run requests the newest version at the start and once a day, and whenever the breaker
// needs it, until ctx ends.
func (f *fleet) run(ctx context.Context) {
	f.refreshVersion(ctx)
	timer := f.clock.NewTimer(time.Hour)
	defer timer.Stop()
	was := breakerClosed
	for {
		var state breakerState
		var pauseEnd, refreshAt time.Time
		var toResume map[types.UID]bool
		now := f.clock.Now()
		f.change(func(b *versionBreaker) {
			b.tick(now)
			state, pauseEnd, refreshAt = b.state, b.pauseEnd, f.refreshAt
			if daily := f.refreshedAt.Add(dailyInterval); f.version != nil && (refreshAt.IsZero() || daily.Before(refreshAt)) {
				refreshAt = daily
			}
			toResume, f.toResume = f.toResume, nil
		})
		if toResume != nil {
			f.resume(toResume)
		}
		timer.Stop()
		switch {
		case state == breakerClosed && was == breakerClosed && !refreshAt.IsZero() && !now.Before(refreshAt):
			if f.refreshVersion(ctx) {
				f.retry()
			}
			continue
		case state == breakerRefreshing:
			was = state
			f.refreshVersion(ctx)
			f.change((*versionBreaker).onRefreshed)
			f.retry() // one of the sessions becomes the probe, the others wait
			continue
		case state == breakerStale:
			timer.Reset(pauseEnd.Sub(f.clock.Now()))
		case state == breakerClosed && was != breakerClosed:
			f.retry()
			was = state
			continue
		case state == breakerClosed && !refreshAt.IsZero():
			timer.Reset(refreshAt.Sub(f.clock.Now()))
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

// refreshVersion requests the newest version; without an answer the old one is kept.
// It reports whether WhatsApp may now accept a session that it refused before.
func (f *fleet) refreshVersion(ctx context.Context) (newer bool) {
	if f.version == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	changed, err := f.version.RefreshVersion(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.clock.Now()
	newer = changed || !f.changedAt.IsZero() && now.Sub(f.changedAt) <= oldVersionTimeout
	f.refreshedAt = now
	switch {
	case changed:
		f.changedAt, f.refreshAt = now, time.Time{}
	case f.refreshAt.IsZero():
	case newer:
		f.refreshAt = time.Time{}
	case err != nil:
		f.refreshAt = now.Add(refreshInterval)
	default:
		f.refreshAt = now.Add(f.breaker.settings.Pause)
	}
	switch {
	case err != nil:
		f.log.Info("Failed to ask for WhatsApp's newest version; keeping the present one", "reason", err.Error())
	case changed:
		f.log.Info("Found a newer version of WhatsApp Web; all new connections use it")
	}
	return newer
}

// scheduleRefresh makes run request the newest version soon, because a session was
// refused, but at most once in each refreshInterval. The caller holds f.mu.
func (f *fleet) scheduleRefresh(now time.Time) {
	at := now
	if soonest := f.refreshedAt.Add(refreshInterval); !f.refreshedAt.IsZero() && soonest.After(at) {
		at = soonest
	}
	if f.version == nil || !f.refreshAt.IsZero() && !at.Before(f.refreshAt) {
		return
	}
	f.refreshAt = at
	f.wake()
}

// wake makes run check what there is to do.
func (f *fleet) wake() {
	select {
	case f.due <- struct{}{}:
	default:
	}
}

// change calls do with the breaker. If its state changes, it wakes all sessions that wait.
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
	metrics.SetVersionBreaker(string(f.breaker.state), breakerStates)
	switch breakerClosed {
	case state:
		f.cancelClosed()
	case f.breaker.state:
		f.closedCtx, f.cancelClosed = context.WithCancel(context.Background())
	}
	f.wake()
}

// admits reports whether a session may connect. If not, it should ask again when
// the channel is closed.
func (f *fleet) admits(uid types.UID) (bool, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.breaker.admits(uid), f.changed
}

// wait returns when a session may connect, or with ctx's error. waited reports
// whether the session was held back.
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

// whileAdmitted returns a context that ends with ctx, and earlier when the breaker
// opens, unless the session is the probe.
func (f *fleet) whileAdmitted(ctx context.Context, uid types.UID) (context.Context, context.CancelFunc) {
	f.mu.Lock()
	closed := f.closedCtx
	isProbe := f.breaker.state != breakerClosed && f.breaker.admits(uid)
	f.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	if isProbe {
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

// onEvent records an event of a session's connection.
func (f *fleet) onEvent(uid types.UID, e session.Event) {
	switch e.Type {
	case session.EventOutdated:
		sessions := f.sessions()
		f.change(func(b *versionBreaker) {
			now := f.clock.Now()
			b.onRefused(uid, sessions, now)
			f.scheduleRefresh(now)
			f.failures.Forget(uid)
		})
	case session.EventConnected, session.EventQR, session.EventPairingCode: // WhatsApp sends codes only to a client that it accepts
		f.change(func(b *versionBreaker) {
			b.onAccepted(uid)
			if e.Type == session.EventConnected {
				f.failures.Connected(uid)
			}
		})
	case session.EventLoggedOut, session.EventReplaced, session.EventBanned: // the session rests, for a reason that other sessions do not share
		f.forget(uid)
	}
}

// onAttemptEnded records that a session's connection, or its attempt to connect, has
// ended.
func (f *fleet) onAttemptEnded(uid types.UID) {
	f.change(func(b *versionBreaker) {
		b.onAttemptEnded(uid)
		f.failures.Ended(uid, f.clock.Now())
	})
}

// forget removes a session that has left this worker, or rests, from the record of
// failures.
func (f *fleet) forget(uid types.UID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures.Forget(uid)
}

// endPause makes a session try the newest version at once, because a person asked
// for an attempt.
func (f *fleet) endPause() { f.change((*versionBreaker).endPause) }

// Failed implements session.Fleet.
func (f *fleet) Failed(uid types.UID, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures.Failed(uid, now)
}

// Recovered implements session.Fleet. After most sessions had failed, the first one
// that is stable again makes the others try soon.
func (f *fleet) Recovered(uid types.UID, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failures.Common(now) {
		if f.toResume == nil {
			f.toResume = map[types.UID]bool{}
		}
		for _, other := range f.failures.Failing() {
			if other != uid {
				f.toResume[other] = true
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

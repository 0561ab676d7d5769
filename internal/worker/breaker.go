package worker

import (
	"cmp"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// Outdated configures the breaker for an outdated client: when WhatsApp's refusals
// of this version of the client concern all sessions of the worker.
type Outdated struct {
	// Sessions is how many sessions must be refused within the time Within. On a worker
	// with fewer sessions, all of them must be.
	Sessions int
	Within   time.Duration
	// Pause is how long all sessions are held back after the newest version was refused as well.
	Pause time.Duration
}

// The defaults of Outdated.
const (
	DefaultOutdatedSessions = 3
	DefaultOutdatedWithin   = time.Minute
	DefaultOutdatedPause    = time.Hour
)

func (o Outdated) orDefault() Outdated {
	return Outdated{
		Sessions: cmp.Or(o.Sessions, DefaultOutdatedSessions),
		Within:   cmp.Or(o.Within, DefaultOutdatedWithin),
		Pause:    cmp.Or(o.Pause, DefaultOutdatedPause),
	}
}

// breakerState is what the breaker does with sessions that want to connect.
type breakerState string

const (
	breakerClosed     breakerState = "closed"     // all may connect
	breakerRefreshing breakerState = "refreshing" // none may; the newest version is being requested
	breakerProbing    breakerState = "probing"    // one session, the probe, may connect
	breakerStale      breakerState = "stale"      // the probe was refused: none may until the pause ends
)

// breakerStates are all states, for the metric.
var breakerStates = []string{string(breakerClosed), string(breakerRefreshing), string(breakerProbing), string(breakerStale)}

// versionBreaker holds all sessions of a worker back when WhatsApp refuses the
// client's version: one refused login says enough, and a thousand look like an
// attack. It is pure; fleet carries out what it decides.
type versionBreaker struct {
	settings Outdated
	state    breakerState
	// refused has the sessions that were refused recently, and when.
	refused map[types.UID]time.Time
	// probe is the session that may connect; empty: none was chosen yet.
	probe types.UID
	// pauseEnd is when breakerStale ends.
	pauseEnd time.Time
}

func newVersionBreaker(settings Outdated) *versionBreaker {
	return &versionBreaker{settings: settings.orDefault(), state: breakerClosed, refused: map[types.UID]time.Time{}}
}

// onRefused records that WhatsApp refused the client of a session. sessions is how
// many sessions the worker has.
func (b *versionBreaker) onRefused(uid types.UID, sessions int, now time.Time) {
	switch {
	case b.state == breakerProbing && uid == b.probe:
		b.state, b.probe, b.pauseEnd = breakerStale, "", now.Add(b.settings.Pause)
	case b.state == breakerClosed:
		b.refused[uid] = now
		for other, when := range b.refused {
			if now.Sub(when) > b.settings.Within {
				delete(b.refused, other)
			}
		}
		if len(b.refused) >= min(b.settings.Sessions, max(sessions, 1)) {
			b.refresh()
		}
	default: // an attempt that began before the breaker opened
	}
}

func (b *versionBreaker) refresh() {
	clear(b.refused)
	b.state, b.probe, b.pauseEnd = breakerRefreshing, "", time.Time{}
}

// onRefreshed records that the newest version is known, or that the request failed.
func (b *versionBreaker) onRefreshed() {
	if b.state == breakerRefreshing {
		b.state = breakerProbing
	}
}

// admits reports whether a session may connect. While probing, the first session
// that asks becomes the probe.
func (b *versionBreaker) admits(uid types.UID) bool {
	if b.state == breakerProbing && b.probe == "" {
		b.probe = uid
	}
	return b.state == breakerClosed || b.state == breakerProbing && b.probe == uid
}

// onAccepted records that WhatsApp has accepted the client of a session.
func (b *versionBreaker) onAccepted(uid types.UID) {
	if b.state == breakerProbing && b.probe == uid {
		b.state, b.probe = breakerClosed, ""
	}
}

// onAttemptEnded records that the attempt of a session has ended. If the probe ends
// without a result, another session may become the probe.
func (b *versionBreaker) onAttemptEnded(uid types.UID) {
	if b.probe == uid {
		b.probe = ""
	}
}

// tick ends the pause when its time has come.
func (b *versionBreaker) tick(now time.Time) {
	if b.state == breakerStale && !now.Before(b.pauseEnd) {
		b.refresh()
	}
}

// endPause ends the pause at once, because a person asked for an attempt.
func (b *versionBreaker) endPause() {
	if b.state == breakerStale {
		b.refresh()
	}
}

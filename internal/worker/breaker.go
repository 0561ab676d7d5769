package worker

import (
	"cmp"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// Outdated says when WhatsApp's refusal of this version of the client is taken
// for one that concerns all sessions of the worker.
type Outdated struct {
	// Sessions is how many sessions must be refused Within that time; a worker with
	// fewer sessions needs fewer.
	Sessions int
	Within   time.Duration
	// Pause is how long all are held back after the newest version was refused as well.
	Pause time.Duration
}

// The fleet breaker where nothing else is configured.
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

// breakerState is what the breaker does with those who want to connect.
type breakerState string

const (
	breakerClosed     breakerState = "closed"     // all may connect
	breakerRefreshing breakerState = "refreshing" // the web version is being asked for
	breakerProbing    breakerState = "probing"    // one session may try
	breakerStale      breakerState = "stale"      // it was refused: a pause
)

// breakerStates are all of them, for the metric.
var breakerStates = []string{string(breakerClosed), string(breakerRefreshing), string(breakerProbing), string(breakerStale)}

// versionBreaker holds all sessions of a worker back when WhatsApp refuses the client's
// version: asking once is enough, and a thousand refused logins look like an
// attack. It is pure: fleet acts upon it.
type versionBreaker struct {
	settings Outdated
	state    breakerState
	// refused are the sessions that were refused lately, and when.
	refused map[types.UID]time.Time
	// probe is the session that tries; empty: nobody has begun.
	probe types.UID
	// until is the end of the pause.
	until time.Time
}

func newVersionBreaker(settings Outdated) *versionBreaker {
	return &versionBreaker{settings: settings.orDefault(), state: breakerClosed, refused: map[types.UID]time.Time{}}
}

// outdated takes note that a session was refused, on a worker with so many.
func (b *versionBreaker) outdated(uid types.UID, sessions int, now time.Time) {
	switch {
	case b.state == breakerProbing && uid == b.probe:
		b.state, b.probe, b.until = breakerStale, "", now.Add(b.settings.Pause)
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
	default: // it was on its way when the others were refused
	}
}

func (b *versionBreaker) refresh() {
	clear(b.refused)
	b.state, b.probe, b.until = breakerRefreshing, "", time.Time{}
}

// refreshed takes note that the newest version is known, or cannot be had.
func (b *versionBreaker) refreshed() {
	if b.state == breakerRefreshing {
		b.state = breakerProbing
	}
}

// admits reports whether a session may connect. The first that asks for it is the probe.
func (b *versionBreaker) admits(uid types.UID) bool {
	if b.state == breakerProbing && b.probe == "" {
		b.probe = uid
	}
	return b.state == breakerClosed || b.state == breakerProbing && b.probe == uid
}

// through takes note that WhatsApp has accepted a session's client.
func (b *versionBreaker) through(uid types.UID) {
	if b.state == breakerProbing && b.probe == uid {
		b.state, b.probe = breakerClosed, ""
	}
}

// gone takes note that a session's attempt is over: a probe without a result
// makes room for another.
func (b *versionBreaker) gone(uid types.UID) {
	if b.probe == uid {
		b.probe = ""
	}
}

// tick ends the pause.
func (b *versionBreaker) tick(now time.Time) {
	if b.state == breakerStale && !now.Before(b.until) {
		b.refresh()
	}
}

// again ends the pause at once: a person asks for it.
func (b *versionBreaker) again() {
	if b.state == breakerStale {
		b.refresh()
	}
}

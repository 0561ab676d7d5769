package session

import (
	"time"

	"k8s.io/apimachinery/pkg/types"
)

const (
	// commonWithin is how long a session counts as failing: longer than commonPause.
	commonWithin = 20 * time.Minute
	// commonMoment is the time within which connections end that have ended for one cause.
	commonMoment = 10 * time.Second
	// commonMinTried is from how many sessions on half of them are enough. Of fewer sessions
	// all must fail, and of a single one the failure says nothing.
	commonMinTried = 10
)

// FailureTracker records which sessions of a worker fail at present. A short outage of
// WhatsApp or of the network makes all sessions fail in the same way. If each then went
// into quarantine, an outage of minutes would become one of hours.
//
// Only sessions that fail and sessions that are connected count. A session that rests
// says nothing. The zero value is ready for use.
type FailureTracker struct {
	// failed is when each session last failed that has not been stable since.
	failed map[types.UID]time.Time
	// open are the sessions that are connected.
	open map[types.UID]bool
	// ended is when the connection of each session last ended, however long it had lasted.
	ended map[types.UID]time.Time
}

// Failed records that a session has failed.
func (t *FailureTracker) Failed(uid types.UID, now time.Time) {
	if t.failed == nil {
		t.failed = map[types.UID]time.Time{}
	}
	t.failed[uid] = now
}

// Recovered records that a session is stable.
func (t *FailureTracker) Recovered(uid types.UID) { delete(t.failed, uid) }

// Connected records that a session is connected.
func (t *FailureTracker) Connected(uid types.UID) {
	if t.open == nil {
		t.open = map[types.UID]bool{}
	}
	t.open[uid] = true
}

// Ended records that the connection of a session has ended.
func (t *FailureTracker) Ended(uid types.UID, now time.Time) {
	if !t.open[uid] {
		return
	}
	delete(t.open, uid)
	if t.ended == nil {
		t.ended = map[types.UID]time.Time{}
	}
	t.ended[uid] = now
}

// Forget removes a session that has left the worker, or rests.
func (t *FailureTracker) Forget(uid types.UID) {
	delete(t.open, uid)
	delete(t.failed, uid)
	delete(t.ended, uid)
}

// Failing returns the sessions that have failed recently.
func (t *FailureTracker) Failing() []types.UID {
	failing := make([]types.UID, 0, len(t.failed))
	for uid := range t.failed {
		failing = append(failing, uid)
	}
	return failing
}

// Common reports whether a failure is common to most sessions: whether at least half
// of those that count have failed recently, or have lost their connections within
// commonMoment. The second is needed for sessions that had been connected for long:
// they are connected again soon, and do not count as failed.
func (t *FailureTracker) Common(now time.Time) bool {
	return t.atLeastHalf(t.failed, commonWithin, now) || t.atLeastHalf(t.ended, commonMoment, now)
}

// atLeastHalf reports whether the affected sessions are at least half of the affected
// and the connected ones together. It removes from affected those whose time is longer
// ago than within.
func (t *FailureTracker) atLeastHalf(affected map[types.UID]time.Time, within time.Duration, now time.Time) bool {
	for uid, when := range affected {
		if now.Sub(when) > within {
			delete(affected, uid)
		}
	}
	failing, tried := len(affected), len(affected)
	for uid := range t.open {
		if _, ok := affected[uid]; !ok {
			tried++
		}
	}
	if tried < commonMinTried {
		return failing > 1 && failing == tried
	}
	return 2*failing >= tried
}

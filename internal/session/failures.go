package session

import (
	"time"

	"k8s.io/apimachinery/pkg/types"
)

const (
	// commonWithin is how long a session counts as failing: longer than commonPause.
	commonWithin = 20 * time.Minute
	// commonMoment is within which time connections end that one cause has ended.
	commonMoment = 10 * time.Second
	// commonMany is how many sessions must try for half of them to decide. Of fewer all
	// must fail, and one by itself proves nothing.
	commonMany = 10
)

// FailureTracker knows which sessions of a worker fail at present. A few bad
// minutes of WhatsApp or of the network fail all sessions in the same way: if
// each then went into quarantine, the quarantine would be the outage.
//
// Only sessions that try count: those that fail and those that are connected. A
// session that rests proves nothing. The zero value is ready for use.
type FailureTracker struct {
	// failed is when a session failed that has had no stable minute since.
	failed map[types.UID]time.Time
	// open are the sessions that are connected.
	open map[types.UID]bool
	// ended is when the connection of a session ended last, however long it had lasted.
	ended map[types.UID]time.Time
}

// Failed takes note that a session has failed.
func (t *FailureTracker) Failed(uid types.UID, now time.Time) {
	if t.failed == nil {
		t.failed = map[types.UID]time.Time{}
	}
	t.failed[uid] = now
}

// Recovered takes note that a session has had its stable minute.
func (t *FailureTracker) Recovered(uid types.UID) { delete(t.failed, uid) }

// Connected takes note that a session is connected.
func (t *FailureTracker) Connected(uid types.UID) {
	if t.open == nil {
		t.open = map[types.UID]bool{}
	}
	t.open[uid] = true
}

// Ended takes note that the connection of a session has ended.
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

// Forget takes note that a session has left, or rests.
func (t *FailureTracker) Forget(uid types.UID) {
	delete(t.open, uid)
	delete(t.failed, uid)
	delete(t.ended, uid)
}

// Failing are the sessions that have failed lately.
func (t *FailureTracker) Failing() []types.UID {
	failing := make([]types.UID, 0, len(t.failed))
	for uid := range t.failed {
		failing = append(failing, uid)
	}
	return failing
}

// Common reports whether at least half of the sessions that try have failed
// lately, or have lost their connections in this moment. The second is for
// sessions that had been connected for long, which are soon back and have not failed.
func (t *FailureTracker) Common(now time.Time) bool {
	return t.most(t.failed, commonWithin, now) || t.most(t.ended, commonMoment, now)
}

// most reports whether the sessions in hit, which are removed from it after that
// time, are at least half of them and the connected together.
func (t *FailureTracker) most(hit map[types.UID]time.Time, within time.Duration, now time.Time) bool {
	for uid, when := range hit {
		if now.Sub(when) > within {
			delete(hit, uid)
		}
	}
	failing, tried := len(hit), len(hit)
	for uid := range t.open {
		if _, ok := hit[uid]; !ok {
			tried++
		}
	}
	if tried < commonMany {
		return failing > 1 && failing == tried
	}
	return 2*failing >= tried
}

package batch

import (
	"maps"
	"slices"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const (
	// If brakeItems items of brakeSessions sessions are refused without a delivery between
	// them, the application is broken, not the items (docs/architecture.md, "Delivery to
	// Laravel").
	brakeItems, brakeSessions = 20, 5
	// conflictTimeout is how long a 409 is repeated before it counts as a refusal: a
	// deadlock in the application's database lasts seconds.
	conflictTimeout = 10 * time.Second
	// conflictMemory is how long a session's 409 is remembered: longer than the pause that
	// Laravel may ask for (5 minutes). Otherwise a 409 with a long pause is repeated forever.
	conflictMemory = 15 * time.Minute
	// A single item that got 5xx poisonAfter times over poisonTimeout, with a delivery of
	// others before each, is the cause of Laravel's errors.
	poisonAfter, poisonTimeout = 20, time.Hour
)

// conflictBackoff is how long a batch waits after a 409, with half jitter.
var conflictBackoff = backoff.Backoff{First: 500 * time.Millisecond, Most: 2 * time.Second}

// refusals count what Laravel refused, to distinguish a bad item from a broken application.
// They are pure; the zero value is empty. A new leader starts with the zero value.
type refusals struct {
	// deliveries counts the batches of which Laravel accepted an item.
	deliveries int
	// items counts the items refused since the last delivery, sessions are their sessions.
	items    int
	sessions map[string]bool
	// braked: the application is considered broken.
	braked bool
	// resent are the sessions whose refused item was enqueued again: another refusal of it
	// is no new sign of a broken application.
	resent map[string]bool
	// conflicts are the first and last 409 of each session since its last delivery.
	conflicts map[string]span
	// failing are single items that got 5xx, by their batch id.
	failing map[string]failing
}

// span is the time from the first to the last occurrence.
type span struct{ first, last time.Time }

// failing is a single item that got 5xx.
type failing struct {
	span
	// count is the number of failures with a delivery of another batch before each.
	count int
	// deliveries is refusals.deliveries at the last counted failure.
	deliveries int
}

// delivered records a batch of which Laravel accepted all but the rejected items.
func (r *refusals) delivered(batch *delivery.Batch, rejected []delivery.Rejection) {
	r.deliveries++
	r.items, r.sessions, r.braked = 0, nil, false
	delete(r.failing, batch.ID)
	for _, item := range batch.Items {
		delete(r.conflicts, item.SessionID)
		if !names(rejected, item) {
			delete(r.resent, item.SessionID)
		}
	}
}

// resend records that a session's refused item is enqueued again.
func (r *refusals) resend(sessionID string) {
	if r.resent == nil {
		r.resent = map[string]bool{}
	}
	r.resent[sessionID] = true
}

// refused records that no item of a batch was accepted, and reports whether the application
// is broken: then the items must be kept.
func (r *refusals) refused(batch *delivery.Batch) (broken bool) {
	if r.braked {
		return true
	}
	items, sessions := r.items, maps.Clone(r.sessions)
	if sessions == nil {
		sessions = map[string]bool{}
	}
	for _, item := range batch.Items {
		delete(r.conflicts, item.SessionID)
		if !r.resent[item.SessionID] {
			items++
			sessions[item.SessionID] = true
		}
	}
	if items >= brakeItems && len(sessions) >= brakeSessions {
		r.braked = true
		return true
	}
	r.items, r.sessions = items, sessions
	return false
}

// conflicted records a 409 for a batch, and reports whether the batch has been repeated
// long enough for each of its sessions.
func (r *refusals) conflicted(batch *delivery.Batch, now time.Time) bool {
	maps.DeleteFunc(r.conflicts, func(_ string, s span) bool { return now.Sub(s.last) > conflictMemory })
	if r.conflicts == nil {
		r.conflicts = map[string]span{}
	}
	long := true
	for _, item := range batch.Items {
		s, known := r.conflicts[item.SessionID]
		if !known {
			s.first = now
		}
		s.last = now
		r.conflicts[item.SessionID] = s
		long = long && now.Sub(s.first) >= conflictTimeout
	}
	return long
}

// poisonous records a 5xx for a single item, and reports whether the item is the cause of
// Laravel's errors. A failure counts only if Laravel accepted a batch since the failure
// before, so an outage counts only once.
func (r *refusals) poisonous(batch *delivery.Batch, now time.Time) bool {
	maps.DeleteFunc(r.failing, func(_ string, f failing) bool { return now.Sub(f.last) > 2*poisonTimeout })
	if r.failing == nil {
		r.failing = map[string]failing{}
	}
	f, known := r.failing[batch.ID]
	if !known {
		f = failing{span: span{first: now}, deliveries: -1}
	}
	f.last = now
	if r.deliveries > f.deliveries {
		f.count, f.deliveries = f.count+1, r.deliveries
	}
	r.failing[batch.ID] = f
	if f.count < poisonAfter || now.Sub(f.first) < poisonTimeout {
		return false
	}
	delete(r.failing, batch.ID)
	return true
}

// names reports whether the list names an item.
func names(list []delivery.Rejection, item delivery.Item) bool {
	return slices.ContainsFunc(list, func(r delivery.Rejection) bool { return r.Names(item) })
}

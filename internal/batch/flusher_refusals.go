package batch

import (
	"maps"
	"slices"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// DeadLetterReason says why an item is a dead letter.
type DeadLetterReason string

const (
	// Refused: Laravel answered 400, 409 or 422 for the item alone.
	Refused DeadLetterReason = "Refused"
	// Rejected: Laravel took the batch and named the item as rejected.
	Rejected DeadLetterReason = "Rejected"
	// TooLarge: Laravel answered 413 for the item alone.
	TooLarge DeadLetterReason = "TooLarge"
	// Poison: Laravel answered 5xx for the item alone again and again, while it took others.
	Poison DeadLetterReason = "Poison"
)

const (
	// brakeItems of brakeSessions refused with no delivery between them say that the
	// application is broken, not the items (docs/architecture.md, "Delivery to Laravel").
	brakeItems, brakeSessions = 20, 5
	// conflictTimeout is how long a 409 is repeated before it counts as a refusal: a
	// deadlock in the application's database lasts seconds.
	conflictTimeout = 10 * time.Second
	// conflictCap bounds the pause between two such repetitions.
	conflictCap = 2 * time.Second
	// conflictMemory is how long a session's 409 is remembered.
	conflictMemory = 2 * time.Minute
	// An item alone that got 5xx poisonAfter times over poisonTimeout, while others passed
	// before each of them, is what Laravel fails over.
	poisonAfter, poisonTimeout = 20, time.Hour
)

// refusals keep account of what Laravel refused, to tell a bad item from a broken
// application. They are pure, and the zero value has seen nothing. A process that
// becomes the leader begins anew.
type refusals struct {
	// deliveries counts batches of which Laravel took something.
	deliveries int
	// items and sessions were refused since the last delivery.
	items    int
	sessions map[string]bool
	// braked: the application is taken for broken.
	braked bool
	// resent are sessions whose refused item was enqueued again: another refusal of it
	// says nothing new about the application.
	resent map[string]bool
	// conflicts are the 409s of each session since it was last delivered.
	conflicts map[string]span
	// failing are single items by their batch id.
	failing map[string]failing
}

// span is from the first to the last time of something.
type span struct{ first, last time.Time }

// failing is an item alone that got 5xx.
type failing struct {
	span
	// count of the failures that had a delivery of something else between them.
	count int
	// deliveries is refusals.deliveries at the last of them.
	deliveries int
}

// delivered notes a batch of which Laravel took all but the rejected items.
func (r *refusals) delivered(batch *delivery.Batch, rejected []delivery.Rejection) {
	r.deliveries++
	r.items, r.sessions, r.braked = 0, nil, false
	delete(r.failing, batch.ID)
	for _, item := range batch.Items {
		delete(r.conflicts, item.SessionID)
		if !names(rejected, item.SessionID) {
			delete(r.resent, item.SessionID)
		}
	}
}

// resend notes that a session's refused item is enqueued again.
func (r *refusals) resend(sessionID string) {
	if r.resent == nil {
		r.resent = map[string]bool{}
	}
	r.resent[sessionID] = true
}

// refused notes that no item of a batch was taken, and reports whether the
// application is broken: then the items must be kept.
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

// conflicted notes a 409 for a batch, and reports whether it has been repeated long
// enough for each of its sessions.
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

// poisonous notes a 5xx for an item alone, and reports whether it is the item that
// Laravel fails over. A failure counts only if Laravel took something since the one
// before, so an outage never counts more than once.
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

// names reports whether the list names a session.
func names(list []delivery.Rejection, sessionID string) bool {
	return slices.ContainsFunc(list, func(r delivery.Rejection) bool { return r.SessionID == sessionID })
}

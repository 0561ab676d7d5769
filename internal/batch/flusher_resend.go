package batch

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const (
	// The state of a session that Laravel refused is enqueued again with the first delivery
	// of something else, or after resendBase, then after three times as long, up to resendCap:
	// Laravel must not keep an old state for good, and an application that has lost a tenant
	// must not be asked about him every minute.
	resendBase, resendCap = 10 * time.Second, 6 * time.Hour
	// resendMost is how many are enqueued again at a time.
	resendMost = 5
	// resendPause is the least time between two such rounds.
	resendPause = time.Second
)

// resends say when the states of sessions that Laravel refused are enqueued again. They are
// kept for statuses only: a refused QR code is replaced by the next one. They are pure;
// the zero value is empty. The dead letters themselves are in Redis.
type resends struct {
	sessions map[string]resend
	// next is the earliest time of the next round.
	next time.Time
}

type resend struct {
	// due is when the state is enqueued again; sent: it was, and waits for its answer.
	due  time.Time
	sent bool
	// attempts counts how often it was.
	attempts int
}

// refused notes that a session's state is a dead letter.
func (r *resends) refused(sessionID string, now time.Time) {
	if r.sessions == nil {
		r.sessions = map[string]resend{}
	}
	s := r.sessions[sessionID]
	s.due, s.sent = now.Add(tripled(resendBase, resendCap, s.attempts)), false
	r.sessions[sessionID] = s
}

// delivered notes that Laravel took a batch but for the rejected items.
func (r *resends) delivered(batch *delivery.Batch, rejected []delivery.Rejection, now time.Time) {
	for _, item := range batch.Items {
		if !names(rejected, item.SessionID) {
			delete(r.sessions, item.SessionID)
		}
	}
	for id, s := range r.sessions {
		if s.attempts == 0 && s.due.After(now) {
			s.due = now
			r.sessions[id] = s
		}
	}
}

// all makes every state due: the application that refused everything works again.
func (r *resends) all(now time.Time) {
	for id, s := range r.sessions {
		if !s.sent {
			s.due = now
			r.sessions[id] = s
		}
	}
}

// take returns the sessions whose state is to be enqueued again now.
func (r *resends) take(now time.Time) []string {
	if now.Before(r.next) || len(r.sessions) == 0 {
		return nil
	}
	var ids []string
	for id, s := range r.sessions {
		if len(ids) == resendMost {
			break
		}
		if !s.sent && !s.due.After(now) {
			s.sent = true
			s.attempts++
			r.sessions[id] = s
			ids = append(ids, id)
		}
	}
	r.next = now.Add(resendPause)
	return ids
}

// forget drops a session whose state is not to be enqueued again.
func (r *resends) forget(sessionID string) { delete(r.sessions, sessionID) }

// tripled triples base n times, up to limit.
func tripled(base, limit time.Duration, n int) time.Duration {
	for ; n > 0 && base < limit; n-- {
		base *= 3
	}
	return min(base, limit)
}

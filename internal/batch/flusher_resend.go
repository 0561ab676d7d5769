package batch

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// resendBackoff is after how long a session's state that Laravel refused is enqueued again,
// if no other batch is delivered before: Laravel must not keep an old state forever, and an
// application that does not know a tenant must not get its state every minute.
var resendBackoff = backoff.Backoff{First: 10 * time.Second, Most: 6 * time.Hour, Factor: 3}

const (
	// resendMax is how many states are enqueued again in one round.
	resendMax = 5
	// resendPause is the shortest time between two rounds.
	resendPause = time.Second
)

// resends say when states that Laravel refused are enqueued again. They are for statuses
// only: a refused QR code is replaced by the next one. They are pure; the zero value is
// empty. The dead letters themselves are in Redis.
type resends struct {
	sessions map[string]resend
	// next is the earliest time of the next round.
	next time.Time
}

type resend struct {
	// due is when the state is enqueued again; sent: it was enqueued, and waits for its answer.
	due  time.Time
	sent bool
	// attempts counts how often it was enqueued again.
	attempts int
}

// refused records that a session's state is a dead letter.
func (r *resends) refused(sessionID string, now time.Time) {
	if r.sessions == nil {
		r.sessions = map[string]resend{}
	}
	s := r.sessions[sessionID]
	s.due, s.sent = now.Add(resendBackoff.After(s.attempts+1)), false
	r.sessions[sessionID] = s
}

// delivered records that Laravel accepted a batch except the rejected items.
func (r *resends) delivered(batch *delivery.Batch, rejected []delivery.Rejection, now time.Time) {
	for _, item := range batch.Items {
		if !names(rejected, item) {
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

// all makes every state due, because an application that refused everything works again.
func (r *resends) all(now time.Time) {
	for id, s := range r.sessions {
		if !s.sent {
			s.due = now
			r.sessions[id] = s
		}
	}
}

// take returns the sessions whose state must be enqueued again now.
func (r *resends) take(now time.Time) []string {
	if now.Before(r.next) || len(r.sessions) == 0 {
		return nil
	}
	var ids []string
	for id, s := range r.sessions {
		if len(ids) == resendMax {
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

// forget drops a session whose state must not be enqueued again.
func (r *resends) forget(sessionID string) { delete(r.sessions, sessionID) }

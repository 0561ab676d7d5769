package worker

import (
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// lastSeen is a connection that knows when something last came from WhatsApp.
type lastSeen interface{ LastSeen() time.Time }

// Life reports for how long nothing has come from WhatsApp on the most silent of
// the connections, and how many sessions are in quarantine.
func (a *Agent) Life() (oldest time.Duration, quarantined int) {
	now := a.o.Clock.Now()
	for _, s := range a.all() {
		if s.quarantined.Load() {
			quarantined++
		}
		phase, live := s.phase.Load(), s.live.Load()
		if phase == nil || *phase != v1alpha1.PhaseConnected || live == nil {
			continue
		}
		if seen := (*live).LastSeen(); !seen.IsZero() {
			oldest = max(oldest, now.Sub(seen))
		}
	}
	return oldest, quarantined
}

// sessions counts the sessions that this worker supervises.
func (a *Agent) sessions() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.supervisors)
}

// placedSessions counts the sessions that are placed on this worker, those included that
// have no supervisor yet, as at the start of the process. The cache is read at most once a
// second: a thousand sessions that wait for their trials ask.
func (a *Agent) placedSessions() int {
	now := a.o.Clock.Now()
	a.mu.Lock()
	n, fresh := a.placedCount, now.Before(a.placedCountUntil)
	a.mu.Unlock()
	if fresh {
		return n
	}
	var placed v1alpha1.WhatsAppSessionList
	if err := a.placed.List(a.life, &placed); err != nil {
		a.o.Log.Error(err, "Failed to count the sessions of this worker")
	}
	n = max(len(placed.Items), a.sessions())
	a.mu.Lock()
	defer a.mu.Unlock()
	a.placedCount, a.placedCountUntil = n, now.Add(time.Second)
	return n
}

// retryOutdated has the sessions try again whose client WhatsApp has refused.
func (a *Agent) retryOutdated() {
	for _, s := range a.all() {
		s.post(func() { s.step(session.RetryOutdated{}) })
	}
}

// resumeSoon has those sessions try soon.
func (a *Agent) resumeSoon(sessions map[types.UID]bool) {
	for _, s := range a.all() {
		if sessions[s.uid] {
			s.post(func() { s.step(session.ResumeSoon{}) })
		}
	}
}

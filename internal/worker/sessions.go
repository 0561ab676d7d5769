package worker

import (
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// lastSeen is implemented by a connection that knows when it last received something
// from WhatsApp.
type lastSeen interface{ LastSeen() time.Time }

// SessionStats returns the longest time for which an open connection has received
// nothing from WhatsApp, and how many sessions are in quarantine.
func (a *Agent) SessionStats() (longestSilence time.Duration, quarantined int) {
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
			longestSilence = max(longestSilence, now.Sub(seen))
		}
	}
	return longestSilence, quarantined
}

// sessions counts the sessions that have a supervisor.
func (a *Agent) sessions() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.supervisors)
}

// placedSessions counts the sessions that are placed on this worker, including those
// that have no supervisor yet, as at the start of the process. It reads the cache at
// most once a second, because a thousand sessions may wait for their trials and ask.
func (a *Agent) placedSessions() int {
	now := a.o.Clock.Now()
	a.mu.Lock()
	n, fresh := a.placedCount, now.Before(a.placedCountUntil)
	a.mu.Unlock()
	if fresh {
		return n
	}
	var placed v1alpha1.WhatsAppSessionList
	if err := a.placed.List(a.supervisorCtx, &placed); err != nil {
		a.o.Log.Error(err, "Failed to count the sessions of this worker")
	}
	n = max(len(placed.Items), a.sessions())
	a.mu.Lock()
	defer a.mu.Unlock()
	a.placedCount, a.placedCountUntil = n, now.Add(time.Second)
	return n
}

// retryOutdated makes the sessions whose client WhatsApp refused try again.
func (a *Agent) retryOutdated() {
	for _, s := range a.all() {
		s.post(func() { s.step(session.RetryOutdated{}) })
	}
}

// resumeSoon makes these sessions try soon.
func (a *Agent) resumeSoon(sessions map[types.UID]bool) {
	for _, s := range a.all() {
		if sessions[s.uid] {
			s.post(func() { s.step(session.ResumeSoon{}) })
		}
	}
}

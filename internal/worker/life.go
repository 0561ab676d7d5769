package worker

import (
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// sign tells when WhatsApp was last heard on a connection; some connections can.
type sign interface{ LastSeen() time.Time }

// Life is how the sessions fare: for how long the most silent of the connected
// ones has heard nothing, and how many are in quarantine.
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

// retryOutdated has the sessions try again whose client WhatsApp has refused.
func (a *Agent) retryOutdated() {
	for _, s := range a.all() {
		s.post(func() { s.m.retryOutdated(s.Clock.Now()) })
	}
}

// backAgain has those sessions try soon.
func (a *Agent) backAgain(sessions map[types.UID]bool) {
	for _, s := range a.all() {
		if sessions[s.uid] {
			s.post(func() { s.m.backAgain(s.Clock.Now()) })
		}
	}
}

func (m *model) retryOutdated(now time.Time) {
	if m.taken && m.want.Phase == v1alpha1.PhaseOutdated && m.retryAt.IsZero() {
		m.retryAt = now
	}
}

// heldBack says why a session that is to connect does not yet.
func (m *model) heldBack(now time.Time) {
	switch m.want.Phase {
	case v1alpha1.PhaseConnecting, v1alpha1.PhaseDisconnected, v1alpha1.PhasePairing:
		m.phase(m.want.Phase, v1alpha1.ReasonOutdated,
			"WhatsApp refuses this version of the client: the newest is tried with one session, and the others connect when that one is through", now)
	}
}

package session

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// A database that takes each probe and refuses each message must not cause a login each second.
func TestRefusalsSlowDown(t *testing.T) {
	g := NewWithT(t)
	m, now := awaiting(EndInboxUnavailable), noon
	var pauses []time.Duration
	for range 9 {
		g.Expect(m.Awaits()).To(Equal(EndInboxUnavailable))
		m.Step(InboxReady{EndInboxUnavailable}, now)
		g.Expect(m.Awaits()).To(BeEmpty())
		for m.Next(now).Operation != OpDial {
			next := m.WakeAt(now)
			g.Expect(next).To(BeTemporally(">", now))
			pauses = append(pauses, next.Sub(now))
			now = next
		}
		m.Step(Dialed{Paired: true}, now)
		m.Step(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, now)
		g.Expect(m.Phase()).To(Equal(v1alpha1.PhaseConnected))
		m.Step(Event{Type: EventDisconnected, Reason: EndInboxUnavailable, Ours: true}, now)
		g.Expect(m.Phase()).To(Equal(v1alpha1.PhaseDisconnected), "never shown as connected")
		g.Expect(m.Next(now).Operation).To(Equal(OpClose))
		m.Step(Closed{}, now)
	}
	g.Expect(pauses[len(pauses)-1]).To(BeNumerically(">=", 30*time.Second), "%v", pauses)
	g.Expect(m.want.Failures).To(BeZero(), "the fault is not the session's: no quarantine")
}

package session

import (
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// A connection that has refused a message, whose keys the database did not read or store, or after
// which too many messages wait, is ended by this process (docs/architecture.md, "Messages").
// WhatsApp keeps the messages that follow. The session is connected again only when the worker
// reports that the cause is over: otherwise each login would only bring the same messages once
// more.

// InboxReady says that the cause is over for which sessions wait: the database takes a write
// again (EndInboxUnavailable), or less than half of the bound waits (EndBacklog).
type InboxReady struct{ Reason string }

func (r InboxReady) apply(m *Machine, _ time.Time) {
	if m.awaits == r.Reason {
		m.awaits = ""
	}
}

// Awaits is the reason for which the session is not connected until InboxReady comes; empty: it
// awaits nothing.
func (m *Machine) Awaits() string { return m.awaits }

// awaitInbox handles the end of a connection for one of these reasons.
func (m *Machine) awaitInbox(e Event, now time.Time) {
	m.awaits = e.Reason
	if e.Reason == EndBacklog {
		m.retryAt = now
		const message = "too many of its messages wait for Laravel: WhatsApp keeps the later ones, and the session connects again when less than half of the bound waits"
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonBacklog, message)
		m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonBacklog, message, now)
		return
	}
	m.backOff(now) // a database that takes every probe, but refuses a message again and again, must not cause a login each second
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonInboxUnavailable,
		"a message could not be stored in the database: WhatsApp keeps the messages, and the session connects again when the database takes them", now)
}

package session

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// People do not always write a number as WhatsApp knows the account (Brazil's ninth
// digit, Mexico's and Argentina's extra digit). When the linked number differs from the
// one in the spec, WhatsApp is asked, and the phone is wrong only if WhatsApp clearly
// says so. Until then the session is not Connected.

// identity is the question that WhatsApp is asked: whether the allowed number belongs
// to the linked account.
type identity struct{ allowed, linked string }

// identity is the present question.
func (m *Machine) identity() identity {
	return identity{allowed: m.obj.Spec.Pairing.PhoneNumber, linked: m.want.JID}
}

// phoneDiffers reports whether the linked number differs, as text, from the one that the
// spec allows.
func (m *Machine) phoneDiffers() bool {
	allowed := m.obj.Spec.Pairing.PhoneNumber
	return allowed != "" && m.want.JID != "" && m.want.PhoneNumber != allowed
}

// unverified reports whether WhatsApp must be asked whether the linked account is the
// allowed one.
func (m *Machine) unverified() bool {
	return m.phoneDiffers() && m.same != m.identity() && m.other != m.identity()
}

// wrongPhone reports whether WhatsApp says that the linked account is not the allowed
// one.
func (m *Machine) wrongPhone() bool { return m.phoneDiffers() && m.other == m.identity() }

// onVerified handles WhatsApp's answer.
func (m *Machine) onVerified(same bool, now time.Time) {
	if !same {
		m.other = m.verifying
		return
	}
	m.same = m.verifying
	if m.socket == socketOpen && !m.logoutWanted() && !m.unverified() && !m.wrongPhone() {
		m.phase(v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, connectedMessage, now)
	}
}

// awaitVerification says why a session with an open connection is not Connected.
func (m *Machine) awaitVerification(now time.Time) {
	m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, status.Phone(m.want.PhoneNumber)+
		" is linked: asking WhatsApp whether it is the one in spec.pairing.phoneNumber, "+m.obj.Spec.Pairing.PhoneNumber, now)
}

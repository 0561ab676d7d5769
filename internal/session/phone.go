package session

import (
	"strings"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// A number as people write it is not always the one by which WhatsApp knows the
// account (Brazil's ninth digit, Mexico's and Argentina's extra one): where the
// two differ as text, WhatsApp is asked, and only its clear no makes the phone a
// wrong one. Until it has answered, the session is not Connected.

// identity is what a question whose account a number is was asked about.
type identity struct{ allowed, linked string }

// identity is the number that the spec allows, and the account that is linked.
func (m *Machine) identity() identity {
	return identity{allowed: m.obj.Spec.Pairing.PhoneNumber, linked: m.want.JID}
}

// phoneDiffers: the linked number is not the one that the spec allows, as text.
func (m *Machine) phoneDiffers() bool {
	allowed := m.obj.Spec.Pairing.PhoneNumber
	return allowed != "" && m.want.JID != "" && m.want.PhoneNumber != allowed
}

// unverified: WhatsApp is to be asked whether the linked account is the allowed one.
func (m *Machine) unverified() bool {
	return m.phoneDiffers() && m.same != m.identity() && m.other != m.identity()
}

// wrongPhone: the linked account is not the one that the spec allows.
func (m *Machine) wrongPhone() bool { return m.phoneDiffers() && m.other == m.identity() }

// onVerified takes note of WhatsApp's answer.
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
	m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, strings.TrimSpace("the phone "+m.want.PhoneNumber)+
		" is linked: WhatsApp is asked whether that is "+m.obj.Spec.Pairing.PhoneNumber+", which spec.pairing.phoneNumber allows", now)
}

package session

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// rule is a row of the table that decides the next step.
type rule struct {
	name string
	when func(m *Machine, now time.Time) bool
	// then changes the machine and returns the operation to start; OpNone: none.
	then func(m *Machine, now time.Time) Operation
}

// rules are tried in order, and the first one that applies is carried out. They are
// level-triggered: the same state leads to the same step, even if an input was missed or
// came twice.
var rules = []rule{
	{
		name: "one operation at a time",
		when: func(m *Machine, _ time.Time) bool { return m.running != OpNone },
		then: nothing,
	},
	{
		name: "a connection that has ended is closed",
		when: func(m *Machine, _ time.Time) bool { return m.socket == socketEnded },
		then: start(OpClose),
	},
	{
		name: "a session that is not held here, or must be released, has no socket",
		when: func(m *Machine, now time.Time) bool {
			return m.socket != socketNone && (!m.held() || !m.stays(now))
		},
		then: func(m *Machine, now time.Time) Operation {
			m.onLeaving(now)
			m.drop()
			return OpClose
		},
	},
	{
		name: "a new proxy needs a new connection",
		when: func(m *Machine, _ time.Time) bool {
			return m.socket != socketNone && m.dialed.ProxySecret != m.dialSpec().ProxySecret
		},
		then: func(m *Machine, now time.Time) Operation {
			m.drop()
			m.retryAt = now
			m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, "spec.proxy changed", now)
			return OpClose
		},
	},
	{
		name: "pending publications come before the release, for a second at most",
		when: func(m *Machine, now time.Time) bool {
			return m.heldHere() && !m.stays(now) && m.hold && m.releaseBy.IsZero()
		},
		then: func(m *Machine, now time.Time) Operation {
			m.onLeaving(now)
			m.releaseBy = now.Add(flushTimeout)
			return OpNone
		},
	},
	{
		name: "a taking is settled before the release",
		when: func(m *Machine, now time.Time) bool {
			return m.held() && !m.stays(now) && m.hold && m.taken && !m.forgotten && !m.settleAt.IsZero() && !m.settledLast && m.pace.allows(OpSettle, now)
		},
		then: func(m *Machine, _ time.Time) Operation { m.settledLast = true; return OpSettle },
	},
	{
		name: "a session that must not be held is released",
		when: func(m *Machine, now time.Time) bool { return m.heldHere() && !m.stays(now) },
		then: func(m *Machine, now time.Time) Operation {
			if m.hold && m.publishing && now.Before(m.releaseBy) {
				return OpNone
			}
			m.hold, m.releaseBy = false, time.Time{}
			return OpNone
		},
	},
	{
		name: "nothing is done for a session that is not placed here",
		when: func(m *Machine, now time.Time) bool { return !m.stays(now) },
		then: nothing,
	},
	{
		name: "a login token comes before the claim",
		when: func(m *Machine, now time.Time) bool { return (!m.held() || !m.hold) && !m.token && !m.restsLong(now) },
		then: start(OpToken),
	},
	{
		name: "the claim waits until the old holder has released the session",
		when: func(m *Machine, _ time.Time) bool { return m.obj.Status.HeldBy != "" && !m.heldHere() },
		then: nothing,
	},
	{
		name: "the claim is written and confirmed before the keys are taken",
		when: func(m *Machine, _ time.Time) bool { return !m.held() || !m.hold },
		then: func(m *Machine, now time.Time) Operation {
			if !m.hold && m.pace.allows(claim, now) {
				m.pace.start(claim, now)
				m.hold = true
			}
			return OpNone
		},
	},
	{
		name: "the keys are taken under the epoch of the claim",
		when: func(m *Machine, now time.Time) bool { return !m.taken && !now.Before(m.retryAt) },
		then: start(OpTake),
	},
	{
		name: "without keys nothing else is done",
		when: func(m *Machine, _ time.Time) bool { return !m.taken },
		then: nothing,
	},
	{
		name: "a deleted session offers no codes; its keys are taken again, because a phone may have scanned one",
		when: func(m *Machine, _ time.Time) bool {
			return m.logoutWanted() && m.socket == socketPairing && m.want.JID == ""
		},
		then: func(m *Machine, _ time.Time) Operation {
			m.drop()
			m.taken = false
			return OpClose
		},
	},
	{
		name: "a new pairing method needs a new connection",
		when: func(m *Machine, _ time.Time) bool {
			return m.want.JID == "" && m.want.Phase == v1alpha1.PhasePairing && m.dialed.PairPhone != m.dialSpec().PairPhone
		},
		then: func(m *Machine, now time.Time) Operation {
			m.awaitCodes(now)
			m.retryAt, m.want.RetryAfter, m.want.RetryReason = now, nil, ""
			if m.socket == socketNone { // the session was waiting after WhatsApp refused a code
				return OpNone
			}
			m.drop()
			return OpClose
		},
	},
	{
		name: "the keys of a deleted session without a device are deleted",
		when: func(m *Machine, now time.Time) bool {
			return m.logoutWanted() && m.socket == socketNone && (m.loggedOut || m.want.JID == "") && !now.Before(m.retryAt)
		},
		then: start(OpForget),
	},
	{
		name: "a deleted session and a wrong phone are logged out",
		when: func(m *Machine, now time.Time) bool {
			return m.socket == socketOpen && (m.logoutWanted() || m.wrongPhone()) && !now.Before(m.retryAt)
		},
		then: start(OpLogout),
	},
	{
		name: "WhatsApp is asked whether a number that differs belongs to the linked account",
		when: func(m *Machine, now time.Time) bool {
			return m.socket == socketOpen && m.unverified() && !m.logoutWanted() && !now.Before(m.retryAt)
		},
		then: func(m *Machine, now time.Time) Operation {
			m.awaitVerification(now)
			return OpVerify
		},
	},
	{
		name: "the answer of the passkey is sent",
		when: func(m *Machine, _ time.Time) bool { return m.socket == socketPairing && m.passkey.answer != "" },
		then: start(OpPasskeyAnswer),
	},
	{
		name: "the confirmation of the passkey is sent",
		when: func(m *Machine, _ time.Time) bool { return m.socket == socketPairing && m.passkey.confirm },
		then: start(OpPasskeyConfirm),
	},
	{
		name: "a taking that has lasted a minute is settled",
		when: func(m *Machine, now time.Time) bool { return !m.settleAt.IsZero() && !now.Before(m.settleAt) },
		then: start(OpSettle),
	},
	{
		name: "the end of a trial is recorded when this process is still alive",
		when: func(m *Machine, now time.Time) bool { return m.trialOver(now) },
		then: start(OpTrial),
	},
	{
		name: "a session whose messages cannot be stored is not connected until they can be",
		when: func(m *Machine, _ time.Time) bool {
			return m.socket == socketNone && m.awaits != "" && !m.logoutWanted()
		},
		then: nothing,
	},
	{
		name: "a session that may end its worker is tried in a group, whose size is recorded first",
		when: func(m *Machine, now time.Time) bool { return m.trialDue(now) },
		then: (*Machine).beginTrial,
	},
	{
		name: "a session without a socket connects when its time has come",
		when: func(m *Machine, now time.Time) bool { return m.dialDue(now) },
		then: start(OpDial),
	},
}

func nothing(*Machine, time.Time) Operation { return OpNone }

func start(op Operation) func(*Machine, time.Time) Operation {
	return func(*Machine, time.Time) Operation { return op }
}

// decide carries out the first rule that applies, and returns its name and operation.
func (m *Machine) decide(now time.Time) (string, Operation) {
	if m.obj == nil {
		return "", OpNone
	}
	for _, r := range rules {
		if r.when(m, now) {
			return r.name, r.then(m, now)
		}
	}
	return "", OpNone
}

// cancels reports whether the operation under way is useless now.
func (m *Machine) cancels(now time.Time) bool {
	switch m.running {
	case OpToken:
		return !m.stays(now)
	case OpDial:
		return !m.stays(now) || !m.held() || m.dialIsUseless()
	case OpTake, OpLogout, OpVerify:
		return !m.stays(now) || !m.held()
	default:
		return false
	}
}

// dialIsUseless reports whether something that has changed while the dial waited for its
// turn makes it useless. If a connection is still needed, a new dial starts.
func (m *Machine) dialIsUseless() bool {
	spec, unpaired := m.dialSpec(), m.want.JID == ""
	switch {
	case m.retryAt.IsZero(): // the pairing has expired
		return true
	case spec.ProxySecret != m.dialing.ProxySecret:
		return true
	case unpaired && spec != m.dialing:
		return true
	default:
		return unpaired && m.logoutWanted()
	}
}

// onLeaving prepares the status of a session that must be released: it says why the
// session is not connected.
func (m *Machine) onLeaving(now time.Time) {
	m.hideCode()
	m.stableAt, m.watchdog = time.Time{}, time.Time{}
	if m.obj.Spec.Suspend {
		m.want = Suspend(m.want)
		if m.want.Phase == v1alpha1.PhaseReplaced { // the session may be resumed before the manager sees this status
			m.want.Phase = v1alpha1.PhaseDisconnected
		}
	}
	switch m.want.Phase {
	case v1alpha1.PhaseConnected, v1alpha1.PhaseConnecting, v1alpha1.PhasePairing, v1alpha1.PhaseDisconnected:
	default:
		return
	}
	reason, message := v1alpha1.ReasonMoving, "the session is moving to another worker"
	switch {
	case m.reason == v1alpha1.ReasonEpochBehind, m.stalled() && !m.obj.Spec.Suspend:
		return
	case m.obj.Spec.Suspend:
		reason, message = v1alpha1.ReasonSuspended, "spec.suspend is true"
	case m.evicted:
		message = "worker " + m.worker + " is shutting down"
	}
	m.phase(v1alpha1.PhaseDisconnected, reason, message, now)
}

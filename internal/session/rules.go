package session

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// rule is a line of the table by which a supervisor decides what to do next.
type rule struct {
	name string
	when func(m *Machine, now time.Time) bool
	// then changes the model and names the operation to begin, if any.
	then func(m *Machine, now time.Time) Operation
}

// rules are tried in order; the first that applies is carried out. They are
// level-triggered: whatever was missed or came twice, the same facts lead to
// the same step.
var rules = []rule{
	{
		name: "one operation at a time",
		when: func(m *Machine, _ time.Time) bool { return m.running != OpNone },
		then: nothing,
	},
	{
		name: "a connection that has ended is closed",
		when: func(m *Machine, _ time.Time) bool { return m.socket == socketOver },
		then: start(OpClose),
	},
	{
		name: "a device that is not held, or not to be held, has no socket",
		when: func(m *Machine, now time.Time) bool {
			return m.socket != socketNone && (!m.held() || !m.stays(now))
		},
		then: func(m *Machine, now time.Time) Operation {
			m.leaving(now)
			m.drop()
			return OpClose
		},
	},
	{
		name: "another proxy means another connection",
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
		name: "what is to be told is told before the device is given up, for a moment",
		when: func(m *Machine, now time.Time) bool {
			return m.heldHere() && !m.stays(now) && m.hold && m.releaseBy.IsZero()
		},
		then: func(m *Machine, now time.Time) Operation {
			m.leaving(now)
			m.releaseBy = now.Add(flushTimeout)
			return OpNone
		},
	},
	{
		name: "a taking that ends in order is settled before its device is given up",
		when: func(m *Machine, now time.Time) bool {
			return m.held() && !m.stays(now) && m.hold && m.taken && !m.forgotten && !m.settleAt.IsZero() && !m.settledLast && m.pace.allows(OpSettle, now)
		},
		then: func(m *Machine, _ time.Time) Operation { m.settledLast = true; return OpSettle },
	},
	{
		name: "a device that is not to be held is given up",
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
		name: "the old holder is waited for",
		when: func(m *Machine, _ time.Time) bool { return m.obj.Status.HeldBy != "" && !m.heldHere() },
		then: nothing,
	},
	{
		name: "the claim is written and confirmed before the device is taken",
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
		name: "a deleted session offers no codes; its record is read again, for a scan may just have succeeded",
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
		name: "another way of pairing means another connection",
		when: func(m *Machine, _ time.Time) bool {
			return m.want.JID == "" && m.want.Phase == v1alpha1.PhasePairing && m.dialed.PairPhone != m.dialSpec().PairPhone
		},
		then: func(m *Machine, now time.Time) Operation {
			m.awaitCodes(now)
			m.retryAt, m.want.RetryAfter, m.want.RetryReason = now, nil, ""
			if m.socket == socketNone { // it may have been waiting after a refusal
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
		name: "whose account a number is that differs, WhatsApp says",
		when: func(m *Machine, now time.Time) bool {
			return m.socket == socketOpen && m.unverified() && !m.logoutWanted() && !now.Before(m.retryAt)
		},
		then: func(m *Machine, now time.Time) Operation {
			m.awaitVerification(now)
			return OpVerify
		},
	},
	{
		name: "a taking that has lasted a minute is settled",
		when: func(m *Machine, now time.Time) bool { return !m.settleAt.IsZero() && !now.Before(m.settleAt) },
		then: start(OpSettle),
	},
	{
		name: "the process has lived through a trial: that is recorded",
		when: func(m *Machine, now time.Time) bool { return m.trialOver(now) },
		then: start(OpTrial),
	},
	{
		name: "a session that may end its worker is tried in a group, which is recorded before",
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

// decide applies the first rule that holds and returns its name and operation.
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

// cancels reports whether the operation under way is of no use any more.
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

// dialIsUseless: what was decided while the dial waited for its turn makes it
// useless. If it is still wanted, it begins anew with what is so now.
func (m *Machine) dialIsUseless() bool {
	spec, unpaired := m.dialSpec(), m.want.JID == ""
	switch {
	case m.retryAt.IsZero(): // the time for pairing is over
		return true
	case spec.ProxySecret != m.dialing.ProxySecret:
		return true
	case unpaired && spec != m.dialing:
		return true
	default:
		return unpaired && m.logoutWanted()
	}
}

// leaving says why a session that is to be given up is not connected.
func (m *Machine) leaving(now time.Time) {
	m.hideCode()
	m.stableAt, m.watchdog = time.Time{}, time.Time{}
	if m.obj.Spec.Suspend {
		m.want = Suspend(m.want)
		if m.want.Phase == v1alpha1.PhaseReplaced { // should it be resumed before the manager has seen it
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

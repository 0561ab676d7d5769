package session

import (
	"cmp"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// Quarantine says when a session that fails again and again is tried only after
// hours, and after how many: attempts in a loop prolong WhatsApp's locks.
type Quarantine struct {
	// After is how many failures in a row, without a stable minute, are enough.
	After int
	// First is the pause then; each further failure doubles it, up to Most. Half of each
	// pause is random.
	First, Most time.Duration
}

// The quarantine where nothing else is configured.
const (
	DefaultQuarantineAfter = 8
	DefaultQuarantineFirst = time.Hour
	DefaultQuarantineMost  = 6 * time.Hour
)

func (q Quarantine) withDefaults() Quarantine {
	return Quarantine{
		After: cmp.Or(q.After, DefaultQuarantineAfter),
		First: cmp.Or(q.First, DefaultQuarantineFirst),
		Most:  cmp.Or(q.Most, DefaultQuarantineMost),
	}
}

// pause is how long a session rests after so many failures; chance is from 0 to 1.
func (q Quarantine) pause(failures int, chance float64) time.Duration {
	interval := q.First
	for n := q.After; n < failures && interval < q.Most; n++ {
		interval *= 2
	}
	interval = min(interval, q.Most)
	return interval/2 + time.Duration(chance*float64(interval/2))
}

const (
	// banMargin is added to the end of a ban: the clock of the next holder may be ahead.
	banMargin = 30 * time.Second
	// commonAfter multiplies the failures after which the pauses become longer while most
	// sessions fail.
	commonAfter = 4
	// commonPause is the longest pause while most sessions fail: attempts an hour apart
	// would notice the end of it long after it.
	commonPause = 15 * time.Minute
	// assessmentDelay is how long the assessment of a session waits for what happens to the
	// others: of all sessions that fail for one cause, one is always the first.
	assessmentDelay = commonMoment / 2
)

// counted takes note of the end of a connection that WhatsApp had accepted and
// that had no stable minute, and reports whether the session goes into quarantine
// at once, because it already was in it. Others are assessed a little later (assess).
// What never reached WhatsApp does not count: it prolongs no lock, and a network
// that is away for five minutes must not cost hours.
//
// In the same way means for the same reason. An end that nobody explained may be
// any: the last node of a connection, which names the reason, can be lost. Once
// in quarantine, whatever fails goes on with it.
func (m *Machine) counted(e Event, now time.Time) (enough bool) {
	s := &m.want
	inQuarantine := s.Failures > 0 && s.RetryAfter != nil
	unexplained := e.Reason == EndSocketClosed
	m.fleet.Failed(m.obj.UID, now)
	common := m.fleet.Common(now)
	switch {
	case s.Failures == 0, !inQuarantine && !unexplained && s.FailureReason != e.Reason && s.FailureReason != EndSocketClosed:
		s.Failures, s.FailureReason = 1, e.Reason
		s.RetryAfter, s.RetryReason = nil, ""
	case common: // not the session's own failure
	default:
		s.Failures++
		if !unexplained {
			s.FailureReason = e.Reason
		}
	}
	if !common && (inQuarantine || int(s.Failures) >= m.quarantine.After) {
		m.assessAt = now.Add(assessmentDelay)
	}
	return inQuarantine
}

// assess decides whether a session that has failed often enough goes into
// quarantine: not if it has turned out that most sessions failed with it. A
// session that was in quarantine before then rests as for such a failure, not for hours.
func (m *Machine) assess(now time.Time) {
	m.assessAt = time.Time{}
	common, inQuarantine := m.fleet.Common(now), m.want.RetryAfter != nil
	switch {
	case !m.taken || m.logoutWanted() || status.Resting(m.want.Phase):
		return
	case common:
		m.want.Failures--
	}
	if common == inQuarantine { // else it is tried soon, or is in quarantine already
		m.enterQuarantine(now)
	}
}

// enterQuarantine puts the session into quarantine, or back into it.
func (m *Machine) enterQuarantine(now time.Time) {
	entered := m.want.RetryAfter == nil
	q := m.quarantine
	if m.fleet.Common(now) {
		q.First, q.Most = min(q.First, commonPause), min(q.Most, commonPause)
	}
	m.want.RetryAfter = at(now.Add(q.pause(int(m.want.Failures), m.random())))
	m.retryAt = m.want.RetryAfter.Time
	if m.want.JID == "" { // no codes are offered meanwhile
		m.want.PairingDeadline = nil
	}
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonQuarantined, QuarantineMessage(m.want), now)
	if entered {
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonQuarantined, m.message)
	}
}

// slowDown makes the pauses longer when most sessions have been failing for long.
func (m *Machine) slowDown(now time.Time) {
	if m.attempts > commonAfter*m.quarantine.After && m.fleet.Common(now) {
		m.retryAt = now.Add(time.Duration((1 + m.random()) * float64(min(commonPause, m.quarantine.First)) / 2))
	}
}

// resumeSoon brings the next attempt of a session forward, because one that failed
// with it is stable again. The attempts are spread, so that not all come at once.
func (m *Machine) resumeSoon(now time.Time) {
	if !m.assessAt.IsZero() { // most sessions had that failure
		m.assessAt = time.Time{}
		m.want.Failures--
	}
	soon := now.Add(time.Duration(m.random() * float64(backoffMost)))
	if !m.taken || m.socket != socketNone || status.Resting(m.want.Phase) || m.want.RetryReason != "" || m.want.Failures == 0 || !m.retryAt.After(soon) {
		return
	}
	m.retryAt = soon
	if !m.stalled() {
		return
	}
	m.want.RetryAfter = at(roundUp(soon))
	m.retryAt = m.want.RetryAfter.Time
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonQuarantined, QuarantineMessage(m.want), now)
}

// resetFailures forgets the failures: the session has had its stable minute, or a
// person has asked for a new beginning.
func (m *Machine) resetFailures() {
	m.attempts, m.want.Failures, m.want.FailureReason, m.want.Replacements = 0, 0, "", 0
	m.want.RetryAfter, m.want.RetryReason = nil, ""
	m.assessAt = time.Time{}
}

// recallRest reports whether the session rests, and says of it what the status
// knows: the phase may have been overwritten on the way here (by the loss of a
// worker, by a suspension), but what the next holder must know was not.
func (m *Machine) recallRest(now time.Time) bool {
	s := &m.want
	if s.Phase == v1alpha1.PhaseReplaced && s.Replacements == 0 { // as an older version wrote it
		s.Replacements, s.Failures = max(s.Failures, 1), 0
	}
	if s.RetryReason == v1alpha1.ReasonPairingCodeRefused && m.dialSpec().PairPhone == "" { // no code is to be typed any more
		s.RetryReason, s.RetryAfter = "", nil
	}
	if status.Resting(s.Phase) {
		return true
	}
	rest, rests := Rest(*s, now)
	if rests {
		s.Phase, m.reason, m.message = rest.Phase, rest.Reason, rest.Message
	}
	return rests
}

// restNear is how soon a rest must end for its session to take a login token along.
const restNear = time.Minute

// restsLong: no attempt is near, so the session is claimed without a login token.
func (m *Machine) restsLong(now time.Time) bool {
	if m.logoutWanted() || restartWanted(m.obj, m.want) {
		return false
	}
	_, rests := Rest(m.want, now)
	until := m.restUntil()
	return (rests || status.Resting(m.want.Phase)) && (until.IsZero() || until.After(now.Add(restNear)))
}

// restUntil is when a session that rests is tried again; zero: never by itself.
func (m *Machine) restUntil() time.Time {
	if m.want.RetryAfter == nil || m.want.Phase == v1alpha1.PhaseLoggedOut || m.want.Phase == v1alpha1.PhasePairingExpired {
		return time.Time{}
	}
	return m.want.RetryAfter.Time
}

// replaced stops for a login elsewhere: once for five minutes, then for good.
func (m *Machine) replaced(now time.Time) {
	m.want.Replacements++
	m.want.Failures, m.want.FailureReason = 0, ""
	m.retryAt, m.want.RetryAfter, m.want.RetryReason = time.Time{}, nil, ""
	if m.want.Replacements == 1 {
		m.retryAt = now.Add(replacedPause)
		m.want.RetryAfter = at(m.retryAt)
	}
	message := ReplacedMessage(m.want.Replacements)
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonReplaced, message)
	m.phase(v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, message, now)
}

// ban stops until the ban is over, and returns what is to be said of it. A
// deleted session stops as well: its logout would be an attempt.
func (m *Machine) ban(e Event, now time.Time) string {
	m.resetFailures()
	m.retryAt, m.want.RetryReason = time.Time{}, v1alpha1.ReasonBanned
	if e.Until.IsZero() {
		return e.Message + ": WhatsApp did not say until when; change the annotation " + v1alpha1.RestartedAtAnnotation + " to try"
	}
	until := e.Until
	if latest := now.Add(banMost); until.After(latest) {
		until = latest
	}
	// Rounded up: not one attempt before, by whichever clock.
	m.want.RetryAfter = at(roundUp(until.Add(banMargin)))
	m.retryAt = m.want.RetryAfter.Time
	return e.Message + ": no attempt is made before " + m.want.RetryAfter.UTC().Format(time.RFC3339)
}

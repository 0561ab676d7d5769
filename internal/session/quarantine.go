package session

import (
	"cmp"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// Quarantine configures after how many failures in a row the next attempt is made only
// after hours: attempts in a loop make WhatsApp lock an account for longer.
type Quarantine struct {
	// After is how many failures in a row, without a stable connection between them, lead to
	// a quarantine.
	After int
	// First is the first pause. Each further failure doubles it, up to Most. Half of each
	// pause is random.
	First, Most time.Duration
}

// The defaults of Quarantine.
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

// pause is how long a session rests after that many failures; random is from 0 to 1.
func (q Quarantine) pause(failures int, random float64) time.Duration {
	pause := backoff.Backoff{First: q.First, Most: q.Most}.After(failures - q.After + 1)
	return backoff.HalfJitter(pause, random)
}

const (
	// banMargin is added to the end of a ban, because the clock of the next holder may be
	// ahead.
	banMargin = 30 * time.Second
	// commonAfter times Quarantine.After is the number of failures after which the pauses
	// become longer while most sessions fail.
	commonAfter = 4
	// commonPause is the longest pause while most sessions fail. With attempts an hour apart
	// the sessions would be connected again only long after the outage.
	commonPause = 15 * time.Minute
	// assessmentDelay is how long after a failure a session is assessed. By then it is known
	// whether other sessions have failed for the same cause: one of them is always the first.
	assessmentDelay = commonMoment / 2
)

// countFailure counts the end of a connection that WhatsApp had accepted and that had
// not become stable. It reports whether the session returns to quarantine at once,
// because it was in it before. Other sessions are assessed a little later (assess).
// Attempts that did not reach WhatsApp do not count: they prolong no lock, and an outage
// of the network for five minutes must not cost hours.
//
// Only failures for the same reason are counted together. An end without a reason
// (EndSocketClosed) counts as any reason, because the last node of a connection, which
// names the reason, can be lost. A session that was in quarantine returns to it after a
// failure for any reason.
func (m *Machine) countFailure(e Event, now time.Time) (inQuarantine bool) {
	s := &m.want
	inQuarantine = s.Failures > 0 && s.RetryAfter != nil
	unexplained := e.Reason == EndSocketClosed
	m.fleet.Failed(m.obj.UID, now)
	common := m.fleet.Common(now)
	switch {
	case s.Failures == 0, !inQuarantine && !unexplained && s.FailureReason != e.Reason && s.FailureReason != EndSocketClosed:
		s.Failures, s.FailureReason = 1, e.Reason
		s.RetryAfter, s.RetryReason = nil, ""
	case common: // most sessions fail, so the cause is not this session
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

// assess decides whether a session that has failed often enough goes into quarantine.
// It does not if most sessions have failed meanwhile. A session that has returned to
// quarantine then rests for a common failure, not for hours.
func (m *Machine) assess(now time.Time) {
	m.assessAt = time.Time{}
	common, inQuarantine := m.fleet.Common(now), m.want.RetryAfter != nil
	switch {
	case !m.taken || m.logoutWanted() || status.Resting(m.want.Phase):
		return
	case common:
		m.want.Failures--
	}
	if common == inQuarantine { // otherwise it is tried soon, or is in quarantine already
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
	m.pausePairing()
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonQuarantined, QuarantineMessage(m.want), now)
	if entered {
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonQuarantined, m.message)
	}
}

// slowDown makes the pauses longer if most sessions have been failing for long.
func (m *Machine) slowDown(now time.Time) {
	if m.attempts > commonAfter*m.quarantine.After && m.fleet.Common(now) {
		m.retryAt = now.Add(backoff.HalfJitter(min(commonPause, m.quarantine.First), m.random()))
	}
}

// resumeSoon makes the next attempt earlier, because another session with the same
// failure is stable again. The attempts of the sessions are spread at random.
func (m *Machine) resumeSoon(now time.Time) {
	if !m.assessAt.IsZero() { // the failure was common to most sessions
		m.assessAt = time.Time{}
		m.want.Failures--
	}
	soon := now.Add(backoff.FullJitter(backoffMax, m.random()))
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

// resetFailures resets the counters: the session is stable, or a person has restarted
// it.
func (m *Machine) resetFailures() {
	m.attempts, m.want.Failures, m.want.FailureReason, m.want.Replacements = 0, 0, "", 0
	m.want.RetryAfter, m.want.RetryReason = nil, ""
	m.assessAt = time.Time{}
}

// restoreRest reports whether the session rests, and restores the phase of the rest from
// the other fields of the status. The phase may have been overwritten since the last
// holder (by the loss of its worker, or by a suspension); those fields were not.
func (m *Machine) restoreRest(now time.Time) bool {
	s := &m.want
	if s.Phase == v1alpha1.PhaseReplaced && s.Replacements == 0 { // written by a version that did not count replacements
		s.Replacements, s.Failures = max(s.Failures, 1), 0
	}
	if s.RetryReason == v1alpha1.ReasonPairingCodeRefused && m.dialSpec().PairPhone == "" { // the spec no longer asks for a pairing code
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

// shortRest is the longest rest for which a session waits for a login token before it is
// claimed.
const shortRest = time.Minute

// restsLong reports whether no attempt is made soon, so that the session is claimed
// without a login token.
func (m *Machine) restsLong(now time.Time) bool {
	if m.logoutWanted() || restartWanted(m.obj, m.want) {
		return false
	}
	_, rests := Rest(m.want, now)
	until := m.restUntil()
	return (rests || status.Resting(m.want.Phase)) && (until.IsZero() || until.After(now.Add(shortRest)))
}

// restUntil is when a rest ends; zero: only when a person acts.
func (m *Machine) restUntil() time.Time {
	if m.want.RetryAfter == nil || m.want.Phase == v1alpha1.PhaseLoggedOut || m.want.Phase == v1alpha1.PhasePairingExpired {
		return time.Time{}
	}
	return m.want.RetryAfter.Time
}

// onReplaced stops attempts after another login: the first time for five minutes, then
// until a person acts.
func (m *Machine) onReplaced(now time.Time) {
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

// onBanned stops attempts until the ban ends, and returns the message. That includes the
// logout of a deleted session.
func (m *Machine) onBanned(e Event, now time.Time) string {
	m.resetFailures()
	m.pausePairing()
	m.retryAt, m.want.RetryReason = time.Time{}, v1alpha1.ReasonBanned
	if e.Until.IsZero() {
		return e.Message + ": WhatsApp did not say until when; change the annotation " + v1alpha1.RestartedAtAnnotation + " to try"
	}
	until := e.Until
	if latest := now.Add(banMax); until.After(latest) {
		until = latest
	}
	// Rounded up, so that no holder makes an attempt before the end, whatever its clock says.
	m.want.RetryAfter = at(roundUp(until.Add(banMargin)))
	m.retryAt = m.want.RetryAfter.Time
	return e.Message + ": no attempt is made before " + m.want.RetryAfter.UTC().Format(time.RFC3339)
}

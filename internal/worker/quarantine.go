package worker

import (
	"cmp"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

// Quarantine says when a session that fails again and again is left alone, and
// for how long: attempts in a loop prolong WhatsApp's locks.
type Quarantine struct {
	// After is how many failures in a row, without a stable minute, are enough.
	After int
	// First is the pause then; each further failure doubles it, up to Most. Half of it is by chance.
	First, Most time.Duration
}

// The quarantine where nothing else is configured.
const (
	DefaultQuarantineAfter = 8
	DefaultQuarantineFirst = time.Hour
	DefaultQuarantineMost  = 6 * time.Hour
)

func (q Quarantine) orDefault() Quarantine {
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
	// commonPatience multiplies the failures that are needed while the trouble is common.
	commonPatience = 4
	// commonWithin is how long a session counts as failing for it.
	commonWithin = 5 * time.Minute
	// commonLeast is the least number of failing sessions that make a trouble common.
	commonLeast = 5
)

// troubles tells one session's trouble from everybody's. A few bad minutes of
// WhatsApp or of the network fail all sessions in the same way: if each were
// then left alone for hours, the cure would be the outage.
type troubles struct{ failed map[types.UID]time.Time }

func (t *troubles) note(uid types.UID, now time.Time) {
	if t.failed == nil {
		t.failed = map[types.UID]time.Time{}
	}
	t.failed[uid] = now
}

// common reports whether at least half of so many sessions have failed lately.
func (t *troubles) common(sessions int, now time.Time) bool {
	for uid, when := range t.failed {
		if now.Sub(when) > commonWithin {
			delete(t.failed, uid)
		}
	}
	return len(t.failed) >= commonLeast && 2*len(t.failed) >= sessions
}

// counted takes note of the end of a connection that WhatsApp had accepted and
// that had no stable minute, and reports whether the session is to be left alone.
// What never reached WhatsApp does not count: it prolongs no lock, and a network
// that is away for five minutes must not cost hours.
//
// In the same way means for the same reason. An end that nobody explained may be
// any: the last node of a connection, which names the reason, can be lost. Once
// in quarantine, whatever fails goes on with it.
func (m *model) counted(e whatsapp.Event, now time.Time) (enough bool) {
	s := &m.want
	inQuarantine := s.Failures > 0 && s.RetryAfter != nil
	unexplained := e.Reason == whatsapp.ReasonSocketClosed
	switch {
	case s.Failures == 0, !inQuarantine && !unexplained && s.FailureReason != e.Reason && s.FailureReason != whatsapp.ReasonSocketClosed:
		s.Failures, s.FailureReason, s.RetryAfter = 1, e.Reason, nil
	default:
		s.Failures++
		if !unexplained {
			s.FailureReason = e.Reason
		}
	}
	m.around.failed(m.obj.UID, now)
	needed := m.quarantine.After
	if !inQuarantine && m.around.common(now) {
		needed *= commonPatience
	}
	return inQuarantine || int(s.Failures) >= needed
}

// leaveAlone puts the session into quarantine, or back into it.
func (m *model) leaveAlone(now time.Time) {
	entered := m.want.RetryAfter == nil
	m.want.RetryAfter = at(now.Add(m.quarantine.pause(int(m.want.Failures), m.random())))
	m.retryAt = m.want.RetryAfter.Time
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonQuarantined, status.QuarantineMessage(m.want), now)
	if entered {
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonQuarantined, m.message)
	}
}

// uncount forgets the failures: the session has had its minute, or a person begins anew.
func (m *model) uncount() {
	m.attempts, m.want.Failures, m.want.FailureReason, m.want.Replacements, m.want.RetryAfter = 0, 0, "", 0, nil
}

// waits: status.retryAfter is still to come.
func (m *model) waits(now time.Time) bool {
	return m.want.RetryAfter != nil && now.Before(m.want.RetryAfter.Time)
}

// banned: the ban is not over. A ban is the only wait without failures and replacements.
func (m *model) banned(now time.Time) bool {
	return m.waits(now) && (m.want.Phase == v1alpha1.PhaseBanned || m.want.Failures == 0 && m.want.Replacements == 0)
}

// recall reports whether the session rests, and says of it what the status
// knows: the phase may have been overwritten on the way here (by the loss of a
// worker, by a suspension), but what the next holder must know was not.
func (m *model) recall(now time.Time) bool {
	s := &m.want
	if s.Phase == v1alpha1.PhaseReplaced && s.Replacements == 0 { // as an older version wrote it
		s.Replacements, s.Failures = max(s.Failures, 1), 0
	}
	switch {
	case resting[s.Phase]:
	case status.Quarantined(*s, now):
		s.Phase, m.reason, m.message = v1alpha1.PhaseDisconnected, v1alpha1.ReasonQuarantined, status.QuarantineMessage(*s)
	case s.Replacements > 1, m.waits(now) && s.Replacements > 0:
		s.Phase, m.reason, m.message = v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, replacedMessage(s.Replacements)
	case m.waits(now):
		s.Phase, m.reason = v1alpha1.PhaseBanned, v1alpha1.ReasonBanned
		m.message = "WhatsApp banned the account for a time: no attempt is made before " + s.RetryAfter.UTC().Format(time.RFC3339)
	default:
		return false
	}
	return true
}

// restUntil is when a session that rests is tried again; zero: never by itself.
func (m *model) restUntil() time.Time {
	if m.want.RetryAfter == nil || m.want.Phase == v1alpha1.PhaseLoggedOut || m.want.Phase == v1alpha1.PhasePairingExpired {
		return time.Time{}
	}
	return m.want.RetryAfter.Time
}

func replacedMessage(replacements int32) string {
	if replacements == 1 {
		return "another program logged in with the keys of this device: stop it; the session is tried once more after 5 minutes"
	}
	return "another program logged in with the keys of this device: stop it; then change the annotation " + v1alpha1.RestartedAtAnnotation
}

// replaced stops for a login elsewhere: once for five minutes, then for good.
func (m *model) replaced(now time.Time) {
	m.want.Replacements++
	m.want.Failures, m.want.FailureReason = 0, ""
	m.retryAt, m.want.RetryAfter = time.Time{}, nil
	if m.want.Replacements == 1 {
		m.retryAt = now.Add(replacedPause)
		m.want.RetryAfter = at(m.retryAt)
	}
	message := replacedMessage(m.want.Replacements)
	m.tell(corev1.EventTypeWarning, v1alpha1.ReasonReplaced, message)
	m.phase(v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, message, now)
}

// ban stops until the ban is over, and returns what is to be said of it. A
// deleted session stops as well: its logout would be an attempt.
func (m *model) ban(e whatsapp.Event) string {
	m.uncount()
	m.retryAt = time.Time{}
	if e.Until.IsZero() {
		return e.Message + ": WhatsApp did not say until when; change the annotation " + v1alpha1.RestartedAtAnnotation + " to try"
	}
	// Rounded up: not one attempt before, by whichever clock.
	m.want.RetryAfter = at(e.Until.Add(banMargin + time.Second - time.Nanosecond))
	m.retryAt = m.want.RetryAfter.Time
	return e.Message + ": no attempt is made before " + m.want.RetryAfter.UTC().Format(time.RFC3339)
}

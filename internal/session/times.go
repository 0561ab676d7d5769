package session

import (
	"cmp"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// The times in an object were written by other machines, whose clocks may be ahead, or
// by a person. A time that is further in the future than its rule allows is replaced by
// the latest time allowed, so that a wrong clock disables nothing for long.

// LogoutTimeout is how long the logout of a deleted session is tried. A process that
// learns of the deletion late tries it for minLogout at least.
const (
	LogoutTimeout = 5 * time.Minute
	minLogout     = time.Minute
)

// banMax is the longest ban that is accepted. WhatsApp's bans last hours or days.
const banMax = 30 * 24 * time.Hour

// DeletionDeadline is when the logout of a deleted session is given up; zero: the
// session is not deleted. seen is when this process first saw the deletion. A
// deletionTimestamp after seen is from a clock that is ahead, and counts as seen. One
// that is long past is from a clock that is behind, or from a time without a manager:
// the logout is still tried for minLogout, because without it the device stays linked.
func DeletionDeadline(obj *v1alpha1.WhatsAppSession, seen time.Time) time.Time {
	if obj.DeletionTimestamp.IsZero() {
		return time.Time{}
	}
	since := min(max(seen.Sub(obj.DeletionTimestamp.Time), 0), LogoutTimeout-minLogout)
	return seen.Add(LogoutTimeout - since) // monotonic, like seen: the clock may be set back meanwhile
}

// ClampTimes returns s with status.pairingDeadline and status.retryAfter no further in
// the future than their rules allow. Every writer of the status must call it, because
// only a written bound is a fixed one. longest is the longest quarantine; zero: it is
// not known, so only the holder bounds quarantines.
func ClampTimes(obj *v1alpha1.WhatsAppSession, s v1alpha1.WhatsAppSessionStatus, longest time.Duration, now time.Time) v1alpha1.WhatsAppSessionStatus {
	if latest := now.Add(pairingTimeout(obj)); s.PairingDeadline != nil && s.PairingDeadline.After(latest) {
		s.PairingDeadline = at(latest)
	}
	pause := maxRetryPause(s, longest, now)
	if latest := roundUp(now.Add(pause)); pause > 0 && s.RetryAfter != nil && s.RetryAfter.After(latest) {
		s.RetryAfter = at(latest)
	}
	return s
}

// boundTimes bounds the times of a session that this process holds. The API stores times of
// the clock on the wall, which may have been set back since they were written.
func (m *Machine) boundTimes(now time.Time) {
	if !m.held() || !m.taken {
		return
	}
	if m.settleAt.After(now.Add(settleAfter + settleInterval)) {
		m.settleAt = settleTime(now)
	}
	before := m.want.RetryAfter
	m.want = ClampTimes(m.obj, m.want, m.quarantine.Most, now)
	if before.Equal(m.want.RetryAfter) {
		return
	}
	if until := m.want.RetryAfter.Time; m.retryAt.After(until) {
		m.retryAt = until
	}
	if rest, rests := Rest(m.want, now); rests && rest.Reason == m.reason {
		m.message = rest.Message // it names the time
	}
}

// maxRetryPause is how far in the future status.retryAfter may be; zero: not known.
func maxRetryPause(s v1alpha1.WhatsAppSessionStatus, longest time.Duration, now time.Time) time.Duration {
	switch {
	case s.RetryReason == v1alpha1.ReasonPairingCodeRefused:
		return codeRefusedPause
	case Banned(s, now):
		return banMax + banMargin
	case Quarantined(s, now), endsItsWorker(s, now):
		return longest
	case s.Replacements > 0:
		return replacedPause
	default:
		return 0
	}
}

// pairingTimeout is how long codes are offered.
func pairingTimeout(obj *v1alpha1.WhatsAppSession) time.Duration {
	return cmp.Or(max(obj.Spec.Pairing.Timeout.Duration, 0), defaultPairingTimeout)
}

// roundUp rounds t up to whole seconds: the API stores no fractions of a second.
func roundUp(t time.Time) time.Time {
	return t.Add(time.Second - time.Nanosecond).Truncate(time.Second)
}

package session

import (
	"cmp"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// The times in an object were written by other machines, whose clocks may have
// been ahead, or by a person. What lies further in the future than its own rule
// allows is brought back to that, so that no wrong clock disables anything for long.

// LogoutTimeout is how long the logout of a deleted session is tried, and leastLogout for
// how long a process tries it that learns of the deletion only later.
const (
	LogoutTimeout = 5 * time.Minute
	leastLogout   = time.Minute
)

// banMost is the longest ban that is believed. WhatsApp's bans last hours or days.
const banMost = 30 * 24 * time.Hour

// DeletionDeadline is when the logout of a deleted session is given up. seen is
// when this process first saw the deletion: a deletionTimestamp after it is from a
// clock that is ahead, and counts as then. One that is long past is from a clock that
// is behind, or from a time in which no manager ran: the logout is tried for a minute
// all the same, because without it the device stays linked. The deadline is zero for a
// session that is not deleted.
func DeletionDeadline(obj *v1alpha1.WhatsAppSession, seen time.Time) time.Time {
	if obj.DeletionTimestamp.IsZero() {
		return time.Time{}
	}
	begun := obj.DeletionTimestamp.Time
	if begun.After(seen) {
		begun = seen
	}
	if earliest := seen.Add(leastLogout - LogoutTimeout); begun.Before(earliest) {
		begun = earliest
	}
	return begun.Add(LogoutTimeout)
}

// ClampTimes returns s with status.pairingDeadline and status.retryAfter no
// further in the future than their rules allow. It is for every writer of the
// status: only what is written down stays bounded. longest is the longest
// quarantine; zero: it is not known, and quarantines are left to the holder.
func ClampTimes(obj *v1alpha1.WhatsAppSession, s v1alpha1.WhatsAppSessionStatus, longest time.Duration, now time.Time) v1alpha1.WhatsAppSessionStatus {
	if latest := now.Add(pairingTimeout(obj)); s.PairingDeadline != nil && s.PairingDeadline.After(latest) {
		s.PairingDeadline = at(latest)
	}
	most := retryMost(s, longest, now)
	if latest := roundUp(now.Add(most)); most > 0 && s.RetryAfter != nil && s.RetryAfter.After(latest) {
		s.RetryAfter = at(latest)
	}
	return s
}

// retryMost is how far in the future status.retryAfter may be; zero: it is not known.
func retryMost(s v1alpha1.WhatsAppSessionStatus, longest time.Duration, now time.Time) time.Duration {
	switch {
	case s.RetryReason == v1alpha1.ReasonPairingCodeRefused:
		return codeRefusedPause
	case Banned(s, now):
		return banMost + banMargin
	case Quarantined(s, now), endsItsWorker(s, now):
		return longest
	case s.Replacements > 0:
		return replacedPause
	default:
		return 0
	}
}

// pairingTimeout is for how long codes are offered.
func pairingTimeout(obj *v1alpha1.WhatsAppSession) time.Duration {
	return cmp.Or(max(obj.Spec.Pairing.Timeout.Duration, 0), defaultPairingTimeout)
}

// roundUp is t in whole seconds, not before t: the API keeps no fractions.
func roundUp(t time.Time) time.Time {
	return t.Add(time.Second - time.Nanosecond).Truncate(time.Second)
}

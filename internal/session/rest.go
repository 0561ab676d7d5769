package session

import (
	"fmt"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// Quarantined reports whether the session has failed so often that it is left
// alone until status.retryAfter. Of all that set retryAfter, only a quarantine
// has failures beside it.
func Quarantined(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	return s.RetryReason == "" && s.Failures > 0 && waits(s, now)
}

// waits: status.retryAfter is still to come.
func waits(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	return s.RetryAfter != nil && now.Before(s.RetryAfter.Time)
}

// Banned reports whether WhatsApp's ban is not over yet. One without an end is
// over when a person says so.
func Banned(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	switch s.RetryReason {
	case v1alpha1.ReasonBanned:
		return s.RetryAfter == nil || waits(s, now)
	case "": // as a version without retryReason wrote it: the only wait that counts nothing
		return waits(s, now) && (s.Phase == v1alpha1.PhaseBanned || s.Failures == 0 && s.Replacements == 0)
	default:
		return false
	}
}

// endsItsWorker reports whether the session rests because workers died of it.
func endsItsWorker(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	return s.RetryReason == v1alpha1.ReasonEndsItsWorker && waits(s, now)
}

// Rest is what a session rests from, by all that its status remembers of it
// whatever became of its phase; rests is false where an attempt may be made. The
// facts are a phase, its reason and its message.
func Rest(s v1alpha1.WhatsAppSessionStatus, now time.Time) (f status.Facts, rests bool) {
	again := ": change the annotation " + v1alpha1.RestartedAtAnnotation + " "
	switch {
	case s.RetryReason == v1alpha1.ReasonLoggedOut:
		return status.Facts{Phase: v1alpha1.PhaseLoggedOut, Reason: s.RetryReason, Message: "the device was unlinked" + again + "and scan again"}, true
	case s.RetryReason == v1alpha1.ReasonWrongPhone:
		return status.Facts{Phase: v1alpha1.PhaseLoggedOut, Reason: s.RetryReason, Message: "a phone was linked that spec.pairing.phoneNumber does not allow, and has been logged out" + again + "and scan with the right phone"}, true
	case s.RetryReason == v1alpha1.ReasonPairingExpired:
		return status.Facts{Phase: v1alpha1.PhasePairingExpired, Reason: s.RetryReason, Message: "no phone was linked in time" + again + "to offer codes again"}, true
	case s.RetryReason == v1alpha1.ReasonPairingCodeRefused && waits(s, now):
		return status.Facts{Phase: v1alpha1.PhasePairing, Reason: s.RetryReason, Message: "WhatsApp gave no pairing code: it is asked again at " + s.RetryAfter.UTC().Format(time.RFC3339)}, true
	case endsItsWorker(s, now):
		return status.Facts{Phase: v1alpha1.PhaseFailed, Reason: s.RetryReason, Message: EndsItsWorkerMessage(s), Stalled: true}, true
	case Quarantined(s, now):
		return status.Facts{Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonQuarantined, Message: QuarantineMessage(s), Stalled: true}, true
	case s.RetryReason == "" && (s.Replacements > 1 || s.Replacements > 0 && waits(s, now)):
		return status.Facts{Phase: v1alpha1.PhaseReplaced, Reason: v1alpha1.ReasonReplaced, Message: ReplacedMessage(s.Replacements)}, true
	case Banned(s, now) && s.RetryAfter == nil:
		return status.Facts{Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned, Message: "WhatsApp banned the account and did not say until when" + again + "to try"}, true
	case Banned(s, now):
		return status.Facts{Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned, Message: "WhatsApp banned the account for a time: no attempt is made before " + s.RetryAfter.UTC().Format(time.RFC3339)}, true
	default:
		return status.Facts{}, false
	}
}

// Remember keeps what a phase alone says of a rest, so that the phase may be overwritten.
func Remember(s v1alpha1.WhatsAppSessionStatus) v1alpha1.WhatsAppSessionStatus {
	switch {
	case s.RetryReason != "":
	case s.Phase == v1alpha1.PhaseLoggedOut && status.Reason(s) == v1alpha1.ReasonWrongPhone:
		s.RetryReason = v1alpha1.ReasonWrongPhone
	case s.Phase == v1alpha1.PhaseLoggedOut, s.Phase == v1alpha1.PhasePairingExpired, s.Phase == v1alpha1.PhaseBanned:
		s.RetryReason = string(s.Phase) // which are reasons, too
	}
	return s
}

// Suspend is what a suspension makes of the status of a session that nobody
// holds any more: its time does not count against the pairing, and who suspends
// and resumes has looked for the other login.
func Suspend(s v1alpha1.WhatsAppSessionStatus) v1alpha1.WhatsAppSessionStatus {
	s = Remember(s)
	s.PairingDeadline = nil
	if s.Phase == v1alpha1.PhaseReplaced {
		s.RetryAfter, s.Replacements = nil, min(s.Replacements, 1)
	}
	return s
}

// RestartBannedMessage says why a restart makes no attempt.
func RestartBannedMessage(s v1alpha1.WhatsAppSessionStatus) string {
	return "restartedAt changed, but WhatsApp bans the account until " + s.RetryAfter.UTC().Format(time.RFC3339) + ": no attempt is made before"
}

// ReplacedMessage says what to do about so many logins elsewhere.
func ReplacedMessage(replacements int32) string {
	if replacements <= 1 {
		return "another program logged in with the keys of this device: stop it; the session is tried once more after 5 minutes"
	}
	return "another program logged in with the keys of this device: stop it; then change the annotation " + v1alpha1.RestartedAtAnnotation
}

// QuarantineMessage says why a session is in quarantine, and what to do.
func QuarantineMessage(s v1alpha1.WhatsAppSessionStatus) string {
	return fmt.Sprintf("%d connections in a row ended in the same way (%s) within a minute: the next attempt is made at %s; find the cause, then change the annotation %s to try at once",
		s.Failures, s.FailureReason, s.RetryAfter.UTC().Format(time.RFC3339), v1alpha1.RestartedAtAnnotation)
}

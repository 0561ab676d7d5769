package session

import (
	"fmt"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// Quarantined reports whether the session has failed so often that no attempt is made
// before status.retryAfter. Nothing else sets both retryAfter and failures.
func Quarantined(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	return s.RetryReason == "" && s.Failures > 0 && waits(s, now)
}

// waits reports whether status.retryAfter is in the future.
func waits(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	return s.RetryAfter != nil && now.Before(s.RetryAfter.Time)
}

// Banned reports whether the account is banned by WhatsApp. A ban without an end is over
// when a person restarts the session.
func Banned(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	switch s.RetryReason {
	case v1alpha1.ReasonBanned:
		return s.RetryAfter == nil || waits(s, now)
	case "": // written by a version without retryReason: the only wait without any counter
		return waits(s, now) && (s.Phase == v1alpha1.PhaseBanned || s.Failures == 0 && s.Replacements == 0)
	default:
		return false
	}
}

// endsItsWorker reports whether the session rests because it ended workers.
func endsItsWorker(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	return s.RetryReason == v1alpha1.ReasonEndsItsWorker && waits(s, now)
}

// Rest reports whether the session must rest: whether no attempt may be made. It reads
// only those fields of the status that survive a change of the phase. The facts are the
// phase of the rest, its reason and its message.
func Rest(s v1alpha1.WhatsAppSessionStatus, now time.Time) (f status.Facts, rests bool) {
	restart := ": change the annotation " + v1alpha1.RestartedAtAnnotation + " "
	switch {
	case s.RetryReason == v1alpha1.ReasonLoggedOut:
		return status.Facts{Phase: v1alpha1.PhaseLoggedOut, Reason: s.RetryReason, Message: "the device was unlinked" + restart + "and scan again"}, true
	case s.RetryReason == v1alpha1.ReasonWrongPhone:
		return status.Facts{Phase: v1alpha1.PhaseLoggedOut, Reason: s.RetryReason, Message: "a phone was linked that spec.pairing.phoneNumber does not allow, and has been logged out" + restart + "and scan with the right phone"}, true
	case s.RetryReason == v1alpha1.ReasonPairingExpired:
		return status.Facts{Phase: v1alpha1.PhasePairingExpired, Reason: s.RetryReason, Message: "no phone was linked in time" + restart + "to offer codes again"}, true
	case s.RetryReason == v1alpha1.ReasonPairingCodeRefused && waits(s, now):
		return status.Facts{Phase: v1alpha1.PhasePairing, Reason: s.RetryReason, Message: "WhatsApp gave no pairing code: it is asked again at " + s.RetryAfter.UTC().Format(time.RFC3339)}, true
	case endsItsWorker(s, now):
		return status.Facts{Phase: v1alpha1.PhaseFailed, Reason: s.RetryReason, Message: EndsItsWorkerMessage(s), Stalled: true}, true
	case Quarantined(s, now):
		return status.Facts{Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonQuarantined, Message: QuarantineMessage(s), Stalled: true}, true
	case s.RetryReason == "" && (s.Replacements > 1 || s.Replacements > 0 && waits(s, now)):
		return status.Facts{Phase: v1alpha1.PhaseReplaced, Reason: v1alpha1.ReasonReplaced, Message: ReplacedMessage(s.Replacements)}, true
	case Banned(s, now) && s.RetryAfter == nil:
		return status.Facts{Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned, Message: "WhatsApp banned the account and did not say until when" + restart + "to try"}, true
	case Banned(s, now):
		return status.Facts{Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned, Message: "WhatsApp banned the account for a time: no attempt is made before " + s.RetryAfter.UTC().Format(time.RFC3339)}, true
	default:
		return status.Facts{}, false
	}
}

// keepRest sets status.retryReason from the phase, so that the rest is still known when
// the phase is overwritten.
func keepRest(s v1alpha1.WhatsAppSessionStatus) v1alpha1.WhatsAppSessionStatus {
	switch {
	case s.RetryReason != "":
	case s.Phase == v1alpha1.PhaseLoggedOut && status.Reason(s) == v1alpha1.ReasonWrongPhone:
		s.RetryReason = v1alpha1.ReasonWrongPhone
	case s.Phase == v1alpha1.PhaseLoggedOut, s.Phase == v1alpha1.PhasePairingExpired, s.Phase == v1alpha1.PhaseBanned:
		s.RetryReason = string(s.Phase) // these phases are also reasons
	}
	return s
}

// Suspend returns the status of a suspended session that no worker holds any more. The
// time of the suspension does not count for the pairing deadline. After Replaced, a
// person who suspends and resumes has presumably stopped the other login, so one more
// attempt is made.
func Suspend(s v1alpha1.WhatsAppSessionStatus) v1alpha1.WhatsAppSessionStatus {
	s = keepRest(s)
	s.PairingDeadline = nil
	if s.Phase == v1alpha1.PhaseReplaced {
		s.RetryAfter, s.Replacements = nil, min(s.Replacements, 1)
	}
	return s
}

// RestartBannedMessage says why no attempt is made after a restart.
func RestartBannedMessage(s v1alpha1.WhatsAppSessionStatus) string {
	return "restartedAt changed, but WhatsApp bans the account until " + s.RetryAfter.UTC().Format(time.RFC3339) + ": no attempt is made before"
}

// ReplacedMessage says what to do after that many replacements by another login.
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

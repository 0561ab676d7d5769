// Package status computes what a WhatsAppSession says of itself. The manager
// and the workers share it: whoever writes a status writes what Summarize
// returns, so the conditions of a phase are the same whoever was the writer.
// It is pure: facts in, status out.
package status

import (
	"cmp"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// maxMessage bounds a condition's message, in bytes.
const maxMessage = 512

// Facts are what a writer knows of a session beside the plain fields of its status.
type Facts struct {
	// Generation of the spec that the facts answer.
	Generation int64
	// Phase is the state in one word.
	Phase v1alpha1.Phase
	// Reason and Message explain the phase; they become those of Ready.
	Reason, Message string
	// NotPlaced is why the session has no worker; empty: it waits for the manager.
	// It counts only while status.worker is empty. NotPlacedMessage explains it where
	// Message explains something else.
	NotPlaced, NotPlacedMessage string
	// Stalled is set where a phase that usually goes on by itself does not:
	// a quarantine, an id that another session holds.
	Stalled bool
}

// stalled are the phases that a person (or, for Banned and Replaced, time) must end.
var stalled = map[v1alpha1.Phase]bool{
	v1alpha1.PhasePairingExpired: true,
	v1alpha1.PhaseLoggedOut:      true,
	v1alpha1.PhaseBanned:         true,
	v1alpha1.PhaseOutdated:       true,
	v1alpha1.PhaseReplaced:       true,
	v1alpha1.PhaseFailed:         true,
}

// Summarize returns s with phase, observedGeneration and every condition set
// from the facts; s carries the plain fields (worker, jid, qr, ...) as they are
// to be written. A condition that does not change keeps its transition time.
// now is in whole seconds in the result, as the API stores it.
//
// A suspended session has no Ready condition: it is as its spec wants it, and
// kstatus (Flux, Argo CD) takes Ready=False for "still in progress" for ever.
func Summarize(s v1alpha1.WhatsAppSessionStatus, f Facts, now time.Time) v1alpha1.WhatsAppSessionStatus {
	s = *s.DeepCopy()
	s.Phase = f.Phase
	s.ObservedGeneration = f.Generation
	isStalled := f.Stalled || stalled[f.Phase]
	isConnected := f.Phase == v1alpha1.PhaseConnected
	isSuspended := f.Phase == v1alpha1.PhaseSuspended
	message := Clean(f.Message, maxMessage)

	set := func(kind string, yes bool, reason, message string) {
		status := metav1.ConditionFalse
		if yes {
			status = metav1.ConditionTrue
		}
		meta.SetStatusCondition(&s.Conditions, metav1.Condition{
			Type: kind, Status: status, Reason: reason, Message: message,
			ObservedGeneration: f.Generation, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
		})
	}

	if isSuspended {
		meta.RemoveStatusCondition(&s.Conditions, v1alpha1.ConditionReady)
	} else {
		set(v1alpha1.ConditionReady, isConnected, f.Reason, message)
	}

	switch {
	case s.Worker != "":
		set(v1alpha1.ConditionPlaced, true, v1alpha1.ReasonPlaced, "placed on "+s.Worker)
	case f.NotPlaced != "":
		set(v1alpha1.ConditionPlaced, false, f.NotPlaced, cmp.Or(Clean(f.NotPlacedMessage, maxMessage), message))
	case isSuspended, f.Phase == v1alpha1.PhaseTerminating:
		set(v1alpha1.ConditionPlaced, false, f.Reason, message)
	default:
		set(v1alpha1.ConditionPlaced, false, v1alpha1.ReasonWaitingForPlacement, "no worker has been chosen yet")
	}

	switch {
	case s.JID != "":
		set(v1alpha1.ConditionPaired, true, v1alpha1.ReasonPaired, "linked to "+s.PhoneNumber)
	case f.Phase == v1alpha1.PhasePairing, f.Phase == v1alpha1.PhasePairingExpired, f.Phase == v1alpha1.PhaseLoggedOut:
		set(v1alpha1.ConditionPaired, false, f.Reason, message)
	default:
		set(v1alpha1.ConditionPaired, false, v1alpha1.ReasonNotPaired, "no phone has linked the device yet")
	}

	set(v1alpha1.ConditionConnected, isConnected, f.Reason, message)

	switch {
	case isStalled:
		set(v1alpha1.ConditionReconciling, false, f.Reason, message)
		set(v1alpha1.ConditionStalled, true, f.Reason, message)
	case isConnected, isSuspended:
		set(v1alpha1.ConditionReconciling, false, v1alpha1.ReasonSucceeded, "")
		set(v1alpha1.ConditionStalled, false, v1alpha1.ReasonSucceeded, "")
	default:
		set(v1alpha1.ConditionReconciling, true, f.Reason, message)
		set(v1alpha1.ConditionStalled, false, v1alpha1.ReasonProgressing, "")
	}
	return s
}

// ForeignID is the status of a session whose id belongs to another: it says
// nothing of worker, epoch or account, because it has none.
func ForeignID(s v1alpha1.WhatsAppSessionStatus, generation int64, now time.Time) v1alpha1.WhatsAppSessionStatus {
	return Summarize(v1alpha1.WhatsAppSessionStatus{Conditions: s.Conditions, Installation: s.Installation}, Facts{
		Generation: generation, Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonSessionIDTaken, Stalled: true,
		NotPlaced: v1alpha1.ReasonSessionIDTaken,
		Message:   "another session holds this session id: choose another spec.sessionID, or delete the session that holds it",
	}, now)
}

// Word maps a phase to Laravel's three words. A connection that drops is
// pending: Laravel must not take an echo of our trouble for its tenant's wish.
func Word(phase v1alpha1.Phase, isStalled bool) delivery.Word {
	switch phase {
	case v1alpha1.PhaseConnected:
		return delivery.Active
	case v1alpha1.PhaseSuspended, v1alpha1.PhaseTerminating:
		return delivery.Inactive
	default:
		if isStalled || stalled[phase] {
			return delivery.Inactive
		}
		return delivery.Pending
	}
}

// Update is the status as Laravel gets it. It is High when the connection was
// lost, when the session became active, and when it is inactive.
func Update(s v1alpha1.WhatsAppSessionStatus, n delivery.Numbers, occurredAt time.Time) delivery.StatusItem {
	word := Word(s.Phase, meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionStalled))
	priority := delivery.Normal
	if word != delivery.Pending || s.Phase == v1alpha1.PhaseDisconnected {
		priority = delivery.High
	}
	return delivery.StatusItem{
		SessionID: s.SessionID, Status: word, Phase: string(s.Phase), Reason: Reason(s), Priority: priority,
		JID: s.JID, PhoneNumber: s.PhoneNumber, OccurredAt: delivery.Time{Time: occurredAt}, Numbers: n,
	}
}

// Reason is why the session is in its phase.
func Reason(s v1alpha1.WhatsAppSessionStatus) string {
	if c := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionConnected); c != nil {
		return c.Reason
	}
	return ""
}

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

// Rest is what a session rests from, by all that its status remembers of it
// whatever became of its phase; rests is false where an attempt may be made. The
// facts are a phase, its reason and its message.
func Rest(s v1alpha1.WhatsAppSessionStatus, now time.Time) (f Facts, rests bool) {
	again := ": change the annotation " + v1alpha1.RestartedAtAnnotation + " "
	switch {
	case s.RetryReason == v1alpha1.ReasonLoggedOut:
		return Facts{Phase: v1alpha1.PhaseLoggedOut, Reason: s.RetryReason, Message: "the device was unlinked" + again + "and scan again"}, true
	case s.RetryReason == v1alpha1.ReasonWrongPhone:
		return Facts{Phase: v1alpha1.PhaseLoggedOut, Reason: s.RetryReason, Message: "a phone was linked that spec.pairing.phoneNumber does not allow, and has been logged out" + again + "and scan with the right phone"}, true
	case s.RetryReason == v1alpha1.ReasonPairingExpired:
		return Facts{Phase: v1alpha1.PhasePairingExpired, Reason: s.RetryReason, Message: "no phone was linked in time" + again + "to offer codes again"}, true
	case s.RetryReason == v1alpha1.ReasonPairingCodeRefused && waits(s, now):
		return Facts{Phase: v1alpha1.PhasePairing, Reason: s.RetryReason, Message: "WhatsApp gave no pairing code: it is asked again at " + s.RetryAfter.UTC().Format(time.RFC3339)}, true
	case Quarantined(s, now):
		return Facts{Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonQuarantined, Message: QuarantineMessage(s), Stalled: true}, true
	case s.RetryReason == "" && (s.Replacements > 1 || s.Replacements > 0 && waits(s, now)):
		return Facts{Phase: v1alpha1.PhaseReplaced, Reason: v1alpha1.ReasonReplaced, Message: ReplacedMessage(s.Replacements)}, true
	case Banned(s, now) && s.RetryAfter == nil:
		return Facts{Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned, Message: "WhatsApp banned the account and did not say until when" + again + "to try"}, true
	case Banned(s, now):
		return Facts{Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned, Message: "WhatsApp banned the account for a time: no attempt is made before " + s.RetryAfter.UTC().Format(time.RFC3339)}, true
	default:
		return Facts{}, false
	}
}

// Remember keeps what a phase alone says of a rest, so that the phase may be overwritten.
func Remember(s v1alpha1.WhatsAppSessionStatus) v1alpha1.WhatsAppSessionStatus {
	switch {
	case s.RetryReason != "":
	case s.Phase == v1alpha1.PhaseLoggedOut && Reason(s) == v1alpha1.ReasonWrongPhone:
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

// Clean makes text from outside fit for a status, an Event or a terminal: no
// control or formatting characters, valid UTF-8, at most limit bytes.
func Clean(text string, limit int) string {
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == utf8.RuneError:
			return -1
		}
		return r
	}, text)
	if len(text) <= limit {
		return text
	}
	for cut := limit; ; cut-- {
		if utf8.RuneStart(text[cut]) {
			return text[:cut]
		}
	}
}

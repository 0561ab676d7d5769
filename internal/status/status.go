// Package status computes what a WhatsAppSession says of itself. The manager
// and the workers share it: whoever writes a status writes what Summarize
// returns, so the conditions of a phase are the same whoever was the writer.
// It is pure: facts in, status out.
package status

import (
	"cmp"
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
	isStalled := f.Stalled || stalled(f.Phase)
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
		Message:   "another session holds this session id (upper and lower case make no difference): choose another spec.sessionID, or delete the session that holds it",
	}, now)
}

// Word maps a phase to Laravel's three words. A connection that drops is
// pending: Laravel must not take an echo of our trouble for its tenant's wish.
func Word(phase v1alpha1.Phase, isStalled bool) delivery.Status {
	switch phase {
	case v1alpha1.PhaseConnected:
		return delivery.Active
	case v1alpha1.PhaseSuspended, v1alpha1.PhaseTerminating:
		return delivery.Inactive
	default:
		if isStalled || stalled(phase) {
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

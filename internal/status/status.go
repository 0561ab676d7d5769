// Package status computes the status of a WhatsAppSession from facts. The manager and
// the workers both write what Summarize returns, so the conditions of a phase do not
// depend on the writer. It is pure: facts in, status out.
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

// Facts is what a writer knows about a session, apart from the plain fields of its status.
type Facts struct {
	// Generation is that of the spec which the facts take into account.
	Generation int64
	// Phase is the phase to write.
	Phase v1alpha1.Phase
	// Reason and Message explain the phase. They become those of the condition Ready.
	Reason, Message string
	// NotPlaced is why the session has no worker; empty: the manager has not decided yet.
	// It is used only while status.worker is empty. NotPlacedMessage explains it; empty:
	// Message does.
	NotPlaced, NotPlacedMessage string
	// Stalled is set when a phase that usually ends without a person does not: in a
	// quarantine, or while another session has the session's id.
	Stalled bool
}

// Summarize returns s with phase, observedGeneration and all conditions set from the
// facts; the caller has set the plain fields (worker, jid, qr, ...). A condition that
// does not change keeps its transition time. Times in the result are whole seconds, as
// the API stores them.
//
// A suspended session has no Ready condition: it is in the state that its spec asks
// for, and kstatus (Flux, Argo CD) would read Ready=False as "in progress" forever.
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
		set(v1alpha1.ConditionPaired, true, v1alpha1.ReasonPaired, "linked to "+cmp.Or(s.PhoneNumber, s.JID))
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

// ForeignID is the status of a session whose id belongs to another session. It has no
// worker, epoch or account.
func ForeignID(s v1alpha1.WhatsAppSessionStatus, generation int64, now time.Time) v1alpha1.WhatsAppSessionStatus {
	return Summarize(v1alpha1.WhatsAppSessionStatus{Conditions: s.Conditions, Installation: s.Installation}, Facts{
		Generation: generation, Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonSessionIDTaken, Stalled: true,
		NotPlaced: v1alpha1.ReasonSessionIDTaken,
		Message:   "another session holds this session id (upper and lower case make no difference): choose another spec.sessionID, or delete the session that holds it",
	}, now)
}

// laravelStatus maps a phase to one of Laravel's three statuses. A session whose
// connection was lost is pending, not inactive: Laravel must not take our failure for
// a decision of its tenant.
func laravelStatus(phase v1alpha1.Phase, isStalled bool) delivery.Status {
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

// Update returns the status as it is delivered to Laravel. Its priority is High when
// the session is active, inactive or has lost its connection.
func Update(s v1alpha1.WhatsAppSessionStatus, n delivery.Numbers, occurredAt time.Time) delivery.StatusItem {
	value := laravelStatus(s.Phase, meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionStalled))
	priority := delivery.Normal
	if value != delivery.Pending || s.Phase == v1alpha1.PhaseDisconnected {
		priority = delivery.High
	}
	return delivery.StatusItem{
		SessionID: s.SessionID, Status: value, Phase: string(s.Phase), Reason: Reason(s), Priority: priority,
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

package controllers

import (
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// maxReason bounds status.lastDisconnectReason.
const maxReason = 512

// unplaced is why a session has no worker; the zero value: it has one, or waits for one.
type unplaced struct{ reason, message string }

// unplacedReasons are the reasons that only a placement run sets and removes.
var unplacedReasons = map[string]bool{
	v1alpha1.ReasonNoCapacity:      true,
	v1alpha1.ReasonNoWorkers:       true,
	v1alpha1.ReasonTooManySessions: true,
}

// lastUnplaced is the result of the last placement run for the session.
func lastUnplaced(s *v1alpha1.WhatsAppSession) unplaced {
	placed := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionPlaced)
	if placed == nil || !unplacedReasons[placed.Reason] {
		return unplaced{}
	}
	return unplaced{reason: placed.Reason, message: placed.Message}
}

// unheldFacts computes the facts for the status of a session that no worker holds. next is
// the status that will be written, still without its new phase and conditions.
func unheldFacts(s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus, why unplaced, now time.Time) status.Facts {
	f := status.Facts{Generation: s.Generation, NotPlaced: why.reason, NotPlacedMessage: why.message}
	rest, rests := session.Rest(next, now)
	rests = rests && rest.Phase != v1alpha1.PhasePairing // only a holder offers codes
	switch {
	case !s.DeletionTimestamp.IsZero():
		f.Phase, f.Reason, f.Message = v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, "waiting for a worker to unlink the device"
	case s.Spec.Suspend:
		f.Phase, f.Reason, f.Message = v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, "spec.suspend is true: set it to false to connect"
		f.NotPlaced, f.NotPlacedMessage = "", ""
	case rests && (next.Phase == v1alpha1.PhaseSuspended || next.Worker == "" && !status.Kept(next.Phase)):
		f.Phase, f.Reason, f.Message, f.Stalled = rest.Phase, rest.Reason, rest.Message, rest.Stalled
	case status.Kept(next.Phase), next.Phase == v1alpha1.PhaseDisconnected && (next.Worker != "" || status.Reason(next) == v1alpha1.ReasonWorkerLost):
		f.Phase, f.Reason = next.Phase, status.Reason(next)
		f.Stalled = meta.IsStatusConditionTrue(next.Conditions, v1alpha1.ConditionStalled)
		if c := meta.FindStatusCondition(next.Conditions, v1alpha1.ConditionReady); c != nil {
			f.Message = c.Message
		}
	case next.Worker != "":
		f.Phase, f.Reason, f.Message = v1alpha1.PhasePending, v1alpha1.ReasonPlaced, "placed on "+next.Worker+", which connects it next"
	case why.reason != "":
		f.Phase, f.Reason, f.Message = v1alpha1.PhasePending, why.reason, why.message
	default:
		f.Phase, f.Reason, f.Message = v1alpha1.PhasePending, v1alpha1.ReasonWaitingForPlacement, "no worker has been chosen yet"
	}
	if f.Reason == "" { // the conditions of the phase were removed
		f.Reason = string(f.Phase)
	}
	return f
}

// unheldStatus is the status of a session that no worker holds and that is not being deleted.
func unheldStatus(s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus, now time.Time) v1alpha1.WhatsAppSessionStatus {
	next = session.ClampTimes(s, next, 0, now)
	if s.Spec.Suspend {
		next = session.Suspend(next)
	}
	return status.Summarize(next, unheldFacts(s, next, lastUnplaced(s), now), now)
}

// afterWorkerLoss returns next, the status of a session whose holder is dead, without that
// holder. A phase that waits for a person or a time does not change, nor does a quarantine.
func afterWorkerLoss(s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus, now time.Time) v1alpha1.WhatsAppSessionStatus {
	return afterHolderLoss(s, next, "worker "+next.HeldBy+" died while it held the session", now)
}

// afterHolderLoss does the same for any cause, which why names.
func afterHolderLoss(s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus, why string, now time.Time) v1alpha1.WhatsAppSessionStatus {
	next.HeldBy, next.HolderStart = "", ""
	next.HideCodes()
	if next.Phase == v1alpha1.PhaseConnected {
		next.LastDisconnectedTime = &metav1.Time{Time: now.Truncate(time.Second)}
		next.LastDisconnectReason = status.Clean(why, maxReason)
	}
	quarantined := next.Phase == v1alpha1.PhaseDisconnected && meta.IsStatusConditionTrue(next.Conditions, v1alpha1.ConditionStalled)
	if status.Kept(next.Phase) || next.Phase == v1alpha1.PhaseTerminating || quarantined {
		return next
	}
	return status.Summarize(next, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonWorkerLost, Message: why + ": it is placed on another worker and connects again",
	}, now)
}

// supersede raises the epoch of next, a status that the manager writes for a session that no
// worker holds, if its content is new, so that Redis and Laravel accept it as newer.
func supersede(s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus, now time.Time) v1alpha1.WhatsAppSessionStatus {
	before, after := status.Update(s.Status, delivery.Numbers{}, time.Time{}), status.Update(next, delivery.Numbers{}, time.Time{})
	if before == after || after.Reason == v1alpha1.ReasonWaitingForPlacement || next.Epoch > s.Status.Epoch {
		return next // nothing new, or only for a moment, or the epoch is higher already
	}
	next.Epoch = nextEpoch(s.Status, now)
	return next
}

// nextEpoch is the epoch of the next placement (docs/architecture.md, "Ownership"). It never
// exceeds the maximum. A session that has reached the maximum, by a wrong clock or a change
// by hand, keeps it.
func nextEpoch(s v1alpha1.WhatsAppSessionStatus, now time.Time) int64 {
	next := max(min(s.Epoch, v1alpha1.MaxEpoch)+1, min(s.StoredEpoch, v1alpha1.MaxEpoch)+1, now.Unix())
	return min(next, v1alpha1.MaxEpoch)
}

// epochBehind reports whether the store has refused the epoch of the present placement.
func epochBehind(s v1alpha1.WhatsAppSessionStatus) bool {
	return s.Worker != "" && s.StoredEpoch >= s.Epoch
}

// lacksProxySecret reports whether the holder of a deleted session cannot log it out because
// it cannot use the proxy's Secret. If the namespace is being deleted too, that Secret cannot
// be created any more.
func lacksProxySecret(s *v1alpha1.WhatsAppSession) bool {
	if s.Status.Phase != v1alpha1.PhaseTerminating {
		return false
	}
	switch status.Reason(s.Status) {
	case v1alpha1.ReasonProxySecretMissing, v1alpha1.ReasonProxySecretForbidden, v1alpha1.ReasonProxySecretInvalid:
		return true
	default:
		return false
	}
}

// wantsWorker reports whether the session needs a worker. A deleted session needs one to log
// out, for as long as d allows.
func wantsWorker(s *v1alpha1.WhatsAppSession, installation string, d deletion, now time.Time) bool {
	switch {
	case s.Status.SessionID == "" || s.Status.Installation != installation:
		return false
	case !s.DeletionTimestamp.IsZero():
		return s.Spec.DeletionPolicy != v1alpha1.DeletionRetain && s.Status.JID != "" &&
			!d.over(now) && !deletionDecided(s)
	default:
		return !s.Spec.Suspend
	}
}

// deletionDecided reports whether the manager has written the last status of a deleted session.
func deletionDecided(s *v1alpha1.WhatsAppSession) bool {
	reason := status.Reason(s.Status)
	return s.Status.Phase == v1alpha1.PhaseTerminating &&
		(reason == v1alpha1.ReasonDeleted || reason == v1alpha1.ReasonLogoutUnconfirmed)
}

// statusItem is what the manager publishes about a session. In its numbers the starts are 0
// (docs/architecture.md, "Ownership").
func statusItem(s *v1alpha1.WhatsAppSession) delivery.StatusItem {
	since := s.CreationTimestamp.Time
	for _, c := range s.Status.Conditions {
		if c.LastTransitionTime.After(since) {
			since = c.LastTransitionTime.Time
		}
	}
	item := status.Update(s.Status, delivery.Numbers{Epoch: s.Status.Epoch, Seq: delivery.FirstSeq(0) + 1}, since)
	item.Metadata = delivery.NewMetadata(s.Spec.Metadata)
	return item
}

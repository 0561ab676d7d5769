package controllers

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

// silence is a time in which a worker that holds sessions does not renew its Lease and cannot
// be declared dead.
type silence struct {
	// marked are the sessions whose condition Ready was set to Unknown because of it. Each is
	// marked once: if its holder lives and writes Ready again, that stays.
	marked map[types.UID]bool
	// notBefore is when a write that failed is tried again.
	notBefore time.Time
}

// markSilentHolders sets the condition Ready of a connected session to Unknown, reason
// WorkerSilent, while its holder's Lease is silent and the holder cannot be declared dead.
// Otherwise the session would look well for as long as the worker is lost.
//
// It is the only write of the manager to the status of a session that is held. It carries
// the resourceVersion of the object that was read, so it never undoes a write of the holder,
// and the holder, if it lives, writes Ready again when it sees the change. Nothing is
// published: Laravel does not read Ready.
//
// retry is when to try failed writes again; zero: none has failed.
func (r *placementReconciler) markSilentHolders(ctx context.Context, snapshot placement.Snapshot, now time.Time) (retry time.Time) {
	connected := map[string][]*v1alpha1.WhatsAppSession{} // by silent holder
	for i := range snapshot.Sessions {
		s := &snapshot.Sessions[i]
		holder := s.HeldBy
		if holder == "" || !r.Deaths.LeaseSilent(holder) { // a holder that is dead is not in the snapshot
			continue
		}
		if meta.IsStatusConditionTrue(s.Object.Status.Conditions, v1alpha1.ConditionReady) || r.silences[holder] != nil {
			connected[holder] = append(connected[holder], s.Object)
		}
	}
	for worker := range r.silences {
		if connected[worker] == nil {
			delete(r.silences, worker)
			r.Log.Info("Found that a silent worker is back or dead, or holds no session any more", "worker", worker)
		}
	}
	for worker, sessions := range connected {
		if r.silences[worker] == nil {
			r.silences[worker] = &silence{marked: map[types.UID]bool{}}
			r.reportSilent(worker, len(sessions))
		}
		if s := r.silences[worker]; now.Before(s.notBefore) {
			retry = earlier(retry, s.notBefore)
		} else if !r.markSilent(ctx, s, worker, sessions, now) {
			s.notBefore = now.Add(retryFirst)
			retry = earlier(retry, s.notBefore)
		}
	}
	return retry
}

// reportSilent reports a worker that has become silent, with one Event for its Lease.
func (r *placementReconciler) reportSilent(worker string, sessions int) {
	r.Log.Info("Found a silent worker that cannot be declared dead", "worker", worker, "sessions", sessions)
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: membership.LeaseName(r.Release, worker)}}
	r.events.Eventf(lease, nil, corev1.EventTypeWarning, v1alpha1.ReasonWorkerSilent, "Place",
		"worker %s does not renew its Lease and cannot be declared dead, because its heartbeat in Redis is renewed or cannot be read: its %d connected sessions show Ready=Unknown. %s",
		worker, sessions, silentAdvice)
}

const silentAdvice = "Check its pod and node, and Redis. If the node is lost for good, delete its Node, or taint it with " + corev1.TaintNodeOutOfService + "=nodeshutdown:NoExecute"

// markSilent writes the condition of those sessions that are not marked yet. It reports
// whether all could be written.
func (r *placementReconciler) markSilent(ctx context.Context, s *silence, worker string, sessions []*v1alpha1.WhatsAppSession, now time.Time) bool {
	var unmarked []*v1alpha1.WhatsAppSession
	for _, obj := range sessions {
		if !s.marked[obj.UID] && meta.IsStatusConditionTrue(obj.Status.Conditions, v1alpha1.ConditionReady) {
			unmarked = append(unmarked, obj)
		}
	}
	errs := make([]error, len(unmarked))
	var group errgroup.Group
	group.SetLimit(r.Concurrency)
	for i, obj := range unmarked {
		group.Go(func() error {
			errs[i] = patchStatus(ctx, r.client, obj.DeepCopy(), silentStatus(obj.Status, worker, now))
			r.run.Progress()
			return nil // the failure of one session does not delay the others
		})
	}
	_ = group.Wait() // always nil
	all := true
	for i, obj := range unmarked {
		switch err := errs[i]; {
		case err == nil:
			s.marked[obj.UID] = true
		case apierrors.IsConflict(err), apierrors.IsNotFound(err): // the cache is stale
			all = false
		default:
			all = false
			r.Log.Error(err, "Failed to mark a session of a silent worker, trying again", "namespace", obj.Namespace, "session", obj.Name, "worker", worker)
		}
	}
	return all
}

// silentStatus is the status of a connected session whose holder is silent: only Ready changes.
func silentStatus(s v1alpha1.WhatsAppSessionStatus, worker string, now time.Time) v1alpha1.WhatsAppSessionStatus {
	next := *s.DeepCopy()
	ready := meta.FindStatusCondition(next.Conditions, v1alpha1.ConditionReady)
	meta.SetStatusCondition(&next.Conditions, metav1.Condition{
		Type: v1alpha1.ConditionReady, Status: metav1.ConditionUnknown, Reason: v1alpha1.ReasonWorkerSilent,
		Message:            fmt.Sprintf("worker %s has not renewed its Lease and cannot be declared dead, so it is not known whether the session is connected", worker),
		ObservedGeneration: ready.ObservedGeneration, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
	})
	return next
}

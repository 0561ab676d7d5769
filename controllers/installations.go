package controllers

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

const (
	// formerInterval is how often, at most, the store is asked for the installations that it
	// was taken over from.
	formerInterval = 5 * time.Second
	// formerHolderTimeout is how long a worker of a former installation has to notice that its
	// store was taken over, and to close its connections: it asks every 5 s, waits 2 s for an
	// answer and ends within 5 s. Until then its sessions are not taken from it.
	formerHolderTimeout = 20 * time.Second
	// otherInterval is how often a session of another installation is checked: its store may
	// have been taken over, or its manager may be gone.
	otherInterval = time.Minute
	// leaseReadInterval is how often a Lease of another release is read, and silentReads is how
	// many reads in a row must show no renewal before its owner counts as gone. A leader renews
	// its Lease every 2 s, a worker every 3 s.
	leaseReadInterval = 15 * time.Second
	silentReads       = 4
	// leaseRetention is how long a Lease that no session leads to any more is remembered.
	leaseRetention = 10 * time.Minute
)

// splitInstallation returns the parts of an installation's id.
func splitInstallation(id string) (cluster, namespace, release string) {
	cluster, rest, _ := strings.Cut(id, "/")
	namespace, release, _ = strings.Cut(rest, "/")
	return cluster, namespace, release
}

// formerInstallations are the installations whose sessions this one takes over, because a
// person has moved their store to it.
type formerInstallations struct {
	mu    sync.Mutex
	ids   []string
	read  time.Time
	since map[string]time.Time // when this leader first read each id
}

// has reports whether id is one of them, and since when this leader knows it.
func (f *formerInstallations) has(ctx context.Context, ids IDs, id string, now time.Time) (since time.Time, is bool, err error) {
	f.mu.Lock()
	stale := f.read.IsZero() || now.Sub(f.read) >= formerInterval || now.Before(f.read)
	f.mu.Unlock()
	if stale {
		read, err := ids.Former(ctx)
		if err != nil {
			return time.Time{}, false, fmt.Errorf("asking the store for its former installations: %w", err)
		}
		f.mu.Lock()
		f.ids, f.read = read, now
		f.mu.Unlock()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.ids, id) {
		delete(f.since, id)
		return time.Time{}, false, nil
	}
	if f.since == nil {
		f.since = map[string]time.Time{}
	}
	if f.since[id].IsZero() {
		f.since[id] = now
	}
	return f.since[id], true, nil
}

// ours reports whether a session belongs to this installation, or to none yet, or to one
// whose sessions this one takes over: then its id is one of this installation's store.
func (r *SessionReconciler) ours(ctx context.Context, s *v1alpha1.WhatsAppSession) (bool, error) {
	if s.Status.Installation == "" || s.Status.Installation == r.Installation {
		return true, nil
	}
	_, former, err := r.former.has(ctx, r.IDs, s.Status.Installation, r.Clock.Now())
	return former, err
}

// reconcileOther does the steps for a session whose status names another installation. If
// this installation has the store of that one, it takes the session over. If somebody manages
// the session, it does not change it. Otherwise it reports what a person can do.
func (r *SessionReconciler) reconcileOther(ctx context.Context, s *v1alpha1.WhatsAppSession) (ctrl.Result, error) {
	since, former, err := r.former.has(ctx, r.IDs, s.Status.Installation, r.Clock.Now())
	switch {
	case err != nil:
		return ctrl.Result{}, err
	case former:
		return r.takeOver(ctx, s, since)
	}
	if err := r.withdrawClaim(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	again, managed, err := r.isManaged(ctx, s)
	if err != nil || managed {
		return ctrl.Result{RequeueAfter: again}, err
	}
	if !s.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, r.finishOtherDeletion(ctx, s)
	}
	return ctrl.Result{RequeueAfter: again}, r.reportOther(ctx, s)
}

// takeOver takes a session over from a former installation. If a worker of that one holds
// it, takeOver waits for formerHolderTimeout first.
func (r *SessionReconciler) takeOver(ctx context.Context, s *v1alpha1.WhatsAppSession, since time.Time) (ctrl.Result, error) {
	now := r.Clock.Now()
	if until := since.Add(formerHolderTimeout); s.Status.HeldBy != "" && now.Before(until) {
		return ctrl.Result{RequeueAfter: until.Sub(now)}, nil
	}
	from := s.Status.Installation
	next := *s.Status.DeepCopy()
	next.Installation, next.Worker = r.Installation, ""
	held := false
	if s.DeletionTimestamp.IsZero() { // a deleted session claims nothing: its record in the store decides how its deletion ends
		var err error
		if held, err = r.claimRecord(ctx, s); err != nil {
			return ctrl.Result{}, err
		}
		if next.SessionID = ""; held {
			next.SessionID = s.SessionID()
		}
	}
	next.Epoch = nextEpoch(s.Status, now)
	if next.HeldBy != "" {
		next = afterHolderLoss(s, next, "worker "+next.HeldBy+" of the former installation "+from+" held the session", now)
	}
	next.HideCodes()
	if held || !s.DeletionTimestamp.IsZero() {
		next = unheldStatus(s, next, now)
	} else {
		next = status.ForeignID(next, s.Generation, now)
	}
	lost := s.Status.Passkey != nil && s.DeletionTimestamp.IsZero()
	written, err := r.write(ctx, s, next)
	if err != nil {
		return ctrl.Result{}, err
	}
	if lost && written {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonPasskeyExpired, session.PasskeyLostMessage)
	}
	logr.FromContextOrDiscard(ctx).Info("Took over the session from a former installation", "sessionID", next.SessionID, "epoch", next.Epoch, "installation", from)
	return ctrl.Result{}, nil // the event of the write requests the next call
}

// withdrawClaim removes the record that this installation's store has of a session that
// belongs to another one: both managers may have claimed its id when it was new. A record
// with keys is kept. Each leader asks the store once for each session.
func (r *SessionReconciler) withdrawClaim(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	key := client.ObjectKeyFromObject(s)
	r.mu.Lock()
	done := r.withdrawn[key] == s.UID
	r.mu.Unlock()
	if done {
		return nil
	}
	record, err := r.IDs.Record(ctx, s.SessionID())
	if err != nil {
		return fmt.Errorf("asking the store who holds the session id: %w", err)
	}
	if record != nil && record.UID == s.UID && record.JID == "" {
		if err := r.IDs.Release(ctx, s.UID, ReleaseRetain); err != nil {
			return fmt.Errorf("releasing the session id: %w", err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.withdrawn[key] = s.UID
	return nil
}

// isManaged reports whether somebody manages, or may manage, a session of another
// installation. The Leases of another cluster cannot be read; a session of it is here because
// of a restore, so it counts as not managed. An installation of this cluster is gone if
// neither its leader nor the worker that holds the session renews its Lease. again is after
// how long to check again.
func (r *SessionReconciler) isManaged(ctx context.Context, s *v1alpha1.WhatsAppSession) (again time.Duration, managed bool, err error) {
	cluster, namespace, release := splitInstallation(s.Status.Installation)
	if ours, _, _ := splitInstallation(r.Installation); cluster != ours || namespace == "" || release == "" {
		return otherInterval, false, nil
	}
	leader := types.NamespacedName{Namespace: namespace, Name: membership.LeaderLeaseName(release)}
	if r.wasOverwritten(s) {
		r.otherReleases.answered(leader)
	}
	leases := []string{leader.Name}
	if s.Status.HeldBy != "" {
		leases = append(leases, membership.LeaseName(release, s.Status.HeldBy))
	}
	silent := true
	for _, name := range leases {
		is, err := r.otherReleases.silent(ctx, types.NamespacedName{Namespace: namespace, Name: name})
		if err != nil {
			return 0, true, err
		}
		silent = silent && is
	}
	if silent {
		return otherInterval, false, nil
	}
	return leaseReadInterval, true, nil
}

// reportOther reports that nobody manages the session, and what a person can do.
func (r *SessionReconciler) reportOther(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	cluster, namespace, release := splitInstallation(s.Status.Installation)
	where := "the installation " + s.Status.Installation + " of another cluster manages the session"
	if ours, _, _ := splitInstallation(r.Installation); cluster == ours {
		where = fmt.Sprintf("the release %s in the namespace %s manages the session, and has not been running for a minute: start it", release, namespace)
	}
	message := where + "; if this installation takes its place, with its database, run `whatsapp-operator store adopt --former " + s.Status.Installation +
		"`; if that installation is gone for good, delete the session: then remove the device on the phone by hand"
	next := status.Summarize(s.Status, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhaseFailed, Reason: v1alpha1.ReasonOtherInstallation, Message: message, Stalled: true,
	}, r.Clock.Now())
	written, err := r.write(ctx, s, next)
	if err == nil {
		r.mu.Lock()
		r.reported[client.ObjectKeyFromObject(s)] = s.UID
		r.mu.Unlock()
	}
	if written {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonOtherInstallation, message)
	}
	return err
}

// wasOverwritten reports whether another program has written the status of a session after
// it was reported as managed by nobody. That is a manager without leader election, which has
// no Lease; the two managers must not overwrite each other.
func (r *SessionReconciler) wasOverwritten(s *v1alpha1.WhatsAppSession) bool {
	key := client.ObjectKeyFromObject(s)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reported[key] != s.UID || status.Reason(s.Status) == v1alpha1.ReasonOtherInstallation {
		return false
	}
	delete(r.reported, key)
	return true
}

// finishOtherDeletion removes the finalizer of a deleted session of another installation
// that nobody manages. Its keys stay in the store of that installation.
func (r *SessionReconciler) finishOtherDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	if !controllerutil.ContainsFinalizer(s, v1alpha1.Finalizer) {
		return nil
	}
	message := "the session was deleted here; the installation " + s.Status.Installation + " keeps its keys"
	if s.Status.JID != "" {
		message += ": on " + status.Phone(s.Status.PhoneNumber) + " open Linked devices and remove the device " + deviceName(s, s.Status.JID)
	}
	r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonOtherInstallation, message)
	return r.removeFinalizer(ctx, s)
}

// otherReleases observes the Leases of other releases in this cluster.
type otherReleases struct {
	reader client.Reader // must not read from a cache, which has this release's Leases only
	clock  clock.PassiveClock
	log    logr.Logger

	reading sync.Mutex // one read at a time: an API server that does not answer must not block every reconciliation
	mu      sync.Mutex
	seen    map[types.NamespacedName]leaseReads
}

// leaseReads is the result of the last reads of a Lease.
type leaseReads struct {
	version   string // empty: there was no Lease
	last      time.Time
	unchanged int // how many reads in a row showed the same version
	// forbidden says that the Lease may not be read. Then its owner never counts as gone.
	forbidden bool
	// answered says that its owner was active although it does not renew the Lease.
	answered bool
}

// answered records that the owner of a Lease is active although it does not renew it. This
// counts until the Lease changes.
func (n *otherReleases) answered(key types.NamespacedName) {
	n.mu.Lock()
	defer n.mu.Unlock()
	seen, known := n.seen[key]
	seen.answered, seen.unchanged = true, 0
	if !known { // or it is forgotten at once
		seen.last = n.clock.Now()
	}
	if n.seen == nil {
		n.seen = map[types.NamespacedName]leaseReads{}
	}
	n.seen[key] = seen
}

// silent reports whether silentReads reads in a row have shown no renewal of the Lease.
func (n *otherReleases) silent(ctx context.Context, key types.NamespacedName) (bool, error) {
	n.mu.Lock()
	seen, known := n.seen[key]
	n.mu.Unlock()
	now := n.clock.Now()
	if known && now.Sub(seen.last) < leaseReadInterval || !n.reading.TryLock() {
		return seen.unchanged >= silentReads, nil
	}
	defer n.reading.Unlock()
	lease, version := &coordinationv1.Lease{}, ""
	err := n.reader.Get(ctx, key, lease)
	switch {
	case apierrors.IsForbidden(err):
		if !seen.forbidden {
			n.log.Error(err, "Failed to read the Lease of another release, assuming that it manages its sessions", "lease", key.String())
		}
		seen = leaseReads{forbidden: true}
	case client.IgnoreNotFound(err) != nil:
		return false, fmt.Errorf("reading the Lease of another release: %w", err)
	case err == nil && lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity != "":
		version = string(lease.UID) + "/" + lease.ResourceVersion
	}
	seen.forbidden = seen.forbidden && apierrors.IsForbidden(err)
	switch {
	case seen.forbidden:
	case known && version == seen.version:
		if !seen.answered {
			seen.unchanged++
		}
	default:
		seen.version, seen.unchanged, seen.answered = version, 0, false
	}
	seen.last = now
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.seen == nil {
		n.seen = map[types.NamespacedName]leaseReads{}
	}
	for other, reads := range n.seen {
		if now.Sub(reads.last) >= leaseRetention {
			delete(n.seen, other)
		}
	}
	n.seen[key] = seen
	return seen.unchanged >= silentReads, nil
}

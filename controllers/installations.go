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
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

const (
	// formerInterval is how often the store is asked at most which installations it was
	// taken over from.
	formerInterval = 5 * time.Second
	// formerHolderTimeout is how long a worker of a former installation is given to notice
	// that its store was taken over, and to close its connections: it asks each 5 s, waits 2 s
	// for an answer and ends within 5 s. Until then its sessions are not taken from it.
	formerHolderTimeout = 20 * time.Second
	// otherInterval is how often a session of another installation is looked at: its store
	// may be taken over, or its manager gone.
	otherInterval = time.Minute
	// leaseReadInterval is how often a Lease of another release is read, and silentReads how
	// many reads must show no renewal before the release counts as gone. A leader renews
	// every 2 s, a worker every 3 s.
	leaseReadInterval = 15 * time.Second
	silentReads       = 4
)

// splitInstallation is the namespace and the release of an installation of a cluster.
func splitInstallation(id string) (cluster, namespace, release string) {
	cluster, rest, _ := strings.Cut(id, "/")
	namespace, release, _ = strings.Cut(rest, "/")
	return cluster, namespace, release
}

// formerInstallations are the installations whose sessions this one takes over:
// those from which a person has taken the store.
type formerInstallations struct {
	mu    sync.Mutex
	ids   []string
	read  time.Time
	since map[string]time.Time // when this leader first heard of each
}

// has reports whether id is one of them, and since when this leader has known it.
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

// ours reports whether a session is this installation's, or nobody's yet, or is
// to be taken over: it holds or wants an id of this installation's store.
func (r *SessionReconciler) ours(ctx context.Context, s *v1alpha1.WhatsAppSession) (bool, error) {
	if s.Status.Installation == "" || s.Status.Installation == r.Installation {
		return true, nil
	}
	_, former, err := r.former.has(ctx, r.IDs, s.Status.Installation, r.Clock.Now())
	return former, err
}

// reconcileOther is the story of a session whose status names another
// installation: one of which this one has the store is taken over, one that is
// managed is left alone, and of any other it is said what a person can do.
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
		return ctrl.Result{}, r.letOtherGo(ctx, s)
	}
	return ctrl.Result{RequeueAfter: again}, r.reportOther(ctx, s)
}

// takeOver makes a session of a former installation this one's. Its holder was
// a worker of the former one, which is given the time to notice.
func (r *SessionReconciler) takeOver(ctx context.Context, s *v1alpha1.WhatsAppSession, since time.Time) (ctrl.Result, error) {
	now := r.Clock.Now()
	if until := since.Add(formerHolderTimeout); s.Status.HeldBy != "" && now.Before(until) {
		return ctrl.Result{RequeueAfter: until.Sub(now)}, nil
	}
	from := s.Status.Installation
	next := *s.Status.DeepCopy()
	next.Installation, next.Worker = r.Installation, ""
	held := false
	if s.DeletionTimestamp.IsZero() { // a deleted one claims nothing: what it has in the store decides how it ends
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
	next.QR, next.PairingCode = nil, ""
	if held || !s.DeletionTimestamp.IsZero() {
		next = unheldStatus(s, next, now)
	} else {
		next = status.ForeignID(next, s.Generation, now)
	}
	if _, err := r.write(ctx, s, next); err != nil {
		return ctrl.Result{}, err
	}
	logr.FromContextOrDiscard(ctx).Info("Took the session over from a former installation", "sessionID", next.SessionID, "epoch", next.Epoch, "installation", from)
	return ctrl.Result{}, nil // its event brings it back, as one of this installation
}

// withdrawClaim removes what this installation's store has of a session that
// belongs to another one: both managers may have claimed its id when it was new.
// A record with keys stays. The store is asked once in the life of a leader.
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

// isManaged reports whether somebody manages a session of another installation,
// or may do so. One of another cluster cannot be asked: its sessions came here by
// a restore. One of this cluster is gone when neither its leader nor the worker
// that holds the session renews its Lease. again is when to look once more.
func (r *SessionReconciler) isManaged(ctx context.Context, s *v1alpha1.WhatsAppSession) (again time.Duration, managed bool, err error) {
	cluster, namespace, release := splitInstallation(s.Status.Installation)
	if ours, _, _ := splitInstallation(r.Installation); cluster != ours || namespace == "" || release == "" {
		return otherInterval, false, nil
	}
	leader := types.NamespacedName{Namespace: namespace, Name: membership.LeaderLeaseName(release)}
	if r.wasOverwritten(s) {
		r.neighbours.answered(leader)
	}
	leases := []string{leader.Name}
	if s.Status.HeldBy != "" {
		leases = append(leases, membership.LeaseName(release, s.Status.HeldBy))
	}
	silent := true
	for _, name := range leases {
		is, err := r.neighbours.silent(ctx, types.NamespacedName{Namespace: namespace, Name: name})
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

// reportOther says that nobody manages the session, and what a person can do.
func (r *SessionReconciler) reportOther(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	cluster, namespace, release := splitInstallation(s.Status.Installation)
	where := "the installation " + s.Status.Installation + " of another cluster manages the session"
	if ours, _, _ := splitInstallation(r.Installation); cluster == ours {
		where = fmt.Sprintf("the release %s in the namespace %s manages the session, and has not been running for a minute: start it", release, namespace)
	}
	message := where + "; if this installation takes its place, with its database, run `whatsapp-operator store adopt --former " + s.Status.Installation +
		"`; if it is gone for good, delete the session: the device then has to be removed on the phone by hand"
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

// wasOverwritten reports whether somebody has written the status of a session
// after it was said that nobody manages it: a manager without leader election has
// no Lease, and the two must not write against each other.
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

// letOtherGo removes the finalizer of a deleted session that nobody manages. Its
// keys stay in the store that has them, which is not this installation's.
func (r *SessionReconciler) letOtherGo(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	if !controllerutil.ContainsFinalizer(s, v1alpha1.Finalizer) {
		return nil
	}
	message := "the session was deleted here; the installation " + s.Status.Installation + " keeps its keys"
	if s.Status.JID != "" {
		message += ": on the phone " + s.Status.PhoneNumber + " open Linked devices and remove the device " + deviceName(s, s.Status.JID)
	}
	r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonOtherInstallation, message)
	return r.removeFinalizer(ctx, s)
}

// neighbours observes the Leases of other releases in this cluster.
type neighbours struct {
	reader client.Reader // must not read from a cache, which has this release's Leases only
	clock  clock.PassiveClock
	log    logr.Logger

	reading sync.Mutex // one read at a time: an API server that hangs must not hold every session's turn
	mu      sync.Mutex
	seen    map[types.NamespacedName]leaseReads
}

// leaseReads is what the last reads of a Lease showed.
type leaseReads struct {
	version   string // empty: there was none
	last      time.Time
	unchanged int // reads in a row that showed the same
	// forbidden: the Lease may not be read, so its owner is never taken for gone.
	forbidden bool
	// answered: its owner has been seen in another way.
	answered bool
}

// answered takes note that the owner of a Lease is there although it does not
// renew it. That stands until the Lease changes.
func (n *neighbours) answered(key types.NamespacedName) {
	n.mu.Lock()
	defer n.mu.Unlock()
	seen := n.seen[key]
	seen.answered, seen.unchanged = true, 0
	if n.seen == nil {
		n.seen = map[types.NamespacedName]leaseReads{}
	}
	n.seen[key] = seen
}

// silent reports whether the Lease has not been renewed for silentReads reads.
func (n *neighbours) silent(ctx context.Context, key types.NamespacedName) (bool, error) {
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
			n.log.Error(err, "Failed to read the Lease of another release: its sessions are taken for managed", "lease", key.String())
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
	n.seen[key] = seen
	return seen.unchanged >= silentReads, nil
}

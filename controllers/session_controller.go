package controllers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

const (
	// indexSessionID finds the sessions that want the same id. Ids that differ only by case
	// are one id.
	indexSessionID = "sessionID"
	// conflictRetryInterval is when a decision that was made from a stale cache is made again,
	// if no watch event comes first.
	conflictRetryInterval = 100 * time.Millisecond
	// idRetryInterval is how often a session whose id is taken asks the store again. An id can
	// become free without the deletion of an object: a person may purge the keys of a retained
	// session.
	idRetryInterval = 10 * time.Minute
	// maxRetryInterval bounds the backoff after errors. Most of them end when Redis, the
	// database or the API server is back.
	maxRetryInterval = time.Minute
)

// Record is what the store knows about a session id.
type Record struct {
	// Namespace and UID are those of the object that holds the id.
	Namespace string
	UID       types.UID
	// JID is the linked device; empty: there is none. PhoneNumber is the number of its
	// account, in E.164.
	JID, PhoneNumber string
}

// Claimant is an object that wants a session id.
type Claimant struct {
	SessionID, Namespace string
	UID                  types.UID
}

// Release says what happens to the keys of a deleted session.
type Release string

const (
	// ReleaseForget deletes the keys and the record.
	ReleaseForget Release = "Forget"
	// ReleaseRetain keeps the keys; a record without keys is deleted.
	ReleaseRetain Release = "Retain"
	// ReleaseOrphan keeps the keys for 30 days as orphans; a record without keys is deleted.
	ReleaseOrphan Release = "Orphan"
)

// IDs is the part of the store that the controller needs: which object holds which session
// id. Calls may run concurrently, and each may be repeated.
type IDs interface {
	// Former returns the ids of the installations from which a person has taken the store over.
	Former(ctx context.Context) ([]string, error)
	// Record returns the record of a session id; nil: no object holds the id.
	Record(ctx context.Context, sessionID string) (*Record, error)
	// Claim gives the id to the claimant and reports whether the claimant holds it now. It
	// takes the record of another object only in the same namespace, and only if gone reports
	// that no live object has that object's UID.
	Claim(ctx context.Context, c Claimant, gone func(uid types.UID) bool) (held bool, err error)
	// Release gives up the id of the object with that UID. It succeeds if there is no record.
	Release(ctx context.Context, uid types.UID, how Release) error
}

// Publisher is the part of Redis that the controller needs: it publishes the status of
// sessions that no worker holds. Redis ignores a status that is not newer than the one it
// has, so a call may be repeated or come late.
type Publisher interface {
	// All three return a *delivery.StaleError if Redis has a higher epoch of the session:
	// then Laravel receives nothing about the session until its epoch is above that.

	// Update publishes a status that may be stale already. It does so only if Redis has an
	// earlier status of the session, which would refuse a stale one; published is false if it
	// has none.
	Update(ctx context.Context, item delivery.StatusItem) (published bool, err error)
	// Enqueue publishes the present status of a session.
	Enqueue(ctx context.Context, item delivery.StatusItem) error
	// Deleted publishes the last status of a session and removes its keys from Redis.
	Deleted(ctx context.Context, item delivery.StatusItem) error
}

// SessionOptions configure SetupSession. All but Concurrency are required.
type SessionOptions struct {
	// Installation is the id of this installation: cluster/namespace/release.
	Installation string
	IDs          IDs
	Publisher    Publisher
	Clock        clock.PassiveClock
	Log          logr.Logger
	// Concurrency is how many sessions are reconciled at a time; default 16.
	Concurrency int
}

// SessionReconciler reconciles one session at a time (docs/architecture.md, "The resource"):
// its finalizer, id, suspension, restart and deletion, and its status while no worker holds it.
type SessionReconciler struct {
	SessionOptions
	client client.Client
	// reader reads from the API server itself, not from a cache.
	reader client.Reader
	events events.EventRecorder

	mu sync.Mutex
	// published is the epoch under which this process has published a session's status. A
	// new leader has published nothing, so it publishes everything once.
	published map[types.NamespacedName]int64
	// emptiedCount counts how often Redis has lost its data.
	emptiedCount int
	// lastEpochs are the last epochs of sessions that were deleted a moment ago, by session
	// id: a session that is applied again within the same second needs a higher epoch.
	lastEpochs map[string]int64
	// lastWrite is the version of a session that this process has written last. It is kept
	// until the cache shows that version.
	lastWrite map[types.NamespacedName]version
	queue     workqueue.TypedRateLimitingInterface[reconcile.Request]

	former        formerInstallations
	otherReleases otherReleases
	// withdrawn are the sessions of other installations whose record was removed from this
	// installation's store; reported are those that were reported as managed by nobody.
	withdrawn, reported map[types.NamespacedName]types.UID
	// Deletions are the deletions that this process has seen.
	Deletions *Deletions
}

// version is one version of an object.
type version struct {
	uid             types.UID
	resourceVersion string
}

// SetupSession adds the session controller to the manager.
func SetupSession(mgr ctrl.Manager, o SessionOptions) (*SessionReconciler, error) {
	if o.Concurrency == 0 {
		o.Concurrency = 16
	}
	r := &SessionReconciler{
		SessionOptions: o, client: mgr.GetClient(), reader: mgr.GetAPIReader(), events: mgr.GetEventRecorder("whatsapp-operator"),
		published: map[types.NamespacedName]int64{}, lastEpochs: map[string]int64{}, lastWrite: map[types.NamespacedName]version{},
		Deletions: &Deletions{},
		withdrawn: map[types.NamespacedName]types.UID{}, reported: map[types.NamespacedName]types.UID{},
	}
	r.otherReleases = otherReleases{reader: r.reader, clock: o.Clock, log: o.Log}
	err := mgr.GetFieldIndexer().IndexField(context.Background(), &v1alpha1.WhatsAppSession{}, indexSessionID, func(obj client.Object) []string {
		return []string{foldID(obj.(*v1alpha1.WhatsAppSession).SessionID())}
	})
	if err != nil {
		return nil, fmt.Errorf("indexing the sessions by their id: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).
		For(&v1alpha1.WhatsAppSession{}).
		// The deletion of an object may free its id for another one.
		Watches(&v1alpha1.WhatsAppSession{}, handler.EnqueueRequestsFromMapFunc(r.sameID), builder.WithPredicates(predicate.Funcs{
			CreateFunc: func(event.CreateEvent) bool { return false },
			UpdateFunc: func(event.UpdateEvent) bool { return false },
		})).
		WatchesRawSource(source.Func(r.setQueue)).
		WithOptions(options(o.Concurrency, o.Log)).
		Complete(r)
	if err != nil {
		return nil, fmt.Errorf("setting up the session controller: %w", err)
	}
	return r, nil
}

func options(concurrency int, log logr.Logger) controller.Options {
	warm := true
	return controller.Options{
		MaxConcurrentReconciles: concurrency,
		EnableWarmup:            &warm,
		RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](5*time.Millisecond, maxRetryInterval),
		LogConstructor: func(request *reconcile.Request) logr.Logger {
			if request == nil || request.Namespace == "" {
				return log
			}
			return log.WithValues("namespace", request.Namespace, "session", request.Name)
		},
	}
}

func (r *SessionReconciler) setQueue(_ context.Context, queue workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = queue
	return nil
}

// PublishAgain requests that the status of every session that no worker holds is published
// again, because Redis has lost its data. It does not wait for that.
func (r *SessionReconciler) PublishAgain(ctx context.Context) error {
	list := &v1alpha1.WhatsAppSessionList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("listing the sessions: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.published)
	r.emptiedCount++
	queue, ok := r.queue.(priorityqueue.PriorityQueue[reconcile.Request])
	if !ok {
		return nil // not started yet: after its start the controller publishes everything
	}
	low := handler.LowPriority
	for i := range list.Items {
		if s := &list.Items[i]; s.Status.HeldBy == "" {
			queue.AddWithOpts(priorityqueue.AddOpts{Priority: &low}, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(s)})
		}
	}
	return nil
}

// sameID returns the other sessions that want the id of obj.
func (r *SessionReconciler) sameID(ctx context.Context, obj client.Object) []reconcile.Request {
	claimants, err := r.claimants(ctx, obj.(*v1alpha1.WhatsAppSession))
	if err != nil {
		r.Log.Error(err, "Failed to find the sessions that wait for a session id", "namespace", obj.GetNamespace(), "session", obj.GetName())
		return nil
	}
	requests := make([]reconcile.Request, 0, len(claimants))
	for i := range claimants {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&claimants[i])})
	}
	return requests
}

// Reconcile reconciles one session.
func (r *SessionReconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	s := &v1alpha1.WhatsAppSession{}
	if err := r.client.Get(ctx, request.NamespacedName, s); err != nil {
		r.forget(request.NamespacedName)
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if r.isCacheBehind(s) {
		return ctrl.Result{}, nil // the event of that write requests the next call
	}
	result, err := r.reconcile(ctx, s)
	if apierrors.IsConflict(err) {
		logr.FromContextOrDiscard(ctx).V(1).Info("Deciding again because the session has changed")
		return ctrl.Result{RequeueAfter: conflictRetryInterval}, nil
	}
	return result, client.IgnoreNotFound(err)
}

// reconcile does the steps for a session of this installation that is not being deleted.
func (r *SessionReconciler) reconcile(ctx context.Context, s *v1alpha1.WhatsAppSession) (ctrl.Result, error) {
	if s.Status.Installation != "" && s.Status.Installation != r.Installation {
		return r.reconcileOther(ctx, s)
	}
	if !s.DeletionTimestamp.IsZero() {
		return r.reconcileDeletion(ctx, s)
	}
	if err := r.addFinalizer(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	mine, err := r.claim(ctx, s)
	if err != nil {
		return ctrl.Result{}, errors.Join(err, r.reportStoreUnavailable(ctx, s))
	}
	if !mine {
		return ctrl.Result{RequeueAfter: idRetryInterval}, r.reportIDTaken(ctx, s)
	}
	if err := r.removePasskeyAnnotations(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	again, err := r.updateStatus(ctx, s)
	if err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: again}, r.publish(ctx, s)
}

func (r *SessionReconciler) addFinalizer(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	if controllerutil.ContainsFinalizer(s, v1alpha1.Finalizer) {
		return nil
	}
	base := s.DeepCopy()
	controllerutil.AddFinalizer(s, v1alpha1.Finalizer)
	if err := r.client.Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("adding the finalizer: %w", err)
	}
	r.rememberWrite(s)
	return nil
}

// removePasskeyAnnotations removes what a person gave for a passkey when the holder has
// used or refused it, and what nobody asks for. Workers may not write annotations.
func (r *SessionReconciler) removePasskeyAnnotations(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	p := s.Status.Passkey
	var done []string
	if response := s.PasskeyResponse(); response != "" && (p == nil || p.ObservedResponse == session.Digest(response)) {
		done = append(done, v1alpha1.PasskeyResponseAnnotation)
	}
	if code := s.PasskeyConfirmation(); code != "" && (p == nil || p.ObservedConfirmation == session.Digest(code)) {
		done = append(done, v1alpha1.PasskeyConfirmAnnotation)
	}
	if len(done) == 0 {
		return nil
	}
	base := s.DeepCopy()
	for _, annotation := range done {
		delete(s.Annotations, annotation)
	}
	if err := r.client.Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("removing the annotations of a passkey: %w", err)
	}
	r.rememberWrite(s)
	if p == nil && s.Status.JID == "" {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonPasskeyRefused,
			"WhatsApp does not ask for a passkey at present, so the annotations "+v1alpha1.PasskeyResponseAnnotation+" and "+v1alpha1.PasskeyConfirmAnnotation+
				" were removed: give them while status.passkey is present")
	}
	return nil
}

func (r *SessionReconciler) removeFinalizer(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	base := s.DeepCopy()
	if !controllerutil.RemoveFinalizer(s, v1alpha1.Finalizer) {
		return nil
	}
	if err := r.client.Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("removing the finalizer: %w", err)
	}
	return nil
}

// isCacheBehind reports whether the cache shows a session as it was before this process
// wrote it last. A reconciliation would repeat the last decision then, with a query to the
// store and a write that is refused.
func (r *SessionReconciler) isCacheBehind(s *v1alpha1.WhatsAppSession) bool {
	key := client.ObjectKeyFromObject(s)
	r.mu.Lock()
	defer r.mu.Unlock()
	wrote, ok := r.lastWrite[key]
	if !ok {
		return false
	}
	if wrote.uid == s.UID {
		if order, err := resourceversion.CompareResourceVersion(s.ResourceVersion, wrote.resourceVersion); err == nil && order < 0 {
			return true
		}
	}
	delete(r.lastWrite, key)
	return false
}

// rememberWrite records that s is the version that this process has written.
func (r *SessionReconciler) rememberWrite(s *v1alpha1.WhatsAppSession) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lastWrite[client.ObjectKeyFromObject(s)] = version{s.UID, s.ResourceVersion}
}

// claimants returns the other sessions that want the id of s.
func (r *SessionReconciler) claimants(ctx context.Context, s *v1alpha1.WhatsAppSession) ([]v1alpha1.WhatsAppSession, error) {
	list := &v1alpha1.WhatsAppSessionList{}
	if err := r.client.List(ctx, list, client.MatchingFields{indexSessionID: foldID(s.SessionID())}); err != nil {
		return nil, fmt.Errorf("looking for sessions with the same id: %w", err)
	}
	claimants := list.Items[:0]
	for i := range list.Items {
		if list.Items[i].UID == s.UID {
			continue
		}
		ours, err := r.ours(ctx, &list.Items[i])
		if err != nil {
			return nil, err
		}
		if ours { // a session of another installation has its id in another store
			claimants = append(claimants, list.Items[i])
		}
	}
	return claimants, nil
}

// claim reports whether s holds its id, and claims it if s does not. A session whose
// holder found no record of it in the store (a database that was restored from an older
// backup) claims its id again.
func (r *SessionReconciler) claim(ctx context.Context, s *v1alpha1.WhatsAppSession) (bool, error) {
	if s.Status.SessionID != "" && status.Reason(s.Status) != v1alpha1.ReasonRecordMissing {
		return true, nil
	}
	return r.claimRecord(ctx, s)
}

// claimRecord claims the id in the store, whatever the status says. The store's record
// decides which object holds the id; without a record it is the older object. The cache is
// sure to have the object of a record, if it exists: only a leader writes records, only for
// objects that it had in its cache, and a watch shows an object before any younger one.
func (r *SessionReconciler) claimRecord(ctx context.Context, s *v1alpha1.WhatsAppSession) (bool, error) {
	claimants, err := r.claimants(ctx, s)
	if err != nil {
		return false, err
	}
	if first := firstClaimant(s, claimants); first != nil {
		// One more query, only for the few sessions whose id another session wants too.
		record, err := r.IDs.Record(ctx, s.SessionID())
		if err != nil {
			return false, fmt.Errorf("asking the store who holds the session id: %w", err)
		}
		switch {
		case record == nil:
			return false, nil
		case record.UID != s.UID && first.Namespace == s.Namespace:
			return false, nil
		}
	}
	held, err := r.IDs.Claim(ctx, Claimant{SessionID: s.SessionID(), Namespace: s.Namespace, UID: s.UID}, func(uid types.UID) bool {
		for i := range claimants {
			if claimants[i].UID == uid {
				return false
			}
		}
		return true
	})
	if err != nil {
		return false, fmt.Errorf("claiming the session id: %w", err)
	}
	return held, nil
}

// firstClaimant returns the claimant that has priority over s when there is no record: one
// that still holds the id, or an older one. If there are several, it prefers one in the
// namespace of s.
func firstClaimant(s *v1alpha1.WhatsAppSession, claimants []v1alpha1.WhatsAppSession) *v1alpha1.WhatsAppSession {
	var first *v1alpha1.WhatsAppSession
	for i := range claimants {
		other := &claimants[i]
		holds := other.Status.SessionID != ""
		if !holds && (!other.DeletionTimestamp.IsZero() || !older(other, s)) {
			continue
		}
		if first == nil || other.Namespace == s.Namespace {
			first = other
		}
	}
	return first
}

// foldID returns the same string for ids that differ only by case. Most applications'
// databases ignore case when they compare, so one tenant could write into another tenant's
// row there. Ids are ASCII.
func foldID(id string) string { return strings.ToLower(id) }

// older reports whether a is older than b; if both have the same age, the UID decides.
func older(a, b *v1alpha1.WhatsAppSession) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.UID < b.UID
}

// reportIDTaken reports that another session holds the id.
func (r *SessionReconciler) reportIDTaken(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	next := status.ForeignID(s.Status, s.Generation, r.Clock.Now())
	next.Installation = r.Installation
	written, err := r.write(ctx, s, next)
	if written {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonSessionIDTaken, "another session holds the session id "+s.SessionID()+" (upper and lower case make no difference): choose another spec.sessionID, or delete the session that holds it")
	}
	return err
}

// reportStoreUnavailable reports that the session waits for the database.
func (r *SessionReconciler) reportStoreUnavailable(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	if s.Status.HeldBy != "" {
		return nil // its holder writes the status, and would write it back at once
	}
	next := *s.Status.DeepCopy()
	next.Installation = r.Installation
	_, err := r.write(ctx, s, status.Summarize(next, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonStoreUnavailable,
		Message: "the database does not answer: the session waits for its id, and the manager tries again",
	}, r.Clock.Now()))
	return err
}

// updateStatus writes what the manager decides for a session that is not being deleted:
// its id, its suspension, an epoch above one that the store refused, a restart, and, while
// no worker holds it, its whole status. again is after how long the session must be
// reconciled again; zero: when it changes.
func (r *SessionReconciler) updateStatus(ctx context.Context, s *v1alpha1.WhatsAppSession) (again time.Duration, err error) {
	now := r.Clock.Now()
	next := *s.Status.DeepCopy()
	if next.SessionID == "" {
		next.SessionID, next.Installation, next.Epoch = s.SessionID(), r.Installation, r.lastEpoch(s.SessionID())
	}
	switch {
	case s.Spec.Suspend && next.Worker != "":
		next.Worker, next.Epoch = "", nextEpoch(next, now)
	case epochBehind(next):
		next.Epoch = nextEpoch(next, now)
	}
	restarted := session.RestartNone
	if next.HeldBy == "" {
		next, again, restarted = restart(s, next, now)
		next = unheldStatus(s, next, now)
		next = supersede(s, next, now)
	}
	before := s.Status
	written, err := r.write(ctx, s, next)
	if !written {
		return again, err
	}
	log := logr.FromContextOrDiscard(ctx).WithValues("sessionID", next.SessionID, "epoch", next.Epoch)
	switch {
	case before.SessionID == "":
		log.V(1).Info("Claimed the session id")
	case restarted == session.RestartBanned:
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonBanned, session.RestartBannedMessage(next))
	case restarted == session.RestartDone:
		log.Info("Restarted")
		r.recordEvent(ctx, s, corev1.EventTypeNormal, v1alpha1.ReasonRestarted, "restartedAt changed: the session starts again when it is placed")
	case next.Phase == v1alpha1.PhaseSuspended && before.Phase != v1alpha1.PhaseSuspended:
		log.Info("Suspended")
		r.recordEvent(ctx, s, corev1.EventTypeNormal, v1alpha1.ReasonSuspended, "the session is disconnected and keeps its keys")
	case before.Epoch != next.Epoch && next.Worker == before.Worker && next.HeldBy != "":
		log.Info("Raised the epoch above the one in the store", "worker", next.Worker)
	}
	return again, nil
}

// restart acts on the annotation restartedAt of a session that rests and has no worker. If
// it has a worker, that worker acts on the annotation.
func restart(s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus, now time.Time) (v1alpha1.WhatsAppSessionStatus, time.Duration, session.RestartResult) {
	if next.Worker != "" || s.Spec.Suspend || !status.Kept(next.Phase) {
		return next, 0, session.RestartNone
	}
	next, result, from := session.Restart(s, next, now)
	switch result {
	case session.RestartWaits:
		return next, from.Sub(now), result
	case session.RestartDone:
		next.Phase = v1alpha1.PhasePending
	case session.RestartNone, session.RestartBanned:
	}
	return next, 0, result
}

// write patches the status, if it differs, with the resourceVersion of s. Afterwards s is
// the object as it was written.
func (r *SessionReconciler) write(ctx context.Context, s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus) (written bool, err error) {
	if equality.Semantic.DeepEqual(s.Status, next) {
		return false, nil
	}
	before := s.Status.Epoch
	if err := patchStatus(ctx, r.client, s, next); err != nil {
		return false, err
	}
	r.rememberWrite(s)
	if before < v1alpha1.MaxEpoch && next.Epoch == v1alpha1.MaxEpoch {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonEpochAtMaximum,
			"status.epoch is at its maximum; the cause is a wrong clock or a change by hand: correct the clocks, delete the session with deletionPolicy Logout and apply it again under another spec.sessionID")
	}
	return true, nil
}

// patchStatus writes a status as a merge patch that fails if s is not the newest version.
// Afterwards s is the object as it was written.
func patchStatus(ctx context.Context, c client.Client, s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus) error {
	base := s.DeepCopy()
	s.Status = next
	if err := c.Status().Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("writing the status: %w", err)
	}
	return nil
}

// raiseAboveRedis raises the epoch of s if err says that Redis has a higher one: the
// resource was restored from a backup, or another cluster has had the session since. Redis
// refuses every update of the session as stale until its epoch is higher. Any other error is
// returned unchanged. The patch is refused if s is not the newest version, because the
// higher epoch may be in a version that the cache does not show yet.
func (r *SessionReconciler) raiseAboveRedis(ctx context.Context, s *v1alpha1.WhatsAppSession, err error) (raised bool, _ error) {
	var stale *delivery.StaleError
	if !errors.As(err, &stale) || stale.Epoch < s.Status.Epoch {
		return false, err
	}
	if stale.Epoch >= v1alpha1.MaxEpoch {
		return false, fmt.Errorf("no higher epoch is possible: delete the entries of session id %s from the queues' keys in Redis: %w", s.Status.SessionID, err)
	}
	next := *s.Status.DeepCopy()
	next.Epoch = max(nextEpoch(next, r.Clock.Now()), stale.Epoch+1)
	if _, err := r.write(ctx, s, next); err != nil {
		return false, err
	}
	logr.FromContextOrDiscard(ctx).Info("Raised the epoch above the one in Redis", "sessionID", next.SessionID, "epoch", next.Epoch, "epochInRedis", stale.Epoch)
	return true, nil
}

// publish publishes the status of a session that no worker holds. The status and its
// epoch have been written before, so nothing is published that was not decided. After an
// error it is tried again, and a new leader publishes every session again.
func (r *SessionReconciler) publish(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	key := client.ObjectKeyFromObject(s)
	if s.Status.HeldBy != "" || s.Status.SessionID == "" || s.Status.Epoch == 0 {
		r.clearPublished(key)
		return nil
	}
	r.mu.Lock()
	published, emptiedCount := r.published[key], r.emptiedCount
	r.mu.Unlock()
	if published == s.Status.Epoch {
		return nil
	}
	known, err := r.Publisher.Update(ctx, statusItem(s))
	if err == nil && !known {
		// Redis has nothing that would refuse a stale status, and this one may be stale: this
		// process may have been paused, may not be the leader any more, and its cache may not
		// be up to date yet.
		newest, readErr := r.isNewest(ctx, s)
		if readErr != nil || !newest {
			return readErr // the event of the change requests the next call
		}
		err = r.Publisher.Enqueue(ctx, statusItem(s))
	}
	if raised, err := r.raiseAboveRedis(ctx, s, err); raised || err != nil {
		if err != nil {
			return fmt.Errorf("publishing the session's status: %w", err)
		}
		return r.publish(ctx, s)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.emptiedCount == emptiedCount { // otherwise PublishAgain has requested it again
		r.published[key] = s.Status.Epoch
	}
	return nil
}

// isNewest asks the API server whether s is the newest version.
func (r *SessionReconciler) isNewest(ctx context.Context, s *v1alpha1.WhatsAppSession) (bool, error) {
	newest := &v1alpha1.WhatsAppSession{}
	err := r.reader.Get(ctx, client.ObjectKeyFromObject(s), newest)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading the session from the API server: %w", err)
	}
	return newest.UID == s.UID && newest.ResourceVersion == s.ResourceVersion, nil
}

func (r *SessionReconciler) clearPublished(key types.NamespacedName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.published, key)
}

// forget removes everything that is kept about a session that does not exist any more.
func (r *SessionReconciler) forget(key types.NamespacedName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.published, key)
	delete(r.lastWrite, key)
	delete(r.withdrawn, key)
	delete(r.reported, key)
	r.Deletions.forget(key)
}

// rememberEpoch keeps the last epoch of a deleted session for as long as a new placement
// could get a lower one: until the clock has passed it.
func (r *SessionReconciler) rememberEpoch(sessionID string, epoch int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.Clock.Now().Unix()
	for id, last := range r.lastEpochs {
		if last < now {
			delete(r.lastEpochs, id)
		}
	}
	r.lastEpochs[foldID(sessionID)] = epoch
}

func (r *SessionReconciler) lastEpoch(sessionID string) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lastEpochs[foldID(sessionID)]
}

// recordEvent records an Event for the session and logs it: in a namespace that is being
// deleted no Event can be created.
func (r *SessionReconciler) recordEvent(ctx context.Context, s *v1alpha1.WhatsAppSession, kind, reason, message string) {
	r.events.Eventf(s, nil, kind, reason, reason, "%s", message)
	logr.FromContextOrDiscard(ctx).Info("Recorded an Event", "sessionID", s.SessionID(), "reason", reason, "message", message)
}

// ending is how the deletion of a session ends.
type ending struct {
	// reason is that of its last status: v1alpha1.ReasonDeleted or ReasonLogoutUnconfirmed.
	reason, message string
	release         Release // empty: the store has no record of it
}

// reconcileDeletion does the steps for a session that is being deleted: it waits for the
// holder, withdraws the placement if the holder need not log out or did not in time, and
// when no worker holds the session any more publishes its last status and removes the
// finalizer.
func (r *SessionReconciler) reconcileDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession) (ctrl.Result, error) {
	if !controllerutil.ContainsFinalizer(s, v1alpha1.Finalizer) {
		return ctrl.Result{}, nil
	}
	record, err := r.IDs.Record(ctx, s.SessionID())
	if err != nil {
		return ctrl.Result{}, errors.Join(
			fmt.Errorf("asking the store who holds the session id: %w", err), r.reportWaitingDeletion(ctx, s, "the database does not answer"))
	}
	if record != nil && record.UID != s.UID {
		record = nil // that of another object
	}
	if record == nil && s.Status.SessionID == "" {
		return ctrl.Result{}, r.removeFinalizer(ctx, s) // it never held the id
	}
	now := r.Clock.Now()
	d, err := r.deletionOf(ctx, s, now)
	if err != nil {
		return ctrl.Result{}, err
	}
	e, wait := decideEnding(s, record, d, now)
	if e != nil {
		return ctrl.Result{}, r.finishDeletion(ctx, s, *e)
	}
	if err := r.reportDeletion(ctx, s, record, d, now); err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: wait}, r.publish(ctx, s)
}

// deletionOf computes the deadline, and reads the namespace if the proxy's Secret is missing.
func (r *SessionReconciler) deletionOf(ctx context.Context, s *v1alpha1.WhatsAppSession, now time.Time) (deletion, error) {
	d := r.Deletions.see(s, false, now)
	if d.noProxy || !lacksProxySecret(s) {
		return d, nil
	}
	namespace := &metav1.PartialObjectMetadata{}
	namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	err := r.client.Get(ctx, types.NamespacedName{Name: s.Namespace}, namespace)
	if client.IgnoreNotFound(err) != nil {
		return d, fmt.Errorf("reading the session's namespace: %w", err)
	}
	isGone := apierrors.IsNotFound(err) || !namespace.DeletionTimestamp.IsZero()
	return r.Deletions.see(s, isGone, now), nil
}

// decideEnding decides whether the deletion of a session can end now, and how; if not, how
// long to wait at most. record is the record of this session; nil: the store has none any
// more.
func decideEnding(s *v1alpha1.WhatsAppSession, record *Record, d deletion, now time.Time) (*ending, time.Duration) {
	retain := s.Spec.DeletionPolicy == v1alpha1.DeletionRetain
	linked := record != nil && record.JID != ""
	switch {
	case s.Status.HeldBy != "":
		return nil, d.wait(now) // until the holder has released the session, or placement has written the holder's death
	case record == nil && linkUnknown(s):
		return &ending{reason: v1alpha1.ReasonLogoutUnconfirmed, message: fmt.Sprintf(
			"the database has no record of the session, as after a restore of an older backup, so it is unknown whether the device is unlinked: on %s open Linked devices and remove the device %s if it is there",
			status.Phone(s.Status.PhoneNumber), deviceName(s, s.Status.JID))}, 0
	case record == nil:
		return &ending{reason: v1alpha1.ReasonDeleted, message: "the device is unlinked and its keys are deleted"}, 0
	case !linked && retain: // a device that WhatsApp has logged out is kept for a person to restore
		return &ending{reason: v1alpha1.ReasonDeleted, message: "no device is linked", release: ReleaseRetain}, 0
	case !linked:
		return &ending{reason: v1alpha1.ReasonDeleted, message: "no device was linked", release: ReleaseForget}, 0
	case retain:
		return &ending{reason: v1alpha1.ReasonDeleted, message: "the device stays linked and its keys are kept: apply the session again in this namespace to use them", release: ReleaseRetain}, 0
	case !d.over(now) && !deletionDecided(s): // what an earlier leader has decided is not decided again
		return nil, d.wait(now)
	default:
		return &ending{reason: v1alpha1.ReasonLogoutUnconfirmed, message: unlinkByHand(s, record, d), release: ReleaseOrphan}, 0
	}
}

// linkUnknown: a session without a record had a device, and no holder has written that it
// was unlinked. The holder writes that before, or while, it deletes the record.
func linkUnknown(s *v1alpha1.WhatsAppSession) bool {
	finished := deletionDecided(s) && status.Reason(s.Status) == v1alpha1.ReasonDeleted // its record is deleted then
	return s.Status.JID != "" && !finished
}

// unlinkByHand says which device the person who has the phone must remove, and why.
func unlinkByHand(s *v1alpha1.WhatsAppSession, record *Record, d deletion) string {
	why := "no worker could confirm the logout"
	if d.noProxy {
		why = "no worker can use the proxy's Secret, and it cannot be created any more because the namespace is being deleted"
	}
	return fmt.Sprintf("%s: on %s open Linked devices and remove the device %s; its keys are kept for 30 days",
		why, status.Phone(record.PhoneNumber), deviceName(s, record.JID))
}

// deviceName is the name of the device under Linked devices on the phone.
func deviceName(s *v1alpha1.WhatsAppSession, jid string) string {
	if s.Spec.DeviceName == "" {
		return jid
	}
	return fmt.Sprintf("%q (%s)", s.Spec.DeviceName, jid)
}

// reportDeletion writes the manager's part of the status of a session whose deletion cannot
// end yet.
func (r *SessionReconciler) reportDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession, record *Record, d deletion, now time.Time) error {
	next := *s.Status.DeepCopy()
	next.SessionID, next.Installation = s.SessionID(), r.Installation
	if next.Worker != "" && (s.Spec.DeletionPolicy == v1alpha1.DeletionRetain || d.over(now)) {
		next.Worker, next.Epoch = "", nextEpoch(next, now)
	}
	if next.HeldBy == "" {
		if record != nil {
			// A device that was linked but not written into the status is logged out too.
			if next.JID != record.JID {
				next.LID = "" // the record has none
			}
			next.JID, next.PhoneNumber = record.JID, record.PhoneNumber
		}
		next.HideCodes()
		next = status.Summarize(next, unheldFacts(s, next, lastUnplaced(s), now), now)
		next = supersede(s, next, now)
	}
	_, err := r.write(ctx, s, next)
	return err
}

// reportWaitingDeletion reports once that the deletion of a session that no worker holds
// waits for the database or for Redis.
func (r *SessionReconciler) reportWaitingDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession, why string) error {
	if s.Status.HeldBy != "" {
		return nil // the holder writes the status
	}
	reason := v1alpha1.ReasonDeletionWaits
	if deletionDecided(s) { // the reason must stay: the decision is not made again
		reason = status.Reason(s.Status)
	}
	message := why + ": the session is removed as soon as its deletion is recorded there"
	next := status.Summarize(s.Status, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhaseTerminating, Reason: reason, Message: message,
	}, r.Clock.Now())
	written, err := r.write(ctx, s, next)
	if written {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonDeletionWaits, message)
	}
	return err
}

// finishDeletion publishes the last status of a session and removes the finalizer. It
// writes the status first, so that no worker can take the session afterwards, and publishes
// before it removes the finalizer, so that the deletion is in Redis before the object is
// gone.
func (r *SessionReconciler) finishDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession, e ending) error {
	written := false
	if deletionDecided(s) { // by an earlier call, which failed afterwards or waits for the database or Redis
		e.reason = status.Reason(s.Status)
	} else {
		now := r.Clock.Now()
		next := *s.Status.DeepCopy()
		next.SessionID, next.Installation, next.Worker = s.SessionID(), r.Installation, ""
		next.HideCodes()
		next = status.Summarize(next, status.Facts{
			Generation: s.Generation, Phase: v1alpha1.PhaseTerminating, Reason: e.reason, Message: e.message,
		}, now)
		next = supersede(s, next, now)
		var err error
		if written, err = r.write(ctx, s, next); err != nil {
			return err
		}
	}
	if !written { // it may have been decided long ago, and the cache may be stale
		if newest, err := r.isNewest(ctx, s); err != nil || !newest {
			return err
		}
	}
	if e.release != "" {
		if err := r.IDs.Release(ctx, s.UID, e.release); err != nil {
			return errors.Join(fmt.Errorf("releasing the session id: %w", err), r.reportWaitingDeletion(ctx, s, "the database does not answer"))
		}
	}
	err := r.Publisher.Deleted(ctx, statusItem(s))
	if raised, raiseErr := r.raiseAboveRedis(ctx, s, err); raised {
		err = r.Publisher.Deleted(ctx, statusItem(s))
	} else {
		err = raiseErr
	}
	if err != nil {
		why := "Redis does not answer"
		if stale := (*delivery.StaleError)(nil); errors.As(err, &stale) {
			why = "Redis has the highest possible epoch for this session id"
		}
		return errors.Join(fmt.Errorf("publishing that the session is deleted: %w", err), r.reportWaitingDeletion(ctx, s, why))
	}
	r.rememberEpoch(s.Status.SessionID, s.Status.Epoch)
	kind := corev1.EventTypeNormal
	if e.reason == v1alpha1.ReasonLogoutUnconfirmed {
		kind = corev1.EventTypeWarning
	}
	r.recordEvent(ctx, s, kind, e.reason, e.message)
	logr.FromContextOrDiscard(ctx).V(1).Info("Deleted the session", "sessionID", s.Status.SessionID, "epoch", s.Status.Epoch)
	return r.removeFinalizer(ctx, s)
}

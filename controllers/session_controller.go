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
	// conflictRetryInterval is how soon a decision that was made from an old picture is made
	// again, should no watch event come first.
	conflictRetryInterval = 100 * time.Millisecond
	// idResync is how often the store is asked whether an id has become free without
	// the deletion of an object: a person may purge what a retained session left.
	idResync = 10 * time.Minute
	// maxRetryInterval bounds the backoff after errors, which end when Redis, the database or
	// the API server come back.
	maxRetryInterval = time.Minute
)

// Record is what the store knows of a session id.
type Record struct {
	// Namespace and UID are those of the object that holds the id.
	Namespace string
	UID       types.UID
	// JID is the linked device; empty: there is none. PhoneNumber is its account's, in E.164.
	JID, PhoneNumber string
}

// Claimant is an object that wants a session id.
type Claimant struct {
	SessionID, Namespace string
	UID                  types.UID
}

// Release is what becomes of a deleted session's keys.
type Release string

const (
	// ReleaseForget deletes keys and record.
	ReleaseForget Release = "Forget"
	// ReleaseRetain keeps them; a record without keys is deleted.
	ReleaseRetain Release = "Retain"
	// ReleaseOrphan keeps them for 30 days as those of no resource; a record without keys
	// is deleted.
	ReleaseOrphan Release = "Orphan"
)

// IDs is the store as the controller needs it: who holds which session id.
// Calls may run concurrently; each may be repeated.
type IDs interface {
	// Former returns the ids of the installations from which a person has taken the store over.
	Former(ctx context.Context) ([]string, error)
	// Record returns the record of a session id; nil: nobody holds it.
	Record(ctx context.Context, sessionID string) (*Record, error)
	// Claim gives the id to the claimant and reports whether it holds it now. A record of
	// the same namespace passes on from another object only when gone says that no live
	// object has its UID.
	Claim(ctx context.Context, c Claimant, gone func(uid types.UID) bool) (held bool, err error)
	// Release gives up the id of the object with that UID. No record is a success.
	Release(ctx context.Context, uid types.UID, how Release) error
}

// Publisher is Redis as the controller needs it: the manager's voice for
// sessions that nobody holds. What is not newer than what Redis knows is
// ignored there, so a call may be repeated or come late.
type Publisher interface {
	// All three return a *delivery.StaleError where Redis remembers a higher epoch of the
	// session: nobody would hear of it before it is placed above that.

	// Update says the status of a session that may have another by now: only where Redis
	// remembers what was said of it before. told is false where it remembers nothing.
	Update(ctx context.Context, item delivery.StatusItem) (told bool, err error)
	// Enqueue says the present status of a session.
	Enqueue(ctx context.Context, item delivery.StatusItem) error
	// Deleted says the last status of a session and removes what Redis has of it.
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
	// Concurrency is how many sessions are led at a time; default 16.
	Concurrency int
}

// SessionReconciler leads every session through its life (docs/architecture.md, "The resource").
type SessionReconciler struct {
	SessionOptions
	client client.Client
	// reader asks the API server itself.
	reader client.Reader
	events events.EventRecorder

	mu sync.Mutex
	// published is the epoch under which this process has published a session's status. A
	// new leader has published nothing, so it publishes everything once.
	published map[types.NamespacedName]int64
	// forgetCount counts how often Redis has forgotten everything.
	forgetCount int
	// lastEpochs are the last epochs of sessions deleted a moment ago, by session id: what is
	// applied again within the same second must be above it.
	lastEpochs map[string]int64
	// lastWrite is the version of a session as this process has written it last, until the
	// cache shows it.
	lastWrite map[types.NamespacedName]version
	queue     workqueue.TypedRateLimitingInterface[reconcile.Request]

	former     formerInstallations
	neighbours neighbours
	// withdrawn and reported are the sessions of other installations whose record was removed
	// from this one's store, and of which it was said that nobody manages them.
	withdrawn, reported map[types.NamespacedName]types.UID
	// Deletions are those that this process has seen.
	Deletions *Deletions
}

// version is one state of an object.
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
	r.neighbours = neighbours{reader: r.reader, clock: o.Clock, log: o.Log}
	err := mgr.GetFieldIndexer().IndexField(context.Background(), &v1alpha1.WhatsAppSession{}, indexSessionID, func(obj client.Object) []string {
		return []string{foldID(obj.(*v1alpha1.WhatsAppSession).SessionID())}
	})
	if err != nil {
		return nil, fmt.Errorf("indexing the sessions by their id: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).
		For(&v1alpha1.WhatsAppSession{}).
		// An object that goes may free its id for another.
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

// PublishAgain has the status of every session that nobody holds said once more:
// Redis forgot it. It does not wait for that.
func (r *SessionReconciler) PublishAgain(ctx context.Context) error {
	list := &v1alpha1.WhatsAppSessionList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("listing the sessions: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.published)
	r.forgetCount++
	queue, ok := r.queue.(priorityqueue.PriorityQueue[reconcile.Request])
	if !ok {
		return nil // not started: whoever starts has told nothing yet
	}
	low := handler.LowPriority
	for i := range list.Items {
		if s := &list.Items[i]; s.Status.HeldBy == "" {
			queue.AddWithOpts(priorityqueue.AddOpts{Priority: &low}, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(s)})
		}
	}
	return nil
}

// sameID finds the other sessions that want the id of obj.
func (r *SessionReconciler) sameID(ctx context.Context, obj client.Object) []reconcile.Request {
	claimants, err := r.claimants(ctx, obj.(*v1alpha1.WhatsAppSession))
	if err != nil {
		r.Log.Error(err, "Those who wait for a session's id were not found", "namespace", obj.GetNamespace(), "session", obj.GetName())
		return nil
	}
	requests := make([]reconcile.Request, 0, len(claimants))
	for i := range claimants {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&claimants[i])})
	}
	return requests
}

// Reconcile leads one session as far as it goes.
func (r *SessionReconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	s := &v1alpha1.WhatsAppSession{}
	if err := r.client.Get(ctx, request.NamespacedName, s); err != nil {
		r.forget(request.NamespacedName)
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if r.isCacheBehind(s) {
		return ctrl.Result{}, nil // the event of what was written brings it back
	}
	result, err := r.reconcile(ctx, s)
	if apierrors.IsConflict(err) {
		logr.FromContextOrDiscard(ctx).V(1).Info("The session has changed meanwhile: deciding again")
		return ctrl.Result{RequeueAfter: conflictRetryInterval}, nil
	}
	return result, client.IgnoreNotFound(err)
}

// reconcile is the story of a session.
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
		return ctrl.Result{RequeueAfter: idResync}, r.reportIDTaken(ctx, s)
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

// isCacheBehind reports whether the cache shows a session as it was before this
// process wrote it last: what was decided then would be decided again, with a
// query at the store and a write that is refused.
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

// rememberWrite notes that s is as this process has written it.
func (r *SessionReconciler) rememberWrite(s *v1alpha1.WhatsAppSession) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lastWrite[client.ObjectKeyFromObject(s)] = version{s.UID, s.ResourceVersion}
}

// claimants are the other sessions that want the id of s.
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
		if ours { // another installation has the same id in a store of its own
			claimants = append(claimants, list.Items[i])
		}
	}
	return claimants, nil
}

// claim reports whether s holds its id, or gets it. One whose holder finds no
// record of it in the store (a database that was restored from an older copy)
// claims its id once more.
func (r *SessionReconciler) claim(ctx context.Context, s *v1alpha1.WhatsAppSession) (bool, error) {
	if s.Status.SessionID != "" && status.Reason(s.Status) != v1alpha1.ReasonRecordMissing {
		return true, nil
	}
	return r.claimRecord(ctx, s)
}

// claimRecord has the store give the id to s, whatever the status says. The
// store's record decides; with none the older object does. The cache may be
// trusted to know the UID of a record: only the leader writes records, of objects
// that it had seen, and a watch brings an object before any that was made after it.
func (r *SessionReconciler) claimRecord(ctx context.Context, s *v1alpha1.WhatsAppSession) (bool, error) {
	claimants, err := r.claimants(ctx, s)
	if err != nil {
		return false, err
	}
	if first := firstClaimant(s, claimants); first != nil {
		// One query more, for the few whose id somebody else wants too.
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

// firstClaimant is the other that comes before s where no record decides: one that
// still holds the id, or an older one. In doubt it is one of the namespace of s.
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

// foldID makes one of the ids that differ only by upper and lower case: most
// applications' databases take them for one, and one tenant could write into
// another's row there. Ids are ASCII.
func foldID(id string) string { return strings.ToLower(id) }

// older orders objects by age; equal ages are decided by UID.
func older(a, b *v1alpha1.WhatsAppSession) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.UID < b.UID
}

// reportIDTaken says that another session holds the id.
func (r *SessionReconciler) reportIDTaken(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	next := status.ForeignID(s.Status, s.Generation, r.Clock.Now())
	next.Installation = r.Installation
	written, err := r.write(ctx, s, next)
	if written {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonSessionIDTaken, "another session holds the session id "+s.SessionID()+" (upper and lower case make no difference): choose another spec.sessionID, or delete the session that holds it")
	}
	return err
}

// reportStoreUnavailable says that the session waits for the database.
func (r *SessionReconciler) reportStoreUnavailable(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	next := *s.Status.DeepCopy()
	next.Installation = r.Installation
	_, err := r.write(ctx, s, status.Summarize(next, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonStoreUnavailable,
		Message: "the database does not answer: the session waits for its id, and it is tried again",
	}, r.Clock.Now()))
	return err
}

// updateStatus decides what is the manager's to decide of a session that is not being
// deleted: its id, its suspension, an epoch that the store refused, a restart,
// and, while nobody holds it, all that its status says. again is when to look
// once more; zero: when something changes.
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
	was := s.Status
	written, err := r.write(ctx, s, next)
	if !written {
		return again, err
	}
	log := logr.FromContextOrDiscard(ctx).WithValues("sessionID", next.SessionID, "epoch", next.Epoch)
	switch {
	case was.SessionID == "":
		log.V(1).Info("The session holds its id")
	case restarted == session.RestartBanned:
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonBanned, session.RestartBannedMessage(next))
	case restarted == session.RestartDone:
		log.Info("Restarted")
		r.recordEvent(ctx, s, corev1.EventTypeNormal, v1alpha1.ReasonRestarted, "restartedAt changed: the session begins anew when it is placed")
	case next.Phase == v1alpha1.PhaseSuspended && was.Phase != v1alpha1.PhaseSuspended:
		log.Info("Suspended")
		r.recordEvent(ctx, s, corev1.EventTypeNormal, v1alpha1.ReasonSuspended, "the session is disconnected and keeps its keys")
	case was.Epoch != next.Epoch && next.Worker == was.Worker && next.HeldBy != "":
		log.Info("Placed again above the epoch that the store knows", "worker", next.Worker)
	}
	return again, nil
}

// restart acts upon restartedAt for a session that rests and that no worker is
// to take: a worker that takes it sees the annotation itself.
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

// write patches the status, if it differs, with the resourceVersion of s, and
// leaves in s the object as written.
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
			"status.epoch is at its maximum, which only a wrong clock or a change by hand explains: correct the clocks, delete the session with deletionPolicy Logout and apply it again under another spec.sessionID")
	}
	return true, nil
}

// patchStatus writes a status as a merge patch that fails if s is not the
// newest version, and leaves in s the object as written.
func patchStatus(ctx context.Context, c client.Client, s *v1alpha1.WhatsAppSession, next v1alpha1.WhatsAppSessionStatus) error {
	base := s.DeepCopy()
	s.Status = next
	if err := c.Status().Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("writing the status: %w", err)
	}
	return nil
}

// raiseAboveRedis raises the epoch of s where err says that Redis remembers a higher one:
// the resource was restored from a backup, or another cluster had the session since.
// Until then Redis takes every update of the session for an old one. An err of another
// kind is returned as it is. The patch is refused where s is not the newest: then Redis
// may know what this process does not know yet.
func (r *SessionReconciler) raiseAboveRedis(ctx context.Context, s *v1alpha1.WhatsAppSession, err error) (raised bool, _ error) {
	var stale *delivery.StaleError
	if !errors.As(err, &stale) || stale.Epoch < s.Status.Epoch {
		return false, err
	}
	if stale.Epoch >= v1alpha1.MaxEpoch {
		return false, fmt.Errorf("there is no epoch above it: delete what Redis has of session id %s in the queues' keys: %w", s.Status.SessionID, err)
	}
	next := *s.Status.DeepCopy()
	next.Epoch = max(nextEpoch(next, r.Clock.Now()), stale.Epoch+1)
	if _, err := r.write(ctx, s, next); err != nil {
		return false, err
	}
	logr.FromContextOrDiscard(ctx).Info("Raised the epoch above the one that Redis remembers", "sessionID", next.SessionID, "epoch", next.Epoch, "remembered", stale.Epoch)
	return true, nil
}

// publish says what Redis is to know of a session that nobody holds. The
// patch that raised the epoch came first, so nothing is said that was not
// decided; an error is repeated, and so is everything by a new leader.
func (r *SessionReconciler) publish(ctx context.Context, s *v1alpha1.WhatsAppSession) error {
	key := client.ObjectKeyFromObject(s)
	if s.Status.HeldBy != "" || s.Status.SessionID == "" || s.Status.Epoch == 0 {
		r.clearPublished(key)
		return nil
	}
	r.mu.Lock()
	told, forgetCount := r.published[key], r.forgetCount
	r.mu.Unlock()
	if told == s.Status.Epoch {
		return nil
	}
	known, err := r.Publisher.Update(ctx, item(s))
	if err == nil && !known {
		// Nothing there would keep an old status from Laravel, and ours may be old: that of
		// a leader that was paused and leads no more, whose cache is catching up.
		newest, readErr := r.isNewest(ctx, s)
		if readErr != nil || !newest {
			return readErr // what has changed brings the session back
		}
		err = r.Publisher.Enqueue(ctx, item(s))
	}
	if raised, err := r.raiseAboveRedis(ctx, s, err); raised || err != nil {
		if err != nil {
			return fmt.Errorf("telling Redis the session's status: %w", err)
		}
		return r.publish(ctx, s)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.forgetCount == forgetCount { // else it is to be said again, and comes back for it
		r.published[key] = s.Status.Epoch
	}
	return nil
}

// isNewest asks the API server whether s is what it has.
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

// forget forgets a session that does not exist any more.
func (r *SessionReconciler) forget(key types.NamespacedName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.published, key)
	delete(r.lastWrite, key)
	delete(r.withdrawn, key)
	delete(r.reported, key)
	r.Deletions.forget(key)
}

// rememberEpoch remembers the last epoch of a deleted session for as long as a new
// placement could come out below it: until the clock has passed it.
func (r *SessionReconciler) rememberEpoch(sessionID string, epoch int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.Clock.Now().Unix()
	for id, floor := range r.lastEpochs {
		if floor < now {
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

// recordEvent says something beside the session and in the log: in a namespace
// that is being deleted, Events are forbidden.
func (r *SessionReconciler) recordEvent(ctx context.Context, s *v1alpha1.WhatsAppSession, kind, reason, message string) {
	r.events.Eventf(s, nil, kind, reason, reason, "%s", message)
	logr.FromContextOrDiscard(ctx).Info("Recorded an Event", "sessionID", s.SessionID(), "reason", reason, "message", message)
}

// ending is how a deleted session ends.
type ending struct {
	// reason of its last status: v1alpha1.ReasonDeleted or ReasonLogoutUnconfirmed.
	reason, message string
	release         Release // empty: the store has nothing of it
}

// reconcileDeletion is the story of a session that is being deleted: it waits for
// the holder, takes the session from it where it is not to log out, and when
// nobody holds it any more publishes its last status and removes the finalizer.
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
		record = nil // another's
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

// deletionOf looks at the clock of this process and at the namespace.
func (r *SessionReconciler) deletionOf(ctx context.Context, s *v1alpha1.WhatsAppSession, now time.Time) (deletion, error) {
	d := r.Deletions.see(s, false, now)
	if d.hopeless || !lacksSecret(s) {
		return d, nil
	}
	namespace := &metav1.PartialObjectMetadata{}
	namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	err := r.client.Get(ctx, types.NamespacedName{Name: s.Namespace}, namespace)
	if client.IgnoreNotFound(err) != nil {
		return d, fmt.Errorf("reading the session's namespace: %w", err)
	}
	return r.Deletions.see(s, err != nil || !namespace.DeletionTimestamp.IsZero(), now), nil
}

// decideEnding decides whether a deleted session may go, and how; if not, how long
// to wait at most. record is the session's own; nil: the store has none any more.
func decideEnding(s *v1alpha1.WhatsAppSession, record *Record, d deletion, now time.Time) (*ending, time.Duration) {
	retain := s.Spec.DeletionPolicy == v1alpha1.DeletionRetain
	linked := record != nil && record.JID != ""
	switch {
	case s.Status.HeldBy != "":
		return nil, d.wait(now) // only the holder's release ends this, or its death, which placement writes
	case record == nil:
		return &ending{reason: v1alpha1.ReasonDeleted, message: "the device is unlinked and its keys are deleted"}, 0
	case !linked && retain: // a device that WhatsApp has logged out is kept for a person to restore
		return &ending{reason: v1alpha1.ReasonDeleted, message: "no device is linked", release: ReleaseRetain}, 0
	case !linked:
		return &ending{reason: v1alpha1.ReasonDeleted, message: "no device was linked", release: ReleaseForget}, 0
	case retain:
		return &ending{reason: v1alpha1.ReasonDeleted, message: "the device stays linked and its keys are kept: apply the session again in this namespace to use them", release: ReleaseRetain}, 0
	case !d.over(now):
		return nil, d.wait(now)
	default:
		return &ending{reason: v1alpha1.ReasonLogoutUnconfirmed, message: unlinkByHand(s, record, d), release: ReleaseOrphan}, 0
	}
}

// unlinkByHand names the device for the person who has the phone.
func unlinkByHand(s *v1alpha1.WhatsAppSession, record *Record, d deletion) string {
	why := fmt.Sprintf("no worker could confirm the logout within %s", session.LogoutTimeout)
	if d.hopeless {
		why = "the namespace is being deleted with the proxy's Secret, so no worker can reach WhatsApp"
	}
	return fmt.Sprintf("%s: on the phone %s open Linked devices and remove the device %s; its keys are kept for 30 days",
		why, record.PhoneNumber, deviceName(s, record.JID))
}

// deviceName is what a person finds under Linked devices.
func deviceName(s *v1alpha1.WhatsAppSession, jid string) string {
	if s.Spec.DeviceName == "" {
		return jid
	}
	return fmt.Sprintf("%q (%s)", s.Spec.DeviceName, jid)
}

// reportDeletion writes what the manager has to say of a deleted session that cannot go yet.
func (r *SessionReconciler) reportDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession, record *Record, d deletion, now time.Time) error {
	next := *s.Status.DeepCopy()
	next.SessionID, next.Installation = s.SessionID(), r.Installation
	if next.Worker != "" && (s.Spec.DeletionPolicy == v1alpha1.DeletionRetain || d.over(now)) {
		next.Worker, next.Epoch = "", nextEpoch(next, now)
	}
	if next.HeldBy == "" {
		if record != nil {
			// What was linked while nobody could write it down is logged out too.
			next.JID, next.PhoneNumber = record.JID, record.PhoneNumber
		}
		next.QR, next.PairingCode = nil, ""
		next = status.Summarize(next, unheldFacts(s, next, lastUnplaced(s), now), now)
		next = supersede(s, next, now)
	}
	_, err := r.write(ctx, s, next)
	return err
}

// reportWaitingDeletion says that a deleted session which nobody holds waits for a
// database or for Redis, once.
func (r *SessionReconciler) reportWaitingDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession, why string) error {
	if s.Status.HeldBy != "" {
		return nil // its holder writes the status, and has work to do
	}
	reason := v1alpha1.ReasonDeletionWaits
	if deletionDecided(s) { // which is not decided again
		reason = status.Reason(s.Status)
	}
	message := why + ": the session is removed as soon as its end is recorded there"
	next := status.Summarize(s.Status, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhaseTerminating, Reason: reason, Message: message,
	}, r.Clock.Now())
	written, err := r.write(ctx, s, next)
	if written {
		r.recordEvent(ctx, s, corev1.EventTypeWarning, v1alpha1.ReasonDeletionWaits, message)
	}
	return err
}

// finishDeletion publishes the last status of a session and removes the finalizer.
// The patch comes first: no worker can take the session afterwards. Redis comes
// before the finalizer: a deletion is known there before the object is gone.
func (r *SessionReconciler) finishDeletion(ctx context.Context, s *v1alpha1.WhatsAppSession, e ending) error {
	written := false
	if deletionDecided(s) { // by a process that came no further, or that waits for the database or Redis
		e.reason = status.Reason(s.Status)
	} else {
		now := r.Clock.Now()
		next := *s.Status.DeepCopy()
		next.SessionID, next.Installation, next.Worker = s.SessionID(), r.Installation, ""
		next.QR, next.PairingCode = nil, ""
		next = status.Summarize(next, status.Facts{
			Generation: s.Generation, Phase: v1alpha1.PhaseTerminating, Reason: e.reason, Message: e.message,
		}, now)
		next = supersede(s, next, now)
		var err error
		if written, err = r.write(ctx, s, next); err != nil {
			return err
		}
	}
	if !written { // or it was decided long ago, and the cache is old
		if newest, err := r.isNewest(ctx, s); err != nil || !newest {
			return err
		}
	}
	if e.release != "" {
		if err := r.IDs.Release(ctx, s.UID, e.release); err != nil {
			return errors.Join(fmt.Errorf("releasing the session id: %w", err), r.reportWaitingDeletion(ctx, s, "the database does not answer"))
		}
	}
	err := r.Publisher.Deleted(ctx, item(s))
	if raised, raiseErr := r.raiseAboveRedis(ctx, s, err); raised {
		err = r.Publisher.Deleted(ctx, item(s))
	} else {
		err = raiseErr
	}
	if err != nil {
		why := "Redis does not answer"
		if stale := (*delivery.StaleError)(nil); errors.As(err, &stale) {
			why = "Redis remembers a higher epoch of this session id than there may be"
		}
		return errors.Join(fmt.Errorf("telling Redis that the session is deleted: %w", err), r.reportWaitingDeletion(ctx, s, why))
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

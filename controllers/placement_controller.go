package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/liveness"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

const (
	// rebalanceThreshold is the difference of relative loads up to which nothing is rebalanced:
	// ordinary changes make differences of a tenth of a worker's capacity.
	rebalanceThreshold = 0.1
	// coalesceDelay is how long a run waits after the first change for further changes that
	// belong to it: a manifest with many sessions, a worker with many claims.
	coalesceDelay = 20 * time.Millisecond
	// phaseDelay is the same for changes that hardly matter for a plan: a change of the phase
	// only, and a claim while no session waits for a worker. A thousand sessions that fail
	// repeatedly, or that are claimed after a fail-over, must not keep the reconciler busy.
	phaseDelay = time.Second
	// retryFirst is the first pause after a write that failed; each further one doubles it.
	retryFirst = 500 * time.Millisecond
)

// everything is the only request of the placement reconciler: each plan is for all sessions.
var everything = reconcile.Request{NamespacedName: types.NamespacedName{Name: "placement"}}

// PlacementOptions configure SetupPlacement. All but Loop, Concurrency and the rebalancing are required.
type PlacementOptions struct {
	// Installation is the id of this installation: only its sessions are placed.
	Installation string
	Clock        clock.WithTicker
	Log          logr.Logger
	// Deaths decides which workers are dead; their sessions are placed on others.
	Deaths DeathConfirmer
	// Deletions are the deletions that the session controller of the same manager has seen.
	Deletions *Deletions
	// Namespace is the operator's, where the workers' pods are. Release distinguishes their
	// Leases from those of another release in the same namespace.
	Namespace, Release string
	// RebalanceInterval is how often, in each pool, a session is moved away from a worker with
	// more load than others; zero: never. RebalanceAfter is how long a worker must have been
	// live before it gets sessions in this way.
	RebalanceInterval, RebalanceAfter time.Duration
	// Loop watches the runs; nil: nobody does.
	Loop *liveness.Loop
	// Concurrency is how many sessions are written at a time; default 64, because after the
	// loss of a worker these writes are more urgent than all others.
	Concurrency int
}

// placementReconciler places the sessions on the workers (docs/architecture.md, "Ownership").
// Only the leader runs it, one run at a time.
//
// A run reads the cache, which may not show the last writes of the reconciler yet. So the
// reconciler keeps what it wrote until the cache shows it: otherwise a worker could get more
// sessions than it has room for.
type placementReconciler struct {
	PlacementOptions
	client  client.Client
	direct  client.Reader // reads from the API server itself
	events  events.EventRecorder
	members *members
	changed chan event.GenericEvent // the result of Deaths.Dead has changed for a worker
	// unsettled says that after the last run some sessions still want another worker or could
	// not be written.
	unsettled atomic.Bool

	// run is the present run, for the liveness probe.
	run *liveness.Run
	// assumed are decisions that were written and that the cache does not show yet.
	assumed map[types.UID]assumption
	// since is when each session began to want a worker, or another one.
	since map[types.UID]time.Time
	// failing are the sessions whose placement could not be written.
	failing map[types.UID]failure
	// lost are the workers whose death was reported, while a session names them as its holder.
	lost map[string]bool
	// failingWorkers are the workers that were reported as failing, with what they cannot reach.
	failingWorkers map[string]string
	// silences are the workers that are silent and cannot be declared dead, while they hold
	// connected sessions.
	silences map[string]*silence
	// misplaced are the sessions that were reported as connected in another pool, with the
	// reason.
	misplaced map[types.UID]string
	// rebalanced is when each pool was rebalanced last.
	rebalanced map[string]time.Time
	// declined are the values of move-to that were reported as impossible.
	declined map[types.UID]string
	// placed is when each session whose epoch is ahead of the clock was placed; it is kept for
	// placement.MoveInterval.
	placed map[types.UID]time.Time
	// invalidLimits are the invalid values of max-sessions, by namespace, so that each is
	// logged once.
	invalidLimits map[string]string
}

// failure says how many times in a row a session's placement could not be written, and when
// it is tried again.
type failure struct {
	count int
	until time.Time
}

// assumption is a placement as it was written. The epoch never becomes lower, so it shows
// whether the cache has the placement already.
type assumption struct {
	key            types.NamespacedName
	worker, heldBy string
	epoch          int64
	// uncertain says that the write failed without a clear answer, so that the session must be
	// read from the API server.
	uncertain bool
}

// SetupPlacement adds the placement controller to the manager, whose cache must have
// CacheOptions.
func SetupPlacement(mgr ctrl.Manager, o PlacementOptions) error {
	if o.Concurrency == 0 {
		o.Concurrency = 64
	}
	r := newPlacementReconciler(o, mgr.GetClient(), mgr.GetAPIReader(), mgr.GetEventRecorder("whatsapp-operator"))
	err := ctrl.NewControllerManagedBy(mgr).Named("placement").
		Watches(&v1alpha1.WhatsAppSession{}, r.onSession()).
		Watches(&coordinationv1.Lease{}, r.onLease()).
		WatchesMetadata(&corev1.Namespace{}, onNamespace()).
		WatchesRawSource(source.Channel(r.changed, handler.Funcs{
			GenericFunc: func(_ context.Context, _ event.GenericEvent, q queue) { q.Add(everything) },
		})).
		WithOptions(options(1, o.Log)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the placement controller: %w", err)
	}
	costs := &deletionCosts{
		namespace: o.Namespace, installation: o.Installation, clock: o.Clock, log: o.Log, client: r.client, direct: r.direct, members: r.members, written: map[string]int{},
	}
	for _, runnable := range []manager.Runnable{manager.RunnableFunc(r.forwardDeaths), costs} {
		if err := mgr.Add(runnable); err != nil {
			return fmt.Errorf("setting up the placement controller: %w", err)
		}
	}
	return nil
}

func newPlacementReconciler(o PlacementOptions, c client.Client, direct client.Reader, recorder events.EventRecorder) *placementReconciler {
	return &placementReconciler{
		PlacementOptions: o, client: c, direct: direct, events: recorder,
		members: &members{clock: o.Clock, log: o.Log, known: map[string]knownMember{}},
		changed: make(chan event.GenericEvent),
		assumed: map[types.UID]assumption{}, since: map[types.UID]time.Time{}, invalidLimits: map[string]string{}, placed: map[types.UID]time.Time{},
		failing: map[types.UID]failure{}, lost: map[string]bool{}, rebalanced: map[string]time.Time{}, declined: map[types.UID]string{},
		failingWorkers: map[string]string{}, silences: map[string]*silence{}, misplaced: map[types.UID]string{},
	}
}

type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// onNamespace requests a run when a namespace is created or deleted, or changes in a way that
// matters for a plan.
func onNamespace() handler.EventHandler {
	return handler.Funcs{
		CreateFunc: func(_ context.Context, _ event.CreateEvent, q queue) { q.AddAfter(everything, coalesceDelay) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
			if namespaceChanged(e.ObjectOld, e.ObjectNew) {
				q.AddAfter(everything, coalesceDelay)
			}
		},
		DeleteFunc: func(_ context.Context, _ event.DeleteEvent, q queue) { q.AddAfter(everything, coalesceDelay) },
	}
}

// onSession requests a run when a session is created or deleted, or changes in a way that
// matters for a plan.
func (r *placementReconciler) onSession() handler.EventHandler {
	return handler.Funcs{
		CreateFunc: func(_ context.Context, _ event.CreateEvent, q queue) { q.AddAfter(everything, coalesceDelay) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
			before, after := e.ObjectOld.(*v1alpha1.WhatsAppSession), e.ObjectNew.(*v1alpha1.WhatsAppSession)
			switch {
			case sessionChanged(before, after) && (r.unsettled.Load() || !onlyClaimed(before, after)):
				q.AddAfter(everything, coalesceDelay)
			case sessionChanged(before, after), before.Status.Phase != after.Status.Phase:
				q.AddAfter(everything, phaseDelay)
			}
		},
		DeleteFunc: func(_ context.Context, _ event.DeleteEvent, q queue) { q.AddAfter(everything, coalesceDelay) },
	}
}

func sessionChanged(a, b *v1alpha1.WhatsAppSession) bool {
	type facts struct {
		suspend, deleted, linked                bool
		policy                                  v1alpha1.DeletionPolicy
		id, installation, worker, heldBy, start string
		moveTo                                  string
		epoch                                   int64
	}
	of := func(s *v1alpha1.WhatsAppSession) facts {
		return facts{
			suspend: s.Spec.Suspend, deleted: !s.DeletionTimestamp.IsZero(), linked: s.Status.JID != "",
			policy: s.Spec.DeletionPolicy, moveTo: s.Annotations[v1alpha1.MoveToAnnotation], id: s.Status.SessionID, installation: s.Status.Installation,
			worker: s.Status.Worker, heldBy: s.Status.HeldBy, start: s.Status.HolderStart, epoch: s.Status.Epoch,
		}
	}
	return of(a) != of(b)
}

// onlyClaimed reports whether the only change that matters for a plan is the claim by the
// worker of the placement. Such a claim only makes room for further moves to that worker.
func onlyClaimed(before, after *v1alpha1.WhatsAppSession) bool {
	if after.Status.HeldBy != after.Status.Worker || before.Status.HeldBy != "" && before.Status.HeldBy != after.Status.HeldBy {
		return false
	}
	unclaimed := *before
	unclaimed.Status.HeldBy, unclaimed.Status.HolderStart = after.Status.HeldBy, after.Status.HolderStart
	return !sessionChanged(&unclaimed, after)
}

func namespaceChanged(before, after client.Object) bool {
	return before.GetLabels()[v1alpha1.PoolLabel] != after.GetLabels()[v1alpha1.PoolLabel] ||
		before.GetAnnotations()[v1alpha1.MaxSessionsAnnotation] != after.GetAnnotations()[v1alpha1.MaxSessionsAnnotation]
}

func (r *placementReconciler) onLease() handler.EventHandler {
	observe := func(obj client.Object, q queue) {
		if r.members.observe(obj.(*coordinationv1.Lease)) {
			q.AddAfter(everything, coalesceDelay)
		}
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent, q queue) { observe(e.Object, q) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) { observe(e.ObjectNew, q) },
		DeleteFunc: func(_ context.Context, e event.DeleteEvent, q queue) {
			if r.members.forget(e.Object.GetName()) {
				q.AddAfter(everything, coalesceDelay)
			}
		},
	}
}

// Reconcile makes a plan and carries it out.
func (r *placementReconciler) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	r.run = r.Loop.Begin()
	defer r.run.End()
	unresolved := r.resolve(ctx) // these sessions keep their assumptions; the others are planned anyway
	now := r.Clock.Now()
	snapshot, again, err := r.snapshot(ctx, now)
	if err != nil {
		return ctrl.Result{}, err
	}
	r.reportLostWorkers(snapshot)
	r.reportFailingWorkers(snapshot)
	plan := placement.Make(snapshot)
	metrics.SetFleet(r.count(snapshot, plan, r.Clock.Since(now)))
	r.remember(snapshot, plan, now)
	r.reportDeclined(plan)
	r.reportMisplaced(plan, snapshot)

	conflicts, retry := r.carryOut(ctx, snapshot, plan, now)
	retry = earlier(retry, r.markSilentHolders(ctx, snapshot, now))
	r.unsettled.Store(conflicts || unresolved != nil || !retry.IsZero() || len(plan.Waiting)+len(plan.Unplaceable)+len(plan.Misplaced) > 0)
	if unresolved != nil {
		r.Log.Error(unresolved, "Failed to find out whether some placements were written, trying again")
		retry = earlier(retry, now.Add(retryFirst))
	}
	// No error is returned: its backoff would delay all sessions, also a run that is due at a
	// certain time.
	return ctrl.Result{RequeueAfter: untilFirst(now, conflicts, plan.Again, again, retry)}, nil
}

// earlier returns the earlier of two times; a zero time means never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// untilFirst returns how long to wait for the earliest of the times that are not zero. A
// conflict is tried again after conflictRetryInterval.
func untilFirst(now time.Time, conflicts bool, instants ...time.Time) time.Duration {
	var wait time.Duration
	if conflicts {
		wait = conflictRetryInterval
	}
	for _, t := range instants {
		if t.IsZero() {
			continue
		}
		if d := max(t.Sub(now), time.Millisecond); wait == 0 || d < wait {
			wait = d
		}
	}
	return wait
}

// resolve reads the sessions whose last write failed without a clear answer.
func (r *placementReconciler) resolve(ctx context.Context) error {
	var errs []error
	for uid, a := range r.assumed {
		if !a.uncertain {
			continue
		}
		s := &v1alpha1.WhatsAppSession{}
		err := r.direct.Get(ctx, a.key, s)
		r.run.Progress()
		switch {
		case apierrors.IsNotFound(err), err == nil && (s.UID != uid || s.Status.Epoch < a.epoch):
			delete(r.assumed, uid)
		case err != nil:
			errs = append(errs, fmt.Errorf("reading a session whose placement may have been written: %w", err))
		default:
			a.uncertain = false
			r.assumed[uid] = a
		}
	}
	return errors.Join(errs...)
}

// snapshot reads the cache. The objects of its sessions belong to the cache and must not be
// changed. again is when the snapshot changes without an event, because time has passed.
func (r *placementReconciler) snapshot(ctx context.Context, now time.Time) (out placement.Snapshot, again time.Time, err error) {
	out = placement.Snapshot{Now: now, Namespaces: map[string]placement.Namespace{}}
	list := &v1alpha1.WhatsAppSessionList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return out, time.Time{}, fmt.Errorf("listing the sessions: %w", err)
	}
	terminating := map[string]bool{} // namespaces that are being deleted
	namespaces := &metav1.PartialObjectMetadataList{}
	namespaces.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
	if err := r.client.List(ctx, namespaces, client.UnsafeDisableDeepCopy); err != nil {
		return out, time.Time{}, fmt.Errorf("listing the namespaces: %w", err)
	}
	for i := range namespaces.Items {
		ns := &namespaces.Items[i]
		terminating[ns.Name] = !ns.DeletionTimestamp.IsZero()
		out.Namespaces[ns.Name] = placement.Namespace{Pool: ns.Labels[v1alpha1.PoolLabel], MaxSessions: r.limit(ns)}
	}
	out.Workers, again = r.members.workers(now)
	dead := r.dead(ctx, list.Items, out.Workers)
	for i := range out.Workers {
		w := &out.Workers[i]
		w.Live = w.Live && !dead[w.Name] // the kubelet may report the end before the Lease expires
	}

	out.Sessions = make([]placement.Session, len(list.Items))
	assumed := make(map[types.UID]assumption, len(r.assumed))
	for i := range list.Items {
		s := &list.Items[i]
		worker, heldBy := s.Status.Worker, s.Status.HeldBy
		if s.Status.Installation != r.Installation {
			worker, heldBy = "", "" // they are workers of another installation, even if they have names of ours
		}
		if a, ok := r.assumed[s.UID]; ok && a.epoch > s.Status.Epoch {
			worker, heldBy, assumed[s.UID] = a.worker, a.heldBy, a
		}
		lost := dead[heldBy]
		if lost {
			heldBy = ""
		}
		out.Sessions[i] = placement.Session{
			Object: s, UID: s.UID, Namespace: s.Namespace, Created: s.CreationTimestamp.Time,
			Worker: worker, HeldBy: heldBy, Lost: lost, Since: r.since[s.UID],
			Wanted: wantsWorker(s, r.Installation, r.Deletions.of(s, terminating[s.Namespace], now), now), Urgent: !s.DeletionTimestamp.IsZero(),
			Paired: s.Status.JID != "", Idle: status.Kept(s.Status.Phase), Connected: connectedSince(s), Unconnected: isUnconnected(s, now),
			MoveTo: s.Annotations[v1alpha1.MoveToAnnotation], Placed: r.placedAt(s, now),
		}
	}
	r.assumed = assumed
	if r.RebalanceInterval > 0 {
		out.Rebalance = &placement.Rebalance{
			Threshold: rebalanceThreshold, MinAge: r.RebalanceAfter, Interval: r.RebalanceInterval, Last: r.rebalanced,
		}
	}
	return out, again, nil
}

// placedAt is when the session was placed last, which is its epoch (docs/architecture.md,
// "Ownership"). An epoch that is ahead of this clock, from a manager whose clock was wrong or
// from a restored store, does not count: otherwise a person could not move the session for
// hours. Then only this process's own placements are known.
func (r *placementReconciler) placedAt(s *v1alpha1.WhatsAppSession, now time.Time) time.Time {
	if at := time.Unix(s.Status.Epoch, 0); !at.After(now) {
		return at
	}
	return r.placed[s.UID]
}

// isUnconnected reports whether the session should have a connection and has none: neither
// one that is logged in nor one that offers codes. A session that waits for a person or a
// time should have none.
func isUnconnected(s *v1alpha1.WhatsAppSession, now time.Time) bool {
	waits := s.Status.RetryAfter != nil && now.Before(s.Status.RetryAfter.Time) ||
		status.Kept(s.Status.Phase) || meta.IsStatusConditionTrue(s.Status.Conditions, v1alpha1.ConditionStalled)
	return s.Status.Phase != v1alpha1.PhaseConnected && !s.Status.OffersCodes() && !waits
}

// connectedSince is when the session connected; zero: it is not connected.
func connectedSince(s *v1alpha1.WhatsAppSession) time.Time {
	if s.Status.Phase != v1alpha1.PhaseConnected || s.Status.LastConnectedTime == nil {
		return time.Time{}
	}
	return s.Status.LastConnectedTime.Time
}

// reportLostWorkers reports once for each worker that it is dead. There is one Event, for
// its Lease: Events for each of a thousand sessions would take a quarter of the time of the
// fail-over itself, and the sessions' conditions say the same.
//
// A worker is reported again only if it was live in between, or no session named it as its
// holder any more: an observer that could not read the heartbeats for a moment has not found
// a second death.
func (r *placementReconciler) reportLostWorkers(snapshot placement.Snapshot) {
	lost, holders := map[string]int{}, map[string]bool{}
	for i := range snapshot.Sessions {
		s := &snapshot.Sessions[i]
		holder := s.Object.Status.HeldBy
		holders[holder] = true
		if s.Lost {
			lost[holder]++
		}
	}
	for worker, n := range lost {
		if !r.lost[worker] {
			r.lost[worker] = true
			r.Log.Info("Placing the sessions of a dead worker on others", "worker", worker, "sessions", n)
			metrics.WorkerLost()
			lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: membership.LeaseName(r.Release, worker)}}
			r.events.Eventf(lease, nil, corev1.EventTypeWarning, v1alpha1.ReasonWorkerLost, "Place", "worker %s is dead: its %d sessions are placed on other workers", worker, n)
		}
	}
	live := map[string]bool{}
	for _, w := range snapshot.Workers {
		live[w.Name] = w.Live
	}
	for worker := range r.lost {
		if !holders[worker] || live[worker] {
			delete(r.lost, worker)
		}
	}
}

// reportFailingWorkers reports once for each worker, with an Event for its Lease, that it
// cannot reach its database or WhatsApp, and logs once that it can again.
func (r *placementReconciler) reportFailingWorkers(snapshot placement.Snapshot) {
	failing := map[string]string{}
	for _, w := range snapshot.Workers {
		if !w.Live || !w.Failing {
			continue
		}
		what := r.members.unreachable(w.Name)
		failing[w.Name] = what
		if r.failingWorkers[w.Name] == what {
			continue
		}
		r.Log.Info("Found a worker that cannot reach what it needs", "worker", w.Name, "unreachable", what)
		lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: membership.LeaseName(r.Release, w.Name)}}
		r.events.Eventf(lease, nil, corev1.EventTypeWarning, v1alpha1.ReasonWorkerFailing, "Place",
			"worker %s cannot reach %s: while other workers can, it gets no new sessions, and after %s its sessions without a connection move to them; check its network and its log",
			w.Name, what, placement.FailingTimeout)
	}
	for worker := range r.failingWorkers {
		if failing[worker] == "" {
			r.Log.Info("Found a worker that is not failing any more", "worker", worker)
		}
	}
	r.failingWorkers = failing
}

// reportMisplaced reports once for each session and reason that the pool of its namespace
// cannot take it, so that it stays connected in another pool.
func (r *placementReconciler) reportMisplaced(plan placement.Plan, snapshot placement.Snapshot) {
	misplaced := map[types.UID]string{}
	for _, m := range plan.Misplaced {
		misplaced[m.Session.UID] = m.Reason
		if r.misplaced[m.Session.UID] == m.Reason {
			continue
		}
		s := m.Session.Object
		why := r.explain(m.Reason, s.Namespace, snapshot)
		r.Log.Info("Failed to move a session to the pool of its namespace", "namespace", s.Namespace, "session", s.Name, "worker", m.Session.Worker, "reason", why.reason)
		r.events.Eventf(s, nil, corev1.EventTypeWarning, why.reason, "Move", "the session stays on worker %s of another pool: %s", m.Session.Worker, why.message)
	}
	r.misplaced = misplaced
}

// limit reads max-sessions. An invalid value is logged and counts as no limit.
func (r *placementReconciler) limit(ns *metav1.PartialObjectMetadata) *int {
	text, ok := ns.Annotations[v1alpha1.MaxSessionsAnnotation]
	if !ok {
		delete(r.invalidLimits, ns.Name)
		return nil
	}
	limit, err := strconv.Atoi(text)
	if err != nil || limit < 0 {
		if r.invalidLimits[ns.Name] == text {
			return nil
		}
		r.invalidLimits[ns.Name] = text
		r.Log.Info("Ignoring an annotation that is not a number of at least 0: the sessions of the namespace are not limited",
			"namespace", ns.Name, "annotation", v1alpha1.MaxSessionsAnnotation)
		return nil
	}
	delete(r.invalidLimits, ns.Name)
	return &limit
}

// reportDeclined reports once for each value of move-to why the session is not moved there.
func (r *placementReconciler) reportDeclined(plan placement.Plan) {
	declined := map[types.UID]string{}
	for _, d := range plan.Declined {
		s := d.Session.Object
		value := s.Annotations[v1alpha1.MoveToAnnotation]
		declined[s.UID] = value
		if r.declined[s.UID] == value {
			continue
		}
		worker := status.Clean(value, 253) // the longest name of a pod
		r.Log.Info("Ignoring the annotation move-to for now", "namespace", s.Namespace, "session", s.Name, "worker", worker, "reason", string(d.Why))
		r.events.Eventf(s, nil, corev1.EventTypeWarning, v1alpha1.ReasonMoveRefused, "Move",
			"the annotation %s names worker %q, %s", v1alpha1.MoveToAnnotation, worker, declineMessages[d.Why])
	}
	r.declined = declined
}

// declineMessages say why a session is not moved as move-to requests.
var declineMessages = map[placement.Decline]string{
	placement.DeclinedUnknown:  "which does not exist: name another or remove the annotation",
	placement.DeclinedSilent:   "which does not renew its Lease: the session moves when it does again",
	placement.DeclinedDraining: "which is shutting down: name another or remove the annotation",
	placement.DeclinedPool:     "which is of another pool: the label " + v1alpha1.PoolLabel + " of the namespace chooses the pool",
	placement.DeclinedFailing:  "which cannot reach its database or WhatsApp: the session moves when it can again",
	placement.DeclinedFull:     "which is full: the session moves when there is room",
}

// remember records since when each session wants a worker and when each pool was rebalanced,
// and deletes what no plan needs any more.
func (r *placementReconciler) remember(snapshot placement.Snapshot, plan placement.Plan, now time.Time) {
	since := map[types.UID]time.Time{}
	keep := func(s *placement.Session) {
		if since[s.UID] = r.since[s.UID]; since[s.UID].IsZero() {
			since[s.UID] = now
		}
	}
	for _, s := range plan.Waiting {
		keep(s)
	}
	for _, u := range plan.Unplaceable {
		keep(u.Session)
	}
	for _, m := range plan.Moves {
		if m.To == "" {
			keep(m.Session)
		}
		if m.Cause == placement.Rebalanced {
			r.rebalanced[snapshot.Pool(m.Session.Namespace)] = now
		}
	}
	r.since = since
	for name := range r.invalidLimits {
		if _, found := snapshot.Namespaces[name]; !found {
			delete(r.invalidLimits, name)
		}
	}
	for uid, at := range r.placed {
		if now.Sub(at) >= placement.MoveInterval {
			delete(r.placed, uid)
		}
	}
	for pool, last := range r.rebalanced { // older than the interval: it does not matter any more
		if now.Sub(last) >= r.RebalanceInterval {
			delete(r.rebalanced, pool)
		}
	}
}

// carryOut writes the plan, several sessions at a time. conflicts says that a decision was
// made from a stale cache and must be made again; retry is when to try failed writes again.
func (r *placementReconciler) carryOut(ctx context.Context, snapshot placement.Snapshot, plan placement.Plan, now time.Time) (conflicts bool, retry time.Time) {
	type write struct {
		decision
		assume assumption
		err    error
	}
	writes := make([]write, 0, len(plan.Moves)+len(plan.Unplaceable))
	failing := r.failing
	r.failing = map[types.UID]failure{}
	add := func(s *placement.Session, to, reason string, cause placement.Cause) {
		if f, found := failing[s.UID]; found && now.Before(f.until) {
			r.failing[s.UID] = f
			retry = earlier(retry, f.until)
			return
		}
		writes = append(writes, write{decision: decision{
			session: s, to: to, cause: cause, why: r.explain(reason, s.Namespace, snapshot),
		}})
	}
	for _, m := range plan.Moves {
		add(m.Session, m.To, m.Reason, m.Cause)
	}
	for _, u := range plan.Unplaceable {
		add(u.Session, "", u.Reason, "")
	}
	var group errgroup.Group
	group.SetLimit(r.Concurrency)
	for i := range writes {
		w := &writes[i]
		group.Go(func() error {
			w.assume, w.err = r.write(ctx, w.decision, now)
			r.run.Progress()
			return nil // the failure of one session does not delay the others
		})
	}
	_ = group.Wait() // always nil
	for _, w := range writes {
		uid := w.session.UID
		switch {
		case w.err == nil && w.assume.epoch != 0:
			r.assumed[uid] = w.assume
			if w.assume.epoch > now.Unix() {
				r.placed[uid] = now
			}
		case apierrors.IsConflict(w.err), apierrors.IsNotFound(w.err), errors.Is(w.err, errNotDead):
			conflicts = true
			metrics.Placement("conflict")
		case w.err != nil:
			w.assume.uncertain = true
			r.assumed[uid] = w.assume
			f := failure{count: failing[uid].count + 1}
			f.until = now.Add(backoff.Backoff{First: retryFirst, Most: maxRetryInterval}.After(f.count))
			r.failing[uid] = f
			retry = earlier(retry, f.until)
			r.Log.Error(w.err, "Failed to place a session, trying again", "namespace", w.session.Namespace, "session", w.session.Object.Name, "worker", w.to)
			metrics.Placement("failed")
		}
	}
	return conflicts, retry
}

// decision is what the plan decides for one session.
type decision struct {
	session *placement.Session // as it was in the snapshot
	to      string
	why     unplaced
	cause   placement.Cause
}

// write writes a session's worker, or why it has none, and clears a dead holder, all in one
// patch. It returns the zero assumption if there was nothing to write.
func (r *placementReconciler) write(ctx context.Context, d decision, now time.Time) (assumption, error) {
	cached, lost := d.session.Object, d.session.Lost
	if d.session.Worker == "" && d.to == "" && !lost && (cached.Status.HeldBy != "" || isReported(cached, d.why)) {
		return assumption{}, nil
	}
	s := cached.DeepCopy()
	next := *s.Status.DeepCopy()
	if next.Worker != d.to || lost {
		next.Worker, next.Epoch = d.to, nextEpoch(next, now)
	}
	if lost {
		next = afterWorkerLoss(s, next, now)
	}
	if next.HeldBy == "" {
		next = status.Summarize(next, unheldFacts(s, next, d.why, now), now)
		next = supersede(s, next, now)
	}
	if equality.Semantic.DeepEqual(s.Status, next) {
		return assumption{}, nil
	}
	if lost && !r.Deaths.Dead(cached.Status.HeldBy) { // many writes may have come before this one
		return assumption{}, errNotDead
	}
	a := assumption{key: client.ObjectKeyFromObject(s), worker: d.to, heldBy: next.HeldBy, epoch: next.Epoch}
	if err := patchStatus(ctx, r.client, s, next); err != nil {
		return a, err
	}
	r.report(s, d)
	return a, nil
}

// isReported reports whether the status already says why the session has no worker.
func isReported(s *v1alpha1.WhatsAppSession, why unplaced) bool {
	placed := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionPlaced)
	return placed != nil && s.Status.Worker == "" && placed.Reason == why.reason && placed.Message == why.message && placed.ObservedGeneration == s.Generation
}

// report logs and counts what was written; s is the session after the write.
func (r *placementReconciler) report(s *v1alpha1.WhatsAppSession, d decision) {
	from, to := d.session.Worker, d.to
	log := r.Log.WithValues("namespace", s.Namespace, "session", s.Name, "sessionID", s.Status.SessionID, "epoch", s.Status.Epoch)
	warn := func(reason, message string) {
		r.events.Eventf(s, nil, corev1.EventTypeWarning, reason, "Place", "%s", message)
	}
	switch {
	case d.session.Lost:
		// reportLostWorkers has logged one line for all sessions of the worker.
		log.V(1).Info("Took a session from a dead worker", "worker", to, "from", d.session.Object.Status.HeldBy, "reason", d.why.reason)
		metrics.Placement("failed_over")
		if d.session.Object.Status.Passkey != nil {
			warn(v1alpha1.ReasonPasskeyExpired, session.PasskeyLostMessage)
		}
		if d.why.reason != "" {
			warn(d.why.reason, d.why.message)
		}
	case to != "" && from == "":
		log.Info("Placed a session", "worker", to)
		metrics.Placement("placed")
	case to != "":
		if d.cause != "" { // otherwise it could not stay
			log = log.WithValues("cause", string(d.cause))
		}
		log.Info("Moved a session", "worker", to, "from", from)
		metrics.Placement(moved[d.cause])
	case from != "":
		log.Info("Withdrew a session that no other worker can take", "worker", from, "reason", d.why.reason)
		metrics.Placement("withdrawn")
		if s.Status.HeldBy == "" { // otherwise it is reported when its holder has released it
			warn(d.why.reason, d.why.message)
		}
	case lastUnplaced(d.session.Object).reason != d.why.reason:
		log.Info("Failed to place a session", "reason", d.why.reason)
		warn(d.why.reason, d.why.message)
	default: // the reason is the same; only its message or the generation has changed
	}
}

// moved are the values of the metric's label for the causes of moves.
var moved = map[placement.Cause]string{"": "moved", placement.Requested: "moved_as_requested", placement.Rebalanced: "rebalanced", placement.Failing: "moved_from_failing"}

// explain says why a session has no worker, and what a person can do.
func (r *placementReconciler) explain(reason, namespace string, snapshot placement.Snapshot) unplaced {
	ns, pool := snapshot.Namespaces[namespace], snapshot.Pool(namespace)
	switch reason {
	case v1alpha1.ReasonNoCapacity:
		return unplaced{reason, fmt.Sprintf("every worker of the pool %q that can take sessions is full: add workers, or raise their --capacity", pool)}
	case v1alpha1.ReasonNoWorkers:
		return unplaced{reason, r.explainNoWorkers(pool, snapshot.Workers)}
	case v1alpha1.ReasonTooManySessions:
		return unplaced{reason, fmt.Sprintf("the namespace has the %d sessions that its annotation %s allows: delete sessions, or ask an administrator to raise it", *ns.MaxSessions, v1alpha1.MaxSessionsAnnotation)}
	default:
		return unplaced{}
	}
}

// explainNoWorkers says why no worker of a pool can take sessions, and what a person can do.
func (r *placementReconciler) explainNoWorkers(pool string, workers []placement.Worker) string {
	draining, silent := false, false
	pools := map[string]bool{}
	for _, w := range workers {
		switch {
		case w.Live && !w.Draining:
			pools[w.Pool] = true
		case w.Pool != pool || r.Deaths.Dead(w.Name):
		case w.Live:
			draining = true
		default:
			silent = true
		}
	}
	switch {
	case draining && silent:
		return fmt.Sprintf("every worker of the pool %q is shutting down or does not renew its Lease: start another one", pool)
	case draining:
		return fmt.Sprintf("every worker of the pool %q is shutting down: start another one", pool)
	case silent:
		return fmt.Sprintf("no worker of the pool %q renews its Lease: check the workers' pods, and whether they reach the API server", pool)
	}
	names := slices.Sorted(maps.Keys(pools))
	for i := range names {
		names[i] = strconv.Quote(names[i])
	}
	const most = 5
	if len(names) > most {
		names = append(names[:most], "…")
	}
	exist := "no pool has workers now"
	if len(names) > 0 {
		exist = "pools with workers: " + strings.Join(names, ", ")
	}
	return fmt.Sprintf("no worker serves the pool %q: scale up its Deployment or start a worker with --pool=%s, or correct the label %s of the Namespace (%s)", pool, pool, v1alpha1.PoolLabel, exist)
}

// count counts the sessions and workers of the snapshot and the plan. A session that another installation manages is
// in that one's counts; one that nobody manages is in these.
func (r *placementReconciler) count(snapshot placement.Snapshot, plan placement.Plan, planning time.Duration) metrics.Fleet {
	f := metrics.Fleet{
		Sessions: map[string]int{}, Unplaced: map[metrics.PoolReason]int{}, Misplaced: map[metrics.PoolReason]int{}, Workers: map[metrics.PoolState]int{}, Capacity: map[string]int{}, Wanted: map[string]int{}, Planning: planning,
	}
	live := map[string]bool{}
	for _, w := range snapshot.Workers {
		state := metrics.PoolState{Pool: w.Pool, State: "live"}
		switch {
		case r.Deaths.Dead(w.Name):
			state.State = "dead"
		case !w.Live:
			state.State = "silent"
		case w.Draining:
			state.State = "draining"
		default:
			if w.Failing {
				state.State = "failing"
			}
			f.Capacity[w.Pool] += w.Capacity
		}
		live[w.Name] = w.Live
		f.Workers[state]++
	}
	for i := range snapshot.Sessions {
		s := &snapshot.Sessions[i].Object.Status
		foreign := s.Installation != "" && s.Installation != r.Installation
		if foreign && status.Reason(*s) != v1alpha1.ReasonOtherInstallation {
			continue
		}
		f.Sessions[string(s.Phase)]++
		if snapshot.Sessions[i].Wanted {
			f.Wanted[snapshot.Pool(snapshot.Sessions[i].Namespace)]++
		}
		if !foreign && s.HeldBy != "" && !live[s.HeldBy] {
			f.HeldBySilent++
		}
	}
	of := func(s *placement.Session, reason string) metrics.PoolReason {
		return metrics.PoolReason{Pool: snapshot.Pool(s.Namespace), Reason: reason}
	}
	for _, u := range plan.Unplaceable {
		f.Unplaced[of(u.Session, u.Reason)]++
	}
	for _, m := range plan.Moves {
		if m.Reason != "" {
			f.Unplaced[of(m.Session, m.Reason)]++
		}
	}
	for _, m := range plan.Misplaced {
		f.Misplaced[of(m.Session, m.Reason)]++
	}
	return f
}

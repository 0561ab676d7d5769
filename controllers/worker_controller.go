package controllers

import (
	"context"
	"errors"
	"fmt"
	"strconv"
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
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/lease"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// gather is how long a run waits after the first change, for the changes that
// come with it: a manifest with many sessions, a worker with many claims.
const gather = 20 * time.Millisecond

// everything is the one request of the placement reconciler: a plan is for all sessions.
var everything = reconcile.Request{NamespacedName: types.NamespacedName{Name: "placement"}}

// PlacementOptions configure SetupPlacement. All but Concurrency are required.
type PlacementOptions struct {
	// Installation is the id of this installation: only its sessions are placed.
	Installation string
	Clock        clock.PassiveClock
	Log          logr.Logger
	// Concurrency is how many sessions are written at a time; default 16.
	Concurrency int
}

// placementReconciler places the sessions on the workers (DESIGN section 3).
// Only the leader runs it, one run at a time.
//
// A run reads the cache, which may be behind its own writes; so it remembers
// what it wrote until the cache shows it, and no worker is filled twice.
type placementReconciler struct {
	PlacementOptions
	client  client.Client
	direct  client.Reader // the API server itself
	events  events.EventRecorder
	members *members

	// assumed are decisions that were written and that the cache does not show yet.
	assumed map[types.UID]assumption
	// since is when a session began to want a worker, or another one.
	since map[types.UID]time.Time
	// misread are the values of max-sessions that are no numbers, by namespace, so that
	// each is said once.
	misread map[string]string
}

// assumption is a placement as it was written. The epoch only rises, so it
// tells whether the cache is behind.
type assumption struct {
	key    types.NamespacedName
	worker string
	epoch  int64
	// uncertain: the write got no answer; the API server must be asked.
	uncertain bool
}

// SetupPlacement adds the placement to the manager. The manager's cache needs
// CacheOptions.
func SetupPlacement(mgr ctrl.Manager, o PlacementOptions) error {
	if o.Concurrency == 0 {
		o.Concurrency = 16
	}
	r := &placementReconciler{
		PlacementOptions: o, client: mgr.GetClient(), direct: mgr.GetAPIReader(), events: mgr.GetEventRecorder("whatsapp-operator"),
		members: &members{clock: o.Clock, log: o.Log, known: map[string]sighting{}},
		assumed: map[types.UID]assumption{}, since: map[types.UID]time.Time{}, misread: map[string]string{},
	}
	err := ctrl.NewControllerManagedBy(mgr).Named("placement").
		Watches(&v1alpha1.WhatsAppSession{}, onChange(sessionChanged)).
		Watches(&coordinationv1.Lease{}, r.onLease()).
		WatchesMetadata(&corev1.Namespace{}, onChange(namespaceChanged)).
		WithOptions(options(1, o.Log)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the placement: %w", err)
	}
	return nil
}

type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// onChange asks for a run when an object comes, goes, or changes in what a plan depends on.
func onChange(changed func(before, after client.Object) bool) handler.EventHandler {
	return handler.Funcs{
		CreateFunc: func(_ context.Context, _ event.CreateEvent, q queue) { q.AddAfter(everything, gather) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
			if changed(e.ObjectOld, e.ObjectNew) {
				q.AddAfter(everything, gather)
			}
		},
		DeleteFunc: func(_ context.Context, _ event.DeleteEvent, q queue) { q.AddAfter(everything, gather) },
	}
}

func sessionChanged(before, after client.Object) bool {
	a, b := before.(*v1alpha1.WhatsAppSession), after.(*v1alpha1.WhatsAppSession)
	type facts struct {
		suspend, deleted, linked                bool
		policy                                  v1alpha1.DeletionPolicy
		phase                                   v1alpha1.Phase
		id, installation, worker, heldBy, start string
		epoch                                   int64
	}
	of := func(s *v1alpha1.WhatsAppSession) facts {
		return facts{
			suspend: s.Spec.Suspend, deleted: !s.DeletionTimestamp.IsZero(), linked: s.Status.JID != "",
			policy: s.Spec.DeletionPolicy, phase: s.Status.Phase, id: s.Status.SessionID, installation: s.Status.Installation,
			worker: s.Status.Worker, heldBy: s.Status.HeldBy, start: s.Status.HolderStart, epoch: s.Status.Epoch,
		}
	}
	return of(a) != of(b)
}

func namespaceChanged(before, after client.Object) bool {
	return before.GetLabels()[v1alpha1.PoolLabel] != after.GetLabels()[v1alpha1.PoolLabel] ||
		before.GetAnnotations()[v1alpha1.MaxSessionsAnnotation] != after.GetAnnotations()[v1alpha1.MaxSessionsAnnotation]
}

func (r *placementReconciler) onLease() handler.EventHandler {
	observe := func(obj client.Object, q queue) {
		if l := obj.(*coordinationv1.Lease); l.Labels[lease.ComponentLabel] == lease.ComponentWorker && r.members.observe(l) {
			q.AddAfter(everything, gather)
		}
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent, q queue) { observe(e.Object, q) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) { observe(e.ObjectNew, q) },
		DeleteFunc: func(_ context.Context, e event.DeleteEvent, q queue) {
			if r.members.forget(e.Object.GetName()) {
				q.AddAfter(everything, gather)
			}
		},
	}
}

// Reconcile makes a plan and carries it out.
func (r *placementReconciler) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	if err := r.resolve(ctx); err != nil {
		return ctrl.Result{}, err
	}
	now := r.Clock.Now()
	sessions, snapshot, expires, err := r.snapshot(ctx, now)
	if err != nil {
		return ctrl.Result{}, err
	}
	plan := placement.Make(snapshot)
	r.count(sessions, snapshot, plan, r.Clock.Since(now))
	r.remember(snapshot, plan, now)

	conflicts, err := r.carryOut(ctx, sessions, snapshot, plan, now)
	if err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{RequeueAfter: untilFirst(now, conflicts, plan.Again, expires)}, nil
}

// untilFirst is how long to wait for the first of the instants that are not zero.
func untilFirst(now time.Time, conflicts bool, instants ...time.Time) time.Duration {
	var wait time.Duration
	if conflicts {
		wait = againAfterConflict
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

// resolve asks the API server about the writes that got no answer.
func (r *placementReconciler) resolve(ctx context.Context) error {
	for uid, a := range r.assumed {
		if !a.uncertain {
			continue
		}
		s := &v1alpha1.WhatsAppSession{}
		err := r.direct.Get(ctx, a.key, s)
		switch {
		case apierrors.IsNotFound(err), err == nil && (s.UID != uid || s.Status.Epoch < a.epoch):
			delete(r.assumed, uid)
		case err != nil:
			return fmt.Errorf("asking for a session whose placement got no answer: %w", err)
		default:
			a.uncertain = false
			r.assumed[uid] = a
		}
	}
	return nil
}

// snapshot reads the cache. The sessions are the cache's own and must not be changed.
func (r *placementReconciler) snapshot(ctx context.Context, now time.Time) ([]v1alpha1.WhatsAppSession, placement.Snapshot, time.Time, error) {
	out := placement.Snapshot{Now: now, Namespaces: map[string]placement.Namespace{}}
	list := &v1alpha1.WhatsAppSessionList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, out, time.Time{}, fmt.Errorf("listing the sessions: %w", err)
	}
	namespaces := &metav1.PartialObjectMetadataList{}
	namespaces.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
	if err := r.client.List(ctx, namespaces, client.UnsafeDisableDeepCopy); err != nil {
		return nil, out, time.Time{}, fmt.Errorf("listing the namespaces: %w", err)
	}
	for i := range namespaces.Items {
		ns := &namespaces.Items[i]
		out.Namespaces[ns.Name] = placement.Namespace{Pool: ns.Labels[v1alpha1.PoolLabel], MaxSessions: r.limit(ns)}
	}
	var expires time.Time
	out.Workers, expires = r.members.workers(now)

	out.Sessions = make([]placement.Session, len(list.Items))
	assumed := make(map[types.UID]assumption, len(r.assumed))
	for i := range list.Items {
		s := &list.Items[i]
		worker := s.Status.Worker
		if a, ok := r.assumed[s.UID]; ok && a.epoch > s.Status.Epoch {
			worker, assumed[s.UID] = a.worker, a
		}
		out.Sessions[i] = placement.Session{
			UID: s.UID, Namespace: s.Namespace, Created: s.CreationTimestamp.Time,
			Worker: worker, HeldBy: s.Status.HeldBy, Since: r.since[s.UID],
			Wanted: wantsWorker(s, r.Installation, now), Urgent: !s.DeletionTimestamp.IsZero(),
		}
	}
	r.assumed = assumed
	return list.Items, out, expires, nil
}

// limit reads max-sessions. What is no number is no limit, and said.
func (r *placementReconciler) limit(ns *metav1.PartialObjectMetadata) *int {
	text, ok := ns.Annotations[v1alpha1.MaxSessionsAnnotation]
	if !ok {
		return nil
	}
	limit, err := strconv.Atoi(text)
	if err != nil || limit < 0 {
		if r.misread[ns.Name] == text {
			return nil
		}
		r.misread[ns.Name] = text
		r.Log.Info("The annotation of a namespace is not a number from 0 on; its sessions are not limited",
			"namespace", ns.Name, "annotation", v1alpha1.MaxSessionsAnnotation)
		return nil
	}
	delete(r.misread, ns.Name)
	return &limit
}

// remember keeps since when each session has wanted a worker.
func (r *placementReconciler) remember(snapshot placement.Snapshot, plan placement.Plan, now time.Time) {
	since := map[types.UID]time.Time{}
	keep := func(i int) {
		uid := snapshot.Sessions[i].UID
		if since[uid] = r.since[uid]; since[uid].IsZero() {
			since[uid] = now
		}
	}
	for _, i := range plan.Waiting {
		keep(i)
	}
	for _, refused := range plan.Refusals {
		keep(refused.Session)
	}
	for _, m := range plan.Moves {
		if m.To == "" {
			keep(m.Session)
		}
	}
	r.since = since
}

// carryOut writes the plan, several sessions at a time. It reports whether a
// decision was made from an old picture and must be made again.
func (r *placementReconciler) carryOut(
	ctx context.Context, sessions []v1alpha1.WhatsAppSession, snapshot placement.Snapshot, plan placement.Plan, now time.Time,
) (conflicts bool, err error) {
	type write struct {
		session int
		to      string
		why     refusal
		assume  assumption
		err     error
	}
	writes := make([]write, 0, len(plan.Moves)+len(plan.Refusals))
	for _, m := range plan.Moves {
		writes = append(writes, write{session: m.Session, to: m.To, why: r.explain(m.Refused, sessions[m.Session].Namespace, snapshot)})
	}
	for _, refused := range plan.Refusals {
		writes = append(writes, write{session: refused.Session, why: r.explain(refused.Reason, sessions[refused.Session].Namespace, snapshot)})
	}
	var group errgroup.Group
	group.SetLimit(r.Concurrency)
	for i := range writes {
		w := &writes[i]
		group.Go(func() error {
			w.assume, w.err = r.write(ctx, &sessions[w.session], snapshot.Sessions[w.session].Worker, w.to, w.why, now)
			return nil // one session's trouble does not keep the others waiting
		})
	}
	_ = group.Wait() // always nil
	var errs []error
	for _, w := range writes {
		uid := sessions[w.session].UID
		switch {
		case w.err == nil && w.assume.epoch != 0:
			r.assumed[uid] = w.assume
		case apierrors.IsConflict(w.err), apierrors.IsNotFound(w.err):
			conflicts = true
			metrics.Placement("conflict")
		case w.err != nil:
			w.assume.uncertain = true
			r.assumed[uid] = w.assume
			errs = append(errs, w.err)
			metrics.Placement("failed")
		}
	}
	return conflicts, errors.Join(errs...)
}

// write gives a session its worker, or says why it has none. from is the worker
// that the plan was made with. The zero assumption says that nothing was to be written.
func (r *placementReconciler) write(
	ctx context.Context, cached *v1alpha1.WhatsAppSession, from, to string, why refusal, now time.Time,
) (assumption, error) {
	if from == "" && to == "" && (cached.Status.HeldBy != "" || says(cached, why)) {
		return assumption{}, nil
	}
	s := cached.DeepCopy()
	next := *s.Status.DeepCopy()
	if next.Worker != to {
		next.Worker, next.Epoch = to, nextEpoch(next, now)
	}
	if next.HeldBy == "" {
		next = status.Summarize(next, unheld(s, next, why, now), now)
		next = speak(s, next, now)
	}
	if equality.Semantic.DeepEqual(s.Status, next) {
		return assumption{}, nil
	}
	a := assumption{key: client.ObjectKeyFromObject(s), worker: to, epoch: next.Epoch}
	if err := patchStatus(ctx, r.client, s, next); err != nil {
		return a, err
	}
	r.report(s, from, to, why)
	return a, nil
}

// says reports whether the status has the refusal already.
func says(s *v1alpha1.WhatsAppSession, why refusal) bool {
	placed := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionPlaced)
	return placed != nil && s.Status.Worker == "" && placed.Reason == why.reason && placed.Message == why.message && placed.ObservedGeneration == s.Generation
}

func (r *placementReconciler) report(s *v1alpha1.WhatsAppSession, from, to string, why refusal) {
	log := r.Log.WithValues("namespace", s.Namespace, "session", s.Name, "sessionID", s.Status.SessionID, "epoch", s.Status.Epoch)
	switch {
	case to != "" && from == "":
		log.Info("Placed", "worker", to)
		metrics.Placement("placed")
	case to != "":
		log.Info("Moved", "worker", to, "from", from)
		metrics.Placement("moved")
	case from != "":
		log.Info("Withdrawn: no other worker can take the session", "worker", from, "reason", why.reason)
		metrics.Placement("withdrawn")
	default:
		log.Info("Not placed", "reason", why.reason)
		r.events.Eventf(s, nil, corev1.EventTypeWarning, why.reason, "Place", "%s", why.message)
	}
}

// explain makes a sentence of the reason why a session has no worker.
func (r *placementReconciler) explain(reason, namespace string, snapshot placement.Snapshot) refusal {
	ns := snapshot.Namespaces[namespace]
	pool := ns.Pool
	if pool == "" {
		pool = v1alpha1.DefaultPool
	}
	switch reason {
	case v1alpha1.ReasonNoCapacity:
		return refusal{reason, fmt.Sprintf("every worker of the pool %q is full: add workers", pool)}
	case v1alpha1.ReasonNoWorkers:
		return refusal{reason, fmt.Sprintf("no worker of the pool %q is running: start one, or correct the label %s of the namespace", pool, v1alpha1.PoolLabel)}
	case v1alpha1.ReasonTooManySessions:
		return refusal{reason, fmt.Sprintf("the namespace has the %d sessions that its annotation %s allows: delete sessions or have it raised", *ns.MaxSessions, v1alpha1.MaxSessionsAnnotation)}
	default:
		return refusal{}
	}
}

// count publishes what the plan was made from.
func (r *placementReconciler) count(sessions []v1alpha1.WhatsAppSession, snapshot placement.Snapshot, plan placement.Plan, planning time.Duration) {
	f := metrics.Fleet{
		Sessions: map[string]int{}, Unplaced: map[string]int{}, Workers: map[metrics.PoolState]int{}, Capacity: map[string]int{}, Planning: planning,
	}
	live := map[string]bool{}
	for _, w := range snapshot.Workers {
		state := metrics.PoolState{Pool: w.Pool, State: "live"}
		switch {
		case !w.Live:
			state.State = "silent"
		case w.Draining:
			state.State = "draining"
		default:
			f.Capacity[w.Pool] += w.Capacity
		}
		live[w.Name] = w.Live
		f.Workers[state]++
	}
	for i := range sessions {
		s := &sessions[i].Status
		f.Sessions[string(s.Phase)]++
		if s.HeldBy != "" && !live[s.HeldBy] {
			f.HeldBySilent++
		}
	}
	for _, refused := range plan.Refusals {
		f.Unplaced[refused.Reason]++
	}
	for _, m := range plan.Moves {
		if m.Refused != "" {
			f.Unplaced[m.Refused]++
		}
	}
	metrics.SetFleet(f)
}

// Package worker is what runs in a worker pod: an agent that learns from the
// API server which sessions are placed here, and one supervisor per session
// that claims the device, connects it, writes its status, publishes it to Redis
// and records Events.
//
// Package session, which is pure, decides what a session does next. A supervisor
// is the loop that carries the decisions out.
package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

const (
	// drainInterval is how often a drain checks which sessions are left.
	drainInterval = 100 * time.Millisecond
	// answerTimeout is how long a drain waits for the manager to name successors, counted
	// from the last session that left. The drain stops waiting evictBefore the end of the
	// grace period (docs/architecture.md, "Ownership").
	answerTimeout = 30 * time.Second
	evictBefore   = 5 * time.Second
	// maxReconciles is how many sessions are reconciled at a time. Each one that was moved
	// away costs a request to the API server.
	maxReconciles = 16
	// reconcileRetryFirst is the first pause after a failed reconcile; each further failure
	// doubles it, up to retryMost.
	reconcileRetryFirst = 50 * time.Millisecond
	// heldListInterval is how often this worker lists the sessions that it holds and that
	// are placed elsewhere.
	heldListInterval = 5 * time.Minute
	// loopInterval is how often the agent's loop runs at least. It counts as stuck after
	// stuckTimeout, which is longer than a slow refresh of the cache takes.
	loopInterval = 5 * time.Second
	stuckTimeout = time.Minute
)

// Options are what an agent needs.
type Options struct {
	// Worker is this pod's name; Process identifies this process in the pod.
	Worker, Process string
	// Installation is the id of this installation. Sessions of other installations are left alone.
	Installation string
	// Stop is closed when the process is asked to end. The agent then hands all sessions over.
	Stop <-chan struct{}
	// DrainTimeout bounds the hand-over of all sessions at shutdown: the pod's grace period.
	DrainTimeout time.Duration
	Membership   Membership
	// Health records whether this worker reaches its database and WhatsApp; nil: a new one.
	Health    *Health
	Sessions  Sessions
	Accounts  Accounts
	Proxies   Proxies
	Publisher Publisher
	Limiter   Limiter
	// Inbox is asked when messages were refused, or too many wait.
	Inbox Inbox
	// DropMessages: there is no Laravel application, so that messages are acknowledged, counted and
	// dropped.
	DropMessages bool
	// Version is refreshed at the start, and when WhatsApp refuses it; nil: never.
	Version Version
	// Quarantine and Outdated have defaults for their zero fields.
	Quarantine session.Quarantine
	Outdated   Outdated
	Events     Events
	Clock      clock.WithTicker
	Log        logr.Logger
}

// Agent supervises the sessions of one worker.
type Agent struct {
	o Options
	// placed is a cache of the sessions whose status.worker is this worker.
	placed client.Reader
	// requeue asks for a reconcile of a session whose supervisor has ended.
	requeue chan event.GenericEvent
	ready   chan struct{}

	// lastRun is when the agent's loop last ran, in Unix nanoseconds.
	lastRun atomic.Int64

	mu          sync.Mutex
	joined      bool
	draining    bool
	evicting    bool // the drain no longer waits for successors
	ended       bool // no supervisor is started any more
	heldListed  bool // the sessions that a former process held were listed
	supervisors map[types.NamespacedName]*supervisor
	// lastKnown has the last object that each ended supervisor knew, until the cache shows
	// something newer.
	lastKnown map[types.NamespacedName]objectVersion
	// paces has the recent attempts of the sessions whose supervisors have ended, so that a
	// session that leaves and returns is not tried more often than one that stays.
	paces map[types.UID]*session.Pace
	// placedCount is how many sessions were placed here when they were last counted. It is
	// valid until placedCountUntil.
	placedCount      int
	placedCountUntil time.Time

	starts  int // number of supervisors started
	dials   atomic.Int64
	fleet   *fleet
	inbox   *inboxWatch
	running sync.WaitGroup
	// supervisorCtx is the context of all supervisors.
	supervisorCtx     context.Context
	cancelSupervisors context.CancelFunc
}

// NewAgent returns an agent that reads from a cache of the sessions that are placed on its worker.
func NewAgent(o Options, placed client.Reader) *Agent {
	if o.Health == nil {
		o.Health = NewHealth(o.Clock, o.Log)
	}
	a := &Agent{
		o: o, placed: placed,
		requeue: make(chan event.GenericEvent, 1024), ready: make(chan struct{}),
		supervisors: map[types.NamespacedName]*supervisor{}, lastKnown: map[types.NamespacedName]objectVersion{}, paces: map[types.UID]*session.Pace{},
	}
	// The supervisors outlive the manager's context: they are drained after it has ended.
	a.supervisorCtx, a.cancelSupervisors = context.WithCancel(context.Background())
	a.inbox = newInboxWatch(o.Inbox, o.Health, o.Clock, o.Log)
	a.fleet = newFleet(o.Outdated, o.Version, o.Clock, o.Log, a.sessions, a.placedSessions, a.retryOutdated, a.resumeSoon)
	return a
}

// SetupWithManager makes the manager call Reconcile for the sessions in the
// cache. The caller calls Start itself, because the manager must outlive it: an
// agent that hands its sessions over must still see which workers take them.
func (a *Agent) SetupWithManager(mgr manager.Manager, placed cache.Cache) error {
	c, err := controller.New("agent", mgr, controller.Options{
		Reconciler: a, MaxConcurrentReconciles: maxReconciles,
		// The default's pauses grow to a quarter of an hour. A session that was moved away while
		// the API server was down must be released soon after.
		RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](reconcileRetryFirst, retryMost),
	})
	if err != nil {
		return fmt.Errorf("creating the agent's controller: %w", err)
	}
	sources := []source.Source{
		source.Kind(placed, &v1alpha1.WhatsAppSession{}, &handler.TypedEnqueueRequestForObject[*v1alpha1.WhatsAppSession]{}),
		source.Channel(a.requeue, &handler.EnqueueRequestForObject{}),
	}
	for _, s := range sources {
		if err := c.Watch(s); err != nil {
			return fmt.Errorf("watching the sessions of this worker: %w", err)
		}
	}
	return nil
}

// Reconcile hands the newest object to the session's supervisor.
func (a *Agent) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	select {
	case <-a.ready:
	case <-ctx.Done():
		return reconcile.Result{}, nil
	}
	obj, cached, err := a.newest(ctx, req.NamespacedName)
	if err != nil {
		return reconcile.Result{}, err
	}
	if obj != nil && obj.Status.Installation != a.o.Installation {
		obj = nil // another installation has a worker of the same name, or the status was copied from elsewhere
	}
	if obj == nil || !cached { // the cache no longer has the session, so it cannot show a stale one
		a.mu.Lock()
		delete(a.lastKnown, req.NamespacedName)
		a.mu.Unlock()
	}
	s := a.supervisor(req.NamespacedName, obj)
	if s == nil {
		return reconcile.Result{}, nil
	}
	s.post(func() {
		if obj == nil {
			s.step(session.Vanished{})
			return
		}
		s.observe(obj)
	})
	return reconcile.Result{}, nil
}

// newest reads the session from the cache, or from the API server if the cache
// does not have it; nil: the session does not exist. A session that is moved away
// leaves the cache, so its holder must read the API server to know what to do.
func (a *Agent) newest(ctx context.Context, key types.NamespacedName) (obj *v1alpha1.WhatsAppSession, cached bool, err error) {
	obj = &v1alpha1.WhatsAppSession{}
	err = a.placed.Get(ctx, key, obj)
	if err == nil {
		return obj, true, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, false, fmt.Errorf("reading the session from the cache: %w", err)
	}
	obj, err = a.o.Sessions.Get(ctx, key)
	if apierrors.IsNotFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("reading the session from the API server: %w", err)
	}
	return obj, false, nil
}

// supervisor returns the session's supervisor. If there is none, it starts one if
// the session is placed on this worker or held by it.
func (a *Agent) supervisor(key types.NamespacedName, obj *v1alpha1.WhatsAppSession) *supervisor {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s, ok := a.supervisors[key]; ok {
		return s
	}
	if obj == nil || a.ended || obj.Status.Installation != a.o.Installation || a.isStale(key, obj) {
		return nil
	}
	heldHere := obj.Status.HeldBy == a.o.Worker
	placedHere := obj.Status.Worker == a.o.Worker && obj.Status.SessionID != ""
	if !heldHere && (!placedHere || a.draining) {
		return nil
	}
	s := newSupervisor(dependencies{
		Sessions: a.o.Sessions, Accounts: a.o.Accounts, Proxies: a.o.Proxies, Publisher: a.o.Publisher,
		Limiter: a.o.Limiter, Events: a.o.Events, Clock: a.o.Clock, Dials: &a.dials,
		Quarantine: a.o.Quarantine, Fleet: a.fleet, Health: a.o.Health, Inbox: a.inbox, DropMessages: a.o.DropMessages,
	}, a.o.Log, obj, a.o.Worker, a.nextStart(), a.paces[obj.UID])
	delete(a.paces, obj.UID)
	switch {
	case a.evicting:
		s.step(session.Evict{})
	case a.draining:
		s.step(session.Drain{})
	}
	a.supervisors[key] = s
	ended := event.GenericEvent{Object: &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}}}
	a.running.Go(func() {
		s.run(a.supervisorCtx)
		a.mu.Lock()
		delete(a.supervisors, key)
		if obj := s.machine.Object(); obj != nil {
			a.lastKnown[key] = objectVersion{uid: obj.UID, resourceVersion: obj.ResourceVersion}
			a.keepPace(obj.UID, s.machine.Pace())
		}
		a.mu.Unlock()
		// Another object may have the name by now.
		select {
		case a.requeue <- ended:
		case <-a.supervisorCtx.Done():
		}
	})
	return s
}

// objectVersion identifies one version of one object.
type objectVersion struct {
	uid             types.UID
	resourceVersion string
}

// isStale reports whether an ended supervisor of the session knew this object or
// a newer one. The cache may not show yet the write by which it released the
// session. The caller holds a.mu.
func (a *Agent) isStale(key types.NamespacedName, obj *v1alpha1.WhatsAppSession) bool {
	known, found := a.lastKnown[key]
	if !found {
		return false
	}
	if known.uid == obj.UID {
		if order, err := resourceversion.CompareResourceVersion(obj.ResourceVersion, known.resourceVersion); err == nil && order <= 0 {
			return true
		}
	}
	delete(a.lastKnown, key)
	return false
}

// keepPace keeps the pace of a session whose supervisor has ended, and removes
// the paces that have expired. The caller holds a.mu.
func (a *Agent) keepPace(uid types.UID, pace *session.Pace) {
	now := a.o.Clock.Now()
	for other, p := range a.paces {
		if p.Expired(now) {
			delete(a.paces, other)
		}
	}
	if !pace.Expired(now) {
		a.paces[uid] = pace
	}
}

// nextStart returns a unique name for a supervisor. A session that an earlier
// supervisor of the same process claimed is claimed again, so a stale cache cannot
// be mistaken for a confirmed claim.
func (a *Agent) nextStart() string {
	a.starts++
	return a.o.Process + "-" + strconv.Itoa(a.starts)
}

// Start runs the agent until the process is asked to end, then hands every
// session over and ends the membership. It returns earlier, without a hand-over,
// when ctx ends or when this worker must assume that it was declared dead.
func (a *Agent) Start(ctx context.Context) error {
	lease, endLease := context.WithCancel(context.WithoutCancel(ctx))
	defer endLease()
	a.running.Go(func() { a.fleet.run(a.supervisorCtx) })
	a.running.Go(func() { a.inbox.run(a.supervisorCtx) })
	ended := make(chan error, 1)
	go func() {
		ended <- a.o.Membership.Run(lease, a.join, a.load)
		close(ended)
	}()

	err := a.serve(ctx, ended)
	released := false
	if err == nil && a.Joined() { // a process that has not joined holds nothing that it may release
		released = a.drain(ctx, ended)
	}
	a.finish()
	endLease()
	for runErr := range ended {
		err = cmp.Or(err, runErr)
	}
	if !released { // a restart in place continues with them; until then they must not look free
		return err
	}
	leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	if leaveErr := a.o.Membership.Leave(leave); leaveErr != nil {
		a.o.Log.Error(leaveErr, "Failed to remove the heartbeats; the manager waits for their time-out")
	}
	return err
}

// finish ends the remaining supervisors, which close their sockets.
func (a *Agent) finish() {
	a.mu.Lock()
	a.ended = true
	a.mu.Unlock()
	a.cancelSupervisors()
	a.running.Wait()
}

// errLost ends the process. After a restart in place it joins again.
var errLost = errors.New("this worker must assume that it was declared dead: all its connections are closed")

// serve refreshes the cache until the process is asked to end (nil), or cannot
// continue. membershipEnded gets a value when Membership.Run has returned.
func (a *Agent) serve(ctx context.Context, membershipEnded <-chan error) error {
	refresh, tick := a.o.Clock.NewTicker(delivery.CacheRefreshInterval), a.o.Clock.NewTicker(loopInterval)
	defer refresh.Stop()
	defer tick.Stop()
	logins := loginBurst{}
	refreshed := make(chan struct{}, 1) // has a value while no refresh is under way
	refreshed <- struct{}{}
	for {
		a.lastRun.Store(a.o.Clock.Now().UnixNano())
		select {
		case <-a.o.Membership.Lost():
			a.cancelSupervisors() // first of all, because it closes the sockets
			return errLost
		case <-a.o.Stop:
			return nil
		case <-ctx.Done():
			return nil
		case err := <-membershipEnded:
			a.cancelSupervisors()
			if err == nil {
				err = errors.New("the membership ended")
			}
			return err
		case <-tick.C():
		case <-refresh.C():
			select {
			case <-refreshed: // in its own goroutine: a Redis that hangs must not delay the answer to Membership.Lost
				a.running.Go(func() {
					a.refresh(a.supervisorCtx)
					refreshed <- struct{}{}
				})
			default: // the previous refresh is still under way
			}
			if logins.ended(a.dials.Load()) {
				debug.FreeOSMemory()
			}
		}
	}
}

// Alive is the liveness check: it fails if the agent's loop has not run for
// stuckTimeout. Sessions that fail never make it fail.
func (a *Agent) Alive() error {
	lastRun := a.lastRun.Load()
	if silent := a.o.Clock.Now().Sub(time.Unix(0, lastRun)); lastRun != 0 && silent > stuckTimeout {
		return fmt.Errorf("the agent's loop has not run for %s", silent.Round(time.Second))
	}
	return nil
}

// loginBurst detects the end of a burst of logins, after which memory is returned
// to the system. A thousand logins leave as much garbage as all sessions keep in
// memory, and an idle worker allocates so little that the garbage would stay for
// minutes.
type loginBurst struct {
	dials   int64
	running bool
}

// ended is called at each tick with the number of dials so far. It is true at the
// first tick at which the number has not risen after it had risen.
func (b *loginBurst) ended(dials int64) bool {
	rose := dials != b.dials
	ended := b.running && !rose
	b.dials, b.running = dials, rose
	return ended
}

// refresh writes the cache keys of all sessions again.
func (a *Agent) refresh(ctx context.Context) {
	var all []session.Publication
	for _, s := range a.all() {
		if p := s.lastPublished.Load(); p != nil {
			all = append(all, *p)
		}
	}
	if len(all) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, delivery.CacheRefreshTimeout)
	defer cancel()
	if err := a.o.Publisher.Refresh(ctx, all); err != nil && ctx.Err() == nil {
		a.o.Log.Error(err, "Failed to refresh the cache; trying again", "sessions", len(all))
	}
}

func (a *Agent) join() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.joined {
		a.joined = true
		close(a.ready)
		if !a.ended {
			a.running.Go(func() { a.superviseHeldNotPlaced(a.supervisorCtx) })
		}
	}
}

// superviseHeldNotPlaced starts supervisors, which release them, for the sessions
// that this worker holds and that are placed elsewhere: sessions of a former process
// that were moved while it was dead (docs/architecture.md, "Ownership"). A session
// that is moved away later leaves the cache, which triggers a reconcile. The list is
// repeated for moves that were missed while the watch was interrupted.
func (a *Agent) superviseHeldNotPlaced(ctx context.Context) {
	failures := 0
	for {
		wait := heldListInterval
		held, err := a.heldNotPlaced(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			a.o.Log.Error(err, "Failed to list the sessions that this worker holds and that are placed elsewhere; trying again")
			failures++
			wait = pause(failures)
		default:
			failures = 0
			a.supervise(held)
			a.mu.Lock()
			a.heldListed = true
			a.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-a.o.Clock.After(wait):
		}
	}
}

// heldNotPlaced lists the sessions that this worker holds and that are placed
// elsewhere. It first waits until the cache is filled: a session that is moved after
// that leaves the cache, which triggers a reconcile.
func (a *Agent) heldNotPlaced(ctx context.Context) ([]v1alpha1.WhatsAppSession, error) {
	if err := a.placed.List(ctx, &v1alpha1.WhatsAppSessionList{}, client.Limit(1)); err != nil {
		return nil, fmt.Errorf("waiting for the cache: %w", err)
	}
	return a.o.Sessions.HeldNotPlaced(ctx, a.o.Worker)
}

// Joined is the readiness check: it reports whether the worker may hold sessions.
func (a *Agent) Joined() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.joined
}

func (a *Agent) load() (sessions, tokens int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.supervisors), a.o.Limiter.Free()
}

// drain hands every session over: each is released when the manager has named its
// successor, or that there is none. It reports whether this worker holds nothing
// any more. Without an answer from the manager for answerTimeout, or shortly before
// the grace period ends, it releases all sessions, so that other workers can claim
// them as soon as they are placed.
func (a *Agent) drain(ctx context.Context, membershipEnded <-chan error) (released bool) {
	a.mu.Lock()
	a.draining = true
	a.mu.Unlock()
	if err := a.o.Membership.Drain(ctx); err != nil {
		a.o.Log.Error(err, "Failed to mark the lease as draining; the next renewal tries again")
	}
	if !a.superviseHeld(ctx) {
		return false
	}
	all := a.all()
	a.o.Log.Info("Handing over all sessions", "sessions", len(all))
	for _, s := range all {
		s.post(func() { s.step(session.Drain{}) })
	}
	begun := a.o.Clock.Now()
	remaining, progress, evicted := len(all), begun, false
	ticker := a.o.Clock.NewTicker(drainInterval)
	defer ticker.Stop()
	for {
		now := a.o.Clock.Now()
		a.lastRun.Store(now.UnixNano())
		heldListed := a.hasListedHeld() // read before all, which then includes the sessions of that list
		all := a.all()
		switch {
		case len(all) == 0 && (evicted || heldListed):
			return heldListed // without the list, sessions of a former process may still be held
		case !now.Before(begun.Add(a.o.DrainTimeout)):
			for _, s := range all {
				a.o.Log.Info("Failed to release the session in time; closing its socket, a restart continues with it", "session", s.key.Name, "namespace", s.key.Namespace)
			}
			return false
		case evicted:
		case !now.Before(progress.Add(answerTimeout)), !now.Before(begun.Add(a.o.DrainTimeout - evictBefore)), ctx.Err() != nil:
			evicted = true
			a.mu.Lock()
			a.evicting = true
			a.mu.Unlock()
			a.o.Log.Info("Releasing all sessions without waiting for their successors", "sessions", len(all))
			for _, s := range a.all() { // read again: some may have been started since
				s.post(func() { s.step(session.Evict{}) })
			}
		case len(all) != remaining:
			remaining, progress = len(all), now
		}
		select {
		case <-ticker.C():
		case <-a.o.Membership.Lost():
			return false
		case err := <-membershipEnded: // the heartbeats are no longer renewed
			a.o.Log.Error(err, "Lost the membership while handing over the sessions")
			return false
		}
	}
}

// hasListedHeld reports whether the sessions that a former process held were listed.
func (a *Agent) hasListedHeld() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.heldListed
}

// superviseHeld starts supervisors for the sessions in the cache that this worker
// holds and that have none yet: the sessions of a former process are released, too.
func (a *Agent) superviseHeld(ctx context.Context) bool {
	var placed v1alpha1.WhatsAppSessionList
	if err := a.placed.List(ctx, &placed); err != nil {
		a.o.Log.Error(err, "Failed to list the sessions of this worker")
		return false
	}
	a.supervise(placed.Items)
	return true
}

// supervise gives the objects to the supervisors of their sessions.
func (a *Agent) supervise(sessions []v1alpha1.WhatsAppSession) {
	for i := range sessions {
		obj := &sessions[i]
		if s := a.supervisor(client.ObjectKeyFromObject(obj), obj); s != nil {
			s.post(func() { s.observe(obj) })
		}
	}
}

// PublishAgain publishes the state of every session again, after Redis lost its data.
func (a *Agent) PublishAgain() {
	for _, s := range a.all() {
		s.post(func() { s.step(session.PublishAgain{}) })
	}
}

// Phases counts the sessions of this worker by phase.
func (a *Agent) Phases() map[v1alpha1.Phase]int {
	counts := map[v1alpha1.Phase]int{}
	for _, s := range a.all() {
		if phase := s.phase.Load(); phase != nil {
			counts[*phase]++
		}
	}
	return counts
}

// all returns the supervisors that are running.
func (a *Agent) all() []*supervisor {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make([]*supervisor, 0, len(a.supervisors))
	for _, s := range a.supervisors {
		all = append(all, s)
	}
	return all
}

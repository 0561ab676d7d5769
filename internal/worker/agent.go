// Package worker is what runs in a worker pod: an agent that learns from the
// API server which sessions are placed here, and one supervisor per session
// that claims the device, connects it, writes its status, publishes it to Redis
// and records Events.
//
// What becomes of a session is decided in package session, which is pure; a
// supervisor is the loop that carries the decisions out.
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
	// drainInterval is how often a drain looks at what is left.
	drainInterval = 100 * time.Millisecond
	// answerTimeout is how long a drain waits for the manager to name successors, counted
	// from the last session that went, and evictBefore how long before the end of the
	// grace it waits no longer (docs/architecture.md, "Ownership").
	answerTimeout = 30 * time.Second
	evictBefore   = 5 * time.Second
	// reconciles is how many sessions are looked at at a time; for one that was moved away
	// that is a request to the API server.
	reconciles = 16
	// lookAgain is the first pause after a look that failed; each further one doubles it, up to retryMost.
	lookAgain = 50 * time.Millisecond
	// stockInterval is how often this worker asks what it holds but was not given.
	stockInterval = 5 * time.Minute
	// beatInterval is how often the agent's loop runs at least, and stuckAfter when it counts
	// as stuck: a slow refresh of the cache does not make it so.
	beatInterval = 5 * time.Second
	stuckAfter   = time.Minute
)

// Options are what an agent needs.
type Options struct {
	// Worker is this pod's name; Process identifies this process of it.
	Worker, Process string
	// Installation is the id of this installation: sessions of others are not touched.
	Installation string
	// Stop is closed when the process is asked to end: the sessions are then handed over.
	Stop <-chan struct{}
	// DrainTimeout bounds the handing over of all sessions at shutdown: the pod's grace.
	DrainTimeout time.Duration
	Membership   Membership
	// Health records what this worker reaches; nil: one of its own.
	Health    *Health
	Sessions  Sessions
	Accounts  Accounts
	Proxies   Proxies
	Publisher Publisher
	Limiter   Limiter
	// Version is refreshed at the start, and when WhatsApp refuses it; nil: it never is.
	Version Version
	// Quarantine and Outdated may be zero: the defaults.
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
	// again asks for a reconcile of a session whose supervisor has ended.
	again chan event.GenericEvent
	ready chan struct{}

	// beat is when the agent's loop last ran, in Unix nanoseconds.
	beat atomic.Int64

	mu          sync.Mutex
	joined      bool
	draining    bool
	evicting    bool // the drain waits for no successor any more
	ended       bool // nothing is started any more
	stocked     bool // it is known what a former process left
	supervisors map[types.NamespacedName]*supervisor
	// over is what the supervisors that have ended knew of their sessions, until a cache
	// shows something newer.
	over map[types.NamespacedName]ending
	// paces is how often the sessions whose supervisors have ended were tried of late: one
	// that comes and goes is not tried more often than one that stays.
	paces map[types.UID]*session.Pace
	// placedCount is how many sessions were placed here at the last count, which is good
	// until placedCountUntil.
	placedCount      int
	placedCountUntil time.Time

	starts  int // supervisors begun
	dials   atomic.Int64
	fleet   *fleet
	running sync.WaitGroup
	life    context.Context
	end     context.CancelFunc
}

// NewAgent returns an agent that reads from a cache of the sessions that are placed on its worker.
func NewAgent(o Options, placed client.Reader) *Agent {
	if o.Health == nil {
		o.Health = NewHealth(o.Clock, o.Log)
	}
	a := &Agent{
		o: o, placed: placed,
		again: make(chan event.GenericEvent, 1024), ready: make(chan struct{}),
		supervisors: map[types.NamespacedName]*supervisor{}, over: map[types.NamespacedName]ending{}, paces: map[types.UID]*session.Pace{},
	}
	// The supervisors outlive the manager's context: they are drained after it has ended.
	a.life, a.end = context.WithCancel(context.Background())
	a.fleet = newFleet(o.Outdated, o.Version, o.Clock, o.Log, a.sessions, a.placedSessions, a.retryOutdated, a.resumeSoon)
	return a
}

// SetupWithManager has the manager feed the agent from the cache. Start is
// left to the caller, because the manager must outlive it: an agent that hands
// its sessions over still learns who takes them.
func (a *Agent) SetupWithManager(mgr manager.Manager, placed cache.Cache) error {
	c, err := controller.New("agent", mgr, controller.Options{
		Reconciler: a, MaxConcurrentReconciles: reconciles,
		// The default's pauses grow to a quarter of an hour, and a session that was moved away
		// while the API server was down has to be given up soon after.
		RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](lookAgain, retryMost),
	})
	if err != nil {
		return fmt.Errorf("creating the agent's controller: %w", err)
	}
	sources := []source.Source{
		source.Kind(placed, &v1alpha1.WhatsAppSession{}, &handler.TypedEnqueueRequestForObject[*v1alpha1.WhatsAppSession]{}),
		source.Channel(a.again, &handler.EnqueueRequestForObject{}),
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
		obj = nil // another's worker of the same name, or a status that came from elsewhere
	}
	if obj == nil || !cached { // the cache has it no more: it cannot be behind
		a.mu.Lock()
		delete(a.over, req.NamespacedName)
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

// newest is the session as the cache, or where it has gone from it the API
// server itself, knows it; nil: it does not exist. A session that is moved away
// leaves the cache, and what its holder is to do then is in the API server alone.
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

// supervisor finds the session's supervisor, or starts one where the session concerns this worker.
func (a *Agent) supervisor(key types.NamespacedName, obj *v1alpha1.WhatsAppSession) *supervisor {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s, ok := a.supervisors[key]; ok {
		return s
	}
	if obj == nil || a.ended || obj.Status.Installation != a.o.Installation || a.isOver(key, obj) {
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
		Quarantine: a.o.Quarantine, Fleet: a.fleet, Health: a.o.Health,
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
		s.run(a.life)
		a.mu.Lock()
		delete(a.supervisors, key)
		if obj := s.machine.Object(); obj != nil {
			a.over[key] = ending{uid: obj.UID, version: obj.ResourceVersion}
			a.rememberPace(obj.UID, s.machine.Pace())
		}
		a.mu.Unlock()
		// The name may stand for another object by now.
		select {
		case a.again <- ended:
		case <-a.life.Done():
		}
	})
	return s
}

// ending is what the last supervisor of a session knew.
type ending struct {
	uid     types.UID
	version string
}

// isOver reports whether a supervisor that has ended knew the object, or a newer
// one: the cache may be behind the write by which it gave the session up. The
// caller holds a.mu.
func (a *Agent) isOver(key types.NamespacedName, obj *v1alpha1.WhatsAppSession) bool {
	known, found := a.over[key]
	if !found {
		return false
	}
	if known.uid == obj.UID {
		if order, err := resourceversion.CompareResourceVersion(obj.ResourceVersion, known.version); err == nil && order <= 0 {
			return true
		}
	}
	delete(a.over, key)
	return false
}

// rememberPace keeps the pace of a session whose supervisor has ended, and
// removes those that say nothing any more. The caller holds a.mu.
func (a *Agent) rememberPace(uid types.UID, pace *session.Pace) {
	now := a.o.Clock.Now()
	for other, p := range a.paces {
		if p.Forgotten(now) {
			delete(a.paces, other)
		}
	}
	if !pace.Forgotten(now) {
		a.paces[uid] = pace
	}
}

// nextStart names a supervisor: what an earlier one of the same process has
// claimed is claimed anew, so that a cache that is behind cannot pass for a claim.
func (a *Agent) nextStart() string {
	a.starts++
	return a.o.Process + "-" + strconv.Itoa(a.starts)
}

// Start runs the agent until the process is asked to end, then hands every
// session over and leaves. It returns earlier, without a hand-over, when ctx
// ends or this worker must take itself for declared dead.
func (a *Agent) Start(ctx context.Context) error {
	lease, endLease := context.WithCancel(context.WithoutCancel(ctx))
	defer endLease()
	a.running.Go(func() { a.fleet.run(a.life) })
	ended := make(chan error, 1)
	go func() {
		ended <- a.o.Membership.Run(lease, a.join, a.load)
		close(ended)
	}()

	err := a.serve(ctx, ended)
	released := false
	if err == nil && a.Joined() { // before that nothing here is this process's to give up
		released = a.drain(ctx, ended)
	}
	a.finish()
	endLease()
	for runErr := range ended {
		err = cmp.Or(err, runErr)
	}
	if !released { // a restart in place takes the rest up; until then nobody may think them free
		return err
	}
	leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	if leaveErr := a.o.Membership.Leave(leave); leaveErr != nil {
		a.o.Log.Error(leaveErr, "Failed to remove the heartbeats; the other workers wait for their time-out")
	}
	return err
}

// finish ends what is left of the supervisors: their sockets are closed.
func (a *Agent) finish() {
	a.mu.Lock()
	a.ended = true
	a.mu.Unlock()
	a.end()
	a.running.Wait()
}

// errLost ends the process: a restart in place begins anew.
var errLost = errors.New("this worker must assume that it was declared dead: all its connections are closed")

// serve refreshes the cache until the process is asked to end (nil), or cannot go on.
func (a *Agent) serve(ctx context.Context, left <-chan error) error {
	refresh, beat := a.o.Clock.NewTicker(delivery.CacheRefreshInterval), a.o.Clock.NewTicker(beatInterval)
	defer refresh.Stop()
	defer beat.Stop()
	memory := burst{}
	refreshed := make(chan struct{}, 1) // holds a token while no refresh is under way
	refreshed <- struct{}{}
	for {
		a.beat.Store(a.o.Clock.Now().UnixNano())
		select {
		case <-a.o.Membership.Lost():
			a.end() // at once: nothing else comes before the sockets
			return errLost
		case <-a.o.Stop:
			return nil
		case <-ctx.Done():
			return nil
		case err := <-left:
			a.end()
			if err == nil {
				err = errors.New("the membership ended")
			}
			return err
		case <-beat.C():
		case <-refresh.C():
			select {
			case <-refreshed: // beside the loop: a Redis that hangs must not keep it from hearing that the worker is lost
				a.running.Go(func() {
					a.refresh(a.life)
					refreshed <- struct{}{}
				})
			default: // the one before is still under way
			}
			if memory.isOver(a.dials.Load()) {
				debug.FreeOSMemory()
			}
		}
	}
}

// Alive is the liveness check: the agent's loop runs. Sessions that fail never
// make it fail.
func (a *Agent) Alive() error {
	beat := a.beat.Load()
	if silent := a.o.Clock.Now().Sub(time.Unix(0, beat)); beat != 0 && silent > stuckAfter {
		return fmt.Errorf("the agent's loop has not run for %s", silent.Round(time.Second))
	}
	return nil
}

// burst tells when a burst of logins is over. A thousand logins leave garbage
// of the size of all that the sessions keep, and an idle worker allocates so
// little that it would hold on to it for minutes.
type burst struct {
	seen    int64
	running bool
}

// isOver is given the count of dials at each look, and is true once after those
// in which it rose.
func (b *burst) isOver(dials int64) bool {
	rose := dials != b.seen
	over := b.running && !rose
	b.seen, b.running = dials, rose
	return over
}

func (a *Agent) refresh(ctx context.Context) {
	var all []session.Publication
	for _, s := range a.all() {
		if snapshot := s.snapshot.Load(); snapshot != nil {
			all = append(all, *snapshot)
		}
	}
	if len(all) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, delivery.CacheRefreshTimeout)
	defer cancel()
	if err := a.o.Publisher.Refresh(ctx, all); err != nil && ctx.Err() == nil {
		a.o.Log.Error(err, "Failed to refresh the cache; it is tried again", "sessions", len(all))
	}
}

func (a *Agent) join() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.joined {
		a.joined = true
		close(a.ready)
		if !a.ended {
			a.running.Go(func() { a.takeStock(a.life) })
		}
	}
}

// takeStock has what this worker holds but was not given released: a former
// process's sessions that were moved while it was dead (docs/architecture.md, "Ownership").
// What leaves this worker later leaves the cache, which tells; that it is looked
// for again and again is for what a break of the watch has hidden.
func (a *Agent) takeStock(ctx context.Context) {
	fails := 0
	for {
		wait := stockInterval
		held, err := a.leftHeld(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			a.o.Log.Error(err, "Failed to list the sessions that this worker holds and that are placed elsewhere; it is tried again")
			wait = pause(fails)
			fails++
		default:
			fails = 0
			a.supervise(held)
			a.mu.Lock()
			a.stocked = true
			a.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-a.o.Clock.After(wait):
		}
	}
}

// leftHeld lists what this worker holds but was not given. The cache has what is
// placed here before: of a session that is moved between the two looks, the
// cache tells.
func (a *Agent) leftHeld(ctx context.Context) ([]v1alpha1.WhatsAppSession, error) {
	if err := a.placed.List(ctx, &v1alpha1.WhatsAppSessionList{}, client.Limit(1)); err != nil {
		return nil, fmt.Errorf("waiting for the cache: %w", err)
	}
	return a.o.Sessions.HeldNotPlaced(ctx, a.o.Worker)
}

// Joined reports whether the worker may hold sessions; it is the readiness check.
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

// drain hands every session over: each is given up when the manager has named
// its successor, or says that there is none. It reports whether nothing is held
// any more. Without an answer for a while, or shortly before the grace ends,
// everything is given up: the others then wait for nothing but the placement.
func (a *Agent) drain(ctx context.Context, left <-chan error) (released bool) {
	a.mu.Lock()
	a.draining = true
	a.mu.Unlock()
	if err := a.o.Membership.Drain(ctx); err != nil {
		a.o.Log.Error(err, "Failed to mark the lease as draining at once; the next renewal does it")
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
		a.beat.Store(now.UnixNano())
		stocked := a.tookStock() // before all: what was found is among them
		all := a.all()
		switch {
		case len(all) == 0 && (evicted || stocked):
			return stocked // or a former process's sessions may still be held
		case !now.Before(begun.Add(a.o.DrainTimeout)):
			for _, s := range all {
				a.o.Log.Info("Failed to give up the session in time; its socket is closed and a restart takes it up", "session", s.key.Name, "namespace", s.key.Namespace)
			}
			return false
		case evicted:
		case !now.Before(progress.Add(answerTimeout)), !now.Before(begun.Add(a.o.DrainTimeout - evictBefore)), ctx.Err() != nil:
			evicted = true
			a.mu.Lock()
			a.evicting = true
			a.mu.Unlock()
			a.o.Log.Info("Giving up all sessions without waiting for their successors", "sessions", len(all))
			for _, s := range a.all() { // also those that have come since
				s.post(func() { s.step(session.Evict{}) })
			}
		case len(all) != remaining:
			remaining, progress = len(all), now
		}
		select {
		case <-ticker.C():
		case <-a.o.Membership.Lost():
			return false
		case err := <-left: // nothing is renewed any more
			a.o.Log.Error(err, "Lost the membership while the sessions were handed over")
			return false
		}
	}
}

// tookStock reports whether it is known what a former process left.
func (a *Agent) tookStock() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.stocked
}

// superviseHeld starts a supervisor for what this worker holds and nobody has
// looked at yet: a former process's sessions are given up, too.
func (a *Agent) superviseHeld(ctx context.Context) bool {
	var placed v1alpha1.WhatsAppSessionList
	if err := a.placed.List(ctx, &placed); err != nil {
		a.o.Log.Error(err, "Failed to list the sessions of this worker")
		return false
	}
	a.supervise(placed.Items)
	return true
}

// supervise shows the sessions to their supervisors.
func (a *Agent) supervise(sessions []v1alpha1.WhatsAppSession) {
	for i := range sessions {
		obj := &sessions[i]
		if s := a.supervisor(client.ObjectKeyFromObject(obj), obj); s != nil {
			s.post(func() { s.observe(obj) })
		}
	}
}

// PublishAgain has the state of every session published again: Redis forgot it.
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

func (a *Agent) all() []*supervisor {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make([]*supervisor, 0, len(a.supervisors))
	for _, s := range a.supervisors {
		all = append(all, s)
	}
	return all
}

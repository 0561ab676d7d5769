package membership

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// lookTimeout bounds one read of a look.
	lookTimeout = 2 * time.Second
	// keepDead is how long the heartbeats of a dead worker are kept, for whoever looks for
	// the cause.
	keepDead = time.Hour
)

// Keys is the second heartbeat: a value for each worker in Redis.
type Keys interface {
	// Raise renews the worker's value. Another incarnation's is an error, unless it is the
	// one that may be replaced.
	Raise(ctx context.Context, worker, incarnation, replacing string) error
	// Remove deletes the worker's value if it is that of the incarnation.
	Remove(ctx context.Context, worker, incarnation string) error
	// Read is the values of all workers, "incarnation/count", and the run id of the primary
	// that said so. An error says that they could not be seen.
	Read(ctx context.Context) (run string, values map[string]string, err error)
}

// Observer tells which workers are dead. Every manager has one, the standby
// too, so that a new leader need not begin from nothing. Its methods may be
// called from any goroutine.
type Observer struct {
	// Client must read from the API server itself.
	Client client.Client
	// Namespace has the workers' Leases and pods.
	Namespace string
	// Release is the one whose workers are observed.
	Release string
	Keys    Keys
	// Elapsed is the observer's own monotonic clock; see the function Elapsed.
	Elapsed func() time.Duration
	Clock   clock.WithTicker
	Log     logr.Logger
	// Sight, where set, is told after each look whether both heartbeats were seen.
	Sight func(both bool)

	once    sync.Once
	turn    chan struct{} // taken by who looks
	changed chan struct{}

	mu      sync.Mutex
	watch   *watch
	dead    map[string]time.Duration // the known dead, and since when
	blind   bool
	settled bool // silence has been watched for long enough to judge those who were never seen
}

func (o *Observer) init() {
	o.once.Do(func() {
		o.turn, o.changed = make(chan struct{}, 1), make(chan struct{}, 1)
		o.watch, o.dead = newWatch(), map[string]time.Duration{}
	})
}

// Start looks each 2 s, and when a worker's silence would be over, until ctx ends.
func (o *Observer) Start(ctx context.Context) error {
	o.init()
	for {
		if err := o.Confirm(ctx); err != nil && ctx.Err() == nil {
			o.Log.V(1).Info("The workers could not be seen", "reason", err.Error())
		}
		timer := o.Clock.NewTimer(o.untilNext())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C():
		}
	}
}

// untilNext is how long to wait for the next look.
func (o *Observer) untilNext() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	return max(o.watch.next()-o.Elapsed(), 0)
}

// NeedLeaderElection says that standby managers observe too.
func (o *Observer) NeedLeaderElection() bool { return false }

// Dead reports whether the worker of that name is declared dead by the last
// look. A look that is older than 5 s proves nothing. It does no I/O.
func (o *Observer) Dead(worker string) bool {
	o.init()
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.Elapsed()-o.watch.last <= sightGap && o.watch.dead(worker)
}

// Changed gets a value after a verdict has changed.
func (o *Observer) Changed() <-chan struct{} {
	o.init()
	return o.changed
}

// Confirm looks once more, now. What Dead says afterwards is true of a time
// after Confirm was called: whoever reads a session, confirms, and then finds
// its holder dead, knows that the session was not claimed by a process that
// came back meanwhile, for that one would have renewed before.
//
// The error says what could not be seen; the look counts in any case.
func (o *Observer) Confirm(ctx context.Context) error {
	o.init()
	select {
	case o.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("waiting to look at the workers: %w", ctx.Err())
	}
	defer func() { <-o.turn }()

	l := look{began: o.Elapsed()}
	var keysErr, leasesErr error
	var reading sync.WaitGroup
	reading.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, lookTimeout)
		defer cancel()
		var keys map[string]string
		if l.run, keys, keysErr = o.Keys.Read(ctx); keysErr == nil {
			l.keys = keys
			if l.keys == nil {
				l.keys = map[string]string{}
			}
		}
	})
	l.leases, leasesErr = o.leases(ctx)
	reading.Wait()
	l.ended = o.Elapsed()
	o.judge(l)
	err := errors.Join(leasesErr, keysErr)
	o.report(err)
	return err
}

// leases reads the Leases of all workers, and the pods of those that may have ended.
func (o *Observer) leases(ctx context.Context) (map[string]leaseSight, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	list := &coordinationv1.LeaseList{}
	if err := o.Client.List(ctx, list, client.InNamespace(o.Namespace), client.MatchingLabels(WorkerLabels(o.Release))); err != nil {
		return nil, fmt.Errorf("listing the workers' leases: %w", err)
	}
	sights := make(map[string]leaseSight, len(list.Items))
	for i := range list.Items {
		member, err := FromLease(&list.Items[i])
		if err != nil {
			continue // the placement says it
		}
		sights[member.Name] = leaseSight{version: list.Items[i].ResourceVersion, podUID: member.PodUID}
	}
	for name, sight := range sights {
		o.mu.Lock()
		suspect := o.watch.suspect(name, sight, o.Elapsed())
		o.mu.Unlock()
		if !suspect {
			continue
		}
		pod := &corev1.Pod{}
		err := o.Client.Get(ctx, client.ObjectKey{Namespace: o.Namespace, Name: name}, pod)
		switch {
		case err == nil:
			sight.kubelet = kubelet(pod, sight.podUID)
			sights[name] = sight
		case !apierrors.IsNotFound(err): // its Lease was seen all the same
			o.Log.V(1).Info("A silent worker's pod could not be read", "worker", name, "reason", err.Error())
		}
	}
	return sights, nil
}

// judge takes a look and tells whoever waits for verdicts.
func (o *Observer) judge(l look) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.watch.take(l)
	tell := false
	for name := range o.dead {
		if !o.watch.dead(name) {
			o.Log.Info("A worker that was declared dead is back", "worker", name)
			delete(o.dead, name)
			tell = true
		}
	}
	for name, t := range o.watch.workers {
		if _, known := o.dead[name]; known || !o.watch.dead(name) {
			continue
		}
		o.dead[name] = l.ended
		tell = true
		o.Log.Info("A worker is declared dead", "worker", name, "kubelet", t.word != wordNone && !o.watch.silent(name))
	}
	settled := o.watch.sighted && o.watch.last-o.watch.since >= Silence
	tell = tell || settled && !o.settled
	o.settled = settled
	if tell {
		select {
		case o.changed <- struct{}{}:
		default:
		}
	}
}

// report says once that the observer has become blind, and that it sees again.
func (o *Observer) report(err error) {
	o.mu.Lock()
	was := o.blind
	o.blind = err != nil && !errors.Is(err, context.Canceled)
	now := o.blind
	o.mu.Unlock()
	if o.Sight != nil {
		o.Sight(!now)
	}
	switch {
	case now && !was:
		o.Log.Error(err, "A heartbeat of the workers cannot be seen: nobody is declared dead by silence until both are seen again")
	case was && !now:
		o.Log.Info("Both heartbeats of the workers are seen again")
	}
}

// Sweep deletes the heartbeats of workers that have been dead for an hour. Only
// the leader should. A worker that comes back meanwhile writes them anew.
func (o *Observer) Sweep(ctx context.Context) error {
	o.init()
	list := &coordinationv1.LeaseList{}
	if err := o.Client.List(ctx, list, client.InNamespace(o.Namespace), client.MatchingLabels(WorkerLabels(o.Release))); err != nil {
		return fmt.Errorf("listing the workers' leases: %w", err)
	}
	var errs []error
	for i := range list.Items {
		lease := &list.Items[i]
		member, err := FromLease(lease)
		if err != nil || !o.longDead(member.Name) {
			continue
		}
		version := lease.ResourceVersion
		if err := client.IgnoreNotFound(o.Client.Delete(ctx, lease, client.Preconditions{ResourceVersion: &version})); err != nil {
			errs = append(errs, fmt.Errorf("deleting a dead worker's lease: %w", err))
			continue
		}
		errs = append(errs, o.Keys.Remove(ctx, member.Name, member.Incarnation))
	}
	return errors.Join(errs...)
}

func (o *Observer) longDead(worker string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	since, known := o.dead[worker]
	return known && o.watch.dead(worker) && o.watch.last-since >= keepDead
}

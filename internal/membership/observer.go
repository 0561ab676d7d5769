package membership

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/internal/liveness"
)

const (
	// readTimeout bounds each read of an observation.
	readTimeout = 2 * time.Second
	// deadRetention is how long the heartbeats of a dead worker are kept, for a person who
	// looks for the cause.
	deadRetention = time.Hour
)

// Keys is the second heartbeat: a value for each worker in Redis.
type Keys interface {
	// Renew renews the worker's value. It returns an error if the value is that of another
	// incarnation, unless that one is replacing.
	Renew(ctx context.Context, worker, incarnation, replacing string) error
	// Remove deletes the worker's value if it is that of the incarnation.
	Remove(ctx context.Context, worker, incarnation string) error
	// Read returns the values of all workers, "incarnation/count", and the run id of the
	// primary that returned them. After an error the values are unknown.
	Read(ctx context.Context) (run string, values map[string]string, err error)
}

// Observer decides which workers are dead. Every manager has one, the standby too, so
// that a new leader has seen the heartbeats already. Its methods may be called from any
// goroutine.
type Observer struct {
	// Client must read from the API server itself.
	Client client.Client
	// Namespace is that of the workers' Leases and pods.
	Namespace string
	// Release is the release whose workers are observed.
	Release string
	Keys    Keys
	// Elapsed is the observer's own monotonic clock; see the function Elapsed.
	Elapsed func() time.Duration
	Clock   clock.WithTicker
	Log     logr.Logger
	// Visibility, where set, is called after each observation and says whether both
	// heartbeats were visible.
	Visibility func(both bool)
	// Loop watches Start; nil: nobody does.
	Loop *liveness.Loop

	once    sync.Once
	turn    chan struct{} // held by the goroutine that observes
	changed chan struct{}
	// nodes are the nodes of the workers' pods, by worker. It belongs to the holder of turn.
	nodes map[string]podNode

	mu       sync.Mutex
	detector *failureDetector
	dead     map[string]death
	// notVisible says that the last observation could not read both heartbeats.
	notVisible bool
	// unseenAreDead says that the heartbeats were visible for SilenceTimeout, so that Dead is
	// true of a worker that was never seen.
	unseenAreDead bool
	// silent are the workers whose Lease is silent; unseenAreSilent says that a worker that
	// was never seen counts as one.
	silent          map[string]bool
	unseenAreSilent bool
}

// podNode is the node of a pod.
type podNode struct {
	pod types.UID
	// node is its name; empty: the pod could not be read.
	node string
}

// death is what the observer knows about a worker that was declared dead. It is kept
// until a heartbeat of the worker changes or both are gone.
type death struct {
	since time.Duration
	// unsure says that the last observation shows neither that the worker is dead nor that it
	// is alive.
	unsure bool
}

func (o *Observer) init() {
	o.once.Do(func() {
		o.turn, o.changed = make(chan struct{}, 1), make(chan struct{}, 1)
		o.detector, o.dead, o.nodes = newFailureDetector(), map[string]death{}, map[string]podNode{}
	})
}

// Start observes every ObserveInterval, and when a worker's silence reaches
// SilenceTimeout, until ctx ends.
func (o *Observer) Start(ctx context.Context) error {
	o.init()
	for {
		run := o.Loop.Begin()
		if err := o.Confirm(ctx); err != nil && ctx.Err() == nil {
			o.Log.V(1).Info("Failed to read every heartbeat", "reason", err.Error())
		}
		run.End()
		timer := o.Clock.NewTimer(o.untilNext())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C():
		}
	}
}

// untilNext is how long to wait for the next observation.
func (o *Observer) untilNext() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	return max(o.detector.next()-o.Elapsed(), 0)
}

// NeedLeaderElection says that standby managers observe too.
func (o *Observer) NeedLeaderElection() bool { return false }

// Dead reports whether the last observation shows that the worker of that name is dead.
// It is false if that observation is older than maxObservationGap. It does no I/O.
func (o *Observer) Dead(worker string) bool {
	o.init()
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.Elapsed()-o.detector.last <= maxObservationGap && o.detector.dead(worker)
}

// LeaseSilent reports whether the worker's Lease has not been renewed for so long that the
// worker would be dead by now, if its other heartbeat were visible and silent too. It is
// false while the Leases cannot be read, and if the last observation is older than
// maxObservationGap. It does no I/O.
func (o *Observer) LeaseSilent(worker string) bool {
	o.init()
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.Elapsed()-o.detector.last <= maxObservationGap && o.detector.leaseSilent(worker, shownSilentAfter)
}

// Changed receives a value after the result of Dead or of LeaseSilent has changed for a worker.
func (o *Observer) Changed() <-chan struct{} {
	o.init()
	return o.changed
}

// Confirm observes once more, now. The result of Dead is then about a time after the
// call of Confirm: a caller that reads a session, confirms, and then finds its holder dead
// knows that no process that came back in between has claimed the session, because that
// process would have renewed its heartbeats before.
//
// The error says what could not be read; the observation counts in any case.
func (o *Observer) Confirm(ctx context.Context) error {
	o.init()
	select {
	case o.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("waiting to read the heartbeats: %w", ctx.Err())
	}
	defer func() { <-o.turn }()

	seen := observation{began: o.Elapsed()}
	var keysErr, leasesErr error
	var reading sync.WaitGroup
	reading.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		var keys map[string]string
		if seen.run, keys, keysErr = o.Keys.Read(ctx); keysErr == nil {
			seen.keys = keys
			if seen.keys == nil {
				seen.keys = map[string]string{}
			}
		}
	})
	seen.leases, leasesErr = o.leases(ctx)
	reading.Wait()
	seen.ended = o.Elapsed()
	o.evaluate(seen)
	err := errors.Join(leasesErr, keysErr)
	o.reportVisibility(err)
	return err
}

// leases reads the Leases of all workers, and the pods of those that may have ended.
func (o *Observer) leases(ctx context.Context) (map[string]observedLease, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	list := &coordinationv1.LeaseList{}
	if err := o.Client.List(ctx, list, client.InNamespace(o.Namespace), client.MatchingLabels(WorkerLabels(o.Release))); err != nil {
		return nil, fmt.Errorf("listing the workers' leases: %w", err)
	}
	observed := make(map[string]observedLease, len(list.Items))
	for i := range list.Items {
		member, err := FromLease(&list.Items[i])
		if err != nil {
			continue // the placement controller logs it
		}
		observed[member.Name] = observedLease{
			version: list.Items[i].ResourceVersion, podUID: member.PodUID, acquired: member.AcquireTime,
		}
	}
	maps.DeleteFunc(o.nodes, func(name string, _ podNode) bool { _, found := observed[name]; return !found })
	for name, lease := range observed {
		observed[name] = o.askKubernetes(ctx, name, lease)
	}
	return observed, nil
}

// askKubernetes adds to a Lease what the kubelet reports about the worker's pod and what
// became of its node, as far as the silence of the Lease makes them matter. The name of the
// node is read while the pod exists: Kubernetes deletes the pods of a lost node.
func (o *Observer) askKubernetes(ctx context.Context, name string, lease observedLease) observedLease {
	if lease.podUID == "" {
		return lease
	}
	o.mu.Lock()
	now := o.Elapsed()
	suspect, suspectNode := o.detector.suspect(name, lease, now), o.detector.suspectNode(name, lease, now)
	o.mu.Unlock()
	if suspect || o.nodes[name].pod != lease.podUID {
		pod := &corev1.Pod{}
		err := o.Client.Get(ctx, client.ObjectKey{Namespace: o.Namespace, Name: name}, pod)
		switch {
		case err == nil && suspect:
			lease.report = reportOf(pod, lease.podUID, lease.acquired)
		case client.IgnoreNotFound(err) != nil: // the Lease counts without the pod
			o.Log.V(1).Info("Failed to read the pod of a worker", "worker", name, "reason", err.Error())
		}
		switch {
		case err == nil && pod.UID == lease.podUID && pod.Spec.NodeName != "":
			o.nodes[name] = podNode{pod: pod.UID, node: pod.Spec.NodeName}
		case o.nodes[name].pod != lease.podUID && ctx.Err() == nil: // read again when the worker is suspect
			o.nodes[name] = podNode{pod: lease.podUID}
		}
	}
	if node := o.nodes[name].node; suspectNode && node != "" {
		lease.node = o.readNode(ctx, node)
	}
	return lease
}

func (o *Observer) readNode(ctx context.Context, name string) nodeState {
	node := &corev1.Node{}
	err := o.Client.Get(ctx, client.ObjectKey{Name: name}, node)
	switch {
	case err == nil:
		return stateOf(node)
	case apierrors.IsNotFound(err):
		return nodeLost
	default:
		o.Log.V(1).Info("Failed to read the node of a silent worker", "node", name, "reason", err.Error())
		return nodeUnknown
	}
}

// evaluate updates the detector with an observation, and signals if the result of Dead
// has changed for a worker.
//
// A worker that was declared dead counts as alive again only when a heartbeat of it has
// changed since. After an observation that failed it is only unsure whether it is dead.
func (o *Observer) evaluate(seen observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.detector.observe(seen)
	changed := false
	for name, d := range o.dead {
		dead := o.detector.dead(name)
		_, tracked := o.detector.workers[name]
		switch {
		case !tracked: // its heartbeats are gone
			delete(o.dead, name)
		case dead:
			changed = changed || d.unsure
			o.dead[name] = death{since: d.since}
		case o.detector.changedSince(name, d.since):
			o.Log.Info("Found a worker alive that was declared dead", "worker", name)
			delete(o.dead, name)
			changed = true
		default:
			changed = changed || !d.unsure
			o.dead[name] = death{since: d.since, unsure: true}
		}
	}
	for name, t := range o.detector.workers {
		if _, known := o.dead[name]; known || !o.detector.dead(name) {
			continue
		}
		o.dead[name] = death{since: seen.ended}
		changed = true
		silent := o.detector.silent(name)
		o.Log.Info("Declared a worker dead", "worker", name, "reportedByKubelet", t.report.ended() && !silent, "nodeLost", t.nodeLost && !silent)
	}
	unseenAreDead := o.detector.visible && o.detector.last-o.detector.since >= SilenceTimeout
	changed = changed || unseenAreDead && !o.unseenAreDead
	o.unseenAreDead = unseenAreDead
	if o.updateSilent() || changed {
		select {
		case o.changed <- struct{}{}:
		default:
		}
	}
}

// updateSilent records which Leases are silent, and reports whether that has changed. It is
// called with mu held.
func (o *Observer) updateSilent() (changed bool) {
	silent := map[string]bool{}
	for name := range o.detector.workers {
		if o.detector.leaseSilent(name, shownSilentAfter) {
			silent[name] = true
		}
	}
	unseen := o.detector.leasesVisible && o.detector.last-o.detector.leasesSince >= shownSilentAfter
	changed = !maps.Equal(silent, o.silent) || unseen != o.unseenAreSilent
	o.silent, o.unseenAreSilent = silent, unseen
	return changed
}

// reportVisibility logs once when a heartbeat cannot be read any more, and once when both
// can be read again.
func (o *Observer) reportVisibility(err error) {
	o.mu.Lock()
	before := o.notVisible
	o.notVisible = err != nil && !errors.Is(err, context.Canceled)
	now := o.notVisible
	o.mu.Unlock()
	if o.Visibility != nil {
		o.Visibility(!now)
	}
	switch {
	case now && !before:
		o.Log.Error(err, "Failed to read a heartbeat of the workers: no worker is declared dead for its silence until both can be read again")
	case before && !now:
		o.Log.Info("Read both heartbeats of the workers again")
	}
}

// Sweep deletes the heartbeats of workers that have been dead for deadRetention, and the
// keys in Redis of workers that could not delete them because Redis did not answer when
// they left. Only the leader should call it. A worker that comes back writes its
// heartbeats again.
func (o *Observer) Sweep(ctx context.Context) error {
	o.init()
	list := &coordinationv1.LeaseList{}
	if err := o.Client.List(ctx, list, client.InNamespace(o.Namespace), client.MatchingLabels(WorkerLabels(o.Release))); err != nil {
		return fmt.Errorf("listing the workers' leases: %w", err)
	}
	var errs []error
	swept := o.longDead()
	for i := range list.Items {
		lease := &list.Items[i]
		member, err := FromLease(lease)
		if err != nil {
			continue
		}
		if _, found := swept[member.Name]; !found {
			continue
		}
		version := lease.ResourceVersion
		if err := client.IgnoreNotFound(o.Client.Delete(ctx, lease, client.Preconditions{ResourceVersion: &version})); err != nil {
			errs = append(errs, fmt.Errorf("deleting a dead worker's lease: %w", err))
			delete(swept, member.Name) // it was renewed, or the next call tries again
		}
	}
	for name, incarnation := range swept {
		if incarnation != "" {
			errs = append(errs, o.Keys.Remove(ctx, name, incarnation))
		}
	}
	return errors.Join(errs...)
}

// longDead returns the workers that have been dead for deadRetention, each with the
// incarnation of its value in Redis; empty: it has no value there.
func (o *Observer) longDead() map[string]string {
	o.mu.Lock()
	defer o.mu.Unlock()
	names := map[string]string{}
	for name, d := range o.dead {
		if o.detector.dead(name) && o.detector.last-d.since >= deadRetention {
			names[name] = incarnationOf(o.detector.workers[name].key)
		}
	}
	return names
}

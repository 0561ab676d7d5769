package membership

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// SilenceTimeout is how long neither heartbeat of a worker may change before the worker
	// is dead.
	SilenceTimeout = 15 * time.Second
	// ObserveInterval is how often the heartbeats are read. They are also read at the moment
	// at which a silence reaches SilenceTimeout.
	ObserveInterval = 2 * time.Second
	// maxObservationGap is the longest pause between two observations over which silence still
	// counts: an observer that was stopped itself knows nothing about the time between them.
	maxObservationGap = 5 * time.Second
	// restartTimeout is how long a container that is restarted in its pod may take to come
	// back before the kubelet's report counts (docs/architecture.md, "Ownership").
	restartTimeout = 15 * time.Second
	// askKubeletAfter is how long a Lease must be unchanged before its pod is read: long
	// enough for one renewal to be missing.
	askKubeletAfter = RenewInterval + time.Second
	// shownSilentAfter is how long a Lease must be unchanged before its worker counts as silent
	// (Observer.LeaseSilent). A worker that dies stops both heartbeats within RenewInterval, and
	// its death is decided first.
	shownSilentAfter = SilenceTimeout + RenewInterval + 2*ObserveInterval
	// ContainerName is the worker's container in its pod.
	ContainerName = "worker"
)

// containerState is what the kubelet reports about a worker's container.
type containerState int

const (
	stateUnknown    containerState = iota // the pod was not read, or cannot be read
	stateRunning                          // it runs, or has not been started yet
	stateRestarting                       // it has ended and may be restarted in its pod
	stateEnded                            // it has ended for good
)

// kubeletReport is the kubelet's report on a worker's container.
type kubeletReport struct {
	state containerState
	// finished is when the container ended, by the clock of its node and in whole seconds;
	// zero: it runs, or the kubelet does not know.
	finished time.Time
}

// ended: the report says that a container has ended.
func (r kubeletReport) ended() bool { return r.state == stateRestarting || r.state == stateEnded }

func (r kubeletReport) equal(other kubeletReport) bool {
	return r.state == other.state && r.finished.Equal(other.finished)
}

// nodeState is what the API server says about the node of a worker's pod.
type nodeState int

const (
	nodeUnknown nodeState = iota // it was not read, or cannot be read
	nodePresent                  // the Node object exists and is not marked as out of service
	nodeLost                     // the Node object is gone, or is marked as out of service
)

// observedLease is one Lease in an observation.
type observedLease struct {
	version string // its resourceVersion
	podUID  types.UID
	// acquired is when the process that renews the Lease joined, by the clock of its node;
	// zero: the worker does not report it.
	acquired time.Time
	// report is the kubelet's; its state is stateUnknown where the pod was not read.
	report kubeletReport
	// node is the state of the pod's node; nodeUnknown where it was not read.
	node nodeState
}

// observation is one reading of all heartbeats. The leases or the keys are nil if they
// could not be read.
type observation struct {
	// began and ended are by the observer's own monotonic clock.
	began, ended time.Duration
	leases       map[string]observedLease
	keys         map[string]string
	run          string // run id of Redis
}

// failureDetector decides from observations which workers are dead (docs/architecture.md,
// "Ownership"). It is pure: it takes the time only from the observations. Anything that
// makes an observation uncertain delays the decision, and never makes it earlier:
//
//   - a change counts from the end of the observation that showed it, silence up to
//     the beginning of the last one;
//   - silence counts only while both heartbeats are visible, in observations that
//     follow each other closely and read the same run of Redis;
//   - a missing value is not a change: Redis may have been emptied;
//   - a worker that was never seen counts as silent since the detector began;
//   - the kubelet's report counts only while it can be about the process that renewed
//     the heartbeats last;
//   - the loss of the node counts only after SilenceTimeout without a visible change of
//     either heartbeat: a person may have deleted the object of a node that still runs.
//
// The rule about the kubelet's report is for a node that is cut off just when it has restarted the
// container: the pod then shows for ever that the container has ended, although the
// new process lives. So a report does not count if the container finished before the
// process of the Lease joined, or if either heartbeat has changed after the report. A
// report that was refuted in this way never counts again; a different report about the
// same pod does.
type failureDetector struct {
	// since is when both heartbeats began to be visible without a break; visible: they are
	// visible now.
	since   time.Duration
	visible bool
	// leasesSince is the same for the Leases alone: the kubelet's report needs no Redis.
	leasesSince   time.Duration
	leasesVisible bool

	last    time.Duration // when the last observation began
	run     string
	workers map[string]*track
}

// track is what the detector knows about one worker.
type track struct {
	lease observedLease
	key   string
	// leaseChanged and changed are when the Lease, or either heartbeat, was last seen to change.
	leaseChanged, changed time.Duration
	// report is the kubelet's last report that a container has ended, and reportedSince when
	// it was first seen. It stays valid when the pod cannot be read any more; only a change of
	// a heartbeat, or another report of the kubelet, withdraws it.
	report        kubeletReport
	reportedSince time.Duration
	// refuted is the last report that was followed by a change of a heartbeat.
	refuted kubeletReport
	// nodeLost: the node of the worker's pod was lost when it was last read.
	nodeLost bool
	inLeases bool
}

func newFailureDetector() *failureDetector {
	return &failureDetector{workers: map[string]*track{}}
}

// observe updates the detector with the next observation.
func (d *failureDetector) observe(o observation) {
	closely := o.began-d.last <= maxObservationGap
	d.last = o.began
	both := o.leases != nil && o.keys != nil
	if !both || !d.visible || !closely || o.run != d.run {
		d.visible, d.since = both, o.ended
	}
	if o.leases == nil || !d.leasesVisible || !closely {
		d.leasesVisible, d.leasesSince = o.leases != nil, o.ended
	}
	if o.keys != nil {
		d.run = o.run
	}
	for _, t := range d.workers {
		t.inLeases = t.inLeases && o.leases == nil
	}
	// The keys come first: a change that is seen together with a report may have happened
	// before the report.
	for name, key := range o.keys {
		if t := d.track(name); t.key != key {
			t.key = key
			t.renewed(o.ended)
		}
	}
	for name, lease := range o.leases {
		t := d.track(name)
		t.inLeases = true
		switch {
		case t.lease.podUID != lease.podUID: // reports about another pod do not apply to this one
			t.leaseChanged, t.changed = o.ended, o.ended
			t.report, t.refuted, t.nodeLost = kubeletReport{}, kubeletReport{}, false
		case t.lease.version != lease.version:
			t.leaseChanged = o.ended
			t.renewed(o.ended)
		}
		t.lease = lease
		t.reported(lease, o.ended)
		if lease.node != nodeUnknown {
			t.nodeLost = lease.node == nodeLost
		}
	}
	for name, t := range d.workers {
		if _, inKeys := o.keys[name]; !inKeys && o.keys != nil && !t.inLeases && d.silent(name) {
			delete(d.workers, name) // both heartbeats are gone; dead returns the same for an unknown name
		}
	}
}

func (d *failureDetector) track(name string) *track {
	t := d.workers[name]
	if t == nil {
		t = &track{}
		d.workers[name] = t
	}
	return t
}

// renewed records that a heartbeat has changed. An earlier report of the kubelet was
// about an earlier process, or is wrong.
func (t *track) renewed(at time.Duration) {
	t.changed = at
	if t.report.ended() {
		t.refuted, t.report = t.report, kubeletReport{}
	}
}

// reported records the kubelet's report.
func (t *track) reported(lease observedLease, at time.Duration) {
	report := lease.report
	earlier := !lease.acquired.IsZero() && !report.finished.IsZero() && !lease.acquired.Before(report.finished)
	switch {
	case report.state == stateUnknown, t.report.state == stateEnded:
	case report.state == stateRunning, earlier, report.equal(t.refuted):
		t.report = kubeletReport{}
	default:
		if !t.report.ended() {
			t.reportedSince = at
		}
		t.report = report
	}
}

// silent reports whether neither heartbeat has changed for SilenceTimeout while both were visible.
func (d *failureDetector) silent(name string) bool {
	if !d.visible {
		return false
	}
	from := d.since
	if t := d.workers[name]; t != nil {
		from = max(from, t.changed)
	}
	return d.last-from >= SilenceTimeout
}

// leaseSilent reports whether the Lease has not changed for that long while the Leases were
// visible. A Lease that is gone does not change.
func (d *failureDetector) leaseSilent(name string, timeout time.Duration) bool {
	if !d.leasesVisible {
		return false
	}
	from := d.leasesSince
	if t := d.workers[name]; t != nil {
		from = max(from, t.leaseChanged)
	}
	return d.last-from >= timeout
}

// next is when to observe again: at the next regular time, or earlier if a silence
// reaches SilenceTimeout before, because the sessions of a dead worker are down.
func (d *failureDetector) next() time.Duration {
	next := d.last + ObserveInterval
	if !d.visible {
		return next
	}
	observeSilence := func(since time.Duration) {
		if end := max(d.since, since) + SilenceTimeout; end > d.last {
			next = min(next, end)
		}
	}
	observeSilence(d.since) // workers that were never seen
	for _, t := range d.workers {
		observeSilence(t.changed)
	}
	return next
}

// dead reports whether the worker is silent, or the kubelet has reported that its
// process has ended and no heartbeat has changed since, or its node is lost and no
// heartbeat has visibly changed for SilenceTimeout.
func (d *failureDetector) dead(name string) bool {
	if d.silent(name) {
		return true
	}
	t := d.workers[name]
	if t == nil || !t.inLeases || !d.leasesVisible {
		return false
	}
	if t.nodeLost && d.last-max(d.leasesSince, t.changed) >= SilenceTimeout {
		return true
	}
	switch t.report.state {
	case stateEnded:
		return true
	case stateRestarting:
		return d.last-max(t.reportedSince, d.leasesSince) >= restartTimeout
	default:
		return false
	}
}

// changedSince reports whether an observation after that moment has shown a change of a
// heartbeat of the worker.
func (d *failureDetector) changedSince(name string, at time.Duration) bool {
	t := d.workers[name]
	return t != nil && t.changed > at
}

// suspect reports whether a renewal of the Lease is missing, so that the pod should be read.
func (d *failureDetector) suspect(name string, l observedLease, now time.Duration) bool {
	t := d.workers[name]
	return l.podUID != "" && t != nil && t.lease.version == l.version && now-t.leaseChanged >= askKubeletAfter
}

// suspectNode reports whether the Lease has been silent for so long that the loss of the
// worker's node would count.
func (d *failureDetector) suspectNode(name string, l observedLease, now time.Duration) bool {
	t := d.workers[name]
	return t != nil && t.lease.version == l.version && now-t.leaseChanged >= SilenceTimeout
}

// stateOf returns the state of a node that exists. With the taint a cloud's controller or a
// person says that the node is shut down and does not come back with its pods.
func stateOf(node *corev1.Node) nodeState {
	for _, taint := range node.Spec.Taints {
		if taint.Key == corev1.TaintNodeOutOfService {
			return nodeLost
		}
	}
	return nodePresent
}

// reportOf reads the kubelet's report about the worker's container from the worker's
// pod. acquired is when the process that renews the Lease joined; zero: it is not
// known. A pod of the same name with another UID gives no report.
//
// Only the kubelet writes containerStatuses. Controllers write other parts of the pod:
// when a node is cut off, a controller deletes its pods or marks them as failed, while
// their containerStatuses stay old. So deletion and failure prove that a container is not
// restarted only if the process that ended is known to be the one of the Lease.
func reportOf(pod *corev1.Pod, uid types.UID, acquired time.Time) kubeletReport {
	if pod.UID != uid {
		return kubeletReport{}
	}
	for i := range pod.Status.ContainerStatuses {
		c := &pod.Status.ContainerStatuses[i]
		if c.Name != ContainerName && len(pod.Status.ContainerStatuses) > 1 {
			continue
		}
		ended := c.State.Terminated
		if ended == nil && c.State.Waiting != nil {
			ended = c.LastTerminationState.Terminated
		}
		if ended == nil {
			return kubeletReport{state: stateRunning}
		}
		report := kubeletReport{state: stateRestarting, finished: ended.FinishedAt.Time}
		isLast := !acquired.IsZero() && acquired.Before(report.finished)
		isLeaving := !pod.DeletionTimestamp.IsZero() || pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
		if c.State.Terminated != nil && (pod.Spec.RestartPolicy == corev1.RestartPolicyNever || isLast && isLeaving) {
			report.state = stateEnded
		}
		return report
	}
	return kubeletReport{}
}

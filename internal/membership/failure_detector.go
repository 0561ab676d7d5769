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
	// ObserveInterval is how often the heartbeats are read. The moment at which a silence is
	// over gets an observation of its own.
	ObserveInterval = 2 * time.Second
	// maxObservationGap is the longest pause between two observations over which silence still
	// counts: an observer that was stopped itself knows nothing of the time between.
	maxObservationGap = 5 * time.Second
	// restartTimeout is how long a container that is restarted in its pod may take to come
	// back before the kubelet's report counts (docs/architecture.md, "Ownership").
	restartTimeout = 15 * time.Second
	// askKubeletAfter is how long a Lease must be unchanged before its pod is read: one
	// renewal was left out.
	askKubeletAfter = RenewInterval + time.Second
	// ContainerName is the worker's container in its pod.
	ContainerName = "worker"
)

// containerState is what the kubelet reports of a worker's container.
type containerState int

const (
	stateUnknown    containerState = iota // it was not asked, or cannot be read
	stateRunning                          // it runs, or has not been started yet
	stateRestarting                       // it has ended and may be restarted in its pod
	stateEnded                            // it has ended for good
)

// kubeletReport is the kubelet's report on a worker's container.
type kubeletReport struct {
	state containerState
	// finished is when the container that has ended did so, by the clock of its node and in
	// whole seconds; zero: it runs, or the kubelet does not know.
	finished time.Time
}

// ended: the report says that a container has ended.
func (r kubeletReport) ended() bool { return r.state == stateRestarting || r.state == stateEnded }

func (r kubeletReport) equal(other kubeletReport) bool {
	return r.state == other.state && r.finished.Equal(other.finished)
}

// observedLease is what an observation saw of one Lease.
type observedLease struct {
	version string // its resourceVersion
	podUID  types.UID
	// acquired is when the process that renews the Lease joined, by the clock of its node;
	// zero where the worker does not say so.
	acquired time.Time
	// report is the kubelet's; stateUnknown where it was not asked for.
	report kubeletReport
}

// observation is what was seen in one reading of all heartbeats. A half that could
// not be read is nil.
type observation struct {
	// began and ended are by the observer's own monotonic clock.
	began, ended time.Duration
	leases       map[string]observedLease
	keys         map[string]string
	run          string // run id of Redis
}

// failureDetector decides from observations which workers are dead (docs/architecture.md,
// "Ownership"). It is pure: it knows no time but that of the observations. Whatever makes
// an observation unsure makes the decision later, never sooner:
//
//   - a change counts from the end of the observation that showed it, silence up to
//     the beginning of the last one;
//   - silence counts only while both heartbeats were visible, in observations that
//     follow each other closely, of one run of Redis;
//   - a value that is missing is no change: Redis may have been emptied;
//   - a worker that was never seen is silent since the detector began;
//   - the kubelet's report counts only while it can be about the process that renewed
//     the heartbeats last.
//
// The last rule is for a node that is cut off in the very moment in which it has
// restarted the container: the pod then says for ever that the container has
// ended, while the new process lives. So a report is refuted by a container that
// finished before the process of the Lease joined, and by a change of either
// heartbeat after the report. A refuted report never counts again; another one of
// the same pod does.
type failureDetector struct {
	// since is when both heartbeats began to be visible without a break; visible: they are.
	since   time.Duration
	visible bool
	// leasesSince is the same for the Leases alone: the kubelet's report needs no Redis.
	leasesSince   time.Duration
	leasesVisible bool

	last    time.Duration // when the last observation began
	run     string
	workers map[string]*track
}

// track is what is remembered of one worker.
type track struct {
	lease observedLease
	key   string
	// leaseChanged and changed are when the Lease, or either heartbeat, was last seen to change.
	leaseChanged, changed time.Duration
	// report is the kubelet's last one that a container has ended, and reportedSince when it
	// was first seen. That a pod cannot be read any more takes nothing back; only a heartbeat,
	// or the kubelet itself, does.
	report        kubeletReport
	reportedSince time.Duration
	// refuted is the last report after which a heartbeat has changed.
	refuted  kubeletReport
	inLeases bool
}

func newFailureDetector() *failureDetector {
	return &failureDetector{workers: map[string]*track{}}
}

// observe takes one more observation into account.
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
	// The keys come first: a change that is seen together with a report may be older than it.
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
		case t.lease.podUID != lease.podUID: // reports on another pod say nothing of this one
			t.leaseChanged, t.changed = o.ended, o.ended
			t.report, t.refuted = kubeletReport{}, kubeletReport{}
		case t.lease.version != lease.version:
			t.leaseChanged = o.ended
			t.renewed(o.ended)
		}
		t.lease = lease
		t.reported(lease, o.ended)
	}
	for name, t := range d.workers {
		if _, inKeys := o.keys[name]; !inKeys && o.keys != nil && !t.inLeases && d.silent(name) {
			delete(d.workers, name) // gone: the answer for its name stays the same
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

// renewed records that a heartbeat has changed. What the kubelet had reported before
// was about an earlier process, or is not true.
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

// silent: neither heartbeat has changed for SilenceTimeout while both were visible.
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

// next is when to observe again: the sessions of a dead worker are down, so a
// silence that would be over before the next regular observation gets its own.
func (d *failureDetector) next() time.Duration {
	next := d.last + ObserveInterval
	if !d.visible {
		return next
	}
	sooner := func(since time.Duration) {
		if over := max(d.since, since) + SilenceTimeout; over > d.last {
			next = min(next, over)
		}
	}
	sooner(d.since) // workers that were never seen
	for _, t := range d.workers {
		sooner(t.changed)
	}
	return next
}

// dead: the worker is silent, or the kubelet has reported that its process has
// ended and no heartbeat has changed since.
func (d *failureDetector) dead(name string) bool {
	if d.silent(name) {
		return true
	}
	t := d.workers[name]
	if t == nil || !t.inLeases || !d.leasesVisible {
		return false
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

// changedSince reports whether a heartbeat of the worker has been seen to change after that moment.
func (d *failureDetector) changedSince(name string, at time.Duration) bool {
	t := d.workers[name]
	return t != nil && t.changed > at
}

// suspect: a renewal of the Lease was left out, so the kubelet may know more.
func (d *failureDetector) suspect(name string, l observedLease, now time.Duration) bool {
	t := d.workers[name]
	return l.podUID != "" && t != nil && t.lease.version == l.version && now-t.leaseChanged >= askKubeletAfter
}

// reportOf reads the kubelet's report on the worker's container from the worker's
// pod. acquired is when the process that renews the Lease joined; zero: it is not
// known. Another pod of the same name says nothing.
//
// Only the kubelet writes containerStatuses. The rest of the pod is written by
// controllers too: the pod of a node that is cut off is deleted, or marked as failed, by
// a controller, while its containerStatuses are from before. So these tell that a
// container is not restarted only where it is known that it was the process of the
// Lease that has ended.
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

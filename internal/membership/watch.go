package membership

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// Silence is how long neither heartbeat of a worker may change before it is dead.
	Silence = 15 * time.Second
	// LookInterval is how often the heartbeats are looked at; the moment at which a silence is
	// over gets a look of its own.
	LookInterval = 2 * time.Second
	// sightGap is the longest pause between two looks over which silence still counts: an
	// observer that was stopped itself knows nothing of the time between.
	sightGap = 5 * time.Second
	// comeBack is how long a container that is restarted in its pod may take, before the
	// kubelet's word that it has ended counts (DESIGN section 3.5).
	comeBack = 15 * time.Second
	// suspectAfter is how long a Lease must be unchanged before its pod is asked for: one
	// renewal was left out.
	suspectAfter = RenewInterval + time.Second
	// ContainerName is the worker's container in its pod.
	ContainerName = "worker"
)

// word is what the kubelet says of a worker's container.
type word int

const (
	wordNone      word = iota // it was not asked, or cannot be read
	wordRuns                  // it runs, or has not been started yet
	wordRestarted             // it has ended and is being restarted in its pod
	wordEnded                 // it has ended for good
)

// leaseSight is what a look saw of one Lease.
type leaseSight struct {
	version string // its resourceVersion
	podUID  types.UID
	// kubelet is the kubelet's word; wordNone where it was not asked for.
	kubelet word
}

// look is what one look at the heartbeats saw. A half that could not be read is nil.
type look struct {
	// began and ended are by the observer's own monotonic clock.
	began, ended time.Duration
	leases       map[string]leaseSight
	keys         map[string]string
	run          string // run id of Redis
}

// watch judges from looks who is dead (DESIGN section 3.5). It is pure: it
// knows no time but that of the looks. Whatever makes a look unsure makes the
// judgement later, never sooner:
//
//   - a change counts from the end of the look that showed it, silence up to the
//     beginning of the last look;
//   - silence counts only while both heartbeats were seen, in looks that follow
//     each other closely, of one run of Redis;
//   - a value that is missing is no change: Redis may have been emptied;
//   - a worker that was never seen is silent since the watch began.
type watch struct {
	// since is when both heartbeats began to be seen without a break; sighted: they are.
	since   time.Duration
	sighted bool
	// leasesSince is the same for the Leases alone: the kubelet's word needs no Redis.
	leasesSince   time.Duration
	leasesSighted bool

	last    time.Duration // when the last look began
	run     string
	workers map[string]*track
}

// track is what is remembered of one worker.
type track struct {
	lease leaseSight
	key   string
	// leaseChanged and changed are when the Lease, or either heartbeat, was last seen to change.
	leaseChanged, changed time.Duration
	// word is the kubelet's last one: wordNone, wordRestarted or wordEnded, and endedSince
	// since when it has said so. That a pod cannot be read any more takes nothing back;
	// only a renewal of the Lease, or the kubelet itself, does.
	word       word
	endedSince time.Duration
	inLeases   bool
}

func newWatch() *watch { return &watch{workers: map[string]*track{}} }

// take judges one more look.
func (w *watch) take(l look) {
	closely := l.began-w.last <= sightGap
	w.last = l.began
	sees := l.leases != nil && l.keys != nil
	if !sees || !w.sighted || !closely || l.run != w.run {
		w.sighted, w.since = sees, l.ended
	}
	if l.leases == nil || !w.leasesSighted || !closely {
		w.leasesSighted, w.leasesSince = l.leases != nil, l.ended
	}
	if l.keys != nil {
		w.run = l.run
	}
	for _, t := range w.workers {
		t.inLeases = t.inLeases && l.leases == nil
	}
	for name, lease := range l.leases {
		t := w.track(name)
		t.inLeases = true
		if t.lease.version != lease.version || t.lease.podUID != lease.podUID {
			t.leaseChanged, t.changed, t.word = l.ended, l.ended, wordNone
		}
		t.lease = lease
		switch {
		case lease.kubelet == wordNone, t.word == wordEnded:
		case lease.kubelet == wordRuns:
			t.word = wordNone
		default:
			if t.word == wordNone {
				t.endedSince = l.ended
			}
			t.word = lease.kubelet
		}
	}
	for name, key := range l.keys {
		t := w.track(name)
		if t.key != key {
			t.key, t.changed = key, l.ended
		}
	}
	for name, t := range w.workers {
		if _, inKeys := l.keys[name]; !inKeys && l.keys != nil && !t.inLeases && w.silent(name) {
			delete(w.workers, name) // gone; whoever asks for it gets the same answer
		}
	}
}

func (w *watch) track(name string) *track {
	t := w.workers[name]
	if t == nil {
		t = &track{}
		w.workers[name] = t
	}
	return t
}

// silent: neither heartbeat has changed for Silence under a watch that saw both.
func (w *watch) silent(name string) bool {
	if !w.sighted {
		return false
	}
	from := w.since
	if t := w.workers[name]; t != nil {
		from = max(from, t.changed)
	}
	return w.last-from >= Silence
}

// next is when to look again: the sessions of a dead worker are down, so a
// silence that would be over before the next regular look is not left to it.
func (w *watch) next() time.Duration {
	next := w.last + LookInterval
	if !w.sighted {
		return next
	}
	sooner := func(since time.Duration) {
		if over := max(w.since, since) + Silence; over > w.last {
			next = min(next, over)
		}
	}
	sooner(w.since) // those who were never seen
	for _, t := range w.workers {
		sooner(t.changed)
	}
	return next
}

// dead: the worker is silent, or the kubelet has said that it has ended and its
// Lease has not changed since.
func (w *watch) dead(name string) bool {
	if w.silent(name) {
		return true
	}
	t := w.workers[name]
	if t == nil || !t.inLeases || !w.leasesSighted {
		return false
	}
	switch t.word {
	case wordEnded:
		return true
	case wordRestarted:
		return w.last-max(t.endedSince, w.leasesSince) >= comeBack
	default:
		return false
	}
}

// suspect: a renewal of the Lease was left out, so the kubelet may know more.
func (w *watch) suspect(name string, l leaseSight, now time.Duration) bool {
	t := w.workers[name]
	return l.podUID != "" && t != nil && t.lease.version == l.version && now-t.leaseChanged >= suspectAfter
}

// kubelet reads its word on the worker's container from the worker's pod. Only
// the kubelet writes it. Another pod of the same name says nothing.
func kubelet(pod *corev1.Pod, uid types.UID) word {
	if pod.UID != uid {
		return wordNone
	}
	for i := range pod.Status.ContainerStatuses {
		c := &pod.Status.ContainerStatuses[i]
		if c.Name != ContainerName && len(pod.Status.ContainerStatuses) > 1 {
			continue
		}
		over := !pod.DeletionTimestamp.IsZero() || pod.Spec.RestartPolicy == corev1.RestartPolicyNever ||
			pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
		switch {
		case c.State.Terminated != nil && over:
			return wordEnded
		case c.State.Terminated != nil, c.State.Waiting != nil && c.LastTerminationState.Terminated != nil:
			return wordRestarted
		default:
			return wordRuns
		}
	}
	return wordNone
}

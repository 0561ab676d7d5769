package membership

import (
	"cmp"
	"fmt"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// state is what an observer can read at one second of a test case.
type state struct {
	leaseRenewed, keyRenewed bool // since the previous observation
	leaseGone, keyGone       bool
	noAPI, noRedis           bool // cannot be read
	run                      string
	kubelet                  kubeletReport
	acquired                 int    // the second at which the process of the Lease joined; 0: the Lease does not say it
	pod                      string // UID; empty: "p"
	node                     nodeState
	skip                     bool // the observer itself is stopped: it does not observe
}

// at returns the time of that second by the clock of the worker's node.
func at(second int) time.Time { return time.Unix(1_800_000_000+int64(second), 0) }

func restarting(finished int) kubeletReport { return kubeletReport{stateRestarting, at(finished)} }
func hasEnded(finished int) kubeletReport   { return kubeletReport{stateEnded, at(finished)} }

// during returns the report that the pod shows at the second now: report between from and
// to, otherwise none.
func during(report kubeletReport, now, from, to int) kubeletReport {
	if now < from || now >= to {
		return kubeletReport{}
	}
	return report
}

// lostFrom returns the state that the node shows at the second now: it is lost from a second on.
func lostFrom(now, from int) nodeState {
	if now < from {
		return nodePresent
	}
	return nodeLost
}

// deadAt observes the states of a test case every 2 s, and returns the second at which the
// worker is dead (-1: never).
func deadAt(states func(second int) state, seconds int) int {
	d := newFailureDetector()
	version, count := 1, 1
	for second := 0; second <= seconds; second += 2 {
		s := states(second)
		if s.skip {
			continue
		}
		if s.leaseRenewed {
			version++
		}
		if s.keyRenewed {
			count++
		}
		now := time.Duration(second) * time.Second
		o := observation{began: now, ended: now, run: s.run}
		if !s.noAPI {
			o.leases = map[string]observedLease{}
			if !s.leaseGone {
				lease := observedLease{version: fmt.Sprint(version), podUID: types.UID(cmp.Or(s.pod, "p")), report: s.kubelet, node: s.node}
				if s.acquired != 0 {
					lease.acquired = at(s.acquired)
				}
				o.leases["w"] = lease
			}
		}
		if !s.noRedis {
			o.keys = map[string]string{}
			if !s.keyGone {
				o.keys["w"] = fmt.Sprintf("i/%d", count)
			}
		}
		d.observe(o)
		if d.dead("w") {
			return second
		}
	}
	return -1
}

func TestFailureDetector(t *testing.T) {
	alive := func(second int) bool { return second%4 == 0 }
	tests := []struct {
		name   string
		states func(second int) state
		dead   int
	}{
		{
			name:   "the worker renews both heartbeats",
			states: func(s int) state { return state{leaseRenewed: alive(s), keyRenewed: alive(s)} },
			dead:   -1,
		},
		{
			name: "the worker is killed after 20 s and is dead after 15 s of silence",
			states: func(s int) state {
				return state{leaseRenewed: s <= 20 && alive(s), keyRenewed: s <= 20 && alive(s)}
			},
			dead: 36, // the first observation after 20 + 15
		},
		{
			name:   "the worker is cut off from the API server and renews its key in Redis",
			states: func(s int) state { return state{keyRenewed: alive(s)} },
			dead:   -1,
		},
		{
			name:   "the worker is cut off from Redis and renews its Lease",
			states: func(s int) state { return state{leaseRenewed: alive(s)} },
			dead:   -1,
		},
		{
			name: "the Lease is silent, then the key, but never both for 15 s",
			states: func(s int) state {
				return state{leaseRenewed: s < 20, keyRenewed: s >= 30}
			},
			dead: -1,
		},
		{
			name:   "the worker dies while Redis does not answer: it is declared dead only after Redis is back",
			states: func(s int) state { return state{noRedis: s < 100} },
			dead:   116, // 15 s after both are visible again
		},
		{
			name:   "the worker dies while the API server does not answer",
			states: func(s int) state { return state{noAPI: s > 4 && s < 100} },
			dead:   116,
		},
		{
			name: "the manager is cut off from Redis while the worker is cut off from the API server",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, keyRenewed: true, noRedis: s >= 10 && s < 200}
			},
			dead: -1,
		},
		{
			name: "a failed read restarts the silence",
			states: func(s int) state {
				return state{noRedis: s == 14}
			},
			dead: 32,
		},
		{
			name: "Redis is emptied while the worker lives",
			states: func(s int) state {
				return state{leaseRenewed: alive(s), keyRenewed: alive(s), keyGone: s >= 20 && s < 24}
			},
			dead: -1,
		},
		{
			name: "the worker is cut off from the API server and Redis is emptied: a missing key is not a death",
			states: func(s int) state {
				return state{keyRenewed: alive(s), keyGone: s >= 20 && s < 32}
			},
			dead: -1,
		},
		{
			name: "Redis fails over: its new run id restarts the silence",
			states: func(s int) state {
				run := "a"
				if s >= 12 {
					run = "b"
				}
				return state{run: run}
			},
			dead: 28,
		},
		{
			name:   "the observer is stopped for a minute: that time does not count",
			states: func(s int) state { return state{leaseRenewed: s < 8, skip: s >= 8 && s < 68} },
			dead:   84,
		},
		{
			name:   "the worker was never seen",
			states: func(int) state { return state{leaseGone: true, keyGone: true} },
			dead:   16,
		},
		{
			name: "the worker has left in order: 15 s after its heartbeats are deleted it is dead",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, keyRenewed: s < 10, leaseGone: s >= 10, keyGone: s >= 10}
			},
			dead: 24,
		},
		{
			name: "the kubelet reports that the container has ended for good: dead at once",
			states: func(s int) state {
				if s >= 10 {
					return state{kubelet: hasEnded(10)}
				}
				return state{leaseRenewed: true, keyRenewed: true}
			},
			dead: 10,
		},
		{
			name: "the kubelet reports that the container has ended for good while Redis does not answer",
			states: func(s int) state {
				if s >= 10 {
					return state{kubelet: hasEnded(10), noRedis: true}
				}
				return state{leaseRenewed: true, keyRenewed: true}
			},
			dead: 10,
		},
		{
			name: "a container that is restarted in its pod has 15 s to come back",
			states: func(s int) state {
				if s >= 10 {
					return state{kubelet: restarting(10), noRedis: true}
				}
				return state{leaseRenewed: true, keyRenewed: true}
			},
			dead: 26,
		},
		{
			name: "a container that is restarted in its pod comes back and renews its Lease",
			states: func(s int) state {
				return state{leaseRenewed: s < 10 || s >= 20, keyRenewed: true, kubelet: during(restarting(10), s, 10, 20)}
			},
			dead: -1,
		},
		{
			name: "the kubelet reports the end, then the pod is gone, while Redis does not answer",
			states: func(s int) state {
				switch {
				case s < 10:
					return state{leaseRenewed: true, keyRenewed: true}
				case s < 12:
					return state{kubelet: restarting(10), noRedis: true}
				default:
					return state{noRedis: true}
				}
			},
			dead: 26,
		},
		{
			name: "the kubelet reports that the container runs again",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, keyRenewed: s < 10, noRedis: s >= 10, kubelet: map[bool]kubeletReport{true: restarting(10), false: {state: stateRunning}}[s >= 10 && s < 20]}
			},
			dead: -1,
		},
		{
			name: "an old report about a worker that renews its Lease",
			states: func(int) state {
				return state{leaseRenewed: true, kubelet: restarting(1)}
			},
			dead: -1,
		},
		{
			name: "15 s of silence are enough without the kubelet",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, keyRenewed: s < 10, kubelet: during(restarting(20), s, 20, 1000)}
			},
			dead: 24,
		},
		{
			name: "restarted in place and cut off at that moment: the pod shows the end of the old process, Redis a heartbeat of the new one",
			states: func(s int) state {
				return state{leaseRenewed: s < 14, keyRenewed: alive(s), acquired: 12, kubelet: during(restarting(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "restarted in place and cut off, and the worker is too old to report when it joined",
			states: func(s int) state {
				return state{leaseRenewed: s < 14, keyRenewed: alive(s), kubelet: during(restarting(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "restarted in place and cut off, and the manager cannot read Redis",
			states: func(s int) state {
				return state{leaseRenewed: s < 14, keyRenewed: alive(s), noRedis: s > 14, acquired: 12, kubelet: during(restarting(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "restarted in place and cut off, and a controller has marked the pod as one that is not restarted",
			states: func(s int) state {
				return state{leaseRenewed: s < 14, keyRenewed: alive(s), acquired: 12, kubelet: during(hasEnded(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "restarted in place and cut off, then killed: dead after 15 s of silence",
			states: func(s int) state {
				return state{leaseRenewed: s < 14, keyRenewed: s <= 60 && alive(s), acquired: 12, kubelet: during(restarting(10), s, 18, 1000)}
			},
			dead: 76,
		},
		{
			name: "restarted in place and cut off, then killed, and the kubelet reports that end too: dead at once",
			states: func(s int) state {
				report := during(restarting(10), s, 18, 60)
				if s >= 60 {
					report = hasEnded(59)
				}
				return state{leaseRenewed: s < 14, keyRenewed: s < 60 && alive(s), acquired: 12, kubelet: report}
			},
			dead: 60,
		},
		{
			name: "a report that is followed by a change of the key in Redis never counts again",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, keyRenewed: s < 10 || s == 20, noRedis: s > 20, kubelet: during(restarting(10), s, 10, 1000)}
			},
			dead: -1,
		},
		{
			name: "a change of the key that is seen together with the report happened before it",
			states: func(s int) state {
				return state{leaseRenewed: s < 6, keyRenewed: s <= 10, kubelet: during(hasEnded(9), s, 10, 1000)}
			},
			dead: 10,
		},
		{
			name: "the kubelet is back and reports an old status: the Lease was renewed after it",
			states: func(s int) state {
				report := during(restarting(10), s, 10, 14)
				if s >= 30 {
					report = restarting(10)
				}
				return state{leaseRenewed: s < 10 || s >= 14 && s < 24, keyRenewed: s < 10, noRedis: s >= 10, kubelet: report}
			},
			dead: -1,
		},
		{
			name: "the container restarts several times: each report counts separately",
			states: func(s int) state {
				report := during(restarting(10), s, 10, 16)
				if s >= 30 {
					report = restarting(29)
				}
				return state{leaseRenewed: s < 10 || s >= 16 && s < 26, keyRenewed: s < 10, noRedis: s >= 10, acquired: 0, kubelet: report}
			},
			dead: 46,
		},
		{
			name: "another pod takes over the name: reports about the old pod do not apply to it",
			states: func(s int) state {
				if s < 10 {
					return state{leaseRenewed: true, keyRenewed: true}
				}
				return state{leaseRenewed: s < 20, keyRenewed: s < 60 && alive(s), pod: "q", acquired: 12}
			},
			dead: 72,
		},
		{
			name: "the node is lost together with the only Redis",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, keyRenewed: s < 10, noRedis: s >= 10, node: lostFrom(s, 60)}
			},
			dead: 60,
		},
		{
			name: "the Node is deleted although its machine still runs: the worker renews its Lease",
			states: func(s int) state {
				return state{leaseRenewed: alive(s), keyRenewed: alive(s), noRedis: s >= 10, node: lostFrom(s, 20)}
			},
			dead: -1,
		},
		{
			name: "the Node is deleted while its worker is cut off from the API server and renews its key in Redis",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, keyRenewed: alive(s), node: lostFrom(s, 20)}
			},
			dead: -1,
		},
		{
			name: "the Node is deleted at once, while Redis does not answer: 15 s of silence decide",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, noRedis: s >= 10, node: lostFrom(s, 10)}
			},
			dead: 24, // the Lease changed last at 8
		},
		{
			name: "the taint is removed before the silence is long enough",
			states: func(s int) state {
				node := lostFrom(s, 10)
				if s >= 20 {
					node = nodePresent
				}
				return state{leaseRenewed: s < 10, noRedis: true, node: node}
			},
			dead: -1,
		},
		{
			name: "the node is lost and the API server fails from time to time: the silence starts again",
			states: func(s int) state {
				return state{leaseRenewed: s < 10, noRedis: true, noAPI: s == 20, node: lostFrom(s, 10)}
			},
			dead: 38, // visible again at 22, and 15 s
		},
		{
			name: "another pod takes over the name: the loss of the old pod's node does not apply to it",
			states: func(s int) state {
				if s < 30 {
					return state{noRedis: true, noAPI: s > 10, node: lostFrom(s, 6)}
				}
				return state{noRedis: true, pod: "q"}
			},
			dead: -1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			NewWithT(t).Expect(deadAt(tt.states, 300)).To(Equal(tt.dead))
		})
	}
}

func TestTheNextObservation(t *testing.T) {
	t.Parallel()
	const s = time.Second
	key := func(began time.Duration, value string) observation {
		return observation{began: began, ended: began + s/10, leases: map[string]observedLease{}, keys: map[string]string{"w": value}}
	}
	for name, tt := range map[string]struct {
		observations []observation
		want         time.Duration
	}{
		"after the first observation":                              {[]observation{key(0, "i/1")}, ObserveInterval},
		"after one that could read nothing":                        {[]observation{{began: 4 * s, ended: 4 * s}}, 4*s + ObserveInterval},
		"when a silence reaches 15 s before the next regular time": {[]observation{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1"), key(14*s, "i/1")}, 15*s + s/10},
		"when a silence has reached 15 s":                          {[]observation{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1"), key(15*s+s/10, "i/1")}, 17*s + s/10},
		"when a silence is far from 15 s":                          {[]observation{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1")}, 12 * s},
		"when both heartbeats became visible again after the worker fell silent": {[]observation{
			key(0, "i/1"), key(5*s, "i/1"), {began: 10 * s, ended: 10 * s}, key(12*s, "i/1"), key(17*s, "i/1"), key(22*s, "i/1"), key(26*s, "i/1"),
		}, 27*s + s/10},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newFailureDetector()
			for _, o := range tt.observations {
				d.observe(o)
			}
			NewWithT(t).Expect(d.next()).To(Equal(tt.want))
		})
	}
}

func TestAReportStaysValidWhenThePodCannotBeRead(t *testing.T) {
	g := NewWithT(t)
	d := newFailureDetector()
	for second, report := range []kubeletReport{{}, {state: stateRunning}, hasEnded(2), {}, {}, {state: stateRunning}} {
		at := time.Duration(second) * time.Second
		d.observe(observation{began: at, ended: at, leases: map[string]observedLease{"w": {version: "1", podUID: "p", report: report}}})
		g.Expect(d.dead("w")).To(Equal(second >= 2), "second %d", second)
	}
	d.observe(observation{began: 7 * time.Second, ended: 7 * time.Second, leases: map[string]observedLease{"w": {version: "2", podUID: "p"}}})
	g.Expect(d.dead("w")).To(BeFalse(), "a renewal withdraws the report")
}

func TestSilenceCountsBetweenTheReads(t *testing.T) {
	g := NewWithT(t)
	d := newFailureDetector()
	observe := func(began, ended float64, version string) {
		d.observe(observation{
			began: time.Duration(began * float64(time.Second)), ended: time.Duration(ended * float64(time.Second)),
			leases: map[string]observedLease{"w": {version: version}}, keys: map[string]string{},
		})
	}
	observe(0, 0, "1")
	observe(4, 6, "2") // the change may have happened as late as 6
	for at := 8.0; at < 21; at += 4 {
		observe(at, at+2, "2") // what the read that ends at 22 returned may be as old as 20
	}
	g.Expect(d.dead("w")).To(BeFalse())
	observe(21.5, 21.5, "2")
	g.Expect(d.dead("w")).To(BeTrue())
}

func TestGoneWorkersAreForgotten(t *testing.T) {
	g := NewWithT(t)
	d := newFailureDetector()
	for second := range 60 {
		o := observation{began: time.Duration(second) * time.Second, ended: time.Duration(second) * time.Second, leases: map[string]observedLease{}, keys: map[string]string{}}
		if second < 10 {
			o.leases["w"] = observedLease{version: fmt.Sprint(second)}
		}
		d.observe(o)
	}
	g.Expect(d.workers).To(BeEmpty())
	g.Expect(d.dead("w")).To(BeTrue(), "a worker without heartbeats is dead")
}

func TestReportOf(t *testing.T) {
	finished := at(10)
	ended := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137, FinishedAt: metav1.NewTime(finished)}}
	lost := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137, Reason: "ContainerStatusUnknown"}}
	waiting := corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	deletion := metav1.Now()
	deleted := func(p *corev1.Pod) { p.DeletionTimestamp = &deletion }
	failed := func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }
	never := func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }
	tests := []struct {
		name     string
		pod      func(*corev1.Pod)
		status   corev1.ContainerStatus
		acquired time.Time
		want     containerState
	}{
		{name: "the container runs", status: corev1.ContainerStatus{State: running}, want: stateRunning},
		{name: "the container runs again", status: corev1.ContainerStatus{State: running, LastTerminationState: ended}, want: stateRunning},
		{name: "the container has ended and will be restarted", status: corev1.ContainerStatus{State: ended}, want: stateRestarting},
		{name: "the container waits to be restarted", status: corev1.ContainerStatus{State: waiting, LastTerminationState: ended}, want: stateRestarting},
		{name: "the container waits for its first start", status: corev1.ContainerStatus{State: waiting}, want: stateRunning},
		{name: "the pod is being deleted", pod: deleted, status: corev1.ContainerStatus{State: ended}, acquired: at(3), want: stateEnded},
		{name: "the pod has failed because it was evicted", pod: failed, status: corev1.ContainerStatus{State: ended}, acquired: at(3), want: stateEnded},
		{name: "the pod is being deleted, and the process joined after the container ended", pod: deleted, status: corev1.ContainerStatus{State: ended}, acquired: at(11), want: stateRestarting},
		{name: "the pod was marked as failed, and the process joined after the container ended", pod: failed, status: corev1.ContainerStatus{State: ended}, acquired: at(10), want: stateRestarting},
		{name: "the pod is being deleted, and it is not known when the process joined", pod: deleted, status: corev1.ContainerStatus{State: ended}, want: stateRestarting},
		{name: "the pod is being deleted, and the kubelet does not know when the container ended", pod: deleted, status: corev1.ContainerStatus{State: lost}, acquired: at(3), want: stateRestarting},
		{name: "the pod is being deleted while the container waits to be restarted", pod: deleted, status: corev1.ContainerStatus{State: waiting, LastTerminationState: ended}, acquired: at(3), want: stateRestarting},
		{name: "the container is never restarted", pod: never, status: corev1.ContainerStatus{State: ended}, want: stateEnded},
		{name: "another pod of the same name", pod: func(p *corev1.Pod) { p.UID = "other" }, status: corev1.ContainerStatus{State: ended}, want: stateUnknown},
		{name: "the pod is being deleted and the container still runs", pod: deleted, status: corev1.ContainerStatus{State: running}, want: stateRunning},
		{
			name: "another container of the pod has ended",
			pod: func(p *corev1.Pod) {
				p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "sidecar", State: ended}}
			},
			status: corev1.ContainerStatus{State: running}, want: stateRunning,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "p"}}
			if tt.pod != nil {
				tt.pod(pod)
			}
			tt.status.Name = ContainerName
			pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, tt.status)
			report := reportOf(pod, "p", tt.acquired)
			g.Expect(report.state).To(Equal(tt.want))
			if tt.want == stateEnded {
				g.Expect(report.finished).To(BeTemporally("==", finished))
			}
		})
	}
}

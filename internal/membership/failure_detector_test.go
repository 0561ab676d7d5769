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

// scene is what an observer can see at a second of the story.
type scene struct {
	leaseRenewed, keyRenewed bool // since the observation before
	leaseGone, keyGone       bool
	noAPI, noRedis           bool // cannot be read
	run                      string
	kubelet                  kubeletReport
	acquired                 int    // the second at which the process of the Lease joined; 0: it does not say
	pod                      string // UID; empty: "p"
	skip                     bool   // the observer itself is stopped
}

// at is that second by the clock of the worker's node.
func at(second int) time.Time { return time.Unix(1_800_000_000+int64(second), 0) }

func restarting(finished int) kubeletReport { return kubeletReport{stateRestarting, at(finished)} }
func hasEnded(finished int) kubeletReport   { return kubeletReport{stateEnded, at(finished)} }

// when is a report that the pod shows from one second on, up to another; before and after it shows none.
func when(report kubeletReport, now, from, to int) kubeletReport {
	if now < from || now >= to {
		return kubeletReport{}
	}
	return report
}

// until tells a story: scenes of 2 s each, and when the worker is dead (in
// seconds; -1: never).
func until(story func(second int) scene, seconds int) int {
	d := newFailureDetector()
	version, count := 1, 1
	for second := 0; second <= seconds; second += 2 {
		s := story(second)
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
		l := observation{began: now, ended: now, run: s.run}
		if !s.noAPI {
			l.leases = map[string]observedLease{}
			if !s.leaseGone {
				lease := observedLease{version: fmt.Sprint(version), podUID: types.UID(cmp.Or(s.pod, "p")), report: s.kubelet}
				if s.acquired != 0 {
					lease.acquired = at(s.acquired)
				}
				l.leases["w"] = lease
			}
		}
		if !s.noRedis {
			l.keys = map[string]string{}
			if !s.keyGone {
				l.keys["w"] = fmt.Sprintf("i/%d", count)
			}
		}
		d.observe(l)
		if d.dead("w") {
			return second
		}
	}
	return -1
}

func TestWhoIsDead(t *testing.T) {
	alive := func(second int) bool { return second%4 == 0 }
	tests := []struct {
		name  string
		story func(second int) scene
		dead  int
	}{
		{
			name:  "a worker that renews both",
			story: func(s int) scene { return scene{leaseRenewed: alive(s), keyRenewed: alive(s)} },
			dead:  -1,
		},
		{
			name: "killed after 20 s: 15 s of silence",
			story: func(s int) scene {
				return scene{leaseRenewed: s <= 20 && alive(s), keyRenewed: s <= 20 && alive(s)}
			},
			dead: 36, // the first observation after 20 + 15
		},
		{
			name:  "cut off from the API server: Redis speaks for it",
			story: func(s int) scene { return scene{keyRenewed: alive(s)} },
			dead:  -1,
		},
		{
			name:  "cut off from Redis: its Lease speaks for it",
			story: func(s int) scene { return scene{leaseRenewed: alive(s)} },
			dead:  -1,
		},
		{
			name: "first the one, then the other, never 15 s of both",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 20, keyRenewed: s >= 30}
			},
			dead: -1,
		},
		{
			name:  "it dies while Redis is away: nobody knows until Redis is back",
			story: func(s int) scene { return scene{noRedis: s < 100} },
			dead:  116, // 15 s after both are seen again
		},
		{
			name:  "it dies while the API server is away",
			story: func(s int) scene { return scene{noAPI: s > 4 && s < 100} },
			dead:  116,
		},
		{
			name: "the manager is cut from Redis while the worker is cut from the API server",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10, keyRenewed: true, noRedis: s >= 10 && s < 200}
			},
			dead: -1,
		},
		{
			name: "one failed read starts the silence again",
			story: func(s int) scene {
				return scene{noRedis: s == 14}
			},
			dead: 32,
		},
		{
			name: "Redis emptied while the worker lives",
			story: func(s int) scene {
				return scene{leaseRenewed: alive(s), keyRenewed: alive(s), keyGone: s >= 20 && s < 24}
			},
			dead: -1,
		},
		{
			name: "cut off from the API server, and Redis is emptied: the missing key is no death",
			story: func(s int) scene {
				return scene{keyRenewed: alive(s), keyGone: s >= 20 && s < 32}
			},
			dead: -1,
		},
		{
			name: "Redis fails over: its new run id starts the silence again",
			story: func(s int) scene {
				run := "a"
				if s >= 12 {
					run = "b"
				}
				return scene{run: run}
			},
			dead: 28,
		},
		{
			name:  "the observer was stopped for a minute: it knows nothing of that time",
			story: func(s int) scene { return scene{leaseRenewed: s < 8, skip: s >= 8 && s < 68} },
			dead:  84,
		},
		{
			name:  "nobody has ever seen it",
			story: func(int) scene { return scene{leaseGone: true, keyGone: true} },
			dead:  16,
		},
		{
			name: "it left in order: its heartbeats are gone, and so is it in time",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10, keyRenewed: s < 10, leaseGone: s >= 10, keyGone: s >= 10}
			},
			dead: 24,
		},
		{
			name: "the kubelet reports that its container has ended for good: at once",
			story: func(s int) scene {
				if s >= 10 {
					return scene{kubelet: hasEnded(10)}
				}
				return scene{leaseRenewed: true, keyRenewed: true}
			},
			dead: 10,
		},
		{
			name: "the same while Redis is away",
			story: func(s int) scene {
				if s >= 10 {
					return scene{kubelet: hasEnded(10), noRedis: true}
				}
				return scene{leaseRenewed: true, keyRenewed: true}
			},
			dead: 10,
		},
		{
			name: "a container that is restarted in its pod has 15 s",
			story: func(s int) scene {
				if s >= 10 {
					return scene{kubelet: restarting(10), noRedis: true}
				}
				return scene{leaseRenewed: true, keyRenewed: true}
			},
			dead: 26,
		},
		{
			name: "and one that came back has renewed its Lease",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10 || s >= 20, keyRenewed: true, kubelet: when(restarting(10), s, 10, 20)}
			},
			dead: -1,
		},
		{
			name: "the kubelet has reported the end, and then the pod is gone, while Redis is away",
			story: func(s int) scene {
				switch {
				case s < 10:
					return scene{leaseRenewed: true, keyRenewed: true}
				case s < 12:
					return scene{kubelet: restarting(10), noRedis: true}
				default:
					return scene{noRedis: true}
				}
			},
			dead: 26,
		},
		{
			name: "the kubelet reports that the container runs again",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10, keyRenewed: s < 10, noRedis: s >= 10, kubelet: map[bool]kubeletReport{true: restarting(10), false: {state: stateRunning}}[s >= 10 && s < 20]}
			},
			dead: -1,
		},
		{
			name: "an old report on a worker that renews",
			story: func(int) scene {
				return scene{leaseRenewed: true, kubelet: restarting(1)}
			},
			dead: -1,
		},
		{
			name: "15 s of silence decide without the kubelet",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10, keyRenewed: s < 10, kubelet: when(restarting(20), s, 20, 1000)}
			},
			dead: 24,
		},
		{
			name: "restarted in place and cut off at that moment: the pod shows the old end, Redis the new process",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 14, keyRenewed: alive(s), acquired: 12, kubelet: when(restarting(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "the same, and its worker is too old to say when it joined",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 14, keyRenewed: alive(s), kubelet: when(restarting(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "the same, and the manager cannot see Redis",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 14, keyRenewed: alive(s), noRedis: s > 14, acquired: 12, kubelet: when(restarting(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "the same, and a controller says that it is not restarted",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 14, keyRenewed: alive(s), acquired: 12, kubelet: when(hasEnded(10), s, 18, 1000)}
			},
			dead: -1,
		},
		{
			name: "it is killed after that: 15 s of silence decide",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 14, keyRenewed: s <= 60 && alive(s), acquired: 12, kubelet: when(restarting(10), s, 18, 1000)}
			},
			dead: 76,
		},
		{
			name: "or the kubelet reports its end, too",
			story: func(s int) scene {
				report := when(restarting(10), s, 18, 60)
				if s >= 60 {
					report = hasEnded(59)
				}
				return scene{leaseRenewed: s < 14, keyRenewed: s < 60 && alive(s), acquired: 12, kubelet: report}
			},
			dead: 60,
		},
		{
			name: "a report after which the key in Redis changes is refuted for good",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10, keyRenewed: s < 10 || s == 20, noRedis: s > 20, kubelet: when(restarting(10), s, 10, 1000)}
			},
			dead: -1,
		},
		{
			name: "a key that was seen to change together with the report is older than it",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 6, keyRenewed: s <= 10, kubelet: when(hasEnded(9), s, 10, 1000)}
			},
			dead: 10,
		},
		{
			name: "the kubelet is back and reports an older status: the Lease was renewed since",
			story: func(s int) scene {
				report := when(restarting(10), s, 10, 14)
				if s >= 30 {
					report = restarting(10)
				}
				return scene{leaseRenewed: s < 10 || s >= 14 && s < 24, keyRenewed: s < 10, noRedis: s >= 10, kubelet: report}
			},
			dead: -1,
		},
		{
			name: "the container restarts again and again: each report counts for itself",
			story: func(s int) scene {
				report := when(restarting(10), s, 10, 16)
				if s >= 30 {
					report = restarting(29)
				}
				return scene{leaseRenewed: s < 10 || s >= 16 && s < 26, keyRenewed: s < 10, noRedis: s >= 10, acquired: 0, kubelet: report}
			},
			dead: 46,
		},
		{
			name: "another pod takes over the name: reports on the old one say nothing of it",
			story: func(s int) scene {
				if s < 10 {
					return scene{leaseRenewed: true, keyRenewed: true}
				}
				return scene{leaseRenewed: s < 20, keyRenewed: s < 60 && alive(s), pod: "q", acquired: 12}
			},
			dead: 72,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			NewWithT(t).Expect(until(tt.story, 300)).To(Equal(tt.dead))
		})
	}
}

func TestTheNextLook(t *testing.T) {
	t.Parallel()
	const s = time.Second
	key := func(began time.Duration, value string) observation {
		return observation{began: began, ended: began + s/10, leases: map[string]observedLease{}, keys: map[string]string{"w": value}}
	}
	for name, tt := range map[string]struct {
		looks []observation
		want  time.Duration
	}{
		"a first look":                        {[]observation{key(0, "i/1")}, ObserveInterval},
		"one that is blind":                   {[]observation{{began: 4 * s, ended: 4 * s}}, 4*s + ObserveInterval},
		"the end of a silence":                {[]observation{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1"), key(14*s, "i/1")}, 15*s + s/10},
		"a silence that is over":              {[]observation{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1"), key(15*s+s/10, "i/1")}, 17*s + s/10},
		"a silence that is not over for long": {[]observation{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1")}, 12 * s},
		"the watch itself is new, its worker long silent": {[]observation{
			key(0, "i/1"), key(5*s, "i/1"), {began: 10 * s, ended: 10 * s}, key(12*s, "i/1"), key(17*s, "i/1"), key(22*s, "i/1"), key(26*s, "i/1"),
		}, 27*s + s/10},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newFailureDetector()
			for _, l := range tt.looks {
				d.observe(l)
			}
			NewWithT(t).Expect(d.next()).To(Equal(tt.want))
		})
	}
}

func TestAPodThatCannotBeReadTakesNoReportBack(t *testing.T) {
	g := NewWithT(t)
	d := newFailureDetector()
	for second, report := range []kubeletReport{{}, {state: stateRunning}, hasEnded(2), {}, {}, {state: stateRunning}} {
		at := time.Duration(second) * time.Second
		d.observe(observation{began: at, ended: at, leases: map[string]observedLease{"w": {version: "1", podUID: "p", report: report}}})
		g.Expect(d.dead("w")).To(Equal(second >= 2), "second %d", second)
	}
	d.observe(observation{began: 7 * time.Second, ended: 7 * time.Second, leases: map[string]observedLease{"w": {version: "2", podUID: "p"}}})
	g.Expect(d.dead("w")).To(BeFalse(), "but a renewal does")
}

func TestSilenceCountsBetweenTheReads(t *testing.T) {
	g := NewWithT(t)
	d := newFailureDetector()
	see := func(began, ended float64, version string) {
		d.observe(observation{
			began: time.Duration(began * float64(time.Second)), ended: time.Duration(ended * float64(time.Second)),
			leases: map[string]observedLease{"w": {version: version}}, keys: map[string]string{},
		})
	}
	see(0, 0, "1")
	see(4, 6, "2") // the change may have come as late as 6
	for at := 8.0; at < 21; at += 4 {
		see(at, at+2, "2") // what the read that ends at 22 saw may be as old as 20
	}
	g.Expect(d.dead("w")).To(BeFalse())
	see(21.5, 21.5, "2")
	g.Expect(d.dead("w")).To(BeTrue())
}

func TestGoneWorkersAreForgotten(t *testing.T) {
	g := NewWithT(t)
	d := newFailureDetector()
	for second := range 60 {
		l := observation{began: time.Duration(second) * time.Second, ended: time.Duration(second) * time.Second, leases: map[string]observedLease{}, keys: map[string]string{}}
		if second < 10 {
			l.leases["w"] = observedLease{version: fmt.Sprint(second)}
		}
		d.observe(l)
	}
	g.Expect(d.workers).To(BeEmpty())
	g.Expect(d.dead("w")).To(BeTrue(), "and are dead for whoever asks")
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
		{name: "it runs", status: corev1.ContainerStatus{State: running}, want: stateRunning},
		{name: "it runs again", status: corev1.ContainerStatus{State: running, LastTerminationState: ended}, want: stateRunning},
		{name: "it has ended and is restarted", status: corev1.ContainerStatus{State: ended}, want: stateRestarting},
		{name: "it waits to be restarted", status: corev1.ContainerStatus{State: waiting, LastTerminationState: ended}, want: stateRestarting},
		{name: "it waits for its first start", status: corev1.ContainerStatus{State: waiting}, want: stateRunning},
		{name: "its pod is being deleted", pod: deleted, status: corev1.ContainerStatus{State: ended}, acquired: at(3), want: stateEnded},
		{name: "its pod has failed: evicted", pod: failed, status: corev1.ContainerStatus{State: ended}, acquired: at(3), want: stateEnded},
		{name: "its pod is being deleted, and the process joined after that end", pod: deleted, status: corev1.ContainerStatus{State: ended}, acquired: at(11), want: stateRestarting},
		{name: "its pod was marked as failed, and the process joined after that end", pod: failed, status: corev1.ContainerStatus{State: ended}, acquired: at(10), want: stateRestarting},
		{name: "its pod is being deleted, and it is not known when the process joined", pod: deleted, status: corev1.ContainerStatus{State: ended}, want: stateRestarting},
		{name: "its pod is being deleted, and the kubelet does not know when it ended", pod: deleted, status: corev1.ContainerStatus{State: lost}, acquired: at(3), want: stateRestarting},
		{name: "its pod is being deleted while it waits to be restarted", pod: deleted, status: corev1.ContainerStatus{State: waiting, LastTerminationState: ended}, acquired: at(3), want: stateRestarting},
		{name: "it is never restarted", pod: never, status: corev1.ContainerStatus{State: ended}, want: stateEnded},
		{name: "another pod of the same name", pod: func(p *corev1.Pod) { p.UID = "other" }, status: corev1.ContainerStatus{State: ended}, want: stateUnknown},
		{name: "a pod that is being deleted, but runs", pod: deleted, status: corev1.ContainerStatus{State: running}, want: stateRunning},
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

package membership

import (
	"fmt"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// scene is what an observer can see at a second of the story.
type scene struct {
	leaseRenewed, keyRenewed bool // since the look before
	leaseGone, keyGone       bool
	noAPI, noRedis           bool // cannot be read
	run                      string
	kubelet                  word
	skip                     bool // the observer itself is stopped
}

// until tells a story: scenes of 2 s each, and when the worker is dead (in
// seconds; -1: never).
func until(story func(second int) scene, seconds int) int {
	w := newWatch()
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
		at := time.Duration(second) * time.Second
		l := look{began: at, ended: at, run: s.run}
		if !s.noAPI {
			l.leases = map[string]leaseSight{}
			if !s.leaseGone {
				l.leases["w"] = leaseSight{version: fmt.Sprint(version), podUID: "p", kubelet: s.kubelet}
			}
		}
		if !s.noRedis {
			l.keys = map[string]string{}
			if !s.keyGone {
				l.keys["w"] = fmt.Sprintf("i/%d", count)
			}
		}
		w.take(l)
		if w.dead("w") {
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
			dead: 36, // the first look after 20 + 15
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
			name: "the kubelet says that its container has ended for good: at once",
			story: func(s int) scene {
				if s >= 10 {
					return scene{kubelet: wordEnded}
				}
				return scene{leaseRenewed: true, keyRenewed: true}
			},
			dead: 10,
		},
		{
			name: "so too while Redis is away",
			story: func(s int) scene {
				if s >= 10 {
					return scene{kubelet: wordEnded, noRedis: true}
				}
				return scene{leaseRenewed: true, keyRenewed: true}
			},
			dead: 10,
		},
		{
			name: "a container that is restarted in its pod has 15 s",
			story: func(s int) scene {
				if s >= 10 {
					return scene{kubelet: wordRestarted, noRedis: true}
				}
				return scene{leaseRenewed: true, keyRenewed: true}
			},
			dead: 26,
		},
		{
			name: "and one that came back has renewed its Lease",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10 || s >= 20, keyRenewed: true, kubelet: map[bool]word{true: wordRestarted}[s >= 10 && s < 20]}
			},
			dead: -1,
		},
		{
			name: "the kubelet has spoken, and then the pod is gone, while Redis is away",
			story: func(s int) scene {
				switch {
				case s < 10:
					return scene{leaseRenewed: true, keyRenewed: true}
				case s < 12:
					return scene{kubelet: wordRestarted, noRedis: true}
				default:
					return scene{noRedis: true}
				}
			},
			dead: 26,
		},
		{
			name: "the kubelet takes its word back",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10, keyRenewed: true, kubelet: map[bool]word{true: wordRestarted, false: wordRuns}[s >= 10 && s < 20]}
			},
			dead: -1,
		},
		{
			name: "the kubelet's old word on a worker that renews",
			story: func(int) scene {
				return scene{leaseRenewed: true, kubelet: wordRestarted}
			},
			dead: -1,
		},
		{
			name: "15 s of silence decide without the kubelet",
			story: func(s int) scene {
				return scene{leaseRenewed: s < 10, keyRenewed: s < 10, kubelet: map[bool]word{true: wordRestarted}[s >= 20]}
			},
			dead: 24,
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
	key := func(began time.Duration, value string) look {
		return look{began: began, ended: began + s/10, leases: map[string]leaseSight{}, keys: map[string]string{"w": value}}
	}
	for name, tt := range map[string]struct {
		looks []look
		want  time.Duration
	}{
		"a first look":                        {[]look{key(0, "i/1")}, LookInterval},
		"one that is blind":                   {[]look{{began: 4 * s, ended: 4 * s}}, 4*s + LookInterval},
		"the end of a silence":                {[]look{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1"), key(14*s, "i/1")}, 15*s + s/10},
		"a silence that is over":              {[]look{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1"), key(15*s+s/10, "i/1")}, 17*s + s/10},
		"a silence that is not over for long": {[]look{key(0, "i/1"), key(5*s, "i/1"), key(10*s, "i/1")}, 12 * s},
		"the watch itself is new, its worker long silent": {[]look{
			key(0, "i/1"), key(5*s, "i/1"), {began: 10 * s, ended: 10 * s}, key(12*s, "i/1"), key(17*s, "i/1"), key(22*s, "i/1"), key(26*s, "i/1"),
		}, 27*s + s/10},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWatch()
			for _, l := range tt.looks {
				w.take(l)
			}
			NewWithT(t).Expect(w.next()).To(Equal(tt.want))
		})
	}
}

func TestTheKubeletsProofStands(t *testing.T) {
	g := NewWithT(t)
	w := newWatch()
	for second, kubelet := range []word{wordNone, wordRuns, wordEnded, wordNone, wordNone, wordRuns} {
		at := time.Duration(second) * time.Second
		w.take(look{began: at, ended: at, leases: map[string]leaseSight{"w": {version: "1", podUID: "p", kubelet: kubelet}}})
		g.Expect(w.dead("w")).To(Equal(second >= 2), "second %d", second)
	}
	w.take(look{began: 7 * time.Second, ended: 7 * time.Second, leases: map[string]leaseSight{"w": {version: "2", podUID: "p"}}})
	g.Expect(w.dead("w")).To(BeFalse(), "but a renewal refutes it")
}

func TestSilenceCountsBetweenTheReads(t *testing.T) {
	g := NewWithT(t)
	w := newWatch()
	see := func(began, ended float64, version string) {
		w.take(look{
			began: time.Duration(began * float64(time.Second)), ended: time.Duration(ended * float64(time.Second)),
			leases: map[string]leaseSight{"w": {version: version}}, keys: map[string]string{},
		})
	}
	see(0, 0, "1")
	see(4, 6, "2") // the change may have come as late as 6
	for at := 8.0; at < 21; at += 4 {
		see(at, at+2, "2") // what the read that ends at 22 saw may be as old as 20
	}
	g.Expect(w.dead("w")).To(BeFalse())
	see(21.5, 21.5, "2")
	g.Expect(w.dead("w")).To(BeTrue())
}

func TestGoneWorkersAreForgotten(t *testing.T) {
	g := NewWithT(t)
	w := newWatch()
	for second := range 60 {
		l := look{began: time.Duration(second) * time.Second, ended: time.Duration(second) * time.Second, leases: map[string]leaseSight{}, keys: map[string]string{}}
		if second < 10 {
			l.leases["w"] = leaseSight{version: fmt.Sprint(second)}
		}
		w.take(l)
	}
	g.Expect(w.workers).To(BeEmpty())
	g.Expect(w.dead("w")).To(BeTrue(), "and are dead for whoever asks")
}

func TestTheKubeletsWord(t *testing.T) {
	ended := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137}}
	waiting := corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	deleted := metav1.Now()
	tests := []struct {
		name   string
		pod    func(*corev1.Pod)
		status corev1.ContainerStatus
		want   word
	}{
		{name: "it runs", status: corev1.ContainerStatus{State: running}, want: wordRuns},
		{name: "it runs again", status: corev1.ContainerStatus{State: running, LastTerminationState: ended}, want: wordRuns},
		{name: "it has ended and is restarted", status: corev1.ContainerStatus{State: ended}, want: wordRestarted},
		{name: "it waits to be restarted", status: corev1.ContainerStatus{State: waiting, LastTerminationState: ended}, want: wordRestarted},
		{name: "it waits for its first start", status: corev1.ContainerStatus{State: waiting}, want: wordRuns},
		{name: "its pod is being deleted", pod: func(p *corev1.Pod) { p.DeletionTimestamp = &deleted }, status: corev1.ContainerStatus{State: ended}, want: wordEnded},
		{name: "its pod has failed: evicted", pod: func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, status: corev1.ContainerStatus{State: ended}, want: wordEnded},
		{name: "it is never restarted", pod: func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }, status: corev1.ContainerStatus{State: ended}, want: wordEnded},
		{name: "another pod of the same name", pod: func(p *corev1.Pod) { p.UID = "other" }, status: corev1.ContainerStatus{State: ended}, want: wordNone},
		{name: "a pod that is being deleted, but runs", pod: func(p *corev1.Pod) { p.DeletionTimestamp = &deleted }, status: corev1.ContainerStatus{State: running}, want: wordRuns},
		{
			name: "another container of the pod has ended",
			pod: func(p *corev1.Pod) {
				p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "sidecar", State: ended}}
			},
			status: corev1.ContainerStatus{State: running}, want: wordRuns,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "p"}}
			if tt.pod != nil {
				tt.pod(pod)
			}
			tt.status.Name = ContainerName
			pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, tt.status)
			NewWithT(t).Expect(kubelet(pod, "p")).To(Equal(tt.want))
		})
	}
}

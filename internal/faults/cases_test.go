//go:build faults

package faults

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// silence is what declares a worker dead.
const silence = 15 * time.Second

// fault is a named case. The checks of check_test.go apply to every case. In
// addition, keeps says that the fault must end no connection, moves is how often a
// session may be moved at most (-1: any number), and logins how often it may log in.
type fault struct {
	name   string
	keeps  bool
	moves  int
	logins int64
	do     func(w *environment)
}

const anyNumber = -1

var faults = []fault{
	{"SIGKILL a worker whose pod is gone: the others take over", false, 1, 1, func(w *environment) {
		w.busiest()[0].remove()
		w.goneFrom(w.busiest())
	}},
	{"a worker's node is lost: not even its sockets are closed", false, 1, 1, func(w *environment) {
		w.busiest()[0].vanish()
		w.goneFrom(w.busiest())
	}},
	{"SIGKILL a worker whose end the kubelet reports: no wait for its silence", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		victim.remove()
		start := time.Now()
		w.kubeletSays(victim)
		w.goneFrom([]*pod{victim})
		if took := time.Since(start); took >= silence {
			w.reportViolation("the manager did not use the kubelet's report for %s", took)
		}
	}},
	{"a worker dies while Redis is away, and the kubelet reports it", false, 1, 1, func(w *environment) {
		w.stopRedis()
		victim := w.busiest()[0]
		victim.remove()
		w.kubeletSays(victim)
		w.goneFrom([]*pod{victim})
		w.startRedis(false)
	}},
	{"SIGKILL a worker that is restarted in place", false, 0, 1, func(w *environment) {
		w.busiest()[0].kill(restartAfter)
	}},
	{"SIGKILL every worker at once, all are restarted in place", false, 0, 1, func(w *environment) {
		for _, p := range w.busiest() {
			p.kill(restartAfter)
		}
	}},
	{"SIGSTOP a worker past its fail-over, then SIGCONT", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		victim.pause()
		w.last(40 * time.Second)
		victim.wake()
		w.within(5*time.Second, "the worker that was declared dead to end by itself", ended)
	}},
	{"SIGSTOP a worker past its self-fence, SIGCONT before its fail-over", false, 1, 2, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		victim.pause()
		w.last(10500 * time.Millisecond)
		victim.wake()
		w.within(5*time.Second, "the worker that has lost its right to end by itself", ended)
	}},
	{"SIGSTOP a worker for a moment", true, 0, 0, func(w *environment) {
		victim := w.busiest()[0]
		victim.pause()
		w.last(5 * time.Second)
		victim.wake()
	}},
	{"a worker is cut from the API server for 40 s", true, 0, 0, func(w *environment) {
		w.without(w.busiest()[:1], 40*time.Second, toAPI)
	}},
	{"a worker is cut from Redis for 40 s", true, 0, 0, func(w *environment) {
		w.without(w.busiest()[:1], 40*time.Second, toRedis)
	}},
	{"a worker's connection to the API server hangs for 60 s", true, 0, 0, func(w *environment) {
		w.hanging(w.busiest()[:1], 60*time.Second, toAPI)
	}},
	{"a worker's connection to Redis hangs for 60 s", true, 0, 0, func(w *environment) {
		w.hanging(w.busiest()[:1], 60*time.Second, toRedis)
	}},
	{"a worker is cut from the API server, then from Redis instead", true, 0, 0, func(w *environment) {
		victim := w.busiest()[:1]
		w.without(victim, 25*time.Second, toAPI)
		w.without(victim, 25*time.Second, toRedis)
	}},
	{"a worker is cut from the API server and from Redis for 40 s", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		victim.proxies[toAPI].Cut()
		victim.proxies[toRedis].Cut()
		w.within(14*time.Second, "the worker that renews nothing to end by itself", ended)
		w.last(26 * time.Second)
	}},
	{"a worker's connections to the API server and to Redis hang for 40 s", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		victim.proxies[toAPI].Hang()
		victim.proxies[toRedis].Hang()
		w.within(14*time.Second, "the worker that renews nothing to end by itself", ended)
		w.last(26 * time.Second)
	}},
	{"a worker is cut from PostgreSQL for 30 s", false, 0, anyNumber, func(w *environment) {
		w.without(w.busiest()[:1], 30*time.Second, toStore)
	}},
	{"a worker's connection to PostgreSQL hangs for 30 s", false, 0, anyNumber, func(w *environment) {
		w.hanging(w.busiest()[:1], 30*time.Second, toStore)
	}},
	{"a worker's connection to WhatsApp is cut for 30 s", false, 0, anyNumber, func(w *environment) {
		w.without(w.busiest()[:1], 30*time.Second, toWhatsApp)
	}},
	{"the API server stops for a minute", true, 0, 0, func(w *environment) {
		w.stopAPI()
		w.last(time.Minute)
		w.startAPI()
	}},
	{"Redis is away for 30 s and comes back with its data", true, 0, 0, func(w *environment) {
		w.stopRedis()
		w.last(30 * time.Second)
		w.startRedis(false)
		w.last(20 * time.Second)
	}},
	{"Redis is restarted empty", true, 0, 0, func(w *environment) {
		w.stopRedis()
		w.startRedis(true)
		w.last(20 * time.Second)
	}},
	{"the API server and then Redis are away", true, 0, 0, func(w *environment) {
		w.stopAPI()
		w.last(20 * time.Second)
		w.startAPI()
		w.last(5 * time.Second)
		w.stopRedis()
		w.last(20 * time.Second)
		w.startRedis(true)
		w.last(20 * time.Second)
	}},
	{"PostgreSQL crashes and is restarted", false, 0, anyNumber, func(w *environment) {
		w.killStore()
		w.last(5 * time.Second)
		w.startStore()
	}},
	{"a worker dies while Redis is away: it is failed over when Redis is back", false, 1, 1, func(w *environment) {
		w.stopRedis()
		victim := w.busiest()[0]
		victim.remove()
		w.last(silence + 10*time.Second)
		w.stillHolds(victim)
		w.startRedis(false)
		w.goneFrom([]*pod{victim})
	}},
	{"both managers are cut from Redis while a worker is cut from the API server", true, 0, 0, func(w *environment) {
		for _, p := range w.managers {
			p.proxies[toRedis].Cut()
		}
		w.without(w.busiest()[:1], 40*time.Second, toAPI)
	}},
	{"both managers are cut from the API server while a worker is cut from Redis", true, 0, 0, func(w *environment) {
		for _, p := range w.managers {
			p.proxies[toAPI].Cut()
		}
		w.without(w.busiest()[:1], 40*time.Second, toRedis)
	}},
	{"the leader is killed while it places sessions", true, 0, 0, func(w *environment) {
		names := w.unpaired(100)
		w.leader().kill(restartAfter)
		w.placedOnce(names)
		w.leader().kill(5 * time.Second) // and once more while its successor has only just started
		w.deleteAndWait(names)
	}},
	{"the leader is paused for 40 s and wakes, a worker dies meanwhile", false, 1, 1, func(w *environment) {
		leader := w.leader()
		leader.pause()
		victim := w.busiest()[0]
		victim.remove()
		w.goneFrom([]*pod{victim})
		w.last(20 * time.Second)
		if now := w.leader(); now == leader {
			w.reportViolation("%s leads although it is paused", leader.name)
		}
		leader.wake()
		w.last(10 * time.Second)
	}},
	{"sessions are deleted and applied again while a worker dies", false, anyNumber, anyNumber, func(w *environment) {
		w.busiest()[0].remove()
		w.recreate(w.sessions[:len(w.sessions)/6])
	}},
	{"sessions are deleted and applied again while a worker is cut from the API server", false, anyNumber, anyNumber, func(w *environment) {
		victim := w.busiest()[0]
		victim.proxies[toAPI].Cut()
		mine := w.heldBy(victim)
		w.must(w.remove(mine))
		w.last(20 * time.Second)
		victim.proxies[toAPI].Restore()
		w.recreate(mine)
	}},
	{"every socket drops at once", false, 0, 1, func(w *environment) {
		_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultDrop})
		w.must(err)
	}},
	{"a rolling restart", false, 1, 1, func(w *environment) {
		w.surge(0, 1, 2, 3)
		w.leaving.Wait()
	}},
	{"two rolling restarts at once", false, 2, 2, func(w *environment) {
		w.surge(0, 1) // the second begins in the middle of the first
		w.surge(0, 1, 2, 3)
		w.leaving.Wait()
	}},
	{"SIGKILL a worker during a rolling restart", false, 2, 2, func(w *environment) {
		w.surge(0, 1)
		w.workers[0].kill(restartAfter) // of the new revision
		w.workers[3].remove()           // of the old one
		w.revision--
		w.surge(2, 3)
		w.leaving.Wait()
	}},
	{"restarts at the moment when a worker is declared dead", false, anyNumber, anyNumber, func(w *environment) {
		for after := silence - 2*time.Second; after <= silence+2*time.Second; after += 500 * time.Millisecond {
			w.note("restarts after %s and %s", after, after+250*time.Millisecond)
			victims := w.busiest()[:2]
			victims[0].kill(after)
			victims[1].kill(after + 250*time.Millisecond)
			w.last(after + 5*time.Second)
			w.eventually("all sessions to be back", w.missing)
		}
	}},
}

// smoke lists the cases that .ci/run makes (make test-faults-smoke), each with the
// reason why no shorter test shows it. Together they take about six minutes; the
// whole suite is make test-faults.
var smoke = map[string]string{
	"SIGSTOP a worker past its fail-over, then SIGCONT":                          "only a process that is really stopped wakes up with connections that it may not hold any more",
	"a worker's node is lost: not even its sockets are closed":                   "servers keep the connections and transactions of a client that is gone",
	"a worker's connections to the API server and to Redis hang for 40 s":        "the self-fence must act while every request hangs",
	"both managers are cut from Redis while a worker is cut from the API server": "no single process sees that the worker lives",
	"SIGKILL every worker at once, all are restarted in place":                   "the lock of the kernel on the state folder is the proof that the old process is gone",
	"Redis is restarted empty":                                                   "every process must notice by itself and publish again",
	"PostgreSQL crashes and is restarted":                                        "transactions end in the middle, under messages that arrive",
	"a rolling restart":                                                          "old and new revisions, drain and placement work together",
}

// chosen returns the faults to make: all, or those of smoke, each of which must exist.
func chosen(t *testing.T) []fault {
	if !*onlySmoke {
		return faults
	}
	chosen := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return smoke[f.name] == "" })
	if len(chosen) != len(smoke) {
		t.Fatalf("%d of the %d cases of the smoke test exist", len(chosen), len(smoke))
	}
	return chosen
}

// TestFaults makes one fault after another, in a few environments in parallel,
// because most cases spend their time waiting.
func TestFaults(t *testing.T) {
	faults := chosen(t)
	for i := range *environmentCount {
		t.Run(fmt.Sprintf("environment %d", i+1), func(t *testing.T) {
			t.Parallel()
			var mine []fault
			for n, f := range faults {
				if n%*environmentCount == i {
					mine = append(mine, f)
				}
			}
			inOneEnvironment(t, mine)
		})
	}
}

// inOneEnvironment makes faults in an environment that they share. After a case
// that failed, the next one gets a new environment.
func inOneEnvironment(t *testing.T, faults []fault) {
	var w *environment
	var results []result
	for _, f := range faults {
		t.Run(f.name, func(s *testing.T) {
			if w == nil {
				w = newEnvironment(t, s, *sessionCount, "--rebalance=false")
			}
			w.t = s
			broken := true
			defer func() {
				if !broken {
					return
				}
				if !w.dumped {
					w.dump(s, w.missing(t.Context()))
				}
				w.end()
				w = nil
			}()
			v := w.try(s, f)
			results = append(results, v)
			broken = v.failed
		})
	}
	for _, v := range results {
		t.Log(v.String())
	}
}

// try makes the fault, ends it, and checks the result.
func (w *environment) try(t *testing.T, f fault) result {
	w.eventually("all to be well before the fault", w.missing)
	c := w.begin(f.name)
	f.do(w)
	w.heal()
	v := w.check(t, c)
	excess := ""
	switch all, most := c.loggedIn(w); {
	case f.keeps && (all > 0 || len(v.absences) > 0):
		excess = fmt.Sprintf("%d logins although no connection had a reason to end; %s", all, describe(v.absences))
	case !f.keeps && f.logins != anyNumber && most > f.logins:
		excess = fmt.Sprintf("a device logged in %d times; at most %d are allowed", most, f.logins)
	}
	switch {
	case excess != "" && v.starved():
		t.Logf("%s, but the test process did not run for %s", excess, v.stall.Round(10*time.Millisecond))
	case excess != "":
		t.Error(excess)
		v.failed = true
	}
	if f.moves != anyNumber && v.mostMoves > f.moves {
		t.Errorf("a session was moved %d times; at most %d are allowed", v.mostMoves, f.moves)
		v.failed = true
	}
	return v
}

// without cuts pods from servers for a while.
func (w *environment) without(pods []*pod, d time.Duration, to ...service) {
	w.severed(pods, d, func(p *pod, s service) {
		w.note("%s is cut from %s", p.name, s)
		p.proxies[s].Cut()
	}, to)
}

// hanging makes the connections of pods to servers hang for a while.
func (w *environment) hanging(pods []*pod, d time.Duration, to ...service) {
	w.severed(pods, d, func(p *pod, s service) {
		w.note("the connections of %s to %s hang", p.name, s)
		p.proxies[s].Hang()
	}, to)
}

func (w *environment) severed(pods []*pod, d time.Duration, sever func(*pod, service), to []service) {
	for _, p := range pods {
		for _, s := range to {
			sever(p, s)
		}
	}
	w.last(d)
	for _, p := range pods {
		for _, s := range to {
			p.proxies[s].Restore()
		}
	}
	w.note("restored")
}

// within waits for a process to end.
func (w *environment) within(d time.Duration, what string, ended <-chan struct{}) {
	late := time.NewTimer(d)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
		w.reportViolation("waiting for %s: not within %s", what, d)
	}
}

// goneFrom waits until no session is placed on, or held by, a pod that is deleted.
func (w *environment) goneFrom(pods []*pod) {
	w.eventually("the sessions of the deleted pods to be on other workers", func(ctx context.Context) error {
		var list v1alpha1.WhatsAppSessionList
		if err := w.client.List(ctx, &list, client.InNamespace(w.namespace)); err != nil {
			return err
		}
		for _, s := range list.Items {
			for _, p := range pods {
				if p.isGoing() && (s.Status.Worker == p.name || s.Status.HeldBy == p.name) {
					return fmt.Errorf("%s is on %q and held by %q", s.Name, s.Status.Worker, s.Status.HeldBy)
				}
			}
		}
		return nil
	})
}

// stillHolds reports a violation when a pod holds no session any more.
func (w *environment) stillHolds(p *pod) {
	if len(w.heldBy(p)) == 0 {
		w.reportViolation("the sessions of %s were taken from it by a manager that could not see whether it lives", p.name)
	}
}

func (w *environment) heldBy(p *pod) (mine []*session) {
	var list v1alpha1.WhatsAppSessionList
	w.must(w.client.List(w.t.Context(), &list, client.InNamespace(w.namespace)))
	for _, obj := range list.Items {
		i := slices.IndexFunc(w.sessions, func(s *session) bool { return s.name == obj.Name })
		if i >= 0 && obj.Status.HeldBy == p.name {
			mine = append(mine, w.sessions[i])
		}
	}
	return mine
}

// unpaired applies sessions whose codes are not scanned.
func (w *environment) unpaired(n int) (names []string) {
	var group errgroup.Group
	group.SetLimit(8)
	for i := range n {
		name := fmt.Sprintf("unpaired-%03d", i)
		names = append(names, name)
		group.Go(func() error { return w.apply(w.t.Context(), name) })
	}
	w.must(group.Wait())
	return names
}

// placedOnce waits until each of the sessions shows a code.
func (w *environment) placedOnce(names []string) {
	w.eventually("all unpaired sessions to be placed", func(ctx context.Context) error {
		for _, name := range names {
			s := &v1alpha1.WhatsAppSession{}
			if err := w.client.Get(ctx, client.ObjectKey{Namespace: w.namespace, Name: name}, s); err != nil {
				return err
			}
			if s.Status.Worker == "" || s.Status.HeldBy != s.Status.Worker || s.Status.Phase != v1alpha1.PhasePairing {
				return fmt.Errorf("%s is %s on %q and held by %q", name, s.Status.Phase, s.Status.Worker, s.Status.HeldBy)
			}
		}
		return nil
	})
}

// deleteAndWait deletes sessions and waits until they are gone.
func (w *environment) deleteAndWait(names []string) {
	var group errgroup.Group
	group.SetLimit(8)
	for _, name := range names {
		group.Go(func() error { return w.delete(w.t.Context(), name) })
	}
	w.must(group.Wait())
	for _, name := range names {
		w.gone(name)
	}
}

func (w *environment) delete(ctx context.Context, name string) error {
	obj := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name}}
	return client.IgnoreNotFound(w.client.Delete(ctx, obj))
}

func (w *environment) gone(name string) {
	w.eventually(name+" to be gone", func(ctx context.Context) error {
		obj := &v1alpha1.WhatsAppSession{}
		err := w.client.Get(ctx, client.ObjectKey{Namespace: w.namespace, Name: name}, obj)
		if err == nil {
			return fmt.Errorf("it is %s on %q and held by %q", obj.Status.Phase, obj.Status.Worker, obj.Status.HeldBy)
		}
		return client.IgnoreNotFound(err)
	})
}

// remove deletes sessions; their keys are retained.
func (w *environment) remove(sessions []*session) error {
	w.note("%d sessions are deleted", len(sessions))
	for _, s := range sessions {
		if err := w.delete(w.t.Context(), s.name); err != nil {
			return err
		}
	}
	return nil
}

// recreate deletes sessions and applies them again, each as soon as it is gone.
func (w *environment) recreate(sessions []*session) {
	w.must(w.remove(sessions))
	for _, s := range sessions {
		w.gone(s.name)
		w.must(w.apply(w.t.Context(), s.name))
	}
	w.note("%d sessions are applied again", len(sessions))
}

// surge does what a Deployment does with maxSurge 1 and maxUnavailable 0: for each
// place, it starts a worker of a new revision, then asks the old one to end. It
// does not wait for that end.
func (w *environment) surge(places ...int) {
	w.revision++
	for _, place := range places {
		old := w.workers[place]
		w.joined(w.newWorker(place))
		w.note("%s is asked to end", old.name)
		w.leaving.Go(old.shutDown)
	}
}

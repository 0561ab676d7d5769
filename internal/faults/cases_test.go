//go:build faults

package faults

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// silence is how long a worker must be silent until it is declared dead.
const silence = 15 * time.Second

// fault is a named case. The checks of check_test.go apply to every case. In addition,
// keeps says that the fault must end no connection, moves is how often a session may be
// moved (-1: any number), and logins how often it may log in.
type fault struct {
	name   string
	keeps  bool
	moves  int
	logins int64
	do     func(w *environment)
}

const anyNumber = -1

var faults = []fault{
	{"SIGKILL a worker whose pod is deleted: the others take over", false, 1, 1, func(w *environment) {
		w.busiest()[0].remove()
		w.waitUntilMovedFrom(w.busiest())
	}},
	{"a worker's node is lost without closing its sockets", false, 1, 1, func(w *environment) {
		w.busiest()[0].vanish()
		w.waitUntilMovedFrom(w.busiest())
	}},
	{"SIGKILL a worker whose end the kubelet reports: it is declared dead at once", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		victim.remove()
		start := time.Now()
		w.reportContainerEnded(victim)
		w.waitUntilMovedFrom([]*pod{victim})
		if took := time.Since(start); took >= silence {
			w.reportViolation("the manager did not use the kubelet's report for %s", took)
		}
	}},
	{"a worker dies while Redis is down, and the kubelet reports it", false, 1, 1, func(w *environment) {
		w.stopRedis()
		victim := w.busiest()[0]
		victim.remove()
		w.reportContainerEnded(victim)
		w.waitUntilMovedFrom([]*pod{victim})
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
		w.waitFor(40 * time.Second)
		victim.resume()
		w.mustEndWithin(5*time.Second, "the worker that was declared dead to end", ended)
	}},
	{"SIGSTOP a worker past its self-fence, SIGCONT before its fail-over", false, 1, 2, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		victim.pause()
		w.waitFor(10500 * time.Millisecond)
		victim.resume()
		w.mustEndWithin(5*time.Second, "the worker that has lost its right to connect to end", ended)
	}},
	{"SIGSTOP a worker for a moment", true, 0, 0, func(w *environment) {
		victim := w.busiest()[0]
		victim.pause()
		w.waitFor(2 * time.Second)
		victim.resume()
	}},
	// PostgreSQL ends a transaction of keys that is idle for 3 s, so a session that was storing a
	// message connects again.
	{"SIGSTOP a worker for longer than its transactions may take", false, 0, 1, func(w *environment) {
		victim := w.busiest()[0]
		victim.pause()
		w.waitFor(5 * time.Second)
		victim.resume()
	}},
	{"a worker is cut from the API server for 40 s", true, 0, 0, func(w *environment) {
		w.cutFor(w.busiest()[:1], 40*time.Second, toAPI)
	}},
	{"a worker is cut from Redis for 40 s", true, 0, 0, func(w *environment) {
		w.cutFor(w.busiest()[:1], 40*time.Second, toRedis)
	}},
	{"a worker's connection to the API server hangs for 60 s", true, 0, 0, func(w *environment) {
		w.hangFor(w.busiest()[:1], 60*time.Second, toAPI)
	}},
	{"a worker's connection to Redis hangs for 60 s", true, 0, 0, func(w *environment) {
		w.hangFor(w.busiest()[:1], 60*time.Second, toRedis)
	}},
	{"a worker is cut from the API server, then from Redis instead", true, 0, 0, func(w *environment) {
		victim := w.busiest()[:1]
		w.cutFor(victim, 25*time.Second, toAPI)
		w.cutFor(victim, 25*time.Second, toRedis)
	}},
	{"a worker is cut from the API server and from Redis for 40 s", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		victim.proxies[toAPI].Cut()
		victim.proxies[toRedis].Cut()
		w.mustEndWithin(14*time.Second, "the worker that cannot renew its heartbeats to end", ended)
		w.waitFor(26 * time.Second)
	}},
	{"a worker's connections to the API server and to Redis hang for 40 s", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		victim.proxies[toAPI].Hang()
		victim.proxies[toRedis].Hang()
		w.mustEndWithin(14*time.Second, "the worker that cannot renew its heartbeats to end", ended)
		w.waitFor(26 * time.Second)
	}},
	{"a worker is cut from PostgreSQL for 30 s", false, 0, anyNumber, func(w *environment) {
		w.cutFor(w.busiest()[:1], 30*time.Second, toStore)
	}},
	{"a worker's connection to PostgreSQL hangs for 30 s", false, 0, anyNumber, func(w *environment) {
		w.hangFor(w.busiest()[:1], 30*time.Second, toStore)
	}},
	{"a worker's connection to WhatsApp is cut for 30 s", false, 0, anyNumber, func(w *environment) {
		w.cutFor(w.busiest()[:1], 30*time.Second, toWhatsApp)
	}},
	{"the API server stops for a minute", true, 0, 0, func(w *environment) {
		w.stopAPI()
		w.waitFor(time.Minute)
		w.startAPI()
	}},
	{"Redis is down for 30 s and keeps its data", true, 0, 0, func(w *environment) {
		w.stopRedis()
		w.waitFor(30 * time.Second)
		w.startRedis(false)
		w.waitFor(20 * time.Second)
	}},
	{"Redis is restarted empty", true, 0, 0, func(w *environment) {
		w.stopRedis()
		w.startRedis(true)
		w.waitFor(20 * time.Second)
	}},
	{"the API server is down, then Redis", true, 0, 0, func(w *environment) {
		w.stopAPI()
		w.waitFor(20 * time.Second)
		w.startAPI()
		w.waitFor(5 * time.Second)
		w.stopRedis()
		w.waitFor(20 * time.Second)
		w.startRedis(true)
		w.waitFor(20 * time.Second)
	}},
	{"PostgreSQL crashes and is restarted", false, 0, anyNumber, func(w *environment) {
		w.killStore()
		w.waitFor(5 * time.Second)
		w.startStore()
	}},
	{"a worker dies while Redis is down: its sessions are moved when Redis is back", false, 1, 1, func(w *environment) {
		w.stopRedis()
		victim := w.busiest()[0]
		victim.remove()
		w.waitFor(silence + 10*time.Second)
		w.stillHolds(victim)
		w.startRedis(false)
		w.waitUntilMovedFrom([]*pod{victim})
	}},
	{"both managers are cut from Redis while a worker is cut from the API server", true, 0, 0, func(w *environment) {
		for _, p := range w.managers {
			p.proxies[toRedis].Cut()
		}
		w.cutFor(w.busiest()[:1], 40*time.Second, toAPI)
	}},
	{"both managers are cut from the API server while a worker is cut from Redis", true, 0, 0, func(w *environment) {
		for _, p := range w.managers {
			p.proxies[toAPI].Cut()
		}
		w.cutFor(w.busiest()[:1], 40*time.Second, toRedis)
	}},
	{"the leader is killed while it places sessions", true, 0, 0, func(w *environment) {
		names := w.unpaired(100)
		w.leader().kill(restartAfter)
		w.waitUntilPlaced(names)
		w.leader().kill(5 * time.Second) // again, while its successor is starting
		w.deleteAndWait(names)
	}},
	{"the leader is paused for 40 s while a worker dies", false, 1, 1, func(w *environment) {
		leader := w.leader()
		leader.pause()
		victim := w.busiest()[0]
		victim.remove()
		w.waitUntilMovedFrom([]*pod{victim})
		w.waitFor(20 * time.Second)
		if now := w.leader(); now == leader {
			w.reportViolation("%s is still the leader although it is paused", leader.name)
		}
		leader.resume()
		w.waitFor(10 * time.Second)
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
		w.waitFor(20 * time.Second)
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
		w.surge(0, 1) // the second begins before the first has ended
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
		for delay := silence - 2*time.Second; delay <= silence+2*time.Second; delay += 500 * time.Millisecond {
			w.record("restarts after %s and %s", delay, delay+250*time.Millisecond)
			victims := w.busiest()[:2]
			victims[0].kill(delay)
			victims[1].kill(delay + 250*time.Millisecond)
			w.waitFor(delay + 5*time.Second)
			w.eventually("all sessions to be back", w.missing)
			w.eventually("the takings to be settled", w.mayEndWorkers)
		}
	}},
	{"SIGKILL every worker while sessions are paired, all are restarted in place", false, 0, 1, pairDuring(func(w *environment) {
		for _, p := range w.busiest() {
			p.kill(restartAfter)
		}
	})},
	{"SIGKILL two workers while sessions are paired: the others take over", false, 1, 1, pairDuring(func(w *environment) {
		victims := w.busiest()[:2]
		for _, p := range victims {
			p.remove()
		}
		w.people.release()
		w.waitUntilMovedFrom(victims)
	})},
	{"SIGSTOP workers while sessions are paired, one past its self-fence, one past its fail-over", false, 1, 2, pairDuring(func(w *environment) {
		first, second := w.busiest()[0], w.busiest()[1]
		first.pause()
		second.pause()
		w.people.release()
		w.waitFor(10500 * time.Millisecond)
		first.resume()
		w.waitFor(30 * time.Second)
		second.resume()
	})},
	{"a rolling restart while sessions are paired", false, 1, 1, pairDuring(func(w *environment) {
		w.surge(0, 1)
		w.people.release()
		w.surge(2, 3)
		w.leaving.Wait()
	})},
	{"the leader is killed while sessions are paired", true, 0, 0, pairDuring(func(w *environment) {
		w.leader().kill(restartAfter)
		w.people.release()
		w.waitFor(5 * time.Second)
		w.leader().kill(restartAfter)
	})},
	{"Redis is restarted empty while sessions are paired", true, 0, 0, pairDuring(func(w *environment) {
		w.stopRedis()
		w.people.release()
		w.waitFor(2 * time.Second)
		w.startRedis(true)
	})},
	{"WhatsApp does not get the answers to scans", true, 0, 0, pairDuring(func(w *environment) {
		w.inject(simulator.Fault{Kind: simulator.FaultLosePairing})
		w.people.release()
		w.waitFor(8 * time.Second)
	})},
	{"sessions are deleted and applied again while they are paired and their workers are killed", false, 0, 1, pairDuring(func(w *environment) {
		for _, n := range w.people.all() {
			w.people.recreate(n)
		}
		w.waitFor(time.Second)
		for _, p := range w.busiest() {
			p.kill(restartAfter)
		}
	})},
	{"PostgreSQL crashes and is restarted during a flood of messages", false, 0, anyNumber, func(w *environment) {
		w.flood()
		w.waitFor(5 * time.Second)
		w.killStore()
		w.waitFor(5 * time.Second)
		w.startStore()
		w.waitFor(5 * time.Second)
	}},
	{"SIGKILL a worker during a flood of messages, it is restarted in place", false, 0, 1, func(w *environment) {
		w.flood()
		w.waitFor(5 * time.Second)
		w.busiest()[0].kill(restartAfter)
		w.waitFor(5 * time.Second)
	}},
	{"SIGSTOP a worker during a flood of messages: others take over its sessions, which get messages", false, 1, 1, func(w *environment) {
		victim := w.busiest()[0]
		ended := victim.present()
		w.flood(w.heldBy(victim)...)
		w.waitFor(2 * time.Second)
		victim.pause()
		w.waitFor(40 * time.Second)
		victim.resume()
		w.mustEndWithin(5*time.Second, "the worker that was declared dead to end", ended)
	}},
	{"Redis is down for a minute: messages are stored and delivered", true, 0, 0, func(w *environment) {
		w.stopRedis()
		w.flood()
		w.waitFor(40 * time.Second)
		w.mustArrive("Redis is down")
		w.waitFor(20 * time.Second)
		w.startRedis(false)
	}},
	{"Laravel is away for 40 s, then refuses everything for 30 s, during a flood of messages", true, 0, 0, func(w *environment) {
		w.flood()
		w.cutFor(w.managers, 20*time.Second, toLaravel)
		w.hangFor(w.managers, 20*time.Second, toLaravel)
		w.laravelAnswersFor(15*time.Second, http.StatusServiceUnavailable)
		w.laravelAnswersFor(15*time.Second, http.StatusUnauthorized)
		w.mustBeAcknowledged("Laravel has just come back")
	}},
	{"the leader is killed between Laravel's answer and the acknowledgement of a batch", true, 0, 0, func(w *environment) {
		batch := w.holdAnswer()
		w.leader().kill(restartAfter)
		w.eventually("the next leader to send the batch again", func(context.Context) error {
			if !w.messages.wasRepeated(batch) {
				return fmt.Errorf("%s was sent once", batch)
			}
			return nil
		})
	}},
	{"sessions are moved during a flood of messages", false, 1, 1, func(w *environment) {
		w.flood()
		w.surge(0, 1, 2, 3)
		w.leaving.Wait()
	}},
	{"five thousand messages wait for a session at its login", false, 0, 1, func(w *environment) {
		w.sendWhileAway(w.sessions[0], 5000)
	}},
}

// smoke lists the cases that .ci/run runs (make test-faults-smoke), each with the reason why
// a shorter test is not enough. Together they take about six minutes; the whole suite is
// make test-faults.
var smoke = map[string]string{
	"SIGSTOP a worker past its fail-over, then SIGCONT":                                "only a process that was really stopped resumes with connections that it may not hold any more",
	"a worker's node is lost without closing its sockets":                              "servers keep the connections and transactions of a client that disappeared",
	"a worker's connections to the API server and to Redis hang for 40 s":              "the self-fence must act while every request hangs",
	"both managers are cut from Redis while a worker is cut from the API server":       "no single process can see that the worker is alive",
	"SIGKILL every worker at once, all are restarted in place":                         "the kernel's lock on the state folder proves that the old process has ended",
	"Redis is restarted empty":                                                         "every process must notice it and publish again",
	"PostgreSQL crashes and is restarted during a flood of messages":                   "transactions are aborted while messages are stored, and while keys are used up",
	"the leader is killed between Laravel's answer and the acknowledgement of a batch": "what the next leader repeats must be what Laravel has accepted",
	"a rolling restart": "old and new revisions, drain and placement work together",
}

// chosen returns the faults to run: all, or those of smoke, each of which must exist.
func chosen(t *testing.T) []fault {
	if !*onlySmoke {
		return faults
	}
	chosen := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return smoke[f.name] == "" })
	if len(chosen) != len(smoke) {
		t.Fatalf("only %d of the %d cases of the smoke test exist", len(chosen), len(smoke))
	}
	return chosen
}

// TestFaults runs the faults one after another, in several environments in parallel, because
// most cases spend their time waiting.
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
			runInOneEnvironment(t, mine)
		})
	}
}

// runInOneEnvironment runs faults in a shared environment. After a failed case the next one
// gets a new environment.
func runInOneEnvironment(t *testing.T, faults []fault) {
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
	if w != nil {
		w.checkAllMessages(t)
	}
	for _, v := range results {
		t.Log(v.String())
	}
}

// try starts the fault, ends it, and checks the result.
func (w *environment) try(t *testing.T, f fault) result {
	w.eventually("all sessions to be connected before the fault", w.missing)
	w.eventually("the takings to be settled before the fault", w.mayEndWorkers)
	c := w.begin(f.name)
	f.do(w)
	w.heal()
	v := w.check(t, c)
	excess := ""
	switch all, most := c.loggedIn(w); {
	case f.keeps && (all > 0 || len(v.absences) > 0):
		excess = fmt.Sprintf("%d logins although no connection should have ended; %s", all, describe(v.absences))
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
	if !v.failed {
		w.endPairings()
	}
	return v
}

// cutFor cuts the connections of pods to servers for a while.
func (w *environment) cutFor(pods []*pod, d time.Duration, to ...service) {
	w.disconnectFor(pods, d, func(p *pod, s service) {
		w.record("%s is cut from %s", p.name, s)
		p.proxies[s].Cut()
	}, to)
}

// hangFor makes the connections of pods to servers hang for a while.
func (w *environment) hangFor(pods []*pod, d time.Duration, to ...service) {
	w.disconnectFor(pods, d, func(p *pod, s service) {
		w.record("the connections of %s to %s hang", p.name, s)
		p.proxies[s].Hang()
	}, to)
}

func (w *environment) disconnectFor(pods []*pod, d time.Duration, disconnect func(*pod, service), to []service) {
	for _, p := range pods {
		for _, s := range to {
			disconnect(p, s)
		}
	}
	w.waitFor(d)
	for _, p := range pods {
		for _, s := range to {
			p.proxies[s].Restore()
		}
	}
	w.record("restored")
}

// laravelAnswersFor makes Laravel answer every request with a status, and accept nothing.
func (w *environment) laravelAnswersFor(d time.Duration, status int) {
	w.record("Laravel answers %d", status)
	w.laravel.AnswerWith(func(laraveltest.Request) laraveltest.Answer { return laraveltest.Refuse(status, "") })
	w.waitFor(d)
	w.laravel.AnswerWith(nil)
	w.record("Laravel accepts again")
}

// mustEndWithin waits until a process has ended, and reports a violation if it takes longer than d.
func (w *environment) mustEndWithin(d time.Duration, what string, ended <-chan struct{}) {
	late := time.NewTimer(d)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
		w.reportViolation("waiting for %s: not within %s", what, d)
	}
}

// waitUntilMovedFrom waits until no session is placed on, or held by, one of the deleted pods.
func (w *environment) waitUntilMovedFrom(pods []*pod) {
	w.eventually("the sessions of the deleted pods to be on other workers", func(ctx context.Context) error {
		var list v1alpha1.WhatsAppSessionList
		if err := w.client.List(ctx, &list, client.InNamespace(w.namespace)); err != nil {
			return err
		}
		for _, s := range list.Items {
			for _, p := range pods {
				if p.isDeleted() && (s.Status.Worker == p.name || s.Status.HeldBy == p.name) {
					return fmt.Errorf("%s is on %q and held by %q", s.Name, s.Status.Worker, s.Status.HeldBy)
				}
			}
		}
		return nil
	})
}

// stillHolds reports a violation if a pod holds no session any more.
func (w *environment) stillHolds(p *pod) {
	if len(w.heldBy(p)) == 0 {
		w.reportViolation("a manager moved the sessions of %s although it could not see whether that worker is alive", p.name)
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

// waitUntilPlaced waits until each session is held by its worker and shows a code.
func (w *environment) waitUntilPlaced(names []string) {
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
		w.waitUntilDeleted(name)
	}
}

func (w *environment) delete(ctx context.Context, name string) error {
	obj := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name}}
	return client.IgnoreNotFound(w.client.Delete(ctx, obj))
}

func (w *environment) waitUntilDeleted(name string) {
	w.eventually(name+" to be deleted", func(ctx context.Context) error {
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
	w.record("%d sessions are deleted", len(sessions))
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
		w.waitUntilDeleted(s.name)
		w.must(w.apply(w.t.Context(), s.name))
	}
	w.record("%d sessions are applied again", len(sessions))
}

// surge does what a Deployment does with maxSurge 1 and maxUnavailable 0: for each place it
// starts a worker of a new revision, then asks the old one to end. It does not wait until
// the old one has ended.
func (w *environment) surge(places ...int) {
	w.revision++
	for _, place := range places {
		old := w.workers[place]
		w.waitUntilJoined(w.newWorker(place))
		w.record("%s is asked to end", old.name)
		w.leaving.Go(old.shutDown)
	}
}

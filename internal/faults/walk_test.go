//go:build faults

package faults

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	// roundLength is how long faults are started before everything is healed and checked.
	roundLength = 50 * time.Second
	// busyWorkers is how many workers may have a fault at the same time: one worker can
	// always take sessions.
	busyWorkers = workerCount - 1
)

// walk starts random faults of random lengths, which may overlap. One goroutine draws all
// random numbers from one source, so a seed always gives the same list of steps, even if
// their results differ.
type walk struct {
	*environment
	random *rand.Rand
	clock  time.Duration // since the walk began
	step   int
	ends   []walkEnd
	busy   map[string]bool // places and servers that have a fault
}

type walkEnd struct {
	at   time.Duration
	what string
	do   func()
}

// TestRandomWalk runs for -walk. SEED in the environment repeats a walk.
func TestRandomWalk(t *testing.T) {
	w := &walk{environment: newEnvironment(t, t, *sessionCount)}
	w.random = rand.New(rand.NewPCG(w.seed, 0))
	began := time.Now()
	for n := 1; n == 1 || time.Since(began) < *walkFor; n++ {
		w.eventually("all sessions to be connected", w.missing)
		c := w.begin(fmt.Sprintf("round %d of the walk with seed %d", n, w.seed))
		w.round(began)
		w.heal()
		if v := w.check(t, c); v.failed {
			t.FailNow()
		}
		w.endPairings()
	}
	w.checkAllMessages(t)
}

// round starts faults for roundLength.
func (w *walk) round(began time.Time) {
	w.busy = map[string]bool{}
	w.clock, w.ends = time.Since(began), nil
	for i := range max(len(w.sessions)/10, len(ways)) {
		w.people.add(ways[i%len(ways)], "")
	}
	for end := w.clock + roundLength; w.clock < end; {
		pause := w.upTo(6 * time.Second)
		w.advance(began, w.clock+pause)
		w.start()
	}
	for _, e := range w.ends {
		w.log("ends early", e.what)
		e.do()
	}
}

// advance waits until then, and meanwhile ends the faults whose time is over.
func (w *walk) advance(began time.Time, then time.Duration) {
	for {
		slices.SortStableFunc(w.ends, func(a, b walkEnd) int { return int(a.at - b.at) })
		if len(w.ends) == 0 || w.ends[0].at > then {
			break
		}
		e := w.ends[0]
		w.ends = w.ends[1:]
		w.waitFor(time.Until(began.Add(e.at)))
		w.log("ends", e.what)
		e.do()
	}
	w.waitFor(time.Until(began.Add(then)))
	w.clock = then
}

func (w *walk) log(verb, what string) {
	w.record("step %d %s: %s", w.step, verb, what)
	w.t.Logf("%7.1fs  step %d %s: %s", w.clock.Seconds(), w.step, verb, what)
}

func (w *walk) upTo(d time.Duration) time.Duration {
	return time.Duration(w.random.Int64N(int64(d))).Round(100 * time.Millisecond)
}

// length draws a fault's length: short, near the time after which a worker is declared dead,
// or long.
func (w *walk) length() time.Duration {
	switch w.random.IntN(3) {
	case 0:
		return w.upTo(5*time.Second) + 100*time.Millisecond
	case 1:
		return silence - 6*time.Second + w.upTo(10*time.Second)
	default:
		return 20*time.Second + w.upTo(20*time.Second)
	}
}

// during starts a fault that ends after a while, unless there is already a fault in the same
// place. The caller has drawn all random numbers before, so that those of a seed do not
// depend on whether the fault is skipped.
func (w *walk) during(where, what string, d time.Duration, begin, end func()) {
	if w.busy[where] {
		w.log("is skipped", what)
		return
	}
	w.busy[where] = true
	what = fmt.Sprintf("%s for %s", what, d)
	w.log("begins", what)
	begin()
	w.ends = append(w.ends, walkEnd{w.clock + d, what, func() { end(); delete(w.busy, where) }})
}

// start starts one fault.
func (w *walk) start() {
	w.step++
	kind, worker, manager, d := w.random.IntN(22), w.random.IntN(workerCount), w.random.IntN(managerCount), w.length()
	mode, servers := w.random.IntN(2), w.random.IntN(4)
	coin, person := w.random.IntN(2) == 0, w.random.IntN(1<<16)
	place := fmt.Sprintf("worker %d", worker)
	p := w.workers[worker]
	if kind <= 6 && w.faultyWorkers() >= busyWorkers && !w.busy[place] {
		w.log("is skipped", "too many workers have a fault")
		return
	}
	if kind <= 6 && w.mayEndWorkers(w.t.Context()) != nil {
		w.log("is skipped", "another death would be one too many in a row for a session")
		return
	}
	disconnect := func(p *pod, place string, to ...service) {
		verb := [...]string{"is cut from", "has hanging connections to"}[mode]
		w.during(place, fmt.Sprintf("%s %s %s", p.name, verb, to), d, func() {
			for _, s := range to {
				if mode == 0 {
					p.proxies[s].Cut()
				} else {
					p.proxies[s].Hang()
				}
			}
		}, func() {
			for _, s := range to {
				p.proxies[s].Restore()
			}
		})
	}
	switch kind {
	case 0, 1:
		w.during(place, p.name+" is killed and restarted", d, func() { p.kill(d) }, func() {})
	case 2:
		w.during(place, fmt.Sprintf("%s is removed, without closing its connections: %t", p.name, coin), d, func() {
			if coin {
				p.vanish()
			} else {
				p.remove()
			}
		}, func() { w.newWorker(worker) })
	case 3, 4:
		w.during(place, p.name+" is paused", d, p.pause, p.resume)
	case 5, 6:
		disconnect(p, place, [][]service{{toAPI}, {toRedis}, {toAPI, toRedis}, {toStore}}[servers]...)
	case 7:
		m := w.managers[manager]
		disconnect(m, fmt.Sprintf("manager %d", manager), [][]service{{toAPI}, {toRedis}, {toAPI, toRedis}, {toStore}}[servers]...)
	case 8:
		m := w.managers[manager]
		w.during(fmt.Sprintf("manager %d", manager), m.name+" is paused", d, m.pause, m.resume)
	case 9:
		m := w.managers[manager]
		w.during(fmt.Sprintf("manager %d", manager), m.name+" is killed and restarted", d, func() { m.kill(d) }, func() {})
	case 10:
		w.during("API server", "the API server stops", d, w.stopAPI, w.startAPI)
	case 11:
		w.during("Redis", fmt.Sprintf("Redis stops, empty afterwards: %t", coin), d, w.stopRedis, func() { w.startRedis(coin) })
	case 12:
		w.during("PostgreSQL", "PostgreSQL crashes", d/2, w.killStore, w.startStore)
	case 13:
		w.log("begins", "every socket drops")
		_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultDrop})
		w.must(err)
	case 14, 15:
		w.during(place, p.name+" is replaced by a newer revision", d, func() {
			w.revision++
			w.newWorker(worker)
			w.leaving.Go(p.shutDown)
		}, func() {})
	case 16:
		n := w.people.add(ways[person%len(ways)], "")
		w.log("begins", n.name+" is paired")
	case 17, 18:
		all := w.people.all()
		n := all[person%len(all)]
		w.log("begins", n.name+" is deleted and applied again")
		w.people.recreate(n)
	case 19:
		m := w.managers[manager]
		disconnect(m, fmt.Sprintf("manager %d", manager), toLaravel)
	case 20:
		status := [...]int{http.StatusServiceUnavailable, http.StatusUnauthorized, http.StatusTooManyRequests, http.StatusNotFound}[servers]
		w.during("Laravel", fmt.Sprintf("Laravel answers %d", status), d, func() {
			w.laravel.AnswerWith(func(laraveltest.Request) laraveltest.Answer { return laraveltest.Refuse(status, "") })
		}, func() { w.laravel.AnswerWith(nil) })
	case 21:
		w.during("flood", "a flood of messages", d, func() { w.flood() }, w.endFloods)
	}
}

// faultyWorkers counts the workers that have a fault.
func (w *walk) faultyWorkers() (n int) {
	for where := range w.busy {
		if len(where) > 6 && where[:6] == "worker" {
			n++
		}
	}
	return n
}

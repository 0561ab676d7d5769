//go:build faults

package faults

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	// leg is how long faults are made before everything is healed and checked.
	leg = 50 * time.Second
	// busyWorkers is how many workers may have a fault at a time: there
	// is always one that can take sessions.
	busyWorkers = workerCount - 1
)

// walk makes random faults of random lengths, which may overlap. One goroutine draws
// all random numbers from one source, so a seed always gives the same list of
// steps, whatever their results are.
type walk struct {
	*environment
	random *rand.Rand
	clock  time.Duration // since the walk began
	step   int
	ends   []walkEnd
	busy   map[string]bool // places and servers that something is wrong with
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
		w.eventually("all to be well", w.missing)
		c := w.begin(fmt.Sprintf("leg %d of the walk with seed %d", n, w.seed))
		w.leg(began)
		w.heal()
		if v := w.check(t, c); v.failed {
			t.FailNow()
		}
	}
}

// leg makes faults for a while.
func (w *walk) leg(began time.Time) {
	w.busy = map[string]bool{}
	w.clock, w.ends = time.Since(began), nil
	for end := w.clock + leg; w.clock < end; {
		pause := w.upTo(6 * time.Second)
		w.advance(began, w.clock+pause)
		w.make()
	}
	for _, e := range w.ends {
		w.say("early", e.what)
		e.do()
	}
}

// advance waits until then, and ends the faults whose time is over meanwhile.
func (w *walk) advance(began time.Time, then time.Duration) {
	for {
		slices.SortStableFunc(w.ends, func(a, b walkEnd) int { return int(a.at - b.at) })
		if len(w.ends) == 0 || w.ends[0].at > then {
			break
		}
		e := w.ends[0]
		w.ends = w.ends[1:]
		w.last(time.Until(began.Add(e.at)))
		w.say("ends", e.what)
		e.do()
	}
	w.last(time.Until(began.Add(then)))
	w.clock = then
}

func (w *walk) say(verb, what string) {
	w.note("step %d %s: %s", w.step, verb, what)
	w.t.Logf("%7.1fs  step %d %s: %s", w.clock.Seconds(), w.step, verb, what)
}

func (w *walk) upTo(d time.Duration) time.Duration {
	return time.Duration(w.random.Int64N(int64(d))).Round(100 * time.Millisecond)
}

// length draws a fault's length: short, about the time after which a worker is
// declared dead, or long.
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

// during makes a fault that ends by itself after a while, unless something is
// wrong there already. The caller has drawn the fault before, so that the random
// numbers of a seed do not depend on whether it is left out.
func (w *walk) during(where, what string, d time.Duration, begin, end func()) {
	if w.busy[where] {
		w.say("is left out", what)
		return
	}
	w.busy[where] = true
	what = fmt.Sprintf("%s for %s", what, d)
	w.say("begins", what)
	begin()
	w.ends = append(w.ends, walkEnd{w.clock + d, what, func() { end(); delete(w.busy, where) }})
}

// make makes one fault.
func (w *walk) make() {
	w.step++
	kind, worker, manager, d := w.random.IntN(16), w.random.IntN(workerCount), w.random.IntN(managerCount), w.length()
	mode, servers := w.random.IntN(2), w.random.IntN(4)
	coin := w.random.IntN(2) == 0
	place := fmt.Sprintf("worker %d", worker)
	p := w.workers[worker]
	if kind <= 6 && w.faultyWorkers() >= busyWorkers && !w.busy[place] {
		w.say("is left out", "too many workers have a fault")
		return
	}
	sever := func(p *pod, place string, to ...service) {
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
		w.during(place, fmt.Sprintf("%s is gone, abruptly: %t", p.name, coin), d, func() {
			if coin {
				p.vanish()
			} else {
				p.remove()
			}
		}, func() { w.newWorker(worker) })
	case 3, 4:
		w.during(place, p.name+" is stopped", d, p.pause, p.wake)
	case 5, 6:
		sever(p, place, [][]service{{toAPI}, {toRedis}, {toAPI, toRedis}, {toStore}}[servers]...)
	case 7:
		m := w.managers[manager]
		sever(m, fmt.Sprintf("manager %d", manager), [][]service{{toAPI}, {toRedis}, {toAPI, toRedis}, {toStore}}[servers]...)
	case 8:
		m := w.managers[manager]
		w.during(fmt.Sprintf("manager %d", manager), m.name+" is stopped", d, m.pause, m.wake)
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
		w.say("begins", "every socket drops")
		_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultDrop})
		w.must(err)
	case 14, 15:
		w.during(place, p.name+" is replaced by a newer revision", d, func() {
			w.revision++
			w.newWorker(worker)
			w.leaving.Go(p.shutDown)
		}, func() {})
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

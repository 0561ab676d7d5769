package placement

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Rebalance is how unequal loads are made equal. It is never urgent: a session
// that moves is down for a moment, and an unequal load hurts nobody before the
// workers are full. So it goes slowly, and not at all while anything else is
// under way in the pool: something waits, moves, drains, is silent, or a newer
// revision is being rolled out.
type Rebalance struct {
	// Threshold is the difference of relative loads (0 to 1) up to which nothing moves.
	Threshold float64
	// Timeout is how long a worker must have been live before it takes anything over: one
	// that has just come up may be about to go again, and new sessions fill it by themselves.
	MinAge time.Duration
	// Every is the pace of the moves in a pool; Last is when each pool had its last one.
	Interval time.Duration
	Last     map[string]time.Time
}

// rebalance moves at most one session in each pool.
func (p *planner) rebalance() {
	for _, pool := range slices.Sorted(maps.Keys(p.pools)) {
		if revisions := p.pools[pool].revisions; len(revisions) == 1 && !p.busy[pool] {
			p.balance(pool, slices.Clone(revisions[0]))
		}
	}
}

// balance moves a session from the worker with the most relative load that has
// one to spare to the one with the least.
func (p *planner) balance(pool string, workers []*worker) {
	slices.SortFunc(workers, func(a, b *worker) int {
		return cmp.Or(cmp.Compare(b.relative(), a.relative()), cmp.Compare(a.Name, b.Name))
	})
	to := p.taker(workers)
	if to == nil || !p.unequal(workers[0], to) {
		return
	}
	if next := p.Rebalance.Last[pool].Add(p.Rebalance.Interval); p.Now.Before(next) {
		p.again(next)
		return
	}
	cheapest := p.cheapest(pool)
	for _, from := range workers {
		if !p.unequal(from, to) {
			return
		}
		if i, ok := cheapest[from.Name]; ok {
			if !p.fits(&p.Sessions[i])(to) {
				p.again(p.Now.Add(p.Rebalance.Interval))
				return
			}
			p.assign(i, to, Balanced)
			return
		}
	}
}

// taker is the worker with the least relative load that has been live for long
// enough. workers are in the order of their load, the greatest first.
func (p *planner) taker(workers []*worker) *worker {
	for _, w := range slices.Backward(workers) {
		ripe := w.Since.Add(p.Rebalance.MinAge)
		switch {
		case !w.hasRoom():
		case p.Now.Before(ripe):
			if p.unequal(workers[0], w) {
				p.again(ripe)
			}
		default:
			return w
		}
	}
	return nil
}

// unequal reports whether a session's move makes the loads of the two more equal, and enough to be worth it.
func (p *planner) unequal(from, to *worker) bool {
	after := float64(to.load+1) / float64(max(to.Capacity, 1))
	return from.relative()-to.relative() > p.Rebalance.Threshold && from.relative() >= after
}

func (w *worker) relative() float64 { return float64(w.load) / float64(max(w.Capacity, 1)) }

// cheapest is the session of each worker that loses the least by a move: one
// without a connection loses nothing; of the others the one that has been
// connected the longest, for it has proven that it connects well, it is not in
// the midst of what follows a login, and what has just moved does not move again.
// Whoever is being paired or is reconnecting is not disturbed, and where a person
// wants a session it stays.
func (p *planner) cheapest(pool string) map[string]int {
	best := map[string]int{}
	for i := range p.Sessions {
		s := &p.Sessions[i]
		if !s.Wanted || s.Urgent || s.MoveTo != "" || s.Worker == "" || s.HeldBy != s.Worker || p.pool(s) != pool {
			continue
		}
		if !s.Idle && s.Connected.IsZero() {
			continue
		}
		if other, ok := best[s.Worker]; !ok || cheaper(s, &p.Sessions[other]) < 0 {
			best[s.Worker] = i
		}
	}
	return best
}

func cheaper(a, b *Session) int {
	if a.Idle && b.Idle {
		return cmp.Compare(a.UID, b.UID)
	}
	return cmp.Or(first(a.Idle, b.Idle), a.Connected.Compare(b.Connected), cmp.Compare(a.UID, b.UID))
}

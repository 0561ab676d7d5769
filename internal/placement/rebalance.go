package placement

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Rebalance is how unequal loads are made equal. It is never urgent: a session
// that moves is down for a moment, and an unequal load does no harm before the
// workers are full. So it is slow, and it stops while anything else is going on
// in the pool: something waits, moves, drains, is silent, is failing, or a newer
// revision is being rolled out.
type Rebalance struct {
	// Threshold is the difference of relative loads (0 to 1) up to which nothing moves.
	Threshold float64
	// MinAge is how long a worker must have been live before it takes anything over: one
	// that has just started may end soon, and new sessions fill it by themselves.
	MinAge time.Duration
	// Interval is the pace of the moves in a pool; Last is when each pool had its last one.
	Interval time.Duration
	Last     map[string]time.Time
}

// rebalance moves at most one session in each pool.
func (p *planner) rebalance() {
	for _, pool := range slices.Sorted(maps.Keys(p.pools)) {
		if group := p.pools[pool]; len(group.groups) == 1 && group.healthy == 1 && !p.busy[pool] {
			p.balance(pool, slices.Clone(group.groups[0]))
		}
	}
}

// balance moves a session from the worker with the most relative load that has
// one to spare to the one with the least.
func (p *planner) balance(pool string, workers []*worker) {
	slices.SortFunc(workers, func(a, b *worker) int {
		return cmp.Or(cmp.Compare(b.relative(), a.relative()), cmp.Compare(a.Name, b.Name))
	})
	to := p.successor(workers)
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
		if s := cheapest[from.Name]; s != nil {
			if !p.fits(s)(to) {
				p.again(p.Now.Add(p.Rebalance.Interval))
				return
			}
			p.assign(s, to, Rebalanced)
			return
		}
	}
}

// successor is the worker with the least relative load that has been live for long
// enough. workers are in the order of their load, the greatest first.
func (p *planner) successor(workers []*worker) *worker {
	for _, w := range slices.Backward(workers) {
		oldEnough := w.Since.Add(p.Rebalance.MinAge)
		switch {
		case !w.hasRoom():
		case p.Now.Before(oldEnough):
			if p.unequal(workers[0], w) {
				p.again(oldEnough)
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
// connected the longest, because it has shown that it connects well, a login
// long ago has nothing left to do, and a session that has just moved does not move
// again. A session that is being paired or is reconnecting is not disturbed, and
// one that a person wants where it is stays.
func (p *planner) cheapest(pool string) map[string]*Session {
	best := map[string]*Session{}
	for i := range p.Sessions {
		s := &p.Sessions[i]
		if !s.Wanted || s.Urgent || s.MoveTo != "" || s.Worker == "" || s.HeldBy != s.Worker || p.pool(s) != pool {
			continue
		}
		if !s.Idle && s.Connected.IsZero() {
			continue
		}
		if other := best[s.Worker]; other == nil || cheaper(s, other) < 0 {
			best[s.Worker] = s
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

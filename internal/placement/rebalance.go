package placement

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Rebalance configures how unequal loads are made equal. This is never urgent: a
// session that moves has no connection for a moment, and unequal loads do no harm
// until the workers are full. So it is slow, and it pauses while sessions of the pool
// wait or move, while a worker of it is draining, late, silent or failing, and while a newer
// revision is rolled out.
type Rebalance struct {
	// Threshold is the difference of relative loads (0 to 1) up to which no session moves.
	Threshold float64
	// MinAge is how long a worker must have been live before sessions move to it. A worker
	// that was started a moment ago may end soon, and new sessions are placed on it anyway.
	MinAge time.Duration
	// Interval is the time between two moves in a pool; Last is when each pool had its last
	// move.
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

// balance moves a session to the worker with the least relative load, from the worker
// with the most that has a session which may move.
func (p *planner) balance(pool string, workers []*worker) {
	slices.SortFunc(workers, func(a, b *worker) int {
		return cmp.Or(cmp.Compare(b.relative(), a.relative()), cmp.Compare(a.Name, b.Name))
	})
	to := p.successor(workers)
	if to == nil || !p.unequal(workers[0], to) {
		return
	}
	if next := p.Rebalance.Last[pool].Add(p.Rebalance.Interval); p.Now.Before(next) {
		p.planAgain(next)
		return
	}
	cheapest := p.cheapest(pool)
	for _, from := range workers {
		if !p.unequal(from, to) {
			return
		}
		if s := cheapest[from.Name]; s != nil {
			if !p.fits(s)(to) {
				p.planAgain(p.Now.Add(p.Rebalance.Interval))
				return
			}
			p.assign(s, to, Rebalanced)
			return
		}
	}
}

// successor returns the worker with the least relative load that has room and has been
// live for long enough. workers are in the order of their load, the greatest first.
func (p *planner) successor(workers []*worker) *worker {
	for _, w := range slices.Backward(workers) {
		oldEnoughAt := w.Since.Add(p.Rebalance.MinAge)
		switch {
		case !w.hasRoom():
		case p.Now.Before(oldEnoughAt):
			if p.unequal(workers[0], w) {
				p.planAgain(oldEnoughAt)
			}
		default:
			return w
		}
	}
	return nil
}

// unequal reports whether the loads differ by more than the threshold, and whether the
// move of a session makes them more equal.
func (p *planner) unequal(from, to *worker) bool {
	after := float64(to.load+1) / float64(max(to.Capacity, 1))
	return from.relative()-to.relative() > p.Rebalance.Threshold && from.relative() >= after
}

// relative is the load as a share of the capacity.
func (w *worker) relative() float64 { return float64(w.load) / float64(max(w.Capacity, 1)) }

// cheapest returns the session of each worker that loses the least by a move. An idle
// session loses nothing. Of the others it is the one that has been connected the
// longest: it has a stable connection, its login has long been finished, and it has not
// moved recently. A session that is being paired or is reconnecting does not move, nor
// one whose worker a person chose.
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

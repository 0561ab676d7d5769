// Package placement decides which worker holds which session (docs/architecture.md,
// "Ownership"). It is a pure function from a snapshot of sessions and workers to moves:
// no I/O, no clock, no randomness, and the same answer whatever the order of its input.
//
// It moves no session without a reason:
//
//   - A session on a live worker of its namespace's pool stays there.
//   - A session without a worker goes to the worker with the least relative load.
//   - The sessions of a draining worker move in waves, no faster than the new workers
//     can log them in.
//   - A worker that cannot reach its database or WhatsApp gets no new sessions while
//     another worker has room, and loses those that it has not connected.
//   - A worker that is late with its renewals gets no new sessions until it renews: it may
//     have died at the same moment as the worker whose sessions are placed now, and they
//     would move twice.
//   - A session goes to the worker that a person chose for it.
//   - When there is nothing else to do, unequal loads are made equal, one session at a
//     time (see rebalance.go).
//   - A session that no worker can take is unplaceable, with the reason.
//   - A session whose worker died comes before all others and does not wait for the
//     newest revision: it has no connection, so a second move costs it less.
//
// Each session scans the workers of its pool instead of taking one from a heap: ties
// are frequent (the workers of a new pool are all equal), and the session decides
// them, so the heap would have to be rebuilt for every session.
// 10,000 sessions on 100 workers take some milliseconds (BenchmarkPlan).
package placement

import (
	"cmp"
	"hash/fnv"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

const (
	// NewestTimeout is how long a session waits for room on the newest revision before it
	// goes to an older one, from which it would have to move again during a rollout.
	NewestTimeout = 60 * time.Second
	// drainTimeout is the same for the sessions of a draining worker. It is shorter than
	// the 30 s after which such a worker releases all its sessions, which would then be
	// without a connection.
	drainTimeout = 15 * time.Second
	// DefaultWave is how many sessions move to a worker at a time. A session has no
	// connection between the release by its old holder and the login on the new one, so a
	// wave is no larger than what a busy machine can log in quickly. The next session moves
	// when one of the wave has arrived. (1,000 sessions on four workers, all on two cores: a
	// wave of 25 makes a gap of 2.2 s, p99.)
	DefaultWave = 12
	// FailingTimeout is how long a worker must have been failing before its sessions without
	// a connection move.
	FailingTimeout = 60 * time.Second
	// MoveInterval is the shortest time between two moves of a session that a person asked
	// for.
	MoveInterval = time.Minute
	// tokenInterval is after what time to plan again while moves wait for login tokens.
	tokenInterval = time.Second
)

// Session has the facts of a session that a plan depends on.
type Session struct {
	// Object is the resource. The plan does not depend on it; the caller needs it to carry
	// out the plan.
	Object *v1alpha1.WhatsAppSession

	UID       types.UID
	Namespace string
	// Created orders the sessions of a namespace: the older ones come first.
	Created time.Time
	// Worker is the worker on which the session is placed; empty: none.
	Worker string
	// HeldBy is the worker that holds the session; empty: none.
	HeldBy string
	// Lost: the worker that held the session was declared dead. HeldBy is then empty. Each
	// lost session is in the plan, as a move or as unplaceable, so that the caller clears
	// its holder, or it waits for late workers.
	Lost bool
	// Wanted: the session needs a worker. One that is not wanted uses the capacity of a
	// worker that still has it, and nothing else.
	Wanted bool
	// Urgent: the session is placed before others and beyond its namespace's limit. It is
	// set for a deleted session, which needs a worker to log out.
	Urgent bool
	// Since is when the session began to need another worker; zero: now.
	Since time.Time
	// Paired: the session has a device, so the worker that takes it must log in, for which
	// it needs a token.
	Paired bool
	// Idle: the session has no connection, and needs none until a person acts or a point in
	// time has come.
	Idle bool
	// Connected is since when the session is connected; zero: it is not.
	Connected time.Time
	// Unconnected: the session should have a connection and has none, so it loses nothing by
	// a move.
	Unconnected bool
	// MoveTo is the worker that a person chose for the session; empty: any.
	MoveTo string
	// Placed is when the manager last placed the session or raised its epoch.
	Placed time.Time
}

// Worker has the facts of a worker that a plan depends on.
type Worker struct {
	Name     string
	Pool     string
	Revision int64
	// Capacity is how many sessions the worker takes at most.
	Capacity int
	// Tokens is how many logins the worker can begin at once. It bounds the waves of moves.
	Tokens int
	// Draining: the worker hands its sessions over and takes none.
	Draining bool
	// Live: the worker renews its Lease.
	Live bool
	// Late: the worker is live, but has missed renewals of its Lease.
	Late bool
	// Failing: the worker reports since FailingSince that it cannot reach its database or
	// WhatsApp (docs/architecture.md, "Ownership").
	Failing      bool
	FailingSince time.Time
	// Since is when the worker became live; zero: long ago.
	Since time.Time
}

// Namespace has the settings of a namespace that a plan depends on.
type Namespace struct {
	// Pool is the pool whose workers serve the namespace; empty: the default pool.
	Pool string
	// MaxSessions is how many sessions of the namespace are placed at most; nil: no limit.
	MaxSessions *int
}

// Snapshot is the whole input of a plan.
type Snapshot struct {
	Now        time.Time
	Sessions   []Session
	Workers    []Worker
	Namespaces map[string]Namespace
	// Wave is how many sessions move to a worker at a time; 0: DefaultWave.
	Wave int
	// Rebalance configures how unequal loads are made equal; nil: they are left.
	Rebalance *Rebalance
}

// Pool is the pool whose workers serve a namespace.
func (s *Snapshot) Pool(namespace string) string {
	if name := s.Namespaces[namespace].Pool; name != "" {
		return name
	}
	return v1alpha1.DefaultPool
}

// Cause is why a session moves that could have stayed.
type Cause string

const (
	// Requested: a person chose the worker.
	Requested Cause = "Requested"
	// Rebalanced: the old worker has more sessions than others.
	Rebalanced Cause = "Rebalanced"
	// Failing: the old worker cannot reach its database or WhatsApp.
	Failing Cause = "Failing"
)

// Move places a session on another worker.
type Move struct {
	// Session is one of the snapshot's.
	Session *Session
	// To is the worker; empty: no worker can take the session, and its present worker must
	// release it. It is the present worker if a lost session was already placed there.
	To string
	// Reason is why To is empty, as in Unplaceable. It is empty, too, for a lost session
	// that is not wanted.
	Reason string
	// Cause is empty if the session could not stay.
	Cause Cause
}

// Unplaceable is a session that needs a worker and gets none.
type Unplaceable struct {
	// Session is one of the snapshot's.
	Session *Session
	// Reason is one of v1alpha1.ReasonNoCapacity, ReasonNoWorkers and ReasonTooManySessions.
	Reason string
}

// Decline is why a session cannot go to the worker that a person chose.
type Decline string

// The worker that MoveTo names is unknown, silent, draining, in another pool, full, or
// failing while others are not.
const (
	DeclinedUnknown  Decline = "Unknown"
	DeclinedSilent   Decline = "Silent"
	DeclinedDraining Decline = "Draining"
	DeclinedPool     Decline = "Pool"
	DeclinedFull     Decline = "Full"
	DeclinedFailing  Decline = "Failing"
)

// Declined is a session that does not go to the worker that a person chose.
type Declined struct {
	// Session is one of the snapshot's.
	Session *Session
	Why     Decline
}

// Plan is the result of Make.
type Plan struct {
	Moves       []Move
	Unplaceable []Unplaceable
	// Waiting are the sessions that need another worker and will get one later, because the
	// newest revision is full for now, because the workers with room are late, or because
	// moves are paced.
	Waiting []*Session
	// Misplaced are the sessions that stay connected on a worker of another pool, with the
	// reason why their own pool cannot take them.
	Misplaced []Unplaceable
	Declined  []Declined
	// Again is when to plan again even if nothing changes; zero: not at all.
	Again time.Time
}

// Make returns the plan for a snapshot. The plan has pointers into the snapshot.
func Make(s Snapshot) Plan {
	p := planner{Snapshot: s, workers: map[string]*worker{}, pools: map[string]*pool{}, placed: map[string]int{}, busy: map[string]bool{}}
	if p.Wave == 0 {
		p.Wave = DefaultWave
	}
	p.addWorkers()
	todo := p.addSessions()
	p.roundRobin(todo.lost, p.place) // first, because they were connected: each second is an outage
	p.roundRobin(todo.waiting, p.place)
	p.roundRobin(todo.leaving, p.move)
	p.roundRobin(todo.failing, p.moveFromFailing)
	p.roundRobin(todo.requested, p.moveAsRequested)
	if p.Rebalance != nil {
		p.rebalance()
	}
	return p.plan
}

type worker struct {
	Worker
	hash     uint64
	load     int // sessions that are placed on the worker or held by it
	tokens   int // logins that it can begin, minus those for the sessions that are moving to it
	arriving int // sessions with a device that are placed on the worker and not held by it yet
}

// pool has the workers that can take sessions, in groups that are filled in their
// order: the newest revision first, and the failing workers last.
type pool struct {
	groups [][]*worker // the workers of a group have one revision, and all or none are failing
	// healthy is how many of the groups are not failing.
	healthy int
}

type planner struct {
	Snapshot
	workers map[string]*worker
	pools   map[string]*pool
	placed  map[string]int  // by namespace
	busy    map[string]bool // pools in which something is under way
	plan    Plan
}

func (p *planner) addWorkers() {
	sorted := slices.Clone(p.Workers)
	slices.SortFunc(sorted, func(a, b Worker) int {
		return cmp.Or(first(!a.Failing, !b.Failing), cmp.Compare(b.Revision, a.Revision), cmp.Compare(a.Name, b.Name))
	})
	for _, known := range sorted {
		w := &worker{Worker: known, hash: hash(known.Name), tokens: known.Tokens}
		p.workers[w.Name] = w
		if w.Draining && w.Live {
			p.busy[w.Pool] = true
		}
		if !w.Live || w.Draining {
			continue
		}
		if w.Late {
			p.busy[w.Pool] = true
		}
		group := p.pools[w.Pool]
		if group == nil {
			group = &pool{}
			p.pools[w.Pool] = group
		}
		last := len(group.groups) - 1
		if last < 0 || group.groups[last][0].Revision != w.Revision || group.groups[last][0].Failing != w.Failing {
			group.groups = append(group.groups, nil)
			last++
			if !w.Failing {
				group.healthy++
			}
		}
		group.groups[last] = append(group.groups[last], w)
	}
}

// todo has the sessions that need a worker or another worker.
type todo struct {
	lost      []*Session // the worker died
	waiting   []*Session // there is no worker
	leaving   []*Session // the session cannot stay on its worker
	failing   []*Session // the worker is failing and has not connected the session
	requested []*Session // a person chose another worker
}

// addSessions counts the sessions of every worker, and returns those that need a
// worker or another worker.
func (p *planner) addSessions() (todo todo) {
	for i := range p.Sessions {
		s := &p.Sessions[i]
		w := p.workers[s.Worker]
		if w != nil {
			w.load++
			// A session whose holder is silent arrives at an unknown time, so it must not delay the
			// moves of other sessions.
			holder := p.workers[s.HeldBy]
			if s.HeldBy != s.Worker && s.Paired && (s.HeldBy == "" || holder != nil && holder.Live) {
				w.tokens--
				w.arriving++
			}
		}
		if holder := p.workers[s.HeldBy]; holder != nil && s.HeldBy != s.Worker {
			holder.load++ // until it has released the session
		}
		if !s.Wanted {
			if s.Lost {
				p.plan.Moves = append(p.plan.Moves, Move{Session: s})
			}
			continue
		}
		held := s.Worker != "" && s.HeldBy == s.Worker
		stays := w != nil && w.Live && !w.Draining && w.Pool == p.pool(s)
		if s.Worker != "" && !(held && stays) {
			p.busy[p.pool(s)] = true
		}
		switch {
		case stays: // a live worker keeps its sessions
			p.placed[s.Namespace]++
			if s.Lost {
				p.plan.Moves = append(p.plan.Moves, Move{Session: s, To: s.Worker})
			}
			switch {
			case w.Failing && s.Unconnected && !s.Lost && (held || s.HeldBy == "") && p.pools[w.Pool].healthy > 0:
				todo.failing = append(todo.failing, s)
			case held && s.MoveTo != "" && s.MoveTo != s.Worker:
				todo.requested = append(todo.requested, s)
			}
		case s.Lost:
			todo.lost = append(todo.lost, s)
		case w != nil && w.Live && (held || !w.Draining):
			p.placed[s.Namespace]++
			todo.leaving = append(todo.leaving, s)
		case held:
			p.placed[s.Namespace]++ // the worker is silent, but not declared dead: it may still have the connection
		default:
			todo.waiting = append(todo.waiting, s)
		}
	}
	return todo
}

func (p *planner) pool(s *Session) string { return p.Pool(s.Namespace) }

// roundRobin calls each with the sessions. The namespaces take turns, beginning with
// those that have the fewest placed sessions.
func (p *planner) roundRobin(sessions []*Session, each func(*Session)) {
	queues := map[string][]*Session{}
	for _, s := range sessions {
		queues[s.Namespace] = append(queues[s.Namespace], s)
	}
	names := make([]string, 0, len(queues))
	for name, queue := range queues {
		names = append(names, name)
		slices.SortFunc(queue, compare)
	}
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(p.placed[a], p.placed[b]), cmp.Compare(a, b))
	})
	for round := 0; len(names) > 0; round++ {
		names = slices.DeleteFunc(names, func(name string) bool { return round >= len(queues[name]) })
		for _, name := range names {
			each(queues[name][round])
		}
	}
}

// compare orders the sessions of a namespace: urgent ones first, then those that had a
// worker, then the oldest.
func compare(a, b *Session) int {
	return cmp.Or(
		first(a.Urgent, b.Urgent), first(a.Worker != "", b.Worker != ""),
		a.Created.Compare(b.Created), cmp.Compare(a.UID, b.UID),
	)
}

// first orders the one that is true before the other.
func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	default:
		return 1
	}
}

// place finds a worker for a session that has none.
func (p *planner) place(s *Session) {
	// A lost session keeps its place even if the limit was lowered meanwhile.
	if limit := p.Namespaces[s.Namespace].MaxSessions; limit != nil && !s.Urgent && !s.Lost && p.placed[s.Namespace] >= *limit {
		p.markUnplaceable(s, v1alpha1.ReasonTooManySessions)
		return
	}
	p.busy[p.pool(s)] = true
	workers, reason := p.find(s)
	requested, declined := p.requested(s)
	switch {
	case requested != nil && declined == "" && requested.available():
		p.placed[s.Namespace]++
		p.assign(s, requested, "")
	case workers != nil:
		p.placed[s.Namespace]++
		p.assign(s, leastLoaded(s, workers, (*worker).available), "")
	case reason != "":
		p.markUnplaceable(s, reason)
	default:
		p.waitForWorkers(s)
	}
}

// move finds another worker for a session that has one and cannot stay there.
func (p *planner) move(s *Session) {
	workers, reason := p.find(s)
	requested, declined := p.requested(s)
	switch {
	case requested != nil && declined == "" && p.fits(s)(requested):
		p.assign(s, requested, "")
	case workers != nil:
		if to := leastLoaded(s, workers, p.fits(s)); to != nil {
			p.assign(s, to, "")
			return
		}
		p.waitUntil(s, p.Now.Add(tokenInterval))
	case reason == "":
		p.waitForWorkers(s)
	case p.workers[s.Worker].Draining:
		p.markUnplaceable(s, reason)
	default:
		p.plan.Misplaced = append(p.plan.Misplaced, Unplaceable{Session: s, Reason: reason})
	}
}

// moveFromFailing moves a session from a failing worker that has not connected it to
// one that is not failing. If none of those has room, the session stays.
func (p *planner) moveFromFailing(s *Session) {
	from := p.workers[s.Worker]
	if until := from.FailingSince.Add(FailingTimeout); p.Now.Before(until) {
		p.planAgain(until)
		return
	}
	group := p.pools[from.Pool]
	for _, workers := range group.groups[:group.healthy] {
		if !slices.ContainsFunc(workers, (*worker).available) {
			continue
		}
		p.busy[from.Pool] = true
		if to := leastLoaded(s, workers, p.fits(s)); to != nil {
			p.assign(s, to, Failing)
			return
		}
		p.waitUntil(s, p.Now.Add(tokenInterval))
		return
	}
}

// moveAsRequested moves a session to the worker that a person chose.
func (p *planner) moveAsRequested(s *Session) {
	switch to, declined := p.requested(s); {
	case declined != "":
		p.plan.Declined = append(p.plan.Declined, Declined{Session: s, Why: declined})
	case p.Now.Before(s.Placed.Add(MoveInterval)):
		p.waitUntil(s, s.Placed.Add(MoveInterval))
	case !p.fits(s)(to):
		p.waitUntil(s, p.Now.Add(tokenInterval))
	default:
		p.busy[to.Pool] = true
		p.assign(s, to, Requested)
	}
}

// requested returns the worker that a person chose for the session, and why the
// session cannot go there. Both are empty if nobody chose a worker.
func (p *planner) requested(s *Session) (*worker, Decline) {
	if s.MoveTo == "" {
		return nil, ""
	}
	w := p.workers[s.MoveTo]
	switch {
	case w == nil:
		return nil, DeclinedUnknown
	case !w.Live:
		return w, DeclinedSilent
	case w.Draining:
		return w, DeclinedDraining
	case w.Pool != p.pool(s):
		return w, DeclinedPool
	case !w.hasRoom():
		return w, DeclinedFull
	case w.Failing && p.pools[w.Pool].healthy > 0:
		return w, DeclinedFailing
	default:
		return w, ""
	}
}

// find returns the group of workers that takes a session, at least one of which is
// available, or the reason why there is none. If both are empty, the session must wait for
// the newest revision, or for workers that are late. It does not wait when only failing
// workers have room.
func (p *planner) find(s *Session) (workers []*worker, reason string) {
	group := p.pools[p.pool(s)]
	if group == nil {
		return nil, v1alpha1.ReasonNoWorkers
	}
	n := slices.IndexFunc(group.groups, func(g []*worker) bool { return slices.ContainsFunc(g, (*worker).available) })
	switch {
	case n < 0 && slices.ContainsFunc(group.groups, func(g []*worker) bool { return slices.ContainsFunc(g, (*worker).hasRoom) }):
		return nil, "" // a late worker renews soon or is not live any more
	case n < 0:
		return nil, v1alpha1.ReasonNoCapacity
	case n > 0 && n < group.healthy && !s.Lost && p.Now.Before(p.since(s).Add(p.newestTimeout(s))):
		return nil, ""
	default:
		return group.groups[n], ""
	}
}

// newestTimeout is how long a session waits for the newest revision.
func (p *planner) newestTimeout(s *Session) time.Duration {
	if w := p.workers[s.Worker]; w != nil && w.Draining {
		return drainTimeout
	}
	return NewestTimeout
}

func (p *planner) since(s *Session) time.Time {
	if s.Since.IsZero() {
		return p.Now
	}
	return s.Since
}

// leastLoaded returns the worker with the least relative load. Of equal workers the
// session's hash chooses one, so that they fill evenly and a session tends to return
// to the same worker.
func leastLoaded(s *Session, workers []*worker, fits func(*worker) bool) *worker {
	var best *worker
	var score uint64
	id := hash(string(s.UID))
	for _, w := range workers {
		if !fits(w) {
			continue
		}
		order := -1
		if best != nil {
			order = cmp.Compare(int64(w.load)*int64(best.Capacity), int64(best.load)*int64(w.Capacity))
		}
		if order > 0 {
			continue
		}
		if own := mix(id ^ w.hash); order < 0 || own > score {
			best, score = w, own
		}
	}
	return best
}

func (w *worker) hasRoom() bool { return w.load < w.Capacity }

// available reports whether a session can be placed on the worker now.
func (w *worker) available() bool { return w.hasRoom() && !w.Late }

// fits returns a filter for the workers to which the session can move now. A session
// without a device needs no login and has no connection to lose.
func (p *planner) fits(s *Session) func(*worker) bool {
	if !s.Paired {
		return (*worker).available
	}
	return func(w *worker) bool { return w.available() && w.tokens > 0 && w.arriving < p.Wave }
}

// assign moves a session to a worker.
func (p *planner) assign(s *Session, to *worker, cause Cause) {
	to.load++
	if s.Paired {
		to.tokens--
		to.arriving++
	}
	p.plan.Moves = append(p.plan.Moves, Move{Session: s, To: to.Name, Cause: cause})
}

// markUnplaceable records why a session gets no worker. If it is placed on one, it is
// removed from it.
func (p *planner) markUnplaceable(s *Session, reason string) {
	if s.Worker != "" {
		p.plan.Moves = append(p.plan.Moves, Move{Session: s, Reason: reason})
		return
	}
	p.plan.Unplaceable = append(p.plan.Unplaceable, Unplaceable{Session: s, Reason: reason})
}

// waitForWorkers makes the session wait for the newest revision, or for late workers.
func (p *planner) waitForWorkers(s *Session) {
	until := p.since(s).Add(p.newestTimeout(s))
	if !p.Now.Before(until) {
		until = p.Now.Add(tokenInterval)
	}
	p.waitUntil(s, until)
}

func (p *planner) waitUntil(s *Session, t time.Time) {
	p.plan.Waiting = append(p.plan.Waiting, s)
	p.planAgain(t)
}

// planAgain makes the caller plan again at t.
func (p *planner) planAgain(t time.Time) {
	if p.plan.Again.IsZero() || t.Before(p.plan.Again) {
		p.plan.Again = t
	}
}

func hash(s string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(s)) // never fails
	return mix(h.Sum64())
}

// mix is the finalizer of SplitMix64: every bit of x changes every bit of the result.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	x ^= x >> 31
	return x
}

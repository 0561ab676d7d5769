// Package placement decides which worker holds which session (docs/architecture.md,
// "Ownership"). It is a pure function from a snapshot of sessions and workers to moves:
// no I/O, no clock, no randomness, and the same answer whatever the order of its input.
//
// It moves nothing without a reason. A session on a live worker of its
// namespace's pool stays where it is. A session without a worker goes to the
// one with the least relative load. A session on a draining worker moves in
// waves that its successors can log in. A worker that cannot reach its database or
// WhatsApp gets nothing new while another one has room, and gives up what it has not
// connected. A session that a person wants elsewhere goes there. Where nothing else is to be done, unequal loads are made equal, one
// session at a time (see rebalance.go). A session that no worker can take is in
// the plan as unplaceable, with the reason. A session whose worker died comes
// before all others and does not wait for the newest revision: it is down, and
// another move costs it less.
//
// The workers of a pool are scanned for each session instead of being kept in
// a heap: ties are frequent (the workers of a new pool are all equal) and are
// decided by the session, so a heap would have to be rebuilt for every session.
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
	// NewestTimeout is how long a session waits for room on the newest revision
	// before it goes to an older one: during a rollout it would have to move again.
	NewestTimeout = 60 * time.Second
	// drainTimeout is the same for the sessions of a draining worker: it is shorter than
	// the 30 s after which such a worker releases everything by itself, which would leave
	// them without a connection.
	drainTimeout = 15 * time.Second
	// DefaultWave is how many sessions are moving to a worker at a time. From the
	// release by the old holder to the successor's login a session is down, so a wave is
	// no larger than what a busy machine takes up in a moment; the next session moves
	// when one of them has arrived. (1,000 sessions on four workers, all on two cores: with
	// 25 a gap of 2.2 s, p99.)
	DefaultWave = 12
	// FailingTimeout is how long a worker must have been failing before its sessions without
	// a connection move.
	FailingTimeout = 60 * time.Second
	// MoveInterval is how often a session moves at most because a person asks for it.
	MoveInterval = time.Minute
	// paceInterval is when to plan again for moves that wait for login tokens.
	paceInterval = time.Second
)

// Session is what a plan depends on of a session.
type Session struct {
	// Object is the resource, for the caller that carries the plan out. The plan does not
	// depend on it.
	Object *v1alpha1.WhatsAppSession

	UID       types.UID
	Namespace string
	// Created orders the sessions of a namespace: the older ones come first.
	Created time.Time
	// Worker is where the session is placed; empty: nowhere.
	Worker string
	// HeldBy is the worker that owns its device.
	HeldBy string
	// Lost: the worker that owned its device has been declared dead; HeldBy is empty then.
	// Each lost session is among the plan's moves or unplaceable sessions, so that its holder
	// is cleared.
	Lost bool
	// Wanted: the session is to have a worker. One that is not wanted only takes room
	// as long as a worker has it.
	Wanted bool
	// Urgent: the session comes first and beyond its namespace's limit; a deleted one
	// needs a worker to log out.
	Urgent bool
	// Since is when the session began to want another worker; zero: just now.
	Since time.Time
	// Paired: it has a device, so that taking it up is a login, which costs a token.
	Paired bool
	// Idle: it has no connection, and is to have none until a person acts or a date has come.
	Idle bool
	// Connected is since when it is connected; zero: it is not.
	Connected time.Time
	// Unconnected: it is to have a connection and has none now: it loses nothing by a move.
	Unconnected bool
	// MoveTo is the worker on which a person wants it; empty: any.
	MoveTo string
	// Placed is when it was placed last, or spoken for.
	Placed time.Time
}

// Worker is what a plan depends on of a worker.
type Worker struct {
	Name     string
	Pool     string
	Revision int64
	// Capacity is how many sessions it takes at most.
	Capacity int
	// Tokens is how many logins it can begin at once; it bounds the waves of moves.
	Tokens int
	// Draining: it gives away what it has and takes nothing.
	Draining bool
	// Live: its Lease is being renewed.
	Live bool
	// Failing: it says that it cannot reach its database or WhatsApp (docs/architecture.md,
	// "Ownership"), and FailingSince is since when.
	Failing      bool
	FailingSince time.Time
	// Since is when it became live; zero: long ago.
	Since time.Time
}

// Namespace is what a plan depends on of a namespace.
type Namespace struct {
	// Pool whose workers serve it; empty: the default pool.
	Pool string
	// MaxSessions bounds how many of its sessions are placed; nil: no bound.
	MaxSessions *int
}

// Snapshot is all that a plan is made from.
type Snapshot struct {
	Now        time.Time
	Sessions   []Session
	Workers    []Worker
	Namespaces map[string]Namespace
	// Wave is how many sessions are on their way to a worker at a time; 0: DefaultWave.
	Wave int
	// Rebalance is how unequal loads are made equal; nil: they are not.
	Rebalance *Rebalance
}

// Pool is the pool whose workers serve a namespace.
func (s *Snapshot) Pool(namespace string) string {
	if name := s.Namespaces[namespace].Pool; name != "" {
		return name
	}
	return v1alpha1.DefaultPool
}

// Cause is why a session moves that could stay.
type Cause string

const (
	// Requested: a person wants it on that worker.
	Requested Cause = "Requested"
	// Rebalanced: its worker has more sessions than others.
	Rebalanced Cause = "Rebalanced"
	// Failing: its worker cannot reach its database or WhatsApp.
	Failing Cause = "Failing"
)

// Move gives a session another worker.
type Move struct {
	// Session is one of the snapshot's.
	Session *Session
	// To is the worker; empty: no worker can take the session, and its present worker has to
	// give it up. It is the present worker where a lost session was on its way there.
	To string
	// Reason is why To is empty, as in Unplaceable; of a lost session that is not wanted it
	// is empty, too.
	Reason string
	// Cause is empty where the session could not stay.
	Cause Cause
}

// Unplaceable is a session that wants a worker and gets none.
type Unplaceable struct {
	// Session is one of the snapshot's.
	Session *Session
	// Reason is one of v1alpha1.ReasonNoCapacity, ReasonNoWorkers and ReasonTooManySessions.
	Reason string
}

// Decline is why a session cannot go where a person wants it.
type Decline string

// The worker that MoveTo names is not known, silent, draining, of another pool, full,
// or failing while others are not.
const (
	DeclinedUnknown  Decline = "Unknown"
	DeclinedSilent   Decline = "Silent"
	DeclinedDraining Decline = "Draining"
	DeclinedPool     Decline = "Pool"
	DeclinedFull     Decline = "Full"
	DeclinedFailing  Decline = "Failing"
)

// Declined is a session that stays where it is although a person wants it elsewhere.
type Declined struct {
	// Session is one of the snapshot's.
	Session *Session
	Why     Decline
}

// Plan is what to do.
type Plan struct {
	Moves       []Move
	Unplaceable []Unplaceable
	// Waiting are the sessions that want another worker and will get one later: the newest
	// revision is full for the moment, or moves are paced.
	Waiting []*Session
	// Misplaced are the sessions that stay connected on a worker of another pool, because
	// their own cannot take them, with the reason.
	Misplaced []Unplaceable
	Declined  []Declined
	// Again is when the plan may change by time alone; zero: never.
	Again time.Time
}

// Make plans the snapshot. The plan points into it.
func Make(s Snapshot) Plan {
	p := planner{Snapshot: s, workers: map[string]*worker{}, pools: map[string]*pool{}, placed: map[string]int{}, busy: map[string]bool{}}
	if p.Wave == 0 {
		p.Wave = DefaultWave
	}
	p.addWorkers()
	todo := p.addSessions()
	p.roundRobin(todo.lost, p.place) // they were connected: each second is an outage
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
	load     int // sessions that it has or is to have
	tokens   int // logins that it can begin, less those of the sessions that are moving here
	arriving int // sessions with a device that are placed here and not held here yet
}

// pool is the workers that can take sessions, in the order in which they are to be
// filled: the newest revision first, and after all others those that are failing.
type pool struct {
	groups [][]*worker // each of one revision, and all of it failing or none
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

// todo are the sessions for which a worker is to be found.
type todo struct {
	lost      []*Session // their worker died
	waiting   []*Session // they have none
	leaving   []*Session // they have one and cannot stay there
	failing   []*Session // they have one that does not connect them, because it is failing
	requested []*Session // a person wants them elsewhere
}

// addSessions counts what every worker has, and sorts out the sessions for which
// a worker is to be found.
func (p *planner) addSessions() (todo todo) {
	for i := range p.Sessions {
		s := &p.Sessions[i]
		w := p.workers[s.Worker]
		if w != nil {
			w.load++
			// One whose holder is silent arrives at an unknown time: it must not keep the others
			// from moving.
			holder := p.workers[s.HeldBy]
			if s.HeldBy != s.Worker && s.Paired && (s.HeldBy == "" || holder != nil && holder.Live) {
				w.tokens--
				w.arriving++
			}
		}
		if holder := p.workers[s.HeldBy]; holder != nil && s.HeldBy != s.Worker {
			holder.load++ // until it has given the session up
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
		case stays: // a live worker keeps what it has
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
			p.placed[s.Namespace]++ // silent, but not declared dead: it may still hold the connection
		default:
			todo.waiting = append(todo.waiting, s)
		}
	}
	return todo
}

func (p *planner) pool(s *Session) string { return p.Pool(s.Namespace) }

// roundRobin calls each with the sessions, one of every namespace in turn, beginning
// with the namespaces that have the fewest placed.
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

// compare orders the sessions of a namespace: urgent ones, those that had a worker, old ones.
func compare(a, b *Session) int {
	return cmp.Or(
		first(a.Urgent, b.Urgent), first(a.Worker != "", b.Worker != ""),
		a.Created.Compare(b.Created), cmp.Compare(a.UID, b.UID),
	)
}

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
	// A limit that was lowered takes no session's worker away, nor does a worker's death.
	if limit := p.Namespaces[s.Namespace].MaxSessions; limit != nil && !s.Urgent && !s.Lost && p.placed[s.Namespace] >= *limit {
		p.markUnplaceable(s, v1alpha1.ReasonTooManySessions)
		return
	}
	p.busy[p.pool(s)] = true
	workers, reason := p.find(s)
	requested, declined := p.requested(s)
	switch {
	case requested != nil && declined == "":
		p.placed[s.Namespace]++
		p.assign(s, requested, "")
	case workers != nil:
		p.placed[s.Namespace]++
		p.assign(s, leastLoaded(s, workers, (*worker).hasRoom), "")
	case reason != "":
		p.markUnplaceable(s, reason)
	default:
		p.waitForNewest(s)
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
		p.waitUntil(s, p.Now.Add(paceInterval))
	case reason == "":
		p.waitForNewest(s)
	case p.workers[s.Worker].Draining:
		p.markUnplaceable(s, reason)
	default:
		p.plan.Misplaced = append(p.plan.Misplaced, Unplaceable{Session: s, Reason: reason})
	}
}

// moveFromFailing moves a session from a failing worker that has not connected it to
// one that is not failing; where none of these has room it stays.
func (p *planner) moveFromFailing(s *Session) {
	from := p.workers[s.Worker]
	if until := from.FailingSince.Add(FailingTimeout); p.Now.Before(until) {
		p.again(until)
		return
	}
	group := p.pools[from.Pool]
	for _, workers := range group.groups[:group.healthy] {
		if !slices.ContainsFunc(workers, (*worker).hasRoom) {
			continue
		}
		p.busy[from.Pool] = true
		if to := leastLoaded(s, workers, p.fits(s)); to != nil {
			p.assign(s, to, Failing)
			return
		}
		p.waitUntil(s, p.Now.Add(paceInterval))
		return
	}
}

// moveAsRequested moves a session to where a person wants it.
func (p *planner) moveAsRequested(s *Session) {
	switch to, declined := p.requested(s); {
	case declined != "":
		p.plan.Declined = append(p.plan.Declined, Declined{Session: s, Why: declined})
	case p.Now.Before(s.Placed.Add(MoveInterval)):
		p.waitUntil(s, s.Placed.Add(MoveInterval))
	case !p.fits(s)(to):
		p.waitUntil(s, p.Now.Add(paceInterval))
	default:
		p.busy[to.Pool] = true
		p.assign(s, to, Requested)
	}
}

// requested is the worker on which a person wants the session, and why it cannot go
// there; both are empty where no person has chosen one.
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

// find returns the workers of the group that is to take a session, some of which
// have room, or why there are none; with neither, the session is to wait for the
// newest revision. It does not wait while only failing workers have room.
func (p *planner) find(s *Session) (workers []*worker, reason string) {
	group := p.pools[p.pool(s)]
	if group == nil {
		return nil, v1alpha1.ReasonNoWorkers
	}
	n := slices.IndexFunc(group.groups, func(g []*worker) bool { return slices.ContainsFunc(g, (*worker).hasRoom) })
	switch {
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

// leastLoaded is the worker with the least relative load; of equal ones the one that
// the session's hash prefers, so that they fill evenly and a session tends to
// find the same one again.
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

// fits returns a filter for the workers to which the session can move now. A session
// without a device has no login to make and no connection to lose.
func (p *planner) fits(s *Session) func(*worker) bool {
	if !s.Paired {
		return (*worker).hasRoom
	}
	return func(w *worker) bool { return w.hasRoom() && w.tokens > 0 && w.arriving < p.Wave }
}

func (p *planner) assign(s *Session, to *worker, cause Cause) {
	to.load++
	if s.Paired {
		to.tokens--
		to.arriving++
	}
	p.plan.Moves = append(p.plan.Moves, Move{Session: s, To: to.Name, Cause: cause})
}

// markUnplaceable says why a session gets no worker; it loses the one that it had.
func (p *planner) markUnplaceable(s *Session, reason string) {
	if s.Worker != "" {
		p.plan.Moves = append(p.plan.Moves, Move{Session: s, Reason: reason})
		return
	}
	p.plan.Unplaceable = append(p.plan.Unplaceable, Unplaceable{Session: s, Reason: reason})
}

// waitForNewest has the session wait for the newest revision.
func (p *planner) waitForNewest(s *Session) {
	p.waitUntil(s, p.since(s).Add(p.newestTimeout(s)))
}

func (p *planner) waitUntil(s *Session, t time.Time) {
	p.plan.Waiting = append(p.plan.Waiting, s)
	p.again(t)
}

func (p *planner) again(t time.Time) {
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

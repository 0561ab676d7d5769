// Package placement decides which worker holds which session (DESIGN section
// 3.3). It is a pure function from a snapshot of sessions and workers to moves:
// no I/O, no clock, no randomness, and the same answer whatever the order of
// its input.
//
// It moves nothing without a reason. A session on a live worker of its
// namespace's pool stays where it is. A session without a worker goes to the
// one with the least relative load. A session on a draining worker moves in
// waves that its successors can log in. One that a person wants elsewhere goes
// there. Where nothing else is to be done, unequal loads are made equal, one
// session at a time (see rebalance.go). The rest is said to be refused, with
// the reason. A session whose worker died comes before all others and does not
// wait for the newest revision: it is down, and another move costs it less.
//
// The workers of a pool are scanned for each session instead of being kept in
// a heap: ties are frequent (a fresh pool is one big tie) and are decided by
// the session, so a heap would be taken apart for every session anyway. 10,000
// sessions on 100 workers take some milliseconds (BenchmarkPlan).
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
	// drainTimeout is the same for what a draining worker has: it is shorter than the
	// 30 s after which such a worker releases everything by itself, and then what it had
	// is down.
	drainTimeout = 15 * time.Second
	// DefaultWave is how many sessions are on their way to a worker at a time. From the
	// release by the old holder to the successor's login a session is down, so a wave is
	// no larger than what a busy machine takes up in a moment; the next session goes
	// when one of them has arrived. (1,000 sessions on four workers, all on two cores: with
	// 25 a gap of 2.2 s, p99.)
	DefaultWave = 12
	// MoveInterval is how often a session moves at most because a person asks for it.
	MoveInterval = time.Minute
	// paceInterval is when to look again at moves that wait for login tokens.
	paceInterval = time.Second
)

// Session is what counts of a session.
type Session struct {
	UID       types.UID
	Namespace string
	// Created orders the sessions of a namespace: the older ones come first.
	Created time.Time
	// Worker is where the session is placed; empty: nowhere.
	Worker string
	// HeldBy is the worker that owns its device.
	HeldBy string
	// Lost: the worker that owned its device has been declared dead; HeldBy is empty then.
	// Each lost session is in the plan's moves or refusals, so that its holder is cleared.
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
	// Idle: it has no connection, and is to have none before a person or a date says so.
	Idle bool
	// Connected is since when it is connected; zero: it is not.
	Connected time.Time
	// MoveTo is the worker on which a person wants it; empty: whichever.
	MoveTo string
	// Placed is when it was placed last, or spoken for.
	Placed time.Time
}

// Worker is what counts of a worker.
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
	// Since is when it became live; zero: long ago.
	Since time.Time
}

// Namespace is what counts of a namespace.
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
	// Asked: a person wants it on that worker.
	Asked Cause = "Asked"
	// Balanced: its worker has more to do than others.
	Balanced Cause = "Balanced"
)

// Move gives a session another worker.
type Move struct {
	// Session is its index in the snapshot.
	Session int
	// To is the worker; empty: nobody can take the session, and its present worker has to
	// give it up. It is the present worker where a lost session was on its way there.
	To string
	// Refused is why To is empty; of a lost session that is not wanted it is empty, too.
	Refused string
	// Cause is empty where the session could not stay.
	Cause Cause
}

// Refusal says why a session that wants a worker gets none.
type Refusal struct {
	// Session is its index in the snapshot.
	Session int
	// Reason is one of v1alpha1.ReasonNoCapacity, ReasonNoWorkers and ReasonTooManySessions.
	Reason string
}

// Decline is why a session cannot go where a person wants it.
type Decline string

// The worker that MoveTo names is not known, silent, draining, of another pool, or full.
const (
	DeclinedUnknown  Decline = "Unknown"
	DeclinedSilent   Decline = "Silent"
	DeclinedDraining Decline = "Draining"
	DeclinedPool     Decline = "Pool"
	DeclinedFull     Decline = "Full"
)

// Declined is a session that stays where it is although a person wants it elsewhere.
type Declined struct {
	// Session is its index in the snapshot.
	Session int
	Why     Decline
}

// Plan is what to do.
type Plan struct {
	Moves    []Move
	Refusals []Refusal
	// Waiting are the indexes of sessions that want another worker and will get one
	// later: the newest revision is full for the moment, or moves are paced.
	Waiting  []int
	Declined []Declined
	// Again is when the plan may change by time alone; zero: never.
	Again time.Time
}

// Make plans the snapshot.
func Make(s Snapshot) Plan {
	p := planner{Snapshot: s, workers: map[string]*worker{}, pools: map[string]*pool{}, placed: map[string]int{}, busy: map[string]bool{}}
	if p.Wave == 0 {
		p.Wave = DefaultWave
	}
	p.takeWorkers()
	todo := p.takeSessions()
	p.deal(todo.lost, p.place) // they were connected: each second is an outage
	p.deal(todo.waiting, p.place)
	p.deal(todo.moving, p.move)
	p.deal(todo.asked, p.obey)
	if p.Rebalance != nil {
		p.rebalance()
	}
	return p.plan
}

type worker struct {
	Worker
	hash   uint64
	load   int // sessions that it has or is to have
	budget int // logins that it can begin, less those that it owes
	coming int // sessions with a device that are placed here and not held here yet
}

// pool is the workers that can take sessions, newest revision first.
type pool struct{ revisions [][]*worker }

type planner struct {
	Snapshot
	workers map[string]*worker
	pools   map[string]*pool
	placed  map[string]int  // by namespace
	busy    map[string]bool // pools in which something is under way
	plan    Plan
}

func (p *planner) takeWorkers() {
	sorted := slices.Clone(p.Workers)
	slices.SortFunc(sorted, func(a, b Worker) int {
		return cmp.Or(cmp.Compare(b.Revision, a.Revision), cmp.Compare(a.Name, b.Name))
	})
	for _, known := range sorted {
		w := &worker{Worker: known, hash: hash(known.Name), budget: known.Tokens}
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
		last := len(group.revisions) - 1
		if last < 0 || group.revisions[last][0].Revision != w.Revision {
			group.revisions = append(group.revisions, nil)
			last++
		}
		group.revisions[last] = append(group.revisions[last], w)
	}
}

// todo are the sessions for which a worker is to be found.
type todo struct {
	lost    []int // their worker died
	waiting []int // they have none
	moving  []int // they have one and must leave it
	asked   []int // a person wants them elsewhere
}

// takeSessions counts what every worker has, and sorts the sessions for which
// a worker is to be found.
func (p *planner) takeSessions() (todo todo) {
	for i := range p.Sessions {
		s := &p.Sessions[i]
		w := p.workers[s.Worker]
		if w != nil {
			w.load++
			// One whose holder is silent comes nobody knows when: it must not keep the others
			// from moving.
			holder := p.workers[s.HeldBy]
			if s.HeldBy != s.Worker && s.Paired && (s.HeldBy == "" || holder != nil && holder.Live) {
				w.budget--
				w.coming++
			}
		}
		if holder := p.workers[s.HeldBy]; holder != nil && s.HeldBy != s.Worker {
			holder.load++ // until it has given the session up
		}
		if !s.Wanted {
			if s.Lost {
				p.plan.Moves = append(p.plan.Moves, Move{Session: i})
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
				p.plan.Moves = append(p.plan.Moves, Move{Session: i, To: s.Worker})
			}
			if held && s.MoveTo != "" && s.MoveTo != s.Worker {
				todo.asked = append(todo.asked, i)
			}
		case s.Lost:
			todo.lost = append(todo.lost, i)
		case w != nil && w.Live && (held || !w.Draining):
			p.placed[s.Namespace]++
			todo.moving = append(todo.moving, i)
		case held:
			p.placed[s.Namespace]++ // silent, but not declared dead: it may still hold the connection
		default:
			todo.waiting = append(todo.waiting, i)
		}
	}
	return todo
}

func (p *planner) pool(s *Session) string { return p.Pool(s.Namespace) }

// deal hands the sessions to each, one of every namespace in turn, beginning
// with the namespaces that have the fewest placed.
func (p *planner) deal(sessions []int, each func(i int)) {
	queues := map[string][]int{}
	for _, i := range sessions {
		queues[p.Sessions[i].Namespace] = append(queues[p.Sessions[i].Namespace], i)
	}
	names := make([]string, 0, len(queues))
	for name, queue := range queues {
		names = append(names, name)
		slices.SortFunc(queue, p.compare)
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
func (p *planner) compare(i, j int) int {
	a, b := &p.Sessions[i], &p.Sessions[j]
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
func (p *planner) place(i int) {
	s := &p.Sessions[i]
	// A limit that was lowered takes no session's worker away, nor does a worker's death.
	if limit := p.Namespaces[s.Namespace].MaxSessions; limit != nil && !s.Urgent && !s.Lost && p.placed[s.Namespace] >= *limit {
		p.refuse(i, v1alpha1.ReasonTooManySessions)
		return
	}
	p.busy[p.pool(s)] = true
	workers, reason := p.find(s)
	wish, declined := p.wish(s)
	switch {
	case wish != nil && declined == "":
		p.placed[s.Namespace]++
		p.assign(i, wish, "")
	case workers != nil:
		p.placed[s.Namespace]++
		p.assign(i, pick(s, workers, (*worker).hasRoom), "")
	case reason != "":
		p.refuse(i, reason)
	default:
		p.wait(i)
	}
}

// move finds another worker for a session that has one and must leave it.
func (p *planner) move(i int) {
	s := &p.Sessions[i]
	workers, reason := p.find(s)
	wish, declined := p.wish(s)
	switch {
	case wish != nil && declined == "" && p.fits(s)(wish):
		p.assign(i, wish, "")
	case workers != nil:
		if to := pick(s, workers, p.fits(s)); to != nil {
			p.assign(i, to, "")
			return
		}
		p.waitUntil(i, p.Now.Add(paceInterval))
	case reason == "":
		p.wait(i)
	case p.workers[s.Worker].Draining:
		p.refuse(i, reason)
	}
}

// obey moves a session to where a person wants it.
func (p *planner) obey(i int) {
	s := &p.Sessions[i]
	switch to, declined := p.wish(s); {
	case declined != "":
		p.plan.Declined = append(p.plan.Declined, Declined{Session: i, Why: declined})
	case p.Now.Before(s.Placed.Add(MoveInterval)):
		p.waitUntil(i, s.Placed.Add(MoveInterval))
	case !p.fits(s)(to):
		p.waitUntil(i, p.Now.Add(paceInterval))
	default:
		p.busy[to.Pool] = true
		p.assign(i, to, Asked)
	}
}

// wish is the worker on which a person wants the session, and why it cannot go
// there; without such a wish both are empty.
func (p *planner) wish(s *Session) (*worker, Decline) {
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
	default:
		return w, ""
	}
}

// find returns the workers of the revision that is to take a session, some of
// which have room, or why there are none; with neither, the session is to wait
// for the newest revision.
func (p *planner) find(s *Session) (workers []*worker, reason string) {
	group := p.pools[p.pool(s)]
	if group == nil {
		return nil, v1alpha1.ReasonNoWorkers
	}
	n := slices.IndexFunc(group.revisions, func(r []*worker) bool { return slices.ContainsFunc(r, (*worker).hasRoom) })
	switch {
	case n < 0:
		return nil, v1alpha1.ReasonNoCapacity
	case n > 0 && !s.Lost && p.Now.Before(p.since(s).Add(p.patience(s))):
		return nil, ""
	default:
		return group.revisions[n], ""
	}
}

// patience is how long a session waits for the newest revision.
func (p *planner) patience(s *Session) time.Duration {
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

// pick is the worker with the least relative load; of equal ones the one that
// the session's hash prefers, so that they fill evenly and a session tends to
// find the same one again.
func pick(s *Session, workers []*worker, fits func(*worker) bool) *worker {
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

// fits tells the workers to which the session can move now. One without a device
// has no login to make and no connection to lose.
func (p *planner) fits(s *Session) func(*worker) bool {
	if !s.Paired {
		return (*worker).hasRoom
	}
	return func(w *worker) bool { return w.hasRoom() && w.budget > 0 && w.coming < p.Wave }
}

func (p *planner) assign(i int, to *worker, cause Cause) {
	to.load++
	if p.Sessions[i].Paired {
		to.budget--
		to.coming++
	}
	p.plan.Moves = append(p.plan.Moves, Move{Session: i, To: to.Name, Cause: cause})
}

// refuse says why a session gets no worker; it loses the one that it had.
func (p *planner) refuse(i int, reason string) {
	if p.Sessions[i].Worker != "" {
		p.plan.Moves = append(p.plan.Moves, Move{Session: i, Refused: reason})
		return
	}
	p.plan.Refusals = append(p.plan.Refusals, Refusal{Session: i, Reason: reason})
}

// wait has the session wait for the newest revision.
func (p *planner) wait(i int) {
	s := &p.Sessions[i]
	p.waitUntil(i, p.since(s).Add(p.patience(s)))
}

func (p *planner) waitUntil(i int, t time.Time) {
	p.plan.Waiting = append(p.plan.Waiting, i)
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

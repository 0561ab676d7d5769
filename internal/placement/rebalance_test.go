package placement_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

func moveTo(worker string) func(*session) { return func(s *session) { s.MoveTo = worker } }
func idle(s *session)                     { s.Idle = true }

func connected(ago time.Duration) func(*session) {
	return func(s *session) { s.Connected = noon.Add(-ago) }
}

func placedAgo(ago time.Duration) func(*session) {
	return func(s *session) { s.Placed = noon.Add(-ago) }
}

func liveFor(d time.Duration) func(*worker) {
	return func(w *worker) { w.Since = noon.Add(-d) }
}

// TestWaves checks how many sessions move to a worker at a time.
func TestWaves(t *testing.T) {
	from := func(n int, more ...session) []session {
		var out []session
		for i := range n {
			out = append(out, s(i+1, "a", on("w1")))
		}
		return append(out, more...)
	}
	coming := func(n, first int, worker, holder string) []session {
		var out []session
		for i := range n {
			out = append(out, s(first+i, "a", placedOn(worker), heldBy(holder)))
		}
		return out
	}
	for _, tt := range []struct {
		name     string
		sessions []session
		workers  []worker
		wave     int
		want     map[string]int
		waiting  int
	}{
		{
			name:     "one successor takes one wave",
			sessions: from(100), workers: []worker{w("w1", 100, draining), w("w2", 100)},
			want: map[string]int{"w2": placement.DefaultWave}, waiting: 100 - placement.DefaultWave,
		},
		{
			name:     "equal successors share the sessions",
			sessions: from(40), workers: []worker{w("w1", 100, draining), w("w2", 100), w("w3", 100)}, wave: 10,
			want: map[string]int{"w2": 10, "w3": 10}, waiting: 20,
		},
		{
			name:     "the next session moves when one has arrived",
			sessions: append(from(20), coming(9, 100, "w2", "w1")...), workers: []worker{w("w1", 100, draining), w("w2", 100)}, wave: 10,
			want: map[string]int{"w2": 1}, waiting: 19,
		},
		{
			name:     "sessions that are released and not claimed yet count, too",
			sessions: append(from(20), coming(10, 100, "w2", "")...), workers: []worker{w("w1", 100, draining), w("w2", 100)}, wave: 10,
			want: map[string]int{}, waiting: 20,
		},
		{
			name:     "sessions without a device do not count: they have no connection to lose",
			sessions: append(from(20), s(100, "a", placedOn("w2"), unpaired), s(101, "a", placedOn("w2"), unpaired)),
			workers:  []worker{w("w1", 100, draining), w("w2", 100)}, wave: 2,
			want: map[string]int{"w2": 2}, waiting: 18,
		},
		{
			name:     "the sessions of a dead worker move all at once, and the drain waits for them",
			sessions: append(from(20), s(50, "a", placedOn("dead"), lost)),
			workers:  []worker{w("w1", 100, draining), w("w2", 100)}, wave: 1,
			want: map[string]int{"w2": 1}, waiting: 20,
		},
		{
			name:     "the sessions of a namespace whose pool was changed move in waves, too",
			sessions: []session{s(1, "blue", on("w1")), s(2, "blue", on("w1")), s(3, "blue", on("w1"))},
			workers:  []worker{w("w1", 100), w("w2", 100, pool("blue"))}, wave: 2,
			want: map[string]int{"w2": 2}, waiting: 1,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			p := placement.Make(placement.Snapshot{
				Now: noon, Sessions: tt.sessions, Workers: tt.workers, Wave: tt.wave,
				Namespaces: map[string]placement.Namespace{"blue": {Pool: "blue"}},
			})
			to := map[string]int{}
			for _, m := range p.Moves {
				to[m.To]++
			}
			g.Expect(to).To(Equal(tt.want))
			g.Expect(p.Waiting).To(HaveLen(tt.waiting))
		})
	}
}

// TestRequestedMoves tests the annotation move-to.
func TestRequestedMoves(t *testing.T) {
	for _, tt := range []struct {
		name     string
		sessions []session
		workers  []worker
		moves    map[string]string
		declined map[string]placement.Decline
		waiting  []string
		again    time.Duration
	}{
		{
			name:     "the session moves to the worker",
			sessions: []session{s(1, "a", on("w1"), moveTo("w2"))}, workers: []worker{w("w1", 9), w("w2", 9)},
			moves: map[string]string{"a-0001": "w2"},
		},
		{
			name:     "the session is on the worker already",
			sessions: []session{s(1, "a", on("w2"), moveTo("w2"))}, workers: []worker{w("w1", 9), w("w2", 9)},
		},
		{
			name:     "a new session goes to the worker at once",
			sessions: []session{s(1, "a", moveTo("w2")), s(2, "a", on("w2")), s(3, "a", on("w2"))}, workers: []worker{w("w1", 9), w("w2", 9)},
			moves: map[string]string{"a-0001": "w2"},
		},
		{
			name:     "the sessions of draining and dead workers go to the worker even if its revision is older",
			sessions: []session{s(1, "a", on("w1"), moveTo("w2")), s(2, "a", lost, moveTo("w2"))},
			workers:  []worker{w("w1", 9, draining), w("w2", 9), w("w3", 9, revision(2))},
			moves:    map[string]string{"a-0001": "w2", "a-0002": "w2"},
		},
		{
			name:     "a session that is moving must arrive first",
			sessions: []session{s(1, "a", placedOn("w1"), moveTo("w2"))}, workers: []worker{w("w1", 9), w("w2", 9)},
		},
		{
			name:     "not twice within a minute",
			sessions: []session{s(1, "a", on("w1"), moveTo("w2"), placedAgo(40*time.Second))}, workers: []worker{w("w1", 9), w("w2", 9)},
			waiting: []string{"a-0001"}, again: 20 * time.Second,
		},
		{
			name:     "not without a login token",
			sessions: []session{s(1, "a", on("w1"), moveTo("w2"))}, workers: []worker{w("w1", 9), w("w2", 9, tokens(0))},
			waiting: []string{"a-0001"}, again: time.Second,
		},
		{
			name: "a worker that cannot take the session is declined, with the reason",
			sessions: []session{
				s(1, "a", on("w1"), moveTo("nobody")), s(2, "a", on("w1"), moveTo("quiet")), s(3, "a", on("w1"), moveTo("going")),
				s(4, "a", on("w1"), moveTo("blue")), s(5, "a", on("w1"), moveTo("full")), s(6, "a", on("full")),
				s(7, "a", on("w1"), moveTo("failing")),
			},
			workers: []worker{w("w1", 9), w("failing", 9, failing(0)), w("quiet", 9, silent), w("going", 9, draining), w("blue", 9, pool("blue")), w("full", 1)},
			declined: map[string]placement.Decline{
				"a-0001": placement.DeclinedUnknown, "a-0002": placement.DeclinedSilent, "a-0003": placement.DeclinedDraining,
				"a-0004": placement.DeclinedPool, "a-0005": placement.DeclinedFull, "a-0007": placement.DeclinedFailing,
			},
		},
		{
			name:     "a session that must move goes to another worker if it cannot go to the chosen one",
			sessions: []session{s(1, "a", on("w1"), moveTo("nobody"))}, workers: []worker{w("w1", 9, draining), w("w2", 9)},
			moves: map[string]string{"a-0001": "w2"},
		},
		{
			name:     "a session that is not wanted does not move",
			sessions: []session{s(1, "a", on("w1"), moveTo("w2"), unwanted)}, workers: []worker{w("w1", 9), w("w2", 9)},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			snapshot := placement.Snapshot{Now: noon, Sessions: tt.sessions, Workers: tt.workers}
			got := plan(snapshot)
			if tt.moves == nil {
				tt.moves = map[string]string{}
			}
			g.Expect(got.moves).To(Equal(tt.moves))
			g.Expect(got.unplaceable).To(BeEmpty())
			g.Expect(got.waiting).To(Equal(tt.waiting))
			g.Expect(got.again).To(Equal(tt.again))
			var declined map[string]placement.Decline
			for _, d := range placement.Make(snapshot).Declined {
				if declined == nil {
					declined = map[string]placement.Decline{}
				}
				declined[string(d.Session.UID)] = d.Why
			}
			g.Expect(declined).To(Equal(tt.declined))
		})
	}
}

func TestRebalance(t *testing.T) {
	// many returns sessions of a worker, each connected for as many hours as its number.
	many := func(n, first int, worker string, change ...func(*session)) []session {
		var out []session
		for i := range n {
			out = append(out, s(first+i, "a", append([]func(*session){on(worker), connected(time.Duration(first+i) * time.Hour)}, change...)...))
		}
		return out
	}
	const old = time.Hour
	for _, tt := range []struct {
		name     string
		sessions []session
		workers  []worker
		off      bool
		last     map[string]time.Time
		want     map[string]string
		again    time.Duration
	}{
		{
			name:     "only the session that has been connected the longest moves, to the worker with the lower load",
			sessions: many(6, 1, "w1"), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old))},
			want: map[string]string{"a-0006": "w2"},
		},
		{
			name:     "an idle session loses nothing, so it moves first",
			sessions: append(many(6, 1, "w1"), s(9, "a", on("w1"), idle)), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old))},
			want: map[string]string{"a-0009": "w2"},
		},
		{
			name:     "rebalancing is off",
			sessions: many(6, 1, "w1"), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old))}, off: true,
		},
		{
			name:     "no session moves to a worker that became live a short time ago",
			sessions: many(6, 1, "w1"), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(4*time.Minute))},
			again: time.Minute,
		},
		{
			name:     "a small difference is left",
			sessions: append(many(5, 1, "w1"), many(4, 11, "w2")...), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old))},
		},
		{
			name:     "no session moves if the move would only reverse the difference",
			sessions: many(1, 1, "w1"), workers: []worker{w("w1", 3, liveFor(old)), w("w2", 2, liveFor(old))},
		},
		{
			name:     "the relative load counts",
			sessions: append(many(2, 1, "small"), many(20, 11, "big")...), workers: []worker{w("small", 4, liveFor(old)), w("big", 100, liveFor(old))},
			want: map[string]string{"a-0002": "big"},
		},
		{
			name:     "not before the interval since the last move is over",
			sessions: many(6, 1, "w1"), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old))},
			last: map[string]time.Time{v1alpha1.DefaultPool: noon.Add(-7 * time.Second)}, again: 3 * time.Second,
		},
		{
			name:     "not while another session is moving",
			sessions: append(many(6, 1, "w1"), s(9, "a", placedOn("w2"), heldBy("w1"))), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old))},
		},
		{
			name:     "not while a worker drains, even if it has no sessions any more",
			sessions: many(6, 1, "w1"), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old)), w("w3", 10, draining)},
		},
		{
			name:     "not while a silent worker holds a session",
			sessions: append(many(6, 1, "w1"), s(9, "a", on("w3"))), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old)), w("w3", 10, silent)},
		},
		{
			name:     "not while a session is placed or failed over",
			sessions: append(many(6, 1, "w1"), s(9, "a", placedOn("dead"), lost), s(10, "a")), workers: []worker{w("w1", 20, liveFor(old)), w("w2", 10, liveFor(old))},
			want: map[string]string{"a-0009": "w2", "a-0010": "w2"},
		},
		{
			name:     "not during a rollout",
			sessions: many(6, 1, "w1"), workers: []worker{w("w1", 10, revision(2), liveFor(old)), w("w2", 10, revision(2), liveFor(old)), w("w3", 10, liveFor(old))},
		},
		{
			name:     "another pool does not matter",
			sessions: append(many(6, 1, "w1"), s(9, "b")), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old)), w("w3", 0, pool("blue"))},
			want: map[string]string{"a-0006": "w2"},
		},
		{
			name:     "sessions whose worker a person chose do not move, nor those that pair or reconnect",
			sessions: append(many(3, 1, "w1", moveTo("w1")), s(8, "a", on("w1")), s(9, "a", on("w1"), unpaired)), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old))},
		},
		{
			name:     "if no session of the first worker may move, one of the next worker moves",
			sessions: append(many(9, 1, "w1", moveTo("w1")), many(5, 11, "w2")...),
			workers:  []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old)), w("w3", 10, liveFor(old))},
			want:     map[string]string{"a-0015": "w3"},
		},
		{
			name:     "not without a login token",
			sessions: many(6, 1, "w1"), workers: []worker{w("w1", 10, liveFor(old)), w("w2", 10, liveFor(old), tokens(0))},
			again: 10 * time.Second,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			snapshot := placement.Snapshot{
				Now: noon, Sessions: tt.sessions, Workers: tt.workers, Namespaces: map[string]placement.Namespace{"b": {Pool: "blue"}},
				Rebalance: &placement.Rebalance{Threshold: 0.1, MinAge: 5 * time.Minute, Interval: 10 * time.Second, Last: tt.last},
			}
			if tt.off {
				snapshot.Rebalance = nil
			}
			got := plan(snapshot)
			if tt.want == nil {
				tt.want = map[string]string{}
			}
			g.Expect(got.moves).To(Equal(tt.want))
			g.Expect(got.again).To(Equal(tt.again))
		})
	}
}

// TestRebalanceEnds rebalances random loads until no session moves any more, and checks
// each move.
func TestRebalanceEnds(t *testing.T) {
	for seed := range uint64(100) {
		g, r, note := NewWithT(t), rand.New(rand.NewPCG(seed, 11)), fmt.Sprintf("seed %d", seed)
		snapshot := placement.Snapshot{Now: noon, Rebalance: &placement.Rebalance{Threshold: 0.1, MinAge: time.Minute, Interval: 10 * time.Second, Last: map[string]time.Time{}}}
		for n := range 2 + r.IntN(4) {
			snapshot.Workers = append(snapshot.Workers, w(fmt.Sprintf("w%d", n), 20+r.IntN(100), liveFor(time.Hour)))
		}
		for n := range r.IntN(60) {
			one := s(n, "a", on(snapshot.Workers[r.IntN(2)].Name), connected(time.Duration(1+r.IntN(1000))*time.Minute))
			one.Idle = r.IntN(5) == 0
			snapshot.Sessions = append(snapshot.Sessions, one)
		}
		moves := 0
		for {
			p := placement.Make(snapshot)
			if len(p.Moves) == 0 && p.Again.IsZero() {
				break
			}
			g.Expect(len(p.Moves)).To(BeNumerically("<=", 1), note+": one at a time")
			for _, m := range p.Moves {
				s := m.Session
				s.Worker, s.HeldBy, s.Connected = m.To, m.To, snapshot.Now
				snapshot.Rebalance.Last[v1alpha1.DefaultPool] = snapshot.Now
				g.Expect(m.Cause).To(Equal(placement.Rebalanced), note)
			}
			if moves += len(p.Moves); moves > len(snapshot.Sessions) {
				t.Fatalf("%s: sessions move endlessly", note)
			}
			if snapshot.Now = snapshot.Now.Add(time.Second); !p.Again.IsZero() {
				snapshot.Now = p.Again
			}
		}
		loads := map[string]float64{}
		for _, w := range snapshot.Workers {
			loads[w.Name] = 0
		}
		for _, s := range snapshot.Sessions {
			loads[s.Worker]++
		}
		for _, w := range snapshot.Workers {
			loads[w.Name] /= float64(w.Capacity)
		}
		sorted := slices.Sorted(maps.Values(loads))
		g.Expect(sorted[len(sorted)-1]-sorted[0]).To(BeNumerically("<=", 0.1+1e-9), note)
	}
}

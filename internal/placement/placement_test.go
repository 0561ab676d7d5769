package placement_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

type (
	session = placement.Session
	worker  = placement.Worker
)

// s returns a session that needs a worker. A session with a smaller number is older.
func s(n int, namespace string, change ...func(*session)) session {
	out := session{
		UID: types.UID(fmt.Sprintf("%s-%04d", namespace, n)), Namespace: namespace, Wanted: true, Paired: true,
		Created: noon.Add(time.Duration(n) * time.Second),
	}
	for _, c := range change {
		c(&out)
	}
	return out
}

func on(worker string) func(*session) {
	return func(s *session) { s.Worker, s.HeldBy = worker, worker }
}

func placedOn(worker string) func(*session) { return func(s *session) { s.Worker = worker } }
func heldBy(worker string) func(*session)   { return func(s *session) { s.HeldBy = worker } }
func lost(s *session)                       { s.Lost = true }
func unpaired(s *session)                   { s.Paired = false }
func unwanted(s *session)                   { s.Wanted = false }
func urgent(s *session)                     { s.Urgent = true }

func since(ago time.Duration) func(*session) {
	return func(s *session) { s.Since = noon.Add(-ago) }
}

// w returns a live worker of the default pool.
func w(name string, capacity int, change ...func(*worker)) worker {
	out := worker{Name: name, Pool: v1alpha1.DefaultPool, Revision: 1, Capacity: capacity, Tokens: 200, Live: true}
	for _, c := range change {
		c(&out)
	}
	return out
}

func revision(n int64) func(*worker) { return func(w *worker) { w.Revision = n } }
func tokens(n int) func(*worker)     { return func(w *worker) { w.Tokens = n } }
func pool(name string) func(*worker) { return func(w *worker) { w.Pool = name } }
func draining(w *worker)             { w.Draining = true }
func silent(w *worker)               { w.Live = false }
func late(w *worker)                 { w.Late = true }
func unconnected(s *session)         { s.Unconnected = true }

// failing makes a worker report, for that time, that it cannot reach its database or WhatsApp.
func failing(ago time.Duration) func(*worker) {
	return func(w *worker) { w.Failing, w.FailingSince = true, noon.Add(-ago) }
}

// result is a plan in a form for tables: session → worker, session → reason.
type result struct {
	moves       map[string]string
	unplaceable map[string]string
	waiting     []string
	again       time.Duration
}

func plan(snapshot placement.Snapshot) result {
	p := placement.Make(snapshot)
	out := result{moves: map[string]string{}, unplaceable: map[string]string{}}
	name := func(s *session) string { return string(s.UID) }
	for _, m := range p.Moves {
		out.moves[name(m.Session)] = m.To
		if m.Reason != "" {
			out.unplaceable[name(m.Session)] = m.Reason
		}
	}
	for _, r := range p.Unplaceable {
		out.unplaceable[name(r.Session)] = r.Reason
	}
	for _, s := range p.Waiting {
		out.waiting = append(out.waiting, name(s))
	}
	slices.Sort(out.waiting)
	if !p.Again.IsZero() {
		out.again = p.Again.Sub(snapshot.Now)
	}
	return out
}

func TestMake(t *testing.T) {
	tests := []struct {
		name       string
		sessions   []session
		workers    []worker
		namespaces map[string]placement.Namespace
		want       result
	}{
		{name: "nothing to do"},
		{
			name:     "a session without a worker gets one",
			sessions: []session{s(1, "a")},
			workers:  []worker{w("w1", 10)},
			want:     result{moves: map[string]string{"a-0001": "w1"}},
		},
		{
			name:     "the least relative load decides, not the number of sessions",
			sessions: []session{s(1, "a", on("small")), s(2, "a", on("big")), s(3, "a", on("big")), s(4, "a")},
			workers:  []worker{w("small", 2), w("big", 100)},
			want:     result{moves: map[string]string{"a-0004": "big"}},
		},
		{
			name:     "a live worker keeps its sessions, however unequal the load",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", on("w1")), s(3, "a", on("w1"))},
			workers:  []worker{w("w1", 4), w("w2", 4)},
		},
		{
			name:     "a worker whose capacity was lowered keeps its sessions and takes no more",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", on("w1")), s(3, "a")},
			workers:  []worker{w("w1", 1)},
			want:     result{unplaceable: map[string]string{"a-0003": v1alpha1.ReasonNoCapacity}},
		},
		{
			name:     "a session that is not wanted gets no worker",
			sessions: []session{s(1, "a", unwanted)},
			workers:  []worker{w("w1", 10)},
		},
		{
			name:     "a session that is not wanted uses capacity until its worker has released it",
			sessions: []session{s(1, "a", unwanted, heldBy("w1")), s(2, "a")},
			workers:  []worker{w("w1", 1)},
			want:     result{unplaceable: map[string]string{"a-0002": v1alpha1.ReasonNoCapacity}},
		},
		{
			name:     "a session that moves uses capacity of both workers",
			sessions: []session{s(1, "a", placedOn("w2"), heldBy("w1")), s(2, "a")},
			workers:  []worker{w("w1", 1), w("w2", 1)},
			want:     result{unplaceable: map[string]string{"a-0002": v1alpha1.ReasonNoCapacity}},
		},
		{
			name:     "the pool is full",
			sessions: []session{s(1, "a", on("w1")), s(2, "a")},
			workers:  []worker{w("w1", 1)},
			want:     result{unplaceable: map[string]string{"a-0002": v1alpha1.ReasonNoCapacity}},
		},
		{
			name:     "no worker at all",
			sessions: []session{s(1, "a")},
			want:     result{unplaceable: map[string]string{"a-0001": v1alpha1.ReasonNoWorkers}},
		},
		{
			name:     "only silent and draining workers",
			sessions: []session{s(1, "a")},
			workers:  []worker{w("w1", 10, silent), w("w2", 10, draining)},
			want:     result{unplaceable: map[string]string{"a-0001": v1alpha1.ReasonNoWorkers}},
		},
		{
			name:     "a session goes only to workers of its namespace's pool",
			sessions: []session{s(1, "a"), s(2, "b"), s(3, "c")},
			workers:  []worker{w("w1", 10), w("w2", 10, pool("blue"))},
			namespaces: map[string]placement.Namespace{
				"b": {Pool: "blue"}, "c": {Pool: "green"},
			},
			want: result{
				moves:       map[string]string{"a-0001": "w1", "b-0002": "w2"},
				unplaceable: map[string]string{"c-0003": v1alpha1.ReasonNoWorkers},
			},
		},
		{
			name:       "the sessions of a namespace whose pool was changed move there",
			sessions:   []session{s(1, "a", on("w1"))},
			workers:    []worker{w("w1", 10), w("w2", 10, pool("blue"))},
			namespaces: map[string]placement.Namespace{"a": {Pool: "blue"}},
			want:       result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:       "they stay connected while the new pool has no workers",
			sessions:   []session{s(1, "a", on("w1"))},
			workers:    []worker{w("w1", 10)},
			namespaces: map[string]placement.Namespace{"a": {Pool: "blue"}},
		},
		{
			name:     "a session whose worker is gone is placed elsewhere",
			sessions: []session{s(1, "a", placedOn("gone"))},
			workers:  []worker{w("w1", 10)},
			want:     result{moves: map[string]string{"a-0001": "w1"}},
		},
		{
			name:     "a session that its silent worker has not claimed is placed elsewhere",
			sessions: []session{s(1, "a", placedOn("w1"))},
			workers:  []worker{w("w1", 10, silent), w("w2", 10)},
			want:     result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:     "a session that a silent worker holds stays until the worker is declared dead",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", on("gone"))},
			workers:  []worker{w("w1", 10, silent), w("w2", 10)},
		},
		{
			name:     "a session whose worker is gone has none when there is no other",
			sessions: []session{s(1, "a", placedOn("gone"))},
			want: result{
				moves:       map[string]string{"a-0001": ""},
				unplaceable: map[string]string{"a-0001": v1alpha1.ReasonNoWorkers},
			},
		},
		{
			name:     "the sessions of a draining worker move",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", placedOn("w1"))},
			workers:  []worker{w("w1", 10, draining), w("w2", 10)},
			want:     result{moves: map[string]string{"a-0001": "w2", "a-0002": "w2"}},
		},
		{
			name:     "the sessions of a draining worker are released if no other can take them",
			sessions: []session{s(1, "a", on("w1"))},
			workers:  []worker{w("w1", 10, draining)},
			want: result{
				moves:       map[string]string{"a-0001": ""},
				unplaceable: map[string]string{"a-0001": v1alpha1.ReasonNoWorkers},
			},
		},
		{
			name:     "a wave of moves is no larger than the free login tokens",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", on("w1")), s(3, "a", on("w1"))},
			workers:  []worker{w("w1", 10, draining), w("w2", 10, tokens(2))},
			want: result{
				moves:   map[string]string{"a-0001": "w2", "a-0002": "w2"},
				waiting: []string{"a-0003"}, again: time.Second,
			},
		},
		{
			name: "sessions that have not arrived yet have used their tokens",
			sessions: []session{
				s(1, "a", on("w1")), s(2, "a", placedOn("w2"), heldBy("w1")), s(3, "a", placedOn("w2")),
			},
			workers: []worker{w("w1", 10, draining), w("w2", 10, tokens(2))},
			want:    result{waiting: []string{"a-0001"}, again: time.Second},
		},
		{
			name:     "the namespaces share a wave",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", on("w1")), s(3, "a", on("w1")), s(4, "b", on("w1"))},
			workers:  []worker{w("w1", 10, draining), w("w2", 10, tokens(2))},
			want: result{
				moves:   map[string]string{"a-0001": "w2", "b-0004": "w2"},
				waiting: []string{"a-0002", "a-0003"}, again: time.Second,
			},
		},
		{
			name:     "a new session does not wait for a token here: the worker paces logins",
			sessions: []session{s(1, "a")},
			workers:  []worker{w("w1", 10, tokens(0))},
			want:     result{moves: map[string]string{"a-0001": "w1"}},
		},
		{
			name:     "during a rollout sessions go to the newest revision only",
			sessions: []session{s(1, "a"), s(2, "a"), s(3, "a", on("old"))},
			workers:  []worker{w("old", 1000), w("new", 2, revision(2))},
			want:     result{moves: map[string]string{"a-0001": "new", "a-0002": "new"}},
		},
		{
			name:     "a session waits for the newest revision when it is full",
			sessions: []session{s(1, "a", on("new")), s(2, "a"), s(3, "a", since(45*time.Second))},
			workers:  []worker{w("old", 1000), w("new", 1, revision(2))},
			want:     result{waiting: []string{"a-0002", "a-0003"}, again: 15 * time.Second},
		},
		{
			name:     "after 60 s it goes to an older revision",
			sessions: []session{s(1, "a", on("new")), s(2, "a", since(time.Minute))},
			workers:  []worker{w("old", 1000), w("new", 1, revision(2))},
			want:     result{moves: map[string]string{"a-0002": "old"}},
		},
		{
			name:     "it does not wait when the older revisions are full too",
			sessions: []session{s(1, "a", on("new")), s(2, "a", on("old")), s(3, "a")},
			workers:  []worker{w("old", 1), w("new", 1, revision(2))},
			want:     result{unplaceable: map[string]string{"a-0003": v1alpha1.ReasonNoCapacity}},
		},
		{
			name:     "a move that waits for a token never goes to an older revision",
			sessions: []session{s(1, "a", on("w1"), since(time.Hour))},
			workers:  []worker{w("w1", 10, draining), w("old", 1000), w("new", 10, revision(2), tokens(0))},
			want:     result{waiting: []string{"a-0001"}, again: time.Second},
		},
		{
			name:     "the session of a draining worker waits for the newest revision too",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", on("new"))},
			workers:  []worker{w("w1", 10, draining), w("old", 1000), w("new", 1, revision(2))},
			want:     result{waiting: []string{"a-0001"}, again: 15 * time.Second},
		},
		{
			name:     "after 15 s, before the draining worker releases it, it goes to an older revision",
			sessions: []session{s(1, "a", on("w1"), since(15*time.Second)), s(2, "a", on("new"))},
			workers:  []worker{w("w1", 10, draining), w("old", 1000), w("new", 1, revision(2))},
			want:     result{moves: map[string]string{"a-0001": "old"}},
		},
		{
			name:     "a session without a device needs no login token",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", placedOn("w2"), unpaired), s(3, "a", on("w1"), unpaired), s(4, "a", on("w1"), unpaired)},
			workers:  []worker{w("w1", 10, draining), w("w2", 10, tokens(1))},
			want:     result{moves: map[string]string{"a-0001": "w2", "a-0003": "w2", "a-0004": "w2"}},
		},
		{
			name:     "the namespaces share the capacity",
			sessions: []session{s(1, "a"), s(2, "a"), s(3, "a"), s(4, "b")},
			workers:  []worker{w("w1", 2)},
			want: result{
				moves: map[string]string{"a-0001": "w1", "b-0004": "w1"},
				unplaceable: map[string]string{
					"a-0002": v1alpha1.ReasonNoCapacity, "a-0003": v1alpha1.ReasonNoCapacity,
				},
			},
		},
		{
			name:     "the namespace with the fewest placed sessions comes first",
			sessions: []session{s(1, "a", on("w1")), s(2, "a"), s(3, "b")},
			workers:  []worker{w("w1", 2)},
			want: result{
				moves:       map[string]string{"b-0003": "w1"},
				unplaceable: map[string]string{"a-0002": v1alpha1.ReasonNoCapacity},
			},
		},
		{
			name:     "within a namespace a session that had a worker comes first, then the oldest",
			sessions: []session{s(1, "a"), s(2, "a"), s(3, "a", placedOn("gone"))},
			workers:  []worker{w("w1", 2)},
			want: result{
				moves:       map[string]string{"a-0003": "w1", "a-0001": "w1"},
				unplaceable: map[string]string{"a-0002": v1alpha1.ReasonNoCapacity},
			},
		},
		{
			name:       "the limit of a namespace",
			sessions:   []session{s(1, "a", on("w1")), s(2, "a"), s(3, "a"), s(4, "b")},
			workers:    []worker{w("w1", 10)},
			namespaces: map[string]placement.Namespace{"a": {MaxSessions: ptr.To(2)}},
			want: result{
				moves:       map[string]string{"a-0002": "w1", "b-0004": "w1"},
				unplaceable: map[string]string{"a-0003": v1alpha1.ReasonTooManySessions},
			},
		},
		{
			name:       "a lowered limit removes no placed session from its worker",
			sessions:   []session{s(1, "a", on("w1")), s(2, "a", on("w1"))},
			workers:    []worker{w("w1", 10)},
			namespaces: map[string]placement.Namespace{"a": {MaxSessions: ptr.To(0)}},
		},
		{
			name:       "a deleted session is placed first and beyond the limit, so that it can log out",
			sessions:   []session{s(1, "a"), s(2, "a", urgent)},
			workers:    []worker{w("w1", 1)},
			namespaces: map[string]placement.Namespace{"a": {MaxSessions: ptr.To(1)}},
			want: result{
				moves:       map[string]string{"a-0002": "w1"},
				unplaceable: map[string]string{"a-0001": v1alpha1.ReasonTooManySessions},
			},
		},
		{
			name:     "the sessions of a dead worker come before all others",
			sessions: []session{s(1, "a", urgent), s(2, "b", placedOn("dead"), lost)},
			workers:  []worker{w("w1", 1), w("dead", 10, silent)},
			want: result{
				moves:       map[string]string{"b-0002": "w1"},
				unplaceable: map[string]string{"a-0001": v1alpha1.ReasonNoCapacity},
			},
		},
		{
			name:     "the sessions of a dead worker wait neither for tokens nor for the newest revision",
			sessions: []session{s(1, "a", on("new")), s(2, "a", placedOn("dead"), lost)},
			workers:  []worker{w("old", 10, tokens(0)), w("new", 1, revision(2))},
			want:     result{moves: map[string]string{"a-0002": "old"}},
		},
		{
			name:     "a session that was moving from a dead worker continues to the same worker",
			sessions: []session{s(1, "a", placedOn("w1"), lost)},
			workers:  []worker{w("w1", 10), w("w2", 10)},
			want:     result{moves: map[string]string{"a-0001": "w1"}},
		},
		{
			name:     "a session that was moving from a dead worker to a draining one goes elsewhere at once",
			sessions: []session{s(1, "a", placedOn("w1"), lost)},
			workers:  []worker{w("w1", 10, draining), w("w2", 10)},
			want:     result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:     "the session of a dead worker loses its holder even if no other worker can take it",
			sessions: []session{s(1, "a", placedOn("dead"), lost), s(2, "a", lost)},
			want: result{
				moves:       map[string]string{"a-0001": ""},
				unplaceable: map[string]string{"a-0001": v1alpha1.ReasonNoWorkers, "a-0002": v1alpha1.ReasonNoWorkers},
			},
		},
		{
			name:     "the session of a dead worker loses its holder even if it is not wanted",
			sessions: []session{s(1, "a", placedOn("dead"), lost, unwanted)},
			workers:  []worker{w("w1", 10)},
			want:     result{moves: map[string]string{"a-0001": ""}},
		},
		{
			name:       "a lowered limit does not apply to the sessions of a dead worker",
			sessions:   []session{s(1, "a", placedOn("dead"), lost)},
			workers:    []worker{w("w1", 10)},
			namespaces: map[string]placement.Namespace{"a": {MaxSessions: ptr.To(0)}},
			want:       result{moves: map[string]string{"a-0001": "w1"}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			got := plan(placement.Snapshot{Now: noon, Sessions: tt.sessions, Workers: tt.workers, Namespaces: tt.namespaces})
			if tt.want.moves == nil {
				tt.want.moves = map[string]string{}
			}
			if tt.want.unplaceable == nil {
				tt.want.unplaceable = map[string]string{}
			}
			g.Expect(got).To(Equal(tt.want))
		})
	}
}

// A failing worker reports that it cannot reach its database or WhatsApp.
func TestFailingWorkers(t *testing.T) {
	const minute = time.Minute
	for _, tt := range []struct {
		name       string
		sessions   []session
		workers    []worker
		wave       int
		namespaces map[string]placement.Namespace
		rebalance  bool
		want       result
	}{
		{
			name:     "it gets no new session while another worker has room, however high its load",
			sessions: []session{s(1, "a", on("w2")), s(2, "a")},
			workers:  []worker{w("w1", 10, failing(0)), w("w2", 2)},
			want:     result{moves: map[string]string{"a-0002": "w2"}},
		},
		{
			name:     "it gets new sessions when no other worker has room",
			sessions: []session{s(1, "a", on("w2")), s(2, "a")},
			workers:  []worker{w("w1", 10, failing(time.Hour)), w("w2", 1)},
			want:     result{moves: map[string]string{"a-0002": "w1"}},
		},
		{
			name:     "it gets them at once: nothing waits for a failing newest revision",
			sessions: []session{s(1, "a", on("w2")), s(2, "a")},
			workers:  []worker{w("w1", 10, failing(time.Hour), revision(2)), w("w2", 1)},
			want:     result{moves: map[string]string{"a-0002": "w1"}},
		},
		{
			name:     "a failing new revision gets no sessions, and no session waits for it",
			sessions: []session{s(1, "a"), s(2, "a", on("old1"))},
			workers:  []worker{w("new", 10, failing(0), revision(2)), w("old1", 10, draining), w("old2", 10)},
			want:     result{moves: map[string]string{"a-0001": "old2", "a-0002": "old2"}},
		},
		{
			name:     "when all are failing, a new session goes to the newest revision",
			sessions: []session{s(1, "a")},
			workers:  []worker{w("new", 10, failing(0), revision(2)), w("old", 10, failing(0))},
			want:     result{moves: map[string]string{"a-0001": "new"}},
		},
		{
			name:     "the sessions of a dead worker go to workers that are not failing",
			sessions: []session{s(1, "a", placedOn("dead"), lost)},
			workers:  []worker{w("w1", 10, failing(0)), w("w2", 10), w("dead", 10, silent)},
			want:     result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:     "its sessions stay for a minute",
			sessions: []session{s(1, "a", on("w1"), unconnected)},
			workers:  []worker{w("w1", 10, failing(45*time.Second)), w("w2", 10)},
			want:     result{again: 15 * time.Second},
		},
		{
			name: "after a minute its sessions without a connection move, also those that it has not claimed",
			sessions: []session{
				s(1, "a", on("w1"), unconnected), s(2, "a", on("w1"), connected(time.Hour)), s(3, "a", on("w1"), idle),
				s(4, "a", placedOn("w1"), unconnected),
			},
			workers: []worker{w("w1", 10, failing(minute)), w("w2", 10)},
			want:    result{moves: map[string]string{"a-0001": "w2", "a-0004": "w2"}},
		},
		{
			name:     "a session that another worker still holds does not move again before it has arrived",
			sessions: []session{s(1, "a", placedOn("w1"), heldBy("w2"), unconnected)},
			workers:  []worker{w("w1", 10, failing(minute)), w("w2", 10)},
		},
		{
			name:     "its sessions move in waves",
			sessions: []session{s(1, "a", on("w1"), unconnected), s(2, "a", on("w1"), unconnected), s(3, "b", on("w1"), unconnected)},
			workers:  []worker{w("w1", 10, failing(minute)), w("w2", 10)}, wave: 2,
			want: result{moves: map[string]string{"a-0001": "w2", "b-0003": "w2"}, waiting: []string{"a-0002"}, again: time.Second},
		},
		{
			name:     "its sessions move while there is room",
			sessions: []session{s(1, "a", on("w1"), unconnected), s(2, "a", on("w1"), unconnected)},
			workers:  []worker{w("w1", 10, failing(minute)), w("w2", 1)},
			want:     result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:     "no session moves when all workers are failing",
			sessions: []session{s(1, "a", on("w1"), unconnected), s(2, "a", on("w2"), unconnected)},
			workers:  []worker{w("w1", 10, failing(time.Hour)), w("w2", 10, failing(minute))},
		},
		{
			name:     "no session moves when the others are draining, silent or in another pool",
			sessions: []session{s(1, "a", on("w1"), unconnected)},
			workers:  []worker{w("w1", 10, failing(time.Hour)), w("w2", 10, draining), w("w3", 10, silent), w("w4", 10, pool("blue"))},
		},
		{
			name:     "the sessions of a draining worker go to a failing one if there is no other",
			sessions: []session{s(1, "a", on("w1"))},
			workers:  []worker{w("w1", 10, draining), w("w2", 10, failing(time.Hour))},
			want:     result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:     "its sessions move even if a person chose it for them",
			sessions: []session{s(1, "a", on("w1"), unconnected, moveTo("w1"))},
			workers:  []worker{w("w1", 10, failing(minute)), w("w2", 10)},
			want:     result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:     "no session is rebalanced while a worker is failing",
			sessions: []session{s(1, "a", on("w1"), connected(time.Hour)), s(2, "a", on("w1"), connected(time.Hour))},
			workers:  []worker{w("w1", 10, liveFor(time.Hour)), w("w2", 10, liveFor(time.Hour)), w("w3", 10, liveFor(time.Hour), failing(0))}, rebalance: true,
		},
		{
			name:     "no session is rebalanced between failing workers",
			sessions: []session{s(1, "a", on("w1"), connected(time.Hour)), s(2, "a", on("w1"), connected(time.Hour))},
			workers:  []worker{w("w1", 10, liveFor(time.Hour), failing(0)), w("w2", 10, liveFor(time.Hour), failing(0))}, rebalance: true,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			snapshot := placement.Snapshot{Now: noon, Sessions: tt.sessions, Workers: tt.workers, Namespaces: tt.namespaces, Wave: tt.wave}
			if tt.rebalance {
				snapshot.Rebalance = &placement.Rebalance{Threshold: 0.1, MinAge: time.Minute, Interval: time.Second}
			}
			if tt.want.moves == nil {
				tt.want.moves = map[string]string{}
			}
			tt.want.unplaceable = map[string]string{}
			g.Expect(plan(snapshot)).To(Equal(tt.want))
		})
	}
}

// TestLateWorkers: of workers that die together, none gets the sessions of another.
func TestLateWorkers(t *testing.T) {
	for _, tt := range []struct {
		name      string
		sessions  []session
		workers   []worker
		rebalance bool
		want      result
	}{
		{
			name:     "the sessions of a dead worker go to another one, however high its load",
			sessions: []session{s(1, "a", on("w2")), s(2, "a", placedOn("dead"), lost)},
			workers:  []worker{w("w1", 10, late), w("w2", 2), w("dead", 10, silent)},
			want:     result{moves: map[string]string{"a-0002": "w2"}},
		},
		{
			name:     "they wait if no other worker has room",
			sessions: []session{s(1, "a", on("w2")), s(2, "a", placedOn("dead"), lost)},
			workers:  []worker{w("w1", 10, late), w("w2", 1), w("dead", 10, silent)},
			want:     result{waiting: []string{"a-0002"}, again: placement.NewestTimeout},
		},
		{
			name:     "a session that has waited for long does not make the next plan due at once",
			sessions: []session{s(1, "a", since(time.Hour)), s(2, "a", on("leaving"), since(time.Hour))},
			workers:  []worker{w("w1", 10, late), w("leaving", 10, draining)},
			want:     result{waiting: []string{"a-0001", "a-0002"}, again: time.Second},
		},
		{
			name:     "a late worker that is full is no reason to wait",
			sessions: []session{s(1, "a", on("w1")), s(2, "a")},
			workers:  []worker{w("w1", 1, late)},
			want:     result{unplaceable: map[string]string{"a-0002": v1alpha1.ReasonNoCapacity}},
		},
		{
			name:     "during a rollout sessions do not go back to the old revision because of it",
			sessions: []session{s(1, "a", on("old1"))},
			workers:  []worker{w("new", 10, late, revision(2)), w("old1", 10, draining), w("old2", 10)},
			want:     result{waiting: []string{"a-0001"}, again: 15 * time.Second},
		},
		{
			name:     "the sessions of a draining worker are not withdrawn",
			sessions: []session{s(1, "a", on("w1"))},
			workers:  []worker{w("w1", 10, draining), w("w2", 10, late)},
			want:     result{waiting: []string{"a-0001"}, again: 15 * time.Second},
		},
		{
			name:     "it keeps what it has",
			sessions: []session{s(1, "a", on("w1")), s(2, "a", placedOn("w1")), s(3, "a", placedOn("w1"), lost)},
			workers:  []worker{w("w1", 10, late), w("w2", 10)},
			want:     result{moves: map[string]string{"a-0003": "w1"}},
		},
		{
			name:     "a session that waits for the worker that a person chose goes to another one",
			sessions: []session{s(1, "a", moveTo("w1"))},
			workers:  []worker{w("w1", 10, late), w("w2", 10)},
			want:     result{moves: map[string]string{"a-0001": "w2"}},
		},
		{
			name:     "a connected session waits for the worker that a person chose",
			sessions: []session{s(1, "a", on("w2"), moveTo("w1"))},
			workers:  []worker{w("w1", 10, late), w("w2", 10)},
			want:     result{waiting: []string{"a-0001"}, again: time.Second},
		},
		{
			name:     "the sessions of a failing worker do not go to it",
			sessions: []session{s(1, "a", on("w1"), unconnected)},
			workers:  []worker{w("w1", 10, failing(time.Hour)), w("w2", 10, late)},
			want:     result{},
		},
		{
			name:      "nothing is rebalanced",
			sessions:  []session{s(1, "a", on("w1")), s(2, "a", on("w1")), s(3, "a", on("w1"))},
			workers:   []worker{w("w1", 4), w("w2", 4), w("w3", 4, late)},
			rebalance: true,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			snapshot := placement.Snapshot{Now: noon, Sessions: tt.sessions, Workers: tt.workers}
			if tt.rebalance {
				snapshot.Rebalance = &placement.Rebalance{Threshold: 0.1}
			}
			if tt.want.moves == nil {
				tt.want.moves = map[string]string{}
			}
			if tt.want.unplaceable == nil {
				tt.want.unplaceable = map[string]string{}
			}
			NewWithT(t).Expect(plan(snapshot)).To(Equal(tt.want))
		})
	}
}

func TestMisplacedSessions(t *testing.T) {
	g := NewWithT(t)
	snapshot := placement.Snapshot{
		Now: noon, Sessions: []session{s(1, "a", on("w1")), s(2, "b", on("w1")), s(3, "c", on("w1"))},
		Workers:    []worker{w("w1", 10), w("full", 0, pool("blue"))},
		Namespaces: map[string]placement.Namespace{"a": {Pool: "blue"}, "b": {Pool: "blu"}},
	}
	reasons := map[string]string{}
	for _, m := range placement.Make(snapshot).Misplaced {
		reasons[string(m.Session.UID)] = m.Reason
	}
	g.Expect(reasons).To(Equal(map[string]string{"a-0001": v1alpha1.ReasonNoCapacity, "b-0002": v1alpha1.ReasonNoWorkers}))
}

func TestANewPoolFillsEvenly(t *testing.T) {
	g := NewWithT(t)
	snapshot := newSnapshot(1000, 10, 7)
	loads := map[string]int{}
	for _, m := range placement.Make(snapshot).Moves {
		loads[m.To]++
	}
	for name := range maps.Keys(loads) {
		g.Expect(loads[name]).To(Equal(100), name)
	}
	g.Expect(loads).To(HaveLen(10))
}

func TestSessionsSpreadOverEqualWorkers(t *testing.T) {
	g := NewWithT(t)
	chosen := map[string]int{}
	for n := range 400 {
		p := placement.Make(placement.Snapshot{Now: noon, Sessions: []session{s(n, "a")}, Workers: []worker{w("w1", 9), w("w2", 9), w("w3", 9), w("w4", 9)}})
		chosen[p.Moves[0].To]++
	}
	for _, name := range []string{"w1", "w2", "w3", "w4"} {
		g.Expect(chosen[name]).To(BeNumerically("~", 100, 40), name)
	}
}

// TestRandomPlans checks what must be true of every plan with random sessions and
// workers, and carries the plans out until no session moves any more.
func TestRandomPlans(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 7))
		snapshot := randomSnapshot(r)
		check(t, seed, r, snapshot)
		for round := 0; ; round++ {
			p := placement.Make(snapshot)
			if len(p.Moves) == 0 {
				break
			}
			if round > 200 {
				t.Fatalf("seed %d: sessions still move after %d rounds", seed, round)
			}
			for _, m := range p.Moves { // the workers release and claim at once
				s := m.Session
				s.Worker, s.HeldBy, s.Lost = m.To, m.To, false
			}
		}
	}
}

func check(t *testing.T, seed uint64, r *rand.Rand, snapshot placement.Snapshot) {
	t.Helper()
	g := NewWithT(t)
	note := fmt.Sprintf("seed %d", seed)
	p := placement.Make(snapshot)

	shuffled := snapshot
	shuffled.Sessions, shuffled.Workers = slices.Clone(snapshot.Sessions), slices.Clone(snapshot.Workers)
	r.Shuffle(len(shuffled.Sessions), func(i, j int) {
		shuffled.Sessions[i], shuffled.Sessions[j] = shuffled.Sessions[j], shuffled.Sessions[i]
	})
	r.Shuffle(len(shuffled.Workers), func(i, j int) {
		shuffled.Workers[i], shuffled.Workers[j] = shuffled.Workers[j], shuffled.Workers[i]
	})
	g.Expect(plan(shuffled)).To(Equal(plan(snapshot)), note+": the order of the input must not matter")

	workers, load, before := map[string]worker{}, map[string]int{}, map[string]int{}
	for _, w := range snapshot.Workers {
		workers[w.Name] = w
	}
	for _, s := range snapshot.Sessions {
		load[s.Worker]++
		if s.HeldBy != s.Worker {
			load[s.HeldBy]++
		}
	}
	maps.Copy(before, load)
	seen := map[types.UID]bool{}
	for _, m := range p.Moves {
		s := *m.Session
		g.Expect(seen[s.UID]).To(BeFalse(), note+": one decision for a session")
		seen[s.UID] = true
		if !s.Wanted {
			g.Expect(s.Lost && m == placement.Move{Session: m.Session}).To(BeTrue(), note+": only its dead holder is cleared")
			continue
		}
		g.Expect(m.To == "").To(Equal(m.Reason != ""), note)
		from, known := workers[s.Worker]
		wanted := snapshot.Namespaces[s.Namespace].Pool
		if wanted == "" {
			wanted = v1alpha1.DefaultPool
		}
		if m.To == s.Worker {
			g.Expect(s.Lost && from.Live && !from.Draining && from.Pool == wanted).To(BeTrue(), note+": a move changes the worker or clears a dead holder")
			continue
		}
		if m.Cause == placement.Failing {
			g.Expect(from.Failing && s.Unconnected && !noon.Before(from.FailingSince.Add(placement.FailingTimeout)) && !workers[m.To].Failing).To(BeTrue(), note)
		} else if known && from.Live && !from.Draining {
			g.Expect(from.Pool).NotTo(Equal(wanted), note+": a live worker keeps its sessions")
		}
		if s.Worker != "" && s.HeldBy == s.Worker {
			g.Expect(known && from.Live).To(BeTrue(), note+": a session that a silent worker holds stays")
		}
		if m.To == "" {
			continue
		}
		to := workers[m.To]
		g.Expect(to.Live && !to.Draining && !to.Late).To(BeTrue(), note)
		g.Expect(to.Pool).To(Equal(wanted), note)
		load[m.To]++
	}
	for _, w := range snapshot.Workers {
		if load[w.Name] > before[w.Name] {
			g.Expect(load[w.Name]).To(BeNumerically("<=", w.Capacity), note+": never over capacity")
		}
	}
	for _, unplaceable := range p.Unplaceable {
		g.Expect(seen[unplaceable.Session.UID]).To(BeFalse(), note)
		seen[unplaceable.Session.UID] = true
	}
	for _, s := range p.Waiting {
		g.Expect(seen[s.UID]).To(BeFalse(), note)
		seen[s.UID] = true
		g.Expect(p.Again.After(noon)).To(BeTrue(), note)
	}
	for _, s := range snapshot.Sessions {
		g.Expect(seen[s.UID] || !s.Lost).To(BeTrue(), note+": each lost session is in the plan")
	}
}

func randomSnapshot(r *rand.Rand) placement.Snapshot {
	out := placement.Snapshot{Now: noon, Namespaces: map[string]placement.Namespace{
		"b": {Pool: "blue"}, "c": {MaxSessions: ptr.To(r.IntN(6))}, "d": {Pool: "nobody"},
	}}
	for n := range 1 + r.IntN(7) {
		out.Workers = append(out.Workers, worker{
			Name: fmt.Sprintf("w%d", n), Pool: []string{v1alpha1.DefaultPool, "blue"}[r.IntN(2)], Revision: int64(r.IntN(2)),
			Capacity: r.IntN(8), Tokens: 1 + r.IntN(4), Draining: r.IntN(4) == 0, Live: r.IntN(5) > 0, Late: r.IntN(5) == 0,
			Failing: r.IntN(4) == 0, FailingSince: noon.Add(-time.Duration(r.IntN(120)) * time.Second),
		})
	}
	randomWorker := func() string {
		return []string{"", "gone", out.Workers[r.IntN(len(out.Workers))].Name}[r.IntN(3)]
	}
	for n := range r.IntN(30) {
		one := s(n, []string{"a", "b", "c", "d"}[r.IntN(4)])
		one.Wanted, one.Urgent, one.Unconnected = r.IntN(5) > 0, r.IntN(8) == 0, r.IntN(2) == 0
		one.Worker = randomWorker()
		if one.HeldBy = one.Worker; r.IntN(3) == 0 {
			one.HeldBy = randomWorker()
		}
		if one.Lost = r.IntN(5) == 0; one.Lost {
			one.HeldBy = ""
		}
		if r.IntN(2) == 0 {
			one.Since = noon.Add(-time.Duration(r.IntN(120)) * time.Second)
		}
		out.Sessions = append(out.Sessions, one)
	}
	return out
}

// newSnapshot returns new sessions, spread over the namespaces, and empty workers with
// room for all.
func newSnapshot(sessions, workers, namespaces int) placement.Snapshot {
	out := placement.Snapshot{Now: noon}
	for n := range sessions {
		out.Sessions = append(out.Sessions, s(n, fmt.Sprintf("ns-%d", n%namespaces)))
	}
	for n := range workers {
		out.Workers = append(out.Workers, w(fmt.Sprintf("w%03d", n), 2*sessions/workers))
	}
	return out
}

// BenchmarkPlan measures plans for 10,000 sessions on 100 workers, which must take less
// than 50 ms: all sessions new, none new, ten workers dead, ten draining, and unequal
// loads.
func BenchmarkPlan(b *testing.B) {
	fresh := newSnapshot(10_000, 100, 50)
	settled := func() placement.Snapshot {
		out := newSnapshot(10_000, 100, 50)
		for _, m := range placement.Make(out).Moves {
			on(m.To)(m.Session)
			m.Session.Connected = noon.Add(-time.Hour)
		}
		out.Rebalance = &placement.Rebalance{Threshold: 0.1, Interval: 10 * time.Second}
		return out
	}
	of := func(out placement.Snapshot, worker func(*worker), session func(*session)) placement.Snapshot {
		chosen := map[string]bool{}
		for i := range out.Workers[:10] {
			worker(&out.Workers[i])
			chosen[out.Workers[i].Name] = true
		}
		for i := range out.Sessions {
			if chosen[out.Sessions[i].Worker] {
				session(&out.Sessions[i])
			}
		}
		return out
	}
	unchanged := func(*session) {}
	for _, row := range []struct {
		name     string
		snapshot placement.Snapshot
		moves    int
	}{
		{"fresh", fresh, 10_000},
		{"settled", settled(), 0},
		{"dead", of(settled(), silent, func(s *session) { s.HeldBy, s.Lost = "", true }), 1000},
		{"draining", of(settled(), draining, unchanged), 1000},
		{"unequal", of(settled(), func(w *worker) { w.Capacity *= 10 }, unchanged), 1},
	} {
		b.Run(row.name, func(b *testing.B) {
			for b.Loop() {
				if p := placement.Make(row.snapshot); len(p.Moves) != row.moves {
					b.Fatalf("%d sessions move, not %d", len(p.Moves), row.moves)
				}
			}
		})
	}
}

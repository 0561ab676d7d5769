package store

import (
	"sync"

	utilcache "k8s.io/apimachinery/pkg/util/cache"
)

// moment is a position in the order of a memory's events. Clocks cannot reliably say
// which of two events came first.
type moment uint64

// memory is a process's cache of the map between phone numbers and LIDs:
// a limited number of answers, each for a limited time. All sessions share it,
// but a session that was moved here may have changed the map in another process: its
// device uses only answers that were read after it was opened.
//
// The cached answer for a user is never older than an earlier answer, because the
// receiver of that answer may have moved keys because of it. Several queries may run at
// the same time, and it is unknown which answer is the later one: if they differ, or the
// map is changed meanwhile, none is cached, which costs one more query.
type memory struct {
	known *utilcache.LRUExpireCache

	mu      sync.Mutex
	now     moment
	pending map[any]*question
}

// answer is the content of the map for a user.
type answer struct {
	// other is the user's other address; empty: none.
	other string
	// asked is a moment before the map was read.
	asked moment
}

// question is a query for one user that at least one caller waits for.
type question struct {
	askers int
	// other is the answer that was given.
	other    string
	answered bool
	// changed: the answers differed, or the map was changed meanwhile.
	changed bool
}

func newMemory(known *utilcache.LRUExpireCache) *memory {
	return &memory{known: known, pending: map[any]*question{}}
}

// open returns a moment after all questions that were asked so far.
func (m *memory) open() moment {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now++
	return m.now
}

// recall returns an answer that was asked for at the moment or later.
func (m *memory) recall(key any, opened moment) (other string, ok bool) {
	known, ok := m.known.Get(key)
	if !ok || known.(answer).asked < opened {
		return "", false
	}
	return known.(answer).other, true
}

// ask is called before the database is queried, and answered or unanswered for
// each of the keys after the query.
func (m *memory) ask(keys []any) (asked moment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, key := range keys {
		if m.pending[key] == nil {
			m.pending[key] = &question{}
		}
		m.pending[key].askers++
	}
	return m.now
}

// answered caches the answer of the database, unless it may be older than another one.
func (m *memory) answered(asked moment, key any, other string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	q := m.pending[key]
	defer m.leave(key, q)
	q.changed = q.changed || q.answered && q.other != other
	q.answered, q.other = true, other
	if q.changed {
		m.known.Remove(key)
		return
	}
	ttl := lidKnown
	if other == "" {
		ttl = lidUnknown
	}
	m.known.Add(key, answer{other: other, asked: asked}, ttl)
}

// unanswered removes a question that has failed.
func (m *memory) unanswered(key any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leave(key, m.pending[key])
}

// leave removes one asker of the question. It is called with mu held.
func (m *memory) leave(key any, q *question) {
	if q.askers--; q.askers == 0 {
		delete(m.pending, key)
	}
}

// changed removes the answers that a change has made stale, and prevents the caching of
// answers to queries in flight.
func (m *memory) changed(keys ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, key := range keys {
		m.known.Remove(key)
		if q := m.pending[key]; q != nil {
			q.changed = true
		}
	}
}

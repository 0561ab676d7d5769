// Package claimtest is the test suite of what gives out batches by claims: the coalescing
// queue in Redis, and the inbox in the database.
//
// Several writers and several flushers, of which some die, are too slow or get no answer, work
// on one storage at once in simulated time. A model records what was written, what is in
// flight, and what a Laravel that accepts every request has, and counts where a guarantee is
// broken.
package claimtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Start is the time at which the simulated time starts: a whole millisecond.
var Start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// Lease is how long a claim lasts.
const Lease = 30 * time.Second

// ErrLost is the error of a command that was executed, but whose answer was lost.
var ErrLost = errors.New("the answer was lost")

type randomKey struct{}

// WithRandom makes answers of calls with this context be lost at random.
func WithRandom(ctx context.Context, random *rand.Rand) context.Context {
	return context.WithValue(ctx, randomKey{}, random)
}

// Lost reports whether an answer is lost: one in twenty, if the context has WithRandom's
// numbers.
func Lost(ctx context.Context) bool {
	random, ok := ctx.Value(randomKey{}).(*rand.Rand)
	return ok && random.IntN(20) == 0
}

// Process is one process that uses the storage.
type Process interface {
	Backlog(ctx context.Context, kind delivery.Kind) (delivery.Backlog, error)
	Claim(ctx context.Context, kind delivery.Kind, limit int, lease time.Duration) (*delivery.Batch, error)
	Ack(ctx context.Context, b *delivery.Batch, rejected ...delivery.Rejection) error
	Release(ctx context.Context, b *delivery.Batch, notBefore time.Time) error
	Split(ctx context.Context, b *delivery.Batch) error
	// Write writes items of random sessions, repeats what may have failed, and tells m.
	Write(ctx context.Context, random *rand.Rand, m *Model) error
}

// Subject is the storage.
type Subject struct {
	Kind delivery.Kind
	// Open makes one more process, which knows nothing of what others did. Its clock is now.
	Open   func(now func() time.Time) Process
	Rounds int
}

// Model records what must be true of a storage.
type Model struct {
	mu sync.Mutex
	// every: each item must arrive, in its order. Otherwise only the newest of a session must.
	every bool
	// newest is the highest written number of each session.
	newest map[string]int64
	// has is the highest number of each session that Laravel has, or that is a dead letter.
	has map[string]int64
	// holder is the id of the batch with which a session is in flight.
	holder map[string]string
	// content is the items of each batch id when it was first sent.
	content map[string]string

	// attempt is the newest claim of each batch; over are the finished batches.
	attempt map[string]int
	over    map[string]bool

	doubled, disordered, altered, stolen, deliveries int
}

func newModel(kind delivery.Kind) *Model {
	return &Model{
		every: kind == delivery.KindMessage, newest: map[string]int64{}, has: map[string]int64{}, holder: map[string]string{},
		content: map[string]string{}, attempt: map[string]int{}, over: map[string]bool{},
	}
}

// Written records that the storage has items of a session up to a number.
func (m *Model) Written(sessionID string, seq int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.newest[sessionID] = max(m.newest[sessionID], seq)
}

// claimed records a batch in flight. If another unfinished batch holds one of its sessions,
// that session is doubled.
func (m *Model) claimed(b *delivery.Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over[b.ID] {
		return // another has claimed and finished it since the answer
	}
	m.attempt[b.ID] = max(m.attempt[b.ID], b.Attempt)
	for _, item := range b.Items {
		if holder := m.holder[item.SessionID]; holder != "" && holder != b.ID {
			m.doubled++
		}
		m.holder[item.SessionID] = b.ID
	}
}

// ended records that a batch is about to be finished or to get another id.
func (m *Model) ended(b *delivery.Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over[b.ID] = true
	m.free(b)
}

func (m *Model) free(b *delivery.Batch) {
	for _, item := range b.Items {
		if m.holder[item.SessionID] == b.ID {
			m.holder[item.SessionID] = ""
		}
	}
}

// tooLate lets a flusher finish a batch whose claim may have ended. If another has claimed
// it since, this must have no effect.
func (m *Model) tooLate(b *delivery.Batch, finishes bool, finish func() error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if finish() != nil || m.over[b.ID] {
		return
	}
	if m.attempt[b.ID] > b.Attempt {
		m.stolen++
	}
	if finishes {
		m.over[b.ID] = true
		m.free(b)
	}
}

// received records a request at Laravel.
func (m *Model) received(b *delivery.Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	text, err := json.Marshal(b.Items)
	if err != nil {
		panic(err)
	}
	if first, known := m.content[b.ID]; known {
		if first != string(text) {
			m.altered++
		}
		return // Laravel knows the batch id
	}
	m.content[b.ID] = string(text)
	m.deliveries++
	// Another flusher has claimed the batch, and perhaps halved it, before this one sent it.
	// Laravel ignores the older numbers.
	late := m.over[b.ID] || m.attempt[b.ID] > b.Attempt
	before := map[string]int64{}
	for _, item := range b.Items {
		has := m.has[item.SessionID]
		// The halves of a batch may repeat items that arrived with the whole batch.
		older := !m.every && !late && item.Seq < has
		skips := m.every && item.Seq > has+1
		jumps := before[item.SessionID] > 0 && item.Seq != before[item.SessionID]+1
		if older || skips || jumps {
			m.disordered++
		}
		before[item.SessionID] = item.Seq
		m.has[item.SessionID] = max(has, item.Seq)
	}
}

// Run runs the suite.
func Run(t *testing.T, s Subject) {
	const writers, flushers = 3, 3
	g := gomega.NewWithT(t)
	seed := testenv.Seed(t)
	var passed atomic.Int64 // in milliseconds
	now := func() time.Time { return Start.Add(time.Duration(passed.Load()) * time.Millisecond) }
	m := newModel(s.Kind)
	ctx := t.Context()
	// repeat repeats a call whose answer was lost, as the flusher does.
	repeat := func(call func() error) error {
		for {
			if err := call(); !errors.Is(err, ErrLost) {
				return err
			}
		}
	}
	again := func(call func() error) {
		// If the claim was lost, another flusher finishes the batch.
		if err := repeat(call); err != nil && !errors.Is(err, delivery.ErrClaimLost) {
			t.Error(err)
		}
	}
	flush := func(ctx context.Context, p Process, random *rand.Rand) {
		batch, err := p.Claim(ctx, s.Kind, 1+random.IntN(8), Lease)
		if err != nil && !errors.Is(err, ErrLost) {
			t.Error(err)
		}
		if err != nil || batch == nil {
			return
		}
		m.claimed(batch)
		switch dice := random.IntN(10); {
		case dice == 0: // dies before it has sent
			return
		case dice == 1: // dies after it has sent
			m.received(batch)
			return
		case dice == 2: // Laravel is down
			again(func() error {
				return p.Release(ctx, batch, now().Add(time.Duration(random.IntN(3000))*time.Millisecond))
			})
		case dice == 3 && len(batch.Items) > 1: // an item is bad
			m.ended(batch)
			again(func() error { return p.Split(ctx, batch) })
		case dice == 4: // one is rejected by name
			m.received(batch)
			m.ended(batch)
			again(func() error {
				return p.Ack(ctx, batch, delivery.Rejection{SessionID: batch.Items[0].SessionID, Key: batch.Items[0].Key, Reason: "no"})
			})
		case dice == 5: // is paused until its claim has ended
			m.received(batch)
			passed.Add(Lease.Milliseconds())
			for range 3 {
				other, err := p.Claim(ctx, s.Kind, 0, Lease)
				if err == nil && other != nil {
					m.claimed(other)
				}
			}
			switch random.IntN(3) {
			case 0:
				m.tooLate(batch, true, func() error { return repeat(func() error { return p.Ack(ctx, batch) }) })
			case 1:
				m.tooLate(batch, false, func() error { return repeat(func() error { return p.Release(ctx, batch, now()) }) })
			default:
				if len(batch.Items) > 1 {
					m.tooLate(batch, true, func() error { return repeat(func() error { return p.Split(ctx, batch) }) })
				}
			}
		default:
			m.received(batch)
			m.ended(batch)
			again(func() error { return p.Ack(ctx, batch) })
		}
	}

	var work sync.WaitGroup
	for i := range uint64(writers) {
		work.Go(func() {
			p, random := s.Open(now), rand.New(rand.NewPCG(seed, i))
			ctx := WithRandom(ctx, random)
			for range s.Rounds {
				if err := p.Write(ctx, random, m); err != nil {
					t.Error(err)
					return
				}
				passed.Add(random.Int64N(200))
			}
		})
	}
	for i := range uint64(flushers) {
		work.Go(func() {
			p, random := s.Open(now), rand.New(rand.NewPCG(seed, writers+i))
			ctx := WithRandom(ctx, random)
			for range s.Rounds {
				if random.IntN(50) == 0 {
					p = s.Open(now) // a new leader, which does not know the lost answers
				}
				flush(ctx, p, random)
			}
		})
	}
	work.Wait()

	// At the end everything that remains is claimed and delivered.
	p := s.Open(now)
	for {
		batch, err := p.Claim(ctx, s.Kind, 50, Lease)
		g.Expect(err).NotTo(gomega.HaveOccurred())
		if batch == nil {
			left, err := p.Backlog(ctx, s.Kind)
			g.Expect(err).NotTo(gomega.HaveOccurred())
			if left.Waiting == 0 && left.Unfinished == 0 {
				g.Expect(left).To(gomega.Equal(delivery.Backlog{}))
				break
			}
			passed.Add(Lease.Milliseconds())
			continue
		}
		m.claimed(batch)
		m.received(batch)
		m.ended(batch)
		g.Expect(p.Ack(ctx, batch)).To(gomega.Succeed())
	}
	lost := 0
	for session, newest := range m.newest {
		if m.has[session] != newest {
			lost++
		}
	}
	t.Logf("%d requests; lost %d, doubled %d, disordered %d, altered %d, stolen %d", m.deliveries, lost, m.doubled, m.disordered, m.altered, m.stolen)
	g.Expect([]int{lost, m.doubled, m.disordered, m.altered, m.stolen}).To(gomega.Equal([]int{0, 0, 0, 0, 0}))
	g.Expect(m.deliveries).To(gomega.BeNumerically(">", s.Rounds/10))
}

// SessionName is the id of the nth session.
func SessionName(n int) string { return fmt.Sprintf("s%02d", n) }

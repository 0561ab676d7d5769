package batch

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

	"github.com/alicebob/miniredis/v2"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// model records what was enqueued, what is in flight, and what a Laravel that accepts
// every request has, and counts where the queue breaks its guarantees.
type model struct {
	mu sync.Mutex
	// newest is the highest enqueued number of each session.
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

func newModel() *model {
	return &model{newest: map[string]int64{}, has: map[string]int64{}, holder: map[string]string{}, content: map[string]string{},
		attempt: map[string]int{}, over: map[string]bool{}}
}

// claimed records a batch in flight. If another unfinished batch holds one of its sessions,
// that session is doubled.
func (m *model) claimed(b *delivery.Batch) {
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
func (m *model) ended(b *delivery.Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over[b.ID] = true
	m.free(b)
}

func (m *model) free(b *delivery.Batch) {
	for _, item := range b.Items {
		if m.holder[item.SessionID] == b.ID {
			m.holder[item.SessionID] = ""
		}
	}
}

// tooLate lets a flusher finish a batch whose claim may have ended. If another has claimed
// it since, this must have no effect.
func (m *model) tooLate(b *delivery.Batch, finishes bool, finish func() error) {
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
func (m *model) received(b *delivery.Batch) {
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
	for _, item := range b.Items {
		// The halves of a batch may repeat items that arrived with the whole batch.
		if item.Seq < m.has[item.SessionID] {
			m.disordered++
		}
		m.has[item.SessionID] = max(m.has[item.SessionID], item.Seq)
	}
}

// flaky loses one answer in twenty, after the command was executed. The caller's
// context has the random numbers (withRandom); without them no answer is lost.
type flaky struct{}

type randomKey struct{}

func withRandom(ctx context.Context, random *rand.Rand) context.Context {
	return context.WithValue(ctx, randomKey{}, random)
}

func (flaky) lost(ctx context.Context) bool {
	random, ok := ctx.Value(randomKey{}).(*rand.Rand)
	return ok && random.IntN(20) == 0
}

func (f flaky) DialHook(next goredis.DialHook) goredis.DialHook { return next }

func (f flaky) ProcessHook(next goredis.ProcessHook) goredis.ProcessHook {
	return func(ctx context.Context, cmd goredis.Cmder) error {
		err := next(ctx, cmd)
		if err == nil && f.lost(ctx) {
			cmd.SetErr(errLost)
			return errLost
		}
		return err
	}
}

func (f flaky) ProcessPipelineHook(next goredis.ProcessPipelineHook) goredis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []goredis.Cmder) error {
		err := next(ctx, cmds)
		if err == nil && f.lost(ctx) {
			return errLost
		}
		return err
	}
}

// TestInterleavings lets several writers and several flushers, of which some
// die, are too slow or get no answer, work on one queue at once.
func TestInterleavings(t *testing.T) {
	for _, server := range []struct {
		name   string
		rounds int
		addr   func(*testing.T) string
	}{
		{"redis", 800, func(t *testing.T) string { return testenv.Redis(t) }},
		{"embedded", 150, func(t *testing.T) string { return miniredis.RunT(t).Addr() }},
	} {
		for _, kind := range delivery.Kinds {
			t.Run(server.name+"/"+string(kind), func(t *testing.T) { interleave(t, kind, server.addr(t), server.rounds) })
		}
	}
}

func interleave(t *testing.T, kind delivery.Kind, addr string, rounds int) {
	const writers, flushers, sessions = 3, 3, 40
	g := NewWithT(t)
	client := goredis.NewClient(&goredis.Options{Addr: addr})
	t.Cleanup(func() { _ = client.Close() })
	client.AddHook(flaky{})
	seed := testenv.Seed(t)
	var millisPassed atomic.Int64
	now := func() time.Time { return start.Add(time.Duration(millisPassed.Load()) * time.Millisecond) }
	clk := clockOf(now)
	newQueue := func() *Queue { return NewQueue(client, redis.Keys{}, clk, Options{Now: now, DeadLetters: 1 << 20}) }
	m := newModel()
	var counters [sessions]atomic.Int64
	ctx := t.Context()

	expires := func() time.Time {
		if kind == delivery.KindStatus {
			return time.Time{}
		}
		return now().Add(24 * time.Hour) // nothing expires here: nothing may be missing
	}
	write := func(ctx context.Context, q *Queue, random *rand.Rand) error {
		n := 1 + random.IntN(4)
		items := make([]delivery.Item, 0, n)
		for range n {
			s := random.IntN(sessions)
			items = append(items, code(fmt.Sprintf("s%02d", s), counters[s].Add(1), expires()))
			if random.IntN(3) == 0 {
				items[len(items)-1].Priority = delivery.High
			}
		}
		for {
			if _, err := q.Enqueue(ctx, kind, items...); err == nil {
				break
			} else if ctx.Err() != nil {
				return err
			}
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, item := range items {
			m.newest[item.SessionID] = max(m.newest[item.SessionID], item.Seq)
		}
		return nil
	}
	// repeat repeats a call whose answer was lost, as the flusher does.
	repeat := func(call func() error) error {
		for {
			if err := call(); err == nil || !isLost(err) {
				return err
			}
		}
	}
	again := func(call func() error) {
		// If the claim was lost, another flusher finishes the batch.
		if err := repeat(call); err != nil && !errors.Is(err, ErrClaimLost) {
			t.Error(err)
		}
	}
	flush := func(ctx context.Context, q *Queue, random *rand.Rand) {
		batch, err := q.Claim(ctx, kind, 1+random.IntN(8), lease)
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
				return q.Release(ctx, batch, now().Add(time.Duration(random.IntN(3000))*time.Millisecond))
			})
		case dice == 3 && len(batch.Items) > 1: // an item is bad
			m.ended(batch)
			again(func() error { return q.Split(ctx, batch) })
		case dice == 4: // one is rejected by name
			m.received(batch)
			m.ended(batch)
			again(func() error {
				return q.Ack(ctx, batch, delivery.Rejection{SessionID: batch.Items[0].SessionID, Reason: "no"})
			})
		case dice == 5: // is paused until its claim has ended
			m.received(batch)
			millisPassed.Add(lease.Milliseconds())
			for range 3 {
				other, err := q.Claim(ctx, kind, 0, lease)
				if err == nil && other != nil {
					m.claimed(other)
				}
			}
			switch random.IntN(3) {
			case 0:
				m.tooLate(batch, true, func() error { return repeat(func() error { return q.Ack(ctx, batch) }) })
			case 1:
				m.tooLate(batch, false, func() error { return repeat(func() error { return q.Release(ctx, batch, now()) }) })
			default:
				if len(batch.Items) > 1 {
					m.tooLate(batch, true, func() error { return repeat(func() error { return q.Split(ctx, batch) }) })
				}
			}
		default:
			m.received(batch)
			m.ended(batch)
			again(func() error { return q.Ack(ctx, batch) })
		}
	}

	var work sync.WaitGroup
	for i := range uint64(writers) {
		work.Go(func() {
			q, random := newQueue(), rand.New(rand.NewPCG(seed, i))
			ctx := withRandom(ctx, random)
			for range rounds {
				if write(ctx, q, random) != nil {
					return
				}
				millisPassed.Add(random.Int64N(200))
			}
		})
	}
	for i := range uint64(flushers) {
		work.Go(func() {
			q, random := newQueue(), rand.New(rand.NewPCG(seed, writers+i))
			ctx := withRandom(ctx, random)
			for range rounds {
				if random.IntN(50) == 0 {
					q = newQueue() // a new leader, which does not know the lost answers
				}
				flush(ctx, q, random)
			}
		})
	}
	work.Wait()

	// At the end everything that remains is claimed and delivered.
	q := newQueue()
	for {
		batch, err := q.Claim(ctx, kind, 50, lease)
		g.Expect(err).NotTo(HaveOccurred())
		if batch == nil {
			p, err := q.Pending(ctx, kind)
			g.Expect(err).NotTo(HaveOccurred())
			if p.Waiting == 0 && p.Unfinished == 0 {
				g.Expect(p).To(Equal(Pending{}))
				break
			}
			millisPassed.Add(lease.Milliseconds())
			continue
		}
		m.claimed(batch)
		m.received(batch)
		m.ended(batch)
		g.Expect(q.Ack(ctx, batch)).To(Succeed())
	}
	lost := 0
	for session, newest := range m.newest {
		if m.has[session] != newest {
			lost++
		}
	}
	t.Logf("%d requests; lost %d, doubled %d, disordered %d, altered %d, stolen %d", m.deliveries, lost, m.doubled, m.disordered, m.altered, m.stolen)
	g.Expect([]int{lost, m.doubled, m.disordered, m.altered, m.stolen}).To(Equal([]int{0, 0, 0, 0, 0}))
	g.Expect(m.deliveries).To(BeNumerically(">", rounds/10))
}

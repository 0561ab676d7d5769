package batch

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv/claimtest"
)

// flaky loses answers, after the command was executed, as claimtest.Lost says.
type flaky struct{}

func (f flaky) DialHook(next goredis.DialHook) goredis.DialHook { return next }

func (f flaky) ProcessHook(next goredis.ProcessHook) goredis.ProcessHook {
	return func(ctx context.Context, cmd goredis.Cmder) error {
		err := next(ctx, cmd)
		if err == nil && claimtest.Lost(ctx) {
			cmd.SetErr(claimtest.ErrLost)
			return claimtest.ErrLost
		}
		return err
	}
}

func (f flaky) ProcessPipelineHook(next goredis.ProcessPipelineHook) goredis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []goredis.Cmder) error {
		err := next(ctx, cmds)
		if err == nil && claimtest.Lost(ctx) {
			return claimtest.ErrLost
		}
		return err
	}
}

// interleavingSessions is how many sessions the writers of TestInterleavings have.
const interleavingSessions = 40

// writingQueue is the queue of one process, whose Write enqueues items.
type writingQueue struct {
	*Queue
	kind     delivery.Kind
	now      func() time.Time
	counters *[interleavingSessions]atomic.Int64
}

func (q writingQueue) Write(ctx context.Context, random *rand.Rand, m *claimtest.Model) error {
	expires := time.Time{}
	if q.kind == delivery.KindQR {
		expires = q.now().Add(24 * time.Hour) // nothing expires here: nothing may be missing
	}
	n := 1 + random.IntN(4)
	items := make([]delivery.Item, 0, n)
	for range n {
		s := random.IntN(interleavingSessions)
		items = append(items, code(claimtest.SessionName(s), q.counters[s].Add(1), expires))
		if random.IntN(3) == 0 {
			items[len(items)-1].Priority = delivery.High
		}
	}
	for {
		if _, err := q.Enqueue(ctx, q.kind, items...); err == nil {
			break
		} else if ctx.Err() != nil {
			return err
		}
	}
	for _, item := range items {
		m.Written(item.SessionID, item.Seq)
	}
	return nil
}

// TestInterleavings is the suite that the inbox runs too (internal/store).
func TestInterleavings(t *testing.T) {
	for _, server := range []struct {
		name   string
		rounds int
		addr   func(*testing.T) string
	}{
		{"redis", 800, func(t *testing.T) string { return testenv.Redis(t) }},
		{"embedded", 150, func(t *testing.T) string { return miniredis.RunT(t).Addr() }},
	} {
		for _, kind := range delivery.StateKinds {
			t.Run(server.name+"/"+string(kind), func(t *testing.T) {
				client := goredis.NewClient(&goredis.Options{Addr: server.addr(t)})
				t.Cleanup(func() { _ = client.Close() })
				client.AddHook(flaky{})
				var counters [interleavingSessions]atomic.Int64
				claimtest.Run(t, claimtest.Subject{Kind: kind, Rounds: server.rounds, Open: func(now func() time.Time) claimtest.Process {
					q := NewQueue(client, redis.Keys{}, clockOf(now), Options{Now: now, DeadLetters: 1 << 20})
					return writingQueue{q, kind, now, &counters}
				}})
			})
		}
	}
}

package store

import (
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv/claimtest"
)

// BenchmarkInbox pushes messages of a thousand sessions and claims and acknowledges them:
//
//	go test ./internal/store -run '^$' -bench Inbox -benchtime 20000x
//
// push: 16 pushers, nobody claims. drain: a backlog of b.N messages, one claimer with 8 batches
// of 200 in flight. both: at once, with 16 pushers.
func BenchmarkInbox(b *testing.B) {
	for kind, url := range map[string]func(b *testing.B) string{
		"PostgreSQL": func(b *testing.B) string { return testenv.PostgresServer(b).URL() },
		"SQLite":     func(b *testing.B) string { return filepath.Join(b.TempDir(), "keys.db") },
	} {
		for _, what := range []string{"push", "drain", "both"} {
			b.Run(kind+"/"+what, func(b *testing.B) { benchmarkInbox(b, url(b), what) })
		}
	}
}

func benchmarkInbox(b *testing.B, url, what string) {
	const sessions, pushers, slots = 1000, 16, 8
	ctx := b.Context()
	s, err := Open(ctx, Config{URL: url, MaxConns: pushers + slots + 1}, logr.Discard())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if err := s.Migrate(ctx); err != nil {
		b.Fatal(err)
	}
	inbox := NewInbox(s, InboxOptions{Bounds: Bounds{SessionMessages: 1 << 40}})
	takings := make([]*Taking, sessions)
	for i := range takings {
		id := claimtest.SessionName(i)
		if _, err := s.Claim(ctx, Claimant{SessionID: id, Namespace: "a", UID: id}, never); err != nil {
			b.Fatal(err)
		}
		if takings[i], err = s.Take(ctx, id, 1); err != nil {
			b.Fatal(err)
		}
	}
	var pushed, drained atomic.Int64
	var slowest atomic.Int64
	push := func() {
		var work sync.WaitGroup
		var next atomic.Int64
		for p := range pushers {
			work.Go(func() {
				for seq := int64(1); next.Add(1) <= int64(b.N); seq++ {
					// Each pusher has its own sessions, because a session's pushes follow each other.
					i := p + pushers*(int(seq)%(sessions/pushers))
					begun := time.Now()
					if _, err := inbox.Push(ctx, takings[i], messageItem(claimtest.SessionName(i), seq)); err != nil {
						b.Error(err)
						return
					}
					slowest.Store(max(slowest.Load(), int64(time.Since(begun))))
					pushed.Add(1)
				}
			})
		}
		work.Wait()
	}
	drain := func() {
		var acks sync.WaitGroup
		slot := make(chan struct{}, slots)
		for drained.Load() < int64(b.N) && !b.Failed() {
			slot <- struct{}{}
			batch, err := inbox.Claim(ctx, delivery.KindMessage, 200, time.Minute)
			if err != nil {
				b.Error(err)
				break
			}
			if batch == nil {
				<-slot
				continue
			}
			acks.Go(func() {
				defer func() { <-slot }()
				if err := inbox.Ack(ctx, batch); err != nil {
					b.Error(err)
				}
				drained.Add(int64(len(batch.Items)))
			})
		}
		acks.Wait()
	}
	if what == "drain" {
		push()
	}
	b.ResetTimer()
	switch what {
	case "push":
		push()
	case "drain":
		drain()
	default:
		var pushing sync.WaitGroup
		pushing.Go(push)
		drain()
		pushing.Wait()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "messages/s")
	if what != "drain" {
		b.ReportMetric(float64(slowest.Load())/1e6, "slowest-push-ms")
	}
	b.ReportMetric(0, "ns/op")
}

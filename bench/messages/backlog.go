package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver that the product uses too
	goredis "github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

const (
	// pushers is how many sessions push at the same time.
	pushers = 8
	// changeInterval is the mean pause between two urgent changes while the backlog is drained.
	changeInterval = 25 * time.Millisecond
	// drainTimeout is long enough for a machine that is a hundred times slower.
	drainTimeout = 20 * time.Minute
	// text is a message of the usual length.
	text = "Good morning, I would like to know whether you are open today, and whether the order of last week has arrived already. Thank you!"
)

// measureBacklog is the part backlog.
func (b *bench) measureBacklog() (err error) {
	database, err := b.Database()
	if err != nil {
		return err
	}
	defer database.Stop()
	url := database.URL()
	b.laravel.setAway(true)
	manager, err := b.Manager(url)
	if err != nil {
		return err
	}
	defer manager.Kill()
	s, err := store.Open(b.ctx, store.Config{URL: url, MaxConns: pushers}, logr.Discard())
	if err != nil {
		return fmt.Errorf("opening the store: %w", err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.WaitForSchema(b.ctx); err != nil {
		return fmt.Errorf("waiting for the manager: %w", err)
	}
	db, err := sql.Open("pgx", url)
	if err != nil {
		return fmt.Errorf("opening the database: %w", err)
	}
	defer func() { _ = db.Close() }()
	empty, err := b.tableBytes(db)
	if err != nil {
		return err
	}
	if err := b.fill(s); err != nil {
		return err
	}
	full, err := b.tableBytes(db)
	if err != nil {
		return err
	}
	b.BytesPerMessage = float64(full-empty) / float64(b.backlog)
	if b.away > 0 {
		benchenv.Print("Laravel stays away for %s", b.away)
		if err := benchenv.Pause(b.ctx, b.away); err != nil {
			return err
		}
	}
	if err := b.drain(manager); err != nil {
		return err
	}
	inbox := store.NewInbox(s, store.InboxOptions{})
	err = benchenv.WaitUntil(b.ctx, "sessions have no backlog", time.Minute, 100*time.Millisecond, func() (int, int, error) {
		left, err := inbox.Usage(b.ctx)
		return b.sessions - len(left), b.sessions, err
	})
	if err != nil {
		return err
	}
	if b.BytesAfter, err = b.tableBytes(db); err != nil {
		return err
	}
	manager.Terminate()
	return manager.WaitUntilEnded(b.ctx, time.Minute)
}

// tableBytes is what the tables of the inbox and their indexes take on the disk.
func (b *bench) tableBytes(db *sql.DB) (n int64, err error) {
	err = db.QueryRowContext(b.ctx, "SELECT SUM(pg_total_relation_size(oid)) FROM pg_class WHERE relkind='r' AND relname LIKE 'whatsapp_operator_inbox%'").Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("measuring the database: %w", err)
	}
	return n, nil
}

// fill pushes the messages, one session after another in turns.
func (b *bench) fill(s *store.Store) error {
	benchenv.Print("storing %d messages of %d sessions while Laravel is away", b.backlog, b.sessions)
	inbox := store.NewInbox(s, store.InboxOptions{})
	group, ctx := errgroup.WithContext(b.ctx)
	var begun atomic.Int64
	var bytes atomic.Int64
	ready := make(chan struct{}, pushers)
	start := make(chan struct{})
	for pusher := range pushers {
		group.Go(func() error {
			var takings []*store.Taking
			for i := pusher; i < b.sessions; i += pushers {
				taking, err := take(ctx, s, fmt.Sprintf("backlog-%05d", i))
				if err != nil {
					return err
				}
				takings = append(takings, taking)
			}
			ready <- struct{}{}
			select {
			case <-start:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			for n := begun.Add(1); n <= int64(b.backlog); n = begun.Add(1) {
				taking := takings[(int(n)/pushers)%len(takings)]
				item, err := message(taking.Record.SessionID, n)
				if err != nil {
					return err
				}
				bytes.Add(int64(len(item.Payload)))
				if _, err := inbox.Push(ctx, taking, item); err != nil {
					return fmt.Errorf("storing a message: %w", err)
				}
			}
			return nil
		})
	}
	for range pushers {
		select {
		case <-ready:
		case <-ctx.Done():
			return group.Wait()
		}
	}
	at := time.Now()
	close(start)
	if err := group.Wait(); err != nil {
		return err
	}
	b.PushPerSecond = float64(b.backlog) / time.Since(at).Seconds()
	b.PayloadBytes = float64(bytes.Load()) / float64(b.backlog)
	return nil
}

func take(ctx context.Context, s *store.Store, id string) (*store.Taking, error) {
	_, err := s.Claim(ctx, store.Claimant{SessionID: id, Namespace: benchenv.Namespace, UID: id}, func(context.Context, string) (bool, error) { return false, nil })
	if err != nil {
		return nil, fmt.Errorf("claiming a session id: %w", err)
	}
	taking, err := s.Take(ctx, id, 1)
	if err != nil {
		return nil, fmt.Errorf("taking a session: %w", err)
	}
	return taking, nil
}

// message is an item of the usual size. n rises over the messages of a session.
func message(sessionID string, n int64) (delivery.Item, error) {
	id := fmt.Sprintf("3EB0%018X", n)
	address := delivery.Address{LID: "123456789012345@lid", Phone: "+4915112345678"}
	item, err := delivery.MessageItem{
		SessionID: sessionID, Key: delivery.MessageKey(sessionID, address.LID, address.LID, id), ID: id, Type: delivery.TypeText,
		Chat: delivery.Chat{Address: address}, Sender: &address, Timestamp: delivery.Time{Time: time.Now().Truncate(time.Second)},
		PushName: "Ann", Text: text, Numbers: delivery.Numbers{Epoch: 1, Seq: n},
	}.Item()
	if err != nil {
		return delivery.Item{}, fmt.Errorf("making a message: %w", err)
	}
	return item, nil
}

// drain lets Laravel accept the messages, slowly, while urgent statuses go on.
func (b *bench) drain(manager *benchenv.Process) error {
	benchenv.Print("Laravel is back and answers in %s", b.slowAnswer)
	b.laravel.setAnswer(delivery.KindMessage, b.slowAnswer)
	back := time.Now()
	b.laravel.setAway(false)
	err := benchenv.WaitUntil(b.ctx, "messages accepted", time.Minute, time.Millisecond, func() (int, int, error) {
		n, _, _ := b.laravel.accepted()
		rss, _, err := manager.RSS()
		b.ManagerRSS = max(b.ManagerRSS, rss)
		return n, 1, err
	})
	if err != nil {
		return err
	}
	changing, stop := context.WithCancel(b.ctx)
	changed := make(chan error, 1)
	var changes map[statusKey]time.Time
	go func() {
		var err error
		changes, err = b.change(changing)
		changed <- err
	}()
	err = benchenv.WaitUntil(b.ctx, "messages accepted", drainTimeout, 20*time.Millisecond, func() (int, int, error) {
		n, _, _ := b.laravel.accepted()
		rss, _, err := manager.RSS()
		b.ManagerRSS = max(b.ManagerRSS, rss)
		return n, b.backlog, err
	})
	stop()
	if err := errors.Join(err, <-changed); err != nil {
		return err
	}
	n, first, last := b.laravel.accepted()
	b.Lost += b.backlog - n
	b.Drain, b.Resumed = float64(n)/last.Sub(first).Seconds(), first.Sub(back).Seconds()
	return b.awaitStatuses(changes)
}

// change publishes urgent statuses at random times until ctx ends.
func (b *bench) change(ctx context.Context) (map[statusKey]time.Time, error) {
	client := goredis.NewClient(&goredis.Options{Addr: b.Redis})
	defer func() { _ = client.Close() }()
	queue := batch.NewQueue(client, redis.Config{}.Keys(), clock.RealClock{}, batch.Options{})
	changes := map[statusKey]time.Time{}
	for n := 0; ; n++ {
		if err := benchenv.Pause(ctx, time.Duration(rand.ExpFloat64()*float64(changeInterval))); err != nil {
			return changes, nil // the backlog is drained
		}
		k := statusKey{fmt.Sprintf("backlog-%05d", n%b.sessions), delivery.Numbers{Epoch: 1, Seq: int64(n) + 1}}
		at := time.Now()
		item, err := delivery.StatusItem{
			SessionID: k.sessionID, Status: delivery.Pending, Phase: "Disconnected", Reason: "ConnectionLost", Priority: delivery.High,
			OccurredAt: delivery.Time{Time: at}, Numbers: k.Numbers,
		}.Item()
		if err != nil {
			return nil, fmt.Errorf("making a status: %w", err)
		}
		changes[k] = at
		if _, err := queue.Enqueue(context.WithoutCancel(ctx), delivery.KindStatus, item); err != nil {
			return nil, fmt.Errorf("publishing a status: %w", err)
		}
	}
}

// awaitStatuses waits until all statuses have arrived.
func (b *bench) awaitStatuses(changes map[statusKey]time.Time) error {
	var latencies []time.Duration
	err := benchenv.WaitUntil(b.ctx, "statuses arrived", time.Minute, 50*time.Millisecond, func() (int, int, error) {
		latencies = latencies[:0]
		for k, at := range changes {
			if arrived := b.laravel.arrivedAt(k); !arrived.IsZero() {
				latencies = append(latencies, arrived.Sub(at))
			}
		}
		return len(latencies), len(changes), nil
	})
	slices.Sort(latencies)
	b.StatusSamples = len(changes)
	b.StatusHigh = 1000 * benchenv.Percentile(latencies, 99)
	return err
}

package app

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

// wakeTimeout bounds one wake-up of the flusher; without it the flusher reads the inbox a little later.
const wakeTimeout = 2 * time.Second

// workerInbox is where a worker stores the messages of its sessions. It counts the pushes, and
// wakes the flusher.
type workerInbox struct {
	*store.Inbox
	store *store.Store
	waker messageWaker
	wake  chan struct{}
	clock clock.PassiveClock
	log   logr.Logger
}

// messageWaker is the part of *batch.Queue that wakes the flusher of messages.
type messageWaker interface {
	WakeForMessages(ctx context.Context) error
}

func newWorkerInbox(s *store.Store, bounds store.Bounds, waker messageWaker, clk clock.PassiveClock, log logr.Logger) *workerInbox {
	return &workerInbox{Inbox: store.NewInbox(s, store.InboxOptions{Bounds: bounds}), store: s, waker: waker, wake: make(chan struct{}, 1), clock: clk, log: log}
}

// Push implements store.Inbox's Push. It does not wait for the wake-up.
func (i *workerInbox) Push(ctx context.Context, t *store.Taking, item delivery.Item) (store.PushResult, error) {
	begun := i.clock.Now()
	result, err := i.Inbox.Push(ctx, t, item)
	metrics.InboxPush(pushOutcome(result, err), i.clock.Since(begun))
	if err != nil {
		return result, fmt.Errorf("storing a message: %w", err)
	}
	if result.Over != store.NoBound {
		metrics.InboxOver(string(result.Over))
	}
	if result.Waiting == 1 {
		select {
		case i.wake <- struct{}{}:
		default: // a wake-up is about to be sent
		}
	}
	return result, nil
}

// Probe implements worker.Inbox.
func (i *workerInbox) Probe(ctx context.Context) error { return i.store.Probe(ctx) }

// HasRoom implements worker.Inbox.
func (i *workerInbox) HasRoom(ctx context.Context, sessionID, namespace, bound string) (bool, error) {
	return i.Inbox.HasRoom(ctx, sessionID, namespace, store.Bound(bound))
}

func pushOutcome(r store.PushResult, err error) metrics.PushOutcome {
	switch {
	case errors.Is(err, store.ErrFenced):
		return metrics.PushFenced
	case err != nil:
		return metrics.PushFailed
	case r.Repeated:
		return metrics.PushRepeated
	default:
		return metrics.PushStored
	}
}

// run watches the bounds and sends the wake-ups, until ctx ends.
func (i *workerInbox) run(ctx context.Context) error {
	var group errgroup.Group
	group.Go(func() error {
		i.WatchBounds(ctx)
		return nil
	})
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-i.wake:
			}
			waking, done := context.WithTimeout(ctx, wakeTimeout)
			err := i.waker.WakeForMessages(waking)
			done()
			if err != nil && ctx.Err() == nil {
				i.log.V(1).Info("Failed to wake the flusher of messages, it reads the inbox a little later", "error", err.Error())
			}
		}
	})
	return group.Wait()
}

// over is how many sessions are over a bound of their namespace or of all, for the metrics.
func (i *workerInbox) over() map[string]int {
	over := map[string]int{string(store.NamespaceBound): 0, string(store.TotalBound): 0}
	for bound, n := range i.Over() {
		over[string(bound)] = n
	}
	return over
}

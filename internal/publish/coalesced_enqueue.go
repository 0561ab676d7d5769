package publish

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// enqueueTimeout bounds one round trip to the queue. A Redis that answers only after it has
// written to its disk (WAITAOF) may take a second.
const enqueueTimeout = 10 * time.Second

// coalescedEnqueue lets concurrent calls share one round trip to the queue: where Redis
// writes to its disk or to a replica before it answers, a thousand sessions must not wait for
// it one after the other. A few round trips may be in progress at a time. Their order does
// not matter, because the items have numbers.
type coalescedEnqueue struct {
	kind    delivery.Kind
	enqueue enqueue
	// turn limits how many round trips are in progress.
	turn chan struct{}

	mu      sync.Mutex
	waiting []*waiter
}

// enqueue puts items into a Queue.
type enqueue func(ctx context.Context, kind delivery.Kind, items ...delivery.Item) ([]batch.EnqueueResult, error)

// waiter is a caller that waits for the result of its item.
type waiter struct {
	item delivery.Item
	done chan struct{}
	// result and err are valid when done is closed.
	result batch.EnqueueResult
	err    error
}

func newCoalescedEnqueue(kind delivery.Kind, roundTrips int, enqueue enqueue) *coalescedEnqueue {
	return &coalescedEnqueue{kind: kind, enqueue: enqueue, turn: make(chan struct{}, roundTrips)}
}

// Enqueue returns when the queue has answered for the item. After an error the item may be
// in the queue, or may still arrive there; its numbers make that harmless.
func (t *coalescedEnqueue) Enqueue(ctx context.Context, item delivery.Item) (batch.EnqueueResult, error) {
	mine := &waiter{item: item, done: make(chan struct{})}
	t.mu.Lock()
	t.waiting = append(t.waiting, mine)
	t.mu.Unlock()
	select {
	case <-mine.done:
	case t.turn <- struct{}{}:
		t.take(ctx)
		<-t.turn
		<-mine.done // closed by this call, or by the one that made the round trip before
	case <-ctx.Done():
		return batch.EnqueueResult{}, fmt.Errorf("waiting to enqueue: %w", ctx.Err())
	}
	return mine.result, mine.err
}

// take makes one round trip for all waiters. The end of ctx does not cancel it, because the
// other waiters depend on it.
func (t *coalescedEnqueue) take(ctx context.Context) {
	t.mu.Lock()
	all := t.waiting
	t.waiting = nil
	t.mu.Unlock()
	if len(all) == 0 {
		return
	}
	items := make([]delivery.Item, len(all))
	for i, w := range all {
		items[i] = w.item
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), enqueueTimeout)
	defer cancel()
	results, err := t.enqueue(ctx, t.kind, items...)
	for i, w := range all {
		mine, err := results, err
		if errors.Is(err, batch.ErrInvalidItem) && len(all) > 1 { // one invalid item must not make the others fail
			mine, err = t.enqueue(ctx, t.kind, w.item)
			i = 0
		}
		if err != nil {
			w.err = fmt.Errorf("enqueueing a %s update: %w", t.kind, err)
		} else {
			w.result = mine[i]
		}
		close(w.done)
	}
}

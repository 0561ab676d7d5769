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

// enqueueTimeout bounds one round trip to the queue. A Redis that answers only
// after its disk has (WAITAOF) may take a second.
const enqueueTimeout = 10 * time.Second

// coalescedEnqueue lets callers that come at the same time share one round trip to the
// queue: where Redis must reach its disk or a replica before it answers, a
// thousand sessions must not wait for it one after the other. A few round trips
// may be under way at a time; their order does not matter, the items' numbers do.
type coalescedEnqueue struct {
	kind    delivery.Kind
	enqueue enqueue
	// turn is taken by who makes a round trip.
	turn chan struct{}

	mu      sync.Mutex
	waiting []*joined
}

// enqueue is how a Queue takes items.
type enqueue func(ctx context.Context, kind delivery.Kind, items ...delivery.Item) ([]batch.EnqueueResult, error)

type joined struct {
	item delivery.Item
	done chan struct{}
	// Valid when done is closed.
	result batch.EnqueueResult
	err    error
}

func newCoalescedEnqueue(kind delivery.Kind, trips int, how enqueue) *coalescedEnqueue {
	return &coalescedEnqueue{kind: kind, enqueue: how, turn: make(chan struct{}, trips)}
}

// Enqueue returns when the queue has answered for the item. After an error it
// may be there or come there yet; its numbers make that harmless.
func (t *coalescedEnqueue) Enqueue(ctx context.Context, item delivery.Item) (batch.EnqueueResult, error) {
	mine := &joined{item: item, done: make(chan struct{})}
	t.mu.Lock()
	t.waiting = append(t.waiting, mine)
	t.mu.Unlock()
	select {
	case <-mine.done:
	case t.turn <- struct{}{}:
		t.take(ctx)
		<-t.turn
		<-mine.done // by us, or by who had the turn before
	case <-ctx.Done():
		return batch.EnqueueResult{}, fmt.Errorf("waiting to enqueue: %w", ctx.Err())
	}
	return mine.result, mine.err
}

// take makes the round trip for everyone who waits. It is not cut short by the
// context of the one whose turn it is.
func (t *coalescedEnqueue) take(ctx context.Context) {
	t.mu.Lock()
	all := t.waiting
	t.waiting = nil
	t.mu.Unlock()
	if len(all) == 0 {
		return
	}
	items := make([]delivery.Item, len(all))
	for i, j := range all {
		items[i] = j.item
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), enqueueTimeout)
	defer cancel()
	results, err := t.enqueue(ctx, t.kind, items...)
	for i, j := range all {
		mine, err := results, err
		if errors.Is(err, batch.ErrInvalidItem) && len(all) > 1 { // one bad item must not hold up the others
			mine, err = t.enqueue(ctx, t.kind, j.item)
			i = 0
		}
		if err != nil {
			j.err = fmt.Errorf("enqueueing a %s update: %w", t.kind, err)
		} else {
			j.result = mine[i]
		}
		close(j.done)
	}
}

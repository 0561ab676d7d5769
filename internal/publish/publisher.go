package publish

import (
	"context"
	"errors"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/cache"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// Publisher brings a session's state to Redis: the queues first, because
// Laravel waits, then the cache keys.
type Publisher struct {
	queue           *batch.Queue
	cache           *cache.Cache
	statuses, codes *coalescedEnqueue
}

// roundTrips is how many calls of a kind may wait for Redis at a time: one that
// waits for the disk must not keep the next change from being sent.
const roundTrips = 4

// NewPublisher returns the workers' publisher.
func NewPublisher(queue *batch.Queue, c *cache.Cache) *Publisher {
	return &Publisher{
		queue: queue, cache: c,
		statuses: newCoalescedEnqueue(delivery.KindStatus, roundTrips, queue.Enqueue), codes: newCoalescedEnqueue(delivery.KindQR, roundTrips, queue.Enqueue),
	}
}

// Publish implements worker.Publisher.
func (a *Publisher) Publish(ctx context.Context, what session.Publication) error {
	var told error
	if what.NewStatus {
		told = a.enqueue(ctx, what.Status)
	}
	// People scan from the cache: it does not wait for a queue that fails.
	return errors.Join(told, a.code(ctx, what), a.cache.RefreshAll(ctx, []cache.Entry{entry(what, false)}))
}

// Refresh implements worker.Publisher.
func (a *Publisher) Refresh(ctx context.Context, all []session.Publication) error {
	entries := make([]cache.Entry, len(all))
	for i, what := range all {
		entries[i] = entry(what, true)
	}
	return a.cache.RefreshAll(ctx, entries)
}

// enqueue puts a status into its queue.
func (a *Publisher) enqueue(ctx context.Context, status delivery.StatusItem) error {
	item, err := status.Item()
	if err != nil {
		return err
	}
	_, err = put(ctx, a.statuses, item)
	return err
}

// put puts an item into a queue. A *delivery.StaleError says that Redis remembers
// numbers that the writer's own can never exceed: those of a resource that was restored
// from a backup, for example.
func put(ctx context.Context, queue *coalescedEnqueue, item delivery.Item) (batch.EnqueueResult, error) {
	result, err := queue.Enqueue(ctx, item)
	if err == nil && result.Code == batch.Stale {
		err = item.Stale(result.Newest)
	}
	return result, err
}

// code writes the QR code to the cache and, if it is new there, into its queue.
func (a *Publisher) code(ctx context.Context, what session.Publication) error {
	if what.QR == nil {
		if !what.QRGone {
			return nil
		}
		return errors.Join(
			a.cache.ClearQR(ctx, what.Status.SessionID, what.Status.Numbers),
			a.queue.Withdraw(ctx, delivery.KindQR, what.Status.SessionID, what.Status.Numbers),
		)
	}
	isNew, err := a.cache.SetQR(ctx, *what.QR)
	if err != nil || !isNew && !what.NewQR {
		return err
	}
	item, err := what.QR.Item()
	if err != nil {
		return err
	}
	_, err = put(ctx, a.codes, item)
	return err
}

// entry is what the cache says of a session; a code is rewritten only by a
// refresh, because Announce must know whether it is new.
func entry(what session.Publication, withCode bool) cache.Entry {
	s := what.Status
	connection := cache.Connection{
		Numbers: s.Numbers, SessionID: s.SessionID, Connected: !what.ConnectedSince.IsZero(),
		Worker: what.Worker, Since: s.OccurredAt,
	}
	if connection.Connected {
		connection.Since = delivery.Time{Time: what.ConnectedSince}
	}
	e := cache.Entry{Status: &s, Connection: &connection}
	if withCode {
		e.QR = what.QR
	}
	return e
}

// ManagerPublisher is the manager's: for sessions that nobody holds.
type ManagerPublisher struct {
	*Publisher
	updates *coalescedEnqueue
}

// NewManagerPublisher returns the manager's publisher.
func NewManagerPublisher(queue *batch.Queue, c *cache.Cache) *ManagerPublisher {
	return &ManagerPublisher{NewPublisher(queue, c), newCoalescedEnqueue(delivery.KindStatus, roundTrips, queue.Update)}
}

// Update implements controllers.Publisher.
func (s *ManagerPublisher) Update(ctx context.Context, status delivery.StatusItem) (told bool, err error) {
	item, err := status.Item()
	if err != nil {
		return false, err
	}
	result, err := put(ctx, s.updates, item)
	switch {
	case err != nil:
		return false, err
	case result.Code == batch.Unknown:
		return false, nil
	case result.Code == batch.Stale: // the cache's keys may be gone, and would take what is old
		return true, nil
	}
	return true, s.refresh(ctx, status)
}

// Enqueue implements controllers.Publisher.
func (s *ManagerPublisher) Enqueue(ctx context.Context, status delivery.StatusItem) error {
	return errors.Join(s.enqueue(ctx, status), s.refresh(ctx, status))
}

func (s *ManagerPublisher) refresh(ctx context.Context, status delivery.StatusItem) error {
	return s.cache.RefreshAll(ctx, []cache.Entry{entry(session.Publication{Status: status}, false)})
}

// Deleted implements controllers.Publisher.
func (s *ManagerPublisher) Deleted(ctx context.Context, status delivery.StatusItem) error {
	return errors.Join(
		s.enqueue(ctx, status),
		s.queue.Withdraw(ctx, delivery.KindQR, status.SessionID, status.Numbers),
		s.cache.Delete(ctx, status.SessionID, status.Numbers),
	)
}

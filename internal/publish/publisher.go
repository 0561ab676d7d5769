package publish

import (
	"context"
	"errors"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/cache"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// Publisher writes a session's state to Redis: to the queues first, because Laravel waits for
// it, then to the cache.
type Publisher struct {
	queue           *batch.Queue
	cache           *cache.Cache
	statuses, codes *coalescedEnqueue
}

// roundTrips is how many round trips of a kind may be in progress at a time: one that waits
// for the disk must not delay the next change.
const roundTrips = 4

// NewPublisher returns the workers' publisher.
func NewPublisher(queue *batch.Queue, c *cache.Cache) *Publisher {
	return &Publisher{
		queue: queue, cache: c,
		statuses: newCoalescedEnqueue(delivery.KindStatus, roundTrips, queue.Enqueue), codes: newCoalescedEnqueue(delivery.KindQR, roundTrips, queue.Enqueue),
	}
}

// Publish implements worker.Publisher.
func (p *Publisher) Publish(ctx context.Context, what session.Publication) error {
	var enqueueErr error
	if what.NewStatus {
		enqueueErr = p.enqueue(ctx, what.Status)
	}
	// People scan from the cache: it is written also when the queue fails.
	return errors.Join(enqueueErr, p.code(ctx, what), p.cache.RefreshAll(ctx, []cache.Entry{entry(what, false)}))
}

// Refresh implements worker.Publisher.
func (p *Publisher) Refresh(ctx context.Context, all []session.Publication) error {
	entries := make([]cache.Entry, len(all))
	for i, what := range all {
		entries[i] = entry(what, true)
	}
	return p.cache.RefreshAll(ctx, entries)
}

// enqueue puts a status into its queue.
func (p *Publisher) enqueue(ctx context.Context, status delivery.StatusItem) error {
	item, err := status.Item()
	if err != nil {
		return err
	}
	_, err = put(ctx, p.statuses, item)
	return err
}

// put puts an item into a queue. It returns a *delivery.StaleError if Redis has higher numbers
// than this writer can ever have, for example because the resource was restored from a backup.
func put(ctx context.Context, queue *coalescedEnqueue, item delivery.Item) (batch.EnqueueResult, error) {
	result, err := queue.Enqueue(ctx, item)
	if err == nil && result.Code == batch.Stale {
		err = item.Stale(result.Newest)
	}
	return result, err
}

// code writes the QR code to the cache and, if it is new there, into its queue.
func (p *Publisher) code(ctx context.Context, what session.Publication) error {
	if what.QR == nil {
		if !what.QRGone {
			return nil
		}
		return errors.Join(
			p.cache.ClearQR(ctx, what.Status.SessionID, what.Status.Numbers),
			p.queue.Withdraw(ctx, delivery.KindQR, what.Status.SessionID, what.Status.Numbers),
		)
	}
	isNew, err := p.cache.SetQR(ctx, *what.QR)
	if err != nil || !isNew && !what.NewQR {
		return err
	}
	item, err := what.QR.Item()
	if err != nil {
		return err
	}
	_, err = put(ctx, p.codes, item)
	return err
}

// entry is what the cache has about a session. Only a refresh writes a code again: Publish
// must find out whether the code is new.
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

// ManagerPublisher is the manager's publisher, for sessions that no worker holds.
type ManagerPublisher struct {
	*Publisher
	updates *coalescedEnqueue
}

// NewManagerPublisher returns the manager's publisher.
func NewManagerPublisher(queue *batch.Queue, c *cache.Cache) *ManagerPublisher {
	return &ManagerPublisher{NewPublisher(queue, c), newCoalescedEnqueue(delivery.KindStatus, roundTrips, queue.Update)}
}

// Update implements controllers.Publisher.
func (p *ManagerPublisher) Update(ctx context.Context, status delivery.StatusItem) (published bool, err error) {
	item, err := status.Item()
	if err != nil {
		return false, err
	}
	result, err := put(ctx, p.updates, item)
	switch {
	case err != nil:
		return false, err
	case result.Code == batch.Unknown:
		return false, nil
	case result.Code == batch.Stale: // the keys in the cache may have expired, so that it would accept a stale status
		return true, nil
	}
	return true, p.refresh(ctx, status)
}

// Enqueue implements controllers.Publisher.
func (p *ManagerPublisher) Enqueue(ctx context.Context, status delivery.StatusItem) error {
	return errors.Join(p.enqueue(ctx, status), p.refresh(ctx, status))
}

func (p *ManagerPublisher) refresh(ctx context.Context, status delivery.StatusItem) error {
	return p.cache.RefreshAll(ctx, []cache.Entry{entry(session.Publication{Status: status}, false)})
}

// Deleted implements controllers.Publisher.
func (p *ManagerPublisher) Deleted(ctx context.Context, status delivery.StatusItem) error {
	return errors.Join(
		p.enqueue(ctx, status),
		p.queue.Withdraw(ctx, delivery.KindQR, status.SessionID, status.Numbers),
		p.cache.Delete(ctx, status.SessionID, status.Numbers),
	)
}

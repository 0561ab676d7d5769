package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

var (
	deliveryRequests = counter("delivery_requests_total", "Requests with a batch to Laravel, by what the answer meant.", "kind", "result")
	deliveryDuration = histogram("delivery_request_duration_seconds",
		"How long a request with a batch took, whatever the answer.", []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 60, 300}, "kind")
	deliveryBatchItems = histogram("delivery_batch_items", "Updates in a request to Laravel.", []float64{1, 2, 5, 10, 20, 30, 40, 49, 50, 100, 150, 199, 200}, "kind")
	deliveryItems      = counter("delivery_items_total", "Updates whose delivery has ended: Laravel has accepted them, or refused them for good.", "kind", "outcome")
	deadLetters        = counter("dead_letters_total",
		"Updates that became dead letters, by the reason why Laravel does not accept them: Refused, Rejected, TooLarge or Poison.", "kind", "reason")
	deadLettersKept   = gauge("dead_letters_kept", "Dead letters that are kept. When there is no room for more, delivery of the kind stops.", "kind")
	deliveryStopped   = gauge("delivery_stopped", "1 while delivery is stopped for this reason, so that only one batch at a time is tried.", "kind", "reason")
	laravelConfigured = gauge("laravel_configured",
		"1 if this manager has the URL of a Laravel application; 0: nothing is delivered, and the newest state of each session waits in Redis.")
	queueWaiting    = gauge("queue_waiting_items", "Updates that wait to be sent; of messages, the sessions that could be claimed, up to 200.", "kind")
	queueInFlight   = gauge("queue_in_flight_items", "Updates in batches that are being sent or repeated.", "kind")
	queueUnfinished = gauge("queue_unfinished_batches", "Batches that are being sent or repeated.", "kind")
	queueOldest     = gauge("queue_oldest_due_age_seconds", "How long the oldest of the updates that could be sent has waited.", "kind")
	queueErrors     = counter("queue_errors_total", "Operations on the queue in Redis, or on the inbox in the database, that failed.", "operation")

	queueRepairs         = counter("queue_repairs_total", "Repairs of a queue in Redis of which keys were deleted, evicted or overwritten.", "kind")
	queueRepairedRecords = counter("queue_repaired_records_total",
		"Records that repairs of a queue discarded, or restored from others.", "kind", "action")
)

// DeliveryRequest counts one request with that many items, and its result.
func DeliveryRequest(kind delivery.Kind, result delivery.Result, items int, took time.Duration) {
	deliveryRequests.WithLabelValues(string(kind), string(result)).Inc()
	deliveryDuration.WithLabelValues(string(kind)).Observe(took.Seconds())
	deliveryBatchItems.WithLabelValues(string(kind)).Observe(float64(items))
}

// DeliveryItems counts updates whose delivery has ended: delivered, or dead letters.
func DeliveryItems(kind delivery.Kind, delivered, deadLetters int) {
	deliveryItems.WithLabelValues(string(kind), "delivered").Add(float64(delivered))
	deliveryItems.WithLabelValues(string(kind), "dead_letter").Add(float64(deadLetters))
}

// DeadLetters counts updates that became dead letters.
func DeadLetters(kind delivery.Kind, reason string, n int) {
	deadLetters.WithLabelValues(string(kind), reason).Add(float64(n))
}

// SetDeadLettersKept publishes how many dead letters there are.
func SetDeadLettersKept(kind delivery.Kind, n int) {
	deadLettersKept.WithLabelValues(string(kind)).Set(float64(n))
}

// SetDeliveryStopped publishes why delivery of a kind is stopped; empty: it is not.
func SetDeliveryStopped(kind delivery.Kind, reason string) {
	deliveryStopped.DeletePartialMatch(prometheus.Labels{"kind": string(kind)})
	if reason != "" {
		deliveryStopped.WithLabelValues(string(kind), reason).Set(1)
	}
}

// SetLaravelConfigured publishes whether this manager can deliver.
func SetLaravelConfigured(yes bool) { laravelConfigured.WithLabelValues().Set(oneIf(yes)) }

// SetQueue publishes what a queue held when it was read last; oldest is how long the oldest
// update that could be sent has waited.
func SetQueue(kind delivery.Kind, waiting, inFlight, unfinished int, oldest time.Duration) {
	queueWaiting.WithLabelValues(string(kind)).Set(float64(waiting))
	queueInFlight.WithLabelValues(string(kind)).Set(float64(inFlight))
	queueUnfinished.WithLabelValues(string(kind)).Set(float64(unfinished))
	queueOldest.WithLabelValues(string(kind)).Set(oldest.Seconds())
}

// QueueRepaired counts a repair of a queue.
func QueueRepaired(kind delivery.Kind, discarded, restored int) {
	queueRepairs.WithLabelValues(string(kind)).Inc()
	queueRepairedRecords.WithLabelValues(string(kind), "discarded").Add(float64(discarded))
	queueRepairedRecords.WithLabelValues(string(kind), "restored").Add(float64(restored))
}

// QueueError counts a failed operation on the queue: pending, claim, finish or dead_letters.
func QueueError(operation string) { queueErrors.WithLabelValues(operation).Inc() }

// ForgetDelivery removes the gauges of a kind in a process that does not deliver any more:
// the next leader publishes them.
func ForgetDelivery(kind delivery.Kind) {
	SetDeliveryStopped(kind, "")
	for _, gauge := range []*prometheus.GaugeVec{queueWaiting, queueInFlight, queueUnfinished, queueOldest, deadLettersKept} {
		gauge.DeleteLabelValues(string(kind))
	}
}

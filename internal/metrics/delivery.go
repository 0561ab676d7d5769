package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

var (
	deliveryRequests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "delivery_requests_total",
		Help: "Requests with a batch to Laravel, by what the answer meant.",
	}, []string{"kind", "verdict"})
	deliveryDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: namespace, Name: "delivery_request_duration_seconds",
		Help:    "How long a request with a batch took, whatever the answer.",
		Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 60, 300},
	}, []string{"kind"})
	deliveryBatchItems = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: namespace, Name: "delivery_batch_items",
		Help:    "Updates in a request to Laravel.",
		Buckets: []float64{1, 2, 5, 10, 20, 30, 40, 49, 50, 100},
	}, []string{"kind"})
	deliveryItems = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "delivery_items_total",
		Help: "Updates that are done with: Laravel has them, or refused them for good.",
	}, []string{"kind", "outcome"})
	deadLetters = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "dead_letters_total",
		Help: "Updates that became dead letters, by why Laravel does not take them: Refused, Rejected, TooLarge or Poison.",
	}, []string{"kind", "reason"})
	deadLettersKept = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "dead_letters_kept",
		Help: "Dead letters that are kept. When there is no room for more, delivery of the kind stops.",
	}, []string{"kind"})
	deliveryStopped = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "delivery_stopped",
		Help: "1 while delivery is stopped for this reason and only probed.",
	}, []string{"kind", "reason"})
	queueWaiting = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "queue_waiting_items",
		Help: "Updates that wait to be sent.",
	}, []string{"kind"})
	queueInFlight = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "queue_in_flight_items",
		Help: "Updates in batches that are being sent or repeated.",
	}, []string{"kind"})
	queueUnfinished = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "queue_unfinished_batches",
		Help: "Batches that are being sent or repeated.",
	}, []string{"kind"})
	queueOldest = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "queue_oldest_due_age_seconds",
		Help: "For how long the first of the updates that could be sent has waited.",
	}, []string{"kind"})
	queueErrors = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "queue_errors_total",
		Help: "Operations on the queue in Redis that failed.",
	}, []string{"operation"})
)

var (
	queueRepairs = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "queue_repairs_total",
		Help: "Repairs of a queue in Redis of which keys were deleted, evicted or overwritten.",
	}, []string{"kind"})
	queueRepairedRecords = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "queue_repaired_records_total",
		Help: "Records that repairs of a queue discarded, or restored from others.",
	}, []string{"kind", "action"})
)

func init() {
	metrics.Registry.MustRegister(deliveryRequests, deliveryDuration, deliveryBatchItems, deliveryItems, deadLetters, deadLettersKept,
		deliveryStopped, queueWaiting, queueInFlight, queueUnfinished, queueOldest, queueErrors, queueRepairs, queueRepairedRecords)
}

// DeliveryRequest counts one request of so many items and what came of it.
func DeliveryRequest(kind delivery.Kind, result delivery.Result, items int, took time.Duration) {
	deliveryRequests.WithLabelValues(string(kind), string(result)).Inc()
	deliveryDuration.WithLabelValues(string(kind)).Observe(took.Seconds())
	deliveryBatchItems.WithLabelValues(string(kind)).Observe(float64(items))
}

// DeliveryItems counts updates that are done with: delivered, or dead letters.
func DeliveryItems(kind delivery.Kind, delivered, deadLetters int) {
	deliveryItems.WithLabelValues(string(kind), "delivered").Add(float64(delivered))
	deliveryItems.WithLabelValues(string(kind), "dead_letter").Add(float64(deadLetters))
}

// DeadLetters counts updates that became dead letters.
func DeadLetters(kind delivery.Kind, reason string, n int) {
	deadLetters.WithLabelValues(string(kind), reason).Add(float64(n))
}

// DeadLettersKept says how many dead letters there are.
func DeadLettersKept(kind delivery.Kind, n int) {
	deadLettersKept.WithLabelValues(string(kind)).Set(float64(n))
}

// DeliveryStopped says why delivery of a kind is stopped; empty: it is not.
func DeliveryStopped(kind delivery.Kind, reason string) {
	deliveryStopped.DeletePartialMatch(prometheus.Labels{"kind": string(kind)})
	if reason != "" {
		deliveryStopped.WithLabelValues(string(kind), reason).Set(1)
	}
}

// Queue shows what a queue held when it was last looked at; oldest is for how
// long the first update that could be sent has waited.
func Queue(kind delivery.Kind, waiting, inFlight, unfinished int, oldest time.Duration) {
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

// QueueError counts an operation on the queue that failed: look, claim or finish.
func QueueError(operation string) { queueErrors.WithLabelValues(operation).Inc() }

// ForgetDelivery drops the gauges of a kind in a process that does not deliver
// any more: what they showed is the next leader's to say.
func ForgetDelivery(kind delivery.Kind) {
	DeliveryStopped(kind, "")
	for _, gauge := range []*prometheus.GaugeVec{queueWaiting, queueInFlight, queueUnfinished, queueOldest, deadLettersKept} {
		gauge.DeleteLabelValues(string(kind))
	}
}

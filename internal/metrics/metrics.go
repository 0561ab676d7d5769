// Package metrics has every metric of the product, in one place. Each has a name, a unit and
// a bounded set of labels, and none has a label for each session. They are served together
// with those of controller-runtime.
package metrics

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const namespace = "whatsapp_operator"

func gauge(name, help string, labels ...string) *prometheus.GaugeVec {
	return register(prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, labels))
}

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return register(prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, labels))
}

func histogram(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return register(prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help, Buckets: buckets}, labels))
}

func register[C prometheus.Collector](c C) C {
	metrics.Registry.MustRegister(c)
	return c
}

// oneIf is the value of a gauge that says yes or no.
func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

var (
	redisFit      = gauge("redis_fit", "1 while Redis answers, permits what is needed, does not evict and persists (or may be volatile); 0 otherwise.").WithLabelValues()
	redisRefusals = counter("redis_refusals_total",
		"Commands that Redis has refused, by reason: read_only, loading, cluster_down, try_again, busy, disk_failing, full, not_authenticated, wrong_password, no_permission, master_down, no_replicas, too_many_clients, unknown_command, wrong_database, wrong_mode or protected.", "reason")
	// A vector without labels is not served before it is set: only the leader sets it.
	storeAnswers = gauge("store_answers", "1 while the database answers the leading manager; 0 otherwise: new sessions and deletions wait.")
	storeRecords = gauge("store_records",
		"Records of session ids in the database, by state: in_use, missing (no session has been found for less than a day), orphaned, retained.", "state")
	storeRecordsImplausible = gauge("store_records_implausible",
		"1 while so many records are without a session that none of them is changed; 0 otherwise.")
	queueExpired = counter("queue_expired_total", "Updates dropped because they expired before they could be sent.", "kind")
)

// SetRedisFit publishes whether Redis may hold the updates that wait for Laravel.
func SetRedisFit(fit bool) { redisFit.Set(oneIf(fit)) }

// SetStoreAnswers publishes whether the database answers the leader.
func SetStoreAnswers(answers bool) { storeAnswers.WithLabelValues().Set(oneIf(answers)) }

// RedisRefusal counts a command that Redis has refused.
func RedisRefusal(reason string) { redisRefusals.WithLabelValues(reason).Inc() }

// SetStoreRecords publishes how many records the database has in each state, as the leader
// has compared them with the sessions.
func SetStoreRecords(inUse, missing, orphaned, retained int, implausible bool) {
	for state, n := range map[string]int{"in_use": inUse, "missing": missing, "orphaned": orphaned, "retained": retained} {
		storeRecords.WithLabelValues(state).Set(float64(n))
	}
	storeRecordsImplausible.WithLabelValues().Set(oneIf(implausible))
}

// QueueExpired counts updates that expired in their queue.
func QueueExpired(kind delivery.Kind, n int) {
	queueExpired.WithLabelValues(string(kind)).Add(float64(n))
}

// sessions collects, at each scrape, the number of a worker's sessions by phase.
type sessions struct {
	count func() map[string]int
	desc  *prometheus.Desc
}

// RegisterSessions registers a count of the worker's sessions by phase, which is called at
// each scrape.
func RegisterSessions(count func() map[string]int) error {
	err := metrics.Registry.Register(&sessions{count: count, desc: prometheus.NewDesc(
		namespace+"_worker_sessions", "Sessions that this worker supervises, by phase.", []string{"phase"}, nil)})
	if err != nil {
		return fmt.Errorf("registering the count of sessions: %w", err)
	}
	return nil
}

// Describe implements prometheus.Collector.
func (s *sessions) Describe(ch chan<- *prometheus.Desc) { ch <- s.desc }

// Collect implements prometheus.Collector.
func (s *sessions) Collect(ch chan<- prometheus.Metric) {
	for phase, n := range s.count() {
		ch <- prometheus.MustNewConstMetric(s.desc, prometheus.GaugeValue, float64(n), phase)
	}
}

// Package metrics holds every metric of the product, in one place: a name, a
// unit and a bounded set of labels each, and never a label per session. They
// are served with controller-runtime's own.
package metrics

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const namespace = "whatsapp_operator"

var (
	redisFit = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: namespace, Name: "redis_fit",
		Help: "1 while Redis answers, permits what is needed, does not evict and persists (or may be volatile); 0 otherwise.",
	})
	redisRefusals = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "redis_refusals_total",
		Help: "Commands that Redis has refused, by reason: read_only, loading, cluster_down, try_again, busy, disk_failing, full, not_authenticated, wrong_password, no_permission, master_down, no_replicas, too_many_clients, unknown_command, wrong_database, wrong_mode or protected.",
	}, []string{"reason"})
	// Without labels, but not served by those who do not ask.
	storeAnswers = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "store_answers",
		Help: "1 while the database answers the leading manager; 0 otherwise: new sessions and deletions wait.",
	}, nil)
	storeRecords = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "store_records",
		Help: "Records of session ids in the database, by state: in_use, missing (no session has been found for less than a day), orphaned, retained.",
	}, []string{"state"})
	storeRecordsImplausible = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "store_records_implausible",
		Help: "1 while so many records are without a session that nothing is done with them; 0 otherwise.",
	}, nil)
	queueExpired = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "queue_expired_total",
		Help: "Updates dropped because they expired before they could be sent.",
	}, []string{"kind"})
)

func init() {
	metrics.Registry.MustRegister(redisFit, redisRefusals, storeAnswers, storeRecords, storeRecordsImplausible, queueExpired)
}

// RedisFit says whether Redis is fit to hold what waits for Laravel.
func RedisFit(fit bool) {
	if fit {
		redisFit.Set(1)
	} else {
		redisFit.Set(0)
	}
}

// RedisRefusal counts a command that Redis has refused.
func RedisRefusal(reason string) { redisRefusals.WithLabelValues(reason).Inc() }

// StoreAnswers says whether the database answers the leader.
func StoreAnswers(answers bool) {
	if answers {
		storeAnswers.WithLabelValues().Set(1)
	} else {
		storeAnswers.WithLabelValues().Set(0)
	}
}

// StoreRecords counts the records of the database, as the leader has compared them
// with the sessions.
func StoreRecords(inUse, missing, orphaned, retained int, implausible bool) {
	for state, n := range map[string]int{"in_use": inUse, "missing": missing, "orphaned": orphaned, "retained": retained} {
		storeRecords.WithLabelValues(state).Set(float64(n))
	}
	value := 0.0
	if implausible {
		value = 1
	}
	storeRecordsImplausible.WithLabelValues().Set(value)
}

// QueueExpired counts updates that expired in their queue.
func QueueExpired(kind delivery.Kind, n int) {
	queueExpired.WithLabelValues(string(kind)).Add(float64(n))
}

// sessions collects the number of a worker's sessions by phase when it is asked.
type sessions struct {
	count func() map[string]int
	desc  *prometheus.Desc
}

// RegisterSessions has the worker's sessions counted by phase at each scrape.
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

package metrics

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

var (
	connectionsEnded = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "worker_connections_ended_total",
		Help: "Connections to WhatsApp that ended, or could not be opened, by reason: each but the last ones of a session means another attempt.",
	}, []string{"reason"})
	reconnects = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "worker_reconnects_total",
		Help: "Sessions that were connected again by this worker, by the reason for which their last connection here had ended.",
	}, []string{"reason"})
	quarantines = prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: namespace, Name: "worker_quarantines_total",
		Help: "Times that a session was put into quarantine: it failed again and again and is tried hours later.",
	})
	versionBreaker = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "worker_version_breaker",
		Help: "1 for the state that the breaker for an outdated client is in: closed, refreshing, probing, or stale (WhatsApp refuses the newest version that this build can name: upgrade the image).",
	}, []string{"state"})
	unreached = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "worker_unreached",
		Help: "1 for a service (database, WhatsApp) that this worker cannot reach, by all attempts of the last minute; its Lease says so, too.",
	}, []string{"service"})
)

func init() {
	metrics.Registry.MustRegister(connectionsEnded, reconnects, quarantines, versionBreaker, unreached)
}

// Unreached publishes whether this worker can reach a service.
func Unreached(service string, failing bool) {
	value := 0.0
	if failing {
		value = 1
	}
	unreached.WithLabelValues(service).Set(value)
}

// ConnectionEnded counts a connection that ended, or could not be opened.
func ConnectionEnded(reason string) { connectionsEnded.WithLabelValues(session.EndLabel(reason)).Inc() }

// Reconnected counts a session that is connected again after an end for that reason.
func Reconnected(reason string) { reconnects.WithLabelValues(session.EndLabel(reason)).Inc() }

// Quarantined counts a session that was put into quarantine.
func Quarantined() { quarantines.Inc() }

// VersionBreaker shows which of the states the breaker is in.
func VersionBreaker(state string, states []string) {
	for _, s := range states {
		value := 0.0
		if s == state {
			value = 1
		}
		versionBreaker.WithLabelValues(s).Set(value)
	}
}

// life collects how a worker's sessions fare, when it is asked.
type life struct {
	look             func() (oldest time.Duration, quarantined int)
	age, quarantined *prometheus.Desc
}

// RegisterLife has shown at each scrape for how long the most silent of the
// connected sessions has heard nothing from WhatsApp, and how many sessions are
// in quarantine.
func RegisterLife(look func() (oldest time.Duration, quarantined int)) error {
	err := metrics.Registry.Register(&life{
		look: look,
		age: prometheus.NewDesc(namespace+"_worker_oldest_sign_of_life_seconds",
			"For how long the most silent of the connected sessions has heard nothing from WhatsApp; above 90 it is about to be disconnected.", nil, nil),
		quarantined: prometheus.NewDesc(namespace+"_worker_quarantined_sessions",
			"Sessions that failed again and again and are tried hours later.", nil, nil),
	})
	if err != nil {
		return fmt.Errorf("registering the signs of life: %w", err)
	}
	return nil
}

// Describe implements prometheus.Collector.
func (l *life) Describe(ch chan<- *prometheus.Desc) { ch <- l.age; ch <- l.quarantined }

// Collect implements prometheus.Collector.
func (l *life) Collect(ch chan<- prometheus.Metric) {
	oldest, quarantined := l.look()
	ch <- prometheus.MustNewConstMetric(l.age, prometheus.GaugeValue, oldest.Seconds())
	ch <- prometheus.MustNewConstMetric(l.quarantined, prometheus.GaugeValue, float64(quarantined))
}

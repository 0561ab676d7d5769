package metrics

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

var (
	connectionsEnded = counter("worker_connections_ended_total",
		"Connections to WhatsApp that ended, or could not be opened, by reason.", "reason")
	reconnects = counter("worker_reconnects_total",
		"Sessions that were connected again by this worker, by the reason for which their last connection here had ended.", "reason")
	quarantines = counter("worker_quarantines_total",
		"How many times a session was put into quarantine: it failed again and again and is tried hours later.").WithLabelValues()
	messagesIn = counter("worker_messages_total",
		"Messages that WhatsApp has delivered, by what became of them: stored, ignored (spec.messages.ignore), dropped (there is no Laravel application), or refused, so that WhatsApp delivers them again.", "outcome")
	versionBreaker = gauge("worker_version_breaker",
		"1 for the present state of the breaker for an outdated client: closed, refreshing, probing, or stale (WhatsApp refuses the newest version that this build can use: upgrade the image).", "state")
	unreached = gauge("worker_unreached",
		"1 for a service (database, WhatsApp) that this worker cannot reach, by all attempts of the last minute. Its Lease says so too.", "service")
)

// RegisterLibraryAge registers the age of the WhatsApp client library, computed at each
// scrape from the time of its last commit.
func RegisterLibraryAge(built time.Time, now func() time.Time) error {
	err := metrics.Registry.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "worker_whatsapp_library_age_days",
		Help: "The age of the WhatsApp client library in this build, in days. WhatsApp refuses clients that are too old: upgrade the image when it is above 90.",
	}, func() float64 { return now().Sub(built).Hours() / 24 }))
	if err != nil {
		return fmt.Errorf("registering the age of the client library: %w", err)
	}
	return nil
}

// SetUnreachable publishes whether a service cannot be reached by this worker.
func SetUnreachable(service string, unreachable bool) {
	unreached.WithLabelValues(service).Set(oneIf(unreachable))
}

// ConnectionEnded counts a connection that ended, or could not be opened.
func ConnectionEnded(reason string) { connectionsEnded.WithLabelValues(session.EndLabel(reason)).Inc() }

// Reconnected counts a session that is connected again after its connection ended for that
// reason.
func Reconnected(reason string) { reconnects.WithLabelValues(session.EndLabel(reason)).Inc() }

// Quarantined counts a session that was put into quarantine.
func Quarantined() { quarantines.Inc() }

// MessageOutcome is what became of a message.
type MessageOutcome string

// The outcomes of messages.
const (
	MessageStored  MessageOutcome = "stored"
	MessageIgnored MessageOutcome = "ignored"
	MessageDropped MessageOutcome = "dropped"
	MessageRefused MessageOutcome = "refused"
)

// MessageIn counts a message that WhatsApp has delivered.
func MessageIn(outcome MessageOutcome) { messagesIn.WithLabelValues(string(outcome)).Inc() }

// SetVersionBreaker publishes which of the states the breaker is in.
func SetVersionBreaker(state string, states []string) {
	for _, s := range states {
		versionBreaker.WithLabelValues(s).Set(oneIf(s == state))
	}
}

// sessionStats collects, at each scrape, the two values of RegisterSessionStats.
type sessionStats struct {
	read             func() (oldest time.Duration, quarantined int)
	age, quarantined *prometheus.Desc
}

// RegisterSessionStats registers a function that is called at each scrape. oldest is the
// longest time for which a connected session has received nothing from WhatsApp;
// quarantined is how many sessions are in quarantine.
func RegisterSessionStats(read func() (oldest time.Duration, quarantined int)) error {
	err := metrics.Registry.Register(&sessionStats{
		read: read,
		age: prometheus.NewDesc(namespace+"_worker_oldest_sign_of_life_seconds",
			"The longest time for which a connected session has received nothing from WhatsApp. Above 90 the session is about to be disconnected.", nil, nil),
		quarantined: prometheus.NewDesc(namespace+"_worker_quarantined_sessions",
			"Sessions that failed again and again and are tried hours later.", nil, nil),
	})
	if err != nil {
		return fmt.Errorf("registering the statistics of sessions: %w", err)
	}
	return nil
}

// Describe implements prometheus.Collector.
func (s *sessionStats) Describe(ch chan<- *prometheus.Desc) { ch <- s.age; ch <- s.quarantined }

// Collect implements prometheus.Collector.
func (s *sessionStats) Collect(ch chan<- prometheus.Metric) {
	oldest, quarantined := s.read()
	ch <- prometheus.MustNewConstMetric(s.age, prometheus.GaugeValue, oldest.Seconds())
	ch <- prometheus.MustNewConstMetric(s.quarantined, prometheus.GaugeValue, float64(quarantined))
}

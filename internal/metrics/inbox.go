package metrics

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

var (
	inboxMessages = gauge("inbox_messages", "Messages in the database that Laravel has not accepted yet, as the leading manager counts them twice a minute.")
	inboxBytes    = gauge("inbox_bytes", "Bytes of these messages.")
	inboxSessions = gauge("inbox_sessions", "Sessions that have such messages.")
	inboxOldest   = gauge("inbox_oldest_age_seconds", "How long the oldest of these messages has waited.")

	inboxPushes = counter("worker_inbox_pushes_total",
		"Messages that this worker stored in the database, by outcome: stored, repeated (it was stored already), fenced (the session was taken by another process) or failed.", "outcome")
	inboxPushDuration = histogram("worker_inbox_push_seconds",
		"How long it took to store a message, whatever the outcome. WhatsApp's message is acknowledged after it.", []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}).WithLabelValues()
	inboxOver = counter("worker_inbox_over_bound_total",
		"Messages that were stored although their session was over a bound of what may wait for Laravel (Session, Namespace or Total). The session is disconnected after it.", "bound")
)

// InboxGauges are what the leading manager publishes about the inbox.
type InboxGauges struct {
	Sessions        int
	Messages, Bytes int64
	// Oldest is how long the oldest message has waited.
	Oldest time.Duration
}

// SetInbox publishes what waits in the inbox.
func SetInbox(g InboxGauges) {
	inboxSessions.WithLabelValues().Set(float64(g.Sessions))
	inboxMessages.WithLabelValues().Set(float64(g.Messages))
	inboxBytes.WithLabelValues().Set(float64(g.Bytes))
	inboxOldest.WithLabelValues().Set(g.Oldest.Seconds())
}

// ForgetInbox removes these gauges in a process that does not lead any more.
func ForgetInbox() {
	for _, gauge := range []*prometheus.GaugeVec{inboxSessions, inboxMessages, inboxBytes, inboxOldest} {
		gauge.DeleteLabelValues()
	}
}

// PushOutcome is what became of a push.
type PushOutcome string

const (
	// PushStored: the message is stored.
	PushStored PushOutcome = "stored"
	// PushRepeated: it was stored already.
	PushRepeated PushOutcome = "repeated"
	// PushFenced: the session was taken by another process.
	PushFenced PushOutcome = "fenced"
	// PushFailed: the database did not store it, or did not answer.
	PushFailed PushOutcome = "failed"
)

// InboxPush counts a push.
func InboxPush(outcome PushOutcome, took time.Duration) {
	inboxPushes.WithLabelValues(string(outcome)).Inc()
	inboxPushDuration.Observe(took.Seconds())
}

// InboxOver counts a message that was stored although its session was over a bound.
func InboxOver(bound string) { inboxOver.WithLabelValues(bound).Inc() }

// RegisterInboxOver registers a count, by bound, of the sessions that are over the bound of their namespace or of
// all, which is called at each scrape.
func RegisterInboxOver(count func() map[string]int) error {
	err := metrics.Registry.Register(&sessions{count: count, desc: prometheus.NewDesc(namespace+"_worker_inbox_sessions_over_bound",
		"Sessions of all workers whose backlogs are the longest while more waits for Laravel than a bound allows (Namespace or Total), as this worker has read them. They are disconnected when they get another message.",
		[]string{"bound"}, nil)})
	if err != nil {
		return fmt.Errorf("registering the count of backlogs: %w", err)
	}
	return nil
}

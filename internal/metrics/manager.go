package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

var (
	managerSessions = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "sessions",
		Help: "Sessions by phase, as the leader sees them.",
	}, []string{"phase"})
	sessionsUnplaced = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "sessions_unplaced",
		Help: "Sessions that want a worker and have none, by the pool of their namespace and reason. NoCapacity is what to scale the workers on.",
	}, []string{"pool", "reason"})
	sessionsMisplaced = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "sessions_misplaced",
		Help: "Sessions that stay connected on a worker of another pool because that of their namespace cannot take them, by the pool of their namespace and reason.",
	}, []string{"pool", "reason"})
	sessionsSilent = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: namespace, Name: "sessions_held_by_silent_workers",
		Help: "Sessions held by a worker whose Lease is not being renewed, or is gone.",
	})
	workers = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "workers",
		Help: "Workers by pool and state: live, failing (it cannot reach its database or WhatsApp), draining, silent or dead.",
	}, []string{"pool", "state"})
	poolCapacity = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: namespace, Name: "pool_capacity_sessions",
		Help: "Sessions that the live workers of a pool take at most.",
	}, []string{"pool"})
	placements = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: namespace, Name: "placements_total",
		Help: "Decisions of the placement: placed, moved (off a draining worker or to another pool), moved_as_requested (move-to), moved_from_failing, rebalanced, failed_over (taken from a dead worker), withdrawn, conflict (to be made again) or failed.",
	}, []string{"result"})
	workersLost = prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: namespace, Name: "workers_lost_total",
		Help: "Workers that were declared dead while they held sessions.",
	})
	heartbeatsVisible = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: namespace, Name: "heartbeats_visible",
		Help: "1 while this manager can read both heartbeats of the workers, the Leases and Redis. While it is 0 no worker is declared dead by its silence.",
	})
	placementSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: namespace, Name: "placement_plan_seconds",
		Help:    "Time to compute one placement plan, without carrying it out.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12),
	})
)

func init() {
	metrics.Registry.MustRegister(managerSessions, sessionsUnplaced, sessionsMisplaced, sessionsSilent, workers, poolCapacity, placements, workersLost, heartbeatsVisible, placementSeconds)
}

// Fleet is what the leader counts before each plan.
type Fleet struct {
	// Sessions by phase.
	Sessions map[string]int
	// Unplaced and Misplaced are the sessions that their pool cannot take.
	Unplaced, Misplaced map[PoolReason]int
	// HeldBySilent are the sessions of workers that are not live.
	HeldBySilent int
	// Workers by pool and state, Capacity of the live workers by pool.
	Workers  map[PoolState]int
	Capacity map[string]int
	// Planning is how long the plan took.
	Planning time.Duration
}

// PoolState is a pool and a state of workers: live, failing, draining, silent or dead.
type PoolState struct{ Pool, State string }

// PoolReason is a pool and why it cannot take a session.
type PoolReason struct{ Pool, Reason string }

// SetFleet publishes the counts; what they do not name any more disappears.
func SetFleet(f Fleet) {
	set := func(gauge *prometheus.GaugeVec, counts map[string]int) {
		gauge.Reset()
		for label, n := range counts {
			gauge.WithLabelValues(label).Set(float64(n))
		}
	}
	set(managerSessions, f.Sessions)
	setReasons := func(gauge *prometheus.GaugeVec, counts map[PoolReason]int) {
		gauge.Reset()
		for label, n := range counts {
			gauge.WithLabelValues(label.Pool, label.Reason).Set(float64(n))
		}
	}
	setReasons(sessionsUnplaced, f.Unplaced)
	setReasons(sessionsMisplaced, f.Misplaced)
	set(poolCapacity, f.Capacity)
	workers.Reset()
	for label, n := range f.Workers {
		workers.WithLabelValues(label.Pool, label.State).Set(float64(n))
	}
	sessionsSilent.Set(float64(f.HeldBySilent))
	placementSeconds.Observe(f.Planning.Seconds())
}

// WorkerLost counts a worker that died with its sessions.
func WorkerLost() { workersLost.Inc() }

// HeartbeatsVisible publishes whether both heartbeats of the workers are visible.
func HeartbeatsVisible(both bool) {
	value := 0.0
	if both {
		value = 1
	}
	heartbeatsVisible.Set(value)
}

// Placement counts a decision that was carried out, or could not be.
func Placement(result string) { placements.WithLabelValues(result).Inc() }

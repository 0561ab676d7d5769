package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	managerSessions  = gauge("sessions", "Sessions by phase, in the cache of the leader.", "phase")
	sessionsUnplaced = gauge("sessions_unplaced",
		"Sessions that want a worker and have none, by the pool of their namespace and reason. Scale the workers on NoCapacity.", "pool", "reason")
	sessionsMisplaced = gauge("sessions_misplaced",
		"Sessions that stay connected on a worker of another pool because the pool of their namespace cannot take them, by the pool of their namespace and reason.", "pool", "reason")
	sessionsSilent = gauge("sessions_held_by_silent_workers",
		"Sessions held by a worker whose Lease is not being renewed, or is gone.").WithLabelValues()
	workers = gauge("workers",
		"Workers by pool and state: live, failing (it cannot reach its database or WhatsApp), draining, silent or dead.", "pool", "state")
	poolCapacity  = gauge("pool_capacity_sessions", "Sessions that the live workers of a pool take at most.", "pool")
	poolSessions  = gauge("pool_sessions", "Sessions that need a worker of the pool, placed or not. Scale the workers on its share of pool_capacity_sessions.", "pool")
	bundledStores = gauge("bundled_store", "1 for a store (redis, database) that is the chart's own single server, for trying out only.", "store")
	placements    = counter("placements_total",
		"Decisions of the placement: placed, moved (off a draining worker or to another pool), moved_as_requested (move-to), moved_from_failing, rebalanced, failed_over (taken from a dead worker), withdrawn, conflict (the decision is made again) or failed.", "result")
	workersLost       = counter("workers_lost_total", "Workers that were declared dead while they held sessions.").WithLabelValues()
	heartbeatsVisible = gauge("heartbeats_visible",
		"1 while this manager can read both heartbeats of the workers, the Leases and Redis. While it is 0 no worker is declared dead for its silence.").WithLabelValues()
	placementSeconds = histogram("placement_plan_seconds",
		"Time to compute one placement plan, without carrying it out.", prometheus.ExponentialBuckets(0.0005, 2, 12)).WithLabelValues()
)

// Fleet is what the leader counts for each plan.
type Fleet struct {
	// Sessions are the sessions by phase.
	Sessions map[string]int
	// Unplaced and Misplaced are the sessions that their pool cannot take.
	Unplaced, Misplaced map[PoolReason]int
	// HeldBySilent are the sessions that workers hold which are not live.
	HeldBySilent int
	// Workers are the workers by pool and state, Capacity is that of the live workers by pool.
	Workers  map[PoolState]int
	Capacity map[string]int
	// Wanted are the sessions that need a worker, by the pool of their namespace.
	Wanted map[string]int
	// Planning is how long the plan took.
	Planning time.Duration
}

// PoolState is a pool and a state of workers: live, failing, draining, silent or dead.
type PoolState struct{ Pool, State string }

func (s PoolState) labels() []string { return []string{s.Pool, s.State} }

// PoolReason is a pool and the reason why it cannot take a session.
type PoolReason struct{ Pool, Reason string }

func (r PoolReason) labels() []string { return []string{r.Pool, r.Reason} }

// SetFleet publishes the counts. Labels that the counts do not have any more are removed.
func SetFleet(f Fleet) {
	replace(managerSessions, f.Sessions, func(phase string) []string { return []string{phase} })
	replace(sessionsUnplaced, f.Unplaced, PoolReason.labels)
	replace(sessionsMisplaced, f.Misplaced, PoolReason.labels)
	replace(poolCapacity, f.Capacity, func(pool string) []string { return []string{pool} })
	replace(poolSessions, f.Wanted, func(pool string) []string { return []string{pool} })
	replace(workers, f.Workers, PoolState.labels)
	sessionsSilent.Set(float64(f.HeldBySilent))
	placementSeconds.Observe(f.Planning.Seconds())
}

// replace sets a gauge to the counts and removes every other value of it.
func replace[K comparable](vec *prometheus.GaugeVec, counts map[K]int, labels func(K) []string) {
	vec.Reset()
	for key, n := range counts {
		vec.WithLabelValues(labels(key)...).Set(float64(n))
	}
}

// WorkerLost counts a worker that died with its sessions.
func WorkerLost() { workersLost.Inc() }

// SetHeartbeatsVisible publishes whether both heartbeats of the workers are visible.
func SetHeartbeatsVisible(both bool) { heartbeatsVisible.Set(oneIf(both)) }

// Placement counts a decision of the placement, by its result.
func Placement(result string) { placements.WithLabelValues(result).Inc() }

// SetBundledStores publishes which stores are the chart's own.
func SetBundledStores(names []string) {
	bundledStores.Reset()
	for _, name := range names {
		bundledStores.WithLabelValues(name).Set(1)
	}
}

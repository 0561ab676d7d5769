package redis

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-logr/logr"
	"github.com/google/uuid"
	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"
)

// watchInterval bounds how late a process notices that Redis has lost data. Two
// cheap commands each 2 s are no load for Redis.
const watchInterval = 2 * time.Second

// LossReason is why data in Redis may be lost.
type LossReason string

const (
	// Restarted: a server with a new run id answers.
	Restarted LossReason = "Restarted"
	// RoleChanged: the server was a master and is a replica, or the other way round.
	RoleChanged LossReason = "RoleChanged"
	// MarkerMissing: the marker key is gone, so other keys may be gone too.
	MarkerMissing LossReason = "MarkerMissing"
	// MarkerChanged: the marker has another value: another process has noticed the loss first.
	MarkerChanged LossReason = "MarkerChanged"
	// NotObserved: Redis could not be read when the watch began.
	NotObserved LossReason = "NotObserved"
)

// DeleteMarker makes the Watcher of every process report that data is lost. A process
// that finds keys missing calls it.
func DeleteMarker(ctx context.Context, client goredis.UniversalClient, keys Keys) error {
	if err := client.Del(ctx, keys.Marker()).Err(); err != nil {
		return fmt.Errorf("deleting the marker in Redis: %w", err)
	}
	return nil
}

// Watcher reports when Redis may have lost data, so that everything present is
// published again (docs/architecture.md, "QR and status").
type Watcher struct {
	// Client is the server to watch.
	Client goredis.UniversalClient
	// Keys name the marker.
	Keys Keys
	// Clock drives the observations.
	Clock clock.WithTicker
	// OnDataLoss is called each time, by the goroutine of Start; the next observation
	// comes after it has returned. A false alarm is possible and must do no harm.
	OnDataLoss func(LossReason)
	// Log gets a line when Redis cannot be read any more, and when it can be again.
	Log logr.Logger

	last *observation
	// missed: an observation failed before the first that succeeded.
	missed  bool
	failing bool
}

// observation is what was read of Redis at one time.
type observation struct {
	marker string
	// roles by run id; empty where the server has no INFO.
	roles map[string]string
}

// Start observes now and each 2 s until ctx ends. Errors of the connection are
// logged once, and it continues.
func (w *Watcher) Start(ctx context.Context) error {
	ticker := w.Clock.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		w.Observe(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// Observe reads Redis once and reports a loss. Start repeats it; both must not run at
// the same time.
func (w *Watcher) Observe(ctx context.Context) {
	now, missing, err := w.observe(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		if !w.failing {
			w.Log.Error(err, "Failed to watch Redis")
		}
		w.failing = true
		w.missed = w.missed || w.last == nil
		return
	}
	if w.failing {
		w.Log.Info("Watching Redis again")
		w.failing = false
	}
	before := w.last
	w.last = now
	if reason := loss(before, now, missing, w.missed); reason != "" {
		w.OnDataLoss(reason)
	}
	w.missed = false
}

// loss compares two observations; empty: nothing is lost.
func loss(before, now *observation, missing, missed bool) LossReason {
	switch {
	case before == nil && missed:
		return NotObserved
	case before == nil:
		return ""
	case before.marker != now.marker && missing:
		return MarkerMissing
	case before.marker != now.marker:
		return MarkerChanged
	}
	if len(before.roles) == 0 {
		return ""
	}
	for _, id := range slices.Sorted(maps.Keys(now.roles)) {
		role, known := before.roles[id]
		if !known {
			return Restarted
		}
		if role != now.roles[id] {
			return RoleChanged
		}
	}
	return ""
}

// observe reads the marker, and sets one where there is none.
func (w *Watcher) observe(ctx context.Context) (now *observation, missing bool, err error) {
	now = &observation{roles: map[string]string{}}
	err = eachMaster(ctx, w.Client, func(ctx context.Context, node goredis.Cmdable) error {
		fields, err := info(ctx, node, "server", "replication")
		if id := fields["run_id"]; id != "" {
			now.roles[id] = fields["role"]
		}
		if isReplica(fields) {
			leaveReplica(ctx, node, w.Keys.Workers())
		}
		return err
	})
	if err != nil {
		return nil, false, err
	}
	if len(now.roles) == 0 && w.last != nil {
		now.roles = w.last.roles // roles that cannot be read count as unchanged
	}
	now.marker, err = w.Client.Get(ctx, w.Keys.Marker()).Result()
	if errors.Is(err, goredis.Nil) {
		missing = true
		err = setIfMissing(ctx, w.Client, w.Keys.Marker(), uuid.NewString())
		var refusal goredis.Error
		switch {
		case err == nil:
			now.marker, err = w.Client.Get(ctx, w.Keys.Marker()).Result()
		case errors.As(err, &refusal):
			// A replica, a full server or one without a disk takes no marker. It is enough
			// to know that it is missing; one is set when the server takes writes again.
			err = nil
		}
	}
	if err != nil {
		return nil, false, fmt.Errorf("reading the marker in Redis: %w", err)
	}
	return now, missing, nil
}

// setIfMissing sets a key that is not there. SET with NX takes the place of SETNX, so
// that an ACL user needs one command less.
func setIfMissing(ctx context.Context, client goredis.UniversalClient, key, value string) error {
	err := client.SetArgs(ctx, key, value, goredis.SetArgs{Mode: "NX"}).Err()
	if errors.Is(err, goredis.Nil) { // it is there
		return nil
	}
	return err //nolint:wrapcheck // the caller knows what it asked
}

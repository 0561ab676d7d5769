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

// watchInterval bounds how late a process notices that Redis has forgotten. Two
// cheap commands each 2 s are nothing to Redis.
const watchInterval = 2 * time.Second

// Reason is why what was written may be gone.
type Reason string

const (
	// Restarted: a server with a new run id answers.
	Restarted Reason = "Restarted"
	// RoleChanged: the server was a master and is a replica, or the other way round.
	RoleChanged Reason = "RoleChanged"
	// MarkerMissing: the marker key is gone, so other keys are too.
	MarkerMissing Reason = "MarkerMissing"
	// MarkerChanged: the marker is another one: somebody else has noticed first.
	MarkerChanged Reason = "MarkerChanged"
	// NotWatched: Redis could not be seen when the watch began.
	NotWatched Reason = "NotWatched"
)

// Forget makes every Watcher say that Redis has forgotten, by deleting the marker. It is
// for whoever finds out that keys are gone.
func Forget(ctx context.Context, client goredis.UniversalClient, keys Keys) error {
	if err := client.Del(ctx, keys.Marker()).Err(); err != nil {
		return fmt.Errorf("deleting the marker in Redis: %w", err)
	}
	return nil
}

// Watcher tells when Redis may have forgotten what it was given, so that
// everything present is given to it again (docs/architecture.md, "QR and status").
type Watcher struct {
	// Client is the server to watch.
	Client goredis.UniversalClient
	// Keys name the marker.
	Keys Keys
	// Clock drives the looks.
	Clock clock.WithTicker
	// Forgot is called each time, by the goroutine of Start; the next look comes
	// after it has returned. A false alarm is possible and must do no harm.
	Forgot func(Reason)
	// Log gets a line when the connection is lost and when it is back.
	Log logr.Logger

	seen    *sight
	unseen  bool // a look failed before the first that succeeded
	trouble bool
}

// sight is what one look saw.
type sight struct {
	marker string
	// roles by run id; empty where the server has no INFO.
	roles map[string]string
}

// Start looks now and each 2 s until ctx ends. Errors of the connection are
// logged once and survived.
func (w *Watcher) Start(ctx context.Context) error {
	ticker := w.Clock.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		w.Look(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// NeedLeaderElection says that every process watches for itself.
func (w *Watcher) NeedLeaderElection() bool { return false }

// Look looks once. It is what Start repeats, and must not be called beside it.
func (w *Watcher) Look(ctx context.Context) {
	now, missing, err := w.look(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		if !w.trouble {
			w.Log.Error(err, "redis cannot be watched")
		}
		w.trouble = true
		w.unseen = w.unseen || w.seen == nil
		return
	}
	if w.trouble {
		w.Log.Info("redis is watched again")
		w.trouble = false
	}
	before := w.seen
	w.seen = now
	if reason := changed(before, now, missing, w.unseen); reason != "" {
		w.Forgot(reason)
	}
	w.unseen = false
}

// changed compares two looks.
func changed(before, now *sight, missing, unseen bool) Reason {
	switch {
	case before == nil && unseen:
		return NotWatched
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

// look reads the marker, and sets one where there is none.
func (w *Watcher) look(ctx context.Context) (now *sight, missing bool, err error) {
	now = &sight{roles: map[string]string{}}
	err = eachMaster(ctx, w.Client, func(ctx context.Context, node goredis.Cmdable) error {
		fields, err := info(ctx, node, "server", "replication")
		if id := fields["run_id"]; id != "" {
			now.roles[id] = fields["role"]
		}
		return err
	})
	if err != nil {
		return nil, false, err
	}
	if len(now.roles) == 0 && w.seen != nil {
		now.roles = w.seen.roles // what cannot be seen has not changed
	}
	now.marker, err = w.Client.Get(ctx, w.Keys.Marker()).Result()
	if errors.Is(err, goredis.Nil) {
		missing = true
		err = w.Client.SetNX(ctx, w.Keys.Marker(), uuid.NewString(), 0).Err()
		var refusal goredis.Error
		switch {
		case err == nil:
			now.marker, err = w.Client.Get(ctx, w.Keys.Marker()).Result()
		case errors.As(err, &refusal):
			// A replica, a full server or one without a disk takes no marker. That it is
			// missing says enough; one is set when the server takes writes again.
			err = nil
		}
	}
	if err != nil {
		return nil, false, fmt.Errorf("reading the marker in Redis: %w", err)
	}
	return now, missing, nil
}

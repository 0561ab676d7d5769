package worker

import (
	"errors"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

const (
	// healthWindow is how far back attempts count.
	healthWindow = time.Minute
	// healthHold is how long a worker stays failing without a further attempt. Its
	// sessions move to other workers, so it may have nothing left to try. After this time
	// it gets sessions again, and their attempts show whether it still fails.
	healthHold = 5 * time.Minute
	// minFailing is how many sessions, or proxies, must have failed: one failing account
	// or proxy says nothing about the worker.
	minFailing = 2
)

// ErrStoreUnreachable says that the database could not be reached, or does not serve
// requests. It is no error about the stored data.
var ErrStoreUnreachable = errors.New("the database cannot be reached")

// Health assesses, from the attempts of this worker's sessions, whether the worker
// reaches its database and WhatsApp (docs/architecture.md, "Ownership"). It is safe
// for concurrent use.
type Health struct {
	clock clock.PassiveClock
	log   logr.Logger

	mu              sync.Mutex
	store, whatsapp reachability
}

// NewHealth returns the health of a worker without any attempts yet.
func NewHealth(clock clock.PassiveClock, log logr.Logger) *Health {
	return &Health{clock: clock, log: log, store: newReachability(), whatsapp: newReachability()}
}

// Failing reports whether the database and WhatsApp cannot be reached. It is called
// at each renewal of the Lease.
func (h *Health) Failing() (store, whatsapp bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.assess("database", &h.store), h.assess("WhatsApp", &h.whatsapp)
}

func (h *Health) assess(service string, r *reachability) bool {
	before := r.failing
	failing := r.assess(h.clock.Now())
	metrics.SetUnreachable(service, failing)
	switch {
	case failing && !before:
		h.log.Info("Failed to reach a service in every attempt of the last minute; reporting it in the lease", "service", service)
	case before && !failing:
		h.log.Info("Stopped reporting a service as unreachable", "service", service)
	}
	return failing
}

// recordTake records the result of an attempt to take a session's keys.
func (h *Health) recordTake(session types.UID, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.store.record(session, "", !errors.Is(err, ErrStoreUnreachable), h.clock.Now())
}

// recordDial records the result of an attempt to connect by that egress; empty: the
// worker's own address. A dial that succeeds has read the device from the database,
// and a server of WhatsApp has answered. Whether WhatsApp then accepts the device says
// nothing about the worker.
func (h *Health) recordDial(session types.UID, egress string, err error) {
	var refused *whatsapp.ConnectError
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.clock.Now()
	switch {
	case errors.Is(err, ErrStoreUnreachable):
		h.store.record(session, "", false, now)
	case err == nil:
		h.store.record(session, "", true, now)
		h.whatsapp.record(session, egress, true, now)
	case errors.As(err, &refused):
		h.store.record(session, "", true, now)
		h.whatsapp.record(session, egress, false, now)
	}
}

// reachability is what the attempts of the last minute say about one service. It is
// pure.
type reachability struct {
	// failed is the last failure of each session, and succeeded the last success by each egress.
	failed    map[types.UID]failure
	succeeded map[string]time.Time
	// failing is the last assessment. Without further attempts it holds until until.
	failing bool
	until   time.Time
}

type failure struct {
	egress string
	at     time.Time
}

func newReachability() reachability {
	return reachability{failed: map[types.UID]failure{}, succeeded: map[string]time.Time{}}
}

func (r *reachability) record(session types.UID, egress string, succeeded bool, now time.Time) {
	if succeeded {
		delete(r.failed, session)
		r.succeeded[egress] = now
	} else {
		r.failed[session] = failure{egress: egress, at: now}
	}
}

// assess removes the attempts that are older than healthWindow, and reports whether
// the service cannot be reached:
//
//   - by the worker's own address, where sessions use it: at least two failed, and
//     none succeeded;
//   - where all use proxies: at least two proxies failed, and none succeeded.
//
// If the attempts fit neither, the last assessment stays, for healthHold.
func (r *reachability) assess(now time.Time) bool {
	own, proxies := 0, map[string]bool{}
	for session, f := range r.failed {
		switch {
		case now.Sub(f.at) >= healthWindow:
			delete(r.failed, session)
		case f.egress == "":
			own++
		default:
			proxies[f.egress] = true
		}
	}
	for egress, at := range r.succeeded {
		if now.Sub(at) >= healthWindow {
			delete(r.succeeded, egress)
		}
	}
	_, ownSucceeded := r.succeeded[""]
	switch {
	case ownSucceeded, own == 0 && len(r.succeeded) > 0:
		r.failing = false
	case own >= minFailing, own == 0 && len(proxies) >= minFailing:
		r.failing, r.until = true, now.Add(healthHold)
	case !now.Before(r.until):
		r.failing = false
	}
	return r.failing
}

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
	// healthHold is for how long a worker stays failing without an attempt that says
	// otherwise. Its sessions move to other workers, so that it may have nothing left to try;
	// after this time it is given sessions again, and shows what it can.
	healthHold = 5 * time.Minute
	// minFailing is how many sessions, or proxies, must have failed: the failures of one
	// account or of one proxy say nothing of the worker.
	minFailing = 2
)

// ErrStoreUnreachable says that the database could not be reached, or does not serve:
// an error that is not about what is stored.
var ErrStoreUnreachable = errors.New("the database cannot be reached")

// Health tells by the attempts of this worker's sessions whether it reaches its
// database and WhatsApp (docs/architecture.md, "Ownership"). It may be used by many goroutines.
type Health struct {
	clock clock.PassiveClock
	log   logr.Logger

	mu              sync.Mutex
	store, whatsapp reach
}

// NewHealth returns the health of a worker that has not tried anything yet.
func NewHealth(clock clock.PassiveClock, log logr.Logger) *Health {
	return &Health{clock: clock, log: log, store: newReach(), whatsapp: newReach()}
}

// Failing reports what cannot be reached. It is called at each renewal of the Lease.
func (h *Health) Failing() (store, whatsapp bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.assess("database", &h.store), h.assess("WhatsApp", &h.whatsapp)
}

func (h *Health) assess(what string, r *reach) bool {
	before := r.failing
	failing := r.assess(h.clock.Now())
	metrics.Unreached(what, failing)
	switch {
	case failing && !before:
		h.log.Info("Failed to reach a service with every attempt of the last minute, saying so in the lease", "service", what)
	case before && !failing:
		h.log.Info("No longer failing to reach a service", "service", what)
	}
	return failing
}

// took records the result of an attempt to take a session's keys.
func (h *Health) took(session types.UID, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.store.record(session, "", !errors.Is(err, ErrStoreUnreachable), h.clock.Now())
}

// dialed records the result of an attempt to connect by that egress; empty: the
// worker's own address. A dial that succeeds has read the device from the database,
// and a server of WhatsApp has answered; whether it lets the device in says nothing of
// the worker.
func (h *Health) dialed(session types.UID, egress string, err error) {
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

// reach is what the attempts of the last minute say of one service. It is pure.
type reach struct {
	// failed is the last failure of each session, and succeeded the last success by each egress.
	failed    map[types.UID]failure
	succeeded map[string]time.Time
	// failing is the last assessment, and until when it holds without an attempt.
	failing bool
	until   time.Time
}

type failure struct {
	egress string
	at     time.Time
}

func newReach() reach {
	return reach{failed: map[types.UID]failure{}, succeeded: map[string]time.Time{}}
}

func (r *reach) record(session types.UID, egress string, succeeded bool, now time.Time) {
	if succeeded {
		delete(r.failed, session)
		r.succeeded[egress] = now
	} else {
		r.failed[session] = failure{egress: egress, at: now}
	}
}

// assess forgets what is older than the window, and reports whether the service
// cannot be reached:
//
//   - by the worker's own address, where sessions use it: at least two failed, and
//     none succeeded;
//   - where all use proxies: at least two proxies failed, and none succeeded.
//
// Attempts that say neither yes nor no leave the assessment as it was, for healthHold.
func (r *reach) assess(now time.Time) bool {
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

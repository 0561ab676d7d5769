package controllers

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// claimOutweighs is for how long a claim that was seen outweighs a verdict. A
// verdict rests on reads that may be some seconds old (an observer whose reads
// are 5 s apart begins anew), so it may not know yet that the worker came back,
// renewed its witnesses and claimed a session. Of a worker that is really dead
// the last claim is older, or its fail-over is late by this much at most.
const claimOutweighs = 10 * time.Second

// errAlive says that a verdict does not stand any more: the decision is made again.
var errAlive = errors.New("the worker is not declared dead any more")

// Verdicts tells which workers are dead: no change in either witness for 15 s
// under an observer that saw both, or the kubelet's word (DESIGN section 3.5).
type Verdicts interface {
	// Dead reports whether the worker of that name is declared dead. It does no I/O. A
	// worker of which there is no witness at all is dead once that has been seen for 15 s.
	// A verdict whose reads are older than 5 s does not stand.
	Dead(worker string) bool
	// Changed gets a value (buffered, never blocks) after a verdict has changed.
	Changed() <-chan struct{}
}

// claims remembers when each worker was last seen to claim a session.
//
// A claim that came before the manager's read makes no conflict with its patch,
// so it must be weighed against the verdict: the process that made it has
// renewed both witnesses before. One that comes later conflicts.
type claims struct {
	clock clock.PassiveClock

	mu   sync.Mutex
	seen map[string]time.Time // by worker
}

// observe takes note of a session as a watch brings it; before is nil where it
// was not known.
func (c *claims) observe(before, after *v1alpha1.WhatsAppSession) {
	holder := after.Status.HeldBy
	if holder == "" || before != nil && before.Status.HeldBy == holder && before.Status.HolderStart == after.Status.HolderStart {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen[holder] = c.clock.Now()
}

// outweigh reports whether the worker has claimed a session so lately that a
// verdict may not know of it, and until when.
func (c *claims) outweigh(worker string) (until time.Time, yes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	until = c.seen[worker].Add(claimOutweighs)
	if !c.clock.Now().Before(until) {
		return time.Time{}, false
	}
	return until, true
}

// forget drops the claims that say nothing any more.
func (c *claims) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.clock.Now()
	maps.DeleteFunc(c.seen, func(_ string, seen time.Time) bool { return !now.Before(seen.Add(claimOutweighs)) })
}

// dead reports whether what the worker holds may be taken from it; where only a
// late claim forbids that, until is when to look again.
func (r *placementReconciler) dead(worker string) (dead bool, until time.Time) {
	if !r.Verdicts.Dead(worker) {
		return false, time.Time{}
	}
	until, claimed := r.claims.outweigh(worker)
	return !claimed, until
}

// passOn asks for a run after each change of a verdict, until ctx ends.
func (r *placementReconciler) passOn(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.Verdicts.Changed():
		}
		select {
		case <-ctx.Done():
			return nil
		case r.changed <- event.GenericEvent{}:
		}
	}
}

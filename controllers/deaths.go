package controllers

import (
	"context"
	"errors"

	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

// errNotDead says that the worker is not dead by the newest observation: the decision
// is made again.
var errNotDead = errors.New("the worker is not declared dead any more")

// DeathConfirmer tells which workers are dead: no change in either heartbeat for 15 s
// under an observer that saw both, or the kubelet's report (docs/architecture.md, "Ownership").
// Calls may run concurrently.
type DeathConfirmer interface {
	// Dead reports whether the worker of that name is declared dead. It does no I/O. A
	// worker of which there is no heartbeat at all is dead once that has been seen for 15 s.
	// After 5 s without an observation no worker is.
	Dead(worker string) bool
	// Confirm observes the heartbeats once more: what Dead says afterwards rests on reads
	// that began after Confirm was called. The error says what could not be seen; Dead
	// takes that into account.
	Confirm(ctx context.Context) error
	// Changed gets a value (buffered, never blocks) after the answer of Dead has changed for
	// a worker.
	Changed() <-chan struct{}
}

// dead are the dead among the holders of sessions that were read before, and
// among the workers whose Lease is being renewed.
//
// A process that came back in place renews its heartbeats before it claims a
// session. So an observation that began after the sessions were read shows every
// process whose claim they show, however old the declaration was; and a claim that
// they do not show conflicts with the patch. Without that observation a session
// could be taken from a process that has just opened it.
//
// The watch may show a new worker's Lease up to one observation before the observer
// reads it, and to the observer a worker that was never seen is dead. Without an
// observation in between, a rolling restart would give the sessions also to workers
// that are about to end.
func (r *placementReconciler) dead(ctx context.Context, sessions []v1alpha1.WhatsAppSession, workers []placement.Worker) map[string]bool {
	dead := map[string]bool{}
	for i := range sessions {
		s := &sessions[i].Status
		if s.HeldBy != "" && s.Installation == r.Installation && !dead[s.HeldBy] && r.Deaths.Dead(s.HeldBy) {
			dead[s.HeldBy] = true
		}
	}
	for _, w := range workers {
		if w.Live && r.Deaths.Dead(w.Name) {
			dead[w.Name] = true
		}
	}
	if len(dead) == 0 {
		return nil
	}
	if err := r.Deaths.Confirm(ctx); err != nil && ctx.Err() == nil {
		r.Log.V(1).Info("Failed to read every heartbeat of the workers", "reason", err.Error())
	}
	for name := range dead {
		dead[name] = r.Deaths.Dead(name)
	}
	return dead
}

// forwardDeaths asks for a run after each change of what Dead says, until ctx ends.
func (r *placementReconciler) forwardDeaths(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.Deaths.Changed():
		}
		select {
		case <-ctx.Done():
			return nil
		case r.changed <- event.GenericEvent{}:
		}
	}
}

package controllers

import (
	"context"
	"errors"

	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

// errAlive says that a verdict does not stand any more: the decision is made again.
var errAlive = errors.New("the worker is not declared dead any more")

// Verdicts tells which workers are dead: no change in either heartbeat for 15 s
// under an observer that saw both, or the kubelet's word (DESIGN section 3.5).
// Calls may run concurrently.
type Verdicts interface {
	// Dead reports whether the worker of that name is declared dead. It does no I/O. A
	// worker of which there is no heartbeat at all is dead once that has been seen for 15 s.
	// A verdict whose reads are older than 5 s does not stand.
	Dead(worker string) bool
	// Confirm looks at the heartbeats once more: what Dead says afterwards rests on reads
	// that began after Confirm was called. The error says what could not be seen; Dead
	// takes that into account.
	Confirm(ctx context.Context) error
	// Changed gets a value (buffered, never blocks) after a verdict has changed.
	Changed() <-chan struct{}
}

// dead are the dead among the holders of sessions that were read before, and
// among the workers whose Lease is being renewed.
//
// A process that came back in place renews its heartbeats before it claims a
// session. So a look that began after the sessions were read knows of every
// process whose claim they show, however old the verdict was; and a claim that
// they do not show conflicts with the patch. Without that look a session could
// be taken from a process that has just opened it.
//
// The watch may know a new worker's Lease up to one look before the observer
// does, to which who was never seen is dead. Without a look of its own a rolling
// restart would hand the sessions to workers that are about to end, too.
func (r *placementReconciler) dead(ctx context.Context, sessions []v1alpha1.WhatsAppSession, workers []placement.Worker) map[string]bool {
	dead := map[string]bool{}
	for i := range sessions {
		s := &sessions[i].Status
		if s.HeldBy != "" && s.Installation == r.Installation && !dead[s.HeldBy] && r.Verdicts.Dead(s.HeldBy) {
			dead[s.HeldBy] = true
		}
	}
	for _, w := range workers {
		if w.Live && r.Verdicts.Dead(w.Name) {
			dead[w.Name] = true
		}
	}
	if len(dead) == 0 {
		return nil
	}
	if err := r.Verdicts.Confirm(ctx); err != nil && ctx.Err() == nil {
		r.Log.V(1).Info("Not every heartbeat of the workers could be seen", "reason", err.Error())
	}
	for name := range dead {
		dead[name] = r.Verdicts.Dead(name)
	}
	return dead
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

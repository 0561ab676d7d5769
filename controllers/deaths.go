package controllers

import (
	"context"
	"errors"

	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

// errNotDead says that the newest observation does not show the worker as dead. Then the
// decision is made again.
var errNotDead = errors.New("the worker is not declared dead any more")

// DeathConfirmer decides which workers are dead: neither heartbeat has changed for 15 s
// while both were visible, or the kubelet has reported the end, or the node is lost
// (docs/architecture.md, "Ownership"). Calls may run concurrently.
type DeathConfirmer interface {
	// Dead reports whether the worker of that name is declared dead. It does no I/O. A worker
	// without any heartbeat is dead after 15 s of observation. After 5 s without an
	// observation no worker is declared dead.
	Dead(worker string) bool
	// LeaseSilent reports whether the worker's Lease has not been renewed for so long that the
	// worker would be dead by now, if its other heartbeat were visible and silent too. It does no I/O.
	LeaseSilent(worker string) bool
	// Confirm observes the heartbeats once more: the result of Dead afterwards is based on
	// reads that began after the call of Confirm. The error says what could not be read; Dead
	// takes that into account.
	Confirm(ctx context.Context) error
	// Changed receives a value (buffered, never blocks) after the result of Dead or of
	// LeaseSilent has changed for a worker.
	Changed() <-chan struct{}
}

// dead returns which holders of the sessions are dead, and which workers whose Lease is
// being renewed are. The sessions must have been read before the call.
//
// A process that is restarted in place renews its heartbeats before it claims a session.
// So an observation that began after the sessions were read shows every process whose claim
// is in those sessions, however long ago it was declared dead. A claim that is not in those
// sessions makes the patch conflict. Without that observation a session could be taken from
// a process that has just connected it.
//
// The watch may show a new worker's Lease up to one observation before the observer reads
// it, and the observer declares a worker dead that it has never seen. Without an observation
// in between, a rolling restart would place the sessions also on workers that are about to
// end.
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

// forwardDeaths requests a run after each change that Deaths.Changed reports, until ctx ends.
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

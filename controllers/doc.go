// Package controllers contains the manager's reconcilers. They read and write Kubernetes
// objects, and never connect to WhatsApp.
//
// The SessionReconciler handles one session at a time: its finalizer, which object holds
// its id, suspension, restart, deletion, and its status while no worker holds it. The
// placement reconciler computes from all sessions and all workers which worker gets which
// session.
//
// While status.heldBy names a worker, that worker writes the status and the
// manager writes only status.worker and status.epoch. Every write is a merge
// patch with the resourceVersion that it was computed from, so a decision that was made
// from a stale cache fails, and is made again.
//
// A session that a dead worker holds is taken from it and placed again in one patch. The
// DeathConfirmer decides which workers are dead.
//
// The SessionReconciler publishes the status of a session that no worker holds to Redis,
// from which Laravel gets it. The patch that changed the status has raised the epoch too,
// and every new leader publishes it again.
package controllers

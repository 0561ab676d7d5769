// Package controllers is the manager's half of a session's life: Kubernetes
// in, decisions out. It never speaks to WhatsApp.
//
// The SessionReconciler leads one session at a time through its story: the
// finalizer, whose id it is, suspension, restart, deletion, and what its status
// says while no worker holds it. The placement reconciler looks at all sessions
// and all workers at once and writes which worker a session belongs to.
//
// While status.heldBy names a worker, that worker writes the status and the
// manager writes only status.worker and status.epoch. Every write is a merge
// patch with the resourceVersion that it was computed from, so a decision that
// was made from an old picture fails, and is made again.
//
// What a dead worker holds is taken from it in the patch that places it anew. Who
// is dead is what DeathConfirmer says; a claim that was just seen outweighs
// it, for the observer may not know of it yet.
//
// What Redis, and through it Laravel, is to hear of a session that nobody holds
// is said by the SessionReconciler: under an epoch that was raised in the very
// patch that changed the status, and again by every new leader.
package controllers

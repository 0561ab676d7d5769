// Package session decides what a worker does with one session. It is pure: it opens
// no connection, writes nothing and does not read the clock.
//
// A Machine has a small interface. Step takes an Input: an object from the API server,
// an event of the connection, the result of an operation, or the request to drain.
// Next returns a Decision: an operation to start or to cancel, what to publish, and
// which Events to record. WakeAt is when to call Next again. Status is the status to
// write to the API server.
//
//   - inputs.go, decision.go: the interface
//   - rules.go: the ordered table that decides the next step
//   - machine.go: the state, and how each input changes it
//   - quarantine.go, failures.go: sessions that fail again and again
//   - trial.go: sessions that may end their workers
//   - inbox.go: sessions whose messages cannot be stored
//   - rest.go: sessions that wait for a person or a time (the manager uses it too)
//   - reasons.go: why connections end
//
// Package worker carries out the decisions.
package session

// Package session decides what becomes of one session in a worker. It is pure:
// it opens no connection, writes nothing and does not read the clock.
//
// A Machine is used through a small door. Whatever happens goes in as an Input
// (Step): an object from the API server, an event of the connection, the result
// of an operation, the wish to drain. What is to be done comes out as a Decision
// (Next): an operation to start or to cancel, what to publish, Events to record,
// and the time at which to ask again. Status is what the API server is to keep.
//
//   - inputs.go, decision.go: the door
//   - rules.go: the ordered table that decides the next step
//   - machine.go: the facts, and what each input makes of them
//   - quarantine.go, failures.go: sessions that fail again and again
//   - rest.go: what the status remembers of a session that waits (the manager uses it too)
//   - reasons.go: why connections end
//
// The worker package carries the decisions out.
package session

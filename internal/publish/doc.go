// Package publish brings the state of sessions to Redis: into the coalescing
// queues, from which Laravel gets it, and into the cache, from which people and
// Laravel read it. Workers publish the sessions that they hold, the manager those
// that nobody holds. Callers that come at the same time share a round trip.
package publish

// Package publish writes the state of sessions to Redis: into the coalescing queues, from
// which it is delivered to Laravel, and into the cache, which people and Laravel read.
// Workers publish the sessions that they hold, the manager those that no worker holds.
// Concurrent calls share round trips.
package publish

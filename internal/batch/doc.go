// Package batch sends the updates of sessions to Laravel in few requests. It contains
// the coalescing queue of states, which is in Redis, and the flusher, which empties it
// (docs/architecture.md, "QR and status"). A second flusher empties the inbox of messages,
// which is in the database (internal/store) and has the same claims.
//
// # The queue
//
// There is one queue per delivery.Kind. For each session it holds only the newest item,
// by its numbers (epoch, seq), and its due time, from which it may be claimed:
//
//	Enqueue ──► items + due ──Claim──► a stored batch ──Ack──► deleted
//	                 ▲                    │  ▲
//	                 └── what was         │  └─ Release, or the end of the
//	                     replaced ◄──Ack──┘     claim: claimed again
//
// A claimed batch is stored with its id and its exact items until it is
// finished, so a repetition by any process is the same request. While it is stored, its
// sessions are in flight: newer items of them wait, and so a session's updates arrive in
// order. After the Ack the queue keeps the last numbers of each session for a week, and
// refuses items that are not newer.
//
// # In Redis
//
// Every change is one Lua script (folder scripts): no other process sees a change half
// done, and a script can detect that it is repeated. The keys
// of a kind share the hash tag {queue}, which puts them on one node of a Redis
// Cluster. They are batch:{queue}:<kind>: and
//
//	items    hash    session → the newest item
//	urgent   zset    session → due time, for items of priority high
//	normal   zset    session → due time, for the others
//	flight   hash    session → numbers and batch id of its item in a stored batch
//	last     hash    session → numbers, time and expiry of its last delivered item
//	forget   zset    session → when its entry in last was written
//	open     zset    batch id → the time from which it may be claimed again
//	claims   hash    batch id → number of claims and the token of the newest
//	content  hash    batch id → its items
//	state    string  how many sessions items had after the last change
//
// There are also the stream batch:{queue}:dead:<kind> of dead letters and the channel
// batch:{queue}:wake. Times are Unix milliseconds by the clock of Redis.
// Numbers are compared as decimals of a fixed width, byte by byte, because
// Lua's numbers are exact only up to 2⁵³ and no script re-encodes an item.
//
// # When keys are missing
//
// A person may delete a key, Redis may evict it, another program may overwrite it.
// No script fails because of that: each discards what it cannot read and continues.
// Queue.Backlog compares the sizes of the keys, and so finds a missing key, also if all
// are missing (then state is missing). It repairs the queue: it restores due times and
// marks from the other keys, and deletes the marker of redis.Watcher, so that every
// process publishes its present state again.
package batch

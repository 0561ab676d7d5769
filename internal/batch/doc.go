// Package batch carries updates of sessions to Laravel in few requests: the
// coalescing queue, which is in Redis, and the flusher, which empties it
// (docs/architecture.md, "QR and status").
//
// # The queue
//
// There is one queue per delivery.Kind. It holds of each session the newest
// item by its numbers (epoch, seq), and a due time from which it may be claimed:
//
//	Enqueue ──► items + due ──Claim──► a stored batch ──Ack──► gone
//	                 ▲                    │  ▲
//	                 └── what was         │  └─ Release, or the end of the
//	                     replaced ◄──Ack──┘     claim: claimed again
//
// A claimed batch is stored with its id and its exact items until it is
// finished, so whoever repeats it sends the same request. While it is stored
// its sessions are in flight: what is newer waits behind it, and so a session's
// updates arrive in order. After the Ack the queue remembers for a week which
// numbers were the last, and refuses what is not newer.
//
// # In Redis
//
// Every change is one Lua script (folder scripts), so that no other process
// sees it half done and a repetition can be told from the first time. The keys
// of a kind share the hash tag {queue}, which puts them on one node of a Redis
// Cluster. They are batch:{queue}:<kind>: and
//
//	items    hash    session → the newest item
//	urgent   zset    session → due time, for items of priority high
//	normal   zset    session → due time, for the others
//	flight   hash    session → numbers and batch id of what is in a stored batch
//	last     hash    session → numbers, time and expiry of what was delivered last
//	forget   zset    session → when that was
//	open     zset    batch id → from when on it may be claimed again
//	claims   hash    batch id → number of claims and the token of the newest
//	content  hash    batch id → its items
//	state    string  how many sessions items had after the last change
//
// beside the stream batch:{queue}:dead:<kind> of dead letters and the channel
// batch:{queue}:wake. Times are Unix milliseconds by the clock of Redis.
// Numbers are compared as decimals of a fixed width, byte by byte, because
// Lua's numbers are exact only up to 2⁵³ and no script re-encodes an item.
//
// # When keys are gone
//
// A person may delete a key, Redis may evict it, another program may overwrite it.
// No script fails because of that: each discards what it cannot read and goes on.
// Queue.Pending compares the sizes of the keys, which shows each key that is gone,
// also all of them together (state is missing then), and repairs the queue: due times
// and marks are made again from what is there, and the marker of redis.Watcher is
// deleted, so that every process publishes what is present again.
package batch

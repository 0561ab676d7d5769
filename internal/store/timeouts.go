package store

import "time"

// The time-outs of the store. They depend on each other:
//
//   - fenceIdleTimeout (3 s) < idleTimeout (5 s): a former owner that is stopped inside a
//     write, or inside a taking, keeps the record locked for that long.
//   - idleTimeout (5 s) + fenceIdleTimeout (3 s) < TakeTimeout (10 s): a taking that meets a
//     stopped taking and then a stopped write still succeeds.
//   - peerTimeout (15 s) < answerTimeout (20 s): for a node that is lost the kernel's
//     error comes first, and names the cause. answerTimeout is for a server that is there
//     and does not answer, or a proxy whose server is gone.
//   - QueryTimeout (2 s) is for the manager, which has other work: it may be shorter than the
//     locks above are held, because a reconciler comes back.
const (
	// fenceIdleTimeout is how long a transaction with the fence may do nothing until
	// PostgreSQL ends it: while it lasts the successor waits. It is set for each
	// transaction, so that it also holds where a pooler is in between.
	fenceIdleTimeout = 3 * time.Second
	// idleTimeout is that of any other transaction.
	idleTimeout = 5 * time.Second
	// connectTimeout is how long a new connection may take, where the URL sets none.
	connectTimeout = 5 * time.Second
	// peerTimeout is how long a connection to PostgreSQL waits for the other side's
	// kernel. A lost node sends nothing, and Linux alone waits for a quarter of an
	// hour: all connections of the pool would hang in it, and every login with them.
	peerTimeout = 15 * time.Second
	// answerTimeout bounds a transaction, and a read outside one, from the wait for a
	// connection to the answer.
	answerTimeout = 20 * time.Second
	// deleteTimeout bounds the marking of a device, which must not be stopped by the end of
	// the connection that has led to it.
	deleteTimeout = 5 * time.Second
	// migrateTimeout bounds a migration, which may build an index over a large table.
	migrateTimeout = 10 * time.Minute
	// sqliteBusyTimeout is how long a writer waits for one in another process.
	sqliteBusyTimeout = 10 * time.Second

	// connIdleTimeout is how long an unused connection is kept.
	connIdleTimeout = 5 * time.Minute
	// connLifetime is how long a connection is used: the address may name another server
	// by then, the password may have been changed.
	connLifetime = 30 * time.Minute

	// TakeTimeout bounds what a worker asks before it can dial.
	TakeTimeout = 10 * time.Second
	// QueryTimeout bounds what the manager asks for a session.
	QueryTimeout = 2 * time.Second
)

package store

import "time"

// The time-outs of the store. They depend on each other:
//
//   - fenceIdleTimeout (3 s) < idleTimeout (5 s): a former owner that is stopped inside a
//     write, or inside a taking, keeps the record locked for that long.
//   - idleTimeout (5 s) + fenceIdleTimeout (3 s) < TakeTimeout (10 s): a taking that meets a
//     stopped taking and then a stopped write still succeeds.
//   - peerTimeout (15 s) < answerTimeout (20 s): if a node is lost, the kernel's error
//     comes first, and names the cause. answerTimeout is for a server that is reachable
//     but does not answer, or a proxy that has lost its server.
//   - QueryTimeout (2 s) is for the manager, which has other work: it may be shorter than
//     the locks above are held, because a reconciler tries again.
const (
	// fenceIdleTimeout is how long a transaction with the fence may be idle before
	// PostgreSQL ends it: the successor waits until then. It is set for each
	// transaction, so that it also works with a pooler.
	fenceIdleTimeout = 3 * time.Second
	// idleTimeout is the same for any other transaction.
	idleTimeout = 5 * time.Second
	// connectTimeout is how long a new connection may take if the URL sets no time-out.
	connectTimeout = 5 * time.Second
	// peerTimeout is how long a connection to PostgreSQL waits for the peer's kernel. A
	// lost node sends nothing, and by default Linux waits for a quarter of an hour: all
	// connections of the pool would hang for that time, and every login too.
	peerTimeout = 15 * time.Second
	// answerTimeout is the time-out of a transaction, or of a read outside one, from the
	// wait for a connection to the answer.
	answerTimeout = 20 * time.Second
	// preKeysTimeout is the time-out of the transaction that makes a device's one-time keys:
	// 812 scalar multiplications and as many rows. On an overloaded machine they take long, and
	// a transaction that ends before loses all of them: the next login would start again.
	preKeysTimeout = 2 * time.Minute
	// deleteTimeout is the time-out for marking a device. The end of the connection that
	// caused the marking must not stop it.
	deleteTimeout = 5 * time.Second
	// migrateTimeout is the time-out of a migration, which may build an index over a large table.
	migrateTimeout = 10 * time.Minute
	// sqliteBusyTimeout is how long a writer waits for a writer in another process.
	sqliteBusyTimeout = 10 * time.Second

	// connIdleTimeout is how long an unused connection is kept.
	connIdleTimeout = 5 * time.Minute
	// connLifetime is how long a connection is used: the address may name another server
	// by then, the password may have been changed.
	connLifetime = 30 * time.Minute

	// TakeTimeout is the time-out of a worker's calls before it can dial.
	TakeTimeout = 10 * time.Second
	// QueryTimeout is the time-out of the manager's calls for a session.
	QueryTimeout = 2 * time.Second
)

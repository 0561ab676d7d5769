// Package store keeps the keys of the linked devices, and records which session
// a device belongs to and which process may write it. It also holds the messages that wait for
// Laravel. It uses whatsmeow's own tables
// and migrations (store/sqlstore), in PostgreSQL or in SQLite.
//
// # Records
//
// Each session id has one [Record]: the namespace and the object's UID that
// hold the id, the linked device's JID, and two numbers. A record lives as long
// as any key of the session is kept, so no other object can get the id meanwhile
// ([Store.Claim]).
//
// # Taking and fencing
//
// A worker takes a session with [Store.Take] under the epoch that the manager
// gave it. That raises the record's epoch and its starts, and waits for the
// writes of an earlier owner that are in flight. From then on the earlier owner
// cannot write any more: every write of a device's keys runs in one transaction
// that first reads and locks the record and stops if the numbers or the JID in
// it are not those of the writer.
//
// [Taking.Open] reads the device and wraps it: the container and every store of
// a whatsmeow store.Device are replaced by one object (device.go) that fences
// its writes. The device is read and wrapped again for every connection.
//
// # Failing
//
// whatsmeow acknowledges a message when its store fails, and WhatsApp then
// forgets it. It does not acknowledge when the context is cancelled or the
// error is context.Canceled. So the first error of the store, or a refusal by the
// fence, is passed to the function given to Open, which must cancel the
// connection's context. From then on every call of that device, also a read,
// fails with an error that is context.Canceled.
//
// # Keys are not deleted by mistake
//
// A device that WhatsApp logs out is only marked: its rows are renamed and kept
// for 30 days. Keys whose resource does not exist any more are orphans, kept as
// long, or retained until a person purges them ([Keeping]). [Store.Clean] deletes
// what is older; [Store.Restore] gives a marked device back.
//
// # The inbox
//
// A message must be on disk before WhatsApp may forget it. The holder of a session pushes it
// with [Inbox.Push], under the fence of its taking; the leading manager claims batches,
// delivers them and acknowledges them. docs/decisions/0002-inbox.md says why it is made like
// this.
//
// # The files
//
// store.go opens the database, postgres.go makes connections to PostgreSQL,
// timeouts.go sets every time-out, schema.go the migration, record.go the records,
// installation.go the installation, take.go the taking, device.go the fence,
// clean.go the deletions, orphans.go the keys without a resource, restore.go the
// devices that were logged out, secrets.go the secrets of messages, gate.go what protects the manager from a database
// that does not answer, unreachable.go which errors mean that, lids.go the map
// between phone numbers and LIDs, memory.go the cache of that map, inbox.go the inbox and
// its pushes, inbox_claims.go its batches, inbox_letters.go its dead letters, inbox_bounds.go
// its bounds.
package store

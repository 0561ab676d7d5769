// Package cache keeps in Redis what others may read quickly of each session: the newest
// QR code, the status, and which worker holds the connection (docs/architecture.md, "QR and
// status"). Laravel reads the same keys.
//
// # The values
//
// Each is one JSON object, read with GET:
//
//	session:<sid>:qr          delivery.QRItem      until the code expires
//	session:<sid>:status      delivery.StatusItem  120 s, rewritten by the worker (RefreshAll)
//	session:<sid>:connection  Connection           120 s, rewritten by the worker
//
// A missing key means: no code to scan, or nothing was published of the session for two
// minutes. Every object begins with {"epoch":<n>,"seq":<n>, without
// white space; the order of the other members, and what is added to them later,
// is not important to a reader.
//
// # Who may overwrite what
//
// The pair (epoch, seq) orders the writes of a session, and each script compares
// it, key by key, with the one in the value before it writes. It takes the two
// numbers from the text and compares them as text (the longer is the greater,
// equal lengths are decided by their bytes), because Lua's numbers are exact
// only up to 2⁵³. A value that does not begin as described was not written by
// this program; it is overwritten.
//
// What was deleted leaves its numbers for ten minutes in a second key on the
// same node of a Redis Cluster, gone:{session:<sid>:qr}, so that an older write
// that arrives late does not bring it back.
package cache

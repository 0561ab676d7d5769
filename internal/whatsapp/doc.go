// Package whatsapp is the connector: the only package, but for the simulator,
// that uses the whatsmeow library's client. It hides it behind a few verbs
// (connect, log out, close) and one kind of [Event].
//
// [Setup] is called once in a process and returns the [Factory] of all
// connections. A [Connection] is one login of one device, or one attempt at
// pairing, and is never used twice: whatsmeow itself tries to log in after a pairing
// only once and only logs a failure, and a store that has failed stays closed. So also
// the login after a pairing is a new connection, with the device read anew.
//
// # What ends a connection
//
// The context given to [Connection.Connect] is the connection's life: when it
// ends, the socket is closed at once. Every connection that was opened reports its
// end with exactly one event for which [Event.Over] holds, unless it is closed
// first. whatsmeow has several ends without an event of its own (a lost last
// node, an unpaired client, the close after 515), so the socket itself is
// watched, see monitoredconn.go.
//
// # Pairing
//
// A device without an ID offers codes to scan ([EventQR]) or, with
// [Options.PairPhone], asks for a code to type on that phone
// ([EventPairingCode]). Either way a phone's consent is [EventPairSuccess], and the
// device logs in on the next connection.
//
// # Messages
//
// WhatsApp gets its acknowledgement when [Options.Accept] has returned without
// an error. One refusal refuses all that follow on the connection, so that their
// order is kept; WhatsApp delivers them again at the next login.
//
// # What a server may send
//
// Nothing that a server, a sender or a proxy sends may end the process, because
// hundreds of sessions share it. whatsmeow handles what it receives in goroutines
// that nothing recovers, so the connector receives in its place (receiver.go), and
// refuses what libsignal would panic over (malformed.go). What a connection may
// hold is bounded: headers to 64 KB, a websocket message to 8 MB, a decompressed
// node to 16 MB, 64 levels and 200,000 parts, nodes that wait to be handled to
// 2,048 and 16 MB together, handlers beside the queue to 32, a download to 64 MB.
// Beyond these the connection ends with a reason, or the server has to wait. A message
// with more than 64 KB of compressed settings is refused (contents.go).
//
// Some things run in goroutines of whatsmeow's own that have nothing of ours on their
// stack: the names of senders, the count and upload of prekeys after a login,
// receipts for messages of the own phone, the request for keys of settings, the deletion
// and issuing of privacy tokens, and the reading of the websocket. What they read was
// checked before.
//
// # The files
//
// setup.go: what is set once; connection.go: one connection; translate.go: the
// table of events; monitoredconn.go: the socket; stream.go: the bytes of the
// websocket; compression.go: their compression; node.go: what is decoded of them;
// receiver.go: what is done with it; appstate.go: the phone's settings; contents.go:
// what is decrypted; account.go: whose account a number is; life.go: the proof of life;
// proxy.go: proxies and downloads; errors.go: messages for failed attempts; log.go: the library's log;
// malformed.go: what is refused before the library would panic over it.
package whatsapp

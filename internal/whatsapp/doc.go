// Package whatsapp is the connector: the only package, except the simulator,
// that uses the whatsmeow library's client. It hides the client behind a few methods
// (connect, log out, close) and one kind of [Event].
//
// [Setup] is called once in a process and returns the [Factory] of all
// connections. A [Connection] is one login of one device, or one attempt at
// pairing, and is never used twice: whatsmeow itself tries to log in after a pairing
// only once and only logs a failure, and a store that has failed stays closed. So the
// login after a pairing is also a new connection, with the device read again.
//
// # What ends a connection
//
// The context given to [Connection.Connect] limits the connection's life: when it
// ends, the socket is closed at once. Every connection that was opened reports its
// end with exactly one event for which [Event.Over] holds, unless it is closed
// first. whatsmeow reports several ends with no event (a lost last node, an
// unpaired client, the close after 515), so the connector watches the socket
// itself, see monitoredconn.go.
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
// What Laravel gets is handed over ([Options.Accept]) before its acknowledgement is written. The
// first refusal ends the connection: nothing that follows is acknowledged, and WhatsApp delivers
// all of it again, in order, at the next login. [ErrBacklog] ends it after the acknowledgement.
// Nothing more is read from the socket during a hand-over. What cannot be decrypted or read, or
// makes something panic, is handed over as far as it can be, so that no message stops a session.
//
// # What a server may send
//
// No data from a server, a sender or a proxy may end the process, because
// hundreds of sessions share it. whatsmeow handles received data in goroutines
// without a recover, so the connector receives instead (receiver.go), and
// refuses data that makes libsignal panic (malformed.go). The data that a connection
// may hold is limited: headers to 64 KB, a websocket message to 8 MB, a decompressed
// node to 16 MB, 64 levels and 200,000 parts, nodes that wait to be handled to
// 2,048 and 16 MB together, handlers beside the queue to 32, a download to 64 MB.
// Beyond these limits the connection ends with a reason, or the server has to wait. A message
// with more than 64 KB of compressed settings is refused (contents.go).
//
// Some work runs in goroutines of whatsmeow without a function of this project on their
// stack: the count and upload of prekeys after a login,
// receipts for messages of the own phone, the request for keys of settings, the deletion
// and issuing of privacy tokens, and the reading of the websocket. The data that they
// read was checked before.
//
// # The files
//
// setup.go: the settings of the process; connection.go: one connection; translate.go: the
// table of events; monitoredconn.go: the socket; stream.go: the bytes of the
// websocket; compression.go: their compression; node.go: the decoding of nodes;
// receiver.go: the handling of nodes; decrypt.go: the decryption of messages; handover.go: the
// hand-over and the refusal; message.go and message_content.go: the translation of messages; appstate.go: the phone's settings; contents.go:
// decrypted contents; account.go: the account of a number; life.go: the proof of life;
// proxy.go: proxies and downloads; errors.go: messages for failed attempts; log.go: the library's log;
// malformed.go: the refusal of messages that would make the library panic.
package whatsapp

// Package simulator is a WhatsApp server that runs in one process, for people
// who try the operator without a phone, for load tests and for our own tests.
//
// It speaks the real protocol, as the whatsmeow library understands it: a
// websocket, frames of a three-byte length, a Noise_XX handshake with a
// certificate chain, binary XML nodes, the pairing with its signatures, and
// messages encrypted with the Signal protocol. A client needs only two
// settings: the server's address ([Server.Endpoint]) and the root that signs its
// certificates ([Server.NoiseRoot]). The server keeps all data in memory.
//
// # The parts
//
//   - server.go: options, listeners, start and end; pausableconn.go: a network
//     connection that can be paused; tls.go: the self-signed authority.
//   - noise.go: the responder's side of the handshake; conn.go: one connection.
//   - pairing.go: QR codes and their scan; phonecode.go: codes that are typed on
//     the phone; companion.go: pairing with a passkey; login.go: logins, refusals,
//     and the count of doubled connections.
//   - iq.go: the answers to a client's iq requests; known.go and known.txt: all that
//     clients send; account.go: phones and the devices linked to them; handset.go: a
//     phone's Signal keys; groupkeys.go: its keys in groups.
//   - write.go: the request to send a message; contents.go, secrets.go and describe.go: what
//     is in it; delivery.go: its encryption and its stanza; malformed.go: messages that no
//     client can read; messages.go: what they have in common.
//   - queue.go: the stanzas without an acknowledgement, and the windows at a login; acks.go:
//     acknowledgements, receipts and retry receipts of clients; ledger.go: what happened to each
//     stanza; received.go: the messages of clients.
//   - group.go and groupchange.go: groups; placeholder.go: messages that a device asks its
//     phone for; media.go and mediaretry.go: the media host; receipt.go: receipts of contacts;
//     call.go: calls; flood.go: many messages at a steady rate.
//   - stanzas.go: what WhatsApp sends without a request; devicelist.go: the lists of an
//     account's devices; tokens.go: the privacy tokens of contacts; play.go: methods for
//     tests of a client.
//   - web.go: the page that names the newest web version, and the check for
//     outdated clients.
//   - fault.go: the faults that can be injected.
//   - control.go: the HTTP API below; client.go: [Control], its Go client.
//
// # The control API
//
// JSON over HTTP at [Server.ControlURL]. It has no authentication: it listens
// on the loopback interface by default. An error is answered
// as {"error": "a sentence"}: 400 for bad input, 404 for a device that does not
// exist, 409 for a request that is not possible now (a code that has expired).
//
//	GET    /info                     {"endpoint","noise_root","ca"}
//	GET    /stats                    [Stats]
//	GET    /devices                  list of [Device]
//	POST   /scan      {"qr","phone"} {"jid"}: scan a code as a phone; without a number the server chooses one
//	POST   /enter-code {"phone","code"}  {"jid"}: type a pairing code on that phone
//	POST   /passkey {"phone","request"}  {"answer"}: the answer of a browser to a passkey request
//	GET    /confirmation-code?phone=     {"code"}: the code that the phone shows while a device is linked with its passkey
//	POST   /send      [SendRequest]  {"id"}: a contact or the own account writes a message
//	POST   /receipt   [ReceiptRequest] {"id"}: contacts send a receipt for what a device sent
//	POST   /call      [CallRequest]  {"id"}: a contact calls
//	POST   /group     [GroupRequest] {"group"}: create a group
//	POST   /group-change [GroupChange] {"group"}: a member changes a group
//	POST   /history   {"device","contacts"} {"id"}: the phone sends a device its history, see [Server.SendHistory]
//	POST   /expire-media {}          {"files"}: the media host forgets all files; the phones have them
//	GET    /ledger    ?device=&after=&limit=&waiting=  list of [LedgerEntry]: each stanza for a device and what happened to it
//	POST   /flood     [FloodRequest] {"id"}: contacts write at a steady rate
//	GET    /flood                    list of [Flood]
//	DELETE /flood                    list of [Flood]: end the floods that run
//	POST   /notify {"device","from","stanza"}  {"id"}: send a stanza of [Stanzas], for example a status or a call of the contact
//	GET    /lid       ?phone=        {"lid"}: the LID of the account with that number
//	GET    /received  ?device=       list of [Message]: messages that devices sent, as the recipient's phone decrypted them
//	GET    /doubled                  list of [Doubled]: second logins while the first connection was alive
//	GET    /unknown                  {"name": count}: what clients sent and the simulator does not know
//	POST   /alias     {"phone","alias"}  make alias another way to write an account's number
//	GET    /version                  {"web_version"}: the version that the page of WhatsApp Web names
//	POST   /version   {"web_version"} set the version that the page names; 0 is the library's own
//	POST   /fault     [Fault]        {"connections"}: inject a fault
//	GET    /fault                    list of the active faults
//	DELETE /fault     ?kind=&device= {"cleared"}: end active faults (without parameters: all)
//
// A device is named by its JID ("15551234567:1@s.whatsapp.net") or by its phone
// number, which means the newest device linked to it (in a fault: all of them).
//
// # Numbers and LIDs
//
// Each account has a phone number and a LID, and clients can use both everywhere. As
// with WhatsApp, clients write to LIDs. A contact that is named by its number in
// [Server.Send] is the sender by its number, with the LID as an attribute, and the other
// way round. When a device is linked or unlinked, those who know the account's devices
// are informed, and a message to an old list is answered with the hash of the new one.
//
// # Messages
//
// Contacts send every kind of [Kinds], to a device or in a group, and the own account sends
// its devices copies of what it writes. As at WhatsApp, a message stays in the queue of a
// device until the device acknowledges it, and comes again, in order, at each login
// ([Options.OfflineWindow]). A sender answers retry receipts ([FaultSenderOffline]: it does
// not), and the own phone answers requests for messages and media files
// ([FaultPhoneOffline]). A client can ask its phone only after the phone has written to it, as
// it does after a pairing ([Server.SendHistory]). [Server.Ledger] says what happened.
//
// # Tokens and the reach-out lock
//
// A client gives each contact a privacy token, which the contact's devices receive and
// add to their messages and requests; [Message] and [Stats] say whether the tokens were
// valid. With [FaultReachOutLock] messages to strangers without a token get error 463.
//
// # What is known
//
// known.txt lists all stanzas and requests of clients, with their attributes and
// children, of whatsmeow today and at the end of 2025. Everything else is counted in
// [Stats.Unknown], and tests fail if anything was; a request is refused with error 501,
// so that no client waits. Acknowledgements must repeat the attributes of their stanza.
// [Server.Notify] sends each stanza that whatsmeow handles, and some that it only
// acknowledges. Clients of 2025 are served too: their QR codes, and the requests that
// today's clients no longer make.
//
// # What it leaves out
//
// Channels, pictures, businesses, bots, the media of calls, usernames, Messenger, changes of
// groups by clients, and the phone's settings. Requests about those are refused with the error that
// WhatsApp gives where there is nothing (404) or no right (403), or answered with an
// empty list; changes to the privacy settings and blocked contacts are accepted and not
// stored. The history of a phone ([Server.SendHistory]) has no messages.
package simulator

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
//   - iq.go: the answers to a client's iq requests; account.go: phones
//     and the devices linked to them; handset.go: a phone's Signal keys;
//     messages.go: messages both ways, and the queue of those without a receipt.
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
//	POST   /send      {"device","from","text"}  {"id"}: a contact writes to a device
//	GET    /received  ?device=       list of [Message]: messages that devices sent, as the recipient's phone decrypted them
//	GET    /doubled                  list of [Doubled]: second logins while the first connection was alive
//	GET    /unknown                  {"name": count}: requests of clients that the simulator does not know
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
// # What it leaves out
//
// Groups, channels, media files, and the phone's history and its settings.
// Requests about those are refused with an error that a client can handle, and
// never left without an answer. Requests that the simulator does not know are
// counted.
package simulator

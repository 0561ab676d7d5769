package simulator

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.mau.fi/libsignal/keys/prekey"
	"go.mau.fi/libsignal/serialize"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// DefaultContact is the sender of messages when none is named.
const DefaultContact = "15550000001"

// Message is a message that a device sent, as the recipient's phone decrypted it.
type Message struct {
	ID     string `json:"id"`
	Device string `json:"device"`
	// To is the chat: a person, a group, or a broadcast list.
	To string `json:"to"`
	// Type is WhatsApp's name of the kind: text, media, reaction, poll.
	Type string    `json:"type"`
	Text string    `json:"text,omitempty"`
	At   time.Time `json:"at"`
	// Problem says why Text could not be read.
	Problem string `json:"problem,omitempty"`
	// Token is the kind of the token that the message carried (tctoken or cstoken), and
	// TokenValid is true if it came from the recipient or from the sender's own phone.
	Token      string `json:"token,omitempty"`
	TokenValid bool   `json:"token_valid,omitempty"`
}

// stanza is a node that a device must acknowledge.
type stanza struct {
	tag, id string
	node    waBinary.Node
	queued  time.Time
	sent    bool
	// ignore counts acknowledgements that belong to an earlier stanza with the same id.
	ignore int
}

// queue holds the stanzas that a device has not acknowledged, the oldest first. It is
// guarded by Server.mu.
type queue struct {
	waiting []*stanza
	// next is the index of the first stanza not yet sent on the present connection.
	next int
	// sent are the newest messages in plaintext, for devices that could not decrypt them.
	sent []sentMessage
}

type sentMessage struct {
	id        string
	from      correspondent
	plaintext []byte
}

// correspondent is an account that writes to a device, and whether the message names it by
// its LID. WhatsApp uses both, for the same contact from one message to the next.
type correspondent struct {
	account *account
	byLID   bool
}

// maxSent limits the plaintexts that are kept for a device; a client asks for a
// message again immediately or never.
const maxSent = 64

// messages counts the messages among the waiting stanzas.
func (q *queue) messages() int { return q.count("message") }

// count counts the waiting stanzas with that tag.
func (q *queue) count(tag string) int {
	n := 0
	for _, s := range q.waiting {
		if s.tag == tag {
			n++
		}
	}
	return n
}

// find returns the first waiting stanza with that tag and id, or nil.
func (q *queue) find(tag, id string) *stanza {
	i := slices.IndexFunc(q.waiting, func(s *stanza) bool { return s.tag == tag && s.id == id })
	if i < 0 {
		return nil
	}
	return q.waiting[i]
}

// remove removes an acknowledged stanza. It returns false if there is none.
func (q *queue) remove(tag, id string, force bool) bool {
	i := slices.IndexFunc(q.waiting, func(s *stanza) bool { return s.tag == tag && s.id == id })
	if i < 0 {
		return false
	}
	if s := q.waiting[i]; s.ignore > 0 && !force {
		s.ignore--
		return true
	}
	if i == 0 {
		q.waiting[0] = nil
		q.waiting = q.waiting[1:] // the usual case: acknowledged in order
	} else {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	}
	if i < q.next {
		q.next--
	}
	return true
}

// enqueue adds a stanza for a device and sends it if the device is connected.
func (s *Server) enqueue(d *device, st *stanza) {
	s.add(d, st)
	s.deliver(d)
}

func (s *Server) add(d *device, st *stanza) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.queued = s.clock.Now()
	d.queue.waiting = append(d.queue.waiting, st)
}

// deliver sends a device, in order, the stanzas that have not been sent on its
// present connection. Stanzas without a receipt are sent again at the next login.
func (s *Server) deliver(d *device) {
	d.delivering.Lock()
	defer d.delivering.Unlock()
	for {
		s.mu.Lock()
		c := d.conn
		if c == nil || !c.active || c.ending || d.queue.next >= len(d.queue.waiting) {
			s.mu.Unlock()
			return
		}
		st := d.queue.waiting[d.queue.next]
		d.queue.next++
		node := st.node
		if st.queued.Before(c.activeAt) {
			node.Attrs = maps.Clone(node.Attrs)
			node.Attrs["offline"] = "1"
		}
		if st.sent && st.tag == "message" {
			s.counts.redelivered++
		}
		st.sent = true
		s.mu.Unlock()
		if c.send(node) != nil {
			return // the reader sees the failure too and ends the connection
		}
	}
}

// activate starts the delivery of messages to a connection, which a client requests
// after its login.
func (c *conn) activate() error {
	d := c.device
	c.srv.mu.Lock()
	c.active, c.activeAt = true, c.srv.clock.Now()
	waiting, messages, receipts := len(d.queue.waiting), d.queue.messages(), d.queue.count("receipt")
	c.srv.mu.Unlock()
	if waiting > 0 {
		if err := c.send(waBinary.Node{Tag: "ib", Attrs: fromServer(waBinary.Attrs{}), Content: []waBinary.Node{{
			Tag: "offline_preview", Attrs: waBinary.Attrs{
				"count": waiting, "message": messages, "receipt": receipts, "appdata": 0, "notification": waiting - messages - receipts,
			},
		}}}); err != nil {
			return err
		}
	}
	c.srv.deliver(d)
	return c.send(waBinary.Node{Tag: "ib", Attrs: fromServer(waBinary.Attrs{}), Content: []waBinary.Node{{
		Tag: "offline", Attrs: waBinary.Attrs{"count": waiting},
	}}})
}

// Send sends a text from a contact to a device, encrypted with the device's own
// keys, and returns the message's id. The contact is named by its phone number
// and created if it does not exist ([DefaultContact] if from is empty); if it is named
// by its LID ([Server.LID]), the message names it so too. A device that is not connected gets the message at its next login. Each message is sent
// again at each login until the device sends a receipt.
func (s *Server) Send(ctx context.Context, deviceName, from, text string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if text == "" {
		return "", fmt.Errorf("%w: a message needs a text", ErrBadInput)
	}
	d, sender, err := s.correspondents(deviceName, from)
	if err != nil {
		return "", err
	}
	if sender.account == d.account {
		return "", fmt.Errorf("%w: a contact writes from another number than the device's own", ErrBadInput)
	}
	message := &waE2E.Message{Conversation: proto.String(text)}
	if malformed, _ := s.active(FaultMalformed, d); malformed.Code == malformedSenderKey {
		message.SenderKeyDistributionMessage = &waE2E.SenderKeyDistributionMessage{
			GroupID: proto.String(malformedGroup.String()), AxolotlSenderKeyDistributionMessage: []byte{},
		}
	}
	return s.sendTo(d, sender, message)
}

// push encrypts a message of a contact and queues it. With a count it answers the
// device's count-th request to send the message again; such a message begins a new
// session.
func (s *Server) push(d *device, sender correspondent, id string, plaintext []byte, count string, ignore int) error {
	low := false
	kind, ciphertext, err := sender.account.handset.encrypt(d, plaintext, func() *prekey.Bundle {
		s.mu.Lock()
		defer s.mu.Unlock()
		bundle := d.bundleLocked()
		low = len(d.preKeys) == lowPreKeys
		return bundle
	}, count != "")
	if err != nil {
		return err
	}
	enc := waBinary.Attrs{"v": "2", "type": kind}
	if count != "" {
		enc["count"] = count
	}
	s.mu.Lock()
	name := sender.account.name
	malformed, _ := s.activeLocked(FaultMalformed, d)
	s.mu.Unlock()
	attrs := waBinary.Attrs{"id": id, "t": s.seconds(), "type": "text", "notify": name}
	if sender.byLID {
		attrs["from"], attrs["sender_pn"], attrs["addressing_mode"] = sender.account.lidJID(), sender.account.jid(), string(types.AddressingModeLID)
	} else {
		attrs["from"], attrs["sender_lid"] = sender.account.jid(), sender.account.lidJID()
	}
	switch malformed.Code {
	case malformedSenderKey:
		attrs["from"], attrs["participant"] = malformedGroup, sender.account.jid()
	case malformedKeys:
		enc["type"] = "pkmsg"
		if ciphertext, err = emptyKeys(); err != nil {
			return err
		}
	}
	s.enqueue(d, &stanza{tag: "message", id: id, ignore: ignore, node: waBinary.Node{
		Tag: "message", Attrs: attrs, Content: []waBinary.Node{{Tag: "enc", Attrs: enc, Content: ciphertext}},
	}})
	if low {
		s.askForPreKeys(d)
	}
	return nil
}

// malformedGroup is the group of the messages with a malformed sender key.
var malformedGroup = types.NewJID("120363000000000001", types.GroupServer)

// emptyKeys is an encrypted message whose keys are present, but empty.
func emptyKeys() ([]byte, error) {
	content, err := proto.Marshal(&serialize.PreKeySignalMessage{
		RegistrationId: proto.Uint32(1), PreKeyId: proto.Uint32(1), SignedPreKeyId: proto.Uint32(1),
		BaseKey: []byte{}, IdentityKey: []byte{}, Message: []byte{},
	})
	if err != nil {
		return nil, fmt.Errorf("encode a malformed message: %w", err)
	}
	return append([]byte{3<<4 | 3}, content...), nil // the version, in both halves of the byte
}

// askForPreKeys informs a device that few of its one-time keys are left.
func (s *Server) askForPreKeys(d *device) {
	s.sendStanza(d, notification("encrypt", types.ServerJID, waBinary.Node{Tag: "count", Attrs: waBinary.Attrs{"value": lowPreKeys}}))
}

// handleAck handles an acknowledgement. One with an error says that the client could not
// handle the stanza. One that does not repeat the attributes of the stanza does not count.
func (c *conn) handleAck(node *waBinary.Node) {
	if c.device == nil {
		return
	}
	s := c.srv
	class, id := attribute(node, "class"), attribute(node, "id")
	wrong := ""
	s.mu.Lock()
	if _, refused := node.Attrs["error"]; refused {
		s.counts.nacks++
	}
	if st := c.device.queue.find(class, id); st != nil {
		wrong = wrongAck(&st.node, node)
	}
	if wrong == "" {
		c.device.queue.remove(class, id, false)
	}
	s.mu.Unlock()
	if wrong != "" {
		s.countUnknown("ack of a " + class + " with another " + wrong)
	}
}

// wrongAck names an attribute of an acknowledgement that differs from the stanza's.
func wrongAck(stanza, ack *waBinary.Node) string {
	if jidAttribute(stanza, "from") != jidAttribute(ack, "to") {
		return "to"
	}
	for _, name := range []string{"participant", "recipient"} {
		if jidAttribute(stanza, name) != jidAttribute(ack, name) {
			return name
		}
	}
	if stanza.Tag != "message" && attribute(stanza, "type") != attribute(ack, "type") {
		return "type"
	}
	return ""
}

// handleReceipt handles the receipt of one or more messages, and forwards it if the
// sender is a linked device.
func (c *conn) handleReceipt(node *waBinary.Node) error {
	d := c.device
	if d == nil {
		return nil
	}
	s := c.srv
	kind, to := attribute(node, "type"), jidAttribute(node, "to")
	ids := []string{attribute(node, "id")}
	list := node.GetChildByTag("list")
	for _, item := range list.GetChildren() {
		ids = append(ids, attribute(&item, "id"))
	}
	s.mu.Lock()
	if kind != "retry" {
		for _, id := range ids {
			d.queue.remove("message", id, true)
		}
	}
	var other *device
	if a := s.accountOfLocked(to); a != nil {
		other = a.devices[to.Device]
	}
	s.mu.Unlock()
	switch {
	case other != nil && other != d:
		receipt := cloneNode(*node)
		delete(receipt.Attrs, "to")
		receipt.Attrs["from"] = d.jid()
		if to.Server == types.HiddenUserServer {
			receipt.Attrs["from"] = d.lidJID()
		}
		receipt.Attrs["t"] = s.seconds()
		s.enqueue(other, &stanza{tag: "receipt", id: ids[0], node: receipt})
	case kind == "retry":
		if err := s.retry(d, node); err != nil {
			s.log.Error(err, "Failed to send a message again", "device", d.jid().String())
		}
	}
	ack := waBinary.Attrs{"class": "receipt", "id": ids[0], "from": node.Attrs["to"]}
	if kind != "" {
		ack["type"] = kind
	}
	return c.send(waBinary.Node{Tag: "ack", Attrs: ack})
}

// retry handles the receipt of a device that could not decrypt a message. The contact
// encrypts the message again in a new session, unless the contact is offline.
func (s *Server) retry(d *device, receipt *waBinary.Node) error {
	id := attribute(receipt, "id")
	child := receipt.GetChildByTag("retry")
	count := attribute(&child, "count")
	s.mu.Lock()
	s.counts.retries++
	i := slices.IndexFunc(d.queue.sent, func(m sentMessage) bool { return m.id == id })
	_, offline := s.activeLocked(FaultSenderOffline, d)
	if i < 0 || offline || count == "" {
		s.mu.Unlock()
		return nil
	}
	message := d.queue.sent[i]
	ignore := 0
	if d.queue.remove("message", id, true) {
		ignore = 1 // the client also acknowledges the message that it could not read, and that ack arrives later
	}
	s.mu.Unlock()
	return s.push(d, message.from, id, message.plaintext, count, ignore)
}

// part is one encrypted copy of a message.
type part struct {
	to  types.JID
	enc waBinary.Node
}

func parts(node *waBinary.Node) []part {
	var out []part
	to := jidAttribute(node, "to")
	for _, enc := range node.GetChildrenByTag("enc") {
		out = append(out, part{to: to, enc: enc})
	}
	participants := node.GetChildByTag("participants")
	for _, child := range participants.GetChildrenByTag("to") {
		out = append(out, part{to: jidAttribute(&child, "jid"), enc: child.GetChildByTag("enc")})
	}
	return out
}

// handleMessage handles a message from a device: phones decrypt their copies, other
// linked devices receive theirs, and the device receives an acknowledgement.
func (c *conn) handleMessage(node *waBinary.Node) error {
	d, s := c.device, c.srv
	if d == nil {
		s.countUnknown("message before the login")
		return nil
	}
	to := jidAttribute(node, "to")
	message := Message{
		ID: attribute(node, "id"), Device: d.jid().String(), To: to.String(), Type: attribute(node, "type"),
		At: s.clock.Now(), Problem: "no copy of it was for a phone",
	}
	var locked bool
	if locked, message.Token, message.TokenValid = s.checkMessage(d, to, node); locked {
		return c.send(waBinary.Node{Tag: "ack", Attrs: waBinary.Attrs{
			"class": "message", "id": message.ID, "from": node.Attrs["to"], "t": s.seconds(), "error": errorReachOut,
		}})
	}
	read, delivered := false, false
	var addressed []types.JID
	for _, p := range parts(node) {
		addressed = append(addressed, p.to)
		s.mu.Lock()
		target := s.accountOfLocked(p.to)
		var other *device
		if target != nil {
			other = target.devices[p.to.Device]
		}
		s.mu.Unlock()
		switch {
		case target == nil:
		case p.to.Device != 0:
			if other != nil && other != d {
				s.forward(d, other, node, p)
			}
		default:
			ciphertext, _ := p.enc.Content.([]byte)
			text, err := readMessage(target.handset, d, attribute(&p.enc, "type"), ciphertext)
			if err != nil {
				s.count(func(c *counts) { c.undecryptable++ })
				if !read {
					message.Problem = err.Error()
				}
				continue
			}
			delivered = delivered || target != d.account
			if !read || target != d.account { // the recipient's copy rather than the sender's own
				message.Text, message.Problem, read = text, "", true
			}
		}
	}
	if attribute(node, "category") != "peer" { // peer messages are for the account's own phone
		s.mu.Lock()
		s.counts.received++
		d.received = append(d.received, message)
		d.received = d.received[max(0, len(d.received)-maxReceived):]
		s.mu.Unlock()
	}
	ack := waBinary.Attrs{"class": "message", "id": message.ID, "from": node.Attrs["to"], "t": s.seconds()}
	if _, fanOut := node.GetOptionalChildByTag("participants"); fanOut {
		if hash := s.listProblem(d, to, addressed); hash != "" {
			ack["phash"] = hash
		}
	}
	if err := c.send(waBinary.Node{Tag: "ack", Attrs: ack}); err != nil {
		return err
	}
	if delivered {
		s.enqueue(d, &stanza{tag: "receipt", id: message.ID, node: waBinary.Node{
			Tag: "receipt", Attrs: waBinary.Attrs{"from": to, "id": message.ID, "t": s.seconds()},
		}})
	}
	return nil
}

// errorReachOut refuses a message to a stranger, because the sender is locked or the
// message carries no token.
const errorReachOut = 463

// checkMessage checks the token of a message to a person, and reports whether
// FaultReachOutLock refuses the message.
func (s *Server) checkMessage(d *device, to types.JID, node *waBinary.Node) (locked bool, token string, valid bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	token, valid = s.checkTokenLocked(d.account, to, node)
	if _, active := s.activeLocked(FaultReachOutLock, d); !active || valid {
		return false, token, valid
	}
	a := s.accountOfLocked(to)
	if a == nil || a == d.account {
		return false, token, valid
	}
	if known := d.account.contacts[a.lid]; known != nil && known.wrote {
		return false, token, valid
	}
	s.counts.locked++
	return true, token, valid
}

// readMessage decrypts a copy and returns its text.
func readMessage(h *handset, from *device, kind string, ciphertext []byte) (string, error) {
	plaintext, err := h.decrypt(from, kind, ciphertext)
	if err != nil {
		return "", err
	}
	var m waE2E.Message
	if err := proto.Unmarshal(plaintext, &m); err != nil {
		return "", fmt.Errorf("decode a message: %w", err)
	}
	inner := &m
	if sent := m.GetDeviceSentMessage(); sent != nil { // the copy for the account's own phone
		inner = sent.GetMessage()
	}
	if text := inner.GetConversation(); text != "" {
		return text, nil
	}
	return inner.GetExtendedTextMessage().GetText(), nil
}

// forward sends a copy to another linked device.
func (s *Server) forward(from, to *device, node *waBinary.Node, p part) {
	s.mu.Lock()
	name := from.account.name
	s.mu.Unlock()
	attrs := waBinary.Attrs{"id": attribute(node, "id"), "t": s.seconds(), "type": attribute(node, "type"), "notify": name}
	if p.to.Server == types.HiddenUserServer {
		attrs["from"], attrs["sender_pn"] = from.lidJID(), from.account.jid()
	} else {
		attrs["from"], attrs["sender_lid"] = from.jid(), from.account.lidJID()
	}
	if from.account == to.account {
		attrs["recipient"] = node.Attrs["to"]
	}
	children := []waBinary.Node{cloneNode(p.enc)}
	if id, ok := node.GetOptionalChildByTag("device-identity"); ok {
		children = append(children, cloneNode(id))
	}
	s.enqueue(to, &stanza{tag: "message", id: attribute(node, "id"), node: waBinary.Node{Tag: "message", Attrs: attrs, Content: children}})
}

// Received lists the messages that a device sent, the oldest first, at most the
// newest 1,000 of a device; without a device, the messages of all devices.
func (s *Server) Received(deviceName string) ([]Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []Message{}
	if deviceName != "" {
		d, err := s.deviceLocked(deviceName)
		if err != nil {
			return nil, err
		}
		return append(out, d.received...), nil
	}
	for _, a := range s.byPhone {
		for _, d := range a.devices {
			out = append(out, d.received...)
		}
	}
	slices.SortStableFunc(out, func(a, b Message) int { return a.At.Compare(b.At) })
	return out, nil
}

// cloneNode copies a node that was decoded from a connection's buffer, so that
// it can be kept.
func cloneNode(n waBinary.Node) waBinary.Node {
	n.Attrs = maps.Clone(n.Attrs)
	switch content := n.Content.(type) {
	case []byte:
		n.Content = slices.Clone(content)
	case []waBinary.Node:
		children := make([]waBinary.Node, len(content))
		for i := range content {
			children[i] = cloneNode(content[i])
		}
		n.Content = children
	}
	return n
}

// newID returns an id in the format of phones: 32 hexadecimal digits.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return strings.ToUpper(hex.EncodeToString(b[:]))
}

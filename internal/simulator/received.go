package simulator

import (
	"errors"
	"fmt"
	"slices"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

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
	r := &reading{server: s, from: d, node: node}
	r.read()
	if r.content != nil {
		message.Text, message.Problem = textOf(r.content), ""
	} else if r.problem != nil {
		message.Problem = r.problem.Error()
	}
	peer := attribute(node, "category") == "peer" // for the account's own phone
	if !peer {
		s.mu.Lock()
		s.counts.received++
		d.received = append(d.received, message)
		d.received = d.received[max(0, len(d.received)-maxReceived):]
		s.mu.Unlock()
		r.remember(message.ID, to)
	}
	ack := waBinary.Attrs{"class": "message", "id": message.ID, "from": node.Attrs["to"], "t": s.seconds()}
	if _, fanOut := node.GetOptionalChildByTag("participants"); fanOut {
		if hash := s.listProblem(d, to, r.addressed); hash != "" {
			ack["phash"] = hash
		}
	}
	if err := c.send(waBinary.Node{Tag: "ack", Attrs: ack}); err != nil {
		return err
	}
	if peer && r.content != nil {
		return s.answerPeer(d, r.content)
	}
	for _, receipt := range r.receipts(message.ID, to) {
		s.enqueue(d, &stanza{tag: "receipt", id: message.ID, node: receipt})
	}
	return nil
}

// reading is what the phones that a message is for make of it.
type reading struct {
	server *Server
	from   *device
	node   *waBinary.Node

	// addressed are the devices with a copy, recipients the accounts other than the sender's
	// whose phones have read it.
	addressed  []types.JID
	recipients []*account
	// content is what the recipient's phone has read, else the sender's own; problem says why
	// none has.
	content *waE2E.Message
	problem error
}

// read decrypts the copies for phones and forwards those for linked devices.
func (r *reading) read() {
	s := r.server
	to := jidAttribute(r.node, "to")
	for _, p := range parts(r.node) {
		if to.Server == types.GroupServer && p.to == to {
			continue // with the sender's key, for all members
		}
		r.addressed = append(r.addressed, p.to)
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
			if other != nil && other != r.from && to.Server != types.GroupServer {
				s.forward(r.from, other, r.node, p.to, []waBinary.Node{p.enc})
			}
		default:
			ciphertext, _ := p.enc.Content.([]byte)
			content, err := readMessage(target.handset, r.from, attribute(&p.enc, "type"), ciphertext)
			if err == nil && content.GetSenderKeyDistributionMessage() != nil && to.Server == types.GroupServer {
				err = target.handset.storeSenderKey(to.User, r.from, content.GetSenderKeyDistributionMessage().GetAxolotlSenderKeyDistributionMessage())
				content = nil
			}
			r.note(target, content, err)
		}
	}
	if to.Server == types.GroupServer {
		r.readGroup(to)
	}
}

// note takes over what a phone has read, or why it could not.
func (r *reading) note(phone *account, content *waE2E.Message, err error) {
	switch {
	case err != nil:
		r.server.count(func(c *counts) { c.undecryptable++ })
		if r.content == nil {
			r.problem = err
		}
	case content == nil: // only a key
	case phone != r.from.account:
		r.content = content
		r.recipients = append(r.recipients, phone)
	case r.content == nil:
		r.content = content
	}
}

// readGroup decrypts a message in a group for the phones of all members, and forwards it to
// their linked devices.
func (r *reading) readGroup(to types.JID) {
	s := r.server
	s.mu.Lock()
	g := s.groups[to.User]
	var members []*account
	var devices []*device
	if g != nil {
		members, devices = slices.Clone(g.members), g.devicesLocked()
	}
	s.mu.Unlock()
	var shared *waBinary.Node
	children := r.node.GetChildren()
	for i := range children {
		if children[i].Tag == "enc" && attribute(&children[i], "type") == "skmsg" {
			shared = &children[i]
		}
	}
	if g == nil || shared == nil {
		r.problem = errors.New("it is not a message to a group that exists")
		return
	}
	ciphertext, _ := shared.Content.([]byte)
	for _, a := range members {
		content := &waE2E.Message{}
		plaintext, err := a.handset.decryptForGroup(g.id, r.from, ciphertext)
		if err == nil {
			err = proto.Unmarshal(plaintext, content)
		}
		r.note(a, content, err)
	}
	keys := map[types.JID]waBinary.Node{}
	for _, p := range parts(r.node) {
		keys[p.to] = p.enc
	}
	for _, d := range devices {
		if d == r.from {
			continue
		}
		address := d.jid()
		if !g.byNumber {
			address = d.lidJID()
		}
		var content []waBinary.Node
		if enc, ok := keys[address]; ok {
			content = append(content, enc)
		}
		s.forward(r.from, d, r.node, address, append(content, *shared))
	}
}

// remember keeps what a device sent, so that other messages can refer to it.
func (r *reading) remember(id string, to types.JID) {
	if r.content == nil {
		return
	}
	content, err := proto.Marshal(r.content)
	if err != nil {
		return // it was decoded from what a phone has decrypted
	}
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	m := &sentMessage{
		id: id, sent: r.server.clock.Now().Unix(), from: correspondent{account: r.from.account, byLID: true, device: r.from.index},
		description: describe(r.content), content: content, entry: &entry{},
	}
	if to.Server == types.GroupServer {
		m.group = r.server.groups[to.User]
	} else {
		m.to = r.server.knownLocked(to)
	}
	r.from.queue.remember(m)
}

// receipts are the receipts of the phones that have read a message.
func (r *reading) receipts(id string, to types.JID) []waBinary.Node {
	var out []waBinary.Node
	for _, a := range r.recipients {
		attrs := waBinary.Attrs{"from": to, "id": id, "t": r.server.seconds()}
		if to.Server == types.GroupServer {
			attrs["participant"] = a.lidJID()
		}
		out = append(out, waBinary.Node{Tag: "receipt", Attrs: attrs})
	}
	return out
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

// readMessage decrypts a copy. A copy for the account's own phone contains the message.
func readMessage(h *handset, from *device, kind string, ciphertext []byte) (*waE2E.Message, error) {
	plaintext, err := h.decrypt(from, kind, ciphertext)
	if err != nil {
		return nil, err
	}
	m := &waE2E.Message{}
	if err := proto.Unmarshal(plaintext, m); err != nil {
		return nil, fmt.Errorf("decode a message: %w", err)
	}
	if sent := m.GetDeviceSentMessage().GetMessage(); sent != nil {
		return sent, nil
	}
	return m, nil
}

// forward sends the encrypted parts of a message that are for another linked device, which
// the message names by that address.
func (s *Server) forward(from, to *device, node *waBinary.Node, address types.JID, encrypted []waBinary.Node) {
	s.mu.Lock()
	name := from.account.name
	s.mu.Unlock()
	attrs := waBinary.Attrs{"id": attribute(node, "id"), "t": s.seconds(), "type": attribute(node, "type"), "notify": name}
	if edit := attribute(node, "edit"); edit != "" {
		attrs["edit"] = edit
	}
	own, other := from.jid(), from.account.lidJID()
	otherName := "lid"
	if address.Server == types.HiddenUserServer {
		own, other, otherName = from.lidJID(), from.account.jid(), "pn"
	}
	if chat := jidAttribute(node, "to"); chat.Server == types.GroupServer {
		attrs["from"], attrs["participant"], attrs["participant_"+otherName] = chat, own, other
		if otherName == "pn" {
			attrs["addressing_mode"] = string(types.AddressingModeLID)
		}
	} else {
		attrs["from"], attrs["sender_"+otherName] = own, other
		if from.account == to.account {
			attrs["recipient"] = node.Attrs["to"]
		}
	}
	var children []waBinary.Node
	for _, enc := range encrypted {
		children = append(children, cloneNode(enc))
	}
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

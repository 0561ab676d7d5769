package simulator

import (
	"fmt"

	"go.mau.fi/libsignal/keys/prekey"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// push encrypts a message for a device and queues it. A count above 0 answers the device's
// count-th request to send the message again; such a message begins a new session. ignore is
// the number of acknowledgements of earlier stanzas with this id that may still arrive.
func (s *Server) push(d *device, m *sentMessage, count, ignore int) error {
	var children []waBinary.Node
	if m.malformed != "" && (m.malformed != malformedOnce || count == 0) {
		node, err := s.malformedNode(d, m)
		if err != nil {
			return err
		}
		s.enqueue(d, &stanza{tag: "message", id: m.id, message: m, ignore: ignore, node: node})
		return nil
	}
	switch {
	case m.unavailable != "" && count == 0:
		children = []waBinary.Node{{Tag: "unavailable", Attrs: waBinary.Attrs{"type": m.unavailable}}}
	default:
		plaintext, err := m.plaintext(count > 0)
		if err != nil {
			return err
		}
		enc, err := s.encrypt(d, m, plaintext, count)
		if err != nil {
			return err
		}
		children = []waBinary.Node{enc}
	}
	s.enqueue(d, &stanza{tag: "message", id: m.id, message: m, ignore: ignore, node: s.messageNode(m, children)})
	return nil
}

// plaintext is what is encrypted for a single device. A message of the own account names its
// chat in it. In a group, a message that is sent again contains the sender's key.
func (m *sentMessage) plaintext(again bool) ([]byte, error) {
	own := m.to != nil
	if !own && (m.group == nil || !again) {
		return m.content, nil
	}
	message := &waE2E.Message{}
	if err := proto.Unmarshal(m.content, message); err != nil {
		return nil, fmt.Errorf("decode a message: %w", err)
	}
	if own {
		message = &waE2E.Message{
			DeviceSentMessage:  &waE2E.DeviceSentMessage{DestinationJID: proto.String(m.from.address(m.to).String()), Message: message},
			MessageContextInfo: message.MessageContextInfo,
		}
	} else {
		key, err := m.from.handset.senderKey(m.group.keyName())
		if err != nil {
			return nil, err
		}
		message.SenderKeyDistributionMessage = m.group.distribution(key)
	}
	out, err := proto.Marshal(message)
	if err != nil {
		return nil, fmt.Errorf("encode a message: %w", err)
	}
	return out, nil
}

// encrypt encrypts a plaintext of a message's sender for a device.
func (s *Server) encrypt(d *device, m *sentMessage, plaintext []byte, count int) (waBinary.Node, error) {
	low := false
	kind, ciphertext, err := m.from.handset.encrypt(d, plaintext, func() *prekey.Bundle {
		s.mu.Lock()
		defer s.mu.Unlock()
		bundle := d.bundleLocked()
		low = len(d.preKeys) == lowPreKeys
		return bundle
	}, count > 0)
	if err != nil {
		return waBinary.Node{}, err
	}
	if low {
		s.askForPreKeys(d)
	}
	enc := waBinary.Node{Tag: "enc", Attrs: waBinary.Attrs{"v": "2", "type": kind}, Content: ciphertext}
	if count > 0 {
		enc.Attrs["count"] = count
	}
	m.mark(enc.Attrs)
	return enc, nil
}

// mark adds to the attributes of an encrypted message what WhatsApp may know of its content.
func (m *sentMessage) mark(enc waBinary.Attrs) {
	if m.mediaType != "" {
		enc["mediatype"] = m.mediaType
	}
	if m.hide {
		enc["decrypt-fail"] = "hide"
	}
}

// messageNode makes the node of a message with encrypted parts.
func (s *Server) messageNode(m *sentMessage, children []waBinary.Node) waBinary.Node {
	s.mu.Lock()
	name := m.from.account.name
	s.mu.Unlock()
	from, other := m.from.sender()
	attrs := waBinary.Attrs{"id": m.id, "t": m.sent, "type": m.stanzaType}
	alternate := func(name string, other types.JID) {
		if !other.IsEmpty() {
			attrs[name] = other
		}
	}
	if m.edit != "" {
		attrs["edit"] = m.edit
	}
	switch {
	case m.group != nil:
		attrs["from"], attrs["participant"], attrs["notify"] = m.group.jid(), from, name
		attrs["addressing_mode"] = string(m.group.mode())
		if m.from.byLID {
			alternate("participant_pn", other)
		} else {
			alternate("participant_lid", other)
		}
	case m.to != nil:
		attrs["from"], attrs["recipient"], attrs["notify"] = from, m.from.address(m.to), name
		if m.from.byLID {
			attrs["addressing_mode"], attrs["peer_recipient_pn"] = string(types.AddressingModeLID), m.to.jid()
		} else {
			attrs["peer_recipient_lid"] = m.to.lidJID()
		}
	case m.peer:
		attrs["from"], attrs["category"] = from, "peer"
	default:
		attrs["from"], attrs["notify"] = from, name
		if m.from.byLID {
			attrs["addressing_mode"] = string(types.AddressingModeLID)
			alternate("sender_pn", other)
		} else {
			alternate("sender_lid", other)
		}
	}
	return waBinary.Node{Tag: "message", Attrs: attrs, Content: children}
}

// pushToGroup encrypts a message once, with the key of its sender in the group, and queues it
// for devices of members. A device that does not have this key gets it in the same stanza.
// messages holds the message for each device.
func (s *Server) pushToGroup(devices []*device, messages []*sentMessage) error {
	m := messages[0]
	g, sender := m.group, m.from.handset
	// Until the stanzas are queued, another message with the key must not be: a device
	// would get the key after a message that needs it.
	g.sending.Lock()
	defer g.sending.Unlock()
	var key []byte
	name := g.keyName()
	given := g.holders(sender, name)
	for _, d := range devices {
		if _, ok := given[d]; !ok && key == nil {
			var err error
			if key, err = sender.senderKey(name); err != nil {
				return err
			}
		}
	}
	ciphertext, err := sender.encryptForGroup(name, m.content)
	if err != nil {
		return err
	}
	for i, d := range devices {
		var children []waBinary.Node
		if _, ok := given[d]; !ok {
			distribution, err := proto.Marshal(&waE2E.Message{SenderKeyDistributionMessage: g.distribution(key)})
			if err != nil {
				return fmt.Errorf("encode a sender key: %w", err)
			}
			enc, err := s.encrypt(d, m, distribution, 0)
			if err != nil {
				return err
			}
			children = append(children, enc)
			given[d] = struct{}{}
		}
		enc := waBinary.Attrs{"v": "2", "type": "skmsg"}
		m.mark(enc)
		children = append(children, waBinary.Node{Tag: "enc", Attrs: enc, Content: ciphertext})
		s.enqueue(d, &stanza{tag: "message", id: m.id, message: messages[i], node: s.messageNode(m, children)})
	}
	return nil
}

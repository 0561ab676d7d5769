package simulator

import (
	"strconv"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// handleAck handles an acknowledgement. One with an error says that the client could not
// handle the stanza. One that does not repeat the attributes of the stanza does not count.
func (c *conn) handleAck(node *waBinary.Node) {
	if c.device == nil {
		return
	}
	s, q := c.srv, &c.device.queue
	class, id := attribute(node, "class"), attribute(node, "id")
	wrong, how := "", "ack"
	s.mu.Lock()
	if code, refused := node.Attrs["error"].(string); refused {
		s.counts.nacks++
		how = "nack " + code
	}
	if i := q.find(class, id, func(stanza *waBinary.Node) bool { return wrongAck(stanza, node) == "" }); i >= 0 {
		if wrong = wrongAck(&q.waiting[i].node, node); wrong == "" {
			s.acknowledgeLocked(c.device, i, how, false)
		}
	}
	s.mu.Unlock()
	if wrong != "" {
		s.countUnknown("ack of a " + class + " with another " + wrong)
	}
	s.deliver(c.device)
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
	how := kind
	if how == "" {
		how = "delivered"
	}
	sender := to
	if participant := jidAttribute(node, "participant"); !participant.IsEmpty() {
		sender = participant
	}
	s.mu.Lock()
	if kind != "retry" && kind != "server-error" {
		for _, id := range ids {
			if i := d.queue.find("message", id, isFrom(to)); i >= 0 {
				s.acknowledgeLocked(d, i, how, true)
			}
		}
	}
	var other *device
	if a := s.accountOfLocked(sender); a != nil {
		other = a.devices[sender.Device]
	}
	s.mu.Unlock()
	switch {
	case other != nil && other != d:
		s.forwardReceipt(d, other, node, to, sender)
	case kind == "retry":
		if err := s.retry(d, node); err != nil {
			s.log.Error(err, "Failed to send a message again", "device", d.jid().String())
		}
	case kind == "server-error":
		if err := s.uploadAgain(d, node); err != nil {
			s.log.Error(err, "Failed to upload a media file again", "device", d.jid().String())
		}
	}
	s.deliver(d)
	ack := waBinary.Attrs{"class": "receipt", "id": ids[0], "from": node.Attrs["to"]}
	if kind != "" {
		ack["type"] = kind
	}
	return c.send(waBinary.Node{Tag: "ack", Attrs: ack})
}

// forwardReceipt sends a receipt to the linked device that sent the message.
func (s *Server) forwardReceipt(from, to *device, node *waBinary.Node, chat, sender types.JID) {
	receipt := cloneNode(*node)
	delete(receipt.Attrs, "to")
	own := from.jid()
	if sender.Server == types.HiddenUserServer {
		own = from.lidJID()
	}
	receipt.Attrs["from"] = own
	if chat.Server == types.GroupServer {
		receipt.Attrs["from"], receipt.Attrs["participant"] = chat, own
	}
	receipt.Attrs["t"] = s.seconds()
	s.enqueue(to, &stanza{tag: "receipt", id: attribute(node, "id"), node: receipt})
}

// retry handles the receipt of a device that could not decrypt a message. The contact
// encrypts the message again in a new session, unless the contact is offline.
func (s *Server) retry(d *device, receipt *waBinary.Node) error {
	id := attribute(receipt, "id")
	child := receipt.GetChildByTag("retry")
	count, _ := strconv.Atoi(attribute(&child, "count")) // 0 is not a count
	s.mu.Lock()
	s.counts.retries++
	m := d.queue.message(id)
	if m != nil {
		m.entry.retries++
	}
	_, offline := s.activeLocked(FaultSenderOffline, d)
	if m == nil || offline || count < 1 {
		s.mu.Unlock()
		return nil
	}
	ignore := 0
	if i := d.queue.find("message", id, isFrom(jidAttribute(receipt, "to"))); i >= 0 {
		s.acknowledgeLocked(d, i, "", true)
		ignore = 1 // the client also acknowledges the message that it could not read, and that ack arrives later
	}
	s.mu.Unlock()
	return s.push(d, m, count, ignore)
}

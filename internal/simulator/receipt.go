package simulator

import (
	"context"
	"fmt"
	"slices"

	waBinary "go.mau.fi/whatsmeow/binary"
)

// ReceiptRequest is a receipt of contacts for messages that a device has sent.
type ReceiptRequest struct {
	Device string `json:"device"`
	// From are the contacts, at least one; several only in a group, whose receipts arrive
	// together.
	From []string `json:"from"`
	// Chat is the group; empty for a chat with the contact.
	Chat string `json:"chat,omitempty"`
	// IDs are the messages; several arrive as a list, several of several contacts in a group
	// as one group of contacts for each message.
	IDs []string `json:"ids"`
	// Type is read, played, delivered, or retry: the contact's phone could not decrypt the message.
	// With read-self and played-self, the device's own account has read it on its phone.
	Type string `json:"type"`
}

// receiptTypes are the types of receipts of contacts, and their names in a stanza.
var receiptTypes = map[string]string{
	"delivered": "", "read": "read", "played": "played", "retry": "retry", "read-self": "read-self", "played-self": "played-self",
}

// Receipt sends a device a receipt and returns the id of its stanza.
func (s *Server) Receipt(ctx context.Context, r ReceiptRequest) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	kind, ok := receiptTypes[r.Type]
	if !ok {
		return "", fmt.Errorf("%w: the type of a receipt is one of %q", ErrBadInput, sortedKeys(receiptTypes))
	}
	if len(r.From) == 0 || len(r.IDs) == 0 || len(r.From) > 1 && r.Chat == "" {
		return "", fmt.Errorf("%w: a receipt needs a contact and the id of a message, and several contacts need a group", ErrBadInput)
	}
	if kind == "retry" && (len(r.From) > 1 || len(r.IDs) > 1) {
		return "", fmt.Errorf("%w: a retry receipt is of one contact for one message", ErrBadInput)
	}
	s.mu.Lock()
	d, err := s.deviceLocked(r.Device)
	var senders []correspondent
	for _, name := range r.From {
		if err != nil {
			break
		}
		var sender correspondent
		sender, err = s.correspondentLocked(name)
		sender.byLID = true
		senders = append(senders, sender)
	}
	var g *group
	if err == nil && r.Chat != "" {
		g, err = s.groupLocked(r.Chat)
	}
	s.mu.Unlock()
	if err != nil {
		return "", err
	}
	node := waBinary.Node{Tag: "receipt", Attrs: waBinary.Attrs{"t": s.seconds(), "id": r.IDs[0]}}
	if kind != "" {
		node.Attrs["type"] = kind
	}
	sender, _ := senders[0].sender()
	switch {
	case g == nil:
		node.Attrs["from"] = sender
	case len(senders) == 1:
		node.Attrs["from"], node.Attrs["participant"] = g.jid(), sender
	default:
		node.Attrs["from"] = g.jid()
		node.Content = s.groupedReceipts(r.IDs, senders)
		s.enqueue(d, &stanza{tag: "receipt", id: r.IDs[0], node: node})
		return r.IDs[0], nil
	}
	switch {
	case kind == "retry":
		if node.Content, err = s.retryRequest(senders[0].handset, r.IDs[0]); err != nil {
			return "", err
		}
	case len(r.IDs) > 1:
		var items []waBinary.Node
		for _, id := range r.IDs[1:] {
			items = append(items, waBinary.Node{Tag: "item", Attrs: waBinary.Attrs{"id": id}})
		}
		node.Content = []waBinary.Node{{Tag: "list", Content: items}}
	}
	s.enqueue(d, &stanza{tag: "receipt", id: r.IDs[0], node: node})
	return r.IDs[0], nil
}

// groupedReceipts are the receipts of several members for messages, as WhatsApp groups them
// for a device that was away.
func (s *Server) groupedReceipts(ids []string, senders []correspondent) []waBinary.Node {
	var users []waBinary.Node
	for _, sender := range senders {
		jid, _ := sender.sender()
		users = append(users, waBinary.Node{Tag: "user", Attrs: waBinary.Attrs{"jid": jid, "t": s.seconds()}})
	}
	var out []waBinary.Node
	for _, id := range ids {
		out = append(out, waBinary.Node{Tag: "participants", Attrs: waBinary.Attrs{"key": id}, Content: slices.Clone(users)})
	}
	return out
}

// retryRequest is the content of the retry receipt of a phone, with its keys for a new session.
func (s *Server) retryRequest(h *handset, id string) ([]waBinary.Node, error) {
	bundle, err := h.bundle()
	if err != nil {
		return nil, err
	}
	return []waBinary.Node{
		{Tag: "retry", Attrs: waBinary.Attrs{"count": "1", "id": id, "t": s.seconds(), "v": "1"}},
		bundle[0], // the registration
		{Tag: "keys", Content: bundle[1:]},
	}, nil
}

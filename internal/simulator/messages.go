package simulator

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
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

// sentMessage is a message of a contact or of the own account to one device. It is kept
// while it waits and a while longer: the device can ask for it again, and other messages
// refer to it.
type sentMessage struct {
	id string
	// sent is its time in Unix seconds. It stays the same when its sender encrypts it again, as
	// whatsmeow's retry.go does.
	sent int64
	from correspondent
	// group is nil in a chat with a person; to is that person in messages of the own account.
	group *group
	to    *account
	description
	// content is the encoded message, without what its encryption for a device adds.
	content []byte
	// peer is true for messages of the own phone about the device itself.
	peer bool
	// unavailable is the kind of a message that its sender has not encrypted for the device.
	unavailable string
	// malformed is a code of malformations; the message is valid if it is empty.
	malformed string
	// file is the media file of the message, which the phone has too; nil without one.
	file *mediaFile
	// entry is set when the message was queued; it is guarded by Server.mu.
	entry *entry
}

// correspondent is an account that writes to a device, and whether the message names it by
// its LID. WhatsApp uses both, for the same contact from one message to the next.
type correspondent struct {
	account *account
	byLID   bool
	handset *handset
	// device is the number of the sender's own linked device, 0 for the phone.
	device uint16
	// alone leaves out the other address of the sender.
	alone bool
}

// address is the JID by which the messages of a correspondent name an account.
func (c correspondent) address(a *account) types.JID {
	if c.byLID {
		return a.lidJID()
	}
	return a.jid()
}

// sender is the JID of the correspondent, and its other one, empty if it is left out.
func (c correspondent) sender() (jid, other types.JID) {
	jid, other = c.account.jid(), c.account.lidJID()
	if c.byLID {
		jid, other = other, jid
	}
	jid.Device = c.device
	if c.alone {
		other = types.JID{}
	}
	return jid, other
}

// Send sends a text from a contact to a device, see [Server.Write].
func (s *Server) Send(ctx context.Context, deviceName, from, text string) (string, error) {
	return s.Write(ctx, SendRequest{Device: deviceName, From: from, Text: text})
}

// askForPreKeys informs a device that few of its one-time keys are left.
func (s *Server) askForPreKeys(d *device) {
	s.sendStanza(d, notification("encrypt", types.ServerJID, waBinary.Node{Tag: "count", Attrs: waBinary.Attrs{"value": lowPreKeys}}))
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

package simulator

import (
	"crypto/rand"
	"fmt"

	"go.mau.fi/libsignal/serialize"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// The ways in which a stranger's message can be malformed.
const (
	// malformedKeys: the keys in the encrypted message are present, but empty.
	malformedKeys = "keys"
	// malformedSenderKey: a message in a group with an empty sender key.
	malformedSenderKey = "sender-key"
	// malformedGarbage: the encrypted message consists of random bytes.
	malformedGarbage = "garbage"
	// malformedOnce: the same, but when the device asks its sender for the message again, it gets
	// a valid one, as from a phone that had lost its keys for the device.
	malformedOnce = "once"
	// malformedEmpty: the node of the encrypted message is empty.
	malformedEmpty = "empty"
	// malformedNothing: there is no encrypted message.
	malformedNothing = "nothing"
	// malformedProtobuf: the decrypted content is no message.
	malformedProtobuf = "protobuf"
	// malformedVersion: the version of the encryption does not exist.
	malformedVersion = "version"
	// malformedParticipant: a message in a group without a sender.
	malformedParticipant = "participant"
	// malformedGroupKey: a message in a group whose key the device never gets.
	malformedGroupKey = "group-key"
)

// malformedGroup is the group of the malformed messages in a group.
var malformedGroup = types.NewJID("120363000000000001", types.GroupServer)

// malformations make the node of a malformed message from that of a valid one.
var malformations = map[string]func(s *Server, d *device, m *sentMessage, valid waBinary.Node) (waBinary.Node, error){
	malformedKeys: func(_ *Server, _ *device, _ *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		content, err := proto.Marshal(&serialize.PreKeySignalMessage{
			RegistrationId: proto.Uint32(1), PreKeyId: proto.Uint32(1), SignedPreKeyId: proto.Uint32(1),
			BaseKey: []byte{}, IdentityKey: []byte{}, Message: []byte{},
		})
		valid.Content = encrypted("pkmsg", append([]byte{3<<4 | 3}, content...)) // the version, in both halves of the byte
		return valid, err
	},
	malformedSenderKey: func(s *Server, d *device, m *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		message := &waE2E.Message{}
		if err := proto.Unmarshal(m.content, message); err != nil {
			return valid, fmt.Errorf("decode a message: %w", err)
		}
		message.SenderKeyDistributionMessage = &waE2E.SenderKeyDistributionMessage{
			GroupID: proto.String(malformedGroup.String()), AxolotlSenderKeyDistributionMessage: []byte{},
		}
		content, err := proto.Marshal(message)
		if err != nil {
			return valid, fmt.Errorf("encode a message: %w", err)
		}
		enc, err := s.encrypt(d, m, content, 0)
		valid.Content = []waBinary.Node{enc}
		return inMalformedGroup(valid), err
	},
	malformedGarbage: garbage,
	malformedOnce:    garbage,
	malformedEmpty: func(_ *Server, _ *device, _ *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		valid.Content = encrypted("msg", nil)
		return valid, nil
	},
	malformedNothing: func(_ *Server, _ *device, _ *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		valid.Content = nil
		return valid, nil
	},
	malformedProtobuf: func(s *Server, d *device, m *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		enc, err := s.encrypt(d, m, []byte{0xff, 0xff, 0xff}, 0)
		valid.Content = []waBinary.Node{enc}
		return valid, err
	},
	malformedVersion: func(s *Server, d *device, m *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		enc, err := s.encrypt(d, m, m.content, 0)
		if err == nil {
			enc.Attrs["v"] = "9"
		}
		valid.Content = []waBinary.Node{enc}
		return valid, err
	},
	malformedParticipant: func(s *Server, d *device, m *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		enc, err := s.encrypt(d, m, m.content, 0)
		valid = inMalformedGroup(valid)
		delete(valid.Attrs, "participant")
		valid.Content = []waBinary.Node{enc}
		return valid, err
	},
	malformedGroupKey: func(_ *Server, _ *device, m *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
		ciphertext, err := m.from.handset.encryptForGroup(malformedGroup.User, m.content)
		valid.Content = encrypted("skmsg", ciphertext)
		return inMalformedGroup(valid), err
	},
}

func garbage(_ *Server, _ *device, _ *sentMessage, valid waBinary.Node) (waBinary.Node, error) {
	garbage := make([]byte, 100)
	_, _ = rand.Read(garbage) // never fails
	valid.Content = encrypted("msg", garbage)
	return valid, nil
}

// Malformations lists the ways in which [SendRequest.Malformed] and [FaultMalformed] make a
// message malformed.
func Malformations() []string { return sortedKeys(malformations) }

// encrypted is the content of a message with one encrypted part.
func encrypted(kind string, ciphertext []byte) []waBinary.Node {
	enc := waBinary.Node{Tag: "enc", Attrs: waBinary.Attrs{"v": "2", "type": kind}}
	if ciphertext != nil {
		enc.Content = ciphertext
	}
	return []waBinary.Node{enc}
}

// inMalformedGroup makes a message to a device one in a group.
func inMalformedGroup(node waBinary.Node) waBinary.Node {
	node.Attrs["from"], node.Attrs["participant"] = malformedGroup, node.Attrs["from"]
	return node
}

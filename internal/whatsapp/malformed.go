package whatsapp

import (
	"fmt"

	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/serialize"
	"go.mau.fi/libsignal/signalerror"
	"go.mau.fi/whatsmeow/store"
)

// whatsmeow uses this serializer for all connections.
func init() { guard(store.SignalProtobufSerializer) }

// keySize is a type and 32 bytes of Curve25519.
const keySize = 1 + 32

// guard makes libsignal refuse messages that would make it panic: an empty message, or
// one with an empty key in it. whatsmeow reads messages in a separate goroutine without
// a recover, so a single malformed message from a stranger would end the process with
// all its sessions, and then the next process to which it is delivered. A refused message
// is handled like any other undecryptable message and is acknowledged.
func guard(s *serialize.Serializer) {
	s.SignalMessage = guarded[protocol.SignalMessageStructure]{s.SignalMessage, func(m *protocol.SignalMessageStructure) [][]byte {
		return [][]byte{m.RatchetKey}
	}}
	s.PreKeySignalMessage = guarded[protocol.PreKeySignalMessageStructure]{s.PreKeySignalMessage, func(m *protocol.PreKeySignalMessageStructure) [][]byte {
		return [][]byte{m.BaseKey, m.IdentityKey}
	}}
	s.SenderKeyDistributionMessage = guarded[protocol.SenderKeyDistributionMessageStructure]{
		s.SenderKeyDistributionMessage, func(m *protocol.SenderKeyDistributionMessageStructure) [][]byte { return [][]byte{m.SigningKey} },
	}
}

// serializer reads and writes a kind of message for libsignal.
type serializer[T any] interface {
	Serialize(*T) []byte
	Deserialize([]byte) (*T, error)
}

// guarded is a serializer that never panics while it reads, and refuses keys that
// would make libsignal panic.
type guarded[T any] struct {
	serializer[T]
	keys func(*T) [][]byte
}

// Deserialize implements the serializers of package protocol.
func (g guarded[T]) Deserialize(content []byte) (message *T, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			message, err = nil, fmt.Errorf("%w: %v", signalerror.ErrIncompleteMessage, cause)
		}
	}()
	if message, err = g.serializer.Deserialize(content); err != nil {
		return nil, err
	}
	for _, key := range g.keys(message) {
		if len(key) < keySize {
			return nil, fmt.Errorf("%w: a key of %d bytes", signalerror.ErrIncompleteMessage, len(key))
		}
	}
	return message, nil
}

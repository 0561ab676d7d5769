package whatsapp

import (
	"fmt"

	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/serialize"
	"go.mau.fi/libsignal/signalerror"
	"go.mau.fi/whatsmeow/store"
)

// whatsmeow reads with this one serializer, from its first connection on.
func init() { guard(store.SignalProtobufSerializer) }

// keySize is a type and 32 bytes of Curve25519.
const keySize = 1 + 32

// guard has libsignal refuse what it would panic over: an empty message, or one
// with an empty key in it. whatsmeow reads messages in a goroutine of its own
// that nothing recovers, so a single malformed message from a stranger would end
// the process with every session on it, and again wherever it is delivered next.
// An error is an undecryptable message like any other and is acknowledged.
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

// serializer is what libsignal reads and writes a kind of message with.
type serializer[T any] interface {
	Serialize(*T) []byte
	Deserialize([]byte) (*T, error)
}

// guarded is a serializer that never panics over what it reads and lets no key
// through over which libsignal would.
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

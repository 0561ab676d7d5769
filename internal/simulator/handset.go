package simulator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	"go.mau.fi/libsignal/ecc"
	groups "go.mau.fi/libsignal/groups/state/record"
	"go.mau.fi/libsignal/keys/identity"
	"go.mau.fi/libsignal/keys/prekey"
	"go.mau.fi/libsignal/protocol"
	"go.mau.fi/libsignal/session"
	"go.mau.fi/libsignal/state/record"
	"go.mau.fi/libsignal/state/store"
	waBinary "go.mau.fi/whatsmeow/binary"
	waStore "go.mau.fi/whatsmeow/store"
)

// handsetRegistration is the registration id of every phone: clients store it
// and never compare it.
const handsetRegistration = 1

// handset is the Signal part of a phone: its keys, and its sessions with its own
// linked devices and those of others. It is safe for concurrent use.
type handset struct {
	mu   sync.Mutex
	keys signalKeys
}

func newHandset(key *ecc.ECKeyPair) *handset {
	return &handset{keys: signalKeys{
		identity: identity.NewKeyPair(identity.NewKey(key.PublicKey()), key.PrivateKey()),
		preKeys:  map[uint32]*record.PreKey{},
		sessions: map[string]*record.Session{},
	}}
}

// bundle returns the keys that a client needs to write to this phone for the first time.
func (h *handset) bundle() ([]waBinary.Node, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.keys.signed == nil {
		pair, err := ecc.GenerateKeyPair()
		if err != nil {
			return nil, fmt.Errorf("make a signed prekey: %w", err)
		}
		signature := ecc.CalculateSignature(h.keys.identity.PrivateKey(), pair.PublicKey().Serialize())
		h.keys.signed = record.NewSignedPreKey(1, 0, pair, signature, nil)
	}
	pair, err := ecc.GenerateKeyPair()
	if err != nil {
		return nil, fmt.Errorf("make a prekey: %w", err)
	}
	h.keys.lastPreKey = h.keys.lastPreKey%0xfffffe + 1
	h.keys.preKeys[h.keys.lastPreKey] = record.NewPreKey(h.keys.lastPreKey, pair, nil)

	public := h.keys.identity.PublicKey().PublicKey().PublicKey()
	once := preKey{id: h.keys.lastPreKey, public: pair.PublicKey().PublicKey()}
	signed := preKey{id: h.keys.signed.ID(), public: h.keys.signed.KeyPair().PublicKey().PublicKey(), signature: h.keys.signed.Signature()}
	return append(bundleNodes(handsetRegistration, public[:]), preKeyNode("key", once), preKeyNode("skey", signed)), nil
}

// encrypt encrypts for a device: in the session with it, or in a new one from
// the bundle that fetch gets. anew drops the session first. The result is the
// type and the content of an enc node.
func (h *handset) encrypt(d *device, plaintext []byte, fetch func() *prekey.Bundle, anew bool) (kind string, ciphertext []byte, err error) {
	ctx := context.Background() // the keys are in memory
	address := d.jid().SignalAddress()
	h.mu.Lock()
	defer h.mu.Unlock()
	if anew {
		delete(h.keys.sessions, address.String())
	}
	builder := session.NewBuilderFromSignal(&h.keys, address, waStore.SignalProtobufSerializer)
	if h.keys.sessions[address.String()] == nil {
		if err := builder.ProcessBundle(ctx, fetch()); err != nil {
			return "", nil, fmt.Errorf("begin a signal session: %w", err)
		}
	}
	message, err := session.NewCipher(builder, address).Encrypt(ctx, pad(plaintext))
	if err != nil {
		return "", nil, fmt.Errorf("encrypt: %w", err)
	}
	if message.Type() == protocol.PREKEY_TYPE {
		return "pkmsg", message.Serialize(), nil
	}
	return "msg", message.Serialize(), nil
}

// decrypt decrypts an enc node from a device.
func (h *handset) decrypt(d *device, kind string, ciphertext []byte) ([]byte, error) {
	ctx := context.Background() // the keys are in memory
	serializer := waStore.SignalProtobufSerializer
	address := d.jid().SignalAddress()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys.decrypting = true
	defer func() { h.keys.decrypting = false }()
	cipher := session.NewCipher(session.NewBuilderFromSignal(&h.keys, address, serializer), address)
	var plaintext []byte
	switch kind {
	case "pkmsg":
		message, err := protocol.NewPreKeySignalMessageFromBytes(ciphertext, serializer.PreKeySignalMessage, serializer.SignalMessage)
		if err != nil {
			return nil, fmt.Errorf("read a prekey message: %w", err)
		}
		if plaintext, err = cipher.DecryptMessage(ctx, message); err != nil {
			return nil, fmt.Errorf("decrypt a prekey message: %w", err)
		}
	case "msg":
		message, err := protocol.NewSignalMessageFromBytes(ciphertext, serializer.SignalMessage)
		if err != nil {
			return nil, fmt.Errorf("read a message: %w", err)
		}
		if plaintext, err = cipher.Decrypt(ctx, message); err != nil {
			return nil, fmt.Errorf("decrypt a message: %w", err)
		}
	default:
		return nil, fmt.Errorf("unknown encryption type %q", kind)
	}
	return unpad(plaintext)
}

// pad appends 1 to 15 bytes, each with their number as its value.
func pad(plaintext []byte) []byte {
	var b [1]byte
	_, _ = rand.Read(b[:]) // never fails
	n := b[0]%15 + 1
	out := make([]byte, len(plaintext), len(plaintext)+int(n))
	copy(out, plaintext)
	for range n {
		out = append(out, n)
	}
	return out
}

func unpad(padded []byte) ([]byte, error) {
	if len(padded) == 0 || int(padded[len(padded)-1]) > len(padded) {
		return nil, errors.New("the padding of a message is wrong")
	}
	return padded[:len(padded)-int(padded[len(padded)-1])], nil
}

// signalKeys is libsignal's store of a handset.
type signalKeys struct {
	identity   *identity.KeyPair
	signed     *record.SignedPreKey
	preKeys    map[uint32]*record.PreKey
	lastPreKey uint32
	sessions   map[string]*record.Session
	// decrypting makes LoadSession return copies: a decryption that fails must change nothing.
	// An encryption does not fail, and a copy is a third of its cost.
	decrypting bool
	senderKeys map[string]*groups.SenderKey // in groups; nil until the first
}

var _ store.SignalProtocol = (*signalKeys)(nil)

// errNotKept is returned for data that libsignal needs only for the maintenance of keys,
// which a simulated phone does not do.
var errNotKept = errors.New("a simulated phone does not keep this")

// GetIdentityKeyPair implements libsignal's store.
func (k *signalKeys) GetIdentityKeyPair() *identity.KeyPair { return k.identity }

// GetLocalRegistrationID implements libsignal's store.
func (k *signalKeys) GetLocalRegistrationID() uint32 { return handsetRegistration }

// SaveIdentity implements libsignal's store: every identity is trusted.
func (k *signalKeys) SaveIdentity(context.Context, *protocol.SignalAddress, *identity.Key) error {
	return nil
}

// IsTrustedIdentity implements libsignal's store: every identity is trusted.
func (k *signalKeys) IsTrustedIdentity(context.Context, *protocol.SignalAddress, *identity.Key) (bool, error) {
	return true, nil
}

// LoadPreKey implements libsignal's store.
func (k *signalKeys) LoadPreKey(_ context.Context, id uint32) (*record.PreKey, error) {
	return k.preKeys[id], nil
}

// StorePreKey implements libsignal's store.
func (k *signalKeys) StorePreKey(context.Context, uint32, *record.PreKey) error { return errNotKept }

// ContainsPreKey implements libsignal's store.
func (k *signalKeys) ContainsPreKey(_ context.Context, id uint32) (bool, error) {
	return k.preKeys[id] != nil, nil
}

// RemovePreKey implements libsignal's store.
func (k *signalKeys) RemovePreKey(_ context.Context, id uint32) error {
	delete(k.preKeys, id)
	return nil
}

// LoadSession implements libsignal's store. It returns a new record if there is none.
func (k *signalKeys) LoadSession(_ context.Context, address *protocol.SignalAddress) (*record.Session, error) {
	serializer := waStore.SignalProtobufSerializer
	kept := k.sessions[address.String()]
	switch {
	case kept == nil:
		return record.NewSession(serializer.Session, serializer.State), nil
	case k.decrypting:
		return record.NewSessionFromBytes(kept.Serialize(), serializer.Session, serializer.State)
	default:
		return kept, nil
	}
}

// GetSubDeviceSessions implements libsignal's store.
func (k *signalKeys) GetSubDeviceSessions(context.Context, string) ([]uint32, error) {
	return nil, errNotKept
}

// StoreSession implements libsignal's store.
func (k *signalKeys) StoreSession(_ context.Context, address *protocol.SignalAddress, s *record.Session) error {
	k.sessions[address.String()] = s
	return nil
}

// ContainsSession implements libsignal's store.
func (k *signalKeys) ContainsSession(_ context.Context, address *protocol.SignalAddress) (bool, error) {
	return k.sessions[address.String()] != nil, nil
}

// DeleteSession implements libsignal's store.
func (k *signalKeys) DeleteSession(_ context.Context, address *protocol.SignalAddress) error {
	delete(k.sessions, address.String())
	return nil
}

// DeleteAllSessions implements libsignal's store.
func (k *signalKeys) DeleteAllSessions(context.Context) error {
	clear(k.sessions)
	return nil
}

// LoadSignedPreKey implements libsignal's store.
func (k *signalKeys) LoadSignedPreKey(_ context.Context, id uint32) (*record.SignedPreKey, error) {
	if k.signed == nil || k.signed.ID() != id {
		return nil, nil
	}
	return k.signed, nil
}

// LoadSignedPreKeys implements libsignal's store.
func (k *signalKeys) LoadSignedPreKeys(context.Context) ([]*record.SignedPreKey, error) {
	return nil, errNotKept
}

// StoreSignedPreKey implements libsignal's store.
func (k *signalKeys) StoreSignedPreKey(context.Context, uint32, *record.SignedPreKey) error {
	return errNotKept
}

// ContainsSignedPreKey implements libsignal's store.
func (k *signalKeys) ContainsSignedPreKey(_ context.Context, id uint32) (bool, error) {
	return k.signed != nil && k.signed.ID() == id, nil
}

// RemoveSignedPreKey implements libsignal's store.
func (k *signalKeys) RemoveSignedPreKey(context.Context, uint32) error { return errNotKept }

package simulator

import (
	"context"
	"fmt"

	signalgroups "go.mau.fi/libsignal/groups"
	groups "go.mau.fi/libsignal/groups/state/record"
	"go.mau.fi/libsignal/protocol"
	waStore "go.mau.fi/whatsmeow/store"
)

// ownSender names a phone's own sender key in its store.
var ownSender = protocol.NewSignalAddress("own", 0)

// senderKey returns the phone's sender key with that name, as the devices of other members get
// it: they can decrypt the messages from now on.
func (h *handset) senderKey(name string) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	builder := signalgroups.NewGroupSessionBuilder(&h.keys, waStore.SignalProtobufSerializer)
	key, err := builder.Create(context.Background(), protocol.NewSenderKeyName(name, ownSender))
	if err != nil {
		return nil, fmt.Errorf("make a sender key: %w", err)
	}
	return key.Serialize(), nil
}

// encryptForGroup encrypts with the phone's sender key with that name. The result is the
// content of an enc node of the type skmsg.
func (h *handset) encryptForGroup(keyName string, plaintext []byte) ([]byte, error) {
	ctx, name := context.Background(), protocol.NewSenderKeyName(keyName, ownSender) // the keys are in memory
	h.mu.Lock()
	defer h.mu.Unlock()
	builder := signalgroups.NewGroupSessionBuilder(&h.keys, waStore.SignalProtobufSerializer)
	if h.keys.senderKeys[name.Sender().String()+keyName] == nil {
		if _, err := builder.Create(ctx, name); err != nil {
			return nil, fmt.Errorf("make a sender key: %w", err)
		}
	}
	message, err := signalgroups.NewGroupCipher(builder, name, &h.keys).Encrypt(ctx, pad(plaintext))
	if err != nil {
		return nil, fmt.Errorf("encrypt for a group: %w", err)
	}
	return message.SignedSerialize(), nil
}

// storeSenderKey stores the sender key that a device has given to the phone.
func (h *handset) storeSenderKey(group string, d *device, key []byte) error {
	message, err := protocol.NewSenderKeyDistributionMessageFromBytes(key, waStore.SignalProtobufSerializer.SenderKeyDistributionMessage)
	if err != nil {
		return fmt.Errorf("read a sender key: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	builder := signalgroups.NewGroupSessionBuilder(&h.keys, waStore.SignalProtobufSerializer)
	if err := builder.Process(context.Background(), protocol.NewSenderKeyName(group, d.jid().SignalAddress()), message); err != nil {
		return fmt.Errorf("store a sender key: %w", err)
	}
	return nil
}

// decryptForGroup decrypts a message of a device with its sender key.
func (h *handset) decryptForGroup(group string, d *device, ciphertext []byte) ([]byte, error) {
	message, err := protocol.NewSenderKeyMessageFromBytes(ciphertext, waStore.SignalProtobufSerializer.SenderKeyMessage)
	if err != nil {
		return nil, fmt.Errorf("read a message in a group: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	name := protocol.NewSenderKeyName(group, d.jid().SignalAddress())
	builder := signalgroups.NewGroupSessionBuilder(&h.keys, waStore.SignalProtobufSerializer)
	plaintext, err := signalgroups.NewGroupCipher(builder, name, &h.keys).Decrypt(context.Background(), message)
	if err != nil {
		return nil, fmt.Errorf("decrypt a message in a group: %w", err)
	}
	return unpad(plaintext)
}

// StoreSenderKey implements libsignal's store.
func (k *signalKeys) StoreSenderKey(_ context.Context, name *protocol.SenderKeyName, key *groups.SenderKey) error {
	if k.senderKeys == nil {
		k.senderKeys = map[string]*groups.SenderKey{}
	}
	k.senderKeys[name.Sender().String()+name.GroupID()] = key
	return nil
}

// LoadSenderKey implements libsignal's store. It returns a new record if there is none.
func (k *signalKeys) LoadSenderKey(_ context.Context, name *protocol.SenderKeyName) (*groups.SenderKey, error) {
	if key := k.senderKeys[name.Sender().String()+name.GroupID()]; key != nil {
		return key, nil
	}
	serializer := waStore.SignalProtobufSerializer
	return groups.NewSenderKey(serializer.SenderKeyRecord, serializer.SenderKeyState), nil
}

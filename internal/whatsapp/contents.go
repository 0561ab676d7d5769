package whatsapp

import (
	"context"
	"errors"
	"time"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/store"
	"google.golang.org/protobuf/proto"
)

// maxCompressed is the maximum size of compressed contents of a message, which can become
// a thousand times as large with gzip.
const maxCompressed = 64 << 10

// errCompressed refuses a message as if it could not be decrypted.
var errCompressed = errors.New("a message holds more compressed settings than are read")

// vettedContents reads decrypted messages before whatsmeow does. whatsmeow decompresses a
// copy of the settings from the own phone without a limit, into memory that hundreds of
// sessions share (appstate/recovery.go, ParseRecovery). It requests no copy here, so no copy
// is missing.
type vettedContents struct{ store.EventBuffer }

// PutBufferedEvent implements store.EventBuffer: whatsmeow calls it with every message, in
// the transaction of its decryption.
func (v vettedContents) PutBufferedEvent(ctx context.Context, hash [32]byte, plaintext []byte, at time.Time) error {
	if err := vetContent(plaintext); err != nil {
		return err
	}
	return v.EventBuffer.PutBufferedEvent(ctx, hash, plaintext, at)
}

// vetContent refuses a decrypted message that cannot be handled within the limits. Only
// a large message can exceed them.
func vetContent(plaintext []byte) error {
	if len(plaintext) <= maxCompressed {
		return nil
	}
	padding := int(plaintext[len(plaintext)-1]) // whatsmeow's message.go, unpadMessage
	var m waE2E.Message
	// If it cannot be read here, whatsmeow cannot read it either.
	_ = proto.Unmarshal(plaintext[:max(0, len(plaintext)-padding)], &m)
	for _, message := range []*waE2E.Message{&m, m.GetDeviceSentMessage().GetMessage()} {
		for _, result := range message.GetProtocolMessage().GetPeerDataOperationRequestResponseMessage().GetPeerDataOperationResult() {
			if len(result.GetSyncdSnapshotFatalRecoveryResponse().GetCollectionSnapshot()) > maxCompressed {
				return errCompressed
			}
		}
	}
	return nil
}

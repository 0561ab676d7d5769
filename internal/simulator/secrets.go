package simulator

import (
	"crypto/rand"
	"fmt"

	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/util/gcmutil"
	"go.mau.fi/whatsmeow/util/hkdfutil"
	"google.golang.org/protobuf/proto"
)

// encryptWithSecret encrypts a message about another one with that one's secret (whatsmeow's
// msgsecret.go, generateMsgSecretKey). Both senders are named as this message names them.
func (l *draft) encryptWithSecret(use string, plain proto.Message) (payload, iv []byte, err error) {
	target := &waE2E.Message{}
	if err := proto.Unmarshal(l.target.content, target); err != nil {
		return nil, nil, fmt.Errorf("decode a message: %w", err)
	}
	secret := target.GetMessageContextInfo().GetMessageSecret()
	if secret == nil {
		return nil, nil, fmt.Errorf("%w: the message %s has no secret", ErrNotNow, l.target.id)
	}
	plaintext, err := proto.Marshal(plain)
	if err != nil {
		return nil, nil, fmt.Errorf("encode a message: %w", err)
	}
	author, sender := l.from.address(l.target.from.account).String(), l.from.address(l.from.account).String()
	key := hkdfutil.SHA256(secret, nil, []byte(l.target.id+author+sender+use), 32)
	var additional []byte
	if use == "Poll Vote" {
		additional = []byte(l.target.id + "\x00" + sender)
	}
	iv = make([]byte, 12)
	_, _ = rand.Read(iv) // never fails
	if payload, err = gcmutil.Encrypt(key, iv, plaintext, additional); err != nil {
		return nil, nil, fmt.Errorf("encrypt with the secret of a message: %w", err)
	}
	return payload, iv, nil
}

package simulator

import (
	"crypto/rand"
	"fmt"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waMmsRetry"
	"go.mau.fi/whatsmeow/util/gcmutil"
	"go.mau.fi/whatsmeow/util/hkdfutil"
	"google.golang.org/protobuf/proto"
)

// errorNotOnPhone is the code of a media retry whose file the phone does not have.
const errorNotOnPhone = "2"

// uploadAgain handles the receipt of a device that could not download the file of a message.
// The phone uploads the file again and sends its new path, encrypted with a key that it
// derives from the key of the file. A phone that is offline does not answer.
func (s *Server) uploadAgain(d *device, receipt *waBinary.Node) error {
	id := attribute(receipt, "id")
	rmr, ok := receipt.GetOptionalChildByTag("rmr")
	if !ok {
		return nil // about a part of the phone's history, which this phone does not upload
	}
	s.mu.Lock()
	m := d.queue.message(id)
	_, offline := s.activeLocked(FaultPhoneOffline, d)
	s.mu.Unlock()
	if offline {
		return nil
	}
	answer := waBinary.Node{
		Tag: "notification", Attrs: waBinary.Attrs{"from": d.account.jid(), "type": "mediaretry", "id": id, "t": s.seconds()},
	}
	if m == nil || m.file == nil {
		answer.Content = []waBinary.Node{cloneNode(rmr), {Tag: "error", Attrs: waBinary.Attrs{"code": errorNotOnPhone}}}
		s.enqueue(d, &stanza{tag: "notification", id: id, node: answer})
		return nil
	}
	key := hkdfutil.SHA256(m.file.key, nil, []byte("WhatsApp Media Retry Notification"), 32)
	encrypt := receipt.GetChildByTag("encrypt")
	var request waMmsRetry.ServerErrorReceipt
	plaintext, err := gcmutil.Decrypt(key, content(&encrypt, "enc_iv"), content(&encrypt, "enc_p"), []byte(id))
	if err != nil {
		return fmt.Errorf("decrypt a request for a media file: %w", err)
	}
	if err := proto.Unmarshal(plaintext, &request); err != nil {
		return fmt.Errorf("decode a request for a media file: %w", err)
	}
	plaintext, err = proto.Marshal(&waMmsRetry.MediaRetryNotification{
		StanzaID: proto.String(request.GetStanzaID()), DirectPath: proto.String(s.media.store(m.file.encrypted)),
		Result: waMmsRetry.MediaRetryNotification_SUCCESS.Enum(),
	})
	if err != nil {
		return fmt.Errorf("encode the path of a media file: %w", err)
	}
	iv := make([]byte, 12)
	_, _ = rand.Read(iv) // never fails
	ciphertext, err := gcmutil.Encrypt(key, iv, plaintext, []byte(id))
	if err != nil {
		return fmt.Errorf("encrypt the path of a media file: %w", err)
	}
	answer.Content = []waBinary.Node{cloneNode(rmr), {Tag: "encrypt", Content: []waBinary.Node{{Tag: "enc_p", Content: ciphertext}, {Tag: "enc_iv", Content: iv}}}}
	s.enqueue(d, &stanza{tag: "notification", id: id, node: answer})
	return nil
}

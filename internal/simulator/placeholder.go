package simulator

import (
	"fmt"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waCommon"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waWeb"
	"google.golang.org/protobuf/proto"
)

// A device that has only a placeholder of a message, because it could not decrypt the message
// or because its sender has not encrypted it for the device, asks its own phone for it. The
// phone sends the whole message in a message of its own (a peer message).

// answerPeer answers a message of a device to its own phone.
func (s *Server) answerPeer(d *device, content *waE2E.Message) error {
	request := content.GetProtocolMessage().GetPeerDataOperationRequestMessage()
	if request.GetPeerDataOperationRequestType() != waE2E.PeerDataOperationRequestType_PLACEHOLDER_MESSAGE_RESEND {
		return nil
	}
	for _, item := range request.GetPlaceholderMessageResendRequest() {
		if err := s.resendPlaceholder(d, item.GetMessageKey()); err != nil {
			s.log.Error(err, "Failed to send a message from the phone", "device", d.jid().String())
		}
	}
	return nil
}

// resendPlaceholder sends a device the message that it asked its phone for, unless the phone
// is offline or does not have it.
func (s *Server) resendPlaceholder(d *device, key *waCommon.MessageKey) error {
	s.mu.Lock()
	m := d.queue.message(key.GetID())
	if m != nil {
		m.entry.asked++
	}
	_, offline := s.activeLocked(FaultPhoneOffline, d)
	if m == nil || offline || m.peer {
		s.mu.Unlock()
		return nil
	}
	m.entry.answered++
	name := m.from.account.name
	s.mu.Unlock()

	message := &waE2E.Message{}
	if err := proto.Unmarshal(m.content, message); err != nil {
		return fmt.Errorf("decode a message: %w", err)
	}
	key = proto.Clone(key).(*waCommon.MessageKey)
	if key.Participant == nil && m.group != nil {
		key.Participant = proto.String(m.from.address(m.from.account).String())
	}
	info, err := proto.Marshal(&waWeb.WebMessageInfo{
		Key: key, Message: message, MessageTimestamp: proto.Uint64(uint64(m.sent)),
		PushName: proto.String(name), Participant: key.Participant,
	})
	if err != nil {
		return fmt.Errorf("encode a message: %w", err)
	}
	return s.sendPeer(d, &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
		Type: waE2E.ProtocolMessage_PEER_DATA_OPERATION_REQUEST_RESPONSE_MESSAGE.Enum(),
		PeerDataOperationRequestResponseMessage: &waE2E.PeerDataOperationRequestResponseMessage{
			PeerDataOperationRequestType: waE2E.PeerDataOperationRequestType_PLACEHOLDER_MESSAGE_RESEND.Enum(),
			StanzaID:                     proto.String(newID()),
			PeerDataOperationResult: []*waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult{{
				PlaceholderMessageResendResponse: &waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult_PlaceholderMessageResendResponse{
					WebMessageInfoBytes: info,
				},
			}},
		},
	}})
}

// sendPeer sends a message of the own phone to a device.
func (s *Server) sendPeer(d *device, message *waE2E.Message) error {
	content, err := proto.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode a message: %w", err)
	}
	return s.push(d, &sentMessage{
		id: newID(), sent: s.clock.Now().Unix(), from: correspondent{account: d.account, handset: d.account.handset},
		description: describe(message), content: content, peer: true,
	}, 0, 0)
}

// malformedNode is the node of a malformed message to a device.
func (s *Server) malformedNode(d *device, m *sentMessage) (waBinary.Node, error) {
	return malformations[m.malformed](s, d, m, s.messageNode(m, nil))
}

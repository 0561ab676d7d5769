package simulator

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"go.mau.fi/whatsmeow/proto/waCommon"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"google.golang.org/protobuf/proto"
)

// The kinds of messages that a contact can send.
const (
	KindText         = "text"
	KindImage        = "image"
	KindVideo        = "video"
	KindVoice        = "voice"
	KindAudio        = "audio"
	KindDocument     = "document"
	KindSticker      = "sticker"
	KindLocation     = "location"
	KindLiveLocation = "live-location"
	KindContact      = "contact"
	KindPoll         = "poll"
	KindVote         = "vote"
	KindReaction     = "reaction"
	KindEdit         = "edit"
	KindRevoke       = "revoke"
	KindOrder        = "order"
	KindProduct      = "product"
)

// mediaKinds are the kinds with a file.
var mediaKinds = []string{KindImage, KindVideo, KindVoice, KindAudio, KindDocument, KindSticker}

// targetKinds are the kinds that refer to another message.
var targetKinds = []string{KindVote, KindReaction, KindEdit, KindRevoke}

// Kinds lists the kinds of messages that [Server.Write] sends.
func Kinds() []string {
	return append(append([]string{KindText, KindLocation, KindLiveLocation, KindContact, KindPoll, KindOrder, KindProduct}, mediaKinds...), targetKinds...)
}

// draft is a request to send a message with all that it refers to.
type draft struct {
	SendRequest
	from correspondent
	// recipient is the account of the device, or the person to whom the own account writes.
	recipient *account
	group     *group
	target    *sentMessage // the message that is edited, revoked, voted on or reacted to
	quoted    *sentMessage
	mentioned []string // JIDs
	file      *mediaFile
	now       int64 // in milliseconds
}

// secretLength is the length of the secret in messages, with which later messages about them
// are encrypted.
const secretLength = 32

// content builds the message.
func (l *draft) content() (*waE2E.Message, error) {
	if l.Kind == KindEdit && l.Encrypted {
		return l.encryptedEdit()
	}
	m, err := l.plain()
	if err != nil {
		return nil, err
	}
	if !slices.Contains(targetKinds, l.Kind) {
		secret := make([]byte, secretLength)
		_, _ = rand.Read(secret) // never fails
		m.MessageContextInfo = &waE2E.MessageContextInfo{MessageSecret: secret}
	}
	wrapped := func(inner *waE2E.Message) *waE2E.FutureProofMessage { return &waE2E.FutureProofMessage{Message: inner} }
	secret := m.MessageContextInfo
	switch {
	case l.ViewOnce:
		m = &waE2E.Message{ViewOnceMessageV2: wrapped(m)}
	case l.Ephemeral:
		m = &waE2E.Message{EphemeralMessage: wrapped(m)}
	}
	m.MessageContextInfo = secret
	return m, nil
}

// plain builds the message without what wraps it.
func (l *draft) plain() (*waE2E.Message, error) {
	text, info := textOrNil(l.Text), l.contextInfo()
	switch l.Kind {
	case KindText:
		if info == nil {
			return &waE2E.Message{Conversation: text}, nil
		}
		return &waE2E.Message{ExtendedTextMessage: &waE2E.ExtendedTextMessage{Text: text, ContextInfo: info}}, nil
	case KindLocation:
		return &waE2E.Message{LocationMessage: &waE2E.LocationMessage{
			DegreesLatitude: proto.Float64(l.Latitude), DegreesLongitude: proto.Float64(l.Longitude), Name: text, ContextInfo: info,
		}}, nil
	case KindLiveLocation:
		return &waE2E.Message{LiveLocationMessage: &waE2E.LiveLocationMessage{
			DegreesLatitude: proto.Float64(l.Latitude), DegreesLongitude: proto.Float64(l.Longitude), Caption: text,
			SequenceNumber: proto.Int64(l.now), ContextInfo: info,
		}}, nil
	case KindContact:
		return l.contacts(info), nil
	case KindPoll:
		poll := &waE2E.PollCreationMessage{Name: text, SelectableOptionsCount: proto.Uint32(0), ContextInfo: info}
		for _, option := range l.Options {
			poll.Options = append(poll.Options, &waE2E.PollCreationMessage_Option{OptionName: proto.String(option)})
		}
		return &waE2E.Message{PollCreationMessage: poll}, nil
	case KindVote:
		return l.vote()
	case KindReaction:
		return &waE2E.Message{ReactionMessage: &waE2E.ReactionMessage{Key: l.targetKey(), Text: proto.String(l.Text), SenderTimestampMS: proto.Int64(l.now)}}, nil
	case KindEdit:
		return &waE2E.Message{EditedMessage: &waE2E.FutureProofMessage{Message: &waE2E.Message{ProtocolMessage: l.edit()}}}, nil
	case KindRevoke:
		return &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_REVOKE.Enum(), Key: l.targetKey()}}, nil
	case KindOrder:
		return &waE2E.Message{OrderMessage: &waE2E.OrderMessage{
			OrderID: proto.String("1"), ItemCount: proto.Int32(1), Message: text, OrderTitle: proto.String("Order"), ContextInfo: info,
		}}, nil
	case KindProduct:
		return &waE2E.Message{ProductMessage: &waE2E.ProductMessage{
			Product: &waE2E.ProductMessage_ProductSnapshot{ProductID: proto.String("1"), Title: text}, ContextInfo: info,
		}}, nil
	}
	if l.file == nil {
		return nil, fmt.Errorf("%w: there is no kind of message %q; the kinds are %q", ErrBadInput, l.Kind, Kinds())
	}
	return l.file.message(l.Kind, text, info), nil
}

// textOrNil is nil for an empty text.
func textOrNil(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}

// contextInfo is what a message says about its relation to others, or nil.
func (l *draft) contextInfo() *waE2E.ContextInfo {
	info := &waE2E.ContextInfo{MentionedJID: l.mentioned}
	if l.quoted != nil {
		quoted := &waE2E.Message{}
		if proto.Unmarshal(l.quoted.content, quoted) == nil {
			quoted.MessageContextInfo = nil
			info.QuotedMessage = quoted
		}
		info.StanzaID = proto.String(l.quoted.id)
		info.Participant = proto.String(l.from.address(l.quoted.from.account).String())
	}
	if l.Forwarded {
		info.IsForwarded, info.ForwardingScore = proto.Bool(true), proto.Uint32(1)
	}
	if l.Ephemeral {
		info.Expiration = proto.Uint32(86400)
	}
	if l.Advert != "" {
		info.ExternalAdReply = &waE2E.ContextInfo_ExternalAdReplyInfo{
			SourceURL: proto.String(l.Advert), SourceType: proto.String("ad"), SourceID: proto.String("1"), Title: proto.String("Advert"),
		}
	}
	if proto.Size(info) == 0 {
		return nil
	}
	return info
}

// contacts is a message with one contact or a list of them.
func (l *draft) contacts(info *waE2E.ContextInfo) *waE2E.Message {
	var cards []*waE2E.ContactMessage
	for i, name := range l.Names {
		card := fmt.Sprintf("BEGIN:VCARD\nVERSION:3.0\nN:;%s;;;\nFN:%s\nTEL;type=CELL;waid=1555000%04d:+1 555 000 %04d\nEND:VCARD", name, name, i, i)
		cards = append(cards, &waE2E.ContactMessage{DisplayName: proto.String(name), Vcard: proto.String(card)})
	}
	if len(cards) == 1 {
		cards[0].ContextInfo = info
		return &waE2E.Message{ContactMessage: cards[0]}
	}
	return &waE2E.Message{ContactsArrayMessage: &waE2E.ContactsArrayMessage{
		DisplayName: proto.String(strings.Join(l.Names, ", ")), Contacts: cards, ContextInfo: info,
	}}
}

// targetKey names the message that this one is about, as the sender sees it.
func (l *draft) targetKey() *waCommon.MessageKey {
	key := &waCommon.MessageKey{ID: proto.String(l.target.id), FromMe: proto.Bool(l.target.from.account == l.from.account)}
	if l.group != nil {
		key.RemoteJID = proto.String(l.group.jid().String())
		if !key.GetFromMe() {
			key.Participant = proto.String(l.from.address(l.target.from.account).String())
		}
	} else {
		key.RemoteJID = proto.String(l.from.address(l.recipient).String())
	}
	return key
}

// edit is a new text for the sender's own message.
func (l *draft) edit() *waE2E.ProtocolMessage {
	return &waE2E.ProtocolMessage{
		Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum(), Key: l.targetKey(), TimestampMS: proto.Int64(l.now),
		EditedMessage: &waE2E.Message{Conversation: textOrNil(l.Text)},
	}
}

// encryptedEdit is an edit that only those who have the secret of the message can read, as
// phones send them since 2026.
func (l *draft) encryptedEdit() (*waE2E.Message, error) {
	payload, iv, err := l.encryptWithSecret("Message Edit", &waE2E.Message{ProtocolMessage: l.edit()})
	if err != nil {
		return nil, err
	}
	return &waE2E.Message{SecretEncryptedMessage: &waE2E.SecretEncryptedMessage{
		TargetMessageKey: l.targetKey(), EncPayload: payload, EncIV: iv, SecretEncType: waE2E.SecretEncryptedMessage_MESSAGE_EDIT.Enum(),
	}}, nil
}

// vote is a vote for options of a poll, encrypted with the secret of the poll.
func (l *draft) vote() (*waE2E.Message, error) {
	vote := &waE2E.PollVoteMessage{}
	for _, option := range l.Options {
		sum := sha256.Sum256([]byte(option))
		vote.SelectedOptions = append(vote.SelectedOptions, sum[:])
	}
	payload, iv, err := l.encryptWithSecret("Poll Vote", vote)
	if err != nil {
		return nil, err
	}
	return &waE2E.Message{PollUpdateMessage: &waE2E.PollUpdateMessage{
		PollCreationMessageKey: l.targetKey(), Vote: &waE2E.PollEncValue{EncPayload: payload, EncIV: iv}, SenderTimestampMS: proto.Int64(l.now),
	}}, nil
}

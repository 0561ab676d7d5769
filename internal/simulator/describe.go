package simulator

import (
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
)

// description is what a stanza says of the message in it, without its content.
type description struct {
	kind       string // one of Kinds, or "other"
	stanzaType string // text, media, reaction or poll
	mediaType  string
	edit       string
	hide       bool // a client shows nothing if it cannot decrypt the message
}

// KindOther is the kind of a message that is none of [Kinds].
const KindOther = "other"

// describe describes a message as the senders of WhatsApp do (whatsmeow's send.go,
// getTypeFromMessage, getMediaTypeFromMessage and getEditAttribute).
func describe(m *waE2E.Message) description {
	for inner := inside(m); inner != nil; inner = inside(m) {
		m = inner
	}
	media := func(kind, mediaType string) description {
		return description{kind: kind, stanzaType: "media", mediaType: mediaType}
	}
	text := func(kind string) description { return description{kind: kind, stanzaType: "text"} }
	switch {
	case m.GetImageMessage() != nil:
		return media(KindImage, "image")
	case m.GetVideoMessage() != nil:
		return media(KindVideo, "video")
	case m.GetAudioMessage().GetPTT():
		return media(KindVoice, "ptt")
	case m.GetAudioMessage() != nil:
		return media(KindAudio, "audio")
	case m.GetDocumentMessage() != nil:
		return media(KindDocument, "document")
	case m.GetStickerMessage() != nil:
		return media(KindSticker, "sticker")
	case m.GetLocationMessage() != nil:
		return media(KindLocation, "location")
	case m.GetLiveLocationMessage() != nil:
		return media(KindLiveLocation, "livelocation")
	case m.GetContactMessage() != nil:
		return media(KindContact, "vcard")
	case m.GetContactsArrayMessage() != nil:
		return media(KindContact, "contact_array")
	case m.GetOrderMessage() != nil:
		return media(KindOrder, "order")
	case m.GetProductMessage() != nil:
		return media(KindProduct, "product")
	case m.GetReactionMessage() != nil:
		out := description{kind: KindReaction, stanzaType: "reaction", hide: true}
		if m.GetReactionMessage().GetText() == "" {
			out.edit = string(types.EditAttributeSenderRevoke)
		}
		return out
	case m.GetPollCreationMessage() != nil, m.GetPollCreationMessageV3() != nil:
		return description{kind: KindPoll, stanzaType: "poll"}
	case m.GetPollUpdateMessage() != nil:
		return description{kind: KindVote, stanzaType: "poll", hide: true}
	case m.GetProtocolMessage().GetType() == waE2E.ProtocolMessage_MESSAGE_EDIT,
		m.GetSecretEncryptedMessage().GetSecretEncType() == waE2E.SecretEncryptedMessage_MESSAGE_EDIT:
		return description{kind: KindEdit, stanzaType: "text", edit: string(types.EditAttributeMessageEdit), hide: true}
	case m.GetProtocolMessage() != nil && m.GetProtocolMessage().GetKey() != nil && m.GetProtocolMessage().GetType() == waE2E.ProtocolMessage_REVOKE:
		out := description{kind: KindRevoke, stanzaType: "text", edit: string(types.EditAttributeAdminRevoke), hide: true}
		if m.GetProtocolMessage().GetKey().GetFromMe() {
			out.edit = string(types.EditAttributeSenderRevoke)
		}
		return out
	case m.Conversation != nil, m.GetExtendedTextMessage() != nil:
		return text(KindText)
	default:
		return text(KindOther)
	}
}

// inside returns the message that another one wraps, or nil.
func inside(m *waE2E.Message) *waE2E.Message {
	for _, wrapper := range []*waE2E.FutureProofMessage{
		m.GetEphemeralMessage(), m.GetViewOnceMessage(), m.GetViewOnceMessageV2(), m.GetViewOnceMessageV2Extension(),
		m.GetDocumentWithCaptionMessage(), m.GetEditedMessage(),
	} {
		if wrapper.GetMessage() != nil {
			return wrapper.GetMessage()
		}
	}
	return nil
}

// textOf is the text of a message, or nothing.
func textOf(m *waE2E.Message) string {
	if text := m.GetConversation(); text != "" {
		return text
	}
	return m.GetExtendedTextMessage().GetText()
}

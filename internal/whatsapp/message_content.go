package whatsapp

import (
	"crypto/sha256"
	"encoding/hex"
	"math"
	"strings"

	"go.mau.fi/whatsmeow/proto/waCommon"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// handling says what happens to a kind of content.
type handling int

const (
	// unsupportedContent is forwarded with its protobuf: it has no type of its own (yet).
	unsupportedContent handling = iota
	// forwardedContent has a case in translation.typed.
	forwardedContent
	// wrappedContent contains another message.
	wrappedContent
	// ignoredContent is not for people: keys, settings, history.
	ignoredContent
)

// contents says what happens to each field of waE2E.Message, by its name in the protobuf.
// A field that is not listed is unsupported. TestEveryKindOfContentIsClassified fails when a
// newer version of the library brings fields about which nobody has decided.
var contents = map[protoreflect.Name]handling{
	"conversation":               forwardedContent,
	"extendedTextMessage":        forwardedContent,
	"imageMessage":               forwardedContent,
	"videoMessage":               forwardedContent,
	"ptvMessage":                 forwardedContent,
	"audioMessage":               forwardedContent,
	"documentMessage":            forwardedContent,
	"stickerMessage":             forwardedContent,
	"locationMessage":            forwardedContent,
	"liveLocationMessage":        forwardedContent,
	"contactMessage":             forwardedContent,
	"contactsArrayMessage":       forwardedContent,
	"pollCreationMessage":        forwardedContent,
	"pollCreationMessageV2":      forwardedContent,
	"pollCreationMessageV3":      forwardedContent,
	"pollCreationMessageV5":      forwardedContent,
	"pollCreationMessageV6":      forwardedContent,
	"pollUpdateMessage":          forwardedContent,
	"reactionMessage":            forwardedContent,
	"encReactionMessage":         forwardedContent,
	"commentMessage":             forwardedContent,
	"encCommentMessage":          forwardedContent,
	"secretEncryptedMessage":     forwardedContent,
	"protocolMessage":            forwardedContent,
	"orderMessage":               forwardedContent,
	"productMessage":             forwardedContent,
	"buttonsResponseMessage":     forwardedContent,
	"listResponseMessage":        forwardedContent,
	"templateButtonReplyMessage": forwardedContent,
	"placeholderMessage":         forwardedContent,

	"deviceSentMessage":                   wrappedContent,
	"ephemeralMessage":                    wrappedContent,
	"viewOnceMessage":                     wrappedContent,
	"viewOnceMessageV2":                   wrappedContent,
	"viewOnceMessageV2Extension":          wrappedContent,
	"documentWithCaptionMessage":          wrappedContent,
	"editedMessage":                       wrappedContent,
	"lottieStickerMessage":                wrappedContent,
	"audioStickerMessage":                 wrappedContent,
	"groupMentionedMessage":               wrappedContent,
	"botInvokeMessage":                    wrappedContent,
	"botForwardedMessage":                 wrappedContent,
	"botTaskMessage":                      wrappedContent,
	"associatedChildMessage":              wrappedContent, // a picture of an album
	"pollCreationMessageV4":               wrappedContent,
	"pollCreationOptionImageMessage":      wrappedContent,
	"eventCoverImage":                     wrappedContent,
	"spoilerMessage":                      wrappedContent,
	"questionMessage":                     wrappedContent,
	"questionReplyMessage":                wrappedContent,
	"groupStatusMessage":                  wrappedContent,
	"groupStatusMessageV2":                wrappedContent,
	"statusMentionMessage":                wrappedContent,
	"groupStatusMentionMessage":           wrappedContent,
	"statusAddYours":                      wrappedContent,
	"limitSharingMessage":                 wrappedContent,
	"newsletterAdminProfileMessage":       wrappedContent,
	"newsletterAdminProfileStatusMessage": wrappedContent,
	"newsletterScheduledMessage":          wrappedContent,

	"senderKeyDistributionMessage":               ignoredContent,
	"fastRatchetKeySenderKeyDistributionMessage": ignoredContent,
	"groupRootKeyShare":                          ignoredContent,
	"rootSecretDistributeMessage":                ignoredContent,
	"messageContextInfo":                         ignoredContent,
	"call":                                       ignoredContent, // the key of a call
	"stickerSyncRmrMessage":                      ignoredContent,
	"messageHistoryBundle":                       ignoredContent,
	"messageHistoryNotice":                       ignoredContent,
	"acp2SettingMessage":                         ignoredContent,
	"botPlatformRegistrationSuccessMessage":      ignoredContent,
	"statusLinkPreviewMetadata":                  ignoredContent,

	"chat":                              unsupportedContent,
	"highlyStructuredMessage":           unsupportedContent,
	"sendPaymentMessage":                unsupportedContent,
	"requestPaymentMessage":             unsupportedContent,
	"declinePaymentRequestMessage":      unsupportedContent,
	"cancelPaymentRequestMessage":       unsupportedContent,
	"paymentInviteMessage":              unsupportedContent,
	"paymentReminderMessage":            unsupportedContent,
	"splitPaymentMessage":               unsupportedContent,
	"splitPaymentUpdateMessage":         unsupportedContent,
	"invoiceMessage":                    unsupportedContent,
	"templateMessage":                   unsupportedContent,
	"listMessage":                       unsupportedContent,
	"buttonsMessage":                    unsupportedContent,
	"interactiveMessage":                unsupportedContent,
	"interactiveResponseMessage":        unsupportedContent,
	"groupInviteMessage":                unsupportedContent,
	"keepInChatMessage":                 unsupportedContent,
	"pinInChatMessage":                  unsupportedContent,
	"requestPhoneNumberMessage":         unsupportedContent,
	"scheduledCallCreationMessage":      unsupportedContent,
	"scheduledCallEditMessage":          unsupportedContent,
	"callLogMesssage":                   unsupportedContent,
	"bcallMessage":                      unsupportedContent,
	"eventMessage":                      unsupportedContent,
	"encEventResponseMessage":           unsupportedContent,
	"eventInviteMessage":                unsupportedContent,
	"newsletterAdminInviteMessage":      unsupportedContent,
	"newsletterFollowerInviteMessageV2": unsupportedContent,
	"albumMessage":                      unsupportedContent,
	"stickerPackMessage":                unsupportedContent,
	"musicMessage":                      unsupportedContent,
	"pollResultSnapshotMessage":         unsupportedContent,
	"pollResultSnapshotMessageV3":       unsupportedContent,
	"pollAddOptionMessage":              unsupportedContent,
	"richResponseMessage":               unsupportedContent,
	"statusNotificationMessage":         unsupportedContent,
	"statusQuestionAnswerMessage":       unsupportedContent,
	"statusQuotedMessage":               unsupportedContent,
	"statusStickerInteractionMessage":   unsupportedContent,
	"questionResponseMessage":           unsupportedContent,
	"conditionalRevealMessage":          unsupportedContent,
}

// protocolContents says what happens to each type of ProtocolMessage. A type that is not
// listed is unsupported.
var protocolContents = map[waE2E.ProtocolMessage_Type]handling{
	waE2E.ProtocolMessage_REVOKE:       forwardedContent,
	waE2E.ProtocolMessage_MESSAGE_EDIT: forwardedContent,

	waE2E.ProtocolMessage_EPHEMERAL_SETTING:                            ignoredContent,
	waE2E.ProtocolMessage_EPHEMERAL_SYNC_RESPONSE:                      ignoredContent,
	waE2E.ProtocolMessage_HISTORY_SYNC_NOTIFICATION:                    ignoredContent,
	waE2E.ProtocolMessage_APP_STATE_SYNC_KEY_SHARE:                     ignoredContent,
	waE2E.ProtocolMessage_APP_STATE_SYNC_KEY_REQUEST:                   ignoredContent,
	waE2E.ProtocolMessage_MSG_FANOUT_BACKFILL_REQUEST:                  ignoredContent,
	waE2E.ProtocolMessage_INITIAL_SECURITY_NOTIFICATION_SETTING_SYNC:   ignoredContent,
	waE2E.ProtocolMessage_APP_STATE_FATAL_EXCEPTION_NOTIFICATION:       ignoredContent,
	waE2E.ProtocolMessage_PEER_DATA_OPERATION_REQUEST_MESSAGE:          ignoredContent,
	waE2E.ProtocolMessage_PEER_DATA_OPERATION_REQUEST_RESPONSE_MESSAGE: ignoredContent,
	waE2E.ProtocolMessage_REQUEST_WELCOME_MESSAGE:                      ignoredContent,
	waE2E.ProtocolMessage_BOT_FEEDBACK_MESSAGE:                         ignoredContent,
	waE2E.ProtocolMessage_MEDIA_NOTIFY_MESSAGE:                         ignoredContent,
	waE2E.ProtocolMessage_CLOUD_API_THREAD_CONTROL_NOTIFICATION:        ignoredContent,
	waE2E.ProtocolMessage_LID_MIGRATION_MAPPING_SYNC:                   ignoredContent,
	waE2E.ProtocolMessage_BOT_MEMU_ONBOARDING_MESSAGE:                  ignoredContent,
	waE2E.ProtocolMessage_STOP_GENERATION_MESSAGE:                      ignoredContent,
	waE2E.ProtocolMessage_LIMIT_SHARING:                                ignoredContent,
	waE2E.ProtocolMessage_AI_PSI_METADATA:                              ignoredContent,
	waE2E.ProtocolMessage_AI_QUERY_FANOUT:                              ignoredContent,
	waE2E.ProtocolMessage_GROUP_MEMBER_LABEL_CHANGE:                    ignoredContent,
	waE2E.ProtocolMessage_AI_MEDIA_COLLECTION_MESSAGE:                  ignoredContent,
	waE2E.ProtocolMessage_CHAT_THEME_SETTING:                           ignoredContent,
	waE2E.ProtocolMessage_AI_METADATA_OPERATION:                        ignoredContent,
	waE2E.ProtocolMessage_COEX_STATE_SYNC:                              ignoredContent,
	waE2E.ProtocolMessage_ACP2_SETTING:                                 ignoredContent,
	waE2E.ProtocolMessage_SHARED_DEVICE_CONTACT_HASH_KEY_SHARE:         ignoredContent,
	waE2E.ProtocolMessage_SHARED_DEVICE_CONTACT_HASH_KEY_REQUEST:       ignoredContent,

	waE2E.ProtocolMessage_SHARE_PHONE_NUMBER:      unsupportedContent,
	waE2E.ProtocolMessage_REMINDER_MESSAGE:        unsupportedContent,
	waE2E.ProtocolMessage_STATUS_MENTION_MESSAGE:  unsupportedContent,
	waE2E.ProtocolMessage_MESSAGE_UNSCHEDULE:      unsupportedContent,
	waE2E.ProtocolMessage_MARK_AS_VERIFIED_ACTION: unsupportedContent,
}

// maxWrapped is how deep messages are unwrapped. WhatsApp's own are at most four deep:
// deviceSent, ephemeral, viewOnce, documentWithCaption.
const maxWrapped = 16

// content fills in the content of a message. Type stays empty if it is not forwarded.
func (t *translation) content(m *waE2E.Message, depth int) {
	field, how := contentOf(m)
	switch {
	case how == ignoredContent:
	case field == nil: // a field that a newer version knows
		t.unsupportedMessage("unknown", m)
	case how == forwardedContent:
		t.context(m.ProtoReflect().Get(field))
		t.typed(field.Name(), m, depth)
	case how == wrappedContent && depth < maxWrapped:
		t.wrapper(field.Name())
		inner, ok := m.ProtoReflect().Get(field).Message().Interface().(interface{ GetMessage() *waE2E.Message })
		if !ok || inner.GetMessage() == nil {
			t.unsupportedMessage(string(field.Name()), m)
			return
		}
		t.content(inner.GetMessage(), depth+1)
		if t.item.Media != nil && field.Name() == "lottieStickerMessage" {
			t.item.Media.Animated = true
		}
	default:
		t.context(m.ProtoReflect().Get(field))
		t.item.Text = textOf(m)
		t.unsupportedMessage(string(field.Name()), m)
	}
}

// contentOf is the field that is a message's content, and what happens to it. Keys and settings
// come beside the content, and are the content only where there is no other. The field is nil
// if the content is unknown.
func contentOf(m *waE2E.Message) (protoreflect.FieldDescriptor, handling) {
	r := m.ProtoReflect()
	fields := r.Descriptor().Fields()
	for i := range fields.Len() {
		if field := fields.Get(i); r.Has(field) && contents[field.Name()] != ignoredContent {
			return field, contents[field.Name()]
		}
	}
	if len(r.GetUnknown()) > 0 {
		return nil, unsupportedContent
	}
	return nil, ignoredContent
}

func (t *translation) wrapper(name protoreflect.Name) {
	switch name {
	case "ephemeralMessage":
		t.item.Ephemeral = true
	case "viewOnceMessage", "viewOnceMessageV2", "viewOnceMessageV2Extension":
		t.item.ViewOnce = true
	}
}

// typed fills in a content that has a type.
func (t *translation) typed(name protoreflect.Name, m *waE2E.Message, depth int) {
	switch name {
	case "conversation":
		t.text(delivery.TypeText, m.GetConversation())
	case "extendedTextMessage":
		t.text(delivery.TypeText, m.GetExtendedTextMessage().GetText())
		t.viewOnce(m.GetExtendedTextMessage().GetViewOnce())
	case "imageMessage":
		image := m.GetImageMessage()
		t.text(delivery.TypeImage, image.GetCaption())
		t.item.Media = &delivery.Media{Mime: image.GetMimetype(), Size: fileSize(image.GetFileLength()), Width: image.GetWidth(), Height: image.GetHeight()}
		t.viewOnce(image.GetViewOnce())
	case "videoMessage":
		t.video(m.GetVideoMessage(), false)
	case "ptvMessage":
		t.video(m.GetPtvMessage(), true)
	case "audioMessage":
		audio := m.GetAudioMessage()
		t.text(delivery.TypeAudio, "")
		if audio.GetPTT() {
			t.item.Type = delivery.TypeVoice
		}
		t.item.Media = &delivery.Media{Mime: audio.GetMimetype(), Size: fileSize(audio.GetFileLength()), Seconds: audio.GetSeconds()}
		t.viewOnce(audio.GetViewOnce())
	case "documentMessage":
		document := m.GetDocumentMessage()
		t.text(delivery.TypeDocument, document.GetCaption())
		file := document.GetFileName()
		if file == "" {
			file = document.GetTitle()
		}
		t.item.Media = &delivery.Media{Mime: document.GetMimetype(), Size: fileSize(document.GetFileLength()), Name: file, Pages: document.GetPageCount()}
	case "stickerMessage":
		sticker := m.GetStickerMessage()
		t.text(delivery.TypeSticker, "")
		t.item.Media = &delivery.Media{
			Mime: sticker.GetMimetype(), Size: fileSize(sticker.GetFileLength()), Width: sticker.GetWidth(), Height: sticker.GetHeight(),
			Animated: sticker.GetIsAnimated() || sticker.GetIsLottie(),
		}
	case "locationMessage":
		place := m.GetLocationMessage()
		t.text(delivery.TypeLocation, place.GetComment())
		if place.GetIsLive() {
			t.item.Type = delivery.TypeLiveLocation
		}
		t.item.Location = &delivery.Location{
			Latitude: place.GetDegreesLatitude(), Longitude: place.GetDegreesLongitude(), Name: place.GetName(), Address: place.GetAddress(), URL: place.GetURL(),
			AccuracyMeters: place.GetAccuracyInMeters(), SpeedMetersPerSecond: float64(place.GetSpeedInMps()), HeadingDegrees: place.GetDegreesClockwiseFromMagneticNorth(),
		}
	case "liveLocationMessage":
		place := m.GetLiveLocationMessage()
		t.text(delivery.TypeLiveLocation, place.GetCaption())
		t.item.Location = &delivery.Location{
			Latitude: place.GetDegreesLatitude(), Longitude: place.GetDegreesLongitude(), AccuracyMeters: place.GetAccuracyInMeters(),
			SpeedMetersPerSecond: float64(place.GetSpeedInMps()), HeadingDegrees: place.GetDegreesClockwiseFromMagneticNorth(), Sequence: place.GetSequenceNumber(),
		}
	case "contactMessage":
		t.contacts([]*waE2E.ContactMessage{m.GetContactMessage()})
	case "contactsArrayMessage":
		t.contacts(m.GetContactsArrayMessage().GetContacts())
	case "pollCreationMessage":
		t.poll(m.GetPollCreationMessage())
	case "pollCreationMessageV2":
		t.poll(m.GetPollCreationMessageV2())
	case "pollCreationMessageV3":
		t.poll(m.GetPollCreationMessageV3())
	case "pollCreationMessageV5":
		t.poll(m.GetPollCreationMessageV5())
	case "pollCreationMessageV6":
		t.poll(m.GetPollCreationMessageV6())
	case "pollUpdateMessage":
		t.vote(m)
	case "reactionMessage":
		t.reaction(m.GetReactionMessage())
	case "encReactionMessage":
		t.encryptedReaction(m)
	case "commentMessage":
		t.comment(m.GetCommentMessage().GetMessage(), m.GetCommentMessage().GetTargetMessageKey(), depth)
	case "encCommentMessage":
		t.encryptedComment(m, depth)
	case "secretEncryptedMessage":
		t.secretEncrypted(m, depth)
	case "protocolMessage":
		t.protocol(m, depth)
	case "orderMessage":
		order := m.GetOrderMessage()
		t.text(delivery.TypeOrder, order.GetMessage())
		t.item.Order = &delivery.Order{
			ID: order.GetOrderID(), Title: order.GetOrderTitle(), ItemCount: order.GetItemCount(),
			TotalThousandths: order.GetTotalAmount1000(), Currency: order.GetTotalCurrencyCode(),
		}
	case "productMessage":
		product := m.GetProductMessage().GetProduct()
		t.text(delivery.TypeProduct, m.GetProductMessage().GetBody())
		t.item.Product = &delivery.Product{
			ID: product.GetProductID(), RetailerID: product.GetRetailerID(), Title: product.GetTitle(), Description: product.GetDescription(),
			PriceThousandths: product.GetPriceAmount1000(), Currency: product.GetCurrencyCode(),
		}
	case "buttonsResponseMessage":
		t.text(delivery.TypeText, m.GetButtonsResponseMessage().GetSelectedDisplayText())
		t.item.Selection = m.GetButtonsResponseMessage().GetSelectedButtonID()
	case "templateButtonReplyMessage":
		t.text(delivery.TypeText, m.GetTemplateButtonReplyMessage().GetSelectedDisplayText())
		t.item.Selection = m.GetTemplateButtonReplyMessage().GetSelectedID()
	case "listResponseMessage":
		t.text(delivery.TypeText, m.GetListResponseMessage().GetTitle())
		t.item.Selection = m.GetListResponseMessage().GetSingleSelectReply().GetSelectedRowID()
	case "placeholderMessage":
		t.item.Type = delivery.TypeUnavailable
	}
}

func (t *translation) text(kind delivery.MessageType, text string) {
	t.item.Type, t.item.Text = kind, text
}

// fileSize is the size of a file, as far as a database or another language can keep it as a number:
// the sender may say more.
func fileSize(size uint64) uint64 { return min(size, math.MaxInt64) }

func (t *translation) viewOnce(once bool) { t.item.ViewOnce = t.item.ViewOnce || once }

func (t *translation) video(video *waE2E.VideoMessage, recorded bool) {
	t.text(delivery.TypeVideo, video.GetCaption())
	t.item.Media = &delivery.Media{
		Mime: video.GetMimetype(), Size: fileSize(video.GetFileLength()), Seconds: video.GetSeconds(), Width: video.GetWidth(), Height: video.GetHeight(),
		Animated: video.GetGifPlayback(), VideoNote: recorded,
	}
	t.viewOnce(video.GetViewOnce())
}

func (t *translation) contacts(cards []*waE2E.ContactMessage) {
	t.text(delivery.TypeContacts, "")
	t.item.Contacts = make([]delivery.Contact, len(cards))
	for i, card := range cards {
		t.item.Contacts[i] = delivery.Contact{Name: card.GetDisplayName(), VCard: withoutPhoto(card.GetVcard())}
	}
}

// withoutPhoto removes the pictures of a vCard: a property with a long value continues in
// lines that begin with a space or a tab (RFC 2426, section 2.6).
func withoutPhoto(card string) string {
	var kept []string
	skip := false
	for line := range strings.SplitSeq(delivery.LineFeeds(card), "\n") {
		if !strings.HasPrefix(line, " ") && !strings.HasPrefix(line, "\t") {
			end := strings.IndexAny(line, ":;")
			name := strings.ToUpper(line[:max(0, end)])
			if dot := strings.LastIndex(name, "."); dot >= 0 { // the group of the property
				name = name[dot+1:]
			}
			skip = name == "PHOTO" || name == "LOGO"
		}
		if !skip {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "\n")
}

func (t *translation) poll(poll *waE2E.PollCreationMessage) {
	t.text(delivery.TypePoll, poll.GetName())
	t.item.Poll = &delivery.Poll{Options: []delivery.PollOption{}, MaxSelections: poll.GetSelectableOptionsCount()}
	for _, option := range poll.GetOptions() {
		sum := sha256.Sum256([]byte(option.GetOptionName()))
		t.item.Poll.Options = append(t.item.Poll.Options, delivery.PollOption{Name: option.GetOptionName(), Hash: hex.EncodeToString(sum[:])})
	}
}

// with is the event with another message in it, as the library's functions for secrets take it.
func (t *translation) with(m *waE2E.Message) *events.Message {
	e := *t.evt
	e.Message = m
	return &e
}

func (t *translation) vote(m *waE2E.Message) {
	t.target(m.GetPollUpdateMessage().GetPollCreationMessageKey())
	if t.quoted {
		t.item.Type = delivery.TypePollVote
		return
	}
	vote, err := t.secrets.DecryptPollVote(t.ctx, t.with(m))
	if err != nil {
		t.secretError(err)
		return
	}
	t.item.Type, t.item.PollVote = delivery.TypePollVote, &delivery.PollVote{Selected: []string{}}
	for _, hash := range vote.GetSelectedOptions() {
		if len(hash) == sha256.Size {
			t.item.PollVote.Selected = append(t.item.PollVote.Selected, hex.EncodeToString(hash))
		}
	}
}

func (t *translation) reaction(reaction *waE2E.ReactionMessage) {
	t.target(reaction.GetKey())
	t.item.Type, t.item.Reaction = delivery.TypeReaction, &delivery.Reaction{Emoji: reaction.GetText()}
}

// encryptedReaction is a reaction in the announcements of a community.
func (t *translation) encryptedReaction(m *waE2E.Message) {
	key := m.GetEncReactionMessage().GetTargetMessageKey()
	if t.quoted {
		t.item.Type = delivery.TypeReaction
		return
	}
	reaction, err := t.secrets.DecryptReaction(t.ctx, t.with(m))
	if err != nil {
		t.target(key)
		t.secretError(err)
		return
	}
	t.reaction(reaction)
	t.target(key)
}

// comment is an answer in the announcements of a community, to the message with a key. What it
// contains may be written by a stranger, and keeps its own target if it changes a message.
func (t *translation) comment(m *waE2E.Message, key *waCommon.MessageKey, depth int) {
	if depth >= maxWrapped {
		t.unsupportedMessage("commentMessage", m)
	} else {
		t.content(m, depth+1)
	}
	if t.item.Type != delivery.TypeEdit && t.item.Type != delivery.TypeRevoke {
		t.target(key)
	}
}

func (t *translation) encryptedComment(m *waE2E.Message, depth int) {
	key := m.GetEncCommentMessage().GetTargetMessageKey()
	if t.quoted {
		t.item.Type = delivery.TypeText
		return
	}
	comment, err := t.secrets.DecryptComment(t.ctx, t.with(m))
	if err != nil {
		t.target(key)
		t.secretError(err)
		return
	}
	t.comment(comment, key, depth)
}

// secretEncrypted is an edit as newer phones send it.
func (t *translation) secretEncrypted(m *waE2E.Message, depth int) {
	secret := m.GetSecretEncryptedMessage()
	if t.quoted || depth >= maxWrapped || secret.GetSecretEncType() != waE2E.SecretEncryptedMessage_MESSAGE_EDIT {
		t.target(secret.GetTargetMessageKey())
		t.unsupportedMessage("secretEncryptedMessage", m)
		return
	}
	decrypted, err := t.secrets.DecryptSecretEncryptedMessage(t.ctx, t.with(m))
	if err != nil {
		t.ownTarget(secret.GetTargetMessageKey())
		t.secretError(err)
		return
	}
	t.content(decrypted, depth+1)
	if t.item.Type == delivery.TypeEdit {
		t.ownTarget(secret.GetTargetMessageKey())
	}
}

func (t *translation) protocol(m *waE2E.Message, depth int) {
	protocol := m.GetProtocolMessage()
	how, known := protocolContents[protocol.GetType()]
	if !known {
		how = unsupportedContent
	}
	switch {
	case how == ignoredContent:
	case how == unsupportedContent || depth >= maxWrapped:
		t.unsupportedMessage("protocolMessage "+protocol.GetType().String(), m)
	case protocol.GetType() == waE2E.ProtocolMessage_REVOKE:
		t.item.Type = delivery.TypeRevoke
		if t.item.Class == delivery.ClassGroups { // an administrator deletes what others wrote
			t.target(protocol.GetKey())
		} else {
			t.ownTarget(protocol.GetKey())
		}
	default: // an edit
		if edited := protocol.GetEditedMessage(); edited != nil {
			t.content(edited, depth+1)
		}
		t.item.Type, t.item.PollVote, t.item.Reaction = delivery.TypeEdit, nil, nil
		t.ownTarget(protocol.GetKey())
	}
}

// context fills in what a message says about its relation to others.
func (t *translation) context(content protoreflect.Value) {
	r, ok := content.Interface().(protoreflect.Message)
	if !ok {
		return
	}
	field := r.Descriptor().Fields().ByName("contextInfo")
	if field == nil || !r.Has(field) {
		return
	}
	info, ok := r.Get(field).Message().Interface().(*waE2E.ContextInfo)
	if !ok {
		return
	}
	t.item.Forwarded = t.item.Forwarded || info.GetIsForwarded() || info.GetForwardingScore() > 0
	t.item.ForwardingScore = info.GetForwardingScore()
	t.item.EphemeralSeconds = info.GetExpiration()
	t.item.Ephemeral = t.item.Ephemeral || info.GetExpiration() > 0
	if t.quoted {
		return
	}
	t.item.MentionsEveryone = info.GetNonJIDMentions() > 0
	t.item.Mentions = t.people(parsed(info.GetMentionedJID()))
	t.item.Quoted = t.quotedBy(info)
	t.item.Referral = referral(info.GetExternalAdReply())
}

// parsed are the addresses of a list that can be read.
func parsed(list []string) []types.JID {
	var jids []types.JID
	for _, text := range list {
		if jid, err := types.ParseJID(text); err == nil && jid.User != "" {
			jids = append(jids, jid)
		}
	}
	return jids
}

// quotedBy is the message that a message answers.
func (t *translation) quotedBy(info *waE2E.ContextInfo) *delivery.Quoted {
	if info.GetStanzaID() == "" && info.GetQuotedMessage() == nil {
		return nil
	}
	quoted := &delivery.Quoted{ID: info.GetStanzaID()}
	if sender, err := types.ParseJID(info.GetParticipant()); err == nil && sender.User != "" {
		p := t.person(sender, types.JID{}, true)
		address := p.address()
		quoted.Sender = &address
		chat := t.chatKey
		if remote, err := types.ParseJID(info.GetRemoteJID()); err == nil && remote.User != "" { // an answer in another chat, for example to a status
			if chat = plain(remote).String(); remote.Server != types.GroupServer && remote.Server != types.BroadcastServer {
				chat = t.person(remote, types.JID{}, true).key()
			}
		}
		if quoted.ID != "" {
			quoted.Key = delivery.MessageKey(t.sessionID, chat, p.key(), quoted.ID)
		}
	}
	if message := info.GetQuotedMessage(); message != nil {
		inner := &translation{messageTranslator: t.messageTranslator, ctx: t.ctx, quoted: true}
		inner.content(message, 0)
		quoted.Type, quoted.Text = inner.item.Type, inner.item.Text
	}
	return quoted
}

func referral(advert *waE2E.ContextInfo_ExternalAdReplyInfo) *delivery.Referral {
	r := delivery.Referral{
		SourceType: advert.GetSourceType(), SourceID: advert.GetSourceID(), SourceURL: advert.GetSourceURL(),
		Title: advert.GetTitle(), Body: advert.GetBody(), ClickID: advert.GetCtwaClid(), Ref: advert.GetRef(),
	}
	if r == (delivery.Referral{}) {
		return nil
	}
	return &r
}

// textOf is the text of a content that has no type.
func textOf(m *waE2E.Message) string {
	for _, text := range []string{
		m.GetButtonsMessage().GetContentText(),
		m.GetListMessage().GetDescription(),
		m.GetListMessage().GetTitle(),
		m.GetTemplateMessage().GetHydratedTemplate().GetHydratedContentText(),
		m.GetTemplateMessage().GetHydratedFourRowTemplate().GetHydratedContentText(),
		m.GetTemplateMessage().GetInteractiveMessageTemplate().GetBody().GetText(),
		m.GetInteractiveMessage().GetBody().GetText(),
		m.GetInteractiveResponseMessage().GetBody().GetText(),
		m.GetGroupInviteMessage().GetCaption(),
		m.GetEventMessage().GetName(),
		m.GetEventInviteMessage().GetCaption(),
		m.GetSendPaymentMessage().GetNoteMessage().GetConversation(),
		m.GetSendPaymentMessage().GetNoteMessage().GetExtendedTextMessage().GetText(),
		m.GetRequestPaymentMessage().GetNoteMessage().GetConversation(),
		m.GetRequestPaymentMessage().GetNoteMessage().GetExtendedTextMessage().GetText(),
		m.GetInvoiceMessage().GetNote(),
		m.GetPaymentReminderMessage().GetDescription(),
		m.GetSplitPaymentMessage().GetDescription(),
		m.GetNewsletterAdminInviteMessage().GetCaption(),
		m.GetNewsletterFollowerInviteMessageV2().GetCaption(),
		m.GetQuestionResponseMessage().GetText(),
		m.GetStatusQuestionAnswerMessage().GetText(),
		m.GetStatusQuotedMessage().GetText(),
		m.GetScheduledCallCreationMessage().GetTitle(),
		m.GetStickerPackMessage().GetCaption(),
		m.GetBcallMessage().GetCaption(),
	} {
		if text != "" {
			return text
		}
	}
	return ""
}

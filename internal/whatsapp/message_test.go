package whatsapp

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/proto/waCommon"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waWeb"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// The accounts of these tests: the session's own, a contact and another member of the group.
var (
	ownPN, ownLID       = types.NewJID("34600000001", types.DefaultUserServer), types.NewJID("1001", types.HiddenUserServer)
	contactPN           = types.NewJID("34600000002", types.DefaultUserServer)
	contactLID          = types.NewJID("1002", types.HiddenUserServer)
	memberPN, memberLID = types.NewJID("34600000003", types.DefaultUserServer), types.NewJID("1003", types.HiddenUserServer)
	theGroup            = types.NewJID("1234", types.GroupServer)
	sentAt              = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

	contactAddress = delivery.Address{LID: "1002@lid", Phone: "+34600000002"}
	memberAddress  = delivery.Address{LID: "1003@lid", Phone: "+34600000003"}
)

// fakeLIDs is a LID map.
type fakeLIDs struct {
	known   map[types.JID]types.JID
	err     error
	lookups int
}

func (f *fakeLIDs) GetPNForLID(_ context.Context, lid types.JID) (types.JID, error) {
	f.lookups++
	return f.known[lid], f.err
}

func (f *fakeLIDs) GetLIDForPN(_ context.Context, pn types.JID) (types.JID, error) {
	f.lookups++
	return f.known[pn], f.err
}

// fakeSecrets is what the messages of a test say when they are decrypted.
type fakeSecrets struct {
	vote     *waE2E.PollVoteMessage
	reaction *waE2E.ReactionMessage
	message  *waE2E.Message
	err      error
}

func (f fakeSecrets) DecryptPollVote(context.Context, *events.Message) (*waE2E.PollVoteMessage, error) {
	return f.vote, f.err
}

func (f fakeSecrets) DecryptReaction(context.Context, *events.Message) (*waE2E.ReactionMessage, error) {
	return f.reaction, f.err
}

func (f fakeSecrets) DecryptComment(context.Context, *events.Message) (*waE2E.Message, error) {
	return f.message, f.err
}

func (f fakeSecrets) DecryptSecretEncryptedMessage(context.Context, *events.Message) (*waE2E.Message, error) {
	return f.message, f.err
}

func newTestTranslator(secrets messageSecrets) (*messageTranslator, *fakeLIDs) {
	lids := &fakeLIDs{known: map[types.JID]types.JID{
		contactPN: contactLID, contactLID: contactPN, memberPN: memberLID, memberLID: memberPN,
	}}
	return &messageTranslator{
		sessionID: "shop", lids: lids, secrets: secrets,
		own: func() (types.JID, types.JID) { return ownPN, ownLID },
		now: func() time.Time { return sentAt.Add(time.Hour) },
	}, lids
}

// from is the envelope of a message from the contact.
func from(id string) types.MessageInfo {
	return types.MessageInfo{
		MessageSource: types.MessageSource{Chat: contactLID, Sender: contactLID, SenderAlt: contactPN},
		ID:            id, Timestamp: sentAt, PushName: "Anna",
	}
}

// inTheGroup is the envelope of a message of the member in the group.
func inTheGroup(id string) types.MessageInfo {
	return types.MessageInfo{
		MessageSource: types.MessageSource{Chat: theGroup, Sender: memberLID, SenderAlt: memberPN, IsGroup: true},
		ID:            id, Timestamp: sentAt,
	}
}

func keyOf(chat, sender types.JID, id string) string {
	return delivery.MessageKey("shop", chat.String(), sender.String(), id)
}

func str(s string) *string { return &s }

func wrapped(m *waE2E.Message) *waE2E.FutureProofMessage {
	return &waE2E.FutureProofMessage{Message: m}
}

func text(s string) *waE2E.Message { return &waE2E.Message{Conversation: &s} }

// withContext is a text with what it says about its relation to others.
func withContext(info *waE2E.ContextInfo) *waE2E.Message {
	return &waE2E.Message{ExtendedTextMessage: &waE2E.ExtendedTextMessage{Text: str("hello"), ContextInfo: info}}
}

func hashOf(option string) string {
	sum := sha256.Sum256([]byte(option))
	return hex.EncodeToString(sum[:])
}

func encoded(m *waE2E.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

// targetOf is the key by which the contact names a message: his own one, or the account's.
func targetOf(id string, own bool) *waCommon.MessageKey {
	return &waCommon.MessageKey{ID: &id, FromMe: &own, RemoteJID: str(ownLID.String())}
}

// TestTranslateContents has a row for each kind of content. The wanted item is without the
// fields of the envelope, which are the same in all rows.
func TestTranslateContents(t *testing.T) {
	yes := proto.Bool(true)
	card := "BEGIN:VCARD\nVERSION:3.0\nFN:Bob\nPHOTO;ENCODING=b:AAAA\n BBBB\nitem1.TEL:+1\nEND:VCARD"
	clean := "BEGIN:VCARD\nVERSION:3.0\nFN:Bob\nitem1.TEL:+1\nEND:VCARD"
	pollOf := func(name string) *waE2E.PollCreationMessage {
		return &waE2E.PollCreationMessage{
			Name: &name, SelectableOptionsCount: proto.Uint32(1),
			Options: []*waE2E.PollCreationMessage_Option{{OptionName: str("yes")}, {OptionName: str("no")}},
		}
	}
	pollItem := func(name string) delivery.MessageItem {
		return delivery.MessageItem{Type: delivery.TypePoll, Text: name, Poll: &delivery.Poll{
			MaxSelections: 1, Options: []delivery.PollOption{{Name: "yes", Hash: hashOf("yes")}, {Name: "no", Hash: hashOf("no")}},
		}}
	}
	yesHash := sha256.Sum256([]byte("yes"))
	ofContact, ofOwn := keyOf(contactLID, contactLID, "T1"), keyOf(contactLID, ownLID, "T1")
	pin := &waE2E.Message{PinInChatMessage: &waE2E.PinInChatMessage{Key: targetOf("T1", true)}}
	edit := &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
		Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum(), Key: targetOf("T1", true), EditedMessage: text("better"),
	}}
	editItem := delivery.MessageItem{Type: delivery.TypeEdit, Text: "better", TargetID: "T1", TargetKey: ofContact}
	list := &waE2E.Message{ListMessage: &waE2E.ListMessage{Description: str("choose")}}
	future := &waE2E.Message{}
	future.ProtoReflect().SetUnknown(protoreflect.RawFields{0xba, 0x3e, 0x01, 'x'}) // field 999

	tests := []struct {
		name    string
		message *waE2E.Message
		want    delivery.MessageItem // without a type: nothing is forwarded
		secrets fakeSecrets
	}{
		{name: "text", message: text("hello"), want: delivery.MessageItem{Type: delivery.TypeText, Text: "hello"}},
		{name: "text with a link", message: withContext(nil), want: delivery.MessageItem{Type: delivery.TypeText, Text: "hello"}},
		{
			name: "an answer with a mention",
			message: withContext(&waE2E.ContextInfo{
				StanzaID: str("Q1"), Participant: str(ownPN.String()), QuotedMessage: text("the question"), MentionedJID: []string{memberLID.String(), "nonsense"},
			}),
			want: delivery.MessageItem{
				Type: delivery.TypeText, Text: "hello", Mentions: []delivery.Address{memberAddress},
				Quoted: &delivery.Quoted{
					ID: "Q1", Key: keyOf(contactLID, ownLID, "Q1"), Type: delivery.TypeText, Text: "the question",
					Sender: &delivery.Address{LID: "1001@lid", Phone: "+34600000001"},
				},
			},
		},
		{
			name: "an answer to a status",
			message: withContext(&waE2E.ContextInfo{
				StanzaID: str("S1"), Participant: str(ownLID.String()), RemoteJID: str("status@broadcast"),
				QuotedMessage: &waE2E.Message{ImageMessage: &waE2E.ImageMessage{Caption: str("new!")}},
			}),
			want: delivery.MessageItem{
				Type: delivery.TypeText, Text: "hello",
				Quoted: &delivery.Quoted{
					ID: "S1", Key: keyOf(types.StatusBroadcastJID, ownLID, "S1"), Type: delivery.TypeImage, Text: "new!",
					Sender: &delivery.Address{LID: "1001@lid", Phone: "+34600000001"},
				},
			},
		},
		{
			name:    "a mention of everybody",
			message: withContext(&waE2E.ContextInfo{NonJIDMentions: proto.Uint32(1)}),
			want:    delivery.MessageItem{Type: delivery.TypeText, Text: "hello", MentionsEveryone: true},
		},
		{
			name: "after a click on an advert",
			message: withContext(&waE2E.ContextInfo{ExternalAdReply: &waE2E.ContextInfo_ExternalAdReplyInfo{
				SourceURL: str("https://fb.me/x"), SourceType: str("ad"), SourceID: str("7"), Title: str("Sale"), Body: str("Half price"), CtwaClid: str("c"), Ref: str("r"),
				Thumbnail: []byte("a picture"), ThumbnailURL: str("https://x"),
			}}),
			want: delivery.MessageItem{Type: delivery.TypeText, Text: "hello", Referral: &delivery.Referral{
				SourceURL: "https://fb.me/x", SourceType: "ad", SourceID: "7", Title: "Sale", Body: "Half price", ClickID: "c", Ref: "r",
			}},
		},
		{
			name:    "forwarded",
			message: withContext(&waE2E.ContextInfo{IsForwarded: yes, ForwardingScore: proto.Uint32(5)}),
			want:    delivery.MessageItem{Type: delivery.TypeText, Text: "hello", Forwarded: true, ForwardingScore: 5},
		},
		{
			name:    "ephemeral",
			message: &waE2E.Message{EphemeralMessage: wrapped(withContext(&waE2E.ContextInfo{Expiration: proto.Uint32(86400)}))},
			want:    delivery.MessageItem{Type: delivery.TypeText, Text: "hello", Ephemeral: true, EphemeralSeconds: 86400},
		},
		{
			name: "image",
			message: &waE2E.Message{ImageMessage: &waE2E.ImageMessage{
				Caption: str("look"), Mimetype: str("image/jpeg"), FileLength: proto.Uint64(9), Width: proto.Uint32(3), Height: proto.Uint32(4),
				URL: str("https://evil"), DirectPath: str("/v/x"), MediaKey: []byte("key"), JPEGThumbnail: []byte("thumbnail"),
			}},
			want: delivery.MessageItem{Type: delivery.TypeImage, Text: "look", Media: &delivery.Media{Mime: "image/jpeg", Size: 9, Width: 3, Height: 4}},
		},
		{
			name:    "image of an impossible size",
			message: &waE2E.Message{ImageMessage: &waE2E.ImageMessage{FileLength: proto.Uint64(math.MaxUint64)}},
			want:    delivery.MessageItem{Type: delivery.TypeImage, Media: &delivery.Media{Size: math.MaxInt64}},
		},
		{
			name:    "video of an impossible size",
			message: &waE2E.Message{VideoMessage: &waE2E.VideoMessage{FileLength: proto.Uint64(math.MaxUint64)}},
			want:    delivery.MessageItem{Type: delivery.TypeVideo, Media: &delivery.Media{Size: math.MaxInt64}},
		},
		{
			name:    "image to open once",
			message: &waE2E.Message{ViewOnceMessageV2: wrapped(&waE2E.Message{ImageMessage: &waE2E.ImageMessage{Mimetype: str("image/jpeg"), ViewOnce: yes}})},
			want:    delivery.MessageItem{Type: delivery.TypeImage, ViewOnce: true, Media: &delivery.Media{Mime: "image/jpeg"}},
		},
		{
			name:    "image of an album",
			message: &waE2E.Message{AssociatedChildMessage: wrapped(&waE2E.Message{ImageMessage: &waE2E.ImageMessage{Mimetype: str("image/png")}})},
			want:    delivery.MessageItem{Type: delivery.TypeImage, Media: &delivery.Media{Mime: "image/png"}},
		},
		{
			name:    "video",
			message: &waE2E.Message{VideoMessage: &waE2E.VideoMessage{Caption: str("c"), Mimetype: str("video/mp4"), Seconds: proto.Uint32(8), GifPlayback: yes}},
			want:    delivery.MessageItem{Type: delivery.TypeVideo, Text: "c", Media: &delivery.Media{Mime: "video/mp4", Seconds: 8, Animated: true}},
		},
		{
			name:    "video note",
			message: &waE2E.Message{PtvMessage: &waE2E.VideoMessage{Mimetype: str("video/mp4"), Seconds: proto.Uint32(8)}},
			want:    delivery.MessageItem{Type: delivery.TypeVideo, Media: &delivery.Media{Mime: "video/mp4", Seconds: 8, VideoNote: true}},
		},
		{
			name:    "voice",
			message: &waE2E.Message{AudioMessage: &waE2E.AudioMessage{Mimetype: str("audio/ogg; codecs=opus"), FileLength: proto.Uint64(5), Seconds: proto.Uint32(2), PTT: yes}},
			want:    delivery.MessageItem{Type: delivery.TypeVoice, Media: &delivery.Media{Mime: "audio/ogg; codecs=opus", Size: 5, Seconds: 2}},
		},
		{
			name:    "audio",
			message: &waE2E.Message{AudioMessage: &waE2E.AudioMessage{Mimetype: str("audio/mpeg"), Seconds: proto.Uint32(200)}},
			want:    delivery.MessageItem{Type: delivery.TypeAudio, Media: &delivery.Media{Mime: "audio/mpeg", Seconds: 200}},
		},
		{
			name: "document with a caption",
			message: &waE2E.Message{DocumentWithCaptionMessage: wrapped(&waE2E.Message{DocumentMessage: &waE2E.DocumentMessage{
				Caption: str("the bill"), Mimetype: str("application/pdf"), FileName: str("bill.pdf"), PageCount: proto.Uint32(2), FileLength: proto.Uint64(7),
			}})},
			want: delivery.MessageItem{Type: delivery.TypeDocument, Text: "the bill", Media: &delivery.Media{Mime: "application/pdf", Name: "bill.pdf", Pages: 2, Size: 7}},
		},
		{
			name:    "document with a title only",
			message: &waE2E.Message{DocumentMessage: &waE2E.DocumentMessage{Title: str("bill")}},
			want:    delivery.MessageItem{Type: delivery.TypeDocument, Media: &delivery.Media{Name: "bill"}},
		},
		{
			name:    "sticker",
			message: &waE2E.Message{StickerMessage: &waE2E.StickerMessage{Mimetype: str("image/webp"), IsAnimated: yes}},
			want:    delivery.MessageItem{Type: delivery.TypeSticker, Media: &delivery.Media{Mime: "image/webp", Animated: true}},
		},
		{
			name:    "sticker in the format of Lottie",
			message: &waE2E.Message{LottieStickerMessage: wrapped(&waE2E.Message{StickerMessage: &waE2E.StickerMessage{Mimetype: str("application/was")}})},
			want:    delivery.MessageItem{Type: delivery.TypeSticker, Media: &delivery.Media{Mime: "application/was", Animated: true}},
		},
		{
			name: "location",
			message: &waE2E.Message{LocationMessage: &waE2E.LocationMessage{
				DegreesLatitude: proto.Float64(41.4), DegreesLongitude: proto.Float64(2.2), Name: str("Shop"), Address: str("Street 1"), URL: str("https://shop"), JPEGThumbnail: []byte("map"),
			}},
			want: delivery.MessageItem{Type: delivery.TypeLocation, Location: &delivery.Location{
				Latitude: 41.4, Longitude: 2.2, Name: "Shop", Address: "Street 1", URL: "https://shop",
			}},
		},
		{
			name: "live location",
			message: &waE2E.Message{LiveLocationMessage: &waE2E.LiveLocationMessage{
				DegreesLatitude: proto.Float64(1), DegreesLongitude: proto.Float64(2), Caption: str("on my way"), SequenceNumber: proto.Int64(3),
				AccuracyInMeters: proto.Uint32(10), SpeedInMps: proto.Float32(1.5), DegreesClockwiseFromMagneticNorth: proto.Uint32(90),
			}},
			want: delivery.MessageItem{Type: delivery.TypeLiveLocation, Text: "on my way", Location: &delivery.Location{
				Latitude: 1, Longitude: 2, Sequence: 3, AccuracyMeters: 10, SpeedMetersPerSecond: 1.5, HeadingDegrees: 90,
			}},
		},
		{
			name:    "contact",
			message: &waE2E.Message{ContactMessage: &waE2E.ContactMessage{DisplayName: str("Bob"), Vcard: &card}},
			want:    delivery.MessageItem{Type: delivery.TypeContacts, Contacts: []delivery.Contact{{Name: "Bob", VCard: clean}}},
		},
		{
			name: "contact with the line breaks of other systems",
			message: &waE2E.Message{ContactsArrayMessage: &waE2E.ContactsArrayMessage{Contacts: []*waE2E.ContactMessage{
				{Vcard: str(strings.ReplaceAll(card, "\n", "\r\n"))}, {Vcard: str(strings.ReplaceAll(card, "\n", "\r"))},
			}}},
			want: delivery.MessageItem{Type: delivery.TypeContacts, Contacts: []delivery.Contact{{VCard: clean}, {VCard: clean}}},
		},
		{
			name: "contacts",
			message: &waE2E.Message{ContactsArrayMessage: &waE2E.ContactsArrayMessage{DisplayName: str("2"), Contacts: []*waE2E.ContactMessage{
				{DisplayName: str("Bob"), Vcard: &card}, {DisplayName: str("Eve")},
			}}},
			want: delivery.MessageItem{Type: delivery.TypeContacts, Contacts: []delivery.Contact{{Name: "Bob", VCard: clean}, {Name: "Eve"}}},
		},
		{name: "poll", message: &waE2E.Message{PollCreationMessage: pollOf("1?")}, want: pollItem("1?")},
		{name: "poll, version 2", message: &waE2E.Message{PollCreationMessageV2: pollOf("2?")}, want: pollItem("2?")},
		{name: "poll, version 3", message: &waE2E.Message{PollCreationMessageV3: pollOf("3?")}, want: pollItem("3?")},
		{name: "poll, version 4", message: &waE2E.Message{PollCreationMessageV4: wrapped(&waE2E.Message{PollCreationMessage: pollOf("4?")})}, want: pollItem("4?")},
		{name: "poll, version 5", message: &waE2E.Message{PollCreationMessageV5: pollOf("5?")}, want: pollItem("5?")},
		{name: "poll, version 6", message: &waE2E.Message{PollCreationMessageV6: pollOf("6?")}, want: pollItem("6?")},
		{
			name:    "vote",
			message: &waE2E.Message{PollUpdateMessage: &waE2E.PollUpdateMessage{PollCreationMessageKey: targetOf("T1", false)}},
			secrets: fakeSecrets{vote: &waE2E.PollVoteMessage{SelectedOptions: [][]byte{yesHash[:], []byte("too short")}}},
			want:    delivery.MessageItem{Type: delivery.TypePollVote, TargetID: "T1", TargetKey: ofOwn, PollVote: &delivery.PollVote{Selected: []string{hashOf("yes")}}},
		},
		{
			name:    "vote that is taken back",
			message: &waE2E.Message{PollUpdateMessage: &waE2E.PollUpdateMessage{PollCreationMessageKey: targetOf("T1", false)}},
			secrets: fakeSecrets{vote: &waE2E.PollVoteMessage{}},
			want:    delivery.MessageItem{Type: delivery.TypePollVote, TargetID: "T1", TargetKey: ofOwn, PollVote: &delivery.PollVote{Selected: []string{}}},
		},
		{
			name:    "vote on a poll whose secret is unknown",
			message: &waE2E.Message{PollUpdateMessage: &waE2E.PollUpdateMessage{PollCreationMessageKey: targetOf("T1", false)}},
			secrets: fakeSecrets{err: errors.New("not found")},
			want:    delivery.MessageItem{Type: delivery.TypeUndecryptable, TargetID: "T1", TargetKey: ofOwn},
		},
		{
			name:    "reaction to the account's message",
			message: &waE2E.Message{ReactionMessage: &waE2E.ReactionMessage{Key: targetOf("T1", false), Text: str("👍")}},
			want:    delivery.MessageItem{Type: delivery.TypeReaction, TargetID: "T1", TargetKey: ofOwn, Reaction: &delivery.Reaction{Emoji: "👍"}},
		},
		{
			name:    "reaction that is removed",
			message: &waE2E.Message{ReactionMessage: &waE2E.ReactionMessage{Key: targetOf("T1", true), Text: str("")}},
			want:    delivery.MessageItem{Type: delivery.TypeReaction, TargetID: "T1", TargetKey: ofContact, Reaction: &delivery.Reaction{}},
		},
		{
			name:    "encrypted reaction",
			message: &waE2E.Message{EncReactionMessage: &waE2E.EncReactionMessage{TargetMessageKey: targetOf("T1", false)}},
			secrets: fakeSecrets{reaction: &waE2E.ReactionMessage{Text: str("👍")}},
			want:    delivery.MessageItem{Type: delivery.TypeReaction, TargetID: "T1", TargetKey: ofOwn, Reaction: &delivery.Reaction{Emoji: "👍"}},
		},
		{
			name:    "comment",
			message: &waE2E.Message{CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T1", false), Message: text("nice")}},
			want:    delivery.MessageItem{Type: delivery.TypeText, Text: "nice", TargetID: "T1", TargetKey: ofOwn},
		},
		{
			name:    "encrypted comment",
			message: &waE2E.Message{EncCommentMessage: &waE2E.EncCommentMessage{TargetMessageKey: targetOf("T1", false)}},
			secrets: fakeSecrets{message: text("nice")},
			want:    delivery.MessageItem{Type: delivery.TypeText, Text: "nice", TargetID: "T1", TargetKey: ofOwn},
		},
		{name: "edit", message: &waE2E.Message{EditedMessage: wrapped(edit)}, want: editItem},
		{name: "edit without a wrapper", message: edit, want: editItem},
		{
			name: "edit of a caption",
			message: &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
				Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum(), Key: targetOf("T1", true),
				EditedMessage: &waE2E.Message{ImageMessage: &waE2E.ImageMessage{Caption: str("better"), Mimetype: str("image/png")}},
			}},
			want: delivery.MessageItem{Type: delivery.TypeEdit, Text: "better", TargetID: "T1", TargetKey: ofContact, Media: &delivery.Media{Mime: "image/png"}},
		},
		{
			name: "edit of somebody else's message changes only the sender's own",
			message: &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
				Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum(), Key: targetOf("T1", false), EditedMessage: text("better"),
			}},
			want: editItem,
		},
		{
			name: "encrypted edit",
			message: &waE2E.Message{SecretEncryptedMessage: &waE2E.SecretEncryptedMessage{
				TargetMessageKey: targetOf("T1", true), SecretEncType: waE2E.SecretEncryptedMessage_MESSAGE_EDIT.Enum(),
			}},
			secrets: fakeSecrets{message: edit}, want: editItem,
		},
		{
			name: "encrypted edit of a message whose secret is unknown",
			message: &waE2E.Message{SecretEncryptedMessage: &waE2E.SecretEncryptedMessage{
				TargetMessageKey: targetOf("T1", true), SecretEncType: waE2E.SecretEncryptedMessage_MESSAGE_EDIT.Enum(),
			}},
			secrets: fakeSecrets{err: errors.New("not found")},
			want:    delivery.MessageItem{Type: delivery.TypeUndecryptable, TargetID: "T1", TargetKey: ofContact},
		},
		{
			name:    "revoke",
			message: &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_REVOKE.Enum(), Key: targetOf("T1", true)}},
			want:    delivery.MessageItem{Type: delivery.TypeRevoke, TargetID: "T1", TargetKey: ofContact},
		},
		{
			name:    "revoke of the account's message by the contact",
			message: &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_REVOKE.Enum(), Key: targetOf("T1", false)}},
			want:    delivery.MessageItem{Type: delivery.TypeRevoke, TargetID: "T1", TargetKey: ofContact},
		},
		{
			name:    "comment with a revoke of another message",
			message: &waE2E.Message{CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T1", false), Message: revokeOf(targetOf("T2", true))}},
			want:    delivery.MessageItem{Type: delivery.TypeRevoke, TargetID: "T2", TargetKey: keyOf(contactLID, contactLID, "T2")},
		},
		{
			name:    "comment with a revoke of nothing",
			message: &waE2E.Message{CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T1", false), Message: revokeOf(nil)}},
			want:    delivery.MessageItem{Type: delivery.TypeRevoke},
		},
		{
			name:    "comment with an edit of another message",
			message: &waE2E.Message{CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T1", false), Message: editOf(targetOf("T2", true), text("better"))}},
			want:    delivery.MessageItem{Type: delivery.TypeEdit, Text: "better", TargetID: "T2", TargetKey: keyOf(contactLID, contactLID, "T2")},
		},
		{
			name:    "encrypted comment with an edit of nothing",
			message: &waE2E.Message{EncCommentMessage: &waE2E.EncCommentMessage{TargetMessageKey: targetOf("T1", false)}},
			secrets: fakeSecrets{message: editOf(nil, text("better"))},
			want:    delivery.MessageItem{Type: delivery.TypeEdit, Text: "better"},
		},
		{
			name:    "encrypted comment with an edit that has no key and contains a comment",
			message: &waE2E.Message{EncCommentMessage: &waE2E.EncCommentMessage{TargetMessageKey: targetOf("T1", false)}},
			secrets: fakeSecrets{message: editOf(nil, &waE2E.Message{CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T1", false), Message: text("better")}})},
			want:    delivery.MessageItem{Type: delivery.TypeEdit, Text: "better"},
		},
		{
			name:    "edit without a key that contains a reaction",
			message: editOf(nil, &waE2E.Message{ReactionMessage: &waE2E.ReactionMessage{Key: targetOf("T1", false)}}),
			want:    delivery.MessageItem{Type: delivery.TypeEdit},
		},
		{
			name: "encrypted edit with a comment that edits the account's message",
			message: &waE2E.Message{SecretEncryptedMessage: &waE2E.SecretEncryptedMessage{
				TargetMessageKey: targetOf("T1", false), SecretEncType: waE2E.SecretEncryptedMessage_MESSAGE_EDIT.Enum(),
			}},
			secrets: fakeSecrets{message: &waE2E.Message{CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T2", false), Message: editOf(nil, text("better"))}}},
			want:    editItem,
		},
		{
			name: "encrypted edit of nothing with a comment",
			message: &waE2E.Message{SecretEncryptedMessage: &waE2E.SecretEncryptedMessage{
				SecretEncType: waE2E.SecretEncryptedMessage_MESSAGE_EDIT.Enum(),
			}},
			secrets: fakeSecrets{message: &waE2E.Message{CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T1", false), Message: editOf(nil, text("better"))}}},
			want:    delivery.MessageItem{Type: delivery.TypeEdit, Text: "better"},
		},
		{
			name: "order",
			message: &waE2E.Message{OrderMessage: &waE2E.OrderMessage{
				OrderID: str("o"), OrderTitle: str("Shop"), Message: str("please"), ItemCount: proto.Int32(2), TotalAmount1000: proto.Int64(12500), TotalCurrencyCode: str("EUR"), Token: str("secret"),
			}},
			want: delivery.MessageItem{Type: delivery.TypeOrder, Text: "please", Order: &delivery.Order{ID: "o", Title: "Shop", ItemCount: 2, TotalThousandths: 12500, Currency: "EUR"}},
		},
		{
			name: "product",
			message: &waE2E.Message{ProductMessage: &waE2E.ProductMessage{Body: str("still there?"), Product: &waE2E.ProductMessage_ProductSnapshot{
				ProductID: str("p"), RetailerID: str("r"), Title: str("Chair"), Description: str("red"), PriceAmount1000: proto.Int64(99000), CurrencyCode: str("EUR"),
			}}},
			want: delivery.MessageItem{Type: delivery.TypeProduct, Text: "still there?", Product: &delivery.Product{
				ID: "p", RetailerID: "r", Title: "Chair", Description: "red", PriceThousandths: 99000, Currency: "EUR",
			}},
		},
		{
			name: "choice of a button",
			message: &waE2E.Message{ButtonsResponseMessage: &waE2E.ButtonsResponseMessage{
				SelectedButtonID: str("b1"), Response: &waE2E.ButtonsResponseMessage_SelectedDisplayText{SelectedDisplayText: "Yes"},
			}},
			want: delivery.MessageItem{Type: delivery.TypeText, Text: "Yes", Selection: "b1"},
		},
		{
			name:    "choice of a template's button",
			message: &waE2E.Message{TemplateButtonReplyMessage: &waE2E.TemplateButtonReplyMessage{SelectedID: str("b1"), SelectedDisplayText: str("Yes")}},
			want:    delivery.MessageItem{Type: delivery.TypeText, Text: "Yes", Selection: "b1"},
		},
		{
			name: "choice in a list",
			message: &waE2E.Message{ListResponseMessage: &waE2E.ListResponseMessage{
				Title: str("Monday"), SingleSelectReply: &waE2E.ListResponseMessage_SingleSelectReply{SelectedRowID: str("r1")},
			}},
			want: delivery.MessageItem{Type: delivery.TypeText, Text: "Monday", Selection: "r1"},
		},
		{
			name:    "what only the phone gets",
			message: &waE2E.Message{PlaceholderMessage: &waE2E.PlaceholderMessage{}},
			want:    delivery.MessageItem{Type: delivery.TypeUnavailable},
		},
		{
			name:    "a message that another device of the account has sent",
			message: &waE2E.Message{DeviceSentMessage: &waE2E.DeviceSentMessage{DestinationJID: str(contactLID.String()), Message: text("hello")}},
			want:    delivery.MessageItem{Type: delivery.TypeText, Text: "hello"},
		},
		{
			name: "an unsupported kind, without its keys",
			message: &waE2E.Message{
				PinInChatMessage: pin.PinInChatMessage, MessageContextInfo: &waE2E.MessageContextInfo{MessageSecret: []byte("secret")},
				SenderKeyDistributionMessage: &waE2E.SenderKeyDistributionMessage{GroupID: str("g")},
			},
			want: delivery.MessageItem{Type: delivery.TypeUnsupported, Unsupported: &delivery.Unsupported{Kind: "pinInChatMessage", Protobuf: encoded(pin)}},
		},
		{
			name: "an unsupported kind with files, without their keys", message: templateOf(
				&waE2E.ImageMessage{
					Caption: str("look"), Mimetype: str("image/jpeg"), URL: str("https://mmg"), StaticURL: str("https://static"), DirectPath: str("/v/x"),
					ThumbnailDirectPath: str("/v/t"), MediaKey: []byte("key"), FileSHA256: []byte("hash"),
				},
				&waE2E.Message{
					StickerMessage: &waE2E.StickerMessage{MediaKey: []byte("key"), DirectPath: str("/v/y"), IsAnimated: yes}, Call: &waE2E.Call{CallKey: []byte("key")},
					MessageContextInfo: &waE2E.MessageContextInfo{MessageSecret: []byte("secret")},
				},
			),
			want: delivery.MessageItem{Type: delivery.TypeUnsupported, Text: "choose", Quoted: &delivery.Quoted{Type: delivery.TypeSticker}, Unsupported: &delivery.Unsupported{Kind: "templateMessage", Protobuf: encoded(templateOf(
				&waE2E.ImageMessage{Caption: str("look"), Mimetype: str("image/jpeg"), FileSHA256: []byte("hash")},
				&waE2E.Message{StickerMessage: &waE2E.StickerMessage{IsAnimated: yes}},
			))}},
		},
		{
			name: "an unsupported kind with a text", message: list,
			want: delivery.MessageItem{Type: delivery.TypeUnsupported, Text: "choose", Unsupported: &delivery.Unsupported{Kind: "listMessage", Protobuf: encoded(list)}},
		},
		{
			name: "a kind of a newer version", message: future,
			want: delivery.MessageItem{Type: delivery.TypeUnsupported, Unsupported: &delivery.Unsupported{Kind: "unknown", Protobuf: encoded(future)}},
		},
		{
			name:    "a protocol message of a newer version",
			message: &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_Type(999).Enum()}},
			want: delivery.MessageItem{Type: delivery.TypeUnsupported, Unsupported: &delivery.Unsupported{
				Kind: "protocolMessage 999", Protobuf: encoded(&waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_Type(999).Enum()}}),
			}},
		},
		{
			name:    "an empty wrapper",
			message: &waE2E.Message{EphemeralMessage: &waE2E.FutureProofMessage{}},
			want: delivery.MessageItem{Type: delivery.TypeUnsupported, Ephemeral: true, Unsupported: &delivery.Unsupported{
				Kind: "ephemeralMessage", Protobuf: encoded(&waE2E.Message{EphemeralMessage: &waE2E.FutureProofMessage{}}),
			}},
		},

		{name: "the key of a group alone", message: &waE2E.Message{SenderKeyDistributionMessage: &waE2E.SenderKeyDistributionMessage{GroupID: str("g")}}},
		{name: "a list of devices alone", message: &waE2E.Message{MessageContextInfo: &waE2E.MessageContextInfo{DeviceListMetadata: &waE2E.DeviceListMetadata{ReceiverAccountType: waAdv.ADVEncryptionType_E2EE.Enum()}}}},
		{name: "nothing", message: &waE2E.Message{}},
		{name: "history", message: protocolOf(waE2E.ProtocolMessage_HISTORY_SYNC_NOTIFICATION)},
		{name: "keys of settings", message: protocolOf(waE2E.ProtocolMessage_APP_STATE_SYNC_KEY_SHARE)},
		{name: "an answer of the own phone", message: protocolOf(waE2E.ProtocolMessage_PEER_DATA_OPERATION_REQUEST_RESPONSE_MESSAGE)},
		{name: "LIDs of contacts", message: protocolOf(waE2E.ProtocolMessage_LID_MIGRATION_MAPPING_SYNC)},
		{name: "the time after which messages disappear", message: protocolOf(waE2E.ProtocolMessage_EPHEMERAL_SETTING)},
		{name: "a setting of a chat", message: &waE2E.Message{LimitSharingMessage: wrapped(protocolOf(waE2E.ProtocolMessage_LIMIT_SHARING))}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			translator, _ := newTestTranslator(tt.secrets)
			evt := (&events.Message{Info: from("M1"), RawMessage: tt.message}).UnwrapRaw()
			items, err := translator.translate(t.Context(), evt)
			g.Expect(err).NotTo(HaveOccurred())
			if tt.want.Type == "" {
				g.Expect(items).To(BeEmpty())
				return
			}
			want := tt.want
			want.SessionID, want.ID, want.Key = "shop", "M1", keyOf(contactLID, contactLID, "M1")
			want.Chat.Address, want.Sender = contactAddress, &contactAddress
			want.Timestamp, want.PushName = delivery.Time{Time: sentAt}, "Anna"
			g.Expect(items).To(Equal([]delivery.MessageItem{want}))
		})
	}
}

func revokeOf(key *waCommon.MessageKey) *waE2E.Message {
	return &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_REVOKE.Enum(), Key: key}}
}

func editOf(key *waCommon.MessageKey, edited *waE2E.Message) *waE2E.Message {
	return &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum(), Key: key, EditedMessage: edited}}
}

// templateOf is a message of an unsupported kind with a picture, and another message that it answers.
func templateOf(image *waE2E.ImageMessage, quoted *waE2E.Message) *waE2E.Message {
	return &waE2E.Message{TemplateMessage: &waE2E.TemplateMessage{
		ContextInfo: &waE2E.ContextInfo{QuotedMessage: quoted},
		HydratedTemplate: &waE2E.TemplateMessage_HydratedFourRowTemplate{
			HydratedContentText: str("choose"),
			Title:               &waE2E.TemplateMessage_HydratedFourRowTemplate_ImageMessage{ImageMessage: image},
			HydratedButtons: []*waE2E.HydratedTemplateButton{{HydratedButton: &waE2E.HydratedTemplateButton_UrlButton{
				UrlButton: &waE2E.HydratedTemplateButton_HydratedURLButton{URL: str("https://shop")},
			}}},
		},
	}}
}

func protocolOf(kind waE2E.ProtocolMessage_Type) *waE2E.Message {
	return &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{Type: &kind}}
}

// TestTranslateOtherEvents has a row for each event that is no message in a chat.
func TestTheTextOfUnsupportedContents(t *testing.T) {
	words := proto.String("hello")
	body := &waE2E.InteractiveMessage{Body: &waE2E.InteractiveMessage_Body{Text: words}}
	for name, m := range map[string]*waE2E.Message{
		"interactive message":              {InteractiveMessage: body},
		"template of interactive messages": {TemplateMessage: &waE2E.TemplateMessage{Format: &waE2E.TemplateMessage_InteractiveMessageTemplate{InteractiveMessageTemplate: body}}},
		"invitation to an event":           {EventInviteMessage: &waE2E.EventInviteMessage{Caption: words}},
		"invitation to follow a channel":   {NewsletterFollowerInviteMessageV2: &waE2E.NewsletterFollowerInviteMessage{Caption: words}},
		"invoice":                          {InvoiceMessage: &waE2E.InvoiceMessage{Note: words}},
		"reminder of a payment":            {PaymentReminderMessage: &waE2E.PaymentReminderMessage{Description: words}},
		"shared payment":                   {SplitPaymentMessage: &waE2E.SplitPaymentMessage{Description: words}},
		"quoted status":                    {StatusQuotedMessage: &waE2E.StatusQuotedMessage{Text: words}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			translator, _ := newTestTranslator(fakeSecrets{})
			items, err := translator.translate(t.Context(), &events.Message{Info: from("M1"), RawMessage: m})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(items).To(HaveLen(1))
			g.Expect(items[0].Type).To(Equal(delivery.TypeUnsupported))
			g.Expect(items[0].Text).To(Equal("hello"))
		})
	}
}

func TestTranslateOtherEvents(t *testing.T) {
	at := delivery.Time{Time: sentAt}
	contact := &delivery.Address{LID: "1002@lid", Phone: "+34600000002"}
	member := &delivery.Address{LID: "1003@lid", Phone: "+34600000003"}
	inGroup := delivery.Chat{Group: "1234@g.us"}
	callOf := types.BasicCallMeta{From: contactLID, CallCreator: contactLID, CallCreatorAlt: contactPN, CallID: "C1", Timestamp: sentAt}
	receiptOf := func(kind types.ReceiptType, ids ...string) *events.Receipt {
		return &events.Receipt{MessageSource: types.MessageSource{Chat: contactLID, Sender: contactLID}, MessageIDs: ids, Timestamp: sentAt, Type: kind}
	}
	receiptItem := func(status string) delivery.MessageItem {
		return delivery.MessageItem{
			Type: delivery.TypeReceipt, Chat: delivery.Chat{Address: *contact}, Sender: contact, Timestamp: at,
			Receipt: &delivery.Receipt{Status: status, Messages: []delivery.ReceiptTarget{{ID: "M1", Key: keyOf(contactLID, ownLID, "M1")}}},
		}
	}
	changeOf := func(change func(*events.GroupInfo)) *events.GroupInfo {
		e := &events.GroupInfo{JID: theGroup, Sender: &memberLID, SenderPN: &memberPN, Timestamp: sentAt}
		change(e)
		return e
	}
	changeItem := func(c delivery.GroupChange) delivery.MessageItem {
		return delivery.MessageItem{Type: delivery.TypeGroupChange, Chat: inGroup, Sender: member, Timestamp: at, Class: delivery.ClassGroups, GroupChange: &c}
	}
	on, off := proto.Bool(true), proto.Bool(false)
	invite := "https://chat.whatsapp.com/abc"
	later := delivery.Time{Time: sentAt.Add(time.Hour)}

	tests := []struct {
		name string
		evt  any
		want delivery.MessageItem // without a type: nothing is forwarded
	}{
		{"undecryptable", &events.UndecryptableMessage{Info: from("M1")}, delivery.MessageItem{
			Type: delivery.TypeUndecryptable, ID: "M1", Chat: delivery.Chat{Address: *contact}, Sender: contact, PushName: "Anna", Timestamp: at,
		}},
		{"an undecryptable reaction", &events.UndecryptableMessage{Info: from("M1"), DecryptFailMode: events.DecryptFailHide}, delivery.MessageItem{
			Type: delivery.TypeUndecryptable, ID: "M1", Chat: delivery.Chat{Address: *contact}, Sender: contact, PushName: "Anna", Timestamp: at, Hidden: true,
		}},
		{"unavailable", &events.UndecryptableMessage{Info: from("M1"), IsUnavailable: true, UnavailableType: events.UnavailableTypeViewOnce}, delivery.MessageItem{
			Type: delivery.TypeUnavailable, Unavailable: "view_once", ID: "M1", Chat: delivery.Chat{Address: *contact}, Sender: contact, PushName: "Anna", Timestamp: at,
		}},
		{"undecryptable, from the own phone about the device", &events.UndecryptableMessage{Info: types.MessageInfo{ID: "M1", Category: "peer"}}, delivery.MessageItem{}},
		{"from the own phone about the device", &events.Message{Info: types.MessageInfo{ID: "M1", Category: "peer"}, RawMessage: text("x")}, delivery.MessageItem{}},

		{"delivered", receiptOf(types.ReceiptTypeDelivered, "M1"), receiptItem("delivered")},
		{"delivered to a device that is not in use", receiptOf(types.ReceiptTypeInactive, "M1"), receiptItem("delivered")},
		{"read", receiptOf(types.ReceiptTypeRead, "M1"), receiptItem("read")},
		{"played", receiptOf(types.ReceiptTypePlayed, "M1"), receiptItem("played")},
		{"read by a member of the group", &events.Receipt{
			MessageSource: types.MessageSource{Chat: theGroup, Sender: memberLID, IsGroup: true}, MessageIDs: []string{"M1", "M2"}, Timestamp: sentAt, Type: types.ReceiptTypeRead,
		}, delivery.MessageItem{
			Type: delivery.TypeReceipt, Chat: inGroup, Sender: member, Timestamp: at, Class: delivery.ClassGroups,
			Receipt: &delivery.Receipt{Status: "read", Messages: []delivery.ReceiptTarget{
				{ID: "M1", Key: keyOf(theGroup, ownLID, "M1")}, {ID: "M2", Key: keyOf(theGroup, ownLID, "M2")},
			}},
		}},
		{"read on the own phone", receiptOf(types.ReceiptTypeReadSelf, "M1"), delivery.MessageItem{}},
		{"played on the own phone", receiptOf(types.ReceiptTypePlayedSelf, "M1"), delivery.MessageItem{}},
		{"of another own device", receiptOf(types.ReceiptTypeSender, "M1"), delivery.MessageItem{}},
		{"a request to send again", receiptOf(types.ReceiptTypeRetry, "M1"), delivery.MessageItem{}},
		{"delivered to the account itself", &events.Receipt{
			MessageSource: types.MessageSource{Chat: ownLID, Sender: ownLID, IsFromMe: true}, MessageIDs: []string{"M1"}, Type: types.ReceiptTypeDelivered,
		}, delivery.MessageItem{}},

		{"a missed call", &events.CallTerminate{BasicCallMeta: callOf, Reason: "timeout"}, delivery.MessageItem{
			Type: delivery.TypeCall, ID: "C1", Chat: delivery.Chat{Address: *contact}, Sender: contact, Timestamp: at, Call: &delivery.Call{Outcome: "missed", Reason: "timeout"},
		}},
		{"a call that its caller ended", &events.CallTerminate{BasicCallMeta: callOf}, delivery.MessageItem{
			Type: delivery.TypeCall, ID: "C1", Chat: delivery.Chat{Address: *contact}, Sender: contact, Timestamp: at, Call: &delivery.Call{Outcome: "missed"},
		}},
		{"a rejected call", &events.CallReject{BasicCallMeta: callOf}, delivery.MessageItem{
			Type: delivery.TypeCall, ID: "C1", Chat: delivery.Chat{Address: *contact}, Sender: contact, Timestamp: at, Call: &delivery.Call{Outcome: "rejected", Reason: "rejected"},
		}},
		{"a call that was rejected on the phone", &events.CallTerminate{BasicCallMeta: callOf, Reason: "rejected_elsewhere"}, delivery.MessageItem{
			Type: delivery.TypeCall, ID: "C1", Chat: delivery.Chat{Address: *contact}, Sender: contact, Timestamp: at, Call: &delivery.Call{Outcome: "rejected", Reason: "rejected_elsewhere"},
		}},
		{"a missed call of a group", &events.CallTerminate{BasicCallMeta: types.BasicCallMeta{
			From: memberLID, CallCreator: memberLID, CallID: "C1", GroupJID: theGroup, Timestamp: sentAt,
		}, Reason: "timeout"}, delivery.MessageItem{
			Type: delivery.TypeCall, ID: "C1", Chat: inGroup, Sender: member, Timestamp: at, Class: delivery.ClassGroups, Call: &delivery.Call{Outcome: "missed", Reason: "timeout"},
		}},
		{"a call that was accepted on the phone", &events.CallTerminate{BasicCallMeta: callOf, Reason: "accepted_elsewhere"}, delivery.MessageItem{}},
		{"the end of a call that the account made", &events.CallTerminate{BasicCallMeta: types.BasicCallMeta{From: contactLID, CallCreator: ownLID, CallID: "C1"}}, delivery.MessageItem{}},
		{"the beginning of a call", &events.CallOffer{BasicCallMeta: callOf}, delivery.MessageItem{}},

		{"subject", changeOf(func(e *events.GroupInfo) { e.Name = &types.GroupName{Name: "Friends"} }), changeItem(delivery.GroupChange{Subject: str("Friends")})},
		{"description", changeOf(func(e *events.GroupInfo) { e.Topic = &types.GroupTopic{Topic: ""} }), changeItem(delivery.GroupChange{Description: str("")})},
		{"locked", changeOf(func(e *events.GroupInfo) { e.Locked = &types.GroupLocked{IsLocked: true} }), changeItem(delivery.GroupChange{Locked: on})},
		{"announce", changeOf(func(e *events.GroupInfo) { e.Announce = &types.GroupAnnounce{} }), changeItem(delivery.GroupChange{Announce: off})},
		{"approval", changeOf(func(e *events.GroupInfo) {
			e.MembershipApprovalMode = &types.GroupMembershipApprovalMode{IsJoinApprovalRequired: true}
		}), changeItem(delivery.GroupChange{Approval: on})},
		{"deleted", changeOf(func(e *events.GroupInfo) { e.Delete = &types.GroupDelete{Deleted: true} }), changeItem(delivery.GroupChange{Deleted: true})},
		{"suspended", changeOf(func(e *events.GroupInfo) { e.Suspended = true }), changeItem(delivery.GroupChange{Suspended: on})},
		{"no longer suspended", changeOf(func(e *events.GroupInfo) { e.Unsuspended = true }), changeItem(delivery.GroupChange{Suspended: off})},
		{"invite link", changeOf(func(e *events.GroupInfo) { e.NewInviteLink = &invite }), changeItem(delivery.GroupChange{InviteLink: invite})},
		{"linked", changeOf(func(e *events.GroupInfo) {
			e.Link = &types.GroupLinkChange{Group: types.GroupLinkTarget{JID: types.NewJID("5", types.GroupServer)}}
		}), changeItem(delivery.GroupChange{Linked: "5@g.us"})},
		{"unlinked", changeOf(func(e *events.GroupInfo) {
			e.Unlink = &types.GroupLinkChange{Group: types.GroupLinkTarget{JID: types.NewJID("5", types.GroupServer)}}
		}), changeItem(delivery.GroupChange{Unlinked: "5@g.us"})},
		{"members", changeOf(func(e *events.GroupInfo) {
			e.Join, e.Leave, e.Promote, e.Demote = []types.JID{contactLID}, []types.JID{memberLID}, []types.JID{contactPN}, []types.JID{memberPN}
		}), changeItem(delivery.GroupChange{
			Added: []delivery.Address{*contact}, Removed: []delivery.Address{*member}, Promoted: []delivery.Address{*contact}, Demoted: []delivery.Address{*member},
		})},
		{"an unknown change", changeOf(func(e *events.GroupInfo) { e.UnknownChanges = []*waBinary.Node{{Tag: "growth_locked"}} }), delivery.MessageItem{
			Type: delivery.TypeUnsupported, Chat: inGroup, Sender: member, Timestamp: at, Class: delivery.ClassGroups, Unsupported: &delivery.Unsupported{Kind: "group growth_locked"},
		}},
		{"ephemeral", changeOf(func(e *events.GroupInfo) { e.Ephemeral = &types.GroupEphemeral{IsEphemeral: true} }), delivery.MessageItem{}},
		{"joined", &events.JoinedGroup{Sender: &memberLID, SenderPN: &memberPN, Type: "new", GroupInfo: types.GroupInfo{
			JID: theGroup, GroupName: types.GroupName{Name: "Friends"},
			Participants: []types.GroupParticipant{{JID: memberLID, PhoneNumber: memberPN}, {JID: ownLID}},
		}}, delivery.MessageItem{
			Type: delivery.TypeGroupChange, Chat: inGroup, Sender: member, Timestamp: later, Class: delivery.ClassGroups,
			GroupChange: &delivery.GroupChange{
				Joined: true, Subject: str("Friends"), Locked: off, Announce: off, Approval: off,
				Members: []delivery.Address{*member, {LID: "1001@lid", Phone: "+34600000001"}},
			},
		}},
		{"picture of a group", &events.Picture{JID: theGroup, Author: memberLID, Timestamp: sentAt, PictureID: "1"}, changeItem(delivery.GroupChange{Picture: "changed"})},
		{"no picture of a group", &events.Picture{JID: theGroup, Author: memberLID, Timestamp: sentAt, Remove: true}, changeItem(delivery.GroupChange{Picture: "removed"})},

		{"presence", &events.Presence{From: contactLID}, delivery.MessageItem{}},
		{"history", &events.HistorySync{}, delivery.MessageItem{}},
		{"connected", &events.Connected{}, delivery.MessageItem{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			translator, _ := newTestTranslator(fakeSecrets{})
			items, err := translator.translate(t.Context(), tt.evt)
			g.Expect(err).NotTo(HaveOccurred())
			if tt.want.Type == "" {
				g.Expect(items).To(BeEmpty())
				return
			}
			g.Expect(items).To(HaveLen(1))
			g.Expect(items[0].Key).To(HaveLen(32))
			again, err := translator.translate(t.Context(), tt.evt)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(again).To(Equal(items))
			want := tt.want
			want.SessionID, want.Key = "shop", items[0].Key
			g.Expect(items[0]).To(Equal(want))
		})
	}
}

// TestOneMessageHasOneKey: however WhatsApp names a message, its key is the same.
func TestOneMessageHasOneKey(t *testing.T) {
	var device uint16 = 7
	onDevice := func(jid types.JID) types.JID { jid.Device = device; return jid }
	hosted := types.NewJID(contactLID.User, types.HostedLIDServer)
	message := func(source types.MessageSource) *events.Message {
		return &events.Message{Info: types.MessageInfo{MessageSource: source, ID: "M1", Timestamp: sentAt}, RawMessage: text("hello")}
	}
	resent := func(key *waCommon.MessageKey) *events.Message {
		// As whatsmeow's ParseWebMessage makes it of an edit.
		return &events.Message{
			Info:         types.MessageInfo{MessageSource: types.MessageSource{Chat: contactLID, Sender: contactLID}, ID: "T1", Timestamp: sentAt},
			SourceWebMsg: &waWeb.WebMessageInfo{Key: key},
			Message:      text("better"),
			RawMessage: &waE2E.Message{EditedMessage: wrapped(&waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
				Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum(), Key: targetOf("T1", true), EditedMessage: text("better"),
			}})},
		}
	}
	tests := []struct {
		name string
		key  string
		evts []any
	}{
		{"a contact's", keyOf(contactLID, contactLID, "M1"), []any{
			message(types.MessageSource{Chat: contactLID, Sender: contactLID, SenderAlt: contactPN}),
			message(types.MessageSource{Chat: contactLID, Sender: onDevice(contactLID)}),
			message(types.MessageSource{Chat: contactPN, Sender: onDevice(contactPN), SenderAlt: onDevice(contactLID)}),
			message(types.MessageSource{Chat: contactPN, Sender: contactPN}),
			message(types.MessageSource{Chat: types.NewJID(contactPN.User, types.LegacyUserServer), Sender: contactPN}),
			message(types.MessageSource{Chat: hosted, Sender: hosted}),
			&events.UndecryptableMessage{Info: from("M1")},
			&events.UndecryptableMessage{Info: from("M1"), IsUnavailable: true},
		}},
		{"a member's in a group", keyOf(theGroup, memberLID, "M1"), []any{
			message(types.MessageSource{Chat: theGroup, Sender: memberLID, IsGroup: true}),
			message(types.MessageSource{Chat: theGroup, Sender: onDevice(memberPN), IsGroup: true}),
			&events.UndecryptableMessage{Info: inTheGroup("M1")},
		}},
		{"the account's own to the contact", keyOf(contactLID, ownLID, "M1"), []any{
			message(types.MessageSource{Chat: contactLID, Sender: ownLID, IsFromMe: true, RecipientAlt: contactPN}),
			message(types.MessageSource{Chat: contactPN, Sender: onDevice(ownPN), IsFromMe: true}),
		}},
		{"an edit, also when the phone sends it again", keyOf(contactLID, contactLID, "E1"), []any{
			resent(&waCommon.MessageKey{ID: str("E1")}),
			&events.UndecryptableMessage{Info: from("E1")},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			for _, evt := range tt.evts {
				translator, _ := newTestTranslator(fakeSecrets{})
				items, err := translator.translate(t.Context(), evt)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(items).To(HaveLen(1))
				g.Expect(items[0].Key).To(Equal(tt.key), "%+v", items[0])
			}
		})
	}
}

func TestDifferentMessagesHaveDifferentKeys(t *testing.T) {
	g := NewWithT(t)
	translator, _ := newTestTranslator(fakeSecrets{})
	channel := types.MessageInfo{MessageSource: types.MessageSource{Chat: types.NewJID("5", types.NewsletterServer), Sender: types.NewJID("5", types.NewsletterServer)}, ID: "M1"}
	group := &events.GroupInfo{JID: theGroup, Sender: &memberLID, Timestamp: sentAt, Name: &types.GroupName{Name: "a"}}
	later := *group
	later.Timestamp = sentAt.Add(time.Second)
	other := *group
	other.Name = &types.GroupName{Name: "b"}
	receipt := func(kind types.ReceiptType, ids ...string) *events.Receipt {
		return &events.Receipt{MessageSource: types.MessageSource{Chat: contactLID, Sender: contactLID}, MessageIDs: ids, Type: kind}
	}
	seen := map[string]bool{}
	for _, evt := range []any{
		&events.Message{Info: from("M1"), RawMessage: text("a")},
		&events.Message{Info: from("M2"), RawMessage: text("a")},
		&events.Message{Info: inTheGroup("M1"), RawMessage: text("a")},
		&events.Message{Info: channel, RawMessage: text("a")},
		&events.Message{Info: channel, RawMessage: text("b"), NewsletterMeta: &events.NewsletterMessageMeta{EditTS: sentAt}},
		&events.Message{Info: channel, RawMessage: text("c"), NewsletterMeta: &events.NewsletterMessageMeta{EditTS: sentAt.Add(time.Second)}},
		receipt(types.ReceiptTypeRead, "M1"), receipt(types.ReceiptTypeDelivered, "M1"), receipt(types.ReceiptTypeRead, "M1", "M2"), receipt(types.ReceiptTypeRead, "M2"),
		&events.CallReject{BasicCallMeta: types.BasicCallMeta{CallCreator: contactLID, CallID: "M1"}},
		group, &later, &other,
	} {
		items, err := translator.translate(t.Context(), evt)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(items).To(HaveLen(1))
		g.Expect(seen).NotTo(HaveKey(items[0].Key))
		seen[items[0].Key] = true
	}
}

func TestAnEditInAChannel(t *testing.T) {
	for name, message := range map[string]*waE2E.Message{
		"a text":    text("better"),
		"a comment": {CommentMessage: &waE2E.CommentMessage{TargetMessageKey: targetOf("T1", false), Message: text("better")}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			translator, _ := newTestTranslator(fakeSecrets{})
			channel := types.NewJID("5", types.NewsletterServer)
			items, err := translator.translate(t.Context(), &events.Message{
				Info:       types.MessageInfo{MessageSource: types.MessageSource{Chat: channel, Sender: channel}, ID: "M1", Timestamp: sentAt},
				RawMessage: message, NewsletterMeta: &events.NewsletterMessageMeta{EditTS: sentAt},
			})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(items).To(HaveLen(1))
			g.Expect(items[0].Type).To(Equal(delivery.TypeEdit))
			g.Expect(items[0].Text).To(Equal("better"))
			g.Expect(items[0].TargetID).To(Equal("M1"))
			g.Expect(items[0].TargetKey).To(Equal(keyOf(channel, channel, "M1")))
			g.Expect(items[0].Sender).To(BeNil())
			g.Expect(items[0].Class).To(Equal(delivery.ClassChannels))
		})
	}
}

// memberKey is the key by which the member names a message of somebody.
func memberKey(fromMe bool, participant string) *waCommon.MessageKey {
	return &waCommon.MessageKey{ID: str("T1"), FromMe: &fromMe, RemoteJID: str(theGroup.String()), Participant: &participant}
}

// TestTargetsInGroups: the sender of a reaction or a revoke names the author of its target. Only
// its author edits a message.
func TestTargetsInGroups(t *testing.T) {
	key := memberKey
	react := func(k *waCommon.MessageKey) *waE2E.Message {
		return &waE2E.Message{ReactionMessage: &waE2E.ReactionMessage{Key: k}}
	}
	tests := []struct {
		name    string
		message *waE2E.Message
		author  types.JID
	}{
		{"a reaction to the sender's own", react(key(true, "")), memberLID},
		{"a reaction to the contact's", react(key(false, contactPN.String())), contactLID},
		{"a reaction to the account's", react(key(false, ownPN.String())), ownLID},
		{"a revoke by an administrator", revokeOf(key(false, contactLID.String())), contactLID},
		{"a revoke of the sender's own", revokeOf(key(true, "")), memberLID},
		{"an edit of the sender's own", editOf(key(true, ""), text("better")), memberLID},
		{"an edit of the contact's changes only the sender's own", editOf(key(false, contactPN.String()), text("better")), memberLID},
		{"an edit of the account's changes only the sender's own", editOf(key(false, ownPN.String()), text("better")), memberLID},
		{"a target without an author", react(key(false, "?")), memberLID},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			translator, _ := newTestTranslator(fakeSecrets{})
			items, err := translator.translate(t.Context(), &events.Message{Info: inTheGroup("M1"), RawMessage: tt.message})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(items[0].TargetKey).To(Equal(keyOf(theGroup, tt.author, "T1")))
		})
	}
}

// TestOnlyInGroupsOthersRevokeAMessage: nobody is an administrator of a status, a broadcast list or
// a chat of two people.
func TestOnlyInGroupsOthersRevokeAMessage(t *testing.T) {
	for chat, author := range map[types.JID]types.JID{
		theGroup:                                 contactLID,
		types.StatusBroadcastJID:                 memberLID,
		types.NewJID("1", types.BroadcastServer): memberLID,
		memberLID:                                memberLID,
	} {
		t.Run(chat.String(), func(t *testing.T) {
			g := NewWithT(t)
			translator, _ := newTestTranslator(fakeSecrets{})
			info := inTheGroup("M1")
			info.Chat = chat
			items, err := translator.translate(t.Context(), &events.Message{Info: info, RawMessage: revokeOf(memberKey(false, contactLID.String()))})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(items).To(HaveLen(1))
			g.Expect(items[0].Type).To(Equal(delivery.TypeRevoke))
			g.Expect(items[0].TargetKey).To(Equal(keyOf(chat, author, "T1")))
		})
	}
}

// TestARevokeOfNothingInAGroup keeps no target of the comment that contains it.
func TestARevokeOfNothingInAGroup(t *testing.T) {
	g := NewWithT(t)
	translator, _ := newTestTranslator(fakeSecrets{message: revokeOf(nil)})
	items, err := translator.translate(t.Context(), &events.Message{
		Info: inTheGroup("M1"), RawMessage: &waE2E.Message{EncCommentMessage: &waE2E.EncCommentMessage{TargetMessageKey: memberKey(false, contactLID.String())}},
	})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(items).To(HaveLen(1))
	g.Expect(items[0].Type).To(Equal(delivery.TypeRevoke))
	g.Expect(items[0].TargetKey).To(BeEmpty())
	g.Expect(items[0].TargetID).To(BeEmpty())
}

// TestUnreadable: what cannot be read is handed over without keys where it can be decoded, and what
// the own phone says to the device is not handed over.
func TestUnreadable(t *testing.T) {
	withKey := &waE2E.Message{ImageMessage: &waE2E.ImageMessage{Caption: str("look"), MediaKey: []byte("key")}, MessageContextInfo: &waE2E.MessageContextInfo{MessageSecret: []byte("secret")}}
	peer := from("M1")
	peer.Category = "peer"
	for _, tt := range []struct {
		name string
		info types.MessageInfo
		raw  []byte
		want []byte // nil: nothing is handed over
	}{
		{"a message", from("M1"), encoded(withKey), encoded(&waE2E.Message{ImageMessage: &waE2E.ImageMessage{Caption: str("look")}})},
		{"no message", from("M1"), []byte{0xff}, []byte{0xff}},
		{"from the own phone about the device", peer, encoded(withKey), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			translator, _ := newTestTranslator(fakeSecrets{})
			items, err := translator.unreadable(t.Context(), &tt.info, tt.raw)
			g.Expect(err).NotTo(HaveOccurred())
			if tt.want == nil {
				g.Expect(items).To(BeEmpty())
				return
			}
			g.Expect(items).To(HaveLen(1))
			g.Expect(items[0].Unsupported.Protobuf).To(Equal(tt.want))
		})
	}
}

// TestAReceiptThatIsNotForwardedLooksNothingUp: a stranger's receipts cost the database nothing.
func TestAReceiptThatIsNotForwardedLooksNothingUp(t *testing.T) {
	g := NewWithT(t)
	translator, lids := newTestTranslator(fakeSecrets{})
	for _, kind := range []types.ReceiptType{types.ReceiptTypeRetry, types.ReceiptTypeServerError, "of a newer version"} {
		items, err := translator.translate(t.Context(), &events.Receipt{MessageSource: types.MessageSource{Chat: contactLID, Sender: contactLID}, MessageIDs: []string{"M1"}, Type: kind})
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(items).To(BeEmpty())
	}
	g.Expect(lids.lookups).To(BeZero())
}

func TestClasses(t *testing.T) {
	for chat, class := range map[types.JID]delivery.MessageClass{
		contactLID:                                "",
		contactPN:                                 "",
		types.NewJID("8", types.BotServer):        "",
		theGroup:                                  delivery.ClassGroups,
		types.StatusBroadcastJID:                  delivery.ClassStatus,
		types.NewJID("1", types.BroadcastServer):  delivery.ClassBroadcasts,
		types.NewJID("1", types.NewsletterServer): delivery.ClassChannels,
	} {
		g := NewWithT(t)
		translator, _ := newTestTranslator(fakeSecrets{})
		items, err := translator.translate(t.Context(), &events.Message{
			Info: types.MessageInfo{MessageSource: types.MessageSource{Chat: chat, Sender: contactLID}, ID: "M1"}, RawMessage: text("a"),
		})
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(items[0].Class).To(Equal(class), chat.String())
		g.Expect(items[0].Chat).NotTo(BeZero(), chat.String())
	}
}

// TestTheLIDMapFails: without it the key could be another one, so nothing is translated.
func TestTheLIDMapFails(t *testing.T) {
	g := NewWithT(t)
	translator, lids := newTestTranslator(fakeSecrets{})
	lids.err = errors.New("the database is away")
	_, err := translator.translate(t.Context(), &events.Message{
		Info: types.MessageInfo{MessageSource: types.MessageSource{Chat: contactPN, Sender: contactPN}, ID: "M1"}, RawMessage: text("a"),
	})
	g.Expect(err).To(MatchError(ContainSubstring("LID map")))
	_, err = translator.translate(t.Context(), &events.Receipt{MessageSource: types.MessageSource{Chat: contactPN, Sender: contactPN}, MessageIDs: []string{"1"}})
	g.Expect(err).To(HaveOccurred())
}

// TestTheStoreFailsWithASecret: a vote that cannot be read because the store has failed comes again.
func TestTheStoreFailsWithASecret(t *testing.T) {
	g := NewWithT(t)
	translator, _ := newTestTranslator(fakeSecrets{err: context.Canceled})
	_, err := translator.translate(t.Context(), &events.Message{
		Info: from("M1"), RawMessage: &waE2E.Message{PollUpdateMessage: &waE2E.PollUpdateMessage{PollCreationMessageKey: targetOf("T1", false)}},
	})
	g.Expect(err).To(HaveOccurred())
}

// TestLookupsOfOneMessageAreLimited: a stranger cannot make the store look up a thousand addresses.
func TestLookupsOfOneMessageAreLimited(t *testing.T) {
	g := NewWithT(t)
	translator, lids := newTestTranslator(fakeSecrets{})
	var mentioned []string
	for range 1000 {
		mentioned = append(mentioned, memberLID.String())
	}
	items, err := translator.translate(t.Context(), &events.Message{Info: from("M1"), RawMessage: withContext(&waE2E.ContextInfo{MentionedJID: mentioned})})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(items[0].Mentions).To(HaveLen(1000))
	g.Expect(lids.lookups).To(Equal(maxLookups))
}

func TestALongReceiptBecomesSeveral(t *testing.T) {
	g := NewWithT(t)
	translator, _ := newTestTranslator(fakeSecrets{})
	ids := make([]string, 2*delivery.MaxReceiptTargets+1)
	for i := range ids {
		ids[i] = strings.Repeat("A", i%5) + "x"
	}
	items, err := translator.translate(t.Context(), &events.Receipt{MessageSource: types.MessageSource{Chat: contactLID, Sender: contactLID}, MessageIDs: ids, Type: types.ReceiptTypeRead})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(items).To(HaveLen(3))
	g.Expect(items[2].Receipt.Messages).To(HaveLen(1))
}

// TestEveryKindOfContentIsClassified walks the fields of the library's messages: a new one of a
// newer version must be decided about.
func TestEveryKindOfContentIsClassified(t *testing.T) {
	g := NewWithT(t)
	fields := (&waE2E.Message{}).ProtoReflect().Descriptor().Fields()
	g.Expect(contents).To(HaveLen(fields.Len()), "contents lists fields that do not exist any more")
	for i := range fields.Len() {
		field := fields.Get(i)
		how, ok := contents[field.Name()]
		g.Expect(ok).To(BeTrue(), "decide in contents what happens to %s", field.Name())
		m := &waE2E.Message{}
		if field.Kind() == protoreflect.MessageKind {
			m.ProtoReflect().Set(field, m.ProtoReflect().NewField(field))
		} else {
			m.Conversation = str("hello")
		}
		translator, _ := newTestTranslator(fakeSecrets{message: &waE2E.Message{}})
		items, err := translator.translate(t.Context(), &events.Message{Info: from("M1"), RawMessage: m})
		g.Expect(err).NotTo(HaveOccurred())
		switch how {
		case forwardedContent:
			if field.Name() == "commentMessage" || field.Name() == "encCommentMessage" { // here without a content
				continue
			}
			g.Expect(items).To(HaveLen(1), "%s", field.Name())
			if field.Name() != "secretEncryptedMessage" { // here without a kind
				g.Expect(items[0].Type).NotTo(Equal(delivery.TypeUnsupported), "%s", field.Name())
			}
		case wrappedContent:
			_, ok := m.ProtoReflect().Get(field).Message().Interface().(interface{ GetMessage() *waE2E.Message })
			g.Expect(ok).To(BeTrue(), "%s contains no message", field.Name())
			g.Expect(items).To(HaveLen(1), "%s", field.Name())
		case unsupportedContent:
			g.Expect(items[0].Unsupported.Kind).To(Equal(string(field.Name())))
		case ignoredContent:
			g.Expect(items).To(BeEmpty(), "%s", field.Name())
		}
	}
	kinds := waE2E.ProtocolMessage_REVOKE.Descriptor().Values()
	for i := range kinds.Len() {
		g.Expect(protocolContents).To(HaveKey(waE2E.ProtocolMessage_Type(kinds.Get(i).Number())), "decide in protocolContents what happens to %s", kinds.Get(i).Name())
	}
}

// FuzzTranslateMessage: whatever a stranger's protobuf holds, its translation does not panic,
// and the item can be stored.
func FuzzTranslateMessage(f *testing.F) {
	for _, m := range []*waE2E.Message{
		text("hello"), {}, withContext(&waE2E.ContextInfo{StanzaID: str("Q"), Participant: str("1@lid"), QuotedMessage: text("q"), MentionedJID: []string{"1@lid", "@", "a:b:c@x"}}),
		{EphemeralMessage: wrapped(&waE2E.Message{ViewOnceMessage: wrapped(text("x"))})},
		{ProtocolMessage: &waE2E.ProtocolMessage{Type: waE2E.ProtocolMessage_MESSAGE_EDIT.Enum(), Key: targetOf("T1", true), EditedMessage: text("x")}},
		{PollUpdateMessage: &waE2E.PollUpdateMessage{}}, {SecretEncryptedMessage: &waE2E.SecretEncryptedMessage{SecretEncType: waE2E.SecretEncryptedMessage_MESSAGE_EDIT.Enum()}},
		{ContactMessage: &waE2E.ContactMessage{Vcard: str("PHOTO\n :")}}, {CommentMessage: &waE2E.CommentMessage{Message: text("x")}},
		{PinInChatMessage: &waE2E.PinInChatMessage{}}, templateOf(&waE2E.ImageMessage{MediaKey: []byte("key"), URL: str("u")}, text("q")), {LocationMessage: &waE2E.LocationMessage{}},
	} {
		f.Add(encoded(m), false)
		f.Add(encoded(m), true)
	}
	f.Fuzz(func(t *testing.T, raw []byte, group bool) {
		var m, decrypted waE2E.Message
		if proto.Unmarshal(raw, &m) != nil {
			return
		}
		_ = proto.Unmarshal(raw, &decrypted) // the same again
		info := from("M1")
		if group {
			info = inTheGroup("M1")
		}
		translator, _ := newTestTranslator(fakeSecrets{message: &decrypted, vote: &waE2E.PollVoteMessage{SelectedOptions: [][]byte{raw}}})
		items, err := translator.translate(t.Context(), (&events.Message{Info: info, RawMessage: &m}).UnwrapRaw())
		if err != nil {
			t.Fatal(err)
		}
		for _, item := range items {
			stored, err := item.Item()
			if err != nil {
				t.Fatal(err)
			}
			if len(stored.Payload) > delivery.MaxMessagePayload || !json.Valid(stored.Payload) || strings.Contains(string(stored.Payload), `\u0000`) {
				t.Fatalf("%d bytes: %.1000s", len(stored.Payload), stored.Payload)
			}
		}
	})
}

// TestEveryKindOfTheSimulatorHasARow keeps the table in step with what can be sent in tests.
func TestEveryKindOfTheSimulatorHasARow(t *testing.T) {
	g := NewWithT(t)
	rows := map[string]delivery.MessageType{}
	for kind, want := range simulatedTypes {
		rows[kind] = want
	}
	for _, kind := range simulator.Kinds() {
		g.Expect(rows).To(HaveKey(kind))
	}
	g.Expect(rows).To(HaveLen(len(simulator.Kinds())))
}

// simulatedTypes are the types of the items of the simulator's kinds of messages.
var simulatedTypes = map[string]delivery.MessageType{
	simulator.KindText: delivery.TypeText, simulator.KindImage: delivery.TypeImage, simulator.KindVideo: delivery.TypeVideo,
	simulator.KindVoice: delivery.TypeVoice, simulator.KindAudio: delivery.TypeAudio, simulator.KindDocument: delivery.TypeDocument,
	simulator.KindSticker: delivery.TypeSticker, simulator.KindLocation: delivery.TypeLocation, simulator.KindLiveLocation: delivery.TypeLiveLocation,
	simulator.KindContact: delivery.TypeContacts, simulator.KindPoll: delivery.TypePoll, simulator.KindVote: delivery.TypePollVote,
	simulator.KindReaction: delivery.TypeReaction, simulator.KindEdit: delivery.TypeEdit, simulator.KindRevoke: delivery.TypeRevoke,
	simulator.KindOrder: delivery.TypeOrder, simulator.KindProduct: delivery.TypeProduct,
}

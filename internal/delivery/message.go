package delivery

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// MessageType says what a message is, and which fields of its MessageItem are set.
type MessageType string

// The types of messages.
const (
	// TypeText has Text.
	TypeText MessageType = "text"
	// TypeImage, TypeVideo, TypeVoice, TypeAudio, TypeDocument and TypeSticker have Media,
	// and the caption as Text.
	TypeImage    MessageType = "image"
	TypeVideo    MessageType = "video"
	TypeVoice    MessageType = "voice"
	TypeAudio    MessageType = "audio"
	TypeDocument MessageType = "document"
	TypeSticker  MessageType = "sticker"
	// TypeLocation and TypeLiveLocation have Location. A live one comes again and again, each
	// time as a message with a key of its own.
	TypeLocation     MessageType = "location"
	TypeLiveLocation MessageType = "live_location"
	// TypeContacts has Contacts.
	TypeContacts MessageType = "contacts"
	// TypePoll has Poll, and the question as Text.
	TypePoll MessageType = "poll"
	// TypePollVote has PollVote and Target.
	TypePollVote MessageType = "poll_vote"
	// TypeReaction has Reaction and Target.
	TypeReaction MessageType = "reaction"
	// TypeEdit has Target, and the new content of that message, as a rule as Text.
	TypeEdit MessageType = "edit"
	// TypeRevoke has Target, the message that is deleted for everybody.
	TypeRevoke MessageType = "revoke"
	// TypeOrder has Order, TypeProduct has Product.
	TypeOrder   MessageType = "order"
	TypeProduct MessageType = "product"
	// TypeGroupChange has GroupChange.
	TypeGroupChange MessageType = "group_change"
	// TypeCall has Call.
	TypeCall MessageType = "call"
	// TypeReceipt has Receipt.
	TypeReceipt MessageType = "receipt"
	// TypeUndecryptable is a message that could not be decrypted (yet). The same key may come
	// again with the message itself.
	TypeUndecryptable MessageType = "undecryptable"
	// TypeUnavailable is a message that WhatsApp does not give to linked devices (Unavailable says
	// why), or not yet. The same key may come again with the message itself.
	TypeUnavailable MessageType = "unavailable"
	// TypeUnsupported has Unsupported: a message of a kind that has no type here.
	TypeUnsupported MessageType = "unsupported"
)

// MessageTypes lists every type.
var MessageTypes = []MessageType{
	TypeText, TypeImage, TypeVideo, TypeVoice, TypeAudio, TypeDocument, TypeSticker, TypeLocation, TypeLiveLocation,
	TypeContacts, TypePoll, TypePollVote, TypeReaction, TypeEdit, TypeRevoke, TypeOrder, TypeProduct, TypeGroupChange,
	TypeCall, TypeReceipt, TypeUndecryptable, TypeUnavailable, TypeUnsupported,
}

// MessageClass is a class of messages that a session may leave out. Its values are those of
// spec.messages.ignore.
type MessageClass string

// The classes. A message between two people has none.
const (
	ClassStatus     MessageClass = "Status"
	ClassChannels   MessageClass = "Channels"
	ClassGroups     MessageClass = "Groups"
	ClassBroadcasts MessageClass = "Broadcasts"
)

// MaxMessagePayload is the maximum size of a message's JSON object in bytes.
const MaxMessagePayload = 1 << 20

// MessageItem is a message: an element of POST /whatsapp/messages/batch. Every field that is
// unknown, or that its type does not have, is left out. A limit is the maximum number of
// characters of a text, or of elements of a list; [MessageItem.Item] cuts what is longer and
// names it in Cut.
type MessageItem struct {
	Numbers
	SessionID string `json:"session_id" limit:"63"`
	// Key is the identity of the message, see MessageKey: Laravel inserts a message by it, or
	// ignores it if it is known. Only an undecryptable or unavailable message is replaced by another
	// one with its key.
	Key string `json:"key" limit:"64"`
	// ID is WhatsApp's id of the message. It is unique only together with chat and sender.
	ID   string      `json:"id,omitempty" limit:"256"`
	Type MessageType `json:"type" limit:"32"`
	Chat Chat        `json:"chat"`
	// Sender is who wrote the message, in every kind of chat; nil: unknown, as in some group changes.
	Sender *Address `json:"sender,omitempty"`
	// FromMe: the session's own account wrote it, on its phone or another device.
	FromMe bool `json:"from_me"`
	// Timestamp is when the message was sent, as WhatsApp says, in whole seconds.
	Timestamp Time `json:"timestamp"`
	// PushName is the name that the sender uses.
	PushName string `json:"push_name,omitempty" limit:"128"`
	// Text is the text, the caption of a file, the question of a poll, the comment of a live
	// location, the text of an order, or the choice in a message with buttons.
	Text string `json:"text,omitempty" limit:"65536"`
	// Quoted is the message that this one answers.
	Quoted *Quoted `json:"quoted,omitempty"`
	// Mentions are the people whom the text mentions.
	Mentions []Address `json:"mentions,omitempty" limit:"1024"`
	// MentionsEveryone: the text mentions all members of the group.
	MentionsEveryone bool `json:"mentions_everyone,omitempty"`
	// Referral is the advert on which the sender clicked to write.
	Referral *Referral `json:"referral,omitempty"`
	// Forwarded: the sender forwarded the message; ForwardingScore is how often it was forwarded.
	Forwarded       bool   `json:"forwarded,omitempty"`
	ForwardingScore uint32 `json:"forwarding_score,omitempty"`
	// Ephemeral: the message disappears; EphemeralSeconds is after what time.
	Ephemeral        bool   `json:"ephemeral,omitempty"`
	EphemeralSeconds uint32 `json:"ephemeral_seconds,omitempty"`
	// ViewOnce: the message may be opened once.
	ViewOnce bool      `json:"view_once,omitempty"`
	Media    *Media    `json:"media,omitempty"`
	Location *Location `json:"location,omitempty"`
	Contacts []Contact `json:"contacts,omitempty" limit:"256"`
	Poll     *Poll     `json:"poll,omitempty"`
	PollVote *PollVote `json:"poll_vote,omitempty"`
	Reaction *Reaction `json:"reaction,omitempty"`
	// TargetKey and TargetID are the key and the id of the message that this one is about.
	TargetKey string   `json:"target_key,omitempty" limit:"64"`
	TargetID  string   `json:"target_id,omitempty" limit:"256"`
	Order     *Order   `json:"order,omitempty"`
	Product   *Product `json:"product,omitempty"`
	// Selection is the id of the button or row that the sender chose in a message of the
	// account's; Text is what it said.
	Selection   string       `json:"selection,omitempty" limit:"256"`
	GroupChange *GroupChange `json:"group_change,omitempty"`
	Call        *Call        `json:"call,omitempty"`
	Receipt     *Receipt     `json:"receipt,omitempty"`
	// Unavailable says why a message is unavailable, in WhatsApp's word (view_once); empty: unknown.
	Unavailable string `json:"unavailable,omitempty" limit:"64"`
	// Hidden: WhatsApp's own apps show nothing in the place of this undecryptable message, because
	// it is no message of its own but, for example, a reaction or a vote.
	Hidden      bool         `json:"hidden,omitempty"`
	Unsupported *Unsupported `json:"unsupported,omitempty"`
	// Cut names the fields that were longer than their limit and are not complete, for example
	// "text" or "contacts.vcard".
	Cut []string `json:"cut,omitempty" limit:"64"`
	// Metadata is the session's spec.metadata.
	Metadata Metadata `json:"metadata,omitempty"`
	// Class is what spec.messages.ignore may leave out; Laravel does not get it.
	Class MessageClass `json:"-"`
}

// Address is a person or a business. LID is WhatsApp's id of the account, which hides its
// phone number; WhatsApp gives LID, Phone or both, and not the same in each message.
type Address struct {
	// LID ends with @lid.
	LID string `json:"lid,omitempty" limit:"64"`
	// Phone is the phone number in E.164.
	Phone string `json:"phone,omitempty" limit:"32"`
	// Other is WhatsApp's address of what has neither, for example of a bot of Meta.
	Other string `json:"other,omitempty" limit:"128"`
}

// Chat is where a message was written: to a person, or to one of the rest.
type Chat struct {
	Address
	// Group ends with @g.us.
	Group string `json:"group,omitempty" limit:"128"`
	// Broadcast is a broadcast list, or status@broadcast.
	Broadcast string `json:"broadcast,omitempty" limit:"128"`
	// Channel ends with @newsletter.
	Channel string `json:"channel,omitempty" limit:"128"`
}

// Quoted is a message that another one answers, as the sender of the answer shows it: its
// text can be forged.
type Quoted struct {
	// Key is the key of the quoted message, if it is one of this chat.
	Key    string      `json:"key,omitempty" limit:"64"`
	ID     string      `json:"id,omitempty" limit:"256"`
	Sender *Address    `json:"sender,omitempty"`
	Type   MessageType `json:"type,omitempty" limit:"32"`
	Text   string      `json:"text,omitempty" limit:"4096"`
}

// Referral is an advert that leads to a chat.
type Referral struct {
	SourceType string `json:"source_type,omitempty" limit:"64"`
	SourceID   string `json:"source_id,omitempty" limit:"256"`
	SourceURL  string `json:"source_url,omitempty" limit:"2048"`
	Title      string `json:"title,omitempty" limit:"1024"`
	Body       string `json:"body,omitempty" limit:"4096"`
	// ClickID is WhatsApp's ctwa_clid, by which Meta's Conversions API knows the click.
	ClickID string `json:"click_id,omitempty" limit:"1024"`
	Ref     string `json:"ref,omitempty" limit:"1024"`
}

// Media is a file, as its sender describes it: none of it is checked. The file itself is not
// part of the item, nor are its preview, its address or its keys.
type Media struct {
	// Mime is the type, for example "audio/ogg; codecs=opus".
	Mime string `json:"mime,omitempty" limit:"256"`
	// Size is in bytes.
	Size uint64 `json:"size,omitempty"`
	// Name is that of a document. It can contain anything, also a path.
	Name string `json:"name,omitempty" limit:"1024"`
	// Seconds is how long audio or video plays.
	Seconds uint32 `json:"seconds,omitempty"`
	Width   uint32 `json:"width,omitempty"`
	Height  uint32 `json:"height,omitempty"`
	// Pages is how many a document has.
	Pages uint32 `json:"pages,omitempty"`
	// Animated: a sticker that moves, or a video that is played as a GIF.
	Animated bool `json:"animated,omitempty"`
	// VideoNote: a video that was recorded in the chat, as a voice message is.
	VideoNote bool `json:"video_note,omitempty"`
}

// Location is a place, or where somebody is at present.
type Location struct {
	Latitude  float64 `json:"latitude"`
	Longitude float64 `json:"longitude"`
	Name      string  `json:"name,omitempty" limit:"1024"`
	Address   string  `json:"address,omitempty" limit:"1024"`
	URL       string  `json:"url,omitempty" limit:"2048"`
	// AccuracyMeters, SpeedMetersPerSecond and HeadingDegrees (clockwise from north) are those of
	// a live location.
	AccuracyMeters       uint32  `json:"accuracy_meters,omitempty"`
	SpeedMetersPerSecond float64 `json:"speed_meters_per_second,omitempty"`
	HeadingDegrees       uint32  `json:"heading_degrees,omitempty"`
	// Sequence orders the messages of one live location.
	Sequence int64 `json:"sequence,omitempty"`
}

// Contact is an address card.
type Contact struct {
	Name string `json:"name,omitempty" limit:"256"`
	// VCard is the card in the format of RFC 2426, without its photo.
	VCard string `json:"vcard,omitempty" limit:"4096"`
}

// Poll is a question with options.
type Poll struct {
	Options []PollOption `json:"options" limit:"64"`
	// MaxSelections is how many options a vote may select; 0: all.
	MaxSelections uint32 `json:"max_selections"`
}

// PollOption is an answer of a poll.
type PollOption struct {
	Name string `json:"name" limit:"512"`
	// Hash is the SHA-256 of the name in hexadecimal, by which a vote names the option.
	Hash string `json:"hash" limit:"64"`
}

// PollVote is the present vote of the sender, which replaces the one before.
type PollVote struct {
	// Selected are the hashes of the options; empty: the vote was taken back.
	Selected []string `json:"selected" limit:"64"`
}

// Reaction is an emoji for a message.
type Reaction struct {
	// Emoji is empty if the reaction is removed.
	Emoji string `json:"emoji" limit:"64"`
}

// Order is a basket that a customer sends.
type Order struct {
	ID        string `json:"id,omitempty" limit:"256"`
	Title     string `json:"title,omitempty" limit:"1024"`
	ItemCount int32  `json:"item_count,omitempty"`
	// TotalThousandths is the price in thousandths of the currency's unit.
	TotalThousandths int64  `json:"total_thousandths,omitempty"`
	Currency         string `json:"currency,omitempty" limit:"16"`
}

// Product is an article of a catalogue.
type Product struct {
	ID          string `json:"id,omitempty" limit:"256"`
	RetailerID  string `json:"retailer_id,omitempty" limit:"256"`
	Title       string `json:"title,omitempty" limit:"1024"`
	Description string `json:"description,omitempty" limit:"4096"`
	// PriceThousandths is the price in thousandths of the currency's unit.
	PriceThousandths int64  `json:"price_thousandths,omitempty"`
	Currency         string `json:"currency,omitempty" limit:"16"`
}

// GroupChange is what was changed in a group; nil and empty fields are unchanged.
type GroupChange struct {
	// Joined: the session's account is a member now; Members lists all.
	Joined      bool    `json:"joined,omitempty"`
	Subject     *string `json:"subject,omitempty" limit:"1024"`
	Description *string `json:"description,omitempty" limit:"8192"`
	// Locked: only administrators may change the group. Announce: only they may write.
	// Approval: they must let new members in.
	Locked   *bool `json:"locked,omitempty"`
	Announce *bool `json:"announce,omitempty"`
	Approval *bool `json:"approval,omitempty"`
	// Deleted: the group does not exist any more. Suspended: WhatsApp has closed it, or opened it again.
	Deleted   bool  `json:"deleted,omitempty"`
	Suspended *bool `json:"suspended,omitempty"`
	// InviteLink is the new link by which people join.
	InviteLink string `json:"invite_link,omitempty" limit:"256"`
	// Picture is changed or removed.
	Picture string `json:"picture,omitempty" limit:"16"`
	// Linked and Unlinked are groups of one community.
	Linked   string    `json:"linked,omitempty" limit:"128"`
	Unlinked string    `json:"unlinked,omitempty" limit:"128"`
	Added    []Address `json:"added,omitempty" limit:"1024"`
	Removed  []Address `json:"removed,omitempty" limit:"1024"`
	Promoted []Address `json:"promoted,omitempty" limit:"256"`
	Demoted  []Address `json:"demoted,omitempty" limit:"256"`
	Members  []Address `json:"members,omitempty" limit:"1024"`
}

// The changes of a group's picture.
const (
	PictureChanged = "changed"
	PictureRemoved = "removed"
)

// Call is a call that nobody took.
type Call struct {
	// Outcome is missed or rejected.
	Outcome string `json:"outcome" limit:"16"`
	// Reason is WhatsApp's word for the end, for example timeout.
	Reason string `json:"reason,omitempty" limit:"64"`
}

// The outcomes of a call.
const (
	CallMissed   = "missed"
	CallRejected = "rejected"
)

// Receipt says that messages of the account were delivered, read or played by the sender of
// the receipt.
type Receipt struct {
	// Status is delivered, read or played.
	Status   string          `json:"status" limit:"16"`
	Messages []ReceiptTarget `json:"messages" limit:"512"`
}

// ReceiptTarget is a message of the account.
type ReceiptTarget struct {
	Key string `json:"key" limit:"64"`
	ID  string `json:"id" limit:"256"`
}

// The states in a receipt.
const (
	ReceiptDelivered = "delivered"
	ReceiptRead      = "read"
	ReceiptPlayed    = "played"
)

// MaxReceiptTargets is how many messages one receipt names: a longer list becomes several receipts.
const MaxReceiptTargets = 512

// Unsupported is a message of a kind that has no type.
type Unsupported struct {
	// Kind is the name of the kind in WhatsApp's protobuf, for example pinInChatMessage; "unknown"
	// if the client does not know it; "group" and a name for an unknown change of a group.
	Kind string `json:"kind,omitempty" limit:"128"`
	// Protobuf is the message (waE2E.Message) in base64, without keys, secrets, and paths and
	// addresses of files; one of more than 64 KiB is left out.
	Protobuf []byte `json:"protobuf,omitempty" limit:"65536"`
}

// MessageKey is the identity of a message in all sessions: 128 bits of SHA-256, in
// hexadecimal. It depends on what is the same whenever a message comes: the session, the
// addresses of chat and sender, without a device and as LID where it is known, and
// WhatsApp's id.
func MessageKey(sessionID, chat, sender, id string) string {
	h := sha256.New()
	for _, part := range []string{sessionID, chat, sender, id} {
		// The length goes first, so that no two different lists of parts are the same text.
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		h.Write([]byte(part))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Placeholder reports whether a message with the same key may replace m.
func (m MessageItem) Placeholder() bool {
	return m.Type == TypeUndecryptable || m.Type == TypeUnavailable
}

// Item wraps m for the inbox. Texts become valid UTF-8 without U+0000, which PostgreSQL
// refuses, and everything keeps to its limit. The payload has at most [MaxMessagePayload] bytes.
func (m MessageItem) Item() (Item, error) {
	payload, err := m.encode()
	if err != nil {
		return Item{}, fmt.Errorf("encoding a message item: %w", err)
	}
	return Item{SessionID: m.SessionID, Key: m.Key, Placeholder: m.Placeholder(), Numbers: m.Numbers, Payload: payload}, nil
}

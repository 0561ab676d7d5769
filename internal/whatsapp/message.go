package whatsapp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"go.mau.fi/whatsmeow/proto/waCommon"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// lidMap finds the other address of an account: each has a LID, which hides its phone number,
// and the address with the phone number. An empty answer means that it is not known.
type lidMap interface {
	GetPNForLID(ctx context.Context, lid types.JID) (types.JID, error)
	GetLIDForPN(ctx context.Context, pn types.JID) (types.JID, error)
}

// messageSecrets decrypts what is encrypted with the secret of another message, which the
// store keeps.
type messageSecrets interface {
	DecryptPollVote(ctx context.Context, vote *events.Message) (*waE2E.PollVoteMessage, error)
	DecryptReaction(ctx context.Context, reaction *events.Message) (*waE2E.ReactionMessage, error)
	DecryptComment(ctx context.Context, comment *events.Message) (*waE2E.Message, error)
	DecryptSecretEncryptedMessage(ctx context.Context, message *events.Message) (*waE2E.Message, error)
}

// messageTranslator translates the library's events into what Laravel gets. It does nothing
// but read: the same event always becomes the same items with the same keys, as long as the
// LID map knows the same.
type messageTranslator struct {
	sessionID string
	lids      lidMap
	secrets   messageSecrets
	// own returns the account's address with its phone number, and its LID.
	own func() (pn, lid types.JID)
	now func() time.Time
}

// maxLookups is how many addresses of one event are looked up in the LID map, besides those that its key
// needs: a message can mention a thousand people.
const maxLookups = 64

// translate returns what Laravel gets of an event of the library: nothing of what it does not
// need. An error means that the store has failed, so the event must be refused: without the
// LID map its key may be another one than before.
func (t *messageTranslator) translate(ctx context.Context, evt any) ([]delivery.MessageItem, error) {
	m := &translation{messageTranslator: t, ctx: ctx}
	switch e := evt.(type) {
	case *events.Message:
		m.message(e)
	case *events.UndecryptableMessage:
		m.undecryptable(e)
	case *events.Receipt:
		return m.receipts(e)
	case *events.GroupInfo:
		m.groupChange(e)
	case *events.JoinedGroup:
		m.joinedGroup(e)
	case *events.Picture:
		m.picture(e)
	case *events.CallTerminate:
		m.call(&e.BasicCallMeta, e.Reason)
	case *events.CallReject:
		m.call(&e.BasicCallMeta, "rejected")
	}
	return m.result()
}

// unreadable is the item of a message of which only its envelope can be read. raw is what was decrypted.
func (t *messageTranslator) unreadable(ctx context.Context, info *types.MessageInfo, raw []byte) ([]delivery.MessageItem, error) {
	if info.Category == categoryPeer {
		return nil, nil
	}
	var decoded waE2E.Message
	if proto.Unmarshal(raw, &decoded) == nil {
		raw = withoutKeys(&decoded)
	}
	m := &translation{messageTranslator: t, ctx: ctx}
	m.header(info)
	m.unsupported("", raw)
	return m.result()
}

// categoryPeer is the category of what the own phone and this device exchange: keys and settings.
const categoryPeer = "peer"

// translation is the translation of one event.
type translation struct {
	*messageTranslator
	ctx context.Context //nolint:containedctx // it lives no longer than the call
	// evt is the event; nil if it is no message.
	evt     *events.Message
	item    delivery.MessageItem
	chatKey string
	// sender wrote the message; senderKey is its address in keys.
	sender    person
	senderKey string
	// lookups were made in the LID map, beside those for the key.
	lookups int
	// quoted: this is the message that another one answers.
	quoted bool
	err    error
}

// result is the item, unless nothing is forwarded.
func (t *translation) result() ([]delivery.MessageItem, error) {
	if t.err != nil {
		return nil, t.err
	}
	if t.item.Type == "" {
		return nil, nil
	}
	return []delivery.MessageItem{t.item}, nil
}

// fail remembers the first error of the store.
func (t *translation) fail(err error) {
	if t.err == nil {
		t.err = err
	}
}

func (t *translation) message(e *events.Message) {
	if e.Info.Category == categoryPeer {
		return
	}
	t.evt = e
	info := e.Info
	if id := e.SourceWebMsg.GetKey().GetID(); id != "" {
		// The library gives an edit that the phone sends again the id of its target (its client.go, ParseWebMessage).
		info.ID = id
	}
	raw := e.RawMessage
	if raw == nil {
		raw = e.Message
	}
	t.header(&info)
	if e.NewsletterMeta != nil && !e.NewsletterMeta.EditTS.IsZero() {
		// An edit in a channel has the id of its target.
		target := t.item.Key
		t.item.Key = t.key("edit", info.ID, strconv.FormatInt(e.NewsletterMeta.EditTS.UnixMilli(), 10))
		if t.content(raw, 0); t.item.Type != "" {
			t.item.Type, t.item.TargetID, t.item.TargetKey = delivery.TypeEdit, t.item.ID, target
		}
		return
	}
	t.content(raw, 0)
}

func (t *translation) undecryptable(e *events.UndecryptableMessage) {
	if e.Info.Category == categoryPeer {
		return
	}
	t.header(&e.Info)
	t.item.Type = delivery.TypeUndecryptable
	if e.IsUnavailable {
		t.item.Type, t.item.Unavailable = delivery.TypeUnavailable, string(e.UnavailableType)
	}
	t.item.Hidden = e.DecryptFailMode == events.DecryptFailHide
}

// header fills in what every message has.
func (t *translation) header(info *types.MessageInfo) {
	t.place(info.Chat, info.Sender, info.SenderAlt, info.RecipientAlt)
	t.item.ID = info.ID
	t.item.Key = delivery.MessageKey(t.sessionID, t.chatKey, t.senderKey, info.ID)
	t.item.FromMe = info.IsFromMe || t.item.FromMe
	t.at(info.Timestamp)
	if info.PushName != "-" { // WhatsApp's word for none
		t.item.PushName = info.PushName
	}
}

// key is the key of what has no id of WhatsApp's own, or the id of another item.
func (t *translation) key(parts ...string) string {
	return delivery.MessageKey(t.sessionID, t.chatKey, t.senderKey, strings.Join(parts, "\x00"))
}

func (t *translation) at(when time.Time) {
	if when.Unix() <= 0 {
		when = t.now()
	}
	t.item.Timestamp = delivery.Time{Time: when.Truncate(time.Second)}
}

// place fills in session, chat and sender.
func (t *translation) place(chat, sender, senderOther, recipientOther types.JID) {
	t.item.SessionID = t.sessionID
	t.sender = t.person(sender, senderOther, true)
	t.senderKey = t.sender.key()
	if !sender.IsEmpty() {
		address := t.sender.address()
		t.item.Sender = &address
	}
	t.item.FromMe = t.sender.own
	chat = plain(chat)
	switch chat.Server {
	case types.GroupServer:
		t.item.Chat.Group, t.item.Class = chat.String(), delivery.ClassGroups
	case types.BroadcastServer:
		t.item.Chat.Broadcast, t.item.Class = chat.String(), delivery.ClassBroadcasts
		if chat == types.StatusBroadcastJID {
			t.item.Class = delivery.ClassStatus
		}
	case types.NewsletterServer:
		t.item.Chat.Channel, t.item.Class = chat.String(), delivery.ClassChannels
		t.item.Sender = nil // nobody but the channel itself
	default:
		other := recipientOther
		if chat == plain(sender) {
			other = senderOther
		}
		p := t.person(chat, other, true)
		t.chatKey, t.item.Chat.Address = p.key(), p.address()
		return
	}
	t.chatKey = chat.String()
}

// person is an account, as far as its addresses are known.
type person struct {
	lid, pn types.JID
	// neither is an address of another kind.
	neither types.JID
	own     bool
}

// person finds the addresses of an account. Those that a key needs are looked up in any case.
func (t *translation) person(jid, other types.JID, needed bool) person {
	jid, other = plain(jid), plain(other)
	var p person
	for _, j := range []types.JID{jid, other} {
		switch {
		case j.User == "":
		case j.Server == types.HiddenUserServer:
			p.lid = j
		case j.Server == types.DefaultUserServer:
			p.pn = j
		case j == jid:
			p.neither = j
		}
	}
	if self := t.self(); p.pn.User != "" && p.pn == self.pn || p.lid.User != "" && p.lid == self.lid {
		return self
	}
	if p.lid.IsEmpty() == p.pn.IsEmpty() {
		return p
	}
	if !needed {
		if t.lookups++; t.lookups > maxLookups {
			return p
		}
	}
	var err error
	if p.lid.IsEmpty() {
		p.lid, err = t.lids.GetLIDForPN(t.ctx, p.pn)
		p.lid = plain(p.lid)
	} else {
		p.pn, err = t.lids.GetPNForLID(t.ctx, p.lid)
		p.pn = plain(p.pn)
	}
	if err != nil {
		t.fail(fmt.Errorf("looking up an address in the LID map: %w", briefError{err}))
	}
	return p
}

// self is the session's own account.
func (t *translation) self() person {
	pn, lid := t.own()
	return person{lid: plain(lid), pn: plain(pn), own: true}
}

// plain is an address without its device, and with the server that all accounts of its kind have.
func plain(jid types.JID) types.JID {
	switch jid = jid.ToNonAD(); jid.Server {
	case types.HostedServer, types.LegacyUserServer:
		jid.Server = types.DefaultUserServer
	case types.HostedLIDServer:
		jid.Server = types.HiddenUserServer
	}
	return jid
}

// key is the address in keys: the LID where it is known.
func (p person) key() string {
	for _, jid := range []types.JID{p.lid, p.pn, p.neither} {
		if !jid.IsEmpty() {
			return jid.String()
		}
	}
	return ""
}

func (p person) address() delivery.Address {
	var a delivery.Address
	if !p.lid.IsEmpty() {
		a.LID = p.lid.String()
	}
	if !p.pn.IsEmpty() {
		if a.Phone = status.PhoneNumber(p.pn.String()); a.Phone == "" {
			a.Other = p.pn.String() // not a number, for example WhatsApp's own account 0
		}
	}
	if !p.neither.IsEmpty() {
		a.Other = p.neither.String()
	}
	return a
}

// people are the addresses of a list, without those that are no accounts.
func (t *translation) people(jids []types.JID) []delivery.Address {
	var list []delivery.Address
	for _, jid := range jids {
		if address := t.person(jid, types.JID{}, false).address(); address != (delivery.Address{}) {
			list = append(list, address)
		}
	}
	return list
}

// target fills in the message that this one is about. The key names it as the sender of this
// message sees it.
func (t *translation) target(key *waCommon.MessageKey) {
	if key.GetID() == "" {
		t.targetBy("", nil)
		return
	}
	t.targetBy(t.author(key), key)
}

// ownTarget is target for what only the author of a message may do: whatever the key says,
// nobody changes the message of somebody else.
func (t *translation) ownTarget(key *waCommon.MessageKey) { t.targetBy(t.senderKey, key) }

// targetBy fills in the message with a key that has that author. It replaces what an inner
// message has filled in: without an id there is no target.
func (t *translation) targetBy(author string, key *waCommon.MessageKey) {
	t.item.TargetID, t.item.TargetKey = key.GetID(), ""
	if key.GetID() != "" {
		t.item.TargetKey = delivery.MessageKey(t.sessionID, t.chatKey, author, key.GetID())
	}
}

// author is the address in keys of who wrote the message with that key.
func (t *translation) author(key *waCommon.MessageKey) string {
	if key.GetFromMe() {
		return t.senderKey
	}
	if t.item.Class != "" {
		if participant, err := types.ParseJID(key.GetParticipant()); err == nil && participant.User != "" {
			return t.person(participant, types.JID{}, true).key()
		}
		return t.senderKey
	}
	if t.item.FromMe { // of the two in this chat it is the other one
		return t.chatKey
	}
	return t.self().key()
}

// unsupported makes the item one of a kind that has no type.
func (t *translation) unsupported(kind string, raw []byte) {
	t.item.Type = delivery.TypeUnsupported
	t.item.Unsupported = &delivery.Unsupported{Kind: kind, Protobuf: raw}
}

// unsupportedMessage is unsupported with the message.
func (t *translation) unsupportedMessage(kind string, m *waE2E.Message) {
	var raw []byte
	if !t.quoted {
		raw = withoutKeys(proto.Clone(m).(*waE2E.Message))
	}
	t.unsupported(kind, raw)
}

// secretError is called when something could not be decrypted with the secret of another
// message. It is undecryptable if the secret is missing, for example because that message came
// before this device was linked.
func (t *translation) secretError(err error) {
	if t.ctx.Err() != nil || errors.Is(err, context.Canceled) {
		t.fail(fmt.Errorf("reading the secret of a message: %w", briefError{err}))
	}
	t.item.Type = delivery.TypeUndecryptable
}

// receiptStatus are the receipts that say something about what the account has sent.
var receiptStatus = map[types.ReceiptType]string{
	types.ReceiptTypeDelivered: delivery.ReceiptDelivered,
	types.ReceiptTypeInactive:  delivery.ReceiptDelivered, // to a device that is not in use
	types.ReceiptTypeRead:      delivery.ReceiptRead,
	types.ReceiptTypePlayed:    delivery.ReceiptPlayed,
}

// receipts translates a receipt of somebody else. A long list becomes several items.
func (t *translation) receipts(e *events.Receipt) ([]delivery.MessageItem, error) {
	name := receiptStatus[e.Type]
	if name == "" || e.IsFromMe {
		return nil, nil
	}
	if t.place(e.Chat, e.Sender, e.SenderAlt, e.RecipientAlt); t.item.FromMe {
		return nil, t.err
	}
	t.at(e.Timestamp)
	t.item.Type = delivery.TypeReceipt
	own := t.self().key()
	var items []delivery.MessageItem
	for ids := e.MessageIDs; len(ids) > 0; {
		n := min(len(ids), delivery.MaxReceiptTargets)
		item := t.item
		item.Key = t.key(append([]string{"receipt", name}, ids[:n]...)...)
		item.Receipt = &delivery.Receipt{Status: name}
		for _, id := range ids[:n] {
			item.Receipt.Messages = append(item.Receipt.Messages, delivery.ReceiptTarget{
				ID: id, Key: delivery.MessageKey(t.sessionID, t.chatKey, own, id),
			})
		}
		items, ids = append(items, item), ids[n:]
	}
	return items, t.err
}

// call translates the end of a call that another account has made.
func (t *translation) call(call *types.BasicCallMeta, reason string) {
	if reason == "accepted_elsewhere" {
		return
	}
	caller := call.CallCreator
	if caller.IsEmpty() {
		caller = call.From
	}
	chat := call.GroupJID
	if chat.IsEmpty() {
		chat = caller
	}
	t.place(chat, caller, call.CallCreatorAlt, types.JID{})
	if t.item.FromMe {
		return
	}
	t.item.ID, t.item.Key = call.CallID, t.key("call", call.CallID)
	t.at(call.Timestamp)
	t.item.Type = delivery.TypeCall
	t.item.Call = &delivery.Call{Outcome: delivery.CallMissed, Reason: reason}
	if strings.HasPrefix(reason, "rejected") {
		t.item.Call.Outcome = delivery.CallRejected
	}
}

// inGroup fills in the place of a change of a group, and who made it if that is known.
func (t *translation) inGroup(group types.JID, by, byPN *types.JID, when time.Time) {
	var sender, other types.JID
	if by != nil {
		sender = *by
	}
	if byPN != nil {
		other = *byPN
	}
	t.place(group, sender, other, types.JID{})
	t.at(when)
}

// change fills in a change of a group. Its key depends on what WhatsApp says, and not on what
// the LID map knows of it.
func (t *translation) change(c *delivery.GroupChange, identity any) {
	text, err := json.Marshal(identity)
	if err != nil {
		t.fail(fmt.Errorf("encoding the identity of a group's change: %w", err))
	}
	t.item.Key = t.key("group", string(text))
	t.item.Type, t.item.GroupChange = delivery.TypeGroupChange, c
}

func (t *translation) groupChange(e *events.GroupInfo) {
	t.inGroup(e.JID, e.Sender, e.SenderPN, e.Timestamp)
	var c delivery.GroupChange
	if e.Name != nil {
		c.Subject = &e.Name.Name
	}
	if e.Topic != nil {
		c.Description = &e.Topic.Topic
	}
	if e.Locked != nil {
		c.Locked = &e.Locked.IsLocked
	}
	if e.Announce != nil {
		c.Announce = &e.Announce.IsAnnounce
	}
	if e.MembershipApprovalMode != nil {
		c.Approval = &e.MembershipApprovalMode.IsJoinApprovalRequired
	}
	if e.Delete != nil {
		c.Deleted = e.Delete.Deleted
	}
	if e.Suspended || e.Unsuspended {
		c.Suspended = &e.Suspended
	}
	if e.NewInviteLink != nil {
		c.InviteLink = *e.NewInviteLink
	}
	if e.Link != nil {
		c.Linked = e.Link.Group.JID.String()
	}
	if e.Unlink != nil {
		c.Unlinked = e.Unlink.Group.JID.String()
	}
	identity := []any{e.Timestamp.Unix(), e.ParticipantVersionID, c, e.Join, e.Leave, e.Promote, e.Demote}
	c.Added, c.Removed, c.Promoted, c.Demoted = t.people(e.Join), t.people(e.Leave), t.people(e.Promote), t.people(e.Demote)
	known, err := json.Marshal(c)
	if err != nil {
		t.fail(fmt.Errorf("encoding a group's change: %w", err))
	}
	switch {
	case string(known) != "{}":
		t.change(&c, identity)
	case len(e.UnknownChanges) > 0:
		var tags []string
		identity := []string{"group", strconv.FormatInt(e.Timestamp.Unix(), 10)}
		for _, node := range e.UnknownChanges {
			tags, identity = append(tags, node.Tag), append(identity, node.String()) // two of one kind may come in the same second
		}
		kind := "group " + strings.Join(tags, " ")
		t.item.Key = t.key(identity...)
		t.unsupported(kind, nil)
	}
	// What remains is the time after which messages disappear, which is not forwarded.
}

func (t *translation) joinedGroup(e *events.JoinedGroup) {
	t.inGroup(e.JID, e.Sender, e.SenderPN, time.Time{})
	c := delivery.GroupChange{
		Joined: true, Subject: &e.Name, Locked: &e.IsLocked, Announce: &e.IsAnnounce, Approval: &e.IsJoinApprovalRequired,
	}
	if e.Topic != "" {
		c.Description = &e.Topic
	}
	for _, member := range e.Participants {
		other := member.PhoneNumber
		if plain(member.JID).Server == types.DefaultUserServer {
			other = member.LID
		}
		if address := t.person(member.JID, other, false).address(); address != (delivery.Address{}) {
			c.Members = append(c.Members, address)
		}
	}
	t.change(&c, []any{"joined", e.Type, e.Reason, e.CreateKey, e.ParticipantVersionID, e.GroupCreated.Unix()})
}

// picture translates the change of a group's picture.
func (t *translation) picture(e *events.Picture) {
	t.inGroup(e.JID, &e.Author, nil, e.Timestamp)
	c := delivery.GroupChange{Picture: delivery.PictureChanged}
	if e.Remove {
		c.Picture = delivery.PictureRemoved
	}
	t.change(&c, []any{"picture", e.Timestamp.Unix(), e.PictureID, e.Remove})
}

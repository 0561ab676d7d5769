package whatsapp

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/libsignal/ecc"
	"go.mau.fi/libsignal/signalerror"
	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"go.mau.fi/whatsmeow/util/keys"
	"google.golang.org/protobuf/proto"
)

// whatsmeow acknowledges a message that it cannot decrypt, or while it panics, before anybody
// hears of it, drops what it cannot parse, and lets all later messages wait for up to 75 s while
// it asks the own phone for one. So the connector handles messages itself: it decrypts them with
// whatsmeow's functions, hands them over, and only then acknowledges them. See message.go of
// whatsmeow, handleEncryptedMessage and decryptMessages.

const (
	// maxRetryReceipts is how often the sender of a message is asked to encrypt it again, as in
	// whatsmeow's retry.go.
	maxRetryReceipts = 4
	// maxRetryCounts bounds the messages of a connection whose retry receipts are counted.
	maxRetryCounts = 1024
	// protobufVersion is the version of the encrypted parts whose content is a waE2E.Message.
	protobufVersion = 2
)

// The kinds of encrypted parts.
const (
	partPreKey    = "pkmsg"
	partDirect    = "msg"
	partSenderKey = "skmsg"
	partSecret    = "msmsg" // of a bot: encrypted with the secret of the message that it answers
)

// errUnknownPart: an encrypted part is of a kind that this version of the client does not know.
var errUnknownPart = errors.New("an encrypted part of an unknown kind")

// unreadable is a message that was decrypted, but that this version of the client cannot read.
type unreadable struct {
	info types.MessageInfo
	// raw is what was decrypted.
	raw []byte
}

// handleMessage decrypts a message, hands it over and acknowledges it.
func (c *Connection) handleMessage(node *waBinary.Node) {
	internals := c.internals()
	info, err := internals.ParseMessageInfo(node)
	if err != nil {
		c.handleUnparsed(node, err)
		return
	}
	c.learn(info)
	children := node.GetChildren()
	switch unavailable, found := node.GetOptionalChildByTag("unavailable"); {
	case info.Sender.Server == types.NewsletterServer:
		c.handlePlaintext(info, node)
	case found && len(node.GetChildrenByTag("enc")) == 0:
		c.handleUnavailable(info, node, events.UnavailableType(unavailable.AttrGetter().OptionalString("type")))
	default:
		c.decrypt(info, node, children)
	}
}

// handleUnparsed handles a message of which an attribute is missing or cannot be read. If its id
// and its chat can be read, Laravel gets those: WhatsApp does not deliver it again.
func (c *Connection) handleUnparsed(node *waBinary.Node, reason error) {
	c.options.Log().Info("Received a message whose sender, id or time cannot be read", "reason", briefError{reason}.Error())
	info := c.nodeInfo(node)
	if info.ID != "" && !info.Chat.IsEmpty() && !c.accept(&unreadable{info: *info}) {
		return
	}
	c.internals().SendAck(c.ctx, node, whatsmeow.NackParsingError)
}

// learn stores what the attributes of a message say about its sender.
func (c *Connection) learn(info *types.MessageInfo) {
	internals := c.internals()
	if !info.SenderAlt.IsEmpty() {
		c.client.StoreLIDPNMapping(c.ctx, info.SenderAlt, info.Sender)
	} else if !info.RecipientAlt.IsEmpty() {
		c.client.StoreLIDPNMapping(c.ctx, info.RecipientAlt, info.Chat)
	}
	known := *info // the goroutines below must not read what decrypt changes
	if name := info.VerifiedName; name != nil && len(name.Details.GetVerifiedName()) > 0 {
		go func() {
			defer c.recovered("the name of a business", false)
			internals.UpdateBusinessName(c.ctx, known.Sender, known.SenderAlt, &known, name.Details.GetVerifiedName())
		}()
	}
	if len(info.PushName) > 0 && info.PushName != "-" {
		go func() {
			defer c.recovered("the name of a contact", false)
			internals.UpdatePushName(c.ctx, known.Sender, known.SenderAlt, &known, known.PushName)
		}()
	}
}

// handleStatus handles a status, which only channels send without encryption.
func (c *Connection) handleStatus(node *waBinary.Node) {
	internals := c.internals()
	info, err := internals.ParseMessageInfo(node)
	switch {
	case err != nil:
		internals.SendAck(c.ctx, node, whatsmeow.NackParsingError)
	case info.Sender.Server != types.NewsletterServer:
		internals.SendAck(c.ctx, node, 0)
	default:
		info.IsNewsletterStatus = true
		c.handlePlaintext(info, node)
	}
}

// handlePlaintext hands over a message of a channel.
func (c *Connection) handlePlaintext(info *types.MessageInfo, node *waBinary.Node) {
	plaintext, found := node.GetOptionalChildByTag("plaintext")
	if found { // otherwise it counts views or reactions
		body, _ := plaintext.Content.([]byte)
		c.guarded(info, body, func() {
			if proto.Unmarshal(body, &waE2E.Message{}) != nil {
				c.accept(&unreadable{info: *info, raw: body})
				return
			}
			c.internals().HandlePlaintextMessage(c.ctx, info, node)
		})
	}
	c.acknowledge(node)
}

// acknowledge acknowledges a node unless the connection has refused something or has ended.
func (c *Connection) acknowledge(node *waBinary.Node) {
	if c.ctx.Err() == nil {
		c.internals().SendAck(c.ctx, node, 0)
	}
}

// handleUnavailable handles that the sender has not encrypted a message for this device. Only
// the own phone can send it, and only when it is asked. It is not asked while too many tasks run:
// a stranger who sends many such messages must not make the others wait.
func (c *Connection) handleUnavailable(info *types.MessageInfo, node *waBinary.Node, kind events.UnavailableType) {
	if !c.accept(&events.UndecryptableMessage{Info: *info, IsUnavailable: true, UnavailableType: kind}) {
		return
	}
	if !c.tryTask(askingPhone, false, func() {
		c.askPhone(info)
		c.acknowledge(node)
	}) {
		c.acknowledge(node)
	}
}

// decrypt decrypts the parts of a message. In a group there are two if the device does not have
// the sender's key yet: the first holds that key only.
func (c *Connection) decrypt(info *types.MessageInfo, node *waBinary.Node, children []waBinary.Node) {
	address := c.encryptionAddress(info)
	parts, known, direct, malformed := 0, 0, false, false
	for i := range children {
		part := &children[i]
		kind, _ := part.Attrs["type"].(string)
		if part.Tag != "enc" || kind == "" {
			continue
		}
		parts++
		plaintext, hash, err := c.decryptPart(info, part, kind, address)
		switch {
		case errors.Is(err, errUnknownPart):
			continue
		case kind == partPreKey || kind == partDirect:
			direct = true
		}
		known++
		switch {
		case c.ctx.Err() != nil, errors.Is(err, context.Canceled):
			return
		case errors.Is(err, whatsmeow.ErrEventAlreadyProcessed):
			continue
		case err != nil:
			unavailable := kind == partSenderKey && !direct && errors.Is(err, signalerror.ErrNoSenderKeyForUser)
			c.onUndecryptable(info, node, kind, unavailable, events.DecryptFailMode(part.AttrGetter().OptionalString("decrypt-fail")))
			return
		}
		malformed = !c.read(info, part, plaintext)
		if c.ctx.Err() != nil {
			return
		}
		if hash != nil {
			// A store that fails ends the connection: the message comes again, and is found in the buffer.
			_ = c.options.Device.EventBuffer.ClearBufferedEventPlaintext(c.ctx, *hash)
		}
	}
	if known == 0 && !c.accept(&events.UndecryptableMessage{Info: *info}) {
		return
	}
	switch internals := c.internals(); {
	case c.ctx.Err() != nil:
	case parts == 0:
		internals.SendAck(c.ctx, node, whatsmeow.NackUnrecognizedStanza)
	case malformed:
		internals.SendAck(c.ctx, node, whatsmeow.NackInvalidProtobuf)
	default:
		internals.SendMessageReceipt(c.ctx, info, node)
	}
}

// encryptionAddress is the address under which the sender's keys are stored: the LID, if it is known.
func (c *Connection) encryptionAddress(info *types.MessageInfo) types.JID {
	if info.Sender.Server != types.DefaultUserServer || info.Sender.IsBot() {
		return info.Sender
	}
	lid := info.SenderAlt
	if lid.Server != types.HiddenUserServer {
		var err error
		if lid, err = c.options.Device.LIDs.GetLIDForPN(c.ctx, info.Sender); err != nil || lid.IsEmpty() {
			return info.Sender // an error has ended the connection
		}
		info.SenderAlt = lid
	}
	c.internals().MigrateSessionStore(c.ctx, info.Sender, lid)
	return lid
}

// decryptPart decrypts a part, or finds it in the buffer of what was decrypted and not accepted.
// hash names it in that buffer; nil: it is not there.
func (c *Connection) decryptPart(info *types.MessageInfo, part *waBinary.Node, kind string, address types.JID) (plaintext []byte, hash *[sha256.Size]byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			c.panicked(r, "the decryption of a message", false)
			plaintext, hash, err = nil, nil, fmt.Errorf("a panic while decrypting a message: %v", r)
		}
	}()
	internals := c.internals()
	switch {
	case kind == partPreKey || kind == partDirect:
		plaintext, hash, err = internals.DecryptDM(c.ctx, part, address, kind == partPreKey, info.Timestamp)
	case kind == partSenderKey && info.IsGroup:
		plaintext, hash, err = internals.DecryptGroupMsg(c.ctx, part, address, info.Chat, info.Timestamp)
	case kind == partSecret && info.Sender.IsBot():
		plaintext, err = c.decryptBot(info, part)
	default:
		return nil, nil, errUnknownPart
	}
	if !errors.Is(err, signalerror.ErrOldCounter) {
		return plaintext, hash, err
	}
	// It was decrypted before. It is in the buffer under the address that the sender had then: the
	// number, if the LID was learned since.
	for _, other := range c.otherAddresses(info, address) {
		hash := bufferHash(part, kind, info.Chat, other)
		buffered, readErr := c.options.Device.EventBuffer.GetBufferedEvent(c.ctx, hash)
		switch {
		case readErr != nil:
			return nil, nil, readErr
		case buffered == nil:
		case buffered.Plaintext == nil:
			return nil, nil, whatsmeow.ErrEventAlreadyProcessed
		default:
			plaintext, err = unpad(buffered.Plaintext, part)
			return plaintext, &hash, err
		}
	}
	return nil, nil, err // nobody has it: the sender must encrypt it again
}

// otherAddresses are the addresses under which a message may have been decrypted before.
func (c *Connection) otherAddresses(info *types.MessageInfo, address types.JID) (others []types.JID) {
	candidates := []types.JID{info.Sender, info.SenderAlt}
	if info.Sender.Server == types.HiddenUserServer {
		number, err := c.options.Device.LIDs.GetPNForLID(c.ctx, info.Sender)
		if err == nil {
			candidates = append(candidates, number)
		}
	}
	for _, other := range candidates {
		if !other.IsEmpty() && other != address {
			others = append(others, other)
		}
	}
	return others
}

// bufferHash names a decrypted part in the buffer, as whatsmeow's message.go does
// (bufferedDecrypt, decryptDM, decryptGroupMsg).
func bufferHash(part *waBinary.Node, kind string, chat, sender types.JID) [sha256.Size]byte {
	content, _ := part.Content.([]byte)
	names := map[string][]string{partPreKey: {"prekey"}, partDirect: {"normal"}, partSenderKey: {"senderkey", chat.String()}}[kind]
	hasher := sha256.New()
	hasher.Write(content)
	for _, name := range append(names, sender.String()) {
		hasher.Write(append([]byte{0}, name...))
	}
	hasher.Write([]byte{0, 0})
	return [sha256.Size]byte(hasher.Sum(nil))
}

// unpad removes the padding, as whatsmeow's message.go does (unpadMessage).
func unpad(plaintext []byte, part *waBinary.Node) ([]byte, error) {
	if part.AttrGetter().OptionalInt("v") == 3 {
		return plaintext, nil
	}
	if len(plaintext) == 0 || int(plaintext[len(plaintext)-1]) > len(plaintext) {
		return nil, errors.New("a message without its padding")
	}
	return plaintext[:len(plaintext)-int(plaintext[len(plaintext)-1])], nil
}

// decryptBot decrypts the answer of a bot, as whatsmeow's decryptMessages does.
func (c *Connection) decryptBot(info *types.MessageInfo, part *waBinary.Node) ([]byte, error) {
	target := info.MsgMetaInfo.TargetSender
	switch {
	case target.User != "":
	case info.Sender.Server == types.BotServer:
		target = c.options.Device.GetLID()
	default:
		target = c.options.Device.GetJID()
	}
	secret, _, err := c.options.Device.MsgSecrets.GetMessageSecret(c.ctx, info.Chat, target, info.MsgMetaInfo.TargetID)
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the secret of a message: %w", err)
	case secret == nil:
		return nil, errors.New("the secret of the message that a bot answers is not known")
	}
	content, _ := part.Content.([]byte)
	var encrypted waE2E.MessageSecretMessage
	if err := proto.Unmarshal(content, &encrypted); err != nil {
		return nil, fmt.Errorf("reading the answer of a bot: %w", err)
	}
	id := info.ID
	if edit := info.MsgBotInfo; (edit.EditType == types.EditTypeInner || edit.EditType == types.EditTypeLast) && edit.EditTargetID != "" {
		id = edit.EditTargetID
	}
	plaintext, err := c.internals().DecryptBotMessage(c.ctx, secret, &encrypted, id, target, info)
	if err != nil && id != info.ID {
		plaintext, err = c.internals().DecryptBotMessage(c.ctx, secret, &encrypted, info.ID, target, info)
	}
	return plaintext, err
}

// read hands over a decrypted part. false: it is malformed, and was handed over as it is.
func (c *Connection) read(info *types.MessageInfo, part *waBinary.Node, plaintext []byte) (wellFormed bool) {
	wellFormed = true
	c.guarded(info, plaintext, func() {
		attributes := part.AttrGetter()
		var message waE2E.Message
		switch {
		case attributes.OptionalInt("v") != protobufVersion:
			c.accept(&unreadable{info: *info, raw: plaintext})
		case proto.Unmarshal(plaintext, &message) != nil:
			wellFormed = false
			c.accept(&unreadable{info: *info, raw: plaintext})
		default:
			c.internals().HandleDecryptedMessage(c.ctx, info, &message, attributes.OptionalInt("count"))
		}
	})
	return wellFormed
}

// guarded calls f, which hands a message over. If whatsmeow panics, the message is handed over
// as it is.
func (c *Connection) guarded(info *types.MessageInfo, raw []byte, f func()) {
	before := c.handedOver
	defer func() {
		if r := recover(); r != nil {
			c.panicked(r, "a message", false)
			if c.handedOver == before {
				c.accept(&unreadable{info: *info, raw: raw})
			}
		}
	}()
	f()
}

// onUndecryptable hands over that a message cannot be decrypted, asks the sender to encrypt it
// again, and acknowledges what has come. The own phone is asked beside the queue: the next
// messages do not wait for it, and the real message gets its place when it comes. It is not asked
// while too many tasks run.
func (c *Connection) onUndecryptable(info *types.MessageInfo, node *waBinary.Node, kind string, unavailable bool, hide events.DecryptFailMode) {
	if !c.accept(&events.UndecryptableMessage{Info: *info, IsUnavailable: unavailable, DecryptFailMode: hide}) {
		return
	}
	if kind == partSecret { // its key is not the sender's
		c.internals().SendAck(c.ctx, node, whatsmeow.NackMissingMessageSecret)
		return
	}
	first := c.sendRetryReceipt(info, node, unavailable)
	c.acknowledge(node)
	if first && info.Category != categoryPeer {
		c.tryTask(askingPhone, false, func() { c.askPhone(info) })
	}
}

// askingPhone names the task of askPhone.
const askingPhone = "a request to the own phone"

// askPhone asks the own phone for a message, without waiting until WhatsApp has confirmed the
// request: the answer is a message.
func (c *Connection) askPhone(info *types.MessageInfo) {
	request := c.client.BuildUnavailableMessageRequest(info.Chat, info.Sender, info.ID)
	id := c.client.GenerateMessageID()
	c.asking.Store(&id)
	_, err := c.client.SendMessage(c.ctx, c.options.Device.GetJID().ToNonAD(), request, whatsmeow.SendRequestExtra{ID: id, Peer: true, Timeout: time.Nanosecond})
	if err != nil && !errors.Is(err, whatsmeow.ErrMessageTimedOut) && c.ctx.Err() == nil {
		c.options.Log().Info("Failed to ask the own phone for a message", "reason", briefError{err}.Error())
	}
}

// sendRetryReceipt asks the sender of a message to encrypt it again, as whatsmeow's
// sendRetryReceipt does without asking the own phone. first: it was not asked before.
func (c *Connection) sendRetryReceipt(info *types.MessageInfo, node *waBinary.Node, withKeys bool) (first bool) {
	count := c.countRetry(info.ID, node.GetChildren())
	if count > maxRetryReceipts {
		return false
	}
	device := c.options.Device
	attributes := waBinary.Attrs{"id": info.ID, "to": node.Attrs["from"], "type": string(types.ReceiptTypeRetry)}
	for _, name := range []string{"recipient", "participant"} {
		if value, found := node.Attrs[name]; found {
			attributes[name] = value
		}
	}
	if info.Type == "peer_msg" && info.IsFromMe {
		attributes["category"] = categoryPeer
	}
	content := []waBinary.Node{
		{Tag: "retry", Attrs: waBinary.Attrs{"count": count, "id": info.ID, "t": node.Attrs["t"], "v": 1}},
		{Tag: "registration", Content: binary.BigEndian.AppendUint32(nil, device.RegistrationID)},
	}
	if count > 1 || withKeys {
		keys, err := c.ownKeys()
		if err != nil {
			c.options.Log().Info("Failed to ask for a message with new keys, asking without them", "reason", briefError{err}.Error())
		} else {
			content = append(content, keys)
		}
	}
	if err := c.internals().SendNode(c.ctx, waBinary.Node{Tag: "receipt", Attrs: attributes, Content: content}); err != nil && c.ctx.Err() == nil {
		c.options.Log().Info("Failed to ask the sender for a message", "reason", briefError{err}.Error())
	}
	return count == 1
}

// countRetry counts the retry receipts of a message. After a restart the number in the message,
// which its sender has encrypted again, continues the count.
func (c *Connection) countRetry(id types.MessageID, children []waBinary.Node) int {
	if len(c.retries) >= maxRetryCounts {
		clear(c.retries) // a message is asked for a few times more
	}
	if c.retries == nil {
		c.retries = map[types.MessageID]int{}
	}
	count := c.retries[id] + 1
	if count == 1 && len(children) == 1 && children[0].Tag == "enc" {
		count += max(0, children[0].AttrGetter().OptionalInt("count"))
	}
	c.retries[id] = count
	return count
}

// ownKeys are keys with which the sender of a message can begin a new session.
func (c *Connection) ownKeys() (waBinary.Node, error) {
	device := c.options.Device
	key, err := device.PreKeys.GenOnePreKey(c.ctx)
	if err != nil {
		return waBinary.Node{}, err
	}
	account, err := proto.Marshal(device.Account)
	if err != nil {
		return waBinary.Node{}, err
	}
	return waBinary.Node{Tag: "keys", Content: []waBinary.Node{
		{Tag: "type", Content: []byte{ecc.DjbType}},
		{Tag: "identity", Content: device.IdentityKey.Pub[:]},
		preKeyNode(key),
		preKeyNode(device.SignedPreKey),
		{Tag: "device-identity", Content: account},
	}}, nil
}

// preKeyNode is a key as WhatsApp reads it (whatsmeow's prekeys.go, preKeyToNode).
func preKeyNode(key *keys.PreKey) waBinary.Node {
	content := []waBinary.Node{
		{Tag: "id", Content: binary.BigEndian.AppendUint32(nil, key.KeyID)[1:]},
		{Tag: "value", Content: key.Pub[:]},
	}
	if key.Signature == nil {
		return waBinary.Node{Tag: "key", Content: content}
	}
	return waBinary.Node{Tag: "skey", Content: append(content, waBinary.Node{Tag: "signature", Content: key.Signature[:]})}
}

package store

import (
	"context"
	"slices"
	"strings"
	"time"

	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
)

// text turns a string from outside into one that PostgreSQL accepts: without NUL and
// invalid UTF-8. Otherwise PostgreSQL would refuse the write, which would end the
// connection, and WhatsApp would deliver the same string again.
func text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

func textJID(jid types.JID) types.JID {
	jid.User, jid.Server = text(jid.User), text(jid.Server)
	return jid
}

// some turns nil into empty bytes: columns that are NOT NULL refuse nil.
func some(b []byte) []byte { return append([]byte{}, b...) }

// cleaned is a device that accepts any text in names, addresses and message ids.
// internal/whatsapp cleans the attributes of nodes, which contain the addresses of keys;
// but names, addresses and message ids also come from encrypted contents, such as the
// phone's settings.
type cleaned struct{ *device }

func (c cleaned) PutAppStateSyncKey(ctx context.Context, id []byte, key store.AppStateSyncKey) error {
	key.Data, key.Fingerprint = some(key.Data), some(key.Fingerprint)
	return c.device.PutAppStateSyncKey(ctx, some(id), key)
}

func (c cleaned) PutPushName(ctx context.Context, user types.JID, name string) (changed bool, previous string, err error) {
	return c.device.PutPushName(ctx, textJID(user), text(name))
}

func (c cleaned) PutBusinessName(ctx context.Context, user types.JID, name string) (changed bool, previous string, err error) {
	return c.device.PutBusinessName(ctx, textJID(user), text(name))
}

func (c cleaned) PutContactName(ctx context.Context, user types.JID, firstName, fullName string) error {
	return c.device.PutContactName(ctx, textJID(user), text(firstName), text(fullName))
}

func (c cleaned) PutAllContactNames(ctx context.Context, contacts []store.ContactEntry) error {
	contacts = slices.Clone(contacts)
	for i, e := range contacts {
		contacts[i] = store.ContactEntry{JID: textJID(e.JID), FirstName: text(e.FirstName), FullName: text(e.FullName)}
	}
	return c.device.PutAllContactNames(ctx, contacts)
}

func (c cleaned) PutManyRedactedPhones(ctx context.Context, entries []store.RedactedPhoneEntry) error {
	entries = slices.Clone(entries)
	for i, e := range entries {
		entries[i] = store.RedactedPhoneEntry{JID: textJID(e.JID), RedactedPhone: text(e.RedactedPhone)}
	}
	return c.device.PutManyRedactedPhones(ctx, entries)
}

func (c cleaned) GetContact(ctx context.Context, user types.JID) (types.ContactInfo, error) {
	return c.device.GetContact(ctx, textJID(user))
}

func (c cleaned) PutMutedUntil(ctx context.Context, chat types.JID, mutedUntil time.Time) error {
	return c.device.PutMutedUntil(ctx, textJID(chat), mutedUntil)
}

func (c cleaned) PutPinned(ctx context.Context, chat types.JID, pinned bool) error {
	return c.device.PutPinned(ctx, textJID(chat), pinned)
}

func (c cleaned) PutArchived(ctx context.Context, chat types.JID, archived bool) error {
	return c.device.PutArchived(ctx, textJID(chat), archived)
}

func (c cleaned) GetChatSettings(ctx context.Context, chat types.JID) (types.LocalChatSettings, error) {
	return c.device.GetChatSettings(ctx, textJID(chat))
}

func (c cleaned) PutMessageSecrets(ctx context.Context, inserts []store.MessageSecretInsert) error {
	inserts = slices.Clone(inserts)
	for i, e := range inserts {
		inserts[i] = store.MessageSecretInsert{Chat: textJID(e.Chat), Sender: textJID(e.Sender), ID: text(e.ID), Secret: some(e.Secret)}
	}
	return c.device.PutMessageSecrets(ctx, inserts)
}

func (c cleaned) PutMessageSecret(ctx context.Context, chat, sender types.JID, id types.MessageID, secret []byte) error {
	return c.device.PutMessageSecret(ctx, textJID(chat), textJID(sender), text(id), some(secret))
}

func (c cleaned) GetMessageSecret(ctx context.Context, chat, sender types.JID, id types.MessageID) (secret []byte, realSender types.JID, err error) {
	return c.device.GetMessageSecret(ctx, textJID(chat), textJID(sender), text(id))
}

func (c cleaned) PutPrivacyTokens(ctx context.Context, tokens ...store.PrivacyToken) error {
	tokens = slices.Clone(tokens)
	for i := range tokens {
		tokens[i].User, tokens[i].Token = textJID(tokens[i].User), some(tokens[i].Token)
	}
	return c.device.PutPrivacyTokens(ctx, tokens...)
}

func (c cleaned) GetPrivacyToken(ctx context.Context, user types.JID) (*store.PrivacyToken, error) {
	return c.device.GetPrivacyToken(ctx, textJID(user))
}

func (c cleaned) PutNCTSalt(ctx context.Context, salt []byte) error {
	return c.device.PutNCTSalt(ctx, some(salt))
}

func (c cleaned) AddOutgoingEvent(ctx context.Context, chat types.JID, id types.MessageID, format string, plaintext []byte) error {
	return c.device.AddOutgoingEvent(ctx, textJID(chat), text(id), format, some(plaintext))
}

func (c cleaned) GetOutgoingEvent(ctx context.Context, chat, otherChat types.JID, id types.MessageID) (format string, plaintext []byte, err error) {
	return c.device.GetOutgoingEvent(ctx, textJID(chat), textJID(otherChat), text(id))
}

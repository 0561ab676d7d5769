package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
)

// The secret of a message decrypts what refers to it: edits, poll votes, comments. Phones send
// one with most messages. whatsmeow's table has no time, so nothing could ever be deleted from
// it: secrets are in a table of our own (upgrades/08-message-secrets.sql).

// keepSecrets is how long the secret of a message is kept. What refers to an older message
// cannot be decrypted any more.
const keepSecrets = 90 * 24 * time.Hour

func (f *device) PutMessageSecret(ctx context.Context, chat, sender types.JID, id types.MessageID, secret []byte) error {
	one := []store.MessageSecretInsert{{Chat: chat, Sender: sender, ID: id, Secret: secret}}
	if chat.IsEmpty() || sender.IsEmpty() || id == "" || len(secret) == 0 {
		return f.PutMessageSecrets(ctx, one)
	}
	return f.statement(ctx, `INSERT INTO whatsapp_operator_message_secret (our_jid, chat_jid, sender_jid, message_id, secret, stored_at)
		SELECT $4, $5, $6, $7, $8::bytea, $9::bigint FROM fence ON CONFLICT DO NOTHING`,
		func(ctx context.Context) error { return f.PutMessageSecrets(ctx, one) }, chat.ToNonAD(), sender.ToNonAD(), id, secret, f.store.now())
}

// PutMessageSecrets implements store.MsgSecretStore. As in whatsmeow's store the first secret
// of a message stays.
func (f *device) PutMessageSecrets(ctx context.Context, inserts []store.MessageSecretInsert) error {
	inserts = slices.DeleteFunc(slices.Clone(inserts), func(i store.MessageSecretInsert) bool {
		return i.Chat.IsEmpty() || i.Sender.IsEmpty() || i.ID == "" || len(i.Secret) == 0
	})
	if len(inserts) == 0 { // no statement
		return f.usable()
	}
	return f.write(ctx, func(ctx context.Context) error {
		for part := range slices.Chunk(inserts, slice) {
			args := []any{f.jid, f.store.now()}
			rows := make([]string, 0, len(part))
			for _, i := range part {
				n := len(args)
				args = append(args, i.Chat.ToNonAD(), i.Sender.ToNonAD(), i.ID, i.Secret)
				rows = append(rows, fmt.Sprintf("($1, $%d, $%d, $%d, $%d, $2)", n+1, n+2, n+3, n+4))
			}
			if err := f.store.exec(ctx, "INSERT INTO whatsapp_operator_message_secret (our_jid, chat_jid, sender_jid, message_id, secret, stored_at) VALUES "+
				strings.Join(rows, ", ")+" ON CONFLICT DO NOTHING", args...); err != nil {
				return fmt.Errorf("storing the secrets of messages: %w", err)
			}
		}
		return nil
	})
}

// findSecret finds the secret of a message by any address of its chat and of its sender: they
// may be the LID or the phone number from one message to the next. One statement reads both
// tables, because the janitor moves rows from one to the other.
const findSecret = `SELECT secret, sender_jid FROM (
		SELECT secret, chat_jid, sender_jid FROM whatsapp_operator_message_secret WHERE our_jid=$1 AND chat_jid IN ($2, $3) AND sender_jid IN ($4, $5) AND message_id=$6
		UNION ALL
		SELECT key, chat_jid, sender_jid FROM whatsmeow_message_secrets WHERE our_jid=$1 AND chat_jid IN ($2, $3) AND sender_jid IN ($4, $5) AND message_id=$6
	) AS found ORDER BY CASE WHEN sender_jid=$4 THEN 0 ELSE 1 END, CASE WHEN chat_jid=$2 THEN 0 ELSE 1 END LIMIT 1`

// GetMessageSecret implements store.MsgSecretStore: no secret is no error.
func (f *device) GetMessageSecret(ctx context.Context, chat, sender types.JID, id types.MessageID) ([]byte, types.JID, error) {
	type found struct {
		secret []byte
		sender types.JID
	}
	got, err := read(ctx, f, func(ctx context.Context) (got found, err error) {
		args := []any{f.jid}
		for _, address := range []types.JID{chat.ToNonAD(), sender.ToNonAD()} {
			other, err := f.otherAddress(ctx, address)
			if err != nil {
				return got, err
			}
			args = append(args, address, other)
		}
		err = f.store.db.QueryRow(ctx, findSecret, append(args, id)...).Scan(&got.secret, &got.sender)
		if errors.Is(err, sql.ErrNoRows) {
			return found{}, nil
		}
		return got, err
	})
	return got.secret, got.sender, err
}

// otherAddress is the LID of a phone number, or the phone number of a LID; the address itself
// if there is none.
func (f *device) otherAddress(ctx context.Context, address types.JID) (other types.JID, err error) {
	switch address.Server {
	case types.DefaultUserServer:
		other, err = f.store.lids.lidOf(ctx, f.opened, address)
	case types.HiddenUserServer:
		other, err = f.store.lids.pnOf(ctx, f.opened, address)
	}
	if other.IsEmpty() {
		other = address
	}
	return other, err
}

// CleanSecrets deletes the secrets of messages that were stored before that time, in slices,
// and returns their number. What an older release has stored in whatsmeow's table counts as
// stored now.
func (s *Store) CleanSecrets(ctx context.Context, before time.Time) (int64, error) {
	if err := s.moveSecrets(ctx); err != nil {
		return 0, fmt.Errorf("moving the secrets of messages: %w", err)
	}
	n, err := s.deleteSlices(ctx, "whatsapp_operator_message_secret", "stored_at", before)
	if err != nil {
		return n, fmt.Errorf("deleting old secrets of messages: %w", err)
	}
	return n, nil
}

// moveSecrets moves the rows of whatsmeow's table, in slices.
func (s *Store) moveSecrets(ctx context.Context) error {
	devices, err := s.strings(ctx, "SELECT jid FROM whatsmeow_device AS d WHERE EXISTS (SELECT 1 FROM whatsmeow_message_secrets WHERE our_jid=d.jid)")
	if err != nil {
		return err
	}
	for _, jid := range devices {
		for moved := int64(slice); moved > 0; {
			err := s.transaction(ctx, func(ctx context.Context) (err error) {
				moved, err = s.moveSlice(ctx, jid)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// moveSlice moves rows of one device, and returns how many.
func (s *Store) moveSlice(ctx context.Context, jid string) (moved int64, err error) {
	const (
		columns = "our_jid, chat_jid, sender_jid, message_id"
		insert  = "INSERT INTO whatsapp_operator_message_secret (" + columns + ", secret, stored_at) SELECT " + columns + ", key, CAST($2 AS BIGINT) FROM "
		nothing = " ON CONFLICT DO NOTHING"
	)
	some := fmt.Sprintf(" FROM whatsmeow_message_secrets WHERE our_jid=$1 ORDER BY %s LIMIT %d", columns, slice)
	if s.postgres != nil {
		// The device first, as where it is marked or deleted: otherwise both could deadlock.
		if found, err := s.strings(ctx, "SELECT jid FROM whatsmeow_device WHERE jid=$1 FOR KEY SHARE", jid); err != nil || len(found) == 0 {
			return 0, err
		}
		// One statement: a worker of an older release may insert another row at any moment.
		err = s.db.QueryRow(ctx, "WITH moved AS (DELETE FROM whatsmeow_message_secrets WHERE ctid = ANY (ARRAY(SELECT ctid"+some+")) RETURNING "+columns+", key), stored AS ("+
			insert+"moved"+nothing+") SELECT COUNT(*) FROM moved", jid, s.now()).Scan(&moved)
		return moved, err
	}
	chosen := "whatsmeow_message_secrets WHERE rowid IN (SELECT rowid" + some + ")"
	if _, err = s.db.Exec(ctx, insert+chosen+nothing, jid, s.now()); err != nil {
		return 0, err
	}
	result, err := s.db.Exec(ctx, "DELETE FROM "+chosen, jid)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

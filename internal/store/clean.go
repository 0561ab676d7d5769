package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.mau.fi/util/dbutil"
)

const (
	// KeepMarked is how long a device that WhatsApp has logged out is kept.
	KeepMarked = 30 * 24 * time.Hour
	// KeepOrphans is how long keys without a resource are kept.
	KeepOrphans = 30 * 24 * time.Hour
	// keepEvents is how long the hash of a message is kept that was accepted. If it comes once more
	// after that, it is told once more, under its key (whatsmeow, DeleteOldBufferedHashes).
	keepEvents = 14 * 24 * time.Hour
	// keepRefused is how long a message is kept that was decrypted, but not accepted: longer than
	// the 30 days for which WhatsApp says that it keeps it, because it cannot be decrypted again.
	keepRefused = 31 * 24 * time.Hour
	// slice bounds one transaction of the clean-up, in rows.
	slice = 500
)

// Why a device was marked.
const (
	markedLogout   = "LoggedOut"
	markedReplaced = "Replaced"
)

// mark keeps a device's rows under another name, so that a device with the same
// JID can be linked, and takes the device from the session that has it. The
// foreign keys update the other tables.
func (s *Store) mark(ctx context.Context, jid, reason string) error {
	var random [8]byte
	if _, err := rand.Read(random[:]); err != nil {
		return err
	}
	user, _, _ := strings.Cut(jid, "@")
	// Still a JID, because whatsmeow parses the column.
	marked := user + "@marked." + hex.EncodeToString(random[:])
	for _, statement := range []struct {
		query string
		args  []any
	}{
		{"UPDATE whatsmeow_device SET jid=$2 WHERE jid=$1", []any{jid, marked}},
		// This table of whatsmeow alone has no foreign key.
		{"UPDATE whatsmeow_privacy_tokens SET our_jid=$2 WHERE our_jid=$1", []any{jid, marked}},
		// The foreign key has updated the session's row.
		{`INSERT INTO whatsapp_operator_marked_device (marked_jid, jid, session_id, reason, marked_at)
			VALUES ($1, $2, (SELECT session_id FROM whatsapp_operator_session WHERE jid=$1), $3, $4)`, []any{marked, jid, reason, s.now()}},
		{"UPDATE whatsapp_operator_session SET jid=NULL, updated_at=$2 WHERE jid=$1", []any{marked, s.now()}},
	} {
		if _, err := s.db.Exec(ctx, statement.query, statement.args...); err != nil {
			return fmt.Errorf("marking a device: %w", err)
		}
	}
	return nil
}

// lockHolder waits for the writes of the session that has the device, and prevents
// new ones until the transaction ends. Renaming a device locks the device's row
// first and the session's row second; a write in flight has locked the session's
// row and then locks the device's row. Without lockHolder they could deadlock.
func (s *Store) lockHolder(ctx context.Context, jid string) error {
	if s.postgres == nil {
		return nil
	}
	_, err := s.strings(ctx, "SELECT uid FROM whatsapp_operator_session WHERE jid=$1 FOR UPDATE", jid)
	return err
}

// DeleteSession permanently deletes the record and the keys of a session, including
// those of its marked devices, even if a process has taken the session: the caller
// must know that no worker holds it. A session without a record is a success.
func (s *Store) DeleteSession(ctx context.Context, uid string) error {
	err := s.transaction(ctx, func(ctx context.Context) error { return s.deleteSession(ctx, uid) })
	if err != nil {
		return fmt.Errorf("deleting a session's keys: %w", err)
	}
	return nil
}

func (s *Store) deleteSession(ctx context.Context, uid string) error {
	devices, err := s.strings(ctx, `SELECT jid FROM whatsapp_operator_session WHERE uid=$1 AND jid IS NOT NULL
		UNION SELECT marked_jid FROM whatsapp_operator_marked_device
			WHERE session_id=(SELECT session_id FROM whatsapp_operator_session WHERE uid=$1)`, uid)
	if err != nil {
		return err
	}
	if _, err := s.db.Exec(ctx, "DELETE FROM whatsapp_operator_session WHERE uid=$1", uid); err != nil {
		return err
	}
	for _, jid := range devices {
		if err := s.deleteDevice(ctx, jid); err != nil {
			return err
		}
	}
	return nil
}

// deleteDevice deletes a device's rows, including its mark.
func (s *Store) deleteDevice(ctx context.Context, jid string) error {
	if _, err := s.db.Exec(ctx, "DELETE FROM whatsmeow_privacy_tokens WHERE our_jid=$1", jid); err != nil {
		return err
	}
	_, err := s.db.Exec(ctx, "DELETE FROM whatsmeow_device WHERE jid=$1", jid)
	return err
}

func (s *Store) strings(ctx context.Context, query string, args ...any) ([]string, error) {
	rows, err := s.db.Query(ctx, query, args...)
	return dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList()
}

// Retain keeps the keys of a session whose resource is deleted with the policy
// Retain, until the session is applied again or purged. It reports whether there are
// keys: a record without keys is deleted, so that its id is free.
func (s *Store) Retain(ctx context.Context, uid string) (kept bool, err error) {
	err = s.transaction(ctx, func(ctx context.Context) error {
		if kept, err = s.hasKeys(ctx, uid); err != nil {
			return err
		}
		if !kept {
			return s.deleteSession(ctx, uid)
		}
		_, err = s.db.Exec(ctx, "UPDATE whatsapp_operator_session SET retained_at=$2, missing_since=NULL, orphaned_at=NULL, updated_at=$2 WHERE uid=$1", uid, s.now())
		return err
	})
	if err != nil {
		return false, fmt.Errorf("keeping a session's keys: %w", err)
	}
	return kept, nil
}

// hasKeys reports whether a session has a device; a marked device counts.
func (s *Store) hasKeys(ctx context.Context, uid string) (has bool, err error) {
	err = s.db.QueryRow(ctx, `SELECT EXISTS (SELECT 1 FROM whatsapp_operator_session WHERE uid=$1 AND jid IS NOT NULL)
		OR EXISTS (SELECT 1 FROM whatsapp_operator_marked_device
			WHERE session_id=(SELECT session_id FROM whatsapp_operator_session WHERE uid=$1))`, uid).Scan(&has)
	return has, err
}

// Clean is one run of the janitor: it deletes marked devices after KeepMarked,
// orphans after KeepOrphans, the hashes of messages that WhatsApp does not deliver again, the
// secrets of old messages, and what the inbox keeps of sessions that are gone. One process
// calls it, a few times a day.
func (s *Store) Clean(ctx context.Context) error {
	now := s.clock.Now()
	marked, errMarked := s.DeleteMarked(ctx, now.Add(-KeepMarked))
	orphans, errOrphans := s.PurgeOrphans(ctx, now.Add(-KeepOrphans))
	events, errEvents := s.CleanEventBuffer(ctx, now.Add(-keepEvents))
	secrets, errSecrets := s.CleanSecrets(ctx, now.Add(-keepSecrets))
	errHeads := s.cleanInboxHeads(ctx)
	if marked+orphans+events+secrets > 0 {
		s.log.Info("Cleaned the store", "markedDevices", marked, "orphans", orphans, "events", events, "messageSecrets", secrets)
	}
	return errors.Join(errMarked, errOrphans, errEvents, errSecrets, errHeads)
}

// cleanInboxHeads deletes what the inbox keeps of sessions that are gone and of which no
// message waits.
func (s *Store) cleanInboxHeads(ctx context.Context) error {
	err := s.exec(ctx, `DELETE FROM whatsapp_operator_inbox_head WHERE tail=head AND batch IS NULL
		AND NOT EXISTS (SELECT 1 FROM whatsapp_operator_session AS s WHERE s.session_id=whatsapp_operator_inbox_head.session_id)`)
	if err != nil {
		return fmt.Errorf("deleting the inbox of sessions that are gone: %w", err)
	}
	return nil
}

// DeleteMarked deletes the devices that were marked before that time, and returns
// their number. A record that was retained only for them is deleted with the last one:
// otherwise no other session could ever use its id.
func (s *Store) DeleteMarked(ctx context.Context, before time.Time) (int64, error) {
	devices, err := s.strings(ctx, "SELECT marked_jid FROM whatsapp_operator_marked_device WHERE marked_at<$1 ORDER BY marked_at", before.UnixMilli())
	if err != nil {
		return 0, fmt.Errorf("deleting marked devices: %w", err)
	}
	var n int64
	for _, jid := range devices {
		err := s.transaction(ctx, func(ctx context.Context) error {
			sessions, err := s.strings(ctx, "SELECT session_id FROM whatsapp_operator_marked_device WHERE marked_jid=$1 AND session_id IS NOT NULL", jid)
			if err != nil {
				return err
			}
			if err := s.deleteDevice(ctx, jid); err != nil {
				return err
			}
			for _, id := range sessions {
				if _, err := s.db.Exec(ctx, `DELETE FROM whatsapp_operator_session WHERE session_id=$1 AND retained_at IS NOT NULL AND jid IS NULL
					AND NOT EXISTS (SELECT 1 FROM whatsapp_operator_marked_device WHERE session_id=$1)`, id); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return n, fmt.Errorf("deleting marked devices: %w", err)
		}
		n++
	}
	return n, nil
}

// PurgeOrphans deletes keys and records that became orphans before that time,
// and returns their number.
func (s *Store) PurgeOrphans(ctx context.Context, before time.Time) (int64, error) {
	uids, err := s.strings(ctx, "SELECT uid FROM whatsapp_operator_session WHERE orphaned_at<$1", before.UnixMilli())
	if err != nil {
		return 0, fmt.Errorf("purging orphans: %w", err)
	}
	var n int64
	for _, uid := range uids {
		err := s.transaction(ctx, func(ctx context.Context) error {
			// A resource may have claimed it again.
			query := selectRecord + " WHERE uid=$1 AND orphaned_at<$2"
			if s.postgres != nil {
				query += " FOR UPDATE"
			}
			if _, err := scanRecord(s.db.QueryRow(ctx, query, uid, before.UnixMilli())); err != nil {
				return err
			}
			return s.deleteSession(ctx, uid)
		})
		switch {
		case errors.Is(err, ErrNoRecord):
		case err != nil:
			return n, fmt.Errorf("purging orphans: %w", err)
		default:
			n++
		}
	}
	return n, nil
}

// CleanEventBuffer deletes what whatsmeow stores of messages decrypted before
// that time, in slices, and returns the number of rows. Messages that were not accepted are kept
// for longer. whatsmeow itself would do it in every client at its first message.
func (s *Store) CleanEventBuffer(ctx context.Context, before time.Time) (int64, error) {
	hashes, err := s.deleteSlices(ctx, "whatsmeow_event_buffer", "insert_timestamp", before, "plaintext IS NULL")
	if err != nil {
		return hashes, fmt.Errorf("cleaning the event buffer: %w", err)
	}
	refused, err := s.deleteSlices(ctx, "whatsmeow_event_buffer", "insert_timestamp", before.Add(keepEvents-keepRefused))
	if err != nil {
		return hashes + refused, fmt.Errorf("deleting messages that were not accepted: %w", err)
	}
	return hashes + refused, nil
}

// deleteSlices deletes the rows of a table whose column, in Unix milliseconds, is before a
// time and for which the conditions are true, and returns their number. Rows that another
// transaction has locked are left out: the janitor delays nobody and can be in no deadlock, and
// its next run finds them.
func (s *Store) deleteSlices(ctx context.Context, table, column string, before time.Time, conditions ...string) (n int64, err error) {
	for {
		var deleted int64
		err := s.transaction(ctx, func(ctx context.Context) error {
			result, err := s.db.Exec(ctx, s.deleteSlice(table, column, conditions...), before.UnixMilli())
			if err != nil {
				return err
			}
			deleted, err = result.RowsAffected()
			return err
		})
		if err != nil || deleted == 0 {
			return n, err
		}
		n += deleted
	}
}

// deleteSlice is the statement that deletes one slice: it finds the rows by the index on the
// column and deletes them by their physical location, so that a slice costs the same in a table
// of any size.
func (s *Store) deleteSlice(table, column string, conditions ...string) string {
	place, isOneOf := s.rowPlaces()
	locked := ""
	if s.postgres != nil {
		locked = " FOR UPDATE SKIP LOCKED"
	}
	where := strings.Join(append(conditions, column+"<$1"), " AND ")
	found := fmt.Sprintf("SELECT %s FROM %s WHERE %s ORDER BY %s LIMIT %d%s", place, table, where, column, slice, locked)
	return "DELETE FROM " + table + " WHERE " + fmt.Sprintf(isOneOf, found)
}

// rowPlaces is the SQL of the physical location of a row, and the format of the condition that it
// is one of those that a query finds.
func (s *Store) rowPlaces() (place, isOneOf string) {
	if s.postgres != nil {
		return "ctid", "ctid = ANY (ARRAY(%s))"
	}
	return "rowid", "rowid IN (%s)"
}

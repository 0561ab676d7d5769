package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.mau.fi/util/dbutil"
)

var (
	// ErrNoMark: no such device of the session was logged out, or it was deleted after KeepMarked.
	ErrNoMark = errors.New("the store keeps no such device that WhatsApp has logged out")
	// ErrHasDevice: the session has a device, so no other one can be restored.
	ErrHasDevice = errors.New("the session has a device")
	// ErrLinkedElsewhere: WhatsApp has given the device's address to another device since.
	ErrLinkedElsewhere = errors.New("another device has the address of this one now")
)

// AmbiguousError says that a session has lost several devices, of which one must be named.
type AmbiguousError struct{ JIDs []string }

func (e *AmbiguousError) Error() string {
	return "several devices of the session were logged out: " + strings.Join(e.JIDs, ", ")
}

// Marked is a device that WhatsApp has logged out and whose keys are kept.
type Marked struct {
	// SessionID is the session that had the device; empty: no session had it.
	SessionID string
	// JID is the address that the device had.
	JID string
	// Reason says why it was marked.
	Reason string
	// At is when it was marked; Until is how long it is kept.
	At, Until time.Time
	// name is the name of its rows in the tables.
	name string
}

const selectMarked = "SELECT marked_jid, jid, session_id, reason, marked_at FROM whatsapp_operator_marked_device"

func scanMarked(row dbutil.Scannable) (m Marked, err error) {
	var session sql.NullString
	var at int64
	err = row.Scan(&m.name, &m.JID, &session, &m.Reason, &at)
	m.SessionID, m.At = session.String, time.UnixMilli(at)
	m.Until = m.At.Add(KeepMarked)
	return m, err
}

// Marked lists the devices that WhatsApp has logged out, the newest first.
func (s *Store) Marked(ctx context.Context) ([]Marked, error) {
	rows, err := s.db.Query(ctx, selectMarked+" ORDER BY marked_at DESC, marked_jid")
	all, err := dbutil.NewRowIterWithError(rows, scanMarked, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("listing marked devices: %w", err)
	}
	return all, nil
}

// Restore gives a device that was logged out back to its session: the one with
// that JID, or, if jid is empty, the only one that the session has lost. If several
// have one JID, it is the newest. A process that has taken the session
// cannot write any more and must take it again.
//
// The error is ErrNoRecord, ErrHasDevice, ErrNoMark, ErrLinkedElsewhere or an
// *AmbiguousError if the device cannot be restored.
func (s *Store) Restore(ctx context.Context, sessionID, jid string) (r Record, err error) {
	err = s.transaction(ctx, func(ctx context.Context) error {
		if r, err = s.lockByID(ctx, sessionID); err != nil {
			return err
		}
		if r.JID != "" {
			return ErrHasDevice
		}
		m, err := s.lost(ctx, r.SessionID, jid)
		if err != nil {
			return err
		}
		var linked bool
		if err := s.db.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM whatsmeow_device WHERE jid=$1)", m.JID).Scan(&linked); err != nil {
			return err
		}
		if linked {
			return ErrLinkedElsewhere
		}
		result, err := s.db.Exec(ctx, "UPDATE whatsmeow_device SET jid=$2 WHERE jid=$1", m.name, m.JID)
		if err != nil {
			return err
		}
		if n, err := result.RowsAffected(); err != nil || n == 0 { // the janitor has deleted it meanwhile
			return errors.Join(ErrNoMark, err)
		}
		if _, err := s.db.Exec(ctx, "UPDATE whatsmeow_privacy_tokens SET our_jid=$2 WHERE our_jid=$1", m.name, m.JID); err != nil {
			return err
		}
		// The foreign key has updated the mark.
		if _, err := s.db.Exec(ctx, "DELETE FROM whatsapp_operator_marked_device WHERE marked_jid=$1", m.JID); err != nil {
			return err
		}
		r, err = scanRecord(s.db.QueryRow(ctx, `UPDATE whatsapp_operator_session SET jid=$2, starts=starts+1, updated_at=$3 WHERE session_id=$1
			RETURNING `+recordColumns, r.SessionID, m.JID, s.now()))
		return err
	})
	if err != nil {
		return Record{}, fmt.Errorf("restoring a device: %w", err)
	}
	return r, nil
}

// lost finds the device to restore.
func (s *Store) lost(ctx context.Context, sessionID, jid string) (Marked, error) {
	rows, err := s.db.Query(ctx, selectMarked+" WHERE session_id=$1 AND (jid=$2 OR $2='') ORDER BY marked_at DESC, marked_jid", sessionID, jid)
	all, err := dbutil.NewRowIterWithError(rows, scanMarked, err).AsList()
	if err != nil {
		return Marked{}, err
	}
	if len(all) == 0 {
		return Marked{}, ErrNoMark
	}
	var jids []string
	seen := map[string]bool{}
	for _, m := range all {
		if !seen[m.JID] {
			seen[m.JID] = true
			jids = append(jids, m.JID)
		}
	}
	if len(jids) > 1 {
		return Marked{}, &AmbiguousError{JIDs: jids}
	}
	return all[0], nil
}

// lockByID reads and locks the record of a session id, so that no one else changes or
// uses it until the transaction ends.
func (s *Store) lockByID(ctx context.Context, sessionID string) (Record, error) {
	// A duplicate is found by its exact id only.
	query := selectRecord + " WHERE session_id=$1 OR NOT duplicate AND " + s.sameID("session_id", "$1") + " ORDER BY session_id<>$1 LIMIT 1"
	if s.postgres != nil {
		query += " FOR UPDATE"
	}
	return scanRecord(s.db.QueryRow(ctx, query, sessionID))
}

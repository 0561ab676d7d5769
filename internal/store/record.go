package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"time"

	"go.mau.fi/util/dbutil"

	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

var (
	// ErrNoRecord: the store has no record of the session.
	ErrNoRecord = errors.New("the store has no record of this session")
	// ErrTaken: another session holds the id. It does not say which.
	ErrTaken = errors.New("another session holds this session id")
)

// Record is the store's entry of a session.
type Record struct {
	SessionID string
	// Namespace and UID name the object that holds the id.
	Namespace, UID string
	// JID is the linked device's address; empty while no device is linked.
	JID string
	// Epoch and Starts are those of the last taking.
	Epoch, Starts int64
	// Unsettled counts the consecutive takings, each by another process, that were not
	// settled, including the last one.
	Unsettled int64
	// Trial is the last trial of the session, because it may end its process
	// (Taking.RecordTrial); 0: the process has lived through it, or there was no trial.
	Trial int64
	// Duplicate: another record has an id that differs only by upper and lower case, from
	// before these were one id. No process can take this one.
	Duplicate bool
	// Keeping says why the record is kept without a resource.
	Keeping
	Created, Updated time.Time
}

// PhoneNumber is the linked account's number in E.164; empty while there is none, or
// while only an address that hides it is known.
func (r Record) PhoneNumber() string { return status.PhoneNumber(r.JID) }

// recordColumns are the columns that scanRecord reads.
const recordColumns = "session_id, namespace, uid, jid, epoch, starts, unsettled, trial, duplicate, missing_since, orphaned_at, retained_at, created_at, updated_at"

const selectRecord = "SELECT " + recordColumns + " FROM whatsapp_operator_session"

func scanRecord(row dbutil.Scannable) (r Record, err error) {
	var jid sql.NullString
	var missing, orphaned, retained sql.NullInt64
	var created, updated int64
	err = row.Scan(&r.SessionID, &r.Namespace, &r.UID, &jid, &r.Epoch, &r.Starts, &r.Unsettled, &r.Trial, &r.Duplicate, &missing, &orphaned, &retained, &created, &updated)
	if errors.Is(err, sql.ErrNoRows) {
		return Record{}, ErrNoRecord
	}
	if err != nil {
		return Record{}, fmt.Errorf("reading a session's record: %w", err)
	}
	r.JID, r.Created, r.Updated = jid.String, time.UnixMilli(created), time.UnixMilli(updated)
	r.Keeping = Keeping{Missing: fromStamp(missing), Orphaned: fromStamp(orphaned), Retained: fromStamp(retained)}
	return r, nil
}

// Record returns the record of the object with that UID, or ErrNoRecord.
func (s *Store) Record(ctx context.Context, uid string) (Record, error) {
	return scanRecord(s.db.QueryRow(ctx, selectRecord+" WHERE uid=$1", uid))
}

// RecordByID returns the record that holds the session id, or ErrNoRecord. Ids
// that differ only by upper and lower case are one id: most applications'
// databases compare ids like this, and one tenant could write into another's row there.
func (s *Store) RecordByID(ctx context.Context, sessionID string) (Record, error) {
	return scanRecord(s.db.QueryRow(ctx, selectRecord+" WHERE NOT duplicate AND "+s.sameID("session_id", "$1"), sessionID))
}

// sameID is the condition for two ids to be one, as in the index. Ids are ASCII, so
// neither the locale nor Unicode matters.
func (s *Store) sameID(a, b string) string {
	if s.postgres != nil {
		return fmt.Sprintf(`lower(%s COLLATE "C")=lower(%s::text COLLATE "C")`, a, b)
	}
	return fmt.Sprintf("lower(%s)=lower(%s)", a, b)
}

// Duplicates lists the records with an id that another record holds in different
// upper and lower case.
func (s *Store) Duplicates(ctx context.Context) ([]Record, error) {
	rows, err := s.db.Query(ctx, selectRecord+" WHERE duplicate ORDER BY session_id")
	all, err := dbutil.NewRowIterWithError(rows, scanRecord, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("listing session ids that differ only by case: %w", err)
	}
	return all, nil
}

// Claimant is an object that wants a session id.
type Claimant struct{ SessionID, Namespace, UID string }

// Claim gives the id to c, unless another holds it (ErrTaken). A record of the
// same namespace moves from an older object only if gone reports that no live
// object has that UID. A second call changes nothing. Ids that differ only by
// upper and lower case are one id.
//
// The caller decides which of several objects may claim an id without a holder
// (the oldest).
func (s *Store) Claim(ctx context.Context, c Claimant, gone func(ctx context.Context, uid string) (bool, error)) (Record, error) {
	if c.SessionID == "" || c.Namespace == "" || c.UID == "" {
		return Record{}, errors.New("claiming a session id: id, namespace and UID must be given")
	}
	r, err := s.RecordByID(ctx, c.SessionID)
	if errors.Is(err, ErrNoRecord) {
		if err = s.newRecord(ctx, c); err == nil {
			r, err = s.RecordByID(ctx, c.SessionID)
		}
		if errors.Is(err, ErrNoRecord) { // it is the duplicate of another namespace, or messages of one wait
			return Record{}, ErrTaken
		}
	}
	if err != nil {
		return Record{}, fmt.Errorf("claiming a session id: %w", err)
	}
	if r.Namespace != c.Namespace {
		return Record{}, ErrTaken
	}
	if r.UID == c.UID && r.Keeping == (Keeping{}) {
		return r, nil
	}
	if r.UID != c.UID {
		passes, err := gone(ctx, r.UID)
		if err != nil {
			return Record{}, fmt.Errorf("looking for the holder of a session id: %w", err)
		}
		if !passes {
			return Record{}, ErrTaken
		}
	}
	err = s.exec(ctx, `UPDATE whatsapp_operator_session SET uid=$1, missing_since=NULL, orphaned_at=NULL, retained_at=NULL, updated_at=$2
		WHERE session_id=$3 AND namespace=$4 AND uid=$5`, c.UID, s.now(), r.SessionID, c.Namespace, r.UID)
	if err != nil {
		return Record{}, fmt.Errorf("claiming a session id: %w", err)
	}
	// Another process may have been faster.
	if r, err = s.RecordByID(ctx, c.SessionID); err != nil {
		return Record{}, fmt.Errorf("claiming a session id: %w", err)
	}
	if r.UID != c.UID || r.Namespace != c.Namespace {
		return Record{}, ErrTaken
	}
	return r, nil
}

// newRecord makes a record for an id that has none, unless messages of another namespace wait
// under it. If the claimant's namespace has a duplicate and the other record is gone, the
// duplicate becomes the record: it has the keys.
func (s *Store) newRecord(ctx context.Context, c Claimant) error {
	return s.transaction(ctx, func(ctx context.Context) error {
		if err := s.lockID(ctx, c.SessionID); err != nil {
			return err
		}
		// Laravel would get the messages that wait as those of the new session.
		waiting, err := s.messagesOfOthers(ctx, c.SessionID, c.Namespace)
		if err != nil || waiting {
			return err
		}
		if _, err := s.db.Exec(ctx, "UPDATE whatsapp_operator_session SET duplicate=$1, updated_at=$2 WHERE duplicate AND session_id=$3 AND namespace=$4 AND NOT EXISTS "+
			"(SELECT 1 FROM whatsapp_operator_session AS o WHERE NOT o.duplicate AND "+s.sameID("o.session_id", "$3")+")",
			false, s.now(), c.SessionID, c.Namespace); err != nil {
			return err
		}
		_, err = s.db.Exec(ctx, `INSERT INTO whatsapp_operator_session (session_id, namespace, uid, created_at, updated_at)
			VALUES ($1, $2, $3, $4, $4) ON CONFLICT DO NOTHING`, c.SessionID, c.Namespace, c.UID, s.now())
		return err
	})
}

// messagesOfOthers reports whether messages of another namespace wait under a session id.
func (s *Store) messagesOfOthers(ctx context.Context, sessionID, namespace string) (wait bool, err error) {
	err = s.db.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM whatsapp_operator_inbox_head WHERE tail>head AND namespace<>$2 AND "+
		s.sameID("session_id", "$1")+")", sessionID, namespace).Scan(&wait)
	return wait, err
}

// idLocks is the first half of the keys of lockID's locks, so that they are no other locks of the
// database.
const idLocks int32 = 0x7761_6964

// lockID makes the transactions that give a session id to a namespace, a new record and the
// replay of a dead letter, wait for each other: neither sees what the other has not committed
// yet. Two ids may have the same lock. SQLite has one writer.
func (s *Store) lockID(ctx context.Context, sessionID string) error {
	if s.postgres == nil {
		return nil
	}
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(strings.ToLower(sessionID)))
	if _, err := s.db.Exec(ctx, "SELECT pg_advisory_xact_lock($1, $2)", idLocks, int32(hash.Sum32())); err != nil {
		return fmt.Errorf("locking a session id: %w", err)
	}
	return nil
}

// exec runs one statement that writes.
func (s *Store) exec(ctx context.Context, query string, args ...any) error {
	return s.transaction(ctx, func(ctx context.Context) error {
		_, err := s.db.Exec(ctx, query, args...)
		return err
	})
}

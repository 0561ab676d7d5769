package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.mau.fi/util/dbutil"
)

// Keeping says why a record is kept although its session has no resource. All
// times are zero while it has one.
type Keeping struct {
	// Missing is since when no resource has been found.
	Missing time.Time
	// Orphaned is when the keys became orphans: they are kept for KeepOrphans.
	Orphaned time.Time
	// Retained is when the resource was deleted with the policy Retain: the keys are kept
	// until it is applied again, or a person purges them.
	Retained time.Time
}

// stamp is a time as the tables store it; NULL: none.
func stamp(t time.Time) sql.NullInt64 {
	return sql.NullInt64{Int64: t.UnixMilli(), Valid: !t.IsZero()}
}

func fromStamp(n sql.NullInt64) time.Time {
	if !n.Valid {
		return time.Time{}
	}
	return time.UnixMilli(n.Int64)
}

// Records lists all records.
func (s *Store) Records(ctx context.Context) ([]Record, error) {
	rows, err := s.db.Query(ctx, selectRecord)
	all, err := dbutil.NewRowIterWithError(rows, scanRecord, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("listing the records: %w", err)
	}
	return all, nil
}

// Unused lists the records that are kept without a resource, in the order of their ids.
func (s *Store) Unused(ctx context.Context) ([]Record, error) {
	rows, err := s.db.Query(ctx, selectRecord+" WHERE orphaned_at IS NOT NULL OR missing_since IS NOT NULL OR retained_at IS NOT NULL ORDER BY session_id, uid")
	all, err := dbutil.NewRowIterWithError(rows, scanRecord, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("listing the records without a resource: %w", err)
	}
	return all, nil
}

// KeepingChange is a change of a record that was read before.
type KeepingChange struct {
	UID      string
	From, To Keeping
}

// ChangeKeeping changes records, each only if it is unchanged since it was read:
// meanwhile the session may have been deleted with the policy Retain, or applied
// again.
func (s *Store) ChangeKeeping(ctx context.Context, changes []KeepingChange) error {
	for part := range slices.Chunk(changes, slice) {
		err := s.transaction(ctx, func(ctx context.Context) error {
			for _, c := range part {
				if _, err := s.db.Exec(ctx, `UPDATE whatsapp_operator_session SET missing_since=$2, orphaned_at=$3, retained_at=$4, updated_at=$5
					WHERE uid=$1 AND COALESCE(missing_since, 0)=$6 AND COALESCE(orphaned_at, 0)=$7 AND COALESCE(retained_at, 0)=$8`,
					c.UID, stamp(c.To.Missing), stamp(c.To.Orphaned), stamp(c.To.Retained), s.now(),
					orZero(c.From.Missing), orZero(c.From.Orphaned), orZero(c.From.Retained)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("changing why records are kept: %w", err)
		}
	}
	return nil
}

func orZero(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// OrphanMissing marks a record that has been missing since that time as an
// orphan, and returns it. A record without keys is deleted. ErrNoRecord says that
// it is not missing any more.
func (s *Store) OrphanMissing(ctx context.Context, uid string, since time.Time) (r Record, err error) {
	err = s.transaction(ctx, func(ctx context.Context) error {
		query := selectRecord + " WHERE uid=$1 AND missing_since=$2"
		if s.postgres != nil {
			query += " FOR UPDATE"
		}
		if r, err = scanRecord(s.db.QueryRow(ctx, query, uid, since.UnixMilli())); err != nil {
			return err
		}
		r, err = s.markOrphan(ctx, r)
		return err
	})
	if err != nil {
		return Record{}, fmt.Errorf("marking an orphan: %w", err)
	}
	return r, nil
}

// MarkOrphan keeps the keys of a session whose resource is deleted without a
// confirmed logout, for KeepOrphans, and returns the record. A person must unlink
// the JID in it by hand. A record without keys is deleted; ErrNoRecord
// says that there was none.
func (s *Store) MarkOrphan(ctx context.Context, uid string) (r Record, err error) {
	err = s.transaction(ctx, func(ctx context.Context) error {
		if r, err = s.Record(ctx, uid); err != nil {
			return err
		}
		r, err = s.markOrphan(ctx, r)
		return err
	})
	if err != nil {
		return Record{}, fmt.Errorf("marking an orphan: %w", err)
	}
	return r, nil
}

func (s *Store) markOrphan(ctx context.Context, r Record) (Record, error) {
	kept, err := s.hasKeys(ctx, r.UID)
	if err != nil {
		return Record{}, err
	}
	if !kept {
		return r, s.deleteSession(ctx, r.UID)
	}
	if !r.Orphaned.IsZero() {
		return r, nil
	}
	now := s.now()
	r.Keeping = Keeping{Orphaned: time.UnixMilli(now)}
	_, err = s.db.Exec(ctx, "UPDATE whatsapp_operator_session SET orphaned_at=$2, missing_since=NULL, retained_at=NULL, updated_at=$2 WHERE uid=$1", r.UID, now)
	return r, err
}

// ErrInUse: a resource uses the session's keys.
var ErrInUse = errors.New("the session's keys are in use")

// Purge permanently deletes the keys and the record of a session that has no
// resource, and returns the deleted record. inUse reports whether the record has a
// resource nevertheless. The error is ErrNoRecord or ErrInUse if the session cannot
// be purged.
func (s *Store) Purge(ctx context.Context, sessionID string, inUse func(Record) bool) (r Record, err error) {
	err = s.transaction(ctx, func(ctx context.Context) error {
		if r, err = s.lockByID(ctx, sessionID); err != nil {
			return err
		}
		if r.Keeping == (Keeping{}) || inUse(r) {
			return ErrInUse
		}
		return s.deleteSession(ctx, r.UID)
	})
	if err != nil {
		return Record{}, fmt.Errorf("purging a session's keys: %w", err)
	}
	return r, nil
}

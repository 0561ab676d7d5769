package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"

	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// EpochBehindError says that the caller's taking is outdated: the session was taken
// again.
type EpochBehindError struct {
	// Stored is the epoch of the last taking.
	Stored int64
}

func (e *EpochBehindError) Error() string {
	return fmt.Sprintf("the session was taken under epoch %d", e.Stored)
}

// Taking is a process's right to write a session's keys. It ends when the
// session is taken again: no signal says so, but every later write is refused.
type Taking struct {
	// Record is the record right after the taking. A later pairing does not change it.
	Record Record
	store  *Store
}

// Take makes the caller the only writer of the keys of the object with that
// UID. It waits for the writes of the previous owner, which are refused from then
// on, and increments the record's starts. It counts the taking as not settled
// until [Taking.Settle]. The error is an *EpochBehindError if a higher epoch
// has taken the session, ErrNoRecord if it has no record, and ErrTaken if
// another session holds the id in different upper and lower case.
func (s *Store) Take(ctx context.Context, uid string, epoch int64) (*Taking, error) {
	if epoch < 0 || epoch > v1alpha1.MaxEpoch {
		return nil, fmt.Errorf("taking a session: the epoch is %d, and must be between 0 and %d", epoch, v1alpha1.MaxEpoch)
	}
	t := &Taking{store: s}
	err := s.transaction(ctx, func(ctx context.Context) (err error) {
		t.Record, err = scanRecord(s.db.QueryRow(ctx, `UPDATE whatsapp_operator_session SET epoch=$2, starts=starts+1, updated_at=$3,
			unsettled=CASE WHEN taken_by=$4 THEN unsettled ELSE unsettled+1 END,
			trial=CASE WHEN taken_by=$4 THEN 0 ELSE trial END, taken_by=$4
			WHERE uid=$1 AND epoch<=$2 AND NOT duplicate
			RETURNING `+recordColumns, uid, epoch, s.now(), s.process))
		if !errors.Is(err, ErrNoRecord) {
			return err
		}
		stored, err := s.Record(ctx, uid)
		if err != nil {
			return err
		}
		if stored.Duplicate {
			return ErrTaken
		}
		return &EpochBehindError{Stored: stored.Epoch}
	})
	if err != nil {
		return nil, fmt.Errorf("taking a session: %w", err)
	}
	return t, nil
}

// Starts counts the takings of the session up to this one.
func (t *Taking) Starts() int64 { return t.Record.Starts }

// Unsettled is the number of consecutive takings before this one that were not settled:
// that many processes have taken the session and may have been ended by it. A process
// that takes a session again, because the answer to its taking was lost or its
// epoch has risen, is alive, so it counts once.
func (t *Taking) Unsettled() int32 {
	return int32(min(max(t.Record.Unsettled-1, 0), math.MaxInt32))
}

// Settle records that the session has not ended the process that took it: the next
// taking counts from zero. It does nothing if the session was taken again or
// has no record any more.
func (t *Taking) Settle(ctx context.Context) error {
	err := t.store.settle(ctx, t.Record)
	if err != nil {
		return fmt.Errorf("settling the taking of a session: %w", err)
	}
	return nil
}

// Trial is what RecordTrial recorded before the process of the previous taking connected
// the session; 0: that process has recorded that it survived, or has recorded no trial. It
// is also 0 if the same process takes the session again.
func (t *Taking) Trial() int32 {
	return int32(min(max(t.Record.Trial, math.MinInt32), math.MaxInt32))
}

// RecordTrial records that the session, which may end its process, is about to be
// connected in a trial (internal/session/trial.go says what the number means); 0: the process
// has survived it. It does nothing if the session was taken again or has no record any more.
func (t *Taking) RecordTrial(ctx context.Context, trial int32) error {
	err := t.store.exec(ctx, "UPDATE whatsapp_operator_session SET trial=$4 WHERE uid=$1 AND epoch=$2 AND starts=$3",
		t.Record.UID, t.Record.Epoch, t.Record.Starts, trial)
	if err != nil {
		return fmt.Errorf("recording the trial of a session: %w", err)
	}
	return nil
}

// Open reads the device for one connection: the linked one, or a new one that
// is stored when a phone links it. An *EpochBehindError says that the session
// was taken again.
//
// fail is called at most once, with the first error of the device's store or a
// refusal by the fence. It must cancel the context that was given to whatsmeow's
// ConnectContext before it returns, and must not wait for anything.
func (t *Taking) Open(ctx context.Context, fail func(error)) (*store.Device, error) {
	r, err := t.store.Record(ctx, t.Record.UID)
	if err != nil {
		return nil, fmt.Errorf("opening a device: %w", err)
	}
	if r.Epoch != t.Record.Epoch || r.Starts != t.Record.Starts {
		return nil, &EpochBehindError{Stored: r.Epoch}
	}
	// The taking has ended the writes of the previous owner: reads from now on see them.
	f := &device{store: t.store, uid: r.UID, epoch: r.Epoch, starts: r.Starts, fail: fail, opened: t.store.lids.open()}
	if r.JID == "" {
		d := t.store.container.NewDevice()
		f.wrap(d)
		return d, nil
	}
	jid, err := types.ParseJID(r.JID)
	if err != nil {
		return nil, fmt.Errorf("opening a device: %w", err)
	}
	d, err := t.store.container.GetDevice(ctx, jid)
	if err != nil {
		return nil, fmt.Errorf("opening a device: %w", err)
	}
	if d == nil { // logged out between the two reads
		return nil, errors.New("opening a device: its keys are gone")
	}
	f.wrap(d)
	return d, nil
}

// Forget permanently deletes the record and the keys of the session, including those
// of marked devices. A session that was taken again is not changed; a session
// that is forgotten already is a success.
func (t *Taking) Forget(ctx context.Context) error {
	err := t.store.transaction(ctx, func(ctx context.Context) error {
		f := &device{store: t.store, uid: t.Record.UID, epoch: t.Record.Epoch, starts: t.Record.Starts}
		if _, err := f.lockRecord(ctx, exclusive); err != nil {
			if _, gone := t.store.Record(ctx, t.Record.UID); errors.Is(gone, ErrNoRecord) {
				return nil // the answer to an earlier call was lost
			}
			return err
		}
		return t.store.deleteSession(ctx, t.Record.UID)
	})
	if err != nil {
		return fmt.Errorf("forgetting a session: %w", err)
	}
	return nil
}

// lock is how a transaction locks the record that it has read.
type lock string

const (
	// shared prevents a taking of the session until the transaction ends.
	shared lock = "FOR SHARE"
	// exclusive is for transactions that change the record: two of them with a shared
	// lock would deadlock.
	exclusive lock = "FOR NO KEY UPDATE"
)

// ErrFenced: another process has taken the session, or it has another device now.
var ErrFenced = errors.New("the session was taken by another process, or has another device now")

// lockRecord is the fence: it returns the JID in the session's record and keeps
// the record unchanged until the transaction ends, or refuses with ErrFenced.
// PostgreSQL disconnects a client that stops in the middle of its transaction
// (fenceIdleTimeout), so that its successor does not wait for it.
func (f *device) lockRecord(ctx context.Context, how lock) (jid string, err error) {
	query := "SELECT epoch, starts, jid FROM whatsapp_operator_session WHERE uid=$1"
	var into []any
	var epoch, starts int64
	var stored sql.NullString
	into = append(into, &epoch, &starts, &stored)
	if f.store.postgres != nil {
		var timeout string
		query = fmt.Sprintf("SELECT epoch, starts, jid, set_config('idle_in_transaction_session_timeout', '%d', true) FROM whatsapp_operator_session WHERE uid=$1 %s",
			fenceIdleTimeout.Milliseconds(), how)
		into = append(into, &timeout)
	}
	err = f.store.db.QueryRow(ctx, query, f.uid).Scan(into...)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", ErrFenced
	case err != nil:
		return "", err
	case epoch != f.epoch || starts != f.starts:
		return "", ErrFenced
	}
	return stored.String, nil
}

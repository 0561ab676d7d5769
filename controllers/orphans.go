package controllers

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

const (
	// orphanInterval is how often the records are compared with the sessions.
	orphanInterval = 10 * time.Minute
	// orphanGrace is how long a record may be without a session until its keys become an
	// orphan's: a cluster that is rebuilt, or a folder that was moved in Git, is back by then.
	orphanGrace = 24 * time.Hour
	// Of the records, max(orphanMin, orphanShare) may lose their sessions within
	// orphanWindow. More is taken for a mistake: a list that is not whole, or a cluster in
	// which the sessions have not been applied yet.
	orphanMin    = 10
	orphanShare  = 0.02
	orphanWindow = time.Hour
	// clockTolerance is how far the clocks of two leaders may differ. A time that is further
	// in the future is wrong, and begins anew.
	clockTolerance = time.Minute
	// orphanPage bounds one answer of the API server.
	orphanPage = 500

	// ReasonRecordsImplausible is the Event that says that too many records are without a session.
	ReasonRecordsImplausible = "RecordsImplausible"
)

// KeyState says why the store keeps a record whose session does not exist. All
// times are zero while it does.
type KeyState struct {
	// Missing is since when no session has been found for the record.
	Missing time.Time
	// Orphaned is when its keys became those of no session.
	Orphaned time.Time
	// Retained is when the session was deleted with the policy Retain.
	Retained time.Time
}

// KeyRecord is what the store knows of a session id and of its keys.
type KeyRecord struct {
	SessionID, Namespace string
	UID                  types.UID
	State                KeyState
}

// KeyMove is what is to become of a record.
type KeyMove struct {
	KeyRecord
	To KeyState
}

// KeyStore is the store as the comparison needs it.
type KeyStore interface {
	// KeyRecords lists all records.
	KeyRecords(ctx context.Context) ([]KeyRecord, error)
	// Move changes records, each only where it is still as it was listed. One that
	// becomes an orphan without having keys is deleted.
	Move(ctx context.Context, moves []KeyMove) error
}

// LiveSessions are the sessions that exist, as the API server lists them.
type LiveSessions struct {
	// terminating says of each object whether it is being deleted.
	terminating map[types.UID]bool
	// ids are those of all sessions, by namespace.
	ids map[string]bool
}

func liveID(namespace, sessionID string) string {
	return namespace + "/" + strings.ToLower(sessionID)
}

// Has reports whether a session exists that the record is, or can become, the record of.
func (l LiveSessions) Has(namespace, sessionID string, uid types.UID) bool {
	_, exists := l.terminating[uid]
	return exists || l.ids[liveID(namespace, sessionID)]
}

func (l LiveSessions) add(s *v1alpha1.WhatsAppSession) {
	l.terminating[s.UID] = !s.DeletionTimestamp.IsZero()
	l.ids[liveID(s.Namespace, s.SessionID())] = true
}

// ListLiveSessions asks the API server, in pages. A list that is not whole is an error.
func ListLiveSessions(ctx context.Context, reader client.Reader) (LiveSessions, error) {
	live := LiveSessions{terminating: map[types.UID]bool{}, ids: map[string]bool{}}
	for next := ""; ; {
		list := &v1alpha1.WhatsAppSessionList{}
		if err := reader.List(ctx, list, client.Limit(orphanPage), client.Continue(next)); err != nil {
			return LiveSessions{}, fmt.Errorf("listing the sessions: %w", err)
		}
		for i := range list.Items {
			live.add(&list.Items[i])
		}
		if next = list.Continue; next == "" {
			return live, nil
		}
	}
}

// KeyComparison is what a comparison of the records with the sessions says.
type KeyComparison struct {
	// Moves are what is to be done.
	Moves []KeyMove
	// NewlyMissing records have lost their session of late, Allowed is how many may.
	NewlyMissing, Allowed int
	// Implausible: more than Allowed have. Then no record becomes missing or an orphan.
	Implausible bool
	// InUse, Missing, Orphaned and Retained count the records, after the moves.
	InUse, Missing, Orphaned, Retained int
}

// CompareKeys decides what is to become of the records. The records must have
// been read before the sessions were listed, or a session that is applied
// meanwhile would seem to be missing. confirmed: a person says that the sessions
// are really gone, however many.
func CompareKeys(records []KeyRecord, live LiveSessions, now time.Time, confirmed bool) KeyComparison {
	c := KeyComparison{Allowed: max(orphanMin, int(orphanShare*float64(len(records))))}
	var found, lost []KeyMove
	for _, r := range records {
		to := r.State
		terminating, exists := live.terminating[r.UID]
		switch {
		case exists && terminating:
			// The session controller decides: its keys may be retained, or an orphan's, already.
		case exists:
			to = KeyState{}
		case live.ids[liveID(r.Namespace, r.SessionID)]:
			to.Missing = time.Time{} // a new session is about to take the keys up
		case !r.State.Retained.IsZero():
		case !r.State.Orphaned.IsZero():
			if wrong(r.State.Orphaned, now) {
				to.Orphaned = now
			}
		case r.State.Missing.IsZero():
			c.NewlyMissing++
			to.Missing = now
		case wrong(r.State.Missing, now):
			to.Missing = now
		case now.Sub(r.State.Missing) >= orphanGrace:
			to = KeyState{Orphaned: now}
		case now.Sub(r.State.Missing) < orphanWindow:
			c.NewlyMissing++
		}
		switch {
		case to == r.State:
		case to.Missing.IsZero() && to.Orphaned.IsZero():
			found = append(found, KeyMove{KeyRecord: r, To: to})
		default:
			lost = append(lost, KeyMove{KeyRecord: r, To: to})
		}
	}
	c.Implausible = c.NewlyMissing > c.Allowed && !confirmed
	c.Moves = found
	if !c.Implausible {
		c.Moves = append(c.Moves, lost...)
	}
	c.count(records)
	return c
}

// wrong: a clock was, and a record must not wait for it.
func wrong(t, now time.Time) bool { return t.After(now.Add(clockTolerance)) }

func (c *KeyComparison) count(records []KeyRecord) {
	moved := make(map[types.UID]KeyState, len(c.Moves))
	for _, m := range c.Moves {
		moved[m.UID] = m.To
	}
	for _, r := range records {
		state, ok := moved[r.UID]
		if !ok {
			state = r.State
		}
		switch {
		case !state.Orphaned.IsZero():
			c.Orphaned++
		case !state.Retained.IsZero():
			c.Retained++
		case !state.Missing.IsZero():
			c.Missing++
		default:
			c.InUse++
		}
	}
}

// Orphans finds the keys whose session is gone, however it went: by a finalizer
// that was removed by hand, or with its cluster. Only the leader runs it.
type Orphans struct {
	Store KeyStore
	// Reader asks the API server itself: a cache may be old.
	Reader client.Reader
	Clock  clock.WithTicker
	Log    logr.Logger
	// Compared is told of each comparison; Implausible of the first of those in a row that
	// are. Both may be nil.
	Compared    func(KeyComparison)
	Implausible func(message string)

	implausible bool
}

// Start compares until ctx ends.
func (o *Orphans) Start(ctx context.Context) error {
	ticker := o.Clock.NewTicker(orphanInterval)
	defer ticker.Stop()
	for {
		if err := o.compare(ctx); err != nil && ctx.Err() == nil {
			o.Log.Error(err, "Failed to look for keys without a session, trying again", "after", orphanInterval.String())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

func (o *Orphans) compare(ctx context.Context) error {
	records, err := o.Store.KeyRecords(ctx)
	if err != nil {
		return fmt.Errorf("reading the records: %w", err)
	}
	live, err := ListLiveSessions(ctx, o.Reader)
	if err != nil {
		return err
	}
	c := CompareKeys(records, live, o.Clock.Now(), false)
	if err := o.Store.Move(ctx, c.Moves); err != nil {
		return fmt.Errorf("changing the records: %w", err)
	}
	for _, m := range c.Moves {
		log := o.Log.WithValues("sessionID", m.SessionID, "namespace", m.Namespace)
		switch {
		case !m.To.Orphaned.IsZero() && m.State.Orphaned.IsZero():
			log.Info("Made an orphan of keys whose session has been gone for a day")
		case !m.To.Missing.IsZero() && m.State.Missing.IsZero():
			log.Info("Found a record whose session is gone", "orphanAfter", orphanGrace.String())
		case m.To == KeyState{}:
			log.V(1).Info("Found the session of a record again")
		}
	}
	if c.Implausible && !o.implausible {
		message := fmt.Sprintf("%d of %d records in the store have lost their session within an hour, more than the %d that are plausible: nothing is done with them. "+
			"Apply the missing sessions, or confirm with \"whatsapp-operator store orphans --confirm\" that they are gone for good", c.NewlyMissing, len(records), c.Allowed)
		o.Log.Info("WARNING: too many records are without a session, nothing is done with them", "missing", c.NewlyMissing, "records", len(records), "allowed", c.Allowed)
		if o.Implausible != nil {
			o.Implausible(message)
		}
	}
	o.implausible = c.Implausible
	if o.Compared != nil {
		o.Compared(c)
	}
	return nil
}

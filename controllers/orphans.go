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
	// orphanGrace is how long a record may be without a session before its keys become
	// orphans: by then a cluster that is rebuilt, or a folder that was moved in Git, is back.
	orphanGrace = 24 * time.Hour
	// At most orphanMin records, or the share orphanShare of all records if that is more, may
	// lose their sessions within orphanWindow. If there are more, the cause is probably a
	// mistake: an incomplete list, or a cluster in which the sessions have not been applied yet.
	orphanMin    = 10
	orphanShare  = 0.02
	orphanWindow = time.Hour
	// clockTolerance is how far the clocks of two leaders may differ. A time that is further in
	// the future is wrong, and is replaced by the present time.
	clockTolerance = time.Minute
	// orphanPage is how many sessions the API server returns in one answer at most.
	orphanPage = 500

	// ReasonRecordsImplausible is the reason of the Event that says that too many records are
	// without a session.
	ReasonRecordsImplausible = "RecordsImplausible"
)

// KeyState says why the store keeps a record whose session does not exist. All times are
// zero while the session exists.
type KeyState struct {
	// Missing is since when no session has been found for the record.
	Missing time.Time
	// Orphaned is when its keys became orphans.
	Orphaned time.Time
	// Retained is when the session was deleted with the policy Retain.
	Retained time.Time
}

// KeyRecord is what the store knows about a session id and its keys.
type KeyRecord struct {
	SessionID, Namespace string
	UID                  types.UID
	State                KeyState
}

// KeyMove is a change of a record's state.
type KeyMove struct {
	KeyRecord
	To KeyState
}

// KeyStore is the part of the store that the comparison needs.
type KeyStore interface {
	// KeyRecords lists all records.
	KeyRecords(ctx context.Context) ([]KeyRecord, error)
	// Move changes records, each only if it is still as it was listed. A record without keys
	// that becomes an orphan is deleted.
	Move(ctx context.Context, moves []KeyMove) error
}

// LiveSessions are the sessions that exist, as the API server lists them.
type LiveSessions struct {
	// terminating has every object, and says whether it is being deleted.
	terminating map[types.UID]bool
	// ids are the ids of all sessions, with their namespaces.
	ids map[string]bool
}

func liveID(namespace, sessionID string) string {
	return namespace + "/" + strings.ToLower(sessionID)
}

// Has reports whether the session of a record exists, or a session that can take it over.
func (l LiveSessions) Has(namespace, sessionID string, uid types.UID) bool {
	_, exists := l.terminating[uid]
	return exists || l.ids[liveID(namespace, sessionID)]
}

func (l LiveSessions) add(s *v1alpha1.WhatsAppSession) {
	l.terminating[s.UID] = !s.DeletionTimestamp.IsZero()
	l.ids[liveID(s.Namespace, s.SessionID())] = true
}

// ListLiveSessions lists the sessions at the API server, in pages. An incomplete list is an
// error.
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

// KeyComparison is the result of a comparison of the records with the sessions.
type KeyComparison struct {
	// Moves are the changes to make.
	Moves []KeyMove
	// NewlyMissing is how many records have lost their session within orphanWindow, Allowed is
	// how many may.
	NewlyMissing, Allowed int
	// Implausible says that NewlyMissing is more than Allowed, and that not all of them are
	// marked as missing yet. Then no record becomes missing or an orphan.
	Implausible bool
	// InUse, Missing, Orphaned and Retained count the records, after the moves.
	InUse, Missing, Orphaned, Retained int
}

// CompareKeys decides which records change. The records must have been read before the
// sessions were listed: otherwise a session that is applied in between would seem to be
// missing. confirmed says that a person has confirmed that the sessions are really gone,
// however many they are.
func CompareKeys(records []KeyRecord, live LiveSessions, now time.Time, confirmed bool) KeyComparison {
	c := KeyComparison{Allowed: max(orphanMin, int(orphanShare*float64(len(records))))}
	var found, lost []KeyMove
	unmarked := 0 // missing, and not marked so yet
	for _, r := range records {
		to := r.State
		terminating, exists := live.terminating[r.UID]
		switch {
		case exists && terminating:
			// The session controller decides: its keys may already be retained, or orphans.
		case exists:
			to = KeyState{}
		case live.ids[liveID(r.Namespace, r.SessionID)]:
			to.Missing = time.Time{} // a new session is about to use the keys
		case !r.State.Retained.IsZero():
		case !r.State.Orphaned.IsZero():
			if inFuture(r.State.Orphaned, now) {
				to.Orphaned = now
			}
		case r.State.Missing.IsZero():
			c.NewlyMissing++
			unmarked++
			to.Missing = now
		case inFuture(r.State.Missing, now):
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
	// Where all are marked already a person has confirmed them.
	c.Implausible = c.NewlyMissing > c.Allowed && unmarked > 0 && !confirmed
	c.Moves = found
	if !c.Implausible {
		c.Moves = append(c.Moves, lost...)
	}
	c.count(records)
	return c
}

// inFuture reports whether a time was written by a wrong clock: a record must not wait for it.
func inFuture(t, now time.Time) bool { return t.After(now.Add(clockTolerance)) }

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

// Orphans finds the keys whose session was removed without the session controller: its
// finalizer was removed by hand, or its cluster is gone. Only the leader runs it.
type Orphans struct {
	Store KeyStore
	// Reader reads from the API server itself, because a cache may be stale.
	Reader client.Reader
	Clock  clock.WithTicker
	Log    logr.Logger
	// Compared is called with the result of each comparison. Implausible is called when a
	// result is implausible and the one before was not. Both may be nil.
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
			log.Info("Marked keys as orphans because their session has been gone for a day")
		case !m.To.Missing.IsZero() && m.State.Missing.IsZero():
			log.Info("Found a record without its session", "orphanAfter", orphanGrace.String())
		case m.To == KeyState{}:
			log.V(1).Info("Found the session of a record again")
		}
	}
	if c.Implausible && !o.implausible {
		message := fmt.Sprintf("%d of %d records in the store have lost their session within an hour, and at most %d are plausible: none of them is changed. "+
			"Apply the missing sessions, or confirm with \"whatsapp-operator store orphans --confirm\" that they are gone for good", c.NewlyMissing, len(records), c.Allowed)
		o.Log.Info("Found too many records without a session, leaving them as they are", "missing", c.NewlyMissing, "records", len(records), "allowed", c.Allowed)
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

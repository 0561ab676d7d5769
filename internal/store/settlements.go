package store

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"go.mau.fi/util/dbutil"
)

// maxSettlements is the maximum number of takings that one statement settles. Each has three
// parameters, of which a statement can have 32,766 (SQLite).
const maxSettlements = 500

// settlements groups the takings that are settled at the same time: a worker with a thousand
// sessions settles them with a few statements instead of a thousand transactions. A record
// that is locked, because its session's keys are being written, is left out of the statement
// and settled alone: the statement would wait with the locks of all the others, and their
// sessions' writes would wait for it.
type settlements struct {
	// turn is held while a statement runs.
	turn chan struct{}

	mu sync.Mutex
	// next is the group that takes more; nil: there is none.
	next *settlementGroup
}

// settlementGroup holds takings that are settled with one statement.
type settlementGroup struct {
	// takings is changed under the mutex of settlements until the statement begins.
	takings map[*Record]struct{}
	// done is closed when the statement has ended; settled and err are set before.
	done    chan struct{}
	settled map[settledTaking]struct{}
	err     error
}

// settledTaking names a taking.
type settledTaking struct {
	uid           string
	epoch, starts int64
}

// settle settles a taking, together with the others that wait where that is possible.
func (s *Store) settle(ctx context.Context, taking Record) error {
	settled, err := s.settleTogether(ctx, &taking)
	if settled || err != nil {
		return err
	}
	_, err = s.settleAll(ctx, []*Record{&taking}, true)
	return err
}

// settleTogether settles a taking with its group; false: its record was locked, or there is
// nothing to settle.
func (s *Store) settleTogether(ctx context.Context, taking *Record) (settled bool, err error) {
	all := &s.settlements
	group := all.join(taking)
	select {
	case <-group.done:
	case <-ctx.Done():
		all.leave(group, taking)
		return false, ctx.Err()
	case all.turn <- struct{}{}:
		select {
		case <-group.done: // by the previous owner of the turn
		default:
			s.settleGroup(ctx, group)
		}
		<-all.turn
	}
	_, settled = group.settled[settledTaking{taking.UID, taking.Epoch, taking.Starts}]
	return settled, group.err
}

// settleGroup settles the takings of a group, for the owner of the turn.
func (s *Store) settleGroup(ctx context.Context, group *settlementGroup) {
	defer close(group.done)
	// The caller may be cancelled, because its session leaves, while the others still need the
	// answer. Its deadline stays.
	writing, cancel := context.WithoutCancel(ctx), context.CancelFunc(func() {})
	if deadline, ok := ctx.Deadline(); ok {
		writing, cancel = context.WithDeadline(writing, deadline)
	}
	defer cancel()
	group.settled, group.err = s.settleAll(writing, s.settlements.begin(group), false)
}

// join adds a taking to the group that takes more.
func (a *settlements) join(taking *Record) *settlementGroup {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.next == nil || len(a.next.takings) >= maxSettlements {
		a.next = &settlementGroup{takings: map[*Record]struct{}{}, done: make(chan struct{})}
	}
	a.next.takings[taking] = struct{}{}
	return a.next
}

// leave removes a taking from a group whose statement has not begun.
func (a *settlements) leave(group *settlementGroup, taking *Record) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(group.takings, taking)
}

// begin returns the takings of the group, which takes no more of them.
func (a *settlements) begin(group *settlementGroup) []*Record {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.next == group {
		a.next = nil
	}
	takings := make([]*Record, 0, len(group.takings))
	for taking := range group.takings {
		takings = append(takings, taking)
	}
	return takings
}

// settleAll settles takings, and returns those that were not settled before. It waits for
// locked records, or leaves them out.
func (s *Store) settleAll(ctx context.Context, takings []*Record, wait bool) (map[settledTaking]struct{}, error) {
	args := make([]any, 0, 3*len(takings))
	values := make([]string, 0, len(takings))
	for _, t := range takings {
		n := len(args)
		// PostgreSQL cannot know the types of parameters in VALUES.
		values = append(values, fmt.Sprintf("(CAST($%d AS TEXT), CAST($%d AS BIGINT), CAST($%d AS BIGINT))", n+1, n+2, n+3))
		args = append(args, t.UID, t.Epoch, t.Starts)
	}
	chosen := "SELECT uid FROM whatsapp_operator_session WHERE (unsettled<>0 OR trial<>0) AND (uid, epoch, starts) IN (VALUES " + strings.Join(values, ", ") + ")"
	if s.postgres != nil { // SQLite has one writer and no locks of rows
		chosen += " FOR NO KEY UPDATE"
		if !wait {
			chosen += " SKIP LOCKED"
		}
	}
	settled := make(map[settledTaking]struct{}, len(takings))
	err := s.transaction(ctx, func(ctx context.Context) error {
		clear(settled) // a transaction may be repeated
		rows, err := s.db.Query(ctx, "UPDATE whatsapp_operator_session SET unsettled=0, trial=0, taken_by=NULL WHERE uid IN ("+chosen+") RETURNING uid, epoch, starts", args...)
		return dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (t settledTaking, err error) {
			return t, row.Scan(&t.uid, &t.epoch, &t.starts)
		}, err).Iter(func(t settledTaking) (bool, error) {
			settled[t] = struct{}{}
			return true, nil
		})
	})
	return settled, err
}

package store

import (
	"context"
	"fmt"
	"strings"
	"sync"
)

// maxSettlements is the maximum number of takings that one statement settles. Each has three
// parameters, of which a statement can have 32,766 (SQLite).
const maxSettlements = 500

// settlements groups the takings that are settled at the same time: a worker with a thousand
// sessions settles them with a few statements instead of a thousand transactions.
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
	// done is closed when the statement has ended; err is set before.
	done chan struct{}
	err  error
}

// settle settles a taking together with the others that wait.
func (s *Store) settle(ctx context.Context, taking Record) error {
	all := &s.settlements
	group := all.join(&taking)
	select {
	case <-group.done:
		return group.err
	case <-ctx.Done():
		all.leave(group, &taking)
		return ctx.Err()
	case all.turn <- struct{}{}:
	}
	defer func() { <-all.turn }()
	select {
	case <-group.done: // by the previous owner of the turn
		return group.err
	default:
	}
	return s.settleGroup(ctx, group)
}

// settleGroup settles the takings of a group, for the owner of the turn.
func (s *Store) settleGroup(ctx context.Context, group *settlementGroup) error {
	defer close(group.done)
	// The caller may be cancelled, because its session leaves, while the others still need the
	// answer. Its deadline stays.
	writing, cancel := context.WithoutCancel(ctx), context.CancelFunc(func() {})
	if deadline, ok := ctx.Deadline(); ok {
		writing, cancel = context.WithDeadline(writing, deadline)
	}
	defer cancel()
	group.err = s.settleAll(writing, s.settlements.begin(group))
	return group.err
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

func (s *Store) settleAll(ctx context.Context, takings []*Record) error {
	args := make([]any, 0, 3*len(takings))
	rows := make([]string, 0, len(takings))
	for _, t := range takings {
		n := len(args)
		// PostgreSQL cannot know the types of parameters in VALUES.
		rows = append(rows, fmt.Sprintf("(CAST($%d AS TEXT), CAST($%d AS BIGINT), CAST($%d AS BIGINT))", n+1, n+2, n+3))
		args = append(args, t.UID, t.Epoch, t.Starts)
	}
	return s.exec(ctx, "UPDATE whatsapp_operator_session SET unsettled=0, trial=0, taken_by=NULL WHERE (unsettled<>0 OR trial<>0) AND (uid, epoch, starts) IN (VALUES "+
		strings.Join(rows, ", ")+")", args...)
}

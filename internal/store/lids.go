package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	utilcache "k8s.io/apimachinery/pkg/util/cache"
	"k8s.io/utils/clock"
)

const (
	// lidEntries is the maximum number of cached answers of a process, about 8 MB: for each of
	// a thousand sessions both directions of the sixteen contacts that write the most.
	lidEntries = 32 << 10
	// lidKnown is how long a mapping is cached. Another process may change it, which
	// happens when a number moves to another account.
	lidKnown = 10 * time.Minute
	// lidUnknown is how long it is cached that a contact has no mapping. Another process may
	// learn it at any moment.
	lidUnknown = time.Minute
	// lidAttempts is how often a write that conflicts with another process's is tried.
	lidAttempts = 5
)

// lids is the map between phone numbers and LIDs. It replaces whatsmeow's map,
// which never evicts entries and holds its lock during queries. All sessions
// share it: it holds facts about WhatsApp, not keys of a device, and all
// sessions write the same facts.
//
// The map decides under which of a contact's addresses its messages are decrypted, and
// the keys move permanently with the first message under the other address. So a device
// must never see an older map than the one its keys were written with: its answers were
// read after it was opened, and are never older than its earlier answers.
//
// No lock is held during a query, so a slow one delays no other caller, and a
// query may run inside a transaction.
type lids struct {
	store *Store
	*memory
}

// phone and hidden are the users of the two addresses of a contact, as keys of
// the cache; the value is the user of the other address, empty if there is none.
type (
	phone  string
	hidden string
)

// pair is a row of the table.
type pair struct{ lid, pn string }

func newLIDs(s *Store, c clock.PassiveClock) *lids {
	return &lids{store: s, memory: newMemory(utilcache.NewLRUExpireCacheWithClock(lidEntries, c))}
}

// lidOf returns the LID of a phone number, the empty JID if none is known.
func (l *lids) lidOf(ctx context.Context, opened moment, pn types.JID) (types.JID, error) {
	if pn.Server != types.DefaultUserServer {
		return types.EmptyJID, fmt.Errorf("%s is not the address of a phone number", pn)
	}
	users, err := l.lookUp(ctx, opened, "pn", []string{pn.User})
	return addressed(users[pn.User], pn.Device, types.HiddenUserServer), err
}

// pnOf returns the phone number of a LID, the empty JID if none is known.
func (l *lids) pnOf(ctx context.Context, opened moment, lid types.JID) (types.JID, error) {
	if lid.Server != types.HiddenUserServer {
		return types.EmptyJID, fmt.Errorf("%s is not a LID", lid)
	}
	users, err := l.lookUp(ctx, opened, "lid", []string{lid.User})
	return addressed(users[lid.User], lid.Device, types.DefaultUserServer), err
}

// lidsOf returns the LIDs of those phone numbers that have one.
func (l *lids) lidsOf(ctx context.Context, opened moment, pns []types.JID) (map[types.JID]types.JID, error) {
	users := make([]string, 0, len(pns))
	for _, pn := range pns {
		if pn.Server == types.DefaultUserServer {
			users = append(users, pn.User)
		}
	}
	found, err := l.lookUp(ctx, opened, "pn", users)
	if err != nil {
		return nil, err
	}
	result := make(map[types.JID]types.JID, len(pns))
	for _, pn := range pns {
		if lid := found[pn.User]; lid != "" && pn.Server == types.DefaultUserServer {
			result[pn] = addressed(lid, pn.Device, types.HiddenUserServer)
		}
	}
	return result, nil
}

func addressed(user string, device uint16, server string) types.JID {
	if user == "" {
		return types.EmptyJID
	}
	return types.JID{User: user, Device: device, Server: server}
}

// lookUp returns, for users in the column "pn" or "lid", the users in the other column,
// as the map was at some time after the moment.
func (l *lids) lookUp(ctx context.Context, opened moment, column string, users []string) (map[string]string, error) {
	found := make(map[string]string, len(users))
	// A transaction sees its uncommitted changes, which others must not see yet.
	remembers := !nested(ctx)
	missing := make([]string, 0, len(users))
	for _, user := range users {
		if text(user) != user { // no database has it, and PostgreSQL would refuse the query
			continue
		}
		if remembers {
			if other, ok := l.recall(key(column, user), opened); ok {
				found[user] = other
				continue
			}
		}
		missing = append(missing, user)
	}
	slices.Sort(missing)
	for part := range slices.Chunk(slices.Compact(missing), slice) {
		keys := make([]any, 0, len(part))
		for _, user := range part {
			keys = append(keys, key(column, user))
		}
		var asked moment
		if remembers {
			asked = l.ask(keys)
		}
		pairs, err := l.queryUsers(ctx, column, part)
		for _, p := range pairs {
			if column == "pn" {
				found[p.pn] = p.lid
			} else {
				found[p.lid] = p.pn
			}
		}
		for i, user := range part {
			switch {
			case remembers && err != nil:
				l.unanswered(keys[i])
			case remembers:
				l.answered(asked, keys[i], found[user])
			case err == nil:
				// Also if the transaction has seen a change of another process: it will use it.
				l.changed(keys[i])
			}
		}
		if err != nil {
			return nil, fmt.Errorf("looking for LIDs: %w", err)
		}
	}
	return found, nil
}

func (l *lids) queryUsers(ctx context.Context, column string, users []string) ([]pair, error) {
	args, numbers := make([]any, 0, len(users)), make([]string, 0, len(users))
	for i, user := range users {
		args, numbers = append(args, user), append(numbers, fmt.Sprintf("$%d", i+1))
	}
	return l.query(ctx, fmt.Sprintf("SELECT lid, pn FROM whatsmeow_lid_map WHERE %s IN (%s)", column, strings.Join(numbers, ",")), args...)
}

func key(column, user string) any {
	if column == "pn" {
		return phone(user)
	}
	return hidden(user)
}

// put stores mappings; where two contradict each other the last one counts.
// write runs the change in a transaction, and may run it again.
func (l *lids) put(ctx context.Context, opened moment, mappings []store.LIDMapping, write func(context.Context, func(context.Context) error) error) error {
	pairs := latest(mappings)
	pns := make([]string, 0, len(pairs))
	for _, p := range pairs {
		pns = append(pns, p.pn)
	}
	known, err := l.lookUp(ctx, opened, "pn", pns)
	if err != nil {
		return err
	}
	pairs = slices.DeleteFunc(pairs, func(p pair) bool { return known[p.pn] == p.lid })
	if len(pairs) == 0 {
		return nil
	}
	for attempt := 1; ; attempt++ {
		err := write(ctx, func(ctx context.Context) error {
			for part := range slices.Chunk(pairs, slice) {
				if err := l.replace(ctx, part); err != nil {
					return fmt.Errorf("storing LIDs: %w", err)
				}
			}
			return nil
		})
		if err == nil || nested(ctx) || attempt == lidAttempts || !contradicted(err) {
			return err
		}
	}
}

// latest drops invalid mappings, and all but the last of those that contradict
// each other. The result has the same order in all processes, so that two that
// store the same mappings do not deadlock.
func latest(mappings []store.LIDMapping) []pair {
	pairs := make([]pair, 0, len(mappings))
	lids, pns := map[string]bool{}, map[string]bool{}
	for _, m := range slices.Backward(mappings) {
		if m.LID.Server != types.HiddenUserServer || m.PN.Server != types.DefaultUserServer ||
			text(m.LID.User) != m.LID.User || text(m.PN.User) != m.PN.User || lids[m.LID.User] || pns[m.PN.User] {
			continue
		}
		lids[m.LID.User], pns[m.PN.User] = true, true
		pairs = append(pairs, pair{lid: m.LID.User, pn: m.PN.User})
	}
	slices.SortFunc(pairs, func(a, b pair) int { return strings.Compare(a.lid, b.lid) })
	return pairs
}

// contradicted: another process changed the same rows in another order.
func contradicted(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "40P01" // deadlock_detected
}

// replace stores pairs and deletes the mappings that contradict them, inside a transaction.
func (l *lids) replace(ctx context.Context, pairs []pair) error {
	args := make([]any, 0, 2*len(pairs))
	lidNumbers, pnNumbers, rows := make([]string, 0, len(pairs)), make([]string, 0, len(pairs)), make([]string, 0, len(pairs))
	for i, p := range pairs {
		args = append(args, p.lid, p.pn)
		lid, pn := fmt.Sprintf("$%d", 2*i+1), fmt.Sprintf("$%d", 2*i+2)
		lidNumbers, pnNumbers, rows = append(lidNumbers, lid), append(pnNumbers, pn), append(rows, "("+lid+","+pn+")")
	}
	displaced, err := l.query(ctx, fmt.Sprintf("DELETE FROM whatsmeow_lid_map WHERE lid IN (%s) OR pn IN (%s) RETURNING lid, pn",
		strings.Join(lidNumbers, ","), strings.Join(pnNumbers, ",")), args...)
	if err != nil {
		return err
	}
	// A conflict is a mapping that another process has stored since.
	if err := l.store.exec(ctx, "INSERT INTO whatsmeow_lid_map (lid, pn) VALUES "+strings.Join(rows, ",")+" ON CONFLICT DO NOTHING", args...); err != nil {
		return err
	}
	keys := make([]any, 0, 2*(len(displaced)+len(pairs)))
	for _, p := range append(displaced, pairs...) {
		keys = append(keys, hidden(p.lid), phone(p.pn))
	}
	// The stored mappings are not cached: another process may have changed them since the commit.
	afterCommit(ctx, func() { l.changed(keys...) })
	return nil
}

func (l *lids) query(ctx context.Context, query string, args ...any) ([]pair, error) {
	rows, err := l.store.db.Query(ctx, query, args...)
	return dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (p pair, err error) {
		err = row.Scan(&p.lid, &p.pn)
		return p, err
	}, err).AsList()
}

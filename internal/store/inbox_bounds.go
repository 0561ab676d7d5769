package store

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"go.mau.fi/util/dbutil"
)

const (
	// usageInterval is how often the backlogs of all sessions are read, while messages are pushed.
	usageInterval = 2 * time.Second
	// usageAge is how long they count: without a push they are not read, and shrink meanwhile.
	usageAge = 5 * usageInterval
)

// Bounds are how much may wait for Laravel. They are soft: a message that was decrypted is
// always stored, and a session over a bound is disconnected after it, so that its later
// messages wait, still encrypted, at WhatsApp. The zero value means the defaults.
type Bounds struct {
	// SessionMessages and SessionBytes bound one session; defaults 10,000 and 64 MiB.
	SessionMessages, SessionBytes int64
	// NamespaceBytes and TotalBytes bound the sessions of a namespace, and all of them;
	// defaults 1 GiB and 8 GiB.
	NamespaceBytes, TotalBytes int64
}

// DefaultBounds are the bounds that the zero value means.
var DefaultBounds = Bounds{SessionMessages: 10_000, SessionBytes: 64 << 20, NamespaceBytes: 1 << 30, TotalBytes: 8 << 30}

func (o Bounds) withDefaults() Bounds {
	d := DefaultBounds
	return Bounds{
		SessionMessages: cmp.Or(o.SessionMessages, d.SessionMessages), SessionBytes: cmp.Or(o.SessionBytes, d.SessionBytes),
		NamespaceBytes: cmp.Or(o.NamespaceBytes, d.NamespaceBytes), TotalBytes: cmp.Or(o.TotalBytes, d.TotalBytes),
	}
}

// Bound names a bound that a session may be over.
type Bound string

const (
	// NoBound: the session is over none.
	NoBound Bound = ""
	// SessionBound: too much of the session waits.
	SessionBound Bound = "Session"
	// NamespaceBound: too much of its namespace waits, and its backlog is one of the longest there.
	NamespaceBound Bound = "Namespace"
	// TotalBound: too much waits in all, and its backlog is one of the longest in one of the
	// namespaces with the longest ones.
	TotalBound Bound = "Total"
)

// SessionUsage is the backlog of one session.
type SessionUsage struct {
	SessionID, Namespace string
	Messages, Bytes      int64
}

// usage is what waited when it was read last.
type usage struct {
	// read is when, by Inbox.elapsed.
	read time.Time
	// over are the sessions that are over a bound of their namespace, or of all.
	over       map[string]Bound
	namespaces map[string]int64
	total      int64
}

// Usage lists the sessions of which messages wait. It reads one row of each session.
func (b *Inbox) Usage(ctx context.Context) (all []SessionUsage, err error) {
	err = b.do(ctx, func(ctx context.Context) error {
		rows, err := b.store.db.Query(ctx, "SELECT session_id, namespace, tail-head, bytes_in-bytes_out FROM whatsapp_operator_inbox_head WHERE tail>head")
		all, err = dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (s SessionUsage, err error) {
			return s, row.Scan(&s.SessionID, &s.Namespace, &s.Messages, &s.Bytes)
		}, err).AsList()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the backlogs: %w", err)
	}
	return all, nil
}

// Oldest returns since when the oldest message waits, zero if none does. It reads one message of
// each session.
func (b *Inbox) Oldest(ctx context.Context) (since time.Time, err error) {
	var oldest, now int64
	err = b.do(ctx, func(ctx context.Context) error {
		return b.store.db.QueryRow(ctx, `SELECT COALESCE(MIN((SELECT m.pushed_at FROM whatsapp_operator_inbox AS m
				WHERE m.session_id=h.session_id AND m.n>h.head ORDER BY m.n LIMIT 1)), 0), `+b.nowIs("$1")+`
			FROM whatsapp_operator_inbox_head AS h WHERE h.tail>h.head`, b.now()).Scan(&oldest, &now)
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("reading the age of the oldest message: %w", err)
	}
	if oldest == 0 {
		return time.Time{}, nil
	}
	return b.local().Add(time.Duration(min(oldest, now)-now) * time.Millisecond), nil
}

// WatchBounds reads the backlogs of all sessions regularly while this process pushes, until ctx
// ends. Without it a push only knows the bounds of its own session.
func (b *Inbox) WatchBounds(ctx context.Context) {
	ticker := b.store.clock.NewTicker(usageInterval)
	defer ticker.Stop()
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C():
		}
		if !b.pushed.Swap(false) {
			continue
		}
		_, err := b.readUsage(ctx)
		if err != nil {
			b.pushed.Store(true)
			if !failed && ctx.Err() == nil {
				b.store.log.Error(err, "Failed to read the backlogs, trying again")
			}
		}
		failed = err != nil
	}
}

func (b *Inbox) readUsage(ctx context.Context) (*usage, error) {
	read := b.elapsed.Now()
	all, err := b.Usage(ctx)
	if err != nil {
		return nil, err
	}
	u := b.opts.Bounds.compare(all)
	u.read = read
	b.reportOver(b.usage.Swap(u), u)
	return u, nil
}

// reportOver logs that a bound of a namespace, or of all, begins to stop sessions, or that it stops none
// any more.
func (b *Inbox) reportOver(before, now *usage) {
	had := map[Bound]int{}
	if before != nil {
		had = before.count()
	}
	have := now.count()
	for _, bound := range []Bound{NamespaceBound, TotalBound} {
		log := b.store.log.WithValues("bound", bound, "bytes", now.total)
		switch {
		case have[bound] > 0 && had[bound] == 0:
			log.Info("WARNING: too many messages wait for Laravel, the sessions with the longest backlogs are disconnected when they get another message; their later messages wait at WhatsApp", "sessions", have[bound])
		case have[bound] == 0 && had[bound] > 0:
			log.Info("No session is over the bound any more")
		}
	}
}

// count is how many sessions are over each bound.
func (u *usage) count() map[Bound]int {
	n := map[Bound]int{}
	for _, bound := range u.over {
		n[bound]++
	}
	return n
}

// Over is how many sessions are over the bound of their namespace or of all, when this process read the backlogs
// last.
func (b *Inbox) Over() map[Bound]int {
	u := b.usage.Load()
	if u == nil || b.elapsed.Since(u.read) > usageAge {
		return nil
	}
	return u.count()
}

// over returns the bound that a session is over after a push.
func (b *Inbox) over(sessionID string, messages, bytes int64) Bound {
	if messages >= b.opts.Bounds.SessionMessages || bytes >= b.opts.Bounds.SessionBytes {
		return SessionBound
	}
	if u := b.usage.Load(); u != nil && b.elapsed.Since(u.read) <= usageAge {
		return u.over[sessionID]
	}
	return NoBound
}

// HasRoom reports whether a session that was over a bound may connect again: less than half of
// that bound waits. Many sessions may ask at once: the backlogs of all are read at most every
// two seconds.
func (b *Inbox) HasRoom(ctx context.Context, sessionID, namespace string, bound Bound) (bool, error) {
	limits := b.opts.Bounds
	switch bound {
	case SessionBound:
		var messages, bytes int64
		err := b.do(ctx, func(ctx context.Context) error {
			return b.store.db.QueryRow(ctx, "SELECT COALESCE(SUM(tail-head), 0), COALESCE(SUM(bytes_in-bytes_out), 0) FROM whatsapp_operator_inbox_head WHERE session_id=$1", sessionID).
				Scan(&messages, &bytes)
		})
		if err != nil {
			return false, fmt.Errorf("reading a session's backlog: %w", err)
		}
		return 2*messages < limits.SessionMessages && 2*bytes < limits.SessionBytes, nil
	case NamespaceBound, TotalBound:
		u, err := b.recentUsage(ctx)
		if err != nil {
			return false, err
		}
		if bound == TotalBound {
			return 2*u.total < limits.TotalBytes, nil
		}
		return 2*u.namespaces[namespace] < limits.NamespaceBytes, nil
	default:
		return true, nil
	}
}

// recentUsage is what was read at most usageInterval ago. All who ask meanwhile wait for one reading.
func (b *Inbox) recentUsage(ctx context.Context) (*usage, error) {
	u, err, _ := b.reading.Do("", func() (any, error) {
		if u := b.usage.Load(); u != nil && b.elapsed.Since(u.read) < usageInterval {
			return u, nil
		}
		return b.readUsage(context.WithoutCancel(ctx)) // the others wait for it too
	})
	if err != nil {
		return nil, err
	}
	return u.(*usage), nil
}

// compare finds the sessions that are over a bound of their namespace or of all: those with the
// longest backlogs, until the backlogs of the others have room.
func (o Bounds) compare(all []SessionUsage) *usage {
	u := &usage{over: map[string]Bound{}, namespaces: map[string]int64{}}
	byNamespace := map[string][]SessionUsage{}
	for _, s := range all {
		u.namespaces[s.Namespace] += s.Bytes
		u.total += s.Bytes
		byNamespace[s.Namespace] = append(byNamespace[s.Namespace], s)
	}
	// remaining is what waits of the sessions that are over no bound.
	type namespace struct {
		remaining int64
		sessions  []SessionUsage // the longest backlog first
	}
	var namespaces []*namespace
	var total int64
	for name, sessions := range byNamespace {
		slices.SortFunc(sessions, func(x, y SessionUsage) int {
			return cmp.Or(cmp.Compare(y.Bytes, x.Bytes), cmp.Compare(x.SessionID, y.SessionID))
		})
		n := &namespace{u.namespaces[name], sessions}
		for n.remaining > room(o.NamespaceBytes, u.namespaces[name]) {
			u.over[n.sessions[0].SessionID] = NamespaceBound
			n.remaining -= n.sessions[0].Bytes
			n.sessions = n.sessions[1:]
		}
		total += n.remaining
		namespaces = append(namespaces, n)
	}
	for total > room(o.TotalBytes, u.total) {
		longest := slices.MaxFunc(namespaces, func(x, y *namespace) int { return cmp.Compare(x.remaining, y.remaining) })
		u.over[longest.sessions[0].SessionID] = TotalBound
		total -= longest.sessions[0].Bytes
		longest.remaining -= longest.sessions[0].Bytes
		longest.sessions = longest.sessions[1:]
	}
	return u
}

// room is how much may wait of the sessions that are not stopped. Up to the bound that is the
// bound; then it becomes less, until at twice the bound all are stopped: the backlogs of those
// that are stopped need space in the database, too.
func room(bound, waiting int64) int64 { return max(0, min(bound, 2*bound-waiting)) }

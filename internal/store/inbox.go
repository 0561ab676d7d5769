package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const (
	// maxKey is the longest key of a message: 128 bits in hexadecimal are 32 bytes.
	maxKey = 64
	// perSession is how many messages of one session are in a batch at most: a session with a
	// backlog leaves room for others.
	perSession = 100
	// maxBatchBytes bounds the payloads of a batch; one message alone may have as many.
	maxBatchBytes = 1 << 20
	// candidates is how many sessions are read to fill a batch.
	candidates = 200
	// rescanInterval is how often a claim reads the due sessions from the first one on, and not
	// from where the last claim ended; see Inbox.scan.
	rescanInterval = time.Second
	// lateCommit is how far before that place the reading begins: a push that got its time
	// earlier may commit later.
	lateCommit = 100 * time.Millisecond
)

// ErrInvalidMessage says that a message cannot be pushed; it is a fault of the program.
var ErrInvalidMessage = errors.New("invalid message")

// InboxOptions are the options of an Inbox. The zero value is what production uses.
type InboxOptions struct {
	// Bounds are those of the backlogs; see Bounds.
	Bounds Bounds
	// DeadLetters and DeadLetterBytes are how many are kept, and with how many bytes; defaults
	// 10,000 and 256 MiB.
	DeadLetters     int
	DeadLetterBytes int64
	// DeadLetterAge is how long they are kept; default 7 days.
	DeadLetterAge time.Duration
	// Gate, if set, is what every call but Push goes through.
	Gate *Gate
	// Now, if set, replaces the clock of the database. It is for tests.
	Now func() time.Time
}

const (
	defaultDeadLetters     = 10_000
	defaultDeadLetterBytes = 256 << 20
	defaultDeadLetterAge   = 7 * 24 * time.Hour
)

// Inbox holds the messages that wait for Laravel. A message is pushed by the holder of its
// session, under the fence of its taking; batches are claimed and finished as those of the
// coalescing queue. Any number of processes may use it at once. Each method may be repeated
// after an error: the repetition of a call whose answer was lost changes nothing.
//
// Its invariants:
//   - The first waiting messages of a session belong to its one open batch, if it has one.
//   - Only a push appends. Only Ack, and DeadLetter, remove.
//   - A batch id means the same messages until Ack or Split.
//   - A session's messages are delivered in the order of their pushes.
type Inbox struct {
	store *Store
	opts  InboxOptions
	// elapsed measures how long ago something was in this process.
	elapsed clock.PassiveClock

	// tokens are those of claims.
	tokens delivery.Tokens

	mu sync.Mutex
	// from is the due time at which the last claim ended; rescanned is when a claim last read
	// the due sessions from the first one on.
	from      int64
	rescanned time.Time

	// usage is what waited when it was read last, pushed whether something was pushed since.
	usage   atomic.Pointer[usage]
	pushed  atomic.Bool
	reading singleflight.Group

	// loseAnswer, if set, may lose the answer of a call that was executed. It is for tests.
	loseAnswer func(ctx context.Context) error
}

// NewInbox returns the inbox of a store; it does no I/O.
func NewInbox(s *Store, opts InboxOptions) *Inbox {
	opts.Bounds = opts.Bounds.withDefaults()
	if opts.DeadLetters == 0 {
		opts.DeadLetters = defaultDeadLetters
	}
	if opts.DeadLetterBytes == 0 {
		opts.DeadLetterBytes = defaultDeadLetterBytes
	}
	if opts.DeadLetterAge == 0 {
		opts.DeadLetterAge = defaultDeadLetterAge
	}
	return &Inbox{store: s, opts: opts, elapsed: clock.RealClock{}}
}

// PushResult is the result of a push.
type PushResult struct {
	// Repeated: the message is that of the last push, whose answer was lost. Nothing was changed.
	// A placeholder is not the message itself.
	Repeated bool
	// Waiting and Bytes are the session's messages that Laravel has not accepted yet. If
	// Waiting is 1 the flusher may be asleep and should be woken; otherwise it knows of the session.
	Waiting, Bytes int64
	// Over is the bound that the session is over; NoBound: none. The message is stored in any
	// case, but the session should be disconnected.
	Over Bound
}

// Push stores a message of the session of a taking, behind its other ones. It has committed
// when Push returns without an error. The error is ErrFenced if the session was taken again.
// After any other error it is unknown whether the message is stored: push it again, before
// another one of the session.
//
// A session's messages must be pushed one after the other.
func (b *Inbox) Push(ctx context.Context, t *Taking, item delivery.Item) (r PushResult, err error) {
	switch {
	case item.Key == "" || len(item.Key) > maxKey:
		return r, fmt.Errorf("%w: a key of %d bytes", ErrInvalidMessage, len(item.Key))
	case len(item.Payload) > delivery.MaxMessagePayload:
		return r, fmt.Errorf("%w: a payload of %d bytes", ErrInvalidMessage, len(item.Payload))
	case !json.Valid(item.Payload):
		return r, fmt.Errorf("%w: the payload is not JSON", ErrInvalidMessage)
	}
	var allowed, pushed bool
	push := func(ctx context.Context) error {
		return b.store.db.QueryRow(ctx, b.pushStatement(), t.Record.UID, t.Record.Epoch, t.Record.Starts, b.now(),
			text(item.Key), item.Epoch, item.Seq, len(item.Payload), []byte(item.Payload), lastKey(item)).
			Scan(&allowed, &pushed, &r.Waiting, &r.Bytes)
	}
	if b.store.postgres == nil {
		push = func(ctx context.Context) error {
			return b.store.transaction(ctx, func(ctx context.Context) (err error) {
				allowed, pushed, r, err = b.pushInSteps(ctx, t, item)
				return err
			})
		}
	}
	ctx, cancel := within(ctx, answerTimeout)
	defer cancel()
	err = push(ctx)
	if err == nil && b.loseAnswer != nil {
		err = b.loseAnswer(ctx)
	}
	if err != nil {
		return PushResult{}, fmt.Errorf("pushing a message: %w", late(ctx, err))
	}
	if !allowed {
		return PushResult{}, fmt.Errorf("pushing a message: %w", ErrFenced)
	}
	b.pushed.Store(true)
	r.Repeated = !pushed
	r.Over = b.over(t.Record.SessionID, r.Waiting, r.Bytes)
	return r, nil
}

// lastKey is what is remembered of the last push. A placeholder and the message itself have the
// same key and are two messages.
func lastKey(item delivery.Item) string {
	if item.Placeholder {
		return text(item.Key) + "?"
	}
	return text(item.Key)
}

// pushStatement pushes in one statement, which is a transaction of its own: the process may
// stop at any moment, and PostgreSQL executes all of it or nothing. The row of the session is
// locked as in every write of keys, so a taking waits for the push, or the push finds the
// numbers of the new taking.
func (b *Inbox) pushStatement() string {
	return `WITH fence AS (
		SELECT session_id, namespace FROM whatsapp_operator_session WHERE uid=$1 AND epoch=$2 AND starts=$3 FOR SHARE
	), head AS (
		INSERT INTO whatsapp_operator_inbox_head AS h (session_id, namespace, tail, head, bytes_in, bytes_out, due, last_key)
		SELECT session_id, namespace, 1, 0, $8::bigint, 0, ` + b.nowIs("$4") + `, $10::text FROM fence
		ON CONFLICT (session_id) DO UPDATE SET namespace=excluded.namespace, tail=h.tail+1, bytes_in=h.bytes_in+excluded.bytes_in,
			due=CASE WHEN h.due IS NULL AND h.batch IS NULL THEN excluded.due ELSE h.due END, last_key=excluded.last_key
		WHERE h.last_key<>excluded.last_key
		RETURNING session_id, tail, head, bytes_in, bytes_out
	), message AS (
		INSERT INTO whatsapp_operator_inbox (session_id, n, key, epoch, seq, size, pushed_at, payload)
		SELECT session_id, tail, $5::text, $6::bigint, $7::bigint, $8::bigint, ` + b.nowIs("$4") + `, $9::bytea FROM head
	), result AS (
		SELECT 1 AS pushed, tail-head AS waiting, bytes_in-bytes_out AS bytes FROM head
		UNION ALL
		SELECT 0, h.tail-h.head, h.bytes_in-h.bytes_out FROM whatsapp_operator_inbox_head AS h JOIN fence USING (session_id)
	)
	SELECT EXISTS (SELECT 1 FROM fence), COALESCE(MAX(pushed), 0)=1,
		COALESCE((SELECT waiting FROM result ORDER BY pushed DESC LIMIT 1), 0),
		COALESCE((SELECT bytes FROM result ORDER BY pushed DESC LIMIT 1), 0) FROM result`
}

// pushInSteps is the push on SQLite, whose transaction has the only lock that there is.
func (b *Inbox) pushInSteps(ctx context.Context, t *Taking, item delivery.Item) (allowed, pushed bool, r PushResult, err error) {
	db, size := b.store.db, len(item.Payload)
	var sessionID, namespace string
	rows, err := db.Query(ctx, "SELECT session_id, namespace FROM whatsapp_operator_session WHERE uid=$1 AND epoch=$2 AND starts=$3",
		t.Record.UID, t.Record.Epoch, t.Record.Starts)
	if allowed, err = one(rows, err, &sessionID, &namespace); err != nil || !allowed {
		return false, false, r, err
	}
	var tail int64
	rows, err = db.Query(ctx, `INSERT INTO whatsapp_operator_inbox_head AS h (session_id, namespace, tail, head, bytes_in, bytes_out, due, last_key)
		VALUES ($1, $2, 1, 0, $3, 0, $4, $5)
		ON CONFLICT (session_id) DO UPDATE SET namespace=excluded.namespace, tail=h.tail+1, bytes_in=h.bytes_in+excluded.bytes_in,
			due=CASE WHEN h.due IS NULL AND h.batch IS NULL THEN excluded.due ELSE h.due END, last_key=excluded.last_key
		WHERE h.last_key<>excluded.last_key
		RETURNING tail, tail-head, bytes_in-bytes_out`, sessionID, namespace, size, b.now(), lastKey(item))
	if pushed, err = one(rows, err, &tail, &r.Waiting, &r.Bytes); err != nil {
		return true, false, r, err
	}
	if !pushed {
		err = db.QueryRow(ctx, "SELECT tail-head, bytes_in-bytes_out FROM whatsapp_operator_inbox_head WHERE session_id=$1", sessionID).Scan(&r.Waiting, &r.Bytes)
		return true, false, r, err
	}
	_, err = db.Exec(ctx, "INSERT INTO whatsapp_operator_inbox (session_id, n, key, epoch, seq, size, pushed_at, payload) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
		sessionID, tail, text(item.Key), item.Epoch, item.Seq, size, b.now(), []byte(item.Payload))
	return true, true, r, err
}

// Backlog says what waits, in one round trip. Waiting is only what a claim would find.
func (b *Inbox) Backlog(ctx context.Context, _ delivery.Kind) (w delivery.Backlog, err error) {
	for {
		from := b.scan()
		var now, sessions, messages, bytes, since, next int64
		err = b.do(ctx, func(ctx context.Context) error {
			return b.store.db.QueryRow(ctx, fmt.Sprintf(`SELECT %[1]s, d.sessions, d.messages, d.bytes, d.since, i.sessions, i.batches, i.claimable, i.next
				FROM (
					SELECT COUNT(*) AS sessions, COALESCE(SUM(CASE WHEN waiting>%[2]d THEN %[2]d ELSE waiting END), 0) AS messages,
						COALESCE(SUM(bytes), 0) AS bytes, COALESCE(MIN(due), 0) AS since
					FROM (SELECT tail-head AS waiting, bytes_in-bytes_out AS bytes, due FROM whatsapp_operator_inbox_head
						WHERE due IS NOT NULL AND due>=$2 ORDER BY due LIMIT %[3]d) AS f
				) AS d, (
					SELECT COUNT(*) AS batches, COALESCE(SUM(sessions), 0) AS sessions, COUNT(*) FILTER (WHERE claimable_from<=%[1]s OR claimable_from>%[1]s+%[4]d) AS claimable,
						COALESCE(MIN(claimable_from) FILTER (WHERE claimable_from>%[1]s AND claimable_from<=%[1]s+%[4]d), 0) AS next
					FROM whatsapp_operator_inbox_batch
				) AS i`, b.nowIs("$1"), perSession, candidates, delivery.MaxHold.Milliseconds()), b.now(), from).
				Scan(&now, &sessions, &messages, &bytes, &since, &w.InFlight, &w.Unfinished, &w.Claimable, &next)
		})
		if err != nil {
			return delivery.Backlog{}, fmt.Errorf("reading what waits in the inbox: %w", err)
		}
		if sessions == 0 && from > 0 {
			b.scanAll()
			continue
		}
		received := b.local()
		at := func(ms int64) time.Time {
			if ms == 0 {
				return time.Time{}
			}
			return received.Add(time.Duration(ms-now) * time.Millisecond)
		}
		w.Normal, w.Waiting, w.Full = int(messages), int(sessions), bytes >= maxBatchBytes
		w.NormalSince, w.NextClaimable = at(min(since, now)), at(next) // a later time was written before the clock was set back
		return w, nil
	}
}

// scan returns the due time from which on the due sessions are read. An index keeps entries
// of former due times until it is cleaned, and a reader from the first one on would skip all
// of them each time. A session that became due earlier, but whose push committed after it was
// passed, is found by the next claim that reads from the first one on, soon. Other readings do
// not count: a claim that reads behind them would pass the session over again.
func (b *Inbox) scan() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.elapsed.Since(b.rescanned) >= rescanInterval {
		return 0
	}
	return b.from
}

// scannedAll records that a claim that began then has read the due sessions from the first one on.
func (b *Inbox) scannedAll(begun time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rescanned = begun
}

// scanAll makes the next reading begin with the first due session.
func (b *Inbox) scanAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.from = 0
}

// scanFrom makes the next readings begin shortly before a due time.
func (b *Inbox) scanFrom(due int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.from = max(0, due-lateCommit.Milliseconds())
}

// do calls fn, behind the gate if there is one.
func (b *Inbox) do(ctx context.Context, fn func(ctx context.Context) error) (err error) {
	if b.opts.Gate != nil {
		err = b.opts.Gate.Do(ctx, fn)
	} else {
		bounded, cancel := within(ctx, answerTimeout)
		defer cancel()
		if err = fn(bounded); err != nil {
			err = late(bounded, err)
		}
	}
	if err == nil && b.loseAnswer != nil {
		err = b.loseAnswer(ctx)
	}
	return err
}

// transaction runs fn in one transaction, behind the gate.
func (b *Inbox) transaction(ctx context.Context, fn func(ctx context.Context) error) error {
	return b.do(ctx, func(ctx context.Context) error { return b.store.transaction(ctx, fn) })
}

// now is the parameter that nowIs reads: the time of a test, or of SQLite's one machine;
// otherwise NULL.
func (b *Inbox) now() any {
	switch {
	case b.opts.Now != nil:
		return b.opts.Now().UnixMilli()
	case b.store.postgres == nil:
		return b.store.now()
	default:
		return nil
	}
}

// nowIs is the SQL of the present time, where parameter is the one of now. The server's clock
// counts, as with the coalescing queue: many workers write due times, and one leader reads them.
func (b *Inbox) nowIs(parameter string) string {
	if b.store.postgres == nil {
		return "CAST(" + parameter + " AS INTEGER)"
	}
	return "COALESCE(" + parameter + "::bigint, (EXTRACT(EPOCH FROM clock_timestamp())*1000)::bigint)"
}

// local is the present time of the caller's clock, in which all answers are.
func (b *Inbox) local() time.Time {
	if b.opts.Now != nil {
		return b.opts.Now()
	}
	return b.store.clock.Now()
}

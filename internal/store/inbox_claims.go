package store

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.mau.fi/util/dbutil"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// messageRange are messages of one session in a batch. A range may have holes: of a batch
// whose rejected messages found no room, only these are left.
type messageRange struct {
	SessionID string `json:"s"`
	First     int64  `json:"a"`
	Last      int64  `json:"b"`
	Bytes     int64  `json:"z"`
}

// storedMessage is a stored message.
type storedMessage struct {
	sessionID string
	n         int64
	key       string
	numbers   delivery.Numbers
	size      int64
	payload   []byte
}

// rangesOf is the SQL of a table r of the ranges in a parameter.
func (b *Inbox) rangesOf(parameter string) string {
	if b.store.postgres != nil {
		return "json_to_recordset(" + parameter + "::json) AS r(s text, a bigint, b bigint, z bigint)"
	}
	return "(SELECT value->>'s' AS s, value->>'a' AS a, value->>'b' AS b, value->>'z' AS z FROM json_each(" + parameter + ")) AS r"
}

// inRanges is the SQL that joins messages to the ranges in a parameter, with the columns what
// of m. PostgreSQL would read the whole table and join it by a hash, because it cannot know
// how few messages there are in the ranges: the limit makes it use the index for each range.
func (b *Inbox) inRanges(what, parameter string) string {
	if b.store.postgres == nil {
		return b.rangesOf(parameter) + " JOIN whatsapp_operator_inbox AS m ON m.session_id=r.s AND m.n BETWEEN r.a AND r.b"
	}
	return b.rangesOf(parameter) + fmt.Sprintf(" CROSS JOIN LATERAL (SELECT %s FROM whatsapp_operator_inbox WHERE session_id=r.s AND n BETWEEN r.a AND r.b ORDER BY n LIMIT %d) AS m",
		what, perSession)
}

// ofRanges is the SQL that joins the head h to the ranges in the second parameter, after SET.
// With the array PostgreSQL uses the index, however many heads there are.
func (b *Inbox) ofRanges() string {
	from := " FROM " + b.rangesOf("$2") + " WHERE h.session_id=r.s"
	if b.store.postgres != nil {
		from += " AND h.session_id=ANY (ARRAY(SELECT r.s FROM " + b.rangesOf("$2") + "))"
	}
	return from
}

// encodeRanges is what rangesOf reads.
func encodeRanges(ranges []messageRange) string {
	encoded, err := json.Marshal(ranges)
	if err != nil { // strings and numbers only
		panic(err)
	}
	return string(encoded)
}

// Claim claims a batch for the length of lease. It first claims the oldest unfinished batch
// that was released or whose claim has ended, with the same id and exactly the same messages.
// If there is none, it takes up to limit messages, at most 100 of each session and 1 MiB in
// all, of the sessions that have waited longest and have no open batch, and stores them as a
// batch; with limit 0 it claims only unfinished batches. It returns nil when there is nothing
// to claim.
//
// The batch belongs to the caller until its Deadline, which counts from before the request was
// sent. Ack, Release, Split and DeadLetter check the claim by ID and Attempt together.
func (b *Inbox) Claim(ctx context.Context, kind delivery.Kind, limit int, lease time.Duration) (*delivery.Batch, error) {
	if lease < delivery.MinLease || lease > delivery.MaxHold {
		return nil, fmt.Errorf("a claim of %s is not between %s and %s", lease, delivery.MinLease, delivery.MaxHold)
	}
	token, retried := b.tokens.Next(kind)
	for {
		from, sent, begun := b.scan(), b.local(), b.elapsed.Now()
		var c claim
		err := b.transaction(ctx, func(ctx context.Context) (err error) {
			c, err = b.claim(ctx, token, retried, limit, lease.Milliseconds(), from)
			return err
		})
		if err != nil {
			b.tokens.Keep(kind, token)
			return nil, fmt.Errorf("claiming a batch of messages: %w", err)
		}
		if c.scanned && from == 0 {
			b.scannedAll(begun)
		}
		switch {
		case c.id == "" && c.skipped:
			continue
		case c.id == "" && from > 0 && limit > 0:
			b.scanAll()
			continue
		case c.id == "":
			return nil, nil
		}
		if c.next > 0 {
			b.scanFrom(c.next)
		}
		batch := &delivery.Batch{
			ID: c.id, Kind: delivery.KindMessage, Attempt: int(c.attempt),
			Deadline: sent.Add(time.Duration(c.until-c.now) * time.Millisecond),
		}
		for _, m := range c.messages {
			batch.Items = append(batch.Items, delivery.Item{SessionID: m.sessionID, Key: m.key, Numbers: m.numbers, Priority: delivery.Normal, Payload: m.payload})
		}
		return batch, nil
	}
}

// claim is the result of one claim.
type claim struct {
	id         string
	attempt    int64
	now, until int64
	messages   []storedMessage
	// next is the due time from which on the next claim finds sessions; 0: no new batch was made.
	next int64
	// scanned: the due sessions were read.
	scanned bool
	// skipped: there were messages that are missing, so claim again.
	skipped bool
}

func (b *Inbox) claim(ctx context.Context, token string, retried bool, limit int, lease, from int64) (c claim, err error) {
	c.id, err = b.claimStored(ctx, token, retried, lease, &c)
	if err != nil || c.id != "" || c.skipped || limit == 0 {
		return c, err
	}
	c.scanned = true
	heads, passed, now, err := b.lockDue(ctx, limit, from)
	if err != nil || len(heads) == 0 {
		return c, err
	}
	ranges := make([]messageRange, 0, len(heads))
	for _, h := range heads {
		ranges = append(ranges, messageRange{SessionID: h.sessionID, First: h.head + 1, Last: min(h.tail, h.head+perSession)})
	}
	messages, err := b.messages(ctx, ranges, false)
	if err != nil {
		return c, err
	}
	chosen, missing := choose(ranges, messages, limit)
	if len(missing) > 0 { // somebody has deleted rows by hand
		if err := b.skip(ctx, missing, now); err != nil {
			return c, err
		}
	}
	if len(chosen) == 0 {
		c.skipped = len(missing) > 0
		return c, nil
	}
	c.id, c.attempt, c.now, c.until = delivery.NewBatchID(), 1, now, now+lease
	c.next = heads[min(len(chosen), len(heads)-1)].due
	if passed > 0 {
		c.next = min(c.next, passed)
	}
	if err := b.storeBatch(ctx, c.id, token, 1, c.until, chosen); err != nil {
		return c, err
	}
	if _, err := b.store.db.Exec(ctx, "UPDATE whatsapp_operator_inbox_head AS h SET due=NULL, batch=$1, batch_end=r.b"+b.ofRanges(), c.id, encodeRanges(chosen)); err != nil {
		return c, err
	}
	c.messages, err = b.messages(ctx, chosen, true)
	return c, err
}

// claimStored claims a stored batch; an empty id: there is none that may be claimed.
func (b *Inbox) claimStored(ctx context.Context, token string, retried bool, lease int64, c *claim) (id string, err error) {
	const returning = " RETURNING id, attempt, claimable_from, ranges, "
	now := b.nowIs("$1")
	var encoded string
	found := false
	if retried { // its answer was lost
		rows, err := b.store.db.Query(ctx, "UPDATE whatsapp_operator_inbox_batch SET token=token WHERE token=$2 AND claimable_from>"+now+returning+now, b.now(), token)
		if found, err = one(rows, err, &id, &c.attempt, &c.until, &encoded, &c.now); err != nil {
			return "", err
		}
	}
	if !found {
		// A time so far in the future was written before the clock was set back.
		oldest := fmt.Sprintf("SELECT id FROM whatsapp_operator_inbox_batch WHERE claimable_from<=%s OR claimable_from>%s+%d ORDER BY id LIMIT 1", now, now, delivery.MaxHold.Milliseconds())
		if b.store.postgres != nil {
			oldest += " FOR NO KEY UPDATE SKIP LOCKED"
		}
		rows, err := b.store.db.Query(ctx, "UPDATE whatsapp_operator_inbox_batch SET token=$2, attempt=attempt+1, claimable_from="+now+"+$3 WHERE id=("+oldest+")"+
			returning+"claimable_from-$3", b.now(), token, lease)
		if found, err = one(rows, err, &id, &c.attempt, &c.until, &encoded, &c.now); err != nil || !found {
			return "", err
		}
	}
	ranges, err := decodeRanges(id, encoded)
	if err != nil {
		return "", err
	}
	if c.messages, err = b.messages(ctx, ranges, true); err != nil || len(c.messages) > 0 {
		return id, err
	}
	// Somebody has deleted all of them by hand. Laravel would have nothing to answer.
	c.skipped = true
	b.store.log.Error(nil, "The messages of a batch are missing in the database, they were deleted by hand", "batch", id)
	if _, err := b.store.db.Exec(ctx, "DELETE FROM whatsapp_operator_inbox_batch WHERE id=$1", id); err != nil {
		return "", err
	}
	return "", b.advance(ctx, id, ranges)
}

// dueHead is a session whose messages may be claimed.
type dueHead struct {
	sessionID       string
	head, tail, due int64
}

// lockDue locks the sessions that have waited longest, as many as can fill a batch of limit
// messages. Those that another transaction has locked are left out, and later ones are locked
// in their place: a busy session is locked by each push. passed is the due time of the first
// that was left out; 0: none was.
func (b *Inbox) lockDue(ctx context.Context, limit int, from int64) (heads []dueHead, passed, now int64, err error) {
	clock := b.nowIs("$1")
	read := func(condition string, most int, lock string, parameter any) ([]dueHead, error) {
		rows, err := b.store.db.Query(ctx, fmt.Sprintf("SELECT session_id, head, tail, due, %s FROM whatsapp_operator_inbox_head WHERE due IS NOT NULL AND %s ORDER BY due LIMIT %d%s",
			clock, condition, most, lock), b.now(), parameter)
		return dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (h dueHead, err error) {
			return h, row.Scan(&h.sessionID, &h.head, &h.tail, &h.due, &now)
		}, err).AsList()
	}
	found, err := read("due>=$2", candidates, "", from)
	if err != nil {
		return nil, 0, 0, err
	}
	var wanted []messageRange
	for messages := int64(0); len(found) > len(wanted) && messages < int64(limit); {
		h := found[len(wanted)]
		wanted = append(wanted, messageRange{SessionID: h.sessionID})
		messages += min(h.tail-h.head, perSession)
	}
	found = found[:len(wanted)]
	if b.store.postgres == nil || len(found) == 0 {
		return found, 0, now, nil
	}
	const lock = " FOR NO KEY UPDATE SKIP LOCKED"
	those := " (ARRAY(SELECT r.s FROM " + b.rangesOf("$2") + "))"
	if heads, err = read("session_id=ANY"+those, len(found), lock, encodeRanges(wanted)); err != nil || len(heads) == len(found) {
		return heads, 0, now, err
	}
	for _, h := range slices.Backward(found) {
		if !slices.ContainsFunc(heads, func(locked dueHead) bool { return locked.sessionID == h.sessionID }) {
			passed = h.due
		}
	}
	others, err := read(fmt.Sprintf("due>=%d AND session_id<>ALL%s", passed, those), len(found)-len(heads), lock, encodeRanges(wanted))
	heads = append(heads, others...)
	slices.SortStableFunc(heads, func(x, y dueHead) int { return cmp.Compare(x.due, y.due) })
	return heads, passed, now, err
}

// choose takes messages in the order of the ranges, up to the limits of a batch. missing are
// ranges of which no message exists.
func choose(ranges []messageRange, messages []storedMessage, limit int) (chosen, missing []messageRange) {
	var total int64
	count := 0
	for _, r := range ranges {
		own := ofRange(messages, r)
		if len(own) == 0 {
			missing = append(missing, r)
			continue
		}
		taken := messageRange{SessionID: r.SessionID, First: r.First}
		for _, m := range own {
			if count == limit || count > 0 && total+m.size > maxBatchBytes {
				break
			}
			taken.Last = m.n
			taken.Bytes += m.size
			total += m.size
			count++
		}
		if taken.Last == 0 {
			break
		}
		all := taken.Last == own[len(own)-1].n
		if all {
			taken.Last = r.Last // with the numbers after it that have no message
		}
		chosen = append(chosen, taken)
		if !all {
			break
		}
	}
	return chosen, missing
}

// messages reads the messages of ranges, in the order of the ranges.
func (b *Inbox) messages(ctx context.Context, ranges []messageRange, payload bool) ([]storedMessage, error) {
	columns, content := "session_id, n, key, epoch, seq, size", "''"
	if payload {
		columns, content = columns+", payload", "m.payload"
	}
	rows, err := b.store.db.Query(ctx, "SELECT m.session_id, m.n, m.key, m.epoch, m.seq, m.size, "+content+" FROM "+b.inRanges(columns, "$1"), encodeRanges(ranges))
	all, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (m storedMessage, err error) {
		return m, row.Scan(&m.sessionID, &m.n, &m.key, &m.numbers.Epoch, &m.numbers.Seq, &m.size, &m.payload)
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("reading messages: %w", err)
	}
	place := make(map[string]int, len(ranges))
	for i, r := range ranges {
		place[r.SessionID] = i
	}
	slices.SortFunc(all, func(x, y storedMessage) int {
		return cmp.Or(cmp.Compare(place[x.sessionID], place[y.sessionID]), cmp.Compare(x.n, y.n))
	})
	return all, nil
}

// ofRange are the messages of a range; messages is in the order of the ranges.
func ofRange(messages []storedMessage, r messageRange) []storedMessage {
	first := slices.IndexFunc(messages, func(m storedMessage) bool { return m.sessionID == r.SessionID })
	if first < 0 {
		return nil
	}
	end := first
	for end < len(messages) && messages[end].sessionID == r.SessionID {
		end++
	}
	return messages[first:end]
}

// skip moves heads over messages that do not exist.
func (b *Inbox) skip(ctx context.Context, missing []messageRange, now int64) error {
	b.store.log.Error(nil, "Messages that waited for Laravel are missing in the database, they were deleted by hand", "sessions", len(missing))
	_, err := b.store.db.Exec(ctx, "UPDATE whatsapp_operator_inbox_head AS h SET head=r.b, due=CASE WHEN h.tail>r.b THEN CAST($1 AS BIGINT) END, bytes_out=CASE WHEN h.tail>r.b THEN h.bytes_out ELSE h.bytes_in END"+b.ofRanges(), now, encodeRanges(missing))
	return err
}

func (b *Inbox) storeBatch(ctx context.Context, id, token string, attempt, claimableFrom int64, ranges []messageRange) error {
	_, err := b.store.db.Exec(ctx, "INSERT INTO whatsapp_operator_inbox_batch (id, token, attempt, claimable_from, sessions, ranges) VALUES ($1, $2, $3, $4, $5, $6)",
		id, token, attempt, claimableFrom, len(ranges), encodeRanges(ranges))
	return err
}

// take removes a batch whose claim the caller holds; ok is false if it is not stored any more.
func (b *Inbox) take(ctx context.Context, batch *delivery.Batch) (ranges []messageRange, claimableFrom int64, ok bool, err error) {
	var encoded string
	rows, err := b.store.db.Query(ctx, "DELETE FROM whatsapp_operator_inbox_batch WHERE id=$1 AND attempt=$2 RETURNING claimable_from, ranges", batch.ID, batch.Attempt)
	if ok, err = one(rows, err, &claimableFrom, &encoded); err != nil {
		return nil, 0, false, err
	}
	if !ok {
		return nil, 0, false, b.lost(ctx, batch)
	}
	ranges, err = decodeRanges(batch.ID, encoded)
	return ranges, claimableFrom, true, err
}

// lost is ErrClaimLost if the batch still exists: then another process has claimed it.
func (b *Inbox) lost(ctx context.Context, batch *delivery.Batch) error {
	var exists bool
	if err := b.store.db.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM whatsapp_operator_inbox_batch WHERE id=$1)", batch.ID).Scan(&exists); err != nil {
		return err
	}
	if exists {
		return delivery.ErrClaimLost
	}
	return nil
}

// Ack finishes a batch that Laravel has accepted. The messages that Laravel rejected by name
// become dead letters; what was pushed meanwhile becomes due. If another process has claimed
// the batch since, it returns ErrClaimLost and changes nothing; if the batch is not stored any
// more, it returns nil. With ErrDeadLettersFull the delivered messages are acknowledged, and
// the rejected ones are stored as a separate batch with a new id, which can be claimed when
// this claim would have ended; if all are rejected, nothing is changed.
func (b *Inbox) Ack(ctx context.Context, batch *delivery.Batch, rejected ...delivery.Rejection) error {
	return b.ack(ctx, batch, delivery.RejectedByName, rejected)
}

func (b *Inbox) ack(ctx context.Context, batch *delivery.Batch, reason delivery.DeadLetterReason, rejected []delivery.Rejection) error {
	full := false
	err := b.transaction(ctx, func(ctx context.Context) error {
		full = false
		ranges, claimableFrom, ok, err := b.take(ctx, batch)
		if err != nil || !ok {
			return err
		}
		var dead []deadMessage
		var kept []messageRange
		if len(rejected) > 0 {
			messages, err := b.messages(ctx, ranges, false)
			if err != nil {
				return err
			}
			dead = rejectedMessages(messages, rejected)
			if full, err = b.deadLettersFull(ctx, dead); err != nil {
				return err
			}
			switch {
			case full && len(dead) == len(messages):
				return delivery.ErrDeadLettersFull
			case full:
				kept = keep(ranges, dead)
			default:
				if err := b.storeDeadLetters(ctx, batch.ID, reason, dead); err != nil {
					return err
				}
			}
		}
		keptMessages := []keptMessage{}
		if full {
			for _, d := range dead {
				keptMessages = append(keptMessages, keptMessage{d.sessionID, d.n})
			}
		}
		if err := b.remove(ctx, ranges, keptMessages); err != nil {
			return err
		}
		if err := b.advance(ctx, batch.ID, ranges); err != nil || !full {
			return err
		}
		id := delivery.NewBatchID()
		if err := b.storeBatch(ctx, id, "", 0, claimableFrom, kept); err != nil {
			return err
		}
		// Their messages are still the first ones of their sessions.
		_, err = b.store.db.Exec(ctx, "UPDATE whatsapp_operator_inbox_head AS h SET head=r.a-1, bytes_out=h.bytes_out-r.z, due=NULL, batch=$1, batch_end=r.b"+b.ofRanges(), id, encodeRanges(kept))
		return err
	})
	if err == nil && full {
		err = delivery.ErrDeadLettersFull
	}
	if err != nil {
		return fmt.Errorf("acknowledging a batch of messages: %w", err)
	}
	return nil
}

// keep are the ranges of rejected messages that find no room as dead letters. Each ends where
// the range of its session ended, because the numbers up to there have no messages any more.
func keep(ranges []messageRange, dead []deadMessage) (kept []messageRange) {
	for _, d := range dead {
		if last := len(kept) - 1; last >= 0 && kept[last].SessionID == d.sessionID {
			kept[last].Bytes += d.size
			continue
		}
		i := slices.IndexFunc(ranges, func(r messageRange) bool { return r.SessionID == d.sessionID })
		kept = append(kept, messageRange{SessionID: d.sessionID, First: d.n, Last: ranges[i].Last, Bytes: d.size})
	}
	return kept
}

// keptMessage is a message that remains when the others of its range are removed.
type keptMessage struct {
	SessionID string `json:"s"`
	N         int64  `json:"a"`
}

// remove deletes the messages of ranges, but for some.
func (b *Inbox) remove(ctx context.Context, ranges []messageRange, kept []keptMessage) error {
	place, isOneOf := b.store.rowPlaces()
	query, args := "DELETE FROM whatsapp_operator_inbox WHERE "+fmt.Sprintf(isOneOf, "SELECT m."+place+" FROM "+b.inRanges(place, "$1")), []any{encodeRanges(ranges)}
	if len(kept) > 0 {
		encoded, err := json.Marshal(kept)
		if err != nil {
			return err
		}
		query += " AND (session_id, n) NOT IN (SELECT r.s, r.a FROM " + b.rangesOf("$2") + ")"
		args = append(args, string(encoded))
	}
	_, err := b.store.db.Exec(ctx, query, args...)
	return err
}

// advance ends the open batch of sessions whose messages in it are gone.
func (b *Inbox) advance(ctx context.Context, batchID string, ranges []messageRange) error {
	_, err := b.store.db.Exec(ctx, "UPDATE whatsapp_operator_inbox_head AS h SET head=h.batch_end, batch=NULL, batch_end=NULL, due=CASE WHEN h.tail>h.batch_end THEN "+b.nowIs("$1")+
		" END, bytes_out=CASE WHEN h.tail>h.batch_end THEN h.bytes_out+r.z ELSE h.bytes_in END"+b.ofRanges()+" AND h.batch=$3",
		b.now(), encodeRanges(ranges), batchID)
	return err
}

// Release ends the claim of a batch. It can be claimed again at notBefore (zero or past: at
// once; at most 15 minutes from now), with the same id and messages. ErrClaimLost and nil as
// with Ack.
func (b *Inbox) Release(ctx context.Context, batch *delivery.Batch, notBefore time.Time) error {
	delay := min(max(0, notBefore.Sub(b.local())), delivery.MaxHold).Milliseconds()
	err := b.transaction(ctx, func(ctx context.Context) error {
		result, err := b.store.db.Exec(ctx, "UPDATE whatsapp_operator_inbox_batch SET token='', claimable_from="+b.nowIs("$1")+"+$2 WHERE id=$3 AND attempt=$4",
			b.now(), delay, batch.ID, batch.Attempt)
		if err != nil {
			return err
		}
		if n, err := result.RowsAffected(); err != nil || n > 0 {
			return err
		}
		return b.lost(ctx, batch)
	})
	if err != nil {
		return fmt.Errorf("releasing a batch of messages: %w", err)
	}
	return nil
}

// Split replaces a batch by two, each with a new id and about half of the messages; both can be
// claimed at once, the first half first. The messages of one session stay together, so that
// they are never in two batches. Of a batch with one session only the first half stays, under a
// new id, and the others wait behind it. ErrClaimLost and nil as with Ack.
func (b *Inbox) Split(ctx context.Context, batch *delivery.Batch) error {
	err := b.transaction(ctx, func(ctx context.Context) error {
		ranges, _, ok, err := b.take(ctx, batch)
		if err != nil || !ok {
			return err
		}
		var halves [][]messageRange
		if len(ranges) > 1 {
			halves = halve(ranges)
		} else {
			messages, err := b.messages(ctx, ranges, false)
			if err != nil {
				return err
			}
			halves = [][]messageRange{{firstHalf(ranges[0], messages)}}
		}
		var now int64
		if err := b.store.db.QueryRow(ctx, "SELECT "+b.nowIs("$1"), b.now()).Scan(&now); err != nil {
			return err
		}
		for _, half := range halves {
			id := delivery.NewBatchID()
			if err := b.storeBatch(ctx, id, "", 0, now, half); err != nil {
				return err
			}
			if _, err := b.store.db.Exec(ctx, "UPDATE whatsapp_operator_inbox_head AS h SET batch=$1, batch_end=r.b"+b.ofRanges(),
				id, encodeRanges(half)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("splitting a batch of messages: %w", err)
	}
	return nil
}

// firstHalf is the range of the first half of a session's messages in a batch.
func firstHalf(r messageRange, messages []storedMessage) messageRange {
	if len(messages) < 2 {
		return r
	}
	messages = messages[:(len(messages)+1)/2]
	r.Last, r.Bytes = messages[len(messages)-1].n, 0
	for _, m := range messages {
		r.Bytes += m.size
	}
	return r
}

// halve returns the ranges of the batches that replace one of several sessions.
func halve(ranges []messageRange) [][]messageRange {
	var total, before int64
	for _, r := range ranges {
		total += r.Last - r.First + 1
	}
	cut := 0
	for cut < len(ranges)-1 && (cut == 0 || 2*before < total) {
		before += ranges[cut].Last - ranges[cut].First + 1
		cut++
	}
	return [][]messageRange{ranges[:cut], ranges[cut:]}
}

// DeadLetter finishes a batch of one message that Laravel refuses for good: it stores the
// message as a dead letter with a reason and Laravel's answer. If there is no room it returns
// ErrDeadLettersFull; then nothing was changed and the claim is still held. ErrClaimLost and nil
// as with Ack.
func (b *Inbox) DeadLetter(ctx context.Context, batch *delivery.Batch, reason delivery.DeadLetterReason, answer delivery.Answer) error {
	if len(batch.Items) != 1 {
		return fmt.Errorf("a batch of %d messages cannot be a dead letter: split it", len(batch.Items))
	}
	return b.ack(ctx, batch, reason, []delivery.Rejection{{SessionID: batch.Items[0].SessionID, Key: batch.Items[0].Key, Reason: answer.Text()}})
}

func decodeRanges(id, encoded string) (ranges []messageRange, err error) {
	if err := json.Unmarshal([]byte(encoded), &ranges); err != nil || len(ranges) == 0 {
		return nil, fmt.Errorf("the stored batch %s cannot be read (%w)", id, err)
	}
	return ranges, nil
}

// one reads the one row of a query; found is false if there is none.
func one(rows dbutil.Rows, err error, into ...any) (found bool, _ error) {
	if err != nil {
		return false, err
	}
	defer func() { _ = rows.Close() }()
	if found = rows.Next(); found {
		if err := rows.Scan(into...); err != nil {
			return false, err
		}
	}
	if err := rows.Err(); err != nil && !errors.Is(err, sql.ErrNoRows) {
		return false, err
	}
	return found, nil
}

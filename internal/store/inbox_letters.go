package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"go.mau.fi/util/dbutil"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// deadLetterPage is how many dead letters are read in one round trip; with the largest
// messages they take 50 MiB.
const deadLetterPage = 50

// deadLetterPrefix begins the id of a dead letter, so that it is not mistaken for one of another kind.
const deadLetterPrefix = "m"

// ErrInvalidDeadLetterID says that a text is not the id of a message's dead letter.
var ErrInvalidDeadLetterID = errors.New("the id of a message's dead letter is \"m\" and a number, as \"deadletter list\" prints it")

// deadMessage is a message that becomes a dead letter.
type deadMessage struct {
	sessionID string
	n, size   int64
	answer    string
}

// rejectedMessages are the messages of a batch that are in the list.
func rejectedMessages(messages []storedMessage, rejected []delivery.Rejection) (dead []deadMessage) {
	answers := make(map[[2]string]string, len(rejected))
	for _, r := range rejected {
		answers[[2]string{r.SessionID, r.Key}] = delivery.BoundedAnswer(r.Reason)
	}
	for _, m := range messages {
		if answer, is := answers[[2]string{m.sessionID, m.key}]; is {
			dead = append(dead, deadMessage{m.sessionID, m.n, m.size, text(answer)})
		}
	}
	return dead
}

// deadLettersFull reports whether there is no room for more dead letters. Those that are too
// old are deleted first.
func (b *Inbox) deadLettersFull(ctx context.Context, more []deadMessage) (bool, error) {
	if len(more) == 0 {
		return false, nil
	}
	if err := b.deleteOldDeadLetters(ctx); err != nil {
		return false, err
	}
	var count, bytes int64
	if err := b.store.db.QueryRow(ctx, "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM whatsapp_operator_dead_letter").Scan(&count, &bytes); err != nil {
		return false, fmt.Errorf("counting the dead letters: %w", err)
	}
	for _, m := range more {
		count, bytes = count+1, bytes+m.size
	}
	return count > int64(b.opts.DeadLetters) || bytes > b.opts.DeadLetterBytes, nil
}

func (b *Inbox) deleteOldDeadLetters(ctx context.Context) error {
	_, err := b.store.db.Exec(ctx, "DELETE FROM whatsapp_operator_dead_letter WHERE dead_since<"+b.nowIs("$1")+"-$2", b.now(), b.opts.DeadLetterAge.Milliseconds())
	if err != nil {
		return fmt.Errorf("deleting old dead letters: %w", err)
	}
	return nil
}

// storeDeadLetters copies messages to the dead letters.
func (b *Inbox) storeDeadLetters(ctx context.Context, batchID string, reason delivery.DeadLetterReason, dead []deadMessage) error {
	for _, d := range dead {
		if _, err := b.store.db.Exec(ctx, `INSERT INTO whatsapp_operator_dead_letter (namespace, session_id, key, epoch, seq, size, batch_id, reason, answer, dead_since, payload)
			SELECT h.namespace, m.session_id, m.key, m.epoch, m.seq, m.size, $2, $3, $4, `+b.nowIs("$1")+`, m.payload
			FROM whatsapp_operator_inbox AS m JOIN whatsapp_operator_inbox_head AS h ON h.session_id=m.session_id WHERE m.session_id=$5 AND m.n=$6`,
			b.now(), batchID, string(reason), d.answer, d.sessionID, d.n); err != nil {
			return fmt.Errorf("storing a dead letter: %w", err)
		}
	}
	return nil
}

// CountDeadLetters deletes the dead letters that are too old, and counts the rest.
func (b *Inbox) CountDeadLetters(ctx context.Context, _ delivery.Kind) (n int, err error) {
	err = b.transaction(ctx, func(ctx context.Context) error {
		if err := b.deleteOldDeadLetters(ctx); err != nil {
			return err
		}
		return b.store.db.QueryRow(ctx, "SELECT COUNT(*) FROM whatsapp_operator_dead_letter").Scan(&n)
	})
	if err != nil {
		return 0, fmt.Errorf("counting the dead letters: %w", err)
	}
	return n, nil
}

// DeadLetters visits the dead letters, the oldest first, until visit returns false. Those that
// are too old are deleted first.
func (b *Inbox) DeadLetters(ctx context.Context, kind delivery.Kind, visit func(delivery.DeadLetter) bool) error {
	if _, err := b.CountDeadLetters(ctx, kind); err != nil {
		return err
	}
	for last := int64(0); ; {
		var page []delivery.DeadLetter
		err := b.do(ctx, func(ctx context.Context) error {
			rows, err := b.store.db.Query(ctx, fmt.Sprintf(`SELECT id, session_id, key, epoch, seq, batch_id, reason, answer, dead_since, payload
				FROM whatsapp_operator_dead_letter WHERE id>$1 ORDER BY id LIMIT %d`, deadLetterPage), last)
			page, err = dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (l delivery.DeadLetter, err error) {
				var at int64
				var reason string
				var payload []byte
				err = row.Scan(&last, &l.SessionID, &l.Key, &l.Epoch, &l.Seq, &l.BatchID, &reason, &l.Answer, &at, &payload)
				l.ID, l.Kind, l.At = deadLetterPrefix+strconv.FormatInt(last, 10), delivery.KindMessage, time.UnixMilli(at).UTC()
				l.Reason, l.Payload = delivery.DeadLetterReason(reason), json.RawMessage(payload)
				return l, err
			}, err).AsList()
			return err
		})
		if err != nil {
			return fmt.Errorf("reading the dead letters: %w", err)
		}
		for _, l := range page {
			if !visit(l) {
				return nil
			}
		}
		if len(page) < deadLetterPage {
			return nil
		}
	}
}

// Replay makes the message of a dead letter wait again, behind the other messages of its
// session and with the key and the numbers that it had. It is OtherNamespace if a session of
// another namespace has the id now, or messages of one wait.
func (b *Inbox) Replay(ctx context.Context, _ delivery.Kind, id string) (result delivery.ReplayResult, err error) {
	number, err := parseDeadLetterID(id)
	if err != nil {
		return delivery.NotFound, err
	}
	err = b.transaction(ctx, func(ctx context.Context) error {
		result = delivery.NotFound
		var namespace, sessionID, key string
		var epoch, seq, size int64
		var payload []byte
		rows, err := b.store.db.Query(ctx, "DELETE FROM whatsapp_operator_dead_letter WHERE id=$1 RETURNING namespace, session_id, key, epoch, seq, size, payload", number)
		if found, err := one(rows, err, &namespace, &sessionID, &key, &epoch, &seq, &size, &payload); err != nil || !found {
			return err
		}
		if err := b.store.lockID(ctx, sessionID); err != nil {
			return err
		}
		var other bool
		if err := b.store.db.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM whatsapp_operator_session WHERE "+b.store.sameID("session_id", "$1")+" AND namespace<>$2)",
			sessionID, namespace).Scan(&other); err != nil {
			return err
		}
		if !other { // it may be gone, and its messages wait
			if other, err = b.store.messagesOfOthers(ctx, sessionID, namespace); err != nil {
				return err
			}
		}
		if other {
			result = delivery.OtherNamespace
			return errKeep
		}
		var tail int64
		// The key of the last push stays: its holder may be about to repeat it.
		if err := b.store.db.QueryRow(ctx, `INSERT INTO whatsapp_operator_inbox_head AS h (session_id, namespace, tail, head, bytes_in, bytes_out, due, last_key)
			VALUES ($2, $3, 1, 0, $4, 0, `+b.nowIs("$1")+`, '')
			ON CONFLICT (session_id) DO UPDATE SET namespace=excluded.namespace, tail=h.tail+1, bytes_in=h.bytes_in+excluded.bytes_in,
				due=CASE WHEN h.due IS NULL AND h.batch IS NULL THEN excluded.due ELSE h.due END
			RETURNING tail`, b.now(), sessionID, namespace, size).Scan(&tail); err != nil {
			return err
		}
		_, err = b.store.db.Exec(ctx, `INSERT INTO whatsapp_operator_inbox (session_id, n, key, epoch, seq, size, pushed_at, payload)
			VALUES ($2, $3, $4, $5, $6, $7, `+b.nowIs("$1")+`, $8)`, b.now(), sessionID, tail, key, epoch, seq, size, payload)
		result = delivery.Replayed
		return err
	})
	if errors.Is(err, errKeep) {
		err = nil
	}
	if err != nil {
		return delivery.NotFound, fmt.Errorf("replaying a dead letter: %w", err)
	}
	return result, nil
}

// errKeep ends a transaction without a change.
var errKeep = errors.New("keep the dead letter")

// Drop deletes dead letters, and returns how many there were.
func (b *Inbox) Drop(ctx context.Context, _ delivery.Kind, ids ...string) (int, error) {
	numbers := make([]messageRange, 0, len(ids))
	for _, id := range ids {
		number, err := parseDeadLetterID(id)
		if err != nil {
			return 0, err
		}
		numbers = append(numbers, messageRange{First: number})
	}
	var n int64
	err := b.transaction(ctx, func(ctx context.Context) error {
		result, err := b.store.db.Exec(ctx, "DELETE FROM whatsapp_operator_dead_letter WHERE id IN (SELECT r.a FROM "+b.rangesOf("$1")+")", encodeRanges(numbers))
		if err != nil {
			return err
		}
		n, err = result.RowsAffected()
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("deleting dead letters: %w", err)
	}
	return int(n), nil
}

func parseDeadLetterID(id string) (int64, error) {
	digits, has := strings.CutPrefix(id, deadLetterPrefix)
	number, err := strconv.ParseUint(digits, 10, 63)
	if !has || err != nil {
		return 0, fmt.Errorf("%q: %w", id, ErrInvalidDeadLetterID)
	}
	return int64(number), nil
}

package batch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// deadLetterPage is how many dead letters are read in one round trip.
const deadLetterPage = 500

// ErrInvalidDeadLetterID says that a text is not the id of a dead letter.
var ErrInvalidDeadLetterID = errors.New("the id of a dead letter is two numbers with a dash between them, as \"deadletter list\" prints it")

// DeadLetter finishes a batch of one item that Laravel refuses for good: it stores the item
// as a dead letter with a reason and Laravel's answer. If there is no room it returns
// ErrDeadLettersFull; then nothing was changed and the claim is still held. ErrClaimLost
// and nil as with Ack.
func (q *Queue) DeadLetter(ctx context.Context, b *delivery.Batch, reason delivery.DeadLetterReason, answer delivery.Answer) error {
	if len(b.Items) != 1 {
		return fmt.Errorf("a batch of %d items cannot be a dead letter: split it", len(b.Items))
	}
	return q.ack(ctx, b, reason, []delivery.Rejection{{SessionID: b.Items[0].SessionID, Reason: answer.Text()}})
}

// DeadLetters visits the dead letters of a kind, the oldest first, until visit returns false.
// Those that are too old are deleted first.
func (q *Queue) DeadLetters(ctx context.Context, kind delivery.Kind, visit func(delivery.DeadLetter) bool) error {
	if _, err := q.CountDeadLetters(ctx, kind); err != nil {
		return err
	}
	for from := "-"; ; {
		entries, err := q.client.XRangeN(ctx, q.keys.DeadLetters(kind), from, "+", deadLetterPage).Result()
		if err != nil {
			return fmt.Errorf("reading the dead letters: %w", err)
		}
		for _, entry := range entries {
			if !visit(parseDeadLetter(kind, entry)) {
				return nil
			}
		}
		if len(entries) < deadLetterPage {
			return nil
		}
		from = "(" + entries[len(entries)-1].ID
	}
}

// CountDeadLetters deletes the dead letters of a kind that are too old, and counts the rest.
func (q *Queue) CountDeadLetters(ctx context.Context, kind delivery.Kind) (int, error) {
	key := q.keys.DeadLetters(kind)
	now, err := q.client.Time(ctx).Result()
	if err != nil {
		return 0, fmt.Errorf("asking Redis for the time: %w", err)
	}
	oldest := strconv.FormatInt(max(0, now.Add(-q.opts.DeadLetterAge).UnixMilli()), 10)
	if err := q.client.XTrimMinID(ctx, key, oldest).Err(); err != nil {
		return 0, fmt.Errorf("deleting old dead letters: %w", err)
	}
	n, err := q.client.XLen(ctx, key).Result()
	if err != nil {
		return 0, fmt.Errorf("counting the dead letters: %w", err)
	}
	return int(n), nil
}

// Replay enqueues the item of a dead letter again, with the same numbers, unless there is a
// newer item of the session: then Laravel would ignore it.
func (q *Queue) Replay(ctx context.Context, kind delivery.Kind, id string) (delivery.ReplayResult, error) {
	if !isDeadLetterID(id) {
		return delivery.NotFound, fmt.Errorf("%q: %w", id, ErrInvalidDeadLetterID)
	}
	answer, err := replayScript.Run(ctx, q.client, q.kindKeys(kind), q.args(kind, id)...).Int()
	if err != nil {
		return delivery.NotFound, fmt.Errorf("replaying a dead letter: %w", err)
	}
	if delivery.ReplayResult(answer) == delivery.Replayed {
		if err := q.client.Publish(ctx, q.keys.Wake(), string(kind)).Err(); err != nil {
			return delivery.Replayed, fmt.Errorf("waking the flusher: %w", err)
		}
	}
	return delivery.ReplayResult(answer), nil
}

// Drop deletes dead letters, and returns how many there were.
func (q *Queue) Drop(ctx context.Context, kind delivery.Kind, ids ...string) (int, error) {
	for _, id := range ids {
		if !isDeadLetterID(id) {
			return 0, fmt.Errorf("%q: %w", id, ErrInvalidDeadLetterID)
		}
	}
	if len(ids) == 0 {
		return 0, nil
	}
	n, err := q.client.XDel(ctx, q.keys.DeadLetters(kind), ids...).Result()
	if err != nil {
		return 0, fmt.Errorf("deleting dead letters: %w", err)
	}
	return int(n), nil
}

func parseDeadLetter(kind delivery.Kind, entry goredis.XMessage) delivery.DeadLetter {
	text := func(key string) string {
		value, _ := entry.Values[key].(string)
		return value
	}
	l := delivery.DeadLetter{
		ID: entry.ID, Kind: kind, SessionID: text("session_id"), BatchID: text("batch_id"),
		Reason: delivery.DeadLetterReason(text("reason")), Answer: text("answer"), Payload: json.RawMessage(text("payload")),
	}
	l.Epoch, _ = strconv.ParseInt(text("epoch"), 10, 64)
	l.Seq, _ = strconv.ParseInt(text("seq"), 10, 64)
	milliseconds, _, _ := strings.Cut(entry.ID, "-")
	if at, err := strconv.ParseInt(milliseconds, 10, 64); err == nil {
		l.At = time.UnixMilli(at).UTC()
	}
	return l
}

// isDeadLetterID reports whether Redis reads this as the id of one entry.
func isDeadLetterID(id string) bool {
	milliseconds, sequence, found := strings.Cut(id, "-")
	if !found {
		return false
	}
	for _, part := range []string{milliseconds, sequence} {
		if _, err := strconv.ParseUint(part, 10, 64); err != nil {
			return false
		}
	}
	return true
}

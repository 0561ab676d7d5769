package batch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
)

const (
	// enqueueChunk bounds the items of one run of the script, because Redis runs nothing
	// else at that time: 200 items take about a millisecond.
	enqueueChunk = 200
	// defaultNumbersTTL is how long the numbers of the last delivered item are
	// kept. It must be longer than the greatest delay of an update: a worker that was
	// paused writes at most a few minutes late, and Laravel ignores an item that is not newer.
	defaultNumbersTTL = 7 * 24 * time.Hour
	// defaultDeadLetters bounds the dead letters of a kind. With 64 KiB each, the largest
	// size of an item, they take 640 MB; with the usual 500 bytes, 5 MB.
	defaultDeadLetters = 10_000
	// defaultDeadLetterAge is how long a dead letter is kept (docs/architecture.md, "QR and status").
	defaultDeadLetterAge = 7 * 24 * time.Hour
	// repairInterval is the shortest time between two repairs of a queue: after each, every
	// present state is published again, and a Redis that often loses keys must not make this
	// a permanent load.
	repairInterval = 10 * time.Second
)

// ErrInvalidItem says that an item cannot be enqueued; it is a fault of the program.
var ErrInvalidItem = errors.New("invalid item")

// EnqueueCode is the result of enqueuing an item.
type EnqueueCode int

const (
	// Stale: the queue holds a newer item of the session or has finished one;
	// nothing was changed. EnqueueResult.Newest has its numbers.
	Stale EnqueueCode = iota
	// Queued: the item waits. A repeated enqueue of an item that still waits also gets
	// this code.
	Queued
	// Replaced: the item replaces an older one that waits; Laravel does not get the older one.
	Replaced
	// Unknown: the queue knows nothing of the session; nothing was changed.
	// Only Update returns it.
	Unknown
	// Repeated: the queue has finished this same item and knows of no newer one;
	// nothing was changed.
	Repeated
)

// EnqueueResult is the result of enqueuing an item.
type EnqueueResult struct {
	Code EnqueueCode
	// Newest are the numbers of the newest item of the session that the queue holds or has
	// finished, if the code is Stale. A caller that has published nothing newer must use
	// higher numbers from now on; otherwise Laravel gets no update of the session any more.
	Newest delivery.Numbers
}

// DefaultQRInterval is the shortest time between two QR codes of a session that are sent to
// Laravel while the code that Laravel has is still valid (docs/architecture.md, "QR and
// status"). People scan from Redis and from the resource, so Laravel does not need every code.
const DefaultQRInterval = 30 * time.Second

// Options of a Queue. The zero value is what production uses.
type Options struct {
	// QRInterval is the shortest time between two QR codes of a session that are sent to
	// Laravel while the last one is valid; default DefaultQRInterval.
	QRInterval time.Duration
	// NumbersTTL is how long the numbers of the last delivered item of a session
	// are kept; default 7 days.
	NumbersTTL time.Duration
	// DeadLetters is how many are kept per kind; default 10,000.
	DeadLetters int
	// DeadLetterAge is how long they are kept; default 7 days.
	DeadLetterAge time.Duration
	// Durability decides when an enqueued item counts as in Redis; nil: when
	// Redis has answered.
	Durability *redis.Durability
	// OnExpired, if set, is called with the number of items that were dropped because they
	// expired before they could be sent.
	OnExpired func(kind delivery.Kind, n int)
	// OnRepaired, if set, is called after a repair, because keys of the queue were deleted,
	// evicted or overwritten. It must not block.
	OnRepaired func(kind delivery.Kind, r Repair)
	// Now, if set, replaces the clock of Redis. It is for tests: see NewQueue.
	Now func() time.Time
}

// Queue is the coalescing queue of each kind, in Redis. All its methods may be
// called by any number of processes at once. Each may be repeated after an
// error: the repetition of a call whose answer was lost changes nothing.
type Queue struct {
	client goredis.UniversalClient
	keys   redis.Keys
	clock  clock.PassiveClock
	opts   Options

	// tokens are those of claims.
	tokens delivery.Tokens

	mu sync.Mutex
	// repaired is when this process last repaired a queue.
	repaired map[delivery.Kind]time.Time
}

// Repair is the result of a repair. Both counts are zero if the queue is new, or all of it
// was deleted.
type Repair struct {
	// Discarded counts the records that could not be read, or belonged to missing ones.
	Discarded int
	// Restored counts the due times, claims and marks that were restored from other keys.
	Restored int
}

// NewQueue makes a queue over client; it does no I/O.
//
// The scripts compare due times and deadlines with the clock of Redis. Many workers
// write these times and the current leader reads them: with the clock of each machine, a
// worker whose clock is ahead would delay its own updates, and a leader whose clock is
// ahead would repeat a batch whose request is still running. clk is the caller's clock;
// the times in answers are converted to it, and it may differ from that of Redis. Only a
// code's ExpiresAt comes from another machine, and seconds do not matter there.
func NewQueue(client goredis.UniversalClient, keys redis.Keys, clk clock.PassiveClock, opts Options) *Queue {
	if opts.QRInterval == 0 {
		opts.QRInterval = DefaultQRInterval
	}
	if opts.NumbersTTL == 0 {
		opts.NumbersTTL = defaultNumbersTTL
	}
	if opts.DeadLetters == 0 {
		opts.DeadLetters = defaultDeadLetters
	}
	if opts.DeadLetterAge == 0 {
		opts.DeadLetterAge = defaultDeadLetterAge
	}
	return &Queue{client: client, keys: keys, clock: clk, opts: opts, repaired: map[delivery.Kind]time.Time{}}
}

// Enqueue adds items in one round trip and wakes the flusher. For each session
// the item with the highest Numbers is kept. The results are in the order of the
// items. After an error it is unknown which items are in the queue: enqueue
// them again. After ErrInvalidItem none is in the queue.
func (q *Queue) Enqueue(ctx context.Context, kind delivery.Kind, items ...delivery.Item) ([]EnqueueResult, error) {
	return q.enqueue(ctx, kind, false, items)
}

// Update is Enqueue for a caller that may read from a stale cache. It adds an item only if
// the queue knows an earlier one of the session, waiting or delivered within
// Options.NumbersTTL, so that the newer one wins. Otherwise the code is Unknown, because
// a Redis that was emptied would accept an old item too.
func (q *Queue) Update(ctx context.Context, kind delivery.Kind, items ...delivery.Item) ([]EnqueueResult, error) {
	return q.enqueue(ctx, kind, true, items)
}

func (q *Queue) enqueue(ctx context.Context, kind delivery.Kind, knownOnly bool, items []delivery.Item) ([]EnqueueResult, error) {
	if len(items) == 0 {
		return nil, nil
	}
	var chunks [][]any
	for start := 0; start < len(items); start += enqueueChunk {
		args := q.args(kind, knownOnly)
		for _, item := range items[start:min(start+enqueueChunk, len(items))] {
			if err := validate(kind, item); err != nil {
				return nil, err
			}
			args = append(args, item.SessionID, item.Numbers.String(), class(item.Priority), millis(item.ExpiresAt), []byte(item.Payload))
		}
		chunks = append(chunks, args)
	}
	keys := q.kindKeys(kind)
	run := func(eval func(goredis.Pipeliner, []any) *goredis.Cmd) ([]*goredis.Cmd, error) {
		var answers []*goredis.Cmd
		fill := func(p goredis.Pipeliner) error {
			answers = answers[:0]
			for _, args := range chunks {
				answers = append(answers, eval(p, args))
			}
			p.Publish(ctx, q.keys.Wake(), string(kind))
			return nil
		}
		if q.opts.Durability != nil {
			_, err := q.opts.Durability.Pipelined(ctx, keys[0], fill)
			return answers, err
		}
		_, err := q.client.Pipelined(ctx, fill)
		return answers, err
	}
	answers, err := run(func(p goredis.Pipeliner, args []any) *goredis.Cmd {
		return enqueueScript.EvalSha(ctx, p, keys, args...)
	})
	if goredis.HasErrorPrefix(err, "NOSCRIPT") {
		// Redis was restarted, or never had the script: send its text.
		answers, err = run(func(p goredis.Pipeliner, args []any) *goredis.Cmd {
			return enqueueScript.Eval(ctx, p, keys, args...)
		})
	}
	if err != nil {
		return nil, fmt.Errorf("enqueuing %d items: %w", len(items), err)
	}
	results := make([]EnqueueResult, 0, len(items))
	for _, answer := range answers {
		parts, err := answer.Slice()
		if err != nil {
			return nil, fmt.Errorf("reading the answer to an enqueue: %w", err)
		}
		for _, part := range parts {
			result, err := parseResult(part)
			if err != nil {
				return nil, fmt.Errorf("reading the answer to an enqueue: %w", err)
			}
			results = append(results, result)
		}
	}
	if len(results) != len(items) {
		return nil, fmt.Errorf("the answer to an enqueue of %d items has %d results", len(items), len(results))
	}
	return results, nil
}

// Withdraw removes the waiting item of a session if its numbers are not higher than
// upTo: for a QR code that was used or a session that was deleted. Older items that arrive
// later are refused. An item in flight cannot be removed.
func (q *Queue) Withdraw(ctx context.Context, kind delivery.Kind, sessionID string, upTo delivery.Numbers) error {
	if err := withdrawScript.Run(ctx, q.client, q.kindKeys(kind), q.args(kind, sessionID, upTo.String())...).Err(); err != nil {
		return fmt.Errorf("withdrawing an item: %w", err)
	}
	return nil
}

// WakeUps returns a channel that gets a value after enqueues of any process; several
// enqueues may give one value. It is closed when ctx has ended and its goroutine has
// stopped. A wake-up can be lost, because Redis publishes only to connected clients, so
// the caller also needs a timer.
func (q *Queue) WakeUps(ctx context.Context) <-chan struct{} {
	return q.wakeUps(ctx, func(kind delivery.Kind) bool { return kind != delivery.KindMessage })
}

// MessageWakeUps is WakeUps for the messages in the inbox: it gets a value after WakeForMessages.
func (q *Queue) MessageWakeUps(ctx context.Context) <-chan struct{} {
	return q.wakeUps(ctx, func(kind delivery.Kind) bool { return kind == delivery.KindMessage })
}

// WakeForMessages wakes the flusher of messages, for a process that has pushed one. Without
// Redis the message is delivered a little later.
func (q *Queue) WakeForMessages(ctx context.Context) error {
	if err := q.client.Publish(ctx, q.keys.Wake(), string(delivery.KindMessage)).Err(); err != nil {
		return fmt.Errorf("waking the flusher of messages: %w", err)
	}
	return nil
}

func (q *Queue) wakeUps(ctx context.Context, wanted func(delivery.Kind) bool) <-chan struct{} {
	wake := make(chan struct{}, 1)
	subscription := q.client.Subscribe(ctx, q.keys.Wake())
	go func() {
		defer close(wake)
		defer func() { _ = subscription.Close() }()
		messages := subscription.Channel()
		for {
			select {
			case <-ctx.Done():
				return
			case message, open := <-messages:
				if !open {
					return
				}
				if !wanted(delivery.Kind(message.Payload)) {
					continue
				}
				select {
				case wake <- struct{}{}:
				default: // another wake-up is already in the channel
				}
			}
		}
	}()
	return wake
}

// Backlog says what waits of kind, in one round trip. If keys of the queue are missing or
// cannot be read, it repairs the queue first.
func (q *Queue) Backlog(ctx context.Context, kind delivery.Kind) (delivery.Backlog, error) {
	pending, damaged, err := q.inspect(ctx, kind)
	if err != nil || !damaged || !q.mayRepair(kind) {
		return pending, err
	}
	if err := q.repair(ctx, kind); err != nil {
		return delivery.Backlog{}, err
	}
	pending, _, err = q.inspect(ctx, kind)
	return pending, err
}

func (q *Queue) mayRepair(kind delivery.Kind) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	last, found := q.repaired[kind]
	return !found || q.clock.Since(last) >= repairInterval
}

// repair makes the keys of a queue consistent, and makes every process publish its present
// state again, which replaces the lost items.
func (q *Queue) repair(ctx context.Context, kind delivery.Kind) error {
	// The marker is deleted first, because after a repair nothing shows what was wrong: if
	// this process ends in between, the next one repairs the queue and deletes the marker again.
	if err := redis.DeleteMarker(ctx, q.client, q.keys); err != nil {
		return fmt.Errorf("repairing the queue: %w", err)
	}
	answer, err := repairScript.Run(ctx, q.client, q.kindKeys(kind), q.args(kind)...).Int64Slice()
	if err != nil {
		return fmt.Errorf("repairing the queue: %w", err)
	}
	if len(answer) != 2 {
		return fmt.Errorf("the answer to a repair of the queue has %d parts", len(answer))
	}
	q.mu.Lock()
	q.repaired[kind] = q.clock.Now()
	q.mu.Unlock()
	if q.opts.OnRepaired != nil {
		q.opts.OnRepaired(kind, Repair{Discarded: int(answer[0]), Restored: int(answer[1])})
	}
	return nil
}

// inspect reads what waits, and whether the queue is damaged.
func (q *Queue) inspect(ctx context.Context, kind delivery.Kind) (_ delivery.Backlog, damaged bool, _ error) {
	answer, err := pendingScript.Run(ctx, q.client, q.kindKeys(kind), q.args(kind)...).Int64Slice()
	if err != nil {
		return delivery.Backlog{}, false, fmt.Errorf("asking the queue what waits: %w", err)
	}
	if len(answer) != 12 {
		return delivery.Backlog{}, false, fmt.Errorf("the answer to what waits in the queue has %d parts", len(answer))
	}
	received := q.clock.Now()
	local := func(ms int64) time.Time {
		if ms == 0 {
			return time.Time{}
		}
		return received.Add(time.Duration(ms-answer[0]) * time.Millisecond)
	}
	return delivery.Backlog{
		Urgent: int(answer[1]), Normal: int(answer[2]),
		UrgentSince: local(answer[3]), NormalSince: local(answer[4]),
		NextDue: local(answer[5]),
		Waiting: int(answer[6]), InFlight: int(answer[7]),
		Unfinished: int(answer[8]), Claimable: int(answer[9]), NextClaimable: local(answer[10]),
	}, answer[11] != 0, nil
}

// Claim claims a batch for the length of lease (at least MinLease). It first claims the
// oldest unfinished batch that was released or whose claim has ended, with the same id and
// exactly the same items; only a QR batch with an expired code is replaced by one without
// it, under a new id. If there is none, it takes up to limit due items of sessions that
// have nothing in flight, the urgent ones first, and stores them as a batch; with limit 0
// it claims only unfinished batches. It returns nil when there is nothing to claim.
//
// The batch belongs to the caller until its Deadline, which is in the caller's clock and
// counts from before the command was sent. Ack, Release, Split and DeadLetter check the
// claim by ID and Attempt together.
func (q *Queue) Claim(ctx context.Context, kind delivery.Kind, limit int, lease time.Duration) (*delivery.Batch, error) {
	if lease < delivery.MinLease || lease > delivery.MaxHold {
		return nil, fmt.Errorf("a claim of %s is not between %s and %s", lease, delivery.MinLease, delivery.MaxHold)
	}
	// The client repeats a command that got no answer. It must not do so after another
	// process could have finished the batch of the first one: the repetition would use its
	// id again. So all repetitions must end well before the lease.
	ctx, cancel := context.WithTimeout(ctx, lease/2)
	defer cancel()
	token, _ := q.tokens.Next(kind)
	for {
		sent := q.clock.Now()
		answer, err := claimScript.Run(ctx, q.client, q.kindKeys(kind),
			q.args(kind, token, delivery.NewBatchID(), limit, lease.Milliseconds())...).Slice()
		if err != nil {
			q.tokens.Keep(kind, token)
			return nil, fmt.Errorf("claiming a batch: %w", err)
		}
		claimed, err := parseClaim(answer)
		if err != nil && claimed.id != "" {
			// The stored batch is useless. It is discarded, and the present states of its
			// sessions are published again.
			unreadable := &delivery.Batch{ID: claimed.id, Kind: kind, Attempt: claimed.attempt}
			if err := q.finish(ctx, discardScript, unreadable, q.args(kind, claimed.id, claimed.attempt), "discarding a batch that cannot be read"); err != nil {
				return nil, err
			}
			token, _ = q.tokens.Next(kind)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading a claimed batch: %w", err)
		}
		if claimed.expired > 0 && q.opts.OnExpired != nil {
			q.opts.OnExpired(kind, claimed.expired)
		}
		if claimed.id == "" {
			if claimed.more { // the script stopped after a run of expired items
				continue
			}
			return nil, nil
		}
		return &delivery.Batch{
			ID: claimed.id, Kind: kind, Items: claimed.items, Attempt: claimed.attempt,
			Deadline: sent.Add(time.Duration(claimed.until-claimed.now) * time.Millisecond),
		}, nil
	}
}

// Ack finishes a batch that Laravel has accepted. If an item was replaced while it was in
// flight, the newer one becomes due; the items that Laravel rejected by name become
// dead letters. If another process has claimed the batch since, it returns ErrClaimLost
// and changes nothing; if the batch is not stored any more, it returns nil. With
// ErrDeadLettersFull the delivered items are acknowledged, and the rejected ones are
// stored as a separate batch with a new id, which can be claimed when this claim would
// have ended.
func (q *Queue) Ack(ctx context.Context, b *delivery.Batch, rejected ...delivery.Rejection) error {
	return q.ack(ctx, b, delivery.RejectedByName, rejected)
}

func (q *Queue) ack(ctx context.Context, b *delivery.Batch, reason delivery.DeadLetterReason, rejected []delivery.Rejection) error {
	args := q.args(b.Kind, b.ID, b.Attempt, delivery.NewBatchID(), q.opts.DeadLetters, q.opts.DeadLetterAge.Milliseconds())
	for _, r := range rejected {
		args = append(args, r.SessionID, string(reason), delivery.BoundedAnswer(r.Reason))
	}
	return q.finish(ctx, ackScript, b, args, "acknowledging a batch")
}

// Release ends the claim of a batch. It can be claimed again at notBefore (zero or past: at
// once; at most 15 minutes from now), with the same id and items; its sessions stay in
// flight. ErrClaimLost and nil as with Ack.
func (q *Queue) Release(ctx context.Context, b *delivery.Batch, notBefore time.Time) error {
	delay := min(max(0, notBefore.Sub(q.clock.Now())), delivery.MaxHold)
	return q.finish(ctx, releaseScript, b, q.args(b.Kind, b.ID, b.Attempt, delay.Milliseconds()), "releasing a batch")
}

// Split replaces a batch by two, each with a new id and one half of the items in their
// order. Both can be claimed at once, the first half first. A batch of one item gets a new
// id. ErrClaimLost and nil as with Ack.
func (q *Queue) Split(ctx context.Context, b *delivery.Batch) error {
	first, second := delivery.NewBatchID(), delivery.NewBatchID()
	return q.finish(ctx, splitScript, b, q.args(b.Kind, b.ID, b.Attempt, first, second), "splitting a batch")
}

// finish runs a script that needs the claim of b.
func (q *Queue) finish(ctx context.Context, script *goredis.Script, b *delivery.Batch, args []any, what string) error {
	answer, err := script.Run(ctx, q.client, q.kindKeys(b.Kind), args...).Int()
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", what, err)
	case answer == claimLost:
		return fmt.Errorf("%s: %w", what, delivery.ErrClaimLost)
	case answer == deadLettersFull:
		return fmt.Errorf("%s: %w", what, delivery.ErrDeadLettersFull)
	}
	return nil
}

// kindKeys are the KEYS of every script, in the order of scripts/lib.lua.
func (q *Queue) kindKeys(kind delivery.Kind) []string {
	parts := []string{"items", "urgent", "normal", "flight", "last", "forget", "open", "claims", "content"}
	keys := make([]string, 0, len(parts)+2)
	for _, part := range parts {
		keys = append(keys, q.keys.Queue(kind, part))
	}
	return append(keys, q.keys.DeadLetters(kind), q.keys.Queue(kind, "state"))
}

// args are the ARGV of a script: those that scripts/lib.lua reads, then the script's own.
func (q *Queue) args(kind delivery.Kind, own ...any) []any {
	now := ""
	if q.opts.Now != nil {
		now = millis(q.opts.Now())
	}
	return append([]any{now, string(kind), q.opts.QRInterval.Milliseconds(), q.opts.NumbersTTL.Milliseconds()}, own...)
}

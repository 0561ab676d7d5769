package batch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/liveness"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
)

const (
	// requestMargin is how long before its claim a request ends (docs/architecture.md, "QR
	// and status"): the next leader must not claim a batch while its request may still be
	// answered.
	requestMargin         = 5 * time.Second
	defaultRequestTimeout = 15 * time.Second
	// maxRequestTimeout bounds how long a batch stays claimed after its leader was killed.
	maxRequestTimeout = 5 * time.Minute
	// countInterval is how often the dead letters are counted.
	countInterval = 30 * time.Second
	// The shortest time between two observations of a kind's queue because of wake-ups: a
	// thousand enqueues at once must not become a thousand observations. It is shortest
	// while nothing waits, because the first item may be urgent.
	gapQuiet = 2 * time.Millisecond
	// The time at which waiting statuses are sent is known; only a more urgent status or a
	// full batch makes it earlier.
	gapWaiting = 10 * time.Millisecond
	// The time at which waiting QR codes are sent is known and seconds away; only a full
	// batch makes it earlier.
	gapQR = 100 * time.Millisecond
	// The same for waiting messages, at most 250 ms away; each observation is a query of the
	// database.
	gapMessages = 25 * time.Millisecond
	// idleAfter is how long nothing must have waited before IdlePoll counts.
	idleAfter = 10 * time.Second
	// queuePause is the wait after an error of the queue.
	queuePause = 500 * time.Millisecond
	// finishTimeout bounds one attempt to record an answer in the queue, which
	// is repeated until the claim ends.
	finishTimeout = 2 * time.Second
)

// finishBackoff is the wait between two attempts to record an answer in the queue.
var finishBackoff = backoff.Backoff{First: 50 * time.Millisecond, Most: time.Second}

// Source is the part of Queue, or of the inbox in the database, that the flusher uses.
type Source interface {
	WakeUps(ctx context.Context) <-chan struct{}
	Backlog(ctx context.Context, kind delivery.Kind) (delivery.Backlog, error)
	Claim(ctx context.Context, kind delivery.Kind, limit int, lease time.Duration) (*delivery.Batch, error)
	Ack(ctx context.Context, b *delivery.Batch, rejected ...delivery.Rejection) error
	DeadLetter(ctx context.Context, b *delivery.Batch, reason delivery.DeadLetterReason, answer delivery.Answer) error
	DeadLetters(ctx context.Context, kind delivery.Kind, visit func(delivery.DeadLetter) bool) error
	CountDeadLetters(ctx context.Context, kind delivery.Kind) (int, error)
	Replay(ctx context.Context, kind delivery.Kind, id string) (delivery.ReplayResult, error)
	Release(ctx context.Context, b *delivery.Batch, notBefore time.Time) error
	Split(ctx context.Context, b *delivery.Batch) error
}

// Sender posts a batch to Laravel once and says what the answer means. It must
// end when ctx ends.
type Sender interface {
	Send(ctx context.Context, batch delivery.Batch) delivery.Answer
}

// FlusherOptions are the options of a Flusher. The zero value means the defaults.
type FlusherOptions struct {
	Rules
	// Parallel is the highest number of requests at the same time. At most half of them (but
	// at least one) may be for QR codes. Default 4.
	Parallel int
	// RequestTimeout is how long one request may take, at most 5 minutes; default 15 s. A claim
	// lasts longer, so that a batch is never repeated while its request is still running.
	RequestTimeout time.Duration
	// Poll is how often the queue is observed without wake-ups. It bounds the delay after a
	// lost wake-up. Default 250 ms.
	Poll time.Duration
	// IdlePoll replaces Poll when nothing has waited for 10 s: an idle installation must not
	// query its database all the time. Default: Poll.
	IdlePoll time.Duration
	// Grace is how long running requests may take when the flusher is stopped. Then they are
	// cancelled and their batches released. Default 10 s.
	Grace time.Duration
	// Loop watches the flusher's decisions; nil: nobody does.
	Loop *liveness.Loop
	// OnStopped, if set, is called when delivery of a kind stops, and when the reason of a
	// stop changes, to record an Event. detail is a sentence without secrets. It must not
	// block.
	OnStopped func(kind delivery.Kind, reason StopReason, detail string)
	// OnRecovered, if set, is called when a stopped kind is delivered again. It must not
	// block.
	OnRecovered func(kind delivery.Kind)
}

func (o FlusherOptions) withDefaults() FlusherOptions {
	o.Rules = o.Rules.withDefaults()
	if o.Parallel == 0 {
		o.Parallel = 4
	}
	if o.RequestTimeout == 0 {
		o.RequestTimeout = defaultRequestTimeout
	}
	if o.Poll == 0 {
		o.Poll = 250 * time.Millisecond
	}
	if o.IdlePoll == 0 {
		o.IdlePoll = o.Poll
	}
	if o.Grace == 0 {
		o.Grace = 10 * time.Second
	}
	if o.OnStopped == nil {
		o.OnStopped = func(delivery.Kind, StopReason, string) {}
	}
	if o.OnRecovered == nil {
		o.OnRecovered = func(delivery.Kind) {}
	}
	return o
}

// Validate returns all faults, joined in one error.
func (o FlusherOptions) Validate() error {
	o = o.withDefaults()
	errs := []error{o.Rules.validate()}
	if o.Parallel < 1 {
		errs = append(errs, fmt.Errorf("the flusher needs at least 1 request at a time, not %d", o.Parallel))
	}
	if o.RequestTimeout < 0 || o.RequestTimeout > maxRequestTimeout {
		errs = append(errs, fmt.Errorf("a request may take up to %s, not %s", maxRequestTimeout, o.RequestTimeout))
	}
	if o.Poll < 0 || o.IdlePoll < 0 || o.Grace < 0 {
		errs = append(errs, errors.New("a time of the flusher is negative"))
	}
	return errors.Join(errs...)
}

// lease is how long a claim lasts: the request's time-out, the margin after it, and a second
// for the claim command, because a claim counts from before the command was sent.
func (o FlusherOptions) lease() time.Duration {
	return max(delivery.MinLease, o.RequestTimeout+requestMargin+time.Second)
}

// Flusher sends the items of one source to Laravel. It is a runnable of the manager, and only
// the leader runs it. Two at the same time, as when a leader is replaced, lose and reorder
// nothing, because each claims its batches.
type Flusher struct {
	queue  Source
	kinds  []delivery.Kind
	sender Sender
	clock  clock.Clock
	log    logr.Logger
	opts   FlusherOptions
}

// NewFlusher makes the flusher of states, whose source is the coalescing queue; it does no I/O.
func NewFlusher(queue Source, sender Sender, clk clock.Clock, log logr.Logger, opts FlusherOptions) (*Flusher, error) {
	return newFlusher(queue, []delivery.Kind{delivery.KindStatus, delivery.KindQR}, sender, clk, log, opts)
}

// NewMessageFlusher makes the flusher of messages, whose source is the inbox. It has its own
// goroutine, requests and batches, so that no status waits for the database or for a slow
// request with messages. The defaults of its options are 8 requests at the same time, and
// batches of 200 messages, 10 ms after the first if none was sent in the last 250 ms; without
// messages it queries the database every 5 s. It does no I/O.
func NewMessageFlusher(inbox Source, sender Sender, clk clock.Clock, log logr.Logger, opts FlusherOptions) (*Flusher, error) {
	if opts.MaxItems == 0 {
		opts.MaxItems = 200
	}
	if opts.NormalWindow == 0 {
		opts.NormalWindow = 250 * time.Millisecond
	}
	if opts.Parallel == 0 {
		opts.Parallel = 8
	}
	if opts.IdlePoll == 0 {
		opts.IdlePoll = 5 * time.Second
	}
	return newFlusher(inbox, []delivery.Kind{delivery.KindMessage}, sender, clk, log, opts)
}

func newFlusher(source Source, kinds []delivery.Kind, sender Sender, clk clock.Clock, log logr.Logger, opts FlusherOptions) (*Flusher, error) {
	if err := opts.Validate(); err != nil {
		return nil, fmt.Errorf("configuration of the flusher: %w", err)
	}
	return &Flusher{queue: source, kinds: kinds, sender: sender, clock: clk, log: log, opts: opts.withDefaults()}, nil
}

// NeedLeaderElection implements controller-runtime's LeaderElectionRunnable.
func (f *Flusher) NeedLeaderElection() bool { return true }

// Start delivers until ctx ends. Then it claims nothing more, waits for the running
// requests, releases the batches that they do not finish, and returns nil when all its
// goroutines have ended.
func (f *Flusher) Start(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Requests may run for Grace after ctx has ended.
	requests, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()
	r := &run{Flusher: f, requests: requests, ended: make(chan *kindFlusher, f.opts.Parallel)}
	for _, kind := range f.kinds {
		r.kinds = append(r.kinds, &kindFlusher{kind: kind, stale: true})
	}
	defer func() {
		for _, k := range r.kinds {
			metrics.ForgetDelivery(k.kind)
		}
	}()
	wake := f.queue.WakeUps(ctx)
	f.log.V(1).Info("Starting delivery", "parallel", f.opts.Parallel, "batch", f.opts.MaxItems)

	for wakeUps := wake; ctx.Err() == nil; {
		deciding := f.opts.Loop.Begin()
		timer := f.clock.NewTimer(r.flush(ctx).Sub(f.clock.Now()))
		deciding.End()
		select {
		case <-ctx.Done():
		case _, open := <-wakeUps:
			if !open {
				wakeUps = nil
			}
			for _, k := range r.kinds {
				k.stale = true
			}
		case k := <-r.ended:
			r.deliveryEnded(k)
		case <-timer.C():
		}
		timer.Stop()
	}

	grace := f.clock.NewTimer(f.opts.Grace)
	defer grace.Stop()
	for r.inFlight > 0 {
		select {
		case k := <-r.ended:
			r.deliveryEnded(k)
		case <-grace.C():
			abort()
		}
	}
	for range wake { // wait until it is closed: then its goroutine has ended
	}
	f.log.V(1).Info("Stopped delivery")
	return nil
}

// run is the state of one Start. Fields that mu does not guard belong to Start's goroutine.
type run struct {
	*Flusher
	// requests is the context of the requests and of recording their answers.
	requests context.Context
	kinds    []*kindFlusher
	inFlight int
	// ended gets the kindFlusher of each delivery that has ended; its buffer is large enough for all.
	ended chan *kindFlusher
	// queueError is the last logged error of the queue; empty: the queue answers.
	queueError string

	// mu guards the breakers, the resends and when the dead letters were counted.
	mu sync.Mutex
}

// kindFlusher is the delivery of one kind.
type kindFlusher struct {
	kind     delivery.Kind
	inFlight int
	windows  windows
	// pending is what waited at the time observed; stale: it may have changed.
	pending  delivery.Backlog
	observed time.Time
	stale    bool
	// active is when something waited last.
	active time.Time

	// counted is when the dead letters were last counted. deadLettersRead: those of earlier
	// leaders are in resends. deadLettersNotBefore: the next attempt after an error.
	counted              time.Time
	deadLettersRead      bool
	deadLettersNotBefore time.Time

	breaker circuitBreaker
	resends resends
}

// gap is the shortest time until the next observation because of a wake-up.
func (k *kindFlusher) gap() time.Duration {
	switch {
	case k.kind == delivery.KindQR:
		return gapQR
	case k.kind == delivery.KindMessage && k.pending.Due() > 0:
		return gapMessages
	case k.pending.Due() > 0:
		return gapWaiting
	default:
		return gapQuiet
	}
}

// poll is how often the queue is observed without wake-ups.
func (r *run) poll(k *kindFlusher, now time.Time) time.Duration {
	if now.Sub(k.active) >= idleAfter {
		return r.opts.IdlePoll
	}
	return r.opts.Poll
}

// deliveryEnded records that a delivery has ended.
func (r *run) deliveryEnded(k *kindFlusher) {
	k.inFlight--
	r.inFlight--
	k.stale, k.observed = true, never
}

// room reports whether another request of k's kind may begin.
func (r *run) room(k *kindFlusher) bool {
	if k.kind == delivery.KindQR && k.inFlight >= max(1, r.opts.Parallel/2) {
		return false
	}
	return r.inFlight < r.opts.Parallel
}

// flush sends all batches that must be sent now, and returns when to decide again if nothing
// happens before.
func (r *run) flush(ctx context.Context) time.Time {
	for {
		var again time.Time
		sent := false
		// The kind with the fewest requests first, so that neither kind is blocked by the other.
		slices.SortStableFunc(r.kinds, func(a, b *kindFlusher) int { return a.inFlight - b.inFlight })
		for _, k := range r.kinds {
			r.maintainDeadLetters(ctx, k)
			went, at, err := r.next(ctx, k)
			if err != nil {
				r.queueFailed(ctx, err)
				return r.clock.Now().Add(queuePause)
			}
			sent = sent || went
			again = earliest(earliest(again, at), r.clock.Now().Add(r.poll(k, r.clock.Now())))
		}
		if !sent {
			return again
		}
	}
}

// next sends one batch of k's kind if one must be sent now. Otherwise at is when to try
// again, or never.
func (r *run) next(ctx context.Context, k *kindFlusher) (sent bool, at time.Time, err error) {
	if !r.room(k) {
		return false, never, nil // until a request ends
	}
	now := r.clock.Now()
	r.mu.Lock()
	ok, at := k.breaker.admits(now, k.inFlight)
	probe := k.breaker.halfOpen(now)
	r.mu.Unlock()
	if !ok {
		return false, at, nil
	}
	at = never
	switch {
	case now.Sub(k.observed) >= r.poll(k, now), k.stale && now.Sub(k.observed) >= k.gap():
		if err := r.observe(ctx, k, now); err != nil {
			return false, never, err
		}
	case k.stale:
		at = k.observed.Add(k.gap())
	}
	d := r.opts.decide(k.kind, k.pending, k.windows, r.clock.Now())
	if !d.Claim && probe && k.pending.Due() > 0 {
		d = decision{Claim: true, Limit: r.opts.MaxItems} // a probe does not wait for other items
	}
	if !d.Claim {
		return false, earliest(at, d.At), nil
	}
	batch, err := r.queue.Claim(ctx, k.kind, d.Limit, r.opts.lease())
	if err != nil {
		metrics.QueueError("claim")
		return false, never, err
	}
	now = r.clock.Now()
	k.stale = true
	if batch == nil { // the items have expired, or another process has claimed them
		// They still wait: a pause as short as if nothing waited would query again and again.
		pause := k.gap()
		k.observed, k.pending = now, delivery.Backlog{}
		return false, now.Add(pause), nil
	}
	k.observed = never // the remaining items may be a full batch
	k.windows.sent(r.opts.Rules, now)
	k.inFlight++
	r.inFlight++
	go func() {
		defer func() { r.ended <- k }()
		r.deliver(k, batch)
	}()
	return true, never, nil
}

func (r *run) observe(ctx context.Context, k *kindFlusher, now time.Time) error {
	p, err := r.queue.Backlog(ctx, k.kind)
	if err != nil {
		metrics.QueueError("pending")
		return err
	}
	if r.queueError != "" {
		r.queueError = ""
		r.log.Info("Reached the queue again")
	}
	k.pending, k.observed, k.stale = p, now, false
	if p != (delivery.Backlog{}) {
		k.active = now
	}
	var age time.Duration
	if since := p.Since(); !since.IsZero() {
		age = max(0, now.Sub(since))
	}
	metrics.SetQueue(k.kind, p.Waiting, p.InFlight, p.Unfinished, age)
	return nil
}

// queueFailed logs an error of the queue once, not at each attempt.
func (r *run) queueFailed(ctx context.Context, err error) {
	for _, k := range r.kinds {
		k.stale, k.observed = true, never
	}
	if ctx.Err() == nil && r.queueError != err.Error() {
		r.queueError = err.Error()
		r.log.Error(err, "Failed to read the queue, trying again; nothing is lost")
	}
}

// deliver sends a batch and records the answer.
func (r *run) deliver(k *kindFlusher, batch *delivery.Batch) {
	log := r.log.WithValues("kind", batch.Kind, "batch", batch.ID, "items", len(batch.Items), "attempt", batch.Attempt)
	begun := r.clock.Now()
	left := batch.Deadline.Sub(begun) - requestMargin
	if left <= 0 { // the process was paused
		_ = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, begun) })
		return
	}
	ctx, cancel := context.WithTimeout(r.requests, left)
	answer := r.sender.Send(ctx, *batch)
	cancel()
	now := r.clock.Now()
	if r.requests.Err() != nil && answer.StatusCode == 0 { // we cancelled it: this says nothing about Laravel
		_ = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, now) })
		return
	}
	metrics.DeliveryRequest(batch.Kind, answer.Result, len(batch.Items), now.Sub(begun))
	r.mu.Lock()
	reaction := k.breaker.react(batch, answer, now, rand.Float64)
	r.mu.Unlock()
	if reaction.detail == "" {
		reaction.detail = answer.Detail
	}
	r.report(log, batch, answer, reaction, now.Sub(begun))

	var err error
	switch reaction.step {
	case stepAck:
		err = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Ack(ctx, batch, answer.Rejected...) })
		rejected := rejectedItems(batch, answer.Rejected)
		if err == nil {
			metrics.DeliveryItems(batch.Kind, len(batch.Items)-len(rejected), len(rejected))
			r.deadLettered(log, k, batch, rejected, delivery.RejectedByName, answer)
		}
		if err == nil || errors.Is(err, delivery.ErrDeadLettersFull) {
			r.mu.Lock()
			k.resends.delivered(batch, answer.Rejected, now)
			if reaction.recovered {
				k.resends.all(now)
			}
			r.mu.Unlock()
		}
	case stepDeadLetter:
		err = r.finish(log, batch, func(ctx context.Context) error {
			return r.queue.DeadLetter(ctx, batch, reaction.reason, answer)
		})
		if err == nil {
			metrics.DeliveryItems(batch.Kind, 0, 1)
			r.deadLettered(log, k, batch, batch.Items, reaction.reason, answer)
		}
	case stepSplit:
		err = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Split(ctx, batch) })
	case stepRelease:
		err = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, reaction.notBefore) })
	}
	if errors.Is(err, delivery.ErrDeadLettersFull) {
		r.deadLettersFull(log, k, batch, reaction.step)
	}
}

// deadLettered reports items that became dead letters. It logs neither their content nor
// Laravel's answer, which may contain it: "deadletter show" prints both.
func (r *run) deadLettered(log logr.Logger, k *kindFlusher, batch *delivery.Batch, items []delivery.Item, reason delivery.DeadLetterReason, answer delivery.Answer) {
	if len(items) == 0 {
		return
	}
	metrics.DeadLetters(batch.Kind, string(reason), len(items))
	now := r.clock.Now()
	for _, item := range items {
		log.Info("WARNING: Laravel refused an update for good, it became a dead letter",
			"sessionID", item.SessionID, "key", item.Key, "reason", reason, "epoch", item.Epoch, "seq", item.Seq, "status", answer.StatusCode)
	}
	r.mu.Lock()
	if k.kind == delivery.KindStatus {
		for _, item := range items {
			k.resends.refused(item.SessionID, now)
		}
	}
	k.counted = never
	ended := k.breaker.roomAgain(now)
	r.mu.Unlock()
	if ended {
		r.recovered(log, k.kind)
	}
}

// report logs what an answer means, and reports to people why delivery stops.
func (r *run) report(log logr.Logger, batch *delivery.Batch, answer delivery.Answer, reaction reaction, took time.Duration) {
	log = log.WithValues("status", answer.StatusCode, "took", took)
	switch {
	case reaction.step == stepAck:
		log.V(1).Info("Delivered a batch", "rejected", len(answer.Rejected), "detail", answer.Detail)
	case answer.Result != delivery.Retry && reaction.tripped:
		log.Error(nil, "Stopped delivery until a person corrects what Laravel answers; nothing is lost", "answer", reaction.detail)
	case reaction.tripped:
		log.Error(nil, "Stopped delivery because Laravel is not available; it is probed, and nothing is lost", "answer", reaction.detail)
	case reaction.step == stepSplit:
		log.Info("Halved a batch that Laravel did not accept", "answer", reaction.detail)
	case reaction.step == stepRelease:
		log.Info("Failed to deliver a batch, repeating it", "answer", reaction.detail, "notBefore", reaction.notBefore)
	}
	if reaction.stopped != "" {
		metrics.SetDeliveryStopped(batch.Kind, string(reaction.stopped))
		r.opts.OnStopped(batch.Kind, reaction.stopped, reaction.detail)
	}
	if reaction.recovered {
		r.recovered(log, batch.Kind)
	}
}

func (r *run) recovered(log logr.Logger, kind delivery.Kind) {
	metrics.SetDeliveryStopped(kind, "")
	log.Info("Resumed delivery")
	r.opts.OnRecovered(kind)
}

// deadLettersFull stops delivery of the kind, because nothing may be dropped.
func (r *run) deadLettersFull(log logr.Logger, k *kindFlusher, batch *delivery.Batch, s step) {
	now := r.clock.Now()
	r.mu.Lock()
	stopped := k.breaker.full(now)
	until := k.breaker.until
	r.mu.Unlock()
	const advice = "Laravel refuses an update, and there is no room for another dead letter: list, replay or drop some with \"whatsapp-operator deadletter\""
	log.Error(delivery.ErrDeadLettersFull, "Stopped delivery", "advice", advice)
	if stopped != "" {
		metrics.SetDeliveryStopped(batch.Kind, string(stopped))
		r.opts.OnStopped(batch.Kind, stopped, advice)
	}
	if s == stepDeadLetter { // the claim is still held
		_ = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, until) })
	}
}

// maintainDeadLetters counts the dead letters of a kind regularly, and enqueues refused
// states again that Laravel may accept now. An error does not stop the delivery of other
// items: a full Redis refuses new items, but deliveries empty it.
func (r *run) maintainDeadLetters(ctx context.Context, k *kindFlusher) {
	if r.clock.Now().Before(k.deadLettersNotBefore) {
		return
	}
	if err := r.tryMaintainDeadLetters(ctx, k); err != nil {
		k.deadLettersNotBefore = r.clock.Now().Add(resendBackoff.First)
		metrics.QueueError("dead_letters")
		if ctx.Err() == nil {
			r.log.Error(err, "Failed to process the dead letters, trying again", "kind", k.kind)
		}
	}
}

func (r *run) tryMaintainDeadLetters(ctx context.Context, k *kindFlusher) error {
	now := r.clock.Now()
	r.mu.Lock()
	count := k.counted.IsZero() || now.Sub(k.counted) >= countInterval
	if count {
		k.counted = now
	}
	var due []string
	if k.breaker.until.IsZero() {
		due = k.resends.take(now)
	}
	r.mu.Unlock()
	if count {
		n, err := r.queue.CountDeadLetters(ctx, k.kind)
		if err != nil {
			return err
		}
		metrics.SetDeadLettersKept(k.kind, n)
	}
	if k.kind == delivery.KindStatus && !k.deadLettersRead {
		// An earlier leader may have left some.
		newest, err := r.newestDeadLetters(ctx, k, func(string) bool { return true })
		if err != nil {
			return err
		}
		k.deadLettersRead = true
		r.mu.Lock()
		for sessionID := range newest {
			k.resends.refused(sessionID, now)
		}
		r.mu.Unlock()
	}
	if len(due) == 0 {
		return nil
	}
	return r.resend(ctx, k, due)
}

// newestDeadLetters finds the newest dead letter of each session for which wanted is true.
func (r *run) newestDeadLetters(ctx context.Context, k *kindFlusher, wanted func(sessionID string) bool) (map[string]string, error) {
	newest := map[string]string{}
	err := r.queue.DeadLetters(ctx, k.kind, func(l delivery.DeadLetter) bool {
		if wanted(l.SessionID) {
			newest[l.SessionID] = l.ID
		}
		return true
	})
	return newest, err
}

// resend replays the newest dead letter of each session. If a session has a newer state, that
// one is delivered without a replay.
func (r *run) resend(ctx context.Context, k *kindFlusher, sessionIDs []string) error {
	newest, err := r.newestDeadLetters(ctx, k, func(id string) bool { return slices.Contains(sessionIDs, id) })
	for i, sessionID := range sessionIDs {
		result := delivery.NotFound
		if letter, found := newest[sessionID]; found && err == nil {
			r.mu.Lock()
			k.breaker.refusals.resend(sessionID)
			r.mu.Unlock()
			result, err = r.queue.Replay(ctx, k.kind, letter)
		}
		r.mu.Lock()
		switch {
		case err != nil:
			for _, id := range sessionIDs[i:] {
				k.resends.refused(id, r.clock.Now())
			}
			r.mu.Unlock()
			return err
		case result == delivery.Replayed:
			r.log.V(1).Info("Enqueued a refused state again", "sessionID", sessionID)
		default:
			k.resends.forget(sessionID)
		}
		r.mu.Unlock()
	}
	return nil
}

// finish records an answer in the queue, and repeats this until it succeeds or the claim has
// ended: then the batch is claimed and sent again, and Laravel knows its id. With any error
// other than ErrDeadLettersFull nothing was recorded.
func (r *run) finish(log logr.Logger, batch *delivery.Batch, record func(context.Context) error) error {
	for failures := 1; ; failures++ {
		// The first attempt is made even when Grace is over.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.requests), finishTimeout)
		err := record(ctx)
		cancel()
		switch {
		case err == nil, errors.Is(err, delivery.ErrDeadLettersFull):
			return err
		case errors.Is(err, delivery.ErrClaimLost):
			log.Info("Lost the claim of a batch before its answer was recorded, another process repeats it")
			return err
		}
		metrics.QueueError("finish")
		if r.requests.Err() != nil || !r.clock.Now().Before(batch.Deadline) {
			log.Error(err, "Failed to record the answer to a batch, the batch will be repeated")
			return err
		}
		timer := r.clock.NewTimer(finishBackoff.After(failures))
		select {
		case <-timer.C():
		case <-r.requests.Done():
		}
		timer.Stop()
	}
}

// rejectedItems are the items of a batch that are in the list.
func rejectedItems(batch *delivery.Batch, list []delivery.Rejection) []delivery.Item {
	var items []delivery.Item
	for _, item := range batch.Items {
		if names(list, item) {
			items = append(items, item)
		}
	}
	return items
}

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

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
)

const (
	// requestMargin is how long before its claim a request ends (DESIGN section
	// 5): Redis and the next leader must not believe a batch free while its
	// request may still be answered.
	requestMargin = 5 * time.Second
	// The least time between two looks at a kind that publishes ask for: a
	// thousand of them at once must not become a thousand questions. While
	// nothing is known to wait, the first may be urgent.
	gapQuiet = 2 * time.Millisecond
	// Statuses that wait go at a known time, unless a more urgent one or the
	// fiftieth comes.
	gapWaiting = 10 * time.Millisecond
	// Codes go at a known time within seconds, unless the fiftieth comes.
	gapQR = 100 * time.Millisecond
	// queuePause is the wait after an error of the queue.
	queuePause = 500 * time.Millisecond
	// finishTimeout bounds one attempt to record an answer in the queue, which
	// is repeated until the claim ends.
	finishTimeout = 2 * time.Second
)

// Source is what the flusher needs of the queue; *Queue is one. See there.
type Source interface {
	WakeUps(ctx context.Context) <-chan struct{}
	Pending(ctx context.Context, kind delivery.Kind) (Pending, error)
	Claim(ctx context.Context, kind delivery.Kind, limit int, lease time.Duration) (*delivery.Batch, error)
	Ack(ctx context.Context, b *delivery.Batch, rejected ...delivery.Rejection) error
	DeadLetter(ctx context.Context, b *delivery.Batch, answer delivery.Answer) error
	Release(ctx context.Context, b *delivery.Batch, notBefore time.Time) error
	Split(ctx context.Context, b *delivery.Batch) error
}

// Sender posts a batch to Laravel once and says what the answer means. It must
// end when ctx ends.
type Sender interface {
	Send(ctx context.Context, batch delivery.Batch) delivery.Answer
}

// FlusherOptions of a Flusher. The zero value stands for the defaults.
type FlusherOptions struct {
	Rules
	// Parallel is how many requests there are at a time at most, of which QR
	// codes take at most half (but at least one); default 4.
	Parallel int
	// Lease is how long a claim holds; a request gets 5 s less. Default 20 s.
	Lease time.Duration
	// Poll is how often the queue is looked at when nobody publishes; it bounds
	// what a lost publish costs. Default 250 ms.
	Poll time.Duration
	// Grace is how long requests may take to end when the flusher is stopped;
	// then they are cut off and their batches given back. Default 10 s.
	Grace time.Duration
	// OnStopped, where set, is called when delivery of a kind stops, or goes on
	// being stopped for another reason: for an Event. detail is a sentence
	// without secrets. It must not block.
	OnStopped func(kind delivery.Kind, reason StopReason, detail string)
	// OnRecovered, where set, is called when delivery of a kind that was
	// stopped goes on. It must not block.
	OnRecovered func(kind delivery.Kind)
}

func (o FlusherOptions) withDefaults() FlusherOptions {
	o.Rules = o.Rules.withDefaults()
	if o.Parallel == 0 {
		o.Parallel = 4
	}
	if o.Lease == 0 {
		o.Lease = 20 * time.Second
	}
	if o.Poll == 0 {
		o.Poll = 250 * time.Millisecond
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

// Validate returns everything that is wrong, joined in one error.
func (o FlusherOptions) Validate() error {
	o = o.withDefaults()
	errs := []error{o.Rules.validate()}
	if o.Parallel < 1 {
		errs = append(errs, fmt.Errorf("the flusher needs at least 1 request at a time, not %d", o.Parallel))
	}
	if o.Lease < MinLease {
		errs = append(errs, fmt.Errorf("a claim must hold for at least %s, not %s", MinLease, o.Lease))
	}
	if o.Poll < 0 || o.Grace < 0 {
		errs = append(errs, errors.New("a time of the flusher is negative"))
	}
	return errors.Join(errs...)
}

// Flusher empties the queue into Laravel. It is a runnable of the manager that
// only the leader runs; two at a time, as when a leader is replaced, lose and
// reorder nothing, because what one has claimed the other leaves alone.
type Flusher struct {
	queue  Source
	sender Sender
	clock  clock.Clock
	log    logr.Logger
	opts   FlusherOptions
}

// NewFlusher makes a flusher; it does no I/O.
func NewFlusher(queue Source, sender Sender, clk clock.Clock, log logr.Logger, opts FlusherOptions) (*Flusher, error) {
	if err := opts.Validate(); err != nil {
		return nil, fmt.Errorf("configuration of the flusher: %w", err)
	}
	return &Flusher{queue: queue, sender: sender, clock: clk, log: log, opts: opts.withDefaults()}, nil
}

// NeedLeaderElection implements controller-runtime's LeaderElectionRunnable.
func (f *Flusher) NeedLeaderElection() bool { return true }

// Start delivers until ctx ends. Then it claims nothing more, waits for the
// requests on their way, gives back what they do not finish, and returns nil
// when everything that it started has ended.
func (f *Flusher) Start(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Requests outlive ctx by the grace.
	requests, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()
	r := &run{Flusher: f, requests: requests, ended: make(chan *lane, f.opts.Parallel)}
	for _, kind := range []delivery.Kind{delivery.KindStatus, delivery.KindQR} {
		r.lanes = append(r.lanes, &lane{kind: kind, stale: true})
	}
	defer func() {
		for _, l := range r.lanes {
			metrics.ForgetDelivery(l.kind)
		}
	}()
	wake := f.queue.WakeUps(ctx)
	f.log.V(1).Info("delivery to Laravel begins", "parallel", f.opts.Parallel, "batch", f.opts.MaxItems)

	for wakeUps := wake; ctx.Err() == nil; {
		timer := f.clock.NewTimer(r.flush(ctx).Sub(f.clock.Now()))
		select {
		case <-ctx.Done():
		case _, open := <-wakeUps:
			if !open {
				wakeUps = nil
			}
			for _, l := range r.lanes {
				l.stale = true
			}
		case l := <-r.ended:
			r.land(l)
		case <-timer.C():
		}
		timer.Stop()
	}

	grace := f.clock.NewTimer(f.opts.Grace)
	defer grace.Stop()
	for r.inFlight > 0 {
		select {
		case l := <-r.ended:
			r.land(l)
		case <-grace.C():
			abort()
		}
	}
	for range wake { // until it is closed: its goroutine has ended then
	}
	f.log.V(1).Info("delivery to Laravel ends")
	return nil
}

// run is the state of one Start. But for the breakers it belongs to Start's goroutine.
type run struct {
	*Flusher
	// requests is the context of requests and of what is recorded after them.
	requests context.Context
	lanes    []*lane
	inFlight int
	// ended gets the lane of each delivery that has ended; it has room for all.
	ended chan *lane
	// trouble is the last error of the queue that was logged.
	trouble string

	// mu guards the breakers.
	mu sync.Mutex
}

// lane is the delivery of one kind.
type lane struct {
	kind     delivery.Kind
	inFlight int
	windows  windows
	// pending is what was there when it was looked at; stale: it may be more now.
	pending Pending
	looked  time.Time
	stale   bool

	breaker breaker
}

// gap is the least time until the next look that a publish asks for.
func (l *lane) gap() time.Duration {
	switch {
	case l.kind == delivery.KindQR:
		return gapQR
	case l.pending.Due() > 0:
		return gapWaiting
	default:
		return gapQuiet
	}
}

// land notes that a delivery has ended.
func (r *run) land(l *lane) {
	l.inFlight--
	r.inFlight--
	l.stale, l.looked = true, never
}

// room reports whether another request of l's kind may begin.
func (r *run) room(l *lane) bool {
	if l.kind == delivery.KindQR && l.inFlight >= max(1, r.opts.Parallel/2) {
		return false
	}
	return r.inFlight < r.opts.Parallel
}

// flush sends what is to be sent now, and returns when to look again if
// nothing happens before.
func (r *run) flush(ctx context.Context) time.Time {
	for {
		again := r.clock.Now().Add(r.opts.Poll)
		sent := false
		// The kind with the fewest requests first, so that neither starves the other.
		slices.SortStableFunc(r.lanes, func(a, b *lane) int { return a.inFlight - b.inFlight })
		for _, l := range r.lanes {
			went, at, err := r.next(ctx, l)
			if err != nil {
				r.queueFailed(ctx, err)
				return r.clock.Now().Add(queuePause)
			}
			sent = sent || went
			again = earliest(again, at)
		}
		if !sent {
			return again
		}
	}
}

// next sends one batch of l's kind if one is to go now. Otherwise at is when
// to ask again, or never.
func (r *run) next(ctx context.Context, l *lane) (sent bool, at time.Time, err error) {
	if !r.room(l) {
		return false, never, nil // until a request ends
	}
	now := r.clock.Now()
	r.mu.Lock()
	ok, at := l.breaker.admits(now, l.inFlight)
	probe := l.breaker.halfOpen(now)
	r.mu.Unlock()
	if !ok {
		return false, at, nil
	}
	at = never
	switch {
	case now.Sub(l.looked) >= r.opts.Poll, l.stale && now.Sub(l.looked) >= l.gap():
		if err := r.look(ctx, l, now); err != nil {
			return false, never, err
		}
	case l.stale:
		at = l.looked.Add(l.gap())
	}
	d := r.opts.decide(l.kind, l.pending, l.windows, r.clock.Now())
	if !d.Claim && probe && l.pending.Due() > 0 {
		d = decision{Claim: true, Limit: r.opts.MaxItems} // a probe need not wait for company
	}
	if !d.Claim {
		return false, earliest(at, d.At), nil
	}
	batch, err := r.queue.Claim(ctx, l.kind, d.Limit, r.opts.Lease)
	if err != nil {
		metrics.QueueError("claim")
		return false, never, err
	}
	now = r.clock.Now()
	l.stale = true
	if batch == nil { // it has expired, or another process has it
		l.looked, l.pending = now, Pending{}
		return false, now.Add(l.gap()), nil
	}
	l.looked = never // what is left may be a full batch
	l.windows.sent(r.opts.Rules, now)
	l.inFlight++
	r.inFlight++
	go func() {
		defer func() { r.ended <- l }()
		r.deliver(l, batch)
	}()
	return true, never, nil
}

func (r *run) look(ctx context.Context, l *lane, now time.Time) error {
	p, err := r.queue.Pending(ctx, l.kind)
	if err != nil {
		metrics.QueueError("look")
		return err
	}
	if r.trouble != "" {
		r.trouble = ""
		r.log.Info("the queue answers again")
	}
	l.pending, l.looked, l.stale = p, now, false
	var age time.Duration
	if since := p.Since(); !since.IsZero() {
		age = max(0, now.Sub(since))
	}
	metrics.Queue(l.kind, p.Waiting, p.InFlight, p.Unfinished, age)
	return nil
}

// queueFailed logs an error of the queue once, not at each attempt.
func (r *run) queueFailed(ctx context.Context, err error) {
	for _, l := range r.lanes {
		l.stale, l.looked = true, never
	}
	if ctx.Err() == nil && r.trouble != err.Error() {
		r.trouble = err.Error()
		r.log.Error(err, "the queue cannot be read; what waits stays there, and it is tried again")
	}
}

// deliver sends a batch and records what came of it.
func (r *run) deliver(l *lane, batch *delivery.Batch) {
	log := r.log.WithValues("kind", batch.Kind, "batch", batch.ID, "items", len(batch.Items), "attempt", batch.Attempt)
	begun := r.clock.Now()
	left := batch.Deadline.Sub(begun) - requestMargin
	if left <= 0 { // the process was stopped for a while
		_ = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, begun) })
		return
	}
	ctx, cancel := context.WithTimeout(r.requests, left)
	answer := r.sender.Send(ctx, *batch)
	cancel()
	now := r.clock.Now()
	if r.requests.Err() != nil && answer.StatusCode == 0 { // cut off by us: it says nothing about Laravel
		_ = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, now) })
		return
	}
	metrics.DeliveryRequest(batch.Kind, answer.Verdict, len(batch.Items), now.Sub(begun))
	r.mu.Lock()
	reaction := l.breaker.react(batch, answer, now, rand.Float64)
	r.mu.Unlock()
	r.tell(log, batch, answer, reaction, now.Sub(begun))

	var err error
	switch reaction.step {
	case stepAck:
		err = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Ack(ctx, batch, answer.Rejected...) })
		if refused := rejected(batch, answer.Rejected); err == nil {
			metrics.DeliveryItems(batch.Kind, len(batch.Items)-refused, refused)
			if refused > 0 {
				r.roomAgain(log, l)
			}
		}
	case stepDeadLetter:
		err = r.finish(log, batch, func(ctx context.Context) error { return r.queue.DeadLetter(ctx, batch, answer) })
		if err == nil {
			metrics.DeliveryItems(batch.Kind, 0, 1)
			log.Info("Laravel refuses an update for good; it is a dead letter now",
				"sessionID", batch.Items[0].SessionID, "status", answer.StatusCode, "answer", answer.Detail)
			r.roomAgain(log, l)
		}
	case stepSplit:
		err = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Split(ctx, batch) })
	case stepRelease:
		err = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, reaction.notBefore) })
	}
	if errors.Is(err, ErrDeadLettersFull) {
		r.deadLettersFull(log, l, batch, reaction.step)
	}
}

// tell says what an answer means, at the place that knows.
func (r *run) tell(log logr.Logger, batch *delivery.Batch, answer delivery.Answer, reaction reaction, took time.Duration) {
	log = log.WithValues("status", answer.StatusCode, "took", took)
	switch {
	case reaction.step == stepAck && len(answer.Rejected) > 0:
		log.Info("Laravel has taken a batch but for some updates, which are dead letters now", "rejected", len(answer.Rejected))
	case reaction.step == stepAck:
		log.V(1).Info("Laravel has taken a batch", "detail", answer.Detail)
	case answer.Verdict == delivery.Misconfigured && reaction.tripped:
		log.Error(nil, "delivery is stopped: Laravel's answer must be mended by a person; nothing is lost", "answer", answer.Detail)
	case reaction.tripped:
		log.Error(nil, "delivery is stopped: Laravel is not available; it is probed, and nothing is lost", "answer", answer.Detail)
	case reaction.step == stepSplit:
		log.Info("Laravel did not take a batch; it is halved", "answer", answer.Detail)
	case reaction.step == stepRelease:
		log.Info("Laravel did not take a batch; it is repeated", "answer", answer.Detail, "notBefore", reaction.notBefore)
	}
	if reaction.stopped != "" {
		metrics.DeliveryStopped(batch.Kind, string(reaction.stopped))
		r.opts.OnStopped(batch.Kind, reaction.stopped, answer.Detail)
	}
	if reaction.recovered {
		r.recovered(log, batch.Kind)
	}
}

func (r *run) recovered(log logr.Logger, kind delivery.Kind) {
	metrics.DeliveryStopped(kind, "")
	log.Info("delivery goes on")
	r.opts.OnRecovered(kind)
}

// roomAgain notes that a dead letter was stored.
func (r *run) roomAgain(log logr.Logger, l *lane) {
	now := r.clock.Now()
	r.mu.Lock()
	ended := l.breaker.roomAgain(now)
	r.mu.Unlock()
	if ended {
		r.recovered(log, l.kind)
	}
}

// deadLettersFull stops the kind: nothing is dropped silently.
func (r *run) deadLettersFull(log logr.Logger, l *lane, batch *delivery.Batch, s step) {
	now := r.clock.Now()
	r.mu.Lock()
	stopped := l.breaker.full(now)
	until := l.breaker.until
	r.mu.Unlock()
	log.Error(ErrDeadLettersFull, "delivery is stopped: list, replay or drop dead letters")
	if stopped != "" {
		metrics.DeliveryStopped(batch.Kind, string(stopped))
		r.opts.OnStopped(batch.Kind, stopped, "Laravel refuses an update, and there is no room for another dead letter: list, replay or drop some")
	}
	if s == stepDeadLetter { // the claim is still held
		_ = r.finish(log, batch, func(ctx context.Context) error { return r.queue.Release(ctx, batch, until) })
	}
}

// finish records something about a batch in the queue, again and again until
// it is recorded or the claim has ended: then the batch is claimed again, and
// Laravel knows its id. The error is nil, ErrDeadLettersFull, or not recorded.
func (r *run) finish(log logr.Logger, batch *delivery.Batch, record func(context.Context) error) error {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		// The first attempt is made even after the grace.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.requests), finishTimeout)
		err := record(ctx)
		cancel()
		switch {
		case err == nil, errors.Is(err, ErrDeadLettersFull):
			return err
		case errors.Is(err, ErrClaimLost):
			log.Info("the claim of a batch ended before its answer was recorded; it is repeated")
			return err
		}
		metrics.QueueError("finish")
		if r.requests.Err() != nil || !r.clock.Now().Before(batch.Deadline) {
			log.Error(err, "what came of a batch could not be recorded; it is repeated")
			return err
		}
		timer := r.clock.NewTimer(pause)
		select {
		case <-timer.C():
		case <-r.requests.Done():
		}
		timer.Stop()
	}
}

// rejected counts the items of batch that the list names.
func rejected(batch *delivery.Batch, list []delivery.Rejection) int {
	n := 0
	for i := range batch.Items {
		if slices.ContainsFunc(list, func(r delivery.Rejection) bool { return r.SessionID == batch.Items[i].SessionID }) {
			n++
		}
	}
	return n
}

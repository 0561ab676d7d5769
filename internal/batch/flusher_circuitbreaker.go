package batch

import (
	"fmt"
	"net/http"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const (
	// tripAfter is how many failures in a row open the circuit breaker
	// (docs/architecture.md, "Delivery to Laravel").
	tripAfter = 5
	// halveAfter is how many times a batch may fail before the batch itself is suspected as the
	// cause; see suspect.
	halveAfter = 5
	// probeLead is how long before the probe its batch becomes claimable.
	probeLead = 10 * time.Millisecond
	// fullPause is how often to test whether there is room for dead letters again.
	fullPause = time.Minute
)

var (
	// openBackoff is how long the circuit breaker opens, with half jitter.
	openBackoff = backoff.Backoff{First: time.Second, Most: 30 * time.Second}
	// batchBackoff is how long a batch that failed waits, with full jitter.
	batchBackoff = backoff.Backoff{First: 500 * time.Millisecond, Most: 30 * time.Second}
)

// StopReason says why delivery of a kind is stopped and only probes are sent.
type StopReason string

const (
	// LaravelUnavailable: five requests in a row got no answer, or 408, 425, 429
	// or 5xx. Nothing is lost, and delivery resumes without help. Check Laravel.
	LaravelUnavailable StopReason = "LaravelUnavailable"
	// LaravelMisconfigured: only a person can correct what Laravel answers: 401, 403,
	// 404, a redirect, HTML, an untrusted certificate (check the base URL, the routes,
	// the token and the signing secret on both sides), or a refusal of everything
	// (check the application's log).
	LaravelMisconfigured StopReason = "LaravelMisconfigured"
	// DeadLettersFull: Laravel refuses an update for good and there is no room
	// for another dead letter. List, replay or drop dead letters.
	DeadLettersFull StopReason = "DeadLettersFull"
)

// circuitBreaker decides whether requests of a kind may be sent. Each kind has its own,
// because a wrong path affects only one kind. It is closed (all requests may be sent), open
// (none until a certain time), or half-open (that time has come: one request at a time, the
// oldest stored batch, until one is delivered).
//
// It does not use gobreaker or failsafe-go: those open for a fixed time by the clock of the
// machine. This one opens at once for a misconfiguration, stays open as long as Retry-After
// says, and reports when it will be half-open, so that the flusher can sleep until then.
// What remains of a circuit breaker is this struct.
//
// It is pure; the zero value is closed.
type circuitBreaker struct {
	// until is when an open circuit breaker becomes half-open; never: it is closed.
	until time.Time
	// failures and trips count in a row.
	failures, trips int
	// passed: Laravel has accepted a batch from this process.
	passed bool
	// stopped is the reason that was reported; empty: none.
	stopped StopReason
	// refusals are what Laravel refused.
	refusals refusals
}

// admits reports whether a request may be sent while inFlight others are running. If not, at
// is when to ask again; never: when one of those has ended.
func (b *circuitBreaker) admits(now time.Time, inFlight int) (ok bool, at time.Time) {
	switch {
	case b.until.IsZero():
		return true, never
	case now.Before(b.until):
		return false, b.until
	default:
		return inFlight == 0, never
	}
}

// step is what is done with a batch after an answer.
type step int

const (
	stepAck step = iota
	stepRelease
	stepSplit
	stepDeadLetter
)

// reaction is what an answer leads to.
type reaction struct {
	step step
	// reason is why a single item becomes a dead letter.
	reason delivery.DeadLetterReason
	// notBefore is when a released batch may be claimed again.
	notBefore time.Time
	// stopped is why delivery stops, if that was not reported yet;
	// recovered: delivery resumes.
	stopped   StopReason
	recovered bool
	// tripped: delivery is stopped, and the breaker has opened again.
	tripped bool
	// detail replaces the answer's detail, unless it is empty.
	detail string
}

// react decides what an answer leads to. random returns numbers in [0, 1).
func (b *circuitBreaker) react(batch *delivery.Batch, answer delivery.Answer, now time.Time, random func() float64) reaction {
	switch answer.Result {
	case delivery.Delivered:
		if len(rejectedItems(batch, answer.Rejected)) == len(batch.Items) {
			return b.refuse(batch, reaction{step: stepAck}, answer, now, random)
		}
		b.passed = true
		b.refusals.delivered(batch, answer.Rejected)
		if b.stopped == DeadLettersFull && (len(answer.Rejected) > 0 || !b.halfOpen(now)) {
			return reaction{step: stepAck} // it does not show whether there is room
		}
		return reaction{step: stepAck, recovered: b.reset()}
	case delivery.Refused:
		if answer.StatusCode == http.StatusConflict && !b.refusals.conflicted(batch, now) {
			// The application's database may have had a deadlock.
			b.failures = 0
			pause := backoff.HalfJitter(conflictBackoff.After(batch.Attempt), random())
			return reaction{step: stepRelease, notBefore: now.Add(max(pause, answer.RetryAfter))}
		}
		if len(batch.Items) > 1 {
			b.failures = 0
			return reaction{step: stepSplit}
		}
		return b.refuse(batch, reaction{step: stepDeadLetter, reason: delivery.RefusedAlone}, answer, now, random)
	case delivery.TooLarge:
		if len(batch.Items) > 1 {
			b.failures = 0
			return reaction{step: stepSplit}
		}
		if answer.FromProxy {
			r := b.trip(LaravelMisconfigured, batch, answer, now, random)
			r.notBefore, r.detail = b.afterOthers(batch), "a single update is too large for the proxy in front of Laravel: raise the proxy's limit for a request's body: "+answer.Detail
			return r
		}
		return b.refuse(batch, reaction{step: stepDeadLetter, reason: delivery.TooLargeAlone}, answer, now, random)
	case delivery.Misconfigured:
		b.failures++
		onlyThis := suspect(batch, answer) && b.othersDelivered(batch)
		if onlyThis && len(batch.Items) > 1 {
			return reaction{step: stepSplit}
		}
		r := b.trip(LaravelMisconfigured, batch, answer, now, random)
		if onlyThis {
			r.notBefore = b.until.Add(openBackoff.After(batch.Attempt))
			r.detail = "a single update gets this answer while others are delivered: does a firewall in front of Laravel block its content? " + answer.Detail
		}
		return r
	default:
		b.failures++
		if suspect(batch, answer) && len(batch.Items) > 1 && b.othersDelivered(batch) {
			return reaction{step: stepSplit}
		}
		if answer.StatusCode >= 500 && len(batch.Items) == 1 && b.refusals.poisonous(batch, now) {
			return reaction{step: stepDeadLetter, reason: delivery.Poison}
		}
		if b.failures >= tripAfter {
			r := b.trip(LaravelUnavailable, batch, answer, now, random)
			if (answer.TimedOut || answer.StatusCode == http.StatusInternalServerError) && suspect(batch, answer) && len(batch.Items) > 1 {
				// If every batch takes too long, none is ever delivered, but half of one may be. And where
				// one batch has an item of every session, no other one can show that Laravel works: half of
				// it may. 502, 503 and 504 come from what is in front of an application that is away.
				r.step, r.notBefore = stepSplit, never
			}
			return r
		}
		if b.halfOpen(now) { // a failed request after a pause that Laravel asked for
			return b.trip(b.stopped, batch, answer, now, random)
		}
		if answer.RetryAfter > 0 { // a pause for all batches, not only this one
			b.open(now.Add(answer.RetryAfter))
		}
		return b.release(reaction{}, batch, answer, now, random)
	}
}

// othersDelivered reports whether a failed batch has failed more often than there are
// failures in a row: then others were delivered in between.
func (b *circuitBreaker) othersDelivered(batch *delivery.Batch) bool {
	return b.passed && b.failures < batch.Attempt
}

// refuse handles a batch of which Laravel accepted no item. It returns r, unless the
// application refuses so much that the application must be broken, and not the items:
// then everything is kept.
//
// A refusal shows that Laravel answers, but only a delivery closes a half-open breaker: if
// the dead letters are full, nothing else may be sent before.
func (b *circuitBreaker) refuse(batch *delivery.Batch, r reaction, answer delivery.Answer, now time.Time, random func() float64) reaction {
	b.failures = 0
	if !b.refusals.refused(batch) {
		return r
	}
	r = b.trip(LaravelMisconfigured, batch, answer, now, random)
	r.notBefore = b.afterOthers(batch)
	if answer.StatusCode < 300 {
		// The application may have stored the batch id, and would then answer a repetition
		// with a success although it does not have the items: they need a new batch id.
		r.step, r.notBefore = stepSplit, never
	}
	r.detail = fmt.Sprintf("Laravel refuses many updates of several sessions and accepts none: the application seems to be broken, and no more dead letters are made: %s", answer.Detail)
	return r
}

// afterOthers is when a refused batch may be claimed again while the breaker is open: later
// after each attempt, so that the next probes are other batches.
func (b *circuitBreaker) afterOthers(batch *delivery.Batch) time.Time {
	pause := openBackoff.After(b.trips)
	return b.until.Add(time.Second + time.Duration(min(batch.Attempt-1, 5))*pause)
}

// suspect reports whether the batch itself may be the cause of the failure: Laravel has an
// error with one of its items, a firewall blocks one, or all of them together take too long.
func suspect(batch *delivery.Batch, answer delivery.Answer) bool {
	return batch.Attempt >= halveAfter && (answer.StatusCode >= 500 || answer.Result == delivery.Misconfigured || answer.TimedOut)
}

func (b *circuitBreaker) halfOpen(now time.Time) bool {
	return !b.until.IsZero() && !now.Before(b.until)
}

// trip opens the circuit breaker, and releases the batch.
func (b *circuitBreaker) trip(reason StopReason, batch *delivery.Batch, answer delivery.Answer, now time.Time, random func() float64) reaction {
	var r reaction
	if b.until.IsZero() || b.halfOpen(now) {
		b.trips++
		pause := backoff.HalfJitter(openBackoff.After(b.trips), random())
		b.open(now.Add(max(pause, answer.RetryAfter)))
		r.tripped = reason != ""
	} else { // the answer to a request that was sent before the breaker opened
		b.open(now.Add(answer.RetryAfter))
	}
	r.stopped = b.stop(reason)
	return b.release(r, batch, answer, now, random)
}

// full opens the circuit breaker because there is no room for a dead letter. It
// returns the reason if it was not reported yet.
func (b *circuitBreaker) full(now time.Time) StopReason {
	b.open(now.Add(fullPause))
	return b.stop(DeadLettersFull)
}

// roomAgain records that a dead letter was stored, and reports whether that ends a stop. A
// dead letter of a request that was sent before the stop does not.
func (b *circuitBreaker) roomAgain(now time.Time) bool {
	return b.stopped == DeadLettersFull && b.halfOpen(now) && b.reset()
}

// reset closes the circuit breaker after a success, and reports whether that ends a stop.
func (b *circuitBreaker) reset() bool {
	stopped := b.stopped != ""
	*b = circuitBreaker{passed: true, refusals: b.refusals}
	return stopped
}

// stop returns reason if it was not reported yet.
func (b *circuitBreaker) stop(reason StopReason) StopReason {
	if b.stopped == reason {
		return ""
	}
	b.stopped = reason
	return reason
}

// open opens the circuit breaker until a time; it never shortens a pause.
func (b *circuitBreaker) open(until time.Time) {
	if until.After(b.until) {
		b.until = until
	}
}

func (b *circuitBreaker) release(r reaction, batch *delivery.Batch, answer delivery.Answer, now time.Time, random func() float64) reaction {
	r.step = stepRelease
	switch {
	case b.until.IsZero():
		r.notBefore = now.Add(backoff.FullJitter(batchBackoff.After(batch.Attempt), random()))
	case suspect(batch, answer), answer.Result == delivery.Misconfigured && batch.Attempt > 1:
		// The batch may be the cause, so the next probe is another one. A firewall that blocks
		// one batch stops delivery at once, so this must not wait for many attempts.
		r.notBefore = b.until.Add(time.Second)
	default:
		// A little earlier, because the queue has another clock: this batch must be claimable for the probe.
		r.notBefore = b.until.Add(-probeLead)
	}
	return r
}

package batch

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const (
	// tripAfter is how many failures in a row open the breaker (DESIGN section 8).
	tripAfter = 5
	// The breaker opens for 1 s, then 2 s, up to 30 s, each less up to a half
	// of it at random.
	openBase, openCap = time.Second, 30 * time.Second
	// A batch that failed waits a random part (full jitter) of 0.5 s, then 1 s,
	// up to 30 s.
	backoffBase, backoffCap = 500 * time.Millisecond, 30 * time.Second
	// halveAfter is how many times a batch may get 5xx while others pass before
	// it is suspected itself.
	halveAfter = 5
	// probeLead is how much earlier than its probe a batch may be claimed.
	probeLead = 10 * time.Millisecond
	// fullPause is how often it is tried whether the dead letters have room again.
	fullPause = time.Minute
)

// StopReason says why delivery of a kind is stopped and only probed.
type StopReason string

const (
	// LaravelUnavailable: five requests in a row got no answer, or 408, 425, 429
	// or 5xx. Nothing is lost; it goes on by itself. Look at Laravel.
	LaravelUnavailable StopReason = "LaravelUnavailable"
	// LaravelMisconfigured: Laravel's answer can only be mended by a person
	// (401, 403, 404, a redirect, HTML, a foreign certificate). Check the base
	// URL, the routes, the token and the signing secret on both sides.
	LaravelMisconfigured StopReason = "LaravelMisconfigured"
	// DeadLettersFull: Laravel refuses an update for good and there is no room
	// to keep another refused one. List, replay or drop dead letters.
	DeadLettersFull StopReason = "DeadLettersFull"
)

// breaker decides whether requests of a kind may go. A kind has one of its own,
// because a wrong path is one kind's trouble. It is closed (all may go), open
// (none until a time), or half-open (that time has come: one at a time, which
// is the oldest stored batch, until one is delivered).
//
// It is not gobreaker's or failsafe-go's: those open for a fixed time by the
// clock of the machine, and ours opens at once for a misconfiguration, for as
// long as Retry-After says, and must tell when it will be half-open, so that
// the flusher sleeps until then. What is left of a breaker then is this struct.
//
// It is pure, the zero value is closed.
type breaker struct {
	// until is when an open breaker is half-open; never: it is closed.
	until time.Time
	// failures and trips count in a row.
	failures, trips int
	// passed: Laravel has taken a batch since this process delivers.
	passed bool
	// stopped is what people have been told; empty: nothing.
	stopped StopReason
}

// admits reports whether a request may go, while inFlight others are on their
// way; if not, from when on it is worth asking again. Never: when one of those
// has ended.
func (b *breaker) admits(now time.Time, inFlight int) (ok bool, at time.Time) {
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
	// notBefore is when a released batch may be claimed again.
	notBefore time.Time
	// stopped is why delivery stops, if people have not been told yet;
	// recovered: it goes on.
	stopped   StopReason
	recovered bool
	// tripped: delivery is stopped, and the breaker has opened once more.
	tripped bool
}

// react takes an answer into account. random returns numbers in [0, 1).
func (b *breaker) react(batch *delivery.Batch, answer delivery.Answer, now time.Time, random func() float64) reaction {
	switch answer.Verdict {
	case delivery.Delivered:
		b.passed = true
		if b.stopped == DeadLettersFull && (len(answer.Rejected) > 0 || !b.halfOpen(now)) {
			return reaction{step: stepAck} // it does not say whether there is room
		}
		return reaction{step: stepAck, recovered: b.reset()}
	case delivery.Refused, delivery.TooLarge:
		// Laravel works. A half-open breaker closes with a delivery all the
		// same: if the dead letters are full, nothing else may go first.
		b.failures = 0
		if len(batch.Items) > 1 {
			return reaction{step: stepSplit}
		}
		return reaction{step: stepDeadLetter}
	case delivery.Misconfigured:
		b.failures++
		return b.trip(LaravelMisconfigured, batch, answer, now, random)
	default:
		b.failures++
		if suspect(batch, answer) && len(batch.Items) > 1 && b.passed && b.failures < batch.Attempt {
			// It failed more often than anything failed in a row: others pass.
			return reaction{step: stepSplit}
		}
		if b.failures >= tripAfter {
			return b.trip(LaravelUnavailable, batch, answer, now, random)
		}
		if b.halfOpen(now) { // after a pause that Laravel asked for
			return b.trip(b.stopped, batch, answer, now, random)
		}
		if answer.RetryAfter > 0 { // a pause of everything, not of this batch
			b.open(now.Add(answer.RetryAfter))
		}
		return b.release(reaction{}, batch, answer, now, random)
	}
}

// suspect reports whether a batch may be what Laravel stumbles over.
func suspect(batch *delivery.Batch, answer delivery.Answer) bool {
	return batch.Attempt >= halveAfter && answer.StatusCode >= 500
}

func (b *breaker) halfOpen(now time.Time) bool { return !b.until.IsZero() && !now.Before(b.until) }

// trip opens the breaker, and releases the batch.
func (b *breaker) trip(reason StopReason, batch *delivery.Batch, answer delivery.Answer, now time.Time, random func() float64) reaction {
	var r reaction
	if b.until.IsZero() || b.halfOpen(now) {
		pause := grown(openBase, openCap, b.trips)
		pause -= time.Duration(random() * float64(pause) / 2)
		b.trips++
		b.open(now.Add(max(pause, answer.RetryAfter)))
		r.tripped = reason != ""
	} else { // the answer to a request that was on its way already
		b.open(now.Add(answer.RetryAfter))
	}
	r.stopped = b.stop(reason)
	return b.release(r, batch, answer, now, random)
}

// full opens the breaker because there is no room for a dead letter. It
// returns the reason if people have not been told yet.
func (b *breaker) full(now time.Time) StopReason {
	b.open(now.Add(fullPause))
	return b.stop(DeadLettersFull)
}

// roomAgain notes that a dead letter was stored, and reports whether that ends
// a stop. One that was on its way when the others found no room does not.
func (b *breaker) roomAgain(now time.Time) bool {
	return b.stopped == DeadLettersFull && b.halfOpen(now) && b.reset()
}

// reset closes the breaker after a success, and reports whether that ends a stop.
func (b *breaker) reset() bool {
	stopped := b.stopped != ""
	*b = breaker{passed: true}
	return stopped
}

// stop returns reason if people have not been told yet.
func (b *breaker) stop(reason StopReason) StopReason {
	if b.stopped == reason {
		return ""
	}
	b.stopped = reason
	return reason
}

// open never shortens a pause.
func (b *breaker) open(until time.Time) {
	if until.After(b.until) {
		b.until = until
	}
}

func (b *breaker) release(r reaction, batch *delivery.Batch, answer delivery.Answer, now time.Time, random func() float64) reaction {
	r.step = stepRelease
	switch {
	case b.until.IsZero():
		backoff := grown(backoffBase, backoffCap, batch.Attempt-1)
		r.notBefore = now.Add(time.Duration(random() * float64(backoff)))
	case suspect(batch, answer):
		// Should Laravel stumble over this batch, the next probe is another's.
		r.notBefore = b.until.Add(time.Second)
	default:
		// It is there when it is to be the probe: the queue counts in its own clock.
		r.notBefore = b.until.Add(-probeLead)
	}
	return r
}

// grown doubles base n times, up to limit.
func grown(base, limit time.Duration, n int) time.Duration {
	for ; n > 0 && base < limit; n-- {
		base *= 2
	}
	return min(base, limit)
}

package batch

import (
	"errors"
	"fmt"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// Rules say when a batch goes (docs/architecture.md, "QR and status"). The zero value stands for
// the defaults.
type Rules struct {
	// MaxItems fill a batch, which then goes at once; default 50.
	MaxItems int
	// QRDelay is how long the first QR code waits for others; default 5 s.
	QRDelay time.Duration
	// StatusDelay is how long a status waits for others after a quiet time; default
	// 10 ms: what one event of the network does to many sessions comes within it.
	StatusDelay time.Duration
	// HighWindow and NormalWindow are how long a status of either priority
	// waits at most after another batch of statuses; defaults 500 ms and 1 s.
	HighWindow, NormalWindow time.Duration
	// Headroom is how much earlier a window ends, so that what it held is at
	// Laravel, and not on its way, when the time is over: a claim and a POST
	// take a few milliseconds. Default 20 ms.
	Headroom time.Duration
}

// maxBatch keeps a batch and its answer, and the script that claims it, small.
const maxBatch = 1000

func (r Rules) withDefaults() Rules {
	or := func(d *time.Duration, otherwise time.Duration) {
		if *d == 0 {
			*d = otherwise
		}
	}
	if r.MaxItems == 0 {
		r.MaxItems = 50
	}
	or(&r.QRDelay, 5*time.Second)
	or(&r.StatusDelay, 10*time.Millisecond)
	or(&r.HighWindow, 500*time.Millisecond)
	or(&r.NormalWindow, time.Second)
	or(&r.Headroom, 20*time.Millisecond)
	return r
}

func (r Rules) validate() error {
	var errs []error
	if r.MaxItems < 1 || r.MaxItems > maxBatch {
		errs = append(errs, fmt.Errorf("a batch may have 1 to %d items, not %d", maxBatch, r.MaxItems))
	}
	if r.QRDelay < 0 || r.StatusDelay < 0 || r.Headroom < 0 {
		errs = append(errs, errors.New("a delay of the flusher is negative"))
	}
	if r.HighWindow <= r.Headroom || r.NormalWindow <= r.Headroom {
		errs = append(errs, fmt.Errorf("the windows of the flusher must be longer than %s", r.Headroom))
	}
	return errors.Join(errs...)
}

// windows are the times after a batch of statuses in which what comes waits
// for their end, one for each priority. A window opens with the first batch
// that goes while it is not open. Full batches within it do not prolong it, so
// nothing waits longer than one window however much else is sent. The zero
// value: nothing has gone.
type windows struct{ highEnd, normalEnd time.Time }

// sent notes that a batch went.
func (w *windows) sent(r Rules, now time.Time) {
	if !now.Before(w.highEnd) {
		w.highEnd = now.Add(r.HighWindow - r.Headroom)
	}
	if !now.Before(w.normalEnd) {
		w.normalEnd = now.Add(r.NormalWindow - r.Headroom)
	}
}

// decision is what is done about one kind now.
type decision struct {
	// Claim asks the queue for a batch: an unfinished one, or a new one of up to Limit items.
	Claim bool
	Limit int
	// At is when to decide again if nothing happens before; zero: not of itself.
	At time.Time
}

// decide says whether a batch of kind goes now. It is pure: p is what waits,
// w the windows of statuses.
func (r Rules) decide(kind delivery.Kind, p Pending, w windows, now time.Time) decision {
	at := never
	if kind == delivery.KindQR {
		at = earliest(at, after(p.Since(), r.QRDelay))
	} else {
		at = earliest(at, r.ripe(p.UrgentSince, w.highEnd))
		at = earliest(at, r.ripe(p.NormalSince, w.normalEnd))
	}
	if p.Due() >= r.MaxItems || p.Due() > 0 && !at.After(now) {
		return decision{Claim: true, Limit: r.MaxItems}
	}
	// What is repeated has waited already; what only waits must not be taken with it.
	if p.Claimable > 0 {
		return decision{Claim: true}
	}
	// What becomes due later is seen by the next observation.
	at = earliest(at, p.NextDue)
	at = earliest(at, p.NextClaimable)
	return decision{At: at}
}

// ripe is when a status goes whose kind waits since then.
func (r Rules) ripe(since, windowEnd time.Time) time.Time {
	if !since.IsZero() && since.Before(windowEnd) {
		return windowEnd
	}
	return after(since, r.StatusDelay)
}

// never is the zero time, which stands for no time at all.
var never time.Time

// after is d after t, or never.
func after(t time.Time, d time.Duration) time.Time {
	if t.IsZero() {
		return never
	}
	return t.Add(d)
}

// earliest is the earlier of two times of which either may be never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

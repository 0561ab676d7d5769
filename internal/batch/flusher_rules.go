package batch

import (
	"errors"
	"fmt"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// Rules say when a batch is sent (docs/architecture.md, "QR and status"). The zero value
// means the defaults.
type Rules struct {
	// MaxItems is the size of a full batch, which is sent at once; default 50.
	MaxItems int
	// QRDelay is how long the first QR code waits for others; default 5 s.
	QRDelay time.Duration
	// StatusDelay is how long the first status waits for others when no window is open;
	// default 10 ms: one network event changes the statuses of many sessions within it.
	StatusDelay time.Duration
	// HighWindow and NormalWindow are how long a status of that priority waits at most
	// after another batch of statuses; defaults 500 ms and 1 s. Messages wait as a normal status.
	HighWindow, NormalWindow time.Duration
	// Headroom is how much earlier a window ends, so that its statuses have arrived at
	// Laravel when the time is over: a claim and a POST take a few milliseconds.
	// Default 20 ms.
	Headroom time.Duration
}

// maxBatch bounds the size of a batch and of its answer, and the run time of the script that claims it.
const maxBatch = 1000

func (r Rules) withDefaults() Rules {
	setDefault := func(d *time.Duration, value time.Duration) {
		if *d == 0 {
			*d = value
		}
	}
	if r.MaxItems == 0 {
		r.MaxItems = 50
	}
	setDefault(&r.QRDelay, 5*time.Second)
	setDefault(&r.StatusDelay, 10*time.Millisecond)
	setDefault(&r.HighWindow, 500*time.Millisecond)
	setDefault(&r.NormalWindow, time.Second)
	setDefault(&r.Headroom, 20*time.Millisecond)
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

// windows are the times after a batch of statuses during which new statuses wait, one for
// each priority. A window opens with a batch that is sent while it is not open. Full
// batches during a window do not prolong it, so no status waits longer than one window.
// The zero value: no batch was sent.
type windows struct{ highEnd, normalEnd time.Time }

// sent records that a batch was sent.
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
	// At is when to decide again if nothing happens before; zero: only when something happens.
	At time.Time
}

// decide says whether a batch of kind is sent now. It is pure: p is what waits,
// w the windows of statuses.
func (r Rules) decide(kind delivery.Kind, p delivery.Backlog, w windows, now time.Time) decision {
	at := never
	if kind == delivery.KindQR {
		at = earliest(at, after(p.Since(), r.QRDelay))
	} else {
		at = earliest(at, r.sendTime(p.UrgentSince, w.highEnd))
		at = earliest(at, r.sendTime(p.NormalSince, w.normalEnd))
	}
	if p.Due() >= r.MaxItems || p.Full || p.Due() > 0 && !at.After(now) {
		return decision{Claim: true, Limit: r.MaxItems}
	}
	// A repeated batch is claimed at once. Limit stays 0: waiting items must wait longer.
	if p.Claimable > 0 {
		return decision{Claim: true}
	}
	// Items that become due later are found by the next observation.
	at = earliest(at, p.NextDue)
	at = earliest(at, p.NextClaimable)
	return decision{At: at}
}

// sendTime is when statuses of one priority are sent if the oldest waits since then.
func (r Rules) sendTime(since, windowEnd time.Time) time.Time {
	if !since.IsZero() && since.Before(windowEnd) {
		return windowEnd
	}
	return after(since, r.StatusDelay)
}

// never is the zero time, which means "at no time".
var never time.Time

// after is d after t, or never.
func after(t time.Time, d time.Duration) time.Time {
	if t.IsZero() {
		return never
	}
	return t.Add(d)
}

// earliest is the earlier of two times; each may be never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

package batch

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// DefaultQRInterval is how often Laravel hears of a session's QR codes at most
// while the code that it has can still be scanned (docs/architecture.md, "QR and status"): people
// scan from Redis and from the resource, Laravel needs not every code.
const DefaultQRInterval = 30 * time.Second

// lastDelivered is what the queue remembers of the newest item of a session
// that Laravel has. The zero value: Laravel has none.
type lastDelivered struct {
	// At is when Laravel acknowledged it.
	At time.Time
	// ExpiresAt is the end of the QR code that Laravel has.
	ExpiresAt time.Time
}

// dueAt says from when on an item that arrives now may be claimed.
//
// A status is due at once: the windows (docs/architecture.md, "QR and status") are the flusher's,
// which looks at all sessions together. A QR code is due when the interval
// since the last one is over or the code that Laravel has expires, whichever
// comes first: a code that replaces an expired one goes with the next batch.
//
// The scripts decide by the same rule (due_at in scripts/lib.lua); a test holds
// the two together.
func dueAt(kind delivery.Kind, now time.Time, last lastDelivered, qrInterval time.Duration) time.Time {
	if kind != delivery.KindQR || !last.ExpiresAt.After(now) {
		return now
	}
	at := last.At
	if at.After(now) { // delivered before the clock was set back
		at = now
	}
	due := at.Add(qrInterval)
	if last.ExpiresAt.Before(due) {
		due = last.ExpiresAt
	}
	if due.Before(now) {
		return now
	}
	return due
}

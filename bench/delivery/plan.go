package main

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// planned is an event of the steady part, at a time after its start.
type planned struct {
	at       time.Duration
	kind     delivery.Kind
	session  int
	n        int64
	priority delivery.Priority
}

// plan is the same for both sides. Each session gets a code every QRInterval, beginning at a
// random time in the first interval, and changes its status at random times; half of these
// changes are urgent.
func plan(c sideConfig) []planned {
	random := rand.New(rand.NewPCG(c.Seed, 0))
	var all []planned
	for session := range c.Sessions {
		var n int64
		for at := time.Duration(random.Int64N(int64(c.QRInterval))); at < c.Duration; at += c.QRInterval {
			n++
			all = append(all, planned{at: at, kind: delivery.KindQR, session: session, n: n, priority: delivery.Normal})
		}
		n = 0
		for at := pause(random, c.StatusInterval); at < c.Duration; at += pause(random, c.StatusInterval) {
			n++
			priority := delivery.Normal
			if random.IntN(2) == 0 {
				priority = delivery.High
			}
			all = append(all, planned{at: at, kind: delivery.KindStatus, session: session, n: n, priority: priority})
		}
	}
	slices.SortStableFunc(all, func(a, b planned) int { return int(a.at - b.at) })
	return all
}

// pause is a random time to the next event, for events that are independent of each other.
func pause(random *rand.Rand, mean time.Duration) time.Duration {
	return time.Duration(random.ExpFloat64() * float64(mean))
}

// itemOf is the event as both sides send it, with the usual size.
func itemOf(e event, qrValid time.Duration) (delivery.Item, error) {
	if e.Kind == delivery.KindQR {
		return delivery.QRItem{
			SessionID: e.SessionID, QR: code(), Attempt: 1,
			GeneratedAt: delivery.Time{Time: e.At}, ExpiresAt: delivery.Time{Time: e.At.Add(qrValid)}, Numbers: e.Numbers,
		}.Item()
	}
	state, phase, reason := delivery.Pending, "Connecting", "Connecting"
	if e.Priority == delivery.High {
		state, phase, reason = delivery.Pending, "Disconnected", "ConnectionLost"
	}
	return delivery.StatusItem{
		SessionID: e.SessionID, Status: state, Phase: phase, Reason: reason, Priority: e.Priority,
		JID: "34600000000:12@s.whatsapp.net", PhoneNumber: "+34600000000", OccurredAt: delivery.Time{Time: e.At}, Numbers: e.Numbers,
	}.Item()
}

// code has the form of WhatsApp's codes: a reference and three keys.
func code() string {
	part := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		return base64.StdEncoding.EncodeToString(b)
	}
	return fmt.Sprintf("2@%s,%s,%s,%s", part(66), part(32), part(32), part(32))
}

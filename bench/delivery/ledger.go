package main

import (
	"slices"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// key identifies an update.
type key struct {
	Kind      delivery.Kind
	SessionID string
	delivery.Numbers
}

// event is an update and when it happened.
type event struct {
	key
	Priority delivery.Priority
	At       time.Time
}

// tally is the result of a part's events.
type tally struct {
	// high, normal and qr are the latencies of what arrived, in order of size.
	high, normal, qr []time.Duration
	// coalesced events were replaced by a newer one of their session before
	// they were sent; lost ones were not, and never arrived.
	coalesced, lost int
	// disordered counts updates that arrived after a newer one of their session.
	disordered int
	// requests by kind, and the most in any second.
	qrRequests, statusRequests, peak int
}

// count is pure. The requests are in the order of their arrival.
func count(events []event, requests []request) tally {
	var t tally
	type session struct {
		kind delivery.Kind
		id   string
	}
	newest := map[session]delivery.Numbers{}
	arrived := map[key]time.Time{}
	batches := map[string]bool{}
	var times []time.Time
	for _, r := range requests {
		times = append(times, r.at)
		if r.kind == delivery.KindQR {
			t.qrRequests++
		} else {
			t.statusRequests++
		}
		if r.id != "" && batches[r.id] {
			continue // a repetition, which Laravel knows by its id
		}
		batches[r.id] = true
		for _, item := range r.items {
			s := session{item.Kind, item.SessionID}
			if newest[s].Newer(item.Numbers) {
				t.disordered++
			} else {
				newest[s] = item.Numbers
			}
			if _, again := arrived[item]; !again {
				arrived[item] = r.at
			}
		}
	}
	for _, e := range events {
		at, ok := arrived[e.key]
		switch {
		case !ok && newest[session{e.Kind, e.SessionID}].Newer(e.Numbers):
			t.coalesced++
		case !ok:
			t.lost++
		case e.Kind == delivery.KindQR:
			t.qr = append(t.qr, at.Sub(e.At))
		case e.Priority == delivery.High:
			t.high = append(t.high, at.Sub(e.At))
		default:
			t.normal = append(t.normal, at.Sub(e.At))
		}
	}
	for _, list := range [][]time.Duration{t.high, t.normal, t.qr} {
		slices.Sort(list)
	}
	t.peak = peak(times)
	return t
}

// peak is the most times within any second.
func peak(times []time.Time) int {
	most := 0
	for first, last := 0, 0; last < len(times); last++ {
		for times[last].Sub(times[first]) >= time.Second {
			first++
		}
		most = max(most, last-first+1)
	}
	return most
}

// percentile is the smallest of the values that p percent of them do not
// exceed; 0 without values. They are in order of size.
func percentile(values []time.Duration, p int) time.Duration {
	if len(values) == 0 {
		return 0
	}
	return values[max(0, (len(values)*p+99)/100-1)]
}

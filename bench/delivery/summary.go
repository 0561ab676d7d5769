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

// event is an update with the time at which it happened.
type event struct {
	key
	Priority delivery.Priority
	At       time.Time
}

// summary is the result of a part of the benchmark.
type summary struct {
	// high, normal and qr are the sorted latencies of the updates that arrived.
	high, normal, qr []time.Duration
	// coalesced counts the events that did not arrive because a newer one of their session
	// replaced them; lost counts the others that did not arrive.
	coalesced, lost int
	// disordered counts updates that arrived after a newer one of their session.
	disordered int
	// The requests by kind, and the highest number in any second.
	qrRequests, statusRequests, peak int
}

// count computes the summary; it is pure. The requests are in the order of their arrival.
func count(events []event, requests []request) summary {
	var t summary
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
			continue // a repetition: Laravel knows its id
		}
		batches[r.id] = true
		for _, item := range r.items {
			s := session{item.Kind, item.SessionID}
			if newest[s].Newer(item.Numbers) {
				t.disordered++
			} else {
				newest[s] = item.Numbers
			}
			if _, known := arrived[item]; !known {
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

// peak is the highest number of times within any second.
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

// percentile is the smallest value that p percent of the values do not exceed; 0 without
// values. The values are sorted.
func percentile(values []time.Duration, p int) time.Duration {
	if len(values) == 0 {
		return 0
	}
	return values[max(0, (len(values)*p+99)/100-1)]
}

package batch

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

func TestDecide(t *testing.T) {
	r := Rules{}.withDefaults()
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := noon.Add
	// The times of a row are relative to noon, the present time.
	quiet := windows{}
	closed := windows{highEnd: at(-time.Millisecond), normalEnd: at(-time.Millisecond)}
	open := windows{highEnd: at(300 * time.Millisecond), normalEnd: at(800 * time.Millisecond)}
	highOver := windows{highEnd: at(0), normalEnd: at(500 * time.Millisecond)}
	waits := func(d time.Duration) decision { return decision{At: at(d)} }
	claim := decision{Claim: true, Limit: 50}

	for _, row := range []struct {
		name    string
		kind    delivery.Kind
		pending delivery.Backlog
		windows windows
		want    decision
	}{
		{"nothing waits", delivery.KindStatus, delivery.Backlog{}, quiet, decision{}},
		{"the first after a quiet time waits 10 ms for others", delivery.KindStatus, delivery.Backlog{Urgent: 1, UrgentSince: at(0)}, quiet, waits(10 * time.Millisecond)},
		{"the first normal one waits too", delivery.KindStatus, delivery.Backlog{Normal: 1, NormalSince: at(-4 * time.Millisecond)}, quiet, waits(6 * time.Millisecond)},
		{"the first is sent after 10 ms", delivery.KindStatus, delivery.Backlog{Urgent: 1, UrgentSince: at(-10 * time.Millisecond)}, quiet, claim},
		{"the windows are over", delivery.KindStatus, delivery.Backlog{Normal: 1, NormalSince: at(0)}, closed, waits(10 * time.Millisecond)},
		{"a high one waits for the end of its window", delivery.KindStatus, delivery.Backlog{Urgent: 3, UrgentSince: at(-190 * time.Millisecond)}, open, waits(300 * time.Millisecond)},
		{"a normal one waits for the end of its window", delivery.KindStatus, delivery.Backlog{Normal: 3, NormalSince: at(-190 * time.Millisecond)}, open, waits(800 * time.Millisecond)},
		{"both wait: the earlier end counts", delivery.KindStatus, delivery.Backlog{Urgent: 1, Normal: 3, UrgentSince: at(-time.Millisecond), NormalSince: at(-190 * time.Millisecond)}, open, waits(300 * time.Millisecond)},
		{"the window of high ones ends, and normal ones are sent with them", delivery.KindStatus, delivery.Backlog{Urgent: 1, Normal: 3, UrgentSince: at(-time.Millisecond), NormalSince: at(-190 * time.Millisecond)}, highOver, claim},
		{"the window of high ones ends, but only normal ones wait", delivery.KindStatus, delivery.Backlog{Normal: 3, NormalSince: at(-190 * time.Millisecond)}, highOver, waits(500 * time.Millisecond)},
		{"50 are sent at once, also in a window", delivery.KindStatus, delivery.Backlog{Urgent: 20, Normal: 30, UrgentSince: at(0), NormalSince: at(0)}, open, claim},
		{"49 wait", delivery.KindStatus, delivery.Backlog{Urgent: 19, Normal: 30, UrgentSince: at(0), NormalSince: at(0)}, open, waits(300 * time.Millisecond)},
		{"a released batch is sent at once, without the items that wait for their window", delivery.KindStatus, delivery.Backlog{Urgent: 1, UrgentSince: at(0), Claimable: 1, Unfinished: 1}, open, decision{Claim: true}},
		{"a batch that may be claimed later", delivery.KindStatus, delivery.Backlog{Unfinished: 1, NextClaimable: at(70 * time.Millisecond)}, open, waits(70 * time.Millisecond)},

		{"the first QR code waits 5 s", delivery.KindQR, delivery.Backlog{Normal: 1, NormalSince: at(0)}, quiet, waits(5 * time.Second)},
		{"the windows of statuses do not count for QR codes", delivery.KindQR, delivery.Backlog{Normal: 49, NormalSince: at(-4 * time.Second)}, open, waits(time.Second)},
		{"5 s are over", delivery.KindQR, delivery.Backlog{Normal: 1, NormalSince: at(-5 * time.Second)}, quiet, claim},
		{"50 QR codes are sent at once", delivery.KindQR, delivery.Backlog{Normal: 50, NormalSince: at(0)}, quiet, claim},
		{"a QR code that is due later", delivery.KindQR, delivery.Backlog{Waiting: 1, NextDue: at(20 * time.Second)}, quiet, waits(20 * time.Second)},
	} {
		t.Run(row.name, func(t *testing.T) {
			NewWithT(t).Expect(r.decide(row.kind, row.pending, row.windows, noon)).To(Equal(row.want))
		})
	}
}

// However much is sent, a status waits no longer than its window.
func TestWindowsAreNotProlonged(t *testing.T) {
	g := NewWithT(t)
	r := Rules{}.withDefaults()
	var w windows
	first := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	w.sent(r, first)
	g.Expect(w).To(Equal(windows{highEnd: first.Add(480 * time.Millisecond), normalEnd: first.Add(980 * time.Millisecond)}))
	w.sent(r, first.Add(400*time.Millisecond))
	g.Expect(w.highEnd).To(Equal(first.Add(480 * time.Millisecond)))
	w.sent(r, first.Add(480*time.Millisecond))
	g.Expect(w).To(Equal(windows{highEnd: first.Add(960 * time.Millisecond), normalEnd: first.Add(980 * time.Millisecond)}))
}

func TestFlusherOptions(t *testing.T) {
	for _, row := range []struct {
		name string
		opts FlusherOptions
		want string
	}{
		{"defaults", FlusherOptions{}, ""},
		{"too many items", FlusherOptions{Rules: Rules{MaxItems: 1001}}, "1 to 1000"},
		{"no requests", FlusherOptions{Parallel: -1}, "at least 1"},
		{"a request that takes an hour", FlusherOptions{RequestTimeout: time.Hour}, "up to 5m"},
		{"a window shorter than the headroom", FlusherOptions{Rules: Rules{HighWindow: time.Millisecond}}, "longer than"},
		{"a negative delay", FlusherOptions{Rules: Rules{QRDelay: -1}}, "negative"},
		{"a negative grace", FlusherOptions{Grace: -1}, "negative"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if err := row.opts.Validate(); row.want == "" {
				NewWithT(t).Expect(err).NotTo(HaveOccurred())
			} else {
				NewWithT(t).Expect(err).To(MatchError(ContainSubstring(row.want)))
			}
		})
	}
}

// A claim lasts longer than its request, for every time-out.
func TestClaimIsDerivedFromTheRequest(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Second, 15 * time.Second, 90 * time.Second, maxRequestTimeout} {
		g := NewWithT(t)
		o := FlusherOptions{RequestTimeout: timeout}.withDefaults()
		g.Expect(o.lease()-requestMargin).To(BeNumerically(">", o.RequestTimeout), timeout.String())
		g.Expect(o.lease()).To(BeNumerically(">=", delivery.MinLease), timeout.String())
	}
}

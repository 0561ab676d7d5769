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
	// The times of a row count from noon, which is now.
	quiet := windows{}
	closed := windows{highEnd: at(-time.Millisecond), normalEnd: at(-time.Millisecond)}
	open := windows{highEnd: at(300 * time.Millisecond), normalEnd: at(800 * time.Millisecond)}
	highOver := windows{highEnd: at(0), normalEnd: at(500 * time.Millisecond)}
	wait := func(d time.Duration) decision { return decision{At: at(d)} }
	claim := decision{Claim: true, Limit: 50}

	for _, row := range []struct {
		name    string
		kind    delivery.Kind
		pending Pending
		windows windows
		want    decision
	}{
		{"nothing waits", delivery.KindStatus, Pending{}, quiet, decision{}},
		{"the first after a quiet time waits 10 ms for others", delivery.KindStatus, Pending{Urgent: 1, UrgentSince: at(0)}, quiet, wait(10 * time.Millisecond)},
		{"so does a normal one", delivery.KindStatus, Pending{Normal: 1, NormalSince: at(-4 * time.Millisecond)}, quiet, wait(6 * time.Millisecond)},
		{"and goes then", delivery.KindStatus, Pending{Urgent: 1, UrgentSince: at(-10 * time.Millisecond)}, quiet, claim},
		{"the windows are over", delivery.KindStatus, Pending{Normal: 1, NormalSince: at(0)}, closed, wait(10 * time.Millisecond)},
		{"a high one waits for the end of its window", delivery.KindStatus, Pending{Urgent: 3, UrgentSince: at(-190 * time.Millisecond)}, open, wait(300 * time.Millisecond)},
		{"a normal one for the end of its own", delivery.KindStatus, Pending{Normal: 3, NormalSince: at(-190 * time.Millisecond)}, open, wait(800 * time.Millisecond)},
		{"both: the first end counts", delivery.KindStatus, Pending{Urgent: 1, Normal: 3, UrgentSince: at(-time.Millisecond), NormalSince: at(-190 * time.Millisecond)}, open, wait(300 * time.Millisecond)},
		{"the window of high ones ends, and the normal ones go along", delivery.KindStatus, Pending{Urgent: 1, Normal: 3, UrgentSince: at(-time.Millisecond), NormalSince: at(-190 * time.Millisecond)}, highOver, claim},
		{"the window of high ones ends, but only normal ones wait", delivery.KindStatus, Pending{Normal: 3, NormalSince: at(-190 * time.Millisecond)}, highOver, wait(500 * time.Millisecond)},
		{"50 go at once, within a window", delivery.KindStatus, Pending{Urgent: 20, Normal: 30, UrgentSince: at(0), NormalSince: at(0)}, open, claim},
		{"49 wait", delivery.KindStatus, Pending{Urgent: 19, Normal: 30, UrgentSince: at(0), NormalSince: at(0)}, open, wait(300 * time.Millisecond)},
		{"a released batch goes at once, what waits for its window does not", delivery.KindStatus, Pending{Urgent: 1, UrgentSince: at(0), Claimable: 1, Unfinished: 1}, open, decision{Claim: true}},
		{"a batch that may be claimed later", delivery.KindStatus, Pending{Unfinished: 1, NextClaimable: at(70 * time.Millisecond)}, open, wait(70 * time.Millisecond)},

		{"the first QR code waits 5 s", delivery.KindQR, Pending{Normal: 1, NormalSince: at(0)}, quiet, wait(5 * time.Second)},
		{"whatever the windows of statuses", delivery.KindQR, Pending{Normal: 49, NormalSince: at(-4 * time.Second)}, open, wait(time.Second)},
		{"5 s are over", delivery.KindQR, Pending{Normal: 1, NormalSince: at(-5 * time.Second)}, quiet, claim},
		{"50 QR codes go at once", delivery.KindQR, Pending{Normal: 50, NormalSince: at(0)}, quiet, claim},
		{"a QR code that is due later", delivery.KindQR, Pending{Waiting: 1, NextDue: at(20 * time.Second)}, quiet, wait(20 * time.Second)},
	} {
		t.Run(row.name, func(t *testing.T) {
			NewWithT(t).Expect(r.decide(row.kind, row.pending, row.windows, noon)).To(Equal(row.want))
		})
	}
}

// However much goes, a status waits no longer than its window.
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
		{"a window without room", FlusherOptions{Rules: Rules{HighWindow: time.Millisecond}}, "longer than"},
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

// A claim is longer than its request, however long that may take.
func TestClaimIsDerivedFromTheRequest(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Second, 15 * time.Second, 90 * time.Second, maxRequestTimeout} {
		g := NewWithT(t)
		o := FlusherOptions{RequestTimeout: timeout}.withDefaults()
		g.Expect(o.lease()-requestMargin).To(BeNumerically(">", o.RequestTimeout), timeout.String())
		g.Expect(o.lease()).To(BeNumerically(">=", MinLease), timeout.String())
	}
}

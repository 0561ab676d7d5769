package backoff_test

import (
	"math"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
)

func TestAfter(t *testing.T) {
	const s = time.Second
	for _, row := range []struct {
		name    string
		backoff backoff.Backoff
		// want are the pauses after no failure, one failure, two failures, ….
		want []time.Duration
	}{
		{"it doubles up to its bound", backoff.Backoff{First: s, Most: 5 * s}, []time.Duration{s, s, 2 * s, 4 * s, 5 * s, 5 * s}},
		{"it triples", backoff.Backoff{First: 10 * s, Most: 6 * time.Hour, Factor: 3},
			[]time.Duration{10 * s, 10 * s, 30 * s, 90 * s, 270 * s, 810 * s, 2430 * s, 7290 * s, 6 * time.Hour, 6 * time.Hour}},
		{"the bound is one of its pauses", backoff.Backoff{First: s, Most: 2 * s}, []time.Duration{s, s, 2 * s, 2 * s}},
		{"it never grows", backoff.Backoff{First: s, Most: s}, []time.Duration{s, s, s}},
		{"the bound is below the first pause", backoff.Backoff{First: 2 * s, Most: s}, []time.Duration{s, s, s}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			for failures, want := range row.want {
				g.Expect(row.backoff.After(failures)).To(Equal(want), "%d failures", failures)
			}
			g.Expect(row.backoff.After(-1)).To(Equal(row.want[0]))
			g.Expect(row.backoff.After(math.MaxInt)).To(Equal(row.backoff.Most))
		})
	}
}

func TestJitter(t *testing.T) {
	g := NewWithT(t)
	g.Expect(backoff.FullJitter(time.Minute, 0)).To(BeZero())
	g.Expect(backoff.FullJitter(time.Minute, 0.25)).To(Equal(15 * time.Second))
	g.Expect(backoff.FullJitter(time.Minute, 1)).To(Equal(time.Minute))
	g.Expect(backoff.HalfJitter(time.Minute, 0)).To(Equal(30 * time.Second))
	g.Expect(backoff.HalfJitter(time.Minute, 0.5)).To(Equal(45 * time.Second))
	g.Expect(backoff.HalfJitter(time.Minute, 1)).To(Equal(time.Minute))
}

package batch

import (
	"context"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	testclock "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// heldSource is a source of which another process has what waits: every claim finds nothing.
type heldSource struct {
	Source
	backlog delivery.Backlog
	claims  int
}

func (s *heldSource) Backlog(context.Context, delivery.Kind) (delivery.Backlog, error) {
	return s.backlog, nil
}

func (s *heldSource) Claim(context.Context, delivery.Kind, int, time.Duration) (*delivery.Batch, error) {
	s.claims++
	return nil, nil
}

// After a claim that found nothing the flusher pauses as it does while something waits, and does
// not query the database every 2 ms. A message that comes meanwhile is not delayed by it.
func TestPauseAfterAnEmptyClaim(t *testing.T) {
	for kind, pause := range map[delivery.Kind]time.Duration{
		delivery.KindMessage: gapMessages, delivery.KindStatus: gapWaiting, delivery.KindQR: gapQR,
	} {
		t.Run(string(kind), func(t *testing.T) {
			g := NewWithT(t)
			clk := testclock.NewFakeClock(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC))
			source := &heldSource{backlog: delivery.Backlog{Normal: 1, Waiting: 1, NormalSince: clk.Now().Add(-time.Minute)}}
			f, err := newFlusher(source, []delivery.Kind{kind}, nil, clk, logr.Discard(), FlusherOptions{})
			g.Expect(err).NotTo(HaveOccurred())
			r, k := &run{Flusher: f}, &kindFlusher{kind: kind, stale: true}
			sent, at, err := r.next(t.Context(), k)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(sent).To(BeFalse())
			g.Expect(source.claims).To(Equal(1))
			g.Expect(at).To(Equal(clk.Now().Add(pause)))
			if kind == delivery.KindQR {
				return
			}

			clk.Step(gapQuiet)
			source.backlog.NormalSince = clk.Now()
			k.stale = true // it wakes the flusher
			_, at, err = r.next(t.Context(), k)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(source.claims).To(Equal(1))
			g.Expect(at).To(Equal(clk.Now().Add(f.opts.StatusDelay)))
			clk.Step(f.opts.StatusDelay)
			_, _, err = r.next(t.Context(), k)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(source.claims).To(Equal(2))
		})
	}
}

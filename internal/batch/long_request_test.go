package batch_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	testclock "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// senderFunc is a Laravel client.
type senderFunc func(ctx context.Context, b delivery.Batch) delivery.Answer

func (f senderFunc) Send(ctx context.Context, b delivery.Batch) delivery.Answer { return f(ctx, b) }

// A request may take as long as --laravel-timeout allows: until then no other process can
// claim its batch, and afterwards the batch is not lost.
func TestALongRequestKeepsItsClaim(t *testing.T) {
	addr := shared(t)
	for _, timeout := range []time.Duration{time.Second, 15 * time.Second, 16 * time.Second, 90 * time.Second, 5 * time.Minute} {
		for name, late := range map[string]bool{"is answered in time": false, "is answered after another process has delivered its batch": true} {
			t.Run("a request of "+timeout.String()+" "+name, func(t *testing.T) {
				env := newEnvironment(t, addr, 0, nil)
				clk := testclock.NewFakeClock(time.Now().Truncate(time.Millisecond))
				newQueue := func() *batch.Queue { return batch.NewQueue(env.redis, env.keys, clk, batch.Options{Now: clk.Now}) }
				own, other := newQueue(), newQueue()
				claim := func() *delivery.Batch {
					b, err := other.Claim(t.Context(), delivery.KindStatus, 50, delivery.MinLease)
					if err != nil {
						t.Error(err)
					}
					return b
				}

				var requests atomic.Int32
				f, err := batch.NewFlusher(own, senderFunc(func(ctx context.Context, b delivery.Batch) delivery.Answer {
					requests.Add(1)
					if end, bounded := ctx.Deadline(); !bounded || time.Until(end) < timeout {
						t.Errorf("the request may take %s only", time.Until(end))
					}
					clk.Step(timeout)
					if stolen := claim(); stolen != nil {
						t.Errorf("another process claimed batch %s during its request", stolen.ID)
					}
					if late {
						clk.Step(b.Deadline.Sub(clk.Now()))
						if again := claim(); again == nil || again.ID != b.ID || other.Ack(t.Context(), again) != nil {
							t.Error("another process could not deliver the batch after the claim")
						}
					}
					return delivery.Answer{Result: delivery.Delivered, StatusCode: 200}
				}), clk, logr.Discard(), batch.FlusherOptions{RequestTimeout: timeout})
				env.g.Expect(err).NotTo(HaveOccurred())
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- f.Start(ctx) }()

				_, err = own.Enqueue(t.Context(), delivery.KindStatus, statusItem("a", 2))
				env.g.Expect(err).NotTo(HaveOccurred())
				env.g.Eventually(func(g Gomega) {
					if requests.Load() == 0 {
						clk.Step(10 * time.Millisecond) // a status waits for others for some milliseconds
					}
					g.Expect(requests.Load()).To(BeEquivalentTo(1))
					p, err := own.Backlog(t.Context(), delivery.KindStatus)
					g.Expect(err).NotTo(HaveOccurred())
					g.Expect(p.Waiting + p.InFlight + p.Unfinished).To(BeZero())
				}, waitTimeout, 5*time.Millisecond).Should(Succeed())
				cancel()
				env.g.Expect(<-ended).To(Succeed())
			})
		}
	}
}

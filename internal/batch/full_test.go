package batch

import (
	"fmt"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// TestFullRedis: a Redis that may not use more memory refuses new updates, and
// everything that empties the queue still works.
func TestFullRedis(t *testing.T) {
	for _, kind := range delivery.StateKinds {
		t.Run(string(kind), func(t *testing.T) {
			b := newEnvironment(t, realClient(t), Options{})
			g, valid := b.g, start.Add(time.Hour)
			item := func(i int, seq int64) delivery.Item { return code(fmt.Sprintf("s%02d", i), seq, valid) }
			for i := range 20 {
				b.enqueue(kind, item(i, 1))
			}
			inFlight := b.claim(kind, 4)
			g.Expect(b.client.ScriptFlush(b.ctx).Err()).To(Succeed(), "the scripts must also load when it is full")
			g.Expect(b.client.ConfigSet(b.ctx, "maxmemory", "1mb").Err()).To(Succeed())

			_, err := b.Enqueue(b.ctx, kind, item(99, 1))
			g.Expect(err).To(MatchError(And(ContainSubstring("OOM"), ContainSubstring("maxmemory"))), "a person finds the cause in the error")
			_, err = b.Update(b.ctx, kind, item(7, 2))
			g.Expect(err).To(MatchError(ContainSubstring("OOM")))

			g.Expect(b.Release(b.ctx, inFlight, time.Time{})).To(Succeed())
			again := b.claim(kind, 0)
			g.Expect(again.ID).To(Equal(inFlight.ID), "a second claim")
			g.Expect(b.Split(b.ctx, again)).To(Succeed())
			g.Expect(b.Ack(b.ctx, b.claim(kind, 0))).To(Succeed())
			half := b.claim(kind, 0)
			g.Expect(b.Ack(b.ctx, half, delivery.Rejection{SessionID: half.Items[0].SessionID, Reason: "no"})).To(Succeed())
			g.Expect(b.DeadLetter(b.ctx, b.claim(kind, 1), delivery.RefusedAlone, delivery.Answer{StatusCode: 422})).To(Succeed())
			g.Expect(b.Withdraw(b.ctx, kind, "s19", item(19, 1).Numbers)).To(Succeed())
			for batch := b.claim(kind, 5); batch != nil; batch = b.claim(kind, 5) {
				g.Expect(b.Ack(b.ctx, batch)).To(Succeed())
			}
			g.Expect(b.pending(kind)).To(Equal(delivery.Backlog{}))

			g.Expect(b.client.ConfigSet(b.ctx, "maxmemory", "0").Err()).To(Succeed())
			g.Expect(b.enqueue(kind, item(99, 1))).To(Equal([]EnqueueCode{Queued}), "updates are accepted again when there is room")
		})
	}
}

// TestScriptsThatRunWhenFull lists the scripts that may take memory from a full Redis.
// The others must be refused, or a full Redis would grow without a bound.
func TestScriptsThatRunWhenFull(t *testing.T) {
	for name, text := range map[string]string{
		"claim": claimLua, "ack": ackLua, "release": releaseLua, "split": splitLua, "withdraw": withdrawLua,
	} {
		if !strings.Contains(text, "run_when_full()") {
			t.Errorf("%s empties the queue and does not run when Redis is full", name)
		}
	}
	if strings.Contains(enqueueLua, "run_when_full()") {
		t.Error("enqueue fills the queue and runs when Redis is full")
	}
}

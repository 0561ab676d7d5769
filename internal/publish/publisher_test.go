package publish

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/cache"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// TestTheManagerUpdates is what the manager says of a session that nobody holds,
// seen in the cache, whose keys are gone after a while without a holder.
func TestTheManagerUpdates(t *testing.T) {
	g, ctx := NewWithT(t), t.Context()
	client := goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t)})
	t.Cleanup(func() { _ = client.Close() })
	keys := redis.NewKeys("test:")
	queue := batch.NewQueue(client, keys, clock.RealClock{}, batch.Options{})
	s := NewManagerPublisher(queue, cache.New(client, keys, clock.RealClock{}))
	status := func(epoch int64, phase string) delivery.StatusItem {
		now := delivery.Time{Time: time.Now()}
		return delivery.StatusItem{
			Numbers: delivery.Numbers{Epoch: epoch}, SessionID: "acme", Status: "pending", Phase: phase, Reason: "Test",
			OccurredAt: now, Priority: delivery.High,
		}
	}
	shown := func() string {
		value, err := client.Get(ctx, keys.Status("acme")).Result()
		if err != nil {
			g.ExpectWithOffset(1, err).To(MatchError(goredis.Nil))
		}
		return value
	}
	update := func(epoch int64, phase string) bool {
		told, err := s.Update(ctx, status(epoch, phase))
		g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
		return told
	}
	keysGone := func() {
		g.ExpectWithOffset(1, client.Del(ctx, keys.Status("acme"), keys.Connection("acme")).Err()).To(Succeed())
	}
	g.Expect(update(1, "Pending")).To(BeFalse(), "Redis knows nothing")
	g.Expect(shown()).To(BeEmpty())

	g.Expect(s.Enqueue(ctx, status(2, "Pending"))).To(Succeed())
	g.Expect(shown()).To(ContainSubstring("Pending"))
	g.Expect(update(3, "Suspended")).To(BeTrue())
	g.Expect(shown()).To(ContainSubstring("Suspended"))

	keysGone()
	g.Expect(update(2, "Pending")).To(BeTrue(), "what is newer has been told")
	g.Expect(shown()).To(BeEmpty(), "and the cache gets nothing older")
	g.Expect(update(3, "Suspended")).To(BeTrue(), "the answer to the first time was lost")
	g.Expect(shown()).To(ContainSubstring("Suspended"))

	flying, err := queue.Claim(ctx, delivery.KindStatus, 50, time.Minute)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(queue.Ack(ctx, flying)).To(Succeed())
	keysGone()
	g.Expect(update(3, "Suspended")).To(BeTrue(), "also where it was delivered meanwhile")
	g.Expect(shown()).To(ContainSubstring("Suspended"))

	g.Expect(client.FlushAll(ctx).Err()).To(Succeed())
	g.Expect(update(3, "Suspended")).To(BeFalse())
	g.Expect(shown()).To(BeEmpty())
}

package publish

import (
	"errors"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/types"
	goredis "github.com/redis/go-redis/v9"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/cache"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

// The keys of a session in the cache expire a while after its holder is gone.
func TestTheManagerUpdatesTheCache(t *testing.T) {
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
		published, err := s.Update(ctx, status(epoch, phase))
		g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
		return published
	}
	keysGone := func() {
		g.ExpectWithOffset(1, client.Del(ctx, keys.Status("acme"), keys.Connection("acme")).Err()).To(Succeed())
	}
	g.Expect(update(1, "Pending")).To(BeFalse(), "Redis has no status of the session")
	g.Expect(shown()).To(BeEmpty())

	g.Expect(s.Enqueue(ctx, status(2, "Pending"))).To(Succeed())
	g.Expect(shown()).To(ContainSubstring("Pending"))
	g.Expect(update(3, "Suspended")).To(BeTrue())
	g.Expect(shown()).To(ContainSubstring("Suspended"))

	keysGone()
	_, err := s.Update(ctx, status(2, "Pending"))
	g.Expect(err).To(MatchError(ContainSubstring("epoch 3")), "a newer status was published")
	g.Expect(shown()).To(BeEmpty(), "an older status is not written to the cache")
	g.Expect(update(3, "Suspended")).To(BeTrue(), "the answer to the first call was lost")
	g.Expect(shown()).To(ContainSubstring("Suspended"))

	claimed, err := queue.Claim(ctx, delivery.KindStatus, 50, time.Minute)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(queue.Ack(ctx, claimed)).To(Succeed())
	keysGone()
	g.Expect(update(3, "Suspended")).To(BeTrue(), "also if it was delivered in between")
	g.Expect(shown()).To(ContainSubstring("Suspended"))

	g.Expect(client.FlushAll(ctx).Err()).To(Succeed())
	g.Expect(update(3, "Suspended")).To(BeFalse())
	g.Expect(shown()).To(BeEmpty())
}

// The worker checks for the error that the publisher returns.
var _ *worker.StaleError = (*delivery.StaleError)(nil)

// A publisher gets an error if Redis has numbers that it can never exceed, and only then.
func TestAStalePublicationIsReported(t *testing.T) {
	g, ctx := NewWithT(t), t.Context()
	client := goredis.NewClient(&goredis.Options{Addr: testenv.Redis(t)})
	t.Cleanup(func() { _ = client.Close() })
	keys := redis.NewKeys("")
	queue := batch.NewQueue(client, keys, clock.RealClock{}, batch.Options{})
	c := cache.New(client, keys, clock.RealClock{})
	holder, manager := NewPublisher(queue, c), NewManagerPublisher(queue, c)
	at := func(epoch, start, n int64) delivery.StatusItem {
		return delivery.StatusItem{
			SessionID: "acme", Status: delivery.Active, Phase: "Connected", Priority: delivery.High, OccurredAt: delivery.Time{Time: time.Now()},
			Numbers: delivery.Numbers{Epoch: epoch, Seq: delivery.FirstSeq(start) + n},
		}
	}
	publish := func(item delivery.StatusItem) error {
		return holder.Publish(ctx, session.Publication{Status: item, NewStatus: true})
	}
	stale := func(epoch int64) types.GomegaMatcher {
		return Satisfy(func(err error) bool {
			var stale *delivery.StaleError
			return errors.As(err, &stale) && stale.Epoch == epoch
		})
	}
	g.Expect(publish(at(100, 3, 5))).To(Succeed())
	g.Expect(publish(at(100, 3, 5))).To(Succeed(), "a repetition")
	g.Expect(publish(at(100, 3, 4))).To(Succeed(), "it published a newer status itself")
	g.Expect(manager.Enqueue(ctx, at(100, 0, 1))).To(Succeed(), "the holder has published a newer status with this epoch")

	g.Expect(publish(at(99, 9, 9))).To(stale(100), "a resource that was restored")
	g.Expect(publish(at(100, 2, 9))).To(stale(100), "a record in the database that was restored")
	g.Expect(manager.Enqueue(ctx, at(99, 0, 1))).To(stale(100))
	g.Expect(manager.Deleted(ctx, at(99, 0, 1))).To(stale(100))
	_, err := manager.Update(ctx, at(99, 0, 1))
	g.Expect(err).To(stale(100))

	code := delivery.QRItem{
		SessionID: "acme", QR: "code", Attempt: 1, GeneratedAt: delivery.Time{Time: time.Now()}, ExpiresAt: delivery.Time{Time: time.Now().Add(time.Minute)},
		Numbers: delivery.Numbers{Epoch: 300},
	}
	g.Expect(holder.Publish(ctx, session.Publication{Status: at(200, 4, 1), QR: &code, NewQR: true})).To(Succeed())
	code.Epoch, code.QR = 200, "another"
	g.Expect(holder.Publish(ctx, session.Publication{Status: at(200, 4, 2), QR: &code, NewQR: true})).To(stale(300), "the codes are refused as well")
}

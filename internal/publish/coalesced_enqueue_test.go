package publish

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

func TestConcurrentCallsShareARoundTrip(t *testing.T) {
	g := NewWithT(t)
	hold, trips := make(chan struct{}), make(chan int, 1000)
	var mu sync.Mutex
	got := map[string]int{}
	results := map[string]batch.EnqueueResult{
		"0": {Code: batch.Stale, Newest: delivery.Numbers{Epoch: 9}}, "1": {Code: batch.Queued}, "2": {Code: batch.Replaced}, "3": {Code: batch.Unknown},
	}
	q := newCoalescedEnqueue(delivery.KindStatus, 1, func(_ context.Context, _ delivery.Kind, items ...delivery.Item) ([]batch.EnqueueResult, error) {
		trips <- len(items)
		<-hold
		mu.Lock()
		defer mu.Unlock()
		var answer []batch.EnqueueResult
		for _, item := range items {
			got[item.SessionID]++
			answer = append(answer, results[item.SessionID])
		}
		return answer, nil
	})
	var all sync.WaitGroup
	enqueue := func(i int) {
		all.Go(func() {
			id := fmt.Sprint(i)
			g.Expect(q.Enqueue(t.Context(), delivery.Item{SessionID: id})).To(Equal(results[id]), "each call gets the result of its own item")
		})
	}
	enqueue(0)
	g.Eventually(trips).Should(Receive(Equal(1)), "a call that is alone is sent at once")
	for i := 1; i <= 500; i++ {
		enqueue(i)
	}
	g.Eventually(func() int {
		q.mu.Lock()
		defer q.mu.Unlock()
		return len(q.waiting)
	}).Should(Equal(500))
	close(hold)
	all.Wait()
	g.Expect(trips).To(Receive(Equal(500)), "the other calls share one round trip")
	g.Expect(got).To(HaveLen(501))
	for id, n := range got {
		g.Expect(n).To(Equal(1), id)
	}
}

func TestEveryCallGetsTheErrorOfItsRoundTrip(t *testing.T) {
	g := NewWithT(t)
	down := errors.New("connection refused")
	q := newCoalescedEnqueue(delivery.KindStatus, 1, func(context.Context, delivery.Kind, ...delivery.Item) ([]batch.EnqueueResult, error) {
		return nil, down
	})
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			_, err := q.Enqueue(t.Context(), delivery.Item{SessionID: fmt.Sprint(i)})
			g.Expect(err).To(MatchError(down))
		})
	}
	all.Wait()
}

func TestACallThatIsCancelledDoesNotCancelTheOthers(t *testing.T) {
	g := NewWithT(t)
	hold := make(chan struct{})
	q := newCoalescedEnqueue(delivery.KindStatus, 1, func(ctx context.Context, _ delivery.Kind, items ...delivery.Item) ([]batch.EnqueueResult, error) {
		<-hold
		return make([]batch.EnqueueResult, len(items)), ctx.Err()
	})
	cancelled, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() { // makes the round trip for the others too
		g.Expect(q.Enqueue(cancelled, delivery.Item{SessionID: "a"})).Error().NotTo(HaveOccurred())
	})
	g.Eventually(q.turn).Should(HaveLen(1))
	waits := make(chan error, 1)
	all.Go(func() {
		_, err := q.Enqueue(cancelled, delivery.Item{SessionID: "b"})
		waits <- err
	})
	cancel()
	g.Eventually(waits).Should(Receive(MatchError(context.Canceled)))
	all.Go(func() { g.Expect(q.Enqueue(t.Context(), delivery.Item{SessionID: "c"})).Error().NotTo(HaveOccurred()) })
	close(hold)
	all.Wait()
}

package app

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

// wakes counts wake-ups; hang makes each wait for its context, as while Redis is away.
type wakes struct {
	sent chan struct{}
	hang chan struct{}
}

func (w *wakes) WakeForMessages(ctx context.Context) error {
	w.sent <- struct{}{}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-w.hang:
		return nil
	}
}

// A push wakes the flusher when nothing else of the session waits. It waits for no wake-up, so
// Redis may be away while messages come.
func TestPushesWakeTheFlusher(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	opened, err := store.Open(ctx, store.Config{URL: filepath.Join(t.TempDir(), "inbox.db")}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { g.Expect(opened.Close()).To(Succeed()) })
	g.Expect(opened.Migrate(ctx)).To(Succeed())
	w := &wakes{sent: make(chan struct{}, 100), hang: make(chan struct{})}
	inbox := newWorkerInbox(opened, store.Bounds{SessionMessages: 10}, w, clock.RealClock{}, logr.Discard())
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- inbox.run(running) }()

	takings := map[string]*store.Taking{}
	for _, id := range []string{"a", "b", "c"} {
		_, err := opened.Claim(ctx, store.Claimant{SessionID: id, Namespace: "ns", UID: id}, func(context.Context, string) (bool, error) { return false, nil })
		g.Expect(err).NotTo(HaveOccurred())
		takings[id], err = opened.Take(ctx, id, 1)
		g.Expect(err).NotTo(HaveOccurred())
	}
	push := func(id string, n int) (store.PushResult, error) {
		return inbox.Push(ctx, takings[id], delivery.Item{SessionID: id, Key: fmt.Sprint(id, n), Numbers: delivery.Numbers{Epoch: 1, Seq: int64(n)}, Payload: []byte("{}")})
	}
	g.Expect(push("a", 1)).To(HaveField("Waiting", BeEquivalentTo(1)))
	g.Eventually(w.sent).Should(HaveLen(1))
	// The wake-up hangs. All pushes succeed, and one or two more wake-ups follow for all of them.
	for n := range 20 {
		result, err := push("a", n+2)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(result.Over == store.SessionBound).To(Equal(n+2 >= 10))
	}
	for _, id := range []string{"b", "c"} {
		g.Expect(push(id, 1)).To(HaveField("Over", store.NoBound))
	}
	close(w.hang)
	g.Eventually(func() int { return len(w.sent) }).Should(BeNumerically(">", 1))

	_, err = opened.Take(ctx, "a", 2)
	g.Expect(err).NotTo(HaveOccurred())
	_, err = push("a", 99)
	g.Expect(errors.Is(err, store.ErrFenced)).To(BeTrue())
	stop()
	g.Expect(<-ended).To(Succeed())
	g.Expect(len(w.sent)).To(BeNumerically("<=", 3))
}

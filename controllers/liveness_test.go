package controllers

import (
	"context"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/whatsapp-operator/whatsapp-operator/internal/liveness"
)

// A placement run that never ends is seen by the liveness probe; one whose writes end, however
// slowly, is not.
func TestAStuckPlacementIsSeen(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(9)
	loops := liveness.New(w.clock)
	proceed, writing := make(chan struct{}), make(chan struct{}, len(sessions))
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{
		SubResourcePatch: func(ctx context.Context, c client.Client, name string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
			writing <- struct{}{}
			<-proceed
			return c.SubResource(name).Patch(ctx, obj, patch, opts...)
		},
	}))
	r.Loop, r.Concurrency = loops.Watch("placement", time.Minute), 1
	w.lease(r, "worker-a")
	ended := make(chan error, 1)
	go func() {
		_, err := r.Reconcile(context.Background(), everything)
		ended <- err
	}()
	for range len(sessions) - 1 {
		w.Eventually(writing, testTimeout).Should(Receive())
		w.clock.Step(time.Minute)
		w.Expect(loops.Check()).To(Succeed(), "slow, not stuck")
		proceed <- struct{}{}
	}
	w.Eventually(writing, testTimeout).Should(Receive())
	w.clock.Step(time.Minute + time.Second)
	w.Expect(loops.Check()).To(MatchError(ContainSubstring("placement")))
	close(proceed)
	w.Eventually(ended, testTimeout).Should(Receive(BeNil()))
	w.clock.Step(time.Hour)
	w.Expect(loops.Check()).To(Succeed(), "nothing to do")
}

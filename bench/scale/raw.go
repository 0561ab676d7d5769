package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// writes are the numbers of the manager's writes until all sessions were placed, by kind.
type writes struct{ finalizer, status int }

// rawConcurrency is the manager's concurrency: 16 for the session controller and 16 for
// placement.
const rawConcurrency = 32

// rawPatch makes the manager's writes with a bare client that knows all of them in advance,
// and returns how long it took. A session's writes are made one after another, because each
// has the resourceVersion of the one before.
func rawPatch(ctx context.Context, c client.Client, sessions []*v1alpha1.WhatsAppSession, n writes, workers int) (time.Duration, error) {
	begun := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(rawConcurrency)
	share := func(total, i int) int { // the i-th session's share of all writes
		return total*(i+1)/len(sessions) - total*i/len(sessions)
	}
	for i, s := range sessions {
		group.Go(func() error {
			for range share(n.finalizer, i) {
				if err := patchFinalizer(ctx, c, s); err != nil {
					return err
				}
			}
			states := states(s, fmt.Sprintf("worker-%d", i%workers), share(n.status, i))
			for _, next := range states {
				base := s.DeepCopy()
				s.Status = next
				if err := c.Status().Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
					return fmt.Errorf("writing a status: %w", err)
				}
			}
			return nil
		})
	}
	err := group.Wait()
	return time.Since(begun), err
}

func patchFinalizer(ctx context.Context, c client.Client, s *v1alpha1.WhatsAppSession) error {
	base := s.DeepCopy()
	controllerutil.AddFinalizer(s, v1alpha1.Finalizer)
	if err := c.Patch(ctx, s, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("writing the finalizer: %w", err)
	}
	return nil
}

// states are n statuses one after another: the last is the status of a placed session, the
// one before that of a session that has its id.
func states(s *v1alpha1.WhatsAppSession, worker string, n int) []v1alpha1.WhatsAppSessionStatus {
	now := time.Now()
	named := s.Status
	named.SessionID, named.Installation = s.SessionID(), "11111111-2222-3333-4444-555555555555/default/whatsapp-operator"
	named = status.Summarize(named, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonWaitingForPlacement, Message: "no worker has been chosen yet",
	}, now)
	placed := named
	placed.Worker, placed.Epoch = worker, now.Unix()
	placed = status.Summarize(placed, status.Facts{
		Generation: s.Generation, Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonPlaced,
		Message: "placed on " + worker + ", which connects it next",
	}, now)
	switch n {
	case 0:
		return nil
	case 1:
		return []v1alpha1.WhatsAppSessionStatus{placed}
	}
	all := []v1alpha1.WhatsAppSessionStatus{named, placed}
	for more := placed; len(all) < n; {
		more.Epoch++ // placed again
		all = append(all, more)
	}
	return all
}

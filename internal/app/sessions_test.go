package app

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"

	. "github.com/onsi/gomega"
	"golang.org/x/sync/errgroup"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func TestWhoOwnsADeviceGoesBeforeWhatIsToldOfIt(t *testing.T) {
	t.Parallel()
	held := v1alpha1.WhatsAppSessionStatus{HeldBy: "w", HolderStart: "p", Phase: v1alpha1.PhaseConnecting}
	for name, tt := range map[string]struct {
		from, to v1alpha1.WhatsAppSessionStatus
		owner    bool
	}{
		"a claim":                {v1alpha1.WhatsAppSessionStatus{}, held, true},
		"a claim by another run": {v1alpha1.WhatsAppSessionStatus{HeldBy: "w", HolderStart: "before"}, held, true},
		"a release":              {held, v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseDisconnected}, true},
		"a report":               {held, v1alpha1.WhatsAppSessionStatus{HeldBy: "w", HolderStart: "p", Phase: v1alpha1.PhaseConnected}, false},
	} {
		NewWithT(t).Expect(changesOwner(&tt.from, &tt.to)).To(Equal(tt.owner), name)
	}

	t.Log("while an owner waits, there is one report at a time; when none does, there are more")
	g := NewWithT(t)
	s := newSessions(nil)
	var at, most atomic.Int64
	g.Expect(s.own(t.Context(), func(ctx context.Context) error {
		var reports errgroup.Group
		for range 20 {
			reports.Go(func() error {
				return s.report(ctx, func(context.Context) error {
					most.Store(max(most.Load(), at.Add(1)))
					runtime.Gosched()
					at.Add(-1)
					return nil
				})
			})
		}
		return reports.Wait()
	})).To(Succeed())
	g.Expect(most.Load()).To(Equal(int64(1)))

	met := make(chan struct{})
	var meeting errgroup.Group
	for range 2 {
		meeting.Go(func() error {
			return s.report(t.Context(), func(ctx context.Context) error {
				select {
				case met <- struct{}{}:
				case <-met:
				case <-ctx.Done():
					return ctx.Err()
				}
				return nil
			})
		})
	}
	g.Expect(meeting.Wait()).To(Succeed(), "two are under way at once")
}

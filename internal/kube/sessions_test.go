package kube

import (
	"context"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"golang.org/x/sync/errgroup"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func TestClaimsAndReleasesGoBeforeReports(t *testing.T) {
	t.Parallel()
	held := v1alpha1.WhatsAppSessionStatus{HeldBy: "w", HolderStart: "p", Phase: v1alpha1.PhaseConnecting}
	for name, tt := range map[string]struct {
		from, to v1alpha1.WhatsAppSessionStatus
		owner    bool
	}{
		"a claim":                    {v1alpha1.WhatsAppSessionStatus{}, held, true},
		"a claim by another process": {v1alpha1.WhatsAppSessionStatus{HeldBy: "w", HolderStart: "before"}, held, true},
		"a release":                  {held, v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseDisconnected}, true},
		"a report":                   {held, v1alpha1.WhatsAppSessionStatus{HeldBy: "w", HolderStart: "p", Phase: v1alpha1.PhaseConnected}, false},
	} {
		NewWithT(t).Expect(changesOwner(&tt.from, &tt.to)).To(Equal(tt.owner), name)
	}

	t.Log("While a claim waits, there is one report at a time; otherwise there are more")
	g := NewWithT(t)
	s := NewSessions(nil)
	second := false
	g.Expect(s.own(t.Context(), func(ctx context.Context) error {
		return s.report(ctx, func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			g.Expect(s.report(ctx, func(context.Context) error { second = true; return nil })).To(MatchError(context.DeadlineExceeded))
			return nil
		})
	})).To(Succeed())
	g.Expect(second).To(BeFalse())

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
	g.Expect(meeting.Wait()).To(Succeed(), "two are in progress at once")
}

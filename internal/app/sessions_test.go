package app

import (
	"context"
	"testing"

	. "github.com/onsi/gomega"

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

	t.Log("while an owner waits, there is one report at a time")
	g := NewWithT(t)
	s := newSessions(nil)
	together := func() (most int) {
		for s.reports.TryAcquire(1) {
			most++
		}
		s.reports.Release(int64(most))
		return most
	}
	var during, owned int
	g.Expect(s.report(t.Context(), func(context.Context) error { during = together(); return nil })).To(Succeed())
	g.Expect(during).To(Equal(reportRequests - 1))
	g.Expect(s.own(t.Context(), func(ctx context.Context) error {
		return s.report(ctx, func(context.Context) error { owned = together(); return nil })
	})).To(Succeed())
	g.Expect(owned).To(BeZero())
}

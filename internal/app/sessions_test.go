package app

import (
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func TestWhoOwnsADeviceGoesBeforeWhatIsToldOfIt(t *testing.T) {
	t.Parallel()
	s := newSessions(nil)
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
		NewWithT(t).Expect(s.turns(&tt.from, &tt.to) == s.owner).To(Equal(tt.owner), name)
	}
}

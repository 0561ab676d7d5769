package status_test

import (
	"testing"

	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// A device whose account's number is not known is named by its address.
func TestTheMessageOfPaired(t *testing.T) {
	const jid, lid = "34600111222:3@s.whatsapp.net", "123456789012345:3@lid"
	for want, s := range map[string]v1alpha1.WhatsAppSessionStatus{
		"linked to +34600111222": {JID: jid, PhoneNumber: "+34600111222"},
		"linked to " + lid:       {JID: lid},
	} {
		got := status.Summarize(s, status.Facts{Phase: v1alpha1.PhaseConnected, Reason: v1alpha1.ReasonConnected}, noon)
		NewWithT(t).Expect(meta.FindStatusCondition(got.Conditions, v1alpha1.ConditionPaired).Message).To(Equal(want))
	}
}

package app

import (
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// TestAStoreMovesToAnotherReleaseAndBack: a person adopts it while the former
// release still runs, whose processes end; the session connects without a scan, on
// a worker of the same name, and never twice.
func TestAStoreMovesToAnotherReleaseAndBack(t *testing.T) {
	s := newEnvironment(t, testenv.Postgres(t))
	m, w := s.manager(), s.worker("worker-1")
	s.apply("shop")
	s.scan("shop", "+34611000003")
	before := s.phase("shop", v1alpha1.PhaseConnected)
	s.apply("idle", func(obj *v1alpha1.WhatsAppSession) { obj.Spec.Suspend = true })
	s.phase("idle", v1alpha1.PhaseSuspended)
	_, err := s.simulator.Inject(simulator.Fault{Kind: simulator.FaultPasskey})
	s.Expect(err).NotTo(HaveOccurred())
	s.apply("asked")
	s.scan("asked", "+34611000004")
	request := s.passkeyRequest("asked", "")

	for _, release := range []string{"other", "whatsapp-operator"} {
		s.Expect(s.runStore(0, "adopt", "--release="+release)).To(ContainSubstring("Adopted"))
		for _, former := range []*process{m, w} {
			s.Expect(former.fails()).To(And(ContainSubstring("StoreOwnedElsewhere"), ContainSubstring("/"+release), ContainSubstring("store adopt")))
		}
		s.Expect(s.runStore(0, "adopt", "--release="+release)).To(ContainSubstring("Adopted"), "the command may be repeated")
		m, w = s.manager("--release="+release), s.worker("worker-1", "--release="+release)
		for _, name := range []string{"shop", "idle", "asked"} {
			s.Eventually(func() string { return s.get(name).Status.Installation }).Should(HaveSuffix("/" + release))
		}
		after := s.phase("shop", v1alpha1.PhaseConnected)
		s.Expect(after.Status.JID).To(Equal(before.Status.JID))
		s.Expect(after.Status.Epoch).To(BeNumerically(">", before.Status.Epoch))
		s.phase("idle", v1alpha1.PhaseSuspended)
		before = after

		t.Log("a pairing that waits for a passkey starts again with a scan")
		s.Expect(s.event("asked", v1alpha1.ReasonPasskeyExpired)).To(ContainSubstring("scan the next code"))
		s.scan("asked", "+34611000004")
		request = s.passkeyRequest("asked", request)
	}
	s.annotate("asked", v1alpha1.PasskeyResponseAnnotation, s.passkeyAnswer("+34611000004", request))
	s.phase("asked", v1alpha1.PhaseConnected)
	s.Expect(s.runStore(1, "adopt", "--former=nonsense")).To(ContainSubstring("CLUSTER/NAMESPACE/RELEASE"))

	s.Expect(s.client.Delete(t.Context(), s.get("shop"))).To(Succeed())
	s.gone("shop")
}

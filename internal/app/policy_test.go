package app

import (
	"fmt"
	"testing"

	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// A session that WhatsApp refuses again and again is left alone, also by the
// worker that takes it up next, until a person begins anew.
func TestQuarantine(t *testing.T) {
	s := newEnvironment(t, "")
	s.manager()
	flags := []string{"--quarantine-after=3", "--quarantine-first=2h"}
	first := s.worker("worker-1", flags...)
	s.apply("shop")
	s.scan("shop", "+34700222111")
	device := s.phase("shop", v1alpha1.PhaseConnected).Status.JID
	s.expectPublished("shop", delivery.Active, v1alpha1.PhaseConnected)

	_, err := s.simulator.Inject(simulator.Fault{Kind: simulator.FaultRefuse, Device: device})
	s.Expect(err).NotTo(HaveOccurred())
	quarantined := func(on string) v1alpha1.WhatsAppSessionStatus {
		t.Helper()
		s.Eventually(func() v1alpha1.WhatsAppSessionStatus { return s.get("shop").Status }).Should(And(
			HaveField("Phase", v1alpha1.PhaseDisconnected), HaveField("HeldBy", on), HaveField("Failures", BeEquivalentTo(3)),
			HaveField("FailureReason", "SocketClosed"), HaveField("RetryAfter", Not(BeNil()))))
		status := s.get("shop").Status
		stalled := meta.FindStatusCondition(status.Conditions, v1alpha1.ConditionStalled)
		s.Expect(stalled.Reason).To(Equal(v1alpha1.ReasonQuarantined))
		s.Expect(meta.IsStatusConditionTrue(status.Conditions, v1alpha1.ConditionStalled)).To(BeTrue())
		return status
	}
	before := quarantined("worker-1")
	s.Expect(s.expectPublished("shop", delivery.Inactive, v1alpha1.PhaseDisconnected).Reason).To(Equal(v1alpha1.ReasonQuarantined))
	s.Expect(s.event("shop", v1alpha1.ReasonQuarantined)).To(ContainSubstring("SocketClosed"))
	refused := s.simulator.Stats().Refused

	s.worker("worker-2", flags...)
	first.stop()
	after := quarantined("worker-2")
	s.Expect(after.RetryAfter).To(Equal(before.RetryAfter))
	s.Expect(s.simulator.Stats().Refused).To(Equal(refused), "the next holder does not try it at once")

	_, err = s.simulator.Clear("", "")
	s.Expect(err).NotTo(HaveOccurred())
	s.change("shop", restart("the cause is found"))
	status := s.phase("shop", v1alpha1.PhaseConnected).Status
	s.Expect(status.Failures).To(BeZero())
	s.Expect(status.RetryAfter).To(BeNil())
	s.expectPublished("shop", delivery.Active, v1alpha1.PhaseConnected)
}

// WhatsApp refuses the version of the client as outdated: the worker asks for the
// newest, tries it with one session, and all connect again.
func TestOutdatedClientVersion(t *testing.T) {
	s := newEnvironment(t, "")
	s.manager()
	s.worker("worker-1", "--outdated-pause=1s")
	var names []string
	for i := range 5 {
		names = append(names, fmt.Sprintf("shop-%d", i))
		s.apply(names[i])
		s.scan(names[i], fmt.Sprintf("+3470033311%d", i))
	}
	for _, name := range names {
		s.phase(name, v1alpha1.PhaseConnected)
	}

	newest := s.simulator.WebVersion() + 10
	inject := func(f simulator.Fault) {
		t.Helper()
		_, err := s.simulator.Inject(f)
		s.Expect(err).NotTo(HaveOccurred())
	}
	inject(simulator.Fault{Kind: simulator.FaultMinVersion, Version: newest})
	inject(simulator.Fault{Kind: simulator.FaultDrop})
	s.Eventually(func() string { return s.reasons(names) }).Should(ContainSubstring(v1alpha1.ReasonOutdated))
	s.simulator.SetWebVersion(newest)
	for _, name := range names {
		s.phase(name, v1alpha1.PhaseConnected)
		s.expectPublished(name, delivery.Active, v1alpha1.PhaseConnected)
	}
}

// reasons are those of the sessions' connections.
func (s *environment) reasons(names []string) (all string) {
	for _, name := range names {
		if c := meta.FindStatusCondition(s.get(name).Status.Conditions, v1alpha1.ConditionConnected); c != nil {
			all += c.Reason + " "
		}
	}
	return all
}

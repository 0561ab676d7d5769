package app

import (
	"fmt"
	"testing"

	. "github.com/onsi/gomega"
	eventsv1 "k8s.io/api/events/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// code waits until a session shows a code to type that is not the one before.
func (s *environment) code(name, before string) string {
	s.t.Helper()
	var code string
	s.Eventually(func() string {
		code = s.get(name).Status.PairingCode
		return code
	}).ShouldNot(BeElementOf("", before))
	return code
}

// TestPhoneCode links phones by codes that are typed on them.
func TestPhoneCode(t *testing.T) {
	s := newEnvironment(t, "")
	manager, worker := s.manager(), s.worker("worker-1")
	byCode := func(phone string) func(*v1alpha1.WhatsAppSession) {
		return func(o *v1alpha1.WhatsAppSession) {
			o.Spec.Pairing.Method, o.Spec.Pairing.PhoneNumber = v1alpha1.PairingPhoneCode, phone
		}
	}
	const right, other = "+34600333001", "+34600333002"
	enter := func(phone, code string) error {
		_, err := s.simulator.EnterCode(t.Context(), phone, code)
		return err
	}

	s.apply("shop", byCode(right))
	code := s.code("shop", "")
	obj := s.phase("shop", v1alpha1.PhasePairing)
	s.Expect(obj.Status.QR).To(BeNil())
	last := s.expectPublished("shop", delivery.Pending, v1alpha1.PhasePairing)
	s.Expect(last.Reason).To(Equal(v1alpha1.ReasonWaitingForCode))

	t.Log("another phone cannot, nor can the right one with another code")
	s.Expect(enter(other, code)).To(MatchError(simulator.ErrNotNow))
	s.Expect(enter(right, "1111-1111")).To(MatchError(simulator.ErrBadInput))
	s.Expect(s.simulator.Devices()).To(BeEmpty())

	t.Log("a lost connection takes its code with it")
	_, err := s.simulator.Inject(simulator.Fault{Kind: simulator.FaultDrop})
	s.Expect(err).NotTo(HaveOccurred())
	fresh := s.code("shop", code)
	s.Expect(enter(right, code)).To(MatchError(simulator.ErrBadInput))

	t.Log("Laravel and Redis have the code, and no log and no Event does")
	s.Eventually(func() string { return s.laravel.Code("shop").PairingCode }).Should(Equal(fresh))
	s.Expect(s.laravel.Code("shop").QR).To(BeEmpty())
	s.Eventually(func() string { return s.redis.Get(t.Context(), "session:shop:qr").Val() }).Should(ContainSubstring(fresh))
	var events eventsv1.EventList
	s.Expect(s.client.List(t.Context(), &events, client.InNamespace(s.namespace))).To(Succeed())
	for place, content := range map[string]string{
		"the manager's log": manager.output(), "the worker's log": worker.output(), "an Event": fmt.Sprint(events.Items),
	} {
		s.Expect(content).NotTo(ContainSubstring(code), place)
		s.Expect(content).NotTo(ContainSubstring(fresh), place)
	}

	t.Log("the right code on the right phone")
	s.Expect(enter(right, fresh)).To(Succeed())
	obj = s.phase("shop", v1alpha1.PhaseConnected)
	s.Expect(obj.Status.PhoneNumber).To(Equal(right))
	s.Expect(obj.Status.PairingCode).To(BeEmpty(), "a used code is cleared")
	s.Expect(s.expectPublished("shop", delivery.Active, v1alpha1.PhaseConnected).PhoneNumber).To(Equal(right))
	_, err = s.simulator.Send(t.Context(), obj.Status.JID, "", "hello")
	s.Expect(err).NotTo(HaveOccurred())
	s.Eventually(func() int { return s.simulator.Stats().Unacknowledged }).Should(BeZero())

	t.Log("the method is changed while codes are shown, and WhatsApp gives none at first")
	s.apply("till")
	s.Eventually(func() *v1alpha1.QRStatus { return s.get("till").Status.QR }).ShouldNot(BeNil())
	_, err = s.simulator.Inject(simulator.Fault{Kind: simulator.FaultRefuseCode, Reason: 429})
	s.Expect(err).NotTo(HaveOccurred())
	s.change("till", byCode("+34600333009"))
	s.Expect(s.event("till", v1alpha1.ReasonPairingCodeRefused)).To(ContainSubstring("too many were asked for"))
	s.Eventually(func() *v1alpha1.QRStatus { return s.get("till").Status.QR }).Should(BeNil())
	_, err = s.simulator.Clear(simulator.FaultRefuseCode, "")
	s.Expect(err).NotTo(HaveOccurred())
	s.change("till", byCode(other)) // is not made to wait for the other number's refusal
	s.Expect(enter(other, s.code("till", ""))).To(Succeed())
	s.Expect(s.phase("till", v1alpha1.PhaseConnected).Status.PhoneNumber).To(Equal(other))
	s.expectPublished("till", delivery.Active, v1alpha1.PhaseConnected)
}

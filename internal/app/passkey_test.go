package app

import (
	"fmt"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// TestPasskey links accounts that WhatsApp asks for their passkeys, after a scan and after a
// code that was typed, with wrong answers and a worker that ends in between.
func TestPasskey(t *testing.T) {
	s := newEnvironment(t, "")
	manager, worker := s.manager(), s.worker("worker-1")
	_, err := s.simulator.Inject(simulator.Fault{Kind: simulator.FaultPasskey})
	s.Expect(err).NotTo(HaveOccurred())
	const phone = "+34600444001"
	scan := func(before string) (code string) {
		s.t.Helper()
		s.Eventually(func() string {
			if qr := s.get("shop").Status.QR; qr != nil {
				code = qr.Code
			}
			return code
		}).ShouldNot(BeElementOf("", before))
		_, err := s.simulator.Scan(t.Context(), code, phone)
		s.Expect(err).NotTo(HaveOccurred())
		return code
	}

	s.apply("shop")
	code := scan("")
	first := s.passkeyRequest("shop", "")
	obj := s.get("shop")
	s.Expect(obj.Status.Phase).To(Equal(v1alpha1.PhasePairing))
	s.Expect(obj.Status.QR).To(BeNil(), "the code cannot be scanned any more")
	s.Eventually(func() *delivery.Passkey { return s.laravel.Code("shop").Passkey }).ShouldNot(BeNil())
	s.Expect(s.laravel.Code("shop").Passkey.RequestOptions).To(MatchJSON(first))

	t.Log("another account's passkey answers")
	stranger := s.passkeyAnswer("+34600444009", first)
	s.annotate("shop", v1alpha1.PasskeyResponseAnnotation, stranger)
	s.Expect(s.event("shop", v1alpha1.ReasonPasskeyRefused)).To(ContainSubstring("another account"))
	s.Eventually(func() string { return s.get("shop").PasskeyResponse() }).Should(BeEmpty())
	s.Expect(s.get("shop").Status.Passkey).NotTo(BeNil(), "the request stays")

	t.Log("the worker's process ends: the pairing begins anew with a scan")
	worker.Kill()
	worker = s.worker("worker-1")
	scan(code)
	second := s.passkeyRequest("shop", first)
	s.Expect(s.event("shop", v1alpha1.ReasonPasskeyExpired)).To(ContainSubstring("scan the next code"))
	s.annotate("shop", v1alpha1.PasskeyResponseAnnotation, s.passkeyAnswer(phone, first))
	s.Eventually(func() string { return s.get("shop").PasskeyResponse() }).Should(BeEmpty(), "it answers the request before")
	right := s.passkeyAnswer(phone, second)
	s.annotate("shop", v1alpha1.PasskeyResponseAnnotation, right)
	obj = s.phase("shop", v1alpha1.PhaseConnected)
	s.Expect(obj.Status.PhoneNumber).To(Equal(phone))
	s.Expect(obj.Status.Passkey).To(BeNil())
	s.Expect(obj.Status.LID).To(HaveSuffix("@lid"))
	s.expectPublished("shop", delivery.Active, v1alpha1.PhaseConnected)
	s.Eventually(func() string { return s.get("shop").PasskeyResponse() }).Should(BeEmpty())

	t.Log("after a code that was typed")
	const typed = "+34600444002"
	s.apply("till", func(o *v1alpha1.WhatsAppSession) {
		o.Spec.Pairing.Method, o.Spec.Pairing.PhoneNumber = v1alpha1.PairingPhoneCode, typed
	})
	_, err = s.simulator.EnterCode(t.Context(), typed, s.code("till", ""))
	s.Expect(err).NotTo(HaveOccurred())
	s.annotate("till", v1alpha1.PasskeyResponseAnnotation, s.passkeyAnswer(typed, s.passkeyRequest("till", "")))
	s.Expect(s.phase("till", v1alpha1.PhaseConnected).Status.PhoneNumber).To(Equal(typed))

	t.Log("answers are in no log")
	for place, content := range map[string]string{"the manager's log": manager.output(), "the worker's log": worker.output()} {
		for _, secret := range []string{right, stranger} {
			s.Expect(content).NotTo(ContainSubstring(secret[len(secret)/2:len(secret)/2+40]), fmt.Sprint(place))
		}
	}
}

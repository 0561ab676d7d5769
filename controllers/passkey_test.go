package controllers

import (
	"testing"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// What a person gives for a passkey is removed when the holder has used or refused it.
func TestPasskeyAnnotationsAreRemoved(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.pair(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	annotate := func(name, value string) {
		w.edit(s, func(s *v1alpha1.WhatsAppSession) { metav1.SetMetaDataAnnotation(&s.ObjectMeta, name, value) })
	}
	ask := func(change func(*v1alpha1.PasskeyStatus)) {
		w.holder(s, v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, func(next *v1alpha1.WhatsAppSessionStatus) {
			if next.Passkey == nil {
				next.Passkey = &v1alpha1.PasskeyStatus{RequestOptions: "{}", ExpiresAt: metav1.NewTime(w.clock.Now())}
			}
			change(next.Passkey)
		})
	}

	t.Log("nothing is asked for")
	annotate(v1alpha1.PasskeyResponseAnnotation, "too early")
	annotate("example.com/mine", "stays")
	w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.PasskeyResponse()).To(BeEmpty()) })
	w.Expect(w.event(s, v1alpha1.ReasonPasskeyRefused)).To(ContainSubstring("does not ask for a passkey at present"))

	t.Log("the holder has not seen it yet")
	ask(func(*v1alpha1.PasskeyStatus) {})
	annotate(v1alpha1.PasskeyResponseAnnotation, "an answer")
	annotate(v1alpha1.PasskeyConfirmAnnotation, "ABCD-1234")
	w.Consistently(func(g Gomega) {
		now, err := w.get(s)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(now.PasskeyResponse()).To(Equal("an answer"))
	}, "300ms").Should(Succeed())

	t.Log("it has used an older answer, then this one")
	ask(func(p *v1alpha1.PasskeyStatus) {
		p.ObservedResponse, p.ObservedConfirmation = session.Digest("an older answer"), session.Digest("ABCD-1234")
	})
	now := w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.PasskeyConfirmation()).To(BeEmpty()) })
	w.Expect(now.PasskeyResponse()).To(Equal("an answer"))
	ask(func(p *v1alpha1.PasskeyStatus) { p.ObservedResponse = session.Digest("an answer") })
	now = w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.PasskeyResponse()).To(BeEmpty()) })
	w.Expect(now.Annotations).To(HaveKeyWithValue("example.com/mine", "stays"))

	t.Log("its worker dies: the request is of no use any more")
	w.declareDead("worker-a")
	w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Passkey).To(BeNil()) })
	w.Expect(w.event(s, v1alpha1.ReasonPasskeyExpired)).To(ContainSubstring("scan the next code"))
}

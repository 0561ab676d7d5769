package app

import (
	"math"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// TestMoveKeepsOrder: a contact writes all the time while the session moves, because a person asks
// for it, and because its worker is shut down. Laravel gets each message, once by its key, in order.
func TestMoveKeepsOrder(t *testing.T) {
	s := newEnvironment(t, testenv.Postgres(t))
	s.manager()
	s.worker("worker-1")
	s.apply("shop")
	s.scan("shop", "+34600111222")
	s.phase("shop", v1alpha1.PhaseConnected)
	second := s.worker("worker-2")

	_, err := s.simulator.StartFlood(simulator.FloodRequest{Sessions: 1, Rate: 100, Seconds: 600})
	s.Expect(err).NotTo(HaveOccurred())
	arrived := func() int { return len(s.laravel.Messages("shop")) }
	heldBy := func() string { return s.get("shop").Status.HeldBy }
	s.Eventually(arrived).Should(BeNumerically(">", 100))

	t.Log("a person moves it")
	s.change("shop", func(o *v1alpha1.WhatsAppSession) {
		o.Annotations = map[string]string{v1alpha1.MoveToAnnotation: "worker-2"}
	})
	s.Eventually(heldBy).Should(Equal("worker-2"))
	s.phase("shop", v1alpha1.PhaseConnected)
	before := arrived()
	s.Eventually(arrived).Should(BeNumerically(">", before+100))

	t.Log("its worker is shut down")
	second.stop()
	s.Eventually(heldBy).ShouldNot(Equal("worker-2"))
	s.phase("shop", v1alpha1.PhaseConnected)
	before = arrived()
	s.Eventually(arrived).Should(BeNumerically(">", before+100))

	s.simulator.StopFloods()
	s.Eventually(func() int { return s.simulator.Stats().Unacknowledged }).Should(BeZero())
	sent, err := s.simulator.Ledger(simulator.LedgerQuery{Limit: math.MaxInt})
	s.Expect(err).NotTo(HaveOccurred())
	var want []string
	for _, e := range sent {
		if e.Kind == simulator.KindText {
			want = append(want, e.ID)
		}
	}
	// The receiver keeps a message once by its key, in the order in which they came.
	got := func() (ids []string) {
		for _, m := range s.laravel.Messages("shop") {
			if m.Type == delivery.TypeText {
				ids = append(ids, m.ID)
			}
		}
		return ids
	}
	s.Eventually(func() int { return len(got()) }).Should(Equal(len(want)))
	s.Expect(got()).To(Equal(want))
	s.Expect(s.laravel.Breaches()).To(BeEmpty())
}

package metrics

import (
	"fmt"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

// values returns the values of a metric at a scrape, by the value of its label.
func values(t *testing.T, name string) map[string]float64 {
	t.Helper()
	families, err := metrics.Registry.Gather()
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	values := map[string]float64{}
	for _, f := range families {
		if f.GetName() != namespace+"_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			label := ""
			for _, l := range m.GetLabel() {
				label = l.GetValue()
			}
			values[label] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return values
}

// Reasons contain codes from outside. Each code must not make a label value.
func TestReasonsAreBounded(t *testing.T) {
	g := NewWithT(t)
	for i := range 1000 {
		ConnectionEnded(fmt.Sprint("StreamError", i))
		Reconnected(fmt.Sprint("from outside ", i))
	}
	g.Expect(values(t, "worker_connections_ended_total")).To(Equal(map[string]float64{"StreamError": 1000}))
	g.Expect(values(t, "worker_reconnects_total")).To(Equal(map[string]float64{"Other": 1000}))
}

func TestTheStateOfTheBreaker(t *testing.T) {
	states := []string{"closed", "stale"}
	for _, state := range states {
		SetVersionBreaker(state, states)
	}
	NewWithT(t).Expect(values(t, "worker_version_breaker")).To(Equal(map[string]float64{"closed": 0, "stale": 1}))
}

func TestSessionStats(t *testing.T) {
	g := NewWithT(t)
	g.Expect(RegisterSessionStats(func() (time.Duration, int) { return 42 * time.Second, 3 })).To(Succeed())
	g.Expect(values(t, "worker_oldest_sign_of_life_seconds")).To(Equal(map[string]float64{"": 42}))
	g.Expect(values(t, "worker_quarantined_sessions")).To(Equal(map[string]float64{"": 3}))
	g.Expect(RegisterSessionStats(nil)).NotTo(Succeed(), "once in a process")
}

package benchenv

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

func TestCompare(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	at := time.Unix(1000, 0)
	before := snapshot(at, []simulator.Device{
		{JID: "stayed", Connected: true, Logins: 3, Away: time.Second, LoggedIn: at.Add(-time.Hour)},
		{JID: "moved", Connected: true, Logins: 1, LoggedIn: at.Add(-time.Hour)},
		{JID: "twice", Connected: true, Logins: 1, Away: time.Second, LoggedIn: at.Add(-time.Hour)},
		{JID: "gone", Connected: true, Logins: 1, LoggedIn: at.Add(-time.Hour)},
	})
	c := before.compare(snapshot(at.Add(time.Minute), []simulator.Device{
		{JID: "stayed", Connected: true, Logins: 3, Away: time.Second, LoggedIn: at.Add(-time.Hour)},
		{JID: "moved", Connected: true, Logins: 2, Away: 2 * time.Second, LoggedIn: at.Add(5 * time.Second)},
		{JID: "twice", Connected: true, Logins: 3, Away: 4 * time.Second, LoggedIn: at.Add(4 * time.Second)},
		{JID: "gone", Logins: 1, Away: time.Minute, LoggedIn: at.Add(-time.Hour)},
	}))
	g.Expect(c).To(Equal(Change{
		Connected: 3, Moves: 3,
		Logins: []time.Duration{4 * time.Second, 5 * time.Second},
		Gaps:   []time.Duration{2 * time.Second, 3 * time.Second},
	}))
	g.Expect(Percentile(c.Logins, 0)).To(Equal(4.0))
	g.Expect(Percentile(c.Logins, 50)).To(Equal(4.0))
	g.Expect(Percentile(c.Logins, 99)).To(Equal(5.0))
	g.Expect(Percentile(nil, 99)).To(BeZero())
}

package main

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
	before := snapshot{at: at, devices: map[string]simulator.Device{
		"stayed": {Connected: true, Logins: 3, Away: time.Second, LoggedIn: at.Add(-time.Hour)},
		"moved":  {Connected: true, Logins: 1, LoggedIn: at.Add(-time.Hour)},
		"twice":  {Connected: true, Logins: 1, Away: time.Second, LoggedIn: at.Add(-time.Hour)},
		"gone":   {Connected: true, Logins: 1, LoggedIn: at.Add(-time.Hour)},
	}}
	c := before.compare(snapshot{devices: map[string]simulator.Device{
		"stayed": {Connected: true, Logins: 3, Away: time.Second, LoggedIn: at.Add(-time.Hour)},
		"moved":  {Connected: true, Logins: 2, Away: 2 * time.Second, LoggedIn: at.Add(5 * time.Second)},
		"twice":  {Connected: true, Logins: 3, Away: 4 * time.Second, LoggedIn: at.Add(4 * time.Second)},
		"gone":   {Logins: 1, Away: time.Minute, LoggedIn: at.Add(-time.Hour)},
	}})
	g.Expect(c).To(Equal(change{
		connected: 3, moves: 3,
		logins: []time.Duration{4 * time.Second, 5 * time.Second},
		gaps:   []time.Duration{2 * time.Second, 3 * time.Second},
	}))
	g.Expect(percentile(c.logins, 0)).To(Equal(4.0))
	g.Expect(percentile(c.logins, 50)).To(Equal(4.0))
	g.Expect(percentile(c.logins, 99)).To(Equal(5.0))
	g.Expect(percentile(nil, 99)).To(BeZero())
}

package main

import (
	"testing"

	. "github.com/onsi/gomega"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	two, ten := 2.0, 10.0
	ranges := map[string]limits{"seconds": {Max: &two}, "sessions": {Min: &ten}, "both": {Min: &two, Max: &ten}}
	for _, row := range []struct {
		name    string
		figures map[string]float64
		wrong   []string
	}{
		{"at the bounds", map[string]float64{"seconds": 2, "sessions": 10, "both": 10, "other": 99}, nil},
		{"above", map[string]float64{"seconds": 2.5, "sessions": 10, "both": 2}, []string{"seconds is 2.5: 0.5 above the maximum of 2"}},
		{"below", map[string]float64{"seconds": 0, "sessions": 9, "both": 3}, []string{"sessions is 9: 1 below the minimum of 10"}},
		{"not measured", map[string]float64{"seconds": 0, "sessions": 10}, []string{"both was not measured"}},
	} {
		g.Expect(check(row.figures, ranges)).To(Equal(row.wrong), row.name)
	}
}

func TestEmbeddedFiles(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	ranges, err := readRanges("")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(*ranges["placed_over_raw"].Max).To(Equal(2.0))
	l, err := readLoad("")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(l.Workers * l.Capacity).To(BeNumerically(">", l.Sessions))
}

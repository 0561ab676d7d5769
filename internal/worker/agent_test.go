package worker

import (
	"testing"

	. "github.com/onsi/gomega"
)

func TestTheEndOfABurst(t *testing.T) {
	g := NewWithT(t)
	b := burst{}
	looks := []struct {
		dials int64
		over  bool
	}{{0, false}, {0, false}, {900, false}, {1000, false}, {1000, true}, {1000, false}, {1001, false}, {1001, true}}
	for i, look := range looks {
		g.Expect(b.isOver(look.dials)).To(Equal(look.over), "look %d", i)
	}
}

package claimtest

import (
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// An older number is a fault of the storage only while the claim of its batch lasts.
func TestOlderNumbers(t *testing.T) {
	batch := func(id string, attempt int, seq int64) *delivery.Batch {
		return &delivery.Batch{ID: id, Attempt: attempt, Items: []delivery.Item{{SessionID: "a", Numbers: delivery.Numbers{Seq: seq}}}}
	}
	for name, row := range map[string]struct {
		before     func(m *Model)
		disordered int
	}{
		"while its claim lasts":                      {func(*Model) {}, 1},
		"after another flusher has halved its batch": {func(m *Model) { m.ended(batch("old", 2, 1)) }, 0},
		"after another flusher has claimed it":       {func(m *Model) { m.claimed(batch("old", 2, 1)) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			m := newModel(delivery.KindQR)
			m.claimed(batch("old", 1, 1))
			row.before(m)
			m.received(batch("new", 1, 2))
			m.received(batch("old", 1, 1))
			g.Expect(m.disordered).To(Equal(row.disordered))
		})
	}
}

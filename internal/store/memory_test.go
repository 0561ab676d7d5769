package store

import (
	"fmt"
	"math/rand/v2"
	"testing"

	. "github.com/onsi/gomega"
	utilcache "k8s.io/apimachinery/pkg/util/cache"
	clocktesting "k8s.io/utils/clock/testing"
)

func TestMemory(t *testing.T) {
	const user = phone("1")
	keys := []any{user}
	for name, row := range map[string]struct {
		// happens returns the time at which the querying device was opened.
		happens func(m *memory) (opened moment)
		other   string
		known   bool
	}{
		"nothing was asked": {happens: func(*memory) moment { return 0 }},
		"asked after the device was opened": {happens: func(m *memory) moment {
			opened := m.open()
			m.answered(m.ask(keys), user, "91")
			return opened
		}, other: "91", known: true},
		"asked before the device was opened": {happens: func(m *memory) moment {
			m.answered(m.ask(keys), user, "91")
			return m.open()
		}},
		"asked before the device was opened, answered after": {happens: func(m *memory) moment {
			asked := m.ask(keys)
			opened := m.open()
			m.answered(asked, user, "91")
			return opened
		}},
		"asked again after the device was opened": {happens: func(m *memory) moment {
			m.answered(m.ask(keys), user, "")
			opened := m.open()
			m.answered(m.ask(keys), user, "91")
			return opened
		}, other: "91", known: true},
		"an older device uses it as well": {happens: func(m *memory) moment {
			opened := m.open()
			m.open()
			m.answered(m.ask(keys), user, "")
			return opened
		}, known: true},
		"several ask at the same time and get the same answer": {happens: func(m *memory) moment {
			first, second := m.ask(keys), m.ask(keys)
			m.answered(first, user, "91")
			m.answered(second, user, "91")
			return 0
		}, other: "91", known: true},
		"several ask at the same time and get different answers": {happens: func(m *memory) moment {
			first, second := m.ask(keys), m.ask(keys)
			m.answered(second, user, "91")
			m.answered(first, user, "")
			return 0
		}},
		"a late one after those that disagreed": {happens: func(m *memory) moment {
			first, second, third := m.ask(keys), m.ask(keys), m.ask(keys)
			m.answered(first, user, "91")
			m.answered(second, user, "")
			m.answered(third, user, "")
			return 0
		}},
		"one more, when those that disagreed are done": {happens: func(m *memory) moment {
			first, second := m.ask(keys), m.ask(keys)
			m.answered(first, user, "91")
			m.answered(second, user, "")
			m.answered(m.ask(keys), user, "91")
			return 0
		}, other: "91", known: true},
		"one after the other, with different answers": {happens: func(m *memory) moment {
			m.answered(m.ask(keys), user, "91")
			m.answered(m.ask(keys), user, "92")
			return 0
		}, other: "92", known: true},
		"changed after the answer": {happens: func(m *memory) moment {
			m.answered(m.ask(keys), user, "91")
			m.changed(user)
			return 0
		}},
		"changed while it was asked": {happens: func(m *memory) moment {
			asked := m.ask(keys)
			m.changed(user)
			m.answered(asked, user, "91")
			return 0
		}},
		"another user's change": {happens: func(m *memory) moment {
			asked := m.ask(keys)
			m.changed(hidden("1"), phone("2"))
			m.answered(asked, user, "91")
			return 0
		}, other: "91", known: true},
		"a question that fails": {happens: func(m *memory) moment {
			m.ask(keys)
			m.unanswered(user)
			return 0
		}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			m := newMemory(utilcache.NewLRUExpireCacheWithClock(8, clocktesting.NewFakeClock(start)))
			opened := row.happens(m)
			other, known := m.recall(user, opened)
			g.Expect(known).To(Equal(row.known))
			g.Expect(other).To(Equal(row.other))
			g.Expect(m.pending).To(BeEmpty())
		})
	}
}

// No answer is older than an earlier answer, in whatever order queries, reads, answers and
// changes happen.
func TestAnswersNeverGetOlder(t *testing.T) {
	const user = phone("1")
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 0))
		m := newMemory(utilcache.NewLRUExpireCacheWithClock(1, clocktesting.NewFakeClock(start)))
		version := 0 // what the database says
		type device struct {
			opened, asked moment
			asking, read  bool
			reading, got  int
		}
		devices := make([]device, 4)
		for range 400 {
			d := &devices[random.IntN(len(devices))]
			got, chance := -1, random.IntN(12)
			switch {
			case chance == 0: // another process changes the map
				version++
			case chance == 1: // the answer's time is over, or others had to be remembered
				m.known.Remove(user)
			case !d.asking && chance == 2: // it comes from another process, where it got the newest answer
				d.opened, d.got = m.open(), version
			case !d.asking:
				other, ok := m.recall(user, d.opened)
				if ok {
					if _, err := fmt.Sscan(other, &got); err != nil {
						t.Fatal(err)
					}
				} else {
					d.asking, d.asked = true, m.ask([]any{user})
				}
			case !d.read:
				d.read, d.reading = true, version
			default:
				got = d.reading
				m.answered(d.asked, user, fmt.Sprint(got))
				d.asking, d.read = false, false
			}
			if got < 0 {
				continue
			}
			if got < d.got {
				t.Fatalf("seed %d: got %d after %d", seed, got, d.got)
			}
			d.got = got
		}
	}
}

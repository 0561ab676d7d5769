package batch

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// simulation sends batches through a circuit breaker, one request at a time, in simulated time.
type simulation struct {
	now     time.Time
	breaker circuitBreaker
	random  *rand.Rand
	// app returns the application's answer and how long it takes.
	app     func(sessions []string) (delivery.Answer, time.Duration)
	waiting []waitingBatch
	// delivered and dead are the times at which the items of sessions were delivered or became
	// dead letters.
	delivered, dead map[string]time.Time
	requests, ids   int
	// worst is how long another session's batch waited at most.
	worst time.Duration
}

type waitingBatch struct {
	*delivery.Batch
	from, added time.Time
}

func newSimulation(t *testing.T, app func(sessions []string) (delivery.Answer, time.Duration)) *simulation {
	return &simulation{
		now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), random: rand.New(rand.NewPCG(testenv.Seed(t), 0)), app: app,
		delivered: map[string]time.Time{}, dead: map[string]time.Time{},
	}
}

func (p *simulation) add(sessions ...string) {
	p.ids++
	p.waiting = append(p.waiting, waitingBatch{batchOf(fmt.Sprint(p.ids), sessions...), p.now, p.now})
	p.waiting[len(p.waiting)-1].Attempt = 0
}

func sessionsOf(b *delivery.Batch) []string {
	var sessions []string
	for _, item := range b.Items {
		sessions = append(sessions, item.SessionID)
	}
	return sessions
}

// run runs the simulation until a time, and adds a batch of another session every so often.
func (p *simulation) run(until time.Time, every time.Duration) {
	for next := p.now; p.now.Before(until); {
		if every > 0 && !p.now.Before(next) {
			p.add(fmt.Sprintf("other-%d", p.ids))
			next = p.now.Add(every)
		}
		// As the queue does: what is repeated goes before what is new.
		claimable := func(w waitingBatch) int {
			if w.Attempt > 0 && !w.from.After(p.now) {
				return 0
			}
			return 1
		}
		slices.SortStableFunc(p.waiting, func(a, b waitingBatch) int {
			return cmp.Or(cmp.Compare(claimable(a), claimable(b)), a.from.Compare(b.from))
		})
		ok, at := p.breaker.admits(p.now, 0)
		if ok && len(p.waiting) > 0 && !p.waiting[0].from.After(p.now) {
			b := p.waiting[0]
			p.waiting = p.waiting[1:]
			p.send(b)
			continue
		}
		if ok && len(p.waiting) > 0 {
			at = p.waiting[0].from
		}
		if every > 0 {
			at = earliest(at, next)
		}
		if at.IsZero() {
			return
		}
		p.now = at
	}
}

func (p *simulation) send(b waitingBatch) {
	b.Attempt++
	p.requests++
	answer, took := p.app(sessionsOf(b.Batch))
	p.now = p.now.Add(took)
	r := p.breaker.react(b.Batch, answer, p.now, p.random.Float64)
	switch r.step {
	case stepAck:
		for _, s := range sessionsOf(b.Batch) {
			p.delivered[s] = p.now
		}
		if len(b.Items) == 1 && strings.HasPrefix(b.Items[0].SessionID, "other-") {
			p.worst = max(p.worst, p.now.Sub(b.added))
		}
	case stepDeadLetter:
		p.dead[b.Items[0].SessionID] = p.now
	case stepSplit:
		sessions := sessionsOf(b.Batch)
		half := (len(sessions) + 1) / 2
		p.add(sessions[:half]...)
		if half < len(sessions) {
			p.add(sessions[half:]...)
		}
	case stepRelease:
		p.waiting = append(p.waiting, waitingBatch{b.Batch, r.notBefore, b.added})
	}
}

// One bad item, or a large batch, never stops the delivery of the other items, for every
// answer of the application, and only refused items become dead letters.
func TestOthersAreDelivered(t *testing.T) {
	var fifty []string
	for i := range 50 {
		fifty = append(fifty, fmt.Sprintf("s%d", i))
	}
	const bad = "s7"
	over := func(answer delivery.Answer, took time.Duration) func([]string) (delivery.Answer, time.Duration) {
		return func(sessions []string) (delivery.Answer, time.Duration) {
			if slices.Contains(sessions, bad) {
				return answer, took
			}
			return acceptedAnswer, 50 * time.Millisecond
		}
	}
	firewall := delivery.Answer{Result: delivery.Misconfigured, StatusCode: 403, Detail: "403"}
	timedOut := delivery.Answer{Result: delivery.Retry, TimedOut: true, Detail: "no answer in time"}
	conflictLater := conflictAnswer
	conflictLater.RetryAfter = 5 * time.Minute
	for _, row := range []struct {
		name  string
		app   func([]string) (delivery.Answer, time.Duration)
		every time.Duration
		// within is how soon all items but the bad one are delivered; dead: the bad item is then
		// a dead letter.
		within time.Duration
		dead   bool
		// wait is the longest time that the others may wait, where more of them come all the time.
		wait time.Duration
		// all: the bad item is delivered too.
		all bool
	}{
		{name: "422", app: over(refusedAnswer, time.Millisecond), within: time.Second, dead: true},
		{name: "409", app: over(conflictAnswer, time.Millisecond), within: 30 * time.Second, dead: true},
		{name: "409 with a long pause", app: over(conflictLater, time.Millisecond), within: 6 * time.Minute, dead: true},
		{name: "500 while others are delivered", app: over(failedAnswer, time.Millisecond), every: time.Second, within: 4 * time.Minute, wait: 10 * time.Second},
		{name: "500, and nothing else is delivered", app: over(failedAnswer, time.Millisecond), within: 4 * time.Minute},
		{name: "a firewall blocks one while others are delivered", app: over(firewall, time.Millisecond), every: time.Second, within: 4 * time.Minute, wait: 10 * time.Second},
		{name: "one takes too long while others are delivered", app: over(timedOut, 15*time.Second), every: time.Second, within: 15 * time.Minute, wait: 2 * time.Minute},
		{name: "a batch takes too long, and nothing else is delivered", within: 10 * time.Minute, all: true, app: func(sessions []string) (delivery.Answer, time.Duration) {
			if took := time.Duration(len(sessions)) * 600 * time.Millisecond; took < 15*time.Second {
				return acceptedAnswer, took
			}
			return timedOut, 15 * time.Second
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			p := newSimulation(t, row.app)
			p.add(fifty...)
			start := p.now
			p.run(start.Add(row.within), row.every)
			for _, s := range fifty {
				if s != bad || row.all {
					g.Expect(p.delivered).To(HaveKey(s))
				}
			}
			if row.dead {
				g.Expect(p.dead).To(HaveLen(1))
				g.Expect(p.dead).To(HaveKey(bad))
			} else {
				g.Expect(p.dead).To(BeEmpty())
			}
			if row.every == 0 {
				return
			}
			// Later items do not wait long because of the bad one.
			from := p.now
			p.run(from.Add(10*time.Minute), row.every)
			late := 0
			for _, w := range p.waiting {
				if p.now.Sub(w.from) > 20*time.Second {
					late++
				}
			}
			g.Expect(late).To(BeZero(), "of %d waiting batches", len(p.waiting))
			g.Expect(p.worst).To(BeNumerically("<", row.wait))
			g.Expect(p.requests).To(BeNumerically("<", 5000))
		})
	}
}

// While the application fails with all items, batches are halved so slowly that there are
// never many, and all items are delivered when it works again.
func TestAnOutageMakesFewBatches(t *testing.T) {
	g := NewWithT(t)
	works := false
	p := newSimulation(t, func([]string) (delivery.Answer, time.Duration) {
		if works {
			return acceptedAnswer, time.Millisecond
		}
		return failedAnswer, time.Millisecond
	})
	var all []string
	for i := range 400 {
		all = append(all, fmt.Sprintf("s%d", i))
	}
	p.add(all[:200]...)
	p.add(all[200:]...)
	p.run(p.now.Add(time.Hour), 0)
	g.Expect(len(p.waiting)).To(BeNumerically("<", 60))
	works = true
	p.run(p.now.Add(5*time.Minute), 0)
	for _, s := range all {
		g.Expect(p.delivered).To(HaveKey(s))
	}
	g.Expect(p.dead).To(BeEmpty())
}

package batch

import (
	"fmt"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

var (
	refusedAnswer  = delivery.Answer{Result: delivery.Refused, StatusCode: 422, Detail: "422"}
	conflictAnswer = delivery.Answer{Result: delivery.Refused, StatusCode: 409, Detail: "409"}
	failedAnswer   = delivery.Answer{Result: delivery.Retry, StatusCode: 500, Detail: "500"}
	acceptedAnswer = delivery.Answer{Result: delivery.Delivered, StatusCode: 200}
)

func batchOf(id string, sessions ...string) *delivery.Batch {
	b := &delivery.Batch{ID: id, Kind: delivery.KindStatus, Attempt: 1}
	for _, s := range sessions {
		b.Items = append(b.Items, delivery.Item{SessionID: s})
	}
	return b
}

// single is what the breaker does with a single item of a session.
func (b *circuitBreaker) single(session string, answer delivery.Answer, now time.Time) reaction {
	return b.react(batchOf("b-"+session, session), answer, now, half)
}

func TestBrake(t *testing.T) {
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	session := func(i, of int) string { return fmt.Sprintf("s%d", i%of) }
	for _, row := range []struct {
		name string
		// sessions is the number of sessions of the refused items. If deliveryAfter is not 0,
		// Laravel accepts an item of another session after so many refused ones.
		sessions, deliveryAfter int
		// deadLetters is how many of 40 refused items become dead letters.
		deadLetters int
	}{
		{"items of many sessions", 40, 0, 19},
		{"items of five sessions", 5, 0, 19},
		{"items of four sessions", 4, 0, 40},
		{"Laravel accepts one after 19", 40, 19, 40},
		{"Laravel accepts one after 20", 40, 20, 19},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			b := circuitBreaker{}
			deadLetters := 0
			var stopped reaction
			for i := range 40 {
				r := b.single(session(i, row.sessions), refusedAnswer, noon)
				switch r.step {
				case stepDeadLetter:
					deadLetters++
				case stepRelease:
					g.Expect(r.notBefore).To(BeTemporally(">", b.until), "the next probe is another batch")
					if r.stopped != "" {
						stopped = r
					}
				default:
					t.Fatalf("step %d", r.step)
				}
				if row.deliveryAfter > 0 && (i+1)%row.deliveryAfter == 0 && deadLetters == i+1 {
					b.single("other", acceptedAnswer, noon)
				}
			}
			g.Expect(deadLetters).To(Equal(row.deadLetters))
			if deadLetters < 40 {
				g.Expect(stopped.stopped).To(Equal(LaravelMisconfigured))
				g.Expect(stopped.detail).To(ContainSubstring("the application seems to be broken"))
			}
		})
	}
}

func TestBrakeIsReleasedByADelivery(t *testing.T) {
	g := NewWithT(t)
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	b := circuitBreaker{}
	var all []string
	for i := range 30 {
		all = append(all, fmt.Sprintf("s%d", i))
	}
	rejectsAll := acceptedAnswer
	for _, s := range all {
		rejectsAll.Rejected = append(rejectsAll.Rejected, delivery.Rejection{SessionID: s})
	}
	r := b.react(batchOf("b", all...), rejectsAll, now, half)
	g.Expect(r.step).To(Equal(stepSplit), "a batch whose items are all rejected by name counts too; its repetition would be answered with a success")
	g.Expect(r.stopped).To(Equal(LaravelMisconfigured))

	now = b.until
	g.Expect(b.single("s1", refusedAnswer, now).step).To(Equal(stepRelease), "a probe that is refused")
	now = b.until
	g.Expect(b.react(batchOf("c", all...), refusedAnswer, now, half).step).To(Equal(stepSplit), "a good item may be among the bad ones")
	rejectsAll.Rejected = rejectsAll.Rejected[1:]
	r = b.react(batchOf("b", all...), rejectsAll, now, half)
	g.Expect(r.step).To(Equal(stepAck))
	g.Expect(r.recovered).To(BeTrue())
	g.Expect(b.single("s1", refusedAnswer, now).step).To(Equal(stepDeadLetter))
}

// A state that was refused, enqueued again and refused again is no new sign of a broken application.
func TestResentItemsDoNotBrake(t *testing.T) {
	g := NewWithT(t)
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	b := circuitBreaker{}
	for i := range 40 {
		session := fmt.Sprintf("s%d", i)
		b.refusals.resend(session)
		g.Expect(b.single(session, refusedAnswer, now).step).To(Equal(stepDeadLetter))
	}
}

func TestConflict(t *testing.T) {
	g := NewWithT(t)
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	b := circuitBreaker{}
	batch := batchOf("b", "a", "b")
	// A deadlock that lasts seconds: the batch is repeated, nothing is refused.
	now := start
	for ; now.Sub(start) < conflictTimeout; batch.Attempt++ {
		r := b.react(batch, conflictAnswer, now, half)
		g.Expect(r.step).To(Equal(stepRelease))
		g.Expect(r.notBefore).To(BeTemporally(">", now))
		g.Expect(r.notBefore).To(BeTemporally("<=", now.Add(conflictBackoff.Most)))
		now = r.notBefore
	}
	g.Expect(batch.Attempt).To(BeNumerically(">", 4))
	g.Expect(b.react(batch, conflictAnswer, now, half).step).To(Equal(stepSplit), "the conflict lasts: an item is bad")
	g.Expect(b.single("a", acceptedAnswer, now).step).To(Equal(stepAck))
	g.Expect(b.single("b", conflictAnswer, now).step).To(Equal(stepDeadLetter), "it has been repeated already")
	g.Expect(b.single("a", conflictAnswer, now).step).To(Equal(stepRelease), "it has been delivered since")
	g.Expect(b.single("a", conflictAnswer, now.Add(time.Hour)).step).To(Equal(stepRelease), "that was another conflict")
}

func TestPoison(t *testing.T) {
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, row := range []struct {
		name string
		// every is the time between two failures; others: Laravel accepts another item before each.
		every  time.Duration
		others bool
		items  int
		want   bool
	}{
		{"a failure every five minutes while others are delivered", 5 * time.Minute, true, 1, true},
		{"a failure every five minutes while nothing is delivered", 5 * time.Minute, false, 1, false},
		{"a hundred failures within a minute", 500 * time.Millisecond, true, 1, false},
		{"a batch of two, which is halved", 5 * time.Minute, true, 2, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			b := circuitBreaker{}
			batch := batchOf("b", "a", "b")
			batch.Items = batch.Items[:row.items]
			var failures int
			var last reaction
			now := start
			for ; failures < 100 && last.step != stepDeadLetter; now = now.Add(row.every) {
				if row.others {
					b.single("other", acceptedAnswer, now)
				}
				last = b.react(batch, failedAnswer, now, half)
				failures++
			}
			g.Expect(last.step == stepDeadLetter).To(Equal(row.want))
			if row.want {
				g.Expect(last.reason).To(Equal(delivery.Poison))
				g.Expect(failures).To(BeNumerically(">=", poisonAfter))
				g.Expect(now.Sub(start)).To(BeNumerically(">=", poisonTimeout))
			}
		})
	}
}

func TestResends(t *testing.T) {
	g := NewWithT(t)
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var r resends
	g.Expect(r.take(now)).To(BeEmpty())
	r.refused("a", now)
	g.Expect(r.take(now)).To(BeEmpty())
	r.delivered(batchOf("b", "other"), nil, now.Add(time.Second))
	now = now.Add(resendPause)
	g.Expect(r.take(now)).To(ConsistOf("a"), "the application accepts again")
	now = now.Add(time.Hour)
	g.Expect(r.take(now)).To(BeEmpty(), "it is being sent")

	var waits []time.Duration
	for range 12 {
		r.refused("a", now)
		r.delivered(batchOf("b", "other"), nil, now)
		begun := now
		for now = now.Add(time.Second); len(r.take(now)) == 0; now = now.Add(time.Second) {
		}
		waits = append(waits, now.Sub(begun))
	}
	g.Expect(waits[0]).To(Equal(3 * resendBackoff.First))
	g.Expect(waits[1]).To(Equal(9 * resendBackoff.First))
	g.Expect(waits[11]).To(Equal(resendBackoff.Most), "an application that does not know a session gets its state rarely")

	r.refused("a", now)
	r.all(now)
	g.Expect(r.take(now.Add(resendPause))).To(ConsistOf("a"), "the whole application was broken")
	r.delivered(batchOf("b", "a"), []delivery.Rejection{{SessionID: "a"}}, now)
	g.Expect(r.sessions).To(HaveKey("a"))
	r.delivered(batchOf("b", "a"), nil, now)
	g.Expect(r.sessions).To(BeEmpty())

	for i := range 3 * resendMax {
		r.refused(fmt.Sprint(i), now)
	}
	now = now.Add(time.Minute)
	g.Expect(r.take(now)).To(HaveLen(resendMax))
	g.Expect(r.take(now)).To(BeEmpty(), "a few at a time")
	g.Expect(r.take(now.Add(resendPause))).To(HaveLen(resendMax))
	g.Expect(r.take(now.Add(2 * resendPause))).To(HaveLen(resendMax))
	g.Expect(r.take(now.Add(3 * resendPause))).To(BeEmpty())
}

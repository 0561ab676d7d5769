package batch

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// half stands in for a random number: the middle of each range.
func half() float64 { return 0.5 }

func TestBreaker(t *testing.T) {
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := noon.Add
	const ms, s = time.Millisecond, time.Second
	unavailable := delivery.Answer{Result: delivery.Retry, StatusCode: 503}
	noAnswer := delivery.Answer{Result: delivery.Retry}
	slowDown := delivery.Answer{Result: delivery.Retry, StatusCode: 429, RetryAfter: 20 * s}
	forbidden := delivery.Answer{Result: delivery.Misconfigured, StatusCode: 403}
	accepted := delivery.Answer{Result: delivery.Delivered, StatusCode: 200}
	acceptedExcept := delivery.Answer{Result: delivery.Delivered, StatusCode: 200, Rejected: []delivery.Rejection{{SessionID: "a"}}}
	refused := delivery.Answer{Result: delivery.Refused, StatusCode: 422}
	tooLarge := delivery.Answer{Result: delivery.TooLarge, StatusCode: 413}
	closed := circuitBreaker{passed: true}
	openTo := func(d time.Duration) circuitBreaker {
		return circuitBreaker{until: at(d), failures: 5, trips: 1, stopped: LaravelUnavailable}
	}

	for _, row := range []struct {
		name    string
		before  circuitBreaker
		items   int
		attempt int
		answer  delivery.Answer
		want    reaction
		after   circuitBreaker
	}{
		{"a delivery", circuitBreaker{}, 2, 1, accepted, reaction{step: stepAck}, closed},
		{"the first failure waits a random part of 0.5 s", closed, 2, 1, noAnswer, reaction{step: stepRelease, notBefore: at(250 * ms)}, circuitBreaker{passed: true, failures: 1}},
		{"the fourth failure waits a random part of 4 s", closed, 2, 4, noAnswer, reaction{step: stepRelease, notBefore: at(2 * s)}, circuitBreaker{passed: true, failures: 1}},
		{"the hundredth failure waits a random part of 30 s", circuitBreaker{}, 2, 100, noAnswer, reaction{step: stepRelease, notBefore: at(15 * s)}, circuitBreaker{failures: 1}},
		{"Retry-After stops all batches", closed, 2, 1, slowDown, reaction{step: stepRelease, notBefore: at(20*s - probeLead)}, circuitBreaker{passed: true, failures: 1, until: at(20 * s)}},
		{"a failure after such a pause", circuitBreaker{failures: 1, until: at(0)}, 2, 2, noAnswer,
			reaction{step: stepRelease, notBefore: at(750*ms - probeLead)}, circuitBreaker{failures: 2, trips: 1, until: at(750 * ms)}},
		{"the fifth failure in a row", circuitBreaker{failures: 4}, 2, 1, unavailable,
			reaction{step: stepRelease, notBefore: at(750*ms - probeLead), stopped: LaravelUnavailable, tripped: true}, openTo(750 * ms)},
		{"an answer to a request that was sent before", openTo(600 * ms), 2, 1, unavailable,
			reaction{step: stepRelease, notBefore: at(600*ms - probeLead)}, circuitBreaker{until: at(600 * ms), failures: 6, trips: 1, stopped: LaravelUnavailable}},
		{"a probe that fails opens for longer", openTo(0), 2, 2, unavailable,
			reaction{step: stepRelease, notBefore: at(1500*ms - probeLead), tripped: true}, circuitBreaker{until: at(1500 * ms), failures: 6, trips: 2, stopped: LaravelUnavailable}},
		{"a suspected batch is not the next probe", openTo(0), 2, 5, unavailable,
			reaction{step: stepRelease, notBefore: at(2500 * ms), tripped: true}, circuitBreaker{until: at(1500 * ms), failures: 6, trips: 2, stopped: LaravelUnavailable}},
		{"a probe that is delivered", openTo(0), 2, 2, accepted, reaction{step: stepAck, recovered: true}, closed},
		{"a misconfiguration opens it at once", closed, 2, 1, forbidden,
			reaction{step: stepRelease, notBefore: at(750*ms - probeLead), stopped: LaravelMisconfigured, tripped: true},
			circuitBreaker{passed: true, until: at(750 * ms), failures: 1, trips: 1, stopped: LaravelMisconfigured}},
		{"another reason is reported", openTo(0), 2, 1, forbidden,
			reaction{step: stepRelease, notBefore: at(1500*ms - probeLead), stopped: LaravelMisconfigured, tripped: true},
			circuitBreaker{until: at(1500 * ms), failures: 6, trips: 2, stopped: LaravelMisconfigured}},
		{"5xx five times while others are delivered", closed, 2, 5, unavailable, reaction{step: stepSplit}, circuitBreaker{passed: true, failures: 1}},
		{"no answer five times does not halve the batch", closed, 2, 5, noAnswer, reaction{step: stepRelease, notBefore: at(4 * s)}, circuitBreaker{passed: true, failures: 1}},
		{"5xx five times, but a single item", closed, 1, 5, unavailable, reaction{step: stepRelease, notBefore: at(4 * s)}, circuitBreaker{passed: true, failures: 1}},
		{"5xx five times, but nothing was delivered before", circuitBreaker{failures: 1}, 2, 5, unavailable, reaction{step: stepRelease, notBefore: at(4 * s)}, circuitBreaker{failures: 2}},
		{"5xx five times, and nothing is delivered any more", circuitBreaker{passed: true, failures: 4}, 2, 5, unavailable,
			reaction{step: stepRelease, notBefore: at(1750 * ms), stopped: LaravelUnavailable, tripped: true},
			circuitBreaker{passed: true, until: at(750 * ms), failures: 5, trips: 1, stopped: LaravelUnavailable}},
		{"500 five times, and nothing is delivered any more", circuitBreaker{passed: true, failures: 4}, 2, 5, failedAnswer,
			reaction{step: stepSplit, stopped: LaravelUnavailable, tripped: true},
			circuitBreaker{passed: true, until: at(750 * ms), failures: 5, trips: 1, stopped: LaravelUnavailable}},
		{"a bad item among others", circuitBreaker{failures: 3}, 2, 1, refused, reaction{step: stepSplit}, circuitBreaker{}},
		{"a bad item alone", circuitBreaker{failures: 3}, 1, 1, refused, reaction{step: stepDeadLetter, reason: delivery.RefusedAlone}, circuitBreaker{}},
		{"too large", closed, 2, 1, tooLarge, reaction{step: stepSplit}, closed},
		{"too large alone", closed, 1, 1, tooLarge, reaction{step: stepDeadLetter, reason: delivery.TooLargeAlone}, closed},
		{"too large alone for a proxy", closed, 1, 1, delivery.Answer{Result: delivery.TooLarge, StatusCode: 413, FromProxy: true, Detail: "413"},
			reaction{step: stepRelease, notBefore: at(1750 * ms), stopped: LaravelMisconfigured, tripped: true,
				detail: "a single update is too large for the proxy in front of Laravel: raise the proxy's limit for a request's body: 413"},
			circuitBreaker{passed: true, until: at(750 * ms), trips: 1, stopped: LaravelMisconfigured}},
		{"a conflict is repeated", closed, 2, 1, delivery.Answer{Result: delivery.Refused, StatusCode: 409}, reaction{step: stepRelease, notBefore: at(375 * ms)}, closed},
		{"a conflict is repeated after Retry-After", closed, 1, 9, delivery.Answer{Result: delivery.Refused, StatusCode: 409, RetryAfter: 5 * s}, reaction{step: stepRelease, notBefore: at(5 * s)}, closed},
		{"all items are rejected by name", openTo(0), 1, 2, acceptedExcept, reaction{step: stepAck}, circuitBreaker{until: at(0), trips: 1, stopped: LaravelUnavailable}},
		{"a refusal does not close it", openTo(0), 1, 2, refused, reaction{step: stepDeadLetter, reason: delivery.RefusedAlone}, circuitBreaker{until: at(0), trips: 1, stopped: LaravelUnavailable}},
		{"no room for dead letters, and another rejected item", circuitBreaker{until: at(0), stopped: DeadLettersFull}, 2, 1, acceptedExcept, reaction{step: stepAck}, circuitBreaker{passed: true, until: at(0), stopped: DeadLettersFull}},
		{"no room for dead letters, and a delivery that was sent before", circuitBreaker{until: at(s), stopped: DeadLettersFull}, 2, 1, accepted, reaction{step: stepAck}, circuitBreaker{passed: true, until: at(s), stopped: DeadLettersFull}},
		{"no room for dead letters, and a probe that is delivered", circuitBreaker{until: at(0), stopped: DeadLettersFull}, 2, 1, accepted, reaction{step: stepAck, recovered: true}, closed},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			b := row.before
			items := append([]delivery.Item{{SessionID: "a"}}, make([]delivery.Item, row.items-1)...)
			got := b.react(&delivery.Batch{Items: items, Attempt: row.attempt}, row.answer, noon, half)
			g.Expect(got).To(Equal(row.want))
			b.refusals = refusals{} // has its own test
			g.Expect(b).To(Equal(row.after))
		})
	}
}

func TestBreakerAdmits(t *testing.T) {
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, row := range []struct {
		name     string
		until    time.Time
		inFlight int
		want     bool
		at       time.Time
	}{
		{"closed", never, 3, true, never},
		{"open", noon.Add(time.Second), 0, false, noon.Add(time.Second)},
		{"half-open", noon, 0, true, never},
		{"half-open, and the probe is running", noon, 1, false, never},
	} {
		t.Run(row.name, func(t *testing.T) {
			b := circuitBreaker{until: row.until}
			ok, at := b.admits(noon, row.inFlight)
			NewWithT(t).Expect(ok).To(Equal(row.want))
			NewWithT(t).Expect(at).To(Equal(row.at))
		})
	}
}

func TestDeadLettersFull(t *testing.T) {
	g := NewWithT(t)
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var b circuitBreaker
	g.Expect(b.full(noon)).To(Equal(DeadLettersFull))
	g.Expect(b.until).To(Equal(noon.Add(fullPause)))
	g.Expect(b.full(noon.Add(fullPause))).To(BeEmpty(), "it is reported once")
	g.Expect(b.roomAgain(noon.Add(fullPause))).To(BeFalse(), "it was sent before the stop")
	g.Expect(b.roomAgain(noon.Add(2 * fullPause))).To(BeTrue())
	g.Expect(b).To(Equal(circuitBreaker{passed: true}))
	g.Expect(b.roomAgain(noon.Add(2 * fullPause))).To(BeFalse())
}

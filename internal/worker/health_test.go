package worker

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

func TestTheHealthOfAWorker(t *testing.T) {
	t.Parallel()
	unreachable := &whatsapp.ConnectError{Reason: "Unreachable", Message: "WhatsApp cannot be reached"}
	noStore := fmt.Errorf("%w: connection refused", ErrStoreUnreachable)
	const s = time.Second
	type attempt struct {
		at      time.Duration
		session types.UID
		egress  string
		err     error
		take    bool
	}
	take := func(at time.Duration, session types.UID, err error) attempt {
		return attempt{at: at, session: session, err: err, take: true}
	}
	dial := func(at time.Duration, session types.UID, err error) attempt {
		return attempt{at: at, session: session, err: err}
	}
	via := func(egress string, a attempt) attempt { a.egress = egress; return a }
	down := []attempt{dial(0, "a", unreachable), dial(s, "b", unreachable)} // failing at 1 s
	for _, tt := range []struct {
		name            string
		attempts        []attempt
		at              time.Duration
		store, whatsapp bool
	}{
		{name: "a worker that has not tried anything"},
		{name: "two sessions cannot take their keys", attempts: []attempt{take(0, "a", noStore), take(s, "b", noStore)}, at: s, store: true},
		{name: "failures of one account do not count, however many", attempts: []attempt{take(0, "a", noStore), take(9*s, "a", noStore), take(30*s, "a", noStore)}, at: 31 * s},
		{name: "another session succeeded", attempts: []attempt{take(0, "a", noStore), take(s, "b", noStore), take(2*s, "c", nil)}, at: 3 * s},
		{name: "a refusal of the epoch counts as a success", attempts: []attempt{take(0, "a", noStore), take(s, "b", noStore), take(2*s, "c", &EpochBehindError{Stored: 7})}, at: 3 * s},
		{name: "the stored keys cannot be used: not a failure of the worker", attempts: []attempt{take(0, "a", errors.New("unsealing the keys failed")), take(s, "b", errors.New("unsealing the keys failed"))}, at: s},
		{name: "a success a minute ago no longer counts", attempts: []attempt{take(0, "c", nil), take(30*s, "a", noStore), take(31*s, "b", noStore)}, at: 60 * s, store: true},
		{name: "a failure a minute ago no longer counts", attempts: []attempt{take(0, "a", noStore), take(60*s, "b", noStore)}, at: 60 * s},
		{name: "two sessions cannot reach WhatsApp", attempts: down, at: s, whatsapp: true},
		{name: "the database fails at the dial", attempts: []attempt{dial(0, "a", noStore), dial(s, "b", noStore)}, at: s, store: true},
		{name: "cancelled attempts do not count", attempts: []attempt{dial(0, "a", context.Canceled), dial(s, "b", context.Canceled)}, at: s},
		{name: "failures of one proxy do not count, of however many sessions", attempts: []attempt{via("p", dial(0, "a", unreachable)), via("p", dial(s, "b", unreachable)), via("p", dial(s, "c", unreachable))}, at: s},
		{name: "two proxies fail, and nothing else was tried", attempts: []attempt{via("p", dial(0, "a", unreachable)), via("q", dial(s, "b", unreachable))}, at: s, whatsapp: true},
		{name: "two proxies fail, and a third one succeeds", attempts: []attempt{via("p", dial(0, "a", unreachable)), via("q", dial(s, "b", unreachable)), via("r", dial(s, "c", nil))}, at: s},
		{name: "two proxies fail, and the own address succeeds", attempts: []attempt{via("p", dial(0, "a", unreachable)), via("q", dial(s, "b", unreachable)), dial(s, "c", nil)}, at: s},
		{name: "the own address fails, and a proxy in the same network succeeds", attempts: append(down, via("p", dial(s, "c", nil))), at: s, whatsapp: true},
		{name: "one failure by the own address and one by a proxy are not enough", attempts: []attempt{dial(0, "a", unreachable), via("p", dial(s, "b", unreachable))}, at: s},
		{name: "the same session fails by two proxies: its Secret was changed", attempts: []attempt{via("p", dial(0, "a", unreachable)), via("q", dial(s, "a", unreachable))}, at: s},
		{name: "the sessions have moved away: the worker stays failing", attempts: down, at: 4 * time.Minute, whatsapp: true},
		{name: "the sessions have moved away: it stops failing after 5 minutes", attempts: down, at: 5*time.Minute + s},
		{name: "one session that still fails does not keep the worker failing", attempts: append(down, dial(2*time.Minute, "a", unreachable), dial(5*time.Minute, "a", unreachable)), at: 5*time.Minute + s},
		{name: "a success ends the failing state at once", attempts: append(down, dial(2*time.Minute, "a", nil)), at: 2 * time.Minute},
		{name: "a success by a proxy does not end it while the own address fails", attempts: append(down, dial(2*time.Minute, "a", unreachable), via("p", dial(2*time.Minute, "c", nil))), at: 2 * time.Minute, whatsapp: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := NewWithT(t)
			start := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
			clock := clocktesting.NewFakeClock(start)
			h := NewHealth(clock, logr.Discard())
			for _, a := range tt.attempts {
				clock.SetTime(start.Add(a.at))
				if a.take {
					h.recordTake(a.session, a.err)
				} else {
					h.recordDial(a.session, a.egress, a.err)
				}
				h.Failing()
			}
			clock.SetTime(start.Add(tt.at))
			store, whatsapp := h.Failing()
			g.Expect(store).To(Equal(tt.store), "store")
			g.Expect(whatsapp).To(Equal(tt.whatsapp), "whatsapp")
		})
	}
}

func TestHealthRemovesOldAttempts(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	clock := clocktesting.NewFakeClock(time.Unix(0, 0))
	h := NewHealth(clock, logr.Discard())
	for i := range 1000 {
		h.recordDial(types.UID(fmt.Sprint(i)), fmt.Sprint("proxy-", i%10), &whatsapp.ConnectError{})
		h.recordDial(types.UID(fmt.Sprint(i+1000)), fmt.Sprint("proxy-", i), nil)
	}
	clock.Step(healthWindow)
	h.Failing()
	g.Expect(h.whatsapp.failed).To(BeEmpty())
	g.Expect(h.whatsapp.succeeded).To(BeEmpty())
	g.Expect(h.store.succeeded).To(BeEmpty())
}

func TestTheSupervisorRecordsItsAttempts(t *testing.T) {
	t.Parallel()
	st := newSupervisorTest(t, newSession(), account{jid: jid, phone: phone}, func(env *environment) {
		env.takeErr = fmt.Errorf("%w: connection refused", ErrStoreUnreachable)
	})
	counts := func() (store, whatsapp int) {
		st.s.Health.mu.Lock()
		defer st.s.Health.mu.Unlock()
		return len(st.s.Health.store.failed), len(st.s.Health.whatsapp.failed)
	}
	failing := func() []int { store, whatsapp := counts(); return []int{store, whatsapp} }
	st.Eventually(failing).Should(Equal([]int{1, 0}))

	st.locked(func() { st.takeErr, st.dialErr = nil, &whatsapp.ConnectError{Reason: "Unreachable"} })
	st.Eventually(func() []int { st.clock.Step(time.Second); return failing() }).Should(Equal([]int{0, 1}))

	st.locked(func() { st.dialErr = nil })
	st.Eventually(func() []int { st.clock.Step(time.Second); return failing() }).Should(Equal([]int{0, 0}))
}

package store

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
)

// hung is a database that accepts connections and does not answer.
func hung(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestGate(t *testing.T) {
	well := func(context.Context) error { return nil }
	refused := errors.New("connection refused")
	for name, tt := range map[string]struct {
		ping, call func(context.Context) error
		// The result of Do, its longest duration, and whether the gate is open afterwards.
		err    error
		within time.Duration
		open   bool
	}{
		"it answers":                         {ping: well, call: well, open: true},
		"nobody holds the id":                {ping: hung, call: func(context.Context) error { return ErrNoRecord }, err: ErrNoRecord, open: true},
		"another holds the id":               {ping: hung, call: func(context.Context) error { return ErrTaken }, err: ErrTaken, open: true},
		"it hangs":                           {ping: hung, call: hung, err: ErrAway, within: slowCall + probeTimeout},
		"it refuses":                         {ping: func(context.Context) error { return refused }, call: func(context.Context) error { return refused }, err: refused},
		"one call waits for a lock":          {ping: well, call: hung, err: ErrNoAnswer, within: QueryTimeout, open: true},
		"one call fails":                     {ping: well, call: func(context.Context) error { return refused }, err: refused, open: true},
		"it hangs since the call has failed": {ping: hung, call: func(context.Context) error { return refused }, err: refused, within: probeTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := NewWithT(t)
				gate := &Gate{Ping: tt.ping, Log: logr.Discard()}
				gate.Open()
				from := time.Now()
				err := gate.Do(t.Context(), tt.call)
				if tt.err == nil {
					g.Expect(err).NotTo(HaveOccurred())
				} else {
					g.Expect(err).To(MatchError(tt.err))
				}
				g.Expect(time.Since(from)).To(Equal(tt.within))
				from = time.Now()
				err = gate.Do(t.Context(), func(context.Context) error { return nil })
				g.Expect(err == nil).To(Equal(tt.open), "%v", err)
				g.Expect(time.Since(from)).To(BeZero(), "a call does not wait for a decision that was made")
				gate.Close(refused)
			})
		})
	}
}

func TestTheGateOpensAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewWithT(t)
		var answers atomic.Bool
		var changes []bool
		gate := &Gate{Log: logr.Discard(), OnChange: func(reason error) { changes = append(changes, reason == nil) }, Ping: func(ctx context.Context) error {
			if answers.Load() {
				return nil
			}
			return hung(ctx)
		}}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()

		// A new leader knows nothing yet: a call waits for the first decision.
		waiting := make(chan error, 1)
		go func() { waiting <- gate.Do(ctx, func(context.Context) error { return nil }) }()
		synctest.Wait()
		g.Expect(waiting).NotTo(Receive())
		gate.Close(errors.New("not migrated yet"))
		synctest.Wait()
		g.Expect(waiting).To(Receive(MatchError(ErrAway)))

		go gate.Run(ctx)
		time.Sleep(10 * time.Second) //nolint:forbidigo // the bubble's clock is fake
		g.Expect(gate.Do(ctx, hung)).To(MatchError(ErrAway))
		answers.Store(true)
		time.Sleep(probeTimeout + probeInterval) //nolint:forbidigo // the bubble's clock is fake
		g.Expect(gate.Do(ctx, func(context.Context) error { return nil })).To(Succeed())

		// Many calls are running when the database hangs: all of them end at the same time.
		answers.Store(false)
		const many = 16
		ended := make(chan error, many)
		for range many {
			go func() { ended <- gate.Do(ctx, hung) }()
		}
		time.Sleep(slowCall + probeTimeout) //nolint:forbidigo // the bubble's clock is fake
		synctest.Wait()
		for range many {
			g.Expect(ended).To(Receive(MatchError(ErrAway)))
		}
		g.Expect(changes).To(Equal([]bool{false, true, false}))
	})
}

// A reconciler that is stopped does not count as a database that does not answer.
func TestACallThatItsCallerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewWithT(t)
		gate := &Gate{Ping: hung, Log: logr.Discard()}
		gate.Open()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		g.Expect(gate.Do(ctx, hung)).To(MatchError(context.Canceled))
		g.Expect(gate.Do(t.Context(), func(context.Context) error { return nil })).To(Succeed())
		gate.Close(context.Canceled)
	})
}

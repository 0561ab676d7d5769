package membership

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	clocktesting "k8s.io/utils/clock/testing"
)

// stopwatch is a monotonic clock that a test sets.
type stopwatch struct{ now atomic.Int64 }

func (s *stopwatch) elapsed() time.Duration { return time.Duration(s.now.Load()) }

func (s *stopwatch) at(d time.Duration) { s.now.Store(int64(d)) }

func TestSelfFenceCheck(t *testing.T) {
	const s = time.Second
	type renewal struct{ sent, known time.Duration }
	tests := []struct {
		name     string
		renewals []renewal
		check    time.Duration
		err      error
	}{
		{name: "before the first renewal there is no permission", check: 0, err: errNotJoined},
		{name: "the permission lasts for ten seconds", renewals: []renewal{{0, s}}, check: 10 * s},
		{name: "it does not last longer", renewals: []renewal{{0, s}}, check: 10*s + 1, err: ErrFenced},
		{name: "a renewal counts from when it was sent", renewals: []renewal{{0, 0}, {3 * s, 5 * s}}, check: 13*s + 1, err: ErrFenced},
		{name: "renewals of either heartbeat are enough", renewals: []renewal{{0, 0}, {9 * s, 9 * s}, {18 * s, 18 * s}, {27 * s, 27 * s}}, check: 37 * s},
		{name: "a late answer does not shorten the permission", renewals: []renewal{{0, 0}, {6 * s, 6 * s}, {4 * s, 7 * s}}, check: 16 * s},
		{name: "stopped for a minute: the permission is lost although the next renewal succeeds", renewals: []renewal{{0, 0}, {60 * s, 60 * s}}, check: 60 * s, err: ErrFenced},
		{name: "a lost permission never comes back", renewals: []renewal{{0, 0}, {60 * s, 60 * s}, {61 * s, 61 * s}}, check: 61 * s, err: ErrFenced},
		{name: "a renewal that was sent in time and answered late keeps the permission if nothing was checked before", renewals: []renewal{{0, 0}, {9 * s, 12 * s}}, check: 12 * s},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			clock := &stopwatch{}
			fence := NewSelfFence(clock.elapsed)
			for _, r := range tt.renewals {
				clock.at(r.known)
				fence.Renewed(r.sent)
			}
			clock.at(tt.check)
			if tt.err == nil {
				g.Expect(fence.Check()).To(Succeed())
				g.Expect(fence.Lost()).NotTo(BeClosed())
				return
			}
			g.Expect(fence.Check()).To(MatchError(tt.err))
			if tt.err == ErrFenced { //nolint:errorlint // the table holds the error itself
				g.Expect(fence.Lost()).To(BeClosed())
			}
		})
	}
}

func TestACheckAfterTheGapEndsThePermission(t *testing.T) {
	g := NewWithT(t)
	clock := &stopwatch{}
	fence := NewSelfFence(clock.elapsed)
	fence.Renewed(0)
	clock.at(11 * time.Second)
	g.Expect(fence.Check()).To(MatchError(ErrFenced))
	fence.Renewed(9 * time.Second) // sent in time, but Check has already refused
	g.Expect(fence.Check()).To(MatchError(ErrFenced))
}

func TestTheSelfFenceEndsWithoutACheck(t *testing.T) {
	g := NewWithT(t)
	clock, ticks := &stopwatch{}, clocktesting.NewFakeClock(time.Unix(0, 0))
	fence := NewSelfFence(clock.elapsed)
	fence.Renewed(0)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { ended <- fence.Run(ctx, ticks) }()
	clock.at(11 * time.Second)
	g.Eventually(func() error {
		ticks.Step(selfFenceInterval)
		select {
		case err := <-ended:
			return err
		default:
			return nil
		}
	}).Should(MatchError(ErrFenced))
}

func TestElapsedGoesForward(t *testing.T) {
	g := NewWithT(t)
	first := Elapsed()
	g.Expect(first).To(BeNumerically(">", 0))
	g.Eventually(Elapsed).Should(BeNumerically(">", first))
}

func BenchmarkSelfFenceCheck(b *testing.B) {
	fence := NewSelfFence(Elapsed)
	fence.Renewed(fence.Sending())
	for b.Loop() {
		fence.Renewed(fence.Sending())
		if err := fence.Check(); err != nil {
			b.Fatal(err)
		}
	}
}

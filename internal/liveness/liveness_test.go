package liveness_test

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/liveness"
)

func TestALoopIsStuckWhenARunMakesNoProgress(t *testing.T) {
	g := NewWithT(t)
	clk := clocktesting.NewFakeClock(time.Now())
	loops := liveness.New(clk)
	placement, sessions := loops.Watch("placement", time.Minute), loops.Watch("sessions", time.Hour)
	clk.Step(24 * time.Hour)
	g.Expect(loops.Check()).To(Succeed(), "a loop that has nothing to do is not stuck")

	run, other := placement.Begin(), sessions.Begin()
	clk.Step(50 * time.Second)
	run.Progress()
	clk.Step(time.Minute)
	g.Expect(loops.Check()).To(Succeed(), "it has made progress")
	clk.Step(time.Second)
	g.Expect(loops.Check()).To(MatchError(ContainSubstring(`"placement" has made no progress for 1m1s`)))
	run.Progress()
	g.Expect(loops.Check()).To(Succeed(), "it continues")
	run.End()
	clk.Step(30 * time.Minute)
	second := sessions.Begin()
	g.Expect(loops.Check()).To(Succeed())
	clk.Step(30 * time.Minute)
	g.Expect(loops.Check()).To(MatchError(ContainSubstring("sessions")), "one of two runs is stuck")
	other.End()
	g.Expect(loops.Check()).To(Succeed())
	second.End()
}

func TestALoopThatNobodyWatches(t *testing.T) {
	g := NewWithT(t)
	var loops *liveness.Loops
	run := loops.Watch("placement", time.Second).Begin()
	run.Progress()
	run.End()
	g.Expect(loops.Check()).To(Succeed())
}

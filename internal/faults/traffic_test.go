//go:build faults

package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// sendInterval is the pause between two messages.
	sendInterval = 50 * time.Millisecond
	// contacts is how many contacts write; each has its own ratchet with each device.
	contacts = 3
)

// traffic simulates contacts that always write to random sessions.
type traffic struct {
	w      *environment
	random *rand.Rand

	// hold is locked by a check while no other messages may be sent.
	hold sync.Mutex
	sent int
}

func newTraffic(w *environment) *traffic {
	t := &traffic{w: w, random: rand.New(rand.NewPCG(w.seed, 1))}
	w.every(sendInterval, func(ctx context.Context) {
		t.hold.Lock()
		defer t.hold.Unlock()
		t.send(ctx, w.sessions[t.random.IntN(len(w.sessions))])
	})
	return t
}

// send writes the next message to a session. The caller holds t.hold.
func (t *traffic) send(ctx context.Context, s *session) {
	t.sent++
	from := fmt.Sprintf("1555000%04d", 1+t.sent%contacts)
	if _, err := t.w.simulator.Send(ctx, s.jid, from, fmt.Sprintf("message %d", t.sent)); err != nil && ctx.Err() == nil {
		t.w.reportViolation("failed to send a message to %s: %v", s.name, err)
	}
}

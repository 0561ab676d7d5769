package app

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

// TestWaitsAreReportedOnceForEachCause: an error whose text differs each time is one cause, and
// a wait that is usual in a new installation is no Event.
func TestWaitsAreReportedOnceForEachCause(t *testing.T) {
	dial := func(port int) error {
		return fmt.Errorf("reaching Redis: read tcp 10.244.0.7:%d->10.96.1.1:6379: connection reset by peer", port)
	}
	wrongPassword := errors.New("reaching Redis: WRONGPASS invalid username-password pair")
	noSchema := errors.New("a manager of this release migrates the store, and none has done it yet")
	type attempt struct {
		at  time.Duration
		err error
	}
	for _, row := range []struct {
		name     string
		step     step
		attempts []attempt
		reasons  []string
	}{
		{"the port differs each time", stepRedis, []attempt{{0, dial(40001)}, {20 * time.Second, dial(40002)}, {5 * time.Minute, dial(40003)}},
			[]string{reasonWaitingForRedis}},
		{"the cause is reported again after a time", stepRedis, []attempt{{0, dial(40001)}, {waitingEventInterval, dial(40002)}},
			[]string{reasonWaitingForRedis, reasonWaitingForRedis}},
		{"another cause", stepRedis, []attempt{{0, dial(40001)}, {time.Second, wrongPassword}, {waitingChangeInterval, wrongPassword}},
			[]string{reasonWaitingForRedis, reasonWaitingForRedis}},
		{"two causes in turn", stepRedis, []attempt{{0, dial(1)}, {20 * time.Second, wrongPassword}, {40 * time.Second, dial(2)}, {time.Minute, wrongPassword}},
			[]string{reasonWaitingForRedis, reasonWaitingForRedis}},
		{"a new installation", stepSchema, []attempt{{0, noSchema}, {schemaTimeout - time.Second, noSchema}}, nil},
		{"no manager runs", stepSchema, []attempt{{0, noSchema}, {schemaTimeout, noSchema}, {2 * time.Minute, noSchema}},
			[]string{reasonWaitingForManager}},
		{"a schema of a newer version", stepSchema, []attempt{{0, store.ErrSchemaTooNew}}, []string{reasonStoreTooNew}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			var reasons []string
			w := waitReport{step: row.step, log: logr.Discard(), event: func(_ context.Context, _, reason, _ string) error {
				reasons = append(reasons, reason)
				return nil
			}}
			begun := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
			for _, a := range row.attempts {
				w.failed(t.Context(), a.err, begun.Add(a.at))
			}
			g.Expect(reasons).To(Equal(row.reasons))
			w.ended(t.Context(), time.Hour)
			if row.reasons == nil {
				g.Expect(reasons).To(BeEmpty(), "the end of a wait that was not reported")
			} else {
				g.Expect(reasons).To(HaveLen(len(row.reasons)+1), "the end of the wait")
			}
		})
	}
}

// TestManyDifferentErrorsAreOneCause: a text that differs in its words is reported at intervals.
func TestManyDifferentErrorsAreOneCause(t *testing.T) {
	g := NewWithT(t)
	events := 0
	w := waitReport{step: stepRedis, log: logr.Discard(), event: func(context.Context, string, string, string) error {
		events++
		return nil
	}}
	begun := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for i := range 600 {
		w.failed(t.Context(), errors.New(string(rune('a'+i%26))+string(rune('a'+i/26))), begun.Add(time.Duration(i)*time.Second))
	}
	g.Expect(events).To(Equal(maxWaitingCauses))
}

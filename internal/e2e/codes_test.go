//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	singleApplies = 100
	appliesAtOnce = 500
	// codeTimeout bounds the wait for a first code; it is reached only when something is wrong.
	codeTimeout = 5 * time.Minute
)

// testCodes measures how long it takes from `kubectl apply` to the first QR code in the
// status: for sessions one after the other, and for many at once.
func testCodes(t *testing.T, e *environment) {
	e.ensure(t, firstSessions)
	t.Run("one after the other", func(t *testing.T) {
		took := e.timeCodes(t, singleApplies, func(ctx context.Context, key client.ObjectKey, i int) error {
			if err := e.create(ctx, key.Namespace, key.Name); err != nil {
				return err
			}
			_, err := e.history.waitForCodes(ctx, key.Namespace, i+1)
			return err
		}, 1)
		e.results.ApplyToQR = percentile(took, 99).Seconds()
	})
	t.Run("many at once", func(t *testing.T) {
		took := e.timeCodes(t, appliesAtOnce, func(ctx context.Context, key client.ObjectKey, _ int) error {
			return e.create(ctx, key.Namespace, key.Name)
		}, atOnce)
		e.results.Apply500ToQR = percentile(took, 99).Seconds()
	})
}

// timeCodes applies n sessions and returns the times to their first codes, sorted. With one at
// a time each time begins with the session's own apply, else with the first.
func (e *environment) timeCodes(t *testing.T, n int, apply func(ctx context.Context, key client.ObjectKey, i int) error, concurrent int) []time.Duration {
	t.Helper()
	e.history.forgetCodes(timingNamespace)
	ctx, cancel := context.WithTimeout(t.Context(), codeTimeout)
	defer cancel()
	began := make([]time.Time, n)
	key := func(i int) client.ObjectKey {
		return client.ObjectKey{Namespace: timingNamespace, Name: fmt.Sprintf("%s-%d-%04d", timingNamespace, n, i)}
	}
	start := time.Now()
	if concurrent == 1 {
		for i := range n {
			began[i] = time.Now()
			must(t, apply(ctx, key(i), i))
		}
	} else {
		for i := range n {
			began[i] = start
		}
		must(t, each(ctx, 0, n, func(ctx context.Context, i int) error { return apply(ctx, key(i), i) }))
		t.Logf("%d sessions applied in %.1f s", n, time.Since(start).Seconds())
	}
	codes, err := e.history.waitForCodes(ctx, timingNamespace, n)
	if err != nil {
		e.dump(t)
		t.Fatal(err)
	}
	var took []time.Duration
	for i := range n {
		took = append(took, codes[key(i)].Sub(began[i]))
	}
	slices.Sort(took)
	t.Logf("%d sessions, apply to code: p50 %.2f s, p99 %.2f s, longest %.2f s", n, percentile(took, 50).Seconds(), percentile(took, 99).Seconds(), percentile(took, 100).Seconds())
	e.remove(t, timingNamespace)
	return took
}

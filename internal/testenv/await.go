package testenv

import (
	"context"
	"fmt"
	"time"
)

// awaitInterval is how often Await tries again.
const awaitInterval = 200 * time.Millisecond

// Await waits until f succeeds. If this takes longer than most, or until ctx ends, it returns
// f's last error that was not caused by that end.
func Await(ctx context.Context, most time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	ticker := time.NewTicker(awaitInterval)
	defer ticker.Stop()
	var last error
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", most, last)
		case <-ticker.C:
		}
	}
}

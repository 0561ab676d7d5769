//go:build !linux

package membership

import "time"

// Elapsed is a monotonic clock: no administrator can set it.
func Elapsed() time.Duration { return time.Since(started) }

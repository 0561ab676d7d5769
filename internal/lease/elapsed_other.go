//go:build !linux

package lease

import "time"

// Elapsed is a clock that no administrator moves.
func Elapsed() time.Duration { return time.Since(started) }

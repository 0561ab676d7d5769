//go:build !linux

package membership

import "time"

// Elapsed is a clock that no administrator moves.
func Elapsed() time.Duration { return time.Since(started) }

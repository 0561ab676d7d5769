package membership

import (
	"time"

	"golang.org/x/sys/unix"
)

// Elapsed is a clock that no administrator moves and that goes on while the
// machine is suspended, which Go's own monotonic clock does not.
func Elapsed() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Since(started) // a kernel before 2.6.39
	}
	return time.Duration(now.Nano())
}

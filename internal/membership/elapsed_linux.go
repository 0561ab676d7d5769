package membership

import (
	"time"

	"golang.org/x/sys/unix"
)

// Elapsed is a monotonic clock: no administrator can set it. Unlike Go's own
// monotonic clock it also counts the time while the machine is suspended.
func Elapsed() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Since(started) // a kernel before 2.6.39
	}
	return time.Duration(now.Nano())
}

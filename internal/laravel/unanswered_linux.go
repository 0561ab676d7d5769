package laravel

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// boundUnanswered sets how long data may stay unacknowledged (tcp(7), TCP_USER_TIMEOUT).
func boundUnanswered(_, _ string, conn syscall.RawConn) error {
	var failed error
	if err := conn.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unansweredTimeout.Milliseconds()))
	}); err != nil {
		return fmt.Errorf("configuring a connection: %w", err)
	}
	if failed != nil {
		return fmt.Errorf("configuring a connection: %w", failed)
	}
	return nil
}

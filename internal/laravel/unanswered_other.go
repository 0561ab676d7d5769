//go:build !linux

package laravel

import "syscall"

// boundUnanswered does nothing: on other systems only the request's time-out and the pings find a dead connection.
func boundUnanswered(_, _ string, _ syscall.RawConn) error { return nil }

//go:build !linux

package store

import "syscall"

// boundPeer does nothing: only Linux has this option.
func boundPeer(_, _ string, _ syscall.RawConn) error { return nil }

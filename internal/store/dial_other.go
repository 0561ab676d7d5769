//go:build !linux

package store

import "syscall"

// boundPeer bounds nothing: only Linux can.
func boundPeer(_, _ string, _ syscall.RawConn) error { return nil }

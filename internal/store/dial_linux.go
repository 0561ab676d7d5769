package store

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// boundPeer limits how long sent data may stay unacknowledged.
func boundPeer(network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var failed error
	if err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerTimeout.Milliseconds()))
	}); err != nil {
		return err
	}
	return failed
}

package store

import (
	"net"
	"time"
)

const (
	// peerTimeout is how long a connection to PostgreSQL waits for the other side's
	// kernel. A node that is lost says nothing, and Linux alone waits for a quarter of an
	// hour: all connections of the pool would hang in it, and every login with them.
	peerTimeout = 15 * time.Second
	// idleTransaction is how long a transaction may do nothing until PostgreSQL ends it: a
	// process that is stopped in the middle of one must not keep its successor from the
	// session. The fence asks for less by itself (lockRecord), also where a pooler between
	// here and PostgreSQL does not keep a connection's settings.
	idleTransaction = "5s"
)

// dialer makes connections that find out when the other side is lost.
func dialer(timeout time.Duration) *net.Dialer {
	return &net.Dialer{
		Timeout:         timeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: peerTimeout / 3, Interval: peerTimeout / 3, Count: 2},
		Control:         boundPeer,
	}
}

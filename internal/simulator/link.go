package simulator

import (
	"net"
	"sync"
	"time"
)

// link is a network connection that can be frozen: while it is, nothing that
// the peer sends arrives and nothing that we send leaves, as on a link whose
// packets are lost. What is written meanwhile is sent after the thaw, as TCP
// would send it again. It sits below TLS and the websocket, so that not even
// their answers to pings and closes get through.
type link struct {
	net.Conn

	mu     sync.Mutex
	thawed chan struct{} // nil unless frozen; closed by thaw and Close
	closed bool
	held   []byte
}

// freeze reports whether the link was not frozen and not closed.
func (l *link) freeze() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.thawed != nil {
		return false
	}
	l.thawed = make(chan struct{})
	return true
}

// thaw reports whether the link was frozen.
func (l *link) thaw() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.thawed == nil || l.closed {
		return false
	}
	if len(l.held) > 0 {
		// A peer that does not read must not hold the lock that Close needs.
		_ = l.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, _ = l.Conn.Write(l.held)
		_ = l.SetWriteDeadline(time.Time{})
		l.held = nil
	}
	close(l.thawed)
	l.thawed = nil
	return true
}

func (l *link) frozen() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.thawed != nil
}

// Read hands over what arrives, after the thaw if it arrives during a freeze.
func (l *link) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	for {
		l.mu.Lock()
		closed, thawed := l.closed, l.thawed
		l.mu.Unlock()
		if closed {
			return 0, net.ErrClosed
		}
		if thawed == nil {
			return n, err
		}
		<-thawed
	}
}

// Write sends p, or keeps it while the link is frozen.
func (l *link) Write(p []byte) (int, error) {
	l.mu.Lock()
	if l.thawed != nil && !l.closed {
		l.held = append(l.held, p...)
		l.mu.Unlock()
		return len(p), nil
	}
	l.mu.Unlock()
	return l.Conn.Write(p)
}

// Close closes the connection, whether it is frozen or not.
func (l *link) Close() error {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		l.held = nil
		if l.thawed != nil {
			close(l.thawed)
			l.thawed = nil
		}
	}
	l.mu.Unlock()
	return l.Conn.Close()
}

// linkListener makes a link of every connection it accepts.
type linkListener struct{ net.Listener }

// Accept waits for the next connection.
func (l linkListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &link{Conn: c}, nil
}

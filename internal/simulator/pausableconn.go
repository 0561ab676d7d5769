package simulator

import (
	"net"
	"sync"
	"time"
)

// pausableConn is a network connection that can be paused: while it is, nothing that
// the peer sends arrives and nothing that we send leaves, as on a network whose
// packets are lost. What is written meanwhile is sent after the resumption, as TCP
// would send it again. It sits below TLS and the websocket, so that not even
// their answers to pings and closes get through.
type pausableConn struct {
	net.Conn

	mu      sync.Mutex
	resumed chan struct{} // nil unless paused; closed by resume and Close
	closed  bool
	held    []byte
}

// pause reports whether the connection was not paused and not closed.
func (p *pausableConn) pause() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.resumed != nil {
		return false
	}
	p.resumed = make(chan struct{})
	return true
}

// resume reports whether the connection was paused.
func (p *pausableConn) resume() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.resumed == nil || p.closed {
		return false
	}
	if len(p.held) > 0 {
		// A peer that does not read must not hold the lock that Close needs.
		_ = p.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, _ = p.Conn.Write(p.held)
		_ = p.SetWriteDeadline(time.Time{})
		p.held = nil
	}
	close(p.resumed)
	p.resumed = nil
	return true
}

func (p *pausableConn) paused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resumed != nil
}

// Read hands over what arrives, after the resumption if it arrives during a pause.
func (p *pausableConn) Read(b []byte) (int, error) {
	n, err := p.Conn.Read(b)
	for {
		p.mu.Lock()
		closed, resumed := p.closed, p.resumed
		p.mu.Unlock()
		if closed {
			return 0, net.ErrClosed
		}
		if resumed == nil {
			return n, err
		}
		<-resumed
	}
}

// Write sends b, or keeps it while the connection is paused.
func (p *pausableConn) Write(b []byte) (int, error) {
	p.mu.Lock()
	if p.resumed != nil && !p.closed {
		p.held = append(p.held, b...)
		p.mu.Unlock()
		return len(b), nil
	}
	p.mu.Unlock()
	return p.Conn.Write(b)
}

// Close closes the connection, whether it is paused or not.
func (p *pausableConn) Close() error {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		p.held = nil
		if p.resumed != nil {
			close(p.resumed)
			p.resumed = nil
		}
	}
	p.mu.Unlock()
	return p.Conn.Close()
}

// pausableListener makes a pausableConn of every connection it accepts.
type pausableListener struct{ net.Listener }

// Accept waits for the next connection.
func (l pausableListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &pausableConn{Conn: c}, nil
}

package simulator

import (
	"net"
	"sync"
	"time"
)

// pausableConn is a network connection that can be paused: during a pause, no data
// arrives from the peer and no data is sent to it, as on a network that loses all
// packets. Data written during a pause is sent after it, as TCP would send it again.
// It is below TLS and the websocket, so that their answers to pings and closes are
// paused too.
type pausableConn struct {
	net.Conn

	mu      sync.Mutex
	resumed chan struct{} // nil unless paused; closed by resume and Close
	closed  bool
	held    []byte
}

// pause pauses the connection. It returns false if it was paused or closed already.
func (p *pausableConn) pause() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.resumed != nil {
		return false
	}
	p.resumed = make(chan struct{})
	return true
}

// resume ends a pause. It returns false if the connection was not paused.
func (p *pausableConn) resume() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.resumed == nil || p.closed {
		return false
	}
	if len(p.held) > 0 {
		// Close needs the lock, so a peer that does not read must not block here.
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

// Read returns received data; data that arrives during a pause only after the pause.
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

// Write sends b. During a pause it stores b, to be sent after the pause.
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

// pausableListener wraps each accepted connection in a pausableConn.
type pausableListener struct{ net.Listener }

// Accept waits for the next connection.
func (l pausableListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &pausableConn{Conn: c}, nil
}

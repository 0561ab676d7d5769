package whatsapp

import (
	"errors"
	"net"
	"sync/atomic"
	"time"
)

// link is the socket under a connection's websocket. It knows two things that
// whatsmeow does not tell: when the last byte came, and that the socket is
// closed. And it asks before every write whether this process may still speak.
type link struct {
	net.Conn
	now     func() time.Time
	allowed func() error
	// seen is how long after born the last byte came. It is a span, so that a wall clock
	// that is set does not make a living connection look dead.
	seen atomic.Int64
	born time.Time
	// steps orders what was done before a write and what is done after a read: whatsmeow
	// looks at its websocket without a lock when it sends, and drops it when reading fails.
	steps atomic.Uint64
	// closed is called once, after isClosed is set: whoever used the socket has given it up.
	closed   func()
	isClosed atomic.Bool
}

func newLink(conn net.Conn, now func() time.Time, allowed func() error, closed func()) *link {
	l := &link{Conn: conn, now: now, allowed: allowed, closed: closed}
	l.born = now()
	return l
}

// lastSeen is when the last byte came; before the first one it is when the socket was opened.
func (l *link) lastSeen() time.Time { return l.born.Add(time.Duration(l.seen.Load())) }

// Read implements net.Conn.
func (l *link) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	l.steps.Add(1)
	if n > 0 {
		l.seen.Store(int64(l.now().Sub(l.born)))
	}
	return n, err
}

// Write implements net.Conn.
func (l *link) Write(b []byte) (int, error) {
	if err := l.allowed(); err != nil {
		return 0, errors.Join(err, l.Close())
	}
	l.steps.Add(1)
	return l.Conn.Write(b)
}

// Close implements net.Conn.
func (l *link) Close() error {
	err := l.Conn.Close()
	if l.isClosed.CompareAndSwap(false, true) {
		l.closed()
	}
	return err
}

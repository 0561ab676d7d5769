package whatsapp

import (
	"errors"
	"net"
	"sync/atomic"
	"time"
)

// monitoredConn is the socket under a connection's websocket. It records two
// things that whatsmeow does not report: when the last byte came, and that the socket
// is closed. Before every write it checks whether this process may still write.
type monitoredConn struct {
	net.Conn
	now     func() time.Time
	allowed func() error
	// seen is the time from born to the last byte. It is a duration, so that a change of the
	// wall clock does not make a live connection look dead.
	seen atomic.Int64
	born time.Time
	// closed is called once, after isClosed is set.
	closed   func()
	isClosed atomic.Bool
}

func newMonitoredConn(conn net.Conn, now func() time.Time, allowed func() error, closed func()) *monitoredConn {
	m := &monitoredConn{Conn: conn, now: now, allowed: allowed, closed: closed}
	m.born = now()
	return m
}

// lastSeen is when the last byte came; before the first one it is when the socket was opened.
func (m *monitoredConn) lastSeen() time.Time { return m.born.Add(time.Duration(m.seen.Load())) }

// Read implements net.Conn.
func (m *monitoredConn) Read(b []byte) (int, error) {
	n, err := m.Conn.Read(b)
	if n > 0 {
		m.seen.Store(int64(m.now().Sub(m.born)))
	}
	return n, err
}

// Write implements net.Conn.
func (m *monitoredConn) Write(b []byte) (int, error) {
	if err := m.allowed(); err != nil {
		return 0, errors.Join(err, m.Close())
	}
	return m.Conn.Write(b)
}

// Close implements net.Conn.
func (m *monitoredConn) Close() error {
	err := m.Conn.Close()
	if m.isClosed.CompareAndSwap(false, true) {
		m.closed()
	}
	return err
}

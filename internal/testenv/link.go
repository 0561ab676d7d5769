package testenv

import (
	"net"
	"sync"
	"testing"
)

// Link is a way to a server through a TCP proxy of its own, which a test can
// cut, hang and restore. A process that is given the link's address in place of
// the server's shares its way with nobody.
type Link struct {
	listener net.Listener
	upstream string
	running  sync.WaitGroup

	mu      sync.Mutex
	state   linkState
	changed chan struct{} // closed when the state changes
	pairs   map[*linkPair]struct{}
	origins map[string]bool
}

type linkState int

const (
	linkOpen linkState = iota
	linkHung
	linkCut
	linkClosed
)

// linkPair is a connection of a client and the one that carries it on.
type linkPair struct {
	client, server *net.TCPConn
	once           sync.Once
}

// NewLink opens a way to a server's host:port. It ends with the test.
func NewLink(t testing.TB, upstream string) *Link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("opening a link: %v", err)
	}
	l := &Link{
		listener: listener, upstream: upstream, changed: make(chan struct{}),
		pairs: map[*linkPair]struct{}{}, origins: map[string]bool{},
	}
	l.running.Go(l.serve)
	t.Cleanup(l.Close)
	return l
}

// Addr is the host:port that stands for the server's.
func (l *Link) Addr() string { return l.listener.Addr().String() }

// Cut resets every connection, and each new one at once.
func (l *Link) Cut() { l.become(linkCut) }

// Hang lets nothing through, and tells nobody: connections stay open, new ones
// are accepted, and no byte comes. After Restore what was sent arrives.
func (l *Link) Hang() { l.become(linkHung) }

// Restore ends a Cut or a Hang.
func (l *Link) Restore() { l.become(linkOpen) }

// Open reports whether the link is neither cut nor hung.
func (l *Link) Open() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state == linkOpen
}

// Carried reports whether a connection that the server saw come from this
// address came through the link, now or earlier.
func (l *Link) Carried(remote string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.origins[remote]
}

// Close ends the link for good and waits for all that it carries.
func (l *Link) Close() {
	l.become(linkClosed)
	_ = l.listener.Close()
	l.running.Wait()
}

func (l *Link) become(state linkState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == state || l.state == linkClosed {
		return
	}
	l.state = state
	close(l.changed)
	l.changed = make(chan struct{})
	if state == linkCut || state == linkClosed {
		for p := range l.pairs {
			p.reset()
		}
	}
}

// passable waits while the link hangs; false: it is cut.
func (l *Link) passable() bool {
	for {
		l.mu.Lock()
		state, changed := l.state, l.changed
		l.mu.Unlock()
		if state != linkHung {
			return state == linkOpen
		}
		<-changed
	}
}

func (l *Link) serve() {
	for {
		conn, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.running.Go(func() { l.carry(conn.(*net.TCPConn)) })
	}
}

// carry is a connection's life.
func (l *Link) carry(client *net.TCPConn) {
	p := &linkPair{client: client}
	defer p.reset()
	if !l.passable() {
		return
	}
	server, err := net.Dial("tcp", l.upstream)
	if err != nil {
		return
	}
	l.mu.Lock()
	p.server = server.(*net.TCPConn)
	l.pairs[p] = struct{}{}
	l.origins[server.LocalAddr().String()] = true
	cut := l.state == linkCut || l.state == linkClosed
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.pairs, p)
		l.mu.Unlock()
	}()
	if cut {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { l.copy(p, p.server, p.client) })
	both.Go(func() { l.copy(p, p.client, p.server) })
	both.Wait()
}

// copy carries one direction. While the link hangs, not even an end gets through.
func (l *Link) copy(p *linkPair, to, from *net.TCPConn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if !l.passable() {
			return // become has reset both
		}
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				p.close()
				return
			}
		}
		if err != nil {
			p.close()
			return
		}
	}
}

// close ends both connections in an orderly way: what was written arrives.
func (p *linkPair) close() {
	p.once.Do(func() {
		_ = p.client.Close()
		_ = p.server.Close()
	})
}

func (p *linkPair) reset() {
	p.once.Do(func() {
		_ = p.client.SetLinger(0)
		_ = p.client.Close()
		if p.server != nil {
			_ = p.server.SetLinger(0)
			_ = p.server.Close()
		}
	})
}

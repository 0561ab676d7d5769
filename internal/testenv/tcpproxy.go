package testenv

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// TCPProxy is a TCP proxy in front of a server, which a test can cut, hang and
// restore. Give each process its own proxy, and its address in place of the
// server's.
type TCPProxy struct {
	listener net.Listener
	running  sync.WaitGroup

	mu       sync.Mutex
	upstream string
	state    proxyState
	changed  chan struct{} // closed when the state changes
	pairs    map[*proxiedPair]struct{}
	origins  map[string]bool
}

type proxyState int

const (
	proxyOpen proxyState = iota
	proxyHung
	proxyCut
	proxyClosed
)

// proxiedPair is a client's connection and the proxy's connection to the server.
type proxiedPair struct {
	client, server *net.TCPConn
	once           sync.Once
	abandoned      atomic.Bool
}

// NewTCPProxy opens a proxy to a server's host:port. It ends with the test.
func NewTCPProxy(t testing.TB, upstream string) *TCPProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("opening a TCP proxy: %v", err)
	}
	p := &TCPProxy{
		listener: listener, upstream: upstream, changed: make(chan struct{}),
		pairs: map[*proxiedPair]struct{}{}, origins: map[string]bool{},
	}
	p.running.Go(p.serve)
	t.Cleanup(p.Close)
	return p
}

// Addr is the host:port to use in place of the server's.
func (p *TCPProxy) Addr() string { return p.listener.Addr().String() }

// Cut resets every connection, and each new one at once.
func (p *TCPProxy) Cut() { p.become(proxyCut) }

// Hang lets nothing through: connections stay open, new ones
// are accepted, and no byte comes. After Restore what was sent arrives.
func (p *TCPProxy) Hang() { p.become(proxyHung) }

// Abandon lets nothing more through the present connections, for good, as when the
// machine that carried them disappears without closing them. New connections work.
func (p *TCPProxy) Abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for pair := range p.pairs {
		pair.abandoned.Store(true)
	}
}

// Restore ends a Cut or a Hang.
func (p *TCPProxy) Restore() { p.become(proxyOpen) }

// Redirect sends new connections to another server; the others stay.
func (p *TCPProxy) Redirect(upstream string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.upstream = upstream
}

// Open reports whether the proxy is neither cut nor hung.
func (p *TCPProxy) Open() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == proxyOpen
}

// Carried reports whether a connection that the server saw come from this
// address came through the proxy, now or earlier.
func (p *TCPProxy) Carried(remote string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.origins[remote]
}

// Close ends the proxy for good and waits for all that it carries.
func (p *TCPProxy) Close() {
	p.become(proxyClosed)
	_ = p.listener.Close()
	p.running.Wait()
}

func (p *TCPProxy) become(state proxyState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == state || p.state == proxyClosed {
		return
	}
	p.state = state
	close(p.changed)
	p.changed = make(chan struct{})
	if state == proxyCut || state == proxyClosed {
		for pair := range p.pairs {
			pair.reset()
		}
	}
}

// passable waits while the proxy hangs; false: it is cut.
func (p *TCPProxy) passable() bool {
	for {
		p.mu.Lock()
		state, changed := p.state, p.changed
		p.mu.Unlock()
		if state != proxyHung {
			return state == proxyOpen
		}
		<-changed
	}
}

func (p *TCPProxy) serve() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.running.Go(func() { p.carry(conn.(*net.TCPConn)) })
	}
}

// carry handles a connection from its start to its end.
func (p *TCPProxy) carry(client *net.TCPConn) {
	pair := &proxiedPair{client: client}
	defer pair.reset()
	if !p.passable() {
		return
	}
	p.mu.Lock()
	upstream := p.upstream
	p.mu.Unlock()
	server, err := net.Dial("tcp", upstream)
	if err != nil {
		return
	}
	p.mu.Lock()
	pair.server = server.(*net.TCPConn)
	p.pairs[pair] = struct{}{}
	p.origins[server.LocalAddr().String()] = true
	cut := p.state == proxyCut || p.state == proxyClosed
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.pairs, pair)
		p.mu.Unlock()
	}()
	if cut {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.copy(pair, pair.server, pair.client) })
	both.Go(func() { p.copy(pair, pair.client, pair.server) })
	both.Wait()
}

// copy carries one direction. While the proxy hangs, not even the end of a connection gets through.
func (p *TCPProxy) copy(pair *proxiedPair, to, from *net.TCPConn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if !p.passable() {
			return // become has reset both
		}
		if pair.abandoned.Load() {
			if err != nil {
				return // the other side does not get the end of the connection
			}
			continue
		}
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				pair.close()
				return
			}
		}
		if err != nil {
			pair.close()
			return
		}
	}
}

// close ends both connections in an orderly way: what was written arrives.
func (p *proxiedPair) close() {
	p.once.Do(func() {
		_ = p.client.Close()
		_ = p.server.Close()
	})
}

func (p *proxiedPair) reset() {
	p.once.Do(func() {
		_ = p.client.SetLinger(0)
		_ = p.client.Close()
		if p.server != nil {
			_ = p.server.SetLinger(0)
			_ = p.server.Close()
		}
	})
}

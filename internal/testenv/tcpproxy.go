package testenv

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// TCPProxy is a TCP proxy in front of a server. A test can make it reset or block its
// connections. Give each process its own proxy, and the proxy's address instead of the
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

// Addr is the host:port to use instead of the server's.
func (p *TCPProxy) Addr() string { return p.listener.Addr().String() }

// Cut resets every connection, and each new one at once.
func (p *TCPProxy) Cut() { p.become(proxyCut) }

// Hang blocks all traffic: connections stay open and new ones are accepted, but no byte
// passes. After Restore the sent bytes arrive.
func (p *TCPProxy) Hang() { p.become(proxyHung) }

// Abandon blocks the present connections forever, as when a machine between disappears
// without closing them. New connections work.
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

// Carried reports whether a connection to the server from this address came through the
// proxy, now or earlier.
func (p *TCPProxy) Carried(remote string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.origins[remote]
}

// Close stops the proxy and waits until all its connections have ended.
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

// passable waits while the proxy hangs. It returns false if the proxy is cut.
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

// copy copies one direction. While the proxy hangs, even the end of a connection does not pass.
func (p *TCPProxy) copy(pair *proxiedPair, to, from *net.TCPConn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if !p.passable() {
			return // become has reset both
		}
		if pair.abandoned.Load() {
			if err != nil {
				return // the end of the connection does not pass to the other side
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

// close closes both connections in an orderly way: written bytes arrive.
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

package simulator

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/go-logr/logr"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/socket"
	"k8s.io/utils/clock"

	_ "github.com/whatsapp-operator/whatsapp-operator/internal/signallog" // before the first connection
)

// Options configure a [Server]. The zero value is a server on a free port of
// the loopback interface, without TLS and without logs.
type Options struct {
	Logger logr.Logger
	// Clock drives every delay and expiry; the real one by default.
	Clock clock.WithDelayedExecution
	// Listen is the address for clients (default 127.0.0.1:0, a free port), and
	// ControlListen the address of the control API (default 127.0.0.1:0).
	Listen, ControlListen string
	// TLS serves wss:// with a certificate of a new authority, see [Server.CA].
	TLS bool
	// Hosts are further names or addresses that the TLS certificate is for. [Server.Endpoint]
	// names the first one when Listen is on all interfaces.
	Hosts []string
	// RootKey is the private key (Curve25519) of the root that signs the noise
	// certificates, for a server that clients must recognise after a restart.
	// Without it the server generates a new root.
	RootKey *[32]byte
	// RefLifetime is how long a QR code can be scanned after the client starts to
	// show it (default 20 s). The first of the six lasts three times as long, and after
	// the last one the connection is closed, as at WhatsApp.
	RefLifetime time.Duration
	// CodeLifetime is how long a code can be typed on the phone after the client has
	// asked for it (default 160 s). WhatsApp's own time is not documented; whatsmeow
	// says that a code ends with its connection at the latest, that is, when the six
	// QR codes of the connection have expired.
	CodeLifetime time.Duration
	// CloseDelay is the time between the last node of a connection (a stream
	// error, a failure) and its end (default 300 ms). A client can lose that
	// node when the socket closes at once; the fault [FaultCloseAtOnce] does that.
	CloseDelay time.Duration
	// Compression lets clients that offer it compress websocket messages, both ways and with
	// context takeover (earlier messages are the context): 1.2 MB for each such connection.
	Compression bool
	// OfflineWindow is how many of the stanzas that waited at a login a client may leave
	// unacknowledged before it gets the next one (default 200, the number that WhatsApp Web
	// asks for at a time). If it is negative, all are sent at once.
	OfflineWindow int
	// MaxUnacknowledged is how many new stanzas a client may leave unacknowledged on a
	// connection before the connection ends with a stream error (default 2,000; WhatsApp's own
	// limit is not known). If it is negative, there is no limit.
	MaxUnacknowledged int
	// MediaListen is the address of the media host (default: a free port of Listen's host).
	MediaListen string
	// WebVersion is the newest version of WhatsApp Web that the page names
	// (default: the library's own), see [Server.SetWebVersion].
	WebVersion uint32
}

const (
	defaultRefLifetime = 20 * time.Second
	defaultCloseDelay  = 300 * time.Millisecond
	// defaultOfflineWindow is the largest batch of WhatsApp Web (its DEFAULT_MAX_BATCH_SIZE).
	defaultOfflineWindow     = 200
	defaultMaxUnacknowledged = 2000
	// defaultCodeLifetime is the default lifetime of six refs, see Server.expiry.
	defaultCodeLifetime = (refCount + 2) * defaultRefLifetime
	// handshakeTimeout bounds the time from the upgrade to the login, without
	// the faults that slow it down; whatsmeow itself gives up after 20 s.
	handshakeTimeout = 30 * time.Second
	// writeTimeout bounds a write to a client that does not read.
	writeTimeout = 10 * time.Second
	// chatPath is the path of WhatsApp's websocket.
	chatPath = "/ws/chat"
	// pagePath is the pattern of WhatsApp's page; it matches no other path.
	pagePath = "GET /{$}"
)

// Server is a simulated WhatsApp: make it with [New], serve with
// [Server.Run]. Its methods may be called from any goroutine.
type Server struct {
	opts      Options
	log       logr.Logger
	clock     clock.WithDelayedExecution
	authority *authority
	ca        []byte
	tls       *tls.Config
	listener  net.Listener
	control   net.Listener
	mediaHost net.Listener
	media     mediaHost
	refKey    [32]byte // proves that a QR code's ref is ours, see pairing.go

	// script answers iq requests instead of the server, see AnswerWith.
	script atomic.Pointer[func(*waBinary.Node) *waBinary.Node]

	done chan struct{} // closed when the server ends
	wg   sync.WaitGroup

	// mu guards everything below, and the fields of accounts, devices and
	// connections whose comments name it. Do not send or encrypt while holding it.
	mu        sync.Mutex
	closed    bool
	conns     map[*conn]struct{}
	pairings  map[pairingID]*pairing
	byCode    map[string]*pairing // clients that show a code to type, by the phone number that the code is for
	byPhone   map[string]*account
	aliases   map[string]string // numbers of accounts, by other ways to write them
	byLID     map[string]*account
	lastPhone int
	groups    map[string]*group
	ledger    []*entry
	lastEntry int64
	floods    []*flood
	faults    []activeFault
	// webVersion is the version that the page names, see web.go.
	webVersion uint32
	doubled    []Doubled
	counts     counts
	unknown    map[string]int64
}

// New binds the two listeners and generates the server's keys. The server answers
// once [Server.Run] runs. Close a server that will not run.
func New(opts Options) (*Server, error) {
	if opts.Clock == nil {
		opts.Clock = clock.RealClock{}
	}
	if opts.Listen == "" {
		opts.Listen = "127.0.0.1:0"
	}
	if opts.ControlListen == "" {
		opts.ControlListen = "127.0.0.1:0"
	}
	if opts.MediaListen == "" {
		host, _, _ := net.SplitHostPort(opts.Listen) // a wrong address is refused below
		opts.MediaListen = net.JoinHostPort(host, "0")
	}
	if opts.RefLifetime == 0 {
		opts.RefLifetime = defaultRefLifetime
	}
	if opts.CodeLifetime == 0 {
		opts.CodeLifetime = defaultCodeLifetime
	}
	if opts.CloseDelay == 0 {
		opts.CloseDelay = defaultCloseDelay
	}
	if opts.OfflineWindow == 0 {
		opts.OfflineWindow = defaultOfflineWindow
	}
	if opts.MaxUnacknowledged == 0 {
		opts.MaxUnacknowledged = defaultMaxUnacknowledged
	}
	if opts.RefLifetime < 0 || opts.CodeLifetime < 0 || opts.CloseDelay < 0 {
		return nil, errors.New("the lifetime of a code and the delay before a close cannot be negative")
	}
	if opts.Logger.GetSink() == nil {
		opts.Logger = logr.Discard()
	}
	s := &Server{
		opts:     opts,
		log:      opts.Logger,
		clock:    opts.Clock,
		done:     make(chan struct{}),
		conns:    map[*conn]struct{}{},
		pairings: map[pairingID]*pairing{},
		byCode:   map[string]*pairing{},
		byPhone:  map[string]*account{},
		aliases:  map[string]string{},
		byLID:    map[string]*account{},
		groups:   map[string]*group{},
		media:    mediaHost{files: map[string][]byte{}},
		unknown:  map[string]int64{},
	}
	_, _ = rand.Read(s.refKey[:]) // never fails
	s.SetWebVersion(opts.WebVersion)
	var err error
	if s.authority, err = newAuthority(opts.RootKey, s.clock.Now()); err != nil {
		return nil, err
	}
	if s.listener, err = net.Listen("tcp", opts.Listen); err != nil {
		return nil, fmt.Errorf("listen for clients: %w", err)
	}
	if s.control, err = net.Listen("tcp", opts.ControlListen); err != nil {
		_ = s.listener.Close()
		return nil, fmt.Errorf("listen for the control API: %w", err)
	}
	if s.mediaHost, err = net.Listen("tcp", opts.MediaListen); err != nil {
		_ = s.listener.Close()
		_ = s.control.Close()
		return nil, fmt.Errorf("listen for media: %w", err)
	}
	if opts.TLS {
		// Include the name of the real server, for clients that DNS directs here.
		hosts := append([]string{"127.0.0.1", "::1", "localhost", "web.whatsapp.com", s.host()}, opts.Hosts...)
		if s.tls, s.ca, err = newTLS(hosts, s.clock.Now()); err != nil {
			_ = s.Close()
			return nil, err
		}
	}
	return s, nil
}

// host is the name under which clients reach the server.
func (s *Server) host() string {
	addr := s.listener.Addr().(*net.TCPAddr)
	switch {
	case !addr.IP.IsUnspecified():
		return addr.IP.String()
	case len(s.opts.Hosts) > 0:
		return s.opts.Hosts[0]
	default:
		return "127.0.0.1"
	}
}

// MediaHost is the host and port of the media host, which clients learn after their login. It
// is served like [Server.Endpoint], with or without TLS.
func (s *Server) MediaHost() string {
	return net.JoinHostPort(s.host(), fmt.Sprint(s.mediaHost.Addr().(*net.TCPAddr).Port))
}

func (s *Server) address() string {
	return net.JoinHostPort(s.host(), fmt.Sprint(s.listener.Addr().(*net.TCPAddr).Port))
}

// Endpoint replaces wss://web.whatsapp.com in a client's settings:
// "ws://host:port", or "wss://host:port" with TLS.
func (s *Server) Endpoint() string {
	if s.tls != nil {
		return "wss://" + s.address()
	}
	return "ws://" + s.address()
}

// NoiseRoot is the public key that signs the server's noise certificates. It
// replaces whatsmeow's WACertPubKey.
func (s *Server) NoiseRoot() [32]byte { return s.authority.root }

// CA is the authority of the TLS certificate, in PEM; nil without TLS.
func (s *Server) CA() []byte { return s.ca }

// ControlURL is the base of the control API.
func (s *Server) ControlURL() string { return "http://" + s.control.Addr().String() }

// socketKey is the context key of a connection's socket in its requests.
type socketKey struct{}

// Run serves until ctx ends or a listener fails, then closes every connection
// and waits for all goroutines that it started.
func (s *Server) Run(ctx context.Context) error {
	errorLog := slog.NewLogLogger(logr.ToSlogHandler(s.log.V(1)), slog.LevelDebug)
	mux := http.NewServeMux()
	mux.HandleFunc(chatPath, s.accept)
	mux.HandleFunc(pagePath, s.page)
	chat := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: handshakeTimeout,
		ErrorLog:          errorLog,
		TLSConfig:         s.tls.Clone(),                                            // each server changes its own
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){}, // no HTTP/2: the upgrade needs HTTP/1.1
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*tls.Conn); ok {
				c = t.NetConn()
			}
			return context.WithValue(ctx, socketKey{}, c)
		},
	}
	control := &http.Server{Handler: s.controlHandler(), ReadHeaderTimeout: handshakeTimeout, ErrorLog: errorLog}

	media := &http.Server{Handler: s.media.handler(), ReadHeaderTimeout: handshakeTimeout, ErrorLog: errorLog, TLSConfig: s.tls.Clone()}

	failed := make(chan error, 3)
	listen := func(server *http.Server, l net.Listener) {
		if s.tls != nil {
			failed <- server.ServeTLS(l, "", "")
		} else {
			failed <- server.Serve(l)
		}
	}
	go listen(chat, pausableListener{s.listener})
	go listen(media, s.mediaHost)
	go func() { failed <- control.Serve(s.control) }()
	s.log.Info("Serving the simulator", "endpoint", s.Endpoint(), "control", s.ControlURL())
	if !s.control.Addr().(*net.TCPAddr).IP.IsLoopback() {
		s.log.Info("Serving the control API without authentication on the network")
	}

	var err error
	running := 3
	select {
	case <-ctx.Done():
	case err = <-failed:
		running--
		select {
		case <-s.done:
			err = nil // Close was called
		default:
		}
	}
	_ = chat.Close()
	_ = control.Close()
	_ = media.Close()
	for ; running > 0; running-- {
		<-failed //nolint:errcheck // the first error is the one that counts
	}
	_ = s.Close()
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// Close closes the listeners and every connection, and waits for their
// goroutines. Run calls it when its context ends.
func (s *Server) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.done)
	}
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	floods := slices.Clone(s.floods)
	s.mu.Unlock()
	_ = s.listener.Close()
	_ = s.control.Close()
	if s.mediaHost != nil { // New fails before it has all listeners
		_ = s.mediaHost.Close()
	}
	for _, f := range floods {
		f.stop()
	}
	for _, c := range conns {
		c.close()
	}
	s.wg.Wait()
	return nil
}

// start counts a goroutine that Close waits for. It returns false once the server
// ends. If it returns true, the caller must call s.wg.Done.
func (s *Server) start() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.startLocked()
}

func (s *Server) startLocked() bool {
	if s.closed {
		return false
	}
	s.wg.Add(1)
	return true
}

// after runs f in a new goroutine after d: the test clock calls back while it
// holds its lock, which f may need.
func (s *Server) after(d time.Duration, f func()) clock.Timer {
	return s.clock.AfterFunc(d, func() { go f() })
}

// accept upgrades a request to a websocket. A new goroutine then serves the
// connection, so that the goroutine of net/http, with its grown stack, its request
// and its headers, can end.
func (s *Server) accept(w http.ResponseWriter, r *http.Request) {
	if !s.start() {
		http.Error(w, "the simulator is ending", http.StatusServiceUnavailable)
		return
	}
	defer s.wg.Done()
	if f, ok := s.active(FaultSlowUpgrade, nil); ok {
		timer := s.clock.NewTimer(f.Delay.Duration)
		defer timer.Stop()
		select {
		case <-timer.C():
		case <-r.Context().Done():
			return
		case <-s.done:
			return
		}
	}
	if _, ok := s.active(FaultRefuse, nil); ok {
		s.count(func(c *counts) { c.refused++ })
		http.Error(w, "a fault of the simulator refuses connections", http.StatusServiceUnavailable)
		return
	}
	l, _ := r.Context().Value(socketKey{}).(*pausableConn)
	options := &websocket.AcceptOptions{
		// Origin is WhatsApp's page, never our host.
		InsecureSkipVerify: true,
	}
	if s.opts.Compression {
		options.CompressionMode = websocket.CompressionContextTakeover
	}
	ws, err := websocket.Accept(w, r, options)
	if err == nil && w.Header().Get("Sec-WebSocket-Extensions") != "" {
		s.count(func(c *counts) { c.compressed++ })
	}
	if err != nil {
		s.log.V(1).Info("Refused an upgrade", "reason", err.Error())
		return
	}
	ws.SetReadLimit(socket.FrameMaxSize)
	c := &conn{srv: s, ws: ws, socket: l, remote: r.RemoteAddr, closed: make(chan struct{})}
	s.mu.Lock()
	started := s.startLocked()
	if started {
		s.conns[c] = struct{}{}
	}
	s.mu.Unlock()
	if !started {
		_ = ws.CloseNow()
		return
	}
	go c.serve()
}

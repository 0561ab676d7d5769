package whatsapp

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/go-logr/logr"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/store"
	"k8s.io/client-go/util/cert"
	"k8s.io/utils/clock"

	_ "github.com/whatsapp-operator/whatsapp-operator/internal/signallog" // before the first connection
)

const (
	// upgradeTimeout is the time-out for opening a websocket: dialling, TLS, the proxy, the
	// upgrade. whatsmeow itself waits for ever for a server that accepts and sends nothing,
	// and holds its socket's lock meanwhile. The handshake after it has another 20 s.
	upgradeTimeout = 20 * time.Second
	// dialTimeout is the time-out for dialling one TCP connection.
	dialTimeout = 15 * time.Second
	// mediaTimeout is the time-out of a download by the library (app state).
	mediaTimeout = 2 * time.Minute
	// maxDeviceName is the maximum length of a device's name in the API, in characters.
	maxDeviceName = 50
	// whatsAppHost is the host that whatsmeow connects to.
	whatsAppHost = "web.whatsapp.com"
	// defaultDeviceName is what a phone shows by default.
	defaultDeviceName = "WhatsApp operator"
)

// Config says which servers to connect to. The zero value is WhatsApp's servers.
type Config struct {
	// DeviceName is what phones show under linked devices; empty: "WhatsApp operator".
	DeviceName string
	// Endpoint is "ws://HOST:PORT" or "wss://HOST:PORT" of a simulator; empty: WhatsApp.
	Endpoint string
	// NoiseRoot is the public key that signs that server's certificates, 64 hexadecimal digits.
	NoiseRoot string
	// CAFile is a PEM file with the authority of that server's TLS certificate.
	CAFile string
}

// Validate returns all errors, each with what to change.
func (c Config) Validate() error {
	var errs []error
	if utf8.RuneCountInString(c.DeviceName) > maxDeviceName {
		errs = append(errs, fmt.Errorf("--device-name is longer than %d characters", maxDeviceName))
	}
	if c.Endpoint == "" {
		if c.NoiseRoot != "" {
			errs = append(errs, errors.New("--whatsapp-noise-root is only for --whatsapp-endpoint"))
		}
		if c.CAFile != "" {
			errs = append(errs, errors.New("--whatsapp-ca-file is only for --whatsapp-endpoint"))
		}
		return errors.Join(errs...)
	}
	endpoint, err := parseEndpoint(c.Endpoint)
	if err != nil {
		errs = append(errs, err)
	}
	if _, err := parseRoot(c.NoiseRoot); err != nil {
		errs = append(errs, err)
	}
	if c.CAFile != "" && endpoint != nil && endpoint.Scheme != "https" {
		errs = append(errs, errors.New("--whatsapp-ca-file needs an endpoint with wss://"))
	}
	return errors.Join(errs...)
}

func parseEndpoint(text string) (*url.URL, error) {
	wrong := errors.New("--whatsapp-endpoint must be ws://HOST:PORT or wss://HOST:PORT")
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" || u.Port() == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, wrong
	}
	scheme, ok := map[string]string{"ws": "http", "wss": "https"}[u.Scheme]
	if !ok {
		return nil, wrong
	}
	return &url.URL{Scheme: scheme, Host: u.Host}, nil
}

func parseRoot(text string) (root [32]byte, err error) {
	key, err := hex.DecodeString(text)
	if err != nil || len(key) != len(root) {
		return root, errors.New("--whatsapp-noise-root must be the 64 hexadecimal digits that the simulator prints; it is needed with --whatsapp-endpoint")
	}
	return [32]byte(key), nil
}

// Factory makes connections. Its methods may be called from any goroutine.
type Factory struct {
	deviceName string
	endpoint   *url.URL // nil: WhatsApp
	tls        *tls.Config
	log        logr.Logger
	clock      clock.WithDelayedExecution
	// version is the newest web version that WhatsApp has published; nil: the library's version.
	version atomic.Pointer[store.WAVersionContainer]
	// media is the client for downloads without a proxy, shared by all connections.
	media *http.Client
}

// trusted is the noise root that this process trusts; whatsmeow stores it in a global variable.
var trusted struct {
	sync.Mutex
	root [32]byte
	set  bool
}

// Setup sets the library's global settings of the process, before the first
// connection is made. It may be called again with the same noise root only. For
// WhatsApp's servers it changes nothing.
func Setup(cfg Config, log logr.Logger) (*Factory, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	f := &Factory{deviceName: cfg.DeviceName, log: log, clock: clock.RealClock{}, tls: &tls.Config{MinVersion: tls.VersionTLS12}}
	if f.deviceName == "" {
		f.deviceName = defaultDeviceName
	}
	if cfg.Endpoint != "" {
		if err := f.redirect(cfg); err != nil {
			return nil, err
		}
		log.Info("Connecting all sessions to another server than WhatsApp, and trusting its certificates", "endpoint", cfg.Endpoint)
	}
	f.media = f.downloads(f.transport(nil, (&net.Dialer{Timeout: dialTimeout}).DialContext))
	return f, nil
}

func (f *Factory) redirect(cfg Config) (err error) {
	if f.endpoint, err = parseEndpoint(cfg.Endpoint); err != nil {
		return err
	}
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return fmt.Errorf("reading --whatsapp-ca-file: %w", err)
		}
		if f.tls.RootCAs, err = cert.NewPoolFromBytes(pem); err != nil {
			return fmt.Errorf("--whatsapp-ca-file holds no certificate: %w", err)
		}
	}
	root, err := parseRoot(cfg.NoiseRoot)
	if err != nil {
		return err
	}
	trusted.Lock()
	defer trusted.Unlock()
	if trusted.set && trusted.root != root {
		return errors.New("this process trusts another --whatsapp-noise-root already")
	}
	if !trusted.set {
		whatsmeow.WACertPubKey, trusted.root, trusted.set = root, root, true
	}
	return nil
}

// RefreshVersion reads the current web version from WhatsApp's page. Later connections
// send it. It reports whether the version is newer than before. WhatsApp refuses an old
// version some day, with EventOutdated.
func (f *Factory) RefreshVersion(ctx context.Context) (changed bool, err error) {
	client := &http.Client{Transport: f.media.Transport, Timeout: upgradeTimeout}
	newest, err := whatsmeow.GetLatestVersion(ctx, client)
	if err != nil {
		return false, fmt.Errorf("asking for WhatsApp's web version: %w", err)
	}
	before := f.webVersion()
	if !before.LessThan(*newest) { // a page from some cache must not make the client older
		return false, nil
	}
	f.version.Store(newest)
	return true, nil
}

func (f *Factory) webVersion() store.WAVersionContainer {
	if v := f.version.Load(); v != nil {
		return *v
	}
	return store.GetWAVersion()
}

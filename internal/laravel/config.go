package laravel

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/util/cert"
)

// Defaults of Config.
const (
	DefaultQRPath      = "/qr/batch"
	DefaultStatusPath  = "/whatsapp/status/batch"
	DefaultMessagePath = "/whatsapp/messages/batch"
	DefaultTimeout     = 15 * time.Second
	DefaultUserAgent   = "whatsapp-operator"
	// MaxTimeout is the longest time-out. If a leader is killed during a request, its batch waits this long.
	MaxTimeout = 5 * time.Minute
)

// Config says how to reach Laravel and how to authenticate to it.
type Config struct {
	// BaseURL is https://host[:port][/path]; the paths are appended to it.
	BaseURL string
	// QRPath, StatusPath and MessagePath are where the batches go; empty means the defaults.
	QRPath, StatusPath, MessagePath string
	// TokenFile holds the bearer token. It is read again when it changes.
	TokenFile string
	// SigningSecretFiles hold the Standard Webhooks secrets, one per line, as
	// whsec_ and base64 or as plain text. Every request is signed with each of
	// them, which allows a rotation. They are read again when they change.
	SigningSecretFiles []string
	// Timeout bounds a request from the dial to the answer's last byte; zero
	// means 15 s. The flusher must have the same number, because its claims last longer than a request.
	Timeout time.Duration
	// CAFile is a PEM file with the authorities to trust instead of the
	// system's. It is read again when it changes.
	CAFile string
	// InsecureHTTP allows http to other hosts: the network between can then read tokens
	// and phone numbers.
	InsecureHTTP bool
	// UserAgent; empty means "whatsapp-operator".
	UserAgent string
}

// Validate returns all faults, each as a sentence that says what to change, joined in one
// error. It reads the named files, but its errors never contain their content.
func (c Config) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	// The errors of url.Parse contain the URL, which may contain a password.
	switch u, err := url.Parse(c.BaseURL); {
	case c.BaseURL == "":
		wrong("the base URL of Laravel is missing: give https://host")
	case err != nil || u.Hostname() == "" || u.Opaque != "" || u.Scheme != "https" && u.Scheme != "http":
		wrong("the base URL of Laravel is not a URL such as https://host")
	case !validPort(u):
		wrong("the base URL of Laravel has the port %s: choose 1 to 65535", clean(u.Port(), maxHost))
	case u.User != nil:
		wrong("the base URL of Laravel holds a user or a password: put a token into the token file instead")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		wrong("the base URL of Laravel has a query or a fragment: leave them out")
	case u.Scheme == "http" && !c.InsecureHTTP && !isLoopback(u.Hostname()):
		wrong("the base URL of Laravel is not https: use https, or allow plain http to host %s with --insecure-laravel-http", clean(u.Hostname(), maxHost))
	case u.Scheme == "http" && c.CAFile != "":
		wrong("a CA file for Laravel is given, but its base URL is not https")
	}
	paths := []string{c.qrPath(), c.statusPath(), c.messagePath()}
	for _, path := range paths {
		if u, err := url.Parse(path); err != nil || !strings.HasPrefix(path, "/") || strings.HasPrefix(path, "//") || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
			wrong("a path of Laravel does not begin with one / or has a query: give it as %s", DefaultStatusPath)
		}
	}
	if slices.Sort(paths); len(slices.Compact(paths)) < len(paths) {
		wrong("two of the paths of Laravel for QR codes, statuses and messages are the same: give each its own")
	}
	if c.TokenFile == "" {
		wrong("the bearer token for Laravel is missing: give its file with --laravel-token-file")
	} else if err := readFile(c.TokenFile, func(b []byte) error { _, err := parseToken(b); return err }); err != nil {
		errs = append(errs, err)
	}
	if len(c.SigningSecretFiles) == 0 {
		wrong("the signing secret for Laravel is missing: give its file with --laravel-signing-secret-file")
	}
	for _, name := range c.SigningSecretFiles {
		if err := readFile(name, func(b []byte) error { _, err := parseSecrets(b); return err }); err != nil {
			errs = append(errs, err)
		}
	}
	if c.CAFile != "" {
		if err := readFile(c.CAFile, func(b []byte) error { _, err := parseCA(b); return err }); err != nil {
			errs = append(errs, err)
		}
	}
	if c.Timeout < 0 || c.Timeout > MaxTimeout {
		wrong("the time-out for Laravel is %s: choose up to %s", c.Timeout, MaxTimeout)
	}
	return errors.Join(errs...)
}

func (c Config) qrPath() string      { return cmp.Or(c.QRPath, DefaultQRPath) }
func (c Config) statusPath() string  { return cmp.Or(c.StatusPath, DefaultStatusPath) }
func (c Config) messagePath() string { return cmp.Or(c.MessagePath, DefaultMessagePath) }

// validPort reports whether the port is valid, or missing: then it is the scheme's default.
func validPort(u *url.URL) bool {
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	return u.Port() == "" || err == nil && port > 0
}

func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

func readFile(name string, parse func([]byte) error) error {
	content, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("reading a file for Laravel: %w", err)
	}
	if err := parse(content); err != nil {
		return fmt.Errorf("file %s for Laravel: %w", name, err)
	}
	return nil
}

var (
	errToken = errors.New("it must hold one line of visible ASCII characters")
	errCA    = errors.New("it holds no certificate in PEM")
)

// parseToken reads a token, which must be a valid value of an Authorization header.
func parseToken(content []byte) (string, error) {
	token := strings.TrimRight(string(content), "\r\n")
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errToken
	}
	return token, nil
}

// parseSecrets reads one secret per line.
func parseSecrets(content []byte) ([]Secret, error) {
	var secrets []Secret
	for line := range strings.Lines(string(content)) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		secret, err := ParseSecret(line)
		if err != nil {
			return nil, err
		}
		secrets = append(secrets, secret)
	}
	if len(secrets) == 0 {
		return nil, ErrSecret
	}
	return secrets, nil
}

func parseCA(content []byte) (*x509.CertPool, error) {
	pool, err := cert.NewPoolFromBytes(content)
	if err != nil {
		return nil, errCA // it says more than the library's error
	}
	return pool, nil
}

package whatsapp

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// encoding explains how to write characters that a URL must encode.
const encoding = "@ is %40, : is %3A, / is %2F, # is %23, ? is %3F and % is %25"

// ErrBadProxy is a proxy URL that cannot be used. It never shows the URL.
var ErrBadProxy = errors.New("the proxy must be a URL: http://, https://, socks5:// or socks5h://, then USER:PASSWORD@ where it is needed, then HOST:PORT; " +
	"special characters of the user and the password must be percent-encoded (" + encoding + "); the value is not shown")

// ParseProxy reads the URL of a proxy. No error contains any part of it.
func ParseProxy(text string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimSpace(text))
	if err != nil {
		return nil, ErrBadProxy // the error quotes the URL
	}
	if err := checkProxy(u); err != nil {
		return nil, err
	}
	return u, nil
}

func checkProxy(u *url.URL) error {
	switch u.Scheme {
	case "http", "https", "socks5", "socks5h":
	default:
		return ErrBadProxy
	}
	if u.Opaque != "" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return ErrBadProxy
	}
	if port := u.Port(); port != "" || strings.HasSuffix(u.Host, ":") {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return ErrBadProxy
		}
	}
	if password, _ := u.User.Password(); isSOCKS(u) && (len(u.User.Username()) > maxSOCKSText || len(password) > maxSOCKSText) {
		return ErrBadProxy
	}
	return nil
}

// maxSOCKSText is the longest user and password of SOCKS5 (RFC 1929).
const maxSOCKSText = 255

func isSOCKS(u *url.URL) bool { return u.Scheme == "socks5" || u.Scheme == "socks5h" }

// dialFunc opens a TCP connection to the server, or to the proxy.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// transport belongs to one connection: net/http could otherwise give the socket
// of one session to another.
func (f *Factory) transport(proxy *url.URL, dial dialFunc) *http.Transport {
	t := &http.Transport{
		// Like whatsmeow's transport: the administrator sets HTTPS_PROXY.
		Proxy:       http.ProxyFromEnvironment,
		DialContext: dial,
		// Not nil, so that there is no HTTP/2, which has no upgrade.
		TLSClientConfig:     f.tls,
		TLSHandshakeTimeout: dialTimeout,
		DisableKeepAlives:   true,
		// The buffers live as long as the websocket, which has other buffers.
		ReadBufferSize: 1 << 10, WriteBufferSize: 1 << 10,
		MaxResponseHeaderBytes: maxHeaders,
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
			return proxyAnswer(answer)
		},
	}
	switch {
	case proxy == nil:
	case f.endpoint != nil && f.endpoint.Scheme == "http" && !isSOCKS(proxy):
		// net/http would not ask the proxy for a tunnel, but for the page http://web.whatsapp.com.
		t.Proxy, t.DialContext = nil, f.tunnel(proxy, dial)
	default:
		t.Proxy = http.ProxyURL(proxy)
	}
	return t
}

// tunnel dials through an HTTP proxy, as net/http does for https.
func (f *Factory) tunnel(proxy *url.URL, dial dialFunc) dialFunc {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		port := cmp.Or(proxy.Port(), map[string]string{"http": "80", "https": "443"}[proxy.Scheme])
		if conn, err = dial(ctx, network, net.JoinHostPort(proxy.Hostname(), port)); err != nil {
			return nil, &net.OpError{Op: opProxy, Net: network, Err: err}
		}
		raw := conn
		defer context.AfterFunc(ctx, func() { _ = raw.Close() })()
		defer func() {
			if err != nil {
				err = errors.Join(&net.OpError{Op: opProxy, Net: network, Err: err}, raw.Close())
			}
		}()
		if proxy.Scheme == "https" {
			config := f.tls.Clone()
			config.ServerName = proxy.Hostname()
			secure := tls.Client(conn, config)
			if err := secure.HandshakeContext(ctx); err != nil {
				return nil, err
			}
			conn = secure
		}
		req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{}}
		if proxy.User != nil {
			password, _ := proxy.User.Password()
			req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(proxy.User.Username()+":"+password)))
		}
		if err := req.Write(conn); err != nil {
			return nil, err
		}
		// The server sends nothing before the client does, so no bytes of it are lost.
		answer, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxHeaders)), req) //nolint:bodyclose // there is no body: the following bytes belong to the tunnel
		if err != nil {
			return nil, err
		}
		return conn, proxyAnswer(answer)
	}
}

// reroute sends everything to the endpoint, if there is one.
func (f *Factory) reroute(t *http.Transport) http.RoundTripper {
	if f.endpoint == nil {
		return t
	}
	return &rerouted{endpoint: f.endpoint, inner: t}
}

// rerouted replaces WhatsApp's servers. Requests for other hosts are refused, so
// that a test's traffic cannot leave the machine.
type rerouted struct {
	endpoint *url.URL
	inner    *http.Transport
}

// RoundTrip implements http.RoundTripper.
func (r *rerouted) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host != whatsAppHost {
		return nil, fmt.Errorf("a request for %s: only %s is replaced by the endpoint", req.URL.Host, whatsAppHost)
	}
	out := req.Clone(req.Context())
	out.Host = req.URL.Host
	out.URL.Scheme, out.URL.Host = r.endpoint.Scheme, r.endpoint.Host
	if r.inner.Proxy != nil && out.URL.Scheme == "http" {
		if proxy, _ := r.inner.Proxy(out); proxy != nil {
			out.Host = r.endpoint.Host // a proxy is asked for the page of this host
		}
	}
	return r.inner.RoundTrip(out)
}

// clients returns the connection's HTTP clients: for its websocket and for downloads.
func (f *Factory) clients(proxy *url.URL, dial dialFunc) (websocket, media *http.Client) {
	websocket = &http.Client{
		Transport:     f.reroute(f.transport(proxy, dial)),
		Timeout:       upgradeTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	if proxy == nil {
		return websocket, f.media
	}
	plain := (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}).DialContext
	return websocket, f.downloads(f.transport(proxy, plain))
}

const (
	// maxHeaders is the maximum size of an answer's headers; net/http's limit is 10 MB.
	maxHeaders = 64 << 10
	// maxDownload is the maximum size of whatsmeow's downloads: WhatsApp's page, and settings of
	// the phone.
	maxDownload = 64 << 20
	// maxRedirects is how often a download may be redirected.
	maxRedirects = 3
)

// downloads is the client for what whatsmeow downloads.
func (f *Factory) downloads(t *http.Transport) *http.Client {
	return &http.Client{Transport: bounded{f.reroute(t)}, Timeout: mediaTimeout, CheckRedirect: redirect}
}

// redirect allows a redirect of a download only from WhatsApp to WhatsApp: the worker can
// reach addresses that a server outside must not make it request.
func redirect(to *http.Request, before []*http.Request) error {
	host := to.URL.Hostname()
	if len(before) > maxRedirects || to.URL.Scheme != "https" || !strings.HasSuffix(host, ".whatsapp.net") && !strings.HasSuffix(host, ".whatsapp.com") {
		return http.ErrUseLastResponse
	}
	return nil
}

// bounded ends an answer that is too long with an error: whatsmeow reads all of it into memory.
type bounded struct{ inner http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.inner.RoundTrip(req)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxDownload)
	}
	return resp, err
}

// opProxy is net/http's name for a proxy operation, in a net.OpError.
const opProxy = "proxyconnect"

// proxyRefusal is the answer of a proxy that refuses the connection.
type proxyRefusal struct{ status int }

func (e *proxyRefusal) Error() string {
	return fmt.Sprintf("the proxy answered with status %d", e.status)
}

// proxyAnswer is the error of a proxy's answer to CONNECT; nil: the tunnel is open.
func proxyAnswer(answer *http.Response) error {
	if answer.StatusCode != http.StatusOK {
		return &proxyRefusal{status: answer.StatusCode}
	}
	return nil
}

// explainProxy explains an error that a proxy caused; the reason is empty if no proxy did.
func explainProxy(err error, a attempt) (reason, message string) {
	var refusal *proxyRefusal
	if errors.As(err, &refusal) {
		switch status := refusal.status; {
		case status == http.StatusProxyAuthRequired && a.proxy != nil && a.proxy.User == nil:
			return session.EndProxyAuthFailed, "the proxy asks for a user and a password (status 407), and its URL has none: write them before the host, USER:PASSWORD@HOST:PORT"
		case status == http.StatusProxyAuthRequired:
			return session.EndProxyAuthFailed, "the proxy refuses the user or the password of its URL (status 407): correct them; special characters must be percent-encoded (" + encoding + ")"
		case status >= http.StatusInternalServerError:
			return session.EndProxyFailed, fmt.Sprintf("the proxy could not connect to %s (status %d)", a.target(), status)
		default:
			return session.EndProxyRefused, fmt.Sprintf("the proxy refuses to connect to %s (status %d): allow it there", a.target(), status)
		}
	}
	text := err.Error()
	if strings.Contains(text, "invalid proxy address") { // net/http quotes the URL
		return session.EndProxyFailed, "HTTPS_PROXY names no proxy that can be used: " + ErrBadProxy.Error()
	}
	var network *net.OpError
	if !errors.As(err, &network) {
		network = &net.OpError{}
	}
	socks := strings.HasPrefix(network.Op, "socks ")
	if a.proxy == nil && network.Op != opProxy && !socks {
		return "", ""
	}
	if socks || network.Op == opProxy && strings.Contains(text, "socks ") {
		for _, row := range socksProblems {
			if strings.Contains(text, row.text) {
				return row.reason, fmt.Sprintf(row.message, a.target())
			}
		}
	}
	var name *net.DNSError
	switch dialling := network.Op == "dial" || network.Op == opProxy; {
	case errors.As(err, &name) && !name.IsTimeout:
		return session.EndProxyUnreachable, "the name of the proxy's host cannot be resolved: correct the URL, or the cluster's DNS"
	case errors.Is(err, syscall.ECONNREFUSED):
		return session.EndProxyUnreachable, "the proxy refuses connections: check the host and the port of its URL, and that it runs"
	case isTLSError(err) && a.proxy != nil && a.proxy.Scheme == "https" && network.Op == opProxy:
		return session.EndProxyFailed, "the proxy's TLS certificate is not valid for its host, or it does not speak TLS: check the URL, or use http://"
	case strings.Contains(text, "malformed HTTP"):
		return session.EndProxyFailed, "the proxy does not speak HTTP: check the scheme of its URL, socks5:// perhaps"
	case timedOut(err) && !a.dialled, dialling && network.Timeout():
		return session.EndProxyUnreachable, "the proxy does not answer: check the host and the port of its URL, and that a firewall lets the worker reach it"
	case dialling && !a.dialled:
		return session.EndProxyUnreachable, "the proxy cannot be reached: check the host and the port of its URL"
	case timedOut(err):
		return session.EndTimeout, fmt.Sprintf("the proxy accepted the connection, but no answer of %s came through it in time", a.target())
	default:
		return "", ""
	}
}

// socksProblems are the errors of net/http's SOCKS5 client (socks_bundle.go), which
// differ only in their texts.
var socksProblems = []struct{ text, reason, message string }{
	{"username/password authentication failed", session.EndProxyAuthFailed, "the proxy refuses the user or the password of its URL: correct them; special characters must be percent-encoded (" + strings.ReplaceAll(encoding, "%", "%%") + ")%.0s"},
	{"no acceptable authentication methods", session.EndProxyAuthFailed, "the proxy asks for a user and a password, and its URL has none, or takes none and has them: correct the URL%.0s"},
	{"invalid username/password version", session.EndProxyFailed, "the proxy does not speak SOCKS5 as it should: check the URL%.0s"},
	{"not allowed by ruleset", session.EndProxyRefused, "the proxy refuses to connect to %s: allow it there"},
	{"command not supported", session.EndProxyRefused, "the proxy does not let connections to %s through: allow it there"},
	{"unexpected protocol version", session.EndProxyFailed, "the proxy does not speak SOCKS5: check the scheme of its URL, http:// perhaps%.0s"},
	{"general SOCKS server failure", session.EndProxyFailed, "the proxy could not connect to %s"},
	{"unknown error", session.EndProxyFailed, "the proxy could not connect to %s"},
}

// isTLSError: the peer's certificate, or its TLS protocol, is wrong.
func isTLSError(err error) bool {
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	return errors.As(err, &certificate) || errors.As(err, &record)
}

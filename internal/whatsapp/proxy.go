package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ErrBadProxy is a proxy URL that cannot be used. It never shows the URL.
var ErrBadProxy = errors.New("the proxy must be http://, https:// or socks5://, then USER:PASSWORD@ where it is needed, then HOST:PORT (the value is not shown)")

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
	return nil
}

// dialFunc opens a TCP connection to the server, or to the proxy.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// transport is one connection's own: net/http could otherwise hand the socket
// that one session has dialled to another.
func (f *Factory) transport(proxy *url.URL, dial dialFunc) *http.Transport {
	t := &http.Transport{
		// As whatsmeow's own: HTTPS_PROXY is the administrator's wish.
		Proxy:       http.ProxyFromEnvironment,
		DialContext: dial,
		// Not nil, so that there is no HTTP/2, which has no upgrade.
		TLSClientConfig:     f.tls,
		TLSHandshakeTimeout: dialTimeout,
		DisableKeepAlives:   true,
		// The buffers live as long as the websocket, which has its own.
		ReadBufferSize: 1 << 10, WriteBufferSize: 1 << 10,
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
			if answer.StatusCode != http.StatusOK {
				return &proxyRefusal{status: answer.StatusCode}
			}
			return nil
		},
	}
	if proxy != nil {
		t.Proxy = http.ProxyURL(proxy)
	}
	return t
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
	return r.inner.RoundTrip(out)
}

// clients are the connection's HTTP clients: for its websocket and for downloads.
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
	return websocket, &http.Client{Transport: f.reroute(f.transport(proxy, plain)), Timeout: mediaTimeout}
}

package whatsapp

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	proxyUser     = "tenant"
	proxyPassword = "hunter2@/#%:?" // all that must be percent-encoded
)

// listen serves each connection with a function until the test ends.
func listen(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			wg.Go(func() {
				serve(conn)
				_ = conn.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		mu.Lock()
		for _, conn := range conns {
			_ = conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return listener.Addr().String()
}

// targets are where a proxy was asked to connect to.
type targets struct {
	mu   sync.Mutex
	seen []string
}

func (t *targets) add(target string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seen = append(t.seen, target)
}

func (t *targets) all() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string{}, t.seen...)
}

// pass copies both ways between a client and a server.
func pass(client net.Conn, from io.Reader, server net.Conn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(server, from)
		_ = server.Close()
	}()
	_, _ = io.Copy(client, server)
	_ = client.Close()
	_ = server.Close()
	<-done
}

// httpProxy is a proxy that only supports CONNECT and requires the password. A status other
// than 200 is its answer to a request with the right password.
func httpProxy(t *testing.T, status int, seen *targets) string {
	wanted := "Basic " + base64.StdEncoding.EncodeToString([]byte(proxyUser+":"+proxyPassword))
	return listen(t, func(client net.Conn) {
		reader := bufio.NewReader(client)
		req, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		seen.add(req.Method + " " + req.RequestURI)
		answer := status
		if req.Header.Get("Proxy-Authorization") != wanted {
			answer = http.StatusProxyAuthRequired
		}
		if answer == http.StatusOK {
			server, err := net.Dial("tcp", req.RequestURI)
			if err != nil {
				return
			}
			_, _ = io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n")
			pass(client, reader, server)
			return
		}
		_, _ = fmt.Fprintf(client, "HTTP/1.1 %d hunter2\r\nContent-Length: 0\r\n\r\n", answer)
	})
}

// socksProxy is a SOCKS5 proxy (RFC 1928, 1929) that requires the password and answers a
// request with the code: 0 means connected.
func socksProxy(t *testing.T, code byte, seen *targets) string {
	return listen(t, func(client net.Conn) {
		read := func(n int) []byte {
			b := make([]byte, n)
			if _, err := io.ReadFull(client, b); err != nil {
				return nil
			}
			return b
		}
		text := func() string {
			if n := read(1); n != nil {
				return string(read(int(n[0])))
			}
			return ""
		}
		hello := read(2)
		if len(hello) < 2 || hello[0] != 5 {
			return
		}
		if methods := read(int(hello[1])); !strings.Contains(string(methods), "\x02") {
			_, _ = client.Write([]byte{5, 0xff})
			return
		}
		_, _ = client.Write([]byte{5, 2})
		_ = read(1)
		if user, password := text(), text(); user != proxyUser || password != proxyPassword {
			_, _ = client.Write([]byte{1, 1})
			return
		}
		_, _ = client.Write([]byte{1, 0})
		request := read(4)
		if request == nil {
			return
		}
		host := ""
		switch request[3] {
		case 1:
			host = net.IP(read(4)).String()
		case 3:
			host = text()
		}
		port := read(2)
		target := net.JoinHostPort(host, fmt.Sprint(int(port[0])<<8|int(port[1])))
		seen.add(target)
		_, _ = client.Write([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0})
		if code != 0 {
			return
		}
		if server, err := net.Dial("tcp", target); err == nil {
			pass(client, client, server)
		}
	})
}

// TestConnectThroughAProxy: with a simulator, a proxy of either kind is asked for the
// simulator's address, with either scheme, and never for WhatsApp's.
func TestConnectThroughAProxy(t *testing.T) {
	for _, withTLS := range []bool{false, true} {
		for _, scheme := range []string{"http", "socks5", "socks5h"} {
			t.Run(fmt.Sprintf("%s, TLS %t", scheme, withTLS), func(t *testing.T) {
				w := newEnvironment(t, func(o *simulator.Options) { o.TLS = withTLS })
				endpoint, err := url.Parse(w.simulator.Endpoint())
				w.g.Expect(err).NotTo(HaveOccurred())
				var seen targets
				var want, address string
				if scheme == "http" {
					want, address = "CONNECT "+endpoint.Host, httpProxy(t, http.StatusOK, &seen)
				} else {
					want, address = endpoint.Host, socksProxy(t, 0, &seen)
				}
				proxy, err := ParseProxy(fmt.Sprintf("%s://%s@%s", scheme, url.UserPassword(proxyUser, proxyPassword), address))
				w.g.Expect(err).NotTo(HaveOccurred())
				s := w.connect(w.take(), func(o *Options) { o.Proxy = proxy })
				s.event(EventQR)
				w.g.Expect(seen.all()).To(Equal([]string{want}))
				s.Close()
			})
		}
	}
}

// TestProxyFailures: each message says what to correct and contains no part of the URL,
// which is a secret.
func TestProxyFailures(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := free.Addr().String()
	_ = free.Close()
	var seen targets
	speaks := func(text string) string {
		return listen(t, func(client net.Conn) { _, _ = io.WriteString(client, text); _, _ = io.Copy(io.Discard, client) })
	}
	endless := func(first, line string) string {
		return listen(t, func(client net.Conn) {
			_, err := io.WriteString(client, first)
			for err == nil {
				_, err = io.WriteString(client, line)
			}
		})
	}
	socksHello := "\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
	right, wrong := url.UserPassword(proxyUser, proxyPassword).String()+"@", "tenant:hunter3@"
	for name, row := range map[string]struct {
		url    string
		reason string
		says   string
	}{
		"HTTP, a wrong password":             {"http://" + wrong + httpProxy(t, 200, &seen), session.EndProxyAuthFailed, "percent-encoded (@ is %40"},
		"HTTP, no password":                  {"http://" + httpProxy(t, 200, &seen), session.EndProxyAuthFailed, "its URL has none"},
		"HTTP, the target is forbidden":      {"http://" + right + httpProxy(t, 403, &seen), session.EndProxyRefused, "allow it there"},
		"HTTP, CONNECT is not known":         {"http://" + right + httpProxy(t, 405, &seen), session.EndProxyRefused, "status 405"},
		"HTTP, the target is unreachable":    {"http://" + right + httpProxy(t, 502, &seen), session.EndProxyFailed, "could not connect"},
		"HTTP, but the proxy speaks SOCKS":   {"http://" + right + socksProxy(t, 0, &seen), session.EndProxyFailed, "connection through the proxy failed"},
		"HTTP, but something else answers":   {"http://" + right + speaks("SSH-2.0-x\r\n\r\n"), session.EndProxyFailed, "does not speak HTTP"},
		"HTTP, headers without an end":       {"http://" + right + endless("HTTP/1.1 200 OK\r\n", "X: "+strings.Repeat("x", 1000)+"\r\n"), session.EndProxyFailed, "connection through the proxy failed"},
		"HTTPS, but the proxy has no TLS":    {"https://" + right + httpProxy(t, 200, &seen), session.EndProxyFailed, "TLS"},
		"HTTP, nobody listens":               {"http://" + right + nobody, session.EndProxyUnreachable, "refuses connections"},
		"HTTP, no such name":                 {"http://" + right + "hunter2.invalid:3128", session.EndProxyUnreachable, "cannot be resolved"},
		"SOCKS, a wrong password":            {"socks5://" + wrong + socksProxy(t, 0, &seen), session.EndProxyAuthFailed, "percent-encoded (@ is %40"},
		"SOCKS, no password":                 {"socks5://" + socksProxy(t, 0, &seen), session.EndProxyAuthFailed, "has none"},
		"SOCKS, the target is forbidden":     {"socks5://" + right + socksProxy(t, 2, &seen), session.EndProxyRefused, "allow it there"},
		"SOCKS, the target is unreachable":   {"socks5://" + right + socksProxy(t, 5, &seen), session.EndProxyFailed, "could not connect"},
		"SOCKS, but the proxy speaks HTTP":   {"socks5://" + right + speaks("HTTP/1.1 400 Bad Request\r\n\r\n"), session.EndProxyFailed, "does not speak SOCKS5"},
		"SOCKS, nobody listens":              {"socks5h://" + right + nobody, session.EndProxyUnreachable, "refuses connections"},
		"SOCKS, an answer with endless text": {"socks5://" + endless(socksHello+"HTTP/1.1 101 x\r\n", "X: "+strings.Repeat("x", 1000)+"\r\n"), session.EndProxyFailed, "connection through the proxy failed"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, withTLS := range []bool{false, true} {
				if withTLS && strings.HasPrefix(row.url, "https") {
					continue
				}
				w := newEnvironment(t, func(o *simulator.Options) { o.TLS = withTLS })
				proxy, err := ParseProxy(row.url)
				w.g.Expect(err).NotTo(HaveOccurred())
				s, ctx := w.prepare(w.take(), func(o *Options) { o.Proxy = proxy })
				var failed *ConnectError
				err = s.Connect(ctx)
				w.g.Expect(errors.As(err, &failed)).To(BeTrue(), "%v", err)
				w.g.Expect(failed.Reason).To(Equal(row.reason), "%v: %v", failed, errors.Unwrap(failed))
				w.g.Expect(failed.Message).To(ContainSubstring(row.says))
				w.g.Expect(failed.Message).NotTo(Or(ContainSubstring("hunter"), ContainSubstring("tenant"), ContainSubstring("127.0.0.1"), ContainSubstring("!")))
			}
		})
	}
}

// TestExplainProxy has the failures that a test could cause only by waiting for a time-out.
func TestExplainProxy(t *testing.T) {
	proxy := &url.URL{Scheme: "http", Host: "proxy.example:3128", User: url.UserPassword(proxyUser, "hunter2")}
	for name, row := range map[string]struct {
		err    error
		a      attempt
		reason string
		says   string
	}{
		"a dead proxy":                           {err: &net.OpError{Op: opProxy, Err: &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}}, a: attempt{proxy: proxy}, reason: session.EndProxyUnreachable, says: "does not answer"},
		"a dead proxy, after the whole time-out": {err: context.DeadlineExceeded, a: attempt{proxy: proxy}, reason: session.EndProxyUnreachable, says: "does not answer"},
		"a proxy that says nothing":              {err: context.DeadlineExceeded, a: attempt{proxy: proxy, dialled: true}, reason: session.EndTimeout, says: "web.whatsapp.com:443 came through"},
		"no proxy, and WhatsApp is silent":       {err: context.DeadlineExceeded, reason: session.EndTimeout, says: "WhatsApp did not answer"},
		"no route to the proxy":                  {err: &net.OpError{Op: opProxy, Err: &net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}}, a: attempt{proxy: proxy}, reason: session.EndProxyUnreachable, says: "cannot be reached"},
		"HTTPS_PROXY refuses the password":       {err: &proxyRefusal{status: 407}, reason: session.EndProxyAuthFailed, says: "percent-encoded"},
		"HTTPS_PROXY cannot be reached":          {err: &net.OpError{Op: opProxy, Err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}}, reason: session.EndProxyUnreachable, says: "refuses connections"},
		"HTTPS_PROXY is no URL, and secret":      {err: errors.New(`Get "https://web.whatsapp.com": invalid proxy address "http://tenant:hunter2%zz@proxy": parse "x": invalid URL escape "%zz"`), reason: session.EndProxyFailed, says: "HTTPS_PROXY"},
		"WhatsApp itself cannot be reached":      {err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, reason: session.EndUnreachable, says: "WhatsApp cannot be reached"},
		"a simulator that the proxy forbids":     {err: &proxyRefusal{status: 403}, a: attempt{proxy: proxy, simulated: true}, reason: session.EndProxyRefused, says: "--whatsapp-endpoint"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			var failed *ConnectError
			g.Expect(errors.As(explain(fmt.Errorf("failed to dial: %w", row.err), row.a), &failed)).To(BeTrue())
			g.Expect(failed.Reason).To(Equal(row.reason))
			g.Expect(failed.Message).To(ContainSubstring(row.says))
			g.Expect(failed.Message).NotTo(Or(ContainSubstring("hunter"), ContainSubstring("tenant"), ContainSubstring("!")))
		})
	}
}

// TestDownloadsAreBounded: an answer without an end, and a redirect to a host of the cluster,
// are errors.
func TestDownloadsAreBounded(t *testing.T) {
	g := NewWithT(t)
	var asked targets
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.add(r.URL.Path)
		if r.URL.Path == "/redirect" {
			http.Redirect(w, r, "/secret", http.StatusFound)
			return
		}
		chunk := make([]byte, 1<<20)
		for range 2 * maxDownload / len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	defer server.Close()
	f := &Factory{}
	client := f.downloads(f.transport(nil, (&net.Dialer{}).DialContext))
	get := func(path string) (int64, *http.Response, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+path, nil)
		g.Expect(err).NotTo(HaveOccurred())
		resp, err := client.Do(req)
		g.Expect(err).NotTo(HaveOccurred())
		defer func() { _ = resp.Body.Close() }()
		n, err := io.Copy(io.Discard, resp.Body)
		return n, resp, err
	}
	n, _, err := get("/endless")
	g.Expect(err).To(HaveOccurred())
	g.Expect(n).To(BeEquivalentTo(maxDownload))
	_, resp, err := get("/redirect")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(resp.StatusCode).To(Equal(http.StatusFound))
	g.Expect(asked.all()).To(Equal([]string{"/endless", "/redirect"}))
}

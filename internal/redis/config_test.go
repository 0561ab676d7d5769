package redis

import (
	"crypto/tls"
	"net"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

// TestOneSideWithoutTLS: only one of client and server speaks TLS, and the error says which flag
// to look at.
func TestOneSideWithoutTLS(t *testing.T) {
	t.Parallel()
	serve := func(listener net.Listener, handle func(net.Conn)) string {
		var running sync.WaitGroup
		t.Cleanup(func() { _ = listener.Close(); running.Wait() })
		running.Go(func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				running.Go(func() { handle(conn) })
			}
		})
		return listener.Addr().String()
	}
	listen := func() net.Listener {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return listener
	}
	certificate := httptest.NewUnstartedServer(nil)
	certificate.StartTLS()
	t.Cleanup(certificate.Close)

	for _, row := range []struct {
		name, address string
		tls           bool
		says          string
	}{
		{
			"a server without TLS that waits for the rest of a command, as Redis does",
			serve(listen(), func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)); <-t.Context().Done(); _ = conn.Close() }),
			true, "(check the port and --redis-tls)",
		},
		{
			"a server without TLS that answers",
			serve(listen(), func(conn net.Conn) { _, _ = conn.Write([]byte("-ERR unknown command\r\n")); _ = conn.Close() }),
			true, "(check the port and --redis-tls)",
		},
		{
			"a server with TLS",
			serve(tls.NewListener(listen(), certificate.TLS), func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)); _ = conn.Close() }),
			false, "--redis-tls if",
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			g := NewWithT(t)
			client, err := New(Config{Addresses: []string{row.address}, TLS: row.tls, DialTimeout: 200 * time.Millisecond})
			g.Expect(err).NotTo(HaveOccurred())
			t.Cleanup(func() { _ = client.Close() })
			g.Expect(CheckAccess(t.Context(), client, Keys{}, Worker, "")).To(MatchError(ContainSubstring(row.says)))
		})
	}
}

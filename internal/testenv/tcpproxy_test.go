package testenv

import (
	"bufio"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

func TestTCPProxy(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	origins := make(chan string, 10)
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			origins <- c.RemoteAddr().String()
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	defer func() { _ = server.Close(); <-echoed }()
	proxy := NewTCPProxy(t, server.Addr().String())
	dial := func() (net.Conn, *bufio.Reader) {
		c, err := net.Dial("tcp", proxy.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c, bufio.NewReader(c)
	}
	echo := func(c net.Conn, r *bufio.Reader, text string, timeout time.Duration) error {
		_ = c.SetReadDeadline(time.Now().Add(timeout))
		if text != "" {
			if _, err := io.WriteString(c, text+"\n"); err != nil {
				return err
			}
		}
		_, err := r.ReadString('\n')
		return err
	}
	isTimeout := func(err error) bool {
		var timeout net.Error
		return errors.As(err, &timeout) && timeout.Timeout()
	}

	c, r := dial()
	if err := echo(c, r, "hello", 10*time.Second); err != nil {
		t.Fatal("an open proxy does not pass data:", err)
	}
	if origin := <-origins; !proxy.Carried(origin) || proxy.Carried(server.Addr().String()) {
		t.Error("Carried is wrong")
	}
	proxy.Hang()
	if err := echo(c, r, "late", 50*time.Millisecond); !isTimeout(err) {
		t.Fatal("a proxy that hangs passes data:", err)
	}
	newer, newerReader := dial()
	if err := echo(newer, newerReader, "late too", 50*time.Millisecond); !isTimeout(err) {
		t.Fatal("a proxy that hangs passes data of a new connection:", err)
	}
	proxy.Restore()
	for _, err := range []error{echo(c, r, "", 10*time.Second), echo(newer, newerReader, "", 10*time.Second)} {
		if err != nil {
			t.Fatal("data sent while the proxy hung are lost:", err)
		}
	}
	proxy.Cut()
	if err := echo(c, r, "", 10*time.Second); err == nil || isTimeout(err) {
		t.Fatal("a connection survives a cut:", err)
	}
	if again, err := net.Dial("tcp", proxy.Addr()); err == nil { // the reset may be faster than the dial
		if err := echo(again, bufio.NewReader(again), "hello?", 10*time.Second); err == nil || isTimeout(err) {
			t.Fatal("a new connection survives a cut:", err)
		}
		_ = again.Close()
	}
	proxy.Restore()
	c, r = dial()
	if err := echo(c, r, "hello again", 10*time.Second); err != nil {
		t.Fatal("a restored proxy does not pass data:", err)
	}
}

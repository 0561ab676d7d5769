package store

import (
	"net"
	"testing"

	. "github.com/onsi/gomega"
	"golang.org/x/sys/unix"
)

// A lost peer cannot be simulated on one machine, so the test reads the options of the
// socket.
func TestALostPeerIsDetected(t *testing.T) {
	g := NewWithT(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { _ = listener.Close() }()
	cfg, err := Config{}.parsePostgres("postgres://u:p@" + listener.Addr().String() + "/db?connect_timeout=3")
	g.Expect(err).NotTo(HaveOccurred())
	conn, err := cfg.DialFunc(t.Context(), "tcp", listener.Addr().String())
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { _ = conn.Close() }()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	g.Expect(err).NotTo(HaveOccurred())
	option := func(level, name int) (value int) {
		var failed error
		g.ExpectWithOffset(1, raw.Control(func(fd uintptr) { value, failed = unix.GetsockoptInt(int(fd), level, name) })).To(Succeed())
		g.ExpectWithOffset(1, failed).NotTo(HaveOccurred())
		return value
	}
	g.Expect(option(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)).To(BeEquivalentTo(peerTimeout.Milliseconds()))
	g.Expect(option(unix.SOL_SOCKET, unix.SO_KEEPALIVE)).To(Equal(1))
	g.Expect(option(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)).To(BeEquivalentTo(peerTimeout.Seconds() / 3))
}

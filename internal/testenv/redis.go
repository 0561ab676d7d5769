package testenv

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// redisServer is the server of Debian's package. If it does not exist, the one in PATH is
// used.
const redisServer = "/usr/bin/redis-server"

// redisStart bounds the start of a server; two loaded cores need much less.
const redisStart = 30 * time.Second

// redisKeeper runs the server and stops it when the script's standard input ends. This also
// happens when the test binary is killed or exceeds its time-out, so no server remains after
// its test. A line on standard input asks for an orderly stop. SIGTERM is repeated, because
// a server refuses it while it rewrites its append-only file; after ten seconds the server
// is killed.
const redisKeeper = `
"$@" >/dev/null 2>&1 &
server=$!
if read -r orderly; then
	tries=0
	while [ $tries -lt 500 ] && kill -TERM $server 2>/dev/null; do
		tries=$((tries + 1))
		sleep 0.02
	done
fi
kill -KILL $server 2>/dev/null
wait $server
exit 0`

// RedisProcess is a real redis-server on a free loopback port with its own
// folder. It shares nothing with other servers. Its methods may be called from
// the test's goroutine only, because they end the test when they fail.
type RedisProcess struct {
	t    testing.TB
	args []string
	port int
	dir  string
	runs int

	keeper *exec.Cmd
	stdin  io.WriteCloser
}

// Redis starts a server and returns its address (host:port). It ends with the
// test. args are options of redis-server, "--name", "value", …; they come after
// the defaults: noeviction, and an append-only file.
func Redis(t testing.TB, args ...string) string {
	t.Helper()
	return RedisServer(t, args...).Addr()
}

// RedisServer is Redis for a test that stops and restarts its server. If the first argument
// is not an option, it is a configuration file, as on the command line of redis-server.
func RedisServer(t testing.TB, args ...string) *RedisProcess {
	t.Helper()
	p := &RedisProcess{t: t, args: args, dir: t.TempDir()}
	t.Cleanup(p.Kill)
	// Another process may take the port between the check and the start.
	for range 10 {
		var err error
		if p.port, err = freePort(); err != nil {
			t.Fatal(err)
		}
		if p.start() {
			return p
		}
	}
	t.Fatal("redis-server found no free port")
	return nil
}

// Addr is the server's host:port; it stays the same over restarts.
func (p *RedisProcess) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.port)) }

// Port is the port of Addr.
func (p *RedisProcess) Port() int { return p.port }

// Stop stops the server in an orderly way (SIGTERM: it writes its data to disk) and waits
// until it has ended.
func (p *RedisProcess) Stop() { p.end(true) }

// Kill stops the server as a crash does (SIGKILL) and waits until it has ended.
func (p *RedisProcess) Kill() { p.end(false) }

// Restart starts the server again, on the same port and with the data on its disk. If it
// still runs, Restart stops it first.
func (p *RedisProcess) Restart() {
	p.t.Helper()
	p.Stop()
	if !p.start() {
		p.t.Fatalf("redis-server could not be started again on port %d", p.port)
	}
}

// RestartEmpty restarts the server with an empty disk: Redis has lost all its data.
func (p *RedisProcess) RestartEmpty() {
	p.t.Helper()
	p.Kill()
	p.dir = p.t.TempDir()
	if !p.start() {
		p.t.Fatalf("redis-server could not be started again on port %d", p.port)
	}
}

// start runs the server and waits until it serves. It returns false when the
// port is taken.
func (p *RedisProcess) start() bool {
	p.t.Helper()
	server := redisServer
	if _, err := os.Stat(server); err != nil {
		if server, err = exec.LookPath("redis-server"); err != nil {
			p.t.Fatalf("these tests need redis-server (Debian: apt-get install redis-server): %v", err)
		}
	}
	p.runs++
	logFile := filepath.Join(p.dir, fmt.Sprintf("redis-%d.log", p.runs))
	command, options := []string{"-c", redisKeeper, "redis-keeper", server}, p.args
	if len(options) > 0 && !strings.HasPrefix(options[0], "--") {
		command, options = append(command, options[0]), options[1:]
	}
	command = append(command,
		"--bind", "127.0.0.1", "--port", strconv.Itoa(p.port), "--dir", p.dir, "--logfile", logFile,
		"--maxmemory-policy", "noeviction", "--appendonly", "yes", "--save", "")
	command = append(command, options...)
	p.keeper = exec.Command("/bin/sh", command...)
	stdin, err := p.keeper.StdinPipe()
	if err == nil {
		err = p.keeper.Start()
	}
	if err != nil {
		p.t.Fatalf("starting redis-server: %v", err)
	}
	p.stdin = stdin
	retry := time.NewTicker(5 * time.Millisecond)
	defer retry.Stop()
	for end := time.Now().Add(redisStart); time.Now().Before(end); <-retry.C {
		switch state, line := readLog(logFile); state {
		case serving:
			return true
		case portTaken:
			p.Kill()
			return false
		case broken:
			p.t.Fatalf("redis-server does not start: %s", line)
		}
	}
	text, _ := os.ReadFile(logFile)
	p.t.Fatalf("redis-server was not ready within %s; its log: %s", redisStart, text)
	return false
}

func (p *RedisProcess) end(orderly bool) {
	if p.keeper == nil {
		return
	}
	if orderly {
		_, _ = io.WriteString(p.stdin, "end\n")
	}
	_ = p.stdin.Close()
	_ = p.keeper.Wait()
	p.keeper = nil
}

type logState int

const (
	starting logState = iota
	serving
	portTaken
	broken
)

// readLog reads the state of the server from its log. A request over TCP could be answered
// by another server on the same port, and would need the password if the test sets one.
func readLog(name string) (logState, string) {
	f, err := os.Open(name)
	if err != nil {
		return starting, ""
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		switch {
		case strings.Contains(line, "Ready to accept connections"), strings.Contains(line, "Sentinel ID is"):
			return serving, line
		case strings.Contains(line, "Address already in use"):
			return portTaken, line
		case strings.Contains(line, "Fatal"), strings.Contains(line, "FATAL"):
			return broken, line
		}
	}
	return starting, ""
}

// FreeAddress is a loopback host:port that is free now. Another process may take it
// before it is used.
func FreeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("looking for a free port: %w", err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String(), nil
}

// freePort is the port of FreeAddress.
func freePort() (int, error) {
	address, err := FreeAddress()
	if err != nil {
		return 0, err
	}
	_, port, _ := net.SplitHostPort(address) // as Addr writes it
	return strconv.Atoi(port)
}

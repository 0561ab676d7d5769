package testenv

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// serverKeeper runs the server with the data in $1 until it reads a line: "stop" is an
// orderly stop (SIGINT is PostgreSQL's fast shutdown), "kill" a crash (SIGQUIT: nothing
// more is written, and the next start recovers from the log). If standard input ends
// without a line, the test binary has ended; then the script stops the server and deletes
// the folder.
//
// The data survive a crash of the server, but not of the machine: a commit is answered when
// it is written, without waiting for the disk.
const serverKeeper = `
dir=$1 program=$2 port=$3 log=$4
shift 4
"$program" -D "$dir/data" -p "$port" -h 127.0.0.1 -c unix_socket_directories= -c fsync=off -c full_page_writes=off \
	-c max_connections=200 "$@" >"$log" 2>&1 & server=$!
read -r signal
case $signal in
stop) kill -INT $server 2>/dev/null ;;
*) kill -QUIT $server 2>/dev/null ;;
esac
wait $server
[ -n "$signal" ] || rm -rf "$dir"
exit 0`

// postgresStart bounds the start of a server.
const postgresStart = 60 * time.Second

// postgresServer is a real PostgreSQL server on a free loopback port, with its own data.
type postgresServer struct {
	programs string
	account  *syscall.SysProcAttr
	options  []string
	dir      string
	port     int
	runs     int

	keeper *exec.Cmd
	stdin  io.WriteCloser
}

// newPostgresServer makes a cluster and starts its server, which ends with this process.
// options are those of postgres, "-c", "name=value", …; they come after the defaults.
func newPostgresServer(options ...string) (s *postgresServer, err error) {
	programs, err := postgresPrograms()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "testenv-postgres-") // only its owner may enter it, unlike a folder of t.TempDir
	if err != nil {
		return nil, err
	}
	s = &postgresServer{programs: programs, options: options, dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.remove())
		}
	}()
	if os.Geteuid() == 0 { // PostgreSQL refuses to run as root
		if s.account, err = asPostgresUser(s.dir); err != nil {
			return nil, err
		}
	}
	initdb := s.command(filepath.Join(programs, "initdb"), "-D", filepath.Join(dir, "data"), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("making a PostgreSQL cluster: %w\n%s", err, out)
	}
	// Another process may take the port before the server does.
	for range 10 {
		if s.port, err = freePort(); err != nil {
			return nil, err
		}
		if free, err := s.start(); free || err != nil {
			return s, err
		}
	}
	return nil, errors.New("PostgreSQL found no free port")
}

// start runs the server and waits until it serves. free is false when the port is taken.
func (s *postgresServer) start() (free bool, err error) {
	s.runs++
	logFile := filepath.Join(s.dir, fmt.Sprintf("postgres-%d.log", s.runs))
	s.keeper = s.command("/bin/sh", append([]string{"-c", serverKeeper, "postgres-keeper",
		s.dir, filepath.Join(s.programs, "postgres"), strconv.Itoa(s.port), logFile}, s.options...)...)
	if s.stdin, err = s.keeper.StdinPipe(); err == nil {
		err = s.keeper.Start()
	}
	if err != nil {
		s.keeper = nil
		return false, fmt.Errorf("starting PostgreSQL: %w", err)
	}
	// The log is read because another server could answer a request over TCP.
	retry := time.NewTicker(5 * time.Millisecond)
	defer retry.Stop()
	for end := time.Now().Add(postgresStart); time.Now().Before(end); <-retry.C {
		text, _ := os.ReadFile(logFile)
		switch log := string(text); {
		case strings.Contains(log, "database system is ready to accept connections"),
			strings.Contains(log, "database system is ready to accept read-only connections"):
			return true, nil
		case strings.Contains(log, "could not create any TCP/IP sockets"):
			s.end("kill")
			return false, nil
		}
	}
	text, _ := os.ReadFile(logFile)
	return false, fmt.Errorf("PostgreSQL was not ready within %s; its log: %s", postgresStart, text)
}

func (s *postgresServer) end(signal string) {
	if s.keeper == nil {
		return
	}
	_, _ = io.WriteString(s.stdin, signal+"\n")
	_ = s.stdin.Close()
	_ = s.keeper.Wait()
	s.keeper = nil
}

// remove ends the server and deletes its data.
func (s *postgresServer) remove() error {
	s.end("kill")
	if err := os.RemoveAll(s.dir); err != nil {
		return fmt.Errorf("removing the data of PostgreSQL: %w", err)
	}
	return nil
}

func (s *postgresServer) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.SysProcAttr = s.dir, s.account
	return cmd
}

// PostgresProcess is the PostgreSQL server of one test. Its methods may be called from the
// test's goroutine only, because they end the test when they fail.
type PostgresProcess struct {
	t      testing.TB
	server *postgresServer
}

// PostgresServer is Postgres for a test that stops and restarts its server. It ends with the
// test. args are options of postgres, "-c", "name=value", …; they come after the defaults.
func PostgresServer(t testing.TB, args ...string) *PostgresProcess {
	t.Helper()
	server, err := newPostgresServer(args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.remove(); err != nil {
			t.Error(err)
		}
	})
	return &PostgresProcess{t: t, server: server}
}

// Addr is the server's host:port; it stays the same over restarts.
func (p *PostgresProcess) Addr() string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.server.port))
}

// URL is the URL of the server's one database; it stays the same over restarts.
func (p *PostgresProcess) URL() string { return p.URLVia(p.Addr()) }

// URLVia is URL with another host:port that leads to the server, such as a proxy's.
func (p *PostgresProcess) URLVia(address string) string {
	return fmt.Sprintf("postgres://postgres@%s/postgres?sslmode=disable", address)
}

// Stop stops the server in an orderly way: it disconnects its clients, writes its data, and
// ends.
func (p *PostgresProcess) Stop() { p.server.end("stop") }

// Kill stops the server as a crash does: clients lose their connections and open
// transactions, and committed data remain. It waits until the server has ended.
func (p *PostgresProcess) Kill() { p.server.end("kill") }

// Restart starts the server again, on the same port and with the data on its disk. If it
// still runs, Restart stops it first.
func (p *PostgresProcess) Restart() {
	p.t.Helper()
	p.Stop()
	if free, err := p.server.start(); err != nil || !free {
		p.t.Fatalf("PostgreSQL could not be started again on port %d: %v", p.server.port, err)
	}
}

// RestartAsStandby restarts the server as a standby, which accepts no writes; it has no
// primary.
func (p *PostgresProcess) RestartAsStandby() {
	p.t.Helper()
	p.Stop()
	touch := p.server.command("/bin/sh", "-c", ": >data/standby.signal")
	if out, err := touch.CombinedOutput(); err != nil {
		p.t.Fatalf("making a standby: %v\n%s", err, out)
	}
	p.Restart()
}

// RequirePasswords makes roles that must give their password, by name, and restarts the
// server. The role postgres, whose URL is URL, still needs none.
func (p *PostgresProcess) RequirePasswords(roles map[string]string) {
	p.t.Helper()
	db, err := sql.Open("pgx", p.URL())
	if err != nil {
		p.t.Fatalf("reaching PostgreSQL: %v", err)
	}
	defer func() { _ = db.Close() }()
	for name, password := range roles {
		if _, err := db.ExecContext(context.Background(), fmt.Sprintf("CREATE ROLE %q LOGIN SUPERUSER PASSWORD '%s'", name, password)); err != nil {
			p.t.Fatalf("making a role: %v", err)
		}
	}
	rules := p.server.command("/bin/sh", "-c", "printf 'host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n' >data/pg_hba.conf")
	if out, err := rules.CombinedOutput(); err != nil {
		p.t.Fatalf("requiring passwords: %v\n%s", err, out)
	}
	p.Restart()
}

// Terminate ends all other connections to the server, as an administrator or a
// fail-over does, and returns how many there were.
func (p *PostgresProcess) Terminate() (n int) {
	p.t.Helper()
	db, err := sql.Open("pgx", p.URL())
	if err == nil {
		defer func() { _ = db.Close() }()
		// The second argument is how long to wait for the end of each, in milliseconds.
		err = db.QueryRowContext(context.Background(), `SELECT COUNT(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity
			WHERE pid<>pg_backend_pid() AND backend_type='client backend'`).Scan(&n)
	}
	if err != nil {
		p.t.Fatalf("ending the connections to PostgreSQL: %v", err)
	}
	return n
}

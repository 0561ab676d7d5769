package testenv

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// bouncerKeeper runs PgBouncer until the script's standard input ends, which also happens
// when the test binary is killed.
const bouncerKeeper = `
"$2" "$1/pgbouncer.ini" >"$1/pgbouncer.log" 2>&1 & server=$!
read -r _; kill -KILL $server 2>/dev/null; wait $server; rm -rf "$1"`

// bouncerConfig gives each database three connections to the server, so that the
// tests' clients share them: a transaction rarely gets the connection of the transaction before it.
const bouncerConfig = `
[databases]
* = host=127.0.0.1 port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = trust
auth_file = %s
pool_mode = transaction
default_pool_size = 3
max_client_conn = 500
server_round_robin = 1
`

var bouncer struct {
	once  sync.Once
	err   error
	port  int
	stdin io.WriteCloser // open until the test binary ends
}

// PgBouncer is Postgres behind a PgBouncer in transaction mode, which is started
// once for the test binary and ends with it.
func PgBouncer(t testing.TB) string {
	t.Helper()
	direct, err := url.Parse(Postgres(t))
	if err != nil {
		t.Fatal(err)
	}
	bouncer.once.Do(func() { bouncer.err = startBouncer() })
	if bouncer.err != nil {
		t.Fatalf("these tests need PgBouncer (Debian: apt-get install pgbouncer): %v", bouncer.err)
	}
	direct.Host = net.JoinHostPort("127.0.0.1", strconv.Itoa(bouncer.port))
	return direct.String()
}

func startBouncer() error {
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		if program = "/usr/sbin/pgbouncer"; !executable(program) {
			return err
		}
	}
	dir, err := os.MkdirTemp("", "testenv-pgbouncer-")
	if err != nil {
		return err
	}
	if bouncer.port, err = freePort(); err != nil { // another process may take it before PgBouncer does
		return err
	}
	users := filepath.Join(dir, "users")
	for name, content := range map[string]string{
		users:                               `"postgres" ""` + "\n",
		filepath.Join(dir, "pgbouncer.ini"): fmt.Sprintf(bouncerConfig, postgres.server.port, bouncer.port, users),
	} {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	keeper := exec.Command("/bin/sh", "-c", bouncerKeeper, "pgbouncer-keeper", dir, program)
	keeper.Dir = dir
	if os.Geteuid() == 0 { // PgBouncer refuses to run as root
		if keeper.SysProcAttr, err = asPostgresUser(dir); err != nil {
			return err
		}
	}
	if bouncer.stdin, err = keeper.StdinPipe(); err != nil {
		return err
	}
	if err := keeper.Start(); err != nil {
		return err
	}
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for end := time.Now().Add(postgresStart); ; {
		log, _ := os.ReadFile(filepath.Join(dir, "pgbouncer.log"))
		if strings.Contains(string(log), "process up") {
			return nil
		}
		if now := <-retry.C; now.After(end) {
			return fmt.Errorf("PgBouncer was not ready within %s; its log: %s", postgresStart, log)
		}
	}
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&0o111 != 0
}

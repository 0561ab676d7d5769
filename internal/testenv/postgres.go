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
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
)

// postgresStart bounds the start of a cluster.
const postgresStart = 60 * time.Second

// postgresKeeper creates the cluster, runs it, and stops it when the script's standard input
// ends. This also happens when the test binary is killed, so no server and no folder remains
// after the tests. $1 is the folder, $2 the programs' folder, $3 the port. SIGQUIT is
// PostgreSQL's immediate shutdown.
const postgresKeeper = `
"$2/initdb" -D "$1/data" -U postgres -A trust -E UTF8 --locale=C --no-sync >"$1/initdb.log" 2>&1 || exit 1
"$2/postgres" -D "$1/data" -p "$3" -h 127.0.0.1 -k "$1" -c fsync=off -c synchronous_commit=off -c full_page_writes=off \
	-c max_connections=200 >"$1/postgres.log" 2>&1 & server=$!
read -r _; kill -QUIT $server 2>/dev/null; wait $server; rm -rf "$1"`

var postgres struct {
	once  sync.Once
	err   error
	port  int
	stdin io.WriteCloser // open until the test binary ends

	mu        sync.Mutex
	databases int
}

// Postgres returns the URL of a fresh, empty database in a real PostgreSQL
// cluster, which is started on a free loopback port once for the test binary
// and ends with it. The database is dropped when the test ends.
func Postgres(t testing.TB) string {
	t.Helper()
	postgres.once.Do(func() { postgres.err = startPostgres() })
	if postgres.err != nil {
		t.Fatalf("these tests need PostgreSQL (Debian: apt-get install postgresql): %v", postgres.err)
	}
	postgres.mu.Lock()
	postgres.databases++
	name := fmt.Sprintf("test_%d", postgres.databases)
	postgres.mu.Unlock()
	if err := administer(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatalf("making a database: %v", err)
	}
	t.Cleanup(func() {
		if err := administer(context.Background(), "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			t.Errorf("dropping a database: %v", err)
		}
	})
	return postgresURL(name)
}

func postgresURL(database string) string {
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%d/%s?sslmode=disable", postgres.port, database)
}

// administer runs one statement outside the tests' databases. It leaves no connection and no
// goroutine.
func administer(ctx context.Context, query string) (err error) {
	db, err := sql.Open("pgx", postgresURL("postgres"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	_, err = db.ExecContext(ctx, query)
	return err
}

func startPostgres() error {
	programs, err := postgresPrograms()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "testenv-postgres-")
	if err != nil {
		return err
	}
	// Another process may take the port before the server does.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	postgres.port = listener.Addr().(*net.TCPAddr).Port
	if err := listener.Close(); err != nil {
		return err
	}
	keeper := exec.Command("/bin/sh", "-c", postgresKeeper, "postgres-keeper", dir, programs, strconv.Itoa(postgres.port))
	keeper.Dir = dir
	if os.Geteuid() == 0 { // PostgreSQL refuses to run as root
		if keeper.SysProcAttr, err = asPostgresUser(dir); err != nil {
			return err
		}
	}
	if postgres.stdin, err = keeper.StdinPipe(); err != nil {
		return err
	}
	if err := keeper.Start(); err != nil {
		return err
	}
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	end := time.Now().Add(postgresStart)
	for err = administer(context.Background(), "SELECT 1"); err != nil; err = administer(context.Background(), "SELECT 1") {
		if now := <-retry.C; now.After(end) {
			log, _ := os.ReadFile(filepath.Join(dir, "postgres.log"))
			return fmt.Errorf("the cluster does not answer: %w\n%s", err, log)
		}
	}
	return nil
}

// postgresPrograms is the folder of initdb and postgres: Debian's newest version, or the one
// in PATH.
func postgresPrograms() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil {
		return "", err
	}
	if len(found) > 0 {
		return filepath.Dir(found[len(found)-1]), nil
	}
	program, err := exec.LookPath("initdb")
	if err != nil {
		return "", errors.New("initdb is neither in /usr/lib/postgresql nor in PATH")
	}
	return filepath.Dir(program), nil
}

func asPostgresUser(dir string) (*syscall.SysProcAttr, error) {
	account, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(account.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	if err := os.Chown(dir, int(uid), int(gid)); err != nil {
		return nil, err
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}, nil
}

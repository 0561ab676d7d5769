package testenv

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
)

var postgres struct {
	once   sync.Once
	err    error
	server *postgresServer // it ends with the test binary

	mu        sync.Mutex
	databases int
}

// Postgres returns the URL of a fresh, empty database in a real PostgreSQL
// cluster, which is started on a free loopback port once for the test binary
// and ends with it. The database is dropped when the test ends.
func Postgres(t testing.TB) string {
	t.Helper()
	postgres.once.Do(func() { postgres.server, postgres.err = newPostgresServer("-c", "synchronous_commit=off") })
	if postgres.err != nil {
		t.Fatal(postgres.err)
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
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%d/%s?sslmode=disable", postgres.server.port, database)
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
		return "", errors.New("initdb is neither in /usr/lib/postgresql nor in PATH (Debian: apt-get install postgresql)")
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

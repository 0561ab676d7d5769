package testenv

import (
	"database/sql"
	"testing"
)

func TestPostgresDatabasesShareNothing(t *testing.T) {
	for range 2 {
		db, err := sql.Open("pgx", Postgres(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.ExecContext(t.Context(), "CREATE TABLE mine (id INTEGER)"); err != nil {
			t.Error(err)
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestPostgresServer(t *testing.T) {
	ctx := t.Context()
	server := PostgresServer(t, "-c", "max_prepared_transactions=7")
	db, err := sql.Open("pgx", server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	var option string
	if err := db.QueryRowContext(ctx, "SHOW max_prepared_transactions").Scan(&option); err != nil || option != "7" {
		t.Errorf("the test's own option: %q, %v", option, err)
	}
	if _, err := db.ExecContext(ctx, "CREATE TABLE kept (n INTEGER)"); err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]func(){"stopped": server.Stop, "killed": server.Kill} {
		if _, err := db.ExecContext(ctx, "INSERT INTO kept VALUES (1)"); err != nil {
			t.Fatal(err)
		}
		open, err := db.BeginTx(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := open.ExecContext(ctx, "INSERT INTO kept VALUES (2)"); err != nil {
			t.Fatal(err)
		}
		end()
		if err := db.PingContext(ctx); err == nil {
			t.Errorf("a server that was %s answers", name)
		}
		if err := open.Commit(); err == nil {
			t.Errorf("a transaction was committed on a server that was %s", name)
		}
		server.Restart()
	}
	var sum int
	if err := db.QueryRowContext(ctx, "SELECT SUM(n) FROM kept").Scan(&sum); err != nil || sum != 2 {
		t.Errorf("after the restarts: %d, %v; want only the committed rows", sum, err)
	}
	conn, err := db.Conn(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if n := server.Terminate(); n < 1 {
		t.Errorf("%d connections ended, want at least the one that is open", n)
	}
	if err := conn.PingContext(ctx); err == nil {
		t.Error("a terminated connection still works")
	}
}

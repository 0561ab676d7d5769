package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"k8s.io/utils/clock"
	_ "modernc.org/sqlite" // the driver "sqlite", in pure Go

	_ "github.com/whatsapp-operator/whatsapp-operator/internal/signallog" // before the first connection
)

const (
	// postgresConns is the default size of the pool: a thousand idle sessions use no
	// connection, a login uses one for about 2 ms.
	postgresConns = 16
	// sqliteConns is the default for SQLite: one writer at a time, and readers beside it.
	sqliteConns = 4
	// connIdle is how long an unused connection is kept.
	connIdle = 5 * time.Minute
	// sqliteBusy is how long a writer waits for one in another process.
	sqliteBusy = 10 * time.Second
)

// Config says where the store is.
type Config struct {
	// URL is "postgres://…", "sqlite:PATH", or the path of an SQLite file, which is made
	// if it does not exist. It may hold a password and is in no error and no log.
	URL string
	// MaxConns bounds the connections of this process; 0: 16 for PostgreSQL, 4 for SQLite.
	MaxConns int
	// Clock stamps records and marks; nil: the real one.
	Clock clock.WithTicker
}

// Validate returns everything that is wrong, in the words of the flags. It shows
// nothing of the URL.
func (c Config) Validate() error {
	var errs []error
	if c.MaxConns < 0 {
		errs = append(errs, fmt.Errorf("--store-max-connections is %d: choose 1 or more, or 0 for the default", c.MaxConns))
	}
	if isPostgres(c.URL) {
		if _, err := parsePostgres(c.URL); err != nil {
			errs = append(errs, err)
		}
	} else if _, err := parseSQLite(c.URL); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func isPostgres(url string) bool {
	return strings.HasPrefix(url, "postgres://") || strings.HasPrefix(url, "postgresql://")
}

// Store is the database. Its methods may be called from any goroutine.
type Store struct {
	db        *dbutil.Database
	own       *dbutil.Database // the same database, with our own schema's version
	container *sqlstore.Container
	lids      *lids // in the place of the container's own map, which is never used
	clock     clock.WithTicker
	log       logr.Logger
	// process is a random name of this process: a session that it takes twice has not ended it.
	process string
	// writer is held by the one transaction that writes: SQLite has one writer, and
	// waiting in a queue is fairer and cheaper than SQLite's polling. nil for PostgreSQL.
	writer chan struct{}
	// prekeys is held by those who make or read a device's one-time keys, as many at a time
	// as there are processors: 812 scalar multiplications between two statements. Were they
	// as many as connections on a busy machine, each one's transaction would be idle for so
	// long that PostgreSQL throws it out, and the next login begins it again.
	prekeys chan struct{}
}

// ErrBadURL is a store URL that cannot be used.
var ErrBadURL = errors.New("the URL of the store must be postgres://USER:PASSWORD@HOST/DATABASE, sqlite:PATH or a path (it is not shown, because it may hold a password)")

// Open connects to the database and checks that it answers. It changes
// nothing in it but, for SQLite, that the file exists and has a write-ahead log.
func Open(ctx context.Context, cfg Config, log logr.Logger) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Store{clock: cfg.Clock, log: log, process: rand.Text(), prekeys: make(chan struct{}, runtime.GOMAXPROCS(0))}
	if s.clock == nil {
		s.clock = clock.RealClock{}
	}
	var db *sql.DB
	var dialect string
	var err error
	conns := cfg.MaxConns
	if isPostgres(cfg.URL) {
		dialect = "pgx"
		if conns == 0 {
			conns = postgresConns
		}
		db, err = openPostgres(cfg.URL)
	} else {
		dialect = "sqlite"
		s.writer = make(chan struct{}, 1)
		if conns == 0 {
			conns = sqliteConns
		}
		db, err = openSQLite(ctx, cfg.URL)
	}
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	db.SetConnMaxIdleTime(connIdle)
	if err := db.PingContext(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("the store cannot be reached: %w", err), db.Close())
	}
	if s.db, err = dbutil.NewWithDB(db, dialect); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s.db.UpgradeTable, s.db.VersionTable = whatsmeowSchema, "whatsmeow_version"
	s.own = s.db.Child("whatsapp_operator_version", schema, nil)
	s.container = sqlstore.NewWithWrappedDB(s.db, nil)
	s.lids = newLIDs(s, s.clock)
	return s, nil
}

func openPostgres(dsn string) (*sql.DB, error) {
	cfg, err := parsePostgres(dsn)
	if err != nil {
		return nil, err
	}
	if cfg.RuntimeParams["application_name"] == "" {
		cfg.RuntimeParams["application_name"] = "whatsapp-operator"
	}
	return stdlib.OpenDB(*cfg, stdlib.OptionAfterConnect(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "SET idle_in_transaction_session_timeout = '"+idleTransaction+"'")
		return err
	})), nil
}

func parsePostgres(dsn string) (*pgx.ConnConfig, error) {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		// The error quotes the URL.
		return nil, ErrBadURL
	}
	cfg.DialFunc = dialer(cfg.ConnectTimeout).DialContext
	return cfg, nil
}

// parseSQLite returns the path of the file.
func parseSQLite(dsn string) (string, error) {
	path := strings.TrimPrefix(dsn, "sqlite:")
	if path == "" || strings.HasPrefix(path, "file:") || strings.Contains(path, "://") {
		return "", ErrBadURL
	}
	return path, nil
}

func openSQLite(ctx context.Context, dsn string) (*sql.DB, error) {
	path, err := parseSQLite(dsn)
	if err != nil {
		return nil, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, fmt.Errorf("the path of the store: %w", err)
	}
	// Immediate: a transaction that begins by reading its record must not find, at its
	// first write, that another has written meanwhile.
	name := (&url.URL{Scheme: "file", Path: path, RawQuery: url.Values{
		"_busy_timeout": {fmt.Sprint(sqliteBusy.Milliseconds())},
		"_foreign_keys": {"on"},
		"_txlock":       {"immediate"},
	}.Encode()}).String()
	db, err := sql.Open("sqlite", name)
	if err != nil {
		return nil, fmt.Errorf("opening the SQLite store: %w", err)
	}
	// The mode is a property of the file. Changing it does not wait for other
	// processes, which may be doing the same at this moment.
	ctx, cancel := context.WithTimeout(ctx, sqliteBusy)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		_, err := db.ExecContext(ctx, "PRAGMA journal_mode=WAL")
		if err == nil {
			return db, nil
		}
		if !strings.Contains(err.Error(), "SQLITE_BUSY") {
			return nil, errors.Join(fmt.Errorf("opening the SQLite store: %w", err), db.Close())
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("opening the SQLite store: %w", err), db.Close())
		}
	}
}

// Close closes the connections to the database. Nothing may use the store after it.
func (s *Store) Close() error { return s.db.Close() }

// Ping checks that the database answers.
func (s *Store) Ping(ctx context.Context) error {
	if err := s.db.RawDB.PingContext(ctx); err != nil {
		return fmt.Errorf("the store cannot be reached: %w", err)
	}
	return nil
}

func (s *Store) postgres() bool { return s.db.Dialect == dbutil.Postgres }

func (s *Store) now() int64 { return s.clock.Now().UnixMilli() }

// txn is what a transaction carries in its context.
type txn struct{ after []func() }

type inTransaction struct{}

// transaction runs fn in one transaction, or in the one that ctx carries. A
// panic of fn is an error, so that the transaction ends with it.
func (s *Store) transaction(ctx context.Context, fn func(ctx context.Context) error) error {
	if nested(ctx) {
		return fn(ctx)
	}
	if s.writer != nil {
		select {
		case s.writer <- struct{}{}:
			defer func() { <-s.writer }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	t := &txn{}
	err := s.db.DoTxn(ctx, nil, func(ctx context.Context) (err error) {
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("a panic in a transaction of the store: %v\n%s", r, debug.Stack())
			}
		}()
		return fn(context.WithValue(ctx, inTransaction{}, t))
	})
	if err != nil {
		return err
	}
	for _, after := range t.after {
		after()
	}
	return nil
}

func nested(ctx context.Context) bool { return ctx.Value(inTransaction{}) != nil }

// afterCommit has fn called when the transaction of ctx is committed. It must be
// called by the goroutine that runs the transaction.
func afterCommit(ctx context.Context, fn func()) {
	t := ctx.Value(inTransaction{}).(*txn)
	t.after = append(t.after, fn)
}

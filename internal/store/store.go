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
	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"k8s.io/utils/clock"
	_ "modernc.org/sqlite" // the driver "sqlite", in pure Go

	_ "github.com/whatsapp-operator/whatsapp-operator/internal/signallog" // before the first connection
)

const (
	// postgresConns is the default size of the pool: a thousand idle sessions use no
	// connection, a login uses one for about 2 ms. The pools of fifty workers and two managers
	// then add up to 416 connections (docs/scale.md).
	postgresConns = 8
	// sqliteConns is the default for SQLite: one writer at a time, and readers beside it.
	sqliteConns = 4
)

// Config says where the store is.
type Config struct {
	// URL is "postgres://…", "sqlite:PATH", or the path of an SQLite file, which is made
	// if it does not exist. It may hold a password and is in no error and no log.
	URL string
	// ReadURL returns the current URL for each new connection to PostgreSQL, because the
	// password may change; nil: it is always URL. A URL that names another server or database
	// is not used before the process is restarted.
	ReadURL func() (string, error)
	// UserFile and PasswordFile are files with the user and the password, which are not in the
	// URL then. They are read for each new connection to PostgreSQL.
	UserFile, PasswordFile string
	// MaxConns is the maximum number of connections of this process; 0: 8 for PostgreSQL, 4 for SQLite.
	MaxConns int
	// Clock is the clock for the times of records and marks; nil: the real one.
	Clock clock.WithTicker
}

// Validate returns all errors, with the names of the flags. They do not contain any
// part of the URL.
func (c Config) Validate() error {
	var errs []error
	if c.MaxConns < 0 {
		errs = append(errs, fmt.Errorf("--store-max-connections is %d: choose 1 or more, or 0 for the default", c.MaxConns))
	}
	if isPostgres(c.URL) {
		if _, err := c.parsePostgres(c.URL); err != nil {
			errs = append(errs, err)
		}
	} else if c.UserFile != "" || c.PasswordFile != "" {
		errs = append(errs, errors.New("--store-user-file and --store-password-file are for PostgreSQL: leave them out"))
	} else if _, err := parseSQLite(c.URL); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Connections is the maximum number of connections of this process to PostgreSQL; 0: the
// store is SQLite.
func (c Config) Connections() int {
	switch {
	case !isPostgres(c.URL):
		return 0
	case c.MaxConns == 0:
		return postgresConns
	default:
		return c.MaxConns
	}
}

func isPostgres(url string) bool {
	return strings.HasPrefix(url, "postgres://") || strings.HasPrefix(url, "postgresql://")
}

// Store is the database. Its methods may be called from any goroutine.
type Store struct {
	db        *dbutil.Database
	own       *dbutil.Database // the same database, with our own schema's version
	container *sqlstore.Container
	lids      *lids // replaces the container's map, which is never used
	clock     clock.WithTicker
	log       logr.Logger
	// process is a random name of this process: a session that it takes twice has not ended
	// this process.
	process string
	// postgres makes the connections; nil for SQLite.
	postgres *postgresConnector
	// writer is held by the one transaction that writes: SQLite has one writer, and
	// waiting in a queue is fairer and cheaper than SQLite's polling. nil for PostgreSQL.
	writer chan struct{}
	// prekeys is a semaphore with one slot for each processor, held while a device's one-time
	// keys are made or read: 812 scalar multiplications between two statements. With one for
	// each connection on a busy machine, each transaction would be idle for so long that
	// PostgreSQL ends it, and the next login starts it again.
	prekeys chan struct{}
	// settlements groups the takings that are settled at the same time.
	settlements settlements
}

// ErrBadURL is a store URL that cannot be used.
var ErrBadURL = errors.New("the URL of the store must be postgres://USER:PASSWORD@HOST/DATABASE, sqlite:PATH or a path (it is not shown, because it may hold a password)")

// Open prepares the connections to the database, which may not answer yet: see
// [Store.Ping]. It does not change the database, except that it creates the file of
// SQLite with a write-ahead log.
func Open(ctx context.Context, cfg Config, log logr.Logger) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Store{clock: cfg.Clock, log: log, process: rand.Text(), prekeys: make(chan struct{}, runtime.GOMAXPROCS(0)), settlements: settlements{turn: make(chan struct{}, 1)}}
	if s.clock == nil {
		s.clock = clock.RealClock{}
	}
	var db *sql.DB
	var dialect string
	var err error
	conns := cfg.MaxConns
	if isPostgres(cfg.URL) {
		dialect = "pgx"
		conns = cfg.Connections()
		if s.postgres, err = newPostgresConnector(cfg, log); err != nil {
			return nil, err
		}
		db = sql.OpenDB(s.postgres)
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
	db.SetConnMaxIdleTime(connIdleTimeout)
	if s.postgres != nil {
		db.SetConnMaxLifetime(connLifetime)
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
	// Immediate: a transaction that first reads its record must not fail at its first
	// write because another transaction has written meanwhile.
	name := (&url.URL{Scheme: "file", Path: path, RawQuery: url.Values{
		"_busy_timeout": {fmt.Sprint(sqliteBusyTimeout.Milliseconds())},
		"_foreign_keys": {"on"},
		"_txlock":       {"immediate"},
	}.Encode()}).String()
	db, err := sql.Open("sqlite", name)
	if err != nil {
		return nil, fmt.Errorf("opening the SQLite store: %w", err)
	}
	// The mode is a property of the file. Changing it does not wait for other
	// processes, which may be doing the same at this moment.
	ctx, cancel := context.WithTimeout(ctx, sqliteBusyTimeout)
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

// Close closes the connections to the database. The store must not be used after it.
func (s *Store) Close() error { return s.db.Close() }

// Ping checks that the database answers.
func (s *Store) Ping(ctx context.Context) error {
	if err := s.db.RawDB.PingContext(ctx); err != nil {
		return fmt.Errorf("the store cannot be reached: %w", err)
	}
	return nil
}

// Probe checks that the database answers and also takes a write. If a standby must
// confirm each commit and is lost (synchronous_standby_names), every read is answered and
// every commit waits for ever.
func (s *Store) Probe(ctx context.Context) error {
	if s.postgres == nil {
		return s.Ping(ctx)
	}
	// The row exists: only an installation that has claimed the store has sessions in it.
	err := s.exec(ctx, "UPDATE whatsapp_operator_installation SET id=id WHERE one=1")
	switch {
	case isEmptied(err):
		return fmt.Errorf("the database has no tables of this operator any more: restore them from a backup, or restart the manager to begin with an empty database: %w", err)
	case err != nil:
		return fmt.Errorf("the store takes no write: %w", err)
	}
	return nil
}

func (s *Store) now() int64 { return s.clock.Now().UnixMilli() }

// txn is the state of a transaction, stored in its context.
type txn struct{ after []func() }

type inTransaction struct{}

// transaction runs fn in one transaction, or in that of ctx. A panic of fn
// becomes an error, so that the transaction ends.
func (s *Store) transaction(ctx context.Context, fn func(ctx context.Context) error) error {
	return s.transactionWithin(ctx, answerTimeout, fn)
}

func (s *Store) transactionWithin(ctx context.Context, timeout time.Duration, fn func(ctx context.Context) error) error {
	if nested(ctx) {
		return fn(ctx)
	}
	ctx, cancel := within(ctx, timeout)
	defer cancel()
	if s.writer != nil {
		select {
		case s.writer <- struct{}{}:
			defer func() { <-s.writer }()
		case <-ctx.Done():
			return late(ctx, ctx.Err())
		}
	}
	t := &txn{}
	err := s.db.DoTxn(ctx, nil, func(ctx context.Context) (err error) {
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("a panic in a transaction of the store: %v\n%s", r, debug.Stack())
			}
		}()
		if s.postgres != nil {
			if err := s.postgres.begin(ctx, func(ctx context.Context, query string) error {
				_, err := s.db.Exec(ctx, query)
				return err
			}); err != nil {
				return err
			}
		}
		return fn(context.WithValue(ctx, inTransaction{}, t))
	})
	if err != nil {
		return late(ctx, err)
	}
	for _, after := range t.after {
		after()
	}
	return nil
}

// ErrNoAnswer: the database has not answered in time.
var ErrNoAnswer = errors.New("the database did not answer in time")

// within sets the time-out of calls of the database.
func within(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, timeout, ErrNoAnswer)
}

// late returns an ErrNoAnswer if the time-out of within has passed. It hides the error of
// the context, which would be mistaken for the end of the caller's context.
func late(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); errors.Is(cause, ErrNoAnswer) {
		return fmt.Errorf("%w (%s)", cause, err.Error())
	}
	return err
}

func nested(ctx context.Context) bool { return ctx.Value(inTransaction{}) != nil }

// afterCommit calls fn when the transaction of ctx is committed. It must be
// called by the goroutine that runs the transaction.
func afterCommit(ctx context.Context, fn func()) {
	t := ctx.Value(inTransaction{}).(*txn)
	t.after = append(t.after, fn)
}

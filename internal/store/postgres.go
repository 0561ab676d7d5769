package store

import (
	"context"
	"crypto/x509"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/go-logr/logr"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

// ErrReadOnly: the server takes no writes. It is a standby, or a primary that was
// set to read only.
var ErrReadOnly = errors.New("the database server takes no writes: the address names a standby, or the server is set to read only")

// postgresConnector makes the connections to PostgreSQL.
//
// Each connection is to a server that takes writes. When a server reports that it takes
// none, or ends a connection, the other connections of the pool, which lead to the
// same server, are not used again either: otherwise each of them would fail once after
// a fail-over.
//
// A pooler such as PgBouncer may run each transaction on another server
// connection. Then statements have no names, and settings last for one
// transaction only.
type postgresConnector struct {
	log logr.Logger
	// cfg says how to read the URL, the user and the password again.
	cfg Config
	// pooled: there is a pooler between this process and the server.
	pooled atomic.Bool
	// generation counts how often all connections were discarded; those of an earlier
	// generation are not used again.
	generation atomic.Int64

	mu     sync.Mutex
	url    string
	config *pgx.ConnConfig
	// problem is the last problem with the URL that was logged.
	problem string
}

func newPostgresConnector(cfg Config, log logr.Logger) (*postgresConnector, error) {
	config, err := cfg.parsePostgres(cfg.URL)
	if err != nil {
		return nil, err
	}
	return &postgresConnector{log: log, cfg: cfg, url: cfg.URL, config: config}, nil
}

// parsePostgres returns how to connect to the database of a URL, as the user and with the
// password of the files that are named.
func (c Config) parsePostgres(dsn string) (*pgx.ConnConfig, error) {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		if problem := checkTLSFiles(dsn); problem != nil {
			return nil, problem
		}
		// The error quotes the URL.
		return nil, ErrBadURL
	}
	if c.PasswordFile != "" && passwordInURL(dsn) {
		return nil, errors.New("the URL of the store holds a password, and --store-password-file is given as well: keep one")
	}
	for _, f := range []struct {
		flag, path string
		value      *string
	}{{"--store-user-file", c.UserFile, &cfg.User}, {"--store-password-file", c.PasswordFile, &cfg.Password}} {
		if f.path == "" {
			continue
		}
		if *f.value, err = readLine(f.path); err != nil {
			return nil, fmt.Errorf("%s: %w", f.flag, err)
		}
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = connectTimeout
	}
	cfg.DialFunc = dialer(cfg.ConnectTimeout).DialContext
	cfg.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	if cfg.RuntimeParams["application_name"] == "" {
		cfg.RuntimeParams["application_name"] = "whatsapp-operator"
	}
	return cfg, nil
}

// checkTLSFiles says what is wrong with the files that the parameters of a URL name, which the
// library reads when it parses the URL.
func checkTLSFiles(dsn string) error {
	_, query, _ := strings.Cut(dsn, "?")
	parameters, err := url.ParseQuery(query)
	if err != nil {
		return nil //nolint:nilerr // then the URL is what is wrong
	}
	for _, name := range []string{"sslrootcert", "sslcert", "sslkey"} {
		path := parameters.Get(name)
		if path == "" || path == "system" {
			continue
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%s in the URL of the store: %w", name, err)
		}
		if name == "sslrootcert" && !x509.NewCertPool().AppendCertsFromPEM(content) {
			return fmt.Errorf("%s in the URL of the store: the file %s holds no certificate in PEM", name, path)
		}
	}
	return nil
}

// passwordInURL reports whether a URL that can be parsed holds a password. The library's
// result does not tell: it may have found one in the variable PGPASSWORD.
func passwordInURL(dsn string) bool {
	u, err := url.Parse(dsn)
	if err != nil {
		return false
	}
	_, has := u.User.Password()
	return has || u.Query().Has("password")
}

// readLine reads a file without the line end that editors put there.
func readLine(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	line := strings.TrimRight(string(content), "\r\n")
	if line == "" {
		return "", fmt.Errorf("the file %s is empty", path)
	}
	return line, nil
}

// Driver implements driver.Connector.
func (c *postgresConnector) Driver() driver.Driver { return stdlib.GetDefaultDriver() }

// errPooled: the connection would use named statements, and has detected a pooler.
var errPooled = errors.New("there is a pooler between here and the database")

// Connect implements driver.Connector.
func (c *postgresConnector) Connect(ctx context.Context) (driver.Conn, error) {
	config := c.current()
	conn, err := c.connect(ctx, config)
	if errors.Is(err, errPooled) {
		conn, err = c.connect(ctx, config)
	}
	if errors.Is(err, pgconn.ErrReadOnlyConnection) {
		err = fmt.Errorf("%w (%w)", ErrReadOnly, err)
	}
	return conn, err
}

func (c *postgresConnector) connect(ctx context.Context, config *pgx.ConnConfig) (driver.Conn, error) {
	config = config.Copy()
	generation := c.generation.Load()
	byDefault := config.OnPgError
	config.OnPgError = func(conn *pgconn.PgConn, err *pgconn.PgError) bool {
		if leadsElsewhere(err.Code) {
			c.generation.CompareAndSwap(generation, generation+1)
			return false
		}
		return byDefault(conn, err) && !broken(err.Code)
	}
	named := config.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement
	if named && c.pooled.Load() {
		config.DefaultQueryExecMode, named = pgx.QueryExecModeCacheDescribe, false
	}
	return stdlib.GetConnector(*config,
		stdlib.OptionAfterConnect(func(ctx context.Context, conn *pgx.Conn) error {
			err := c.prepare(ctx, conn)
			if err == nil && named && c.pooled.Load() {
				err = errPooled
			}
			if err != nil {
				return errors.Join(err, conn.Close(ctx))
			}
			return nil
		}),
		stdlib.OptionResetSession(func(context.Context, *pgx.Conn) error {
			if c.generation.Load() != generation {
				return driver.ErrBadConn
			}
			return nil
		}),
	).Connect(ctx)
}

// prepare detects a pooler: the server process of the connection is then not the one
// that was named when the connection was made. Without a pooler it sets the time-out of
// the connection's transactions once.
func (c *postgresConnector) prepare(ctx context.Context, conn *pgx.Conn) error {
	result, err := conn.PgConn().Exec(ctx, fmt.Sprintf(
		"SELECT CASE WHEN pg_backend_pid()=%d THEN set_config('idle_in_transaction_session_timeout', '%d', false) END",
		conn.PgConn().PID(), idleTimeout.Milliseconds())).ReadAll()
	if err != nil {
		return err
	}
	direct := len(result) == 1 && len(result[0].Rows) == 1 && result[0].Rows[0][0] != nil
	if !direct && !c.pooled.Swap(true) {
		c.log.Info("Found a connection pooler before the database, so statements are not given names")
	}
	return nil
}

// begin runs at the beginning of every transaction.
func (c *postgresConnector) begin(ctx context.Context, exec func(ctx context.Context, query string) error) error {
	if !c.pooled.Load() {
		return nil
	}
	return exec(ctx, fmt.Sprintf("SET LOCAL idle_in_transaction_session_timeout=%d", idleTimeout.Milliseconds()))
}

// leadsElsewhere: the server does not take writes any more, or ends all its
// connections.
func leadsElsewhere(code string) bool {
	switch code {
	case "25006", // read_only_sql_transaction: a standby
		"57P01", // admin_shutdown
		"57P02", // crash_shutdown
		"57P03": // cannot_connect_now
		return true
	}
	return false
}

// broken: the connection is useless, although the error may not be fatal.
func broken(code string) bool {
	switch code {
	case "26000", // invalid_sql_statement_name: a pooler that was put in between has another server connection
		"42P05", // duplicate_prepared_statement: likewise
		"25P03", // idle_in_transaction_session_timeout
		"25P04": // transaction_timeout
		return true
	}
	// Connection exceptions, operator interventions except a cancelled query, errors of
	// the system and of PostgreSQL itself.
	return code != "57014" && slices.ContainsFunc([]string{"08", "57", "58", "XX"}, func(class string) bool {
		return strings.HasPrefix(code, class)
	})
}

// current returns the configuration of a new connection. The URL is read again for each
// connection, and so are user, password and the files that the URL names; if one of them is
// unusable, the previous ones are used.
func (c *postgresConnector) current() *pgx.ConnConfig {
	c.mu.Lock()
	defer c.mu.Unlock()
	dsn, err := c.url, error(nil)
	if c.cfg.ReadURL != nil {
		dsn, err = c.cfg.ReadURL()
	}
	var config *pgx.ConnConfig
	if err == nil {
		config, err = c.cfg.parsePostgres(dsn)
	}
	if err == nil && !sameDatabase(c.config, config) {
		err = errors.New("the URL of the store names another server or database now: restart this process to use it")
	}
	if err != nil {
		if c.problem != err.Error() {
			c.problem = err.Error()
			c.log.Error(err, "Failed to read the URL, the user or the password of the store again, the former one is used")
		}
		return c.config
	}
	if dsn != c.url || config.User != c.config.User || config.Password != c.config.Password {
		c.log.Info("Read the URL, the user or the password of the store again, new connections use it")
	}
	c.url, c.config, c.problem = dsn, config, ""
	return config
}

// sameDatabase: both lead to the same tables. A process that had connections to
// two databases would let two workers take one session.
func sameDatabase(a, b *pgx.ConnConfig) bool {
	hosts := func(c *pgx.ConnConfig) []string {
		hosts := []string{fmt.Sprint(c.Host, " ", c.Port)}
		for _, f := range c.Fallbacks {
			hosts = append(hosts, fmt.Sprint(f.Host, " ", f.Port))
		}
		slices.Sort(hosts)
		return slices.Compact(hosts)
	}
	return a.Database == b.Database && slices.Equal(hosts(a), hosts(b)) && maps.Equal(a.RuntimeParams, b.RuntimeParams)
}

// ConnectionLimit returns how many connections the server accepts from this store's user at
// most: max_connections without what is reserved, and the limits of the role and of the
// database. 0: there is no limit that can be read, because the store is SQLite or there is a
// pooler before the server.
func (s *Store) ConnectionLimit(ctx context.Context) (limit int, err error) {
	if s.postgres == nil || s.postgres.pooled.Load() {
		return 0, nil
	}
	var role, database int // -1: no limit
	err = s.db.QueryRow(ctx, `SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
			- COALESCE(NULLIF(current_setting('reserved_connections', true), '')::int, 0),
		COALESCE((SELECT rolconnlimit FROM pg_roles WHERE rolname=current_user), -1),
		COALESCE((SELECT datconnlimit FROM pg_database WHERE datname=current_database()), -1)`).Scan(&limit, &role, &database)
	if err != nil {
		return 0, fmt.Errorf("reading how many connections the database accepts: %w", err)
	}
	for _, other := range []int{role, database} {
		if other >= 0 {
			limit = min(limit, other)
		}
	}
	return limit, nil
}

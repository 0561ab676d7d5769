package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// An address can name a standby for a moment during a fail-over. The pool must not keep
// connections to the standby.
func TestAnAddressThatTemporarilyNamesAStandby(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	primary, standby := testenv.PostgresServer(t), testenv.PostgresServer(t)
	standby.RestartAsStandby()
	proxy := testenv.NewTCPProxy(t, primary.Addr())
	s := open(t, primary.URLVia(proxy.Addr()))
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
	g.Expect(err).NotTo(HaveOccurred())

	proxy.Cut()
	proxy.Redirect(standby.Addr())
	proxy.Restore()
	g.Eventually(func() error { return s.Ping(ctx) }, "10s").Should(MatchError(ErrReadOnly))
	_, err = s.Take(ctx, "u", 1)
	g.Expect(err).To(MatchError(ErrReadOnly))

	proxy.Redirect(primary.Addr())
	for epoch := range int64(45) {
		_, err := s.Take(ctx, "u", 1+epoch)
		g.Expect(err).NotTo(HaveOccurred())
	}
}

// A primary becomes a standby, or ends, while the pool has connections to it: after the
// first error none of them is used again.
func TestConnectionsToAReadOnlyServerAreDiscarded(t *testing.T) {
	for name, query := range map[string]string{
		"it takes no more writes": "SET default_transaction_read_only=on",
		"it ends":                 "",
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			url := testenv.Postgres(t)
			s, other := open(t, url), open(t, url)
			g.Expect(s.Migrate(ctx)).To(Succeed())
			_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
			g.Expect(err).NotTo(HaveOccurred())
			var conns []*sql.Conn
			var pids []int
			for range 5 {
				conn, err := s.db.RawDB.Conn(ctx)
				g.Expect(err).NotTo(HaveOccurred())
				var pid int
				g.Expect(conn.QueryRowContext(ctx, "SELECT pg_backend_pid()").Scan(&pid)).To(Succeed())
				_, err = conn.ExecContext(ctx, query)
				g.Expect(err).NotTo(HaveOccurred())
				conns, pids = append(conns, conn), append(pids, pid)
			}
			for _, conn := range conns {
				g.Expect(conn.Close()).To(Succeed(), "back to the pool")
			}
			if query == "" {
				for _, pid := range pids {
					g.Expect(other.exec(ctx, "SELECT pg_terminate_backend($1, 10000)", pid)).To(Succeed())
				}
			}
			failed := 0
			for range 45 {
				if _, err := s.Take(ctx, "u", 1); err != nil {
					failed++
					t.Log(err)
				}
			}
			g.Expect(failed).To(BeNumerically("<=", 1))
		})
	}
}

func TestErrorsThatEndAConnection(t *testing.T) {
	for _, tt := range []struct {
		code              string
		elsewhere, broken bool
	}{
		{code: "25006", elsewhere: true},
		{code: "57P01", elsewhere: true, broken: true},
		{code: "57P02", elsewhere: true, broken: true},
		{code: "57P03", elsewhere: true, broken: true},
		{code: "57P05", broken: true},
		{code: "57014"}, // the query was cancelled
		{code: "25P03", broken: true},
		{code: "25P04", broken: true},
		{code: "25P02"}, // only the transaction has failed
		{code: "26000", broken: true},
		{code: "42P05", broken: true},
		{code: "08006", broken: true},
		{code: "58030", broken: true},
		{code: "XX000", broken: true},
		{code: "23505"}, // a rule of the table
		{code: "40P01"}, // a deadlock
		{code: "53100"}, // the disk is full
	} {
		t.Run(tt.code, func(t *testing.T) {
			g := NewWithT(t)
			g.Expect(leadsElsewhere(tt.code)).To(Equal(tt.elsewhere))
			g.Expect(broken(tt.code)).To(Equal(tt.broken))
		})
	}
}

func TestAPoolerIsDetected(t *testing.T) {
	for kind, pooled := range map[string]bool{"PostgreSQL": false, "PgBouncer": true} {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			s := open(t, kinds[kind](t))
			g.Expect(s.Ping(ctx)).To(Succeed())
			g.Expect(s.postgres.pooled.Load()).To(Equal(pooled))
			// Behind a pooler a session's setting would apply to connections of others.
			var idle string
			g.Expect(s.db.QueryRow(ctx, "SELECT current_setting('idle_in_transaction_session_timeout')").Scan(&idle)).To(Succeed())
			if pooled {
				g.Expect(idle).To(Equal("0"))
			} else {
				g.Expect(idle).To(Equal("5s"))
			}
			var prepared int
			g.Expect(s.db.QueryRow(ctx, "SELECT COUNT(*) FROM pg_prepared_statements WHERE $1", true).Scan(&prepared)).To(Succeed())
			g.Expect(prepared > 0).To(Equal(!pooled), "%d statements have names", prepared)
		})
	}
}

// A changed password is used for new connections; no connection is closed.
func TestTheURLIsReadAgain(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	first := testenv.Postgres(t)
	second := strings.Replace(first, "postgres@", "second:hunter2@", 1)
	var mu sync.Mutex
	current, fails := first, error(nil)
	var lines []string
	s, err := Open(ctx, Config{
		URL: first, MaxConns: 2,
		ReadURL: func() (string, error) {
			mu.Lock()
			defer mu.Unlock()
			return current, fails
		},
	}, funcr.New(func(_, args string) { lines = append(lines, args) }, funcr.Options{}))
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(s.Close()).To(Succeed()) }()
	_, err = s.db.Exec(ctx, "DROP ROLE IF EXISTS second")
	g.Expect(err).NotTo(HaveOccurred())
	_, err = s.db.Exec(ctx, "CREATE ROLE second LOGIN")
	g.Expect(err).NotTo(HaveOccurred())
	defer func() {
		_, err := s.db.Exec(context.Background(), "DROP ROLE second")
		g.Expect(err).NotTo(HaveOccurred())
	}()
	old, err := s.db.RawDB.Conn(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	user := func(conn interface {
		QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	}) (name string) {
		g.ExpectWithOffset(1, conn.QueryRowContext(ctx, "SELECT current_user").Scan(&name)).To(Succeed())
		return name
	}
	// asNew runs a query on a connection that is not used again.
	asNew := func() string {
		s.db.RawDB.SetMaxIdleConns(0)
		return user(s.db.RawDB)
	}
	g.Expect(asNew()).To(Equal("postgres"))

	change := func(url string, err error) {
		mu.Lock()
		defer mu.Unlock()
		current, fails = url, err
	}
	change(second, nil)
	g.Expect(asNew()).To(Equal("second"))
	change("", errors.New("the file is being replaced"))
	g.Expect(asNew()).To(Equal("second"), "the last one that could be read")
	change("postgres://hunter2:port/x", nil)
	g.Expect(asNew()).To(Equal("second"))
	change(strings.Replace(first, "/test_", "/other_", 1), nil)
	g.Expect(asNew()).To(Equal("second"), "another database may have the same sessions")
	g.Expect(asNew()).To(Equal("second"))
	change(first, nil)
	g.Expect(asNew()).To(Equal("postgres"))

	g.Expect(user(old)).To(Equal("postgres"), "a connection that is there stays")
	g.Expect(old.Close()).To(Succeed())
	g.Expect(lines).To(HaveLen(5), "each problem is said once: %v", lines)
	for _, line := range lines {
		g.Expect(line).NotTo(ContainSubstring("hunter2"))
	}
}

// User and password are files of a mounted Secret: a rotation of both is used for new
// connections, and no connection is closed for it.
func TestUserAndPasswordAreReadFromFilesAgain(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	server := testenv.PostgresServer(t)
	server.RequirePasswords(map[string]string{"first": "hunter2", "second": "hunter3 /@:%"})
	dir := t.TempDir()
	userFile, passwordFile := filepath.Join(dir, "user"), filepath.Join(dir, "password")
	write := func(user, password string) {
		g.Expect(os.WriteFile(userFile, []byte(user+"\n"), 0o600)).To(Succeed())
		g.Expect(os.WriteFile(passwordFile, []byte(password+"\n"), 0o600)).To(Succeed())
	}
	url := strings.Replace(server.URL(), "postgres@", "", 1)
	write("first", "hunter9")
	config := Config{URL: url, UserFile: userFile, PasswordFile: passwordFile, MaxConns: 2}
	s, err := Open(ctx, config, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(s.Close()).To(Succeed()) }()
	err = s.Ping(ctx)
	g.Expect(err).To(MatchError(ContainSubstring("password authentication failed")))
	g.Expect(IsUnreachable(err)).To(BeTrue())
	g.Expect(err.Error()).NotTo(ContainSubstring("hunter"))

	write("first", "hunter2")
	g.Expect(s.Ping(ctx)).To(Succeed())
	old, err := s.db.RawDB.Conn(ctx)
	g.Expect(err).NotTo(HaveOccurred())
	user := func(conn interface {
		QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	}) (name string) {
		g.ExpectWithOffset(1, conn.QueryRowContext(ctx, "SELECT current_user").Scan(&name)).To(Succeed())
		return name
	}
	g.Expect(user(old)).To(Equal("first"))
	write("second", "hunter3 /@:%")
	s.db.RawDB.SetMaxIdleConns(0)
	g.Expect(user(s.db.RawDB)).To(Equal("second"))
	g.Expect(user(old)).To(Equal("first"), "a connection that is there stays")
	g.Expect(old.Close()).To(Succeed())
	g.Expect(os.Remove(passwordFile)).To(Succeed())
	g.Expect(user(s.db.RawDB)).To(Equal("second"), "the last one that could be read")

	g.Expect(config.Validate()).To(MatchError(ContainSubstring("--store-password-file")))
	write("", "x")
	g.Expect(config.Validate()).To(MatchError(And(ContainSubstring("--store-user-file"), ContainSubstring("empty"))))
	write("first", "hunter2")
	g.Expect(config.Validate()).To(Succeed())
	config.URL = strings.Replace(server.URL(), "postgres@", "postgres:hunter2@", 1)
	g.Expect(config.Validate()).To(MatchError(ContainSubstring("keep one")))
	config.URL = "sqlite:x.db"
	g.Expect(config.Validate()).To(MatchError(ContainSubstring("are for PostgreSQL")))
}

func TestTheConnectionLimitOfTheDatabase(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	limit := func(s *Store) int {
		n, err := s.ConnectionLimit(ctx)
		g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
		return n
	}
	server := testenv.PostgresServer(t, "-c", "max_connections=50", "-c", "superuser_reserved_connections=5")
	s := open(t, server.URL())
	g.Expect(limit(s)).To(Equal(45))
	for query, want := range map[string]int{
		"ALTER DATABASE postgres CONNECTION LIMIT 30": 30,
		"ALTER ROLE postgres CONNECTION LIMIT 20":     20,
	} {
		_, err := s.db.Exec(ctx, query)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(limit(s)).To(BeNumerically("<=", want))
	}
	g.Expect(limit(s)).To(Equal(20), "the lowest counts")

	pooled := open(t, testenv.PgBouncer(t))
	g.Expect(pooled.Ping(ctx)).To(Succeed())
	g.Expect(limit(pooled)).To(BeZero(), "the pooler's clients are not the server's connections")
	g.Expect(limit(open(t, kinds["SQLite"](t)))).To(BeZero())
}

// A process that is stopped in the middle of a taking delays its successor only for a few
// seconds, also where nothing can be set for a connection.
func TestAStoppedTakingBehindAPooler(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	url := testenv.PgBouncer(t)
	s, stopped := open(t, url), open(t, url)
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
	g.Expect(err).NotTo(HaveOccurred())
	inside, proceed, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		done <- stopped.transaction(ctx, func(ctx context.Context) error {
			_, err := stopped.db.Exec(ctx, "UPDATE whatsapp_operator_session SET epoch=1, starts=starts+1 WHERE uid='u'")
			close(inside)
			<-proceed
			return err
		})
	}()
	<-inside
	taking, err := s.Take(ctx, "u", 2)
	close(proceed)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(taking.Starts()).To(BeEquivalentTo(1), "the other's never was")
	g.Eventually(done).Should(Receive(HaveOccurred()))
}

// The server accepts connections and does not answer, or a proxy has lost its server:
// nothing waits forever, and the error does not count as the caller's cancellation.
func TestAServerThatDoesNotAnswer(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	server := testenv.PostgresServer(t)
	proxy := testenv.NewTCPProxy(t, server.Addr())
	s := open(t, server.URLVia(proxy.Addr()))
	g.Expect(s.Migrate(ctx)).To(Succeed())
	g.Expect(s.Ping(ctx)).To(Succeed())
	proxy.Hang()
	err := s.transactionWithin(ctx, 100*time.Millisecond, func(ctx context.Context) error {
		_, err := s.db.Exec(ctx, "SELECT 1")
		return err
	})
	g.Expect(err).To(MatchError(ErrNoAnswer))
	g.Expect(errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)).To(BeFalse())
	proxy.Restore()
	g.Eventually(func() error { return s.Ping(ctx) }, "10s").Should(Succeed())
}

// When the standby that must confirm each commit is lost, the database answers every read
// and no commit ends. The reconcilers must not wait for that one after another.
func TestAServerWhoseCommitsHang(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	s := open(t, testenv.PostgresServer(t).URL())
	g.Expect(s.Migrate(ctx)).To(Succeed())
	g.Expect(s.SetInstallation(ctx, "c/n/r")).To(Succeed())
	standby := func(name string) {
		for _, query := range []string{"ALTER SYSTEM SET synchronous_standby_names='" + name + "'", "SELECT pg_reload_conf()"} {
			_, err := s.db.RawDB.ExecContext(ctx, query)
			g.Expect(err).NotTo(HaveOccurred())
		}
	}
	gate := &Gate{Ping: s.Probe, Log: logr.Discard()}
	ended := make(chan struct{})
	running, stop := context.WithCancel(ctx)
	go func() { defer close(ended); gate.Run(running) }()
	defer func() { stop(); <-ended }()
	gate.Open()
	claim := func(id string) error {
		return gate.Do(ctx, func(ctx context.Context) error {
			_, err := s.Claim(ctx, Claimant{SessionID: id, Namespace: "a", UID: "uid-" + id}, never)
			return err
		})
	}
	g.Expect(claim("before")).To(Succeed())

	standby("lost")
	n := 0
	g.Eventually(func() error { n++; return claim(fmt.Sprint("lost-", n)) }, "30s").Should(MatchError(ErrAway))
	g.Expect(s.Ping(ctx)).To(Succeed(), "it answers reads")
	g.Expect(claim("refused")).To(MatchError(ErrAway))

	standby("")
	g.Eventually(func() error { return claim("after") }, "30s").Should(Succeed())
}

// A worker whose database user lost its rights, as after a restore without privileges, cannot
// take any session: that is a failure of the worker, not of one session.
func TestAUserWithoutRights(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	server := testenv.PostgresServer(t)
	owner := open(t, server.URL())
	g.Expect(owner.Migrate(ctx)).To(Succeed())
	_, err := owner.Claim(ctx, Claimant{SessionID: "s", Namespace: "a", UID: "u"}, never)
	g.Expect(err).NotTo(HaveOccurred())
	_, err = owner.db.RawDB.ExecContext(ctx, "CREATE ROLE worker LOGIN")
	g.Expect(err).NotTo(HaveOccurred())
	_, err = open(t, strings.Replace(server.URL(), "postgres@", "worker@", 1)).Take(ctx, "u", 1)
	g.Expect(err).To(MatchError(ContainSubstring("permission denied")))
	g.Expect(IsUnreachable(err)).To(BeTrue())
}

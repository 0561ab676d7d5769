package redis

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
	"k8s.io/client-go/util/cert"
)

// Mode is how the servers are arranged.
type Mode string

const (
	// Standalone is one server, or one address behind which a provider changes the server.
	Standalone Mode = "standalone"
	// Sentinel is a master that Sentinels name; the addresses are theirs.
	Sentinel Mode = "sentinel"
	// Cluster is Redis Cluster; the addresses are of some of its nodes.
	Cluster Mode = "cluster"
)

const (
	defaultDialTimeout = 5 * time.Second
	// connectionBuffer and pipelineBuffer are in bytes, each for reading and for writing.
	connectionBuffer = 8 << 10
	pipelineBuffer   = 32 << 10
	// defaultReadTimeout leaves room for both waits of Durability.
	defaultReadTimeout  = 5 * time.Second
	minReadTimeout      = replicaWait + fsyncWait + time.Second
	defaultWriteTimeout = 3 * time.Second
	maxPrefix           = 64
	// connectionLifetime bounds how long a process stays with a server that the address does
	// not name any more. It varies by connectionLifetimeJitter, so that not all connections
	// end at once.
	connectionLifetime       = 5 * time.Minute
	connectionLifetimeJitter = time.Minute
)

// prefixPattern keeps a prefix out of the way of hash tags (braces) and of the
// patterns of ACL rules (*, ?, [).
var prefixPattern = regexp.MustCompile(`^[A-Za-z0-9:._/-]*$`)

// Config says how to reach Redis and what it must offer.
type Config struct {
	// Addresses are host:port; one for Standalone.
	Addresses []string
	// Mode; empty means Standalone.
	Mode Mode
	// MasterName is what the Sentinels call the master.
	MasterName string
	// DB is the number of the database; Cluster has only 0.
	DB int
	// Username of the ACL user; empty means the default user.
	Username string
	// PasswordFile holds the password. It is read for every new connection, so
	// a changed password needs no restart.
	PasswordFile string
	// SentinelUsername and SentinelPasswordFile are for the Sentinels
	// themselves; the file is read at the start only.
	SentinelUsername, SentinelPasswordFile string
	// TLS encrypts the connections and checks the server's certificate.
	TLS bool
	// CAFile is a PEM file with the authorities to trust instead of the
	// system's. It is read for every new connection.
	CAFile string
	// KeyPrefix is the prefix of every key and channel.
	KeyPrefix string
	// AllowVolatile accepts a Redis that evicts or does not persist.
	AllowVolatile bool
	// Durability says when a write counts as in Redis; empty means DurabilityAuto.
	Durability DurabilityMode
	// DialTimeout, ReadTimeout and WriteTimeout bound a connection's set-up and
	// each read and write; zero means 5 s, 5 s and 3 s.
	DialTimeout, ReadTimeout, WriteTimeout time.Duration
	// PoolSize bounds the connections to a node; zero means 10 per CPU.
	PoolSize int
	// OnRefusal, where set, is called for each command that Redis refuses. It must not block.
	OnRefusal func(Refusal)
}

// Keys are the key names under the configured prefix.
func (c Config) Keys() Keys { return NewKeys(c.KeyPrefix) }

// mode is Mode with its default.
func (c Config) mode() Mode {
	if c.Mode == "" {
		return Standalone
	}
	return c.Mode
}

// Validate returns everything that is wrong, each as a sentence that says what
// to change, joined in one error. It reads the files that are named, but never
// repeats what is in them.
func (c Config) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if len(c.Addresses) == 0 {
		wrong("no address of Redis is given: name at least one host:port")
	}
	for _, address := range c.Addresses {
		host, port, err := net.SplitHostPort(address)
		if n, numErr := strconv.Atoi(port); err != nil || host == "" || numErr != nil || n < 1 || n > 65535 {
			// An address that is a URL may carry a password: it is not repeated.
			wrong("an address of Redis is not host:port: give the host and the port only, the rest has its own options")
		}
	}
	switch c.mode() {
	case Standalone:
		if len(c.Addresses) > 1 {
			wrong("mode standalone has one address, %d are given: name one, or choose mode sentinel or cluster", len(c.Addresses))
		}
	case Sentinel:
		if c.MasterName == "" {
			wrong("mode sentinel needs the name by which the Sentinels know the master")
		}
	case Cluster:
		if c.DB != 0 {
			wrong("Redis Cluster has only database 0, %d is given", c.DB)
		}
	default:
		wrong("mode %q of Redis is unknown: use standalone, sentinel or cluster", c.Mode)
	}
	if c.MasterName != "" && c.mode() != Sentinel {
		wrong("a master name is given, but the mode is %s: use mode sentinel", c.mode())
	}
	if (c.SentinelUsername != "" || c.SentinelPasswordFile != "") && c.mode() != Sentinel {
		wrong("credentials for Sentinels are given, but the mode is %s", c.mode())
	}
	if c.DB < 0 {
		wrong("the number of the Redis database is negative")
	}
	if c.Username != "" && c.PasswordFile == "" {
		wrong("a Redis user is given without a password file: give it with --redis-password-file")
	}
	for _, file := range []string{c.PasswordFile, c.SentinelPasswordFile} {
		if file != "" {
			if _, err := readSecret(file); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if c.CAFile != "" {
		if !c.TLS {
			wrong("a CA file for Redis is given, but TLS is off: turn TLS on")
		}
		if _, err := readCA(c.CAFile); err != nil {
			errs = append(errs, err)
		}
	}
	if !prefixPattern.MatchString(c.KeyPrefix) || len(c.KeyPrefix) > maxPrefix {
		wrong("the key prefix may have at most %d letters, digits and the characters : . _ / -", maxPrefix)
	}
	switch c.Durability {
	case "", DurabilityAuto, DurabilityNone, DurabilityReplica, DurabilityFsync:
	default:
		wrong("durability %q of Redis is unknown: use auto, none, replica or fsync", c.Durability)
	}
	if c.DialTimeout < 0 || c.WriteTimeout < 0 {
		wrong("a time-out of Redis is negative")
	}
	if c.ReadTimeout != 0 && c.ReadTimeout < minReadTimeout {
		wrong("the read time-out of Redis is %s, at least %s are needed to wait for replicas and disks", c.ReadTimeout, minReadTimeout)
	}
	if c.PoolSize < 0 {
		wrong("the number of connections to Redis is negative")
	}
	return errors.Join(errs...)
}

// New makes a client. It does no I/O beyond reading files: the first command
// connects. Close the client when done.
func New(c Config) (goredis.UniversalClient, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("configuration of Redis: %w", err)
	}
	options := &goredis.UniversalOptions{
		Addrs: c.Addresses, MasterName: c.MasterName, DB: c.DB,
		DialTimeout:  cmp.Or(c.DialTimeout, defaultDialTimeout),
		ReadTimeout:  cmp.Or(c.ReadTimeout, defaultReadTimeout),
		WriteTimeout: cmp.Or(c.WriteTimeout, defaultWriteTimeout),
		PoolSize:     c.PoolSize,
		// After a fail-over the address may name another server, while the former one answers
		// reads for ever.
		ConnMaxLifetime: connectionLifetime, ConnMaxLifetimeJitter: connectionLifetimeJitter,
		// The library's own (32 KiB, and 128 for pipelines) would cost each worker megabytes;
		// what is larger than a buffer takes one more system call.
		ReadBufferSize: connectionBuffer, WriteBufferSize: connectionBuffer,
		PipelineReadBufferSize: pipelineBuffer, PipelineWriteBufferSize: pipelineBuffer,
		// A caller that gives up must not wait for the read time-out.
		ContextTimeoutEnabled: true,
		// Neither is needed, and not every server and ACL user knows the commands.
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		SentinelUsername:         c.SentinelUsername,
		Dialer:                   c.dial,
	}
	if c.PasswordFile != "" {
		options.CredentialsProviderContext = func(context.Context) (string, string, error) {
			password, err := readSecret(c.PasswordFile)
			return c.Username, password, err
		}
	}
	if c.SentinelPasswordFile != "" {
		password, err := readSecret(c.SentinelPasswordFile)
		if err != nil {
			return nil, err
		}
		options.SentinelPassword = password
	}
	var client goredis.UniversalClient
	switch c.mode() {
	case Sentinel:
		client = goredis.NewFailoverClient(options.Failover())
	case Cluster:
		client = goredis.NewClusterClient(options.Cluster())
	default:
		client = goredis.NewClient(options.Simple())
	}
	explainRefusals(client, c.mode(), c.OnRefusal)
	return client, nil
}

// dial opens a connection; with TLS it reads the CA anew, so that one that was
// replaced is trusted without a restart.
func (c Config) dial(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := &net.Dialer{Timeout: cmp.Or(c.DialTimeout, defaultDialTimeout), KeepAlive: time.Minute}
	if !c.TLS {
		return dialer.DialContext(ctx, network, address)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		roots, err := readCA(c.CAFile)
		if err != nil {
			return nil, err
		}
		config.RootCAs = roots
	}
	conn, err := (&tls.Dialer{NetDialer: dialer, Config: config}).DialContext(ctx, network, address)
	return conn, explainHandshake(err)
}

// explainHandshake says what is probably wrong when a server that took the connection does not
// speak TLS: Redis waits for the rest of a command and answers nothing, other servers answer
// with something else.
func explainHandshake(err error) error {
	var dialing *net.OpError
	if err == nil || errors.As(err, &dialing) && dialing.Op == "dial" {
		return err
	}
	var timeout net.Error
	var other tls.RecordHeaderError
	if errors.As(err, &other) || errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("the server takes the connection but does not answer with TLS: it hangs, or its port has no TLS (check the port and --redis-tls): %w", err)
	}
	return err
}

// readSecret reads a file without the line end that editors put there.
func readSecret(file string) (string, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading a password file of Redis: %w", err)
	}
	secret := strings.TrimRight(string(content), "\r\n")
	if secret == "" {
		return "", fmt.Errorf("the password file %s of Redis is empty", file)
	}
	return secret, nil
}

func readCA(file string) (*x509.CertPool, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the CA file of Redis: %w", err)
	}
	pool, err := cert.NewPoolFromBytes(content)
	if err != nil {
		return nil, fmt.Errorf("the CA file %s of Redis holds no certificate in PEM", file)
	}
	return pool, nil
}

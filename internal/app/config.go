package app

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

// environmentPrefix is the prefix of every variable: --redis-db is
// WHATSAPP_OPERATOR_REDIS_DB. A flag takes precedence over its variable.
const environmentPrefix = "WHATSAPP_OPERATOR_"

// defaultRedisPoolSize is the bound on the connections to a node of Redis. The library's own,
// ten for each processor, would add up to more than Redis accepts (10,000) where fifty
// workers run on large machines.
const defaultRedisPoolSize = 20

// commonConfig is what manager and worker share.
type commonConfig struct {
	Kubeconfig      string
	Namespace       string
	Release         string
	MetricsAddress  string
	HealthAddress   string
	Verbosity       int
	Redis           redis.Config
	redisMode       string
	redisDurability string
	StoreURL        string
	StoreURLFile    string
	// StoreUserFile and StorePasswordFile replace the user and the password of the URL.
	StoreUserFile, StorePasswordFile string
	StoreConns                       int
	// StartTimeout is how long the start waits for what is away; 0: for as long as it takes.
	StartTimeout time.Duration
	// PodUID is the UID of the process's pod; empty: it has none, or it is not known.
	PodUID string
}

// bindProcess binds the flags of a manager and a worker, which are not commands of a person.
func (c *commonConfig) bindProcess(f *pflag.FlagSet) {
	c.bindAll(f)
	f.DurationVar(&c.StartTimeout, "start-timeout", 0, "how long the start waits for the API server, Redis and the database before the process exits with an error; 0: for as long as it takes, which is right in a cluster")
	f.StringVar(&c.PodUID, "pod-uid", "", "UID of the pod (metadata.uid): Events about the process are then shown by `kubectl describe pod`, and a worker counts as dead as soon as the kubelet reports that this pod has ended")
}

// bind binds the flags of a person's command.
func (c *commonConfig) bind(f *pflag.FlagSet) {
	c.bindAll(f)
	f.DurationVar(&c.StartTimeout, "start-timeout", 30*time.Second, "how long the API server, Redis and the store may be unreachable before the command ends with an error")
}

// bindCluster binds what a command that uses nothing but the API server needs.
func (c *commonConfig) bindCluster(f *pflag.FlagSet) {
	c.bindKubeconfig(f)
	f.StringVar(&c.Namespace, "namespace", os.Getenv("POD_NAMESPACE"), "namespace of the operator, where the workers' Leases are")
	f.IntVarP(&c.Verbosity, "verbosity", "v", 0, "how much is logged: 0 what happened, 1 each step of each session, 2 the WhatsApp client's own log")
}

func (c *commonConfig) bindKubeconfig(f *pflag.FlagSet) {
	f.StringVar(&c.Kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "kubeconfig file; empty: the pod's service account")
}

func (c *commonConfig) bindAll(f *pflag.FlagSet) {
	c.bindCluster(f)
	f.StringVar(&c.Release, "release", "whatsapp-operator", "name of the release: cluster, namespace and release identify this installation; several installations in one namespace need different names")
	f.StringVar(&c.MetricsAddress, "metrics-bind-address", "127.0.0.1:8080", "address of the metrics; 0: none")
	f.StringVar(&c.HealthAddress, "health-bind-address", ":8081", "address of /healthz and /readyz; 0: none")

	r := &c.Redis
	f.StringSliceVar(&r.Addresses, "redis", []string{"127.0.0.1:6379"}, "host:port of Redis, of the Sentinels, or of some nodes of the cluster")
	f.StringVar(&c.redisMode, "redis-mode", string(redis.Standalone), "standalone, sentinel or cluster")
	f.StringVar(&r.MasterName, "redis-master-name", "", "name of the master at the Sentinels")
	f.IntVar(&r.DB, "redis-db", 0, "number of the database")
	f.StringVar(&r.Username, "redis-username", "", "ACL user")
	f.StringVar(&r.PasswordFile, "redis-password-file", "", "file with the password; read again for each connection")
	f.StringVar(&r.SentinelUsername, "redis-sentinel-username", "", "ACL user at the Sentinels")
	f.StringVar(&r.SentinelPasswordFile, "redis-sentinel-password-file", "", "file with the password for the Sentinels; read at the start")
	f.BoolVar(&r.TLS, "redis-tls", false, "encrypt the connections to Redis")
	f.StringVar(&r.CAFile, "redis-ca-file", "", "PEM file with the authorities to trust instead of the system's")
	f.IntVar(&r.PoolSize, "redis-pool-size", defaultRedisPoolSize, "bound on this process's connections to each node of Redis; its heartbeats have up to 4 more")
	f.StringVar(&r.KeyPrefix, "redis-key-prefix", "", "prefix of every key")
	f.BoolVar(&r.AllowVolatile, "allow-volatile-redis", false, "accept a Redis that evicts or does not persist: what waits for Laravel can be lost with it")
	f.StringVar(&c.redisDurability, "redis-durability", string(redis.DurabilityAuto), "when a write to Redis counts as durable: auto, none, replica or fsync")

	f.StringVar(&c.StoreURL, "store", "", "database of the device keys: postgres://HOST/DATABASE without a password, or sqlite:PATH")
	f.StringVar(&c.StoreURLFile, "store-file", "", "file with the URL of the database, password included; read again for each new connection")
	f.StringVar(&c.StoreUserFile, "store-user-file", "", "file with the user of the database, instead of one in the URL; read again for each new connection")
	f.StringVar(&c.StorePasswordFile, "store-password-file", "", "file with the password of the database, instead of one in the URL; read again for each new connection")
	f.IntVar(&c.StoreConns, "store-max-connections", 0, "bound on this process's connections to the database; 0: 8 for PostgreSQL, 4 for SQLite")
}

// complete sets the fields that are derived from flags, and returns all mistakes.
func (c *commonConfig) complete() error {
	return errors.Join(c.completeWithoutStore(), c.checkStore())
}

// completeWithoutStore is complete for a command that does not use the database.
func (c *commonConfig) completeWithoutStore() error {
	c.Redis.Mode, c.Redis.Durability = redis.Mode(c.redisMode), redis.DurabilityMode(c.redisDurability)
	var p problems
	p.join(c.Redis.Validate(), c.checkCluster())
	if !releaseRule.MatchString(c.Release) {
		p.add("--release is %q: choose a name of at most 53 lower case letters, digits and '-', which begins with a letter or digit and ends with one", c.Release)
	}
	p.listenAddress("metrics-bind-address", c.MetricsAddress)
	p.listenAddress("health-bind-address", c.HealthAddress)
	within(&p, "start-timeout", c.StartTimeout, 0, time.Hour)
	within(&p, "redis-pool-size", c.Redis.PoolSize, 1, 10_000)
	if c.PodUID != "" && !podUIDRule.MatchString(c.PodUID) {
		p.add("--pod-uid is %q: give metadata.uid of this pod, for example by the downward API", c.PodUID)
	}
	within(&p, "redis-db", c.Redis.DB, 0, 1_000_000)
	return p.err()
}

// checkCluster returns all that is wrong with the flags of bindCluster.
func (c *commonConfig) checkCluster() error {
	var p problems
	if c.Kubeconfig != "" {
		p.file("kubeconfig", c.Kubeconfig)
	}
	if c.Namespace == "" {
		p.add("the operator's namespace is not known: set --namespace")
	} else if len(validation.IsDNS1123Label(c.Namespace)) > 0 {
		p.add("--namespace is %q: give the name of a namespace, lower case letters, digits and '-'", c.Namespace)
	}
	within(&p, "verbosity", c.Verbosity, 0, 10)
	return p.err()
}

// checkStore returns all that is wrong with how to reach the database.
func (c *commonConfig) checkStore() error {
	var p problems
	within(&p, "store-max-connections", c.StoreConns, 0, 10_000)
	switch {
	case c.StoreURL == "" && c.StoreURLFile == "":
		p.add("no database for the device keys is given: set --store or --store-file")
	case c.StoreURL != "" && c.StoreURLFile != "":
		p.add("--store and --store-file are both given: keep one")
	case holdsPassword(c.StoreURL):
		p.add("--store holds a password, which everybody who may list processes can read: put the URL into a file and name it with --store-file")
	default:
		config, err := c.storeConfig()
		if err == nil {
			err = config.Validate()
		}
		p.join(err)
	}
	return p.err()
}

// holdsPassword reports whether a URL may hold a password: one that cannot be parsed and
// has an @ counts as one that does.
func holdsPassword(text string) bool {
	if strings.Contains(strings.ToLower(text), "password=") {
		return true
	}
	u, err := url.Parse(text)
	if err != nil {
		return strings.Contains(text, "@")
	}
	_, has := u.User.Password()
	return has
}

func (c *commonConfig) storeURL() (string, error) {
	if c.StoreURLFile == "" {
		return c.StoreURL, nil
	}
	content, err := os.ReadFile(c.StoreURLFile)
	if err != nil {
		return "", fmt.Errorf("--store-file: %w", err)
	}
	url := strings.TrimSpace(string(content))
	if url == "" {
		return "", errors.New("--store-file: the file is empty: write the URL of the database into it")
	}
	return url, nil
}

func (c *commonConfig) storeConfig() (store.Config, error) {
	url, err := c.storeURL()
	return store.Config{
		URL: url, ReadURL: c.storeURL, UserFile: c.StoreUserFile, PasswordFile: c.StorePasswordFile, MaxConns: c.StoreConns,
	}, err
}

// rest configures the client of the API server. The server's priority and fairness
// limit the requests, so the client does not.
func (c *commonConfig) rest() (*rest.Config, error) {
	var config *rest.Config
	var err error
	if c.Kubeconfig == "" {
		// Not by clientcmd, which prints a warning that this might not work.
		config, err = rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			err = errors.New("this is not a pod: give --kubeconfig")
		}
	} else {
		config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("finding the API server: %w", err)
	}
	config.QPS = -1
	// As Kubernetes' own controllers do: the API server would compress each event of each
	// watch anew, and its CPU time is scarcer than the cluster's network.
	config.DisableCompression = true
	config.UserAgent = "whatsapp-operator/" + Version
	return config, nil
}

// managerConfig configures `manager`.
type managerConfig struct {
	commonConfig
	LeaderElect bool
	// MetricsSecure serves the metrics by HTTPS, to those whom the API server lets read them.
	MetricsSecure  bool
	MetricsCertDir string
	Laravel        laravel.Config
	BatchSize      int
	Parallel       int
	// MessageParallel is Parallel for messages.
	MessageParallel int
	// Rebalance, RebalanceInterval and RebalanceAfter say whether, how often and with
	// which workers unequal loads are made equal.
	Rebalance         bool
	RebalanceInterval time.Duration
	RebalanceAfter    time.Duration
	// BundledStores are the stores of the chart, which are for trying out.
	BundledStores []string
}

func (c *managerConfig) bind(f *pflag.FlagSet) {
	c.bindProcess(f)
	f.BoolVar(&c.MetricsSecure, "metrics-secure", true, "serve the metrics by HTTPS, and only to a bearer token whose owner the API server allows to get /metrics")
	f.StringVar(&c.MetricsCertDir, "metrics-cert-dir", "", "folder with tls.crt and tls.key for the metrics, read again when they change; empty: a self-signed certificate")
	f.BoolVar(&c.LeaderElect, "leader-elect", true, "elect a leader among several managers; without it there must be only one")
	l := &c.Laravel
	f.StringVar(&l.BaseURL, "laravel-url", "", "base URL of the Laravel application's API, for example https://app.example.com/api; empty: nothing is delivered")
	f.StringVar(&l.QRPath, "laravel-qr-path", laravel.DefaultQRPath, "path of the QR batches under the base URL")
	f.StringVar(&l.StatusPath, "laravel-status-path", laravel.DefaultStatusPath, "path of the status batches under the base URL")
	f.StringVar(&l.MessagePath, "laravel-message-path", laravel.DefaultMessagePath, "path of the message batches under the base URL")
	f.StringVar(&l.TokenFile, "laravel-token-file", "", "file with the bearer token; read again when it changes")
	f.StringSliceVar(&l.SigningSecretFiles, "laravel-signing-secret-file", nil, "file with a Standard Webhooks secret (whsec_…); several while it is being changed")
	f.DurationVar(&l.Timeout, "laravel-timeout", laravel.DefaultTimeout, "how long one request may take, at most 5m")
	f.StringVar(&l.CAFile, "laravel-ca-file", "", "PEM file with the authorities to trust instead of the system's")
	f.BoolVar(&l.InsecureHTTP, "insecure-laravel-http", false, "allow http:// to an address that is not loopback: codes and numbers cross the network in the clear")
	f.IntVar(&c.BatchSize, "batch-size", 50, "highest number of items in a batch")
	f.IntVar(&c.Parallel, "laravel-max-requests", 4, "highest number of requests with QR codes and statuses to Laravel at the same time; QR batches take at most half")
	f.IntVar(&c.MessageParallel, "laravel-max-message-requests", 8, "highest number of requests with messages to Laravel at the same time")
	f.BoolVar(&c.Rebalance, "rebalance", true, "slowly move sessions from workers with a higher load than others, while no other move is in progress")
	f.DurationVar(&c.RebalanceInterval, "rebalance-interval", 10*time.Second, "one session of a pool is rebalanced in this time at most")
	f.StringSliceVar(&c.BundledStores, "bundled-stores", nil, "redis, database or both: these are the chart's own single servers, for trying out only; log, Event and metric say so")
	f.DurationVar(&c.RebalanceAfter, "rebalance-after", 5*time.Minute, "how long a worker must have been up before sessions of others are moved to it")
}

func (c *managerConfig) complete() error {
	var p problems
	p.join(c.commonConfig.complete())
	if c.delivers() {
		p.join(c.Laravel.Validate())
	} else if l := c.Laravel; l.TokenFile != "" || len(l.SigningSecretFiles) > 0 || l.CAFile != "" {
		p.add("a token, a signing secret or authorities for Laravel are given, but --laravel-url is empty: set it, or leave them all out")
	}
	if c.MetricsCertDir != "" {
		for _, name := range []string{"tls.crt", "tls.key"} {
			p.file("metrics-cert-dir", filepath.Join(c.MetricsCertDir, name))
		}
		if !c.MetricsSecure {
			p.add("--metrics-cert-dir is given, but --metrics-secure is false: leave one of them out")
		}
	}
	within(&p, "laravel-timeout", c.Laravel.Timeout, 100*time.Millisecond, laravel.MaxTimeout)
	within(&p, "batch-size", c.BatchSize, 1, 1000)
	within(&p, "laravel-max-requests", c.Parallel, 1, 64)
	within(&p, "laravel-max-message-requests", c.MessageParallel, 1, 64)
	within(&p, "rebalance-interval", c.RebalanceInterval, time.Second, 24*time.Hour) // --rebalance=false switches it off
	within(&p, "rebalance-after", c.RebalanceAfter, 0, 24*time.Hour)
	for _, name := range c.BundledStores {
		if name != bundledRedis && name != bundledDatabase {
			p.add("--bundled-stores is %q: give redis, database or both", name)
		}
	}
	return p.err()
}

// delivers reports whether there is a Laravel application to deliver to.
func (c *managerConfig) delivers() bool { return c.Laravel.BaseURL != "" }

// rebalanceInterval is the pace of the rebalancing; zero: it is off.
func (c *managerConfig) rebalanceInterval() time.Duration {
	if !c.Rebalance {
		return 0
	}
	return c.RebalanceInterval
}

// workerConfig configures `worker`.
type workerConfig struct {
	commonConfig
	Name string
	// ServiceAccount is named in the message that asks for a RoleBinding.
	ServiceAccount string
	StateDir       string
	Pool           string
	Capacity       int
	Revision       int64
	DrainTimeout   time.Duration
	GCPercent      int
	Pace           worker.Pace
	Quarantine     session.Quarantine
	Outdated       worker.Outdated
	Backlog        backlogConfig
	WhatsApp       whatsapp.Config
	// DropMessages: there is no Laravel application, so no message is stored.
	DropMessages bool
	// accounts makes the worker's accounts of WhatsApp's.
	accounts func(worker.Accounts) worker.Accounts
}

func (c *workerConfig) bind(f *pflag.FlagSet) {
	c.bindProcess(f)
	hostname, _ := os.Hostname() // an empty name is refused below
	f.StringVar(&c.Name, "name", hostname, "name of this worker: that of its pod")
	f.StringVar(&c.ServiceAccount, "service-account", "whatsapp-operator-worker", "service account of the workers, for the message about a proxy Secret that they may not read")
	f.StringVar(&c.StateDir, "state-dir", "/var/lib/whatsapp-operator", "folder that only this worker uses and that exists as long as its pod")
	f.StringVar(&c.Pool, "pool", "default", "pool of workers that this one belongs to")
	f.IntVar(&c.Capacity, "capacity", 1000, "highest number of sessions that are placed here")
	f.Int64Var(&c.Revision, "revision", 0, "revision of this worker: workers with a higher revision take over the sessions; 0: the revision of the Deployment that the pod belongs to")
	f.DurationVar(&c.DrainTimeout, "drain-timeout", 25*time.Second, "how long handing over all sessions may take at shutdown; shorter than the pod's terminationGracePeriodSeconds")
	f.IntVar(&c.GCPercent, "gc-percent", 25, "GOGC of the garbage collector: with many idle connections memory is scarcer than CPU; the variable GOGC takes precedence")
	f.Float64Var(&c.Pace.LoginsPerSecond, "logins-per-second", 200, "highest rate of logins through one egress")
	f.IntVar(&c.Pace.LoginBurst, "login-burst", 200, "highest number of logins at once through one egress")
	f.Float64Var(&c.Pace.PairingsPerSecond, "pairings-per-second", 20, "highest rate of new pairings through one egress")
	f.IntVar(&c.Pace.PairingBurst, "pairing-burst", 20, "highest number of new pairings at once through one egress")
	f.IntVar(&c.Quarantine.After, "quarantine-after", session.DefaultQuarantineAfter, "failures in a row, in the same way and without a minute connected, after which a session is tried only after hours")
	f.DurationVar(&c.Quarantine.First, "quarantine-first", session.DefaultQuarantineFirst, "the first of these pauses; each further failure doubles it")
	f.DurationVar(&c.Quarantine.Most, "quarantine-most", session.DefaultQuarantineMost, "the longest of these pauses")
	f.IntVar(&c.Outdated.Sessions, "outdated-sessions", worker.DefaultOutdatedSessions, "sessions whose client WhatsApp must refuse as outdated before all are held back and the newest version is tried with one")
	f.DurationVar(&c.Outdated.Within, "outdated-within", worker.DefaultOutdatedWithin, "time within which they must be refused")
	f.DurationVar(&c.Outdated.Pause, "outdated-pause", worker.DefaultOutdatedPause, "how long all are held back when the newest version is refused as well")
	c.Backlog.bind(f)
	f.BoolVar(&c.DropMessages, "drop-messages", false, "there is no Laravel application (the manager has no --laravel-url): messages are acknowledged at WhatsApp, counted and dropped, instead of waiting in the database")
	w := &c.WhatsApp
	f.StringVar(&w.DeviceName, "device-name", "WhatsApp operator", "what phones show under linked devices where spec.deviceName is empty")
	f.StringVar(&w.Endpoint, "whatsapp-endpoint", "", "ws:// or wss:// URL of a simulator instead of WhatsApp's servers; for tests and demos only")
	f.StringVar(&w.NoiseRoot, "whatsapp-noise-root", "", "root key of that server in hex; needed with --whatsapp-endpoint")
	f.StringVar(&w.CAFile, "whatsapp-ca-file", "", "PEM file with the authority of that server's certificate")
}

// releaseRule is what Helm allows as the name of a release, but for dots: the name is part
// of the names of Leases, and a label's value.
var releaseRule = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,51}[a-z0-9])?$`)

func (c *workerConfig) complete() error {
	var p problems
	p.join(c.commonConfig.complete(), c.WhatsApp.Validate())
	if len(validation.IsDNS1123Subdomain(c.Name)) > 0 {
		p.add("--name is %q: it must be the name of a pod, lower case letters, digits, '-' and '.'", c.Name)
	}
	if len(validation.IsDNS1123Subdomain(c.ServiceAccount)) > 0 {
		p.add("--service-account is %q: give the name of a service account, lower case letters, digits, '-' and '.'", c.ServiceAccount)
	}
	if c.StateDir == "" {
		p.add("--state-dir is empty: name a folder that only this worker uses")
	} else if info, err := os.Stat(c.StateDir); err == nil && !info.IsDir() {
		p.add("--state-dir is %q, which is a file: name a folder that only this worker uses", c.StateDir)
	}
	// It is compared with a label of namespaces, and is a label of the worker's Lease.
	if c.Pool == "" || len(validation.IsValidLabelValue(c.Pool)) > 0 {
		p.add("--pool is %q: choose a name of at most 63 letters, digits, '-', '_' and '.', which begins and ends with a letter or digit", c.Pool)
	}
	within(&p, "capacity", c.Capacity, 1, 1_000_000)
	if c.Revision < 0 {
		p.add("--revision is %d: choose 0 or more", c.Revision)
	}
	within(&p, "drain-timeout", c.DrainTimeout, time.Second, time.Hour)
	within(&p, "gc-percent", c.GCPercent, 1, 10_000)
	within(&p, "logins-per-second", c.Pace.LoginsPerSecond, 0.001, 10_000)
	within(&p, "login-burst", c.Pace.LoginBurst, 1, 100_000)
	within(&p, "pairings-per-second", c.Pace.PairingsPerSecond, 0.001, 10_000)
	within(&p, "pairing-burst", c.Pace.PairingBurst, 1, 100_000)
	within(&p, "quarantine-after", c.Quarantine.After, 1, 10_000)
	within(&p, "quarantine-first", c.Quarantine.First, time.Second, 30*24*time.Hour)
	within(&p, "quarantine-most", c.Quarantine.Most, time.Second, 30*24*time.Hour)
	if c.Quarantine.Most < c.Quarantine.First {
		p.add("--quarantine-most is %s, which is shorter than --quarantine-first, %s: choose at least as long", c.Quarantine.Most, c.Quarantine.First)
	}
	within(&p, "outdated-sessions", c.Outdated.Sessions, 1, 1_000_000)
	within(&p, "outdated-within", c.Outdated.Within, time.Second, 24*time.Hour)
	within(&p, "outdated-pause", c.Outdated.Pause, time.Second, 24*time.Hour)
	p.join(c.Backlog.check())
	return p.err()
}

// backlogConfig are the bounds of the messages that wait for Laravel.
type backlogConfig struct {
	SessionMessages                          int64
	SessionBytes, NamespaceBytes, TotalBytes resource.QuantityValue
}

func (c *backlogConfig) bind(f *pflag.FlagSet) {
	defaults := store.DefaultBounds
	f.Int64Var(&c.SessionMessages, "backlog-session-messages", defaults.SessionMessages, "messages of a session that may wait for Laravel; a session with more is disconnected, and its later messages wait at WhatsApp")
	for _, bound := range []struct {
		value       *resource.QuantityValue
		bytes       int64
		name, usage string
	}{
		{&c.SessionBytes, defaults.SessionBytes, "backlog-session-bytes", "the same in bytes, for example 64Mi"},
		{&c.NamespaceBytes, defaults.NamespaceBytes, "backlog-namespace-bytes", "bytes of messages of a namespace that may wait for Laravel; beyond it the sessions with the longest backlogs are disconnected"},
		{&c.TotalBytes, defaults.TotalBytes, "backlog-total-bytes", "bytes of messages that may wait for Laravel in all, which bounds what they take in the database; beyond it the sessions of the namespaces with the longest backlogs are disconnected"},
	} {
		bound.value.Quantity = *resource.NewQuantity(bound.bytes, resource.BinarySI)
		f.Var(bound.value, bound.name, bound.usage)
	}
}

// bounds are what the inbox is given.
func (c *backlogConfig) bounds() store.Bounds {
	return store.Bounds{SessionMessages: c.SessionMessages, SessionBytes: c.SessionBytes.Value(), NamespaceBytes: c.NamespaceBytes.Value(), TotalBytes: c.TotalBytes.Value()}
}

// largestBacklog is what a PostgreSQL table may have, 32 TiB.
const largestBacklog = 32 << 40

// check returns all that is wrong with the bounds. A session's must have room for one message,
// or it would be disconnected after each.
func (c *backlogConfig) check() error {
	var p problems
	within(&p, "backlog-session-messages", c.SessionMessages, 10, 100_000_000)
	before, beforeName := *resource.NewQuantity(2*delivery.MaxMessagePayload, resource.BinarySI), ""
	for _, bound := range []struct {
		name  string
		value resource.Quantity
	}{
		{"backlog-session-bytes", c.SessionBytes.Quantity},
		{"backlog-namespace-bytes", c.NamespaceBytes.Quantity},
		{"backlog-total-bytes", c.TotalBytes.Quantity},
	} {
		switch {
		case bound.value.Cmp(before) < 0 && beforeName != "":
			p.add("--%s is %s, which is less than --%s, %s: choose at least as many", bound.name, bound.value.String(), beforeName, before.String())
		case bound.value.Cmp(before) < 0, bound.value.CmpInt64(largestBacklog) > 0:
			p.add("--%s is %s: choose 2Mi to 32Ti", bound.name, bound.value.String())
		}
		before, beforeName = bound.value, bound.name
	}
	return p.err()
}

// podUIDRule is what a UID of Kubernetes may look like.
var podUIDRule = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)

// fromEnvironment sets every flag that the command line does not from its
// variable, and returns all that cannot be set.
func fromEnvironment(f *pflag.FlagSet) error {
	var errs []error
	f.VisitAll(func(flag *pflag.Flag) {
		name := environmentPrefix + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		value, ok := os.LookupEnv(name)
		if !ok || flag.Changed {
			return
		}
		if err := setFlag(f, flag, value); err != nil {
			errs = append(errs, fmt.Errorf("the variable %s has a value that --%s does not take", name, flag.Name))
		}
	})
	return errors.Join(errs...)
}

// settings lists the flags and their values for the log. Secrets are only ever
// in files, so nothing has to be hidden but a URL's user part.
func settings(cmd *cobra.Command) []any {
	var pairs []any
	cmd.Flags().VisitAll(func(flag *pflag.Flag) {
		if value := flag.Value.String(); value != "" && value != "[]" && flag.Name != "help" {
			pairs = append(pairs, flag.Name, credentials.ReplaceAllString(value, "//***@"))
		}
	})
	return slices.Clip(pairs)
}

var credentials = regexp.MustCompile(`//.*@`)

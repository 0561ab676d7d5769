package redis

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
	testclock "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

func connect(t *testing.T, c Config) goredis.UniversalClient {
	t.Helper()
	client, err := New(c)
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func to(addr string) Config { return Config{Addresses: []string{addr}} }

func write(t *testing.T, name, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	NewWithT(t).Expect(os.WriteFile(file, []byte(content), 0o600)).To(Succeed())
	return file
}

func TestValidate(t *testing.T) {
	for _, row := range []struct {
		name string
		c    Config
		want []string
	}{
		{"the least", to("redis:6379"), nil},
		{"everything", Config{Addresses: []string{"a:1", "[::1]:2"}, Mode: Sentinel, MasterName: "m", DB: 3, Username: "u",
			PasswordFile: write(t, "p", "secret\n"), KeyPrefix: "wa:prod/", Durability: DurabilityFsync, ReadTimeout: 10 * time.Second}, nil},
		{"no address", Config{}, []string{"no address"}},
		{"a URL with a password", to("redis://u:hunter2@h:1"), []string{"not host:port"}},
		{"a port out of range", to("h:70000"), []string{"not host:port"}},
		{"two servers without a mode", Config{Addresses: []string{"a:1", "b:1"}}, []string{"2 are given"}},
		{"Sentinel without a name", Config{Addresses: []string{"a:1"}, Mode: Sentinel}, []string{"name by which the Sentinels"}},
		{"a name without Sentinel", Config{Addresses: []string{"a:1"}, MasterName: "m"}, []string{"use mode sentinel"}},
		{"a database of a cluster", Config{Addresses: []string{"a:1"}, Mode: Cluster, DB: 1}, []string{"only database 0"}},
		{"everything wrong at once", Config{Addresses: []string{"a:1"}, Mode: "ring", DB: -1, Username: "u", CAFile: "/nowhere",
			KeyPrefix: "a{b}", Durability: "always", DialTimeout: -1, ReadTimeout: time.Second, PoolSize: -1}, []string{
			`mode "ring"`, "negative", "without a password file", "TLS is off", "/nowhere", "key prefix", `durability "always"`, "read time-out", "number of connections"}},
		{"an empty password", Config{Addresses: []string{"a:1"}, PasswordFile: write(t, "empty", "\n")}, []string{"is empty"}},
		{"a CA that is none", Config{Addresses: []string{"a:1"}, TLS: true, CAFile: write(t, "ca", "hunter2")}, []string{"no certificate"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			err := row.c.Validate()
			if row.want == nil {
				g.Expect(err).NotTo(HaveOccurred())
				return
			}
			for _, want := range row.want {
				g.Expect(err).To(MatchError(ContainSubstring(want)))
			}
			g.Expect(err.Error()).NotTo(ContainSubstring("hunter2"))
			_, err = New(row.c)
			g.Expect(err).To(HaveOccurred())
		})
	}
}

func TestKeys(t *testing.T) {
	g := NewWithT(t)
	k := Config{KeyPrefix: "wa:"}.Keys()
	g.Expect([]string{
		k.QR("s"), k.Status("s"), k.Connection("s"), k.Sibling(k.QR("s"), "gone"), k.Queue(delivery.KindQR, "items"),
		k.DeadLetters(delivery.KindStatus), k.Wake(), k.Marker(), k.Installation(), k.Key("x"),
	}).To(Equal([]string{
		"wa:session:s:qr", "wa:session:s:status", "wa:session:s:connection", "wa:gone:{wa:session:s:qr}", "wa:batch:{queue}:qr:items",
		"wa:batch:{queue}:dead:status", "wa:batch:{queue}:wake", "wa:operator:marker", "wa:operator:installation", "wa:x",
	}))
	g.Expect(Keys{}.QR("s")).To(Equal("session:s:qr"))
}

func TestPasswordFileIsReadAgain(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	addr := testenv.Redis(t, "--requirepass", "one")
	file := write(t, "password", "one\n")
	client := connect(t, Config{Addresses: []string{addr}, Username: "default", PasswordFile: file})
	g.Expect(client.Ping(ctx).Err()).To(Succeed())
	g.Expect(client.ConfigSet(ctx, "requirepass", "two").Err()).To(Succeed())
	g.Expect(os.WriteFile(file, []byte("two"), 0o600)).To(Succeed())
	g.Expect(client.Do(ctx, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no").Err()).To(Or(Succeed(), HaveOccurred()))
	g.Eventually(func() error { return client.Ping(ctx).Err() }).Should(Succeed())

	g.Expect(os.WriteFile(file, []byte("wrong"), 0o600)).To(Succeed())
	other := connect(t, Config{Addresses: []string{addr}, PasswordFile: file})
	g.Expect(other.Ping(ctx).Err()).To(MatchError(And(ContainSubstring("WRONGPASS"), Not(ContainSubstring("wrong\"")))))
}

func TestSentinel(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	master := testenv.RedisServer(t)
	conf := write(t, "sentinel.conf", "sentinel monitor wa 127.0.0.1 "+strconv.Itoa(master.Port())+" 1\n")
	sentinel := testenv.Redis(t, conf, "--sentinel")
	client := connect(t, Config{Addresses: []string{sentinel}, Mode: Sentinel, MasterName: "wa"})
	g.Expect(client.Set(ctx, "k", "v", 0).Err()).To(Succeed())
	direct := connect(t, to(master.Addr()))
	g.Expect(direct.Get(ctx, "k").Val()).To(Equal("v"))

	// A user with the permissions that docs/redis.md names.
	atSentinel := connect(t, to(sentinel))
	g.Expect(atSentinel.Do(ctx, "ACL", "SETUSER", "watch", "reset", "on", ">secret", "&+*", "+ping", "+subscribe",
		"+sentinel|get-master-addr-by-name", "+sentinel|sentinels", "+sentinel|replicas").Err()).To(Succeed())
	limited := connect(t, Config{Addresses: []string{sentinel}, Mode: Sentinel, MasterName: "wa", SentinelUsername: "watch", SentinelPasswordFile: write(t, "p", "secret")})
	g.Expect(limited.Set(ctx, "k", "w", 0).Err()).To(Succeed())
	g.Expect(CheckAccess(ctx, limited, Keys{}, Manager, "")).To(Succeed())
}

func clusterOfOne(t *testing.T) string {
	g := NewWithT(t)
	addr := testenv.Redis(t, "--cluster-enabled", "yes")
	node := connect(t, to(addr))
	g.Expect(node.ClusterAddSlotsRange(t.Context(), 0, 16383).Err()).To(Succeed())
	g.Eventually(func() (string, error) { return node.ClusterInfo(t.Context()).Result() }).
		WithTimeout(time.Minute).Should(ContainSubstring("cluster_state:ok"))
	return addr
}

func TestCluster(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	client := connect(t, Config{Addresses: []string{clusterOfOne(t)}, Mode: Cluster})
	report, err := Check(ctx, client)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(report.Problems).To(BeEmpty())
	d := NewDurability(client, Keys{}, DurabilityAuto)
	_, err = d.Pipelined(ctx, "{queue}a", func(p goredis.Pipeliner) error { return p.Set(ctx, "{queue}a", 1, 0).Err() })
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(client.Get(ctx, "{queue}a").Val()).To(Equal("1"))

	var reasons []LossReason
	w := &Watcher{Client: client, OnDataLoss: func(r LossReason) { reasons = append(reasons, r) }, Log: logr.Discard()}
	w.Observe(ctx)
	g.Expect(client.Del(ctx, Keys{}.Marker()).Err()).To(Succeed())
	w.Observe(ctx)
	g.Expect(reasons).To(Equal([]LossReason{MarkerMissing}))
}

func TestCheck(t *testing.T) {
	embedded := miniredis.RunT(t).Addr()
	for _, row := range []struct {
		name string
		addr string
		want []string
	}{
		{"as it must be", testenv.Redis(t), nil},
		{"snapshots only", testenv.Redis(t, "--appendonly", "no", "--save", "60 1"), nil},
		{"evicts", testenv.Redis(t, "--maxmemory-policy", "allkeys-lru"), []string{"allkeys-lru"}},
		{"does not persist", testenv.Redis(t, "--appendonly", "no"), []string{"set appendonly to yes"}},
		{"both", testenv.Redis(t, "--appendonly", "no", "--maxmemory-policy", "volatile-ttl"), []string{"volatile-ttl", "set appendonly to yes"}},
		{"CONFIG forbidden", testenv.Redis(t, "--rename-command", "CONFIG", ""), nil},
		{"CONFIG forbidden, evicts and does not persist", testenv.Redis(t, "--rename-command", "CONFIG", "", "--appendonly", "no", "--maxmemory-policy", "allkeys-lru"), []string{"allkeys-lru", "set appendonly to yes"}},
		{"neither CONFIG nor INFO", testenv.Redis(t, "--rename-command", "CONFIG", "", "--rename-command", "INFO", ""), []string{"cannot be read", "cannot be seen"}},
		{"embedded", embedded, []string{"cannot be read", "cannot be seen"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			report, err := Check(t.Context(), connect(t, to(row.addr)))
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(report.Problems).To(HaveLen(len(row.want)))
			for i, want := range row.want {
				g.Expect(report.Problems[i]).To(ContainSubstring(want))
				var volatile *VolatileError
				g.Expect(errors.As(report.Err(false), &volatile)).To(BeTrue())
				g.Expect(volatile).To(MatchError(And(ContainSubstring(want), ContainSubstring("--allow-volatile-redis"))))
			}
			g.Expect(report.Err(true)).To(Succeed())
		})
	}
	t.Run("away", func(t *testing.T) {
		_, err := Check(t.Context(), unreachable(t))
		NewWithT(t).Expect(err).To(HaveOccurred())
	})
}

// unreachable is a client of a server that refuses connections, without
// retries.
func unreachable(t *testing.T) goredis.UniversalClient {
	client := goredis.NewClient(&goredis.Options{Addr: "127.0.0.1:1", MaxRetries: -1, DialerRetries: 1})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func TestMonitor(t *testing.T) {
	g := NewWithT(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	client := connect(t, to(testenv.Redis(t)))
	defer func() { _ = client.Close() }()
	clk := testclock.NewFakeClock(time.Now())
	type result struct {
		report Report
		err    error
	}
	results := make(chan result, 1)
	m := &Monitor{Client: client, Clock: clk, Durability: NewDurability(client, Keys{}, DurabilityReplica),
		Report: func(r Report, err error) { results <- result{r, err} }}
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	work.Go(func() { _ = m.Start(ctx) })
	g.Expect((<-results).err).To(MatchError(ErrNotOffered))
	g.Expect(client.ConfigSet(ctx, "maxmemory-policy", "allkeys-lru").Err()).To(Succeed())
	g.Eventually(clk.HasWaiters).Should(BeTrue())
	clk.Step(checkInterval)
	g.Expect((<-results).report.Problems).To(HaveLen(1))
	cancel()
	work.Wait()
}

func TestDurability(t *testing.T) {
	ctx := t.Context()
	plain := testenv.RedisServer(t)
	always := testenv.Redis(t, "--appendfsync", "always")
	volatile := testenv.Redis(t, "--appendonly", "no")
	master := testenv.RedisServer(t, "--repl-diskless-sync-delay", "0")
	replica := testenv.RedisServer(t, "--replicaof", "127.0.0.1", strconv.Itoa(master.Port()))
	masterClient := connect(t, to(master.Addr()))
	NewWithT(t).Eventually(func() (string, error) { return masterClient.Info(ctx, "replication").Result() }).
		WithTimeout(time.Minute).Should(ContainSubstring("state=online"))
	embedded := miniredis.RunT(t)
	// A server of version 7.2, as far as this package sees it.
	modern := miniredis.RunT(t)
	var written atomic.Int64
	written.Store(1)
	modern.Server().SetPreHook(func(p *server.Peer, command string, _ ...string) bool {
		switch command {
		case "INFO":
			p.WriteBulk("aof_enabled:1\r\n")
		case "WAITAOF":
			p.WriteLen(2)
			p.WriteInt(int(written.Load()))
			p.WriteInt(0)
		default:
			return false
		}
		return true
	})

	for _, row := range []struct {
		name string
		addr string
		mode DurabilityMode
		want string
	}{
		{"Redis 7.0 with one flush a second, auto", plain.Addr(), "", "none"},
		{"Redis 7.0 with one flush a second, fsync", plain.Addr(), DurabilityFsync, ""},
		{"no replica, replica", plain.Addr(), DurabilityReplica, ""},
		{"appendfsync always, auto", always, DurabilityAuto, "fsync (appendfsync always)"},
		{"appendfsync always, fsync", always, DurabilityFsync, "fsync (appendfsync always)"},
		{"appendfsync always, none", always, DurabilityNone, "none"},
		{"no persistence, auto", volatile, DurabilityAuto, "none"},
		{"a replica, auto", master.Addr(), DurabilityAuto, "replica (WAIT)"},
		{"a replica, replica", master.Addr(), DurabilityReplica, "replica (WAIT)"},
		{"a replica, fsync", master.Addr(), DurabilityFsync, ""},
		{"WAITAOF, auto", modern.Addr(), DurabilityAuto, "fsync (WAITAOF)"},
		{"WAITAOF, fsync", modern.Addr(), DurabilityFsync, "fsync (WAITAOF)"},
		{"embedded, auto", embedded.Addr(), DurabilityAuto, "none"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			client := connect(t, to(row.addr))
			d := NewDurability(client, Keys{}, row.mode)
			g.Expect(d.level.Load()).To(BeNil())
			commands, err := d.Pipelined(ctx, "k", func(p goredis.Pipeliner) error { return p.Set(ctx, "k", row.name, 0).Err() })
			if row.want == "" {
				g.Expect(err).To(MatchError(ErrNotOffered))
				return
			}
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(commands).To(HaveLen(1), "the waits are not the caller's")
			g.Expect(d.level.Load().String()).To(Equal(row.want))
			g.Expect(client.Get(ctx, "k").Val()).To(Equal(row.name))
		})
	}

	t.Run("the disk has not the write in time", func(t *testing.T) {
		g := NewWithT(t)
		d := NewDurability(connect(t, to(modern.Addr())), Keys{}, DurabilityFsync)
		set := func(p goredis.Pipeliner) error { return p.Set(ctx, "k", 1, 0).Err() }
		_, err := d.Pipelined(ctx, "k", set)
		g.Expect(err).NotTo(HaveOccurred())
		written.Store(0)
		_, err = d.Pipelined(ctx, "k", set)
		g.Expect(err).To(MatchError(ErrNotDurable))
	})
	t.Run("an error of the caller's own command", func(t *testing.T) {
		g := NewWithT(t)
		d := NewDurability(masterClient, Keys{}, DurabilityAuto)
		_, err := d.Pipelined(ctx, "k", func(p goredis.Pipeliner) error {
			p.Set(ctx, "text", "x", 0)
			return p.Incr(ctx, "text").Err()
		})
		g.Expect(err).To(MatchError(ContainSubstring("not an integer")))
	})
	t.Run("the replica goes away", func(t *testing.T) {
		g := NewWithT(t)
		set := func(p goredis.Pipeliner) error { return p.Set(ctx, "k", 1, 0).Err() }
		auto := NewDurability(masterClient, Keys{}, DurabilityAuto)
		strict := NewDurability(masterClient, Keys{}, DurabilityReplica)
		for _, d := range []*Durability{auto, strict} {
			_, err := d.Pipelined(ctx, "k", set)
			g.Expect(err).NotTo(HaveOccurred())
		}
		replica.Kill()
		_, err := strict.Pipelined(ctx, "k", set)
		g.Expect(err).To(MatchError(ErrNotDurable))
		_, err = auto.Pipelined(ctx, "k", set)
		g.Expect(err).NotTo(HaveOccurred(), "auto asks for no more than what is offered")
		g.Expect(*auto.level.Load()).To(Equal(Level{}))
	})
}

func TestWatcher(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	s := testenv.RedisServer(t)
	client := goredis.NewClient(&goredis.Options{Addr: s.Addr(), MaxRetries: 2, DialerRetries: 1})
	t.Cleanup(func() { _ = client.Close() })
	var reasons []LossReason
	take := func() []LossReason {
		all := reasons
		reasons = nil
		return all
	}
	newWatcher := func(to *[]LossReason) *Watcher {
		return &Watcher{Client: client, Keys: NewKeys("p:"), OnDataLoss: func(r LossReason) { *to = append(*to, r) }, Log: logr.Discard()}
	}
	w := newWatcher(&reasons)
	var others []LossReason
	other := newWatcher(&others)

	w.Observe(ctx)
	other.Observe(ctx)
	w.Observe(ctx)
	g.Expect(take()).To(BeEmpty(), "nothing has happened")

	s.Stop()
	w.Observe(ctx)
	w.Observe(ctx)
	g.Expect(take()).To(BeEmpty(), "an outage is no loss of data")
	s.Restart()
	w.Observe(ctx)
	w.Observe(ctx)
	g.Expect(take()).To(Equal([]LossReason{Restarted}), "once")

	g.Expect(client.FlushAll(ctx).Err()).To(Succeed())
	w.Observe(ctx)
	w.Observe(ctx)
	g.Expect(take()).To(Equal([]LossReason{MarkerMissing}))
	other.Observe(ctx)
	other.Observe(ctx)
	g.Expect(others).To(Equal([]LossReason{MarkerChanged}), "another process has set a new marker")

	s.RestartEmpty()
	w.Observe(ctx)
	g.Expect(take()).To(Equal([]LossReason{MarkerMissing}))

	master := testenv.RedisServer(t, "--repl-diskless-sync-delay", "0")
	g.Expect(client.Do(ctx, "REPLICAOF", "127.0.0.1", master.Port()).Err()).To(Succeed())
	// Which is seen first depends on when the replica has its master's data, which has no marker.
	g.Eventually(func() []LossReason {
		w.Observe(ctx)
		return take()
	}).WithTimeout(time.Minute).Should(Or(Equal([]LossReason{RoleChanged}), Equal([]LossReason{MarkerMissing})))
	g.Eventually(func() (string, error) { return client.Info(ctx, "replication").Result() }).
		WithTimeout(time.Minute).Should(ContainSubstring("master_link_status:up"))
	w.Observe(ctx)
	take()
	w.Observe(ctx)
	g.Expect(take()).To(BeEmpty(), "a replica takes no marker; that is reported once")

	s.Stop()
	late := newWatcher(&others)
	others = nil
	late.Observe(ctx)
	s.RestartEmpty()
	late.Observe(ctx)
	late.Observe(ctx)
	g.Expect(others).To(Equal([]LossReason{NotObserved}))
}

func TestWatcherRuns(t *testing.T) {
	g := NewWithT(t)
	m := miniredis.RunT(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent(),
		goleak.IgnoreAnyFunction("github.com/alicebob/miniredis/v2/server.(*Server).servePeer"),
		goleak.IgnoreAnyFunction("github.com/alicebob/miniredis/v2/server.readArray"))
	client := connect(t, to(m.Addr()))
	defer func() { _ = client.Close() }()
	clk := testclock.NewFakeClock(time.Now())
	reasons := make(chan LossReason, 1)
	w := &Watcher{Client: client, Clock: clk, OnDataLoss: func(r LossReason) { reasons <- r }, Log: logr.Discard()}
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	work.Go(func() { _ = w.Start(ctx) })
	g.Eventually(func() bool { return m.Exists("operator:marker") }).Should(BeTrue())
	m.FlushAll()
	g.Eventually(clk.HasWaiters).Should(BeTrue())
	clk.Step(watchInterval)
	g.Expect(<-reasons).To(Equal(MarkerMissing))
	cancel()
	work.Wait()
}

func TestInstallation(t *testing.T) {
	for name, addr := range map[string]string{"redis": testenv.Redis(t), "embedded": miniredis.RunT(t).Addr()} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			client, keys := connect(t, to(addr)), NewKeys("p:")
			g.Expect(ClaimInstallation(ctx, client, keys, "mine")).To(Succeed())
			g.Expect(ClaimInstallation(ctx, client, keys, "mine")).To(Succeed())
			err := ClaimInstallation(ctx, client, keys, "other")
			var elsewhere *OwnedElsewhereError
			g.Expect(errors.As(err, &elsewhere)).To(BeTrue())
			g.Expect(elsewhere.Found).To(Equal("mine"))
			g.Expect(err).To(MatchError(ContainSubstring("store adopt")))
			g.Expect(ClaimInstallation(ctx, client, NewKeys("q:"), "other")).To(Succeed(), "another prefix is another place")
			g.Expect(CheckInstallation(ctx, client, keys, "mine")).To(Succeed())
			g.Expect(CheckInstallation(ctx, client, keys, "other")).To(MatchError(&OwnedElsewhereError{Found: "mine"}))
			g.Expect(CheckInstallation(ctx, client, NewKeys("r:"), "mine")).To(Succeed(), "nobody's")
			g.Expect(client.Exists(ctx, NewKeys("r:").Installation()).Val()).To(BeZero(), "a check claims nothing")
			g.Expect(Adopt(ctx, client, keys, "other")).To(Succeed())
			g.Expect(ClaimInstallation(ctx, client, keys, "other")).To(Succeed())
		})
	}
	g := NewWithT(t)
	g.Expect(ClaimInstallation(t.Context(), unreachable(t), Keys{}, "x")).To(MatchError(ContainSubstring("reading which installation")))
	g.Expect(Adopt(t.Context(), unreachable(t), Keys{}, "x")).NotTo(Succeed())
}

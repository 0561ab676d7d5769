package redis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// answer is an error as the client library reads it from the server.
type answer string

func (a answer) Error() string { return string(a) }

func (answer) RedisError() {}

// TestRefusals holds answers of Redis 6.2, 7.0, 7.2 and Valkey 8 against what they are taken for.
func TestRefusals(t *testing.T) {
	for _, row := range []struct {
		answer string
		want   Refusal
		says   string
	}{
		{"READONLY You can't write against a read only replica.", ReadOnly, "replica"},
		{"READONLY You can't write against a read only replica. script: a8e0, on @user_script:1.", ReadOnly, "replica"},
		{"ERR Error running script (call to f_a8e0): @user_script:1: -READONLY You can't write against a read only replica.", ReadOnly, "replica"},
		{"LOADING Redis is loading the dataset in memory", Loading, "wait"},
		{"LOADING Valkey is loading the dataset in memory", Loading, "wait"},
		{"CLUSTERDOWN Hash slot not served", ClusterDown, "nodes"},
		{"TRYAGAIN Multiple keys request during rehashing of slot", TryAgain, "wait"},
		{"BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", Busy, "SCRIPT KILL"},
		{"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", DiskFailing, "disk"},
		{"MISCONF Errors writing to the AOF file: No space left on device", DiskFailing, "disk"},
		{"OOM command not allowed when used memory > 'maxmemory'.", Full, "maxmemory"},
		{"ERR Error running script (call to f_a8e0): @user_script:1: -OOM command not allowed when used memory > 'maxmemory'.", Full, "maxmemory"},
		{"NOAUTH Authentication required.", NotAuthenticated, "--redis-password-file"},
		{"NOAUTH HELLO must be called with the client already authenticated", NotAuthenticated, "--redis-password-file"},
		{"WRONGPASS invalid username-password pair or user is disabled.", WrongPassword, "--redis-username"},
		{"ERR invalid password", WrongPassword, "--redis-username"},
		{"NOPERM this user has no permissions to run the 'del' command", NoPermission, "redis-acl"},
		{"NOPERM User w has no permissions to access the 'k' key", NoPermission, "redis-acl"},
		{"ERR The user executing the script can't run this command or subcommand script: 1b04, on @user_script:1.", NoPermission, "redis-acl"},
		{"ERR ACL failure in script: User w has no permissions to run the 'type' command script: 1b04, on @user_script:1.", NoPermission, "redis-acl"},
		{"ERR Error running script (call to f_1b04): @user_script:1: -NOPERM this user has no permissions", NoPermission, "redis-acl"},
		{"MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", MasterDown, "primary"},
		{"NOREPLICAS Not enough good replicas to write.", NoReplicas, "min-replicas-to-write"},
		{"ERR max number of clients reached", TooManyClients, "maxclients"},
		{"ERR DB index is out of range", WrongDatabase, "--redis-db"},
		{"ERR SELECT is not allowed in cluster mode", WrongDatabase, "--redis-db"},
		{"ERR This instance has cluster support disabled", WrongMode, "standalone"},
		{"MOVED 3999 10.0.0.1:6379", WrongMode, "--redis-mode=cluster"},
		{"DENIED Redis is running in protected mode because protected mode is enabled", Protected, "password"},
		{"ERR unknown command 'EVALSHA', with args beginning with: 'hunter2' ", UnknownCommand, "renamed"},
		{"ERR unknown command `EVALSHA`, with args beginning with: `hunter2`, ", UnknownCommand, "renamed"},
		{"ERR Unknown Redis command called from script script: 1b04, on @user_script:1.", UnknownCommand, "renamed"},

		{"NOSCRIPT No matching script. Please use EVAL.", "", ""},
		{"WRONGTYPE Operation against a key holding the wrong kind of value", "", ""},
		{"ERR value is not a valid float", "", ""},
		{"BUSYGROUP Consumer Group name already exists", "", ""},
		{"ERR Error running script (call to f_1): @user_script:1: MOVED of somebody's -MOVED own text", "", ""},
	} {
		t.Run(row.answer, func(t *testing.T) {
			g := NewWithT(t)
			var counted []Refusal
			hook := refusalHook{mode: Standalone, count: func(r Refusal) { counted = append(counted, r) }}
			err := hook.explain("evalsha", fmt.Errorf("wrapped: %w", answer(row.answer)))
			var refused *RefusedError
			if row.want == "" {
				g.Expect(errors.As(err, &refused)).To(BeFalse())
				g.Expect(counted).To(BeEmpty())
				return
			}
			g.Expect(errors.As(err, &refused)).To(BeTrue())
			g.Expect(refused.Refusal).To(Equal(row.want))
			g.Expect(counted).To(Equal([]Refusal{row.want}))
			g.Expect(err).To(MatchError(ContainSubstring(row.says)))
			g.Expect(err.Error()).NotTo(ContainSubstring("hunter2"))
			g.Expect(err).To(MatchError(answer(row.answer)), "the answer is still there for those who look for it")
			again := hook.explain("evalsha", fmt.Errorf("outer: %w", err))
			g.Expect(strings.Count(again.Error(), row.says)).To(Equal(strings.Count(err.Error(), row.says)), "one sentence")
			g.Expect(counted).To(HaveLen(1), "counted once")
		})
	}
	g := NewWithT(t)
	page, err := os.ReadFile("../../docs/redis.md")
	g.Expect(err).NotTo(HaveOccurred())
	for _, r := range refusals {
		g.Expect(string(page)).To(ContainSubstring("`"+string(r.refusal)+"`"), "each is explained")
	}
	g.Expect(refusalHook{mode: Cluster}.explain("get", answer("MOVED 1 h:1"))).To(Equal(answer("MOVED 1 h:1")), "a cluster's way to name the node")
	g.Expect(refusalHook{}.explain("hello", answer("ERR unknown command"))).To(Equal(answer("ERR unknown command")))
	g.Expect(refusalHook{}.explain("get", nil)).To(Succeed())
}

// TestRealRefusals brings a server into the states that it refuses commands in.
func TestRealRefusals(t *testing.T) {
	write := []any{"SET", "k", "v"}
	read := []any{"GET", "k"}
	for _, row := range []struct {
		name    string
		options []string
		refuse  func(g *WithT, ctx context.Context, admin *goredis.Client)
		want    Refusal
		restore func(ctx context.Context, admin *goredis.Client) error
		command []any
	}{
		{name: "a replica", want: ReadOnly, refuse: func(g *WithT, ctx context.Context, admin *goredis.Client) {
			g.Expect(admin.Do(ctx, "REPLICAOF", "127.0.0.1", "1").Err()).To(Succeed())
		}, restore: func(ctx context.Context, admin *goredis.Client) error {
			return admin.Do(ctx, "REPLICAOF", "NO", "ONE").Err()
		}},
		{name: "a replica without its primary", want: MasterDown, command: read, options: []string{"--replica-serve-stale-data", "no"}, refuse: func(g *WithT, ctx context.Context, admin *goredis.Client) {
			g.Expect(admin.Do(ctx, "REPLICAOF", "127.0.0.1", "1").Err()).To(Succeed())
		}, restore: func(ctx context.Context, admin *goredis.Client) error {
			return admin.Do(ctx, "REPLICAOF", "NO", "ONE").Err()
		}},
		{name: "full", want: Full, refuse: func(g *WithT, ctx context.Context, admin *goredis.Client) {
			g.Expect(admin.ConfigSet(ctx, "maxmemory", "1").Err()).To(Succeed())
		}, restore: func(ctx context.Context, admin *goredis.Client) error {
			return admin.ConfigSet(ctx, "maxmemory", "0").Err()
		}},
		{name: "too few replicas", want: NoReplicas, refuse: func(g *WithT, ctx context.Context, admin *goredis.Client) {
			g.Expect(admin.ConfigSet(ctx, "min-replicas-to-write", "1").Err()).To(Succeed())
		}, restore: func(ctx context.Context, admin *goredis.Client) error {
			return admin.ConfigSet(ctx, "min-replicas-to-write", "0").Err()
		}},
		{name: "a long script", want: Busy, options: []string{"--busy-reply-threshold", "1"}, refuse: func(g *WithT, ctx context.Context, admin *goredis.Client) {
			go func() { _ = admin.Eval(context.WithoutCancel(ctx), "while true do end", nil).Err() }() // until SCRIPT KILL
			g.Eventually(func() error { return admin.Ping(ctx).Err() }).WithTimeout(time.Minute).Should(MatchError(HavePrefix("BUSY ")))
		}, restore: func(ctx context.Context, admin *goredis.Client) error { return admin.ScriptKill(ctx).Err() }},
		{name: "a changed password", want: NotAuthenticated, refuse: func(g *WithT, ctx context.Context, admin *goredis.Client) {
			g.Expect(admin.ConfigSet(ctx, "requirepass", "new").Err()).To(Succeed())
			g.Expect(admin.Do(ctx, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes").Err()).To(Succeed())
		}, restore: func(ctx context.Context, admin *goredis.Client) error {
			return admin.ConfigSet(ctx, "requirepass", "").Err()
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g, ctx := NewWithT(t), t.Context()
			addr := testenv.Redis(t, row.options...)
			admin := goredis.NewClient(&goredis.Options{Addr: addr, PoolSize: 2, ReadTimeout: time.Minute, Protocol: 2})
			t.Cleanup(func() { _ = admin.Close() })
			var mu sync.Mutex
			counts := map[Refusal]int{}
			config := to(addr)
			config.OnRefusal = func(r Refusal) {
				mu.Lock()
				defer mu.Unlock()
				counts[r]++
			}
			client := connect(t, config)
			g.Expect(client.Set(ctx, "k", "before", 0).Err()).To(Succeed())

			row.refuse(g, ctx, admin)
			refused := Satisfy(func(err error) bool {
				var refused *RefusedError
				return errors.As(err, &refused) && refused.Refusal == row.want
			})
			command := row.command
			if command == nil {
				command = write
			}
			script := "return redis.call(unpack(ARGV))"
			g.Expect(client.Do(ctx, command...).Err()).To(refused)
			g.Expect(client.Eval(ctx, script, []string{"k"}, command...).Err()).To(refused, "in a script")
			commands, err := client.Pipelined(ctx, func(p goredis.Pipeliner) error {
				p.Do(ctx, command...)
				return p.Eval(ctx, script, []string{"k"}, command...).Err()
			})
			g.Expect(err).To(refused, "in a pipeline")
			for _, command := range commands {
				g.Expect(command.Err()).To(refused)
			}
			mu.Lock()
			g.Expect(counts).To(HaveKeyWithValue(row.want, BeNumerically(">=", 4)))
			mu.Unlock()

			g.Expect(row.restore(ctx, admin)).To(Succeed())
			g.Eventually(func() error { return client.Set(ctx, "k", "after", 0).Err() }).WithTimeout(time.Minute).Should(Succeed(), "nothing to restart")
		})
	}
	t.Run("a database that is not there", func(t *testing.T) {
		g, ctx := NewWithT(t), t.Context()
		config := to(testenv.Redis(t, "--databases", "2"))
		config.DB = 7
		client := connect(t, config)
		g.Expect(client.Ping(ctx).Err()).To(MatchError(ContainSubstring("--redis-db")))
		commands, err := client.Pipelined(ctx, func(p goredis.Pipeliner) error { return p.Ping(ctx).Err() })
		g.Expect(err).To(MatchError(ContainSubstring("--redis-db")))
		g.Expect(commands[0].Err()).To(MatchError(ContainSubstring("--redis-db")), "no command of a pipeline has succeeded")
	})
	t.Run("a cluster that is none", func(t *testing.T) {
		config := to(testenv.Redis(t))
		config.Mode = Cluster
		NewWithT(t).Expect(connect(t, config).Get(t.Context(), "k").Err()).To(MatchError(ContainSubstring("--redis-mode=standalone")))
	})
	t.Run("a cluster, and the configuration does not say so", func(t *testing.T) {
		g, ctx := NewWithT(t), t.Context()
		addr := testenv.Redis(t, "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
		client := connect(t, to(addr))
		g.Expect(client.ClusterAddSlotsRange(ctx, 0, 1).Err()).To(Succeed())
		g.Eventually(func() error { return client.Get(ctx, "k").Err() }).WithTimeout(time.Minute).
			Should(MatchError(ContainSubstring("slots without a node")), "CLUSTERDOWN Hash slot not served")
	})
}

// TestAnAddressThatNamesAnotherServerAfterAFailover: connections to the former primary
// answer reads for ever. They are given up when the server says that it is a replica.
func TestAnAddressThatNamesAnotherServerAfterAFailover(t *testing.T) {
	for _, row := range []struct {
		name string
		read func(ctx context.Context, client goredis.UniversalClient) error
	}{
		{"heartbeats", func(ctx context.Context, client goredis.UniversalClient) error {
			_, _, err := NewHeartbeat(client, Keys{}).Read(ctx)
			return err
		}},
		{"watcher", func(ctx context.Context, client goredis.UniversalClient) error {
			w := &Watcher{Client: client}
			now, _, err := w.observe(ctx)
			for _, role := range now.roles {
				if role != "master" {
					return ErrNoPrimary
				}
			}
			return err
		}},
		{"a write", func(ctx context.Context, client goredis.UniversalClient) error {
			return client.Set(ctx, "k", "v", 0).Err()
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g, ctx := NewWithT(t), t.Context()
			former, next := testenv.RedisServer(t), testenv.RedisServer(t)
			address := testenv.NewTCPProxy(t, former.Addr())
			client := connect(t, to(address.Addr()))
			g.Expect(row.read(ctx, client)).To(Succeed())

			address.Redirect(next.Addr()) // the present connections stay
			admin := connect(t, to(former.Addr()))
			successor := connect(t, to(next.Addr()))
			g.Expect(successor.Set(ctx, Keys{}.Marker(), "m", 0).Err()).To(Succeed())
			g.Expect(admin.Do(ctx, "REPLICAOF", "127.0.0.1", strconv.Itoa(next.Port())).Err()).To(Succeed())
			g.Eventually(func() (string, error) { return admin.Get(ctx, Keys{}.Marker()).Result() }).WithTimeout(time.Minute).Should(Equal("m"))
			g.Eventually(func() error { return row.read(ctx, client) }).WithTimeout(time.Minute).Should(Succeed())
			fields, err := info(ctx, client, "replication")
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(fields["role"]).To(Equal("master"))
		})
	}
}

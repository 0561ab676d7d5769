package redis

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/alicebob/miniredis/v2"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// aclUser makes the user of a role as `redis-acl` prints it, and changes it by rules.
func aclUser(t *testing.T, admin goredis.UniversalClient, role Role, config Config, rules ...string) goredis.UniversalClient {
	t.Helper()
	g, ctx := NewWithT(t), t.Context()
	line := ACLUser(role, string(role), config, false)
	var words []any
	for word := range strings.FieldsSeq(line) {
		if word == ">PASSWORD" {
			word = ">hunter2"
		}
		words = append(words, word)
	}
	g.Expect(admin.Do(ctx, words...).Err()).To(Succeed(), line)
	if len(rules) > 0 {
		change := []any{"ACL", "SETUSER", string(role)}
		for _, rule := range rules {
			change = append(change, rule)
		}
		g.Expect(admin.Do(ctx, change...).Err()).To(Succeed(), "%v", rules)
	}
	config.Username, config.PasswordFile = string(role), write(t, "password", "hunter2")
	return connect(t, config)
}

// TestEachPermissionIsChecked removes each command, each pattern of keys and the channel in
// turn. Nothing that a check does leaves a trace.
func TestEachPermissionIsChecked(t *testing.T) {
	config := to(testenv.Redis(t))
	config.KeyPrefix = "wa:"
	keys := config.Keys()
	admin := connect(t, config)
	for _, role := range Roles {
		check := func(t *testing.T, rules ...string) error {
			return CheckAccess(t.Context(), aclUser(t, admin, role, config, rules...), keys, role, string(role))
		}
		t.Run(string(role), func(t *testing.T) {
			NewWithT(t).Expect(check(t)).To(Succeed())
			line := ACLUser(role, string(role), config, false)
			removed := 0
			for word := range strings.FieldsSeq(line) {
				name, isCommand := strings.CutPrefix(word, "+")
				if !isCommand || name == "config|get" { // without which it works
					continue
				}
				removed++
				t.Run("-"+name, func(t *testing.T) {
					g := NewWithT(t)
					err := check(t, "-"+name)
					var access *AccessError
					g.Expect(errors.As(err, &access)).To(BeTrue(), "%v", err)
					named := strings.ToUpper(strings.ReplaceAll(name, "|", " "))
					g.Expect(access.Commands).To(Equal([]string{named}))
					g.Expect(access.Keys).To(BeEmpty())
					g.Expect(access.Channels).To(BeEmpty())
					g.Expect(access.Unknown).To(BeEmpty())
					g.Expect(err.Error()).To(And(ContainSubstring(`"`+string(role)+`"`), ContainSubstring(named), ContainSubstring("redis-acl"), Not(ContainSubstring("hunter2"))))
				})
			}
			NewWithT(t).Expect(removed).To(BeNumerically(">", 4))

			var patterns []string
			for word := range strings.FieldsSeq(line) {
				if strings.HasPrefix(word, "~") {
					patterns = append(patterns, word)
				}
			}
			for _, pattern := range patterns {
				t.Run("without "+pattern, func(t *testing.T) {
					g := NewWithT(t)
					rules := append([]string{"resetkeys"}, slices.DeleteFunc(slices.Clone(patterns), func(p string) bool { return p == pattern })...)
					var access *AccessError
					err := check(t, rules...)
					g.Expect(errors.As(err, &access)).To(BeTrue(), "%v", err)
					g.Expect(access.Keys).To(Equal([]string{strings.TrimPrefix(pattern, "~")}))
					g.Expect(access.Commands).To(BeEmpty())
				})
			}
			if role != Laravel {
				t.Run("without the channel", func(t *testing.T) {
					g := NewWithT(t)
					var access *AccessError
					g.Expect(errors.As(check(t, "resetchannels"), &access)).To(BeTrue())
					g.Expect(access.Channels).To(Equal([]string{"wa:batch:{queue}:wake"}))
					g.Expect(access.Commands).To(BeEmpty())
				})
			}
		})
	}
	NewWithT(t).Expect(admin.DBSize(t.Context()).Val()).To(BeZero(), "a check writes nothing")
}

func TestAccess(t *testing.T) {
	check := func(t *testing.T, config Config) error {
		return CheckAccess(t.Context(), connect(t, config), config.Keys(), Manager, config.Username)
	}
	t.Run("renamed commands", func(t *testing.T) {
		g := NewWithT(t)
		err := check(t, to(testenv.Redis(t, "--rename-command", "EVALSHA", "", "--rename-command", "HKEYS", "x", "--rename-command", "CONFIG", "", "--rename-command", "INFO", "")))
		var access *AccessError
		g.Expect(errors.As(err, &access)).To(BeTrue(), "%v", err)
		g.Expect(access.Unknown).To(Equal([]string{"EVALSHA", "HKEYS"}), "a server without CONFIG and INFO will do")
		g.Expect(err).To(MatchError(And(ContainSubstring("renamed"), Not(ContainSubstring("permission")))))
	})
	t.Run("a server that refuses writes has checked the permissions before", func(t *testing.T) {
		g, ctx := NewWithT(t), t.Context()
		config := to(testenv.Redis(t))
		admin := connect(t, config)
		g.Expect(admin.ConfigSet(ctx, "maxmemory", "1").Err()).To(Succeed())
		g.Expect(check(t, config)).To(Succeed())
		client := aclUser(t, admin, Manager, config, "-zadd")
		g.Expect(admin.Do(ctx, "REPLICAOF", "127.0.0.1", "1").Err()).To(Succeed())
		g.Expect(CheckAccess(ctx, client, config.Keys(), Manager, "manager")).To(MatchError(ContainSubstring("ZADD")))
	})
	t.Run("a cluster", func(t *testing.T) {
		g, ctx := NewWithT(t), t.Context()
		addr := clusterOfOne(t)
		config := Config{Addresses: []string{addr}, Mode: Cluster}
		admin := connect(t, to(addr))
		for _, role := range []Role{Manager, Worker} {
			client := aclUser(t, admin, role, config)
			g.Expect(CheckAccess(ctx, client, config.Keys(), role, string(role))).To(Succeed())
			g.Expect(admin.Do(ctx, "ACL", "SETUSER", string(role), "-type").Err()).To(Succeed())
			g.Expect(CheckAccess(ctx, client, config.Keys(), role, string(role))).To(MatchError(ContainSubstring("TYPE")))
		}
	})
	t.Run("another database", func(t *testing.T) {
		g, ctx := NewWithT(t), t.Context()
		config := to(testenv.Redis(t))
		admin := connect(t, config)
		config.DB = 3
		g.Expect(CheckAccess(ctx, aclUser(t, admin, Worker, config), config.Keys(), Worker, "worker")).To(Succeed())
		err := CheckAccess(ctx, aclUser(t, admin, Worker, config, "-select"), config.Keys(), Worker, "worker")
		var access *AccessError
		g.Expect(errors.As(err, &access)).To(BeTrue(), "%v", err)
		g.Expect(access.Commands).To(Equal([]string{"SELECT"}))
	})
	t.Run("no password", func(t *testing.T) {
		NewWithT(t).Expect(check(t, to(testenv.Redis(t, "--requirepass", "hunter2")))).To(MatchError(ContainSubstring("--redis-password-file")))
	})
	t.Run("the default user", func(t *testing.T) {
		g := NewWithT(t)
		config := to(testenv.Redis(t))
		admin := connect(t, config)
		client := connect(t, config)
		g.Expect(client.Ping(t.Context()).Err()).To(Succeed())
		g.Expect(admin.Do(t.Context(), "ACL", "SETUSER", "default", "-del").Err()).To(Succeed())
		g.Expect(CheckAccess(t.Context(), client, Keys{}, Worker, "")).To(MatchError(ContainSubstring(`"default"`)))
	})
	t.Run("embedded", func(t *testing.T) { NewWithT(t).Expect(check(t, to(miniredis.RunT(t).Addr()))).To(Succeed()) })
	t.Run("away", func(t *testing.T) {
		err := CheckAccess(t.Context(), unreachable(t), Keys{}, Manager, "")
		var access *AccessError
		NewWithT(t).Expect(err).To(And(HaveOccurred(), Satisfy(func(err error) bool { return !errors.As(err, &access) })))
	})
	t.Run("out of time", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		NewWithT(t).Expect(CheckAccess(ctx, unreachable(t), Keys{}, Manager, "")).To(MatchError(context.Canceled))
	})
}

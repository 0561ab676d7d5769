package app

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	"github.com/spf13/pflag"

	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// takesAnything are the flags of which no value that can be parsed is wrong, and why.
var takesAnything = map[string]string{
	"allow-volatile-redis":  "a bool",
	"redis-tls":             "a bool",
	"leader-elect":          "a bool",
	"metrics-secure":        "a bool",
	"rebalance":             "a bool",
	"insecure-laravel-http": "a bool",
	"drop-messages":         "a bool",
}

// wrongValue is a value that a command must refuse at its start.
type wrongValue struct {
	flag, value string
	// want is part of the sentence; empty: the name of the flag.
	want string
	// with are other flags that the value is wrong with.
	with []string
}

var wrongForBoth = []wrongValue{
	{flag: "kubeconfig", value: "/does/not/exist"},
	{flag: "namespace", value: "", want: "set --namespace"},
	{flag: "namespace", value: "Not_A_Namespace"},
	{flag: "release", value: ""},
	{flag: "release", value: "My Release"},
	{flag: "release", value: strings.Repeat("a", 54)},
	{flag: "metrics-bind-address", value: ""},
	{flag: "metrics-bind-address", value: "8080"},
	{flag: "metrics-bind-address", value: ":http"},
	{flag: "health-bind-address", value: ":65536"},
	{flag: "verbosity", value: "-1"},
	{flag: "verbosity", value: "11"},
	{flag: "start-timeout", value: "-1s"},
	{flag: "start-timeout", value: "2h"},
	{flag: "redis", value: "redis://user:hunter2@host", want: "host:port"},
	{flag: "redis", value: "host", want: "host:port"},
	{flag: "redis", value: "host:0", want: "host:port"},
	{flag: "redis-mode", value: "single", want: "standalone, sentinel or cluster"},
	{flag: "redis-mode", value: "sentinel", want: "the name by which the Sentinels know the master"},
	{flag: "redis-master-name", value: "main", want: "mode sentinel"},
	{flag: "redis-db", value: "-1", want: "negative"},
	{flag: "redis-db", value: "1000001"},
	{flag: "redis-db", value: "1", want: "database 0", with: []string{"--redis-mode=cluster"}},
	{flag: "redis-username", value: "app", want: "password file"},
	{flag: "redis-password-file", value: "/does/not/exist", want: "/does/not/exist"},
	{flag: "redis-sentinel-username", value: "app", want: "Sentinels"},
	{flag: "redis-sentinel-password-file", value: "/does/not/exist", want: "/does/not/exist"},
	{flag: "redis-ca-file", value: "/does/not/exist", want: "/does/not/exist"},
	{flag: "redis-key-prefix", value: "two words", want: "key prefix"},
	{flag: "redis-key-prefix", value: "a{b}", want: "key prefix"},
	{flag: "redis-durability", value: "always", want: "auto, none, replica or fsync"},
	{flag: "store", value: "", want: "set --store or --store-file"},
	{flag: "store", value: "mysql://host/db", want: "the URL of the store must be"},
	{flag: "store", value: "postgres://user:hunter2@host/db", want: "--store holds a password"},
	{flag: "store-file", value: "/does/not/exist", with: []string{"--store="}},
	{flag: "store-file", value: "/does/not/exist", want: "both given"},
	{flag: "store-user-file", value: "/does/not/exist", want: "--store-user-file", with: []string{"--store=postgres://host/db"}},
	{flag: "store-user-file", value: "/does/not/exist", want: "for PostgreSQL"},
	{flag: "store-password-file", value: "/does/not/exist", want: "--store-password-file", with: []string{"--store=postgres://host/db"}},
	{flag: "redis-pool-size", value: "0"},
	{flag: "redis-pool-size", value: "10001"},
	{flag: "pod-uid", value: "a b"},
	{flag: "store-max-connections", value: "-1"},
	{flag: "store-max-connections", value: "10001"},
}

var wrongForManager = []wrongValue{
	{flag: "laravel-url", value: "", want: "--laravel-url is empty"},
	{flag: "metrics-cert-dir", value: "/does/not/exist"},
	{flag: "metrics-cert-dir", value: ".", want: "--metrics-secure is false", with: []string{"--metrics-secure=false"}},
	{flag: "laravel-url", value: "gopher://host", want: "URL of Laravel"},
	{flag: "laravel-url", value: "http://example.com", want: "https"},
	{flag: "laravel-url", value: "https://user:hunter2@host", want: "holds a user or a password"},
	{flag: "laravel-qr-path", value: "qr", want: "a path of Laravel"},
	{flag: "laravel-qr-path", value: "/whatsapp/status/batch", want: "are the same"},
	{flag: "laravel-status-path", value: "//host/x", want: "a path of Laravel"},
	{flag: "laravel-token-file", value: "", want: "bearer token"},
	{flag: "laravel-token-file", value: "/does/not/exist", want: "/does/not/exist"},
	{flag: "laravel-signing-secret-file", value: "/does/not/exist", want: "/does/not/exist"},
	{flag: "laravel-timeout", value: "-1s"},
	{flag: "laravel-timeout", value: "1ms"},
	{flag: "laravel-timeout", value: "1h"},
	{flag: "laravel-ca-file", value: "/does/not/exist", want: "/does/not/exist"},
	{flag: "batch-size", value: "0"},
	{flag: "batch-size", value: "1001"},
	{flag: "laravel-message-path", value: "messages", want: "a path of Laravel"},
	{flag: "laravel-max-message-requests", value: "0"},
	{flag: "laravel-max-message-requests", value: "65"},
	{flag: "laravel-max-requests", value: "0"},
	{flag: "laravel-max-requests", value: "65"},
	{flag: "rebalance-interval", value: "0s"},
	{flag: "rebalance-interval", value: "48h"},
	{flag: "rebalance-after", value: "-1s"},
	{flag: "rebalance-after", value: "48h"},
	{flag: "bundled-stores", value: "mysql", want: "redis, database or both"},
}

var wrongForWorker = []wrongValue{
	{flag: "name", value: ""},
	{flag: "name", value: "Worker_1"},
	{flag: "service-account", value: "name space"},
	{flag: "state-dir", value: ""},
	{flag: "state-dir", value: "config_test.go"},
	{flag: "pool", value: ""},
	{flag: "pool", value: "two words"},
	{flag: "pool", value: "-a"},
	{flag: "pool", value: strings.Repeat("a", 64)},
	{flag: "capacity", value: "0"},
	{flag: "capacity", value: "1000001"},
	{flag: "revision", value: "-1"},
	{flag: "drain-timeout", value: "0s"},
	{flag: "drain-timeout", value: "2h"},
	{flag: "gc-percent", value: "0"},
	{flag: "gc-percent", value: "-1"},
	{flag: "gc-percent", value: "10001"},
	{flag: "logins-per-second", value: "0"},
	{flag: "logins-per-second", value: "NaN"},
	{flag: "logins-per-second", value: "+Inf"},
	{flag: "login-burst", value: "0"},
	{flag: "login-burst", value: "100001"},
	{flag: "pairings-per-second", value: "-1"},
	{flag: "pairings-per-second", value: "NaN"},
	{flag: "pairing-burst", value: "0"},
	{flag: "pairing-burst", value: "100001"},
	{flag: "quarantine-after", value: "0"},
	{flag: "quarantine-first", value: "0s"},
	{flag: "quarantine-first", value: "48h", want: "--quarantine-most is"},
	{flag: "quarantine-most", value: "1s", want: "--quarantine-most is"},
	{flag: "quarantine-most", value: "10000h"},
	{flag: "backlog-session-messages", value: "9"},
	{flag: "backlog-session-bytes", value: "1Mi"},
	{flag: "backlog-session-bytes", value: "-64Mi"},
	{flag: "backlog-session-bytes", value: "2Gi", want: "--backlog-namespace-bytes is 1Gi, which is less than --backlog-session-bytes, 2Gi"},
	{flag: "backlog-namespace-bytes", value: "63Mi", want: "less than --backlog-session-bytes, 64Mi"},
	{flag: "backlog-total-bytes", value: "512Mi", want: "less than --backlog-namespace-bytes, 1Gi"},
	{flag: "backlog-total-bytes", value: "33Ti", want: "choose 2Mi to 32Ti"},
	{flag: "outdated-sessions", value: "0"},
	{flag: "outdated-within", value: "0s"},
	{flag: "outdated-within", value: "25h"},
	{flag: "outdated-pause", value: "0s"},
	{flag: "outdated-pause", value: "25h"},
	{flag: "device-name", value: strings.Repeat("x", 51)},
	{flag: "whatsapp-endpoint", value: "https://host"},
	{flag: "whatsapp-noise-root", value: "00"},
	{flag: "whatsapp-ca-file", value: "/does/not/exist", want: "--whatsapp-ca-file is only for"},
}

// TestEveryFlagIsChecked walks the flags of both commands: each is refused with a
// sentence where its value is wrong, or is one that cannot be.
func TestEveryFlagIsChecked(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	NewWithT(t).Expect(os.WriteFile(secret, []byte(laraveltest.Secret), 0o600)).To(Succeed())
	common := []string{"--kubeconfig=", "--namespace=ops", "--store=sqlite:" + filepath.Join(dir, "keys.db")}
	commands := []struct {
		name  string
		right []string
		wrong []wrongValue
		make  func() (*pflag.FlagSet, func() error)
	}{
		{
			"manager", append([]string{"--laravel-url=https://example.com", "--laravel-token-file=" + secret, "--laravel-signing-secret-file=" + secret}, common...),
			append(wrongForManager, wrongForBoth...),
			func() (*pflag.FlagSet, func() error) {
				c, f := &managerConfig{}, pflag.NewFlagSet("manager", pflag.ContinueOnError)
				c.bind(f)
				return f, c.complete
			},
		},
		{
			"worker", append([]string{"--name=worker-1", "--state-dir=" + dir}, common...),
			append(wrongForWorker, wrongForBoth...),
			func() (*pflag.FlagSet, func() error) {
				c, f := &workerConfig{}, pflag.NewFlagSet("worker", pflag.ContinueOnError)
				c.bind(f)
				return f, c.complete
			},
		},
	}
	for _, command := range commands {
		t.Run(command.name, func(t *testing.T) {
			g := NewWithT(t)
			complete := func(args ...string) error {
				f, complete := command.make()
				g.Expect(f.Parse(append(command.right[:len(command.right):len(command.right)], args...))).To(Succeed())
				return complete()
			}
			g.Expect(complete()).To(Succeed())

			tried := map[string]bool{}
			var allWrong []string
			for _, wrong := range command.wrong {
				tried[wrong.flag] = true
				want := wrong.want
				if want == "" {
					want = "--" + wrong.flag
				}
				err := complete(append([]string{"--" + wrong.flag + "=" + wrong.value}, wrong.with...)...)
				g.Expect(err).To(MatchError(ContainSubstring(want)), "--%s=%s", wrong.flag, wrong.value)
				g.Expect(err.Error()).NotTo(ContainSubstring("hunter2"))
				if wrong.want == "" && wrong.with == nil {
					allWrong = append(allWrong, "--"+wrong.flag+"="+wrong.value)
				}
			}
			err := complete(allWrong...)
			for _, arg := range allWrong {
				flag, _, _ := strings.Cut(arg, "=")
				g.Expect(err).To(MatchError(ContainSubstring(flag)), "all that is wrong is said at once")
			}

			f, _ := command.make()
			f.VisitAll(func(flag *pflag.Flag) {
				_, anything := takesAnything[flag.Name]
				g.Expect(tried[flag.Name] || anything).To(BeTrue(), "--%s is in no table of wrong values", flag.Name)
				g.Expect(flag.Usage).NotTo(BeEmpty(), flag.Name)
			})
		})
	}
}

// TestOutsideOfAPod: without a kubeconfig the error says what to give.
func TestOutsideOfAPod(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	_, err := (&commonConfig{}).rest()
	NewWithT(t).Expect(err).To(MatchError(ContainSubstring("this is not a pod: give --kubeconfig")))
}

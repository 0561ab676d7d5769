package app

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"github.com/spf13/pflag"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// These tests compare the chart with the program; those of hack/chart, which cannot import
// the program, do the rest.

func chartFile(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile("../../charts/whatsapp-operator/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// TestChartHasTheUsersOfRedis: `make manifests` writes the file from what redis-acl prints.
func TestChartHasTheUsersOfRedis(t *testing.T) {
	var want strings.Builder
	for _, role := range redis.Roles {
		line := redis.ACLUser(role, "whatsapp-operator-"+string(role), redis.Config{Addresses: []string{"localhost:6379"}}, false)
		want.WriteString("user " + strings.TrimPrefix(line, "ACL SETUSER ") + "\n")
	}
	NewWithT(t).Expect(chartFile(t, "files/valkey-users.acl")).To(Equal(want.String()), "run make manifests")
}

// TestChartKnowsTheSimulator: the workers' root key is the one that the simulator makes of
// its seed.
func TestChartKnowsTheSimulator(t *testing.T) {
	g := NewWithT(t)
	define := func(name string) string {
		found := regexp.MustCompile(`define "whatsapp-operator.` + name + `" }}([^{]*){{ end }}`).FindStringSubmatch(chartFile(t, "templates/simulator.yaml"))
		g.Expect(found).NotTo(BeNil(), name)
		return found[1]
	}
	root := sha256.Sum256([]byte(define("simulatorSeed")))
	server, err := simulator.New(simulator.Options{RootKey: &root, Logger: logr.Discard()})
	g.Expect(err).NotTo(HaveOccurred())
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	defer func() { _ = server.Run(ended) }() // closes its listeners
	noise := server.NoiseRoot()
	g.Expect(define("simulatorRoot")).To(Equal(hex.EncodeToString(noise[:])))
}

// TestChartsSettingsAreAccepted: what each set of values makes of a process's settings is right,
// but for the files, which are not here. hack/chart writes the list.
func TestChartsSettingsAreAccepted(t *testing.T) {
	content, err := os.ReadFile("../../hack/chart/testdata/processes.json")
	if err != nil {
		t.Fatal(err)
	}
	var processes map[string]struct {
		Args []string          `json:"args"`
		Env  map[string]string `json:"env"`
	}
	if err := json.Unmarshal(content, &processes); err != nil || len(processes) < 20 {
		t.Fatalf("%d processes: %v", len(processes), err)
	}
	for name, p := range processes {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			for key, value := range p.Env {
				if key != "GOMAXPROCS" {
					t.Setenv(key, value)
				}
			}
			flags := pflag.NewFlagSet(name, pflag.ContinueOnError)
			config := map[string]interface {
				bind(*pflag.FlagSet)
				complete() error
			}{"manager": &managerConfig{}, "worker": &workerConfig{}, "bootstrap": &bootstrapConfig{}, "stop": &stopConfig{}}[p.Args[0]]
			config.bind(flags)
			g.Expect(flags.Parse(p.Args[1:])).To(Succeed())
			g.Expect(fromEnvironment(flags)).To(Succeed())
			if err := config.complete(); err != nil && !onlyMissingFiles(err) {
				t.Error(err)
			}
		})
	}
}

// TestDemoInACluster runs what simulator.enabled runs: the phones scan each code that they
// find in a status, and the stand-in for Laravel says what it has received.
func TestDemoInACluster(t *testing.T) {
	s := newEnvironment(t, "")
	token, secret, err := s.laravel.Files(s.dir)
	s.Expect(err).NotTo(HaveOccurred())
	files := []string{"--laravel-token-file=" + token, "--laravel-signing-secret-file=" + secret}
	laravel := s.start("demo-laravel", append([]string{"--listen=127.0.0.1:0"}, files...)...)
	var url string
	s.Eventually(func() string {
		_, rest, _ := strings.Cut(laravel.output(), "Listening on ")
		url, _, _ = strings.Cut(rest, "\n")
		return url
	}).Should(HavePrefix("http://"))
	s.start("manager", slices.Concat([]string{"--leader-elect=false", "--bundled-stores=redis,database", "--laravel-url=" + url}, s.common(), files)...)
	s.worker("worker-1")
	s.start("demo-phones", "--kubeconfig="+s.kube, "--simulator-control="+s.simulator.ControlURL(), "--scan-after=0s")

	s.apply("shop")
	s.phase("shop", v1alpha1.PhaseConnected)
	bounded := &http.Client{Timeout: time.Minute}
	s.Eventually(func() delivery.Status {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/state", http.NoBody)
		s.Expect(err).NotTo(HaveOccurred())
		answer, err := bounded.Do(request)
		s.Expect(err).NotTo(HaveOccurred())
		defer answer.Body.Close()
		var state struct {
			Status map[string]delivery.StatusItem `json:"status"`
		}
		s.Expect(json.NewDecoder(answer.Body).Decode(&state)).To(Succeed())
		return state.Status["shop"].Status
	}).Should(Equal(delivery.Active))
	s.Expect(laravel.output()).To(ContainSubstring("Laravel ← POST"))
}

// TestBundledStoresAreReported: in the log and in an Event; the metric is set.
func TestBundledStoresAreReported(t *testing.T) {
	g := NewWithT(t)
	var messages []string
	event := func(message string) { messages = append(messages, message) }
	reportBundledStores(nil, logr.Discard(), event)
	g.Expect(messages).To(BeEmpty())
	reportBundledStores([]string{bundledRedis, bundledDatabase}, logr.Discard(), event)
	g.Expect(messages).To(ConsistOf(And(ContainSubstring("redis, database"), ContainSubstring("for trying out"), ContainSubstring("docs/install.md"))))
	reportBundledStores(nil, logr.Discard(), event) // the metric is this process's
}

package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	testclock "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/config/crd/bases"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// probed is a process whose probes the test asks, as the kubelet does.
type probed struct {
	*process
	address string
}

// probe starts a process that waits for as long as it takes.
func (s *environment) probe(start func(more ...string) *process, more ...string) *probed {
	address, err := testenv.FreeAddress()
	s.Expect(err).NotTo(HaveOccurred())
	return &probed{process: start(append(more, "--start-timeout=0", "--health-bind-address="+address)...), address: address}
}

func (p *probed) get(path string) (answer string) {
	request, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+p.address+path, http.NoBody)
	if err != nil {
		return err.Error()
	}
	response, err := (&http.Client{Timeout: 10 * time.Second}).Do(request)
	if err != nil {
		return err.Error()
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", response.StatusCode, strings.TrimSpace(string(body)))
}

func (p *probed) healthz() string { return p.get("/healthz") }
func (p *probed) readyz() string  { return p.get("/readyz") }

// podEvent waits for an Event about a pod and returns its text.
func (s *environment) podEvent(pod, reason string) (note string) {
	s.t.Helper()
	s.Eventually(func() bool {
		var all eventsv1.EventList
		s.Expect(s.client.List(context.Background(), &all, client.InNamespace(s.namespace))).To(Succeed())
		for _, e := range all.Items {
			if e.Regarding.Kind == "Pod" && e.Regarding.Name == pod && e.Reason == reason {
				note = e.Note
				return true
			}
		}
		return false
	}).Should(BeTrue(), "an Event %s about the pod %s", reason, pod)
	return note
}

// TestTheStartWaitsForEachServer: the API server, Redis and the database are away when the
// processes start, one after the other comes back, and no process ends.
func TestTheStartWaitsForEachServer(t *testing.T) {
	s := newEnvironment(t, "")
	api, err := url.Parse(apiServer.Config.Host)
	s.Expect(err).NotTo(HaveOccurred())
	apiProxy := testenv.NewTCPProxy(t, api.Host)
	apiProxy.Cut()
	s.Expect(apiServer.WriteKubeconfig(s.kube, apiProxy.Addr())).To(Succeed())
	redisServer := testenv.RedisServer(t)
	redisServer.Stop()
	s.redisAddr = redisServer.Addr()
	database := testenv.PostgresServer(t)
	database.RequirePasswords(map[string]string{"app": "hunter2"})
	s.store = strings.Replace(database.URL(), "postgres@", "app@", 1)
	password := "--store-password-file=" + s.file("password", "hunter3")

	manager := s.probe(s.manager, password)
	worker := s.probe(func(more ...string) *process { return s.worker("worker-1", append(more, "--pod-uid=3f1c9a52")...) }, password)
	both := []*probed{manager, worker}
	waits := func(p *probed, what string) {
		t.Helper()
		s.Eventually(p.readyz).Should(Equal("503 starting: waiting for " + what))
		s.Expect(p.healthz()).To(Equal("200 ok"))
	}
	for _, p := range both {
		s.Eventually(p.healthz).Should(Equal("200 ok"), "from the first moment")
		waits(p, "the API server")
	}

	apiProxy.Restore()
	for _, p := range both {
		waits(p, "Redis")
		s.Eventually(p.output).Should(MatchRegexp(`"Waiting during the start".*"for":"Redis"`), "an attempt has failed")
	}
	s.Expect(s.podEvent("worker-1", "WaitingForRedis")).To(ContainSubstring("connection refused"))

	redisServer.Restart()
	waits(worker, "the store")
	s.Expect(s.podEvent("worker-1", "WaitingForDatabase")).To(And(ContainSubstring("password authentication failed"), Not(ContainSubstring("hunter"))))
	s.Expect(s.podEvent("worker-1", "WaitingEnded")).To(ContainSubstring("Redis"))
	s.Eventually(manager.readyz).Should(Equal("200 ok"), "a manager starts without the database")

	s.file("password", "hunter2")
	for _, p := range both {
		s.Eventually(p.readyz).Should(Equal("200 ok"))
		s.Expect(p.healthz()).To(Equal("200 ok"))
		s.Expect(p.output()).To(And(MatchRegexp(`"Waiting during the start".*"for":"Redis"`), MatchRegexp(`"Waited during the start".*"for":"Redis"`), Not(ContainSubstring("hunter"))))
	}
	s.apply("a")
	s.phase("a", v1alpha1.PhasePairing)

	t.Log("later outages change neither probe")
	apiProxy.Hang()
	redisServer.Kill()
	database.Kill()
	for _, p := range both {
		s.Consistently(func() string { return p.healthz() + p.readyz() }, "2s").Should(Equal("200 ok200 ok"))
	}
	apiProxy.Restore()
	redisServer.Restart()
	database.Restart()
}

func TestOnlyMissingFiles(t *testing.T) {
	_, missing := os.ReadFile("/does/not/exist")
	directory := &fs.PathError{Op: "read", Path: "/", Err: syscall.EISDIR}
	for name, tt := range map[string]struct {
		err  error
		want bool
	}{
		"nothing is wrong":                  {nil, false},
		"a file is missing":                 {fmt.Errorf("--store-file: %w", missing), true},
		"two are missing":                   {errors.Join(fmt.Errorf("a: %w", errors.Join(missing)), nil, missing), true},
		"one is missing, one flag is wrong": {errors.Join(missing, errors.New("--capacity is 0")), false},
		"a file cannot be read":             {directory, false},
		"a flag is wrong":                   {errors.New("--capacity is 0"), false},
	} {
		t.Run(name, func(t *testing.T) { NewWithT(t).Expect(onlyMissingFiles(tt.err)).To(Equal(tt.want)) })
	}
}

// TestTheStartWaitsForItsFiles: a key of a Secret may be added after the pod has started.
func TestTheStartWaitsForItsFiles(t *testing.T) {
	s := newEnvironment(t, "")
	file := filepath.Join(s.dir, "later")
	p := s.probe(s.manager, "--store=", "--store-file="+file)
	s.Eventually(p.readyz).Should(Equal("503 starting: waiting for files that the flags name"))
	s.Expect(p.healthz()).To(Equal("200 ok"))
	s.Eventually(p.output).Should(ContainSubstring("--store-file: open " + file))
	s.file("later", s.store)
	s.Eventually(p.readyz).Should(Equal("200 ok"))
}

// TestTheStartWaitsUntilItIsMended: what a person must mend is said in the log and in an
// Event, and the start continues when it is mended.
func TestTheStartWaitsUntilItIsMended(t *testing.T) {
	s := newEnvironment(t, "")
	s.manager()
	s.apply("known") // the manager has migrated the store when it has its id
	s.Eventually(func() string { return s.get("known").Status.SessionID }).Should(Equal("known"))
	fit, volatile := s.redisAddr, testenv.Redis(t, "--maxmemory-policy", "allkeys-lru")
	evicts := goredis.NewClient(&goredis.Options{Addr: volatile})
	t.Cleanup(func() { _ = evicts.Close() })
	ctx := context.Background()
	others := "sqlite:" + filepath.Join(s.dir, "others.db")
	opened, err := store.Open(ctx, store.Config{URL: others}, logr.Discard())
	s.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { _ = opened.Close() })
	s.Expect(opened.Migrate(ctx)).To(Succeed())
	s.Expect(opened.SetInstallation(ctx, "cluster-x/prod/whatsapp-operator")).To(Succeed())

	for i, tt := range []struct {
		name  string
		flags []string
		// breaks makes it necessary to wait, mends ends that.
		breaks, mends func()
		reason        string
		want          []string
	}{
		{
			name: "a Redis that evicts", breaks: func() { s.redisAddr = volatile },
			mends: func() {
				s.redisAddr = fit
				s.Expect(evicts.ConfigSet(ctx, "maxmemory-policy", "noeviction").Err()).To(Succeed())
			},
			reason: "WaitingForRedis", want: []string{"noeviction", "--allow-volatile-redis"},
		},
		{
			name: "a Redis user that lacks a command", flags: s.redisUser(redis.Worker, "-zadd"), breaks: func() {},
			mends:  func() { s.Expect(s.redis.Do(ctx, "ACL", "SETUSER", string(redis.Worker), "+zadd").Err()).To(Succeed()) },
			reason: "WaitingForRedis", want: []string{"ZADD", "redis-acl"},
		},
		{
			name: "Redis of another installation", flags: []string{"--redis-key-prefix=shared:"},
			breaks: func() {
				s.Expect(s.redis.Set(ctx, "shared:operator:installation", "cluster-x/prod/whatsapp-operator", 0).Err()).To(Succeed())
			},
			mends:  func() { s.Expect(s.redis.Del(ctx, "shared:operator:installation").Err()).To(Succeed()) },
			reason: "StoreOwnedElsewhere", want: []string{"cluster-x/prod/whatsapp-operator", "store adopt"},
		},
		{
			name: "a store of another installation", flags: []string{"--store=" + others}, breaks: func() {},
			mends: func() {
				_, err := opened.Adopt(ctx, s.get("known").Status.Installation)
				s.Expect(err).NotTo(HaveOccurred())
			},
			reason: "StoreOwnedElsewhere", want: []string{"cluster-x/prod/whatsapp-operator", "store adopt"},
		},
	} {
		t.Run(tt.name, func(*testing.T) {
			tt.breaks()
			name := fmt.Sprintf("worker-%d", i)
			p := s.probe(func(more ...string) *process { return s.worker(name, append(more, tt.flags...)...) })
			note := s.podEvent(name, tt.reason)
			for _, sentence := range tt.want {
				s.Expect(note).To(ContainSubstring(sentence))
				s.Expect(p.output()).To(ContainSubstring(sentence))
			}
			s.Expect(p.healthz()).To(Equal("200 ok"))
			s.Expect(p.readyz()).To(ContainSubstring("503 starting: waiting for "))
			tt.mends()
			s.Eventually(p.readyz).Should(Equal("200 ok"))
			p.stop()
		})
	}
}

// TestTheStartWaitsForTheCRD: it is not installed, then older than the program, then right. The
// manager does not lead before.
func TestTheStartWaitsForTheCRD(t *testing.T) {
	s := newEnvironment(t, "")
	server, err := testenv.NewAPIServer()
	s.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	scheme := runtime.NewScheme()
	s.Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	s.Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	api, err := client.New(server.Config, client.Options{Scheme: scheme})
	s.Expect(err).NotTo(HaveOccurred())
	s.Expect(server.WriteKubeconfig(s.kube, "")).To(Succeed())
	s.Expect(api.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.namespace}})).To(Succeed())
	shared := s.client
	s.client = api
	defer func() { s.client = shared }()

	definition := func() *unstructured.Unstructured {
		u := &unstructured.Unstructured{}
		s.Expect(yaml.Unmarshal(bases.WhatsAppSessions, &u.Object)).To(Succeed())
		return u
	}
	apply := func(u *unstructured.Unstructured) {
		t.Helper()
		s.Expect(api.Patch(t.Context(), u, client.Apply, client.FieldOwner("test"), client.ForceOwnership)).To(Succeed()) //nolint:staticcheck // the same for an unstructured object
	}
	s.Expect(api.Delete(t.Context(), definition())).To(Succeed())
	s.Eventually(func() error { return api.Get(t.Context(), client.ObjectKeyFromObject(definition()), definition()) }).ShouldNot(Succeed())

	manager := s.probe(func(more ...string) *process { return s.manager(append(more, "--leader-elect=true")...) })
	worker := s.probe(func(more ...string) *process { return s.worker("worker-1", more...) })
	s.Eventually(manager.output).Should(ContainSubstring("is not installed"))
	s.Expect(manager.readyz()).To(Equal("503 starting: waiting for the CustomResourceDefinition"))

	t.Log("an older one is installed")
	older := func() *unstructured.Unstructured {
		u := definition()
		s.Expect(removeField(u.Object, "status", "holderStart")).To(BeTrue())
		return u
	}
	apply(older())
	s.Eventually(manager.output).Should(And(ContainSubstring("is older than this manager"), ContainSubstring("it lacks .status.holderStart: install"), ContainSubstring("whatsapp-operator crd")))
	s.Expect(manager.healthz()).To(Equal("200 ok"))
	leases := func() (names []string) {
		var all unstructured.UnstructuredList
		all.SetAPIVersion("coordination.k8s.io/v1")
		all.SetKind("LeaseList")
		s.Expect(api.List(t.Context(), &all, client.InNamespace(s.namespace))).To(Succeed())
		for _, l := range all.Items {
			names = append(names, l.GetName())
		}
		return names
	}
	s.Expect(leases()).NotTo(ContainElement(ContainSubstring("manager")), "it does not lead")

	t.Log("the right one is installed")
	apply(definition())
	s.Eventually(manager.readyz).Should(Equal("200 ok"))
	s.Eventually(worker.readyz).Should(Equal("200 ok"))
	s.Expect(leases()).To(ContainElement(ContainSubstring("manager")))
	s.apply("a")
	s.phase("a", v1alpha1.PhasePairing)

	t.Log("a running manager ends when an older one is installed: it must not write with it")
	clk := testclock.NewFakeClock(time.Now())
	d := &dependencies{config: &commonConfig{}, direct: api, clock: clk, log: logr.Discard()}
	ended := make(chan error, 1)
	go func() { ended <- d.watchCRD(t.Context()) }()
	s.Eventually(clk.HasWaiters).Should(BeTrue())
	clk.Step(crdInterval)
	s.Consistently(ended, "200ms").ShouldNot(Receive())
	apply(older())
	s.Eventually(func() chan error { clk.Step(crdInterval); return ended }).Should(Receive(MatchError(ContainSubstring(".status.holderStart"))))
	apply(definition())
}

// removeField removes a field from the schema of a definition.
func removeField(definition map[string]any, path ...string) bool {
	versions, _, _ := unstructured.NestedSlice(definition, "spec", "versions")
	fields := schemaOf(asMap(versions[0]))
	for _, name := range path[:len(path)-1] {
		fields = asMap(asMap(fields["properties"])[name])
	}
	properties := asMap(fields["properties"])
	_, found := properties[path[len(path)-1]]
	delete(properties, path[len(path)-1])
	return found && unstructured.SetNestedSlice(definition, versions, "spec", "versions") == nil
}

func TestWhatAnInstalledDefinitionLacks(t *testing.T) {
	parse := func(text string) (out map[string]any) {
		NewWithT(t).Expect(yaml.Unmarshal([]byte(text), &out)).To(Succeed())
		return out
	}
	own := parse(`
spec: {versions: [{name: v1, served: true, subresources: {status: {}}, selectableFields: [{jsonPath: .status.worker}], schema: {openAPIV3Schema: {properties: {
  spec: {properties: {kind: {enum: [A, B]}, list: {items: {properties: {name: {}}}}, pairs: {additionalProperties: {properties: {value: {}}}}}},
  status: {properties: {phase: {}, qr: {properties: {code: {}}}}}}}}}]}`)
	version := func(properties string) string {
		return `spec: {versions: [{name: v1, served: true, subresources: {status: {}}, selectableFields: [{jsonPath: .status.worker}], schema: {openAPIV3Schema: {properties: {` + properties + `}}}}]}`
	}
	const spec = `spec: {properties: {kind: {enum: [A, B]}, list: {items: {properties: {name: {}}}}, pairs: {additionalProperties: {properties: {value: {}}}}}}`
	const stat = `status: {properties: {phase: {}, qr: {properties: {code: {}}}}}`
	for name, tt := range map[string]struct {
		installed string
		lacking   []string
	}{
		"the same":               {version(spec + ", " + stat), nil},
		"a newer one":            {version(`newer: {}, spec: {properties: {also: {}, kind: {enum: [A, B, C]}, list: {items: {properties: {name: {}}}}, pairs: {additionalProperties: {properties: {value: {}}}}}}, ` + stat), nil},
		"no field":               {version(spec), []string{".status"}},
		"no field below":         {version(spec + `, status: {properties: {phase: {}, qr: {}}}`), []string{".status.qr.code"}},
		"no value":               {version(`spec: {properties: {kind: {enum: [A]}, list: {items: {properties: {name: {}}}}, pairs: {additionalProperties: {properties: {value: {}}}}}}, ` + stat), []string{".spec.kind=B"}},
		"no field in a list":     {version(`spec: {properties: {kind: {}, list: {items: {}}, pairs: {additionalProperties: {properties: {value: {}}}}}}, ` + stat), []string{".spec.list[].name"}},
		"no field in a map":      {version(`spec: {properties: {kind: {}, list: {items: {properties: {name: {}}}}, pairs: {}}}, ` + stat), []string{".spec.pairs.*.value"}},
		"one that keeps all":     {version(`spec: {x-kubernetes-preserve-unknown-fields: true}, status: {x-kubernetes-preserve-unknown-fields: true}`), nil},
		"another version":        {`spec: {versions: [{name: v0, served: true}]}`, []string{"the version v1"}},
		"one that is not served": {`spec: {versions: [{name: v1, served: false}]}`, []string{"the version v1"}},
		"no subresource and no selectable field": {
			`spec: {versions: [{name: v1, served: true, schema: {openAPIV3Schema: {x-kubernetes-preserve-unknown-fields: true}}}]}`,
			[]string{"the subresource status", "the selectable field .status.worker"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			NewWithT(t).Expect(lackingParts(own, parse(tt.installed))).To(Equal(tt.lacking))
		})
	}
}

// TestWithoutLaravel: sessions connect, nothing is delivered, and that is said; what waits is
// delivered as soon as there is a Laravel application. Workers that still drop messages then are
// named.
func TestWithoutLaravel(t *testing.T) {
	s := newEnvironment(t, "")
	address, err := testenv.FreeAddress()
	s.Expect(err).NotTo(HaveOccurred())
	without := s.start("manager", append(s.common(), "--leader-elect=false", "--metrics-secure=false", "--metrics-bind-address="+address)...)
	worker := s.worker("worker-1", "--drop-messages")
	s.apply("a")
	s.scan("a", "+34600111290")
	s.phase("a", v1alpha1.PhaseConnected)
	metrics := &probed{address: address}
	s.Eventually(func() string { return metrics.get("/metrics") }).Should(ContainSubstring("whatsapp_operator_laravel_configured 0"))
	s.Expect(s.podEvent(podOf(&commonConfig{}, "").Name, "LaravelNotConfigured")).To(And(ContainSubstring("--laravel-url"), ContainSubstring("messages are LOST")))
	s.Expect(without.output()).To(ContainSubstring("WARNING: no --laravel-url is given"))
	s.Expect(s.laravel.Status("a")).To(BeZero())
	s.Expect(worker.output()).To(ContainSubstring("WARNING: --drop-messages is set"))
	without.stop()

	s.manager()
	s.expectPublished("a", delivery.Active, v1alpha1.PhaseConnected)
	s.Expect(s.podEvent(podOf(&commonConfig{}, "").Name, "MessagesDropped")).To(ContainSubstring("worker-1"))
}

// insecureClient trusts the self-signed certificate of the metrics.
func insecureClient() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}

// TestWhoReadsTheManagersMetrics: a token whose owner may get /metrics, and nobody else.
func TestWhoReadsTheManagersMetrics(t *testing.T) {
	s := newEnvironment(t, "")
	address, err := testenv.FreeAddress()
	s.Expect(err).NotTo(HaveOccurred())
	s.manager("--metrics-bind-address=" + address)
	token := func(name string) string {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}}
		s.Expect(s.client.Create(t.Context(), account)).To(Succeed())
		request := &authenticationv1.TokenRequest{}
		s.Expect(s.client.SubResource("token").Create(t.Context(), account, request)).To(Succeed())
		return request.Status.Token
	}
	prometheus, stranger := token("prometheus"), token("stranger")
	role := &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: s.namespace + "-metrics"},
		Rules:      []rbacv1.PolicyRule{{NonResourceURLs: []string{"/metrics"}, Verbs: []string{"get"}}},
	}
	s.Expect(s.client.Create(t.Context(), role)).To(Succeed())
	s.Expect(s.client.Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role.Name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: s.namespace, Name: "prometheus"}},
	})).To(Succeed())
	get := func(scheme, token string) func() (string, error) {
		return func() (string, error) {
			request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, scheme+"://"+address+"/metrics", http.NoBody)
			if err != nil {
				return "", err
			}
			if token != "" {
				request.Header.Set("Authorization", "Bearer "+token)
			}
			response, err := insecureClient().Do(request)
			if err != nil {
				return "", err
			}
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			return fmt.Sprintf("%d %s", response.StatusCode, body), err
		}
	}
	s.Eventually(get("https", prometheus)).Should(And(HavePrefix("200 "), ContainSubstring("whatsapp_operator_")))
	s.Expect(get("https", "")()).To(HavePrefix("401 "))
	s.Expect(get("https", "nonsense")()).To(HavePrefix("401 "))
	s.Expect(get("https", stranger)()).To(HavePrefix("403 "))
	clear, err := get("http", prometheus)() // the connection may be reset before the answer
	s.Expect(err != nil || strings.HasPrefix(clear, "400 ")).To(BeTrue(), "not in the clear: %s", clear)
}

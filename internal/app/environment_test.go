package app

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	goredis "github.com/redis/go-redis/v9"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/apiserver"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	childprocess "github.com/whatsapp-operator/whatsapp-operator/internal/process"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

var apiServer *apiserver.Server

func TestMain(m *testing.M) {
	testenv.ProgramMain(func() int {
		root := NewRootCommand()
		withoutProof := workerCommand(func(whatsApp worker.Accounts) worker.Accounts { return accountsWithoutProof{whatsApp} })
		withoutProof.Use = workerWithoutProof
		root.AddCommand(withoutProof)
		return run(root)
	})
	ctrllog.SetLogger(logr.Discard()) // the processes print their own
	server, err := testenv.NewAPIServer()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	apiServer = server
	code := m.Run()
	if err := server.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// waitTimeout bounds waits for whole stories on a loaded machine.
const waitTimeout = 2 * time.Minute

func init() { SetDefaultEventuallyTimeout(waitTimeout) }

// environment is what the program runs in: API server, Redis, a database, the
// simulator, Laravel, and a separate namespace for operator and sessions.
type environment struct {
	*WithT
	t         *testing.T
	dir       string
	namespace string
	client    client.Client
	redisAddr string
	redis     *goredis.Client
	store     string
	simulator *simulator.Server
	laravel   *laraveltest.Receiver
	kube      string
}

func newEnvironment(t *testing.T, store string) *environment {
	g := NewWithT(t)
	g.SetDefaultEventuallyPollingInterval(50 * time.Millisecond)
	s := &environment{WithT: g, t: t, dir: t.TempDir(), redisAddr: testenv.Redis(t), laravel: laraveltest.Start(t, laraveltest.Options{})}
	t.Cleanup(func() {
		for _, breach := range s.laravel.Breaches() {
			t.Error("Laravel was sent what it must not be:", breach)
		}
	})
	s.store = store
	if store == "" {
		s.store = "sqlite:" + filepath.Join(s.dir, "keys.db")
	}
	s.redis = goredis.NewClient(&goredis.Options{Addr: s.redisAddr})
	t.Cleanup(func() { _ = s.redis.Close() })

	scheme := runtime.NewScheme()
	g.Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	g.Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	var err error
	s.client, err = client.New(apiServer.Config, client.Options{Scheme: scheme})
	g.Expect(err).NotTo(HaveOccurred())
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "app-"}}
	g.Expect(s.client.Create(t.Context(), namespace)).To(Succeed())
	s.namespace = namespace.Name
	t.Cleanup(s.clear)
	s.kube = filepath.Join(s.dir, "kubeconfig")
	g.Expect(apiServer.WriteKubeconfig(s.kube, "")).To(Succeed())

	s.simulator, err = simulator.New(simulator.Options{Logger: logr.Discard()})
	g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.simulator.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error("simulator:", err)
		}
		stats := s.simulator.Stats()
		if len(stats.Unknown) > 0 {
			t.Errorf("the simulator got requests that it does not know: %v", stats.Unknown)
		}
		if stats.Doubled > 0 {
			t.Errorf("doubled connections: %d", stats.Doubled)
		}
	})
	return s
}

// clear takes the sessions out of the API server, which other tests use too.
func (s *environment) clear() {
	ctx := context.Background() // the test's own has ended
	var all v1alpha1.WhatsAppSessionList
	s.Expect(s.client.List(ctx, &all)).To(Succeed())
	for _, obj := range all.Items {
		base := obj.DeepCopy()
		obj.Finalizers = nil
		s.Expect(client.IgnoreNotFound(s.client.Patch(ctx, &obj, client.MergeFrom(base)))).To(Succeed())
		s.Expect(client.IgnoreNotFound(s.client.Delete(ctx, &obj))).To(Succeed())
	}
}

// file writes a file into the environment's folder.
func (s *environment) file(name, content string) string {
	path := filepath.Join(s.dir, name)
	s.Expect(os.WriteFile(path, []byte(content), 0o600)).To(Succeed())
	return path
}

func (s *environment) common() []string {
	return []string{
		"--kubeconfig=" + s.kube, "--namespace=" + s.namespace, "--redis=" + s.redisAddr, "--store=" + s.store,
		"--metrics-bind-address=0", "--health-bind-address=0", "--start-timeout=20s",
	}
}

func (s *environment) manager(more ...string) *process {
	flags, err := s.laravel.Flags(s.dir)
	s.Expect(err).NotTo(HaveOccurred())
	args := append(append(s.common(), "--leader-elect=false"), flags...)
	return s.start("manager", append(args, more...)...)
}

func (s *environment) worker(name string, more ...string) *process {
	return s.workerAs("worker", name, more...)
}

// workerAs starts a worker by another command.
func (s *environment) workerAs(command, name string, more ...string) *process {
	args := append(s.common(), "--name="+name, "--state-dir="+filepath.Join(s.dir, name),
		"--whatsapp-endpoint="+s.simulator.Endpoint(), fmt.Sprintf("--whatsapp-noise-root=%x", s.simulator.NoiseRoot()))
	return s.start(command, append(args, more...)...)
}

// process is a run of the program.
type process struct {
	*childprocess.Process
	s  *environment
	mu sync.Mutex
	// out is what it has printed.
	out bytes.Buffer
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// start runs the program; at the end of the test it must end by itself when
// asked to, without an error and without a data race.
func (s *environment) start(command string, args ...string) *process {
	p := &process{s: s}
	var err error
	p.Process, err = testenv.StartProgram(command, p, append([]string{command}, args...)...)
	s.Expect(err).NotTo(HaveOccurred())
	s.t.Cleanup(func() {
		p.stop()
		races, libraries := testenv.DataRaces(p.output())
		for _, report := range libraries {
			s.t.Logf("%s: a data race inside whatsmeow:\n%s", command, report)
		}
		for _, report := range races {
			s.t.Errorf("%s: a data race:\n%s", command, report)
		}
		if s.t.Failed() {
			s.t.Logf("--- %s %s\n%s", command, strings.Join(args, " "), tail(p.output(), 12_000))
		}
	})
	return p
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// stop asks the process to end and waits until it has.
func (p *process) stop() {
	if p.Running() != nil {
		return
	}
	if err := p.Stop(waitTimeout); err != nil {
		p.s.t.Error(err)
	} else if p.Err() != nil {
		p.s.t.Errorf("%s ended with an error at its shutdown: %v", p.Name, p.Err())
	}
}

// fails waits for the process to end by itself with an error and returns what it printed last.
func (p *process) fails() string {
	p.s.Eventually(p.Done()).Should(BeClosed())
	p.s.Expect(p.State().ExitCode()).To(Equal(1), p.output())
	return p.output()
}

// apply creates a session.
func (s *environment) apply(name string, change ...func(*v1alpha1.WhatsAppSession)) *v1alpha1.WhatsAppSession {
	obj := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}}
	for _, c := range change {
		c(obj)
	}
	s.Expect(s.client.Create(s.t.Context(), obj)).To(Succeed())
	return obj
}

// change changes a session's spec or metadata.
func (s *environment) change(name string, f func(*v1alpha1.WhatsAppSession)) {
	obj := s.get(name)
	base := obj.DeepCopy()
	f(obj)
	s.Expect(s.client.Patch(s.t.Context(), obj, client.MergeFrom(base))).To(Succeed())
}

func (s *environment) get(name string) *v1alpha1.WhatsAppSession {
	obj := &v1alpha1.WhatsAppSession{}
	s.Expect(s.client.Get(s.t.Context(), client.ObjectKey{Namespace: s.namespace, Name: name}, obj)).To(Succeed())
	return obj
}

// phase waits until a session is in a phase and returns it.
func (s *environment) phase(name string, p v1alpha1.Phase) *v1alpha1.WhatsAppSession {
	s.t.Helper()
	s.Eventually(func() v1alpha1.Phase { return s.get(name).Status.Phase }).Should(Equal(p), func() string {
		status, _ := json.MarshalIndent(s.get(name).Status, "", " ")
		return name + ": " + string(status)
	})
	return s.get(name)
}

// scan waits for a session's code and scans it with a phone.
func (s *environment) scan(name, phone string) {
	s.t.Helper()
	s.Eventually(func() error {
		qr := s.get(name).Status.QR
		if qr == nil {
			return fmt.Errorf("%s shows no code", name)
		}
		_, err := s.simulator.Scan(s.t.Context(), qr.Code, phone)
		return err
	}).Should(Succeed())
}

// expectPublished waits until the last status that Laravel received of a session is this one.
func (s *environment) expectPublished(sessionID string, want delivery.Status, phase v1alpha1.Phase) delivery.StatusItem {
	s.t.Helper()
	var last delivery.StatusItem
	s.Eventually(func() string {
		last = s.laravel.Status(sessionID)
		return string(last.Status) + "/" + last.Phase
	}).Should(Equal(string(want) + "/" + string(phase)))
	return last
}

// serviceAccount creates a Role, and returns a client that has the rights of this Role and no other.
func serviceAccount(t *testing.T, admin client.Client, role *rbacv1.Role) client.Client {
	t.Helper()
	g := NewWithT(t)
	g.Expect(admin.Create(t.Context(), role)).To(Succeed())
	const name = "limited"
	g.Expect(admin.Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: role.Namespace, Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: role.Namespace, Name: name}},
	})).To(Succeed())
	account := rest.CopyConfig(apiServer.Config)
	account.Impersonate = rest.ImpersonationConfig{
		UserName: "system:serviceaccount:" + role.Namespace + ":" + name, Groups: []string{"system:serviceaccounts", "system:authenticated"},
	}
	limited, err := client.New(account, client.Options{Scheme: clientgoscheme.Scheme})
	g.Expect(err).NotTo(HaveOccurred())
	return limited
}

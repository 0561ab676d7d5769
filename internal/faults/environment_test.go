//go:build faults

package faults

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/apiserver"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

const (
	managerCount = 2
	workerCount  = 4
	// recoveryTimeout bounds every wait until the system has recovered. The longest backoff is two
	// minutes, and a session that is paired makes and stores 812 keys: with the race detector, on
	// two cores that have other work too, some 40 sessions have taken more than four minutes. How
	// fast the system recovers is measured by the benchmarks.
	recoveryTimeout = 10 * time.Minute
	poll            = 200 * time.Millisecond
)

// session is a session that must be connected whenever there is no fault.
type session struct {
	name, phone string
	jid         string // of the device with which it was paired at the beginning
}

// environment holds the sessions and everything that they need: servers, managers, workers.
type environment struct {
	// t belongs to the present case; root belongs to the test that all cases share.
	t, root *testing.T
	// dir contains the logs; it is kept when the test fails.
	dir          string
	namespace    string
	managerFlags []string
	seed         uint64

	api       *apiserver.Server
	apiDown   bool
	redis     *testenv.RedisProcess
	redisDown bool
	store     *testenv.PostgresProcess
	storeDown bool
	client    client.WithWatch
	simulator *simulator.Server
	laravel   *laraveltest.Receiver
	history   *sessionHistory
	traffic   *traffic
	messages  *messages
	floods    int // how many floods have ended
	absences  *absences
	sessions  []*session
	people    *people

	ends   []func()
	dumped bool // dump was called for the present case

	kubelets sync.WaitGroup // the goroutines of the pods' kubelets
	leaving  sync.WaitGroup // pods that are shutting down

	mu         sync.Mutex
	pods       []*pod // all, also the deleted ones
	managers   []*pod // by their place
	workers    []*pod
	podCount   int
	revision   int
	timeline   []string
	violations []string // those of the present case
}

// newEnvironment makes an environment for the test root, whose cases may share it; t is the
// first case.
func newEnvironment(root, t *testing.T, sessions int, managerFlags ...string) *environment {
	dir, err := os.MkdirTemp("", "faults-") //nolint:usetesting // the logs of a failed test are kept
	if err != nil {
		t.Fatal(err)
	}
	w := &environment{t: t, root: root, dir: dir, managerFlags: managerFlags, seed: testenv.Seed(t), revision: 1}
	root.Cleanup(w.end)
	w.atEnd(func() {
		if root.Failed() {
			return // the logs are needed
		}
		if err := os.RemoveAll(dir); err != nil {
			root.Error(err)
		}
	})
	w.api, err = testenv.NewAPIServer()
	w.must(err)
	w.atEnd(func() {
		if err := w.api.Close(); err != nil {
			root.Error(err)
		}
	})
	w.redis, w.store = testenv.RedisServer(root), testenv.PostgresServer(root)
	w.atEnd(w.redis.Kill)
	w.atEnd(w.store.Kill)
	w.messages = newMessages(w)
	w.laravel = newReceiver(root, w.messages.observe)
	w.startSimulator()

	scheme := runtime.NewScheme()
	w.must(clientgoscheme.AddToScheme(scheme))
	w.must(v1alpha1.AddToScheme(scheme))
	w.client, err = client.NewWithWatch(w.api.Config, client.Options{Scheme: scheme})
	w.must(err)
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "faults-"}}
	w.must(w.client.Create(t.Context(), namespace))
	w.namespace = namespace.Name
	w.history = newSessionHistory(w)

	w.atEnd(w.endPods)
	w.managers, w.workers = make([]*pod, managerCount), make([]*pod, workerCount)
	for i := range w.managers {
		w.newManager(i)
	}
	for i := range w.workers {
		w.newWorker(i)
	}
	for _, p := range w.workers {
		w.waitUntilJoined(p)
	}
	w.people = newPeople(w)
	w.pair(sessions)
	w.absences = newAbsences(w)
	w.traffic = newTraffic(w)
	return w
}

func (w *environment) must(err error) {
	if err != nil {
		w.t.Helper()
		w.t.Fatal(err)
	}
}

func (w *environment) startSimulator() {
	var err error
	w.simulator, err = simulator.New(simulator.Options{Logger: logr.Discard()})
	w.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.simulator.Run(ctx) }()
	w.atEnd(func() {
		cancel()
		if err := <-ended; err != nil {
			w.root.Error("simulator:", err)
		}
		if unknown := w.simulator.Stats().Unknown; len(unknown) > 0 {
			w.root.Errorf("the simulator got requests that it does not know: %v", unknown)
		}
	})
}

// atEnd calls f when the environment ends; the last one added is called first.
func (w *environment) atEnd(f func()) { w.ends = append(w.ends, f) }

// every calls f again and again until the environment ends, which waits for it. f gets a
// context that ends then.
func (w *environment) every(interval time.Duration, f func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		wait.NonSlidingUntilWithContext(ctx, f, interval)
	}()
	w.atEnd(func() { cancel(); <-ended })
}

// end stops everything; it may be called again.
func (w *environment) end() {
	for ; len(w.ends) > 0; w.ends = w.ends[:len(w.ends)-1] {
		w.ends[len(w.ends)-1]()
	}
}

// endPods stops all processes and reports the data races in their output.
func (w *environment) endPods() {
	w.mu.Lock()
	pods := slices.Clone(w.pods)
	w.mu.Unlock()
	for _, p := range pods {
		p.markDeleted()
	}
	for _, p := range pods {
		p.remove()
	}
	w.kubelets.Wait()
	w.leaving.Wait()
	for _, p := range pods {
		for _, race := range p.races() {
			w.root.Errorf("%s: a data race:\n%s", p.name, race)
		}
		_ = p.log.Close()
		for _, l := range p.proxies {
			l.Close()
		}
	}
}

// record adds a line to the timeline, which is printed after a failure.
func (w *environment) record(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timeline = append(w.timeline, time.Now().UTC().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// reportViolation records a broken rule, which fails the case.
func (w *environment) reportViolation(format string, args ...any) {
	w.record("WRONG: "+format, args...)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violations = append(w.violations, fmt.Sprintf(format, args...))
}

// kubeconfig writes a kubeconfig with the address of a proxy.
func (w *environment) kubeconfig(name, address string) string {
	path := filepath.Join(w.dir, name+".kubeconfig")
	w.must(w.api.WriteKubeconfig(path, address))
	return path
}

func (w *environment) file(name, content string) string {
	path := filepath.Join(w.dir, name)
	w.must(os.WriteFile(path, []byte(content), 0o600))
	return path
}

func hostPort(url string) string {
	_, after, found := strings.Cut(url, "://")
	if !found {
		return url
	}
	return strings.TrimSuffix(after, "/")
}

func (w *environment) common(p *pod) []string {
	return []string{
		"--kubeconfig=" + w.kubeconfig(p.name, p.proxies[toAPI].Addr()), "--namespace=" + w.namespace,
		"--redis=" + p.proxies[toRedis].Addr(), "--store=" + w.store.URLVia(p.proxies[toStore].Addr()),
		"--metrics-bind-address=0", "--health-bind-address=0", "--start-timeout=20s",
	}
}

func (w *environment) podName(kind string, place int) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.podCount++
	return fmt.Sprintf("%s-%d-%d", kind, place, w.podCount)
}

// newManager starts a manager in a place.
func (w *environment) newManager(place int) *pod {
	upstream := map[service]string{
		toAPI: hostPort(w.api.Config.Host), toRedis: w.redis.Addr(), toStore: w.store.Addr(), toLaravel: hostPort(w.laravel.URL),
	}
	p := w.newPod(w.podName("manager", place), upstream, func(p *pod) []string {
		args := append([]string{"manager", "--laravel-url=http://" + p.proxies[toLaravel].Addr(), "--laravel-token-file=" + w.file("token", laraveltest.Token),
			"--laravel-signing-secret-file=" + w.file("secret", laraveltest.Secret)}, w.common(p)...)
		return append(args, w.managerFlags...)
	})
	w.record("%s is new", p.name)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.managers[place] = p
	return p
}

// newWorker starts a worker of the present revision in a place.
func (w *environment) newWorker(place int) *pod {
	name := w.podName("worker", place)
	uid := w.newPodObject(name)
	upstream := map[service]string{
		toAPI: hostPort(w.api.Config.Host), toRedis: w.redis.Addr(), toStore: w.store.Addr(), toWhatsApp: hostPort(w.simulator.Endpoint()),
	}
	p := w.newPod(name, upstream, func(p *pod) []string {
		return append([]string{"worker", "--name=" + p.name, "--pod-uid=" + string(uid), "--state-dir=" + filepath.Join(w.dir, p.name),
			"--whatsapp-endpoint=ws://" + p.proxies[toWhatsApp].Addr(), fmt.Sprintf("--whatsapp-noise-root=%x", w.simulator.NoiseRoot()),
			fmt.Sprintf("--revision=%d", w.revision), "--drain-timeout=" + drainTimeout.String(),
			"--pairings-per-second=200", "--pairing-burst=200"}, w.common(p)...)
	})
	w.record("%s is new, revision %d", p.name, w.revision)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.workers[place] = p
	return p
}

// newPodObject creates the Pod whose status a kubelet would report. While the API server is
// down it creates none, and the worker starts without a UID.
func (w *environment) newPodObject(name string) types.UID {
	if w.apiDown {
		return ""
	}
	obj := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: membership.ContainerName, Image: "whatsapp-operator"}}},
	}
	w.must(w.client.Create(w.t.Context(), obj))
	return obj.UID
}

// reportContainerEnded reports, as the kubelet does, that a worker's container has ended and will not restart.
func (w *environment) reportContainerEnded(p *pod) {
	obj := &corev1.Pod{}
	w.must(w.client.Get(w.t.Context(), client.ObjectKey{Namespace: w.namespace, Name: p.name}, obj))
	obj.Status.Phase = corev1.PodFailed
	obj.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: membership.ContainerName, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137, FinishedAt: metav1.Now()}},
	}}
	w.must(w.client.Status().Update(w.t.Context(), obj))
}

// waitUntilJoined waits until a worker has a Lease.
func (w *environment) waitUntilJoined(p *pod) {
	w.t.Helper()
	w.eventually("the Lease of "+p.name, func(ctx context.Context) error {
		l := &coordinationv1.Lease{}
		if err := w.client.Get(ctx, client.ObjectKey{Namespace: w.namespace, Name: membership.LeaseName("whatsapp-operator", p.name)}, l); err != nil {
			return err
		}
		if _, err := membership.FromLease(l); err != nil {
			return err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.Spec.RenewTime.Time.Before(p.process.Started) {
			return fmt.Errorf("it was renewed by an earlier process")
		}
		return nil
	})
}

// eventually waits until f succeeds.
func (w *environment) eventually(what string, f func(context.Context) error) {
	w.t.Helper()
	if err := w.await(recoveryTimeout, f); err != nil {
		w.t.Fatalf("waiting for %s: %v", what, err)
	}
}

// await waits until f succeeds, and bounds each of its attempts. If this takes longer than
// most, it returns f's last error.
func (w *environment) await(most time.Duration, f func(context.Context) error) error {
	return testenv.Await(w.t.Context(), most, func(ctx context.Context) error {
		try, done := context.WithTimeout(ctx, 5*time.Second)
		defer done()
		return f(try)
	})
}

// waitFor waits while a fault lasts.
func (w *environment) waitFor(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.t.Context().Done():
	}
}

// apply creates a session.
func (w *environment) apply(ctx context.Context, name string) error {
	err := w.client.Create(ctx, &v1alpha1.WhatsAppSession{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name},
		Spec:       v1alpha1.WhatsAppSessionSpec{DeletionPolicy: v1alpha1.DeletionRetain},
	})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// pair applies the sessions and scans their codes as soon as they are shown.
func (w *environment) pair(n int) {
	start := time.Now()
	byName := map[string]*session{}
	for i := range n {
		s := &session{name: fmt.Sprintf("s-%04d", i), phone: fmt.Sprintf("3460%07d", i+1)}
		w.sessions = append(w.sessions, s)
		byName[s.name] = s
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Minute)
	defer cancel()
	codes := w.history.codes()
	var scans errgroup.Group
	scans.SetLimit(8)
	// Not all at once: a code is valid for a minute, and a pairing costs a tenth of a second.
	waiting := slices.Clone(w.sessions)
	open, scanned := 0, map[string]string{}
	paired := make(chan *session, n)
	for left := n; left > 0; {
		for ; open < 24 && len(waiting) > 0; open++ {
			w.must(w.apply(ctx, waiting[0].name))
			waiting = waiting[1:]
		}
		select {
		case c := <-codes:
			s := byName[c.name]
			if s == nil || scanned[s.name] == c.code {
				continue
			}
			scanned[s.name] = c.code
			scans.Go(func() error {
				jid, err := w.simulator.Scan(ctx, c.code, s.phone)
				if err != nil {
					w.record("the code of %s was refused: %v", s.name, err)
					return nil // the next one is scanned
				}
				s.jid = jid
				paired <- s
				return nil
			})
		case <-paired:
			open--
			left--
		case <-ctx.Done():
			w.t.Fatalf("only %d of %d sessions are paired", n-left, n)
		}
	}
	w.must(scans.Wait())
	w.eventually("all sessions to be connected", w.missing)
	w.record("%d sessions paired in %s", n, time.Since(start).Round(time.Second))
	w.t.Logf("%d sessions paired in %s", n, time.Since(start).Round(time.Second))
}

// leader is the manager that is the leader.
func (w *environment) leader() *pod {
	w.t.Helper()
	var leader *pod
	w.eventually("a leader", func(context.Context) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		leader = nil
		var since time.Time
		for _, p := range w.managers {
			if l := p.leadsSince(); p.isRunning() && l.After(since) {
				leader, since = p, l
			}
		}
		if leader == nil {
			return fmt.Errorf("no manager is the leader")
		}
		return nil
	})
	return leader
}

func (w *environment) allPods() []*pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Concat(w.managers, w.workers)
}

// busiest returns the workers; those with the most sessions come first.
func (w *environment) busiest() []*pod {
	load := map[string]int{}
	for _, s := range w.history.all() {
		load[s.Status.HeldBy]++
	}
	w.mu.Lock()
	workers := slices.Clone(w.workers)
	w.mu.Unlock()
	slices.SortStableFunc(workers, func(a, b *pod) int { return load[b.name] - load[a.name] })
	return workers
}

// The following methods stop and start servers.

func (w *environment) stopAPI() {
	if w.apiDown {
		return
	}
	w.record("the API server is killed")
	w.must(w.api.Kill())
	w.apiDown = true
}

func (w *environment) startAPI() {
	if !w.apiDown {
		return
	}
	w.must(w.api.Restart())
	w.apiDown = false
	w.record("the API server serves again")
}

func (w *environment) stopRedis() {
	w.record("Redis stops")
	w.redis.Stop()
	w.redisDown = true
}

func (w *environment) startRedis(empty bool) {
	if empty {
		w.redis.RestartEmpty()
	} else {
		w.redis.Restart()
	}
	w.redisDown = false
	w.record("Redis serves again, empty: %t", empty)
}

func (w *environment) killStore() {
	w.record("PostgreSQL crashes")
	w.store.Kill()
	w.storeDown = true
}

func (w *environment) startStore() {
	w.store.Restart()
	w.storeDown = false
	w.record("PostgreSQL serves again")
}

// heal ends every fault and starts a pod in every empty place.
func (w *environment) heal() {
	w.endFloods()
	w.laravel.AnswerWith(nil)
	w.startAPI()
	if w.redisDown {
		w.startRedis(false)
	}
	if w.storeDown {
		w.startStore()
	}
	if _, err := w.simulator.Clear("", ""); err != nil {
		w.reportViolation("the simulator: %v", err)
	}
	w.people.rearm()
	for _, p := range w.allPods() {
		p.restore()
	}
	w.leaving.Wait()
	for i, p := range w.managers {
		if p.isDeleted() {
			w.newManager(i)
		}
	}
	for i, p := range w.workers {
		if p.isDeleted() {
			w.newWorker(i)
		}
	}
	w.record("healed")
}

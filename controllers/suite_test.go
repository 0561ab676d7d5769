package controllers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	clocktesting "k8s.io/utils/clock/testing"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

// All tests of this package use one API server; each test has its own namespaces and its own
// manager.
var (
	restConfig *rest.Config
	k8s        client.WithWatch
	scheme     = runtime.NewScheme()
)

const (
	release      = "main"
	installation = "cluster-1/operators/" + release
	testTimeout  = time.Minute
	pollInterval = 10 * time.Millisecond
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	ctrl.SetLogger(logr.Discard())
	stop, err := start()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the API server:", err)
		return 1
	}
	return code
}

func start() (stop func() error, err error) {
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	if restConfig, stop, err = testenv.StartAPIServer(); err != nil {
		return nil, err
	}
	if k8s, err = client.NewWithWatch(restConfig, client.Options{Scheme: scheme}); err == nil {
		err = readRoles()
	}
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	return stop, nil
}

// The managers of these tests have only the rights of the generated roles.
const managerUser = "whatsapp-operator-manager"

var managerRole rbacv1.Role // of the operator's namespace

func readRoles() error {
	file, err := os.Open("../config/rbac/manager_role.yaml")
	if err != nil {
		return err
	}
	defer file.Close()
	var clusterRole rbacv1.ClusterRole
	documents := yaml.NewYAMLOrJSONDecoder(file, 4096)
	if err := errors.Join(documents.Decode(&clusterRole), documents.Decode(&managerRole)); err != nil {
		return err
	}
	return errors.Join(
		k8s.Create(context.Background(), &clusterRole),
		k8s.Create(context.Background(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: managerUser},
			Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: managerUser}},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: clusterRole.Name},
		}),
	)
}

// grant gives the manager its role in the operator's namespace.
func (w *env) grant() {
	w.t.Helper()
	role := managerRole.DeepCopy()
	role.Namespace = w.operator
	w.Expect(k8s.Create(w.t.Context(), role)).To(Succeed())
	w.Expect(k8s.Create(w.t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.operator, Name: managerUser},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: managerUser}},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
	})).To(Succeed())
}

// env is a manager with everything that it uses. The test does what workers would do.
type env struct {
	*WithT
	t     *testing.T
	ids   *fakeIDs
	redis *fakeRedis
	clock *clocktesting.FakeClock
	// deaths says which workers are dead.
	deaths *fakeDeaths

	operator, a, b string // namespaces: the operator's and two tenants'
	installation   string
	elect          bool // the manager takes part in a leader election
	log            logBuffer
	reconciler     *SessionReconciler
	stop           func()
}

func newEnv(t *testing.T) *env {
	t.Helper()
	w := &env{
		WithT: NewWithT(t), t: t, redis: &fakeRedis{}, ids: newFakeIDs(), installation: installation,
		clock: clocktesting.NewFakeClock(time.Now().Truncate(time.Second)), deaths: newFakeDeaths(),
	}
	w.operator, w.a, w.b = w.namespace("operator-"), w.namespace("a-"), w.namespace("b-")
	w.grant()
	w.start()
	return w
}

// otherInstallation is a manager of another installation for the same tenants, with its own
// store, Redis and workers. It is not started.
func (w *env) otherInstallation(operator, installation string) *env {
	w.t.Helper()
	o := &env{
		WithT: w.WithT, t: w.t, redis: &fakeRedis{}, ids: newFakeIDs(), clock: w.clock, deaths: newFakeDeaths(),
		operator: operator, a: w.a, b: w.b, installation: installation, elect: w.elect,
	}
	if operator != w.operator {
		o.grant()
	}
	return o
}

// releaseName is the last part of the installation's id.
func (w *env) releaseName() string {
	_, _, name := splitInstallation(w.installation)
	return name
}

func (w *env) namespace(prefix string) string {
	w.t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: prefix}}
	w.Expect(k8s.Create(w.t.Context(), ns)).To(Succeed())
	return ns.Name
}

// start runs a manager that sees only this test's namespaces.
func (w *env) start() {
	w.t.Helper()
	cacheOptions := CacheOptions(w.operator, w.releaseName())
	for obj, by := range cacheOptions.ByObject {
		if _, ok := obj.(*v1alpha1.WhatsAppSession); ok {
			by.Namespaces = map[string]cache.Config{w.a: {}, w.b: {}}
			cacheOptions.ByObject[obj] = by
		}
	}
	skip := true
	manager := rest.CopyConfig(restConfig)
	manager.Impersonate.UserName = managerUser
	mgr, err := ctrl.NewManager(manager, ctrl.Options{
		Scheme: scheme, Cache: cacheOptions, Metrics: metricsserver.Options{BindAddress: "0"},
		Controller: config.Controller{SkipNameValidation: &skip}, Logger: logr.Discard(),
		LeaderElection: w.elect, LeaderElectionID: membership.LeaderLeaseName(w.releaseName()), LeaderElectionNamespace: w.operator,
		LeaderElectionReleaseOnCancel: true,
	})
	w.Expect(err).NotTo(HaveOccurred())
	w.reconciler, err = SetupSession(mgr, SessionOptions{
		Installation: w.installation, IDs: w.ids, Publisher: w.redis, Clock: w.clock, Log: w.log.logger(), Concurrency: 4,
	})
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(SetupPlacement(mgr, PlacementOptions{
		Installation: w.installation, Clock: w.clock, Log: logr.Discard(), Deaths: w.deaths, Deletions: w.reconciler.Deletions, Namespace: w.operator, Release: w.releaseName(),
		RebalanceInterval: 10 * time.Second, RebalanceAfter: 5 * time.Minute,
	})).To(Succeed())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- mgr.Start(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("the manager ended with: %v", err)
		}
	})
	w.t.Cleanup(w.stop)
}

// logged returns what the session controller has logged.
func (w *env) logged() string { return w.log.text() }

// logBuffer keeps the lines that are logged.
type logBuffer struct {
	mu    sync.Mutex
	lines []string
}

func (l *logBuffer) logger() logr.Logger {
	return funcr.New(func(prefix, args string) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.lines = append(l.lines, prefix+" "+args)
	}, funcr.Options{})
}

func (l *logBuffer) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

// apply creates a session.
func (w *env) apply(namespace, name string, change ...func(*v1alpha1.WhatsAppSession)) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	for _, c := range change {
		c(s)
	}
	w.Expect(k8s.Create(w.t.Context(), s)).To(Succeed())
	return s
}

func withID(id string) func(*v1alpha1.WhatsAppSession) {
	return func(s *v1alpha1.WhatsAppSession) { s.Spec.SessionID = id }
}

func suspended(s *v1alpha1.WhatsAppSession) { s.Spec.Suspend = true }

func retain(s *v1alpha1.WhatsAppSession) { s.Spec.DeletionPolicy = v1alpha1.DeletionRetain }

// get reads a session from the API server.
func (w *env) get(s *v1alpha1.WhatsAppSession) (*v1alpha1.WhatsAppSession, error) {
	out := &v1alpha1.WhatsAppSession{}
	return out, k8s.Get(w.t.Context(), client.ObjectKeyFromObject(s), out)
}

// waitFor waits until check passes for the session, and returns the session.
func (w *env) waitFor(s *v1alpha1.WhatsAppSession, check func(g Gomega, s *v1alpha1.WhatsAppSession)) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	var now *v1alpha1.WhatsAppSession
	w.Eventually(func(g Gomega) {
		var err error
		now, err = w.get(s)
		g.Expect(err).NotTo(HaveOccurred())
		check(g, now)
	}, testTimeout, pollInterval).Should(Succeed())
	return now
}

// placed waits until the session is placed on worker.
func (w *env) placed(s *v1alpha1.WhatsAppSession, worker string) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	return w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Worker).To(Equal(worker)) })
}

// phase waits until the session is in a phase for a reason.
func (w *env) phase(s *v1alpha1.WhatsAppSession, phase v1alpha1.Phase, reason string) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	return w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Status.Phase).To(Equal(phase))
		g.Expect(status.Reason(s.Status)).To(Equal(reason))
	})
}

// gone waits until the object is gone.
func (w *env) gone(s *v1alpha1.WhatsAppSession) {
	w.t.Helper()
	w.Eventually(func() bool {
		_, err := w.get(s)
		return apierrors.IsNotFound(err)
	}, testTimeout, pollInterval).Should(BeTrue())
}

// advance sets the clock to d after now, also after now by the API server's clock, which
// writes the time of a deletion.
func (w *env) advance(d time.Duration) {
	now := w.clock.Now()
	if real := time.Now(); real.After(now) {
		now = real.Truncate(time.Second)
	}
	w.clock.SetTime(now.Add(d))
}

// withdrawnByDeadline advances the clock until the deadline for the logout of a deleted
// session that is held is over, and the manager has withdrawn its placement. The time counts
// from when the manager has seen the deletion.
func (w *env) withdrawnByDeadline(s *v1alpha1.WhatsAppSession) (withdrawn *v1alpha1.WhatsAppSession) {
	w.t.Helper()
	w.Eventually(func(g Gomega) {
		w.clock.SetTime(w.clock.Now().Add(session.LogoutTimeout + time.Second))
		w.touch(s)
		g.Eventually(func(g Gomega) {
			var err error
			withdrawn, err = w.get(s)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(withdrawn.Status.Worker).To(BeEmpty())
		}, "1s", pollInterval).Should(Succeed())
	}, testTimeout, pollInterval).Should(Succeed())
	return withdrawn
}

func (w *env) delete(s *v1alpha1.WhatsAppSession) {
	w.t.Helper()
	w.Expect(k8s.Delete(w.t.Context(), s)).To(Succeed())
}

// edit changes the object as a person would.
func (w *env) edit(s *v1alpha1.WhatsAppSession, change func(*v1alpha1.WhatsAppSession)) {
	w.t.Helper()
	now, err := w.get(s)
	w.Expect(err).NotTo(HaveOccurred())
	base := now.DeepCopy()
	change(now)
	w.Expect(k8s.Patch(w.t.Context(), now, client.MergeFrom(base))).To(Succeed())
}

// touch makes the manager reconcile a session, as its timer would, which a fake clock does
// not advance. The session may be gone already.
func (w *env) touch(s *v1alpha1.WhatsAppSession) {
	w.t.Helper()
	patch := fmt.Sprintf(`{"metadata":{"annotations":{"test/touched":%q}}}`, time.Now().Format(time.RFC3339Nano))
	gone := k8s.Patch(w.t.Context(), s.DeepCopy(), client.RawPatch(types.MergePatchType, []byte(patch)))
	w.Expect(client.IgnoreNotFound(gone)).To(Succeed())
}

func (w *env) restart(s *v1alpha1.WhatsAppSession, value string) {
	w.t.Helper()
	w.edit(s, func(s *v1alpha1.WhatsAppSession) {
		metav1.SetMetaDataAnnotation(&s.ObjectMeta, v1alpha1.RestartedAtAnnotation, value)
	})
}

// holder writes a status as the worker that holds the session does. It tries again after a
// conflict.
func (w *env) holder(s *v1alpha1.WhatsAppSession, phase v1alpha1.Phase, reason string, change func(*v1alpha1.WhatsAppSessionStatus)) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	var now *v1alpha1.WhatsAppSession
	w.Eventually(func(g Gomega) {
		var err error
		now, err = w.get(s)
		g.Expect(err).NotTo(HaveOccurred())
		next := *now.Status.DeepCopy()
		change(&next)
		next = status.Summarize(next, status.Facts{Generation: now.Generation, Phase: phase, Reason: reason}, w.clock.Now())
		g.Expect(patchStatus(w.t.Context(), k8s, now, next)).To(Succeed())
	}, testTimeout, pollInterval).Should(Succeed())
	return now
}

// hold claims the session and connects it, as a worker does.
func (w *env) hold(s *v1alpha1.WhatsAppSession, worker string) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	jid, phone := "34600111222:3@s.whatsapp.net", "+34600111222"
	w.ids.link(s.SessionID(), jid, phone)
	return w.holder(s, v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.HeldBy, next.HolderStart, next.JID, next.PhoneNumber = worker, "p1", jid, phone
	})
}

// pair claims the session and offers codes, as a worker does.
func (w *env) pair(s *v1alpha1.WhatsAppSession, worker string) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	return w.holder(s, v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForScan, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.HeldBy, next.HolderStart = worker, "p1"
	})
}

// release releases the session, as a worker does that has closed its connection.
func (w *env) release(s *v1alpha1.WhatsAppSession) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	return w.holder(s, v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.HeldBy, next.HolderStart = "", ""
	})
}

// forgets is a worker that logs the device out and deletes its record.
func (w *env) forgets(s *v1alpha1.WhatsAppSession, worker string) {
	w.t.Helper()
	w.holder(s, v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.HeldBy, next.HolderStart = worker, "p1"
	})
	w.ids.forget(s.SessionID())
	w.holder(s, v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.HeldBy, next.HolderStart, next.JID = "", "", ""
	})
}

// worker creates a worker's Lease, or renews it with a change.
func (w *env) worker(name string, change ...func(*membership.Member)) {
	w.t.Helper()
	member := membership.Member{
		Release: w.releaseName(), Name: name, Incarnation: "i1", Pool: v1alpha1.DefaultPool, Revision: 1, Capacity: 100, Tokens: 200,
		RenewTime: w.clock.Now(), Duration: membership.Duration,
	}
	for _, c := range change {
		c(&member)
	}
	l := &coordinationv1.Lease{}
	err := k8s.Get(w.t.Context(), types.NamespacedName{Namespace: w.operator, Name: membership.LeaseName(w.releaseName(), name)}, l)
	if apierrors.IsNotFound(err) {
		l.Namespace, l.Name = w.operator, membership.LeaseName(w.releaseName(), name)
		member.Into(l)
		w.Expect(k8s.Create(w.t.Context(), l)).To(Succeed())
		return
	}
	w.Expect(err).NotTo(HaveOccurred())
	member.Into(l)
	w.Expect(k8s.Update(w.t.Context(), l)).To(Succeed())
}

func capacity(n int) func(*membership.Member) { return func(m *membership.Member) { m.Capacity = n } }
func inPool(name string) func(*membership.Member) {
	return func(m *membership.Member) { m.Pool = name }
}
func draining(m *membership.Member) { m.Draining = true }

// removeWorker deletes a worker's Lease, as a worker does that leaves.
func (w *env) removeWorker(name string) {
	w.t.Helper()
	w.Expect(k8s.Delete(w.t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: w.operator, Name: membership.LeaseName(w.releaseName(), name)}})).To(Succeed())
}

// event waits for an Event of the session and returns its text.
func (w *env) event(s *v1alpha1.WhatsAppSession, reason string) string {
	w.t.Helper()
	var note string
	w.Eventually(func() bool {
		events := &eventsv1.EventList{}
		if err := k8s.List(w.t.Context(), events, client.InNamespace(s.Namespace)); err != nil {
			return false
		}
		return slices.ContainsFunc(events.Items, func(e eventsv1.Event) bool {
			note = e.Note
			return e.Regarding.Name == s.Name && e.Reason == reason
		})
	}, testTimeout, pollInterval).Should(BeTrue(), "there is no Event "+reason)
	return note
}

// condition is "Status/Reason".
func condition(s *v1alpha1.WhatsAppSession, kind string) string {
	c := meta.FindStatusCondition(s.Status.Conditions, kind)
	if c == nil {
		return ""
	}
	return string(c.Status) + "/" + c.Reason
}

// fakeIDs is a store of records in memory.
type fakeIDs struct {
	mu       sync.Mutex
	records  map[string]*Record
	released map[types.UID]Release
	former   []string
	err      error
	// claimed is called once, after the next claim and before its answer.
	claimed func()
}

func newFakeIDs() *fakeIDs {
	return &fakeIDs{records: map[string]*Record{}, released: map[types.UID]Release{}}
}

func (f *fakeIDs) Former(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.former, f.err
}

func (f *fakeIDs) Record(_ context.Context, id string) (*Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.records[foldID(id)]; r != nil {
		kept := *r
		return &kept, f.err
	}
	return nil, f.err
}

func (f *fakeIDs) Claim(_ context.Context, c Claimant, gone func(types.UID) bool) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return false, f.err
	}
	r := f.records[foldID(c.SessionID)]
	if r == nil {
		r = &Record{Namespace: c.Namespace, UID: c.UID}
		f.records[foldID(c.SessionID)] = r
	}
	if r.Namespace != c.Namespace || r.UID != c.UID && !gone(r.UID) {
		return false, nil
	}
	r.UID = c.UID
	if then := f.claimed; then != nil {
		f.claimed = nil
		then()
	}
	return true, nil
}

func (f *fakeIDs) Release(_ context.Context, uid types.UID, how Release) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released[uid] = how
	for id, r := range f.records {
		if r.UID == uid && (how == ReleaseForget || r.JID == "") {
			delete(f.records, foldID(id))
		}
	}
	return f.err
}

func (f *fakeIDs) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeIDs) link(id, jid, phone string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.records[foldID(id)].JID, f.records[foldID(id)].PhoneNumber = jid, phone
}

func (f *fakeIDs) has(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.records[foldID(id)] != nil
}

func (f *fakeIDs) forget(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.records, foldID(id))
}

func (f *fakeIDs) releasedAs(uid types.UID) Release {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.released[uid]
}

// fakeDeaths says what a test has set about each worker.
type fakeDeaths struct {
	mu      sync.Mutex
	dead    map[string]bool
	silent  map[string]bool // workers whose Lease is silent
	renewed map[string]bool // workers that the next observation shows as alive
	changed chan struct{}
}

func newFakeDeaths() *fakeDeaths {
	return &fakeDeaths{dead: map[string]bool{}, silent: map[string]bool{}, renewed: map[string]bool{}, changed: make(chan struct{}, 1)}
}

// renew renews the heartbeats of a worker that was declared dead. The next observation shows it.
func (f *fakeDeaths) renew(worker string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.renewed[worker] = true
}

func (f *fakeDeaths) Confirm(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for worker := range f.renewed {
		f.dead[worker] = false
	}
	return nil
}

func (f *fakeDeaths) Dead(worker string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dead[worker]
}

func (f *fakeDeaths) LeaseSilent(worker string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.silent[worker]
}

// setSilent makes a worker's Lease silent, or not.
func (f *fakeDeaths) setSilent(worker string, silent bool) {
	f.mu.Lock()
	f.silent[worker] = silent
	f.mu.Unlock()
	f.signal()
}

func (f *fakeDeaths) Changed() <-chan struct{} { return f.changed }

func (f *fakeDeaths) set(worker string, dead bool) {
	f.mu.Lock()
	f.dead[worker] = dead
	delete(f.renewed, worker)
	f.mu.Unlock()
	f.signal()
}

func (f *fakeDeaths) signal() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// fakeRedis keeps the newest status of each session, as the queue's scripts do.
type fakeRedis struct {
	mu      sync.Mutex
	items   map[string]delivery.StatusItem
	deleted map[string]bool
	err     error
	// then is called once, after the next item was stored and before the answer.
	then func()
}

// remember stores a status that another program has published.
func (f *fakeRedis) remember(item delivery.StatusItem) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.items == nil {
		f.items, f.deleted = map[string]delivery.StatusItem{}, map[string]bool{}
	}
	f.items[item.SessionID] = item
}

func (f *fakeRedis) Enqueue(_ context.Context, item delivery.StatusItem) error {
	f.mu.Lock()
	defer func() {
		then := f.then
		f.then = nil
		f.mu.Unlock()
		if then != nil {
			then()
		}
	}()
	if f.err != nil {
		return f.err
	}
	old, ok := f.items[item.SessionID]
	if ok && old.Newer(item.Numbers) {
		return item.Stale(old.Numbers)
	}
	if !ok || item.Newer(old.Numbers) {
		if f.items == nil {
			f.items, f.deleted = map[string]delivery.StatusItem{}, map[string]bool{}
		}
		f.items[item.SessionID] = item
		delete(f.deleted, item.SessionID)
	}
	return nil
}

func (f *fakeRedis) Update(ctx context.Context, item delivery.StatusItem) (bool, error) {
	if f.status(item.SessionID) == "" {
		f.mu.Lock()
		defer f.mu.Unlock()
		return false, f.err
	}
	return true, f.Enqueue(ctx, item)
}

func (f *fakeRedis) Deleted(ctx context.Context, item delivery.StatusItem) error {
	if err := f.Enqueue(ctx, item); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deleted[item.SessionID] = true
	return nil
}

func (f *fakeRedis) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeRedis) empty() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.items = nil
}

func (f *fakeRedis) gone(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.deleted[id]
}

// status is "status/phase/reason" of the newest published status of a session.
func (f *fakeRedis) status(id string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, ok := f.items[id]
	if !ok {
		return ""
	}
	return strings.Join([]string{string(i.Status), i.Phase, i.Reason}, "/")
}

func (f *fakeRedis) numbers(id string) delivery.Numbers {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.items[id].Numbers
}

// published waits until this status of a session is published.
func (w *env) published(id, what string) {
	w.t.Helper()
	w.Eventually(func() string { return w.redis.status(id) }, testTimeout, pollInterval).Should(Equal(what))
}

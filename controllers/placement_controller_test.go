package controllers

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	clocktesting "k8s.io/utils/clock/testing"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
)

func TestASessionIsPlacedWhenItsPoolHasRoom(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	s := w.phase(w.apply(w.a, "one"), v1alpha1.PhasePending, v1alpha1.ReasonNoWorkers)
	w.published("one", "pending/Pending/NoWorkers")
	w.worker("worker-a", capacity(1))
	w.placed(s, "worker-a")

	late := w.phase(w.apply(w.a, "two"), v1alpha1.PhasePending, v1alpha1.ReasonNoCapacity)
	w.Expect(condition(late, v1alpha1.ConditionPlaced)).To(Equal("False/NoCapacity"))
	w.Expect(w.event(late, v1alpha1.ReasonNoCapacity)).To(ContainSubstring(`the pool "default" that can take sessions is full`))
	w.published("two", "pending/Pending/NoCapacity")

	w.worker("worker-b", capacity(1))
	placed := w.placed(late, "worker-b")
	w.Expect(condition(placed, v1alpha1.ConditionPlaced)).To(Equal("True/Placed"))
	w.Expect(placed.Status.Epoch).To(BeNumerically(">", late.Status.Epoch))
	w.published("two", "pending/Pending/Placed")
}

func TestTheSessionsOfADrainingWorkerMove(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	held := w.hold(w.placed(w.apply(w.a, "held"), "worker-a"), "worker-a")
	free := w.placed(w.apply(w.a, "free"), "worker-a")

	w.worker("worker-b")
	w.worker("worker-a", draining)
	moved := w.placed(held, "worker-b")
	w.Expect(moved.Status.Epoch).To(BeNumerically(">", held.Status.Epoch))
	w.Expect(moved.Status.HeldBy).To(Equal("worker-a"))
	moved.Status.Worker, moved.Status.Epoch = held.Status.Worker, held.Status.Epoch
	w.Expect(moved.Status).To(Equal(held.Status), "the manager writes only the worker and the epoch of a held session")
	w.placed(free, "worker-b")

	t.Log("the old holder releases it, and the new worker claims it")
	w.release(held)
	released := w.waitFor(held, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.HeldBy).To(BeEmpty()) })
	w.Expect(released.Status.Worker).To(Equal("worker-b"))
	w.Expect(released.Status.Phase).To(Equal(v1alpha1.PhaseDisconnected))
	w.published("held", "pending/Disconnected/Moving")

	t.Log("the last worker releases its sessions before its grace ends")
	w.hold(held, "worker-b")
	w.removeWorker("worker-a")
	w.worker("worker-b", draining)
	w.placed(held, "")
	w.release(held)
	w.phase(held, v1alpha1.PhasePending, v1alpha1.ReasonNoWorkers)
}

func TestASilentWorkerKeepsItsSessions(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	held := w.hold(w.placed(w.apply(w.a, "held"), "worker-a"), "worker-a")
	free := w.placed(w.apply(w.a, "free"), "worker-a")
	w.clock.SetTime(w.clock.Now().Add(membership.Duration + time.Second))
	w.worker("worker-b")
	w.placed(free, "worker-b")
	now, err := w.get(held)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.Status).To(Equal(held.Status), "nobody has declared worker-a dead")

	t.Log("it is not dead either when its lease is gone")
	w.removeWorker("worker-a")
	w.placed(w.apply(w.a, "next"), "worker-b")
	now, err = w.get(held)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.Status).To(Equal(held.Status))
}

func TestNamespacesChooseThePoolAndTheLimit(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	w.worker("worker-blue", inPool("blue"))
	label := func(namespace string, change func(*corev1.Namespace)) {
		ns := &corev1.Namespace{}
		w.Expect(k8s.Get(t.Context(), types.NamespacedName{Name: namespace}, ns)).To(Succeed())
		base := ns.DeepCopy()
		change(ns)
		w.Expect(k8s.Patch(t.Context(), ns, client.MergeFrom(base))).To(Succeed())
	}
	label(w.b, func(ns *corev1.Namespace) {
		metav1.SetMetaDataLabel(&ns.ObjectMeta, v1alpha1.PoolLabel, "blue")
		metav1.SetMetaDataAnnotation(&ns.ObjectMeta, v1alpha1.MaxSessionsAnnotation, "1")
	})
	w.placed(w.apply(w.a, "one"), "worker-a")
	blue := w.apply(w.b, "two")
	// The manager may see the session before the label: then the session moves.
	w.waitFor(blue, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Worker).To(Equal("worker-blue")) })
	third := w.phase(w.apply(w.b, "three"), v1alpha1.PhasePending, v1alpha1.ReasonTooManySessions)
	w.Expect(w.event(third, v1alpha1.ReasonTooManySessions)).To(ContainSubstring("the 1 sessions"))

	label(w.b, func(ns *corev1.Namespace) { ns.Annotations[v1alpha1.MaxSessionsAnnotation] = "2" })
	w.placed(third, "worker-blue")

	label(w.b, func(ns *corev1.Namespace) { ns.Annotations[v1alpha1.MaxSessionsAnnotation] = "many" })
	w.placed(w.apply(w.b, "four"), "worker-blue")
}

// newPlacement returns a placement reconciler without a manager, with a client that the test chooses.
func (w *env) newPlacement(c client.Client) *placementReconciler {
	return newPlacementReconciler(
		PlacementOptions{Installation: installation, Clock: w.clock, Log: logr.Discard(), Deaths: w.deaths, Deletions: &Deletions{}, Concurrency: 4},
		c, k8s, events.NewFakeRecorder(100))
}

// waiting creates sessions that hold their ids and wait for a worker, without a running manager.
func (w *env) waiting(n int) []v1alpha1.WhatsAppSession {
	w.t.Helper()
	w.stop()
	out := make([]v1alpha1.WhatsAppSession, n)
	for i := range out {
		s := w.apply(w.a, fmt.Sprintf("s%d", i))
		w.Expect(patchStatus(w.t.Context(), k8s, s, v1alpha1.WhatsAppSessionStatus{
			SessionID: s.Name, Installation: installation, Phase: v1alpha1.PhasePending,
		})).To(Succeed())
		out[i] = *s
	}
	return out
}

// seeing is a client whose cache shows these sessions, however stale they are.
func clientShowing(sessions *[]v1alpha1.WhatsAppSession, more interceptor.Funcs) client.Client {
	more.List = func(ctx context.Context, c client.WithWatch, list client.ObjectList, _ ...client.ListOption) error {
		if l, ok := list.(*v1alpha1.WhatsAppSessionList); ok {
			l.Items = *sessions
			return nil
		}
		return c.List(ctx, list)
	}
	return interceptor.NewClient(k8s, more)
}

// leaseOf is a worker's Lease that is renewed now.
func (w *env) leaseOf(name string, change ...func(*membership.Member)) *coordinationv1.Lease {
	m := membership.Member{
		Release: release, Name: name, Incarnation: "i1", Pool: v1alpha1.DefaultPool, Capacity: 100, Tokens: 100, RenewTime: w.clock.Now(), Duration: membership.Duration,
	}
	for _, c := range change {
		c(&m)
	}
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: membership.LeaseName(release, name)}}
	m.Into(l)
	return l
}

// lease shows r the Lease of a worker that has just joined.
func (w *env) lease(r *placementReconciler, name string, change ...func(*membership.Member)) {
	w.Expect(r.members.observe(w.leaseOf(name, change...))).To(BeTrue())
}

// runPlacement runs r once, reads the sessions again, and returns after what time the next run is due.
func (w *env) runPlacement(r *placementReconciler, sessions []v1alpha1.WhatsAppSession) time.Duration {
	w.t.Helper()
	result, err := r.Reconcile(w.t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	for i := range sessions {
		now, err := w.get(&sessions[i])
		w.Expect(err).NotTo(HaveOccurred())
		sessions[i] = *now
	}
	return result.RequeueAfter
}

// workers counts the sessions of each worker.
func (w *env) workers(sessions []v1alpha1.WhatsAppSession) map[string]int {
	w.t.Helper()
	counts := map[string]int{}
	for i := range sessions {
		now, err := w.get(&sessions[i])
		w.Expect(err).NotTo(HaveOccurred())
		counts[now.Status.Worker]++
	}
	return counts
}

func TestAStaleCacheDoesNotOverfillAWorker(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(6)
	first, all := sessions[:3], sessions
	shown := first
	r := w.newPlacement(clientShowing(&shown, interceptor.Funcs{}))
	w.lease(r, "worker-a", capacity(4))

	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(membership.Duration), "the next run is when the lease expires")
	w.Expect(w.workers(first)).To(Equal(map[string]int{"worker-a": 3}))

	t.Log("three more sessions are created, and the cache still shows the first three without a worker")
	shown = all
	_, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(w.workers(all)).To(Equal(map[string]int{"worker-a": 4, "": 2}))

	t.Log("an assumption ends when the cache shows it")
	for i := range all {
		now, err := w.get(&all[i])
		w.Expect(err).NotTo(HaveOccurred())
		all[i] = *now
	}
	_, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(r.assumed).To(BeEmpty())
}

func TestTheAnswerToAPlacementIsLost(t *testing.T) {
	t.Parallel()
	for _, arrives := range []bool{true, false} {
		t.Run(fmt.Sprintf("that arrived: %t", arrives), func(t *testing.T) {
			t.Parallel()
			w := newEnv(t)
			sessions := w.waiting(2)
			shown := sessions[:1]
			broken := true
			r := w.newPlacement(clientShowing(&shown, interceptor.Funcs{
				SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, o ...client.SubResourcePatchOption) error {
					if !broken || arrives {
						if err := c.SubResource(sub).Patch(ctx, obj, patch, o...); err != nil {
							return err
						}
					}
					if broken {
						return errors.New("connection reset")
					}
					return nil
				},
			}))
			w.lease(r, "worker-a", capacity(1))
			result, err := r.Reconcile(t.Context(), everything)
			w.Expect(err).NotTo(HaveOccurred())
			w.Expect(result.RequeueAfter).To(Equal(retryFirst))

			broken = false
			shown = sessions
			w.clock.SetTime(w.clock.Now().Add(retryFirst))
			_, err = r.Reconcile(t.Context(), everything)
			w.Expect(err).NotTo(HaveOccurred())
			w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 1, "": 1}))
		})
	}
}

func TestAPlacementFromAStaleCacheIsRefused(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(1)
	now := sessions[0].DeepCopy()
	next := *now.Status.DeepCopy()
	next.Worker, next.Epoch = "worker-b", w.clock.Now().Unix()+50
	w.Expect(patchStatus(t.Context(), k8s, now, next)).To(Succeed())

	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.lease(r, "worker-a")
	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(conflictRetryInterval))
	after, err := w.get(now)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(after).To(Equal(now))
}

func TestManySessionsAtOnce(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a", capacity(30))
	w.worker("worker-b", capacity(30))
	var all []*v1alpha1.WhatsAppSession
	for i := range 40 {
		all = append(all, w.apply([]string{w.a, w.b}[i%2], fmt.Sprintf("s%d", i)))
	}
	counts := map[string]int{}
	for _, s := range all {
		counts[w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Worker).NotTo(BeEmpty()) }).Status.Worker]++
	}
	w.Expect(counts).To(Equal(map[string]int{"worker-a": 20, "worker-b": 20}))
}

func TestMembers(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	start := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	clock := clocktesting.NewFakeClock(start)
	m := &members{clock: clock, log: logr.Discard(), known: map[string]knownMember{}}
	leaseOf := func(renewed time.Time, change ...func(*membership.Member)) *coordinationv1.Lease {
		member := membership.Member{Release: release, Name: "w", Incarnation: "i", Pool: "p", Capacity: 5, RenewTime: renewed, Duration: 15 * time.Second}
		for _, c := range change {
			c(&member)
		}
		l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: membership.LeaseName(release, "w")}}
		member.Into(l)
		return l
	}
	live := func() bool {
		workers, _ := m.workers(clock.Now())
		return len(workers) == 1 && workers[0].Live
	}

	late := func() bool {
		workers, _ := m.workers(clock.Now())
		return workers[0].Late
	}

	g.Expect(m.observe(leaseOf(start))).To(BeTrue(), "a new worker")
	g.Expect(live()).To(BeTrue())
	clock.Step(2 * membership.RenewInterval)
	g.Expect(late()).To(BeFalse(), "one renewal is missing")
	clock.Step(time.Second)
	g.Expect(late()).To(BeTrue(), "two renewals are missing")
	g.Expect(m.observe(leaseOf(start))).To(BeFalse(), "the same renewal is seen again")
	g.Expect(live() && late()).To(BeTrue())
	g.Expect(m.observe(leaseOf(start.Add(time.Millisecond)))).To(BeTrue(), "sessions may wait for this renewal")
	g.Expect(live() && !late()).To(BeTrue())
	clock.Step(15 * time.Second)
	g.Expect(live() || late()).To(BeFalse(), "15 s without a renewal")
	g.Expect(m.observe(leaseOf(start.Add(time.Second)))).To(BeTrue(), "it renews again, whatever its clock says")
	g.Expect(live()).To(BeTrue())
	g.Expect(m.observe(leaseOf(start.Add(2*time.Second)))).To(BeFalse(), "an ordinary renewal")
	g.Expect(m.observe(leaseOf(start.Add(3*time.Second), draining))).To(BeTrue(), "it is draining")

	t.Log("it reports that it cannot reach what it needs: the time counts by this process's clock")
	failing := func() (time.Time, string) {
		workers, _ := m.workers(clock.Now())
		if !workers[0].Failing {
			return time.Time{}, m.unreachable("w")
		}
		return workers[0].FailingSince, m.unreachable("w")
	}
	first := clock.Now()
	g.Expect(m.observe(leaseOf(start.Add(3*time.Second), draining, storeFailing))).To(BeTrue())
	clock.Step(time.Second)
	g.Expect(m.observe(leaseOf(start.Add(3*time.Second+1), draining, storeFailing))).To(BeFalse())
	g.Expect(m.observe(leaseOf(start.Add(3*time.Second+2), draining, storeFailing, whatsAppFailing))).To(BeTrue())
	since, what := failing()
	g.Expect(since).To(Equal(first))
	g.Expect(what).To(Equal("its database and WhatsApp"))
	g.Expect(m.observe(leaseOf(start.Add(3*time.Second+3), draining))).To(BeTrue())
	since, what = failing()
	g.Expect(since).To(BeZero())
	g.Expect(what).To(BeEmpty())
	g.Expect(m.observe(leaseOf(start.Add(3*time.Second+4), draining, whatsAppFailing))).To(BeTrue())
	since, what = failing()
	g.Expect(since).To(Equal(clock.Now()))
	g.Expect(what).To(Equal("WhatsApp"))

	liveSince := func() time.Time {
		workers, _ := m.workers(clock.Now())
		return workers[0].Since
	}
	g.Expect(liveSince()).To(Equal(start.Add(22*time.Second)), "when it came back")
	m.observe(leaseOf(start.Add(4*time.Second), func(l *membership.Member) { l.Incarnation = "j" }))
	g.Expect(liveSince()).To(Equal(clock.Now()), "another incarnation counts as another worker")
	left := leaseOf(start)
	left.Spec.HolderIdentity = ptr.To("")
	g.Expect(m.observe(left)).To(BeTrue(), "it has left")
	g.Expect(m.observe(left)).To(BeFalse())
	workers, expires := m.workers(clock.Now())
	g.Expect(workers).To(BeEmpty())
	g.Expect(expires).To(BeZero())

	g.Expect(m.observe(leaseOf(start.Add(-time.Hour)))).To(BeTrue(), "a lease that was left behind")
	g.Expect(live()).To(BeFalse())
	g.Expect(m.observe(leaseOf(start.Add(time.Hour)))).To(BeTrue(), "renewed by a clock that is ahead")
	clock.Step(16 * time.Second)
	g.Expect(live()).To(BeFalse(), "a clock that is ahead does not make it live longer")
}

func TestThePlacementForgetsWhatDoesNotExistAnyMore(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(1)
	conflict := true // another write comes first
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, o ...client.SubResourcePatchOption) error {
			if conflict {
				return apierrors.NewConflict(v1alpha1.GroupVersion.WithResource("whatsappsessions").GroupResource(), obj.GetName(), errors.New("stale"))
			}
			return c.SubResource(sub).Patch(ctx, obj, patch, o...)
		},
	}))
	w.lease(r, "worker-b")
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		GenerateName: "gone-", Annotations: map[string]string{v1alpha1.MaxSessionsAnnotation: "many"},
	}}
	w.Expect(k8s.Create(t.Context(), ns)).To(Succeed())
	w.deaths.set("worker-a", true)
	r.rebalanced["gone"] = w.clock.Now().Add(-time.Hour)
	r.placed["gone"] = w.clock.Now().Add(-time.Hour)
	run := func() {
		_, err := r.Reconcile(t.Context(), everything)
		w.Expect(err).NotTo(HaveOccurred())
	}
	run()
	w.Expect(r.invalidLimits).To(HaveKey(ns.Name))
	w.Expect(r.lost).To(HaveKey("worker-a"))
	w.Expect(r.rebalanced).To(BeEmpty())

	t.Log("an observer that cannot read the heartbeats for a moment does not find a second death")
	reported := func() int { return len(r.events.(*events.FakeRecorder).Events) }
	before := reported()
	w.deaths.set("worker-a", false)
	run()
	w.deaths.set("worker-a", true)
	run()
	w.Expect(reported()).To(Equal(before))
	conflict = false
	run()
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-b": 1}))

	sessions = nil
	ns.Annotations = nil
	w.Expect(k8s.Update(t.Context(), ns)).To(Succeed())
	run()
	w.Expect(r.invalidLimits).NotTo(HaveKey(ns.Name))
	w.Expect(r.lost).To(BeEmpty())
	w.Expect(r.placed).NotTo(HaveKey(types.UID("gone")))
	w.Expect(r.assumed).To(BeEmpty())
	w.Expect(r.since).To(BeEmpty())
	w.Expect(r.failing).To(BeEmpty())

	r.invalidLimits["deleted"] = "many" // the namespace does not exist any more
	run()
	w.Expect(r.invalidLimits).NotTo(HaveKey("deleted"))
}

func storeFailing(m *membership.Member)    { m.StoreFailing = true }
func whatsAppFailing(m *membership.Member) { m.WhatsAppFailing = true }

func TestAWorkerThatCannotReachItsDatabase(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	connected := w.hold(w.placed(w.apply(w.a, "connected"), "worker-a"), "worker-a")
	lost := w.hold(w.placed(w.apply(w.a, "lost"), "worker-a"), "worker-a")
	lost = w.holder(lost, v1alpha1.PhaseDisconnected, v1alpha1.ReasonConnecting, func(*v1alpha1.WhatsAppSessionStatus) {})
	banned := w.hold(w.placed(w.apply(w.a, "banned"), "worker-a"), "worker-a")
	banned = w.holder(banned, v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, func(*v1alpha1.WhatsAppSessionStatus) {})

	t.Log("all workers fail: nothing moves, and a new session is placed nevertheless")
	w.worker("worker-a", storeFailing)
	lease := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: w.operator, Name: membership.LeaseName(release, "worker-a")}}
	w.Expect(w.event(lease, v1alpha1.ReasonWorkerFailing)).To(ContainSubstring("cannot reach its database"))
	late := w.placed(w.apply(w.a, "late"), "worker-a")

	t.Log("another worker does not fail: new sessions are placed there, although its load is higher")
	w.worker("worker-b", capacity(20))
	w.waitUntilPlacedOn("worker-b")
	for range 7 {
		w.clock.SetTime(w.clock.Now().Add(10 * time.Second))
		w.worker("worker-b", capacity(100))
		w.worker("worker-a", storeFailing, whatsAppFailing)
	}
	w.touch(lost)

	t.Log("after a minute the sessions without a connection move, also one that it has never claimed")
	moving := w.placed(lost, "worker-b")
	w.Expect(moving.Status.HeldBy).To(Equal("worker-a"), "it holds the session until it has released it")
	w.placed(late, "worker-b")
	for _, s := range []*v1alpha1.WhatsAppSession{connected, banned} {
		now, err := w.get(s)
		w.Expect(err).NotTo(HaveOccurred())
		w.Expect(now.Status).To(Equal(s.Status), s.Name)
	}

	t.Log("it does not fail any more, and gets new sessions")
	w.worker("worker-a")
	w.waitUntilPlacedOn("worker-a")
}

// waitUntilPlacedOn creates sessions until one is placed on worker: the manager may not have
// seen the present Leases yet.
func (w *env) waitUntilPlacedOn(worker string) {
	w.t.Helper()
	n := 0
	w.Eventually(func() string {
		n++
		s := w.apply(w.a, fmt.Sprintf("for-%s-%d", worker, n))
		return w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Worker).NotTo(BeEmpty()) }).Status.Worker
	}, testTimeout, pollInterval).Should(Equal(worker))
}

func TestAPoolWithoutWorkersIsReportedOnItsSessions(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	w.worker("worker-blue", inPool("blue"))
	connected := w.hold(w.placed(w.apply(w.b, "connected"), "worker-a"), "worker-a")
	ns := &corev1.Namespace{}
	w.Expect(k8s.Get(t.Context(), types.NamespacedName{Name: w.b}, ns)).To(Succeed())
	metav1.SetMetaDataLabel(&ns.ObjectMeta, v1alpha1.PoolLabel, "blu")
	w.Expect(k8s.Update(t.Context(), ns)).To(Succeed())

	t.Log("a connected session stays where it is, and an Event says so")
	w.Expect(w.event(connected, v1alpha1.ReasonNoWorkers)).To(And(
		ContainSubstring("stays on worker worker-a of another pool"), ContainSubstring(`pools with workers: "blue", "default"`)))

	t.Log("the condition of a new session says so, and what to do")
	s := w.phase(w.apply(w.b, "new"), v1alpha1.PhasePending, v1alpha1.ReasonNoWorkers)
	w.Expect(condition(s, v1alpha1.ConditionPlaced)).To(Equal("False/NoWorkers"))
	message := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionPlaced).Message
	w.Expect(message).To(Equal(`no worker serves the pool "blu": scale up its Deployment or start a worker with --pool=blu, or correct the label whatsapp-operator.io/pool of the Namespace (pools with workers: "blue", "default")`))
	w.Expect(w.event(s, v1alpha1.ReasonNoWorkers)).To(Equal(message))

	ns.Labels[v1alpha1.PoolLabel] = "blue"
	w.Expect(k8s.Update(t.Context(), ns)).To(Succeed())
	w.placed(s, "worker-blue")
	w.placed(connected, "worker-blue")
}

func TestTheReasonWhyAPoolIsClosedIsReportedOnce(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(1)
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	recorder := r.events.(*events.FakeRecorder)
	run := func() string {
		_, err := r.Reconcile(t.Context(), everything)
		w.Expect(err).NotTo(HaveOccurred())
		now, err := w.get(&sessions[0])
		w.Expect(err).NotTo(HaveOccurred())
		sessions[0] = *now
		return meta.FindStatusCondition(now.Status.Conditions, v1alpha1.ConditionPlaced).Message
	}
	w.Expect(run()).To(And(ContainSubstring(`no worker serves the pool "default"`), ContainSubstring("no pool has workers now")))
	w.Expect(recorder.Events).To(Receive(ContainSubstring("NoWorkers")))

	w.lease(r, "worker-a", draining)
	w.Expect(run()).To(ContainSubstring("is shutting down: start another one"))
	w.clock.SetTime(w.clock.Now().Add(membership.Duration + time.Second))
	w.Expect(run()).To(ContainSubstring("renews its Lease: check the workers' pods"))
	w.lease(r, "worker-b", draining)
	w.Expect(run()).To(ContainSubstring("is shutting down or does not renew its Lease"))
	w.deaths.set("worker-a", true)
	w.Expect(run()).To(ContainSubstring("is shutting down: start another one"), "a dead worker counts as gone")
	w.Expect(recorder.Events).NotTo(Receive(), "the reason is the same")

	w.lease(r, "worker-c", capacity(0))
	w.Expect(run()).To(ContainSubstring("is full: add workers"))
	w.Expect(recorder.Events).To(Receive(ContainSubstring("NoCapacity")))
	run()
	w.Expect(recorder.Events).NotTo(Receive())
}

// delays is a queue that only records the delays.
type delays struct {
	queue
	after []time.Duration
}

func (d *delays) AddAfter(_ reconcile.Request, after time.Duration) { d.after = append(d.after, after) }

func TestAfterWhichDelayAChangeOfASessionIsPlanned(t *testing.T) {
	t.Parallel()
	placed := v1alpha1.WhatsAppSessionStatus{Worker: "worker-a", Epoch: 7, Phase: v1alpha1.PhasePending}
	held := v1alpha1.WhatsAppSessionStatus{Worker: "worker-a", Epoch: 7, Phase: v1alpha1.PhasePending, HeldBy: "worker-a", HolderStart: "p1"}
	with := func(s v1alpha1.WhatsAppSessionStatus, change func(*v1alpha1.WhatsAppSessionStatus)) v1alpha1.WhatsAppSessionStatus {
		change(&s)
		return s
	}
	for _, tt := range []struct {
		name          string
		before, after v1alpha1.WhatsAppSessionStatus
		unsettled     bool
		want          []time.Duration
	}{
		{name: "a change that does not matter for a plan", before: held, after: with(held, func(s *v1alpha1.WhatsAppSessionStatus) { s.PushName = "Ana" })},
		{name: "a claim: a thousand of them after a fail-over must not make a thousand plans", before: placed, after: held, want: []time.Duration{phaseDelay}},
		{name: "a claim while others wait to move there", before: placed, after: held, unsettled: true, want: []time.Duration{coalesceDelay}},
		{name: "a claim after a restart in place", before: held, after: with(held, func(s *v1alpha1.WhatsAppSessionStatus) { s.HolderStart = "p2" }), want: []time.Duration{phaseDelay}},
		{name: "a claim together with another change", before: placed, after: with(held, func(s *v1alpha1.WhatsAppSessionStatus) { s.JID = "34600111222:3@s.whatsapp.net" }), want: []time.Duration{coalesceDelay}},
		{name: "a release makes room", before: held, after: placed, want: []time.Duration{coalesceDelay}},
		{name: "a claim by the former holder", before: with(placed, func(s *v1alpha1.WhatsAppSessionStatus) { s.Worker = "worker-b" }), after: with(held, func(s *v1alpha1.WhatsAppSessionStatus) { s.Worker = "worker-b" }), want: []time.Duration{coalesceDelay}},
		{name: "a placement", before: placed, after: with(placed, func(s *v1alpha1.WhatsAppSessionStatus) { s.Worker, s.Epoch = "worker-b", 8 }), want: []time.Duration{coalesceDelay}},
		{name: "a change of the phase", before: held, after: with(held, func(s *v1alpha1.WhatsAppSessionStatus) { s.Phase = v1alpha1.PhaseConnected }), want: []time.Duration{phaseDelay}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := NewWithT(t)
			r := &placementReconciler{}
			r.unsettled.Store(tt.unsettled)
			q := &delays{}
			r.onSession().Update(t.Context(), event.UpdateEvent{
				ObjectOld: &v1alpha1.WhatsAppSession{Status: tt.before}, ObjectNew: &v1alpha1.WhatsAppSession{Status: tt.after},
			}, q)
			g.Expect(q.after).To(Equal(tt.want))
		})
	}
}

func TestUntilFirst(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	now := time.Unix(1000, 0)
	g.Expect(untilFirst(now, false)).To(BeZero())
	g.Expect(untilFirst(now, false, time.Time{}, now.Add(time.Minute), now.Add(time.Second))).To(Equal(time.Second))
	g.Expect(untilFirst(now, true, now.Add(time.Minute))).To(Equal(conflictRetryInterval))
	g.Expect(untilFirst(now, false, now.Add(-time.Minute))).To(Equal(time.Millisecond))
}

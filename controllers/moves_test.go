package controllers

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

// setMoveTo sets the annotation move-to.
func setMoveTo(s *v1alpha1.WhatsAppSession, worker string) {
	metav1.SetMetaDataAnnotation(&s.ObjectMeta, v1alpha1.MoveToAnnotation, worker)
}

func TestAnAnnotationMovesASession(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	held := w.hold(w.placed(w.apply(w.a, "held"), "worker-a"), "worker-a")
	w.clock.SetTime(w.clock.Now().Add(placement.MoveInterval))
	w.worker("worker-a")
	w.worker("worker-b")
	w.edit(held, func(s *v1alpha1.WhatsAppSession) { setMoveTo(s, "worker-b") })
	moving := w.placed(held, "worker-b")
	w.Expect(moving.Status.HeldBy).To(Equal("worker-a"))
	w.Expect(moving.Status.Epoch).To(BeNumerically(">", held.Status.Epoch))
	w.release(held)
	w.hold(held, "worker-b")

	w.edit(held, func(s *v1alpha1.WhatsAppSession) { setMoveTo(s, "worker-z") })
	w.Expect(w.event(held, v1alpha1.ReasonMoveRefused)).To(ContainSubstring(`"worker-z", which does not exist`))
	w.placed(held, "worker-b")
}

func TestARefusedMoveIsReportedOnce(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(1)
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	recorder := r.events.(*events.FakeRecorder)
	w.lease(r, "worker-a")
	w.lease(r, "worker-b", draining)
	run := func(worker string) {
		setMoveTo(&sessions[0], worker)
		_, err := r.Reconcile(t.Context(), everything)
		w.Expect(err).NotTo(HaveOccurred())
	}
	run("worker-b")
	w.Expect(recorder.Events).To(Receive(ContainSubstring("is shutting down")))
	run("worker-b")
	w.Expect(recorder.Events).NotTo(Receive())
	run("wörker\x1b[31m")
	w.Expect(recorder.Events).To(Receive(And(ContainSubstring("does not exist"), Not(ContainSubstring("\x1b")))))
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 1}))
}

func TestASessionWithAnEpochAheadOfTheClockCanMove(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(1)
	next := *sessions[0].Status.DeepCopy()
	next.Epoch = w.clock.Now().Add(5 * time.Hour).Unix() // written by a manager whose clock was wrong
	w.Expect(patchStatus(t.Context(), k8s, &sessions[0], next)).To(Succeed())
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.lease(r, "worker-a")
	w.lease(r, "worker-b")
	run := func(to string) time.Duration {
		w.edit(&sessions[0], func(s *v1alpha1.WhatsAppSession) { setMoveTo(s, to) })
		now, err := w.get(&sessions[0])
		w.Expect(err).NotTo(HaveOccurred())
		if taken := *now.Status.DeepCopy(); taken.HeldBy != taken.Worker { // its worker has claimed it
			taken.HeldBy = taken.Worker
			w.Expect(patchStatus(t.Context(), k8s, now, taken)).To(Succeed())
		}
		sessions[0] = *now
		result, err := r.Reconcile(t.Context(), everything)
		w.Expect(err).NotTo(HaveOccurred())
		return result.RequeueAfter
	}
	run("worker-b")
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-b": 1}))

	t.Log("it does not move twice within a minute")
	w.Expect(run("worker-a")).To(BeNumerically("<=", placement.MoveInterval))
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-b": 1}))
	w.clock.SetTime(w.clock.Now().Add(placement.MoveInterval))
	for _, name := range []string{"worker-a", "worker-b"} {
		r.members.observe(w.leaseOf(name))
	}
	run("worker-a")
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 1}))
	w.Expect(r.placed).To(HaveLen(1))
}

func TestADrainMovesInWaves(t *testing.T) {
	t.Parallel()
	const n = placement.DefaultWave + 15
	w := newEnv(t)
	w.worker("worker-a")
	sessions := make([]*v1alpha1.WhatsAppSession, n)
	for i := range sessions {
		sessions[i] = w.apply(w.a, fmt.Sprintf("s%d", i))
	}
	for _, s := range sessions {
		w.hold(w.placed(s, "worker-a"), "worker-a")
	}
	w.worker("worker-b")
	w.worker("worker-a", draining)
	moving := func() (out []*v1alpha1.WhatsAppSession) {
		for _, s := range sessions {
			now, err := w.get(s)
			w.Expect(err).NotTo(HaveOccurred())
			if now.Status.Worker == "worker-b" && now.Status.HeldBy == "worker-a" {
				out = append(out, now)
			}
		}
		return out
	}
	w.Eventually(moving, testTimeout, pollInterval).Should(HaveLen(placement.DefaultWave))
	w.Consistently(moving, "500ms", "50ms").Should(HaveLen(placement.DefaultWave), "no more before one of them has arrived")

	t.Log("as they arrive, the next ones move")
	first := moving()
	for _, s := range first[:10] {
		w.release(s)
		w.hold(s, "worker-b")
	}
	w.Eventually(moving, testTimeout, pollInterval).Should(HaveLen(placement.DefaultWave))
	for _, s := range moving() {
		w.release(s)
		w.hold(s, "worker-b")
	}
	w.Eventually(moving, testTimeout, pollInterval).Should(HaveLen(n - 10 - placement.DefaultWave))
}

func TestUnequalLoadsAreRebalanced(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(5)
	for i := range sessions {
		next := *sessions[i].Status.DeepCopy()
		next.LastConnectedTime = &metav1.Time{Time: w.clock.Now().Add(-time.Duration(i) * time.Hour)}
		w.Expect(patchStatus(t.Context(), k8s, &sessions[i], next)).To(Succeed())
	}
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	r.RebalanceInterval, r.RebalanceAfter = 10*time.Second, 5*time.Minute
	renew := func() {
		for _, name := range []string{"worker-a", "worker-b"} {
			r.members.observe(w.leaseOf(name, capacity(10)))
		}
	}
	run := func() time.Duration { return w.runPlacement(r, sessions) }
	pass := func(d time.Duration) {
		for ; d > 0; d -= 10 * time.Second {
			w.clock.SetTime(w.clock.Now().Add(10 * time.Second))
			renew()
		}
	}
	renew()
	run()
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 5}), "nothing is moved to a new worker at once")
	pass(5 * time.Minute)
	run()
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 4, "worker-b": 1}))
	w.Expect(sessions[4].Status.Worker).To(Equal("worker-b"), "it has been connected the longest")
	pass(20 * time.Second)
	run()
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 4, "worker-b": 1}), "one at a time")

	next := *sessions[4].Status.DeepCopy()
	next.HeldBy, next.HolderStart = "worker-b", "p1"
	w.Expect(patchStatus(t.Context(), k8s, &sessions[4], next)).To(Succeed())
	run()
	w.Expect(sessions[3].Status.Worker).To(Equal("worker-b"))
	next = *sessions[3].Status.DeepCopy()
	next.HeldBy, next.HolderStart = "worker-b", "p1"
	w.Expect(patchStatus(t.Context(), k8s, &sessions[3], next)).To(Succeed())
	pass(20 * time.Second)
	run()
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 3, "worker-b": 2}), "a small difference is not rebalanced")
}

// Reads and writes of one namespace fail, and the sessions of another one are placed.
func TestAFailureInOneNamespaceDoesNotAffectAnother(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(20)
	other := w.apply(w.b, "other")
	w.Expect(patchStatus(t.Context(), k8s, other, v1alpha1.WhatsAppSessionStatus{SessionID: other.Name, Installation: installation})).To(Succeed())
	broken := errors.New("a webhook of this namespace does not answer")
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, o ...client.SubResourcePatchOption) error {
			if obj.GetNamespace() == w.a {
				return broken
			}
			return c.SubResource(sub).Patch(ctx, obj, patch, o...)
		},
	}))
	r.direct = interceptor.NewClient(k8s, interceptor.Funcs{
		Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
			return broken
		},
	})
	w.lease(r, "worker-a", capacity(21))
	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(retryFirst))
	w.Expect(r.failing).To(HaveLen(20))

	sessions = append(sessions, *other)
	result, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(retryFirst))
	w.placed(other, "worker-a")

	t.Log("each failure doubles the pause of the sessions that fail")
	w.clock.SetTime(w.clock.Now().Add(retryFirst))
	result, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(retryFirst), "the sessions could not be read")
	for _, f := range r.failing {
		w.Expect(f.until).To(Equal(w.clock.Now().Add(2 * retryFirst)))
	}
}

// It does not run in parallel: all tests share the metrics of the process.
func TestNoCapacityIsCounted(t *testing.T) {
	w := newEnv(t)
	sessions := w.waiting(3)
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.lease(r, "worker-a", capacity(1))
	unplaced := func() float64 {
		_, err := r.Reconcile(t.Context(), everything)
		w.Expect(err).NotTo(HaveOccurred())
		for i := range sessions {
			now, err := w.get(&sessions[i])
			w.Expect(err).NotTo(HaveOccurred())
			sessions[i] = *now
		}
		families, err := ctrlmetrics.Registry.Gather()
		w.Expect(err).NotTo(HaveOccurred())
		for _, family := range families {
			if family.GetName() != "whatsapp_operator_sessions_unplaced" {
				continue
			}
			for _, m := range family.GetMetric() {
				if m.GetLabel()[0].GetValue() == v1alpha1.DefaultPool && m.GetLabel()[1].GetValue() == v1alpha1.ReasonNoCapacity {
					return m.GetGauge().GetValue()
				}
			}
		}
		return 0
	}
	w.Expect(unplaced()).To(BeEquivalentTo(2))
	w.lease(r, "worker-b", capacity(2))
	w.Expect(unplaced()).To(BeZero(), "they are placed without help")
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 1, "worker-b": 2}))
}

func TestPodsGetADeletionCost(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.operator, Name: "worker-a"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "worker", Image: "none"}}},
	}
	w.Expect(k8s.Create(t.Context(), pod)).To(Succeed())
	w.worker("worker-a")
	w.hold(w.placed(w.apply(w.a, "one"), "worker-a"), "worker-a")
	two := w.hold(w.placed(w.apply(w.a, "two"), "worker-a"), "worker-a")
	w.worker("worker-without-a-pod")
	cost := func() string {
		w.clock.SetTime(w.clock.Now().Add(5 * time.Second))
		w.worker("worker-a")
		w.worker("worker-without-a-pod")
		now := &corev1.Pod{}
		w.Expect(k8s.Get(t.Context(), client.ObjectKeyFromObject(pod), now)).To(Succeed())
		return now.Annotations[corev1.PodDeletionCost]
	}
	w.Eventually(cost, testTimeout, pollInterval).Should(Equal("2"))
	w.edit(two, suspended)
	w.placed(two, "")
	w.release(two)
	w.Eventually(cost, testTimeout, pollInterval).Should(Equal("1"))
}

func TestNoticeable(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		before, now int
		want        bool
	}{
		{0, 0, false}, {0, 1, true}, {1, 0, true}, {1000, 0, true}, {100, 110, false}, {100, 111, true}, {100, 90, false}, {100, 89, true}, {1, 2, true},
	} {
		NewWithT(t).Expect(noticeable(row.before, row.now)).To(Equal(row.want), "%d to %d", row.before, row.now)
	}
}

package controllers

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
)

// planned waits until the manager has carried out a plan from what the cache shows by now: a
// second session is placed only by the run after the one that has placed the first.
func (w *env) planned(name string) {
	w.t.Helper()
	for _, name := range []string{name + "-1", name + "-2"} {
		w.waitFor(w.apply(w.b, name), func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Worker).NotTo(BeEmpty()) })
	}
}

func TestASessionOfASilentWorkerIsNotShownAsReady(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	connected := w.hold(w.placed(w.apply(w.a, "connected"), "worker-a"), "worker-a")
	pairing := w.pair(w.placed(w.apply(w.a, "pairing"), "worker-a"), "worker-a")

	w.deaths.setSilent("worker-a", true)
	silent := w.waitFor(connected, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(condition(s, v1alpha1.ConditionReady)).To(Equal("Unknown/WorkerSilent"))
	})
	lease := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: w.operator, Name: membership.LeaseName(release, "worker-a")}}
	w.Expect(w.event(lease, v1alpha1.ReasonWorkerSilent)).To(And(ContainSubstring("its 1 connected sessions"), ContainSubstring("node.kubernetes.io/out-of-service")))
	silent.Status.Conditions[0] = connected.Status.Conditions[0]
	w.Expect(silent.Status).To(Equal(connected.Status), "nothing but Ready changes")
	w.Expect(w.redis.status("connected")).NotTo(ContainSubstring("WorkerSilent"), "Laravel receives nothing of it")
	now, err := w.get(pairing)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(condition(now, v1alpha1.ConditionReady)).To(Equal("False/WaitingForScan"), "it did not look well")

	t.Log("a holder that lives writes Ready again, and that stays")
	w.holder(connected, v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, func(*v1alpha1.WhatsAppSessionStatus) {})
	w.worker("worker-b")
	w.planned("after-the-holder")
	now, err = w.get(connected)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(condition(now, v1alpha1.ConditionReady)).To(Equal("True/Connected"))

	t.Log("it renews its Lease, and is silent once more")
	w.deaths.setSilent("worker-a", false)
	w.planned("after-the-silence")
	w.deaths.setSilent("worker-a", true)
	w.waitFor(connected, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(condition(s, v1alpha1.ConditionReady)).To(Equal("Unknown/WorkerSilent"))
	})

	t.Log("it is declared dead after all")
	w.clock.SetTime(w.clock.Now().Add(membership.Duration + time.Second))
	w.worker("worker-b")
	w.deaths.set("worker-a", true)
	lost := w.placed(connected, "worker-b")
	w.Expect(condition(lost, v1alpha1.ConditionReady)).To(Equal("False/WorkerLost"))
	w.Expect(lost.Status.LastDisconnectReason).To(ContainSubstring("worker-a died"))
	w.published("connected", "pending/Disconnected/WorkerLost")
}

// All of them are written at once, and each once.
func TestAllSessionsOfASilentWorkerAreMarked(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(20)
	for i := range sessions {
		next := *sessions[i].Status.DeepCopy()
		next.Worker, next.Epoch = "worker-a", w.clock.Now().Unix()
		w.Expect(patchStatus(t.Context(), k8s, &sessions[i], next)).To(Succeed())
		w.ids.records[sessions[i].Name] = &Record{}
		sessions[i] = *w.hold(&sessions[i], "worker-a")
	}
	var writes atomic.Int32
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{SubResourcePatch: func(
		ctx context.Context, c client.Client, subResource string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption,
	) error {
		writes.Add(1)
		return c.SubResource(subResource).Patch(ctx, obj, patch, opts...)
	}}))
	w.deaths.setSilent("worker-a", true)
	for range 2 { // the cache still shows them as they were
		_, err := r.Reconcile(t.Context(), everything)
		w.Expect(err).NotTo(HaveOccurred())
	}
	for i := range sessions {
		now, err := w.get(&sessions[i])
		w.Expect(err).NotTo(HaveOccurred())
		w.Expect(condition(now, v1alpha1.ConditionReady)).To(Equal("Unknown/WorkerSilent"))
	}
	w.Expect(writes.Load()).To(BeEquivalentTo(20))
}

// The manager's cache may be older than the last write of the holder.
func TestASilentWorkerIsNotMarkedFromAStaleCache(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(1)
	next := *sessions[0].Status.DeepCopy()
	next.Worker, next.Epoch = "worker-a", w.clock.Now().Unix()
	w.Expect(patchStatus(t.Context(), k8s, &sessions[0], next)).To(Succeed())
	w.ids.records["s0"] = &Record{}
	sessions[0] = *w.hold(&sessions[0], "worker-a")
	after := w.holder(&sessions[0], v1alpha1.PhaseDisconnected, v1alpha1.ReasonReconnecting, func(*v1alpha1.WhatsAppSessionStatus) {})

	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.deaths.setSilent("worker-a", true)
	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(retryFirst), "it is tried again when the cache is newer")
	now, err := w.get(after)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now).To(Equal(after))

	t.Log("the cache shows the write")
	sessions[0] = *now
	_, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	now, err = w.get(after)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now).To(Equal(after), "it does not look well any more")
}

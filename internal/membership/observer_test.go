package membership

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// observerTest is an Observer with everything that it reads.
type observerTest struct {
	*WithT
	*Observer
	api       client.Client
	keys      *keys
	stopwatch *stopwatch
	now       time.Duration
}

func observe(t *testing.T, objects ...client.Object) *observerTest {
	n := &observerTest{WithT: NewWithT(t), api: newAPI(objects...), keys: newKeys(), stopwatch: &stopwatch{}}
	n.Observer = &Observer{
		Client: n.api, Namespace: "ops", Release: "main", Keys: n.keys, Elapsed: n.stopwatch.elapsed,
		Clock: clocktesting.NewFakeClock(time.Unix(0, 0)), Log: logr.Discard(),
	}
	return n
}

// pass advances the clock, with an observation every 2 s.
func (n *observerTest) pass(d time.Duration) {
	for end := n.now + d; n.now < end; {
		n.now += ObserveInterval
		n.stopwatch.at(n.now)
		_ = n.Confirm(context.Background()) // an observation that fails counts too
	}
}

func workerLease(name string) *coordinationv1.Lease {
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: LeaseName("main", name)}}
	Member{Release: "main", Name: name, Incarnation: "i", PodUID: "uid", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(l)
	return l
}

func TestTheObserverDeclaresSilentWorkersDead(t *testing.T) {
	n := observe(t, workerLease("a"), workerLease("b"))
	n.keys.values["b"] = "i/1"
	for range 20 {
		n.pass(ObserveInterval)
		n.Expect(n.keys.Renew(context.Background(), "b", "i", "")).To(Succeed())
	}
	n.Expect(n.Dead("a")).To(BeTrue())
	n.Expect(n.Dead("b")).To(BeFalse(), "its key is renewed")
	n.Expect(n.Dead("never-seen")).To(BeTrue())
	n.Expect(n.Changed()).To(Receive())

	t.Log("a worker that comes back is not dead after Confirm")
	l := workerLease("a")
	n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(l), l)).To(Succeed())
	l.Annotations["x"] = "renewed"
	n.Expect(n.api.Update(t.Context(), l)).To(Succeed())
	n.Expect(n.Dead("a")).To(BeTrue(), "the renewal has not been observed yet")
	n.Expect(n.Confirm(t.Context())).To(Succeed())
	n.Expect(n.Dead("a")).To(BeFalse())
	n.Expect(n.Changed()).To(Receive())

	t.Log("while Redis does not answer, no worker is declared dead for its silence")
	n.keys.locked(func() { n.keys.down = true })
	n.pass(time.Minute)
	n.Expect(n.Dead("a")).To(BeFalse())
	n.keys.locked(func() { n.keys.down = false })
	n.pass(SilenceTimeout + 2*ObserveInterval)
	n.Expect(n.Dead("a")).To(BeTrue())
}

func TestTheObserverReadsThePodOfAWorkerThatDoesNotRenew(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: "a", UID: "uid"},
		Spec:       corev1.PodSpec{RestartPolicy: corev1.RestartPolicyNever},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			Name: ContainerName, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}},
		}}},
	}
	n := observe(t, workerLease("a"), pod)
	n.keys.down = true
	n.pass(ObserveInterval)
	n.Expect(n.Dead("a")).To(BeFalse(), "its Lease is new: the pod is not read")
	n.pass(askKubeletAfter + ObserveInterval)
	n.Expect(n.Dead("a")).To(BeTrue())
}

func TestTheObserverReadsTheNodeOfAWorkerThatIsSilent(t *testing.T) {
	pod := func() *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: "a", UID: "uid"}, Spec: corev1.PodSpec{NodeName: "node-1"}}
	}
	node := func(taints ...corev1.Taint) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}, Spec: corev1.NodeSpec{Taints: taints}}
	}
	notReady := corev1.Taint{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}
	gone := corev1.Taint{Key: corev1.TaintNodeOutOfService, Value: "nodeshutdown", Effect: corev1.TaintEffectNoExecute}
	for name, tt := range map[string]struct {
		// lost changes what Kubernetes says about the node, after the worker has been silent.
		lost func(n *observerTest)
		dead bool
	}{
		"the node is only not ready": {func(n *observerTest) { n.Expect(n.api.Update(t.Context(), node(notReady))).To(Succeed()) }, false},
		"the node is marked as out of service": {func(n *observerTest) {
			n.Expect(n.api.Update(t.Context(), node(notReady, gone))).To(Succeed())
		}, true},
		"the Node object is deleted": {func(n *observerTest) { n.Expect(n.api.Delete(t.Context(), node())).To(Succeed()) }, true},
		"Kubernetes has deleted the pod and the Node object": {func(n *observerTest) {
			n.Expect(n.api.Delete(t.Context(), pod())).To(Succeed())
			n.Expect(n.api.Delete(t.Context(), node())).To(Succeed())
		}, true},
		"only the pod is deleted, as if by force": {func(n *observerTest) { n.Expect(n.api.Delete(t.Context(), pod())).To(Succeed()) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := observe(t, workerLease("a"), pod(), node())
			n.keys.down = true // lost together with the node
			n.pass(time.Minute)
			n.Expect(n.Dead("a")).To(BeFalse(), "Redis cannot be read, and the node exists")
			tt.lost(n)
			n.pass(ObserveInterval)
			n.Expect(n.Dead("a")).To(Equal(tt.dead))
		})
	}

	t.Run("the Node is deleted while the worker still renews its Lease", func(*testing.T) {
		n := observe(t, workerLease("a"), pod(), node())
		n.keys.down = true
		n.Expect(n.api.Delete(t.Context(), node())).To(Succeed())
		for i := range 20 {
			n.pass(ObserveInterval)
			l := workerLease("a")
			n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(l), l)).To(Succeed())
			l.Annotations["x"] = fmt.Sprint(i)
			n.Expect(n.api.Update(t.Context(), l)).To(Succeed())
			n.Expect(n.Dead("a")).To(BeFalse())
		}
	})
}

func TestASilentLeaseIsNoDeath(t *testing.T) {
	n := observe(t, workerLease("a"), workerLease("b"))
	renew := func(name, value string) {
		l := workerLease(name)
		n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(l), l)).To(Succeed())
		l.Annotations["x"] = value
		n.Expect(n.api.Update(t.Context(), l)).To(Succeed())
	}
	pass := func(d time.Duration) { // only b renews its Lease
		for end := n.now + d; n.now < end; {
			renew("b", fmt.Sprint(n.now))
			n.pass(ObserveInterval)
		}
	}
	n.keys.down = true
	pass(SilenceTimeout)
	n.Expect(n.LeaseSilent("a")).To(BeFalse(), "its key in Redis may have changed last, and then its death is decided first")
	pass(shownSilentAfter - SilenceTimeout + ObserveInterval)
	n.Expect(n.Changed()).To(Receive())
	n.Expect(n.LeaseSilent("a")).To(BeTrue())
	n.Expect(n.LeaseSilent("b")).To(BeFalse())
	n.Expect(n.LeaseSilent("without-a-lease")).To(BeTrue())
	n.Expect(n.Dead("a")).To(BeFalse(), "Redis cannot be read")

	t.Log("it renews its Lease again")
	renew("a", "again")
	pass(ObserveInterval)
	n.Expect(n.LeaseSilent("a")).To(BeFalse())
	n.Expect(n.Changed()).To(Receive())

	t.Log("an observer that was stopped knows nothing about the time between")
	pass(shownSilentAfter + ObserveInterval)
	n.Expect(n.LeaseSilent("a")).To(BeTrue())
	n.now += time.Minute
	n.stopwatch.at(n.now)
	n.Expect(n.LeaseSilent("a")).To(BeFalse())
	n.pass(ObserveInterval)
	n.Expect(n.LeaseSilent("a")).To(BeFalse())
}

func TestSweepDeletesTheHeartbeatsOfLongDeadWorkers(t *testing.T) {
	n := observe(t, workerLease("a"))
	n.keys.values["a"] = "i/7"
	n.pass(time.Minute)
	n.Expect(n.Dead("a")).To(BeTrue())
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(workerLease("a")), &coordinationv1.Lease{})).To(Succeed(), "kept for a person who looks for the cause")
	n.pass(deadRetention + time.Minute)
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	err := n.api.Get(t.Context(), client.ObjectKeyFromObject(workerLease("a")), &coordinationv1.Lease{})
	n.Expect(apierrors.IsNotFound(err)).To(BeTrue())
	n.Expect(n.keys.values).To(BeEmpty())
}

func TestAFailedReadMakesNoDeadWorkerAlive(t *testing.T) {
	n := observe(t, workerLease("a"))
	var lines []string
	n.Log = funcr.New(func(_, args string) { lines = append(lines, args) }, funcr.Options{})
	logged := func(message string) (count int) {
		for _, line := range lines {
			if strings.Contains(line, message) {
				count++
			}
		}
		return count
	}
	n.pass(SilenceTimeout + 2*ObserveInterval)
	n.Expect(n.Dead("a")).To(BeTrue())
	n.Expect(logged("Declared a worker dead")).To(Equal(1))
	n.Expect(n.Changed()).To(Receive())

	for range 3 {
		n.keys.locked(func() { n.keys.down = true })
		n.pass(ObserveInterval)
		n.Expect(n.Dead("a")).To(BeFalse(), "it is unsure now")
		n.Expect(n.Changed()).To(Receive())
		n.keys.locked(func() { n.keys.down = false })
		n.pass(SilenceTimeout + 2*ObserveInterval)
		n.Expect(n.Dead("a")).To(BeTrue())
		n.Expect(n.Changed()).To(Receive())
	}
	n.Expect(logged("Found a worker alive")).To(BeZero())
	n.Expect(logged("Declared a worker dead")).To(Equal(1), "it has not changed since")

	t.Log("the hour before it is swept counts from its death")
	n.pass(deadRetention - time.Minute)
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(apierrors.IsNotFound(n.api.Get(t.Context(), client.ObjectKeyFromObject(workerLease("a")), &coordinationv1.Lease{}))).To(BeTrue())

	t.Log("a worker whose heartbeats are gone is forgotten")
	n.pass(SilenceTimeout + 2*ObserveInterval)
	n.Expect(n.dead).To(BeEmpty())
	n.Expect(n.detector.workers).To(BeEmpty())
	n.Expect(logged("Found a worker alive")).To(BeZero())
	n.Expect(n.Dead("a")).To(BeTrue())
}

func TestTheObserverForgetsWorkersThatLeave(t *testing.T) {
	n := observe(t)
	for i := range 50 {
		name := fmt.Sprintf("worker-%d", i)
		n.Expect(n.api.Create(t.Context(), workerLease(name))).To(Succeed())
		n.Expect(n.keys.Renew(t.Context(), name, "i", "")).To(Succeed())
		n.pass(2 * ObserveInterval)
		if i%2 == 0 { // killed, and swept later
			n.pass(SilenceTimeout)
		}
		n.Expect(n.api.Delete(t.Context(), workerLease(name))).To(Succeed())
		n.Expect(n.keys.Remove(t.Context(), name, "i")).To(Succeed())
	}
	n.pass(SilenceTimeout + 2*ObserveInterval)
	n.Expect(n.dead).To(BeEmpty())
	n.Expect(n.detector.workers).To(BeEmpty())
}

func TestSweepDeletesTheKeyOfAWorkerThatLeftWhileRedisDidNotAnswer(t *testing.T) {
	n := observe(t, workerLease("stays"))
	n.keys.values["left"] = "i/7" // this worker has deleted its Lease and could not delete its key
	n.keys.values["stays"] = "j/1"
	pass := func(d time.Duration) {
		for end := n.now + d; n.now < end; {
			n.pass(ObserveInterval)
			n.Expect(n.keys.Renew(t.Context(), "stays", "j", "")).To(Succeed())
		}
	}
	pass(time.Minute)
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(n.keys.values).To(HaveKey("left"))
	pass(deadRetention)
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(n.keys.values).NotTo(HaveKey("left"))
	n.Expect(n.keys.values).To(HaveKey("stays"))
	pass(time.Minute)
	n.Expect(n.dead).To(BeEmpty())

	t.Log("the key of another incarnation of that name is not deleted")
	n.keys.values["left"] = "i/7"
	pass(deadRetention + time.Minute)
	n.keys.values["left"] = "k/1" // written after the last observation
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(n.keys.values).To(HaveKeyWithValue("left", "k/1"))
}

func TestTheObserverEndsWithItsContext(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	n := observe(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Start(ctx) }()
	cancel()
	n.Eventually(ended).Should(Receive(BeNil()))
}

// Two releases in one namespace have a worker of the same name.
func TestTheWorkersOfAnotherReleaseAreIgnored(t *testing.T) {
	theirs := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: LeaseName("other", "a")}}
	Member{Release: "other", Name: "a", Incarnation: "i", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(theirs)
	n := observe(t, workerLease("a"), theirs)
	for range 10 {
		n.pass(ObserveInterval)
		n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs)).To(Succeed())
		metav1.SetMetaDataAnnotation(&theirs.ObjectMeta, "renewed", n.now.String())
		n.Expect(n.api.Update(t.Context(), theirs)).To(Succeed())
	}
	n.Expect(n.Dead("a")).To(BeTrue(), "the heartbeats of the other release's worker do not count for ours")
	for range 2000 {
		n.pass(ObserveInterval)
	}
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs)).To(Succeed(), "the Lease of the other release is not deleted")
}

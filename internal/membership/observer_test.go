package membership

import (
	"context"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// observation is an Observer with all that it looks at.
type observation struct {
	*WithT
	*Observer
	api   client.Client
	keys  *keys
	watch *stopwatch
	now   time.Duration
}

func observe(t *testing.T, objects ...client.Object) *observation {
	n := &observation{WithT: NewWithT(t), api: newAPI(objects...), keys: newKeys(), watch: &stopwatch{}}
	n.Observer = &Observer{
		Client: n.api, Namespace: "ops", Release: "main", Keys: n.keys, Elapsed: n.watch.elapsed,
		Clock: clocktesting.NewFakeClock(time.Unix(0, 0)), Log: logr.Discard(),
	}
	return n
}

// pass lets time pass, a look each 2 s.
func (n *observation) pass(d time.Duration) {
	for end := n.now + d; n.now < end; {
		n.now += LookInterval
		n.watch.at(n.now)
		_ = n.Confirm(context.Background()) // a look that fails counts too
	}
}

func workerLease(name string) *coordinationv1.Lease {
	l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: LeaseName("main", name)}}
	Member{Release: "main", Name: name, Incarnation: "i", PodUID: "uid", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(l)
	return l
}

func TestTheObserver(t *testing.T) {
	n := observe(t, workerLease("a"), workerLease("b"))
	n.keys.values["b"] = "i/1"
	for range 20 {
		n.pass(LookInterval)
		n.Expect(n.keys.Raise(context.Background(), "b", "i", "")).To(Succeed())
	}
	n.Expect(n.Dead("a")).To(BeTrue())
	n.Expect(n.Dead("b")).To(BeFalse(), "its key is renewed")
	n.Expect(n.Dead("never-seen")).To(BeTrue())
	n.Expect(n.Changed()).To(Receive())

	t.Log("a worker that comes back is not dead for whoever confirms")
	l := workerLease("a")
	n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(l), l)).To(Succeed())
	l.Annotations["x"] = "renewed"
	n.Expect(n.api.Update(t.Context(), l)).To(Succeed())
	n.Expect(n.Dead("a")).To(BeTrue(), "not seen yet")
	n.Expect(n.Confirm(t.Context())).To(Succeed())
	n.Expect(n.Dead("a")).To(BeFalse())
	n.Expect(n.Changed()).To(Receive())

	t.Log("Redis away: nobody is declared dead by silence")
	n.keys.locked(func() { n.keys.down = true })
	n.pass(time.Minute)
	n.Expect(n.Dead("a")).To(BeFalse())
	n.keys.locked(func() { n.keys.down = false })
	n.pass(Silence + 2*LookInterval)
	n.Expect(n.Dead("a")).To(BeTrue())
}

func TestTheObserverAsksTheKubelet(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: "a", UID: "uid"},
		Spec:       corev1.PodSpec{RestartPolicy: corev1.RestartPolicyNever},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			Name: ContainerName, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}},
		}}},
	}
	n := observe(t, workerLease("a"), pod)
	n.keys.down = true
	n.pass(LookInterval)
	n.Expect(n.Dead("a")).To(BeFalse(), "its Lease is new: nobody asks")
	n.pass(suspectAfter + LookInterval)
	n.Expect(n.Dead("a")).To(BeTrue())
}

func TestTheLongDeadAreSwept(t *testing.T) {
	n := observe(t, workerLease("a"))
	n.keys.values["a"] = "i/7"
	n.pass(time.Minute)
	n.Expect(n.Dead("a")).To(BeTrue())
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(workerLease("a")), &coordinationv1.Lease{})).To(Succeed(), "kept for whoever looks for the cause")
	n.pass(keepDead + time.Minute)
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	err := n.api.Get(t.Context(), client.ObjectKeyFromObject(workerLease("a")), &coordinationv1.Lease{})
	n.Expect(apierrors.IsNotFound(err)).To(BeTrue())
	n.Expect(n.keys.values).To(BeEmpty())
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

// TestTwoReleasesInOneNamespace have workers of the same name.
func TestTwoReleasesInOneNamespace(t *testing.T) {
	theirs := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "ops", Name: LeaseName("other", "a")}}
	Member{Release: "other", Name: "a", Incarnation: "i", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(theirs)
	n := observe(t, workerLease("a"), theirs)
	for range 10 {
		n.pass(LookInterval)
		n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs)).To(Succeed())
		metav1.SetMetaDataAnnotation(&theirs.ObjectMeta, "renewed", n.now.String())
		n.Expect(n.api.Update(t.Context(), theirs)).To(Succeed())
	}
	n.Expect(n.Dead("a")).To(BeTrue(), "the other release's worker of that name says nothing of ours")
	for range 2000 {
		n.pass(LookInterval)
	}
	n.Expect(n.Sweep(t.Context())).To(Succeed())
	n.Expect(n.api.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs)).To(Succeed(), "nor is its Lease swept away")
}

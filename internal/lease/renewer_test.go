package lease

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

// renewal is a Renewer that runs, with a clock and an API server to look at.
type renewal struct {
	*WithT
	r      *Renewer
	api    client.Client
	clock  *clocktesting.FakeClock
	joined atomic.Int32
	ended  chan error
	stop   context.CancelFunc
}

func renew(t *testing.T, api client.Client, incarnation string) *renewal {
	n := &renewal{WithT: NewWithT(t), api: api, clock: clocktesting.NewFakeClock(time.Unix(1_800_000_000, 0)), ended: make(chan error, 1)}
	n.r = &Renewer{
		Client: api, Namespace: "ops", Clock: n.clock, Log: logr.Discard(),
		Self: Member{Name: "w", Incarnation: incarnation, Pool: "default", Capacity: 10},
	}
	ctx, cancel := context.WithCancel(t.Context())
	n.stop = cancel
	go func() {
		n.ended <- n.r.Run(ctx, func() { n.joined.Add(1) }, func() (int, int) { return 3, 7 })
		close(n.ended)
	}()
	t.Cleanup(func() {
		cancel()
		for range n.ended { // until it is closed
		}
		goleak.VerifyNone(t, goleak.IgnoreCurrent())
	})
	return n
}

func (n *renewal) member() Member {
	var l coordinationv1.Lease
	n.Expect(n.api.Get(context.Background(), client.ObjectKey{Namespace: "ops", Name: LeaseName("w")}, &l)).To(Succeed())
	m, err := FromLease(&l)
	n.Expect(err).NotTo(HaveOccurred())
	return m
}

// pass lets time pass, one renewal at a time.
func (n *renewal) pass(d time.Duration) {
	for ; d > 0; d -= RenewEvery {
		n.Eventually(n.clock.HasWaiters).Should(BeTrue())
		n.clock.Step(RenewEvery)
	}
}

func newAPI(objects ...client.Object) client.Client {
	return fake.NewClientBuilder().WithScheme(clientgoscheme.Scheme).WithObjects(objects...).Build()
}

func TestRenewing(t *testing.T) {
	n := renew(t, newAPI(), "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	m := n.member()
	n.Expect(m.Load).To(Equal(3))
	n.Expect(m.Tokens).To(Equal(7))
	n.Expect(m.Capacity).To(Equal(10))
	before := m.RenewTime
	n.pass(RenewEvery)
	n.Eventually(func() time.Time { return n.member().RenewTime }).Should(BeTemporally(">", before))

	t.Log("draining is announced at once, and stays")
	n.Expect(n.r.Drain(context.Background())).To(Succeed())
	n.Expect(n.member().Draining).To(BeTrue())
	before = n.member().RenewTime
	n.pass(2 * RenewEvery)
	n.Eventually(func() time.Time { return n.member().RenewTime }).Should(BeTemporally(">", before))
	n.Expect(n.member().Draining).To(BeTrue())

	t.Log("a clean exit leaves nothing to wait for")
	n.stop()
	n.Eventually(n.ended).Should(Receive(BeNil()))
	n.Expect(n.r.Leave(context.Background())).To(Succeed())
	err := n.api.Get(context.Background(), client.ObjectKey{Namespace: "ops", Name: LeaseName("w")}, &coordinationv1.Lease{})
	n.Expect(apierrors.IsNotFound(err)).To(BeTrue())
	n.Expect(n.joined.Load()).To(BeEquivalentTo(1))
}

// foreign is the Lease of another incarnation of the same name.
func foreign() *coordinationv1.Lease {
	l := &coordinationv1.Lease{}
	l.Namespace, l.Name = "ops", LeaseName("w")
	Member{Name: "w", Incarnation: "other", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(l)
	return l
}

func TestAnotherIncarnationIsWaitedFor(t *testing.T) {
	api := newAPI(foreign())
	n := renew(t, api, "one")
	n.pass(Duration - 2*RenewEvery)
	n.Expect(n.joined.Load()).To(BeZero())

	t.Log("it renews: its silence begins anew, whatever its own clock says")
	l := foreign()
	n.Expect(api.Get(context.Background(), client.ObjectKeyFromObject(l), l)).To(Succeed())
	l.Annotations["x"] = "renewed"
	n.Expect(api.Update(context.Background(), l)).To(Succeed())
	n.pass(Duration - 2*RenewEvery)
	n.Expect(n.joined.Load()).To(BeZero())
	n.Expect(n.member().Incarnation).To(Equal("other"))

	n.Eventually(func() int32 { n.pass(RenewEvery); return n.joined.Load() }).Should(BeEquivalentTo(1))
	n.Expect(n.member().Incarnation).To(Equal("one"))
}

func TestAMemberThatIsReplacedEnds(t *testing.T) {
	api := newAPI()
	n := renew(t, api, "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	l := &coordinationv1.Lease{}
	n.Expect(api.Get(context.Background(), client.ObjectKey{Namespace: "ops", Name: LeaseName("w")}, l)).To(Succeed())
	Member{Name: "w", Incarnation: "other", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(l)
	n.Expect(api.Update(context.Background(), l)).To(Succeed())
	n.pass(2 * RenewEvery) // one renewal that is refused, one that reads why
	n.Eventually(n.ended).Should(Receive(MatchError(ContainSubstring("a name of its own"))))
	n.Expect(n.r.Leave(context.Background())).To(Succeed())
	n.Expect(n.member().Incarnation).To(Equal("other"), "another's Lease is not deleted")
}

package membership

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
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
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

// keys is a fake of the keys in Redis.
type keys struct {
	mu     sync.Mutex
	values map[string]string
	run    string
	down   bool
	raised int
	// renewErr, where set, is returned by Renew only.
	renewErr error
}

var errDown = errors.New("connection refused")

func (k *keys) locked(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

func (k *keys) Renew(_ context.Context, worker, incarnation, replacing string) (err error) {
	k.locked(func() {
		count := 0
		found := k.values[worker]
		switch {
		case k.down:
			err = errDown
			return
		case k.renewErr != nil:
			err = k.renewErr
			return
		case found == "":
		case incarnationOf(found) == incarnation:
			_, _ = fmt.Sscanf(found[len(incarnation)+1:], "%d", &count)
		case incarnationOf(found) != replacing:
			err = errors.New("another incarnation's")
			return
		}
		k.raised++
		k.values[worker] = fmt.Sprintf("%s/%d", incarnation, count+1)
	})
	return err
}

func (k *keys) Remove(_ context.Context, worker, incarnation string) error {
	k.locked(func() {
		if incarnationOf(k.values[worker]) == incarnation {
			delete(k.values, worker)
		}
	})
	return nil
}

func (k *keys) Read(context.Context) (run string, values map[string]string, err error) {
	k.locked(func() {
		run, values = k.run, maps.Clone(k.values)
		if k.down {
			err = errDown
		}
	})
	return run, values, err
}

// renewal is a running Membership with the clock, the API server and the Redis that a test controls.
type renewal struct {
	*WithT
	r         *Membership
	api       client.Client
	keys      *keys
	clock     *clocktesting.FakeClock
	stopwatch *stopwatch
	joined    atomic.Int32
	ended     chan error
	stop      context.CancelFunc
}

func renew(t *testing.T, api client.Client, k *keys, incarnation string, change ...func(*Membership)) *renewal {
	n := &renewal{WithT: NewWithT(t), api: api, keys: k, stopwatch: &stopwatch{}, clock: clocktesting.NewFakeClock(time.Unix(1_800_000_000, 0)), ended: make(chan error, 1)}
	n.r = &Membership{
		Renewer: Renewer{
			Client: api, Namespace: "ops", Clock: n.clock, Log: logr.Discard(),
			Self: Member{Release: "main", Name: "w", Incarnation: incarnation, PodUID: "pod", Pool: "default", Capacity: 10},
		},
		Keys: k, SelfFence: NewSelfFence(n.stopwatch.elapsed),
	}
	for _, c := range change {
		c(n.r)
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
	n.Expect(n.api.Get(context.Background(), client.ObjectKey{Namespace: "ops", Name: LeaseName("main", "w")}, &l)).To(Succeed())
	m, err := FromLease(&l)
	n.Expect(err).NotTo(HaveOccurred())
	return m
}

// pass advances the clocks, one second at a time.
func (n *renewal) pass(d time.Duration) {
	for ; d > 0; d -= time.Second {
		n.Eventually(n.clock.HasWaiters).Should(BeTrue())
		n.stopwatch.at(n.stopwatch.elapsed() + time.Second)
		n.clock.Step(time.Second)
	}
}

func newAPI(objects ...client.Object) client.Client {
	return fake.NewClientBuilder().WithScheme(clientgoscheme.Scheme).WithObjects(objects...).Build()
}

func newKeys() *keys { return &keys{values: map[string]string{}, run: "r"} }

func TestRenewing(t *testing.T) {
	n := renew(t, newAPI(), newKeys(), "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	n.Expect(n.r.SelfFence.Check()).To(Succeed())
	m := n.member()
	n.Expect(m.Load).To(Equal(3))
	n.Expect(m.Tokens).To(Equal(7))
	n.Expect(m.Capacity).To(Equal(10))
	n.Expect(m.PodUID).To(BeEquivalentTo("pod"))
	before := m.RenewTime
	n.Eventually(func() time.Time { n.pass(time.Second); return n.member().RenewTime }).Should(BeTemporally(">", before))
	n.Eventually(func() (raised int) {
		n.pass(time.Second)
		n.keys.locked(func() { raised = n.keys.raised })
		return raised
	}).Should(BeNumerically(">", 1))

	t.Log("draining is published at once, and stays")
	n.Expect(n.r.Drain(context.Background())).To(Succeed())
	n.Expect(n.member().Draining).To(BeTrue())
	before = n.member().RenewTime
	n.Eventually(func() time.Time { n.pass(time.Second); return n.member().RenewTime }).Should(BeTemporally(">", before))
	n.Expect(n.member().Draining).To(BeTrue())

	t.Log("a clean exit deletes both heartbeats")
	n.stop()
	n.Eventually(n.ended).Should(Receive(BeNil()))
	n.Expect(n.r.Leave(context.Background())).To(Succeed())
	err := n.api.Get(context.Background(), client.ObjectKey{Namespace: "ops", Name: LeaseName("main", "w")}, &coordinationv1.Lease{})
	n.Expect(apierrors.IsNotFound(err)).To(BeTrue())
	n.Expect(n.keys.values).To(BeEmpty())
	n.Expect(n.joined.Load()).To(BeEquivalentTo(1))
}

func TestARenewalReportsWhatTheWorkerReaches(t *testing.T) {
	var store, whatsapp atomic.Bool
	n := renew(t, newAPI(), newKeys(), "one", func(m *Membership) {
		m.Failing = func() (bool, bool) { return store.Load(), whatsapp.Load() }
	})
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	first := n.member()
	n.Expect(first.StoreFailing || first.WhatsAppFailing).To(BeFalse())
	n.Expect(first.AcquireTime).To(BeTemporally("==", first.RenewTime))
	store.Store(true)
	n.Eventually(func() bool { n.pass(time.Second); return n.member().StoreFailing }).Should(BeTrue())
	n.Expect(n.member().WhatsAppFailing).To(BeFalse())
	n.Expect(n.member().AcquireTime).To(BeTemporally("==", first.AcquireTime), "it is the same process")
	n.Expect(n.r.Drain(context.Background())).To(Succeed())
	n.Expect(n.member().StoreFailing).To(BeTrue(), "draining changes nothing else")
	n.Expect(n.member().AcquireTime).To(BeTemporally("==", first.AcquireTime))
	store.Store(false)
	whatsapp.Store(true)
	n.Eventually(func() bool { n.pass(time.Second); return n.member().WhatsAppFailing }).Should(BeTrue())
	n.Expect(n.member().StoreFailing).To(BeFalse())
}

func TestOneHeartbeatIsEnough(t *testing.T) {
	n := renew(t, newAPI(), newKeys(), "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	n.keys.locked(func() { n.keys.down = true })
	before := n.member().RenewTime
	for range 20 { // the Lease alone is enough, without a limit of time
		n.Eventually(func() time.Time { n.pass(time.Second); return n.member().RenewTime }).Should(BeTemporally(">", before))
		before = n.member().RenewTime
	}
	n.Expect(n.r.SelfFence.Check()).To(Succeed())
	n.keys.locked(func() { n.keys.down, n.keys.values = false, map[string]string{} })
	n.Eventually(func() (value string) {
		n.pass(time.Second)
		n.keys.locked(func() { value = n.keys.values["w"] })
		return value
	}).Should(HavePrefix("one/"), "after Redis was emptied the key is written again")
}

func TestAWorkerThatCanRenewNeitherHeartbeatEnds(t *testing.T) {
	down := atomic.Bool{}
	api := interceptor.NewClient(newAPI().(client.WithWatch), interceptor.Funcs{
		Update: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.UpdateOption) error {
			if down.Load() {
				return errDown
			}
			return c.Update(ctx, obj, opts...)
		},
	})
	n := renew(t, api, newKeys(), "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	down.Store(true)
	n.keys.locked(func() { n.keys.down = true })
	n.pass(SelfFenceTimeout + 2*time.Second)
	n.Eventually(n.ended, "10s").Should(Receive(MatchError(ErrFenced)))
	n.Expect(n.r.Lost()).To(BeClosed())
}

// foreign is the Lease of another incarnation of the same name.
func foreign() *coordinationv1.Lease {
	l := &coordinationv1.Lease{}
	l.Namespace, l.Name = "ops", LeaseName("main", "w")
	Member{Release: "main", Name: "w", Incarnation: "other", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(l)
	return l
}

func TestAJoinWaitsUntilAnotherIncarnationIsSilent(t *testing.T) {
	tests := []struct {
		name       string
		lease, key bool // which heartbeats of it exist
		renew      func(n *renewal)
	}{
		{name: "it renews its Lease", lease: true, key: true, renew: func(n *renewal) {
			l := foreign()
			n.Expect(n.api.Get(context.Background(), client.ObjectKeyFromObject(l), l)).To(Succeed())
			l.Annotations["x"] = n.clock.Now().String()
			n.Expect(n.api.Update(context.Background(), l)).To(Succeed())
		}},
		{name: "it renews its key and is cut off from the API server", lease: true, key: true, renew: func(n *renewal) {
			n.Expect(n.keys.Renew(context.Background(), "w", "other", "")).To(Succeed())
		}},
		{name: "only its key exists: a person has deleted its Lease", key: true, renew: func(n *renewal) {
			n.Expect(n.keys.Renew(context.Background(), "w", "other", "")).To(Succeed())
		}},
		{name: "only its Lease exists: Redis was emptied", lease: true, renew: func(n *renewal) {
			n.Expect(n.keys.Renew(context.Background(), "w", "other", "")).To(Succeed())
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			api, k := newAPI(), newKeys()
			if tt.lease {
				api = newAPI(foreign())
			}
			if tt.key {
				k.values["w"] = "other/41"
			}
			n := renew(t, api, k, "one")
			n.pass(SilenceTimeout - 3*time.Second)
			n.Expect(n.joined.Load()).To(BeZero())

			t.Log("it renews: its silence begins again, whatever its own clock says")
			tt.renew(n)
			n.pass(SilenceTimeout - 3*time.Second)
			n.Expect(n.joined.Load()).To(BeZero())
			n.Expect(n.r.SelfFence.Check()).NotTo(Succeed())

			n.Eventually(func() int32 { n.pass(time.Second); return n.joined.Load() }).Should(BeEquivalentTo(1))
			n.Expect(n.member().Incarnation).To(Equal("one"))
			n.keys.locked(func() { n.Expect(n.keys.values["w"]).To(HavePrefix("one/")) })
		})
	}
}

func TestTheSameIncarnationDoesNotWait(t *testing.T) {
	l := foreign()
	k := newKeys()
	k.values["w"] = "other/41"
	n := renew(t, newAPI(l), k, "other")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	n.Expect(k.values["w"]).To(Equal("other/42"))
}

func TestAMemberThatIsReplacedEnds(t *testing.T) {
	api := newAPI()
	n := renew(t, api, newKeys(), "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	l := &coordinationv1.Lease{}
	n.Expect(api.Get(context.Background(), client.ObjectKey{Namespace: "ops", Name: LeaseName("main", "w")}, l)).To(Succeed())
	Member{Release: "main", Name: "w", Incarnation: "other", Pool: "default", Capacity: 1, RenewTime: time.Unix(0, 0), Duration: Duration}.Into(l)
	n.Expect(api.Update(context.Background(), l)).To(Succeed())
	n.pass(2 * RenewInterval) // one renewal that is refused, one that reads why
	n.Eventually(n.ended).Should(Receive(MatchError(ContainSubstring("its own name"))))
	n.Expect(n.r.Leave(context.Background())).To(Succeed())
	n.Expect(n.member().Incarnation).To(Equal("other"), "the Lease of another incarnation is not deleted")
}

func TestADamagedLeaseIsRepaired(t *testing.T) {
	api := newAPI()
	n := renew(t, api, newKeys(), "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	l := &coordinationv1.Lease{}
	n.Expect(api.Get(context.Background(), client.ObjectKey{Namespace: "ops", Name: LeaseName("main", "w")}, l)).To(Succeed())
	l.Annotations[annotationCap] = "foo"
	n.Expect(api.Update(context.Background(), l)).To(Succeed())
	n.Eventually(func() error {
		n.pass(time.Second)
		n.Expect(api.Get(context.Background(), client.ObjectKeyFromObject(l), l)).To(Succeed())
		_, err := FromLease(l)
		return err
	}).Should(Succeed())
	n.Expect(n.ended).NotTo(Receive())
}

func TestDrainDoesNotMakeTheNextRenewalFail(t *testing.T) {
	n := renew(t, newAPI(), newKeys(), "one")
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
	n.Expect(n.r.Drain(context.Background())).To(Succeed())
	before := n.member().RenewTime
	n.pass(RenewInterval)
	n.Eventually(func() time.Time { return n.member().RenewTime }).Should(BeTemporally(">", before))
}

// After a join that wrote the Lease but not the key, because Redis did not answer, the
// next attempt does not wait for the silence of the other incarnation again.
func TestAJoinThatWroteOneHeartbeatDoesNotWaitAgain(t *testing.T) {
	k := newKeys()
	k.values["w"] = "other/41"
	n := renew(t, newAPI(foreign()), k, "one")
	n.Eventually(func() bool { n.pass(time.Second); return n.stopwatch.elapsed() >= SilenceTimeout-ObserveInterval }).Should(BeTrue())
	k.locked(func() { k.renewErr = errDown })
	n.Eventually(func() string { n.pass(time.Second); return n.member().Incarnation }).Should(Equal("one"))
	n.Expect(n.joined.Load()).To(BeZero())
	k.locked(func() { k.renewErr = nil })
	n.pass(2 * ObserveInterval)
	n.Eventually(n.joined.Load).Should(BeEquivalentTo(1))
}

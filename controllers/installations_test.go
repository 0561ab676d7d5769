package controllers

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Two releases have the same cluster and the same namespaces of tenants. Each session
// belongs to the manager that claims it first, and the other keeps nothing of it.
func TestTwoReleasesWithTheSameNamespaces(t *testing.T) {
	t.Parallel()
	for name, sameNamespace := range map[string]bool{"in one namespace": true, "in two namespaces": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(testenv.Seed(t), 0))
			w := newEnv(t)
			w.stop()
			w.elect = true
			w.installation = "cluster-1/" + w.operator + "/main"
			operator := w.operator
			if !sameNamespace {
				operator = w.namespace("operator-")
			}
			o := w.otherInstallation(operator, "cluster-1/"+operator+"/other")
			w.start()
			o.start()
			both := map[string]*env{w.installation: w, o.installation: o}
			for _, e := range both {
				e.worker("worker-a", capacity(1000)) // a pod's name is unique only in its namespace
			}
			const n = 40
			sessions := make([]*v1alpha1.WhatsAppSession, 0, n)
			for i := range n {
				namespace := []string{w.a, w.b}[random.IntN(2)]
				sessions = append(sessions, w.apply(namespace, fmt.Sprintf("s-%d", i)))
			}
			for _, s := range sessions {
				placed := w.placed(s, "worker-a")
				winner := both[placed.Status.Installation]
				w.Expect(winner).NotTo(BeNil())
				w.Expect(winner.ids.has(s.Name)).To(BeTrue())
				winner.published(s.Name, "pending/Pending/Placed")
				for id, loser := range both {
					if id != placed.Status.Installation {
						w.Eventually(func() bool { return loser.ids.has(s.Name) }, testTimeout, pollInterval).Should(BeFalse(), "the other store keeps no record")
						w.Expect(loser.redis.status(s.Name)).To(BeEmpty())
					}
				}
			}

			t.Log("each manager deletes its own sessions, and the death of one release's worker does not matter to the other")
			o.deaths.set("worker-a", true)
			for _, s := range sessions {
				w.delete(s)
			}
			for _, s := range sessions {
				w.gone(s)
			}
		})
	}
}

// Both managers have claimed the id of a new session, each in its own store, and the other
// one has written the status first.
func TestTheOtherManagerIsFaster(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	theirs := "cluster-1/" + w.operator + "/other"
	written := make(chan error, 1)
	w.ids.claimed = func() {
		s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: w.a, Name: "acme"}}
		now, err := w.get(s)
		if err == nil {
			err = patchStatus(t.Context(), k8s, now, v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Installation: theirs, Epoch: 7, ObservedGeneration: 1})
		}
		written <- err
	}
	w.worker("worker-a")
	s := w.apply(w.a, "acme")
	w.Eventually(written, testTimeout).Should(Receive(Succeed()))
	w.Eventually(func() bool { return w.ids.has("acme") }, testTimeout, pollInterval).Should(BeFalse())
	w.placed(w.apply(w.a, "ours"), "worker-a")
	now, err := w.get(s)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.Status.Installation).To(Equal(theirs))
	w.Expect(now.Status.Epoch).To(BeEquivalentTo(7))
	w.Expect(w.redis.status("acme")).To(BeEmpty())

	t.Log("the same id is free in this installation's store")
	w.placed(w.apply(w.b, "same", withID("acme")), "worker-a")
}

func TestTheSessionsOfAStoreThatWasTakenOver(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.stop()
	const first, second, stranger = "cluster-1/old/main", "cluster-9/operators/main", "cluster-8/operators/main"
	jid, phone := "34600111222:3@s.whatsapp.net", "+34600111222"
	left := func(name, former string, phase v1alpha1.Phase, reason string, change ...func(*v1alpha1.WhatsAppSessionStatus)) *v1alpha1.WhatsAppSession {
		s := w.apply(w.a, name, func(s *v1alpha1.WhatsAppSession) { s.Finalizers = []string{v1alpha1.Finalizer} })
		next := v1alpha1.WhatsAppSessionStatus{SessionID: name, Installation: former, Epoch: 7, JID: jid, PhoneNumber: phone}
		for _, c := range change {
			c(&next)
		}
		next = status.Summarize(next, status.Facts{Generation: s.Generation, Phase: phase, Reason: reason}, w.clock.Now())
		w.Expect(patchStatus(t.Context(), k8s, s, next)).To(Succeed())
		w.ids.records[name] = &Record{Namespace: w.a, UID: s.UID, JID: jid, PhoneNumber: phone}
		return s
	}
	by := func(worker string) func(*v1alpha1.WhatsAppSessionStatus) {
		return func(next *v1alpha1.WhatsAppSessionStatus) {
			next.Worker, next.HeldBy, next.HolderStart = worker, worker, "p9"
		}
	}
	connected := left("connected", second, v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, by("worker-a")) // this installation has a worker of that name too
	chain := left("chain", first, v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving)
	resting := left("resting", second, v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.JID, next.RetryReason = "", v1alpha1.ReasonLoggedOut
	})
	restored := left("restored", second, v1alpha1.PhaseConnected, v1alpha1.ReasonConnected)
	w.ids.records["restored"].UID = "of the object in the former cluster"
	taken := left("taken", second, v1alpha1.PhaseConnected, v1alpha1.ReasonConnected)
	w.ids.records["taken"].Namespace = "another"
	deleted := left("deleted", second, v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, by("worker-z"))
	w.delete(deleted)
	asked := left("asked", second, v1alpha1.PhasePairing, v1alpha1.ReasonPasskeyRequired, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.JID, next.PhoneNumber, next.Passkey = "", "", &v1alpha1.PasskeyStatus{RequestOptions: "{}", ExpiresAt: metav1.NewTime(w.clock.Now())}
	})
	others := left("others", stranger, v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, by("worker-a"))
	w.ids.former = []string{first, second}
	w.start()
	w.worker("worker-a")

	for _, s := range []*v1alpha1.WhatsAppSession{chain, restored} {
		now := w.placed(s, "worker-a")
		w.Expect(now.Status.Installation).To(Equal(installation))
		w.Expect(now.Status.SessionID).To(Equal(s.Name))
		w.Expect(now.Status.JID).To(Equal(jid), "it connects without a scan")
		w.Expect(now.Status.Epoch).To(BeNumerically(">", 7))
		w.Eventually(func() int64 { return w.redis.numbers(s.Name).Epoch }).Should(BeNumerically(">", 7))
	}
	w.waitFor(resting, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Status.Installation).To(Equal(installation))
		g.Expect(s.Status.Phase).To(Equal(v1alpha1.PhaseLoggedOut))
	})
	w.waitFor(asked, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Status.Installation).To(Equal(installation))
		g.Expect(s.Status.Passkey).To(BeNil())
	})
	w.Expect(w.event(asked, v1alpha1.ReasonPasskeyExpired)).To(ContainSubstring("scan the next code"), "its request is lost")
	w.phase(taken, v1alpha1.PhasePending, v1alpha1.ReasonSessionIDTaken)
	w.phase(others, v1alpha1.PhaseFailed, v1alpha1.ReasonOtherInstallation)

	t.Log("a holder that still runs has some time to notice the take-over")
	w.touch(connected)
	w.placed(w.apply(w.a, "later"), "worker-a")
	now, err := w.get(connected)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.Status.HeldBy).To(Equal("worker-a"))
	w.Expect(now.Status.Installation).To(Equal(second))
	w.advance(formerHolderTimeout)
	w.worker("worker-a")
	w.touch(connected)
	w.touch(deleted)
	takenOver := w.waitFor(connected, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Status.HeldBy).To(BeEmpty())
		g.Expect(s.Status.Worker).To(Equal("worker-a"))
	})
	w.Expect(takenOver.Status.Installation).To(Equal(installation))
	w.Expect(takenOver.Status.JID).To(Equal(jid))
	w.published("connected", "pending/Disconnected/WorkerLost")

	t.Log("a deleted session is placed to log out, and then removed")
	w.waitFor(deleted, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Status.Phase).To(Equal(v1alpha1.PhaseTerminating))
		g.Expect(s.Status.Worker).To(Equal("worker-a"))
	})
	w.forgets(deleted, "worker-a")
	w.gone(deleted)

	t.Log("a person adds a former installation")
	w.ids.mu.Lock()
	w.ids.former = append(w.ids.former, stranger)
	w.ids.mu.Unlock()
	w.advance(formerInterval)
	w.worker("worker-a")
	w.touch(others)
	w.Eventually(func(g Gomega) {
		w.advance(formerHolderTimeout)
		w.worker("worker-a")
		w.touch(others)
		now, err := w.get(others)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(now.Status.Installation).To(Equal(installation))
	}, testTimeout, pollInterval).Should(Succeed())
}

// renewLease renews a Lease as the leader or a worker of another release does.
func (w *env) renewLease(namespace, name string) {
	w.t.Helper()
	lease := &coordinationv1.Lease{}
	err := k8s.Get(w.t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, lease)
	now := metav1.NowMicro()
	lease.Spec.HolderIdentity, lease.Spec.RenewTime = ptr.To("somebody"), &now
	if err != nil {
		lease.Namespace, lease.Name = namespace, name
		w.Expect(client.IgnoreNotFound(err)).To(Succeed())
		w.Expect(k8s.Create(w.t.Context(), lease)).To(Succeed())
		return
	}
	w.Expect(k8s.Update(w.t.Context(), lease)).To(Succeed())
}

func TestASessionOfAnotherRelease(t *testing.T) {
	t.Parallel()
	const leader, worker, nobody = "leader", "worker", "nobody"
	for name, tt := range map[string]struct {
		renews  string
		stalled bool
	}{
		"its manager lives":                        {renews: leader},
		"its manager is gone, its worker holds it": {renews: worker},
		"both are gone":                            {renews: nobody, stalled: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newEnv(t)
			w.stop()
			theirs := w.namespace("theirs-")
			s := w.apply(w.a, "acme", func(s *v1alpha1.WhatsAppSession) {
				s.Finalizers, s.Spec.DeviceName = []string{v1alpha1.Finalizer}, "Shop 7"
			})
			w.Expect(patchStatus(t.Context(), k8s, s, v1alpha1.WhatsAppSessionStatus{
				ObservedGeneration: 1, Installation: "cluster-1/" + theirs + "/other", SessionID: "acme", Worker: "worker-a", HeldBy: "worker-a",
				Epoch: 7, Phase: v1alpha1.PhaseConnected, JID: "34600111222:3@s.whatsapp.net", PhoneNumber: "+34600111222",
			})).To(Succeed())
			left := *s.Status.DeepCopy()
			w.installation = "cluster-1/" + w.operator + "/main"
			w.start()
			w.worker("worker-a")
			for range silentReads + 4 {
				switch tt.renews {
				case leader:
					w.renewLease(theirs, membership.LeaderLeaseName("other"))
				case worker:
					w.renewLease(theirs, membership.LeaseName("other", "worker-a"))
				}
				w.advance(leaseReadInterval)
				w.worker("worker-a")
				w.touch(s)
				w.placed(w.apply(w.b, fmt.Sprintf("ours-%d", time.Now().UnixNano())), "worker-a")
			}
			if !tt.stalled {
				now, err := w.get(s)
				w.Expect(err).NotTo(HaveOccurred())
				w.Expect(now.Status).To(Equal(left))
				w.delete(s)
				w.touch(s)
				w.placed(w.apply(w.b, "last"), "worker-a")
				now, err = w.get(s)
				w.Expect(err).NotTo(HaveOccurred())
				w.Expect(now.Finalizers).NotTo(BeEmpty(), "its manager logs it out")
				return
			}
			now := w.phase(s, v1alpha1.PhaseFailed, v1alpha1.ReasonOtherInstallation)
			w.Expect(condition(now, v1alpha1.ConditionStalled)).To(Equal("True/OtherInstallation"))
			w.Expect(w.event(s, v1alpha1.ReasonOtherInstallation)).To(And(ContainSubstring("the release other in the namespace "+theirs), ContainSubstring("store adopt")))

			t.Log("a manager without a Lease writes the status")
			w.Expect(patchStatus(t.Context(), k8s, now, left)).To(Succeed())
			w.advance(leaseReadInterval)
			w.worker("worker-a")
			w.touch(s)
			w.placed(w.apply(w.b, "last"), "worker-a")
			now, err := w.get(s)
			w.Expect(err).NotTo(HaveOccurred())
			w.Expect(now.Status).To(Equal(left), "two managers do not overwrite each other")

			t.Log("its leader renews once, then never again, and the session is deleted")
			w.renewLease(theirs, membership.LeaderLeaseName("other"))
			w.delete(s)
			w.Eventually(func() bool {
				w.advance(leaseReadInterval)
				w.worker("worker-a")
				w.touch(s)
				_, err := w.get(s)
				return client.IgnoreNotFound(err) == nil && err != nil
			}, testTimeout, 10*pollInterval).Should(BeTrue())
			w.Expect(w.ids.releasedAs(s.UID)).To(BeEmpty(), "this installation's store had no record")
		})
	}
}

func TestTheFormerInstallationsCannotBeRead(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	ids := newFakeIDs()
	ids.err = errors.New("connection refused")
	former := &formerInstallations{}
	now := time.Unix(1000, 0)
	_, _, err := former.has(t.Context(), ids, "a", now)
	g.Expect(err).To(MatchError(ContainSubstring("connection refused")))
	ids.err, ids.former = nil, []string{"a"}
	since, is, err := former.has(t.Context(), ids, "a", now)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(is).To(BeTrue())
	g.Expect(since).To(Equal(now))
	ids.former = nil // the former installation has taken the store back
	since, is, err = former.has(t.Context(), ids, "a", now.Add(formerInterval))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(is).To(BeFalse())
	g.Expect(since).To(BeZero())
}

// The holder finds no record in the store.
func TestALostRecordIsClaimedAgain(t *testing.T) {
	t.Parallel()
	missing := func(w *env, record *Record) *v1alpha1.WhatsAppSession {
		w.worker("worker-a")
		s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
		w.ids.mu.Lock()
		delete(w.ids.records, "acme")
		if record != nil {
			w.ids.records["acme"] = record
		}
		w.ids.mu.Unlock()
		w.holder(s, v1alpha1.PhaseFailed, v1alpha1.ReasonRecordMissing, func(*v1alpha1.WhatsAppSessionStatus) {})
		return s
	}
	uid := func(w *env, s *v1alpha1.WhatsAppSession) func() bool {
		return func() bool {
			record, err := w.ids.Record(t.Context(), "acme")
			return err == nil && record != nil && record.UID == s.UID
		}
	}
	t.Run("there is no record", func(t *testing.T) {
		t.Parallel()
		w := newEnv(t)
		s := missing(w, nil)
		w.Eventually(uid(w, s), testTimeout, pollInterval).Should(BeTrue())
	})
	t.Run("the record is that of an object that is gone", func(t *testing.T) {
		t.Parallel()
		w := newEnv(t)
		s := missing(w, &Record{Namespace: w.a, UID: "gone"})
		w.Eventually(uid(w, s), testTimeout, pollInterval).Should(BeTrue())
	})
	t.Run("the record is that of another namespace", func(t *testing.T) {
		t.Parallel()
		w := newEnv(t)
		w.phase(missing(w, &Record{Namespace: "another", UID: "another"}), v1alpha1.PhasePending, v1alpha1.ReasonSessionIDTaken)
	})
}

// TestSessionsOfOthersAreNotCounted: two releases in a cluster would count each session
// twice, and report the other's as held by silent workers for good.
func TestSessionsOfOthersAreNotCounted(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	r := newPlacementReconciler(PlacementOptions{Installation: installation, Deaths: newFakeDeaths()}, nil, nil, nil)
	snapshot := placement.Snapshot{Workers: []placement.Worker{{Name: "worker-a", Pool: v1alpha1.DefaultPool, Live: true, Capacity: 10}}}
	add := func(of, heldBy string, phase v1alpha1.Phase, reason string) {
		s := &v1alpha1.WhatsAppSession{Status: v1alpha1.WhatsAppSessionStatus{Installation: of, HeldBy: heldBy}}
		s.Status = status.Summarize(s.Status, status.Facts{Phase: phase, Reason: reason}, time.Now())
		snapshot.Sessions = append(snapshot.Sessions, placement.Session{Object: s})
	}
	add(installation, "worker-a", v1alpha1.PhaseConnected, v1alpha1.ReasonConnected)
	add(installation, "worker-b", v1alpha1.PhaseConnected, v1alpha1.ReasonConnected)
	add("", "", v1alpha1.PhasePending, v1alpha1.ReasonWaitingForPlacement)
	for range 3 {
		add("cluster-1/other/main", "worker-c", v1alpha1.PhaseConnected, v1alpha1.ReasonConnected)
	}
	add("cluster-1/gone/main", "worker-d", v1alpha1.PhaseFailed, v1alpha1.ReasonOtherInstallation)
	fleet := r.count(snapshot, placement.Plan{}, 0)
	g.Expect(fleet.Sessions).To(Equal(map[string]int{"Connected": 2, "Pending": 1, "Failed": 1}))
	g.Expect(fleet.HeldBySilent).To(Equal(1))
}

// TestTheManagerForgetsTheLeasesOfOthers: each of their rollouts brings workers of new names.
func TestTheManagerForgetsTheLeasesOfOthers(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	clock := clocktesting.NewFakeClock(time.Now())
	n := &otherReleases{reader: k8s, clock: clock, log: logr.Discard()}
	for i := range 100 {
		_, err := n.silent(t.Context(), types.NamespacedName{Namespace: "default", Name: fmt.Sprint("rollout-", i)})
		g.Expect(err).NotTo(HaveOccurred())
		clock.Step(leaseReadInterval)
	}
	g.Expect(len(n.seen)).To(BeNumerically("<=", int(leaseRetention/leaseReadInterval)+1))
}

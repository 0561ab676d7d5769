package controllers

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	clocktesting "k8s.io/utils/clock/testing"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

func TestAnAppliedSessionIsPlaced(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.placed(w.apply(w.a, "acme"), "worker-a")

	w.Expect(controllerutil.ContainsFinalizer(s, v1alpha1.Finalizer)).To(BeTrue())
	w.Expect(s.Status.SessionID).To(Equal("acme"))
	w.Expect(s.Status.Installation).To(Equal(installation))
	w.Expect(s.Status.Epoch).To(Equal(w.clock.Now().Unix()))
	w.Expect(s.Status.ObservedGeneration).To(Equal(s.Generation))
	w.Expect(condition(s, v1alpha1.ConditionPlaced)).To(Equal("True/Placed"))
	w.Expect(condition(s, v1alpha1.ConditionReconciling)).To(Equal("True/Placed"))
	w.Expect(w.ids.has("acme")).To(BeTrue())
	w.published("acme", "pending/Pending/Placed")
	w.Expect(w.redis.numbers("acme")).To(Equal(delivery.Numbers{Epoch: s.Status.Epoch, Seq: 1}))
}

func TestTheStatusOfAHeldSessionIsNotChanged(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.placed(w.apply(w.a, "acme"), "worker-a")
	w.published("acme", "pending/Pending/Placed")
	s = w.hold(s, "worker-a")
	w.stop()
	result, err := w.reconciler.reconcile(t.Context(), s.DeepCopy())
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result).To(BeZero())
	now, err := w.get(s)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now).To(Equal(s))
	w.Expect(w.redis.status("acme")).To(Equal("pending/Pending/Placed"), "only the holder publishes")
}

func TestTwoNamespacesWantTheSameID(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	winner := w.placed(w.apply(w.a, "mine", withID("acme")), "worker-a")
	w.published("acme", "pending/Pending/Placed")
	loser := w.phase(w.apply(w.b, "yours", withID("acme")), v1alpha1.PhasePending, v1alpha1.ReasonSessionIDTaken)

	w.Expect(condition(loser, v1alpha1.ConditionStalled)).To(Equal("True/SessionIDTaken"))
	w.Expect(condition(loser, v1alpha1.ConditionPlaced)).To(Equal("False/SessionIDTaken"))
	w.Expect(loser.Status.SessionID).To(BeEmpty())
	w.Expect(loser.Status.Epoch).To(BeZero())
	w.Expect(w.event(loser, v1alpha1.ReasonSessionIDTaken)).NotTo(ContainSubstring(w.a))
	w.Expect(meta.FindStatusCondition(loser.Status.Conditions, v1alpha1.ConditionStalled).Message).NotTo(ContainSubstring(w.a))

	t.Log("the deletion of a session without the id changes nothing and does not wait")
	second := w.phase(w.apply(w.b, "third", withID("acme")), v1alpha1.PhasePending, v1alpha1.ReasonSessionIDTaken)
	w.delete(second)
	w.gone(second)
	w.Expect(w.ids.has("acme")).To(BeTrue())
	w.Expect(w.redis.status("acme")).To(Equal("pending/Pending/Placed"))

	t.Log("when the holder of the id is deleted, the other session gets the id, with an epoch above the last one")
	w.delete(winner)
	w.gone(winner)
	next := w.placed(loser, "worker-a")
	w.Expect(next.Status.SessionID).To(Equal("acme"))
	w.published("acme", "pending/Pending/Placed")
	w.Expect(w.redis.numbers("acme").Epoch).To(Equal(next.Status.Epoch))
}

// The record of a live session is not given to a session whose id differs by case.
func TestARecordIsNotGivenToAnIDThatDiffersByCase(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	first := w.placed(w.apply(w.a, "one", withID("Acme")), "worker-a")
	for _, namespace := range []string{w.a, w.b} {
		w.phase(w.apply(namespace, "two", withID("aCME")), v1alpha1.PhasePending, v1alpha1.ReasonSessionIDTaken)
	}
	record, err := w.ids.Record(t.Context(), "acme")
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(record.UID).To(Equal(first.UID))
}

func TestWithoutARecordTheOlderObjectWins(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	object := func(uid, namespace string, age int, change ...func(*v1alpha1.WhatsAppSession)) *v1alpha1.WhatsAppSession {
		s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{
			Name: uid, UID: types.UID(uid), Namespace: namespace, CreationTimestamp: metav1.Unix(int64(1000-age), 0),
		}}
		for _, c := range change {
			c(s)
		}
		return s
	}
	deleted := func(s *v1alpha1.WhatsAppSession) { s.DeletionTimestamp = &metav1.Time{Time: time.Unix(2000, 0)} }
	holding := func(s *v1alpha1.WhatsAppSession) { s.Status.SessionID = "acme" }
	for _, tt := range []struct {
		name      string
		s         *v1alpha1.WhatsAppSession
		claimants []*v1alpha1.WhatsAppSession
		first     string
	}{
		{name: "no other claimant", s: object("m", "a", 5)},
		{name: "an older claimant", s: object("m", "a", 5), claimants: []*v1alpha1.WhatsAppSession{object("x", "b", 6)}, first: "x"},
		{name: "a younger claimant", s: object("m", "a", 5), claimants: []*v1alpha1.WhatsAppSession{object("x", "b", 4)}},
		{name: "same age, lower UID", s: object("m", "a", 5), claimants: []*v1alpha1.WhatsAppSession{object("c", "b", 5)}, first: "c"},
		{name: "same age, higher UID", s: object("m", "a", 5), claimants: []*v1alpha1.WhatsAppSession{object("x", "b", 5)}},
		{name: "an older claimant that is being deleted", s: object("m", "a", 5), claimants: []*v1alpha1.WhatsAppSession{object("x", "b", 6, deleted)}},
		{name: "a claimant that is being deleted and still holds the id", s: object("m", "a", 5), claimants: []*v1alpha1.WhatsAppSession{object("x", "b", 1, deleted, holding)}, first: "x"},
		{name: "a claimant in the same namespace comes before one in another", s: object("m", "a", 5), claimants: []*v1alpha1.WhatsAppSession{object("x", "b", 9), object("y", "a", 6)}, first: "y"},
	} {
		claimants := make([]v1alpha1.WhatsAppSession, len(tt.claimants))
		for i := range tt.claimants {
			claimants[i] = *tt.claimants[i]
		}
		first := ""
		if f := firstClaimant(tt.s, claimants); f != nil {
			first = f.Name
		}
		g.Expect(first).To(Equal(tt.first), tt.name)
	}
}

func TestARetainedIDIsGivenToAnotherSessionOfItsNamespace(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "one", withID("acme"), retain), "worker-a"), "worker-a")

	w.delete(s)
	withdrawn := w.placed(s, "")
	w.Expect(withdrawn.Status.HeldBy).To(Equal("worker-a"), "the manager waits for the holder")
	w.Expect(withdrawn.Status.Epoch).To(BeNumerically(">", s.Status.Epoch))
	w.Expect(withdrawn.Status.Phase).To(Equal(v1alpha1.PhaseConnected), "and does not change its status")
	w.release(s)
	w.gone(s)
	w.Expect(w.ids.releasedAs(s.UID)).To(Equal(ReleaseRetain))
	w.Expect(w.ids.has("acme")).To(BeTrue())
	w.published("acme", "inactive/Terminating/Deleted")

	stranger := w.phase(w.apply(w.b, "two", withID("acme")), v1alpha1.PhasePending, v1alpha1.ReasonSessionIDTaken)
	next := w.placed(w.apply(w.a, "three", withID("acme")), "worker-a")
	w.Expect(next.Status.SessionID).To(Equal("acme"))
	now, err := w.get(stranger)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.Status.SessionID).To(BeEmpty())
}

func TestDeletion(t *testing.T) {
	t.Parallel()
	advance := (*env).advance
	tests := []struct {
		name string
		// change changes the manifest.
		change func(*v1alpha1.WhatsAppSession)
		// before runs before the deletion, after runs after it.
		before  func(w *env, s *v1alpha1.WhatsAppSession)
		after   func(w *env, s *v1alpha1.WhatsAppSession)
		release Release
		status  string
		event   string
	}{
		{
			name:    "no phone was linked, and no worker holds the session",
			release: ReleaseForget, status: "inactive/Terminating/Deleted", event: "no device was linked",
		},
		{
			name:   "no phone was linked, and a worker offers codes",
			before: func(w *env, s *v1alpha1.WhatsAppSession) { w.pair(s, "worker-a") },
			after: func(w *env, s *v1alpha1.WhatsAppSession) {
				w.forgets(s, "worker-a")
			},
			status: "inactive/Terminating/Deleted", event: "keys are deleted",
		},
		{
			name:   "the holder logs out and deletes the record",
			before: func(w *env, s *v1alpha1.WhatsAppSession) { w.hold(s, "worker-a") },
			after: func(w *env, s *v1alpha1.WhatsAppSession) {
				w.forgets(s, "worker-a")
			},
			status: "inactive/Terminating/Deleted", event: "unlinked",
		},
		{
			name:   "a suspended session is placed to log out",
			before: func(w *env, s *v1alpha1.WhatsAppSession) { w.suspend(w.hold(s, "worker-a")) },
			after: func(w *env, s *v1alpha1.WhatsAppSession) {
				w.Expect(w.placed(s, "worker-a").Status.Phase).To(Equal(v1alpha1.PhaseTerminating))
				w.published("acme", "inactive/Terminating/Deleting")
				w.hold(s, "worker-a")
				w.forgets(s, "worker-a")
			},
			status: "inactive/Terminating/Deleted", event: "unlinked",
		},
		{
			name: "a device that is not in the status is logged out too",
			before: func(w *env, _ *v1alpha1.WhatsAppSession) {
				w.ids.link("acme", "34600111222:3@s.whatsapp.net", "+34600111222")
			},
			after: func(w *env, s *v1alpha1.WhatsAppSession) {
				w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) {
					g.Expect(s.Status.JID).NotTo(BeEmpty())
					g.Expect(s.Status.Worker).To(Equal("worker-a"))
				})
				w.forgets(s, "worker-a")
			},
			status: "inactive/Terminating/Deleted", event: "unlinked",
		},
		{
			name: "the database has lost the record, and nobody has unlinked the device",
			before: func(w *env, s *v1alpha1.WhatsAppSession) {
				w.suspend(w.hold(s, "worker-a"))
				w.ids.forget("acme")
			},
			status: "inactive/Terminating/LogoutUnconfirmed",
			event:  "on the phone +34600111222 open Linked devices and remove the device 34600111222:3@s.whatsapp.net if it is there",
		},
		{
			name:   "no worker logs out in time",
			change: func(s *v1alpha1.WhatsAppSession) { s.Spec.DeviceName = "Shop 7" },
			before: func(w *env, s *v1alpha1.WhatsAppSession) { w.suspend(w.hold(s, "worker-a")) },
			after: func(w *env, s *v1alpha1.WhatsAppSession) {
				w.published("acme", "inactive/Terminating/Deleting") // the session controller has seen the deletion
				advance(w, session.LogoutTimeout+time.Second)
				w.touch(s)
			},
			release: ReleaseOrphan, status: "inactive/Terminating/LogoutUnconfirmed",
			event: `on the phone +34600111222 open Linked devices and remove the device "Shop 7" (34600111222:3@s.whatsapp.net)`,
		},
		{
			name:   "a holder that does not log out in time loses the placement, and the deletion waits for its release",
			before: func(w *env, s *v1alpha1.WhatsAppSession) { w.hold(s, "worker-a") },
			after: func(w *env, s *v1alpha1.WhatsAppSession) {
				withdrawn := w.withdrawnByDeadline(s)
				w.Expect(withdrawn.Status.HeldBy).To(Equal("worker-a"))
				w.Expect(withdrawn.Finalizers).To(ConsistOf(v1alpha1.Finalizer))
				w.release(s)
			},
			release: ReleaseOrphan, status: "inactive/Terminating/LogoutUnconfirmed", event: "Linked devices",
		},
		{
			name:   "no phone was linked, and the holder dies",
			before: func(w *env, s *v1alpha1.WhatsAppSession) { w.pair(s, "worker-a") },
			after: func(w *env, s *v1alpha1.WhatsAppSession) {
				withdrawn := w.withdrawnByDeadline(s)
				w.Expect(withdrawn.Finalizers).To(ConsistOf(v1alpha1.Finalizer), "the object must exist as long as the session is held")
				w.deaths.set("worker-a", true)
			},
			release: ReleaseForget, status: "inactive/Terminating/Deleted", event: "no device was linked",
		},
		{
			name:   "Retain, and no worker holds the session",
			change: retain,
			before: func(w *env, s *v1alpha1.WhatsAppSession) { w.suspend(w.hold(s, "worker-a")) },
			after:  func(*env, *v1alpha1.WhatsAppSession) {},

			release: ReleaseRetain, status: "inactive/Terminating/Deleted", event: "keys are kept",
		},
		{
			name:    "Retain, and there are no keys",
			change:  retain,
			release: ReleaseRetain, status: "inactive/Terminating/Deleted", event: "no device is linked",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newEnv(t)
			w.worker("worker-a")
			if tt.change == nil {
				tt.change = func(*v1alpha1.WhatsAppSession) {}
			}
			s := w.placed(w.apply(w.a, "acme", tt.change), "worker-a")
			if tt.before != nil {
				tt.before(w, s)
			}
			last, err := w.get(s)
			w.Expect(err).NotTo(HaveOccurred())
			w.delete(s)
			if tt.after != nil {
				tt.after(w, s)
			}
			w.gone(s)
			w.Expect(w.ids.releasedAs(s.UID)).To(Equal(tt.release))
			w.Expect(w.redis.status("acme")).To(Equal(tt.status), "published before the object is gone")
			w.Expect(w.redis.gone("acme")).To(BeTrue())
			w.Expect(w.redis.numbers("acme").Epoch).To(BeNumerically(">", last.Status.Epoch))
			w.Expect(w.redis.numbers("acme").Seq).To(BeEquivalentTo(1))
			reason := strings.TrimPrefix(tt.status, "inactive/Terminating/")
			w.Expect(w.event(s, reason)).To(ContainSubstring(tt.event))
		})
	}
}

// suspend suspends a held session and releases it as its holder does.
func (w *env) suspend(s *v1alpha1.WhatsAppSession) *v1alpha1.WhatsAppSession {
	w.t.Helper()
	w.edit(s, suspended)
	withdrawn := w.placed(s, "")
	w.Expect(withdrawn.Status.HeldBy).NotTo(BeEmpty())
	w.release(s)
	return w.phase(s, v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended)
}

func TestADeletionWaitsForRedis(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.placed(w.apply(w.a, "acme"), "worker-a")
	w.published("acme", "pending/Pending/Placed")
	w.redis.fail(errors.New("connection refused"))
	w.delete(s)
	waiting := w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(status.Reason(s.Status)).To(Equal(v1alpha1.ReasonDeleted))
		g.Expect(meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionReady).Message).To(ContainSubstring("Redis does not answer"))
	})
	w.Expect(w.event(s, v1alpha1.ReasonDeletionWaits)).To(ContainSubstring("Redis does not answer"))
	w.Consistently(func(g Gomega) {
		now, err := w.get(s)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(now.ResourceVersion).To(Equal(waiting.ResourceVersion), "it is reported once")
	}, 200*time.Millisecond, pollInterval).Should(Succeed())
	w.redis.fail(nil)
	w.gone(s)
	w.Expect(w.redis.status("acme")).To(Equal("inactive/Terminating/Deleted"))
}

func TestADeletionWaitsForTheDatabase(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.placed(w.apply(w.a, "acme"), "worker-a")
	w.published("acme", "pending/Pending/Placed")
	w.ids.fail(errors.New("connection refused"))
	w.delete(s)
	w.phase(s, v1alpha1.PhaseTerminating, v1alpha1.ReasonDeletionWaits)
	w.Expect(w.event(s, v1alpha1.ReasonDeletionWaits)).To(ContainSubstring("the database does not answer"))
	w.ids.fail(nil)
	w.gone(s)
	w.Expect(w.redis.status("acme")).To(Equal("inactive/Terminating/Deleted"))
}

// The Secret is deleted before the session, so no worker can log the session out.
func TestANamespaceIsDeletedWithItsProxySecret(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme", func(s *v1alpha1.WhatsAppSession) {
		s.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "proxy"}}
	}), "worker-a"), "worker-a")
	w.Expect(k8s.Delete(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: w.a}})).To(Succeed())
	w.delete(s) // as the namespace controller does, which envtest does not run
	w.holder(s, v1alpha1.PhaseTerminating, v1alpha1.ReasonProxySecretMissing, func(*v1alpha1.WhatsAppSessionStatus) {})
	w.placed(s, "")
	w.holder(s, v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.HeldBy, next.HolderStart = "", ""
	})
	w.gone(s)
	w.Expect(w.ids.releasedAs(s.UID)).To(Equal(ReleaseOrphan))
	w.published("acme", "inactive/Terminating/LogoutUnconfirmed")
	w.Eventually(w.logged, testTimeout, pollInterval).Should(And(
		ContainSubstring(v1alpha1.ReasonLogoutUnconfirmed), ContainSubstring("+34600111222"), ContainSubstring("34600111222:3@s.whatsapp.net"),
	), "no Event can be created there")
}

// The clock that wrote deletionTimestamp is ahead of the manager's.
func TestADeletionEndsInTimeByTheManagersClock(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.suspend(w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a"))
	w.clock.SetTime(w.clock.Now().Add(-12 * time.Hour)) // the API server's clock is ahead
	w.delete(s)
	w.published("acme", "inactive/Terminating/Deleting") // the session controller has seen the deletion
	w.clock.SetTime(w.clock.Now().Add(session.LogoutTimeout + time.Second))
	w.touch(s)
	w.gone(s)
	w.published("acme", "inactive/Terminating/LogoutUnconfirmed")
}

// The session controller and the placement must agree on the deadline of the logout, also
// where the API server's clock is ahead.
func TestASessionIsNotPlacedAgainAfterTheDeadlineOfItsLogout(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	w.clock.SetTime(w.clock.Now().Add(-12 * time.Hour))
	w.delete(s)
	withdrawn := w.withdrawnByDeadline(s)
	w.touch(s)
	w.Consistently(func(g Gomega) {
		now, err := w.get(s)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(now.Status.Epoch).To(Equal(withdrawn.Status.Epoch), "nothing changes before the holder has released it")
	}, "1s", pollInterval).Should(Succeed())
}

// No manager ran until the deadline of the logout was over. A worker must try to log out
// nevertheless, because otherwise the device stays linked.
func TestADeletionThatIsSeenAfterItsDeadline(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.suspend(w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a"))
	w.advance(session.LogoutTimeout + time.Hour) // as if the deletion were an hour old
	w.worker("worker-a")
	w.delete(s)
	s = w.placed(s, "worker-a")
	w.published("acme", "inactive/Terminating/Deleting") // the session controller has seen the deletion
	w.advance(2 * time.Minute)
	w.touch(s)
	w.gone(s)
	w.Expect(w.ids.releasedAs(s.UID)).To(Equal(ReleaseOrphan))
}

// Most applications' databases ignore case when they compare ids.
func TestIDsThatDifferOnlyByCaseAreOneID(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	winner := w.placed(w.apply(w.a, "mine", withID("Acme-1")), "worker-a")
	loser := w.phase(w.apply(w.b, "yours", withID("aCME-1")), v1alpha1.PhasePending, v1alpha1.ReasonSessionIDTaken)
	w.Expect(w.event(loser, v1alpha1.ReasonSessionIDTaken)).To(And(ContainSubstring("upper and lower case"), Not(ContainSubstring(w.a)), Not(ContainSubstring("Acme-1"))))
	w.Expect(meta.FindStatusCondition(loser.Status.Conditions, v1alpha1.ConditionStalled).Message).To(And(ContainSubstring("upper and lower case"), Not(ContainSubstring(w.a))))

	t.Log("the other session gets the id as soon as its holder is gone, with an epoch above the last one")
	w.delete(winner)
	w.gone(winner)
	next := w.placed(loser, "worker-a")
	w.Expect(next.Status.SessionID).To(Equal("aCME-1"))
	w.Expect(next.Status.Epoch).To(BeNumerically(">", winner.Status.Epoch))
}

func TestASessionThatIsAppliedAgainAtOnceHasAHigherEpoch(t *testing.T) {
	t.Parallel()
	w := newEnv(t) // its clock does not advance
	w.worker("worker-a")
	for range 3 {
		before := w.redis.numbers("acme").Epoch
		s := w.placed(w.apply(w.a, "acme"), "worker-a")
		w.Expect(s.Status.Epoch).To(BeNumerically(">", before))
		w.published("acme", "pending/Pending/Placed")
		w.delete(s)
		w.gone(s)
		w.Expect(w.redis.status("acme")).To(Equal("inactive/Terminating/Deleted"))
	}
}

func TestSuspendAndResume(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")

	w.edit(s, suspended)
	withdrawn := w.placed(s, "")
	w.Expect(withdrawn.Status.Epoch).To(BeNumerically(">", s.Status.Epoch))
	w.Expect(withdrawn.Status.HeldBy).To(Equal("worker-a"))
	w.Expect(withdrawn.Status.Phase).To(Equal(v1alpha1.PhaseConnected), "the holder writes the status until it has released the session")

	w.release(s)
	down := w.phase(s, v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended)
	w.Expect(meta.FindStatusCondition(down.Status.Conditions, v1alpha1.ConditionReady)).To(BeNil())
	w.Expect(down.Status.JID).NotTo(BeEmpty())
	w.published("acme", "inactive/Suspended/Suspended")
	w.Expect(w.redis.numbers("acme")).To(Equal(delivery.Numbers{Epoch: down.Status.Epoch, Seq: 1}))
	w.Expect(down.Status.Epoch).To(BeNumerically(">", withdrawn.Status.Epoch))
	w.event(s, v1alpha1.ReasonSuspended)

	w.edit(s, func(s *v1alpha1.WhatsAppSession) { s.Spec.Suspend = false })
	up := w.placed(s, "worker-a")
	w.Expect(up.Status.Epoch).To(BeNumerically(">", down.Status.Epoch))
	w.published("acme", "pending/Pending/Placed")
}

func TestASessionThatIsCreatedSuspended(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.phase(w.apply(w.a, "acme", suspended), v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended)
	w.Expect(s.Status.SessionID).To(Equal("acme"))
	w.Expect(s.Status.Worker).To(BeEmpty())
	w.published("acme", "inactive/Suspended/Suspended")
}

func TestABanContinuesAfterASuspension(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	until := metav1.NewTime(w.clock.Now().Add(time.Hour))
	w.holder(s, v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, func(next *v1alpha1.WhatsAppSessionStatus) { next.RetryAfter = &until })
	w.edit(s, suspended)
	w.placed(s, "")
	w.holder(s, v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, func(next *v1alpha1.WhatsAppSessionStatus) { next.HeldBy, next.HolderStart = "", "" })
	w.phase(s, v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended)
	w.edit(s, func(s *v1alpha1.WhatsAppSession) { s.Spec.Suspend = false })
	w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Status.Phase).To(Equal(v1alpha1.PhaseBanned))
		g.Expect(s.Status.Worker).To(Equal("worker-a"))
	})
}

func TestRestart(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a", capacity(1))
	s := w.pair(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	t.Log("a resting session loses its worker")
	w.holder(s, v1alpha1.PhasePairingExpired, v1alpha1.ReasonPairingExpired, func(*v1alpha1.WhatsAppSessionStatus) {})
	w.worker("worker-a", capacity(1), draining)
	w.placed(s, "")
	w.holder(s, v1alpha1.PhasePairingExpired, v1alpha1.ReasonPairingExpired, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.HeldBy, next.HolderStart = "", ""
	})
	resting := w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(condition(s, v1alpha1.ConditionPlaced)).To(Equal("False/NoWorkers"))
	})
	w.Expect(resting.Status.Phase).To(Equal(v1alpha1.PhasePairingExpired), "a resting session continues to rest")
	w.published("acme", "inactive/PairingExpired/PairingExpired")

	w.restart(s, "one")
	restarted := w.phase(s, v1alpha1.PhasePending, v1alpha1.ReasonNoWorkers)
	w.Expect(restarted.Status.ObservedRestartedAt).To(Equal("one"))
	w.Expect(restarted.Status.RestartedTime.Time).To(BeTemporally("==", w.clock.Now()))
	w.Expect(restarted.Status.Epoch).To(BeNumerically(">", resting.Status.Epoch))
	w.published("acme", "pending/Pending/NoWorkers")
	w.event(s, v1alpha1.ReasonRestarted)
}

func TestWhichSessionsRestart(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) *metav1.Time { return &metav1.Time{Time: now.Add(-d)} }
	for _, tt := range []struct {
		name   string
		status v1alpha1.WhatsAppSessionStatus
		acts   bool
		again  time.Duration
		banned bool
	}{
		{name: "PairingExpired", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhasePairingExpired}, acts: true},
		{name: "LoggedOut", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut}, acts: true},
		{name: "Replaced", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseReplaced}, acts: true},
		{name: "Outdated", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseOutdated}, acts: true},
		{name: "the annotation was acted on already", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut, ObservedRestartedAt: "now"}},
		{
			name:   "45 s after the last restart",
			status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut, RestartedTime: ago(45 * time.Second)}, again: 15 * time.Second,
		},
		{
			name:   "a minute after the last restart",
			status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut, RestartedTime: ago(time.Minute)}, acts: true,
		},
		{
			name:   "a ban that is not over",
			status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryAfter: ago(-time.Hour)}, banned: true,
		},
		{name: "a ban that is over", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryAfter: ago(time.Hour)}, acts: true},
		{name: "the session has a worker, which acts on the annotation itself", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut, Worker: "w"}},
		{name: "a session that does not rest", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhasePending}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			s := &v1alpha1.WhatsAppSession{Status: tt.status}
			s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
			next, again, result := restart(s, tt.status, now)
			acts := result == session.RestartDone
			g.Expect(acts).To(Equal(tt.acts))
			g.Expect(again).To(Equal(tt.again))
			if tt.banned {
				g.Expect(result).To(Equal(session.RestartBanned))
				g.Expect(next.RetryAfter).To(Equal(tt.status.RetryAfter))
				return
			}
			if acts {
				g.Expect(next.Phase).To(Equal(v1alpha1.PhasePending))
				g.Expect(next.ObservedRestartedAt).To(Equal("now"))
				return
			}
			g.Expect(next).To(Equal(tt.status))
		})
	}
}

func TestTheEpochIsRaisedAboveTheOneInTheStore(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	behind := s.Status.Epoch + 1000
	w.holder(s, v1alpha1.PhaseDisconnected, v1alpha1.ReasonEpochBehind, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.StoredEpoch = behind
	})
	above := w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Epoch).To(Equal(behind + 1)) })
	w.Expect(above.Status.Worker).To(Equal("worker-a"), "the worker stays the same")
	w.Expect(above.Status.HeldBy).To(Equal("worker-a"))
}

// The maximum, which only a wrong clock can reach, is not exceeded, and an Event reports it.
func TestTheStoreHasTheHighestPossibleEpoch(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	w.holder(s, v1alpha1.PhaseDisconnected, v1alpha1.ReasonEpochBehind, func(next *v1alpha1.WhatsAppSessionStatus) {
		next.StoredEpoch = v1alpha1.MaxEpoch
	})
	top := w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Epoch).To(Equal(v1alpha1.MaxEpoch)) })
	w.Expect(w.event(s, v1alpha1.ReasonEpochAtMaximum)).To(ContainSubstring("clock"))
	w.touch(s)
	w.placed(w.apply(w.b, "other"), "worker-a")
	now, err := w.get(s)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.Status).To(Equal(top.Status), "it is written only once")
}

func TestTheEpochOfARestingSessionIsRaised(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	behind := s.Status.Epoch + 1000
	rests := func(change func(*v1alpha1.WhatsAppSessionStatus)) {
		s = w.holder(s, v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, change)
	}
	rests(func(next *v1alpha1.WhatsAppSessionStatus) {
		next.JID, next.StoredEpoch, next.RetryReason = "", behind, v1alpha1.ReasonLoggedOut
	})
	s = w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Epoch).To(Equal(behind + 1)) })
	rests(func(next *v1alpha1.WhatsAppSessionStatus) { next.HeldBy, next.HolderStart = "", "" })
	w.Consistently(func(g Gomega) {
		g.Expect(k8s.Get(t.Context(), client.ObjectKeyFromObject(s), s)).To(Succeed())
		g.Expect(s.Status.Phase).To(Equal(v1alpha1.PhaseLoggedOut))
		g.Expect(s.Status.Worker).To(Equal("worker-a"), "the worker that takes it acts on restartedAt")
	}, "300ms").Should(Succeed())
}

func TestASessionOfAnotherInstallation(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.stop() // a restore writes the status before the manager sees the object
	restored := w.apply(w.a, "restored")
	neighbour := w.apply(w.a, "neighbour")
	for s, theirs := range map[*v1alpha1.WhatsAppSession]string{restored: "cluster-9/operators/main", neighbour: "cluster-1/operators/staging"} {
		w.Expect(patchStatus(t.Context(), k8s, s, v1alpha1.WhatsAppSessionStatus{
			ObservedGeneration: 1, Installation: theirs, SessionID: s.Name, Worker: "w9", HeldBy: "w9", Epoch: 7, Phase: v1alpha1.PhaseConnected,
		})).To(Succeed())
	}
	left := neighbour.Status
	w.start()
	w.worker("worker-a")
	stalled := w.phase(restored, v1alpha1.PhaseFailed, v1alpha1.ReasonOtherInstallation)
	w.Expect(condition(stalled, v1alpha1.ConditionStalled)).To(Equal("True/OtherInstallation"))
	w.Expect(stalled.Status.Installation).To(Equal("cluster-9/operators/main"))
	w.Expect(stalled.Status.Epoch).To(BeEquivalentTo(7))
	w.Expect(w.event(restored, v1alpha1.ReasonOtherInstallation)).To(ContainSubstring("cluster-9"))
	w.placed(w.apply(w.a, "ours"), "worker-a")
	w.Expect(w.ids.has("restored")).To(BeFalse())
	w.Expect(w.redis.status("restored")).To(BeEmpty())

	w.delete(restored)
	w.gone(restored)
	now, err := w.get(neighbour)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.Status).To(Equal(left), "the other release of this cluster manages it")
}

func TestAPublicationIsRepeatedUntilRedisAnswers(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.redis.fail(errors.New("connection refused"))
	w.worker("worker-a")
	s := w.placed(w.apply(w.a, "acme"), "worker-a")
	w.Expect(w.redis.status("acme")).To(BeEmpty(), "a placement does not wait for Redis")
	w.redis.fail(nil)
	w.published("acme", "pending/Pending/Placed")
	w.Expect(w.redis.numbers("acme").Epoch).To(Equal(s.Status.Epoch))
}

func TestAStatusIsPublishedAgainAfterRedisWasEmptiedAndByANewLeader(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	s := w.phase(w.apply(w.a, "acme", suspended), v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended)
	w.published("acme", "inactive/Suspended/Suspended")
	before := w.redis.numbers("acme")

	w.redis.empty()
	w.Expect(w.reconciler.PublishAgain(t.Context())).To(Succeed())
	w.published("acme", "inactive/Suspended/Suspended")

	// Redis is emptied right after a publication.
	w.redis.empty()
	again := make(chan error, 1)
	w.redis.mu.Lock()
	w.redis.then = func() {
		w.redis.empty()
		again <- w.reconciler.PublishAgain(t.Context())
	}
	w.redis.mu.Unlock()
	w.Expect(w.reconciler.PublishAgain(t.Context())).To(Succeed())
	w.Eventually(again).Should(Receive(Succeed()))
	w.published("acme", "inactive/Suspended/Suspended")

	w.stop()
	w.redis.empty()
	w.start()
	w.published("acme", "inactive/Suspended/Suspended")
	w.Expect(w.redis.numbers("acme")).To(Equal(before), "the same status with the same numbers")
	now, err := w.get(s)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now.ResourceVersion).To(Equal(s.ResourceVersion), "the object was not written")
}

// A resource was restored from a backup, or moved here from another cluster with an older
// status. Laravel must receive its status nevertheless.
func TestTheEpochIsRaisedAboveTheOneInRedis(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	ahead := time.Now().Unix() + 1_000_000
	remember := func(id string, epoch int64) {
		w.redis.remember(delivery.StatusItem{SessionID: id, Status: delivery.Active, Phase: "Connected", Numbers: delivery.Numbers{Epoch: epoch, Seq: delivery.FirstSeq(7)}})
	}
	remember("acme", ahead)
	s := w.phase(w.apply(w.a, "acme", suspended), v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended)
	w.published("acme", "inactive/Suspended/Suspended")
	w.waitFor(s, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Epoch).To(BeNumerically(">", ahead)) })

	remember("acme", ahead+1_000)
	w.delete(s)
	w.gone(s)
	w.published("acme", "inactive/Terminating/Deleted")
	w.Expect(w.redis.numbers("acme").Epoch).To(BeNumerically(">", ahead+1_000))
}

// A former leader was paused and continues when another one leads and Redis has just been
// emptied: its cache is stale, and Redis has nothing that would refuse a stale status.
func TestAStaleCacheAfterRedisWasEmptied(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	stale := map[string]*v1alpha1.WhatsAppSession{}
	for _, name := range []string{"held", "moved", "unheld", "gone", "again", "ended"} {
		stale[name] = w.placed(w.apply(w.a, name), "worker-a")
		w.published(name, "pending/Pending/Placed")
	}
	w.hold(stale["held"], "worker-a")
	w.edit(stale["ended"], func(s *v1alpha1.WhatsAppSession) {
		s.Finalizers = append(s.Finalizers, "example.com/keeps")
		s.Spec.DeletionPolicy = v1alpha1.DeletionRetain
	})
	w.ids.link("ended", "34600111222:3@s.whatsapp.net", "+34600111222")
	w.edit(stale["moved"], suspended)
	w.phase(stale["moved"], v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended)
	for _, name := range []string{"gone", "again"} {
		w.delete(stale[name])
		w.gone(stale[name])
	}
	w.placed(w.apply(w.a, "again"), "worker-a")
	w.delete(stale["ended"])
	ended := w.waitFor(stale["ended"], func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Finalizers).To(ConsistOf("example.com/keeps"))
	})
	w.stop()
	stale["ended"] = ended.DeepCopy()
	controllerutil.AddFinalizer(stale["ended"], v1alpha1.Finalizer) // as it was before the last of its writes
	stale["ended"].ResourceVersion = stale["moved"].ResourceVersion
	w.edit(ended, func(s *v1alpha1.WhatsAppSession) { s.Finalizers = nil })
	w.gone(ended)
	w.redis.empty()

	reconcileStale := func(name string) error {
		r := &SessionReconciler{
			Deletions:      &Deletions{},
			SessionOptions: SessionOptions{Installation: installation, IDs: w.ids, Publisher: w.redis, Log: logr.Discard(), Clock: w.clock},
			client: interceptor.NewClient(k8s, interceptor.Funcs{
				Get: func(_ context.Context, _ client.WithWatch, _ client.ObjectKey, into client.Object, _ ...client.GetOption) error {
					stale[name].DeepCopyInto(into.(*v1alpha1.WhatsAppSession))
					return nil
				},
			}),
			reader: k8s, events: events.NewFakeRecorder(10),
			published: map[types.NamespacedName]int64{}, lastEpochs: map[string]int64{}, lastWrite: map[types.NamespacedName]version{},
		}
		_, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(stale[name])})
		return err
	}
	for _, name := range []string{"held", "moved", "gone", "again", "ended"} {
		w.Expect(reconcileStale(name)).To(Succeed(), name)
		w.Expect(w.redis.status(name)).To(BeEmpty(), "%s: a stale status is not published", name)
	}
	w.Expect(reconcileStale("unheld")).To(Succeed())
	w.Expect(w.redis.status("unheld")).To(Equal("pending/Pending/Placed"), "a status that has not changed is published")
}

func TestAStoreThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.ids.fail(errors.New("connection refused"))
	w.worker("worker-a")
	s := w.waitFor(w.apply(w.a, "acme"), func(g Gomega, s *v1alpha1.WhatsAppSession) {
		g.Expect(s.Finalizers).NotTo(BeEmpty())
		g.Expect(status.Reason(s.Status)).To(Equal(v1alpha1.ReasonStoreUnavailable))
	})
	w.Expect(s.Status.Worker).To(BeEmpty())
	w.ids.fail(nil)
	w.placed(s, "worker-a")
}

// A former leader was stopped while another one decided: its cache shows the session as it
// was before.
func TestADecisionFromAStaleCacheIsRefused(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	old := w.placed(w.apply(w.a, "acme"), "worker-a")
	w.hold(old, "worker-a")
	now := w.suspend(old)
	w.published("acme", "inactive/Suspended/Suspended")
	w.stop()

	paused := interceptor.NewClient(k8s, interceptor.Funcs{
		Get: func(_ context.Context, _ client.WithWatch, _ client.ObjectKey, into client.Object, _ ...client.GetOption) error {
			before := old.DeepCopy()
			before.Spec.Suspend = true // this would withdraw the placement, with another epoch
			before.DeepCopyInto(into.(*v1alpha1.WhatsAppSession))
			return nil
		},
	})
	r := &SessionReconciler{
		Deletions: &Deletions{},
		SessionOptions: SessionOptions{
			Installation: installation, IDs: w.ids, Publisher: w.redis, Log: logr.Discard(),
			Clock: clocktesting.NewFakeClock(w.clock.Now().Add(time.Hour)),
		},
		client: paused, reader: k8s, events: events.NewFakeRecorder(10), published: map[types.NamespacedName]int64{}, lastEpochs: map[string]int64{},
	}
	result, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(old)})
	w.Expect(err).NotTo(HaveOccurred(), "a conflict is not an error: the decision is made again")
	w.Expect(result.RequeueAfter).To(BeNumerically(">", 0))
	after, err := w.get(old)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(after).To(Equal(now))
	w.Expect(w.redis.numbers("acme").Epoch).To(Equal(now.Status.Epoch), "nothing was published")
}

// The reconciler is called again before the cache shows what it has just written.
func TestNothingIsDecidedBeforeTheCacheShowsTheLastWrite(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.stop()
	shown := w.apply(w.a, "acme")
	claims := &countingIDs{IDs: w.ids}
	patches := 0
	behind := interceptor.NewClient(k8s, interceptor.Funcs{
		Get: func(_ context.Context, _ client.WithWatch, _ client.ObjectKey, into client.Object, _ ...client.GetOption) error {
			shown.DeepCopyInto(into.(*v1alpha1.WhatsAppSession))
			return nil
		},
		List: func(context.Context, client.WithWatch, client.ObjectList, ...client.ListOption) error { return nil }, // no claimants
		Patch: func(ctx context.Context, c client.WithWatch, obj client.Object, patch client.Patch, o ...client.PatchOption) error {
			patches++
			return c.Patch(ctx, obj, patch, o...)
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, o ...client.SubResourcePatchOption) error {
			patches++
			return c.SubResource(sub).Patch(ctx, obj, patch, o...)
		},
	})
	r := &SessionReconciler{
		Deletions:      &Deletions{},
		SessionOptions: SessionOptions{Installation: installation, IDs: claims, Publisher: w.redis, Log: logr.Discard(), Clock: w.clock},
		client:         behind, reader: k8s, events: events.NewFakeRecorder(10),
		published: map[types.NamespacedName]int64{}, lastEpochs: map[string]int64{}, lastWrite: map[types.NamespacedName]version{},
	}
	reconcile := func(why string, writes, claimed int) {
		t.Helper()
		result, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(shown)})
		w.Expect(err).NotTo(HaveOccurred(), why)
		w.Expect(result).To(BeZero(), why)
		w.Expect(patches).To(Equal(writes), why)
		w.Expect(claims.n).To(Equal(claimed), why)
	}
	reconcile("the finalizer and the id are written", 2, 1)
	reconcile("nothing is decided while the cache does not show them", 2, 1)

	var err error
	shown, err = w.get(shown)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(shown.Status.SessionID).To(Equal("acme"))
	reconcile("there is nothing to do when the cache shows them", 2, 1)

	shown.Spec.Suspend = true
	base := shown.DeepCopy()
	base.Spec.Suspend = false
	w.Expect(k8s.Patch(t.Context(), shown, client.MergeFrom(base))).To(Succeed())
	reconcile("a change by a person is acted on", 3, 1)

	w.Expect(k8s.Patch(t.Context(), shown.DeepCopy(), client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`)))).To(Succeed())
	w.delete(shown)
	shown = w.apply(w.a, "acme")
	reconcile("the name belongs to another object now", 5, 2)
}

// countingIDs counts the claims.
type countingIDs struct {
	IDs
	n int
}

func (c *countingIDs) Claim(ctx context.Context, claimant Claimant, gone func(types.UID) bool) (bool, error) {
	c.n++
	return c.IDs.Claim(ctx, claimant, gone)
}

// TestALostRecordWhileTheDatabaseIsAway: the manager cannot claim the id again, and leaves
// the status to the holder. Otherwise each would overwrite what the other has written.
func TestALostRecordWhileTheDatabaseIsAway(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	s := w.hold(w.placed(w.apply(w.a, "acme"), "worker-a"), "worker-a")
	w.ids.fail(errors.New("connection refused"))
	reported := w.holder(s, v1alpha1.PhaseFailed, v1alpha1.ReasonRecordMissing, func(*v1alpha1.WhatsAppSessionStatus) {})
	w.Eventually(w.logged, testTimeout, pollInterval).Should(ContainSubstring("connection refused"))
	w.Consistently(func(g Gomega) {
		now, err := w.get(s)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(now.ResourceVersion).To(Equal(reported.ResourceVersion))
	}, "300ms", pollInterval).Should(Succeed())
	w.ids.fail(nil)
	w.ids.forget("acme")
	w.touch(s)
	w.Eventually(func() bool { return w.ids.has("acme") }, testTimeout, pollInterval).Should(BeTrue())
}

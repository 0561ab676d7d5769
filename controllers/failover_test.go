package controllers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// declareDead makes a worker silent and declares it dead; the survivors renew their Leases.
func (w *env) declareDead(name string, survivors ...string) {
	w.t.Helper()
	// When a later session is placed, the manager has seen the present state of the others.
	w.waitFor(w.apply(w.b, "before-"+name), func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Worker).NotTo(BeEmpty()) })
	w.clock.SetTime(w.clock.Now().Add(membership.Duration + time.Second))
	for _, s := range survivors {
		w.worker(s)
	}
	if len(survivors) > 0 { // the same for the renewals: a survivor whose renewal was not seen would be silent too
		w.waitFor(w.apply(w.b, "after-"+name), func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(survivors).To(ContainElement(s.Status.Worker)) })
	}
	w.deaths.set(name, true)
}

func TestTheSessionsOfADeadWorkerArePlacedOnOthers(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	held := func(name string, phase v1alpha1.Phase, reason string, change func(*v1alpha1.WhatsAppSessionStatus)) *v1alpha1.WhatsAppSession {
		w.t.Helper()
		s := w.hold(w.placed(w.apply(w.a, name), "worker-a"), "worker-a")
		return w.holder(s, phase, reason, change)
	}
	later := metav1.NewTime(w.clock.Now().Add(time.Hour))
	nothing := func(*v1alpha1.WhatsAppSessionStatus) {}
	connected := held("connected", v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, nothing)
	connecting := held("connecting", v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, nothing)
	banned := held("banned", v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryAfter = &later })
	replaced := held("replaced", v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, nothing)
	pairing := w.pair(w.placed(w.apply(w.a, "pairing"), "worker-a"), "worker-a")
	pairing = w.holder(pairing, v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForScan, func(s *v1alpha1.WhatsAppSessionStatus) {
		s.QR = &v1alpha1.QRStatus{Code: "2@code", ExpiresAt: later, Attempt: 1}
	})
	suspending := held("suspending", v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, nothing)
	w.edit(suspending, suspended)
	w.placed(suspending, "")

	w.declareDead("worker-a", "worker-b")
	for _, row := range []struct {
		before        *v1alpha1.WhatsAppSession
		worker        string
		phase, reason string
	}{
		{connected, "worker-b", "Disconnected", v1alpha1.ReasonWorkerLost},
		{connecting, "worker-b", "Disconnected", v1alpha1.ReasonWorkerLost},
		{banned, "worker-b", "Banned", v1alpha1.ReasonBanned},
		{replaced, "worker-b", "Replaced", v1alpha1.ReasonReplaced},
		{pairing, "worker-b", "Disconnected", v1alpha1.ReasonWorkerLost},
		{suspending, "", "Suspended", v1alpha1.ReasonSuspended},
	} {
		after := w.waitFor(row.before, func(g Gomega, s *v1alpha1.WhatsAppSession) {
			g.Expect(s.Status.HeldBy).To(BeEmpty())
			g.Expect(s.Status.Worker).To(Equal(row.worker))
		})
		w.Expect(after.Status.HolderStart).To(BeEmpty(), after.Name)
		w.Expect(string(after.Status.Phase)).To(Equal(row.phase), after.Name)
		w.Expect(status.Reason(after.Status)).To(Equal(row.reason), after.Name)
		w.Expect(after.Status.Epoch).To(BeNumerically(">", row.before.Status.Epoch), after.Name)
		w.Expect(after.Status.QR).To(BeNil(), after.Name)
		w.Expect(after.Status.JID).To(Equal(row.before.Status.JID), after.Name)
		w.Expect(after.Status.RetryAfter).To(Equal(row.before.Status.RetryAfter), after.Name)
	}
	lease := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: w.operator, Name: membership.LeaseName(release, "worker-a")}}
	w.Expect(w.event(lease, v1alpha1.ReasonWorkerLost)).To(Equal("worker worker-a is dead: its 6 sessions are placed on other workers"))
	after, err := w.get(connected)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(after.Status.LastDisconnectedTime.Time).To(BeTemporally("==", w.clock.Now()))
	w.Expect(after.Status.LastDisconnectReason).To(ContainSubstring("worker-a died"))
	w.published("connected", "pending/Disconnected/WorkerLost")
	w.published("suspending", "inactive/Suspended/Suspended")

	t.Log("the new worker claims it")
	back := w.hold(connected, "worker-b")
	w.Expect(back.Status.Worker).To(Equal("worker-b"))
}

func TestTheOnlyWorkerDies(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	held := w.hold(w.placed(w.apply(w.a, "held"), "worker-a"), "worker-a")

	w.declareDead("worker-a")
	lost := w.placed(held, "")
	w.Expect(lost.Status.HeldBy).To(BeEmpty())
	w.Expect(lost.Status.Phase).To(Equal(v1alpha1.PhaseDisconnected))
	w.Expect(status.Reason(lost.Status)).To(Equal(v1alpha1.ReasonWorkerLost))
	w.Expect(condition(lost, v1alpha1.ConditionPlaced)).To(Equal("False/NoWorkers"))
	w.event(lost, v1alpha1.ReasonNoWorkers)
	w.published("held", "pending/Disconnected/WorkerLost")

	t.Log("another worker joins")
	w.worker("worker-b")
	again := w.placed(held, "worker-b")
	w.Expect(again.Status.Epoch).To(BeNumerically(">", lost.Status.Epoch))
	w.Expect(status.Reason(again.Status)).To(Equal(v1alpha1.ReasonWorkerLost))
	w.Expect(condition(again, v1alpha1.ConditionPlaced)).To(Equal("True/Placed"))
}

func TestTheOldHolderDiesDuringAMove(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	held := w.hold(w.placed(w.apply(w.a, "held"), "worker-a"), "worker-a")
	w.worker("worker-b")
	w.worker("worker-a", draining)
	moving := w.placed(held, "worker-b")
	w.Expect(moving.Status.HeldBy).To(Equal("worker-a"))

	w.declareDead("worker-a", "worker-b")
	free := w.waitFor(held, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.HeldBy).To(BeEmpty()) })
	w.Expect(free.Status.Worker).To(Equal("worker-b"), "the target of the move stays the same")
	w.Expect(status.Reason(free.Status)).To(Equal(v1alpha1.ReasonWorkerLost))
}

func TestTheHolderOfADeletedSessionDies(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.worker("worker-a")
	logout := w.hold(w.placed(w.apply(w.a, "logout"), "worker-a"), "worker-a")
	kept := w.hold(w.placed(w.apply(w.a, "kept", retain), "worker-a"), "worker-a")
	unlinked := w.pair(w.placed(w.apply(w.a, "unlinked"), "worker-a"), "worker-a")
	for _, s := range []*v1alpha1.WhatsAppSession{logout, kept, unlinked} {
		w.delete(s)
	}
	w.declareDead("worker-a", "worker-b")
	w.gone(kept)
	w.gone(unlinked)
	next := w.placed(logout, "worker-b")
	w.Expect(next.Status.HeldBy).To(BeEmpty())
	w.phase(logout, v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting)

	t.Log("the next holder dies too, after the deadline of the logout")
	w.hold(logout, "worker-b")
	w.advance(session.LogoutTimeout)
	w.worker("worker-b")
	w.declareDead("worker-b")
	w.gone(logout)
	w.Expect(w.event(logout, v1alpha1.ReasonLogoutUnconfirmed)).To(ContainSubstring("remove the device"))
}

func TestASessionOfAnotherInstallationIsNotPlaced(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	w.stop()
	s := w.apply(w.a, "theirs")
	w.Expect(patchStatus(t.Context(), k8s, s, v1alpha1.WhatsAppSessionStatus{
		SessionID: s.Name, Installation: "cluster-1/other/main", Worker: "worker-a", HeldBy: "worker-a", HolderStart: "p1",
	})).To(Succeed())
	sessions := []v1alpha1.WhatsAppSession{*s}
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.lease(r, "worker-b")
	w.deaths.set("worker-a", true)
	_, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	now, err := w.get(s)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(now).To(Equal(s))
}

// held creates sessions that worker-a holds, without a running manager.
func (w *env) held(n int) []v1alpha1.WhatsAppSession {
	w.t.Helper()
	sessions := w.waiting(n)
	for i := range sessions {
		next := *sessions[i].Status.DeepCopy()
		next.Worker, next.HeldBy, next.HolderStart, next.Epoch = "worker-a", "worker-a", "p1", w.clock.Now().Unix()
		next = status.Summarize(next, status.Facts{Phase: v1alpha1.PhaseConnected, Reason: v1alpha1.ReasonConnected}, w.clock.Now())
		w.Expect(patchStatus(w.t.Context(), k8s, &sessions[i], next)).To(Succeed())
	}
	return sessions
}

// claim claims a session as a process of its worker does after a restart in place. It
// reports whether it could.
func claim(ctx context.Context, s *v1alpha1.WhatsAppSession, process string) (bool, error) {
	for {
		now := &v1alpha1.WhatsAppSession{}
		if err := k8s.Get(ctx, client.ObjectKeyFromObject(s), now); err != nil {
			return false, err
		}
		if now.Status.Worker != s.Status.Worker || now.Status.HeldBy != s.Status.Worker {
			return false, nil
		}
		next := *now.Status.DeepCopy()
		next.HolderStart = process
		err := patchStatus(ctx, k8s, now, next)
		if !apierrors.IsConflict(err) {
			return err == nil, err
		}
	}
}

func TestALeaderIsPausedBetweenDecisionAndPatch(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(1)
	restart := sync.OnceFunc(func() {
		w.deaths.renew("worker-a")
		taken, err := claim(t.Context(), &sessions[0], "p2")
		w.Expect(err).NotTo(HaveOccurred())
		w.Expect(taken).To(BeTrue())
	})
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, o ...client.SubResourcePatchOption) error {
			restart() // while the leader is paused
			return c.SubResource(sub).Patch(ctx, obj, patch, o...)
		},
	}))
	w.lease(r, "worker-b")
	w.deaths.set("worker-a", true)
	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(conflictRetryInterval), "the decision is made again")

	t.Log("the cache shows the claim, and the observer has not seen it yet")
	now, err := w.get(&sessions[0])
	w.Expect(err).NotTo(HaveOccurred())
	sessions[0] = *now
	w.Expect(w.deaths.Dead("worker-a")).To(BeTrue())
	_, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	after, err := w.get(now)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(after).To(Equal(now), "the process that came back keeps it")

	t.Log("when that process dies too, the session is taken from it")
	w.deaths.set("worker-a", true)
	_, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-b": 1}))
}

func TestANewWorkerIsUsedBeforeTheObserverHasSeenIt(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(1)
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.lease(r, "worker-b")
	w.deaths.set("worker-b", true)
	w.deaths.renew("worker-b") // it has joined after the last observation
	_, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-b": 1}))
}

func TestDeadIsCheckedBeforeEachWrite(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(3)
	var once sync.Once
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, o ...client.SubResourcePatchOption) error {
			once.Do(func() { w.deaths.set("worker-a", false) }) // it comes back during the first write
			return c.SubResource(sub).Patch(ctx, obj, patch, o...)
		},
	}))
	r.Concurrency = 1
	w.lease(r, "worker-b")
	w.deaths.set("worker-a", true)
	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(conflictRetryInterval))
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 2, "worker-b": 1}))
}

func TestTheAnswerToAFailOverIsLost(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(1)
	broken := true
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, o ...client.SubResourcePatchOption) error {
			if err := c.SubResource(sub).Patch(ctx, obj, patch, o...); err != nil || !broken {
				return err
			}
			return errors.New("connection reset")
		},
	}))
	w.lease(r, "worker-b")
	w.deaths.set("worker-a", true)
	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(Equal(retryFirst), "it is tried again, and no other session waits for it")
	broken = false
	first, err := w.get(&sessions[0])
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(first.Status.Worker).To(Equal("worker-b"))

	t.Log("the new worker claims it before the cache shows the placement")
	claimed := first.DeepCopy()
	next := *claimed.Status.DeepCopy()
	next.HeldBy, next.HolderStart = "worker-b", "p7"
	w.Expect(patchStatus(t.Context(), k8s, claimed, next)).To(Succeed())
	_, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	after, err := w.get(&sessions[0])
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(after).To(Equal(claimed))
}

// Two workers die at the same moment, and one is declared dead before the other.
func TestTheSessionsOfADeadWorkerDoNotGoToOneThatDiedWithIt(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.held(4)
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.lease(r, "worker-a")
	w.lease(r, "worker-b")
	w.lease(r, "worker-c", capacity(2))
	w.clock.SetTime(w.clock.Now().Add(membership.Duration - time.Second))
	r.members.observe(w.leaseOf("worker-c", capacity(2)))
	w.deaths.set("worker-a", true)
	w.runPlacement(r, sessions)
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 2, "worker-c": 2}), "worker-b has missed as many renewals as worker-a")

	t.Log("it is declared dead as well")
	w.worker("worker-d")
	w.deaths.set("worker-b", true)
	w.clock.SetTime(w.clock.Now().Add(time.Second))
	w.Expect(r.members.observe(w.leaseOf("worker-d"))).To(BeTrue())
	w.runPlacement(r, sessions)
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-c": 2, "worker-d": 2}))
	for i := range sessions {
		w.Expect(sessions[i].Status.HeldBy).To(BeEmpty())
	}
}

// Sessions that wait for a late worker go to it as soon as it renews its Lease.
func TestALateWorkerRenewsItsLease(t *testing.T) {
	t.Parallel()
	w := newEnv(t)
	sessions := w.waiting(1)
	r := w.newPlacement(clientShowing(&sessions, interceptor.Funcs{}))
	w.lease(r, "worker-a")
	w.clock.SetTime(w.clock.Now().Add(lateAfter))
	result, err := r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(result.RequeueAfter).To(BeNumerically("<=", membership.Duration-lateAfter), "when its Lease has expired, the reason is written")
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"": 1}))
	w.Expect(r.members.observe(w.leaseOf("worker-a"))).To(BeTrue(), "its renewal requests a run")
	_, err = r.Reconcile(t.Context(), everything)
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(w.workers(sessions)).To(Equal(map[string]int{"worker-a": 1}))
}

// Processes claim their sessions again while a running manager takes them away. A session
// whose claim succeeded is never taken away, and every other session is placed.
func TestAWorkerComesBackWhileItIsDeclaredDead(t *testing.T) {
	t.Parallel()
	const rounds, each = 12, 10
	w := newEnv(t)
	kept := 0
	for round := range rounds {
		name, process := fmt.Sprintf("worker-%d", round), fmt.Sprintf("back-%d", round)
		newest := func(m *membership.Member) { m.Revision = 2 } // so that the sessions go there first
		w.worker("worker-b", capacity(2*rounds*each))
		w.worker(name, newest)
		sessions := make([]*v1alpha1.WhatsAppSession, each)
		for i := range sessions {
			sessions[i] = w.placed(w.apply(w.a, fmt.Sprintf("s%d-%d", round, i)), name)
		}
		for i := range sessions {
			sessions[i] = w.hold(sessions[i], name)
		}
		w.placed(w.apply(w.a, fmt.Sprintf("before-%d", round)), name) // the manager has seen the claims

		claimed, failed := make([]bool, each), make([]error, each)
		var running sync.WaitGroup
		for i := range sessions {
			if i == round%each {
				w.deaths.set(name, true)
			}
			running.Go(func() {
				w.deaths.renew(name) // a process renews before it claims
				claimed[i], failed[i] = claim(t.Context(), sessions[i], process)
			})
		}
		running.Wait()
		w.Expect(errors.Join(failed...)).NotTo(HaveOccurred())
		for i, s := range sessions {
			if !claimed[i] {
				lost := w.placed(s, "worker-b")
				w.Expect(lost.Status.HeldBy).To(BeEmpty())
			}
		}
		next := w.apply(w.a, fmt.Sprintf("next-%d", round)) // another run of the placement
		w.waitFor(next, func(g Gomega, s *v1alpha1.WhatsAppSession) { g.Expect(s.Status.Worker).NotTo(BeEmpty()) })
		for i, s := range sessions {
			if claimed[i] {
				kept++
				now, err := w.get(s)
				w.Expect(err).NotTo(HaveOccurred())
				w.Expect(now.Status.HeldBy).To(Equal(name), s.Name)
				w.Expect(now.Status.HolderStart).To(Equal(process), s.Name)
			}
		}
		w.removeWorker(name)
	}
	t.Logf("%d of %d sessions were kept by the worker that came back", kept, rounds*each)
}

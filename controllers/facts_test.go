package controllers

import (
	"math"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// writtenStatus is a status as its last writer left it.
func writtenStatus(phase v1alpha1.Phase, reason string, s v1alpha1.WhatsAppSessionStatus) v1alpha1.WhatsAppSessionStatus {
	return status.Summarize(s, status.Facts{Generation: 1, Phase: phase, Reason: reason, Message: "as the holder said"}, noon)
}

// quarantined is the status of a session that is tried again an hour after noon.
func quarantined(worker string) v1alpha1.WhatsAppSessionStatus {
	return v1alpha1.WhatsAppSessionStatus{
		Worker: worker, Failures: 8, FailureReason: "SocketClosed", RetryAfter: &metav1.Time{Time: noon.Add(time.Hour)},
	}
}

func TestUnheldFacts(t *testing.T) {
	t.Parallel()
	onWorker := v1alpha1.WhatsAppSessionStatus{Worker: "worker-a"}
	nowhere := v1alpha1.WhatsAppSessionStatus{}
	tests := []struct {
		name    string
		spec    v1alpha1.WhatsAppSessionSpec
		deleted bool
		next    v1alpha1.WhatsAppSessionStatus
		why     unplaced
		phase   v1alpha1.Phase
		reason  string
		placed  string
		// stalled is for a phase that is usually not stalled.
		stalled bool
	}{
		{name: "new", next: nowhere, phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement, placed: "False/WaitingForPlacement"},
		{name: "placed", next: onWorker, phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed"},
		{
			name: "unplaced", next: nowhere, why: unplaced{v1alpha1.ReasonNoCapacity, "full"},
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonNoCapacity, placed: "False/NoCapacity",
		},
		{
			name: "released by its holder, and placed on another worker", next: writtenStatus(v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving, onWorker),
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonMoving, placed: "True/Placed",
		},
		{
			name: "released by its holder, and without a worker", next: writtenStatus(v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving, nowhere),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement, placed: "False/WaitingForPlacement",
		},
		{
			name: "failed because of its proxy, and placed: the next worker tries again", next: writtenStatus(v1alpha1.PhaseFailed, v1alpha1.ReasonProxySecretMissing, onWorker),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed",
		},
		{
			name: "logged out, and moved", next: writtenStatus(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, onWorker),
			phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut, placed: "True/Placed",
		},
		{
			name: "logged out, and without a worker", next: writtenStatus(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, nowhere),
			why:   unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut, placed: "False/NoWorkers",
		},
		{
			name: "suspended", spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, next: writtenStatus(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, nowhere),
			why:   unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseSuspended, reason: v1alpha1.ReasonSuspended, placed: "False/Suspended",
		},
		{
			name: "resumed", next: writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, nowhere),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement, placed: "False/WaitingForPlacement",
		},
		{
			name: "resumed during a ban",
			next: writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", RetryAfter: &metav1.Time{Time: noon.Add(time.Hour)},
			}),
			phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned, placed: "True/Placed",
		},
		{
			name:  "resumed during a ban without an end",
			next:  writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{RetryReason: v1alpha1.ReasonBanned}),
			phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned, placed: "False/WaitingForPlacement",
		},
		{
			name:  "resumed after it was logged out",
			next:  writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{Worker: "worker-a", RetryReason: v1alpha1.ReasonLoggedOut}),
			phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut, placed: "True/Placed",
		},
		{
			name:  "resumed after nobody had scanned",
			next:  writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{RetryReason: v1alpha1.ReasonPairingExpired}),
			phase: v1alpha1.PhasePairingExpired, reason: v1alpha1.ReasonPairingExpired, placed: "False/WaitingForPlacement",
		},
		{
			name: "resumed after the end of a ban",
			next: writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", RetryReason: v1alpha1.ReasonBanned, RetryAfter: &metav1.Time{Time: noon},
			}),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed",
		},
		{
			name: "resumed shortly after a login elsewhere: it is not a ban",
			next: writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", Replacements: 1, RetryAfter: &metav1.Time{Time: noon.Add(time.Minute)},
			}),
			phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced, placed: "True/Placed",
		},
		{
			name: "resumed shortly after a pairing code was refused: it is not a ban",
			next: writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", RetryReason: v1alpha1.ReasonPairingCodeRefused, RetryAfter: &metav1.Time{Time: noon.Add(time.Minute)},
			}),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed",
		},
		{
			name: "in quarantine, and moved",
			next: status.Summarize(quarantined("worker-a"), status.Facts{
				Generation: 1, Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonQuarantined, Message: "as the holder said", Stalled: true,
			}, noon),
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined, placed: "True/Placed", stalled: true,
		},
		{
			name: "in quarantine, and without a worker", next: writtenStatus(v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving, quarantined("")),
			why:   unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined, placed: "False/NoWorkers", stalled: true,
		},
		{
			name: "resumed during a quarantine", next: writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, quarantined("worker-a")),
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined, placed: "True/Placed", stalled: true,
		},
		{
			name: "resumed after a quarantine",
			next: writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", Failures: 8, FailureReason: "SocketClosed", RetryAfter: &metav1.Time{Time: noon},
			}),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed",
		},
		{
			name: "deleted while suspended", spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, deleted: true, next: onWorker,
			phase: v1alpha1.PhaseTerminating, reason: v1alpha1.ReasonDeleting, placed: "True/Placed",
		},
		{
			name: "deleted, and there is no worker that can log out", deleted: true, next: nowhere, why: unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseTerminating, reason: v1alpha1.ReasonDeleting, placed: "False/NoWorkers",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			s := &v1alpha1.WhatsAppSession{Spec: tt.spec, Status: tt.next}
			if tt.deleted {
				s.DeletionTimestamp = &metav1.Time{Time: noon}
			}
			got := status.Summarize(tt.next, unheldFacts(s, tt.next, tt.why, noon), noon)
			g.Expect(got.Phase).To(Equal(tt.phase))
			g.Expect(status.Reason(got)).To(Equal(tt.reason))
			s.Status = got
			if tt.stalled {
				g.Expect(condition(s, v1alpha1.ConditionStalled)).To(Equal("True/" + tt.reason))
			}
			g.Expect(condition(s, v1alpha1.ConditionPlaced)).To(Equal(tt.placed))

			again := status.Summarize(got, unheldFacts(s, got, lastUnplaced(s), noon), noon.Add(time.Minute))
			g.Expect(again).To(Equal(got), "a second computation changes nothing")
		})
	}
}

// A suspension overwrites the phase, and the phase of a resting session must come back.
func TestARestingSessionRestsAgainAfterASuspension(t *testing.T) {
	t.Parallel()
	soon := &metav1.Time{Time: noon.Add(time.Minute)}
	for _, tt := range []struct {
		name   string
		before v1alpha1.WhatsAppSessionStatus
		phase  v1alpha1.Phase
		reason string
	}{
		{
			name:   "logged out, as a version without retryReason wrote it",
			before: writtenStatus(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut,
		},
		{
			name:   "linked to a wrong phone",
			before: writtenStatus(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonWrongPhone, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonWrongPhone,
		},
		{
			name:   "nobody scanned",
			before: writtenStatus(v1alpha1.PhasePairingExpired, v1alpha1.ReasonPairingExpired, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhasePairingExpired, reason: v1alpha1.ReasonPairingExpired,
		},
		{
			name:   "banned without an end",
			before: writtenStatus(v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name:   "banned",
			before: writtenStatus(v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, v1alpha1.WhatsAppSessionStatus{RetryAfter: soon}),
			phase:  v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name:   "replaced, and its holder died: it connects once more",
			before: writtenStatus(v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, v1alpha1.WhatsAppSessionStatus{Replacements: 1, RetryAfter: soon}),
			phase:  v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement,
		},
		{
			name:   "replaced twice, and its holder died: it connects once more",
			before: writtenStatus(v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, v1alpha1.WhatsAppSessionStatus{Replacements: 2}),
			phase:  v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement,
		},
		{
			name:   "connected",
			before: writtenStatus(v1alpha1.PhaseDisconnected, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			s := &v1alpha1.WhatsAppSession{Spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, Status: tt.before}
			next := unheldStatus(s, tt.before, noon)
			g.Expect(next.Phase).To(Equal(v1alpha1.PhaseSuspended))
			g.Expect(unheldStatus(s, next, noon)).To(Equal(next), "a second computation changes nothing")
			s.Spec.Suspend = false
			next = unheldStatus(s, next, noon)
			g.Expect(next.Phase).To(Equal(tt.phase))
			g.Expect(status.Reason(next)).To(Equal(tt.reason))
			g.Expect(unheldStatus(s, next, noon)).To(Equal(next), "a second computation changes nothing")
		})
	}
}

func TestSupersede(t *testing.T) {
	t.Parallel()
	before := writtenStatus(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Epoch: 5})
	after := func(phase v1alpha1.Phase, reason string, epoch int64) v1alpha1.WhatsAppSessionStatus {
		return writtenStatus(phase, reason, v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Epoch: epoch})
	}
	for _, tt := range []struct {
		name string
		next v1alpha1.WhatsAppSessionStatus
		want int64
	}{
		{name: "nothing new", next: after(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, 5), want: 5},
		{name: "something new", next: after(v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleted, 5), want: noon.Unix()},
		{name: "something new, and the epoch was raised in the same patch", next: after(v1alpha1.PhasePending, v1alpha1.ReasonPlaced, 9), want: 9},
		{name: "waiting for placement, which lasts only a moment", next: after(v1alpha1.PhasePending, v1alpha1.ReasonWaitingForPlacement, 5), want: 5},
	} {
		s := &v1alpha1.WhatsAppSession{Status: before}
		NewWithT(t).Expect(supersede(s, tt.next, noon).Epoch).To(Equal(tt.want), tt.name)
	}
}

func TestDecideEnding(t *testing.T) {
	t.Parallel()
	linked := &Record{JID: "34600111222:3@s.whatsapp.net", PhoneNumber: "+34600111222"}
	unlinked := &Record{}
	tests := []struct {
		name    string
		held    bool
		policy  v1alpha1.DeletionPolicy
		record  *Record
		after   time.Duration
		reason  string // empty: the deletion does not end yet
		release Release
		wait    time.Duration
		jid     string // status.jid
		// terminating is the reason that the status has; namespaceEnds: the namespace is being deleted.
		terminating   string
		namespaceEnds bool
	}{
		{
			name: "no proxy's Secret, and the namespace is being deleted, so it cannot be created", record: linked, namespaceEnds: true, terminating: v1alpha1.ReasonProxySecretMissing,
			reason: v1alpha1.ReasonLogoutUnconfirmed, release: ReleaseOrphan,
		},
		{name: "no proxy's Secret, and the holder still holds the session", held: true, record: linked, namespaceEnds: true, terminating: v1alpha1.ReasonProxySecretForbidden},
		{name: "no proxy's Secret, and it may still be created", record: linked, terminating: v1alpha1.ReasonProxySecretMissing, wait: 5 * time.Minute},
		{name: "the namespace is being deleted, and the logout continues", record: linked, namespaceEnds: true, terminating: v1alpha1.ReasonDeleting, wait: 5 * time.Minute},
		{name: "linked and held: the holder logs out", held: true, record: linked, wait: 5 * time.Minute},
		{name: "linked and held, and the deadline is over", held: true, record: linked, after: time.Hour},
		{name: "Retain and held", held: true, policy: v1alpha1.DeletionRetain, record: linked, wait: 5 * time.Minute},
		{name: "not linked and held: the holder deletes the record", held: true, record: unlinked, wait: 5 * time.Minute},
		{name: "not linked and held, and the deadline is over: it ends only when the holder releases it or is dead", held: true, record: unlinked, after: time.Hour},
		{name: "logged out, and the holder has not released it yet", held: true, wait: 5 * time.Minute},
		{name: "logged out, and placement has cleared the dead holder", after: 6 * time.Minute, reason: v1alpha1.ReasonDeleted},
		{name: "logged out", reason: v1alpha1.ReasonDeleted},
		{name: "its record is lost, and its device may still be linked", jid: "34600111222:3@s.whatsapp.net", reason: v1alpha1.ReasonLogoutUnconfirmed},
		{name: "its record was deleted by a process that came no further", jid: "34600111222:3@s.whatsapp.net", terminating: v1alpha1.ReasonDeleted, reason: v1alpha1.ReasonDeleted},
		{name: "not linked", record: unlinked, reason: v1alpha1.ReasonDeleted, release: ReleaseForget},
		{name: "not linked, Retain: a device that can be restored is kept", policy: v1alpha1.DeletionRetain, record: unlinked, reason: v1alpha1.ReasonDeleted, release: ReleaseRetain},
		{name: "Retain", policy: v1alpha1.DeletionRetain, record: linked, reason: v1alpha1.ReasonDeleted, release: ReleaseRetain},
		{name: "linked: a worker must log out", record: linked, after: time.Minute, wait: 4 * time.Minute},
		{name: "linked, and no worker did", record: linked, after: 5 * time.Minute, reason: v1alpha1.ReasonLogoutUnconfirmed, release: ReleaseOrphan},
		{name: "linked, and an earlier leader has decided", record: linked, terminating: v1alpha1.ReasonLogoutUnconfirmed, reason: v1alpha1.ReasonLogoutUnconfirmed, release: ReleaseOrphan},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &metav1.Time{Time: noon}}}
			s.Spec.DeletionPolicy = tt.policy
			if tt.held {
				s.Status.HeldBy = "worker-a"
			}
			s.Status.JID = tt.jid
			if tt.terminating != "" {
				s.Status = status.Summarize(s.Status, status.Facts{Phase: v1alpha1.PhaseTerminating, Reason: tt.terminating}, noon)
			}
			e, wait := decideEnding(s, tt.record, deletion{deadline: session.DeletionDeadline(s, noon), noProxy: tt.namespaceEnds && lacksProxySecret(s)}, noon.Add(tt.after))
			g.Expect(wait).To(Equal(tt.wait))
			if tt.reason == "" {
				g.Expect(e).To(BeNil())
				return
			}
			g.Expect(e.reason).To(Equal(tt.reason))
			g.Expect(e.release).To(Equal(tt.release))
			g.Expect(e.message).NotTo(Or(BeEmpty(), ContainSubstring("  ")), "also without a phone number")
		})
	}
}

func TestWantsWorker(t *testing.T) {
	t.Parallel()
	linked := v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Installation: installation, JID: "34600111222:3@s.whatsapp.net"}
	for _, tt := range []struct {
		name          string
		spec          v1alpha1.WhatsAppSessionSpec
		status        v1alpha1.WhatsAppSessionStatus
		deleted       *metav1.Time
		namespaceEnds bool
		want          bool
	}{
		{name: "a session that has its id", status: v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Installation: installation}, want: true},
		{name: "a session without its id"},
		{name: "a session of another installation", status: v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Installation: "cluster-1/other/main"}},
		{name: "suspended", spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, status: linked},
		{name: "deleted", status: linked, deleted: &metav1.Time{Time: noon.Add(-time.Minute)}, want: true},
		{name: "deleted while suspended", spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, status: linked, deleted: &metav1.Time{Time: noon}, want: true},
		{name: "deleted without a device", status: v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Installation: installation}, deleted: &metav1.Time{Time: noon}},
		{name: "deleted with Retain", spec: v1alpha1.WhatsAppSessionSpec{DeletionPolicy: v1alpha1.DeletionRetain}, status: linked, deleted: &metav1.Time{Time: noon}},
		{name: "deleted by a clock that is ahead, seen now", status: linked, deleted: &metav1.Time{Time: noon.Add(12 * time.Hour)}, want: true},
		{
			name: "deleted without the proxy's Secret", deleted: &metav1.Time{Time: noon}, want: true,
			status: writtenStatus(v1alpha1.PhaseTerminating, v1alpha1.ReasonProxySecretMissing, linked),
		},
		{
			name: "deleted without the proxy's Secret, with its namespace", deleted: &metav1.Time{Time: noon}, namespaceEnds: true,
			status: writtenStatus(v1alpha1.PhaseTerminating, v1alpha1.ReasonProxySecretMissing, linked),
		},
		{
			name: "the end of its deletion is decided", deleted: &metav1.Time{Time: noon},
			status: writtenStatus(v1alpha1.PhaseTerminating, v1alpha1.ReasonLogoutUnconfirmed, linked),
		},
	} {
		s := &v1alpha1.WhatsAppSession{Spec: tt.spec, Status: tt.status}
		s.DeletionTimestamp = tt.deleted
		NewWithT(t).Expect(wantsWorker(s, installation, (&Deletions{}).of(s, tt.namespaceEnds, noon), noon)).To(Equal(tt.want), tt.name)
	}
	s := &v1alpha1.WhatsAppSession{Status: linked}
	s.DeletionTimestamp = &metav1.Time{Time: noon.Add(12 * time.Hour)}
	d := &Deletions{}
	d.see(s, false, noon)
	later := noon.Add(session.LogoutTimeout)
	NewWithT(t).Expect(wantsWorker(s, installation, d.of(s, false, later), later)).To(BeFalse(), "deleted by a clock that is ahead, seen five minutes ago")
}

func TestNextEpoch(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for _, tt := range []struct {
		name          string
		epoch, stored int64
		want          int64
	}{
		{name: "a new session", want: now.Unix()},
		{name: "two placements within a second", epoch: now.Unix(), want: now.Unix() + 1},
		{name: "an earlier clock was ahead", epoch: now.Unix() + 1000, want: now.Unix() + 1001},
		{name: "the store has a higher epoch", epoch: 5, stored: now.Unix() + 7, want: now.Unix() + 8},
		{name: "the maximum is not exceeded", epoch: v1alpha1.MaxEpoch, want: v1alpha1.MaxEpoch},
		{name: "no number overflows", epoch: math.MaxInt64, stored: math.MaxInt64, want: v1alpha1.MaxEpoch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			g.Expect(nextEpoch(v1alpha1.WhatsAppSessionStatus{Epoch: tt.epoch, StoredEpoch: tt.stored}, now)).To(Equal(tt.want))
		})
	}
}

func TestTheManagersItemsCarryTheMetadata(t *testing.T) {
	s := &v1alpha1.WhatsAppSession{Spec: v1alpha1.WhatsAppSessionSpec{Metadata: map[string]string{"tenant": "7"}}}
	NewWithT(t).Expect(statusItem(s).Metadata).To(BeEquivalentTo(`{"tenant":"7"}`))
}

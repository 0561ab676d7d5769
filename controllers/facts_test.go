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

// was is a status as its last writer left it.
func was(phase v1alpha1.Phase, reason string, s v1alpha1.WhatsAppSessionStatus) v1alpha1.WhatsAppSessionStatus {
	return status.Summarize(s, status.Facts{Generation: 1, Phase: phase, Reason: reason, Message: "as the holder said"}, noon)
}

// quarantined is the status of a session that is tried an hour from noon.
func quarantined(worker string) v1alpha1.WhatsAppSessionStatus {
	return v1alpha1.WhatsAppSessionStatus{
		Worker: worker, Failures: 8, FailureReason: "SocketClosed", RetryAfter: &metav1.Time{Time: noon.Add(time.Hour)},
	}
}

func TestUnheld(t *testing.T) {
	t.Parallel()
	onWorker := v1alpha1.WhatsAppSessionStatus{Worker: "worker-a"}
	nowhere := v1alpha1.WhatsAppSessionStatus{}
	tests := []struct {
		name   string
		spec   v1alpha1.WhatsAppSessionSpec
		gone   bool
		next   v1alpha1.WhatsAppSessionStatus
		why    unplaced
		phase  v1alpha1.Phase
		reason string
		placed string
		// stalled: a phase that usually goes on by itself does not.
		stalled bool
	}{
		{name: "new", next: nowhere, phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement, placed: "False/WaitingForPlacement"},
		{name: "placed", next: onWorker, phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed"},
		{
			name: "unplaced", next: nowhere, why: unplaced{v1alpha1.ReasonNoCapacity, "full"},
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonNoCapacity, placed: "False/NoCapacity",
		},
		{
			name: "given up by its holder, and on its way", next: was(v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving, onWorker),
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonMoving, placed: "True/Placed",
		},
		{
			name: "given up by its holder, and nobody is to take it", next: was(v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving, nowhere),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement, placed: "False/WaitingForPlacement",
		},
		{
			name: "a proxy that was wrong: the next worker tries", next: was(v1alpha1.PhaseFailed, v1alpha1.ReasonProxySecretMissing, onWorker),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed",
		},
		{
			name: "logged out, and moved", next: was(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, onWorker),
			phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut, placed: "True/Placed",
		},
		{
			name: "logged out, and without a worker", next: was(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, nowhere),
			why:   unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut, placed: "False/NoWorkers",
		},
		{
			name: "suspended", spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, next: was(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, nowhere),
			why:   unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseSuspended, reason: v1alpha1.ReasonSuspended, placed: "False/Suspended",
		},
		{
			name: "resumed", next: was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, nowhere),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement, placed: "False/WaitingForPlacement",
		},
		{
			name: "resumed during a ban",
			next: was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", RetryAfter: &metav1.Time{Time: noon.Add(time.Hour)},
			}),
			phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned, placed: "True/Placed",
		},
		{
			name:  "resumed during a ban without an end",
			next:  was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{RetryReason: v1alpha1.ReasonBanned}),
			phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned, placed: "False/WaitingForPlacement",
		},
		{
			name:  "resumed, and was logged out",
			next:  was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{Worker: "worker-a", RetryReason: v1alpha1.ReasonLoggedOut}),
			phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut, placed: "True/Placed",
		},
		{
			name:  "resumed, and nobody had scanned",
			next:  was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{RetryReason: v1alpha1.ReasonPairingExpired}),
			phase: v1alpha1.PhasePairingExpired, reason: v1alpha1.ReasonPairingExpired, placed: "False/WaitingForPlacement",
		},
		{
			name: "resumed after the end of a ban",
			next: was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", RetryReason: v1alpha1.ReasonBanned, RetryAfter: &metav1.Time{Time: noon},
			}),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed",
		},
		{
			name: "resumed shortly after a login elsewhere: no ban",
			next: was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", Replacements: 1, RetryAfter: &metav1.Time{Time: noon.Add(time.Minute)},
			}),
			phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced, placed: "True/Placed",
		},
		{
			name: "resumed shortly after a pairing code was refused: no ban",
			next: was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
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
			name: "in quarantine, and without a worker", next: was(v1alpha1.PhaseDisconnected, v1alpha1.ReasonMoving, quarantined("")),
			why:   unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined, placed: "False/NoWorkers", stalled: true,
		},
		{
			name: "resumed during a quarantine", next: was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, quarantined("worker-a")),
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined, placed: "True/Placed", stalled: true,
		},
		{
			name: "resumed after a quarantine",
			next: was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{
				Worker: "worker-a", Failures: 8, FailureReason: "SocketClosed", RetryAfter: &metav1.Time{Time: noon},
			}),
			phase: v1alpha1.PhasePending, reason: v1alpha1.ReasonPlaced, placed: "True/Placed",
		},
		{
			name: "deleted while suspended", spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, gone: true, next: onWorker,
			phase: v1alpha1.PhaseTerminating, reason: v1alpha1.ReasonDeleting, placed: "True/Placed",
		},
		{
			name: "deleted, and no worker is there to log out", gone: true, next: nowhere, why: unplaced{v1alpha1.ReasonNoWorkers, "none"},
			phase: v1alpha1.PhaseTerminating, reason: v1alpha1.ReasonDeleting, placed: "False/NoWorkers",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			s := &v1alpha1.WhatsAppSession{Spec: tt.spec, Status: tt.next}
			if tt.gone {
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
			g.Expect(again).To(Equal(got), "the next look changes nothing")
		})
	}
}

// A suspension overwrites the phase, and what it said must come back.
func TestARestOutlastsASuspension(t *testing.T) {
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
			before: was(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut,
		},
		{
			name:   "a wrong phone",
			before: was(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonWrongPhone, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonWrongPhone,
		},
		{
			name:   "nobody scanned",
			before: was(v1alpha1.PhasePairingExpired, v1alpha1.ReasonPairingExpired, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhasePairingExpired, reason: v1alpha1.ReasonPairingExpired,
		},
		{
			name:   "banned without an end",
			before: was(v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name:   "banned",
			before: was(v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, v1alpha1.WhatsAppSessionStatus{RetryAfter: soon}),
			phase:  v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name:   "replaced, and its holder died: once more",
			before: was(v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, v1alpha1.WhatsAppSessionStatus{Replacements: 1, RetryAfter: soon}),
			phase:  v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement,
		},
		{
			name:   "replaced twice, and its holder died: once more",
			before: was(v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, v1alpha1.WhatsAppSessionStatus{Replacements: 2}),
			phase:  v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement,
		},
		{
			name:   "connected",
			before: was(v1alpha1.PhaseDisconnected, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{}),
			phase:  v1alpha1.PhasePending, reason: v1alpha1.ReasonWaitingForPlacement,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			s := &v1alpha1.WhatsAppSession{Spec: v1alpha1.WhatsAppSessionSpec{Suspend: true}, Status: tt.before}
			next := unheldStatus(s, tt.before, noon)
			g.Expect(next.Phase).To(Equal(v1alpha1.PhaseSuspended))
			g.Expect(unheldStatus(s, next, noon)).To(Equal(next), "the next look changes nothing")
			s.Spec.Suspend = false
			next = unheldStatus(s, next, noon)
			g.Expect(next.Phase).To(Equal(tt.phase))
			g.Expect(status.Reason(next)).To(Equal(tt.reason))
			g.Expect(unheldStatus(s, next, noon)).To(Equal(next), "the next look changes nothing")
		})
	}
}

func TestSpeak(t *testing.T) {
	t.Parallel()
	before := was(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Epoch: 5})
	after := func(phase v1alpha1.Phase, reason string, epoch int64) v1alpha1.WhatsAppSessionStatus {
		return was(phase, reason, v1alpha1.WhatsAppSessionStatus{SessionID: "acme", Epoch: epoch})
	}
	for _, tt := range []struct {
		name string
		next v1alpha1.WhatsAppSessionStatus
		want int64
	}{
		{name: "nothing new", next: after(v1alpha1.PhaseSuspended, v1alpha1.ReasonSuspended, 5), want: 5},
		{name: "something new", next: after(v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleted, 5), want: noon.Unix()},
		{name: "something new, placed in the same patch", next: after(v1alpha1.PhasePending, v1alpha1.ReasonPlaced, 9), want: 9},
		{name: "what a placement overtakes in a moment", next: after(v1alpha1.PhasePending, v1alpha1.ReasonWaitingForPlacement, 5), want: 5},
	} {
		s := &v1alpha1.WhatsAppSession{Status: before}
		NewWithT(t).Expect(supersede(s, tt.next, noon).Epoch).To(Equal(tt.want), tt.name)
	}
}

func TestHowItEnds(t *testing.T) {
	t.Parallel()
	linked := &Record{JID: "34600111222:3@s.whatsapp.net", PhoneNumber: "+34600111222"}
	bare := &Record{}
	tests := []struct {
		name    string
		held    bool
		policy  v1alpha1.DeletionPolicy
		record  *Record
		after   time.Duration
		reason  string // empty: it does not end yet
		release Release
		wait    time.Duration
		// why is the reason for which it is not logged out yet; ends: its namespace is being deleted.
		why  string
		ends bool
	}{
		{
			name: "no proxy's Secret, and none will come: its namespace ends", record: linked, ends: true, why: v1alpha1.ReasonProxySecretMissing,
			reason: v1alpha1.ReasonLogoutUnconfirmed, release: ReleaseOrphan,
		},
		{name: "no proxy's Secret, but the holder has it still", held: true, record: linked, ends: true, why: v1alpha1.ReasonProxySecretForbidden},
		{name: "no proxy's Secret, but it may come", record: linked, why: v1alpha1.ReasonProxySecretMissing, wait: 5 * time.Minute},
		{name: "its namespace ends, and the logout goes on", record: linked, ends: true, why: v1alpha1.ReasonDeleting, wait: 5 * time.Minute},
		{name: "linked and held: the holder logs out", held: true, record: linked, wait: 5 * time.Minute},
		{name: "linked and held, however late", held: true, record: linked, after: time.Hour},
		{name: "Retain and held", held: true, policy: v1alpha1.DeletionRetain, record: linked, wait: 5 * time.Minute},
		{name: "not linked and held: the holder deletes the record", held: true, record: bare, wait: 5 * time.Minute},
		{name: "not linked and held, however late: only its holder's release or death ends this", held: true, record: bare, after: time.Hour},
		{name: "logged out, and its holder about to let go", held: true, wait: 5 * time.Minute},
		{name: "logged out, and its holder died of it, which placement has written", after: 6 * time.Minute, reason: v1alpha1.ReasonDeleted},
		{name: "logged out", reason: v1alpha1.ReasonDeleted},
		{name: "not linked", record: bare, reason: v1alpha1.ReasonDeleted, release: ReleaseForget},
		{name: "not linked, Retain: what may be restored is kept", policy: v1alpha1.DeletionRetain, record: bare, reason: v1alpha1.ReasonDeleted, release: ReleaseRetain},
		{name: "Retain", policy: v1alpha1.DeletionRetain, record: linked, reason: v1alpha1.ReasonDeleted, release: ReleaseRetain},
		{name: "linked: a worker is to log out", record: linked, after: time.Minute, wait: 4 * time.Minute},
		{name: "linked, and no worker did", record: linked, after: 5 * time.Minute, reason: v1alpha1.ReasonLogoutUnconfirmed, release: ReleaseOrphan},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &metav1.Time{Time: noon}}}
			s.Spec.DeletionPolicy = tt.policy
			if tt.held {
				s.Status.HeldBy = "worker-a"
			}
			if tt.why != "" {
				s.Status = status.Summarize(s.Status, status.Facts{Phase: v1alpha1.PhaseTerminating, Reason: tt.why}, noon)
			}
			e, wait := decideEnding(s, tt.record, deletion{deadline: session.DeletionDeadline(s, noon), hopeless: tt.ends && lacksSecret(s)}, noon.Add(tt.after))
			g.Expect(wait).To(Equal(tt.wait))
			if tt.reason == "" {
				g.Expect(e).To(BeNil())
				return
			}
			g.Expect(e.reason).To(Equal(tt.reason))
			g.Expect(e.release).To(Equal(tt.release))
			g.Expect(e.message).NotTo(BeEmpty())
		})
	}
}

func TestNextEpoch(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for _, tt := range []struct {
		name          string
		epoch, stored int64
		want          int64
	}{
		{name: "a new session", want: now.Unix()},
		{name: "a second placement within a second", epoch: now.Unix(), want: now.Unix() + 1},
		{name: "a clock that was ahead", epoch: now.Unix() + 1000, want: now.Unix() + 1001},
		{name: "the store knows a higher one", epoch: 5, stored: now.Unix() + 7, want: now.Unix() + 8},
		{name: "the maximum is not exceeded", epoch: v1alpha1.MaxEpoch, want: v1alpha1.MaxEpoch},
		{name: "nor does a number overflow", epoch: math.MaxInt64, stored: math.MaxInt64, want: v1alpha1.MaxEpoch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			g.Expect(nextEpoch(v1alpha1.WhatsAppSessionStatus{Epoch: tt.epoch, StoredEpoch: tt.stored}, now)).To(Equal(tt.want))
		})
	}
}

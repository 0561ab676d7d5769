package status_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	kstatus "sigs.k8s.io/cli-utils/pkg/kstatus/status"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 999, time.UTC)

// conditions formats the conditions of a status for a table: "Ready=True/Connected".
func conditions(s v1alpha1.WhatsAppSessionStatus) []string {
	var out []string
	for _, c := range s.Conditions {
		out = append(out, c.Type+"="+string(c.Status)+"/"+c.Reason)
	}
	return out
}

// computeKstatus returns how kubectl wait, Argo CD and Flux read a session with this status.
func computeKstatus(t *testing.T, s v1alpha1.WhatsAppSessionStatus, generation int64, deleted bool) kstatus.Status {
	t.Helper()
	g := NewWithT(t)
	obj := &v1alpha1.WhatsAppSession{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "WhatsAppSession"},
		ObjectMeta: metav1.ObjectMeta{Name: "acme", Namespace: "a", Generation: generation},
		Status:     s,
	}
	if deleted {
		obj.DeletionTimestamp = &metav1.Time{Time: noon}
	}
	raw, err := runtime.DefaultUnstructuredConverter.ToUnstructured(obj)
	g.Expect(err).NotTo(HaveOccurred())
	result, err := kstatus.Compute(&unstructured.Unstructured{Object: raw})
	g.Expect(err).NotTo(HaveOccurred())
	return result.Status
}

func TestSummarize(t *testing.T) {
	const worker = "worker-a"
	paired := v1alpha1.WhatsAppSessionStatus{Worker: worker, JID: "34600111222:3@s.whatsapp.net", PhoneNumber: "+34600111222"}
	unpaired := v1alpha1.WhatsAppSessionStatus{Worker: worker}
	tests := []struct {
		name    string
		status  v1alpha1.WhatsAppSessionStatus
		facts   status.Facts
		deleted bool
		want    []string
		kstatus kstatus.Status
		laravel delivery.Status
		urgent  bool
	}{
		{
			name:  "Pending, the manager has not decided yet",
			facts: status.Facts{Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonWaitingForPlacement},
			want: []string{
				"Ready=False/WaitingForPlacement", "Placed=False/WaitingForPlacement", "Paired=False/NotPaired",
				"Connected=False/WaitingForPlacement", "Reconciling=True/WaitingForPlacement", "Stalled=False/Progressing",
			},
			kstatus: kstatus.InProgressStatus, laravel: delivery.Pending,
		},
		{
			name:  "Pending, no worker has room",
			facts: status.Facts{Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonNoCapacity, NotPlaced: v1alpha1.ReasonNoCapacity},
			want: []string{
				"Ready=False/NoCapacity", "Placed=False/NoCapacity", "Paired=False/NotPaired",
				"Connected=False/NoCapacity", "Reconciling=True/NoCapacity", "Stalled=False/Progressing",
			},
			kstatus: kstatus.InProgressStatus, laravel: delivery.Pending,
		},
		{
			name:   "Pairing",
			status: unpaired,
			facts:  status.Facts{Phase: v1alpha1.PhasePairing, Reason: v1alpha1.ReasonWaitingForScan},
			want: []string{
				"Ready=False/WaitingForScan", "Placed=True/Placed", "Paired=False/WaitingForScan",
				"Connected=False/WaitingForScan", "Reconciling=True/WaitingForScan", "Stalled=False/Progressing",
			},
			kstatus: kstatus.InProgressStatus, laravel: delivery.Pending,
		},
		{
			name:   "Connecting",
			status: paired,
			facts:  status.Facts{Phase: v1alpha1.PhaseConnecting, Reason: v1alpha1.ReasonConnecting},
			want: []string{
				"Ready=False/Connecting", "Placed=True/Placed", "Paired=True/Paired",
				"Connected=False/Connecting", "Reconciling=True/Connecting", "Stalled=False/Progressing",
			},
			kstatus: kstatus.InProgressStatus, laravel: delivery.Pending,
		},
		{
			name:   "Connected",
			status: paired,
			facts:  status.Facts{Phase: v1alpha1.PhaseConnected, Reason: v1alpha1.ReasonConnected},
			want: []string{
				"Ready=True/Connected", "Placed=True/Placed", "Paired=True/Paired",
				"Connected=True/Connected", "Reconciling=False/Succeeded", "Stalled=False/Succeeded",
			},
			kstatus: kstatus.CurrentStatus, laravel: delivery.Active, urgent: true,
		},
		{
			name:   "Disconnected",
			status: paired,
			facts:  status.Facts{Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonReconnecting},
			want: []string{
				"Ready=False/Reconnecting", "Placed=True/Placed", "Paired=True/Paired",
				"Connected=False/Reconnecting", "Reconciling=True/Reconnecting", "Stalled=False/Progressing",
			},
			kstatus: kstatus.InProgressStatus, laravel: delivery.Pending, urgent: true,
		},
		{
			name:   "Disconnected, in quarantine",
			status: paired,
			facts:  status.Facts{Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonQuarantined, Stalled: true},
			want: []string{
				"Ready=False/Quarantined", "Placed=True/Placed", "Paired=True/Paired",
				"Connected=False/Quarantined", "Reconciling=False/Quarantined", "Stalled=True/Quarantined",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "Suspended",
			status: v1alpha1.WhatsAppSessionStatus{JID: paired.JID, PhoneNumber: paired.PhoneNumber},
			facts:  status.Facts{Phase: v1alpha1.PhaseSuspended, Reason: v1alpha1.ReasonSuspended},
			want: []string{
				"Placed=False/Suspended", "Paired=True/Paired",
				"Connected=False/Suspended", "Reconciling=False/Succeeded", "Stalled=False/Succeeded",
			},
			kstatus: kstatus.CurrentStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "PairingExpired",
			status: unpaired,
			facts:  status.Facts{Phase: v1alpha1.PhasePairingExpired, Reason: v1alpha1.ReasonPairingExpired},
			want: []string{
				"Ready=False/PairingExpired", "Placed=True/Placed", "Paired=False/PairingExpired",
				"Connected=False/PairingExpired", "Reconciling=False/PairingExpired", "Stalled=True/PairingExpired",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "LoggedOut",
			status: unpaired,
			facts:  status.Facts{Phase: v1alpha1.PhaseLoggedOut, Reason: v1alpha1.ReasonLoggedOut},
			want: []string{
				"Ready=False/LoggedOut", "Placed=True/Placed", "Paired=False/LoggedOut",
				"Connected=False/LoggedOut", "Reconciling=False/LoggedOut", "Stalled=True/LoggedOut",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "Banned",
			status: paired,
			facts:  status.Facts{Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned},
			want: []string{
				"Ready=False/Banned", "Placed=True/Placed", "Paired=True/Paired",
				"Connected=False/Banned", "Reconciling=False/Banned", "Stalled=True/Banned",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "Outdated",
			status: paired,
			facts:  status.Facts{Phase: v1alpha1.PhaseOutdated, Reason: v1alpha1.ReasonOutdated},
			want: []string{
				"Ready=False/Outdated", "Placed=True/Placed", "Paired=True/Paired",
				"Connected=False/Outdated", "Reconciling=False/Outdated", "Stalled=True/Outdated",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "Replaced",
			status: paired,
			facts:  status.Facts{Phase: v1alpha1.PhaseReplaced, Reason: v1alpha1.ReasonReplaced},
			want: []string{
				"Ready=False/Replaced", "Placed=True/Placed", "Paired=True/Paired",
				"Connected=False/Replaced", "Reconciling=False/Replaced", "Stalled=True/Replaced",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "LoggedOut, and its worker is gone",
			status: v1alpha1.WhatsAppSessionStatus{},
			facts: status.Facts{
				Phase: v1alpha1.PhaseLoggedOut, Reason: v1alpha1.ReasonLoggedOut,
				NotPlaced: v1alpha1.ReasonNoWorkers, NotPlacedMessage: "no worker is running",
			},
			want: []string{
				"Ready=False/LoggedOut", "Placed=False/NoWorkers", "Paired=False/LoggedOut",
				"Connected=False/LoggedOut", "Reconciling=False/LoggedOut", "Stalled=True/LoggedOut",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:   "Failed",
			status: unpaired,
			facts:  status.Facts{Phase: v1alpha1.PhaseFailed, Reason: v1alpha1.ReasonProxySecretMissing},
			want: []string{
				"Ready=False/ProxySecretMissing", "Placed=True/Placed", "Paired=False/NotPaired",
				"Connected=False/ProxySecretMissing", "Reconciling=False/ProxySecretMissing", "Stalled=True/ProxySecretMissing",
			},
			kstatus: kstatus.FailedStatus, laravel: delivery.Inactive, urgent: true,
		},
		{
			name:    "Terminating",
			status:  v1alpha1.WhatsAppSessionStatus{JID: paired.JID, PhoneNumber: paired.PhoneNumber},
			facts:   status.Facts{Phase: v1alpha1.PhaseTerminating, Reason: v1alpha1.ReasonDeleting},
			deleted: true,
			want: []string{
				"Ready=False/Deleting", "Placed=False/Deleting", "Paired=True/Paired",
				"Connected=False/Deleting", "Reconciling=True/Deleting", "Stalled=False/Progressing",
			},
			kstatus: kstatus.TerminatingStatus, laravel: delivery.Inactive, urgent: true,
		},
	}
	seen := map[v1alpha1.Phase]bool{}
	for _, tt := range tests {
		seen[tt.facts.Phase] = true
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			tt.facts.Generation, tt.facts.Message = 3, "because"
			got := status.Summarize(tt.status, tt.facts, noon)
			g.Expect(conditions(got)).To(ConsistOf(tt.want))
			g.Expect(got.Phase).To(Equal(tt.facts.Phase))
			g.Expect(got.ObservedGeneration).To(BeEquivalentTo(3))
			for _, c := range got.Conditions {
				g.Expect(c.ObservedGeneration).To(BeEquivalentTo(3), c.Type)
				g.Expect(c.LastTransitionTime.Time).To(Equal(noon.Truncate(time.Second)), c.Type)
			}
			g.Expect(computeKstatus(t, got, 3, tt.deleted)).To(Equal(tt.kstatus))
			if !tt.deleted {
				g.Expect(computeKstatus(t, got, 4, false)).To(Equal(kstatus.InProgressStatus), "a newer spec is not taken into account yet")
			}
			update := status.Update(got, delivery.Numbers{Epoch: 1, Seq: 2}, noon)
			g.Expect(update.Status).To(Equal(tt.laravel))
			g.Expect(update.Priority == delivery.High).To(Equal(tt.urgent))
			g.Expect(update.Reason).To(Equal(tt.facts.Reason))

			later := status.Summarize(got, tt.facts, noon.Add(time.Hour))
			g.Expect(later).To(Equal(got), "the same facts an hour later change nothing")
		})
	}
	for _, phase := range phases {
		if !seen[phase] {
			t.Errorf("phase %s has no row", phase)
		}
	}
}

// phases has all phases of the API.
var phases = []v1alpha1.Phase{
	v1alpha1.PhasePending, v1alpha1.PhasePairing, v1alpha1.PhaseConnecting, v1alpha1.PhaseConnected, v1alpha1.PhaseDisconnected,
	v1alpha1.PhaseSuspended, v1alpha1.PhasePairingExpired, v1alpha1.PhaseLoggedOut, v1alpha1.PhaseBanned, v1alpha1.PhaseOutdated,
	v1alpha1.PhaseReplaced, v1alpha1.PhaseFailed, v1alpha1.PhaseTerminating,
}

func TestANewSessionIsInProgress(t *testing.T) {
	g := NewWithT(t)
	// The CRD's default for status, before the first write.
	g.Expect(computeKstatus(t, v1alpha1.WhatsAppSessionStatus{ObservedGeneration: -1}, 1, false)).To(Equal(kstatus.InProgressStatus))
}

func TestReadyReturnsAfterASuspension(t *testing.T) {
	g := NewWithT(t)
	suspended := status.Summarize(v1alpha1.WhatsAppSessionStatus{}, status.Facts{Phase: v1alpha1.PhaseSuspended, Reason: v1alpha1.ReasonSuspended}, noon)
	g.Expect(meta.FindStatusCondition(suspended.Conditions, v1alpha1.ConditionReady)).To(BeNil())
	resumed := status.Summarize(suspended, status.Facts{Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonWaitingForPlacement}, noon)
	g.Expect(meta.IsStatusConditionFalse(resumed.Conditions, v1alpha1.ConditionReady)).To(BeTrue())
}

func TestSummarizeDoesNotChangeItsArgument(t *testing.T) {
	g := NewWithT(t)
	before := status.Summarize(v1alpha1.WhatsAppSessionStatus{}, status.Facts{Phase: v1alpha1.PhasePending, Reason: "A"}, noon)
	want := *before.DeepCopy()
	status.Summarize(before, status.Facts{Phase: v1alpha1.PhaseConnected, Reason: "B"}, noon.Add(time.Hour))
	g.Expect(before).To(Equal(want))
}

func TestForeignIDShowsNothingOfTheOtherSession(t *testing.T) {
	g := NewWithT(t)
	full := v1alpha1.WhatsAppSessionStatus{
		SessionID: "acme", Installation: "c/n/r", Worker: "w", Epoch: 5, HeldBy: "w", JID: "1@s.whatsapp.net",
		PhoneNumber: "+1", PushName: "Eve", QR: &v1alpha1.QRStatus{Code: "2@x"},
	}
	got := status.ForeignID(full, 2, noon)
	g.Expect(conditions(got)).To(ContainElements("Stalled=True/SessionIDTaken", "Placed=False/SessionIDTaken", "Ready=False/SessionIDTaken"))
	g.Expect(computeKstatus(t, got, 2, false)).To(Equal(kstatus.FailedStatus))
	got.Conditions = nil
	g.Expect(got).To(Equal(v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhasePending, ObservedGeneration: 2, Installation: "c/n/r"}))
}

func TestTheJSONOfAnUpdate(t *testing.T) {
	g := NewWithT(t)
	s := status.Summarize(v1alpha1.WhatsAppSessionStatus{SessionID: "acme", JID: "34600111222:3@s.whatsapp.net", PhoneNumber: "+34600111222"},
		status.Facts{Phase: v1alpha1.PhaseConnected, Reason: v1alpha1.ReasonConnected}, noon)
	raw, err := json.Marshal(status.Update(s, delivery.Numbers{Epoch: 7, Seq: 1<<32 + 4}, noon))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(raw).To(MatchJSON(`{"session_id":"acme","status":"active","phase":"Connected","reason":"Connected","priority":"high",
		"jid":"34600111222:3@s.whatsapp.net","phone_number":"+34600111222","occurred_at":"2026-05-04T12:00:00.000Z","epoch":7,"seq":4294967300}`))
}

func TestClean(t *testing.T) {
	tests := []struct {
		name, in string
		limit    int
		want     string
	}{
		{"ordinary text", "Zoë 日本", 100, "Zoë 日本"},
		{"terminal escapes", "a\x1b[31mred\x07", 100, "a[31mred"},
		{"line breaks and tabs become spaces", "a\nb\tc", 100, "a b c"},
		{"invisible characters that change the direction of text", "a\u202eb\u200bc", 100, "abc"},
		{"bytes that are not UTF-8", "a\xff\xfeb", 100, "ab"},
		{"cut at the limit", "abcdef", 3, "abc"},
		{"cut before a rune that would not fit", "añb", 2, "a"},
		{"empty text", "", 3, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			NewWithT(t).Expect(status.Clean(tt.in, tt.limit)).To(Equal(tt.want))
		})
	}
}

func TestAMessageIsBounded(t *testing.T) {
	g := NewWithT(t)
	got := status.Summarize(v1alpha1.WhatsAppSessionStatus{}, status.Facts{
		Phase: v1alpha1.PhaseFailed, Reason: "X", Message: strings.Repeat("é", 600),
	}, noon)
	g.Expect(len(meta.FindStatusCondition(got.Conditions, v1alpha1.ConditionReady).Message)).To(Equal(512))
}

package demo

import (
	"fmt"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

func session(name string, phase v1alpha1.Phase, worker, reason, message string) v1alpha1.WhatsAppSession {
	s := v1alpha1.WhatsAppSession{}
	s.Name = name
	s.Status = v1alpha1.WhatsAppSessionStatus{Phase: phase, Worker: worker, Epoch: 5}
	if reason != "" {
		status := metav1.ConditionFalse
		if phase == v1alpha1.PhaseConnected {
			status = metav1.ConditionTrue
			s.Status.PhoneNumber = "+15550000001"
		}
		meta.SetStatusCondition(&s.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionReady, Status: status, Reason: reason, Message: message})
	}
	return s
}

func laravelHas(states ...delivery.StatusItem) laravelState {
	l := laravelState{Status: map[string]delivery.StatusItem{}, HasMessage: map[string]bool{}}
	for _, s := range states {
		l.Status[s.SessionID], l.HasMessage[s.SessionID] = s, true
	}
	return l
}

func (l laravelState) withoutMessages(session string) laravelState {
	l.HasMessage[session] = false
	return l
}

func TestNobodyWritesInARealDemo(t *testing.T) {
	v := view{
		sessions: []v1alpha1.WhatsAppSession{session("demo-1", v1alpha1.PhaseConnected, "worker-1", "Connected", "")},
		laravel:  laravelHas(state("demo-1", delivery.Active, 5, 1)).withoutMessages("demo-1"), total: 1,
	}
	NewWithT(t).Expect(missing(v)).To(BeEmpty())
}

func TestTable(t *testing.T) {
	v := view{
		total: 3, events: 9,
		sessions: []v1alpha1.WhatsAppSession{
			session("demo-1", v1alpha1.PhaseConnected, "worker-2", "Connected", ""),
			session("demo-2", v1alpha1.PhasePairing, "worker-1", "WaitingForScan", ""),
			session("demo-3", "", "", "", ""),
		},
		laravel: laravelHas(state("demo-1", delivery.Active, 5, 2), state("demo-2", delivery.Pending, 5, 1)),
	}
	v.laravel.Requests = 3
	NewWithT(t).Expect(table(v)).To(Equal([]string{
		"SESSION   PHASE       PHONE          WORKER     READY   LARAVEL",
		"demo-1    Connected   +15550000001   worker-2   True    active",
		"demo-2    Pairing     -              worker-1   False   pending",
		"demo-3    -           -              -          -       -",
		"",
		"3 of 3 sessions: 1 -, 1 Connected, 1 Pairing   |   events in: 9 → requests to Laravel: 3 (66 % saved)",
	}))
}

func TestALongTableShowsUnconnectedSessionsFirst(t *testing.T) {
	g := NewWithT(t)
	v := view{total: 100, laravel: laravelHas()}
	for i := range 100 {
		phase := v1alpha1.PhaseConnected
		if i == 99 {
			phase = v1alpha1.PhaseFailed
		}
		v.sessions = append(v.sessions, session(fmt.Sprintf("demo-%03d", i), phase, "worker-1", "x", ""))
	}
	lines := table(v)
	g.Expect(lines).To(HaveLen(1 + maxRows + 1 + 2))
	g.Expect(lines[1]).To(HavePrefix("demo-099   Failed"))
	g.Expect(lines[2]).To(HavePrefix("demo-000   Connected"))
	g.Expect(lines[maxRows+1]).To(Equal("… and 88 more"))
}

func TestMissing(t *testing.T) {
	connected := session("demo-1", v1alpha1.PhaseConnected, "worker-1", "Connected", "")
	for _, row := range []struct {
		name     string
		sessions []v1alpha1.WhatsAppSession
		laravel  laravelState
		want     []string
	}{
		{"nothing is missing", []v1alpha1.WhatsAppSession{connected}, laravelHas(state("demo-1", delivery.Active, 5, 1)), nil},
		{"a session that does not exist yet", nil, laravelHas(), []string{"0 of 1 sessions exist in the API server"}},
		{
			"a session without a status",
			[]v1alpha1.WhatsAppSession{session("demo-1", "", "", "", "")}, laravelHas(),
			[]string{"demo-1 is -"},
		},
		{
			"a session that is not connected, with its reason",
			[]v1alpha1.WhatsAppSession{session("demo-1", v1alpha1.PhasePending, "", "NoWorkers", "no worker of the pool default is alive")}, laravelHas(),
			[]string{"demo-1 is Pending (NoWorkers: no worker of the pool default is alive)"},
		},
		{
			"a session that Laravel does not know",
			[]v1alpha1.WhatsAppSession{connected}, laravelHas(),
			[]string{"demo-1 is Connected, but Laravel has no status of it"},
		},
		{
			"Laravel has an older status",
			[]v1alpha1.WhatsAppSession{connected}, laravelHas(delivery.StatusItem{SessionID: "demo-1", Status: delivery.Pending, Phase: "Connecting", Numbers: delivery.Numbers{Epoch: 5}}),
			[]string{"demo-1 is Connected under epoch 5, but Laravel's last status is pending (Connecting) of epoch 5"},
		},
		{
			"Laravel has the status of an older epoch",
			[]v1alpha1.WhatsAppSession{connected}, laravelHas(state("demo-1", delivery.Active, 4, 1)),
			[]string{"demo-1 is Connected under epoch 5, but Laravel's last status is active (Connected) of epoch 4"},
		},
		{
			"a message has not arrived",
			[]v1alpha1.WhatsAppSession{connected}, laravelHas(state("demo-1", delivery.Active, 5, 1)).withoutMessages("demo-1"),
			[]string{"demo-1 is Connected, but Laravel has no message of it"},
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			NewWithT(t).Expect(missing(view{sessions: row.sessions, laravel: row.laravel, total: 1, messages: true})).To(Equal(row.want))
		})
	}
}

func TestSummary(t *testing.T) {
	g := NewWithT(t)
	v := view{total: 3, events: 9}
	v.laravel.Requests, v.laravel.Messages = 4, 3
	g.Expect(summary(v, 12345*time.Millisecond)).To(Equal(
		"Done in 12.3s: 3 sessions are Connected and Laravel has the last state of each. Events in: 12 → requests to Laravel: 4 (66 % saved)."))
	v.messages = true
	g.Expect(summary(v, 12345*time.Millisecond)).To(ContainSubstring("has the last state of each and 3 messages. "))
}

func TestCodesAreDrawn(t *testing.T) {
	g := NewWithT(t)
	s := showing("demo-1", "2@"+strings.Repeat("x", 230))
	s.Status.QR.Attempt = 2
	lines := codeLines(&s)
	g.Expect(lines[0]).To(HavePrefix("QR code 2 of demo-1, valid until "))
	g.Expect(len(lines)).To(BeNumerically(">", 20))
}

func TestValidateReturnsAllFaults(t *testing.T) {
	g := NewWithT(t)
	o := Defaults()
	o.Assets = "/assets"
	g.Expect(o.Validate()).To(Succeed())

	o = Options{Sessions: 0, WhatsApp: "other", ScanAfter: -1}
	err := o.Validate()
	for _, flag := range []string{"--sessions", "--whatsapp", "--timeout", "--scan-after", "KUBEBUILDER_ASSETS"} {
		g.Expect(err).To(MatchError(ContainSubstring(flag)))
	}
}

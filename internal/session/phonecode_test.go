package session

import (
	"fmt"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const pairingCode = "ABCD-1234"

// byCode makes a session pair with a code that is typed on the phone.
func byCode(s *v1alpha1.WhatsAppSession) {
	s.Spec.Pairing.Method, s.Spec.Pairing.PhoneNumber = v1alpha1.PairingPhoneCode, phone
}

// machineWithCode returns a machine that shows a code until a minute after noon.
func machineWithCode() *Machine {
	m := takenMachine(session(byCode), Device{Starts: 1})
	m.onDialed(false, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventPairingCode, Code: pairingCode, Until: noon.Add(time.Minute)}, noon)
	return m
}

func TestPairingByPhoneCode(t *testing.T) {
	g := NewWithT(t)
	m := takenMachine(session(byCode), Device{Starts: 1})
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhasePairing))
	g.Expect(m.reason).To(Equal(v1alpha1.ReasonWaitingForCode))
	g.Expect(m.want.PairingDeadline).To(BeNil(), "the deadline is set with the first code")
	rule, op := m.decide(noon)
	g.Expect(op).To(Equal(OpDial), rule)

	m = machineWithCode()
	g.Expect(m.want.PairingCode).To(Equal(pairingCode))
	g.Expect(m.reason).To(Equal(v1alpha1.ReasonWaitingForCode))
	g.Expect(m.message).To(ContainSubstring("status.pairingCode"))
	g.Expect(m.message).To(ContainSubstring(phone))
	g.Expect(m.want.PairingDeadline.Time).To(BeTemporally("==", noon.Add(defaultPairingTimeout)))
	g.Expect(m.want.QR).To(BeNil())
	a, changed := m.publication(noon)
	g.Expect(changed).To(BeTrue())
	g.Expect(a.QR.PairingCode).To(Equal(pairingCode))
	g.Expect(a.QR.QR).To(BeEmpty())
	g.Expect(a.QR.ExpiresAt.Time).To(BeTemporally("==", noon.Add(time.Minute)))
	g.Expect(a.Status.Status).To(Equal(delivery.Pending))
	g.Expect(a.Status.Phase).To(BeEquivalentTo(v1alpha1.PhasePairing))
	g.Expect(a.Status.Reason).To(Equal(v1alpha1.ReasonWaitingForCode))
	g.Expect(fmt.Sprintf("%+v %+v %q", a.Status, m.events, m.message)).NotTo(ContainSubstring(pairingCode), "the code is not in the status, an Event or a message")
	status, needed := m.wantedStatus(noon)
	g.Expect(needed).To(BeTrue())
	g.Expect(status.PairingCode).To(Equal(pairingCode))
	g.Expect(fmt.Sprint(status.Conditions)).NotTo(ContainSubstring(pairingCode))

	// The code expires. The next connection has another one.
	now := noon.Add(time.Minute)
	g.Expect(m.wakeTimes(noon)).To(ContainElement(BeTemporally("==", now)))
	m.tick(now)
	g.Expect(m.want.PairingCode).To(BeEmpty(), "a code is removed when it expires")
	_, op = m.decide(now)
	g.Expect(op).To(Equal(OpClose))
	m.socket = socketNone
	_, op = m.decide(now)
	g.Expect(op).To(Equal(OpDial))
	m.onDialed(false, m.dialSpec(), now)
	m.onEvent(Event{Type: EventPairingCode, Code: "WXYZ-9876", Until: now.Add(time.Minute)}, now)
	g.Expect(m.want.PairingCode).To(Equal("WXYZ-9876"))
	g.Expect(m.want.PairingDeadline.Time).To(BeTemporally("==", noon.Add(defaultPairingTimeout)), "a new connection does not extend the deadline")
	a, changed = m.publication(now)
	g.Expect(changed).To(BeTrue())
	g.Expect(a.NewQR).To(BeTrue())
	g.Expect(a.QR.PairingCode).To(Equal("WXYZ-9876"))
	g.Expect(a.QR.Attempt).To(BeEquivalentTo(2))

	m.onEvent(Event{Type: EventPairSuccess, JID: jid, PhoneNumber: phone}, now)
	g.Expect(m.want.PairingCode).To(BeEmpty(), "a used code is removed")
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhaseConnecting))
	m.onEvent(Event{Type: EventPairingCode, Code: pairingCode, Until: now.Add(time.Minute)}, now)
	g.Expect(m.want.PairingCode).To(BeEmpty(), "a code that comes after the pairing is ignored")
}

// The code is removed however the pairing ends.
func TestAPairingCodeIsRemoved(t *testing.T) {
	deadline := noon.Add(defaultPairingTimeout)
	for _, tt := range []struct {
		name  string
		act   func(m *Machine)
		phase v1alpha1.Phase
	}{
		{"nobody types it", func(m *Machine) { m.tick(deadline) }, v1alpha1.PhasePairingExpired},
		{"the connection is lost", func(m *Machine) {
			m.onEvent(Event{Type: EventDisconnected, Message: "the socket closed"}, noon)
		}, v1alpha1.PhasePairing},
		{"the pairing is refused", func(m *Machine) {
			m.onEvent(Event{Type: EventPairError, Message: "a bad signature"}, noon)
			m.onEvent(Event{Type: EventDisconnected, Message: "the pairing was refused"}, noon)
		}, v1alpha1.PhasePairing},
		{"suspended", func(m *Machine) {
			m.observe(session(byCode, heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Spec.Suspend, s.Status.Worker, s.Status.Epoch = true, "", 101 }), noon)
			m.decide(noon)
		}, v1alpha1.PhaseDisconnected},
		{"deleted", func(m *Machine) {
			m.observe(session(byCode, heldByMe, deleted), noon)
			m.decide(noon)
		}, v1alpha1.PhaseTerminating},
		{"restarted", func(m *Machine) {
			m.observe(session(byCode, heldByMe, func(s *v1alpha1.WhatsAppSession) {
				s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "again"}
			}), noon)
		}, v1alpha1.PhaseConnecting},
		{"claimed by another process", func(m *Machine) {
			m.observe(session(byCode, func(s *v1alpha1.WhatsAppSession) { s.Status.PairingCode = pairingCode }), noon)
		}, v1alpha1.PhasePairing},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := machineWithCode()
			tt.act(m)
			g.Expect(m.want.PairingCode).To(BeEmpty())
			g.Expect(m.want.Phase).To(Equal(tt.phase))
		})
	}
}

func TestWhatsAppRefusesAPairingCode(t *testing.T) {
	g := NewWithT(t)
	m := takenMachine(session(byCode), Device{Starts: 1})
	m.onDialed(false, m.dialSpec(), noon)
	refusal := Event{Type: EventCodeRefused, Reason: "PairingCodeRefused429", Message: "too many requests"}
	m.onEvent(refusal, noon)
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhasePairing))
	g.Expect(m.reason).To(Equal(v1alpha1.ReasonPairingCodeRefused))
	g.Expect(m.message).To(Equal(refusal.Message))
	g.Expect(m.retryAt).To(BeTemporally("==", noon.Add(codeRefusedPause)), "asking again soon makes it worse")
	g.Expect(m.events).To(ContainElement(RecordedEvent{corev1.EventTypeWarning, v1alpha1.ReasonPairingCodeRefused, refusal.Message}))
	a, _ := m.publication(noon)
	g.Expect(a.Status.Status).To(Equal(delivery.Pending))
	_, op := m.decide(noon)
	g.Expect(op).To(Equal(OpClose))
	m.socket = socketNone

	t.Run("another number is tried at once", func(t *testing.T) {
		g := NewWithT(t)
		other := *m
		other.observe(session(byCode, heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34600111333" }), noon)
		rule, _ := other.decide(noon)
		g.Expect(rule).To(Equal("a new pairing method needs a new connection"))
		rule, op := other.decide(noon)
		g.Expect(op).To(Equal(OpDial), rule)
		g.Expect(other.dialSpec().PairPhone).To(Equal("+34600111333"))
	})
	t.Run("without another number the pairing expires", func(t *testing.T) {
		g := NewWithT(t)
		deadline := noon.Add(defaultPairingTimeout)
		g.Expect(m.wakeTimes(noon)).To(ContainElement(BeTemporally("==", deadline)))
		m.tick(deadline)
		g.Expect(m.want.Phase).To(Equal(v1alpha1.PhasePairingExpired))
		g.Expect(m.message).To(ContainSubstring("(the last attempt: too many requests)"))
		_, op := m.decide(deadline)
		g.Expect(op).To(Equal(OpNone))
	})
}

// A long reason does not cut off what a person can do.
func TestTheMessageOfAnExpiredPairing(t *testing.T) {
	g := NewWithT(t)
	p := newMachineTest(session(), func() float64 { return 0.5 })
	p.goOn(Device{Starts: 1})
	p.Step(Dialed{}, p.now)
	p.Step(Event{Type: EventQR, Codes: []string{"one"}}, p.now)
	p.Step(Event{Type: EventPairError, Message: strings.Repeat("why ", 128)}, p.now)
	p.now = p.now.Add(defaultPairingTimeout)
	p.next()
	p.write()
	g.Expect(p.Object().Status.Phase).To(Equal(v1alpha1.PhasePairingExpired))
	g.Expect(readyMessage(p.Object().Status)).To(HaveSuffix("to offer codes again"))
}

// WhatsApp limits the codes of a number, so the next holder must keep the pause.
func TestTheNextHolderKnowsOfARefusedCode(t *testing.T) {
	for way, on := range map[string][]func(*v1alpha1.WhatsAppSessionStatus){
		"moved": nil, "its worker died": {workerLost}, "no worker could take it for long": {noWorker}, "suspended and resumed": {suspendedAndResumed},
	} {
		t.Run(way, func(t *testing.T) {
			g := NewWithT(t)
			m := takenMachine(session(byCode), Device{Starts: 1})
			m.onDialed(false, m.dialSpec(), noon)
			m.onEvent(Event{Type: EventCodeRefused, Message: "too many requests"}, noon)
			a := &attempts{Machine: m, now: noon}
			next := a.moveTo(t, Device{Starts: 2}, on...)
			g.Expect(next.want.Phase).To(Equal(v1alpha1.PhasePairing), "not banned")
			g.Expect(next.reason).To(Equal(v1alpha1.ReasonPairingCodeRefused))
			next.wait(codeRefusedPause - time.Second)
			g.Expect(next.dialsNow()).To(BeFalse())
			next.wait(time.Second)
			g.Expect(next.dialsNow()).To(BeTrue())
			next.onDialed(false, next.dialSpec(), next.now)
			next.emit(Event{Type: EventPairingCode, Code: pairingCode, Until: next.now.Add(time.Minute)})
			g.Expect(next.want.RetryReason).To(BeEmpty())
			g.Expect(next.want.RetryAfter).To(BeNil())
		})
	}
	t.Run("a QR code is not affected", func(t *testing.T) {
		g := NewWithT(t)
		m := takenMachine(session(func(s *v1alpha1.WhatsAppSession) {
			s.Status.Phase, s.Status.RetryReason, s.Status.RetryAfter = v1alpha1.PhaseDisconnected, v1alpha1.ReasonPairingCodeRefused, at(noon.Add(time.Minute))
		}), Device{Starts: 2})
		_, op := m.decide(noon)
		g.Expect(op).To(Equal(OpDial))
	})
}

func TestAnotherWayOfPairing(t *testing.T) {
	const rule = "a new pairing method needs a new connection"
	qr := func() *Machine {
		m := takenMachine(session(), Device{Starts: 1})
		m.onDialed(false, m.dialSpec(), noon)
		m.onEvent(Event{Type: EventQR, Codes: []string{"one", "two"}}, noon)
		return m
	}
	for _, tt := range []struct {
		name   string
		before func() *Machine
		change func(*v1alpha1.WhatsAppSession)
		rule   string
		reason string
	}{
		{"from a QR code to a code to type", qr, byCode, rule, v1alpha1.ReasonWaitingForCode},
		{"from a code to type to a QR code", machineWithCode, func(*v1alpha1.WhatsAppSession) {}, rule, v1alpha1.ReasonWaitingForScan},
		{"a code for another phone", machineWithCode, func(s *v1alpha1.WhatsAppSession) {
			byCode(s)
			s.Spec.Pairing.PhoneNumber = "+34600111333"
		}, rule, v1alpha1.ReasonWaitingForCode},
		{"another allowed phone for a QR code", qr, func(s *v1alpha1.WhatsAppSession) {
			s.Spec.Pairing.PhoneNumber = "+34600111333"
		}, "", v1alpha1.ReasonWaitingForScan},
		{"another timeout", machineWithCode, func(s *v1alpha1.WhatsAppSession) {
			byCode(s)
			s.Spec.Pairing.Timeout = metav1.Duration{Duration: time.Hour}
		}, "", v1alpha1.ReasonWaitingForCode},
		{"linked already", func() *Machine { return connectedMachine() }, byCode, "", v1alpha1.ReasonConnected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := tt.before()
			m.observe(session(heldByMe, tt.change), noon)
			name, op := m.decide(noon)
			g.Expect(name).To(Equal(tt.rule))
			g.Expect(m.reason).To(Equal(tt.reason))
			if tt.rule == "" {
				return
			}
			g.Expect(op).To(Equal(OpClose))
			g.Expect(m.want.QR).To(BeNil())
			g.Expect(m.want.PairingCode).To(BeEmpty())
			g.Expect(m.want.PairingDeadline.Time).To(BeTemporally("==", noon.Add(defaultPairingTimeout)))
			m.socket = socketNone
			name, op = m.decide(noon)
			g.Expect(op).To(Equal(OpDial), name)
		})
	}
}

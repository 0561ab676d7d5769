package session

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const (
	me      = "worker-a"
	process = "p1"
	phone   = "+34600111222"
	jid     = "34600111222:7@s.whatsapp.net"
)

// session returns a session that is placed on the worker me with epoch 100.
func session(change ...func(*v1alpha1.WhatsAppSession)) *v1alpha1.WhatsAppSession {
	s := &v1alpha1.WhatsAppSession{
		ObjectMeta: metav1.ObjectMeta{Name: "shop", Namespace: "tenant", UID: "uid-1", ResourceVersion: "1", Generation: 1},
		Status:     v1alpha1.WhatsAppSessionStatus{SessionID: "shop", Worker: me, Epoch: 100},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

// heldByMe makes this process the holder of a session.
func heldByMe(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy, s.Status.HolderStart = me, process }

// deleted marks a session as deleted.
func deleted(s *v1alpha1.WhatsAppSession) {
	stamp := metav1.NewTime(noon)
	s.DeletionTimestamp = &stamp
}

func newMachine(worker, process string, random func() float64) *Machine {
	return New(Config{Worker: worker, Process: process, Random: random})
}

// takenMachine returns a machine that holds the session and has taken its keys.
func takenMachine(obj *v1alpha1.WhatsAppSession, device Device) *Machine {
	m := newMachine(me, process, func() float64 { return 0.5 })
	m.observe(session(func(s *v1alpha1.WhatsAppSession) { *s = *obj; s.Status.HeldBy, s.Status.HolderStart = "", "" }), noon)
	m.hold, m.token = true, true
	heldByMe(obj)
	m.observe(obj, noon)
	m.onTaken(device, noon)
	m.Step(Settled{}, noon) // see trial_test.go
	return m
}

// connectedMachine returns a machine whose session is logged in.
func connectedMachine(change ...func(*v1alpha1.WhatsAppSession)) *Machine {
	m := takenMachine(session(change...), Device{Starts: 1, JID: jid, PhoneNumber: phone})
	m.onDialed(true, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, noon)
	m.events = nil
	return m
}

// awaiting returns a machine whose connection this process has ended for that reason.
func awaiting(reason string) *Machine {
	m := connectedMachine()
	m.onEvent(Event{Type: EventDisconnected, Reason: reason, Ours: true}, noon)
	m.Step(Closed{}, noon)
	return m
}

// A claim that waits to be written must not be written after a change of plan.
func TestASessionThatMustNotBeHeldIsNotClaimed(t *testing.T) {
	for name, change := range map[string]func(*Machine){
		"shutting down": func(m *Machine) { m.draining = true },
		"evicting":      func(m *Machine) { m.draining, m.evicted = true, true },
		"refused by the store": func(m *Machine) {
			m.want.StoredEpoch = m.obj.Status.Epoch
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			m := newMachine(me, process, nil)
			m.observe(session(), noon)
			m.token, m.hold = true, true
			_, needed := m.wantedStatus(noon)
			g.Expect(needed).To(BeTrue(), "the claim")
			change(m)
			_, needed = m.wantedStatus(noon)
			g.Expect(needed).To(BeFalse())
		})
	}
}

func TestRules(t *testing.T) {
	tests := []struct {
		name    string
		machine func() *Machine
		rule    string
		op      Operation
	}{
		{
			name:    "placed here and held by nobody: a login token first",
			machine: func() *Machine { m := newMachine(me, process, nil); m.observe(session(), noon); return m },
			rule:    "a login token comes before the claim", op: OpToken,
		},
		{
			name: "with a login token: the claim is written",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(), noon)
				m.token = true
				return m
			},
			rule: "the claim is written and confirmed before the keys are taken",
		},
		{
			name: "another worker still holds the session",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy = "worker-b" }), noon)
				m.token = true
				return m
			},
			rule: "the claim waits until the old holder has released the session",
		},
		{
			name: "while another worker still holds the session, a login token is requested",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy = "worker-b" }), noon)
				return m
			},
			rule: "a login token comes before the claim", op: OpToken,
		},
		{
			name: "a session without its id is not opened",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status.SessionID = "" }), noon)
				return m
			},
			rule: "nothing is done for a session that is not placed here",
		},
		{
			name: "held by a former process: claimed again before the keys are taken",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy, s.Status.HolderStart = me, "p0" }), noon)
				return m
			},
			rule: "a login token comes before the claim", op: OpToken,
		},
		{
			name: "held by a former process and moved: released",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(func(s *v1alpha1.WhatsAppSession) {
					s.Status.HeldBy, s.Status.HolderStart, s.Status.Worker = me, "p0", "worker-b"
				}), noon)
				return m
			},
			rule: "a session that must not be held is released",
		},
		{
			name: "held: the keys are taken",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(heldByMe), noon)
				m.hold = true
				return m
			},
			rule: "the keys are taken under the epoch of the claim", op: OpTake,
		},
		{
			name:    "taken: it connects",
			machine: func() *Machine { return takenMachine(session(), Device{Starts: 1, JID: jid, PhoneNumber: phone}) },
			rule:    "a session without a socket connects when its time has come", op: OpDial,
		},
		{
			name: "moved while connected: the socket is closed first",
			machine: func() *Machine {
				m := connectedMachine()
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 }), noon)
				return m
			},
			rule: "a session that is not held here, or must be released, has no socket", op: OpClose,
		},
		{
			name: "placed again on this worker with a higher epoch: the socket is closed first",
			machine: func() *Machine {
				m := connectedMachine()
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 }), noon)
				return m
			},
			rule: "a session that is not held here, or must be released, has no socket", op: OpClose,
		},
		{
			name: "heldBy was cleared: the socket is closed at once",
			machine: func() *Machine {
				m := connectedMachine()
				m.observe(session(), noon)
				return m
			},
			rule: "a session that is not held here, or must be released, has no socket", op: OpClose,
		},
		{
			name:    "the resource no longer exists: the socket is closed",
			machine: func() *Machine { m := connectedMachine(); m.Step(Vanished{}, noon); return m },
			rule:    "a session that is not held here, or must be released, has no socket", op: OpClose,
		},
		{
			name: "moved, and the socket is closed: pending publications come before the release",
			machine: func() *Machine {
				m := connectedMachine()
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 }), noon)
				m.socket = socketNone
				return m
			},
			rule: "pending publications come before the release, for a second at most",
		},
		{
			name: "another proxy",
			machine: func() *Machine {
				m := connectedMachine()
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) {
					s.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: "out"}}
				}), noon)
				return m
			},
			rule: "a new proxy needs a new connection", op: OpClose,
		},
		{
			name: "deleted while connected: logged out",
			machine: func() *Machine {
				m := connectedMachine()
				m.observe(session(heldByMe, deleted), noon)
				return m
			},
			rule: "a deleted session and a wrong phone are logged out", op: OpLogout,
		},
		{
			name: "deleted with Retain: the device is not logged out, and the manager removes the placement",
			machine: func() *Machine {
				m := connectedMachine()
				m.observe(session(heldByMe, deleted, func(s *v1alpha1.WhatsAppSession) {
					s.Spec.DeletionPolicy = v1alpha1.DeletionRetain
				}), noon)
				return m
			},
		},
		{
			name:    "deleted before a phone was linked: the keys are deleted",
			machine: func() *Machine { return takenMachine(session(deleted), Device{Starts: 1}) },
			rule:    "the keys of a deleted session without a device are deleted", op: OpForget,
		},
		{
			name: "deleted while it offers codes: the socket is closed",
			machine: func() *Machine {
				m := takenMachine(session(), Device{Starts: 1})
				m.onDialed(false, m.dialSpec(), noon)
				m.onEvent(Event{Type: EventQR, Codes: []string{"one"}}, noon)
				m.observe(session(heldByMe, deleted), noon)
				return m
			},
			rule: "a deleted session offers no codes; its keys are taken again, because a phone may have scanned one", op: OpClose,
		},
		{
			name: "deleted after a wrong phone was logged out: the right phone is still logged out",
			machine: func() *Machine {
				m := connectedMachine()
				m.onLoggedOut(noon)
				m.socket = socketNone
				m.onDialed(false, m.dialSpec(), noon)
				m.onEvent(Event{Type: EventPairSuccess, JID: jid, PhoneNumber: phone}, noon)
				m.onEvent(Event{Type: EventDisconnected}, noon)
				m.socket = socketNone
				m.observe(session(heldByMe, deleted), noon)
				return m
			},
			rule: "a session without a socket connects when its time has come", op: OpDial,
		},
		{
			name: "the deletion of the keys failed: tried again later",
			machine: func() *Machine {
				m := takenMachine(session(deleted), Device{Starts: 1})
				m.onFailed(v1alpha1.ReasonStoreUnavailable, "no answer", noon)
				return m
			},
		},
		{
			name: "held, but this process had decided to release it: claimed again",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.observe(session(heldByMe), noon)
				return m
			},
			rule: "a login token comes before the claim", op: OpToken,
		},
		{
			name: "deleted, and the logout has failed for five minutes: released",
			machine: func() *Machine {
				stamp := metav1.NewTime(noon.Add(-LogoutTimeout))
				m := takenMachine(session(func(s *v1alpha1.WhatsAppSession) { s.DeletionTimestamp = &stamp }), Device{Starts: 1, JID: jid, PhoneNumber: phone})
				m.deletionSeen = stamp.Time
				return m
			},
			rule: "pending publications come before the release, for a second at most",
		},
		{
			name: "another number than the spec allows: WhatsApp is asked",
			machine: func() *Machine {
				return connectedMachine(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34999999999" })
			},
			rule: "WhatsApp is asked whether a number that differs belongs to the linked account", op: OpVerify,
		},
		{
			name: "another account than the spec allows: logged out",
			machine: func() *Machine {
				m := connectedMachine(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34999999999" })
				m.verifying = m.identity()
				m.Step(Verified{}, noon)
				return m
			},
			rule: "a deleted session and a wrong phone are logged out", op: OpLogout,
		},
		{
			name: "the same account with another number: nothing",
			machine: func() *Machine {
				m := connectedMachine(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34999999999" })
				m.verifying = m.identity()
				m.Step(Verified{SameAccount: true}, noon)
				return m
			},
		},
		{
			name: "an answer about an earlier number of the spec does not count",
			machine: func() *Machine {
				m := connectedMachine(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34999999999" })
				m.verifying = m.identity()
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = "+34888888888" }), noon)
				m.Step(Verified{}, noon)
				return m
			},
			rule: "WhatsApp is asked whether a number that differs belongs to the linked account", op: OpVerify,
		},
		{
			name:    "draining: the session stays until a successor is named",
			machine: func() *Machine { m := connectedMachine(); m.draining = true; return m },
		},
		{
			name: "draining, and the successor is named: the socket is closed first",
			machine: func() *Machine {
				m := connectedMachine()
				m.draining = true
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) {
					s.Status.HolderStart, s.Status.Worker, s.Status.Epoch = process, "worker-b", 101
				}), noon)
				return m
			},
			rule: "a session that is not held here, or must be released, has no socket", op: OpClose,
		},
		{
			name: "draining, and no worker can take it: the socket is closed first",
			machine: func() *Machine {
				m := connectedMachine()
				m.draining = true
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) {
					s.Status.HolderStart, s.Status.Worker, s.Status.Epoch = process, "", 101
				}), noon)
				return m
			},
			rule: "a session that is not held here, or must be released, has no socket", op: OpClose,
		},
		{
			name:    "evicted: the socket is closed first",
			machine: func() *Machine { m := connectedMachine(); m.draining, m.evicted = true, true; return m },
			rule:    "a session that is not held here, or must be released, has no socket", op: OpClose,
		},
		{
			name: "draining: nothing is claimed any more",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.draining = true
				m.observe(session(), noon)
				return m
			},
			rule: "nothing is done for a session that is not placed here",
		},
		{
			name: "draining, held by a former process: released",
			machine: func() *Machine {
				m := newMachine(me, process, nil)
				m.draining = true
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Status.HolderStart = "former" }), noon)
				return m
			},
			rule: "a session that must not be held is released",
		},
		{
			name:    "a message was refused: no connection until messages can be stored",
			machine: func() *Machine { return awaiting(EndInboxUnavailable) },
			rule:    "a session whose messages cannot be stored is not connected until they can be",
		},
		{
			name:    "the keys could not be read: no connection until the database takes a write",
			machine: func() *Machine { return awaiting(EndStoreFailed) },
			rule:    "a session whose messages cannot be stored is not connected until they can be",
		},
		{
			name: "the database takes a write after the keys could not be read: connected",
			machine: func() *Machine {
				m := awaiting(EndStoreFailed)
				m.Step(InboxReady{EndInboxUnavailable}, noon)
				m.retryAt = noon
				return m
			},
			rule: "a session without a socket connects when its time has come", op: OpDial,
		},
		{
			name:    "too many messages wait: no connection until there are fewer",
			machine: func() *Machine { return awaiting(EndBacklog) },
			rule:    "a session whose messages cannot be stored is not connected until they can be",
		},
		{
			name: "there is room again: connected",
			machine: func() *Machine {
				m := awaiting(EndBacklog)
				m.Step(InboxReady{EndBacklog}, noon)
				return m
			},
			rule: "a session without a socket connects when its time has come", op: OpDial,
		},
		{
			name: "too many messages wait, and the database takes a write: that is not what it waits for",
			machine: func() *Machine {
				m := awaiting(EndBacklog)
				m.Step(InboxReady{EndInboxUnavailable}, noon)
				return m
			},
			rule: "a session whose messages cannot be stored is not connected until they can be",
		},
		{
			name: "a person restarts a session that waits: connected",
			machine: func() *Machine {
				m := awaiting(EndBacklog)
				m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) {
					s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
				}), noon)
				return m
			},
			rule: "a session without a socket connects when its time has come", op: OpDial,
		},
		{
			name: "a deleted session does not wait to be logged out",
			machine: func() *Machine {
				m := awaiting(EndInboxUnavailable)
				m.observe(session(heldByMe, deleted), noon)
				return m
			},
			rule: "a session without a socket connects when its time has come", op: OpDial,
		},
		{
			name:    "connected and wanted: nothing",
			machine: func() *Machine { return connectedMachine() },
		},
		{
			name:    "an operation under way: nothing",
			machine: func() *Machine { m := connectedMachine(); m.Step(Vanished{}, noon); m.running = OpLogout; return m },
			rule:    "one operation at a time",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			rule, op := tt.machine().decide(noon)
			g.Expect(rule).To(Equal(tt.rule))
			g.Expect(op).To(Equal(tt.op))
		})
	}
}

func TestEndings(t *testing.T) {
	until := noon.Add(2 * time.Hour)
	tests := []struct {
		name     string
		event    Event
		before   func(*Machine)
		phase    v1alpha1.Phase
		reason   string
		retryAt  time.Time
		laravel  delivery.Status
		priority delivery.Priority
		recorded string // the reason of the Event
	}{
		{
			name:  "a lost connection is pending and urgent, and tried again after the backoff",
			event: Event{Type: EventDisconnected, Message: "the socket closed"},
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonReconnecting,
			retryAt: noon.Add(backoffFirst / 2), laravel: delivery.Pending, priority: delivery.High,
		},
		{
			name:   "the backoff doubles up to two minutes",
			event:  Event{Type: EventDisconnected, Message: "the socket closed"},
			before: func(m *Machine) { m.attempts = 30 },
			phase:  v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonReconnecting,
			retryAt: noon.Add(backoffMax / 2), laravel: delivery.Pending, priority: delivery.High,
		},
		{
			name:  "a refused message: pending and urgent",
			event: Event{Type: EventDisconnected, Reason: EndInboxUnavailable, Ours: true},
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonInboxUnavailable,
			retryAt: noon.Add(backoffFirst / 2), laravel: delivery.Pending, priority: delivery.High,
		},
		{
			name:  "too many messages wait: pending and urgent, and a person gets to know",
			event: Event{Type: EventDisconnected, Reason: EndBacklog, Ours: true},
			phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonBacklog,
			retryAt: noon, laravel: delivery.Pending, priority: delivery.High, recorded: v1alpha1.ReasonBacklog,
		},
		{
			name:  "a session that is logged out is not tried again",
			event: Event{Type: EventLoggedOut, Message: "unlinked on the phone"},
			phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut,
			laravel: delivery.Inactive, priority: delivery.High, recorded: v1alpha1.ReasonLoggedOut,
		},
		{
			name:  "a replaced session is tried once more, after five minutes",
			event: Event{Type: EventReplaced},
			phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced, retryAt: noon.Add(replacedPause),
			laravel: delivery.Inactive, priority: delivery.High, recorded: v1alpha1.ReasonReplaced,
		},
		{
			name:   "a session that is replaced a second time waits for a person",
			event:  Event{Type: EventReplaced},
			before: func(m *Machine) { m.want.Replacements = 1 },
			phase:  v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
			laravel: delivery.Inactive, priority: delivery.High, recorded: v1alpha1.ReasonReplaced,
		},
		{
			name:  "a banned session is not tried before the ban ends",
			event: Event{Type: EventBanned, Message: "sent too much", Until: until},
			phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned, retryAt: until.Add(banMargin),
			laravel: delivery.Inactive, priority: delivery.High, recorded: v1alpha1.ReasonBanned,
		},
		{
			name:  "an outdated session waits for a new image",
			event: Event{Type: EventOutdated},
			phase: v1alpha1.PhaseOutdated, reason: v1alpha1.ReasonOutdated,
			laravel: delivery.Inactive, priority: delivery.High, recorded: v1alpha1.ReasonOutdated,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := connectedMachine()
			_, _ = m.publication(noon)
			if tt.before != nil {
				tt.before(m)
			}
			m.onEvent(tt.event, noon)

			g.Expect(m.want.Phase).To(Equal(tt.phase))
			g.Expect(m.reason).To(Equal(tt.reason))
			g.Expect(m.retryAt).To(BeTemporally("==", tt.retryAt))
			g.Expect(m.socket).To(Equal(socketEnded))
			g.Expect(m.want.LastDisconnectedTime.Time).To(BeTemporally("==", noon))
			a, changed := m.publication(noon)
			g.Expect(changed).To(BeTrue())
			g.Expect(a.Status.Status).To(Equal(tt.laravel))
			g.Expect(a.Status.Priority).To(Equal(tt.priority))
			g.Expect(a.Status.Numbers).To(Equal(delivery.Numbers{Epoch: 100, Seq: delivery.FirstSeq(1) + 2}))
			var events []string
			for _, n := range m.events {
				events = append(events, n.Reason)
			}
			if tt.recorded == "" {
				g.Expect(events).To(BeEmpty())
			} else {
				g.Expect(events).To(Equal([]string{tt.recorded}))
			}
		})
	}
}

// A code that WhatsApp has replaced is shown for the rest of the time of the one before.
func TestReplacedCodes(t *testing.T) {
	g := NewWithT(t)
	m := takenMachine(session(), Device{Starts: 1})
	m.onDialed(false, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventQR, Codes: []string{"one", "two", "three"}}, noon)
	now := noon.Add(firstCode)
	m.tick(now)
	g.Expect(m.want.QR.Code).To(Equal("two"))
	published, _ := m.publication(now)
	g.Expect(published.QR.ReplacesInvalid).To(BeFalse())

	later := now.Add(time.Second)
	m.onEvent(Event{Type: EventCodesReplaced, Codes: []string{"uno", "dos", "tres"}}, later)
	g.Expect(m.want.QR.Code).To(Equal("dos"))
	g.Expect(m.want.QR.Attempt).To(BeEquivalentTo(3))
	g.Expect(m.want.QR.ExpiresAt.Time).To(BeTemporally("==", now.Add(laterCode)), "its time goes on")
	published, changed := m.publication(later)
	g.Expect(changed).To(BeTrue())
	g.Expect(published.QR.QR).To(Equal("dos"))
	g.Expect(published.QR.ReplacesInvalid).To(BeTrue(), "Laravel gets it at once")
	g.Expect(m.events).To(ContainElement(HaveField("Reason", v1alpha1.ReasonCodeReplaced)))

	m.tick(now.Add(laterCode))
	g.Expect(m.want.QR.Code).To(Equal("tres"))
	m.onEvent(Event{Type: EventCodesReplaced, Codes: nil}, now.Add(laterCode))
	g.Expect(m.want.QR.Code).To(Equal("tres"), "fewer than were shown")
	m.tick(now.Add(2 * laterCode))
	g.Expect(m.want.QR).To(BeNil())
	m.onEvent(Event{Type: EventCodesReplaced, Codes: []string{"1", "2", "3"}}, now.Add(2*laterCode))
	g.Expect(m.want.QR).To(BeNil(), "the time of the codes is over")
}

// The LID is that of the device in status.jid, and outlives what does not know it.
func TestLID(t *testing.T) {
	g := NewWithT(t)
	const lid = "123456789012345:3@lid"
	m := takenMachine(session(), Device{Starts: 1})
	m.onDialed(false, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventPairSuccess, JID: jid, LID: lid, PhoneNumber: phone}, noon)
	g.Expect(m.want.LID).To(Equal(lid))
	m.onTaken(Device{Starts: 2, JID: jid, PhoneNumber: phone}, noon)
	g.Expect(m.want.LID).To(Equal(lid), "the store does not say it")
	m.onDialed(true, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, noon)
	g.Expect(m.want.LID).To(Equal(lid))
	m.onTaken(Device{Starts: 3, JID: "another:1@s.whatsapp.net"}, noon)
	g.Expect(m.want.LID).To(BeEmpty(), "another device")
	m.onDialed(true, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventConnected, JID: jid, LID: lid, PhoneNumber: phone}, noon)
	m.onEvent(Event{Type: EventLoggedOut, Reason: EndLoggedOut, Message: "unlinked"}, noon)
	g.Expect(m.want.JID + m.want.LID).To(BeEmpty())
}

func TestPairing(t *testing.T) {
	g := NewWithT(t)
	m := takenMachine(session(), Device{Starts: 1})
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhasePairing))
	m.onDialed(false, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventQR, Codes: []string{"one", "two"}}, noon)

	g.Expect(m.want.QR.Code).To(Equal("one"))
	g.Expect(m.want.QR.Attempt).To(BeEquivalentTo(1))
	g.Expect(m.want.QR.ExpiresAt.Time).To(BeTemporally("==", noon.Add(firstCode)))
	g.Expect(m.want.PairingDeadline.Time).To(BeTemporally("==", noon.Add(defaultPairingTimeout)))
	a, changed := m.publication(noon)
	g.Expect(changed).To(BeTrue())
	g.Expect(a.QR.QR).To(Equal("one"))

	now := noon.Add(firstCode)
	g.Expect(m.wakeTimes(noon)).To(ContainElement(BeTemporally("==", now)))
	m.tick(now)
	g.Expect(m.want.QR.Code).To(Equal("two"))
	g.Expect(m.want.QR.ExpiresAt.Time).To(BeTemporally("==", now.Add(laterCode)))
	a, changed = m.publication(now)
	g.Expect(changed).To(BeTrue())
	g.Expect(a.QR.Attempt).To(BeEquivalentTo(2))

	now = now.Add(laterCode)
	m.tick(now)
	g.Expect(m.want.QR).To(BeNil(), "a code is removed when it expires")
	_, op := m.decide(now)
	g.Expect(op).To(Equal(OpClose), "the next connection has new codes")
	m.socket = socketNone
	_, op = m.decide(now)
	g.Expect(op).To(Equal(OpDial))

	m.onDialed(false, m.dialSpec(), now)
	m.onEvent(Event{Type: EventQR, Codes: []string{"three"}}, now)
	g.Expect(m.want.QR.Attempt).To(BeEquivalentTo(3))
	g.Expect(m.want.PairingDeadline.Time).To(BeTemporally("==", noon.Add(defaultPairingTimeout)), "a new connection does not extend the deadline")

	t.Run("nobody scans", func(t *testing.T) {
		g := NewWithT(t)
		late := *m
		deadline := noon.Add(defaultPairingTimeout)
		late.tick(deadline)
		g.Expect(late.want.Phase).To(Equal(v1alpha1.PhasePairingExpired))
		g.Expect(late.want.QR).To(BeNil())
		late.socket = socketNone
		_, op := late.decide(deadline)
		g.Expect(op).To(Equal(OpNone))
		late.obj = session(heldByMe, func(s *v1alpha1.WhatsAppSession) {
			s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "again"}
		})
		late.tick(deadline.Add(time.Second))
		g.Expect(late.want.ObservedRestartedAt).To(Equal("again"))
		_, op = late.decide(deadline.Add(time.Second))
		g.Expect(op).To(Equal(OpDial))
	})

	m.onEvent(Event{Type: EventPairSuccess, JID: jid, PhoneNumber: phone}, now)
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhaseConnecting))
	g.Expect(m.want.QR).To(BeNil(), "a used code is removed")

	t.Run("the 515 that ends the pairing is lost", func(t *testing.T) {
		g := NewWithT(t)
		silent := *m
		silent.tick(now.Add(pairedTimeout))
		g.Expect(silent.socket).To(Equal(socketEnded))
		silent.socket = socketNone
		_, op := silent.decide(now.Add(pairedTimeout))
		g.Expect(op).To(Equal(OpDial))
	})

	m.onEvent(Event{Type: EventDisconnected, Reason: "StreamError515"}, now)
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhaseConnecting), "the 515 is part of a pairing, not a failure")
	m.socket = socketNone
	_, op = m.decide(now)
	g.Expect(op).To(Equal(OpDial), "the device logs in at once")
}

// The library stores a device before WhatsApp links it, so a pairing may end between the two.
func TestADeviceThatWhatsAppHasNotLinked(t *testing.T) {
	unlinked := Event{Type: EventLoggedOut, Reason: EndLoggedOut, Message: "unlinked"}
	paired := func(m *Machine) *Machine {
		m.onDialed(false, m.dialSpec(), noon)
		m.onEvent(Event{Type: EventQR, Codes: []string{"one", "two"}}, noon)
		m.onEvent(Event{Type: EventPairSuccess, JID: jid, PhoneNumber: phone}, noon)
		m.onEvent(Event{Type: EventDisconnected, Reason: "StreamError515"}, noon)
		m.socket = socketNone
		return m
	}
	deadline := metav1.NewTime(noon.Add(defaultPairingTimeout))
	for _, tt := range []struct {
		name    string
		machine func() *Machine
		phase   v1alpha1.Phase
	}{
		{
			name:    "the answer to the scan was lost",
			machine: func() *Machine { return paired(takenMachine(session(), Device{Starts: 1})) },
			phase:   v1alpha1.PhasePairing,
		},
		{
			name: "the process ended before it had written the status",
			machine: func() *Machine {
				return takenMachine(session(func(s *v1alpha1.WhatsAppSession) {
					s.Status.Phase, s.Status.PairingDeadline = v1alpha1.PhasePairing, &deadline
				}), Device{Starts: 2, JID: jid, PhoneNumber: phone})
			},
			phase: v1alpha1.PhasePairing,
		},
		{
			name: "the process ended after it had written the status",
			machine: func() *Machine {
				first := paired(takenMachine(session(), Device{Starts: 1}))
				return takenMachine(session(func(s *v1alpha1.WhatsAppSession) { s.Status = *first.want.DeepCopy() }),
					Device{Starts: 2, JID: jid, PhoneNumber: phone})
			},
			phase: v1alpha1.PhasePairing,
		},
		{
			name: "the device had logged in before",
			machine: func() *Machine {
				m := paired(takenMachine(session(), Device{Starts: 1}))
				m.onDialed(true, m.dialSpec(), noon)
				m.onEvent(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, noon)
				m.onEvent(Event{Type: EventDisconnected, Ours: true}, noon)
				m.socket = socketNone
				return m
			},
			phase: v1alpha1.PhaseLoggedOut,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := tt.machine()
			m.events = nil
			m.onDialed(true, m.dialSpec(), noon)
			m.onEvent(unlinked, noon)
			m.socket = socketNone
			g.Expect(m.want.Phase).To(Equal(tt.phase))
			g.Expect(m.want.JID).To(BeEmpty())
			g.Expect(m.events).To(HaveLen(1))
			_, op := m.decide(noon.Add(backoffMax))
			if tt.phase == v1alpha1.PhaseLoggedOut {
				g.Expect(op).To(Equal(OpNone), "a person must act")
				return
			}
			g.Expect(op).To(Equal(OpDial), "the next code")
			g.Expect(m.events[0].Reason).To(Equal(v1alpha1.ReasonPairingFailed))
			g.Expect(m.want.PhoneNumber).To(BeEmpty())
			g.Expect(m.want.PairingDeadline.Time).To(BeTemporally("==", deadline.Time), "the time for pairing does not start again")
			m.tick(deadline.Time)
			g.Expect(m.want.Phase).To(Equal(v1alpha1.PhasePairingExpired))
		})
	}
}

func TestRestartCountsOnceAMinute(t *testing.T) {
	g := NewWithT(t)
	m := connectedMachine()
	ask := func(value string, now time.Time) {
		m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) {
			s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: value}
			s.Status.ObservedRestartedAt = m.want.ObservedRestartedAt
		}), now)
	}
	ask("1", noon)
	g.Expect(m.want.ObservedRestartedAt).To(Equal("1"))
	g.Expect(m.socket).To(Equal(socketEnded), "a connected session connects again")
	ask("2", noon.Add(time.Second))
	g.Expect(m.want.ObservedRestartedAt).To(Equal("1"))
	g.Expect(m.wakeTimes(noon)).To(ContainElement(BeTemporally("==", noon.Add(restartInterval))))
	m.tick(noon.Add(restartInterval))
	g.Expect(m.want.ObservedRestartedAt).To(Equal("2"))
}

func TestRestartDoesNotShortenABan(t *testing.T) {
	g := NewWithT(t)
	m := connectedMachine()
	m.onEvent(Event{Type: EventBanned, Until: noon.Add(time.Hour)}, noon)
	m.socket = socketNone
	m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "please"}
	}), noon)
	_, op := m.decide(noon)
	g.Expect(op).To(Equal(OpNone))
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhaseBanned))
	_, op = m.decide(noon.Add(time.Hour))
	g.Expect(op).To(Equal(OpNone), "the clock of another worker may be ahead")
	_, op = m.decide(noon.Add(time.Hour + banMargin))
	g.Expect(op).To(Equal(OpDial))
}

func TestTheNextHolderKnowsABan(t *testing.T) {
	g := NewWithT(t)
	until := metav1.NewTime(noon.Add(time.Hour))
	m := takenMachine(session(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Phase, s.Status.RetryAfter = v1alpha1.PhaseBanned, &until
	}), Device{Starts: 3, JID: jid, PhoneNumber: phone})
	_, op := m.decide(noon)
	g.Expect(op).To(Equal(OpNone), "no attempt during the ban")
	g.Expect(m.wakeTimes(noon)).To(ContainElement(BeTemporally("==", until.Time)))
}

func TestASessionWithALowEpochIsReleased(t *testing.T) {
	g := NewWithT(t)
	m := newMachine(me, process, nil)
	m.observe(session(heldByMe), noon)
	m.hold = true
	m.onEpochBehind(500, noon)
	for range 3 {
		_, _ = m.decide(noon)
	}
	status, needed := m.wantedStatus(noon)
	g.Expect(needed).To(BeTrue())
	g.Expect(status.HeldBy).To(BeEmpty())
	g.Expect(status.StoredEpoch).To(BeEquivalentTo(500))

	m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status = status }), noon)
	_, op := m.decide(noon)
	g.Expect(op).To(Equal(OpNone), "not tried again with the old epoch")
	m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status = status; s.Status.Epoch = 501 }), noon)
	_, op = m.decide(noon)
	g.Expect(op).To(Equal(OpToken))
}

func TestOnlyTheHolderWrites(t *testing.T) {
	tests := []struct {
		name   string
		obj    *v1alpha1.WhatsAppSession
		hold   bool
		writes bool
	}{
		{name: "not held, no claim", obj: session()},
		{name: "not held, a claim", obj: session(), hold: true, writes: true},
		{name: "a claim, but another holds it", obj: session(func(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy = "worker-b" }), hold: true},
		{name: "a claim, but it was placed elsewhere", obj: session(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker = "worker-b" }), hold: true},
		{name: "held", obj: session(heldByMe), hold: true, writes: true},
		{name: "held, moved away, to be released", obj: session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Status.Worker = "worker-b" }), writes: true},
		{name: "held, moved away, not released yet: the release has the same status", obj: session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Status.Worker = "worker-b" }), hold: true},
		{name: "held by a former process: the claim comes before any other write", obj: session(func(s *v1alpha1.WhatsAppSession) {
			s.Status.HeldBy, s.Status.HolderStart = me, "p0"
		})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := newMachine(me, process, nil)
			m.observe(tt.obj, noon)
			m.hold = tt.hold
			status, writes := m.wantedStatus(noon)
			g.Expect(writes).To(Equal(tt.writes))
			if writes {
				g.Expect(status.Worker).To(Equal(tt.obj.Status.Worker), "only the manager writes status.worker")
				g.Expect(status.Epoch).To(Equal(tt.obj.Status.Epoch), "only the manager writes status.epoch")
				g.Expect(status.HeldBy != "").To(Equal(tt.hold))
			}
		})
	}
}

func TestAConnectedSessionWritesNothing(t *testing.T) {
	g := NewWithT(t)
	m := connectedMachine()
	status, needed := m.wantedStatus(noon)
	g.Expect(needed).To(BeTrue())
	m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status = status }), noon)
	for _, later := range []time.Duration{time.Second, time.Minute, time.Hour} {
		m.tick(noon.Add(later))
		_, needed = m.wantedStatus(noon.Add(later))
		g.Expect(needed).To(BeFalse())
	}
}

func TestALogoutWithoutAnEvent(t *testing.T) {
	g := NewWithT(t)
	m := connectedMachine()
	m.drop()
	m.socket = socketNone
	m.onDialed(false, m.dialSpec(), noon) // the store has no device any more
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhaseLoggedOut))
	g.Expect(m.want.JID).To(BeEmpty())
	_, op := m.decide(noon)
	g.Expect(op).To(Equal(OpClose))
}

func TestTheNextHolderTriesAgainAfterASetupError(t *testing.T) {
	g := NewWithT(t)
	m := takenMachine(session(func(s *v1alpha1.WhatsAppSession) { s.Status.Phase = v1alpha1.PhaseFailed }), Device{Starts: 2, JID: jid, PhoneNumber: phone})
	_, op := m.decide(noon)
	g.Expect(op).To(Equal(OpDial), "the Secret may exist now")
	m.onSetupInvalid(v1alpha1.ReasonProxySecretMissing, "create it", noon)
	g.Expect(m.want.Phase).To(Equal(v1alpha1.PhaseFailed))
	g.Expect(m.retryAt).To(BeTemporally(">", noon))
}

func TestOnlyChangesAreDeliveredToLaravel(t *testing.T) {
	g := NewWithT(t)
	m := takenMachine(session(), Device{Starts: 1})
	m.onDialed(false, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventQR, Codes: []string{"one", "two"}}, noon)
	a, _ := m.publication(noon)
	g.Expect(a.NewStatus).To(BeTrue())
	g.Expect(a.NewQR).To(BeTrue())
	m.tick(noon.Add(firstCode))
	a, _ = m.publication(noon.Add(firstCode))
	g.Expect(a.NewStatus).To(BeFalse(), "a new code does not change the status")
	g.Expect(a.NewQR).To(BeTrue())
	g.Expect(a.Status.OccurredAt.Time).To(BeTemporally("==", noon))
	m.Step(PublishAgain{}, noon)
	a, changed := m.publication(noon.Add(firstCode + time.Second))
	g.Expect(changed).To(BeTrue())
	g.Expect(a.NewStatus && a.NewQR).To(BeTrue(), "Redis lost both")
	g.Expect(a.Status.OccurredAt.Time).To(BeTemporally("==", noon), "the status has not changed")
}

func TestItemsCarryTheMetadata(t *testing.T) {
	g := NewWithT(t)
	withMetadata := func(value string) func(*v1alpha1.WhatsAppSession) {
		return func(s *v1alpha1.WhatsAppSession) { s.Spec.Metadata = map[string]string{"tenant": value} }
	}
	m := takenMachine(session(withMetadata("7")), Device{Starts: 1})
	m.onDialed(false, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventQR, Codes: []string{"one"}}, noon)
	p, _ := m.publication(noon)
	g.Expect(p.Status.Metadata).To(BeEquivalentTo(`{"tenant":"7"}`))
	g.Expect(p.QR.Metadata).To(BeEquivalentTo(`{"tenant":"7"}`))
	m.observe(session(heldByMe, withMetadata("8")), noon)
	_, changed := m.publication(noon)
	g.Expect(changed).To(BeFalse(), "a change applies from the next item on")
	g.Expect(m.lastPublication().Status.Metadata).To(BeEquivalentTo(`{"tenant":"8"}`))
}

func TestASuspensionDoesNotCountForThePairingDeadline(t *testing.T) {
	g := NewWithT(t)
	m := takenMachine(session(), Device{Starts: 1})
	m.onDialed(false, m.dialSpec(), noon)
	m.onEvent(Event{Type: EventQR, Codes: []string{"one"}}, noon)
	m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.Spec.Suspend, s.Status.Worker, s.Status.Epoch = true, "", 101 }), noon)
	_, op := m.decide(noon)
	g.Expect(op).To(Equal(OpClose))
	g.Expect(m.want.PairingDeadline).To(BeNil())
	g.Expect(m.want.QR).To(BeNil())
}

func TestASessionThatRestsDoesNotWakeUp(t *testing.T) {
	g := NewWithT(t)
	m := connectedMachine()
	m.onEvent(Event{Type: EventOutdated}, noon)
	m.socket = socketNone
	for _, at := range m.wakeTimes(noon) {
		g.Expect(at).To(BeZero())
	}
}

// Redis may have higher numbers than the holder, for example after the cluster was
// restored from a backup.
func TestAStalePublicationRaisesTheEpoch(t *testing.T) {
	for _, tt := range []struct {
		name     string
		stale    int64
		change   func(*v1alpha1.WhatsAppSession)
		released bool
	}{
		{name: "a higher epoch", stale: 900, released: true},
		{name: "the same epoch with a higher seq", stale: 100, released: true},
		{name: "a lower epoch", stale: 99},
		{name: "already placed with a higher epoch", stale: 100, change: func(s *v1alpha1.WhatsAppSession) { s.Status.Epoch = 101 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := connectedMachine()
			if tt.change != nil {
				m.observe(session(heldByMe, tt.change), noon)
			}
			m.Step(Stale{Epoch: tt.stale}, noon)
			if !tt.released {
				g.Expect(m.want.StoredEpoch).To(BeZero())
				return
			}
			_, op := m.decide(noon)
			g.Expect(op).To(Equal(OpClose))
			m.Step(Closed{}, noon)
			for range 3 {
				_, _ = m.decide(noon)
			}
			left, needed := m.wantedStatus(noon)
			g.Expect(needed).To(BeTrue())
			g.Expect(left.HeldBy).To(BeEmpty())
			g.Expect(left.StoredEpoch).To(Equal(tt.stale))
			g.Expect(m.publishAll).To(BeTrue(), "everything is published again with the next epoch")
		})
	}
}

// A process may end between the write of the status that hides a code and the one to Redis:
// the next holder removes the code.
func TestACodeOfTheHolderBeforeIsRemoved(t *testing.T) {
	pairedFor := func(d time.Duration) []metav1.Condition {
		return []metav1.Condition{{Type: v1alpha1.ConditionPaired, Status: metav1.ConditionTrue, LastTransitionTime: metav1.NewTime(noon.Add(-d))}}
	}
	for _, tt := range []struct {
		name       string
		starts     int64
		conditions []metav1.Condition
		device     Device
		gone       bool
	}{
		{name: "the first taking", starts: 1},
		{name: "not linked yet", starts: 2, gone: true},
		{name: "linked a moment ago", starts: 2, conditions: pairedFor(time.Second), device: Device{JID: jid, PhoneNumber: phone}, gone: true},
		{name: "linked while a request for the passkey may still be valid", starts: 2, conditions: pairedFor(passkeyTimeout - time.Second), device: Device{JID: jid, PhoneNumber: phone}, gone: true},
		{name: "linked long ago", starts: 2, conditions: pairedFor(passkeyTimeout), device: Device{JID: jid, PhoneNumber: phone}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			p := newMachineTest(session(func(s *v1alpha1.WhatsAppSession) {
				s.Status.Conditions, s.Status.JID, s.Status.PhoneNumber = tt.conditions, tt.device.JID, tt.device.PhoneNumber
			}), func() float64 { return 0.5 })
			tt.device.Starts = tt.starts
			for range 10 {
				d := p.Next(p.now)
				switch d.Operation {
				case OpToken:
					p.Step(TokenResult{Granted: true}, p.now)
				case OpTake:
					p.Step(Taken{Epoch: p.Object().Status.Epoch, Device: tt.device}, p.now)
				}
				if d.Publication != nil {
					g.Expect(d.Publication.QRGone).To(Equal(tt.gone))
					return
				}
				p.write()
			}
			g.Expect("a publication").To(BeEmpty())
		})
	}
}

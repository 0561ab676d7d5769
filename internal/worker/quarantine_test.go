package worker

import (
	"fmt"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

// life leads a model through attempts, with its clock.
type life struct {
	*model
	now time.Time
}

func newLife(change ...func(*v1alpha1.WhatsAppSession)) *life {
	return &life{model: takenModel(session(change...), account{starts: 1, jid: jid, phone: phone}), now: noon}
}

// wait lets time pass.
func (l *life) wait(d time.Duration) {
	l.now = l.now.Add(d)
	l.tick(l.now)
}

// dialsNow reports whether the next step is an attempt.
func (l *life) dialsNow() bool {
	for range 4 {
		switch _, op := l.decide(l.now); op {
		case opClose:
			l.socket = socketNone
		case opDial:
			return true
		default:
			return false
		}
	}
	return false
}

// attempt waits until the time has come, dials and opens a socket.
func (l *life) attempt(t *testing.T) {
	t.Helper()
	if l.retryAt.After(l.now) {
		l.wait(l.retryAt.Sub(l.now))
	}
	if !l.dialsNow() {
		t.Fatalf("no attempt at %s: %s, %s", l.now, l.want.Phase, l.message)
	}
	l.onDialed(true, l.dialSpec(), l.now)
}

func (l *life) hears(e whatsapp.Event) { l.event(e, l.now) }

func (l *life) connects() {
	l.hears(whatsapp.Event{Type: whatsapp.EventConnected, JID: jid, PhoneNumber: phone})
}

// fails attempts so many times and is refused each time.
func (l *life) fails(t *testing.T, n int, reason string) {
	t.Helper()
	for range n {
		l.attempt(t)
		l.hears(ended(reason))
	}
}

func ended(reason string) whatsapp.Event {
	return whatsapp.Event{Type: whatsapp.EventDisconnected, Reason: reason, Message: "it ended: " + reason}
}

func (l *life) quarantined() bool {
	s, _ := l.rendered(l.now)
	for _, c := range s.Conditions {
		if c.Type == v1alpha1.ConditionStalled {
			return c.Status == metav1.ConditionTrue && c.Reason == v1alpha1.ReasonQuarantined
		}
	}
	return false
}

// moves hands the session to another worker, which takes the keys: through
// the status alone, after what the way there does to it.
func (l *life) moves(t *testing.T, on ...func(*v1alpha1.WhatsAppSessionStatus)) *life {
	t.Helper()
	l.dialsNow()
	l.running = opNone
	away := l.obj.DeepCopy()
	away.Status, _ = l.rendered(l.now)
	away.Status.Worker, away.Status.Epoch = "worker-b", away.Status.Epoch+1
	l.observe(away, l.now)
	for range 4 {
		if _, op := l.decide(l.now); op == opClose {
			l.socket = socketNone
		}
	}
	left, _ := l.rendered(l.now)
	if left.HeldBy != "" {
		t.Fatal("the session was not released")
	}
	for _, f := range on {
		f(&left)
	}
	obj := away.DeepCopy()
	obj.Status = left
	next := newModel("worker-b", "p9", func() float64 { return 0.5 })
	next.observe(obj, l.now)
	next.hold, next.token = true, true
	claimed, _ := next.rendered(l.now)
	held := obj.DeepCopy()
	held.Status = claimed
	next.observe(held, l.now)
	next.onTaken(account{starts: 2, jid: jid, phone: phone}, l.now)
	return &life{model: next, now: l.now}
}

// What becomes of a status on the way to the next holder.
func workerLost(s *v1alpha1.WhatsAppSessionStatus) {
	s.Phase = v1alpha1.PhaseDisconnected
	for i := range s.Conditions {
		if s.Conditions[i].Type != v1alpha1.ConditionPlaced {
			s.Conditions[i].Reason, s.Conditions[i].Message = v1alpha1.ReasonWorkerLost, "worker-a is dead"
		}
	}
}

func noWorker(s *v1alpha1.WhatsAppSessionStatus) { s.Phase = v1alpha1.PhasePending }

func TestQuarantineBegins(t *testing.T) {
	after := DefaultQuarantineAfter
	for _, tt := range []struct {
		name string
		live func(t *testing.T, l *life)
		want bool
		// failures and reason are what the status counts.
		failures int32
		reason   string
	}{
		{
			name:     "one failure less than needed",
			live:     func(t *testing.T, l *life) { l.fails(t, after-1, "StreamError503") },
			failures: 7, reason: "StreamError503",
		},
		{
			name: "refused in the same way again and again",
			live: func(t *testing.T, l *life) { l.fails(t, after, "StreamError503") },
			want: true, failures: 8, reason: "StreamError503",
		},
		{
			name: "connected each time, but never for a minute",
			live: func(t *testing.T, l *life) {
				for range after {
					l.attempt(t)
					l.connects()
					l.wait(59 * time.Second)
					l.hears(ended("StreamError503"))
				}
			},
			want: true, failures: 8, reason: "StreamError503",
		},
		{
			name: "a stable minute ends the row, and the end of a stable connection is no failure",
			live: func(t *testing.T, l *life) {
				l.fails(t, after-1, "StreamError503")
				l.attempt(t)
				l.connects()
				l.wait(stableAfter)
				l.hears(ended("StreamError503"))
			},
		},
		{
			name: "in another way: the row begins anew",
			live: func(t *testing.T, l *life) {
				l.fails(t, after-1, "StreamError503")
				l.fails(t, 1, "ConnectFailure418")
			},
			failures: 1, reason: "ConnectFailure418",
		},
		{
			name: "the node that names the reason is lost now and then",
			live: func(t *testing.T, l *life) {
				l.fails(t, 3, whatsapp.ReasonSocketClosed)
				l.fails(t, 2, "ConnectFailure418")
				l.fails(t, 3, whatsapp.ReasonSocketClosed)
			},
			want: true, failures: 8, reason: "ConnectFailure418",
		},
		{
			name: "silent logins",
			live: func(t *testing.T, l *life) {
				for range after {
					l.attempt(t)
					l.wait(loginPatience)
				}
			},
			want: true, failures: 8, reason: "Silent",
		},
		{
			name: "WhatsApp was never reached: that prolongs no lock",
			live: func(t *testing.T, l *life) {
				l.fails(t, 3, "StreamError503")
				for range 50 {
					l.wait(backoffMost)
					if !l.dialsNow() {
						t.Fatal("it must go on trying")
					}
					l.failed(v1alpha1.ReasonConnectFailed, "WhatsApp cannot be reached", l.now)
				}
			},
			failures: 3, reason: "StreamError503",
		},
		{
			name: "our own store failed: that says nothing of the session",
			live: func(t *testing.T, l *life) {
				for range 20 {
					l.attempt(t)
					l.connects()
					e := ended("StoreFailed")
					e.Ours = true
					l.hears(e)
				}
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			l := newLife()
			tt.live(t, l)
			g.Expect(l.quarantined()).To(Equal(tt.want))
			g.Expect(l.want.Failures).To(Equal(tt.failures))
			g.Expect(l.want.FailureReason).To(Equal(tt.reason))
			notes := 0
			for _, n := range l.notes {
				if n.reason == v1alpha1.ReasonQuarantined {
					notes++
				}
			}
			if !tt.want {
				g.Expect(l.want.RetryAfter).To(BeNil())
				g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("<=", backoffMost))
				g.Expect(notes).To(BeZero())
				return
			}
			g.Expect(notes).To(Equal(1))
			g.Expect(l.want.Phase).To(Equal(v1alpha1.PhaseDisconnected))
			g.Expect(l.message).To(And(ContainSubstring(tt.reason), ContainSubstring(v1alpha1.RestartedAtAnnotation)))
			g.Expect(l.want.RetryAfter.Sub(l.now)).To(BeNumerically("~", 45*time.Minute, time.Second))
			a, _ := l.announcement(l.now)
			g.Expect(a.Status.Status).To(Equal(delivery.Inactive), "Laravel hears that it was given up")
			g.Expect(a.Status.Priority).To(Equal(delivery.High))
			l.wait(44 * time.Minute)
			g.Expect(l.dialsNow()).To(BeFalse(), "not one attempt before")
			l.attempt(t)
		})
	}
}

func TestThePausesOfAQuarantine(t *testing.T) {
	g := NewWithT(t)
	q := Quarantine{}.orDefault()
	for i, want := range []time.Duration{time.Hour, 2 * time.Hour, 4 * time.Hour, 6 * time.Hour, 6 * time.Hour} {
		failures := q.After + i
		g.Expect(q.pause(failures, 0)).To(Equal(want/2), "failure %d", failures)
		g.Expect(q.pause(failures, 1)).To(Equal(want), "failure %d", failures)
	}
	g.Expect(q.pause(1<<30, 1)).To(Equal(6 * time.Hour))
	g.Expect(Quarantine{After: 2, First: time.Minute, Most: time.Minute}.orDefault().pause(7, 1)).To(Equal(time.Minute))
}

func TestQuarantineGoesOnAndEnds(t *testing.T) {
	in := func(t *testing.T) *life {
		l := newLife()
		l.fails(t, DefaultQuarantineAfter, "StreamError503")
		l.notes = nil
		return l
	}
	t.Run("it fails again, also in another way: longer, and without another Event", func(t *testing.T) {
		g := NewWithT(t)
		l := in(t)
		l.fails(t, 1, "ConnectFailure418")
		g.Expect(l.quarantined()).To(BeTrue())
		g.Expect(l.want.Failures).To(BeEquivalentTo(9))
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("~", 90*time.Minute, time.Second))
		g.Expect(l.notes).To(BeEmpty())
	})
	t.Run("the network is away when its time has come: that is tried again soon", func(t *testing.T) {
		g := NewWithT(t)
		l := in(t)
		l.wait(time.Hour)
		g.Expect(l.dialsNow()).To(BeTrue())
		l.failed(v1alpha1.ReasonConnectFailed, "WhatsApp cannot be reached", l.now)
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("<=", backoffMost))
		g.Expect(l.quarantined()).To(BeFalse())
		l.fails(t, 1, "StreamError503")
		g.Expect(l.want.Failures).To(BeEquivalentTo(9), "but it is not forgotten")
		g.Expect(l.quarantined()).To(BeTrue())
	})
	t.Run("a stable minute ends it", func(t *testing.T) {
		g := NewWithT(t)
		l := in(t)
		l.attempt(t)
		l.connects()
		g.Expect(l.quarantined()).To(BeFalse())
		l.wait(stableAfter)
		g.Expect(l.want.Failures).To(BeZero())
		g.Expect(l.want.FailureReason).To(BeEmpty())
		g.Expect(l.want.RetryAfter).To(BeNil())
	})
	t.Run("a person ends it", func(t *testing.T) {
		g := NewWithT(t)
		l := in(t)
		asked := l.obj.DeepCopy()
		asked.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
		l.observe(asked, l.now)
		g.Expect(l.dialsNow()).To(BeTrue())
		g.Expect(l.quarantined()).To(BeFalse())
		g.Expect(l.want.Failures).To(BeZero())
		g.Expect(l.restarted).To(BeTrue())
	})
	t.Run("a deletion does not wait for it", func(t *testing.T) {
		g := NewWithT(t)
		l := in(t)
		gone := l.obj.DeepCopy()
		gone.DeletionTimestamp = &metav1.Time{Time: l.now}
		l.observe(gone, l.now)
		g.Expect(l.dialsNow()).To(BeTrue())
	})
}

// Most sessions of a worker fail: that is WhatsApp's trouble, or the network's.
func TestACommonTroubleIsNoReasonForAQuarantine(t *testing.T) {
	g := NewWithT(t)
	var others troubles
	note := func(n int, when time.Time) {
		for i := range n {
			others.note(types.UID(fmt.Sprint(i)), when)
		}
	}
	note(4, noon)
	g.Expect(others.common(4, noon)).To(BeFalse(), "too few to tell")
	note(5, noon)
	g.Expect(others.common(10, noon)).To(BeTrue())
	g.Expect(others.common(11, noon)).To(BeFalse())
	g.Expect(others.common(10, noon.Add(commonWithin+time.Second))).To(BeFalse())

	l := newLife()
	l.around = everybodyFails{}
	l.fails(t, commonPatience*DefaultQuarantineAfter-1, "StreamError503")
	g.Expect(l.quarantined()).To(BeFalse())
	g.Expect(l.want.Failures).To(BeEquivalentTo(31))
	l.fails(t, 1, "StreamError503")
	g.Expect(l.quarantined()).To(BeTrue(), "in the end it is")

	l = newLife()
	l.around = everybodyFails{}
	l.fails(t, 20, "StreamError503")
	l.around = alone{}
	l.fails(t, 1, "StreamError503")
	g.Expect(l.quarantined()).To(BeTrue(), "the others are back")
}

type everybodyFails struct{ alone }

func (everybodyFails) common(time.Time) bool { return true }

// What the next holder must know, whatever happened to the phase on the way.
func TestWhatMovesWithTheSession(t *testing.T) {
	replaced := whatsapp.Event{Type: whatsapp.EventReplaced}
	for _, tt := range []struct {
		name string
		live func(t *testing.T, l *life)
		// rests is for how long the next holder makes no attempt; negative: never by itself.
		rests  time.Duration
		phase  v1alpha1.Phase
		reason string
	}{
		{
			name:  "in quarantine",
			live:  func(t *testing.T, l *life) { l.fails(t, DefaultQuarantineAfter, "StreamError503") },
			rests: 45 * time.Minute, phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined,
		},
		{
			name:  "some failures",
			live:  func(t *testing.T, l *life) { l.fails(t, 3, "StreamError503") },
			phase: v1alpha1.PhaseConnecting, reason: v1alpha1.ReasonConnecting,
		},
		{
			name: "banned",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(whatsapp.Event{Type: whatsapp.EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
			},
			rests: time.Hour + banMargin, phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name: "banned after failures and a replacement",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(replaced)
				l.fails(t, 3, "StreamError503")
				l.attempt(t)
				l.hears(whatsapp.Event{Type: whatsapp.EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
			},
			rests: time.Hour + banMargin, phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name:  "replaced for the first time",
			live:  func(t *testing.T, l *life) { l.attempt(t); l.hears(replaced) },
			rests: replacedPause, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced after failures: it was not tried yet",
			live: func(t *testing.T, l *life) {
				l.fails(t, 3, "StreamError503")
				l.attempt(t)
				l.hears(replaced)
			},
			rests: replacedPause, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, replaced",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(replaced)
				l.attempt(t)
				l.connects()
				l.wait(30 * time.Second)
				l.hears(replaced)
			},
			rests: -1, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, failed otherwise, replaced: it was tried",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(replaced)
				l.fails(t, 3, whatsapp.ReasonSocketClosed)
				l.attempt(t)
				l.hears(replaced)
			},
			rests: -1, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, stable, replaced: that is another time",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(replaced)
				l.attempt(t)
				l.connects()
				l.wait(stableAfter)
				l.hears(replaced)
			},
			rests: replacedPause, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, and in quarantine for something else",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(replaced)
				l.fails(t, DefaultQuarantineAfter, "StreamError503")
			},
			rests: 45 * time.Minute, phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined,
		},
	} {
		for way, on := range map[string][]func(*v1alpha1.WhatsAppSessionStatus){
			"moved":                     nil,
			"its worker died":           {workerLost},
			"nobody could take it long": {noWorker},
		} {
			t.Run(tt.name+", "+way, func(t *testing.T) {
				g := NewWithT(t)
				l := newLife()
				tt.live(t, l)
				before := l.want
				next := l.moves(t, on...)
				g.Expect(next.want.Phase).To(Equal(tt.phase))
				g.Expect(next.reason).To(Or(Equal(tt.reason), Equal(v1alpha1.ReasonWorkerLost)))
				g.Expect(next.want.Failures).To(Equal(before.Failures))
				g.Expect(next.want.FailureReason).To(Equal(before.FailureReason))
				g.Expect(next.want.Replacements).To(Equal(before.Replacements))
				switch {
				case tt.rests == 0:
					g.Expect(next.dialsNow()).To(BeTrue())
					g.Expect(next.attempts).To(BeEquivalentTo(before.Failures), "the backoff goes on where it was")
				case tt.rests < 0:
					next.wait(1000 * time.Hour)
					g.Expect(next.dialsNow()).To(BeFalse())
				default:
					g.Expect(next.token).To(BeFalse(), "a login token is not kept for hours")
					next.wait(tt.rests - time.Second)
					g.Expect(next.dialsNow()).To(BeFalse(), "not one attempt before")
					next.wait(2 * time.Second)
					g.Expect(next.dialsNow()).To(BeTrue())
				}
			})
		}
	}
}

// A store that is away when the next holder takes the keys must not make it
// forget what the session rests from.
func TestARestSurvivesAnUnreachableStore(t *testing.T) {
	g := NewWithT(t)
	until := metav1.NewTime(noon.Add(time.Hour))
	for phase, change := range map[v1alpha1.Phase]func(*v1alpha1.WhatsAppSessionStatus){
		v1alpha1.PhaseBanned:       func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryAfter = &until },
		v1alpha1.PhaseReplaced:     func(s *v1alpha1.WhatsAppSessionStatus) { s.Replacements = 2 },
		v1alpha1.PhaseLoggedOut:    func(*v1alpha1.WhatsAppSessionStatus) {},
		v1alpha1.PhaseDisconnected: func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryAfter, s.Failures = &until, 8 },
	} {
		obj := session(func(s *v1alpha1.WhatsAppSession) {
			s.Status.Phase = phase
			change(&s.Status)
		})
		m := newModel(me, process, func() float64 { return 0.5 })
		m.observe(obj, noon)
		m.hold = true
		held := obj.DeepCopy()
		heldByMe(held)
		m.observe(held, noon)
		m.failed(v1alpha1.ReasonStoreUnavailable, "no answer", noon)
		g.Expect(m.want.Phase).To(Equal(phase))
		m.onTaken(account{starts: 1, jid: jid, phone: phone}, noon.Add(time.Minute))
		g.Expect(m.want.Phase).To(Equal(phase))
		_, op := m.decide(noon.Add(time.Minute))
		g.Expect(op).To(Equal(opNone), "%s", phase)
	}
}

func TestADeletedSessionIsNotTriedDuringABan(t *testing.T) {
	g := NewWithT(t)
	l := newLife()
	l.attempt(t)
	l.hears(whatsapp.Event{Type: whatsapp.EventBanned, Until: l.now.Add(time.Hour)})
	gone := l.obj.DeepCopy()
	gone.DeletionTimestamp = &metav1.Time{Time: l.now}
	l.observe(gone, l.now)
	g.Expect(l.want.Phase).To(Equal(v1alpha1.PhaseTerminating))
	g.Expect(l.dialsNow()).To(BeFalse())
	l.wait(logoutPatience - time.Second)
	g.Expect(l.dialsNow()).To(BeFalse())

	l = newLife(func(s *v1alpha1.WhatsAppSession) { s.DeletionTimestamp = &metav1.Time{Time: noon} })
	l.attempt(t)
	l.hears(whatsapp.Event{Type: whatsapp.EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
	g.Expect(l.want.Phase).To(Equal(v1alpha1.PhaseTerminating))
	g.Expect(l.message).To(ContainSubstring("no attempt is made before"))
	l.wait(time.Minute)
	g.Expect(l.dialsNow()).To(BeFalse(), "the ban came with the attempt to log out")
}

func TestSuspensionAndReplacement(t *testing.T) {
	g := NewWithT(t)
	l := newLife()
	for range 2 {
		l.attempt(t)
		l.hears(whatsapp.Event{Type: whatsapp.EventReplaced})
	}
	suspended := l.obj.DeepCopy()
	suspended.Spec.Suspend, suspended.Status.Worker = true, ""
	l.observe(suspended, l.now)
	l.dialsNow()
	g.Expect(l.want.Replacements).To(BeEquivalentTo(1), "who suspends and resumes has looked at it: once more")
	g.Expect(l.want.RetryAfter).To(BeNil())
}

// A replaced session as a version before the count of replacements wrote it.
func TestReplacedByAnOlderVersion(t *testing.T) {
	g := NewWithT(t)
	soon := metav1.NewTime(noon.Add(time.Minute))
	m := takenModel(session(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Phase, s.Status.Failures, s.Status.RetryAfter = v1alpha1.PhaseReplaced, 1, &soon
	}), account{starts: 2, jid: jid, phone: phone})
	g.Expect(m.want.Replacements).To(BeEquivalentTo(1))
	g.Expect(m.want.Failures).To(BeZero())
	g.Expect(m.retryAt).To(BeTemporally("==", soon.Time))
}

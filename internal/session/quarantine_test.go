package session

import (
	"fmt"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// life leads a model through attempts, with its clock.
type life struct {
	*Machine
	now time.Time
}

func newLife(change ...func(*v1alpha1.WhatsAppSession)) *life {
	return &life{Machine: takenMachine(session(change...), Device{Starts: 1, JID: jid, PhoneNumber: phone}), now: noon}
}

// wait lets time pass.
func (l *life) wait(d time.Duration) {
	l.now = l.now.Add(d)
	l.tick(l.now)
}

// dialsNow reports whether the next step is an attempt.
func (l *life) dialsNow() bool {
	for range 6 {
		switch _, op := l.decide(l.now); op {
		case OpClose:
			l.socket = socketNone
		case OpSettle:
			l.Step(Settled{}, l.now)
		case OpDial:
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

func (l *life) hears(e Event) { l.onEvent(e, l.now) }

func (l *life) connects() {
	l.hears(Event{Type: EventConnected, JID: jid, PhoneNumber: phone})
}

// fails attempts so many times and is refused each time.
func (l *life) fails(t *testing.T, n int, reason string) {
	t.Helper()
	for range n {
		l.attempt(t)
		l.hears(ended(reason))
		l.verdict()
	}
}

// verdict lets the time pass until it is decided whether the session is left
// alone, where it is not already.
func (l *life) verdict() {
	if !l.assessAt.IsZero() && l.want.RetryAfter == nil {
		l.wait(l.assessAt.Sub(l.now))
	}
}

func ended(reason string) Event {
	return Event{Type: EventDisconnected, Reason: reason, Message: "it ended: " + reason}
}

func (l *life) quarantined() bool {
	s, _ := l.wantedStatus(l.now)
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
	return l.movesTo(t, Device{Starts: 2, JID: jid, PhoneNumber: phone}, on...)
}

// movesTo is moves where the next worker finds those keys.
func (l *life) movesTo(t *testing.T, keys Device, on ...func(*v1alpha1.WhatsAppSessionStatus)) *life {
	t.Helper()
	l.dialsNow()
	l.running = OpNone
	away := l.obj.DeepCopy()
	away.Status, _ = l.wantedStatus(l.now)
	away.Status.Worker, away.Status.Epoch = "worker-b", away.Status.Epoch+1
	l.observe(away, l.now)
	for range 6 {
		switch _, op := l.decide(l.now); op {
		case OpClose:
			l.socket = socketNone
		case OpSettle:
			l.Step(Settled{}, l.now)
		}
	}
	left, _ := l.wantedStatus(l.now)
	if left.HeldBy != "" {
		t.Fatal("the session was not released")
	}
	for _, f := range on {
		f(&left)
	}
	obj := away.DeepCopy()
	obj.Status = left
	next := newMachine("worker-b", "p9", func() float64 { return 0.5 })
	next.observe(obj, l.now)
	next.hold, next.token = true, true
	claimed, _ := next.wantedStatus(l.now)
	held := obj.DeepCopy()
	held.Status = claimed
	next.observe(held, l.now)
	next.onTaken(keys, l.now)
	return &life{Machine: next, now: l.now}
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

func suspendedAndResumed(s *v1alpha1.WhatsAppSessionStatus) {
	*s = status.Summarize(Suspend(*s), status.Facts{Phase: v1alpha1.PhaseSuspended, Reason: v1alpha1.ReasonSuspended}, noon)
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
				l.verdict()
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
				l.fails(t, 3, EndSocketClosed)
				l.fails(t, 2, "ConnectFailure418")
				l.fails(t, 3, EndSocketClosed)
			},
			want: true, failures: 8, reason: "ConnectFailure418",
		},
		{
			name: "silent logins",
			live: func(t *testing.T, l *life) {
				for range after {
					l.attempt(t)
					l.wait(loginTimeout)
				}
				l.verdict()
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
			events := 0
			for _, n := range l.events {
				if n.Reason == v1alpha1.ReasonQuarantined {
					events++
				}
			}
			if !tt.want {
				g.Expect(l.want.RetryAfter).To(BeNil())
				g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("<=", backoffMost))
				g.Expect(events).To(BeZero())
				return
			}
			g.Expect(events).To(Equal(1))
			g.Expect(l.want.Phase).To(Equal(v1alpha1.PhaseDisconnected))
			g.Expect(l.message).To(And(ContainSubstring(tt.reason), ContainSubstring(v1alpha1.RestartedAtAnnotation)))
			g.Expect(l.want.RetryAfter.Sub(l.now)).To(BeNumerically("~", 45*time.Minute, time.Second))
			a, _ := l.publication(l.now)
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
	q := Quarantine{}.withDefaults()
	for i, want := range []time.Duration{time.Hour, 2 * time.Hour, 4 * time.Hour, 6 * time.Hour, 6 * time.Hour} {
		failures := q.After + i
		g.Expect(q.pause(failures, 0)).To(Equal(want/2), "failure %d", failures)
		g.Expect(q.pause(failures, 1)).To(Equal(want), "failure %d", failures)
	}
	g.Expect(q.pause(1<<30, 1)).To(Equal(6 * time.Hour))
	g.Expect(Quarantine{After: 2, First: time.Minute, Most: time.Minute}.withDefaults().pause(7, 1)).To(Equal(time.Minute))
}

func TestQuarantineGoesOnAndEnds(t *testing.T) {
	in := func(t *testing.T) *life {
		l := newLife()
		l.fails(t, DefaultQuarantineAfter, "StreamError503")
		l.events = nil
		return l
	}
	t.Run("it fails again, also in another way: longer, and without another Event", func(t *testing.T) {
		g := NewWithT(t)
		l := in(t)
		l.fails(t, 1, "ConnectFailure418")
		g.Expect(l.quarantined()).To(BeTrue())
		g.Expect(l.want.Failures).To(BeEquivalentTo(9))
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("~", 90*time.Minute, time.Second))
		g.Expect(l.events).To(BeEmpty())
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
func TestWhichTroubleIsCommon(t *testing.T) {
	for _, tt := range []struct {
		name string
		// failing and connected are the sessions that are so; both: connected, but not for a minute.
		failing, connected, both int
		later                    time.Duration
		want                     bool
	}{
		{name: "nobody fails", connected: 20},
		{name: "half of those who try", failing: 10, connected: 10, want: true},
		{name: "fewer", failing: 9, connected: 11},
		{name: "they connect, but never for long", both: 10, connected: 10, want: true},
		{name: "who rests says nothing: only these try", failing: 5, want: true},
		{name: "of a few all must fail", failing: 3, want: true},
		{name: "of a few one is well", failing: 3, connected: 1},
		{name: "one alone says nothing", failing: 1},
		{name: "long ago", failing: 10, later: commonWithin + time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var others FailureTracker
			for i := range tt.failing + tt.both {
				others.Failed(types.UID(fmt.Sprint("failing ", i)), noon)
			}
			for i := range tt.both {
				others.Connected(types.UID(fmt.Sprint("failing ", i)))
			}
			for i := range tt.connected {
				others.Connected(types.UID(fmt.Sprint("connected ", i)))
			}
			NewWithT(t).Expect(others.Common(noon.Add(tt.later))).To(Equal(tt.want))
		})
	}
}

func TestWhichEndIsCommon(t *testing.T) {
	uid := func(i int) types.UID { return types.UID(fmt.Sprint(i)) }
	for _, tt := range []struct {
		name string
		// Of 20 connected sessions so many lose their connections, and back are connected again.
		lose, back int
		later      time.Duration
		want       bool
	}{
		{name: "all at once", lose: 20, want: true},
		{name: "half of them", lose: 10, want: true},
		{name: "fewer", lose: 9},
		{name: "they are back already", lose: 20, back: 19, later: assessmentDelay, want: true},
		{name: "long ago", lose: 20, back: 19, later: commonMoment + time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var others FailureTracker
			for i := range 20 {
				others.Connected(uid(i))
			}
			for i := range tt.lose {
				others.Ended(uid(i), noon)
				others.Ended(uid(i), noon.Add(time.Hour)) // of an attempt that never connected
			}
			for i := range tt.back {
				others.Connected(uid(i))
			}
			NewWithT(t).Expect(others.Common(noon.Add(tt.later))).To(Equal(tt.want))
		})
	}
}

// TestTheFirstToFailOfMany is a session that came back as the last of all and is
// the first of all to lose its connection again.
func TestTheFirstToFailOfMany(t *testing.T) {
	g := NewWithT(t)
	l := newLife()
	l.fails(t, DefaultQuarantineAfter-1, EndSocketClosed)
	for range 3 {
		l.fleet = noFleet{}
		l.attempt(t)
		l.connects()
		l.hears(ended(EndSocketClosed))
		g.Expect(l.quarantined()).To(BeFalse(), "it is not yet known how the others fare")
		l.retryAt = l.now // as for somebody whom others' recovery brings forward
		g.Expect(l.dialsNow()).To(BeFalse(), "and nothing is tried before")
		l.fleet = everybodyFails{}
		l.wait(assessmentDelay)
		g.Expect(l.dialsNow()).To(BeTrue())
		g.Expect(l.quarantined()).To(BeFalse())
		g.Expect(l.want.Failures).To(BeEquivalentTo(DefaultQuarantineAfter - 1))
	}
	l.fleet = noFleet{}
	l.attempt(t)
	l.hears(ended(EndSocketClosed))
	l.wait(assessmentDelay - time.Second)
	g.Expect(l.quarantined()).To(BeFalse())
	l.wait(time.Second)
	g.Expect(l.quarantined()).To(BeTrue(), "it fails alone")
}

// Who has just come back from a quarantine has not had its minute either.
func TestTheFirstToFailOfManyAfterAQuarantine(t *testing.T) {
	g := NewWithT(t)
	l := newLife()
	l.fails(t, DefaultQuarantineAfter, EndSocketClosed)
	for range 3 {
		l.fleet = noFleet{}
		l.attempt(t)
		l.connects()
		l.hears(ended(EndSocketClosed))
		g.Expect(l.quarantined()).To(BeTrue())
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically(">", time.Hour), "it seems to be its own")
		l.fleet = everybodyFails{}
		l.wait(assessmentDelay)
		g.Expect(l.quarantined()).To(BeTrue())
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("<=", commonPause))
		g.Expect(l.want.RetryAfter.Time).To(BeTemporally("==", l.retryAt), "the next holder knows")
		g.Expect(l.want.Failures).To(BeEquivalentTo(DefaultQuarantineAfter))
	}
	l.fleet = noFleet{}
	l.attempt(t)
	l.hears(ended(EndSocketClosed))
	until := l.retryAt
	l.wait(assessmentDelay)
	g.Expect(l.retryAt).To(Equal(until), "it fails alone")
}

func TestACommonTroubleIsNoReasonForAQuarantine(t *testing.T) {
	t.Run("nobody enters, but the pauses become longer", func(t *testing.T) {
		g := NewWithT(t)
		l := newLife()
		l.fleet = everybodyFails{}
		l.fails(t, commonAfter*DefaultQuarantineAfter, "StreamError503")
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("<=", backoffMost))
		l.fails(t, 1, "StreamError503")
		g.Expect(l.quarantined()).To(BeFalse())
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("~", commonPause*3/4, time.Second))

		l.fleet = noFleet{}
		l.fails(t, DefaultQuarantineAfter-2, "StreamError503")
		g.Expect(l.quarantined()).To(BeFalse(), "what all had in common does not count")
		l.fails(t, 1, "StreamError503")
		g.Expect(l.quarantined()).To(BeTrue(), "the others are back")
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("~", 45*time.Minute, time.Second), "the first pause")
	})
	t.Run("who is in quarantine already rests for a while, and no longer each time", func(t *testing.T) {
		g := NewWithT(t)
		l := newLife()
		l.fails(t, DefaultQuarantineAfter+1, "StreamError503")
		l.wait(assessmentDelay)
		l.fleet = everybodyFails{}
		for range 3 {
			l.fails(t, 1, "StreamError503")
			g.Expect(l.quarantined()).To(BeTrue())
			g.Expect(l.want.Failures).To(BeEquivalentTo(9))
			g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("~", commonPause*3/4, time.Second))
		}
	})
	t.Run("when it is over nobody waits for hours", func(t *testing.T) {
		g := NewWithT(t)
		l := newLife()
		l.fails(t, DefaultQuarantineAfter, "StreamError503")
		l.dialsNow()
		l.resumeSoon(l.now)
		g.Expect(l.retryAt.Sub(l.now)).To(BeNumerically("~", backoffMost/2, time.Second))
		g.Expect(l.want.RetryAfter.Time).To(BeTemporally("==", l.retryAt), "the next holder knows")
		g.Expect(l.quarantined()).To(BeTrue())
		l.attempt(t)
	})
	t.Run("when it is over no verdict is waited for", func(t *testing.T) {
		g := NewWithT(t)
		l := newLife()
		l.fails(t, DefaultQuarantineAfter-1, "StreamError503")
		l.attempt(t)
		l.hears(ended("StreamError503"))
		l.resumeSoon(l.now)
		l.wait(assessmentDelay)
		g.Expect(l.quarantined()).To(BeFalse())
		g.Expect(l.want.Failures).To(BeEquivalentTo(DefaultQuarantineAfter - 1))
		l.attempt(t)
	})
	t.Run("a session that rests from something else rests on", func(t *testing.T) {
		g := NewWithT(t)
		l := newLife()
		l.attempt(t)
		l.hears(Event{Type: EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
		l.dialsNow()
		l.resumeSoon(l.now)
		l.wait(59 * time.Minute)
		g.Expect(l.dialsNow()).To(BeFalse())
	})
}

func TestAStableMinuteIsToldToTheOthers(t *testing.T) {
	g := NewWithT(t)
	others := &listener{}
	l := newLife()
	l.fleet = others
	l.attempt(t)
	l.connects()
	l.wait(stableAfter - time.Second)
	g.Expect(others.heard).To(BeEmpty())
	l.wait(time.Hour)
	l.wait(time.Hour)
	g.Expect(others.heard).To(Equal([]types.UID{"uid-1"}), "once")
}

// listener hears who has recovered.
type listener struct {
	noFleet
	heard []types.UID
}

func (o *listener) Recovered(uid types.UID, _ time.Time) { o.heard = append(o.heard, uid) }

type everybodyFails struct{ noFleet }

func (everybodyFails) Common(time.Time) bool { return true }

// What the next holder must know, whatever happened to the phase on the way.
func TestWhatMovesWithTheSession(t *testing.T) {
	replaced := Event{Type: EventReplaced}
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
				l.hears(Event{Type: EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
			},
			rests: time.Hour + banMargin, phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name: "banned without an end",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(Event{Type: EventBanned, Message: "too much"})
			},
			rests: -1, phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name: "logged out",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(Event{Type: EventLoggedOut, Message: "unlinked"})
			},
			rests: -1, phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut,
		},
		{
			name: "a ban that is over, and failures after it",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(Event{Type: EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
				l.fails(t, 2, "StreamError503")
			},
			phase: v1alpha1.PhaseConnecting, reason: v1alpha1.ReasonConnecting,
		},
		{
			name: "banned after failures and a replacement",
			live: func(t *testing.T, l *life) {
				l.attempt(t)
				l.hears(replaced)
				l.fails(t, 3, "StreamError503")
				l.attempt(t)
				l.hears(Event{Type: EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
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
				l.fails(t, 3, EndSocketClosed)
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
			"suspended and resumed":     {noWorker, suspendedAndResumed},
		} {
			t.Run(tt.name+", "+way, func(t *testing.T) {
				g := NewWithT(t)
				l := newLife()
				tt.live(t, l)
				if l.want.Phase == v1alpha1.PhaseReplaced && way == "suspended and resumed" {
					return // see TestSuspensionAndReplacement
				}
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

// Whatever the store says when the next holder takes the keys (nothing, that it
// knows a higher epoch, that it has no record) must not make it forget what the
// session rests from.
func TestARestSurvivesAnUnreachableStore(t *testing.T) {
	g := NewWithT(t)
	until := metav1.NewTime(noon.Add(time.Hour))
	for phase, change := range map[v1alpha1.Phase]func(*v1alpha1.WhatsAppSessionStatus){
		v1alpha1.PhaseBanned:       func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryAfter = &until },
		v1alpha1.PhaseReplaced:     func(s *v1alpha1.WhatsAppSessionStatus) { s.Replacements = 2 },
		v1alpha1.PhaseLoggedOut:    func(*v1alpha1.WhatsAppSessionStatus) {},
		v1alpha1.PhaseDisconnected: func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryAfter, s.Failures = &until, 8 },
		// Without an end, or as a version without retryReason wrote them.
		v1alpha1.PhasePairingExpired: func(*v1alpha1.WhatsAppSessionStatus) {},
	} {
		obj := session(func(s *v1alpha1.WhatsAppSession) {
			s.Status.Phase = phase
			change(&s.Status)
		})
		m := newMachine(me, process, func() float64 { return 0.5 })
		m.observe(obj, noon)
		m.hold = true
		held := obj.DeepCopy()
		heldByMe(held)
		m.observe(held, noon)
		m.failed(v1alpha1.ReasonStoreUnavailable, "no answer", noon)
		g.Expect(m.want.Phase).To(Equal(phase))
		m.refused(v1alpha1.ReasonRecordMissing, "no record", noon)
		g.Expect(m.want.Phase).To(Equal(phase))
		m.onTaken(Device{Starts: 1, JID: jid, PhoneNumber: phone}, noon.Add(time.Minute))
		g.Expect(m.want.Phase).To(Equal(phase))
		_, op := m.decide(noon.Add(time.Minute))
		g.Expect(op).To(Equal(OpNone), "%s", phase)
	}
}

// The store refuses the epoch of a session that rests, as after "store restore":
// the manager places it above, and the next taking rests on until a person asks.
func TestARestSurvivesARefusedEpoch(t *testing.T) {
	for _, tt := range []struct {
		name  string
		phase v1alpha1.Phase
		// restarts: restartedAt is acted upon.
		restarts bool
	}{
		{name: "logged out", phase: v1alpha1.PhaseLoggedOut, restarts: true},
		{name: "nobody scanned", phase: v1alpha1.PhasePairingExpired, restarts: true},
		{name: "banned without an end", phase: v1alpha1.PhaseBanned, restarts: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := newMachine(me, process, func() float64 { return 0.5 })
			m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status.Phase = tt.phase }), noon)
			m.hold = true
			claimed, _ := m.wantedStatus(noon)
			m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status = claimed }), noon)
			m.behind(500, noon)
			for range 3 {
				_, _ = m.decide(noon)
			}
			left, needed := m.wantedStatus(noon)
			g.Expect(needed).To(BeTrue())
			g.Expect(left.HeldBy).To(BeEmpty())
			g.Expect(left.StoredEpoch).To(BeEquivalentTo(500), "all that the manager needs")
			g.Expect(left.Phase).To(Equal(tt.phase))

			above := session(func(s *v1alpha1.WhatsAppSession) { s.Status = left; s.Status.Epoch = 501 })
			m.observe(above, noon)
			_, op := m.decide(noon)
			g.Expect(op).To(Equal(OpNone), "no login token for a session that rests")
			g.Expect(m.hold).To(BeTrue())
			claimed, _ = m.wantedStatus(noon)
			m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status = claimed }), noon)
			_, op = m.decide(noon)
			g.Expect(op).To(Equal(OpTake))
			m.onTaken(Device{Starts: 1, JID: jid, PhoneNumber: phone}, noon)
			_, op = m.decide(noon)
			g.Expect(op).To(Equal(OpNone), "not one attempt")
			g.Expect(m.want.Phase).To(Equal(tt.phase))

			m.observe(session(func(s *v1alpha1.WhatsAppSession) {
				s.Status = claimed
				s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
			}), noon)
			_, op = m.decide(noon)
			g.Expect(op).To(Equal(OpDial), "but a person may ask for one")
			g.Expect(m.want.RetryReason).To(BeEmpty())
		})
	}
}

// Nobody spends a login token on a session that is not to log in soon.
func TestARestIsTakenWithoutALoginToken(t *testing.T) {
	in := func(d time.Duration) *metav1.Time { return &metav1.Time{Time: noon.Add(d)} }
	for _, tt := range []struct {
		name   string
		status v1alpha1.WhatsAppSessionStatus
		asked  bool // restartedAt has changed
		token  bool
	}{
		{name: "logged out", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut}},
		{name: "logged out, and a person asks", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut}, asked: true, token: true},
		{name: "logged out, and its worker died", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseDisconnected, RetryReason: v1alpha1.ReasonLoggedOut}},
		{name: "banned for an hour", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryAfter: in(time.Hour)}},
		{name: "banned for some seconds more", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryAfter: in(time.Second)}, token: true},
		{name: "in quarantine", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseDisconnected, Failures: 8, RetryAfter: in(time.Hour)}},
		{name: "replaced twice", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseReplaced, Replacements: 2}},
		{name: "outdated: another worker may have a newer image", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseOutdated}, token: true},
		{name: "connected elsewhere", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseConnected}, token: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := newMachine(me, process, nil)
			m.observe(session(func(s *v1alpha1.WhatsAppSession) {
				s.Status.Phase, s.Status.RetryReason, s.Status.RetryAfter = tt.status.Phase, tt.status.RetryReason, tt.status.RetryAfter
				s.Status.Failures, s.Status.Replacements = tt.status.Failures, tt.status.Replacements
				if tt.asked {
					s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
				}
			}), noon)
			_, op := m.decide(noon)
			g.Expect(op == OpToken).To(Equal(tt.token))
			g.Expect(m.hold).To(Equal(!tt.token), "claimed at once")
		})
	}
}

// No codes are offered in a quarantine, so its hours do not count against the pairing.
func TestAQuarantineStopsThePairingDeadline(t *testing.T) {
	g := NewWithT(t)
	l := &life{Machine: takenMachine(session(), Device{Starts: 1}), now: noon}
	l.beginPairing(noon)
	for range DefaultQuarantineAfter {
		l.wait(max(l.retryAt.Sub(l.now), 0))
		g.Expect(l.dialsNow()).To(BeTrue())
		l.onDialed(false, l.dialSpec(), l.now)
		l.hears(ended("StreamError503"))
	}
	l.verdict()
	g.Expect(l.quarantined()).To(BeTrue())
	g.Expect(l.want.PairingDeadline).To(BeNil())
	l.dialsNow()
	l.wait(l.retryAt.Sub(l.now))
	g.Expect(l.dialsNow()).To(BeTrue())
	l.onDialed(false, l.dialSpec(), l.now)
	l.hears(Event{Type: EventQR, Codes: []string{"one"}})
	l.wait(time.Second)
	g.Expect(l.want.Phase).To(Equal(v1alpha1.PhasePairing))
	g.Expect(l.want.QR).NotTo(BeNil())
}

func TestADeletedSessionIsNotTriedDuringABan(t *testing.T) {
	g := NewWithT(t)
	l := newLife()
	l.attempt(t)
	l.hears(Event{Type: EventBanned, Until: l.now.Add(time.Hour)})
	gone := l.obj.DeepCopy()
	gone.DeletionTimestamp = &metav1.Time{Time: l.now}
	l.observe(gone, l.now)
	g.Expect(l.want.Phase).To(Equal(v1alpha1.PhaseTerminating))
	g.Expect(l.dialsNow()).To(BeFalse())
	l.wait(LogoutTimeout - time.Second)
	g.Expect(l.dialsNow()).To(BeFalse())

	l = newLife(func(s *v1alpha1.WhatsAppSession) { s.DeletionTimestamp = &metav1.Time{Time: noon} })
	l.attempt(t)
	l.hears(Event{Type: EventBanned, Message: "too much", Until: l.now.Add(time.Hour)})
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
		l.hears(Event{Type: EventReplaced})
	}
	suspended := l.obj.DeepCopy()
	suspended.Spec.Suspend, suspended.Status.Worker = true, ""
	l.observe(suspended, l.now)
	l.dialsNow()
	g.Expect(l.want.Replacements).To(BeEquivalentTo(1), "who suspends and resumes has looked at it: once more")
	g.Expect(l.want.RetryAfter).To(BeNil())

	// Resumed before the manager has seen it.
	resumed := l.obj.DeepCopy()
	l.socket, l.running, l.hold = socketNone, OpNone, false
	resumed.Status, _ = l.wantedStatus(l.now)
	resumed.Spec.Suspend, resumed.Status.Worker, resumed.Status.Epoch = false, "worker-b", 102
	next := newMachine("worker-b", "p9", func() float64 { return 0.5 })
	next.observe(resumed, l.now)
	g.Expect(next.restsLong(l.now)).To(BeFalse())
	g.Expect(next.want.Phase).To(Equal(v1alpha1.PhaseConnecting))
}

// A replaced session as a version before the count of replacements wrote it.
func TestReplacedByAnOlderVersion(t *testing.T) {
	g := NewWithT(t)
	soon := metav1.NewTime(noon.Add(time.Minute))
	m := takenMachine(session(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Phase, s.Status.Failures, s.Status.RetryAfter = v1alpha1.PhaseReplaced, 1, &soon
	}), Device{Starts: 2, JID: jid, PhoneNumber: phone})
	g.Expect(m.want.Replacements).To(BeEquivalentTo(1))
	g.Expect(m.want.Failures).To(BeZero())
	g.Expect(m.retryAt).To(BeTemporally("==", soon.Time))
}

// tracked is a fleet whose sessions are counted as a worker counts them.
type tracked struct {
	noFleet
	*FailureTracker
}

func (f tracked) Failed(uid types.UID, now time.Time)  { f.FailureTracker.Failed(uid, now) }
func (f tracked) Recovered(uid types.UID, _ time.Time) { f.FailureTracker.Recovered(uid) }
func (f tracked) Common(now time.Time) bool            { return f.FailureTracker.Common(now) }

// The first session of many to lose its connection, with the others as the worker counts them.
func TestManyConnectionsThatEnd(t *testing.T) {
	for name, c := range map[string]struct {
		end  int
		want bool
	}{
		"no other's": {0, true},
		"a third":    {4, true},
		"most":       {9, false},
		"all":        {12, false},
	} {
		t.Run(name, func(t *testing.T) {
			fleet := tracked{FailureTracker: &FailureTracker{}}
			l := newLife()
			l.fleet = fleet
			for i := range 12 {
				fleet.Connected(types.UID(fmt.Sprint(i)))
			}
			l.fails(t, DefaultQuarantineAfter-1, EndSocketClosed)
			l.attempt(t)
			l.connects()
			fleet.Connected(l.obj.UID)
			l.hears(ended(EndSocketClosed))
			fleet.Ended(l.obj.UID, l.now)
			for i := range c.end {
				fleet.Ended(types.UID(fmt.Sprint(i)), l.now.Add(assessmentDelay-time.Second))
			}
			l.wait(assessmentDelay)
			NewWithT(t).Expect(l.quarantined()).To(Equal(c.want))
		})
	}
}

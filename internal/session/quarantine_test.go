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

// attempts is a machine with a clock, whose session makes attempts to connect.
type attempts struct {
	*Machine
	now time.Time
}

func newAttempts(change ...func(*v1alpha1.WhatsAppSession)) *attempts {
	return &attempts{Machine: takenMachine(session(change...), Device{Starts: 1, JID: jid, PhoneNumber: phone}), now: noon}
}

// wait advances the clock.
func (a *attempts) wait(d time.Duration) {
	a.now = a.now.Add(d)
	a.tick(a.now)
}

// dialsNow reports whether the machine dials now.
func (a *attempts) dialsNow() bool {
	for range 6 {
		switch _, op := a.decide(a.now); op {
		case OpClose:
			a.socket = socketNone
		case OpSettle:
			a.Step(Settled{}, a.now)
		case OpDial:
			return true
		default:
			return false
		}
	}
	return false
}

// attempt waits until the machine dials, and opens a socket.
func (a *attempts) attempt(t *testing.T) {
	t.Helper()
	if a.retryAt.After(a.now) {
		a.wait(a.retryAt.Sub(a.now))
	}
	if !a.dialsNow() {
		t.Fatalf("no attempt at %s: %s, %s", a.now, a.want.Phase, a.message)
	}
	a.onDialed(true, a.dialSpec(), a.now)
}

func (a *attempts) emit(e Event) { a.onEvent(e, a.now) }

func (a *attempts) connect() {
	a.emit(Event{Type: EventConnected, JID: jid, PhoneNumber: phone})
}

// fail makes n attempts that all end with the reason.
func (a *attempts) fail(t *testing.T, n int, reason string) {
	t.Helper()
	for range n {
		a.attempt(t)
		a.emit(ended(reason))
		a.awaitAssessment()
	}
}

// awaitAssessment waits until the machine has decided whether the session goes into
// quarantine, unless it is in one.
func (a *attempts) awaitAssessment() {
	if !a.assessAt.IsZero() && a.want.RetryAfter == nil {
		a.wait(a.assessAt.Sub(a.now))
	}
}

func ended(reason string) Event {
	return Event{Type: EventDisconnected, Reason: reason, Message: "it ended: " + reason}
}

func (a *attempts) quarantined() bool {
	s, _ := a.wantedStatus(a.now)
	for _, c := range s.Conditions {
		if c.Type == v1alpha1.ConditionStalled {
			return c.Status == metav1.ConditionTrue && c.Reason == v1alpha1.ReasonQuarantined
		}
	}
	return false
}

// move moves the session to another worker, which takes the keys. That worker knows only
// the status, which the given functions change on the way.
func (a *attempts) move(t *testing.T, on ...func(*v1alpha1.WhatsAppSessionStatus)) *attempts {
	t.Helper()
	return a.moveTo(t, Device{Starts: 2, JID: jid, PhoneNumber: phone}, on...)
}

// moveTo is like move; the next worker finds the given keys.
func (a *attempts) moveTo(t *testing.T, keys Device, on ...func(*v1alpha1.WhatsAppSessionStatus)) *attempts {
	t.Helper()
	a.dialsNow()
	a.running = OpNone
	away := a.obj.DeepCopy()
	away.Status, _ = a.wantedStatus(a.now)
	away.Status.Worker, away.Status.Epoch = "worker-b", away.Status.Epoch+1
	a.observe(away, a.now)
	for range 6 {
		switch _, op := a.decide(a.now); op {
		case OpClose:
			a.socket = socketNone
		case OpSettle:
			a.Step(Settled{}, a.now)
		}
	}
	left, _ := a.wantedStatus(a.now)
	if left.HeldBy != "" {
		t.Fatal("the session was not released")
	}
	for _, f := range on {
		f(&left)
	}
	obj := away.DeepCopy()
	obj.Status = left
	next := newMachine("worker-b", "p9", func() float64 { return 0.5 })
	next.observe(obj, a.now)
	next.hold, next.token = true, true
	claimed, _ := next.wantedStatus(a.now)
	held := obj.DeepCopy()
	held.Status = claimed
	next.observe(held, a.now)
	next.onTaken(keys, a.now)
	return &attempts{Machine: next, now: a.now}
}

// Changes of a status between two holders.
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

func TestWhenAQuarantineBegins(t *testing.T) {
	after := DefaultQuarantineAfter
	for _, tt := range []struct {
		name string
		run  func(t *testing.T, a *attempts)
		want bool
		// failures and reason are those in the status.
		failures int32
		reason   string
	}{
		{
			name:     "one failure too few",
			run:      func(t *testing.T, a *attempts) { a.fail(t, after-1, "StreamError503") },
			failures: 7, reason: "StreamError503",
		},
		{
			name: "enough failures for the same reason",
			run:  func(t *testing.T, a *attempts) { a.fail(t, after, "StreamError503") },
			want: true, failures: 8, reason: "StreamError503",
		},
		{
			name: "connected each time, but never for a minute",
			run: func(t *testing.T, a *attempts) {
				for range after {
					a.attempt(t)
					a.connect()
					a.wait(59 * time.Second)
					a.emit(ended("StreamError503"))
				}
				a.awaitAssessment()
			},
			want: true, failures: 8, reason: "StreamError503",
		},
		{
			name: "a stable connection resets the failures, and its end is no failure",
			run: func(t *testing.T, a *attempts) {
				a.fail(t, after-1, "StreamError503")
				a.attempt(t)
				a.connect()
				a.wait(stableAfter)
				a.emit(ended("StreamError503"))
			},
		},
		{
			name: "another reason: the count starts again",
			run: func(t *testing.T, a *attempts) {
				a.fail(t, after-1, "StreamError503")
				a.fail(t, 1, "ConnectFailure418")
			},
			failures: 1, reason: "ConnectFailure418",
		},
		{
			name: "some ends have no reason",
			run: func(t *testing.T, a *attempts) {
				a.fail(t, 3, EndSocketClosed)
				a.fail(t, 2, "ConnectFailure418")
				a.fail(t, 3, EndSocketClosed)
			},
			want: true, failures: 8, reason: "ConnectFailure418",
		},
		{
			name: "logins without an answer",
			run: func(t *testing.T, a *attempts) {
				for range after {
					a.attempt(t)
					a.wait(loginTimeout)
				}
				a.awaitAssessment()
			},
			want: true, failures: 8, reason: "Silent",
		},
		{
			name: "attempts that do not reach WhatsApp do not count",
			run: func(t *testing.T, a *attempts) {
				a.fail(t, 3, "StreamError503")
				for range 50 {
					a.wait(backoffMax)
					if !a.dialsNow() {
						t.Fatal("the machine does not dial")
					}
					a.onFailed(v1alpha1.ReasonConnectFailed, "WhatsApp cannot be reached", a.now)
				}
			},
			failures: 3, reason: "StreamError503",
		},
		{
			name: "connections that end because our store failed do not count",
			run: func(t *testing.T, a *attempts) {
				for range 20 {
					a.attempt(t)
					a.connect()
					e := ended("StoreFailed")
					e.Ours = true
					a.emit(e)
					a.Step(InboxReady{EndInboxUnavailable}, a.now)
				}
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			a := newAttempts()
			tt.run(t, a)
			g.Expect(a.quarantined()).To(Equal(tt.want))
			g.Expect(a.want.Failures).To(Equal(tt.failures))
			g.Expect(a.want.FailureReason).To(Equal(tt.reason))
			events := 0
			for _, n := range a.events {
				if n.Reason == v1alpha1.ReasonQuarantined {
					events++
				}
			}
			if !tt.want {
				g.Expect(a.want.RetryAfter).To(BeNil())
				g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("<=", backoffMax))
				g.Expect(events).To(BeZero())
				return
			}
			g.Expect(events).To(Equal(1))
			g.Expect(a.want.Phase).To(Equal(v1alpha1.PhaseDisconnected))
			g.Expect(a.message).To(And(ContainSubstring(tt.reason), ContainSubstring(v1alpha1.RestartedAtAnnotation)))
			g.Expect(a.want.RetryAfter.Sub(a.now)).To(BeNumerically("~", 45*time.Minute, time.Second))
			p, _ := a.publication(a.now)
			g.Expect(p.Status.Status).To(Equal(delivery.Inactive), "inactive in Laravel")
			g.Expect(p.Status.Priority).To(Equal(delivery.High))
			a.wait(44 * time.Minute)
			g.Expect(a.dialsNow()).To(BeFalse(), "no attempt before the end")
			a.attempt(t)
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

func TestHowAQuarantineContinuesAndEnds(t *testing.T) {
	inQuarantine := func(t *testing.T) *attempts {
		a := newAttempts()
		a.fail(t, DefaultQuarantineAfter, "StreamError503")
		a.events = nil
		return a
	}
	t.Run("a failure for any reason: a longer pause, without another Event", func(t *testing.T) {
		g := NewWithT(t)
		a := inQuarantine(t)
		a.fail(t, 1, "ConnectFailure418")
		g.Expect(a.quarantined()).To(BeTrue())
		g.Expect(a.want.Failures).To(BeEquivalentTo(9))
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("~", 90*time.Minute, time.Second))
		g.Expect(a.events).To(BeEmpty())
	})
	t.Run("the network cannot be reached after the pause: tried again soon", func(t *testing.T) {
		g := NewWithT(t)
		a := inQuarantine(t)
		a.wait(time.Hour)
		g.Expect(a.dialsNow()).To(BeTrue())
		a.onFailed(v1alpha1.ReasonConnectFailed, "WhatsApp cannot be reached", a.now)
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("<=", backoffMax))
		g.Expect(a.quarantined()).To(BeFalse())
		a.fail(t, 1, "StreamError503")
		g.Expect(a.want.Failures).To(BeEquivalentTo(9), "the failures still count")
		g.Expect(a.quarantined()).To(BeTrue())
	})
	t.Run("a stable connection ends it", func(t *testing.T) {
		g := NewWithT(t)
		a := inQuarantine(t)
		a.attempt(t)
		a.connect()
		g.Expect(a.quarantined()).To(BeFalse())
		a.wait(stableAfter)
		g.Expect(a.want.Failures).To(BeZero())
		g.Expect(a.want.FailureReason).To(BeEmpty())
		g.Expect(a.want.RetryAfter).To(BeNil())
	})
	t.Run("a restart ends it", func(t *testing.T) {
		g := NewWithT(t)
		a := inQuarantine(t)
		restarted := a.obj.DeepCopy()
		restarted.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
		a.observe(restarted, a.now)
		g.Expect(a.dialsNow()).To(BeTrue())
		g.Expect(a.quarantined()).To(BeFalse())
		g.Expect(a.want.Failures).To(BeZero())
		g.Expect(a.restarted).To(BeTrue())
	})
	t.Run("a deletion does not wait for its end", func(t *testing.T) {
		g := NewWithT(t)
		a := inQuarantine(t)
		gone := a.obj.DeepCopy()
		gone.DeletionTimestamp = &metav1.Time{Time: a.now}
		a.observe(gone, a.now)
		g.Expect(a.dialsNow()).To(BeTrue())
	})
}

// When most sessions of a worker fail, the cause is WhatsApp or the network.
func TestWhichFailuresAreCommon(t *testing.T) {
	for _, tt := range []struct {
		name string
		// How many sessions fail, are connected, or are connected but not yet stable.
		failing, connected, both int
		later                    time.Duration
		want                     bool
	}{
		{name: "no session fails", connected: 20},
		{name: "half of the sessions fail", failing: 10, connected: 10, want: true},
		{name: "less than half fail", failing: 9, connected: 11},
		{name: "half of the sessions connect, but do not become stable", both: 10, connected: 10, want: true},
		{name: "all that do not rest fail", failing: 5, want: true},
		{name: "a few sessions, and all fail", failing: 3, want: true},
		{name: "a few sessions, and one is connected", failing: 3, connected: 1},
		{name: "a single session fails", failing: 1},
		{name: "the failures were long ago", failing: 10, later: commonWithin + time.Second},
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

func TestWhichEndsOfConnectionsAreCommon(t *testing.T) {
	uid := func(i int) types.UID { return types.UID(fmt.Sprint(i)) }
	for _, tt := range []struct {
		name string
		// How many of 20 connected sessions lose their connections, and how many connect again.
		lose, back int
		later      time.Duration
		want       bool
	}{
		{name: "all end at once", lose: 20, want: true},
		{name: "half of them end", lose: 10, want: true},
		{name: "less than half end", lose: 9},
		{name: "they are connected again already", lose: 20, back: 19, later: assessmentDelay, want: true},
		{name: "the ends were long ago", lose: 20, back: 19, later: commonMoment + time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var others FailureTracker
			for i := range 20 {
				others.Connected(uid(i))
			}
			for i := range tt.lose {
				others.Ended(uid(i), noon)
				others.Ended(uid(i), noon.Add(time.Hour)) // of an attempt that did not connect
			}
			for i := range tt.back {
				others.Connected(uid(i))
			}
			NewWithT(t).Expect(others.Common(noon.Add(tt.later))).To(Equal(tt.want))
		})
	}
}

// The session is the last to connect after an outage, and the first to lose its
// connection in the next one.
func TestTheFirstOfManySessionsToFail(t *testing.T) {
	g := NewWithT(t)
	a := newAttempts()
	a.fail(t, DefaultQuarantineAfter-1, EndSocketClosed)
	for range 3 {
		a.fleet = noFleet{}
		a.attempt(t)
		a.connect()
		a.emit(ended(EndSocketClosed))
		g.Expect(a.quarantined()).To(BeFalse(), "not assessed yet")
		a.retryAt = a.now // as after the recovery of another session
		g.Expect(a.dialsNow()).To(BeFalse(), "no attempt before the assessment")
		a.fleet = allFail{}
		a.wait(assessmentDelay)
		g.Expect(a.dialsNow()).To(BeTrue())
		g.Expect(a.quarantined()).To(BeFalse())
		g.Expect(a.want.Failures).To(BeEquivalentTo(DefaultQuarantineAfter - 1))
	}
	a.fleet = noFleet{}
	a.attempt(t)
	a.emit(ended(EndSocketClosed))
	a.wait(assessmentDelay - time.Second)
	g.Expect(a.quarantined()).To(BeFalse())
	a.wait(time.Second)
	g.Expect(a.quarantined()).To(BeTrue(), "no other session fails")
}

// The same, for a session that was in quarantine and is not stable yet.
func TestTheFirstOfManySessionsToFailAfterAQuarantine(t *testing.T) {
	g := NewWithT(t)
	a := newAttempts()
	a.fail(t, DefaultQuarantineAfter, EndSocketClosed)
	for range 3 {
		a.fleet = noFleet{}
		a.attempt(t)
		a.connect()
		a.emit(ended(EndSocketClosed))
		g.Expect(a.quarantined()).To(BeTrue())
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically(">", time.Hour), "it looks like a failure of this session alone")
		a.fleet = allFail{}
		a.wait(assessmentDelay)
		g.Expect(a.quarantined()).To(BeTrue())
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("<=", commonPause))
		g.Expect(a.want.RetryAfter.Time).To(BeTemporally("==", a.retryAt), "the next holder knows")
		g.Expect(a.want.Failures).To(BeEquivalentTo(DefaultQuarantineAfter))
	}
	a.fleet = noFleet{}
	a.attempt(t)
	a.emit(ended(EndSocketClosed))
	until := a.retryAt
	a.wait(assessmentDelay)
	g.Expect(a.retryAt).To(Equal(until), "no other session fails")
}

func TestACommonFailureLeadsToNoQuarantine(t *testing.T) {
	t.Run("no quarantine, but longer pauses", func(t *testing.T) {
		g := NewWithT(t)
		a := newAttempts()
		a.fleet = allFail{}
		a.fail(t, commonAfter*DefaultQuarantineAfter, "StreamError503")
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("<=", backoffMax))
		a.fail(t, 1, "StreamError503")
		g.Expect(a.quarantined()).To(BeFalse())
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("~", commonPause*3/4, time.Second))

		a.fleet = noFleet{}
		a.fail(t, DefaultQuarantineAfter-2, "StreamError503")
		g.Expect(a.quarantined()).To(BeFalse(), "the common failures do not count")
		a.fail(t, 1, "StreamError503")
		g.Expect(a.quarantined()).To(BeTrue(), "the other sessions no longer fail")
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("~", 45*time.Minute, time.Second), "the first pause of a quarantine")
	})
	t.Run("a session in quarantine rests for a shorter time, which does not grow", func(t *testing.T) {
		g := NewWithT(t)
		a := newAttempts()
		a.fail(t, DefaultQuarantineAfter+1, "StreamError503")
		a.wait(assessmentDelay)
		a.fleet = allFail{}
		for range 3 {
			a.fail(t, 1, "StreamError503")
			g.Expect(a.quarantined()).To(BeTrue())
			g.Expect(a.want.Failures).To(BeEquivalentTo(9))
			g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("~", commonPause*3/4, time.Second))
		}
	})
	t.Run("when the common failure is over, no session waits for hours", func(t *testing.T) {
		g := NewWithT(t)
		a := newAttempts()
		a.fail(t, DefaultQuarantineAfter, "StreamError503")
		a.dialsNow()
		a.resumeSoon(a.now)
		g.Expect(a.retryAt.Sub(a.now)).To(BeNumerically("~", backoffMax/2, time.Second))
		g.Expect(a.want.RetryAfter.Time).To(BeTemporally("==", a.retryAt), "the next holder knows")
		g.Expect(a.quarantined()).To(BeTrue())
		a.attempt(t)
	})
	t.Run("when the common failure is over, no assessment is made", func(t *testing.T) {
		g := NewWithT(t)
		a := newAttempts()
		a.fail(t, DefaultQuarantineAfter-1, "StreamError503")
		a.attempt(t)
		a.emit(ended("StreamError503"))
		a.resumeSoon(a.now)
		a.wait(assessmentDelay)
		g.Expect(a.quarantined()).To(BeFalse())
		g.Expect(a.want.Failures).To(BeEquivalentTo(DefaultQuarantineAfter - 1))
		a.attempt(t)
	})
	t.Run("a session that rests for another reason continues to rest", func(t *testing.T) {
		g := NewWithT(t)
		a := newAttempts()
		a.attempt(t)
		a.emit(Event{Type: EventBanned, Message: "too much", Until: a.now.Add(time.Hour)})
		a.dialsNow()
		a.resumeSoon(a.now)
		a.wait(59 * time.Minute)
		g.Expect(a.dialsNow()).To(BeFalse())
	})
}

func TestARecoveryIsReportedToTheFleet(t *testing.T) {
	g := NewWithT(t)
	others := &recoveryRecorder{}
	a := newAttempts()
	a.fleet = others
	a.attempt(t)
	a.connect()
	a.wait(stableAfter - time.Second)
	g.Expect(others.recovered).To(BeEmpty())
	a.wait(time.Hour)
	a.wait(time.Hour)
	g.Expect(others.recovered).To(Equal([]types.UID{"uid-1"}), "once")
}

// recoveryRecorder is a Fleet that records which sessions have recovered.
type recoveryRecorder struct {
	noFleet
	recovered []types.UID
}

func (o *recoveryRecorder) Recovered(uid types.UID, _ time.Time) {
	o.recovered = append(o.recovered, uid)
}

// allFail is a Fleet in which most sessions fail.
type allFail struct{ noFleet }

func (allFail) Common(time.Time) bool { return true }

// What the next holder must know, however the phase was changed between the holders.
func TestWhatTheNextHolderKnows(t *testing.T) {
	replaced := Event{Type: EventReplaced}
	for _, tt := range []struct {
		name string
		run  func(t *testing.T, a *attempts)
		// rests is how long the next holder makes no attempt; negative: forever.
		rests  time.Duration
		phase  v1alpha1.Phase
		reason string
	}{
		{
			name:  "in quarantine",
			run:   func(t *testing.T, a *attempts) { a.fail(t, DefaultQuarantineAfter, "StreamError503") },
			rests: 45 * time.Minute, phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined,
		},
		{
			name:  "some failures",
			run:   func(t *testing.T, a *attempts) { a.fail(t, 3, "StreamError503") },
			phase: v1alpha1.PhaseConnecting, reason: v1alpha1.ReasonConnecting,
		},
		{
			name: "banned",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(Event{Type: EventBanned, Message: "too much", Until: a.now.Add(time.Hour)})
			},
			rests: time.Hour + banMargin, phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name: "banned without an end",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(Event{Type: EventBanned, Message: "too much"})
			},
			rests: -1, phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name: "logged out",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(Event{Type: EventLoggedOut, Message: "unlinked"})
			},
			rests: -1, phase: v1alpha1.PhaseLoggedOut, reason: v1alpha1.ReasonLoggedOut,
		},
		{
			name: "a ban that is over, then failures",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(Event{Type: EventBanned, Message: "too much", Until: a.now.Add(time.Hour)})
				a.fail(t, 2, "StreamError503")
			},
			phase: v1alpha1.PhaseConnecting, reason: v1alpha1.ReasonConnecting,
		},
		{
			name: "banned after failures and a replacement",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(replaced)
				a.fail(t, 3, "StreamError503")
				a.attempt(t)
				a.emit(Event{Type: EventBanned, Message: "too much", Until: a.now.Add(time.Hour)})
			},
			rests: time.Hour + banMargin, phase: v1alpha1.PhaseBanned, reason: v1alpha1.ReasonBanned,
		},
		{
			name:  "replaced for the first time",
			run:   func(t *testing.T, a *attempts) { a.attempt(t); a.emit(replaced) },
			rests: replacedPause, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced for the first time, after failures",
			run: func(t *testing.T, a *attempts) {
				a.fail(t, 3, "StreamError503")
				a.attempt(t)
				a.emit(replaced)
			},
			rests: replacedPause, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, replaced again",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(replaced)
				a.attempt(t)
				a.connect()
				a.wait(30 * time.Second)
				a.emit(replaced)
			},
			rests: -1, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, failed for another reason, replaced again",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(replaced)
				a.fail(t, 3, EndSocketClosed)
				a.attempt(t)
				a.emit(replaced)
			},
			rests: -1, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, stable, replaced: counts as the first time",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(replaced)
				a.attempt(t)
				a.connect()
				a.wait(stableAfter)
				a.emit(replaced)
			},
			rests: replacedPause, phase: v1alpha1.PhaseReplaced, reason: v1alpha1.ReasonReplaced,
		},
		{
			name: "replaced, tried, then in quarantine",
			run: func(t *testing.T, a *attempts) {
				a.attempt(t)
				a.emit(replaced)
				a.fail(t, DefaultQuarantineAfter, "StreamError503")
			},
			rests: 45 * time.Minute, phase: v1alpha1.PhaseDisconnected, reason: v1alpha1.ReasonQuarantined,
		},
	} {
		for way, on := range map[string][]func(*v1alpha1.WhatsAppSessionStatus){
			"moved":                            nil,
			"its worker died":                  {workerLost},
			"no worker could take it for long": {noWorker},
			"suspended and resumed":            {noWorker, suspendedAndResumed},
		} {
			t.Run(tt.name+", "+way, func(t *testing.T) {
				g := NewWithT(t)
				a := newAttempts()
				tt.run(t, a)
				if a.want.Phase == v1alpha1.PhaseReplaced && way == "suspended and resumed" {
					return // see TestSuspensionAndReplacement
				}
				before := a.want
				next := a.move(t, on...)
				g.Expect(next.want.Phase).To(Equal(tt.phase))
				g.Expect(next.reason).To(Or(Equal(tt.reason), Equal(v1alpha1.ReasonWorkerLost)))
				g.Expect(next.want.Failures).To(Equal(before.Failures))
				g.Expect(next.want.FailureReason).To(Equal(before.FailureReason))
				g.Expect(next.want.Replacements).To(Equal(before.Replacements))
				switch {
				case tt.rests == 0:
					g.Expect(next.dialsNow()).To(BeTrue())
					g.Expect(next.attempts).To(BeEquivalentTo(before.Failures), "the backoff continues")
				case tt.rests < 0:
					next.wait(1000 * time.Hour)
					g.Expect(next.dialsNow()).To(BeFalse())
				default:
					g.Expect(next.token).To(BeFalse(), "no login token is kept during a rest")
					next.wait(tt.rests - time.Second)
					g.Expect(next.dialsNow()).To(BeFalse(), "no attempt before the end")
					next.wait(2 * time.Second)
					g.Expect(next.dialsNow()).To(BeTrue())
				}
			})
		}
	}
}

// When the next holder cannot take the keys (no answer from the store, or no record), it
// must keep the session's rest.
func TestARestStaysWhenTheStoreFails(t *testing.T) {
	g := NewWithT(t)
	until := metav1.NewTime(noon.Add(time.Hour))
	for phase, change := range map[v1alpha1.Phase]func(*v1alpha1.WhatsAppSessionStatus){
		v1alpha1.PhaseBanned:       func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryAfter = &until },
		v1alpha1.PhaseReplaced:     func(s *v1alpha1.WhatsAppSessionStatus) { s.Replacements = 2 },
		v1alpha1.PhaseLoggedOut:    func(*v1alpha1.WhatsAppSessionStatus) {},
		v1alpha1.PhaseDisconnected: func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryAfter, s.Failures = &until, 8 },
		// Written by a version without retryReason.
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
		m.onFailed(v1alpha1.ReasonStoreUnavailable, "no answer", noon)
		g.Expect(m.want.Phase).To(Equal(phase))
		m.onSetupInvalid(v1alpha1.ReasonRecordMissing, "no record", noon)
		g.Expect(m.want.Phase).To(Equal(phase))
		m.onTaken(Device{Starts: 1, JID: jid, PhoneNumber: phone}, noon.Add(time.Minute))
		g.Expect(m.want.Phase).To(Equal(phase))
		_, op := m.decide(noon.Add(time.Minute))
		g.Expect(op).To(Equal(OpNone), "%s", phase)
	}
}

// The store refuses the epoch of a session that rests, as after "store restore". The
// manager places it with a higher epoch, and the session still rests until a person
// restarts it.
func TestARestStaysWhenTheStoreRefusesTheEpoch(t *testing.T) {
	for _, tt := range []struct {
		name  string
		phase v1alpha1.Phase
		// restarts: restartedAt has an effect.
		restarts bool
	}{
		{name: "logged out", phase: v1alpha1.PhaseLoggedOut, restarts: true},
		{name: "pairing expired", phase: v1alpha1.PhasePairingExpired, restarts: true},
		{name: "banned without an end", phase: v1alpha1.PhaseBanned, restarts: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := newMachine(me, process, func() float64 { return 0.5 })
			m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status.Phase = tt.phase }), noon)
			m.hold = true
			claimed, _ := m.wantedStatus(noon)
			m.observe(session(func(s *v1alpha1.WhatsAppSession) { s.Status = claimed }), noon)
			m.onEpochBehind(500, noon)
			for range 3 {
				_, _ = m.decide(noon)
			}
			left, needed := m.wantedStatus(noon)
			g.Expect(needed).To(BeTrue())
			g.Expect(left.HeldBy).To(BeEmpty())
			g.Expect(left.StoredEpoch).To(BeEquivalentTo(500), "the manager needs nothing else")
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
			g.Expect(op).To(Equal(OpNone), "no attempt")
			g.Expect(m.want.Phase).To(Equal(tt.phase))

			m.observe(session(func(s *v1alpha1.WhatsAppSession) {
				s.Status = claimed
				s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
			}), noon)
			_, op = m.decide(noon)
			g.Expect(op).To(Equal(OpDial), "an attempt after a restart")
			g.Expect(m.want.RetryReason).To(BeEmpty())
		})
	}
}

// A session that will not log in soon needs no login token.
func TestASessionThatRestsIsClaimedWithoutALoginToken(t *testing.T) {
	in := func(d time.Duration) *metav1.Time { return &metav1.Time{Time: noon.Add(d)} }
	for _, tt := range []struct {
		name    string
		status  v1alpha1.WhatsAppSessionStatus
		restart bool // restartedAt has changed
		token   bool
	}{
		{name: "logged out", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut}},
		{name: "logged out, and restarted", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut}, restart: true, token: true},
		{name: "logged out, and its worker died", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseDisconnected, RetryReason: v1alpha1.ReasonLoggedOut}},
		{name: "banned for an hour", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryAfter: in(time.Hour)}},
		{name: "banned for a few more seconds", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryAfter: in(time.Second)}, token: true},
		{name: "in quarantine", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseDisconnected, Failures: 8, RetryAfter: in(time.Hour)}},
		{name: "replaced twice", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseReplaced, Replacements: 2}},
		{name: "outdated: another worker may have a newer image", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseOutdated}, token: true},
		{name: "connected by another holder", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseConnected}, token: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			m := newMachine(me, process, nil)
			m.observe(session(func(s *v1alpha1.WhatsAppSession) {
				s.Status.Phase, s.Status.RetryReason, s.Status.RetryAfter = tt.status.Phase, tt.status.RetryReason, tt.status.RetryAfter
				s.Status.Failures, s.Status.Replacements = tt.status.Failures, tt.status.Replacements
				if tt.restart {
					s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
				}
			}), noon)
			_, op := m.decide(noon)
			g.Expect(op == OpToken).To(Equal(tt.token))
			g.Expect(m.hold).To(Equal(!tt.token), "claimed at once")
		})
	}
}

// No codes are offered in a quarantine, so its time does not count for the pairing
// deadline.
func TestAQuarantineRemovesThePairingDeadline(t *testing.T) {
	g := NewWithT(t)
	a := &attempts{Machine: takenMachine(session(), Device{Starts: 1}), now: noon}
	a.beginPairing(noon)
	for range DefaultQuarantineAfter {
		a.wait(max(a.retryAt.Sub(a.now), 0))
		g.Expect(a.dialsNow()).To(BeTrue())
		a.onDialed(false, a.dialSpec(), a.now)
		a.emit(ended("StreamError503"))
	}
	a.awaitAssessment()
	g.Expect(a.quarantined()).To(BeTrue())
	g.Expect(a.want.PairingDeadline).To(BeNil())
	a.dialsNow()
	a.wait(a.retryAt.Sub(a.now))
	g.Expect(a.dialsNow()).To(BeTrue())
	a.onDialed(false, a.dialSpec(), a.now)
	a.emit(Event{Type: EventQR, Codes: []string{"one"}})
	a.wait(time.Second)
	g.Expect(a.want.Phase).To(Equal(v1alpha1.PhasePairing))
	g.Expect(a.want.QR).NotTo(BeNil())
}

// Nor does the time of another rest of hours: the first code after it must not expire at once.
func TestARestRemovesThePairingDeadline(t *testing.T) {
	for name, rest := range map[string]func(a *attempts){
		"banned": func(a *attempts) { a.emit(Event{Type: EventBanned, Message: "banned", Until: a.now.Add(time.Hour)}) },
		"the client is outdated, until another build accepts it": func(a *attempts) {
			a.emit(Event{Type: EventOutdated})
			a.Step(Closed{}, a.now)
			a.now = a.now.Add(time.Hour)
			a.Step(RetryOutdated{}, a.now)
		},
		"it ends its worker": func(a *attempts) {
			a.emit(ended("StreamError503"))
			a.onUnsettled(suspectAfter, 1, a.now)
			a.retryAt = a.restUntil()
			a.suspect = false
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			a := &attempts{Machine: takenMachine(session(), Device{Starts: 1}), now: noon}
			a.onDialed(false, a.dialSpec(), a.now)
			a.emit(Event{Type: EventQR, Codes: []string{"one"}})
			g.Expect(a.want.PairingDeadline).NotTo(BeNil())
			rest(a)
			g.Expect(a.want.PairingDeadline).To(BeNil())
			a.wait(max(a.retryAt.Sub(a.now), 0))
			g.Expect(a.dialsNow()).To(BeTrue())
			a.onDialed(false, a.dialSpec(), a.now)
			a.emit(Event{Type: EventQR, Codes: []string{"two"}})
			a.wait(time.Second)
			g.Expect(a.want.Phase).To(Equal(v1alpha1.PhasePairing))
			g.Expect(a.want.QR).NotTo(BeNil())
		})
	}
}

func TestADeletedSessionIsNotTriedDuringABan(t *testing.T) {
	g := NewWithT(t)
	a := newAttempts()
	a.attempt(t)
	a.emit(Event{Type: EventBanned, Until: a.now.Add(time.Hour)})
	gone := a.obj.DeepCopy()
	gone.DeletionTimestamp = &metav1.Time{Time: a.now}
	a.observe(gone, a.now)
	g.Expect(a.want.Phase).To(Equal(v1alpha1.PhaseTerminating))
	g.Expect(a.dialsNow()).To(BeFalse())
	a.wait(LogoutTimeout - time.Second)
	g.Expect(a.dialsNow()).To(BeFalse())

	a = newAttempts(func(s *v1alpha1.WhatsAppSession) { s.DeletionTimestamp = &metav1.Time{Time: noon} })
	a.attempt(t)
	a.emit(Event{Type: EventBanned, Message: "too much", Until: a.now.Add(time.Hour)})
	g.Expect(a.want.Phase).To(Equal(v1alpha1.PhaseTerminating))
	g.Expect(a.message).To(ContainSubstring("no attempt is made before"))
	a.wait(time.Minute)
	g.Expect(a.dialsNow()).To(BeFalse(), "the attempt to log out was answered with a ban")
}

func TestSuspensionAndReplacement(t *testing.T) {
	g := NewWithT(t)
	a := newAttempts()
	for range 2 {
		a.attempt(t)
		a.emit(Event{Type: EventReplaced})
	}
	suspended := a.obj.DeepCopy()
	suspended.Spec.Suspend, suspended.Status.Worker = true, ""
	a.observe(suspended, a.now)
	a.dialsNow()
	g.Expect(a.want.Replacements).To(BeEquivalentTo(1), "one more attempt after a suspension")
	g.Expect(a.want.RetryAfter).To(BeNil())

	// The session is resumed before the manager has seen the suspension.
	resumed := a.obj.DeepCopy()
	a.socket, a.running, a.hold = socketNone, OpNone, false
	resumed.Status, _ = a.wantedStatus(a.now)
	resumed.Spec.Suspend, resumed.Status.Worker, resumed.Status.Epoch = false, "worker-b", 102
	next := newMachine("worker-b", "p9", func() float64 { return 0.5 })
	next.observe(resumed, a.now)
	g.Expect(next.restsLong(a.now)).To(BeFalse())
	g.Expect(next.want.Phase).To(Equal(v1alpha1.PhaseConnecting))
}

// The status of a replaced session may be written by a version that did not count
// replacements.
func TestAReplacedSessionOfAnOlderVersion(t *testing.T) {
	g := NewWithT(t)
	soon := metav1.NewTime(noon.Add(time.Minute))
	m := takenMachine(session(func(s *v1alpha1.WhatsAppSession) {
		s.Status.Phase, s.Status.Failures, s.Status.RetryAfter = v1alpha1.PhaseReplaced, 1, &soon
	}), Device{Starts: 2, JID: jid, PhoneNumber: phone})
	g.Expect(m.want.Replacements).To(BeEquivalentTo(1))
	g.Expect(m.want.Failures).To(BeZero())
	g.Expect(m.retryAt).To(BeTemporally("==", soon.Time))
}

// tracked is a Fleet with the FailureTracker of a worker.
type tracked struct {
	noFleet
	*FailureTracker
}

func (f tracked) Failed(uid types.UID, now time.Time)  { f.FailureTracker.Failed(uid, now) }
func (f tracked) Recovered(uid types.UID, _ time.Time) { f.FailureTracker.Recovered(uid) }
func (f tracked) Common(now time.Time) bool            { return f.FailureTracker.Common(now) }

// A session loses its connection as the first of many, with the FailureTracker of a worker.
func TestManyConnectionsEnd(t *testing.T) {
	for name, c := range map[string]struct {
		end  int
		want bool
	}{
		"no other": {0, true},
		"a third":  {4, true},
		"most":     {9, false},
		"all":      {12, false},
	} {
		t.Run(name, func(t *testing.T) {
			fleet := tracked{FailureTracker: &FailureTracker{}}
			a := newAttempts()
			a.fleet = fleet
			for i := range 12 {
				fleet.Connected(types.UID(fmt.Sprint(i)))
			}
			a.fail(t, DefaultQuarantineAfter-1, EndSocketClosed)
			a.attempt(t)
			a.connect()
			fleet.Connected(a.obj.UID)
			a.emit(ended(EndSocketClosed))
			fleet.Ended(a.obj.UID, a.now)
			for i := range c.end {
				fleet.Ended(types.UID(fmt.Sprint(i)), a.now.Add(assessmentDelay-time.Second))
			}
			a.wait(assessmentDelay)
			NewWithT(t).Expect(a.quarantined()).To(Equal(c.want))
		})
	}
}

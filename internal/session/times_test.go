package session

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func in(d time.Duration) *metav1.Time { return &metav1.Time{Time: noon.Add(d)} }

// Times that other machines wrote may be from a clock that is ahead.
func TestTimesInTheFuture(t *testing.T) {
	const far = 1000 * time.Hour
	status := func(change func(*v1alpha1.WhatsAppSessionStatus)) v1alpha1.WhatsAppSessionStatus {
		s := v1alpha1.WhatsAppSessionStatus{}
		change(&s)
		return s
	}
	for _, tt := range []struct {
		name     string
		status   v1alpha1.WhatsAppSessionStatus
		deadline *metav1.Time
		retry    *metav1.Time
	}{
		{
			name:     "a pairing deadline within the timeout",
			status:   status(func(s *v1alpha1.WhatsAppSessionStatus) { s.PairingDeadline = in(3 * time.Minute) }),
			deadline: in(3 * time.Minute),
		},
		{
			name:     "a pairing deadline beyond it",
			status:   status(func(s *v1alpha1.WhatsAppSessionStatus) { s.PairingDeadline = in(far) }),
			deadline: in(5 * time.Minute),
		},
		{
			name: "a quarantine",
			status: status(func(s *v1alpha1.WhatsAppSessionStatus) {
				s.Failures, s.RetryAfter = 8, in(5*time.Hour)
			}),
			retry: in(5 * time.Hour),
		},
		{
			name: "a quarantine that is too long",
			status: status(func(s *v1alpha1.WhatsAppSessionStatus) {
				s.Failures, s.RetryAfter = 8, in(far)
			}),
			retry: in(DefaultQuarantineMost),
		},
		{
			name: "replaced once",
			status: status(func(s *v1alpha1.WhatsAppSessionStatus) {
				s.Phase, s.Replacements, s.RetryAfter = v1alpha1.PhaseReplaced, 1, in(far)
			}),
			retry: in(replacedPause),
		},
		{
			name: "a refused pairing code",
			status: status(func(s *v1alpha1.WhatsAppSessionStatus) {
				s.RetryReason, s.RetryAfter = v1alpha1.ReasonPairingCodeRefused, in(far)
			}),
			retry: in(codeRefusedPause),
		},
		{
			name: "a ban of days",
			status: status(func(s *v1alpha1.WhatsAppSessionStatus) {
				s.RetryReason, s.RetryAfter = v1alpha1.ReasonBanned, in(7*24*time.Hour)
			}),
			retry: in(7 * 24 * time.Hour),
		},
		{
			name: "a ban of a hundred years",
			status: status(func(s *v1alpha1.WhatsAppSessionStatus) {
				s.RetryReason, s.RetryAfter = v1alpha1.ReasonBanned, in(100*365*24*time.Hour)
			}),
			retry: in(banMax + banMargin),
		},
		{
			name: "a ban without an end",
			status: status(func(s *v1alpha1.WhatsAppSessionStatus) {
				s.RetryReason = v1alpha1.ReasonBanned
			}),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			obj := session(byCode, func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.Timeout.Duration = 5 * time.Minute })
			got := ClampTimes(obj, tt.status, DefaultQuarantineMost, noon)
			g.Expect(got.PairingDeadline).To(Equal(tt.deadline))
			g.Expect(got.RetryAfter).To(Equal(tt.retry))
			g.Expect(ClampTimes(obj, got, DefaultQuarantineMost, noon.Add(time.Minute))).To(Equal(got), "a later call does not extend it")

			obj.Status.PairingDeadline, obj.Status.RetryAfter, obj.Status.RetryReason = tt.status.PairingDeadline, tt.status.RetryAfter, tt.status.RetryReason
			obj.Status.Phase, obj.Status.Failures, obj.Status.Replacements = tt.status.Phase, tt.status.Failures, tt.status.Replacements
			m := newMachine(me, process, nil)
			m.observe(obj, noon)
			g.Expect(m.want.RetryAfter).To(Equal(tt.retry), "the next holder waits no longer than that")
			g.Expect(m.want.PairingDeadline).To(Equal(tt.deadline))
		})
	}
}

// The clock of the holder's own machine may be set back while it holds the session: the times
// that it wrote before are then as far in the future as those of another machine.
func TestTheClockIsSetBack(t *testing.T) {
	const far = 1000 * time.Hour
	ahead := noon.Add(far)
	for _, tt := range []struct {
		name   string
		before func(p *machineTest)
		// within is how long after the clock was set back the session connects again.
		within time.Duration
	}{
		{
			name: "in quarantine",
			before: func(p *machineTest) {
				p.want.Failures, p.want.FailureReason = int32(p.quarantine.After), "StreamError503"
				p.enterQuarantine(p.now)
			},
			within: DefaultQuarantineMost,
		},
		{
			name: "banned for an hour",
			before: func(p *machineTest) {
				p.onEvent(Event{Type: EventBanned, Message: "banned", Until: p.now.Add(time.Hour)}, p.now)
			},
			within: banMax + time.Hour,
		},
		{
			name:   "replaced by another login",
			before: func(p *machineTest) { p.onEvent(Event{Type: EventReplaced}, p.now) },
			within: replacedPause,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			p := newMachineTest(session(), func() float64 { return 0.5 })
			p.now = ahead
			p.goOn(Device{Starts: 1, JID: jid, PhoneNumber: phone})
			p.Step(Dialed{Paired: true}, p.now)
			p.Step(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, p.now)
			tt.before(p)
			p.socket = socketNone
			settled := func() Operation {
				op := p.next()
				if op == OpSettle {
					p.Step(Settled{}, p.now)
					op = p.next()
				}
				p.write()
				return op
			}
			g.Expect(settled()).To(Equal(OpNone))

			p.now = noon
			*p.pace = Pace{} // its times are monotonic, unlike those of a test
			g.Expect(settled()).To(Equal(OpNone))
			status := p.Object().Status
			g.Expect(status.RetryAfter.Time).To(BeTemporally("<=", noon.Add(tt.within+time.Second)), "it is written, so that it is a fixed time")
			g.Expect(readyMessage(status)).NotTo(ContainSubstring(ahead.Format("2006-01")))
			p.now = status.RetryAfter.Add(-time.Second)
			g.Expect(settled()).To(Equal(OpNone))
			p.now = status.RetryAfter.Time
			g.Expect(settled()).To(Equal(OpDial))
		})
	}
	t.Run("pairing", func(t *testing.T) {
		g := NewWithT(t)
		p := newMachineTest(session(), func() float64 { return 0.5 })
		p.now = ahead
		p.goOn(Device{Starts: 1})
		p.Step(Dialed{}, p.now)
		p.Step(Event{Type: EventQR, Codes: []string{"code"}}, p.now)
		p.next()
		p.write()
		p.now = noon
		p.next()
		p.write()
		g.Expect(p.Object().Status.PairingDeadline.Time).To(BeTemporally("<=", noon.Add(defaultPairingTimeout)))
		g.Expect(p.settleAt).To(BeTemporally("<=", noon.Add(settleAfter+settleInterval)))
	})
}

func TestDeletionDeadline(t *testing.T) {
	for _, tt := range []struct {
		name    string
		deleted *metav1.Time
		seen    time.Duration
		want    time.Duration
	}{
		{name: "seen at once", deleted: in(0), want: LogoutTimeout},
		{name: "seen late: counted from the deletion", deleted: in(0), seen: time.Minute, want: LogoutTimeout},
		{name: "seen when the time is over: tried for a minute", deleted: in(-time.Hour), want: minLogout},
		{name: "seen shortly before the time is over: tried for a minute", deleted: in(0), seen: LogoutTimeout - time.Second, want: LogoutTimeout - time.Second + minLogout},
		{name: "the clock of the API server is ahead: counted from when it was seen", deleted: in(10 * time.Hour), want: LogoutTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			obj := session(func(s *v1alpha1.WhatsAppSession) { s.DeletionTimestamp = tt.deleted })
			NewWithT(t).Expect(DeletionDeadline(obj, noon.Add(tt.seen))).To(BeTemporally("==", noon.Add(tt.want)))
		})
	}
	t.Run("a clock that is set back meanwhile does not extend it", func(t *testing.T) {
		g := NewWithT(t)
		seen := time.Now()
		obj := session(func(s *v1alpha1.WhatsAppSession) {
			s.DeletionTimestamp = &metav1.Time{Time: seen.Add(-time.Minute).Round(0)}
		})
		deadline := DeletionDeadline(obj, seen)
		g.Expect(deadline.Sub(seen)).To(Equal(LogoutTimeout - time.Minute))
		g.Expect(deadline.String()).To(ContainSubstring("m="), "it is compared by the monotonic clock")
	})
	t.Run("the holder releases the session at the deadline", func(t *testing.T) {
		g := NewWithT(t)
		m := connectedMachine()
		m.observe(session(heldByMe, func(s *v1alpha1.WhatsAppSession) { s.DeletionTimestamp = in(10 * time.Hour) }), noon)
		g.Expect(m.stays(noon.Add(LogoutTimeout - time.Second))).To(BeTrue())
		g.Expect(m.stays(noon.Add(LogoutTimeout))).To(BeFalse())
	})
}

func TestRestart(t *testing.T) {
	for _, tt := range []struct {
		name     string
		status   v1alpha1.WhatsAppSessionStatus
		result   RestartResult
		from     time.Time
		observed bool
	}{
		{name: "a new value", result: RestartDone, observed: true},
		{name: "a value that was handled already", status: v1alpha1.WhatsAppSessionStatus{ObservedRestartedAt: "now"}, observed: true},
		{name: "another value than the one that was handled", status: v1alpha1.WhatsAppSessionStatus{ObservedRestartedAt: "before"}, result: RestartDone, observed: true},
		{name: "too soon after the last restart", status: v1alpha1.WhatsAppSessionStatus{RestartedTime: in(-45 * time.Second)}, result: RestartWaits, from: noon.Add(15 * time.Second)},
		{name: "a minute after the last restart", status: v1alpha1.WhatsAppSessionStatus{RestartedTime: in(-time.Minute)}, result: RestartDone, observed: true},
		{name: "the last restart is in the future: written by a clock that is ahead", status: v1alpha1.WhatsAppSessionStatus{RestartedTime: in(10 * time.Hour)}, result: RestartDone, observed: true},
		{name: "during a ban", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryReason: v1alpha1.ReasonBanned, RetryAfter: in(time.Hour)}, result: RestartBanned, observed: true},
		{name: "during a ban without an end", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryReason: v1alpha1.ReasonBanned}, result: RestartDone, observed: true},
		{name: "after a ban", status: v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseBanned, RetryReason: v1alpha1.ReasonBanned, RetryAfter: in(-time.Hour)}, result: RestartDone, observed: true},
		{name: "in quarantine", status: v1alpha1.WhatsAppSessionStatus{Failures: 8, FailureReason: "StreamError503", RetryAfter: in(time.Hour)}, result: RestartDone, observed: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			obj := session(func(s *v1alpha1.WhatsAppSession) {
				s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
			})
			next, result, from := Restart(obj, tt.status, noon)
			g.Expect(result).To(Equal(tt.result))
			g.Expect(from).To(Equal(tt.from))
			g.Expect(next.ObservedRestartedAt == "now").To(Equal(tt.observed))
			switch result {
			case RestartDone:
				g.Expect(next.RestartedTime).To(Equal(in(0)))
				g.Expect(next.RetryAfter).To(BeNil())
				g.Expect(next.RetryReason).To(BeEmpty())
				g.Expect(next.Failures).To(BeZero())
			case RestartBanned:
				g.Expect(next.RetryAfter).To(Equal(tt.status.RetryAfter), "no attempt before the end of the ban")
			default:
				g.Expect(next).To(Equal(tt.status))
			}
		})
	}
}

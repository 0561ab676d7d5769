package session

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// What a taking makes of how many before it nothing has settled.
func TestTakingsThatNothingHasSettled(t *testing.T) {
	for _, tt := range []struct {
		name      string
		unsettled int32
		status    func(*v1alpha1.WhatsAppSessionStatus)
		op        Operation // the first one
		phase     v1alpha1.Phase
		rests     bool
		marked    bool
	}{
		{name: "none", op: OpDial, phase: v1alpha1.PhaseConnecting},
		{name: "one: any process dies once", unsettled: 1, op: OpDial, phase: v1alpha1.PhaseConnecting},
		{name: "a few: a worker that is killed again and again leaves them", unsettled: suspectAfter - 1, op: OpDial, phase: v1alpha1.PhaseConnecting},
		{name: "many: it is marked before it is tried", unsettled: suspectAfter, phase: v1alpha1.PhaseConnecting, marked: true},
		{name: "many, but it was never tried apart: others may be the cause", unsettled: 9, phase: v1alpha1.PhaseConnecting, marked: true},
		{
			name: "its trial has ended its worker", unsettled: suspectAfter + 1, phase: v1alpha1.PhaseFailed, rests: true,
			status: func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryReason = v1alpha1.ReasonEndsItsWorker },
		},
		{
			name: "it rests, and its worker died of something else", unsettled: suspectAfter + 2, phase: v1alpha1.PhaseFailed, rests: true,
			status: func(s *v1alpha1.WhatsAppSessionStatus) {
				s.RetryReason, s.RetryAfter = v1alpha1.ReasonEndsItsWorker, in(time.Hour)
			},
		},
		{
			name: "it has rested: it is tried again", unsettled: suspectAfter + 2, phase: v1alpha1.PhaseConnecting, marked: true,
			status: func(s *v1alpha1.WhatsAppSessionStatus) {
				s.RetryReason, s.RetryAfter = v1alpha1.ReasonEndsItsWorker, in(-time.Second)
			},
		},
		{
			name: "its trial was settled", op: OpDial, phase: v1alpha1.PhaseConnecting,
			status: func(s *v1alpha1.WhatsAppSessionStatus) { s.RetryReason = v1alpha1.ReasonEndsItsWorker },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			p := newPlay(session(func(s *v1alpha1.WhatsAppSession) {
				if tt.status != nil {
					tt.status(&s.Status)
				}
			}), func() float64 { return 0.5 })
			op := p.goOn(tt.unsettled)
			g.Expect(op).To(Equal(tt.op))
			g.Expect(p.want.Phase).To(Equal(tt.phase))
			g.Expect(marked(p.want)).To(Equal(tt.marked))
			g.Expect(endsItsWorker(p.want, p.now)).To(Equal(tt.rests))
			if tt.rests {
				g.Expect(p.want.RetryAfter.Sub(p.now)).To(BeNumerically(">=", 30*time.Minute))
				s, _ := p.wantedStatus(p.now)
				g.Expect(stalledCondition(s)).To(Equal("True/EndsItsWorker"))
			}
			if tt.marked {
				p.write()
				g.Expect(p.goOn(tt.unsettled)).To(Equal(OpDial), "the API server has the mark")
			}
		})
	}
}

// goOn carries out what comes before the first connection, and returns what is then to be done.
func (p *play) goOn(unsettled int32) Operation {
	for range 10 {
		op := p.next()
		switch op {
		case OpToken:
			p.Step(TokenResult{Granted: true}, p.now)
		case OpTake:
			p.Step(Taken{Epoch: p.Object().Status.Epoch, Device: Device{Starts: 1, JID: jid, PhoneNumber: phone, Unsettled: unsettled}}, p.now)
		case OpSettle:
			p.Step(Settled{}, p.now)
		case OpNone:
			if p.taken {
				return op
			}
		default:
			return op
		}
		if !p.taken {
			p.write()
		}
	}
	return OpNone
}

func stalledCondition(s v1alpha1.WhatsAppSessionStatus) string {
	for _, c := range s.Conditions {
		if c.Type == v1alpha1.ConditionStalled {
			return string(c.Status) + "/" + c.Reason
		}
	}
	return ""
}

func TestATakingIsSettled(t *testing.T) {
	t.Run("after a minute, and not at once", func(t *testing.T) {
		g := NewWithT(t)
		p := newPlay(session(), func() float64 { return 0.5 })
		g.Expect(p.goOn(1)).To(Equal(OpDial))
		p.Step(Dialed{Paired: true}, p.now)
		p.Step(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, p.now)
		g.Expect(p.next()).To(Equal(OpNone))
		p.now = p.now.Add(settleAfter - time.Second)
		g.Expect(p.next()).To(Equal(OpNone))
		p.now = p.now.Add(settleAfter)
		g.Expect(p.next()).To(Equal(OpSettle))
		p.Step(Settled{Failed: true}, p.now)
		g.Expect(p.next()).To(Equal(OpNone))
		p.now = p.now.Add(settleRetry)
		g.Expect(p.next()).To(Equal(OpSettle), "a failure is repeated, with a pause")
		p.Step(Settled{}, p.now)
		p.now = p.now.Add(time.Hour)
		g.Expect(p.next()).To(Equal(OpNone))
	})
	t.Run("at an orderly end, after the socket and before the release", func(t *testing.T) {
		g := NewWithT(t)
		p := newPlay(session(), func() float64 { return 0.5 })
		g.Expect(p.goOn(0)).To(Equal(OpDial))
		p.Step(Dialed{Paired: true}, p.now)
		p.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
		g.Expect(p.next()).To(Equal(OpClose))
		p.Step(Closed{}, p.now)
		g.Expect(p.next()).To(Equal(OpSettle))
		p.write()
		g.Expect(p.Object().Status.HeldBy).To(Equal(me), "not before")
		p.Step(Settled{Failed: true}, p.now)
		p.Step(Published{}, p.now)
		g.Expect(p.next()).To(Equal(OpNone), "once: a database that is away does not hold the release up")
		p.write()
		g.Expect(p.Object().Status.HeldBy).To(BeEmpty())
	})
	t.Run("not where it was not tried", func(t *testing.T) {
		g := NewWithT(t)
		p := newPlay(session(func(s *v1alpha1.WhatsAppSession) { s.Status.RetryReason = v1alpha1.ReasonEndsItsWorker }), func() float64 { return 0.5 })
		g.Expect(p.goOn(suspectAfter)).To(Equal(OpNone))
		p.now = p.now.Add(3 * settleAfter)
		g.Expect(p.next()).To(Equal(OpNone))
	})
}

func TestEndsItsWorkerIsTold(t *testing.T) {
	g := NewWithT(t)
	p := newPlay(session(func(s *v1alpha1.WhatsAppSession) { s.Status.RetryReason = v1alpha1.ReasonEndsItsWorker }), func() float64 { return 0.5 })
	var events []RecordedEvent
	for range 6 {
		d := p.Next(p.now)
		events = append(events, d.Events...)
		switch d.Operation {
		case OpToken:
			p.Step(TokenResult{Granted: true}, p.now)
		case OpTake:
			p.Step(Taken{Epoch: 100, Device: Device{JID: jid, PhoneNumber: phone, Unsettled: suspectAfter}}, p.now)
		}
		p.write()
	}
	g.Expect(events).To(HaveLen(1))
	g.Expect(events[0].Type).To(Equal(corev1.EventTypeWarning))
	g.Expect(events[0].Reason).To(Equal(v1alpha1.ReasonEndsItsWorker))

	t.Log("a person has it tried again, once: a death is not blamed on the same annotation twice")
	p.change(func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
	})
	g.Expect(p.next()).To(Equal(OpNone))
	g.Expect(marked(p.want)).To(BeTrue())
	p.write()
	g.Expect(p.next()).To(Equal(OpDial))
	left := p.Object().DeepCopy()
	left.Status.HolderStart = "died"
	next := newPlay(left, func() float64 { return 0.5 })
	g.Expect(next.goOn(suspectAfter + 1)).To(Equal(OpNone))
	g.Expect(endsItsWorker(next.want, next.now)).To(BeTrue())
}

func TestTrialsComeOneAfterTheOther(t *testing.T) {
	g := NewWithT(t)
	var trials Trials
	g.Expect(trials.Begin("a", trialShort, noon)).To(BeTrue())
	g.Expect(trials.Begin("b", trialShort, noon.Add(5*time.Second))).To(BeFalse())
	g.Expect(trials.Begin("a", trialShort, noon.Add(8*time.Second))).To(BeTrue(), "its connection is open now")
	g.Expect(trials.Begin("b", trialShort, noon.Add(trialShort+trialMargin))).To(BeFalse())
	g.Expect(trials.Begin("b", trialShort, noon.Add(8*time.Second+trialShort+trialMargin))).To(BeTrue())
}

// farm is workers with many sessions, one of which ends every process that connects it.
type farm struct {
	now       time.Time
	sessions  map[types.UID]*v1alpha1.WhatsAppSession
	machines  map[types.UID]*play
	unsettled map[types.UID]int32
	connected map[types.UID]bool
	trials    Trials
	processes int
	// dialed is when the culprit was connected; zero: it is not.
	dialed time.Time
}

type farmFleet struct {
	noFleet
	f *farm
}

func (f farmFleet) Trial(uid types.UID, lasts time.Duration, now time.Time) bool {
	return f.f.trials.Begin(uid, lasts, now)
}

// start begins a process that is to have all sessions.
func (f *farm) start(r *rand.Rand) {
	f.processes++
	f.trials, f.machines, f.connected, f.dialed = Trials{}, map[types.UID]*play{}, map[types.UID]bool{}, time.Time{}
	for uid, s := range f.sessions {
		s = s.DeepCopy()
		s.Status.HeldBy, s.Status.HolderStart, s.Status.Epoch = "", "", s.Status.Epoch+1
		s.Status.Phase = v1alpha1.PhaseDisconnected
		p := &play{Machine: New(Config{Worker: me, Process: fmt.Sprint("p", f.processes), Random: r.Float64, Fleet: farmFleet{f: f}}), now: f.now, starts: map[Operation][]time.Time{}}
		p.Step(Observed{Object: s}, f.now)
		f.machines[uid] = p
	}
}

// The sessions that die with the one that ends their workers are not taken for it.
func TestOnlyTheSessionThatEndsItsWorkersRests(t *testing.T) {
	const many, culprit = 12, types.UID("uid-7")
	for _, tt := range []struct {
		name string
		// after is how long the culprit's connection lasts until its process dies.
		after time.Duration
		most  int // processes that die
		// along is how many others may rest with it: those that are being tried when it happens.
		along int
	}{
		{name: "at the login", most: suspectAfter + 1},
		{name: "half a minute later", after: 30 * time.Second, most: suspectAfter + 6, along: longAfter - suspectAfter},
	} {
		t.Run(tt.name, func(t *testing.T) {
			seed := uint64(time.Now().UnixNano())
			t.Logf("SEED=%d", seed)
			g, r := NewWithT(t), rand.New(rand.NewPCG(seed, 0))
			f := &farm{now: noon, sessions: map[types.UID]*v1alpha1.WhatsAppSession{}, unsettled: map[types.UID]int32{}}
			for i := range many {
				s := session(func(s *v1alpha1.WhatsAppSession) { s.UID = types.UID(fmt.Sprint("uid-", i)) })
				f.sessions[s.UID] = s
			}
			f.start(r)
			for ; f.now.Before(noon.Add(25 * time.Minute)); f.now = f.now.Add(time.Second) {
				for uid, p := range f.machines {
					f.turn(uid, p, uid == culprit)
				}
				if !f.dialed.IsZero() && !f.now.Before(f.dialed.Add(tt.after)) {
					f.start(r)
				}
			}
			g.Expect(f.processes-1).To(BeNumerically("<=", tt.most), "processes that died")
			resting := 0
			for uid, s := range f.sessions {
				rests := endsItsWorker(s.Status, f.now)
				g.Expect(f.connected[uid]).To(Equal(!rests), "%s", uid)
				if rests && uid != culprit {
					resting++
				}
			}
			g.Expect(endsItsWorker(f.sessions[culprit].Status, f.now)).To(BeTrue())
			g.Expect(resting).To(BeNumerically("<=", tt.along))
		})
	}
}

// turn lets a session do what is to be done in this second.
func (f *farm) turn(uid types.UID, p *play, isCulprit bool) {
	p.now = f.now
	for range 4 {
		switch p.next() {
		case OpToken:
			p.Step(TokenResult{Granted: true}, f.now)
		case OpTake:
			before := f.unsettled[uid]
			f.unsettled[uid]++
			p.Step(Taken{Epoch: p.Object().Status.Epoch, Device: Device{JID: jid, PhoneNumber: phone, Unsettled: before}}, f.now)
		case OpSettle:
			f.unsettled[uid] = 0
			p.Step(Settled{}, f.now)
		case OpDial:
			if isCulprit {
				f.dialed = f.now
			} else {
				f.connected[uid] = true
			}
			p.Step(Dialed{Paired: true}, f.now)
			p.Step(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, f.now)
		}
		p.write()
	}
	f.sessions[uid] = p.Object()
}

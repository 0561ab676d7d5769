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

// otherSessions is a fleet whose other sessions begin no trials.
type otherSessions struct {
	noFleet
	sessions int
}

func (o otherSessions) Sessions() int { return o.sessions }

// The number of unsettled takings decides what the next taking does.
func TestTakingsThatNothingHasSettled(t *testing.T) {
	rest := func(after time.Duration) func(*v1alpha1.WhatsAppSessionStatus) {
		return func(s *v1alpha1.WhatsAppSessionStatus) {
			s.Phase, s.RetryReason, s.RetryAfter = v1alpha1.PhaseFailed, v1alpha1.ReasonEndsItsWorker, in(after)
		}
	}
	for _, tt := range []struct {
		name      string
		unsettled int32
		trial     int32
		sessions  int // of the worker
		status    func(*v1alpha1.WhatsAppSessionStatus)
		op        Operation // the first one
		size      int32     // that is recorded
		rests     bool
	}{
		{name: "none", sessions: 3, op: OpDial},
		{name: "one: any process dies once", unsettled: 1, sessions: 3, op: OpDial},
		{name: "two of few: each is tried alone", unsettled: 2, sessions: 8, op: OpTrial, size: 1},
		{name: "two of many: others may be the cause", unsettled: 2, sessions: 9, op: OpDial},
		{name: "three of many: in a group", unsettled: 3, sessions: 9, op: OpTrial, size: 2},
		{name: "three of a thousand", unsettled: 3, sessions: 1000, op: OpTrial, size: 125},
		{name: "it was never in a trial: others may be the cause", unsettled: 9, sessions: 1000, op: OpTrial, size: 125},
		{name: "its group has ended its worker", unsettled: 4, trial: 125, sessions: 1000, op: OpTrial, size: 16},
		{name: "a smaller group", unsettled: 5, trial: 16, sessions: 40, op: OpTrial, size: 2},
		{name: "two were tried: alone", unsettled: 6, trial: 2, sessions: 1000, op: OpTrial, size: 1},
		{name: "its trial alone has ended its worker at the third death", unsettled: 3, trial: 1, sessions: 3, rests: true},
		{name: "it has many neighbours now", unsettled: 3, trial: 1, sessions: 1000, rests: true},
		{name: "at a later death: once more, because others were tried alone too", unsettled: 4, trial: 1, sessions: 3, op: OpTrial, size: aloneAgain},
		{name: "its second trial alone has ended its worker", unsettled: 5, trial: aloneAgain, sessions: 3, rests: true},
		{name: "it rests, and its worker died of something else", unsettled: 5, trial: 1, sessions: 9, status: rest(time.Hour), rests: true},
		{name: "so does it after two trials alone", unsettled: 6, trial: aloneAgain, sessions: 9, status: rest(time.Hour), rests: true},
		{name: "it has rested: it is tried alone", unsettled: 5, trial: 1, sessions: 1000, status: rest(-time.Second), op: OpTrial, size: aloneAgain},
		{name: "it has rested for the second time", unsettled: 5, trial: aloneAgain, sessions: 1000, status: rest(-time.Second), op: OpTrial, size: aloneAgain},
		{name: "it has rested, and was settled meanwhile", sessions: 3, status: rest(-time.Second), op: OpDial},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			p := newMachineTest(session(func(s *v1alpha1.WhatsAppSession) {
				if tt.status != nil {
					tt.status(&s.Status)
				}
			}), func() float64 { return 0.5 })
			p.fleet = otherSessions{sessions: tt.sessions}
			op, size := p.goOn(Device{Starts: 1, JID: jid, PhoneNumber: phone, Unsettled: tt.unsettled, Trial: tt.trial})
			g.Expect(op).To(Equal(tt.op))
			g.Expect(size).To(Equal(tt.size))
			g.Expect(endsItsWorker(p.want, p.now)).To(Equal(tt.rests))
			if tt.rests {
				g.Expect(p.want.Phase).To(Equal(v1alpha1.PhaseFailed))
				g.Expect(p.want.RetryAfter.Sub(p.now)).To(BeNumerically(">=", 30*time.Minute))
				s, _ := p.wantedStatus(p.now)
				g.Expect(stalledCondition(s)).To(Equal("True/EndsItsWorker"))
				return
			}
			g.Expect(p.want.Phase).To(Equal(v1alpha1.PhaseConnecting))
			g.Expect(p.want.RetryReason).To(BeEmpty())
			if tt.op != OpTrial {
				return
			}
			p.Step(TrialRecorded{Failed: true}, p.now)
			g.Expect(p.next()).To(Equal(OpNone), "no connection before the store has the size")
			p.now = p.now.Add(2 * trialPoll)
			g.Expect(p.next()).To(Equal(OpTrial))
			p.Step(TrialRecorded{}, p.now)
			g.Expect(p.next()).To(Equal(OpDial))
		})
	}
}

// goOn carries out what comes before the first connection, and returns what is then to be
// done, with the size of the group that must be recorded.
func (p *machineTest) goOn(device Device) (op Operation, size int32) {
	for range 10 {
		d := p.Next(p.now)
		switch d.Operation {
		case OpToken:
			p.Step(TokenResult{Granted: true}, p.now)
		case OpTake:
			p.Step(Taken{Epoch: p.Object().Status.Epoch, Device: device}, p.now)
		case OpSettle:
			p.Step(Settled{}, p.now)
		case OpNone:
			if _, needed := p.Status(p.now); p.taken && !needed {
				return OpNone, 0
			}
		default:
			return d.Operation, d.Trial
		}
		p.write()
	}
	return OpNone, 0
}

func paired(unsettled, trial int32) Device {
	return Device{Starts: 1, JID: jid, PhoneNumber: phone, Unsettled: unsettled, Trial: trial}
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
		p := newMachineTest(session(), func() float64 { return 0.5 })
		op, _ := p.goOn(paired(1, 0))
		g.Expect(op).To(Equal(OpDial))
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
	for name, device := range map[string]Device{"at an orderly end": paired(0, 0), "at an orderly end during its trial": paired(2, 0)} {
		t.Run(name+", after the socket and before the release", func(t *testing.T) {
			g := NewWithT(t)
			p := newMachineTest(session(), func() float64 { return 0.5 })
			op, _ := p.goOn(device)
			if op == OpTrial {
				p.Step(TrialRecorded{}, p.now)
				op = p.next()
			}
			g.Expect(op).To(Equal(OpDial))
			p.Step(Dialed{Paired: true}, p.now)
			p.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = "worker-b", 101 })
			g.Expect(p.next()).To(Equal(OpClose))
			p.Step(Closed{}, p.now)
			g.Expect(p.next()).To(Equal(OpSettle))
			p.write()
			g.Expect(p.Object().Status.HeldBy).To(Equal(me), "not before")
			p.Step(Settled{Failed: true}, p.now)
			p.Step(Published{}, p.now)
			g.Expect(p.next()).To(Equal(OpNone), "once: a database that is away does not delay the release")
			p.write()
			g.Expect(p.Object().Status.HeldBy).To(BeEmpty())
		})
	}
	t.Run("not while the session rests", func(t *testing.T) {
		g := NewWithT(t)
		p := newMachineTest(session(), func() float64 { return 0.5 })
		op, _ := p.goOn(paired(2, 1))
		g.Expect(op).To(Equal(OpNone))
		p.now = p.now.Add(20 * time.Minute)
		g.Expect(p.next()).To(Equal(OpNone))
	})
}

func TestASurvivedTrialIsRecorded(t *testing.T) {
	g := NewWithT(t)
	p := newMachineTest(session(), func() float64 { return 0.5 })
	op, _ := p.goOn(paired(2, 0))
	g.Expect(op).To(Equal(OpTrial))
	p.Step(TrialRecorded{}, p.now)
	g.Expect(p.next()).To(Equal(OpDial))
	p.Step(Dialed{Paired: true}, p.now)
	p.Step(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, p.now)
	p.now = p.now.Add(trialOfOne - time.Second)
	g.Expect(p.next()).To(Equal(OpNone))
	p.now = p.now.Add(time.Second)
	d := p.Next(p.now)
	g.Expect(d.Operation).To(Equal(OpTrial))
	g.Expect(d.Trial).To(BeZero())
	p.Step(TrialRecorded{Failed: true}, p.now)
	g.Expect(p.next()).To(Equal(OpNone))
	p.now = p.now.Add(settleRetry)
	d = p.Next(p.now)
	g.Expect(d.Operation).To(Equal(OpTrial), "a failure is repeated, with a pause")
	p.Step(TrialRecorded{}, p.now)
	g.Expect(p.next()).To(Equal(OpNone))

	t.Log("the connection ends: the next one needs no trial")
	p.Step(Event{Type: EventDisconnected, Message: "the network"}, p.now)
	g.Expect(p.next()).To(Equal(OpClose))
	p.Step(Closed{}, p.now)
	p.now = p.now.Add(backoffFirst)
	g.Expect(p.next()).To(Equal(OpDial))
}

func TestARestIsReported(t *testing.T) {
	g := NewWithT(t)
	p := newMachineTest(session(), func() float64 { return 0.5 })
	var events []RecordedEvent
	for range 6 {
		d := p.Next(p.now)
		events = append(events, d.Events...)
		switch d.Operation {
		case OpToken:
			p.Step(TokenResult{Granted: true}, p.now)
		case OpTake:
			p.Step(Taken{Epoch: 100, Device: paired(3, 1)}, p.now)
		}
		p.write()
	}
	g.Expect(events).To(HaveLen(1))
	g.Expect(events[0].Type).To(Equal(corev1.EventTypeWarning))
	g.Expect(events[0].Reason).To(Equal(v1alpha1.ReasonEndsItsWorker))

	t.Log("a person has it tried again, once: the next process does not act upon the same annotation")
	p.change(func(s *v1alpha1.WhatsAppSession) {
		s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: "now"}
	})
	g.Expect(p.next()).To(Equal(OpNone), "the API server must know that the annotation was acted upon")
	p.write()
	d := p.Next(p.now)
	g.Expect(d.Operation).To(Equal(OpTrial))
	g.Expect(d.Trial).To(BeEquivalentTo(aloneAgain))
	p.Step(TrialRecorded{}, p.now)
	g.Expect(p.next()).To(Equal(OpDial))
	left := p.Object().DeepCopy()
	left.Status.HolderStart = "died"
	next := newMachineTest(left, func() float64 { return 0.5 })
	op, _ := next.goOn(paired(4, aloneAgain))
	g.Expect(op).To(Equal(OpNone))
	g.Expect(endsItsWorker(next.want, next.now)).To(BeTrue())
}

func TestTrialsAreBounded(t *testing.T) {
	const lasts = trialOfOne
	over := lasts + trialMargin
	type begin struct {
		uid  types.UID
		size int32
		at   time.Duration
		want bool
	}
	for name, begins := range map[string][]begin{
		"alone": {
			{"a", 1, 0, true}, {"b", 1, 5 * time.Second, false},
			{"a", 1, 8 * time.Second, true}, // its connection is open now
			{"b", 1, over, false}, {"b", 1, 8*time.Second + over, true},
		},
		"a group": {
			{"a", 2, 0, true}, {"b", 2, time.Second, true}, {"c", 2, 2 * time.Second, false},
			{"c", 2, over, true}, {"d", 2, over, false},
		},
		"groups of different sizes, and one alone after them": {
			{"a", 3, 0, true}, {"b", 3, 0, true}, {"alone", 1, 0, false}, {"c", 2, 0, true}, {"d", 2, 0, true}, {"e", 2, 0, false},
			{"e", 3, 0, false}, {"e", 5, 0, true}, {"f", 5, 0, false},
			{"alone", 1, over, true}, {"f", 5, over, false}, {"f", 5, 2 * over, true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			var trials Trials
			for _, b := range begins {
				g.Expect(trials.Begin(b.uid, b.size, lasts, noon.Add(b.at))).To(Equal(b.want), "%+v", b)
			}
		})
	}
}

// allGroups is how long eight sessions alone and as many groups may take.
const allGroups = trialGroups * (trialOfOne + trialOfGroup + 2*(trialMargin+2*trialPoll))

// dyingWorker is a worker with many sessions, whose processes die.
type dyingWorker struct {
	random    *rand.Rand
	now       time.Time
	order     []types.UID
	sessions  map[types.UID]*v1alpha1.WhatsAppSession
	machines  map[types.UID]*machineTest
	unsettled map[types.UID]int32
	groups    map[types.UID]int32 // the sizes of the groups, as the store has them
	connected map[types.UID]bool
	trials    Trials
	processes int
	cause     types.UID
	// connectedAt is when the cause was connected; zero: it is not.
	connectedAt time.Time
}

type dyingWorkerFleet struct {
	noFleet
	f *dyingWorker
}

func (f dyingWorkerFleet) Sessions() int { return len(f.f.sessions) }

func (f dyingWorkerFleet) Trial(uid types.UID, size int32, lasts time.Duration, now time.Time) bool {
	return f.f.trials.Begin(uid, size, lasts, now)
}

func newDyingWorker(t *testing.T, sessions int) *dyingWorker {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return newDyingWorkerOf(seed, sessions)
}

func newDyingWorkerOf(seed uint64, sessions int) *dyingWorker {
	f := &dyingWorker{
		random: rand.New(rand.NewPCG(seed, 0)), now: noon,
		sessions: map[types.UID]*v1alpha1.WhatsAppSession{}, unsettled: map[types.UID]int32{}, groups: map[types.UID]int32{},
	}
	for i := range sessions {
		s := session(func(s *v1alpha1.WhatsAppSession) { s.UID = types.UID(fmt.Sprint("uid-", i)) })
		f.sessions[s.UID] = s
		f.order = append(f.order, s.UID)
	}
	f.start()
	return f
}

// start begins a process that takes all sessions.
func (f *dyingWorker) start() {
	f.processes++
	f.trials, f.machines, f.connected, f.connectedAt = Trials{}, map[types.UID]*machineTest{}, map[types.UID]bool{}, time.Time{}
	f.random.Shuffle(len(f.order), func(i, j int) { f.order[i], f.order[j] = f.order[j], f.order[i] })
	for _, uid := range f.order {
		s := f.sessions[uid].DeepCopy()
		s.Status.HeldBy, s.Status.HolderStart, s.Status.Epoch = "", "", s.Status.Epoch+1
		s.Status.Phase = v1alpha1.PhaseDisconnected
		p := &machineTest{Machine: New(Config{Worker: me, Process: fmt.Sprint("p", f.processes), Random: f.random.Float64, Fleet: dyingWorkerFleet{f: f}}), now: f.now, starts: map[Operation][]time.Time{}}
		p.Step(Observed{Object: s}, f.now)
		f.machines[uid] = p
	}
}

// second lets all sessions do what is due, in random order.
func (f *dyingWorker) second() {
	for _, uid := range f.order {
		f.turn(uid, f.machines[uid])
	}
	f.now = f.now.Add(time.Second)
}

func (f *dyingWorker) turn(uid types.UID, p *machineTest) {
	p.now = f.now
	for range 5 {
		d := p.Next(f.now)
		switch d.Operation {
		case OpToken:
			p.Step(TokenResult{Granted: true}, f.now)
		case OpTake:
			p.Step(Taken{Epoch: p.Object().Status.Epoch, Device: paired(f.unsettled[uid], f.groups[uid])}, f.now)
			f.unsettled[uid]++
		case OpSettle:
			f.unsettled[uid], f.groups[uid] = 0, 0
			p.Step(Settled{}, f.now)
		case OpTrial:
			f.groups[uid] = d.Trial
			p.Step(TrialRecorded{}, f.now)
		case OpDial:
			if uid == f.cause {
				f.connectedAt = f.now
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

func (f *dyingWorker) resting() (uids []types.UID) {
	for uid, s := range f.sessions {
		if endsItsWorker(s.Status, f.now) {
			uids = append(uids, uid)
		}
	}
	return uids
}

// The session that ends its workers is found, and the others are back soon.
func TestOnlyTheSessionThatEndsItsWorkersRests(t *testing.T) {
	for _, tt := range []struct {
		sessions int
		// after is how long the connection lasts until its process dies.
		after time.Duration
		// deaths bounds the processes that die, along the others that may rest with it:
		// those that are tried when it happens.
		deaths, along int
	}{
		{sessions: 1, deaths: 3},
		{sessions: 3, deaths: 3},
		{sessions: 8, deaths: 3},
		{sessions: 9, deaths: 6},
		{sessions: 60, deaths: 6},
		{sessions: 200, deaths: 7},
		{sessions: 12, after: 30 * time.Second, deaths: 12, along: 3},
	} {
		t.Run(fmt.Sprintf("%d sessions, after %s", tt.sessions, tt.after), func(t *testing.T) {
			g := NewWithT(t)
			f := newDyingWorker(t, tt.sessions)
			f.cause = "uid-0"
			lastDeath := noon
			for f.now.Before(lastDeath.Add(15 * time.Minute)) {
				f.second()
				if !f.connectedAt.IsZero() && !f.now.Before(f.connectedAt.Add(tt.after)) {
					f.start()
					lastDeath = f.now
				}
				if len(f.connected) == tt.sessions-1 && len(f.resting()) == 1 {
					break
				}
			}
			g.Expect(f.processes-1).To(BeNumerically("<=", tt.deaths), "processes that died")
			g.Expect(endsItsWorker(f.sessions[f.cause].Status, f.now)).To(BeTrue())
			resting := len(f.resting())
			g.Expect(resting - 1).To(BeNumerically("<=", tt.along))
			g.Expect(f.connected).To(HaveLen(tt.sessions - resting))
			if tt.after == 0 {
				g.Expect(f.now).To(BeTemporally("<=", lastDeath.Add(allGroups)), "all others are connected")
			}
		})
	}
}

// A worker that is killed again and again for another reason gets its sessions back.
func TestAKilledWorkerHasAllItsSessionsBackSoon(t *testing.T) {
	for _, tt := range []struct{ sessions, kills, rest int }{
		{sessions: 3, kills: 2},
		{sessions: 3, kills: 3, rest: 1}, // the one that was tried alone at the third
		{sessions: 30, kills: 3},
		{sessions: 30, kills: 4},
		{sessions: 200, kills: 2},
		{sessions: 200, kills: 4},
	} {
		t.Run(fmt.Sprintf("%d sessions, %d kills", tt.sessions, tt.kills), func(t *testing.T) {
			g := NewWithT(t)
			f := newDyingWorker(t, tt.sessions)
			for range tt.kills {
				for range 5 + f.random.IntN(40) {
					f.second()
				}
				f.start()
			}
			killed := f.now
			for f.now.Before(killed.Add(10*time.Minute)) && len(f.connected)+len(f.resting()) < tt.sessions {
				f.second()
			}
			g.Expect(len(f.resting())).To(BeNumerically("<=", tt.rest))
			g.Expect(f.connected).To(HaveLen(tt.sessions - len(f.resting())))
			within := time.Duration(0)
			if tt.kills >= suspectAfter || tt.sessions <= trialGroups {
				within = allGroups
			}
			g.Expect(f.now.Sub(killed)).To(BeNumerically("<=", within+2*time.Second))
		})
	}
}

// A worker with few sessions that is killed many times in a row, each time while the sessions
// are tried one after the other.
func TestManyKillsHardlyBlameASession(t *testing.T) {
	const runs, kills = 15, 6
	g := NewWithT(t)
	rests := 0
	for seed := range uint64(runs) {
		f := newDyingWorkerOf(seed, 10)
		for range kills {
			for range 35 + f.random.IntN(20) {
				f.second()
			}
			f.start()
		}
		f.second()
		rests += len(f.resting())
	}
	g.Expect(rests).To(BeZero(), "of %d runs", runs)
}

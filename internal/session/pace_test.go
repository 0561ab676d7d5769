package session

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func TestPace(t *testing.T) {
	g := NewWithT(t)
	p := &Pace{}
	now, starts := noon, 0
	for ; now.Before(noon.Add(time.Minute)); now = now.Add(10 * time.Millisecond) {
		if p.allows(OpDial, now) {
			p.start(OpDial, now)
			starts++
		}
	}
	g.Expect(starts).To(Equal(8), "three at once, then after 1, 2, 4, 8 and 16 seconds")
	g.Expect(p.allows(OpTake, now)).To(BeTrue(), "each step has its own pace")
	g.Expect(p.from(OpDial).Sub(now)).To(BeNumerically("<=", paceMax))
	g.Expect(p.Expired(now)).To(BeFalse())
	g.Expect(p.Expired(now.Add(paceReset + time.Minute))).To(BeTrue())
	now = now.Add(paceReset + time.Minute)
	for range paceFree {
		g.Expect(p.allows(OpDial, now)).To(BeTrue(), "immediate again")
		p.start(OpDial, now)
	}
	g.Expect(p.allows(OpDial, now)).To(BeFalse())
	p.reset()
	g.Expect(p.allows(OpDial, now)).To(BeTrue())
}

// machineTest is a machine with a fake API server that keeps its status.
type machineTest struct {
	*Machine
	now     time.Time
	version int
	// starts has the times at which steps were started, and writes those at which the status
	// was written.
	starts map[Operation][]time.Time
	writes []time.Time
	held   bool
}

func newMachineTest(obj *v1alpha1.WhatsAppSession, random func() float64) *machineTest {
	p := &machineTest{Machine: newMachine(me, process, random), now: noon, starts: map[Operation][]time.Time{}}
	p.Step(Observed{Object: obj}, p.now)
	return p
}

// change changes the object as another writer does, and shows it to the machine.
func (p *machineTest) change(f func(*v1alpha1.WhatsAppSession)) {
	obj := p.Object().DeepCopy()
	f(obj)
	p.version++
	obj.ResourceVersion = strconv.Itoa(p.version)
	p.Step(Observed{Object: obj}, p.now)
}

// next asks the machine for its decision and returns the operation, which the test must
// carry out.
func (p *machineTest) next() Operation {
	d := p.Next(p.now)
	if d.Operation != OpNone && d.Operation != OpClose {
		p.starts[d.Operation] = append(p.starts[d.Operation], p.now)
	}
	return d.Operation
}

// write writes the status to the API server, and shows the object to the machine.
func (p *machineTest) write() {
	wanted, needed := p.Status(p.now)
	if !needed {
		return
	}
	p.writes = append(p.writes, p.now)
	if wanted.HeldBy != "" && !p.held {
		p.starts[claim] = append(p.starts[claim], p.now)
	}
	p.held = wanted.HeldBy != ""
	p.change(func(s *v1alpha1.WhatsAppSession) { s.Status = wanted })
}

// maxWithin returns the highest number of times within any span of that length.
func maxWithin(times []time.Time, span time.Duration) (most int) {
	first := 0
	for i, t := range times {
		for !times[first].Add(span).After(t) {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// A linked session is deleted, and its proxy's Secret is missing, forbidden or invalid: a
// namespace that is being deleted loses its Secrets first.
func TestADeletedSessionKeepsItsBackoff(t *testing.T) {
	for _, reason := range []string{v1alpha1.ReasonProxySecretMissing, v1alpha1.ReasonProxySecretForbidden, v1alpha1.ReasonProxySecretInvalid} {
		t.Run(reason, func(t *testing.T) {
			g := NewWithT(t)
			p := newMachineTest(session(), func() float64 { return 0.5 })
			begun := p.now
			for p.now.Before(begun.Add(2 * time.Minute)) {
				switch p.next() {
				case OpToken:
					p.Step(TokenResult{Granted: true}, p.now)
				case OpTake:
					p.Step(Taken{Epoch: 100, Device: Device{Starts: 1, JID: jid, PhoneNumber: phone}}, p.now)
				case OpDial:
					p.Step(SetupInvalid{Reason: reason, Message: "create it"}, p.now)
				}
				p.write()
				if p.now.Equal(begun.Add(time.Second)) {
					p.change(deleted)
					p.writes = nil
				}
				if p.Object().DeletionTimestamp != nil {
					g.Expect(p.want.Phase).To(Equal(v1alpha1.PhaseTerminating))
				}
				p.now = p.now.Add(10 * time.Millisecond)
			}
			g.Expect(p.reason).To(Equal(reason), "the status says why")
			g.Expect(p.message).To(Equal("create it"))
			g.Expect(len(p.starts[OpDial])).To(And(BeNumerically(">=", 4), BeNumerically("<=", 8)), "with pauses in between")
			g.Expect(len(p.starts[OpToken])).To(BeNumerically("<=", 8))
			g.Expect(len(p.writes)).To(BeNumerically("<=", 4))
		})
	}
}

// No sequence of inputs makes the machine repeat a step in a hot loop.
func TestNoInputMakesAHotLoop(t *testing.T) {
	const (
		tick  = 100 * time.Millisecond
		lasts = 5 * time.Minute
		// In a minute a step is started 8 times at most, and as often again after a stable
		// minute and after a restart, which both come once a minute at most.
		most = 3 * 8
	)
	seed := seedOf(t)
	for run := range 6 {
		r := rand.New(rand.NewPCG(seed, uint64(run)))
		p := newMachineTest(session(), r.Float64)
		// The inputs have different frequencies in each run.
		weights := make([]float64, len(inputs))
		for i := range weights {
			weights[i] = r.Float64() * r.Float64() * r.Float64()
		}
		slow := r.Float64() / 5 // the share of operations that take longer than one tick
		operation := OpNone
		for ; p.now.Before(noon.Add(lasts)); p.now = p.now.Add(tick) {
			for i, input := range inputs {
				if r.Float64() < weights[i] {
					input(p, r)
				}
			}
			for range 3 {
				if operation == OpNone {
					operation = p.next()
				}
				if operation == OpNone || r.Float64() < slow {
					break
				}
				p.Step(result(operation, p, r), p.now)
				operation = OpNone
				if r.IntN(10) > 0 {
					p.write()
				}
			}
			p.write()
		}
		for op, times := range p.starts {
			if n := maxWithin(times, time.Minute); n > most {
				t.Fatalf("SEED=%d, run %d: %s was started %d times in a minute", seed, run, op, n)
			}
		}
	}
}

// inputs are changes that other people and programs may make at any time.
var inputs = []func(p *machineTest, r *rand.Rand){
	func(p *machineTest, _ *rand.Rand) { // a new version of the object without any change
		p.change(func(*v1alpha1.WhatsAppSession) {})
	},
	func(p *machineTest, _ *rand.Rand) { // no worker has room, or one has room again
		p.change(func(s *v1alpha1.WhatsAppSession) {
			if s.Status.Worker == "" {
				s.Status.Worker = me
			} else {
				s.Status.Worker = ""
			}
			s.Status.Epoch++
		})
	},
	func(p *machineTest, r *rand.Rand) { // moved to another worker, back, or to the same worker
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.Status.Worker = []string{me, me, "worker-b"}[r.IntN(3)]
			s.Status.Epoch = max(s.Status.Epoch, s.Status.StoredEpoch) + 1
		})
	},
	func(p *machineTest, _ *rand.Rand) { // declared dead while it runs
		p.change(func(s *v1alpha1.WhatsAppSession) { s.Status.HeldBy, s.Status.HolderStart = "", ""; s.Status.Epoch++ })
		p.held = false
	},
	func(p *machineTest, _ *rand.Rand) { // suspended or resumed, and the manager removes or places it
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.Spec.Suspend = !s.Spec.Suspend
			s.Status.Worker = map[bool]string{false: me, true: ""}[s.Spec.Suspend]
			s.Status.Epoch++
		})
	},
	func(p *machineTest, r *rand.Rand) { // restarted
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.Annotations = map[string]string{v1alpha1.RestartedAtAnnotation: strconv.Itoa(r.Int())}
		})
	},
	func(p *machineTest, r *rand.Rand) { // a passkey's answer, and a confirmation
		site := sha256.Sum256([]byte(WhatsAppPage))
		data := base64.RawURLEncoding.EncodeToString(append(site[:], make([]byte, 5)...))
		clientData := base64.RawURLEncoding.EncodeToString([]byte(`{"type":"webauthn.get","challenge":"AAAA","origin":"https://web.whatsapp.com"}`))
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.Annotations = map[string]string{
				v1alpha1.PasskeyResponseAnnotation: `{"id":"AAAA","rawId":"AAAA","type":"public-key","response":{"clientDataJSON":"` + clientData + `","authenticatorData":"` + data + `","signature":"AAAA"}}` +
					strings.Repeat(" ", r.IntN(3)),
				v1alpha1.PasskeyConfirmAnnotation: []string{"ABCD-1234", "other"}[r.IntN(2)],
			}
		})
	},
	func(p *machineTest, r *rand.Rand) { // another proxy
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.Spec.Proxy = &v1alpha1.ProxySpec{SecretRef: v1alpha1.SecretReference{Name: fmt.Sprint("proxy-", r.IntN(3))}}
		})
	},
	func(p *machineTest, r *rand.Rand) { // another way of pairing, or another phone
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.Spec.Pairing.Method = []v1alpha1.PairingMethod{v1alpha1.PairingQRCode, v1alpha1.PairingPhoneCode}[r.IntN(2)]
			s.Spec.Pairing.PhoneNumber = []string{phone, "+34600111333"}[r.IntN(2)]
		})
	},
	func(p *machineTest, r *rand.Rand) { // deleted, with one policy or the other
		if r.IntN(200) > 0 { // rarely, because it is final
			return
		}
		p.change(func(s *v1alpha1.WhatsAppSession) {
			if s.DeletionTimestamp.IsZero() {
				s.DeletionTimestamp = &metav1.Time{Time: p.now}
			}
		})
	},
	func(p *machineTest, r *rand.Rand) {
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.Spec.DeletionPolicy = []v1alpha1.DeletionPolicy{v1alpha1.DeletionLogout, v1alpha1.DeletionRetain}[r.IntN(2)]
		})
	},
	func(p *machineTest, _ *rand.Rand) { p.Step(ResumeSoon{}, p.now) },
	func(p *machineTest, _ *rand.Rand) { p.Step(RetryOutdated{}, p.now) },
	func(p *machineTest, _ *rand.Rand) { p.Step(PublishAgain{}, p.now) },
	func(p *machineTest, r *rand.Rand) { // an event of the connection
		kinds := []EventType{
			EventQR, EventCodesReplaced, EventPairingCode, EventCodeRefused, EventPairSuccess, EventPairError, EventConnected, EventConnected,
			EventDisconnected, EventDisconnected, EventLoggedOut, EventReplaced, EventBanned, EventOutdated, EventPushName,
			EventPasskeyRequest, EventPasskeyConfirmation, EventPasskeyFailed,
		}
		e := Event{Type: kinds[r.IntN(len(kinds))], JID: jid, PhoneNumber: phone, Code: "ABCD-1234", PasskeyOptions: `{"challenge":"AAAA"}`, Codes: []string{strconv.Itoa(r.Int())}}
		e.Until = p.now.Add(time.Duration(r.IntN(120)-30) * time.Second)
		e.Reason, e.Ours = []string{EndSocketClosed, "StreamError503"}[r.IntN(2)], r.IntN(3) == 0
		e.Continuation = r.IntN(2) == 0
		p.Step(e, p.now)
	},
}

// result returns a random result of an operation.
func result(op Operation, p *machineTest, r *rand.Rand) Input {
	failures := []Input{
		Failed{Reason: v1alpha1.ReasonStoreUnavailable, Message: "the database cannot be reached"},
		SetupInvalid{Reason: v1alpha1.ReasonProxySecretMissing, Message: "create the Secret"},
		EpochBehind{Stored: p.Object().Status.Epoch + int64(r.IntN(5))},
		Cancelled{},
	}
	failed := failures[r.IntN(len(failures))]
	ok := r.IntN(3) > 0
	switch op {
	case OpToken:
		return TokenResult{Granted: ok}
	case OpTake:
		device := Device{Starts: r.Int64N(100), Unsettled: r.Int32N(9), Trial: r.Int32N(4)}
		if r.IntN(2) > 0 {
			device.JID, device.PhoneNumber = jid, phone
		}
		if ok {
			return Taken{Epoch: p.Object().Status.Epoch, Device: device}
		}
		if r.IntN(4) == 0 {
			return NoRecord{}
		}
	case OpDial:
		if ok {
			return Dialed{Paired: p.Paired(), Cancelled: r.IntN(5) == 0}
		}
	case OpClose:
		return Closed{}
	case OpLogout:
		return LogoutResult{Failed: !ok}
	case OpSettle:
		return Settled{Failed: !ok}
	case OpPasskeyAnswer:
		return PasskeyAnswered{Why: []string{"", "refused"}[r.IntN(2)]}
	case OpPasskeyConfirm:
		return PasskeyConfirmed{Why: []string{"", "refused"}[r.IntN(2)]}
	case OpTrial:
		return TrialRecorded{Failed: !ok}
	case OpVerify:
		if ok {
			return Verified{SameAccount: r.IntN(2) > 0}
		}
		return VerifyFailed{}
	case OpForget:
		if ok && r.IntN(10) == 0 {
			return Forgotten{}
		}
	case OpNone:
	}
	return failed
}

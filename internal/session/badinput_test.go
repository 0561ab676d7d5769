package session

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	wapasskey "github.com/whatsapp-operator/whatsapp-operator/internal/simulator/passkey"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// server is a WhatsApp that plays events to each connection of a session. seconds counts those
// since the connection was opened.
type server func(p *machineTest, seconds int)

// traffic is what a session has caused while a server played its events.
type traffic struct{ events, writes, items, dials int }

// play runs a session against a server, with the clock in steps of a second.
func play(p *machineTest, lasts time.Duration, plays server) (t traffic) {
	open := -1
	for end := p.now.Add(lasts); p.now.Before(end); p.now = p.now.Add(time.Second) {
		if open >= 0 && p.socket == socketPairing {
			plays(p, open)
			open++
		}
		for range 5 {
			d := p.Next(p.now)
			t.events += len(d.Events)
			if d.Publication != nil {
				if d.Publication.NewQR || d.Publication.NewStatus {
					t.items++
				}
				p.Step(Published{}, p.now)
			}
			switch d.Operation {
			case OpToken:
				p.Step(TokenResult{Granted: true}, p.now)
			case OpTake:
				p.Step(Taken{Epoch: p.Object().Status.Epoch, Device: Device{Starts: 1}}, p.now)
			case OpDial:
				t.dials++
				open = 0
				p.Step(Dialed{}, p.now)
			case OpPasskeyAnswer:
				p.Step(PasskeyAnswered{}, p.now)
			case OpPasskeyConfirm:
				p.Step(PasskeyConfirmed{}, p.now)
			case OpClose:
				open = -1
				p.Step(Closed{}, p.now)
			case OpSettle:
				p.Step(Settled{}, p.now)
			default:
			}
			written := len(p.writes)
			p.write()
			t.writes += len(p.writes) - written
		}
	}
	return t
}

// A server that goes on changing what a person sees cannot flood the API server, Redis or
// Laravel, and the session rests when the time for its pairing is over.
func TestAServerThatAsksAgainAndAgain(t *testing.T) {
	mine := newAccount(t)
	n := 0
	request := func() string {
		n++
		return mine.request(challenge + strconv.Itoa(n))
	}
	ask := func(p *machineTest, until time.Time) {
		p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: request(), Until: until}, p.now)
	}
	codes := func(p *machineTest) {
		n++
		p.Step(Event{Type: EventQR, Codes: []string{fmt.Sprint("code ", n), fmt.Sprint("another code ", n)}}, p.now)
	}
	answer := func(p *machineTest) {
		if p.want.Passkey != nil && !p.passkey.sent {
			p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(p.want.Passkey.RequestOptions, wapasskey.Origin))
		}
	}
	for name, tt := range map[string]struct {
		plays server
		why   string
		dials int // 0: 75
	}{
		"a passkey each second, never answered": {func(p *machineTest, s int) {
			if s == 0 {
				codes(p)
			}
			ask(p, time.Time{})
		}, "asked for the passkey 4 times", 0},
		"a passkey each second, answered each time": {func(p *machineTest, s int) {
			if s == 0 {
				codes(p)
			}
			answer(p)
			ask(p, time.Time{})
		}, "asked for the passkey 4 times", 0},
		"a passkey without a code": {func(p *machineTest, _ int) {
			ask(p, time.Time{})
		}, "asked for the passkey 4 times", 0},
		"a passkey once on each connection, without a code": {func(p *machineTest, s int) {
			if s == 0 {
				ask(p, time.Time{})
			}
		}, "not answered in time", 0},
		"a passkey that is to be answered within a millisecond": {func(p *machineTest, s int) {
			if s == 0 {
				ask(p, p.now.Add(time.Millisecond))
			}
		}, "not answered in time", 10},
		"a passkey that was to be answered yesterday": {func(p *machineTest, s int) {
			if s == 0 {
				ask(p, p.now.Add(-24*time.Hour))
			}
		}, "not answered in time", 10},
		"codes and a passkey by turns": {func(p *machineTest, _ int) {
			codes(p)
			ask(p, time.Time{})
		}, "asked for the passkey 4 times", 0},
		"codes each second": {func(p *machineTest, _ int) { codes(p) }, "more than 10 times on one connection", 0},
		"another secret each second": {func(p *machineTest, s int) {
			if s == 0 {
				codes(p)
			}
			n++
			p.Step(Event{Type: EventCodesReplaced, Codes: []string{fmt.Sprint("code ", n), fmt.Sprint("another code ", n)}}, p.now)
		}, "more than 10 times on one connection", 0},
		"a code to compare each second": {func(p *machineTest, s int) {
			if s == 0 {
				ask(p, time.Time{})
			}
			answer(p)
			n++
			p.Step(Event{Type: EventPasskeyConfirmation, Code: fmt.Sprintf("CODE-%04d", n)}, p.now)
		}, "more than 10 times on one connection", 0},
		"a phone that is too old each second": {func(p *machineTest, s int) {
			if s == 0 {
				codes(p)
			}
			n++
			p.Step(Event{Type: EventPairError, Message: fmt.Sprint("update the phone ", n)}, p.now)
		}, "more than 10 times on one connection", 0},
		"requests that cannot be read": {func(p *machineTest, _ int) {
			p.Step(Event{Type: EventPasskeyFailed, Message: "no JSON"}, p.now)
		}, "no JSON", 0},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			p := newMachineTest(session(), func() float64 { return 0.5 })
			got := play(p, time.Hour, tt.plays)
			t.Logf("in an hour: %+v, %s: %s", got, p.reason, p.message)
			// Each connection has 10 changes and its own end at most, and the pauses between the
			// connections grow to a minute.
			g.Expect(got.dials).To(BeNumerically("<=", cmp.Or(tt.dials, 75)))
			g.Expect(got.events).To(BeNumerically("<=", 250))
			g.Expect(got.writes).To(BeNumerically("<=", 300))
			g.Expect(got.items).To(BeNumerically("<=", 300))
			g.Expect(p.want.Phase).To(Equal(v1alpha1.PhasePairingExpired), "it rests")
			g.Expect(p.message).To(And(ContainSubstring(tt.why), ContainSubstring(v1alpha1.RestartedAtAnnotation)))
			g.Expect(play(p, 10*time.Minute, tt.plays)).To(Equal(traffic{}), "nothing happens until a person acts")
		})
	}
}

// The result of a step comes after another request has replaced the one that it was for: the
// answer to the new request is sent all the same.
func TestAPasskeyRequestReplacesAnotherWhileItsAnswerIsSent(t *testing.T) {
	for name, why := range map[string]string{"which was accepted": "", "which was refused": "server returned error 401"} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			mine := newAccount(t)
			first, second := mine.request(challenge), mine.request("another")
			p := asked(t, first)
			p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(first, wapasskey.Origin))
			g.Expect(p.next()).To(Equal(OpPasskeyAnswer))
			p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: second}, p.now)
			answer := mine.answer(second, wapasskey.Origin)
			p.annotate(v1alpha1.PasskeyResponseAnnotation, answer)
			g.Expect(p.next()).To(Equal(OpNone), "one operation at a time")
			p.Step(PasskeyAnswered{Why: why}, p.now)
			d := p.Next(p.now)
			g.Expect(d.Operation).To(Equal(OpPasskeyAnswer))
			g.Expect(d.PasskeyResponse).To(Equal(answer))
			g.Expect(d.Events).NotTo(ContainElement(HaveField("Reason", v1alpha1.ReasonPasskeyRefused)))
		})
	}
	t.Run("or its confirmation", func(t *testing.T) {
		g := NewWithT(t)
		mine := newAccount(t)
		p := asked(t, mine.request(challenge))
		p.Step(Event{Type: EventPasskeyConfirmation}, p.now)
		g.Expect(p.next()).To(Equal(OpPasskeyConfirm))
		p.Step(Event{Type: EventPasskeyRequest, PasskeyOptions: mine.request("another")}, p.now)
		p.Step(PasskeyConfirmed{Why: "server returned error 400"}, p.now)
		g.Expect(p.next()).To(Equal(OpNone))
		g.Expect(p.want.Passkey).NotTo(BeNil(), "the new request stays")
	})
}

// What WhatsApp sends twice, or without being waited for, changes nothing.
func TestAContinuationOutOfTurn(t *testing.T) {
	failed := Event{Type: EventPasskeyFailed, Continuation: true, Message: "a continuation without a linking cache"}
	t.Run("while codes are offered", func(t *testing.T) {
		g := NewWithT(t)
		p := newMachineTest(session(), func() float64 { return 0.5 })
		p.goOn(Device{Starts: 1})
		p.Step(Dialed{}, p.now)
		p.Step(Event{Type: EventQR, Codes: []string{"code"}}, p.now)
		p.next()
		p.write()
		p.Step(failed, p.now)
		p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now)
		_, events := p.reported()
		g.Expect(events).To(BeEmpty())
		g.Expect(p.socket).To(Equal(socketPairing))
		g.Expect(p.want.QR.Code).To(Equal("code"))
	})
	t.Run("while an answer is awaited", func(t *testing.T) {
		g := NewWithT(t)
		p := asked(t, newAccount(t).request(challenge))
		p.Step(failed, p.now)
		g.Expect(p.reason).To(Equal(v1alpha1.ReasonPasskeyFailed))
		g.Expect(p.next()).To(Equal(OpClose))
	})
	t.Run("while or after the confirmation is sent", func(t *testing.T) {
		g := NewWithT(t)
		p := asked(t, newAccount(t).request(challenge))
		p.Step(Event{Type: EventPasskeyConfirmation}, p.now)
		g.Expect(p.next()).To(Equal(OpPasskeyConfirm))
		for range 2 {
			p.Step(Event{Type: EventPasskeyConfirmation}, p.now)
			p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now)
			p.Step(failed, p.now)
			p.Step(PasskeyConfirmed{}, p.now)
			g.Expect(p.next()).To(Equal(OpNone), "it is not sent twice")
			g.Expect(p.want.Passkey.ConfirmationCode).To(BeEmpty())
		}
		p.Step(Event{Type: EventPairSuccess, JID: jid, PhoneNumber: phone}, p.now)
		g.Expect(p.want.JID).To(Equal(jid))
	})
	t.Run("a code to compare replaces an agreement that was not sent yet", func(t *testing.T) {
		g := NewWithT(t)
		mine := newAccount(t)
		request := mine.request(challenge)
		p := asked(t, request)
		p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(request, wapasskey.Origin))
		g.Expect(p.next()).To(Equal(OpPasskeyAnswer))
		p.Step(Event{Type: EventPasskeyConfirmation}, p.now)
		p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now)
		p.Step(PasskeyAnswered{}, p.now)
		g.Expect(p.next()).To(Equal(OpNone), "a person compares the codes")
		g.Expect(p.want.Passkey.ConfirmationCode).To(Equal("WXYZ-1234"))
	})
}

func TestWhatAPersonConfirms(t *testing.T) {
	for name, tt := range map[string]struct{ given, want string }{
		"the code":                   {given: "WXYZ-1234"},
		"in lower case":              {given: "wxyz-1234"},
		"without the dash":           {given: "WXYZ1234"},
		"with spaces":                {given: " wxyz 1234\n"},
		"another code":               {given: "WXYZ-1235", want: "it is not the present status.passkey.confirmationCode"},
		"the code that was replaced": {given: "OLDC-0DE1", want: "it is not the present status.passkey.confirmationCode"},
		"half of the code":           {given: "WXYZ", want: "it is not the present status.passkey.confirmationCode"},
		"only a dash":                {given: "-", want: "it is not the present status.passkey.confirmationCode"},
		"a megabyte":                 {given: strings.Repeat("WXYZ-1234", 1<<17), want: "it is not the present status.passkey.confirmationCode"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			p := asked(t, newAccount(t).request(challenge))
			p.Step(Event{Type: EventPasskeyConfirmation, Code: "OLDC-0DE1"}, p.now)
			p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now)
			p.next()
			p.annotate(v1alpha1.PasskeyConfirmAnnotation, tt.given)
			op, events := p.reported()
			if tt.want == "" {
				g.Expect(op).To(Equal(OpPasskeyConfirm))
				p.write()
				p.annotate(v1alpha1.PasskeyConfirmAnnotation, tt.given+" ")
				_, events = p.reported()
				g.Expect(events).To(ContainSubstring("the confirmation was given before"))
				return
			}
			g.Expect(op).To(Equal(OpNone))
			g.Expect(events).To(And(HavePrefix("PasskeyRefused: "), ContainSubstring(tt.want)))
			g.Expect(len(events)).To(BeNumerically("<", 600))
			p.write()
			g.Expect(p.Object().Status.Passkey.ObservedConfirmation).To(Equal(Digest(tt.given)), "the manager removes it")
			p.annotate(v1alpha1.PasskeyConfirmAnnotation, "WXYZ-1234")
			g.Expect(p.next()).To(Equal(OpPasskeyConfirm), "the right one is used afterwards")
		})
	}
}

// A text that was refused because it came too early is used when it is given again.
func TestATextIsGivenAgain(t *testing.T) {
	g := NewWithT(t)
	p := asked(t, newAccount(t).request(challenge))
	give := func(code string) string {
		p.annotate(v1alpha1.PasskeyConfirmAnnotation, code)
		_, events := p.reported()
		p.write()
		return events
	}
	g.Expect(give("WXYZ-1234")).To(ContainSubstring("has not asked for a confirmation"))
	give("") // the manager removes it
	g.Expect(give("WXYZ-1234")).To(ContainSubstring("has not asked for a confirmation"))
	p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now)
	give("")
	p.annotate(v1alpha1.PasskeyConfirmAnnotation, "WXYZ-1234")
	g.Expect(p.next()).To(Equal(OpPasskeyConfirm))
}

// Why a request ended says how far it had come.
func TestWhyAPasskeyExpires(t *testing.T) {
	mine := newAccount(t)
	request := mine.request(challenge)
	for name, tt := range map[string]struct {
		do   func(g Gomega, p *machineTest)
		want string
	}{
		"without an answer": {func(Gomega, *machineTest) {}, "the passkey was not answered in time"},
		"after an answer": {func(g Gomega, p *machineTest) {
			p.annotate(v1alpha1.PasskeyResponseAnnotation, mine.answer(request, wapasskey.Origin))
			g.Expect(p.next()).To(Equal(OpPasskeyAnswer))
			p.Step(PasskeyAnswered{}, p.now)
		}, "did not link the device in time"},
		"without a comparison": {func(_ Gomega, p *machineTest) {
			p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now)
		}, "confirmationCode was not confirmed in time"},
		"after a comparison": {func(g Gomega, p *machineTest) {
			p.Step(Event{Type: EventPasskeyConfirmation, Code: "WXYZ-1234"}, p.now)
			p.annotate(v1alpha1.PasskeyConfirmAnnotation, "WXYZ-1234")
			g.Expect(p.next()).To(Equal(OpPasskeyConfirm))
			p.Step(PasskeyConfirmed{}, p.now)
		}, "did not link the device in time"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			p := asked(t, request)
			tt.do(g, p)
			p.next()
			p.now = p.now.Add(passkeyTimeout)
			op, events := p.reported()
			g.Expect(op).To(Equal(OpClose))
			g.Expect(events).To(And(HavePrefix(v1alpha1.ReasonPasskeyExpired), ContainSubstring(tt.want)))
		})
	}
}

// Events of a pairing that come to a linked device, or a login's to a connection that offers
// codes, change nothing.
func TestEventsOfAnotherKindOfConnection(t *testing.T) {
	linked := func() *machineTest {
		p := newMachineTest(session(), func() float64 { return 0.5 })
		p.goOn(Device{Starts: 1, JID: jid, PhoneNumber: phone})
		p.Step(Dialed{Paired: true}, p.now)
		p.Step(Event{Type: EventConnected, JID: jid, PhoneNumber: phone}, p.now)
		p.next()
		p.write()
		return p
	}
	scanned := func() *machineTest {
		p := newMachineTest(session(), func() float64 { return 0.5 })
		p.goOn(Device{Starts: 1})
		p.Step(Dialed{}, p.now)
		p.Step(Event{Type: EventQR, Codes: []string{"code"}}, p.now)
		p.Step(Event{Type: EventPairSuccess, JID: jid, PhoneNumber: phone}, p.now)
		p.next()
		p.write()
		return p
	}
	for name, p := range map[string]*machineTest{"linked": linked(), "scanned": scanned()} {
		before, err := json.Marshal(p.want)
		NewWithT(t).Expect(err).NotTo(HaveOccurred())
		for _, e := range []Event{
			{Type: EventQR, Codes: []string{"code"}}, {Type: EventCodesReplaced, Codes: []string{"code"}}, {Type: EventPairingCode, Code: "ABCDEFGH", Until: p.now.Add(time.Hour)},
			{Type: EventPasskeyRequest, PasskeyOptions: "{}"}, {Type: EventPasskeyConfirmation}, {Type: EventPasskeyConfirmation, Code: "WXYZ-1234"},
			{Type: EventPasskeyFailed, Message: "x"}, {Type: EventPasskeyFailed, Message: "x", Continuation: true}, {Type: EventPairError, Message: "update the phone"},
			{Type: EventConnected, JID: "", PhoneNumber: ""}, {Type: EventConnected, JID: jid, PhoneNumber: phone},
		} {
			t.Run(fmt.Sprintf("%s: %s %s", name, e.Type, e.Code), func(t *testing.T) {
				g := NewWithT(t)
				reason := p.reason
				for range 3 {
					p.Step(e, p.now)
				}
				op, events := p.reported()
				g.Expect(op).To(Equal(OpNone))
				g.Expect(events).To(BeEmpty())
				g.Expect(p.reason).To(Equal(reason))
				after, err := json.Marshal(p.want)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(string(after)).To(Equal(string(before)))
			})
		}
	}
	t.Run("linked: PairSuccess of another account", func(t *testing.T) {
		g := NewWithT(t)
		p := linked()
		p.Step(Event{Type: EventPairSuccess, JID: "34600999999:1@s.whatsapp.net", PhoneNumber: "+34600999999"}, p.now)
		g.Expect(p.want.JID).To(Equal(jid))
		g.Expect(p.want.Phase).To(Equal(v1alpha1.PhaseConnected))
	})
}

// WhatsApp may refuse a connection before its first code, for example because of its address. A
// session without a device has none to lose, so its pairing goes on until its time is over.
func TestAnUnlinkedDeviceIsRefused(t *testing.T) {
	g := NewWithT(t)
	p := newMachineTest(session(), func() float64 { return 0.5 })
	p.goOn(Device{Starts: 1})
	p.Step(Dialed{}, p.now)
	p.Step(Event{Type: EventLoggedOut, Reason: EndAccountLocked, Message: "WhatsApp locked the account"}, p.now)
	_, events := p.reported()
	g.Expect(events).To(HavePrefix(v1alpha1.ReasonPairingFailed + ": WhatsApp did not link the device (WhatsApp locked the account)"))
	p.Step(Closed{}, p.now)
	p.write()
	g.Expect(p.Object().Status.Phase).To(Equal(v1alpha1.PhasePairing))
	g.Expect(p.Object().Status.RetryReason).To(BeEmpty())
	play(p, defaultPairingTimeout+time.Minute, func(p *machineTest, _ int) {
		p.Step(Event{Type: EventLoggedOut, Reason: EndAccountLocked, Message: "WhatsApp locked the account"}, p.now)
	})
	g.Expect(p.Object().Status.Phase).To(Equal(v1alpha1.PhasePairingExpired))
	g.Expect(readyMessage(p.Object().Status)).To(ContainSubstring("locked the account"))
}

// An account whose number is not known has only a LID, which no sentence shows as a number or
// leaves a gap for.
func TestSentencesWithoutAPhoneNumber(t *testing.T) {
	g := NewWithT(t)
	const hidden = "123456789012345:3@lid"
	p := newMachineTest(session(func(s *v1alpha1.WhatsAppSession) { s.Spec.Pairing.PhoneNumber = phone }), func() float64 { return 0.5 })
	p.goOn(Device{Starts: 1})
	p.Step(Dialed{}, p.now)
	p.Step(Event{Type: EventQR, Codes: []string{"code"}}, p.now)
	p.Step(Event{Type: EventPairSuccess, JID: hidden}, p.now)
	sentences := []string{p.message}
	p.Step(Dialed{Paired: true}, p.now)
	p.Step(Event{Type: EventConnected, JID: hidden}, p.now)
	sentences = append(sentences, p.message)
	p.Step(Verified{}, p.now)
	p.Step(LogoutResult{}, p.now)
	sentences = append(sentences, p.message)
	_, events := p.reported()
	sentences = append(sentences, events)
	for _, sentence := range sentences {
		g.Expect(sentence).NotTo(Or(BeEmpty(), ContainSubstring("  "), HaveSuffix(" "), ContainSubstring("the phone 1")), sentence)
	}
	g.Expect(sentences[0]).To(Equal("the phone linked the device"))
	g.Expect(events).To(ContainSubstring("connected as " + hidden))
}

// TestNoSequenceOfEventsHangs: after any sequence of inputs a session that is placed, and that
// nobody deletes or suspends, waits for something: a time, a person, or WhatsApp.
func TestNoSequenceOfEventsHangs(t *testing.T) {
	seed := seedOf(t)
	for run := range 40 {
		r := rand.New(rand.NewPCG(seed, uint64(run)))
		p := newMachineTest(session(), r.Float64)
		operation := OpNone
		for range 2000 {
			inputs[r.IntN(len(inputs))](p, r)
			inputs[len(inputs)-1](p, r) // an event
			if operation == OpNone {
				operation = p.next()
			}
			if operation != OpNone && r.IntN(3) > 0 {
				p.Step(result(operation, p, r), p.now)
				operation = OpNone
			}
			p.write()
			p.now = p.now.Add(time.Duration(r.IntN(3000)) * time.Millisecond)
		}
		if p.forgotten {
			continue
		}
		p.change(func(s *v1alpha1.WhatsAppSession) {
			s.DeletionTimestamp, s.Spec.Suspend, s.Status.Worker = nil, false, me
			s.Status.Epoch = max(s.Status.Epoch, s.Status.StoredEpoch) + 1
		})
		if operation != OpNone {
			p.Step(result(operation, p, r), p.now)
		}
		for range 200 { // a server that says nothing
			d := p.Next(p.now)
			switch d.Operation {
			case OpToken:
				p.Step(TokenResult{Granted: true}, p.now)
			case OpTake:
				p.Step(Taken{Epoch: p.Object().Status.Epoch, Device: Device{Starts: 1, JID: p.want.JID, PhoneNumber: p.want.PhoneNumber}}, p.now)
			case OpNone:
			default:
				p.Step(result(d.Operation, p, r), p.now)
			}
			p.write()
			if stored := p.Object().Status.StoredEpoch; stored >= p.Object().Status.Epoch { // as the manager does
				p.change(func(s *v1alpha1.WhatsAppSession) { s.Status.Worker, s.Status.Epoch = me, stored+1 })
			}
			p.now = p.now.Add(100 * time.Millisecond)
		}
		p.Next(p.now) // WakeAt leaves out what is due now
		resting := status.Resting(p.want.Phase) || p.want.Phase == v1alpha1.PhaseConnected
		if wake := p.WakeAt(p.now); wake.IsZero() && !resting && p.running == OpNone {
			t.Fatalf("SEED=%d, run %d: nothing happens any more in phase %s, reason %s, socket %s", seed, run, p.want.Phase, p.reason, p.socket)
		}
	}
}

// seedOf is the seed of a random test, from the variable SEED where it is set.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if fixed, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = fixed
	}
	t.Logf("SEED=%d", seed)
	return seed
}

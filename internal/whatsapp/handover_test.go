package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waCommon"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waWeb"
	wastore "go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	contact = "15550000001"
	another = "15550000002"
)

// ledger are the entries after the one with that number.
func (w *environment) ledger(after int64) []simulator.LedgerEntry {
	w.t.Helper()
	entries, err := w.simulator.Ledger(simulator.LedgerQuery{After: after})
	w.g.Expect(err).NotTo(HaveOccurred())
	return entries
}

// write sends a message of a contact.
func (w *environment) write(r simulator.SendRequest) (id string) {
	w.t.Helper()
	r.Device = phone
	id, err := w.simulator.Write(w.t.Context(), r)
	w.g.Expect(err).NotTo(HaveOccurred())
	return id
}

// group is a group of the contact, another one and the session's account.
func (w *environment) group() string {
	w.t.Helper()
	group, err := w.simulator.CreateGroup(simulator.GroupRequest{Subject: "Friends", Members: []string{contact, another, phone}})
	w.g.Expect(err).NotTo(HaveOccurred())
	return group
}

// acknowledged waits until everything has its acknowledgement, not only messages.
func (w *environment) acknowledged() {
	w.t.Helper()
	w.g.Eventually(func() ([]simulator.LedgerEntry, error) {
		return w.simulator.Ledger(simulator.LedgerQuery{Waiting: true})
	}).Should(BeEmpty())
}

// inject causes a fault until the test ends.
func (w *environment) inject(kind simulator.FaultKind) {
	w.t.Helper()
	_, err := w.simulator.Inject(simulator.Fault{Kind: kind})
	w.g.Expect(err).NotTo(HaveOccurred())
}

// fromPhone is the own phone's answer to the request for a message that it has.
func (w *environment) fromPhone(id, text string) {
	w.t.Helper()
	info, err := proto.Marshal(&waWeb.WebMessageInfo{
		Key:     &waCommon.MessageKey{RemoteJID: proto.String(contact + "@s.whatsapp.net"), FromMe: proto.Bool(false), ID: proto.String(id)},
		Message: &waE2E.Message{Conversation: proto.String(text)}, MessageTimestamp: proto.Uint64(uint64(time.Now().Unix())),
	})
	w.g.Expect(err).NotTo(HaveOccurred())
	kind := waE2E.PeerDataOperationRequestType_PLACEHOLDER_MESSAGE_RESEND
	_, err = w.simulator.SendMessage(w.t.Context(), phone, phone, &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
		Type: waE2E.ProtocolMessage_PEER_DATA_OPERATION_REQUEST_RESPONSE_MESSAGE.Enum(),
		PeerDataOperationRequestResponseMessage: &waE2E.PeerDataOperationRequestResponseMessage{
			PeerDataOperationRequestType: &kind, StanzaID: proto.String("REQUEST"),
			PeerDataOperationResult: []*waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult{{
				PlaceholderMessageResendResponse: &waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult_PlaceholderMessageResendResponse{WebMessageInfoBytes: info},
			}},
		},
	}})
	w.g.Expect(err).NotTo(HaveOccurred())
}

// TestRefusalEndsTheConnection: whatever is refused first, it ends the connection, and neither it
// nor anything after it is acknowledged. All of it comes again, in order.
func TestRefusalEndsTheConnection(t *testing.T) {
	type burst struct {
		text, answer, receipt, call, change, undecryptable, last int // the places in the ledger
	}
	receipts := 0
	for name, row := range map[string]struct {
		refuse func(delivery.MessageItem) bool
		place  func(burst) int
	}{
		"a message": {
			func(i delivery.MessageItem) bool { return i.Text == "one" }, func(b burst) int { return b.text },
		},
		"the answer to a placeholder": {
			func(i delivery.MessageItem) bool { return i.Text == "from the phone" }, func(b burst) int { return b.answer },
		},
		"a receipt of several people": {
			func(i delivery.MessageItem) bool { return i.Type == delivery.TypeReceipt }, func(b burst) int { return b.receipt },
		},
		"the last of several people": {
			func(i delivery.MessageItem) bool {
				if i.Type == delivery.TypeReceipt {
					receipts++
				}
				return receipts == 2
			}, func(b burst) int { return b.receipt },
		},
		"a call": {
			func(i delivery.MessageItem) bool { return i.Type == delivery.TypeCall }, func(b burst) int { return b.call },
		},
		"a change of a group": {
			func(i delivery.MessageItem) bool { return i.Type == delivery.TypeGroupChange }, func(b burst) int { return b.change },
		},
		"an undecryptable message": {
			func(i delivery.MessageItem) bool { return i.Type == delivery.TypeUndecryptable }, func(b burst) int { return b.undecryptable },
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, taking, s := linked(t)
			group := w.group()
			w.acknowledged()
			s.Close()
			w.inject(simulator.FaultSenderOffline)
			w.inject(simulator.FaultPhoneOffline)

			entries := w.ledger(0)
			before := entries[len(entries)-1].Number
			place := func() int { return len(w.ledger(before)) - 1 }
			var b burst
			w.write(simulator.SendRequest{Text: "one"})
			b.text = place()
			w.fromPhone("PLACEHOLDER", "from the phone")
			b.answer = place()
			_, err := w.simulator.Receipt(t.Context(), simulator.ReceiptRequest{Device: phone, From: []string{contact, another}, Chat: group, IDs: []string{"OWN"}, Type: "read"})
			w.g.Expect(err).NotTo(HaveOccurred())
			b.receipt = place()
			_, err = w.simulator.Call(t.Context(), simulator.CallRequest{Device: phone, From: contact, End: "missed"})
			w.g.Expect(err).NotTo(HaveOccurred())
			b.call = place()
			w.g.Expect(w.simulator.ChangeGroup(t.Context(), simulator.GroupChange{Group: group, By: contact, Change: "subject", Value: "Enemies"})).To(Succeed())
			b.change = place()
			w.write(simulator.SendRequest{Text: "lost", Malformed: "garbage"})
			b.undecryptable = place()
			w.write(simulator.SendRequest{Text: "two"})
			b.last = place()

			var mu sync.Mutex
			var accepted []delivery.MessageItem
			refused := false
			receipts = 0
			s = w.connect(taking, func(o *Options) {
				o.Accept = func(_ context.Context, item delivery.MessageItem) error {
					mu.Lock()
					defer mu.Unlock()
					if refused {
						t.Errorf("handed over after the refusal: %v", item)
					}
					if row.refuse(item) {
						refused = true
						return errors.New("the database is away")
					}
					accepted = append(accepted, item)
					return nil
				}
			})
			end := s.event(EventDisconnected)
			w.g.Expect(end.Reason).To(Equal(session.EndInboxUnavailable))
			w.g.Expect(end.Ours).To(BeTrue())
			place0 := row.place(b)
			unacknowledged := func() []simulator.LedgerEntry {
				return slices.DeleteFunc(w.ledger(before)[place0:], func(e simulator.LedgerEntry) bool { return e.Acknowledged.IsZero() })
			}
			w.g.Consistently(unacknowledged, "200ms").Should(BeEmpty(), "what was refused, and what followed it")
			w.g.Expect(w.ledger(before)).To(HaveLen(b.last+1), "no retry receipt and no request for what was not accepted")
			s.Close()

			next := w.connect(taking)
			w.g.Eventually(next.texts).Should(ContainElement("two"))
			w.acknowledged()
			// Each once by its key: what was accepted, and not acknowledged in time, comes again.
			once := func(items []delivery.MessageItem) (types []delivery.MessageType) {
				keys := map[string]bool{}
				for _, item := range items {
					if !keys[item.Key] {
						types = append(types, item.Type)
					}
					keys[item.Key] = true
				}
				return types
			}
			mu.Lock()
			defer mu.Unlock()
			all := slices.Concat(accepted, next.accepted())
			w.g.Expect(once(all)).To(Equal([]delivery.MessageType{
				delivery.TypeText, delivery.TypeText, delivery.TypeReceipt, delivery.TypeReceipt,
				delivery.TypeCall, delivery.TypeGroupChange, delivery.TypeUndecryptable, delivery.TypeText,
			}))
			w.g.Expect(slices.Compact(textsOf(all))).To(Equal([]string{"one", "from the phone", "two"}))
			s.mu.Lock()
			defer s.mu.Unlock()
			w.g.Expect(slices.DeleteFunc(s.reported, func(e Event) bool { return !e.Over() })).To(HaveLen(1))
		})
	}
}

// unconnected is a connection without a server, for tests of the hand-over alone.
func unconnected(t *testing.T, clk *clocktesting.FakeClock, accept func(context.Context, delivery.MessageItem) error) (c *Connection, events chan Event) {
	t.Helper()
	events = make(chan Event, 10)
	c = &Connection{factory: &Factory{clock: clk}, options: Options{Accept: accept, Log: logr.Discard, Events: func(e Event) { events <- e }}}
	c.ctx, c.cancel = context.WithCancelCause(t.Context())
	c.translate = func(context.Context, any) ([]delivery.MessageItem, error) {
		return []delivery.MessageItem{{Key: "k", Type: delivery.TypeText}}, nil
	}
	return c, events
}

// TestAHandOverThatTakesTooLong is a refusal, and so is every one after it.
func TestAHandOverThatTakesTooLong(t *testing.T) {
	g := wait(t)
	clk := clocktesting.NewFakeClock(time.Now())
	calls := atomic.Int32{}
	c, events := unconnected(t, clk, func(ctx context.Context, _ delivery.MessageItem) error {
		calls.Add(1)
		<-ctx.Done()
		return ctx.Err()
	})
	done := make(chan bool, 1)
	go func() { done <- c.accept("an event") }()
	g.Eventually(clk.HasWaiters).Should(BeTrue())
	full, _ := c.queue.put(&waBinary.Node{}, 1)
	g.Expect(full).NotTo(BeNil(), "nothing is queued during a hand-over")
	clk.Step(handOverTimeout - time.Millisecond)
	g.Consistently(done, "50ms").ShouldNot(Receive())
	clk.Step(time.Millisecond)
	g.Eventually(done).Should(Receive(BeFalse()))
	g.Expect(context.Cause(c.ctx)).To(MatchError(errHandOverTimeout))
	g.Expect(events).To(Receive(And(HaveField("Reason", session.EndInboxUnavailable), HaveField("Ours", true))))
	g.Expect(c.accept("another")).To(BeFalse())
	g.Expect(calls.Load()).To(BeEquivalentTo(1))
}

// TestTheEndOfAConnectionIsNoRefusal: a hand-over that ends because the worker has closed the
// connection says nothing about the database.
func TestTheEndOfAConnectionIsNoRefusal(t *testing.T) {
	g := wait(t)
	clk := clocktesting.NewFakeClock(time.Now())
	c, events := unconnected(t, clk, func(ctx context.Context, _ delivery.MessageItem) error {
		<-ctx.Done()
		return ctx.Err()
	})
	done := make(chan bool, 1)
	go func() { done <- c.accept("an event") }()
	g.Eventually(clk.HasWaiters).Should(BeTrue())
	c.cancel(context.Canceled)
	g.Eventually(done).Should(Receive(BeFalse()))
	g.Expect(context.Cause(c.ctx)).NotTo(MatchError(errRefused))
	g.Expect(events).NotTo(Receive())
}

// TestWhoeverReportsARefusal: the event of a refused message says why, also if the end of the
// context is noticed first.
func TestWhoeverReportsARefusal(t *testing.T) {
	g := wait(t)
	clk := clocktesting.NewFakeClock(time.Now())
	c, events := unconnected(t, clk, nil)
	c.opened = true
	c.cancel(fmt.Errorf("%w: %w", errRefused, context.Canceled))
	go c.onEnd()
	g.Eventually(clk.HasWaiters).Should(BeTrue())
	clk.Step(explainTimeout)
	g.Eventually(events).Should(Receive(And(HaveField("Reason", session.EndInboxUnavailable), HaveField("Ours", true))))
}

// TestARefusalBeforeConnectReturns is reported by an event only: it is no failure to connect.
func TestARefusalBeforeConnectReturns(t *testing.T) {
	w := newEnvironment(t)
	var s *testSession
	s, ctx := w.prepare(w.take(), func(o *Options) {
		o.Allowed = func() error {
			s.refuse(errors.New("the database is away"))
			return nil
		}
	})
	w.g.Expect(s.Connect(ctx)).To(Succeed())
	w.g.Expect(s.event(EventDisconnected).Reason).To(Equal(session.EndInboxUnavailable))
}

// TestOnlyPicturesOfGroupsAreHandedOver, also those that cannot be read.
func TestOnlyPicturesOfGroupsAreHandedOver(t *testing.T) {
	for jid, handedOver := range map[types.JID]int{theGroup: 1, contactLID: 0, contactPN: 0} {
		g := NewWithT(t)
		c, _ := unconnected(t, clocktesting.NewFakeClock(time.Now()), func(context.Context, delivery.MessageItem) error { return nil })
		g.Expect(c.handle(&events.Picture{JID: jid})).To(BeTrue())
		g.Expect(c.handedOver).To(Equal(handedOver), jid.String())
		g.Expect(isChange(&waBinary.Node{Tag: "notification", Attrs: waBinary.Attrs{"type": "picture", "from": jid}})).To(Equal(handedOver == 1), jid.String())
	}
}

// TestTheApprovalOfNewMembers is read from the state that a change of it has.
func TestTheApprovalOfNewMembers(t *testing.T) {
	for state, required := range map[string]bool{"on": true, "off": false} {
		g := NewWithT(t)
		node := &waBinary.Node{Tag: "notification", Attrs: waBinary.Attrs{"type": "w:gp2", "from": theGroup, "t": "1772366400"}, Content: []waBinary.Node{
			{Tag: "membership_approval_mode", Content: []waBinary.Node{{Tag: "group_join", Attrs: waBinary.Attrs{"state": state}}}},
		}}
		change, _, _, err := (&whatsmeow.Client{}).DangerousInternals().ParseGroupNotification(node) //nolint:staticcheck // "deprecated" only says that it is dangerous
		g.Expect(err).NotTo(HaveOccurred())
		correctApproval(change, node)
		translator, _ := newTestTranslator(fakeSecrets{})
		items, err := translator.translate(t.Context(), change)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(items).To(HaveLen(1))
		g.Expect(items[0].GroupChange.Approval).To(HaveValue(Equal(required)), state)
	}
}

// TestTwoUnknownChangesAtOnce have a key each, and the same one comes again under its own.
func TestTwoUnknownChangesAtOnce(t *testing.T) {
	g := NewWithT(t)
	translator, _ := newTestTranslator(fakeSecrets{})
	keys := map[string]bool{}
	for _, jid := range []types.JID{contactLID, memberLID, memberLID} {
		items, err := translator.translate(t.Context(), &events.GroupInfo{JID: theGroup, Sender: &memberLID, Timestamp: sentAt, UnknownChanges: []*waBinary.Node{
			{Tag: "revoked_membership_requests", Content: []waBinary.Node{{Tag: "participant", Attrs: waBinary.Attrs{"jid": jid}}}},
		}})
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(items).To(HaveLen(1))
		keys[items[0].Key] = true
	}
	g.Expect(keys).To(HaveLen(2))
}

// TestOnlyTheEndOfACallIsAnEvent: nothing else of it is handed over.
func TestOnlyTheEndOfACallIsAnEvent(t *testing.T) {
	for tag, event := range map[string]any{
		"offer": nil, "offer_notice": nil, "accept": nil, "relaylatency": nil, "terminate": &events.CallTerminate{}, "reject": &events.CallReject{},
	} {
		g := NewWithT(t)
		got := callEvent(&waBinary.Node{Tag: "call", Attrs: waBinary.Attrs{"from": contactLID}, Content: []waBinary.Node{{Tag: tag, Attrs: waBinary.Attrs{"call-id": "C1"}}}})
		if event == nil {
			g.Expect(got).To(BeNil(), tag)
		} else {
			g.Expect(got).To(BeAssignableToTypeOf(event), tag)
		}
	}
}

// TestTheWaitForRoom ends the connection only if nothing is handled for too long.
func TestTheWaitForRoom(t *testing.T) {
	g := wait(t)
	clk := clocktesting.NewFakeClock(time.Now())
	c, events := unconnected(t, clk, nil)
	for range maxQueued {
		full, _ := c.queue.put(&waBinary.Node{}, 1)
		g.Expect(full).To(BeNil())
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.enqueue(&waBinary.Node{}, 1)
	}()
	g.Eventually(clk.HasWaiters).Should(BeTrue())
	waits := func() bool {
		c.queue.mu.Lock()
		defer c.queue.mu.Unlock()
		return c.queue.changed != nil
	}
	for range 3 { // a hand-over ends, and the next one begins
		clk.Step(roomTimeout - time.Second)
		c.queue.hold(true)
		c.queue.hold(false)
		g.Eventually(waits).Should(BeTrue())
	}
	g.Expect(events).NotTo(Receive())
	clk.Step(roomTimeout)
	g.Eventually(events).Should(Receive(HaveField("Reason", session.EndOverloaded)))
	g.Eventually(done).Should(BeClosed())
}

// TestTheWaitForTheEndOfAHandOver: reading goes on after it, also if no node was being handled.
func TestTheWaitForTheEndOfAHandOver(t *testing.T) {
	g := wait(t)
	clk := clocktesting.NewFakeClock(time.Now())
	c, _ := unconnected(t, clk, nil)
	c.full = true // nothing is handled
	c.queue.hold(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.enqueue(&waBinary.Node{}, 1)
	}()
	g.Eventually(clk.HasWaiters).Should(BeTrue())
	c.queue.hold(false)
	g.Eventually(done).Should(BeClosed())
}

// TestNothingIsReadDuringAHandOver: the client's queue must not grow while the database is slow.
func TestNothingIsReadDuringAHandOver(t *testing.T) {
	w := newEnvironment(t)
	taking := w.take()
	w.pair(taking, phone)
	release, waiting := make(chan struct{}), make(chan struct{}, 100)
	var mu sync.Mutex
	var items []delivery.MessageItem
	s := w.connect(taking, func(o *Options) {
		o.Accept = func(_ context.Context, item delivery.MessageItem) error {
			waiting <- struct{}{}
			<-release
			mu.Lock()
			defer mu.Unlock()
			items = append(items, item)
			return nil
		}
	})
	s.event(EventConnected)
	w.settled()
	want := []string{"0"}
	w.send("0")
	w.g.Eventually(waiting).Should(Receive())
	for i := 1; i < 30; i++ {
		want = append(want, fmt.Sprint(i))
		w.send(want[i])
	}
	queued := func() int {
		s.queue.mu.Lock()
		defer s.queue.mu.Unlock()
		return len(s.queue.nodes)
	}
	w.g.Consistently(queued, "200ms").Should(BeNumerically("<=", 1))
	close(release)
	w.g.Eventually(func() []string {
		mu.Lock()
		defer mu.Unlock()
		return textsOf(items)
	}).Should(Equal(want))
	w.settled()
}

// TestFiveThousandWaitAtLogin: they come without windows, and are handed over in order, with a
// bounded number in memory.
func TestFiveThousandWaitAtLogin(t *testing.T) {
	w := newEnvironment(t, func(o *simulator.Options) { o.OfflineWindow = -1 })
	taking := w.take()
	w.pair(taking, phone)
	want := make([]string, 5000)
	for i := range want {
		want[i] = fmt.Sprint(i)
		w.send(want[i])
	}
	var most atomic.Int64
	var s *testSession
	var mu sync.Mutex
	var items []delivery.MessageItem
	s, ctx := w.prepare(taking, func(o *Options) {
		o.Accept = func(_ context.Context, item delivery.MessageItem) error {
			mu.Lock()
			items = append(items, item)
			mu.Unlock()
			s.queue.mu.Lock()
			defer s.queue.mu.Unlock()
			most.Store(max(most.Load(), int64(len(s.queue.nodes))))
			return nil
		}
	})
	w.g.Expect(s.Connect(ctx)).To(Succeed())
	w.g.Eventually(func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(items)
	}).WithTimeout(5 * time.Minute).Should(BeNumerically(">=", len(want)))
	w.g.Expect(textsOf(items)).To(Equal(want))
	w.settled()
	w.g.Expect(most.Load()).To(BeNumerically("<=", maxQueued))
	w.g.Expect(slices.ContainsFunc(s.events(), Event.Over)).To(BeFalse())
	w.g.Expect(w.simulator.Stats().Redelivered).To(BeZero())
}

// TestABacklogEndsTheConnection after the message that went over the bound: that one is
// acknowledged, and the next one waits, still encrypted, at WhatsApp.
func TestABacklogEndsTheConnection(t *testing.T) {
	w, taking, s := linked(t)
	w.settled()
	s.Close()
	for _, text := range []string{"one", "two", "three"} {
		w.send(text)
	}
	var mu sync.Mutex
	var items []delivery.MessageItem
	s = w.connect(taking, func(o *Options) {
		o.Accept = func(_ context.Context, item delivery.MessageItem) error {
			mu.Lock()
			defer mu.Unlock()
			items = append(items, item)
			if item.Text == "two" {
				return ErrBacklog
			}
			return nil
		}
	})
	end := s.event(EventDisconnected)
	w.g.Expect(end.Reason).To(Equal(session.EndBacklog))
	w.g.Expect(end.Ours).To(BeTrue())
	s.Close()
	w.g.Expect(textsOf(items)).To(Equal([]string{"one", "two"}))
	w.g.Expect(w.simulator.Stats().Unacknowledged).To(BeNumerically(">=", 1))
	var decrypted int
	w.g.Expect(w.db().QueryRowContext(t.Context(), "SELECT COUNT(*) FROM whatsmeow_event_buffer WHERE plaintext IS NOT NULL").Scan(&decrypted)).To(Succeed())
	w.g.Expect(decrypted).To(BeZero(), "the next one was not decrypted")

	next := w.connect(taking)
	w.g.Eventually(next.texts).Should(Equal([]string{"three"}))
	w.settled()
}

// poison makes stores panic, once each.
type poison struct {
	wastore.EventBuffer
	wastore.MsgSecretStore
	wastore.LIDStore
	contents, decryption, address atomic.Bool
}

func (p *poison) PutMessageSecret(ctx context.Context, chat, sender types.JID, id types.MessageID, secret []byte) error {
	if p.contents.CompareAndSwap(true, false) {
		panic("a bug in the handling of the contents")
	}
	return p.MsgSecretStore.PutMessageSecret(ctx, chat, sender, id, secret)
}

func (p *poison) GetBufferedEvent(ctx context.Context, hash [32]byte) (*wastore.BufferedEvent, error) {
	if p.decryption.CompareAndSwap(true, false) {
		panic("a bug in the decryption")
	}
	return p.EventBuffer.GetBufferedEvent(ctx, hash)
}

func (p *poison) PutLIDMapping(ctx context.Context, lid, pn types.JID) error {
	if p.address.CompareAndSwap(true, false) {
		panic("a bug in the handling of the addresses")
	}
	return p.LIDStore.PutLIDMapping(ctx, lid, pn)
}

// TestPoisonMessageDoesNotStopASession: whatever a message makes panic, and whatever it holds, it
// is handed over as far as it can be, and acknowledged, and the next one comes.
func TestPoisonMessageDoesNotStopASession(t *testing.T) {
	secret := func(text string) *waE2E.Message {
		return &waE2E.Message{Conversation: proto.String(text), MessageContextInfo: &waE2E.MessageContextInfo{MessageSecret: make([]byte, 32)}}
	}
	for name, row := range map[string]struct {
		poison  func(p *poison, s *testSession)
		message *waE2E.Message
		request simulator.SendRequest
		// kinds are the types of its items, in order.
		kinds []delivery.MessageType
	}{
		"its translation panics": {
			poison: func(_ *poison, s *testSession) {
				inner := s.translate
				s.translate = func(ctx context.Context, evt any) ([]delivery.MessageItem, error) {
					if m, ok := evt.(*events.Message); ok && m.Message.GetConversation() == "poison" {
						panic("a bug in the translation")
					}
					return inner(ctx, evt)
				}
			},
			kinds: []delivery.MessageType{delivery.TypeUnsupported},
		},
		"its hand-over panics": {
			poison: func(_ *poison, s *testSession) {
				inner := s.options.Accept
				s.options.Accept = func(ctx context.Context, item delivery.MessageItem) error {
					if item.Text == "poison" {
						panic("a bug in the hand-over")
					}
					return inner(ctx, item)
				}
			},
			kinds: []delivery.MessageType{delivery.TypeUnsupported},
		},
		"whatsmeow panics over its contents": {
			poison:  func(p *poison, _ *testSession) { p.contents.Store(true) },
			message: secret("poison"), kinds: []delivery.MessageType{delivery.TypeUnsupported},
		},
		"whatsmeow panics while it is decrypted: the sender encrypts it again": {
			poison: func(p *poison, _ *testSession) { p.decryption.Store(true) },
			kinds:  []delivery.MessageType{delivery.TypeUndecryptable, delivery.TypeText},
		},
		"whatsmeow panics over its sender": {
			poison: func(p *poison, _ *testSession) { p.address.Store(true) },
			kinds:  []delivery.MessageType{delivery.TypeUnsupported},
		},
		"more than 1 MiB":     {message: secret(strings.Repeat("long", 400_000)), kinds: []delivery.MessageType{delivery.TypeText}},
		"65,536 characters":   {message: secret(strings.Repeat("é", 65_536)), kinds: []delivery.MessageType{delivery.TypeText}},
		"a strange protobuf":  {request: simulator.SendRequest{Malformed: "protobuf"}, kinds: []delivery.MessageType{delivery.TypeUnsupported}},
		"an unknown version":  {request: simulator.SendRequest{Malformed: "version"}, kinds: []delivery.MessageType{delivery.TypeUnsupported}},
		"no encrypted part":   {request: simulator.SendRequest{Malformed: "nothing"}, kinds: []delivery.MessageType{delivery.TypeUndecryptable}},
		"an empty part":       {request: simulator.SendRequest{Malformed: "empty"}, kinds: []delivery.MessageType{delivery.TypeUndecryptable}},
		"a part with garbage": {request: simulator.SendRequest{Malformed: "garbage"}, kinds: []delivery.MessageType{delivery.TypeUndecryptable}},
		"no sender":           {request: simulator.SendRequest{Malformed: "participant"}, kinds: []delivery.MessageType{delivery.TypeUnsupported}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newEnvironment(t)
			taking := w.take()
			w.pair(taking, phone)
			var p *poison
			s, ctx := w.prepare(taking, func(o *Options) {
				p = &poison{EventBuffer: o.Device.EventBuffer, MsgSecretStore: o.Device.MsgSecrets, LIDStore: o.Device.LIDs}
				o.Device.EventBuffer, o.Device.MsgSecrets, o.Device.LIDs = p, p, p
			})
			if row.poison != nil {
				row.poison(p, s)
			}
			if row.request.Malformed != "" {
				w.inject(simulator.FaultSenderOffline)
				w.inject(simulator.FaultPhoneOffline)
			}
			w.g.Expect(s.Connect(ctx)).To(Succeed())
			s.event(EventConnected)
			if row.message == nil {
				row.message = &waE2E.Message{Conversation: proto.String("poison")}
			}
			var id string
			var err error
			if row.request.Malformed != "" {
				row.request.Text = "poison"
				id = w.write(row.request)
			} else {
				id, err = w.simulator.SendMessage(t.Context(), phone, "", row.message)
				w.g.Expect(err).NotTo(HaveOccurred())
			}
			w.g.Eventually(func() (kinds []delivery.MessageType) {
				for _, item := range s.accepted() {
					if item.ID == id {
						kinds = append(kinds, item.Type)
					}
				}
				return slices.Compact(kinds)
			}).Should(Equal(row.kinds))
			w.send("after")
			w.g.Eventually(s.texts).Should(ContainElement("after"))
			w.settled()
			w.g.Expect(slices.ContainsFunc(s.events(), Event.Over)).To(BeFalse(), "the connection goes on")
			keys := map[string]bool{}
			for _, item := range s.accepted() {
				if item.ID == id {
					keys[item.Key] = true
					encoded, err := item.Item()
					w.g.Expect(err).NotTo(HaveOccurred())
					w.g.Expect(len(encoded.Payload)).To(BeNumerically("<=", delivery.MaxMessagePayload))
				}
			}
			w.g.Expect(keys).To(HaveLen(1))
		})
	}
}

// TestAnUndecryptableMessageDoesNotHoldTheQueue: the own phone is asked for it beside the queue.
func TestAnUndecryptableMessageDoesNotHoldTheQueue(t *testing.T) {
	w, _, s := linked(t)
	w.settled()
	// A message that is being sent holds whatsmeow's lock until WhatsApp answers, and the request
	// to the phone waits for it.
	asked, answer := make(chan struct{}, 10), make(chan struct{})
	w.simulator.AnswerWith(func(request *waBinary.Node) *waBinary.Node {
		if request.Attrs["xmlns"] == "encrypt" {
			asked <- struct{}{}
			<-answer
		}
		return nil
	})
	sent := make(chan error, 1)
	go func() {
		_, err := s.client.SendMessage(s.ctx, types.NewJID(another, types.DefaultUserServer), &waE2E.Message{Conversation: proto.String("hello")})
		sent <- err
	}()
	w.g.Eventually(asked).Should(Receive())
	id := w.write(simulator.SendRequest{Text: "lost", Malformed: "garbage"})
	w.send("after")
	w.g.Eventually(s.texts).Should(Equal([]string{"after"}))
	kinds := []delivery.MessageType{}
	for _, item := range s.accepted() {
		kinds = append(kinds, item.Type)
	}
	w.g.Expect(kinds).To(Equal([]delivery.MessageType{delivery.TypeUndecryptable, delivery.TypeText}))
	close(answer)
	w.g.Eventually(sent).Should(Receive(BeNil()))
	w.g.Eventually(func() int {
		for _, e := range w.ledger(0) {
			if e.ID == id {
				return e.PhoneRequests
			}
		}
		return 0
	}).Should(Equal(1))
	w.settled()
}

// TestManyUndecryptableMessagesDoNotHoldTheQueue: beyond a number of them the own phone is not asked,
// and the messages of others go on.
func TestManyUndecryptableMessagesDoNotHoldTheQueue(t *testing.T) {
	for name, request := range map[string]simulator.SendRequest{
		"undecryptable": {Malformed: "garbage"},
		"unavailable":   {Unavailable: "view_once"},
	} {
		t.Run(name, func(t *testing.T) {
			w, _, s := linked(t)
			_, err := w.simulator.SendHistory(t.Context(), phone) // since then the device can write to its phone
			w.g.Expect(err).NotTo(HaveOccurred())
			w.settled()
			w.inject(simulator.FaultSenderOffline)
			s.taskMu.Lock() // as a request that WhatsApp does not answer
			request.Text = "lost"
			ids := map[string]bool{}
			for range maxTasks + 5 {
				ids[w.write(request)] = true
			}
			w.send("after")
			w.g.Eventually(s.texts).Should(ContainElement("after"))
			w.g.Expect(s.tasks.Load()).To(BeEquivalentTo(maxTasks), "as many requests wait")
			s.taskMu.Unlock()
			w.acknowledged()
			w.g.Eventually(s.tasks.Load).Should(BeZero())
			asked := 0
			for _, e := range w.ledger(0) {
				if ids[e.ID] {
					asked += e.PhoneRequests
				}
			}
			w.g.Expect(asked).To(And(BeNumerically(">", 0), BeNumerically("<=", maxTasks)))
			placeholders := map[string]bool{}
			for _, item := range s.accepted() {
				if item.Placeholder() {
					placeholders[item.ID] = true
				}
			}
			w.g.Expect(placeholders).To(Equal(ids))
		})
	}
}

// TestAnUnavailableMessage: it is handed over before its acknowledgement, and the phone's answer
// has the same key.
func TestAnUnavailableMessage(t *testing.T) {
	w, _, s := linked(t)
	_, err := w.simulator.SendHistory(t.Context(), phone) // since then the device can write to its phone
	w.g.Expect(err).NotTo(HaveOccurred())
	w.settled()
	w.write(simulator.SendRequest{Text: "once", Unavailable: "view_once"})
	w.g.Eventually(s.texts).Should(Equal([]string{"once"}))
	items := s.accepted()
	w.g.Expect(items).To(HaveLen(2))
	w.g.Expect(items[0].Type).To(Equal(delivery.TypeUnavailable))
	w.g.Expect(items[1].Key).To(Equal(items[0].Key))
	w.settled()
}

// TestTheLIDIsLearnedAfterARefusal: the message was decrypted under the sender's number, and comes
// again when its LID is known. It is found in the buffer under the number. If the buffer does
// not have it any more, its sender encrypts it again.
func TestTheLIDIsLearnedAfterARefusal(t *testing.T) {
	for name, row := range map[string]struct {
		forget  bool
		kinds   []delivery.MessageType
		retries int
	}{
		"it is in the buffer": {kinds: []delivery.MessageType{delivery.TypeText}},
		"the buffer has lost it": {
			forget: true, retries: 1, kinds: []delivery.MessageType{delivery.TypeUndecryptable, delivery.TypeText},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, taking, s := linked(t)
			w.settled()
			s.Close()
			s = w.connect(taking, func(o *Options) {
				o.Accept = func(context.Context, delivery.MessageItem) error { return errors.New("the database is away") }
			})
			s.event(EventConnected)
			w.write(simulator.SendRequest{From: contact, Text: "hello", Alone: true})
			s.event(EventDisconnected)
			s.Close()

			lid, err := w.simulator.LID(contact)
			w.g.Expect(err).NotTo(HaveOccurred())
			parsed, err := types.ParseJID(lid)
			w.g.Expect(err).NotTo(HaveOccurred())
			device, err := taking.Open(t.Context(), func(error) {})
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Expect(device.LIDs.PutLIDMapping(t.Context(), parsed.ToNonAD(), types.NewJID(contact, types.DefaultUserServer))).To(Succeed())
			if row.forget {
				_, err = w.db().ExecContext(t.Context(), "DELETE FROM whatsmeow_event_buffer")
				w.g.Expect(err).NotTo(HaveOccurred())
			}

			next := w.connect(taking)
			w.g.Eventually(next.texts).Should(Equal([]string{"hello"}))
			w.settled()
			var kinds []delivery.MessageType
			for _, item := range next.accepted() {
				kinds = append(kinds, item.Type)
			}
			w.g.Expect(kinds).To(Equal(row.kinds))
			w.g.Expect(w.simulator.Stats().Retries).To(BeEquivalentTo(row.retries))
		})
	}
}

// crash ends a connection as if its process was killed at a point: nothing that it does later
// has an effect.
type crash struct {
	wastore.EventBuffer
	wastore.SenderKeyStore
	point string
	nth   int

	mu      sync.Mutex
	reached map[string]int
	kill    func()
}

func (c *crash) reach(point string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reached[point]++
	if point == c.point && c.reached[point] == c.nth {
		c.kill()
	}
}

func (c *crash) DoDecryptionTxn(ctx context.Context, fn func(context.Context) error) error {
	err := c.EventBuffer.DoDecryptionTxn(ctx, fn)
	c.reach("decryption")
	return err
}

func (c *crash) ClearBufferedEventPlaintext(ctx context.Context, hash [32]byte) error {
	err := c.EventBuffer.ClearBufferedEventPlaintext(ctx, hash)
	c.reach("clearing")
	return err
}

func (c *crash) PutSenderKey(ctx context.Context, group, user string, key []byte) error {
	err := c.SenderKeyStore.PutSenderKey(ctx, group, user, key)
	c.reach("sender key")
	return err
}

// TestGroupFirstMessageCrash: the first message of a sender in a group has two encrypted parts.
// Wherever the process is killed, the message is handed over, under one key, and acknowledged.
func TestGroupFirstMessageCrash(t *testing.T) {
	for name, row := range map[string]struct {
		point string
		nth   int
		// pushed is how often it is handed over.
		pushed int
	}{
		"never":                                  {pushed: 1},
		"after the decryption of the sender key": {"decryption", 1, 1},
		"after the sender key was stored":        {"sender key", 1, 1},
		"after the sender key was cleared":       {"clearing", 1, 1},
		"while the message is decrypted":         {"sender key", 2, 1},
		"after the message was decrypted":        {"decryption", 2, 1},
		"after the push":                         {"push", 1, 2},
		"after the message was cleared":          {"clearing", 2, 1},
		"after the receipt":                      {"receipt", 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, w *environment) {
				taking := w.take()
				w.pair(taking, phone)
				first := w.connect(taking)
				first.event(EventConnected)
				group := w.group()
				w.acknowledged()
				first.Close()

				var mu sync.Mutex
				var pushed []delivery.MessageItem
				accept := func(_ context.Context, item delivery.MessageItem) error {
					mu.Lock()
					defer mu.Unlock()
					if item.Type == delivery.TypeText {
						pushed = append(pushed, item)
					}
					return nil
				}
				texts := func() []string {
					mu.Lock()
					defer mu.Unlock()
					return textsOf(pushed)
				}
				c := &crash{point: row.point, nth: row.nth, reached: map[string]int{}}
				killed := make(chan struct{})
				s, ctx := w.prepare(taking, func(o *Options) {
					c.EventBuffer, c.SenderKeyStore = o.Device.EventBuffer, o.Device.SenderKeys
					o.Device.EventBuffer, o.Device.SenderKeys = c, c
					o.Accept = func(ctx context.Context, item delivery.MessageItem) error {
						err := accept(ctx, item)
						if item.Type != delivery.TypeText {
							t.Errorf("handed over a %s as well", item.Type)
						}
						c.reach("push")
						return err
					}
				})
				c.kill = func() {
					s.cancel(errors.New("killed"))
					s.closeSocket()
					close(killed)
				}
				w.g.Expect(s.Connect(ctx)).To(Succeed())
				s.event(EventConnected)
				_, err := w.simulator.Write(t.Context(), simulator.SendRequest{From: contact, Chat: group, Text: "hello all"})
				w.g.Expect(err).NotTo(HaveOccurred())
				switch row.point {
				case "", "receipt":
					w.settled()
					c.reach("receipt")
				default:
					w.g.Eventually(killed).Should(BeClosed())
					w.g.Expect(w.simulator.Stats().Unacknowledged).To(Equal(1))
				}
				s.Close()

				next := w.connect(taking, func(o *Options) { o.Accept = accept })
				next.event(EventConnected)
				w.settled()
				w.g.Expect(texts()).To(Equal(slices.Repeat([]string{"hello all"}, row.pushed)))
				w.g.Expect(pushed[0].Key).To(Equal(pushed[len(pushed)-1].Key))
				w.g.Expect(w.simulator.Stats().Retries).To(BeZero())
			})
		})
	}
}

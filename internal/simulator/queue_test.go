package simulator

import (
	"fmt"
	"slices"
	"testing"

	. "github.com/onsi/gomega"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types/events"
)

// away pairs a client, disconnects it and makes a contact write that many messages.
func away(t *testing.T, s *Server, messages int) *client {
	t.Helper()
	g := wait(t)
	c := paired(t, s, "15551234567")
	g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
	c.Disconnect()
	c.forget()
	g.Eventually(func() int { return s.Stats().Connected }).Should(BeZero())
	for i := range messages {
		_, err := s.Send(t.Context(), c.jid(), "", fmt.Sprint(i))
		g.Expect(err).NotTo(HaveOccurred())
	}
	return c
}

func numbers(n int) []string {
	var out []string
	for i := range n {
		out = append(out, fmt.Sprint(i))
	}
	return out
}

// delivered counts the messages that were sent to a device at least once.
func delivered(s *Server) int {
	all, _ := s.Ledger(LedgerQuery{})
	n := 0
	for _, e := range all {
		if e.Stanza == "message" && e.Delivered > 0 {
			n++
		}
	}
	return n
}

// What waits at a login is sent in windows, in order; what is new comes after it.
func TestOfflineWindows(t *testing.T) {
	g := wait(t)
	s := serve(t, func(o *Options) { o.OfflineWindow = 3 })
	c := away(t, s, 10)
	c.setNoReceipts(true) // without acknowledgements, only the first window arrives
	g.Expect(c.Connect()).To(Succeed())
	g.Eventually(func() []string { return texts(c) }).Should(Equal(numbers(3)))
	g.Expect(first[*events.OfflineSyncPreview](t, c)).To(And(HaveField("Total", 10), HaveField("Messages", 10)))
	_, err := s.Send(t.Context(), c.jid(), "", "new")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(delivered(s)).To(Equal(3))
	g.Expect(of[*events.OfflineSyncCompleted](c)).To(BeEmpty())

	// WhatsApp Web asks for more.
	g.Expect(c.DangerousInternals().SendNode(t.Context(), waBinary.Node{Tag: "ib", Content: []waBinary.Node{ //nolint:staticcheck // the only way to send it
		{Tag: "offline_batch", Attrs: waBinary.Attrs{"count": "4"}},
	}})).To(Succeed())
	g.Eventually(func() []string { return texts(c) }).Should(Equal(numbers(7)))
	g.Expect(delivered(s)).To(Equal(7))

	// At the next login everything that was not acknowledged comes again, in order. The client
	// acknowledges now: what it has decrypted it recognises, and does not report again.
	c.Disconnect()
	c.forget()
	c.setNoReceipts(false)
	g.Expect(c.Connect()).To(Succeed())
	g.Eventually(func() []string { return texts(c) }).Should(Equal([]string{"7", "8", "9", "new"}))
	g.Expect(first[*events.OfflineSyncCompleted](t, c).Count).To(Equal(11))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	all, err := s.Ledger(LedgerQuery{})
	g.Expect(err).NotTo(HaveOccurred())
	i := 0
	for _, e := range all {
		if e.Stanza != "message" {
			continue
		}
		g.Expect(e.Delivered).To(Equal(map[bool]int{true: 2, false: 1}[i < 7]), "message %d", i)
		g.Expect(e.By).To(Equal("inactive"))
		g.Expect(e.FirstDelivered.After(e.LastDelivered)).To(BeFalse())
		g.Expect(e.Acknowledged.Before(e.LastDelivered)).To(BeFalse())
		i++
	}
	g.Expect(i).To(Equal(11))
	g.Expect(s.Stats().Redelivered).To(BeEquivalentTo(7))
	waitingEntries, err := s.Ledger(LedgerQuery{Device: c.jid(), Waiting: true})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(waitingEntries).To(BeEmpty())
}

// More messages wait than the queue of the client library can hold (2,048 nodes): with windows
// it gets them in order, from contacts and in a group.
func TestManyWaitAtLogin(t *testing.T) {
	const messages = 2500
	g := wait(t)
	s := serve(t)
	c := away(t, s, 0)
	chat, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15557654321", "15551234567"}})
	g.Expect(err).NotTo(HaveOccurred())
	for i := range messages {
		r := SendRequest{Device: c.jid(), From: fmt.Sprintf("1555765432%d", i%10), Text: fmt.Sprint(i)}
		if i%10 == 1 {
			r.Chat = chat
		}
		_, err := s.Write(t.Context(), r)
		g.Expect(err).NotTo(HaveOccurred())
	}
	g.Expect(c.Connect()).To(Succeed())
	withoutKeys := func() []string { return slices.DeleteFunc(texts(c), func(text string) bool { return text == "" }) }
	g.Eventually(withoutKeys).Should(HaveLen(messages))
	g.Expect(withoutKeys()).To(Equal(numbers(messages)))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	g.Expect(s.Stats().Redelivered).To(BeZero())
	g.Expect(s.Stats().Retries).To(BeZero())
}

// Without windows, everything that waits is sent at once.
func TestOfflineWithoutWindows(t *testing.T) {
	g := wait(t)
	s := serve(t, func(o *Options) { o.OfflineWindow = -1 })
	c := away(t, s, 250)
	c.setNoReceipts(true)
	g.Expect(c.Connect()).To(Succeed())
	g.Eventually(func() []string { return texts(c) }).Should(Equal(numbers(250)))
	g.Expect(of[*events.OfflineSyncCompleted](c)).To(BeEmpty(), "nothing was acknowledged")
}

// A connection on which too much is not acknowledged ends with a stream error.
func TestTooManyUnacknowledged(t *testing.T) {
	g := wait(t)
	s := serve(t, func(o *Options) { o.MaxUnacknowledged = 5 })
	c := paired(t, s, "15551234567")
	c.EnableAutoReconnect = false
	g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
	c.setNoReceipts(true)
	var oldest string
	for i := range 6 {
		id, err := s.Send(t.Context(), c.jid(), "", fmt.Sprint(i))
		g.Expect(err).NotTo(HaveOccurred())
		if i == 0 {
			oldest = id
		}
	}
	failure := first[*events.StreamError](t, c)
	ack := failure.Raw.GetChildByTag("ack")
	g.Expect(ack.Attrs).To(And(HaveKeyWithValue("id", oldest), HaveKeyWithValue("class", "message")))
	first[*events.Disconnected](t, c)
	g.Expect(s.Stats().Overdue).To(BeEquivalentTo(1))
	g.Expect(texts(c)).To(Equal(numbers(5)))

	c.setNoReceipts(false)
	c.forget()
	g.Expect(c.Connect()).To(Succeed())
	g.Eventually(func() []string { return texts(c) }).Should(Equal([]string{"5"}))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
}

// The ledger is read in parts.
func TestLedgerInParts(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := away(t, s, 5)
	control := Control{URL: s.ControlURL()}
	all, err := control.Ledger(t.Context(), LedgerQuery{Device: c.jid(), Waiting: true})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(all).To(HaveLen(5))
	part, err := control.Ledger(t.Context(), LedgerQuery{Waiting: true, After: all[1].Number, Limit: 2})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(part).To(Equal(all[2:4]))
	none, err := control.Ledger(t.Context(), LedgerQuery{Device: "15559999999"})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(none).To(BeEmpty())
	_, err = control.Ledger(t.Context(), LedgerQuery{Limit: -1})
	g.Expect(err).To(MatchError(ErrBadInput))
	_, err = control.Ledger(t.Context(), LedgerQuery{Device: "nobody"})
	g.Expect(err).To(MatchError(ErrBadInput))
}

// A flood: contacts write at a rate, and each device gets its messages in order.
func TestFlood(t *testing.T) {
	g := wait(t)
	s := serve(t)
	clients := []*client{paired(t, s, "15551111111"), paired(t, s, "15552222222"), paired(t, s, "15553333333")}
	control := Control{URL: s.ControlURL()}
	id, err := control.StartFlood(t.Context(), FloodRequest{Sessions: 2, Rate: 200, Seconds: 0.5, Contacts: 3, Size: 64})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(id).To(Equal(1))
	g.Eventually(func() ([]Flood, error) { return control.Floods(t.Context()) }).Should(ConsistOf(And(
		HaveField("Sent", int64(100)), HaveField("Failed", int64(0)), HaveField("Ended.IsZero()", false), HaveField("Devices", 2))))
	for _, c := range clients[:2] {
		g.Eventually(func() []string { return texts(c) }).Should(HaveLen(50))
		for i, text := range texts(c) {
			g.Expect(text).To(And(HaveLen(64), HavePrefix(fmt.Sprintf("Message %d of a flood", i+1))))
		}
	}
	g.Expect(texts(clients[2])).To(BeEmpty())

	_, err = control.StartFlood(t.Context(), FloodRequest{Devices: []string{"15553333333"}, Rate: 0.001, Seconds: 10000})
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(func() []string { return texts(clients[2]) }).Should(HaveLen(1), "the first is sent at once")
	_, err = control.StartFlood(t.Context(), FloodRequest{Rate: 2000, Seconds: 1000})
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(func() int { return len(texts(clients[0])) }).Should(BeNumerically(">", 60))
	s.StopFloods()
	sent := s.Stats().Sent
	g.Expect(s.Floods()).To(HaveEach(HaveField("Ended.IsZero()", false)), "nothing is sent afterwards")
	g.Expect(control.StopFloods(t.Context())).To(Succeed())
	g.Expect(s.Stats().Sent).To(Equal(sent))
	for _, bad := range []FloodRequest{{}, {Rate: 1}, {Rate: 1, Seconds: 1, Size: -1}} {
		_, err = control.StartFlood(t.Context(), bad)
		g.Expect(err).To(MatchError(ErrBadInput))
	}
	_, err = control.StartFlood(t.Context(), FloodRequest{Devices: []string{"15559999999"}, Rate: 1, Seconds: 1})
	g.Expect(err).To(MatchError(ErrNotFound))
}

// A full ledger forgets its older half, but nothing that waits.
func TestLedgerIsFull(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	s.mu.Lock()
	d, err := s.deviceLocked(c.jid())
	g.Expect(err).NotTo(HaveOccurred())
	waits := &entry{number: 1, device: d, id: "waits"}
	gone := &entry{number: 1, device: d, id: "gone", acked: 1}
	s.ledger = nil
	for range maxLedger / 2 {
		s.ledger = append(s.ledger, gone)
	}
	s.ledger[7] = waits
	for range maxLedger/2 - 1 {
		s.ledger = append(s.ledger, &entry{device: d, number: 1, acked: 1})
	}
	s.mu.Unlock()
	id, err := s.Send(t.Context(), c.jid(), "", "one more")
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(func() int64 { return s.Stats().Forgotten }).Should(BeEquivalentTo(maxLedger/2 - 1))
	g.Expect(entries(s, "gone")).To(BeEmpty())
	g.Expect(entries(s, "waits")).To(HaveLen(1))
	g.Expect(entries(s, id)).To(HaveLen(1))
}

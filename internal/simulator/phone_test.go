package simulator

import (
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types/events"
)

// withHistory makes the phone of a client send its history: the client can ask its phone for a
// message only in the session that the phone has begun.
func withHistory(t *testing.T, s *Server, c *client) {
	t.Helper()
	_, err := Control{URL: s.ControlURL()}.SendHistory(t.Context(), c.jid())
	wait(t).Expect(err).NotTo(HaveOccurred())
	first[*events.Message](t, c)
	wait(t).Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	c.forget()
}

// A client asks the phone for a message that was not encrypted for it.
func TestUnavailable(t *testing.T) {
	for name, offline := range map[string]bool{"the phone answers": false, "the phone does not answer": true} {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			c := paired(t, s, "15551234567")
			withHistory(t, s, c)
			if offline {
				_, err := s.Inject(Fault{Kind: FaultPhoneOffline})
				g.Expect(err).NotTo(HaveOccurred())
			}
			jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15557654321", "15551234567"}})
			g.Expect(err).NotTo(HaveOccurred())
			for _, chat := range []string{"", jid} {
				c.forget()
				id, err := s.Write(t.Context(), SendRequest{Device: c.jid(), From: "15557654321", Chat: chat, Text: "secret", Unavailable: "view_once"})
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(first[*events.UndecryptableMessage](t, c)).To(And(HaveField("IsUnavailable", true), HaveField("UnavailableType", events.UnavailableTypeViewOnce)))
				if !offline {
					m := received(t, c, "secret")
					g.Expect(m.Info.ID).To(Equal(id))
					g.Expect(m.UnavailableRequestID).NotTo(BeEmpty())
					g.Expect(m.Info.IsFromMe).To(BeFalse())
					g.Expect(m.Info.IsGroup).To(Equal(chat != ""))
				}
				g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
				g.Expect(withText(c, "secret")).To(HaveLen(map[bool]int{true: 0, false: 1}[offline]))
				g.Expect(entries(s, id)).To(ConsistOf(And(HaveField("Delivered", 1), HaveField("By", "ack"), HaveField("Retries", 0),
					HaveField("PhoneRequests", 1), HaveField("PhoneAnswers", map[bool]int{true: 0, false: 1}[offline]))))
			}
		})
	}
}

// The phone and the sender both answer for a message that could not be decrypted: it comes
// twice, with one id.
func TestPhoneAndSenderAnswer(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	withHistory(t, s, c)
	_, err := s.Send(t.Context(), c.jid(), "", "first")
	g.Expect(err).NotTo(HaveOccurred())
	m := received(t, c, "first")
	c.write(t, m.Info.Chat, "answer") // from now on it is not a pkmsg
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	c.Store.Container.(*memory).dropContacts(c.Store.GetLID())
	id, err := s.Send(t.Context(), c.jid(), "", "second")
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(func() []*events.Message { return withText(c, "second") }).Should(HaveLen(2))
	g.Expect(withText(c, "second")).To(And(HaveEach(HaveField("Info.ID", id)),
		ConsistOf(HaveField("RetryCount", 1), HaveField("UnavailableRequestID", Not(BeEmpty())))))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	g.Expect(entries(s, id)).To(ConsistOf(And(HaveField("Delivered", 2), HaveField("Encrypted", 2), HaveField("Retries", 1),
		HaveField("PhoneRequests", 1), HaveField("PhoneAnswers", 1), HaveField("By", "inactive"))))
}

// The receipts of contacts for what a client has sent.
func TestReceipts(t *testing.T) {
	const contact, other = "15557654321", "15558888888"
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{contact, other, "15551234567"}})
	g.Expect(err).NotTo(HaveOccurred())
	for name, row := range map[string]struct {
		r         ReceiptRequest
		receipts  int
		ids       []string
		kind, lid string
	}{
		"read":             {ReceiptRequest{From: []string{contact}, IDs: []string{"A"}, Type: "read"}, 1, []string{"A"}, "read", contact},
		"a list":           {ReceiptRequest{From: []string{contact}, IDs: []string{"A", "B", "C"}, Type: "played"}, 1, []string{"A", "B", "C"}, "played", contact},
		"in a group":       {ReceiptRequest{From: []string{contact}, Chat: jid, IDs: []string{"A"}, Type: "delivered"}, 1, []string{"A"}, "", contact},
		"grouped":          {ReceiptRequest{From: []string{contact, other}, Chat: jid, IDs: []string{"A"}, Type: "read"}, 2, []string{"A"}, "read", ""},
		"by the own phone": {ReceiptRequest{From: []string{"15551234567"}, IDs: []string{"A"}, Type: "read-self"}, 1, []string{"A"}, "read-self", "15551234567"},
	} {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			c.forget()
			row.r.Device = c.jid()
			_, err := s.Receipt(t.Context(), row.r)
			g.Expect(err).NotTo(HaveOccurred())
			g.Eventually(func() []*events.Receipt { return of[*events.Receipt](c) }).Should(HaveLen(row.receipts))
			g.Expect(of[*events.Receipt](c)).To(HaveEach(And(HaveField("MessageIDs", row.ids), HaveField("Type", BeEquivalentTo(row.kind)))))
			if row.lid != "" {
				lid, err := s.LID(row.lid)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(of[*events.Receipt](c)[0].Sender.String()).To(Equal(lid))
			}
			g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
		})
	}
	t.Run("grouped, of several messages", func(t *testing.T) {
		g := wait(t)
		c.forget()
		_, err := s.Receipt(t.Context(), ReceiptRequest{Device: c.jid(), From: []string{contact, other}, Chat: jid, IDs: []string{"A", "B"}, Type: "played"})
		g.Expect(err).NotTo(HaveOccurred())
		g.Eventually(func() []*events.Receipt { return of[*events.Receipt](c) }).Should(ConsistOf(
			HaveField("MessageIDs", []string{"A"}), HaveField("MessageIDs", []string{"A"}),
			HaveField("MessageIDs", []string{"B"}), HaveField("MessageIDs", []string{"B"})))
	})
	t.Run("a phone could not decrypt a message", func(t *testing.T) {
		g := wait(t)
		lid, err := s.LID(contact)
		g.Expect(err).NotTo(HaveOccurred())
		_, err = s.Send(t.Context(), c.jid(), lid, "hello")
		g.Expect(err).NotTo(HaveOccurred())
		chat := received(t, c, "hello").Info.Chat
		c.write(t, chat, "answer")
		sent, err := s.Received(c.jid())
		g.Expect(err).NotTo(HaveOccurred())
		_, err = s.Receipt(t.Context(), ReceiptRequest{Device: c.jid(), From: []string{lid}, IDs: []string{sent[0].ID}, Type: "retry"})
		g.Expect(err).NotTo(HaveOccurred())
		g.Eventually(func() ([]Message, error) { return s.Received(c.jid()) }).Should(And(HaveLen(2),
			HaveEach(And(HaveField("Text", "answer"), HaveField("ID", sent[0].ID), HaveField("Problem", "")))))
	})
	t.Run("receipts that are not possible", func(t *testing.T) {
		g := wait(t)
		for _, r := range []ReceiptRequest{{}, {Type: "read"}, {Type: "read", From: []string{contact, other}, IDs: []string{"A"}},
			{Type: "retry", From: []string{contact}, IDs: []string{"A", "B"}}} {
			r.Device = c.jid()
			_, err := s.Receipt(t.Context(), r)
			g.Expect(err).To(MatchError(ErrBadInput))
		}
	})
}

// Calls with each end.
func TestCalls(t *testing.T) {
	s := serve(t)
	c := paired(t, s, "15551234567")
	jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15557654321", "15551234567"}})
	wait(t).Expect(err).NotTo(HaveOccurred())
	for _, end := range CallEnds() {
		t.Run(end, func(t *testing.T) {
			g := wait(t)
			c.forget()
			id, err := s.Call(t.Context(), CallRequest{Device: c.jid(), From: "15557654321", End: end, Video: true})
			g.Expect(err).NotTo(HaveOccurred())
			offer := first[*events.CallOffer](t, c)
			g.Expect(offer.CallID).To(Equal(id))
			g.Expect(offer.CallCreatorAlt.User).To(Equal("15557654321"))
			video := offer.Data.GetChildByTag("video")
			g.Expect(video.Tag).To(Equal("video"))
			if end == "rejected" {
				g.Expect(first[*events.CallReject](t, c).CallID).To(Equal(id))
			} else {
				g.Expect(first[*events.CallTerminate](t, c)).To(And(HaveField("CallID", id), HaveField("Reason", callEnds[end].Attrs["reason"])))
			}
		})
	}
	g := wait(t)
	_, err = s.Call(t.Context(), CallRequest{Device: c.jid(), Group: jid, End: "missed"})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(first[*events.CallOfferNotice](t, c)).To(And(HaveField("Media", "audio"), HaveField("GroupJID.User", HavePrefix("12036"))))
	_, err = s.Call(t.Context(), CallRequest{Device: c.jid(), End: "never"})
	g.Expect(err).To(MatchError(ErrBadInput))
	g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
}

// Malformed messages of strangers: how the client acknowledges each, and that the next valid
// message arrives.
func TestMalformedMessages(t *testing.T) {
	for _, row := range []struct {
		malformed string
		by        string
		retries   bool
	}{
		{malformedKeys, "ack", false},           // the library panics, and acknowledges
		{malformedSenderKey, "inactive", false}, // it reports the text in it
		{malformedGarbage, "ack", true},
		{malformedOnce, "ack", true}, // here the sender is offline
		{malformedEmpty, "ack", true},
		{malformedNothing, "nack 488", false},
		{malformedProtobuf, "nack 491", false},
		{malformedVersion, "inactive", false},
		{malformedParticipant, "nack 487", false},
		{malformedGroupKey, "ack", true},
	} {
		t.Run(row.malformed, func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			c := paired(t, s, "15551234567")
			_, err := s.Inject(Fault{Kind: FaultSenderOffline})
			g.Expect(err).NotTo(HaveOccurred())
			_, err = s.Inject(Fault{Kind: FaultPhoneOffline})
			g.Expect(err).NotTo(HaveOccurred())
			id, err := s.Write(t.Context(), SendRequest{Device: c.jid(), Text: "strange", Malformed: row.malformed})
			g.Expect(err).NotTo(HaveOccurred())
			g.Eventually(func() []LedgerEntry { return entries(s, id) }).Should(ConsistOf(And(HaveField("By", row.by), HaveField("Delivered", 1))))
			g.Expect(entries(s, id)[0].Retries > 0).To(Equal(row.retries))
			_, err = s.Send(t.Context(), c.jid(), "15557654321", "valid")
			g.Expect(err).NotTo(HaveOccurred())
			received(t, c, "valid")
			g.Expect(withText(c, "strange")).To(HaveLen(map[bool]int{true: 1, false: 0}[row.malformed == malformedSenderKey]))
		})
	}
	wait(t).Expect(Malformations()).To(HaveLen(10), "each has a row")
}

func TestAMessageThatIsMalformedOnce(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	id, err := s.Write(t.Context(), SendRequest{Device: c.jid(), Text: "now valid", Malformed: malformedOnce})
	g.Expect(err).NotTo(HaveOccurred())
	received(t, c, "now valid")
	g.Eventually(func() []LedgerEntry { return entries(s, id) }).Should(ConsistOf(And(HaveField("Retries", 1), HaveField("Encrypted", 2), HaveField("By", "inactive"))))
}

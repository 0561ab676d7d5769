package simulator

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	clocktesting "k8s.io/utils/clock/testing"
)

// lastMessage waits for the message with that id, without the keys in it.
func lastMessage(t *testing.T, c *client, id string) *events.Message {
	t.Helper()
	find := func() *events.Message {
		for _, m := range of[*events.Message](c) {
			if m.Info.ID == id && m.Message.GetSenderKeyDistributionMessage() == nil {
				return m
			}
		}
		return nil
	}
	wait(t).Eventually(find).ShouldNot(BeNil())
	return find()
}

// A client receives and decrypts each kind of message, and the ledger says that it did.
func TestKinds(t *testing.T) {
	const contact = "15557654321"
	s := serve(t)
	c := paired(t, s, "15551234567")
	write := func(t *testing.T, r SendRequest) *events.Message {
		t.Helper()
		g := wait(t)
		r.Device = c.jid()
		if r.From == "" {
			r.From = contact
		}
		id, err := s.Write(t.Context(), r)
		g.Expect(err).NotTo(HaveOccurred())
		m := lastMessage(t, c, id)
		g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
		kind := r.Kind
		if kind == "" {
			kind = KindText
		}
		g.Expect(entries(s, id)).To(ConsistOf(And(HaveField("Kind", kind), HaveField("Delivered", 1), HaveField("Retries", 0), HaveField("By", "inactive"))))
		return m
	}
	for _, row := range []struct {
		name  string
		r     SendRequest
		check func(g *WithT, m *events.Message)
	}{
		{"text", SendRequest{Text: "hello"}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetConversation()).To(Equal("hello"))
			g.Expect(m.Message.GetMessageContextInfo().GetMessageSecret()).To(HaveLen(secretLength))
		}},
		{"mentions", SendRequest{Text: "hello", Mentions: []string{"15553333333"}}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetExtendedTextMessage().GetContextInfo().GetMentionedJID()).To(Equal([]string{"15553333333@s.whatsapp.net"}))
		}},
		{"forwarded", SendRequest{Text: "hello", Forwarded: true}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetExtendedTextMessage().GetContextInfo().GetIsForwarded()).To(BeTrue())
		}},
		{"ephemeral", SendRequest{Text: "hello", Ephemeral: true}, func(g *WithT, m *events.Message) {
			g.Expect(m.IsEphemeral).To(BeTrue())
			g.Expect(m.Message.GetExtendedTextMessage().GetText()).To(Equal("hello"))
		}},
		{"an answer to an advert", SendRequest{Text: "hello", Advert: "https://example.com/ad"}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetExtendedTextMessage().GetContextInfo().GetExternalAdReply().GetSourceURL()).To(Equal("https://example.com/ad"))
		}},
		{"location", SendRequest{Kind: KindLocation, Text: "Home", Latitude: 41.4, Longitude: 2.2}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetLocationMessage().GetDegreesLatitude()).To(Equal(41.4))
		}},
		{"live location", SendRequest{Kind: KindLiveLocation, Latitude: 41.4, Longitude: 2.2}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetLiveLocationMessage().GetDegreesLongitude()).To(Equal(2.2))
		}},
		{"one contact", SendRequest{Kind: KindContact, Names: []string{"Ann"}}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetContactMessage().GetVcard()).To(ContainSubstring("FN:Ann"))
		}},
		{"contacts", SendRequest{Kind: KindContact, Names: []string{"Ann", "Bob"}}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetContactsArrayMessage().GetContacts()).To(HaveLen(2))
		}},
		{"order", SendRequest{Kind: KindOrder, Text: "one pizza"}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetOrderMessage().GetMessage()).To(Equal("one pizza"))
		}},
		{"product", SendRequest{Kind: KindProduct, Text: "pizza"}, func(g *WithT, m *events.Message) {
			g.Expect(m.Message.GetProductMessage().GetProduct().GetTitle()).To(Equal("pizza"))
		}},
		{"view once", SendRequest{Kind: KindImage, ViewOnce: true}, func(g *WithT, m *events.Message) {
			g.Expect(m.IsViewOnceV2).To(BeTrue())
			g.Expect(m.Message.GetImageMessage()).NotTo(BeNil())
		}},
	} {
		t.Run(row.name, func(t *testing.T) { row.check(wait(t), write(t, row.r)) })
	}
	lid, err := s.LID(contact)
	wait(t).Expect(err).NotTo(HaveOccurred())
	for name, from := range map[string]string{"by number": contact, "by LID": lid} {
		t.Run("messages about others, "+name, func(t *testing.T) {
			g := wait(t)
			target := write(t, SendRequest{From: from, Text: "first"})
			key := target.Info.ID
			answer := write(t, SendRequest{From: from, Text: "answer", Quote: key})
			info := answer.Message.GetExtendedTextMessage().GetContextInfo()
			g.Expect(info.GetStanzaID()).To(Equal(key))
			g.Expect(info.GetParticipant()).To(Equal(target.Info.Sender.String()))
			g.Expect(info.GetQuotedMessage().GetConversation()).To(Equal("first"))

			reaction := write(t, SendRequest{From: from, Kind: KindReaction, Target: key, Text: "👍"})
			g.Expect(reaction.Message.GetReactionMessage().GetKey().GetID()).To(Equal(key))
			removed := write(t, SendRequest{From: from, Kind: KindReaction, Target: key})
			g.Expect(removed.Info.Edit).To(Equal(types.EditAttributeSenderRevoke))

			edit := write(t, SendRequest{From: from, Kind: KindEdit, Target: key, Text: "changed"})
			g.Expect(edit.IsEdit).To(BeTrue())
			g.Expect(edit.Message.GetProtocolMessage().GetEditedMessage().GetConversation()).To(Equal("changed"))
			g.Expect(edit.Info.Edit).To(Equal(types.EditAttributeMessageEdit))
			secret := write(t, SendRequest{From: from, Kind: KindEdit, Encrypted: true, Target: key, Text: "changed again"})
			plain, err := c.DecryptSecretEncryptedMessage(t.Context(), secret)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(plain.GetProtocolMessage().GetEditedMessage().GetConversation()).To(Equal("changed again"))
			g.Expect(plain.GetProtocolMessage().GetKey().GetID()).To(Equal(key))

			revoke := write(t, SendRequest{From: from, Kind: KindRevoke, Target: key})
			g.Expect(revoke.Message.GetProtocolMessage().GetType()).To(Equal(waE2E.ProtocolMessage_REVOKE))
			g.Expect(revoke.Info.Edit).To(Equal(types.EditAttributeSenderRevoke))

			poll := write(t, SendRequest{From: from, Kind: KindPoll, Text: "Where?", Options: []string{"here", "there"}})
			g.Expect(poll.Message.GetPollCreationMessage().GetOptions()).To(HaveLen(2))
			vote := write(t, SendRequest{From: from, Kind: KindVote, Target: poll.Info.ID, Options: []string{"there"}})
			decrypted, err := c.DecryptPollVote(t.Context(), vote)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(decrypted.GetSelectedOptions()).To(HaveLen(1))
		})
	}
	t.Run("a vote on a poll of the client", func(t *testing.T) {
		g := wait(t)
		chat, err := types.ParseJID(lid)
		g.Expect(err).NotTo(HaveOccurred())
		sent, err := c.SendMessage(t.Context(), chat, c.BuildPollCreation("When?", []string{"now", "later"}, 1))
		g.Expect(err).NotTo(HaveOccurred())
		vote := write(t, SendRequest{From: lid, Kind: KindVote, Target: sent.ID, Options: []string{"now"}})
		decrypted, err := c.DecryptPollVote(t.Context(), vote)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(decrypted.GetSelectedOptions()).To(HaveLen(1))
	})
	t.Run("a sender by its LID alone", func(t *testing.T) {
		m := write(t, SendRequest{From: lid, Text: "alone", Alone: true})
		wait(t).Expect(m.Info.SenderAlt.IsEmpty()).To(BeTrue())
	})
}

// What is never possible is an error.
func TestWriteRefuses(t *testing.T) {
	s := serve(t)
	c := paired(t, s, "15551234567")
	for name, row := range map[string]struct {
		r    SendRequest
		kind error
	}{
		"no kind":                         {SendRequest{Kind: "telegram"}, ErrBadInput},
		"no text":                         {SendRequest{}, ErrBadInput},
		"an edit without a target":        {SendRequest{Kind: KindEdit, Text: "x"}, ErrBadInput},
		"a text with a target":            {SendRequest{Text: "x", Target: "y"}, ErrBadInput},
		"a poll with one option":          {SendRequest{Kind: KindPoll, Text: "x", Options: []string{"y"}}, ErrBadInput},
		"a contact without a name":        {SendRequest{Kind: KindContact}, ErrBadInput},
		"an encrypted text":               {SendRequest{Text: "x", Encrypted: true}, ErrBadInput},
		"an unknown target":               {SendRequest{Kind: KindRevoke, Target: "y"}, ErrNotFound},
		"an unknown quote":                {SendRequest{Text: "x", Quote: "y"}, ErrNotFound},
		"an unknown message again":        {SendRequest{Again: "y"}, ErrNotFound},
		"an unknown malformation":         {SendRequest{Text: "x", Malformed: "y"}, ErrBadInput},
		"a contact to another person":     {SendRequest{Text: "x", Chat: "15553333333"}, ErrBadInput},
		"the own account to itself":       {SendRequest{Text: "x", From: "15551234567"}, ErrBadInput},
		"a device that writes for itself": {SendRequest{Text: "x", From: c.jid(), Chat: "15553333333"}, ErrBadInput},
		"an unknown LID":                  {SendRequest{Text: "x", From: "1@lid"}, ErrNotFound},
		"a file that is too large":        {SendRequest{Kind: KindImage, File: &File{Size: maxFileSize + 1}}, ErrBadInput},
	} {
		t.Run(name, func(t *testing.T) {
			row.r.Device = c.jid()
			_, err := s.Write(t.Context(), row.r)
			wait(t).Expect(err).To(MatchError(row.kind))
		})
	}
	_, err := s.Write(t.Context(), SendRequest{Text: "x"})
	wait(t).Expect(err).To(MatchError(ErrBadInput), "neither a device nor a group")
}

// The own account writes on its phone or on another linked device: the client gets a copy.
func TestOwnMessages(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15557654321", "15551234567"}})
	g.Expect(err).NotTo(HaveOccurred())
	lid, err := s.LID("15551234567")
	g.Expect(err).NotTo(HaveOccurred())
	for name, row := range map[string]struct {
		from, chat string
		device     uint16
	}{
		"the phone":                       {"15551234567", "15557654321", 0},
		"the phone, by LID":               {lid, "15557654321", 0},
		"another device":                  {"15551234567:77@s.whatsapp.net", "15557654321", 77},
		"the phone in a group":            {"15551234567", jid, 0},
		"another device writes to groups": {"15551234567:78@s.whatsapp.net", jid, 78},
	} {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			id, err := s.Write(t.Context(), SendRequest{Device: c.jid(), From: row.from, Chat: row.chat, Text: name})
			g.Expect(err).NotTo(HaveOccurred())
			m := lastMessage(t, c, id)
			g.Expect(m.Info.IsFromMe).To(BeTrue())
			g.Expect(m.Info.Sender.Device).To(Equal(row.device))
			g.Expect(textOf(m.Message)).To(Equal(name))
			if row.chat == jid {
				g.Expect(m.Info.Chat.String()).To(Equal(jid))
			} else {
				g.Expect(m.Info.DeviceSentMeta.DestinationJID).To(Equal(m.Info.Chat.String()))
				g.Expect([]string{m.Info.Chat.User, m.Info.RecipientAlt.User}).To(ContainElement("15557654321"))
			}
			g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
			g.Expect(entries(s, id)).To(ConsistOf(And(HaveField("By", "sender"), HaveField("Phone", "15551234567"), HaveField("Delivered", 1))))
		})
	}
}

// The same message can come twice: encrypted again, and under the other address of its sender.
func TestSameMessageAgain(t *testing.T) {
	g := wait(t)
	clock := clocktesting.NewFakeClock(time.Now())
	s := serve(t, func(o *Options) { o.Clock = clock })
	c := paired(t, s, "15551234567")
	lid, err := s.LID(DefaultContact)
	g.Expect(err).NotTo(HaveOccurred())
	id, err := s.Send(t.Context(), c.jid(), "", "hello")
	g.Expect(err).NotTo(HaveOccurred())
	received(t, c, "hello")
	for _, from := range []string{"", lid} {
		clock.Step(2 * time.Second)
		again, err := s.Write(t.Context(), SendRequest{Device: c.jid(), From: from, Again: id})
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(again).To(Equal(id))
	}
	g.Eventually(func() []*events.Message { return withText(c, "hello") }).Should(HaveLen(3), "the library does not compare ids")
	all := withText(c, "hello")
	g.Expect(all[2].Info.Sender.String()).To(Equal(lid))
	g.Expect(all[2].Info.SenderAlt).To(Equal(all[0].Info.Sender))
	g.Expect(all).To(HaveEach(HaveField("Info.Timestamp", all[0].Info.Timestamp)))
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	g.Expect(entries(s, id)).To(And(HaveLen(3), acknowledged("inactive")))
	_, err = s.Write(t.Context(), SendRequest{Device: c.jid(), From: "15559999999", Again: id})
	g.Expect(err).To(MatchError(ErrBadInput))
}

package simulator

import (
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
)

// entries returns what the ledger has of a message, for each device.
func entries(s *Server, id string) []LedgerEntry {
	all, _ := s.Ledger(LedgerQuery{Limit: maxLedger})
	var out []LedgerEntry
	for _, e := range all {
		if e.ID == id {
			out = append(out, e)
		}
	}
	return out
}

// acknowledged matches entries of a message that was delivered and acknowledged once.
func acknowledged(by string) OmegaMatcher {
	return HaveEach(And(HaveField("Delivered", 1), HaveField("Encrypted", 1), HaveField("Retries", 0),
		HaveField("By", by), HaveField("Acknowledged.IsZero()", false)))
}

// withText returns the client's messages with that text.
func withText(c *client, text string) []*events.Message {
	var out []*events.Message
	for _, m := range of[*events.Message](c) {
		if textOf(m.Message) == text {
			out = append(out, m)
		}
	}
	return out
}

// received waits for the client's message with that text.
func received(t *testing.T, c *client, text string) *events.Message {
	t.Helper()
	wait(t).Eventually(func() []*events.Message { return withText(c, text) }).Should(HaveLen(1), text)
	return withText(c, text)[0]
}

// Members of a group write to all its devices. The first message of a sender contains its key
// too, so that the client reports it twice; the later ones do not.
func TestGroup(t *testing.T) {
	for name, byNumber := range map[string]bool{"members are named by LIDs": false, "members are named by numbers": true} {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			s := serve(t)
			a, b := paired(t, s, "15551111111"), paired(t, s, "15552222222")
			jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15557654321", "15551111111", "15552222222"}, ByNumber: byNumber})
			g.Expect(err).NotTo(HaveOccurred())
			for _, c := range []*client{a, b} {
				joined := first[*events.JoinedGroup](t, c)
				g.Expect(joined.JID.String()).To(Equal(jid))
				g.Expect(joined.Participants).To(HaveLen(3))
			}

			id, err := s.Write(t.Context(), SendRequest{From: "15557654321", Chat: jid, Text: "one"})
			g.Expect(err).NotTo(HaveOccurred())
			for _, c := range []*client{a, b} {
				m := received(t, c, "one")
				g.Expect(m.Info.ID).To(Equal(id))
				g.Expect(m.Info.Chat.String()).To(Equal(jid))
				g.Expect(m.Info.IsGroup).To(BeTrue())
				sender, other := m.Info.Sender, m.Info.SenderAlt
				if !byNumber {
					sender, other = other, sender
				}
				g.Expect(sender.User).To(Equal("15557654321"))
				g.Expect(other.Server).To(Equal(types.HiddenUserServer))
				g.Expect(of[*events.Message](c)).To(HaveLen(2), "the key is a message too")
			}
			g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
			g.Expect(entries(s, id)).To(And(HaveLen(2), acknowledged("inactive"),
				HaveEach(And(HaveField("Chat", jid), HaveField("Phone", "15557654321"), HaveField("Kind", KindText)))))

			_, err = s.Write(t.Context(), SendRequest{From: "15557654321", Chat: jid, Text: "two"})
			g.Expect(err).NotTo(HaveOccurred())
			received(t, a, "two")
			received(t, b, "two")
			g.Expect(of[*events.Message](a)).To(HaveLen(3), "without the key")

			// When a member has left, the others use new keys.
			g.Expect(s.ChangeGroup(t.Context(), GroupChange{Group: jid, Change: "remove", Members: []string{"15552222222"}})).To(Succeed())
			_, err = s.Write(t.Context(), SendRequest{From: "15557654321", Chat: jid, Text: "three"})
			g.Expect(err).NotTo(HaveOccurred())
			received(t, a, "three")
			g.Expect(of[*events.Message](a)).To(HaveLen(5), "with a new key")
			g.Expect(s.ChangeGroup(t.Context(), GroupChange{Group: jid, Change: "add", Members: []string{"15552222222"}})).To(Succeed())
			_, err = s.Write(t.Context(), SendRequest{From: "15557654321", Chat: jid, Text: "four"})
			g.Expect(err).NotTo(HaveOccurred())
			received(t, a, "four")
			received(t, b, "four")
			g.Expect(withText(b, "three")).To(BeEmpty())
			g.Expect(s.Stats().Retries).To(BeZero())

			_, err = s.Write(t.Context(), SendRequest{From: "15559999999", Chat: jid, Text: "from outside"})
			g.Expect(err).To(MatchError(ErrNotFound))
			_, err = s.Write(t.Context(), SendRequest{From: "15557654321", Chat: "120363000000009999@g.us", Text: "nowhere"})
			g.Expect(err).To(MatchError(ErrNotFound))
		})
	}
}

// A device that has lost its keys asks for a message in a group again, and gets it with the
// key of the sender.
func TestRetryInGroup(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551111111")
	withHistory(t, s, c)
	_, err := s.Inject(Fault{Kind: FaultPhoneOffline})
	g.Expect(err).NotTo(HaveOccurred())
	jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15557654321", "15551111111"}})
	g.Expect(err).NotTo(HaveOccurred())
	_, err = s.Write(t.Context(), SendRequest{From: "15557654321", Chat: jid, Text: "one"})
	g.Expect(err).NotTo(HaveOccurred())
	received(t, c, "one")
	c.Store.Container.(*memory).dropContacts(c.Store.GetLID())
	id, err := s.Write(t.Context(), SendRequest{From: "15557654321", Chat: jid, Text: "two"})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(received(t, c, "two").RetryCount).To(Equal(1))
	_, err = s.Write(t.Context(), SendRequest{From: "15557654321", Chat: jid, Text: "three"})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(received(t, c, "three").RetryCount).To(BeZero())
	g.Eventually(func() int { return s.Stats().Unacknowledged }).Should(BeZero())
	g.Expect(entries(s, id)).To(ConsistOf(And(HaveField("Delivered", 2), HaveField("Encrypted", 2), HaveField("Retries", 1),
		HaveField("By", "inactive"), HaveField("PhoneRequests", 1), HaveField("PhoneAnswers", 0))))
}

// A client writes to a group: the phones of the members and their other devices read it.
func TestClientWritesToGroup(t *testing.T) {
	g := wait(t)
	s := serve(t)
	a, b := paired(t, s, "15551111111"), paired(t, s, "15552222222")
	jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15551111111", "15552222222", "15557654321"}})
	g.Expect(err).NotTo(HaveOccurred())
	group, err := types.ParseJID(jid)
	g.Expect(err).NotTo(HaveOccurred())
	for _, text := range []string{"one", "two"} {
		a.write(t, group, text)
		g.Expect(received(t, b, text).Info.Chat).To(Equal(group))
	}
	g.Expect(s.Received(a.jid())).To(HaveExactElements(
		And(HaveField("Text", "one"), HaveField("To", jid), HaveField("Problem", "")), HaveField("Text", "two")))
	g.Eventually(func() []*events.Receipt { return of[*events.Receipt](a) }).ShouldNot(BeEmpty())
	g.Expect(s.Stats().Undecryptable).To(BeZero())
	b.write(t, group, "answer")
	received(t, a, "answer")
	groups, err := a.GetJoinedGroups(t.Context())
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(groups).To(ConsistOf(HaveField("Name", "Friends")))
}

// The changes of a group, as a client reports them.
func TestGroupChanges(t *testing.T) {
	s := serve(t)
	c := paired(t, s, "15551111111")
	jid, err := s.CreateGroup(GroupRequest{Subject: "Friends", Members: []string{"15557654321", "15551111111"}})
	wait(t).Expect(err).NotTo(HaveOccurred())
	member := []string{"15553333333"}
	for _, row := range []struct {
		change GroupChange
		check  func(*events.GroupInfo) bool
	}{
		{GroupChange{Change: "subject", Value: "Family"}, func(e *events.GroupInfo) bool { return e.Name != nil && e.Name.Name == "Family" }},
		{GroupChange{Change: "description", Value: "All of us"}, func(e *events.GroupInfo) bool { return e.Topic != nil && e.Topic.Topic == "All of us" }},
		{GroupChange{Change: "description"}, func(e *events.GroupInfo) bool { return e.Topic != nil && e.Topic.TopicDeleted }},
		{GroupChange{Change: "add", Members: member}, func(e *events.GroupInfo) bool { return len(e.Join) == 1 }},
		{GroupChange{Change: "promote", Members: member}, func(e *events.GroupInfo) bool { return len(e.Promote) == 1 }},
		{GroupChange{Change: "demote", Members: member}, func(e *events.GroupInfo) bool { return len(e.Demote) == 1 }},
		{GroupChange{Change: "remove", Members: member, By: "15557654321"}, func(e *events.GroupInfo) bool { return len(e.Leave) == 1 && e.SenderPN.User == "15557654321" }},
		{GroupChange{Change: "announcement"}, func(e *events.GroupInfo) bool { return e.Announce != nil && e.Announce.IsAnnounce }},
		{GroupChange{Change: "not_announcement"}, func(e *events.GroupInfo) bool { return e.Announce != nil && !e.Announce.IsAnnounce }},
		{GroupChange{Change: "locked"}, func(e *events.GroupInfo) bool { return e.Locked != nil && e.Locked.IsLocked }},
		{GroupChange{Change: "unlocked"}, func(e *events.GroupInfo) bool { return e.Locked != nil && !e.Locked.IsLocked }},
		{GroupChange{Change: "ephemeral", Value: "86400"}, func(e *events.GroupInfo) bool { return e.Ephemeral != nil && e.Ephemeral.DisappearingTimer == 86400 }},
		{GroupChange{Change: "ephemeral", Value: "0"}, func(e *events.GroupInfo) bool { return e.Ephemeral != nil && !e.Ephemeral.IsEphemeral }},
		{GroupChange{Change: "invite", Value: "abc"}, func(e *events.GroupInfo) bool { return e.NewInviteLink != nil }},
	} {
		t.Run(row.change.Change, func(t *testing.T) {
			g := wait(t)
			c.forget()
			row.change.Group = jid
			g.Expect(s.ChangeGroup(t.Context(), row.change)).To(Succeed())
			g.Expect(row.check(first[*events.GroupInfo](t, c))).To(BeTrue())
		})
	}
	t.Run("the account is added again", func(t *testing.T) {
		g := wait(t)
		c.forget()
		g.Expect(s.ChangeGroup(t.Context(), GroupChange{Group: jid, Change: "remove", Members: []string{"15551111111"}})).To(Succeed())
		g.Expect(s.ChangeGroup(t.Context(), GroupChange{Group: jid, Change: "add", Members: []string{"15551111111"}})).To(Succeed())
		g.Expect(first[*events.GroupInfo](t, c).Leave).To(HaveLen(1))
		g.Expect(first[*events.JoinedGroup](t, c).Name).To(Equal("Family"))
	})
	t.Run("changes that are not possible", func(t *testing.T) {
		g := wait(t)
		for _, change := range []GroupChange{{Change: "colour"}, {Change: "add"}, {Change: "subject", Members: member}, {Change: "ephemeral", Value: "soon"}} {
			change.Group = jid
			g.Expect(s.ChangeGroup(t.Context(), change)).To(MatchError(ErrBadInput))
		}
		g.Expect(s.ChangeGroup(t.Context(), GroupChange{Group: "1@g.us", Change: "locked"})).To(MatchError(ErrNotFound))
	})
	wait(t).Eventually(func() int { return waiting(s, c) }).Should(BeZero(), "the client acknowledges all")
}

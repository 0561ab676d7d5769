package simulator

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
)

// A client gives each contact a token with its first message; the contact's device stores
// it and proves with it that it is no stranger.
func TestPrivacyTokens(t *testing.T) {
	g := wait(t)
	s := serve(t)
	a, b := paired(t, s, "15551111111"), paired(t, s, "15552222222")
	last := func(c *client) Message {
		all, err := s.Received(c.jid())
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(all).NotTo(BeEmpty())
		return all[len(all)-1]
	}
	stored := func(c *client) []byte {
		token, err := c.Store.PrivacyTokens.GetPrivacyToken(t.Context(), a.Store.GetLID().ToNonAD())
		g.Expect(err).NotTo(HaveOccurred())
		if token == nil {
			return nil
		}
		return token.Token
	}

	a.write(t, types.NewJID("15552222222", types.DefaultUserServer), "hello")
	g.Expect(last(a).Token).To(BeEmpty())
	g.Eventually(stored).WithArguments(b).ShouldNot(BeEmpty(), "b gets a's token")
	g.Expect(s.Stats().Tokens).To(BeEquivalentTo(1))

	b.write(t, types.NewJID("15551111111", types.DefaultUserServer), "hello yourself")
	g.Expect(last(b)).To(And(HaveField("Token", "tctoken"), HaveField("TokenValid", true)))

	// The other places that carry the token.
	g.Expect(b.SubscribePresence(t.Context(), a.Store.GetLID().ToNonAD())).To(Succeed())
	_, err := b.GetUserInfo(t.Context(), []types.JID{a.Store.GetLID().ToNonAD()})
	g.Expect(err).NotTo(HaveOccurred())
	_, err = b.GetProfilePictureInfo(t.Context(), a.Store.GetLID().ToNonAD(), nil)
	g.Expect(err).To(HaveOccurred())
	g.Expect(s.Stats().BadTokens).To(BeZero())

	// A token that a did not give.
	s.mu.Lock()
	clear(s.byPhone["15551111111"].contacts)
	s.mu.Unlock()
	b.write(t, types.NewJID("15551111111", types.DefaultUserServer), "it is me")
	g.Expect(last(b)).To(And(HaveField("Token", "tctoken"), HaveField("TokenValid", false)))
	g.Expect(s.Stats().BadTokens).To(BeEquivalentTo(1))
}

// The phone's history has the LIDs and tokens of contacts, and the secret for the tokens of
// those who gave none.
func TestHistoryHasTokens(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	friend, stranger := "15557654321", "15558888888"
	// The contact has given its token to the account's phone before the device was linked.
	s.mu.Lock()
	giver, err := s.accountLocked(friend)
	g.Expect(err).NotTo(HaveOccurred())
	own := s.byPhone["15551234567"]
	s.mu.Unlock()
	s.tokenStanza(giver, own, time.Now())

	_, err = s.SendHistory(t.Context(), c.jid(), friend, stranger)
	g.Expect(err).NotTo(HaveOccurred())
	notification := first[*events.Message](t, c).Message.GetProtocolMessage().GetHistorySyncNotification()
	_, err = c.DownloadHistorySync(t.Context(), notification, true)
	g.Expect(err).NotTo(HaveOccurred())
	for phone, kind := range map[string]string{friend: "tctoken", stranger: "cstoken"} {
		jid := types.NewJID(phone, types.DefaultUserServer)
		lid, err := c.Store.LIDs.GetLIDForPN(t.Context(), jid)
		g.Expect(err).NotTo(HaveOccurred())
		wanted, err := s.LID(phone)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(lid.String()).To(Equal(wanted))
		c.write(t, jid, "hello")
		all, err := s.Received(c.jid())
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(all[len(all)-1]).To(And(HaveField("Token", kind), HaveField("TokenValid", true)))
	}
	g.Expect(s.Stats().BadTokens).To(BeZero())
}

// A locked account cannot write to strangers, and its devices are informed. It can answer
// people who wrote to it, and write to those who gave it a token.
func TestReachOutLock(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	other := paired(t, s, "15559999999")
	_, err := s.Inject(Fault{Kind: FaultReachOutLock, Device: "15551234567", For: d(time.Hour)})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(first[*events.NotifyAccountReachoutTimelock](t, c)).To(And(
		HaveField("IsActive", true), HaveField("TimeEnforcementEnds.Time", BeTemporally("~", time.Now().Add(time.Hour), time.Minute))))

	jid := func(phone string) types.JID { return types.NewJID(phone, types.DefaultUserServer) }
	_, err = c.SendMessage(t.Context(), jid("15550000010"), conversation("hello"))
	g.Expect(err).To(MatchError(ContainSubstring("463")))
	g.Expect(s.Received(c.jid())).To(BeEmpty(), "nobody got it")
	g.Expect(s.Stats().ReachOutLocked).To(BeEquivalentTo(1))

	_, err = s.Send(t.Context(), c.jid(), "15550000011", "are you there?")
	g.Expect(err).NotTo(HaveOccurred())
	first[*events.Message](t, c)
	c.write(t, jid("15550000011"), "yes")
	_, err = s.Notify(t.Context(), c.jid(), "15550000012", "notification/privacy_token")
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
	c.write(t, jid("15550000012"), "hello")

	other.write(t, jid("15550000010"), "hello")
	g.Expect(of[*events.NotifyAccountReachoutTimelock](other)).To(BeEmpty())

	c.forget()
	_, err = s.Clear(FaultReachOutLock, "")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(first[*events.NotifyAccountReachoutTimelock](t, c).IsActive).To(BeFalse())
	c.write(t, jid("15550000010"), "hello")
}

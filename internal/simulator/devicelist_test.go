package simulator

import (
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
)

// devicesOf returns the devices that a client knows of an account, without the request that
// it makes for an account that it does not know.
func devicesOf(t *testing.T, c *client, jid types.JID) []types.JID {
	t.Helper()
	devices, err := c.GetUserDevices(t.Context(), []types.JID{jid})
	wait(t).Expect(err).NotTo(HaveOccurred())
	return devices
}

// Clients that know the devices of an account learn of each device that is linked or unlinked,
// and clients of the same account learn of it too.
func TestDeviceLists(t *testing.T) {
	g := wait(t)
	s := serve(t)
	a, b := paired(t, s, "15551111111"), paired(t, s, "15552222222")
	number, lid := b.Store.GetJID().ToNonAD(), b.Store.GetLID().ToNonAD()
	lists := []struct {
		who *client
		jid types.JID
	}{{a, number}, {a, lid}, {b, number}, {b, lid}}
	for _, list := range lists {
		g.Expect(devicesOf(t, list.who, list.jid)).To(HaveLen(2), "the phone and b")
	}
	requests := recordRequests(s)

	added := paired(t, s, "15552222222")
	for _, list := range lists {
		g.Eventually(func() []types.JID { return devicesOf(t, list.who, list.jid) }).Should(HaveLen(3))
	}
	added.Store.Container = keptContainer{added.Store.Container}
	_, err := s.Inject(Fault{Kind: FaultStreamError, Code: "device_removed", Device: added.jid()})
	g.Expect(err).NotTo(HaveOccurred())
	for _, list := range lists {
		g.Eventually(func() []types.JID { return devicesOf(t, list.who, list.jid) }).Should(HaveLen(2))
	}
	requests.mu.Lock()
	defer requests.mu.Unlock()
	g.Expect(requests.names).NotTo(HaveKey("usync/get/usync"), "the lists came without a request")
}

// A client that has sent a message to an old list of devices learns it from the
// acknowledgement, and its next message reaches all.
func TestMessageToAnOldDeviceList(t *testing.T) {
	g := wait(t)
	s := serve(t)
	a, b := paired(t, s, "15551111111"), paired(t, s, "15552222222")
	lid := b.Store.GetLID().ToNonAD()
	g.Expect(devicesOf(t, a, lid)).To(HaveLen(2))
	s.mu.Lock()
	clear(s.byPhone["15552222222"].watchers) // nobody sends a the change
	s.mu.Unlock()
	added := paired(t, s, "15552222222")

	a.write(t, lid, "one")
	g.Expect(first[*events.Message](t, b).Message.GetConversation()).To(Equal("one"))
	a.write(t, lid, "two")
	g.Expect(first[*events.Message](t, added).Message.GetConversation()).To(Equal("two"))
}

// A contact is named by its number or by its LID, from one message to the next; the
// client knows that they are the same.
func TestMessageFromALID(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	lid, err := s.LID("15557654321")
	g.Expect(err).NotTo(HaveOccurred())
	for i, from := range []string{"15557654321", lid, "15557654321@s.whatsapp.net"} {
		_, err = s.Send(t.Context(), c.jid(), from, "hello")
		g.Expect(err).NotTo(HaveOccurred())
		g.Eventually(func() []*events.Message { return of[*events.Message](c) }).Should(HaveLen(i + 1))
		info := of[*events.Message](c)[i].Info
		names := []string{info.Sender.String(), info.SenderAlt.String()}
		g.Expect(names).To(ConsistOf("15557654321@s.whatsapp.net", lid))
		g.Expect(info.Sender.Server == types.HiddenUserServer).To(Equal(from == lid))
		c.write(t, info.Chat, "hello yourself")
	}
	g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
	g.Expect(s.Stats().Undecryptable).To(BeZero())
	_, err = s.Send(t.Context(), c.jid(), "123@lid", "hello")
	g.Expect(err).To(MatchError(ErrNotFound))
	_, err = s.Send(t.Context(), c.jid(), c.Store.GetLID().ToNonAD().String(), "hello")
	g.Expect(err).To(MatchError(ErrBadInput), "its own LID")
}

// A phone that has moved its chats to LIDs sends its devices the LIDs of its contacts.
func TestMigrationToLIDs(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	_, err := s.MigrateToLIDs(t.Context(), c.jid(), "15557654321", "+15558888888")
	g.Expect(err).NotTo(HaveOccurred())
	g.Eventually(func() int { return waiting(s, c) }).Should(BeZero())
	for _, phone := range []string{"15557654321", "15558888888"} {
		wanted, err := s.LID(phone)
		g.Expect(err).NotTo(HaveOccurred())
		lid, err := c.Store.LIDs.GetLIDForPN(t.Context(), types.NewJID(phone, types.DefaultUserServer))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(lid.String()).To(Equal(wanted))
	}
}

package simulator

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
)

// expects returns a check that the client has an event of that type that the condition accepts.
func expects[T any](accepts func(T) bool) func(*client) bool {
	return func(c *client) bool {
		for _, evt := range of[T](c) {
			if accepts(evt) {
				return true
			}
		}
		return false
	}
}

// expectsAny is expects for any event of that type.
func expectsAny[T any]() func(*client) bool { return expects(func(T) bool { return true }) }

// The server can send each stanza that the library handles; the client acknowledges it and
// reports it to its handlers.
func TestStanzas(t *testing.T) {
	contact := "15557654321"
	seen := map[string]func(*client) bool{
		"notification/encrypt/identity": expectsAny[*events.IdentityChange](),
		"notification/account_sync/privacy": expects(func(e *events.PrivacySettings) bool {
			return e.LastSeenChanged
		}),
		"notification/account_sync/picture":   expectsAny[*events.Picture](),
		"notification/account_sync/blocklist": expects(func(e *events.Blocklist) bool { return len(e.Changes) == 1 }),
		"notification/w:gp2/subject":          expects(func(e *events.GroupInfo) bool { return e.Name.Name == stanzaText && e.SenderPN.User == contact }),
		"notification/picture/set":            expects(func(e *events.Picture) bool { return e.PictureID == "1" && e.JID.User == contact }),
		"notification/picture/delete":         expects(func(e *events.Picture) bool { return e.Remove }),
		"notification/mediaretry":             expects(func(e *events.MediaRetry) bool { return e.Error.Code == 2 }),
		"notification/newsletter": expects(func(e *events.NewsletterLiveUpdate) bool {
			return len(e.Messages) == 1 && e.Messages[0].Message.GetConversation() == stanzaText
		}),
		"notification/mex/newsletter-join":  expects(func(e *events.NewsletterJoin) bool { return e.ID == someNewsletter }),
		"notification/mex/newsletter-leave": expects(func(e *events.NewsletterLeave) bool { return e.Role == types.NewsletterRoleGuest }),
		"notification/mex/newsletter-mute":  expects(func(e *events.NewsletterMuteChange) bool { return e.Mute == types.NewsletterMuteOn }),
		"notification/mex/reach-out-lock": expects(func(e *events.NotifyAccountReachoutTimelock) bool {
			return e.IsActive && e.TimeEnforcementEnds.After(time.Now()) && e.Mex.OpName == "NotificationUserReachoutTimelockUpdate"
		}),
		"notification/status": expects(func(e *events.UserAbout) bool { return e.Status == stanzaText }),
		"status/newsletter": expects(func(e *events.Message) bool {
			return e.Info.IsNewsletterStatus && e.Message.GetConversation() == stanzaText
		}),
		"message/newsletter":   expects(func(e *events.Message) bool { return e.Info.Chat == someNewsletter && !e.Info.IsNewsletterStatus }),
		"message/unavailable":  expects(func(e *events.UndecryptableMessage) bool { return e.IsUnavailable }),
		"receipt/read":         expects(func(e *events.Receipt) bool { return e.Type == types.ReceiptTypeRead }),
		"call/offer":           expects(func(e *events.CallOffer) bool { return e.CallCreatorAlt.User == contact }),
		"call/offer_notice":    expectsAny[*events.CallOfferNotice](),
		"call/preaccept":       expectsAny[*events.CallPreAccept](),
		"call/accept":          expectsAny[*events.CallAccept](),
		"call/relaylatency":    expectsAny[*events.CallRelayLatency](),
		"call/transport":       expectsAny[*events.CallTransport](),
		"call/reject":          expectsAny[*events.CallReject](),
		"call/terminate":       expects(func(e *events.CallTerminate) bool { return e.Reason == "timeout" }),
		"presence/available":   expects(func(e *events.Presence) bool { return !e.Unavailable }),
		"presence/unavailable": expects(func(e *events.Presence) bool { return e.Unavailable && !e.LastSeen.IsZero() }),
		"chatstate/composing":  expects(func(e *events.ChatPresence) bool { return e.State == types.ChatPresenceComposing }),
		"chatstate/paused":     expects(func(e *events.ChatPresence) bool { return e.State == types.ChatPresencePaused }),
	}
	s := serve(t)
	c := paired(t, s, "15551234567")
	for _, name := range Stanzas() {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			c.forget()
			_, err := s.Notify(t.Context(), c.jid(), contact, name)
			g.Expect(err).NotTo(HaveOccurred())
			g.Eventually(func() int { return waiting(s, c) }).Should(BeZero(), "the client acknowledges it")
			if check := seen[name]; check != nil {
				g.Eventually(check).WithArguments(c).Should(BeTrue(), "the client reports it")
			}
			g.Expect(s.Stats().Nacks).To(BeZero())
		})
	}
	for name := range seen {
		wait(t).Expect(stanzas).To(HaveKey(name))
	}
}

// A stanza that is not acknowledged is sent again at the next login; presences, typing and
// information of the server are not.
func TestStanzasForADeviceThatIsAway(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	c.Disconnect()
	g.Eventually(func() int { return s.Stats().Connected }).Should(BeZero())
	_, err := s.Notify(t.Context(), c.jid(), "", "notification/status")
	g.Expect(err).NotTo(HaveOccurred())
	_, err = s.Notify(t.Context(), c.jid(), "", "presence/available")
	g.Expect(err).To(MatchError(ErrNotNow))
	_, err = s.Notify(t.Context(), c.jid(), "", "horoscope")
	g.Expect(err).To(MatchError(ErrBadInput))
	g.Expect(s.Stats().UnacknowledgedOther).To(Equal(1))
	g.Expect(s.Stats().Unacknowledged).To(BeZero())
	c.forget()
	g.Expect(c.Connect()).To(Succeed())
	g.Expect(first[*events.UserAbout](t, c).JID.User).To(Equal(DefaultContact))
	g.Expect(first[*events.OfflineSyncPreview](t, c)).To(And(HaveField("Notifications", 1), HaveField("Receipts", 0)))
	g.Eventually(func() int { return s.Stats().UnacknowledgedOther }).Should(BeZero())
}

// An acknowledgement of another sender's stanza does not count.
func TestWrongAcknowledgement(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "15551234567")
	c.setNoReceipts(true) // the client acknowledges nothing that it does not accept
	id, err := s.Notify(t.Context(), c.jid(), "", "status/newsletter")
	g.Expect(err).NotTo(HaveOccurred())
	first[*events.Message](t, c)
	ack := func(attrs waBinary.Attrs) {
		attrs["class"], attrs["id"] = "status", id
		g.Expect(c.DangerousInternals().SendNode(t.Context(), waBinary.Node{Tag: "ack", Attrs: attrs})).To(Succeed()) //nolint:staticcheck // the only way to send it
	}
	ack(waBinary.Attrs{"to": someGroup, "type": "text"})
	ack(waBinary.Attrs{"to": someNewsletter})
	g.Eventually(func() map[string]int64 { return s.Stats().Unknown }).Should(Equal(map[string]int64{
		"ack of a status with another to": 1, "ack of a status with another type": 1,
	}))
	g.Expect(s.Stats().UnacknowledgedOther).To(Equal(1))
	ack(waBinary.Attrs{"to": someNewsletter, "type": "text", "error": 500})
	g.Eventually(func() int { return s.Stats().UnacknowledgedOther }).Should(BeZero())
	g.Expect(s.Stats().Nacks).To(BeEquivalentTo(1))
	s.mu.Lock()
	clear(s.unknown) // otherwise serve fails the test at its end
	s.mu.Unlock()
}

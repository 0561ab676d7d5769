package simulator

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/appstate"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
)

// requested records the requests that clients send, as "namespace/type/child".
type requested struct {
	mu    sync.Mutex
	names map[string]bool
}

func recordRequests(s *Server) *requested {
	r := &requested{names: map[string]bool{}}
	s.AnswerWith(func(request *waBinary.Node) *waBinary.Node {
		r.mu.Lock()
		defer r.mu.Unlock()
		name := attribute(request, "xmlns") + "/" + attribute(request, "type")
		for _, child := range request.GetChildren() {
			r.names[name+"/"+child.Tag] = true
		}
		if len(request.GetChildren()) == 0 {
			r.names[name] = true
		}
		return nil
	})
	return r
}

// The server answers every request that the library can send, and knows every stanza that it
// can send.
func TestRequests(t *testing.T) {
	g := wait(t)
	s := serve(t)
	requests := recordRequests(s)
	device := newDevice()
	device.PushName = "Test"
	c := pairedOn(t, s, device, "15551234567")
	peer := types.NewJID("15557654321", types.DefaultUserServer)
	group := types.NewJID("123-456", types.GroupServer)
	channel := types.NewJID("1", types.NewsletterServer)
	info := &types.MessageInfo{ID: "A", MessageSource: types.MessageSource{Chat: peer, Sender: peer, IsGroup: true}}
	internals := c.DangerousInternals() //nolint:staticcheck // the only way to send some requests separately

	// An answer is a result, or an error that WhatsApp would give.
	const ok, refused = true, false
	for _, row := range []struct {
		name   string
		answer bool
		call   func(ctx context.Context) error
	}{
		{"the text about the account", ok, func(ctx context.Context) error {
			return c.SetStatusMessage(ctx, types.SetStatusInput{Text: proto.String("busy")})
		}},
		{"privacy settings", ok, func(ctx context.Context) error {
			settings, err := c.TryFetchPrivacySettings(ctx, true)
			return errors.Join(err, match(settings, HaveField("ReadReceipts", types.PrivacySettingAll)))
		}},
		{"change a privacy setting", ok, func(ctx context.Context) error {
			_, err := c.SetPrivacySetting(ctx, types.PrivacySettingTypeLastSeen, types.PrivacySettingNone)
			return err
		}},
		{"who sees a status", ok, second(c.GetStatusPrivacy)},
		{"blocked contacts", ok, second(c.GetBlocklist)},
		{"block a contact", ok, func(ctx context.Context) error {
			_, err := c.UpdateBlocklist(ctx, peer, events.BlocklistChangeActionBlock)
			return err
		}},
		{"the default disappearing timer", ok, func(ctx context.Context) error { return c.SetDefaultDisappearingTimer(ctx, time.Hour) }},
		{"mark as clean", ok, func(ctx context.Context) error { return c.MarkNotDirty(ctx, "account_sync", time.Now()) }},
		{"settings of the phone", ok, func(ctx context.Context) error {
			return c.FetchAppState(ctx, appstate.WAPatchCriticalBlock, true, false)
		}},
		{"passive", ok, func(ctx context.Context) error { return c.SetPassive(ctx, true) }},
		{"active", ok, func(ctx context.Context) error { return c.SetPassive(ctx, false) }},
		{"the server for media", ok, func(ctx context.Context) error {
			media, err := internals.RefreshMediaConn(ctx, true)
			return errors.Join(err, match(media, HaveField("Hosts", ConsistOf(HaveField("Hostname", s.MediaHost())))))
		}},
		{"push notifications", ok, second(c.GetServerPushNotificationConfig)},
		{"push to an iPhone", ok, func(ctx context.Context) error {
			return c.RegisterForPushNotifications(ctx, &whatsmeow.APNsPushConfig{Token: "x", VoIPToken: "y"})
		}},
		{"push to a browser", ok, func(ctx context.Context) error {
			return c.RegisterForPushNotifications(ctx, &whatsmeow.WebPushConfig{Endpoint: "x"})
		}},
		{"push to Android", ok, func(ctx context.Context) error {
			return c.RegisterForPushNotifications(ctx, &whatsmeow.FCMPushConfig{Token: "x"})
		}},
		{"terms of service", ok, func(ctx context.Context) error { return c.AcceptTOSNotice(ctx, "1", "5") }},
		{"bots", ok, second(c.GetBotListV2)},
		{"profiles of bots", ok, func(ctx context.Context) error {
			_, err := c.GetBotProfiles(ctx, []types.BotListInfo{{BotJID: types.MetaAIJID, PersonaID: "1"}})
			return err
		}},
		{"a business", ok, func(ctx context.Context) error {
			_, err := c.GetBusinessProfile(ctx, peer)
			return err
		}},
		{"an order", refused, func(ctx context.Context) error {
			_, err := c.GetOrderDetails(ctx, "1", "token")
			return err
		}},
		{"a picture", refused, func(ctx context.Context) error {
			_, err := c.GetProfilePictureInfo(ctx, peer, &whatsmeow.GetProfilePictureParams{ExistingID: "1", InviteCode: "x", CommonGID: group, PersonaID: "1"})
			return err
		}},
		{"the picture of a community", refused, func(ctx context.Context) error {
			_, err := c.GetProfilePictureInfo(ctx, group, &whatsmeow.GetProfilePictureParams{IsCommunity: true})
			return err
		}},
		{"the link of a contact", refused, func(ctx context.Context) error {
			_, err := c.ResolveContactQRLink(ctx, "ABC")
			return err
		}},
		{"the link of a business", refused, func(ctx context.Context) error {
			_, err := c.ResolveBusinessMessageLink(ctx, "ABC")
			return err
		}},
		{"the account's link", refused, func(ctx context.Context) error {
			_, err := c.GetContactQRLink(ctx, true)
			return err
		}},
		{"devices of Messenger", refused, func(ctx context.Context) error {
			_, err := c.GetUserDevices(ctx, []types.JID{types.NewJID("1", types.MessengerServer)})
			return err
		}},

		{"channels that it follows", ok, second(c.GetSubscribedNewsletters)},
		{"a channel", refused, func(ctx context.Context) error {
			_, err := c.GetNewsletterInfo(ctx, channel)
			return err
		}},
		{"a channel by its link", refused, func(ctx context.Context) error {
			_, err := c.GetNewsletterInfoWithInvite(ctx, "x")
			return err
		}},
		{"follow a channel", refused, func(ctx context.Context) error { return c.FollowNewsletter(ctx, channel) }},
		{"unfollow a channel", refused, func(ctx context.Context) error { return c.UnfollowNewsletter(ctx, channel) }},
		{"mute a channel", refused, func(ctx context.Context) error { return c.NewsletterToggleMute(ctx, channel, true) }},
		{"unmute a channel", refused, func(ctx context.Context) error { return c.NewsletterToggleMute(ctx, channel, false) }},
		{"create a channel", refused, func(ctx context.Context) error {
			_, err := c.CreateNewsletter(ctx, whatsmeow.CreateNewsletterParams{Name: "x"})
			return err
		}},
		{"live updates of a channel", refused, func(ctx context.Context) error {
			_, err := c.NewsletterSubscribeLiveUpdates(ctx, channel)
			return err
		}},
		{"messages of a channel", refused, func(ctx context.Context) error {
			_, err := c.GetNewsletterMessages(ctx, channel, &whatsmeow.GetNewsletterMessagesParams{Count: 1, Before: 2})
			return err
		}},
		{"changed messages of a channel", refused, func(ctx context.Context) error {
			_, err := c.GetNewsletterMessageUpdates(ctx, channel, &whatsmeow.GetNewsletterUpdatesParams{Count: 1, Since: time.Now(), After: 1})
			return err
		}},
		{"seen messages of a channel", ok, func(ctx context.Context) error {
			return c.NewsletterMarkViewed(ctx, channel, []types.MessageServerID{1})
		}},
		{"a reaction in a channel", ok, func(ctx context.Context) error { return c.NewsletterSendReaction(ctx, channel, 1, "+", "") }},

		{"groups", ok, func(ctx context.Context) error {
			groups, err := c.GetJoinedGroups(ctx)
			return errors.Join(err, match(groups, BeEmpty()))
		}},
		{"a group", refused, func(ctx context.Context) error {
			_, err := c.GetGroupInfo(ctx, group)
			return err
		}},
		{"a group by an invitation", refused, func(ctx context.Context) error {
			_, err := c.GetGroupInfoFromInvite(ctx, group, peer, "x", 1)
			return err
		}},
		{"a group by its link", refused, func(ctx context.Context) error {
			_, err := c.GetGroupInfoFromLink(ctx, "x")
			return err
		}},
		{"groups of a community", refused, func(ctx context.Context) error {
			_, err := c.GetSubGroups(ctx, group)
			return err
		}},
		{"members of a community", refused, func(ctx context.Context) error {
			_, err := c.GetLinkedGroupsParticipants(ctx, group)
			return err
		}},
		{"people who ask to join", refused, func(ctx context.Context) error {
			_, err := c.GetGroupRequestParticipants(ctx, group)
			return err
		}},
		{"create a group", refused, func(ctx context.Context) error {
			_, err := c.CreateGroup(ctx, whatsmeow.ReqCreateGroup{
				Name: "x", Participants: []types.JID{peer}, GroupLocked: types.GroupLocked{IsLocked: true},
				GroupAnnounce: types.GroupAnnounce{IsAnnounce: true}, GroupEphemeral: types.GroupEphemeral{IsEphemeral: true, DisappearingTimer: 1},
				GroupLinkedParent: types.GroupLinkedParent{LinkedParentJID: group},
			})
			return err
		}},
		{"create a community", refused, func(ctx context.Context) error {
			_, err := c.CreateGroup(ctx, whatsmeow.ReqCreateGroup{Name: "x", GroupParent: types.GroupParent{IsParent: true}})
			return err
		}},
		{"join by an invitation", refused, func(ctx context.Context) error { return c.JoinGroupWithInvite(ctx, group, peer, "x", 1) }},
		{"join by a link", refused, func(ctx context.Context) error {
			_, err := c.JoinGroupWithLink(ctx, "x")
			return err
		}},
		{"leave a group", refused, func(ctx context.Context) error { return c.LeaveGroup(ctx, group) }},
		{"link a group", refused, func(ctx context.Context) error { return c.LinkGroup(ctx, group, group) }},
		{"unlink a group", refused, func(ctx context.Context) error { return c.UnlinkGroup(ctx, group, group) }},
		{"add to a group", refused, changeGroup(c, group, whatsmeow.ParticipantChangeAdd)},
		{"remove from a group", refused, changeGroup(c, group, whatsmeow.ParticipantChangeRemove)},
		{"promote in a group", refused, changeGroup(c, group, whatsmeow.ParticipantChangePromote)},
		{"demote in a group", refused, changeGroup(c, group, whatsmeow.ParticipantChangeDemote)},
		{"let somebody join", refused, func(ctx context.Context) error {
			_, err := c.UpdateGroupRequestParticipants(ctx, group, []types.JID{peer}, whatsmeow.ParticipantChangeApprove)
			return err
		}},
		{"let nobody join", refused, func(ctx context.Context) error {
			_, err := c.UpdateGroupRequestParticipants(ctx, group, []types.JID{peer}, whatsmeow.ParticipantChangeReject)
			return err
		}},
		{"a group's picture", refused, func(ctx context.Context) error {
			_, err := c.SetGroupPhoto(ctx, group, []byte{1})
			return err
		}},
		{"a group's name", refused, func(ctx context.Context) error { return c.SetGroupName(ctx, group, "x") }},
		{"a group's topic", refused, func(ctx context.Context) error { return c.SetGroupTopic(ctx, group, "A", "B", "x") }},
		{"no topic", refused, func(ctx context.Context) error { return c.SetGroupTopic(ctx, group, "A", "B", "") }},
		{"lock a group", refused, func(ctx context.Context) error { return c.SetGroupLocked(ctx, group, true) }},
		{"unlock a group", refused, func(ctx context.Context) error { return c.SetGroupLocked(ctx, group, false) }},
		{"only admins write", refused, func(ctx context.Context) error { return c.SetGroupAnnounce(ctx, group, true) }},
		{"all write", refused, func(ctx context.Context) error { return c.SetGroupAnnounce(ctx, group, false) }},
		{"a group's link", refused, func(ctx context.Context) error {
			_, err := c.GetGroupInviteLink(ctx, group, false)
			return err
		}},
		{"another link for a group", refused, func(ctx context.Context) error {
			_, err := c.GetGroupInviteLink(ctx, group, true)
			return err
		}},
		{"approval to join", refused, func(ctx context.Context) error { return c.SetGroupJoinApprovalMode(ctx, group, true) }},
		{"who adds members", refused, func(ctx context.Context) error {
			return c.SetGroupMemberAddMode(ctx, group, types.GroupMemberAddModeAdmin)
		}},
		{"a group's disappearing timer", refused, func(ctx context.Context) error {
			return c.SetDisappearingTimer(ctx, group, time.Hour, time.Now())
		}},
		{"no disappearing timer in a group", refused, func(ctx context.Context) error { return c.SetDisappearingTimer(ctx, group, 0, time.Now()) }},
		{"a message to a group", refused, send(c, group, conversation("x"))},

		{"available", ok, func(ctx context.Context) error { return c.SendPresence(ctx, types.PresenceAvailable) }},
		{"unavailable", ok, func(ctx context.Context) error { return c.SendPresence(ctx, types.PresenceUnavailable) }},
		{"typing", ok, func(ctx context.Context) error {
			return c.SendChatPresence(ctx, peer, types.ChatPresenceComposing, types.ChatPresenceMediaAudio)
		}},
		{"no longer typing", ok, func(ctx context.Context) error { return c.SendChatPresence(ctx, peer, types.ChatPresencePaused, "") }},
		{"a contact's presence", ok, func(ctx context.Context) error { return c.SubscribePresence(ctx, peer) }},
		{"refuse a call", ok, func(ctx context.Context) error { return c.RejectCall(ctx, peer, "A") }},
		{"the acknowledgement of a call", ok, func(ctx context.Context) error {
			acknowledged := internals.WaitResponse("A")
			err := internals.SendNode(ctx, waBinary.Node{Tag: "call", Attrs: waBinary.Attrs{"id": "A", "from": c.Store.GetJID(), "to": peer}})
			select {
			case <-acknowledged:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		}},
		{"read", ok, func(ctx context.Context) error {
			return c.MarkRead(ctx, []types.MessageID{"A", "B"}, time.Now(), peer, peer)
		}},
		{"played in a group", ok, func(ctx context.Context) error {
			return c.MarkRead(ctx, []types.MessageID{"A"}, time.Now(), group, peer, types.ReceiptTypePlayed)
		}},
		{"ask for a file again", ok, func(ctx context.Context) error { return c.SendMediaRetryReceipt(ctx, info, make([]byte, 32)) }},
		{"ask for the history again", ok, func(ctx context.Context) error {
			return c.SendHistorySyncServerErrorReceipt(ctx, "A", make([]byte, 32))
		}},

		{"a text", ok, send(c, peer, conversation("x"))},
		{"a reaction", ok, send(c, peer, c.BuildReaction(peer, peer, "A", "+"))},
		{"a revocation", ok, send(c, peer, c.BuildRevoke(peer, types.EmptyJID, "A"))},
		{"an edit", ok, send(c, peer, c.BuildEdit(peer, "A", conversation("y")))},
		{"a poll", ok, send(c, peer, c.BuildPollCreation("x", []string{"a", "b"}, 1))},
		{"a list", ok, send(c, peer, &waE2E.Message{ListMessage: &waE2E.ListMessage{ListType: waE2E.ListMessage_SINGLE_SELECT.Enum()}})},
		{"buttons", ok, send(c, peer, &waE2E.Message{ButtonsMessage: &waE2E.ButtonsMessage{}})},
		{"an answer to buttons", ok, send(c, peer, &waE2E.Message{ButtonsResponseMessage: &waE2E.ButtonsResponseMessage{}})},
		{"an answer to a list", ok, send(c, peer, &waE2E.Message{ListResponseMessage: &waE2E.ListResponseMessage{}})},
		{"an interactive answer", ok, send(c, peer, &waE2E.Message{InteractiveResponseMessage: &waE2E.InteractiveResponseMessage{}})},
		{"a file", ok, send(c, peer, &waE2E.Message{DocumentMessage: &waE2E.DocumentMessage{}})},
		{"a text with metadata", ok, func(ctx context.Context) error {
			_, err := c.SendMessage(ctx, peer, conversation("x"), whatsmeow.SendRequestExtra{Meta: &types.MsgMetaInfo{ThreadMessageID: "A", ThreadMessageSenderJID: peer}})
			return err
		}},
		{"a message in a channel", ok, send(c, channel, conversation("x"))},
		{"ask the phone for more history", ok, func(ctx context.Context) error {
			_, err := c.SendPeerMessage(ctx, c.BuildHistorySyncRequest(info, 1))
			return err
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
			defer cancel()
			err := row.call(ctx)
			g := wait(t)
			g.Expect(ctx.Err()).NotTo(HaveOccurred(), "the request has no answer")
			if row.answer == ok {
				g.Expect(err).NotTo(HaveOccurred())
			} else {
				g.Expect(err).To(HaveOccurred())
				g.Expect(err).NotTo(MatchError(ContainSubstring("501")))
			}
		})
	}

	g.Eventually(func() bool {
		requests.mu.Lock()
		defer requests.mu.Unlock()
		return requests.names["privacy/set/tokens"]
	}).Should(BeTrue(), "the client gives the contact a token after its first message")
	c.Store.Container = keptContainer{c.Store.Container}
	g.Expect(c.Logout(t.Context())).To(MatchError(errKept))

	// known.txt lists nothing that this test does not send, but for the following.
	elsewhere := []string{
		"md/get/ref", "md/get/passkey_request_options", "md/set/link_code_companion_reg", "md/set/passkey_prologue",
		"md/set/companion_nonce", "md/set/encrypted_pairing_request", // before the login
		"status/set/status", // until 2025
		"w:p/get/ping",      // of other clients
	}
	requests.mu.Lock()
	defer requests.mu.Unlock()
	for name, shape := range known {
		if !strings.Contains(name, "/") {
			continue
		}
		for _, child := range slices.Sorted(maps.Keys(shape.children)) {
			if child := name + "/" + child; !slices.Contains(elsewhere, child) {
				g.Expect(requests.names).To(HaveKey(child), "the test sends it")
			}
		}
	}
}

// The server knows each request that it can answer, and the other way round.
func TestAnswersMatchKnownRequests(t *testing.T) {
	answered := append(slices.Collect(maps.Keys(answers)), slices.Collect(maps.Keys(answersBeforeLogin))...)
	slices.Sort(answered)
	var requests []string
	for name := range known {
		if strings.Contains(name, "/") && name != keepAlive {
			requests = append(requests, name)
		}
	}
	wait(t).Expect(requests).To(ConsistOf(slices.Compact(answered)))
}

// A part of a known stanza that the simulator does not know is counted by its place.
func TestUnknownPartsAreCounted(t *testing.T) {
	g := wait(t)
	s := serve(t)
	c := paired(t, s, "")
	internals := c.DangerousInternals() //nolint:staticcheck // the only way to send these nodes
	_, err := internals.SendIQ(t.Context(), whatsmeow.DangerousInfoQuery{
		Namespace: "usync", Type: "get", To: types.ServerJID, Content: []waBinary.Node{{
			Tag: "usync", Content: []waBinary.Node{{Tag: "query", Content: []waBinary.Node{{Tag: "horoscope"}}}, {Tag: "list", Attrs: waBinary.Attrs{"sign": "leo"}}},
		}},
	})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(internals.SendNode(t.Context(), waBinary.Node{Tag: "presence", Attrs: waBinary.Attrs{"mood": "good"}, Content: []waBinary.Node{{Tag: "smile"}}})).To(Succeed())
	g.Expect(internals.SendNode(t.Context(), waBinary.Node{Tag: "telegram"})).To(Succeed())
	_, err = internals.SendMexIQ(t.Context(), "123", nil)
	g.Expect(err).To(MatchError(ContainSubstring("404")))
	g.Eventually(func() map[string]int64 { return s.Stats().Unknown }).Should(Equal(map[string]int64{
		"w:mex/get/query 123":             1,
		"usync/get/usync/query/horoscope": 1, "usync/get/usync/list@sign": 1, "presence@mood": 1, "presence/smile": 1, "telegram": 1,
	}))
	s.mu.Lock()
	clear(s.unknown) // otherwise serve fails the test at its end
	s.mu.Unlock()
}

func conversation(content string) *waE2E.Message {
	return &waE2E.Message{Conversation: proto.String(content)}
}

func send(c *client, to types.JID, message *waE2E.Message) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := c.SendMessage(ctx, to, message)
		return err
	}
}

func changeGroup(c *client, group types.JID, change whatsmeow.ParticipantChange) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := c.UpdateGroupParticipants(ctx, group, []types.JID{types.NewJID("15557654321", types.DefaultUserServer)}, change)
		return err
	}
}

// second drops the first result of a function.
func second[T any](f func(context.Context) (T, error)) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := f(ctx)
		return err
	}
}

// match is an error if the value does not match.
func match(value any, matcher OmegaMatcher) error {
	ok, err := matcher.Match(value)
	if err == nil && !ok {
		err = errors.New(matcher.FailureMessage(value))
	}
	return err
}

package simulator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"
)

// Stanzas that WhatsApp sends without a request. The server sends some of them on its own
// (an account's devices, tokens, a low number of prekeys, the steps of a pairing); a test
// sends any of them with Notify.

var (
	// someGroup and someNewsletter are the senders of stanzas about a group and a channel.
	someGroup      = types.NewJID("120363000000000002", types.GroupServer)
	someNewsletter = types.NewJID("120363000000000003", types.NewsletterServer)
)

// stanzaText is the text in stanzas that have one.
const stanzaText = "hello"

// stanzas makes the stanzas of Notify, by name. The contact is the sender or the subject.
var stanzas = map[string]func(s *Server, d *device, from *account) waBinary.Node{
	"notification/encrypt/count": func(_ *Server, _ *device, _ *account) waBinary.Node {
		return notification("encrypt", types.ServerJID, waBinary.Node{Tag: "count", Attrs: waBinary.Attrs{"value": lowPreKeys}})
	},
	// The contact has a new phone.
	"notification/encrypt/identity": func(_ *Server, _ *device, from *account) waBinary.Node {
		return notification("encrypt", from.jid(), waBinary.Node{Tag: "identity"})
	},
	"notification/server_sync": func(_ *Server, d *device, _ *account) waBinary.Node {
		return notification("server_sync", d.account.jid(), waBinary.Node{Tag: "collection", Attrs: waBinary.Attrs{"name": "regular", "version": "1"}})
	},
	"notification/account_sync/privacy": func(_ *Server, d *device, _ *account) waBinary.Node {
		return notification("account_sync", d.account.jid(), waBinary.Node{Tag: "privacy", Content: []waBinary.Node{{
			Tag: "category", Attrs: waBinary.Attrs{"name": string(types.PrivacySettingTypeLastSeen), "value": string(types.PrivacySettingNone)},
		}}})
	},
	"notification/account_sync/devices": func(s *Server, d *device, _ *account) waBinary.Node {
		s.mu.Lock()
		defer s.mu.Unlock()
		return notification("account_sync", d.account.jid(), ownDevices(addressesLocked(d.account, types.DefaultUserServer)))
	},
	"notification/account_sync/picture": func(_ *Server, d *device, _ *account) waBinary.Node {
		return notification("account_sync", d.account.jid(), waBinary.Node{Tag: "picture"})
	},
	"notification/account_sync/blocklist": func(_ *Server, d *device, from *account) waBinary.Node {
		return notification("account_sync", d.account.jid(), waBinary.Node{
			Tag: "blocklist", Attrs: waBinary.Attrs{"action": "modify", "dhash": "1", "prev_dhash": "0"},
			Content: []waBinary.Node{{Tag: "item", Attrs: waBinary.Attrs{"jid": from.lidJID(), "action": "block"}}},
		})
	},
	"notification/devices/update": func(_ *Server, _ *device, from *account) waBinary.Node {
		node := notification("devices", from.jid(), waBinary.Node{Tag: "update", Attrs: waBinary.Attrs{"hash": "abcd"}})
		node.Attrs["lid"] = from.lidJID()
		return node
	},
	"notification/fbid:devices": func(_ *Server, _ *device, _ *account) waBinary.Node {
		return notification("fbid:devices", types.NewJID("100000000000001", types.MessengerServer), waBinary.Node{
			Tag: "devices", Attrs: waBinary.Attrs{"dhash": "1"}, Content: []waBinary.Node{{Tag: "device", Attrs: waBinary.Attrs{"id": "1"}}},
		})
	},
	"notification/w:gp2/subject": func(s *Server, _ *device, from *account) waBinary.Node {
		node := notification("w:gp2", someGroup, waBinary.Node{Tag: "subject", Attrs: waBinary.Attrs{
			"subject": stanzaText, "s_t": s.seconds(), "s_o": from.lidJID(), "s_o_pn": from.jid(),
		}})
		node.Attrs["participant"], node.Attrs["participant_pn"] = from.lidJID(), from.jid()
		return node
	},
	"notification/picture/set": func(_ *Server, _ *device, from *account) waBinary.Node {
		return notification("picture", from.jid(), waBinary.Node{Tag: "set", Attrs: waBinary.Attrs{"jid": from.jid(), "id": "1"}})
	},
	"notification/picture/delete": func(_ *Server, _ *device, from *account) waBinary.Node {
		return notification("picture", from.jid(), waBinary.Node{Tag: "delete", Attrs: waBinary.Attrs{"jid": from.jid()}})
	},
	// The phone does not have the file that a device asked for.
	"notification/mediaretry": func(_ *Server, d *device, from *account) waBinary.Node {
		return notification("mediaretry", d.account.jid(),
			waBinary.Node{Tag: "rmr", Attrs: waBinary.Attrs{"jid": from.lidJID(), "from_me": "false"}},
			waBinary.Node{Tag: "error", Attrs: waBinary.Attrs{"code": "2"}})
	},
	"notification/privacy_token": func(s *Server, d *device, from *account) waBinary.Node {
		return s.tokenStanza(from, d.account, s.clock.Now())
	},
	"notification/newsletter": func(s *Server, _ *device, _ *account) waBinary.Node {
		return notification("newsletter", someNewsletter, waBinary.Node{Tag: "live_updates", Content: []waBinary.Node{{
			Tag: "message", Attrs: waBinary.Attrs{"server_id": 1, "id": newID(), "type": "text", "t": s.seconds()},
			Content: []waBinary.Node{
				{Tag: "plaintext", Content: plainText()},
				{Tag: "views_count", Attrs: waBinary.Attrs{"count": 1}},
				{Tag: "reactions", Content: []waBinary.Node{{Tag: "reaction", Attrs: waBinary.Attrs{"code": "+", "count": 1}}}},
			},
		}}})
	},
	"notification/mex/newsletter-join": func(*Server, *device, *account) waBinary.Node {
		return mex("NotificationNewsletterJoin", `{"data":{"xwa2_notify_newsletter_on_join":{"id":"`+someNewsletter.String()+`","state":{"type":"ACTIVE"}}}}`)
	},
	"notification/mex/newsletter-leave": func(*Server, *device, *account) waBinary.Node {
		return mex("NotificationNewsletterLeave", `{"data":{"xwa2_notify_newsletter_on_leave":{"id":"`+someNewsletter.String()+`","role":"GUEST"}}}`)
	},
	"notification/mex/newsletter-mute": func(*Server, *device, *account) waBinary.Node {
		return mex("NotificationNewsletterMuteChange", `{"data":{"xwa2_notify_newsletter_on_mute_change":{"id":"`+someNewsletter.String()+`","mute":"ON"}}}`)
	},
	"notification/mex/reach-out-lock": func(s *Server, _ *device, _ *account) waBinary.Node {
		return reachOutLock(true, s.clock.Now().Add(time.Hour))
	},
	"notification/status": func(_ *Server, _ *device, from *account) waBinary.Node {
		return notification("status", from.jid(), waBinary.Node{Tag: "set", Content: []byte(stanzaText)})
	},
	// Notifications that clients acknowledge and ignore.
	"notification/business": func(_ *Server, _ *device, from *account) waBinary.Node {
		return notification("business", from.jid(), waBinary.Node{Tag: "profile", Attrs: waBinary.Attrs{"hash": "abcd"}})
	},
	"notification/disappearing_mode": func(_ *Server, _ *device, from *account) waBinary.Node {
		return notification("disappearing_mode", from.jid(), waBinary.Node{Tag: "disappearing_mode", Attrs: waBinary.Attrs{"duration": "86400"}})
	},
	"notification/server": func(*Server, *device, *account) waBinary.Node {
		return notification("server", types.ServerJID, waBinary.Node{Tag: "log"})
	},
	"notification/pay": func(*Server, *device, *account) waBinary.Node {
		return notification("pay", types.ServerJID, waBinary.Node{Tag: "transaction"})
	},
	"notification/psa": func(*Server, *device, *account) waBinary.Node {
		return notification("psa", types.ServerJID, waBinary.Node{Tag: "surface"})
	},

	// A person's status, and a channel's. Clients drop the first.
	"status/person": func(s *Server, _ *device, from *account) waBinary.Node {
		s.mu.Lock()
		name := from.name
		s.mu.Unlock()
		return waBinary.Node{
			Tag: "status",
			Attrs: waBinary.Attrs{
				"from": types.StatusBroadcastJID, "participant": from.lidJID(), "participant_pn": from.jid(), "type": "text", "notify": name,
			},
			Content: []waBinary.Node{{Tag: "enc", Attrs: waBinary.Attrs{"v": "2", "type": "skmsg"}, Content: make([]byte, 64)}},
		}
	},
	"status/newsletter":  func(*Server, *device, *account) waBinary.Node { return ofNewsletter("status") },
	"message/newsletter": func(*Server, *device, *account) waBinary.Node { return ofNewsletter("message") },
	// A message that only the phone may show.
	"message/unavailable": func(_ *Server, _ *device, from *account) waBinary.Node {
		return waBinary.Node{
			Tag:     "message",
			Attrs:   waBinary.Attrs{"from": from.lidJID(), "sender_pn": from.jid(), "type": "media"},
			Content: []waBinary.Node{{Tag: "unavailable", Attrs: waBinary.Attrs{"type": "view_once"}}},
		}
	},
	"receipt/read": func(_ *Server, _ *device, from *account) waBinary.Node {
		return waBinary.Node{Tag: "receipt", Attrs: waBinary.Attrs{"from": from.lidJID(), "type": "read"}}
	},

	"call/offer":        callStanza("offer", nil),
	"call/offer_notice": callStanza("offer_notice", waBinary.Attrs{"media": "audio", "type": "group"}),
	"call/preaccept":    callStanza("preaccept", nil),
	"call/accept":       callStanza("accept", nil),
	"call/relaylatency": callStanza("relaylatency", nil),
	"call/transport":    callStanza("transport", nil),
	"call/reject":       callStanza("reject", nil),
	"call/terminate":    callStanza("terminate", waBinary.Attrs{"reason": "timeout"}),

	"presence/available": func(_ *Server, _ *device, from *account) waBinary.Node {
		return waBinary.Node{Tag: "presence", Attrs: waBinary.Attrs{"from": from.lidJID()}}
	},
	"presence/unavailable": func(s *Server, _ *device, from *account) waBinary.Node {
		return waBinary.Node{Tag: "presence", Attrs: waBinary.Attrs{"from": from.lidJID(), "type": "unavailable", "last": s.seconds()}}
	},
	"chatstate/composing": func(_ *Server, _ *device, from *account) waBinary.Node {
		return waBinary.Node{Tag: "chatstate", Attrs: waBinary.Attrs{"from": from.lidJID()}, Content: []waBinary.Node{{Tag: "composing"}}}
	},
	"chatstate/paused": func(_ *Server, _ *device, from *account) waBinary.Node {
		return waBinary.Node{Tag: "chatstate", Attrs: waBinary.Attrs{"from": from.lidJID()}, Content: []waBinary.Node{{Tag: "paused"}}}
	},
	"ib/dirty": func(s *Server, _ *device, _ *account) waBinary.Node {
		return waBinary.Node{Tag: "ib", Attrs: fromServer(waBinary.Attrs{}), Content: []waBinary.Node{{
			Tag: "dirty", Attrs: waBinary.Attrs{"type": "account_sync", "timestamp": s.seconds()},
		}}}
	},
}

// unacknowledged are the stanzas that clients do not acknowledge. They are sent only to
// devices that are connected.
var unacknowledged = []string{"presence", "chatstate", "ib"}

// Stanzas lists the names that [Server.Notify] accepts.
func Stanzas() []string { return slices.Sorted(maps.Keys(stanzas)) }

// Notify sends a device a stanza that clients can receive without a request, by its name
// in [Stanzas], and returns its id. The contact whom it concerns is named as in
// [Server.Send]. A device that is not connected gets it at its next login and again at
// each login until it acknowledges it; stanzas that clients do not acknowledge
// (presence, chatstate, ib) return ErrNotNow instead.
func (s *Server) Notify(ctx context.Context, deviceName, from, name string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	build := stanzas[name]
	if build == nil {
		return "", fmt.Errorf("%w: there is no stanza %q; the names are %q", ErrBadInput, name, Stanzas())
	}
	d, sender, err := s.correspondents(deviceName, from)
	if err != nil {
		return "", err
	}
	node := build(s, d, sender.account)
	if !slices.Contains(unacknowledged, node.Tag) {
		return s.sendStanza(d, node), nil
	}
	s.mu.Lock()
	c := d.conn
	s.mu.Unlock()
	if c == nil {
		return "", fmt.Errorf("%w: the device is not connected", ErrNotNow)
	}
	if err := c.send(node); err != nil {
		return "", errors.Join(ErrNotNow, err)
	}
	return "", nil
}

// sendStanza queues a stanza for a device until the device acknowledges it, and returns the
// id that it gives the stanza.
func (s *Server) sendStanza(d *device, node waBinary.Node) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sendStanzaLocked(d, node)
}

// sendStanzaLocked is sendStanza for a caller that holds s.mu.
func (s *Server) sendStanzaLocked(d *device, node waBinary.Node) string {
	id := newID()
	node.Attrs = maps.Clone(node.Attrs)
	node.Attrs["id"], node.Attrs["t"] = id, s.seconds()
	s.addLocked(d, &stanza{tag: node.Tag, id: id, node: node})
	s.deliverLocked(d)
	return id
}

func notification(kind string, from types.JID, children ...waBinary.Node) waBinary.Node {
	return waBinary.Node{Tag: "notification", Attrs: waBinary.Attrs{"from": from, "type": kind}, Content: children}
}

// mex is the notification about a GraphQL subscription.
func mex(operation, data string) waBinary.Node {
	return notification("mex", types.ServerJID, waBinary.Node{Tag: "update", Attrs: waBinary.Attrs{"op_name": operation}, Content: []byte(data)})
}

// reachOutLock is the notification that the account may not write to strangers until then,
// or that it may again.
func reachOutLock(active bool, until time.Time) waBinary.Node {
	data := `{"is_active":false}`
	if active {
		data = `{"is_active":true,"enforcement_type":"DEFAULT"`
		if !until.IsZero() {
			data += `,"time_enforcement_ends":"` + strconv.FormatInt(until.Unix(), 10) + `"`
		}
		data += `}`
	}
	return mex("NotificationUserReachoutTimelockUpdate", `{"data":{"xwa2_notify_account_reachout_timelock":`+data+`}}`)
}

// ofNewsletter is a message or a status of a channel, which is not encrypted.
func ofNewsletter(tag string) waBinary.Node {
	return waBinary.Node{
		Tag:     tag,
		Attrs:   waBinary.Attrs{"from": someNewsletter, "server_id": 1, "type": "text"},
		Content: []waBinary.Node{{Tag: "plaintext", Content: plainText()}},
	}
}

func plainText() []byte {
	text, _ := proto.Marshal(&waE2E.Message{Conversation: proto.String(stanzaText)}) // fails only for text that is not UTF-8
	return text
}

// callStanza makes a step of a call of the contact.
func callStanza(step string, attributes waBinary.Attrs) func(*Server, *device, *account) waBinary.Node {
	return func(_ *Server, _ *device, from *account) waBinary.Node {
		child := waBinary.Attrs{"call-id": newID(), "call-creator": from.lidJID(), "caller_pn": from.jid()}
		maps.Copy(child, attributes)
		return waBinary.Node{
			Tag:     "call",
			Attrs:   waBinary.Attrs{"from": from.lidJID(), "platform": "android", "version": "2.26.1.1"},
			Content: []waBinary.Node{{Tag: step, Attrs: child}},
		}
	}
}

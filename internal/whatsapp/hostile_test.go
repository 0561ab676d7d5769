package whatsapp

import (
	"bytes"
	"compress/zlib"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waServerSync"
	wastore "go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	"google.golang.org/protobuf/proto"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// hostile is a server that plays malformed nodes to a client, again and again. A panic in
// any goroutine of the client ends the test's process.
type hostile struct {
	w       *environment
	taking  *store.Taking
	mode    hostileMode
	session *testSession
	played  int
	// log is that of the connections.
	log logr.Logger
	// asked is the request for the passkey of the account that has scanned the present
	// connection's code.
	asked string
}

// hostileMode is what the client does.
type hostileMode int

const (
	// linkedClient: it is linked.
	linkedClient hostileMode = iota
	// scanningClient offers QR codes.
	scanningClient
	// typingClient offers a code to type on a phone, of which whatsmeow makes a key: that
	// takes most of a second under the race detector, at each start and each answer.
	typingClient
	// askedClient is asked for a passkey after its code was scanned.
	askedClient
	// answeredClient has given the passkey's answer, and may confirm it.
	answeredClient
)

func newHostile(t testing.TB, mode hostileMode) *hostile {
	t.Helper()
	w := newEnvironmentOn(t, testenv.Postgres(t))
	w.hostile = true
	h := &hostile{w: w, taking: w.take(), mode: mode, log: logr.Discard()}
	switch mode {
	case linkedClient:
		w.pair(h.taking, phone)
		return h
	case scanningClient:
		return h
	case askedClient, answeredClient:
		_, err := w.simulator.Inject(simulator.Fault{Kind: simulator.FaultPasskey})
		w.g.Expect(err).NotTo(HaveOccurred())
		return h
	case typingClient:
	}
	w.simulator.AnswerWith(func(*waBinary.Node) *waBinary.Node {
		n := element("iq", attrs{"type": "result", "from": types.ServerJID}, element("link_code_companion_reg", nil, leaf("link_code_pairing_ref", []byte("ref"))))
		return &n
	})
	return h
}

// keptDevice does not let a logout delete the device, so that it needs no new pairing.
type keptDevice struct{ wastore.DeviceContainer }

func (keptDevice) DeleteDevice(context.Context, *wastore.Device) error {
	return errors.New("the test keeps the device")
}

// connect opens a connection unless there is one. On a busy machine one can end before it
// is used, because its keep-alives are not answered in time.
func (h *hostile) connect(g *WithT) *testSession {
	for range 10 {
		if h.session != nil && h.session.ctx.Err() == nil {
			return h.session
		}
		h.close()
		h.session = h.open(g)
	}
	g.Expect(h.session.events()).To(BeEmpty(), "no connection lasts")
	return nil
}

func (h *hostile) open(g *WithT) *testSession {
	ctx, cancel := context.WithCancelCause(context.Background())
	device, err := h.taking.Open(ctx, cancel)
	g.Expect(err).NotTo(HaveOccurred())
	device.Container = keptDevice{device.Container}
	s := &testSession{w: h.w}
	o := Options{Device: device, Log: func() logr.Logger { return h.log }, Events: func(e Event) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reported = append(s.reported, e)
	}}
	kind := EventConnected
	switch h.mode {
	case scanningClient, askedClient, answeredClient:
		kind = EventQR
	case typingClient:
		kind, o.PairPhone = EventPairingCode, "+"+phone
	}
	s.Connection, err = h.w.factory.New(o)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(s.Connect(ctx)).To(Succeed())
	g.Eventually(s.events).WithPolling(time.Millisecond).Should(
		ContainElement(Or(HaveField("Type", kind), HaveField("Over()", true))))
	if h.mode != askedClient && h.mode != answeredClient {
		return s
	}
	_, err = h.w.simulator.Scan(context.Background(), s.event(EventQR).Codes[0], phone)
	g.Expect(err).NotTo(HaveOccurred())
	h.asked = s.event(EventPasskeyRequest).PasskeyOptions
	if h.mode == answeredClient {
		g.Expect(s.AnswerPasskey(context.Background(), h.answer(g))).To(Succeed())
		s.event(EventPasskeyConfirmation)
	}
	return s
}

// answer is the right one to the present connection's request for the passkey.
func (h *hostile) answer(g *WithT) string {
	answer, err := h.w.simulator.AnswerPasskey(phone, []byte(h.asked))
	g.Expect(err).NotTo(HaveOccurred())
	return string(answer)
}

func (h *hostile) close() {
	if h.session != nil {
		h.session.Close()
		h.session = nil
	}
}

// handledTimeout is longer than whatsmeow waits for the answer to a question (75 s).
const handledTimeout = 100 * time.Second

// play sends frames to the client and waits until it has handled them all, or has ended.
func (h *hostile) play(g *WithT, frames ...[]byte) {
	s := h.connect(g)
	device := phone
	if h.mode != linkedClient {
		device = ""
	}
	h.played++
	id := "played-" + strconv.Itoa(h.played)
	handled := s.internals().WaitResponse(id)
	last, err := waBinary.Marshal(waBinary.Node{Tag: "iq", Attrs: waBinary.Attrs{"id": id, "type": "result"}})
	g.Expect(err).NotTo(HaveOccurred())
	for _, frame := range append(frames, last) {
		// The client may have ended after the frames before.
		_ = h.w.simulator.Play(device, frame)
	}
	g.Eventually(func() bool {
		select {
		case <-s.ctx.Done():
			return true
		case <-handled:
			handled = nil
		default:
		}
		return handled == nil && s.queue.wait() == nil && s.tasks.Load() == 0
	}).WithTimeout(handledTimeout).WithPolling(time.Millisecond).Should(BeTrue(), func() string {
		return fmt.Sprintf("the client has neither handled the frames nor ended: the last one was seen %t, the queue is empty %t, %d tasks run, events %v",
			handled == nil, s.queue.wait() == nil, s.tasks.Load(), s.events())
	})
	if s.ctx.Err() != nil {
		h.close()
	}
}

// encode is the plaintext of a node's frame.
func encode(node waBinary.Node) []byte {
	plaintext, err := waBinary.Marshal(node)
	if err != nil {
		panic(err)
	}
	return plaintext
}

type attrs = waBinary.Attrs

func element(tag string, a attrs, children ...waBinary.Node) waBinary.Node {
	node := waBinary.Node{Tag: tag, Attrs: a}
	if children != nil {
		node.Content = children
	}
	return node
}

func leaf(tag string, content any) waBinary.Node { return waBinary.Node{Tag: tag, Content: content} }

var (
	someone = types.NewJID("15557654321", types.DefaultUserServer)
	itself  = types.NewJID(phone, types.DefaultUserServer)
	group   = types.NewJID("120363000000000001", types.GroupServer)
)

// wellFormed are nodes that WhatsApp sends, of each kind that the client handles.
func wellFormed() []waBinary.Node {
	const at = "1700000000"
	notification := func(kind string, children ...waBinary.Node) waBinary.Node {
		return element("notification", attrs{"from": types.ServerJID, "id": "1", "type": kind, "t": at, "lid": types.NewJID("1", types.HiddenUserServer)}, children...)
	}
	fromGroup := func(children ...waBinary.Node) waBinary.Node {
		n := notification("w:gp2", children...)
		n.Attrs["from"], n.Attrs["participant"] = group, someone
		return n
	}
	participant := element("participant", attrs{"jid": someone, "type": "admin", "lid": types.NewJID("1", types.HiddenUserServer), "phone_number": someone, "error": "403"},
		element("add_request", attrs{"code": "x", "expiration": at}))
	message := func(kind string, children ...waBinary.Node) waBinary.Node {
		return element("message", attrs{"from": someone, "id": "1", "t": at, "type": kind, "notify": "Name", "sender_lid": types.NewJID("1", types.HiddenUserServer)}, children...)
	}
	of := func(from types.JID, n waBinary.Node) waBinary.Node {
		n.Attrs["from"], n.Attrs["participant"], n.Attrs["recipient"] = from, someone, someone
		return n
	}
	receipt := func(kind string, children ...waBinary.Node) waBinary.Node {
		return element("receipt", attrs{"from": someone, "id": "1", "t": at, "type": kind, "participant": someone, "recipient": someone}, children...)
	}
	call := func(kind string) waBinary.Node {
		return element("call", attrs{"from": someone, "id": "1", "t": at, "platform": "android", "version": "2"},
			element(kind, attrs{"call-creator": someone, "call-id": "1", "group-jid": group, "media": "audio", "type": "group", "reason": "x"}))
	}
	link := func(kind string, size int) waBinary.Node {
		return notification("link_code_companion_reg", element("link_code_companion_reg", attrs{"stage": "primary_hello"},
			leaf("link_code_pairing_ref", []byte("ref")), leaf(kind, nil),
			leaf("primary_identity_pub", bytes.Repeat([]byte{9}, 32)), leaf("link_code_pairing_wrapped_primary_ephemeral_pub", make([]byte, size))))
	}
	nodes := []waBinary.Node{
		element("failure", attrs{"reason": "402", "location": "x", "code": "101", "expire": "10", "message": "text"}),
		element("failure", attrs{"reason": "403", "logout_message_header": "x", "logout_message_subtext": "y"}),
		element("stream:error", attrs{"code": "401"}, element("conflict", attrs{"type": "device_removed"})),
		element("stream:error", attrs{}, element("conflict", attrs{"type": "replaced"})),
		element("stream:error", attrs{}, element("ack", attrs{"id": "1", "class": "message"}), element("xml-not-well-formed", nil)),
		element("xmlstreamend", nil),
		element("ib", attrs{"from": types.ServerJID}, element("offline_preview", attrs{"count": "1", "message": "1", "receipt": "0", "appdata": "0", "notification": "0"}),
			element("offline", attrs{"count": "1"}), element("dirty", attrs{"type": "account_sync", "timestamp": at}), element("downgrade_webclient", nil)),
		element("iq", attrs{"from": types.ServerJID, "id": "1", "type": "get", "xmlns": "urn:xmpp:ping"}, element("ping", nil)),
		element("presence", attrs{"from": someone, "type": "unavailable", "last": at}),
		element("chatstate", attrs{"from": someone}, element("composing", attrs{"media": "audio"})),
		element("chatstate", attrs{"from": group, "participant": someone}, element("paused", nil)),
		element("ack", attrs{"id": "1", "class": "message", "from": someone, "error": "463"}),
		element("appdata", attrs{"from": someone, "id": "1", "t": at}),
		receipt(""), receipt("read", element("list", nil, element("item", attrs{"id": "2"}))), receipt("inactive"), receipt("sender"), receipt("server-error"),
		receipt("retry", element("retry", attrs{"id": "1", "t": at, "count": "1", "v": "1"}), leaf("registration", []byte{1, 2, 3, 4}),
			element("keys", nil, leaf("type", []byte{5}), leaf("identity", make([]byte, 32)), element("key", nil, leaf("id", []byte{0, 0, 1}), leaf("value", make([]byte, 32))),
				element("skey", nil, leaf("id", []byte{0, 0, 1}), leaf("value", make([]byte, 32)), leaf("signature", make([]byte, 64))), leaf("device-identity", []byte{1}))),
		of(group, element("receipt", attrs{"id": "1", "t": at}, element("participants", attrs{"key": "1"}, element("user", attrs{"jid": someone, "t": at})))),
		message("text", element("enc", attrs{"v": "2", "type": "pkmsg", "count": "1", "decrypt-fail": "hide"}, nil...), element("meta", attrs{"target_id": "1", "target_sender_jid": someone, "deprecated_lid_session": "false"}), element("multicast", nil)),
		message("text", leaf("enc", []byte{0x33, 8, 1}), leaf("verified_name", []byte{10, 0})),
		of(types.NewJID("13135550002", types.DefaultUserServer), message("text", element("enc", attrs{"v": "2", "type": "msmsg"}), element("bot", attrs{"edit": "inner", "edit_target_id": "1", "sender_timestamp_ms": at}))),
		of(group, message("media", element("enc", attrs{"v": "2", "type": "skmsg", "mediatype": "image"}))),
		of(types.StatusBroadcastJID, message("text", element("enc", attrs{"v": "3", "type": "msg"}), element("participants", nil, element("to", attrs{"jid": someone, "peer_recipient_pn": someone})))),
		of(types.NewJID("1", types.NewsletterServer), message("text", leaf("plaintext", []byte{10, 1, 65}), element("meta", attrs{"msg_edit_t": at, "original_msg_t": at}))),
		message("text", element("unavailable", attrs{"type": "view_once"})),
		notification("encrypt", element("count", attrs{"value": "100"})), notification("encrypt", element("count", attrs{"value": "1"})),
		of(someone, notification("encrypt", element("identity", nil))),
		notification("server_sync", element("collection", attrs{"name": "regular_low", "version": "2"}), element("collection", attrs{"name": "unknown", "version": "2"})),
		notification("account_sync", element("devices", attrs{"dhash": "2:x"}, element("device", attrs{"jid": itself, "key-index": "1"}), element("key-index-list", attrs{"ts": at})),
			element("privacy", nil, element("category", attrs{"name": "last", "value": "all"})), element("picture", nil), element("blocklist", attrs{"action": "modify", "dhash": "x", "prev_dhash": "y"}, element("item", attrs{"jid": someone, "action": "block"})), element("status", nil)),
		of(someone, notification("devices", element("add", attrs{"device_hash": "2:x", "device_lid_hash": "2:y"}, element("device", attrs{"jid": someone, "lid": types.NewJID("1", types.HiddenUserServer)})),
			element("remove", attrs{"device_hash": "2:x"}, element("device", attrs{"jid": someone})), element("update", attrs{"hash": "x"}))),
		of(someone, notification("fbid:devices", element("devices", attrs{"dhash": "x"}, element("device", attrs{"id": "1"})))),
		notification("picture", element("set", attrs{"jid": someone, "author": someone, "id": "1"}), element("delete", attrs{"jid": someone}), element("add", attrs{"jid": someone})),
		notification("mediaretry", element("rmr", attrs{"jid": someone, "from_me": "false", "participant": someone}), element("encrypt", nil, leaf("enc_p", []byte{1}), leaf("enc_iv", []byte{1})), element("error", attrs{"code": "2"})),
		link("x", 80),
		notification("newsletter", element("live_updates", nil, element("messages", nil, element("message", attrs{"server_id": "1", "id": "1", "type": "text", "t": at}, leaf("plaintext", []byte{10, 1, 65}),
			element("views_count", attrs{"count": "1"}), element("reactions", nil, element("reaction", attrs{"code": "x", "count": "1"})))))),
		notification("mex", waBinary.Node{Tag: "update", Attrs: attrs{"op_name": "NotificationNewsletterJoin"}, Content: []byte(`{"data":{"xwa2_notify_newsletter_on_join":{"id":"1@newsletter"}}}`)}),
		notification("mex", leaf("update", []byte(`{"data":{"xwa2_notify_newsletter_on_leave":null,"xwa2_notify_newsletter_on_mute_change":{"mute":7}}}`))),
		notification("status", leaf("set", []byte("about"))),
		notification("passkey_prologue_request", leaf("passkey_request_options", []byte(`{"challenge":7,"allowCredentials":[null]}`))),
		message("text", waBinary.Node{Tag: "enc", Attrs: attrs{"v": "2", "type": "pkmsg", "state": "false"}, Content: []byte{0x33, 8, 1}}),
		notification("business", element("profile", nil)),
		fromGroup(element("create", attrs{"type": "new", "reason": "invite", "key": "x"}, element("group", attrs{"id": "120363000000000001", "creator": someone, "creation": at, "subject": "x", "s_t": at, "s_o": someone, "addressing_mode": "lid"},
			participant, element("description", attrs{"id": "1", "t": at, "participant": someone}, leaf("body", []byte("x"))), element("announcement", nil), element("locked", nil), element("ephemeral", attrs{"expiration": "1"}),
			leaf("member_add_mode", []byte("admin_add")), element("linked_parent", attrs{"jid": group}), element("default_sub_group", nil), element("parent", attrs{"default_membership_approval_mode": "x"}), element("incognito", nil), element("membership_approval_mode", nil, element("group_join", attrs{"state": "on"}))))),
	}
	for _, change := range []string{"add", "remove", "promote", "demote"} {
		nodes = append(nodes, fromGroup(element(change, attrs{"reason": "x", "prev_v_id": "1", "v_id": "2"}, participant)))
	}
	nodes = append(nodes,
		fromGroup(element("subject", attrs{"subject": "x", "s_t": at, "s_o": someone}), element("description", attrs{"id": "1"}, leaf("body", []byte("x"))), element("locked", nil), element("unlocked", nil),
			element("delete", attrs{"reason": "x"}), element("announcement", nil), element("not_announcement", nil), element("ephemeral", attrs{"expiration": "1"}), element("not_ephemeral", nil),
			element("link", attrs{"link_type": "sub_group"}, element("group", attrs{"jid": group, "subject": "x", "s_t": at})), element("unlink", attrs{"unlink_type": "x", "unlink_reason": "y"}, element("group", attrs{"jid": group, "subject": "x", "s_t": at})),
			element("membership_approval_mode", nil, element("group_join", attrs{"state": "on"})), element("suspended", nil), element("unsuspended", nil), element("invite", attrs{"code": "x"}),
			element("created_membership_requests", attrs{"request_method": "x"}, element("requested_user", attrs{"jid": someone})), element("revoked_membership_requests", nil, element("participant", attrs{"jid": someone})), element("unknown", nil)))
	for _, kind := range []string{"offer", "offer_notice", "relaylatency", "accept", "preaccept", "transport", "terminate", "reject", "unknown"} {
		nodes = append(nodes, call(kind))
	}
	recent := recentStanzas()
	for _, name := range slices.Sorted(maps.Keys(recent)) {
		nodes = append(nodes, recent[name])
	}
	return nodes
}

// badValues take the place of an attribute: empty, of another type, absurd.
var badValues = []any{
	[]byte{}, types.ServerJID, types.NewJID("x\x00y", "lid"), "-1", "99999999999999999999", "text", "\xff\x00", []waBinary.Node{{Tag: "x"}},
}

// badContents take the place of a node's content.
var badContents = []any{nil, []byte{}, []byte{1}, "text", someone, []waBinary.Node{}, []waBinary.Node{{Tag: "x"}}}

func clone(node waBinary.Node) waBinary.Node {
	node.Attrs = maps.Clone(node.Attrs)
	if children, ok := node.Content.([]waBinary.Node); ok {
		copied := make([]waBinary.Node, len(children))
		for i, child := range children {
			copied[i] = clone(child)
		}
		node.Content = copied
	}
	return node
}

// variants are a node with one thing wrong in it: each attribute missing and with each bad
// value, each child missing and doubled, each content of each bad kind.
func variants(node waBinary.Node) []waBinary.Node {
	var out []waBinary.Node
	for _, key := range slices.Sorted(maps.Keys(node.Attrs)) {
		missing := clone(node)
		delete(missing.Attrs, key)
		out = append(out, missing)
		for _, value := range badValues {
			bad := clone(node)
			bad.Attrs[key] = value
			out = append(out, bad)
		}
	}
	for _, content := range badContents {
		bad := clone(node)
		bad.Content = content
		out = append(out, bad)
	}
	for i, child := range node.GetChildren() {
		missing, doubled := clone(node), clone(node)
		missing.Content = slices.Delete(missing.GetChildren(), i, i+1)
		doubled.Content = slices.Insert(doubled.GetChildren(), i, clone(child))
		out = append(out, missing, doubled)
		for _, wrong := range variants(child) {
			bad := clone(node)
			bad.GetChildren()[i] = wrong
			out = append(out, bad)
		}
	}
	return out
}

// corpus are the frames of FuzzNodes, in groups: the nodes that do not end the
// connection are many, and are played together. typed are answers to a typed code.
func corpus() (together, typed, single [][]byte) {
	for _, node := range wellFormed() {
		_, answersCode := node.GetOptionalChildByTag("link_code_companion_reg")
		ends := node.Tag == "failure" || node.Tag == "stream:error" || node.Tag == "iq" || node.Tag == "success"
		for _, variant := range append([]waBinary.Node{node}, variants(node)...) {
			switch {
			case ends:
				single = append(single, encode(variant))
			case answersCode:
				typed = append(typed, encode(variant))
			default:
				together = append(together, encode(variant))
			}
		}
	}
	for code := 400; code < 600; code++ {
		text := strconv.Itoa(code)
		single = append(single, encode(element("failure", attrs{"reason": text})), encode(element("stream:error", attrs{"code": text})))
	}
	return together, typed, slices.Concat(single, frames())
}

// frames are some that are no nodes at all.
func frames() [][]byte {
	deep := []byte{0}
	for range 100_000 {
		deep = append(deep, 248, 2, 3, 248, 1) // a node with a list of one node
	}
	deep = append(deep, 248, 1, 3)
	var bomb bytes.Buffer
	z := zlib.NewWriter(&bomb)
	_, _ = z.Write(make([]byte, 2*maxUnpacked))
	_ = z.Close()
	wide := []byte{0, 248, 2, 3, 248, 4} // four nodes with 65,535 each
	for range 4 {
		wide = append(append(wide, 248, 2, 3, 249, 0xff, 0xff), bytes.Repeat([]byte{248, 1, 3}, 0xffff)...)
	}
	hollow := append([]byte{0, 248, 2, 3}, bytes.Repeat([]byte{249, 0xff, 0xff, 248, 2, 3}, 1000)...) // lists that promise more than comes
	return [][]byte{
		{}, {0}, {2}, {0, 0}, {0, 248}, {0, 248, 0}, {0, 248, 1}, {0, 248, 1, 0}, {0, 248, 1, 250, 248, 1, 3}, {0, 248, 3, 3, 250, 0, 0}, {0, 248, 2, 248, 1, 3, 3},
		{0, 248, 3, 3, 3, 250, 248, 1, 248, 1, 3, 3}, {0, 248, 3, 3, 3, 247, 0, 0, 0}, {0, 248, 3, 3, 3, 255, 128}, {0, 249, 0xff, 0xff, 3}, {0, 248, 2, 3, 254, 0xff, 0xff, 0xff, 0xff},
		deep, wide, hollow, append([]byte{2}, bomb.Bytes()...), {2, 0x78, 0x9c, 1, 2, 3},
	}
}

// FuzzNodes plays malformed nodes to a real client that is linked, and to some that offer
// codes, with answers to what they ask that are malformed too. No panic of the client may
// end the process; the next node finds it alive.
//
// Some goroutines of whatsmeow's own start behind its handlers, and nothing of ours is on
// their stack: the names of senders (updatePushName, updateBusinessName), the count and
// upload of prekeys after a login, receipts of the phone's own messages, and the request
// for keys of settings. What they read has been checked before; they are covered here,
// because their panic would end the test. What is not foreseen is left to the rule
// EndsItsWorker of the worker.
func FuzzNodes(f *testing.F) {
	together, typed, single := corpus()
	for i, frame := range single {
		f.Add(frame, []byte{}, uint64(i))
	}
	for _, reply := range replies() {
		f.Add(encode(element("notification", attrs{"from": types.ServerJID, "id": "1", "type": "server_sync"}, element("collection", attrs{"name": "regular_low", "version": "9"}))), encode(reply), uint64(0))
		f.Add(encode(element("notification", attrs{"from": types.ServerJID, "id": "1", "type": "encrypt"}, element("count", attrs{"value": "1"}))), encode(reply), uint64(0))
		f.Add(encode(element("success", attrs{"t": "1"})), encode(reply), uint64(0))
	}
	linked, scanning, typing := newHostile(f, linkedClient), newHostile(f, scanningClient), newHostile(f, typingClient)
	for h, all := range map[*hostile][][]byte{linked: slices.Concat(together, typed), scanning: slices.Concat(together, typed), typing: typed} {
		f.Cleanup(h.close)
		for frames := range slices.Chunk(all, 25) {
			h.play(wait(f), frames...)
		}
	}
	f.Fuzz(func(t *testing.T, frame, reply []byte, seed uint64) {
		g := NewWithT(t)
		played := [][]byte{frame}
		if node, err := decodeNode(frame); err == nil && seed > 1<<32 {
			random := rand.New(rand.NewPCG(seed, 0))
			all := variants(*node)
			for range min(len(all), 8) {
				played = append(played, encode(all[random.IntN(len(all))]))
			}
		}
		if answer, err := decodeNode(reply); err == nil {
			linked.w.simulator.AnswerWith(func(*waBinary.Node) *waBinary.Node {
				copied := clone(*answer)
				return &copied
			})
			defer linked.w.simulator.AnswerWith(nil)
			linked.play(g, played...)
			return
		}
		linked.play(g, played...)
		if len(reply) == 0 && seed%16 == 0 {
			scanning.play(g, played...)
		}
	})
}

// replies are malformed answers to what a client asks.
func replies() []waBinary.Node {
	patches := func(mutations ...*waServerSync.SyncdMutation) waBinary.Node {
		patch, err := proto.Marshal(&waServerSync.SyncdPatch{Version: &waServerSync.SyncdVersion{Version: proto.Uint64(1)}, Mutations: mutations})
		if err != nil {
			panic(err)
		}
		return element("iq", attrs{"type": "result", "from": types.ServerJID}, element("sync", nil,
			element("collection", attrs{"name": "regular_low", "version": "1", "has_more_patches": "true"}, element("patches", nil, leaf("patch", patch)))))
	}
	set := waServerSync.SyncdMutation_SET.Enum()
	short := &waServerSync.SyncdMutation{Operation: set, Record: &waServerSync.SyncdRecord{Value: &waServerSync.SyncdValue{Blob: []byte{1}}}}
	out := []waBinary.Node{
		patches(), patches(&waServerSync.SyncdMutation{Operation: set}), patches(short), patches(short, short), patches(nil),
		element("iq", nil), element("iq", attrs{"type": "result"}), element("iq", attrs{"type": "result"}, element("count", nil)), element("iq", attrs{"type": "result"}, element("list", nil)),
	}
	for _, variant := range variants(patches(short)) {
		variant.Tag = "iq"
		out = append(out, variant)
	}
	for code := 400; code < 600; code += 7 {
		out = append(out, element("iq", attrs{"type": "error"}, element("error", attrs{"code": strconv.Itoa(code), "text": "x"})))
	}
	return append(out, element("iq", attrs{"type": "error"}), element("iq", attrs{"type": "error"}, element("error", nil)))
}

// TestARefusedLoginDoesNotEndTheProcess: whatever reason a login is refused with, the end is
// reported and the process lives.
func TestARefusedLoginDoesNotEndTheProcess(t *testing.T) {
	h := newHostile(t, linkedClient)
	for _, reason := range []int{400, 401, 402, 403, 405, 406, 409, 413, 414, 415, 418, 500, 501, 503, 599} {
		t.Run(strconv.Itoa(reason), func(t *testing.T) {
			g := wait(t)
			_, err := h.w.simulator.Inject(simulator.Fault{Kind: simulator.FaultFailure, Reason: reason})
			g.Expect(err).NotTo(HaveOccurred())
			defer func() { _, _ = h.w.simulator.Clear(simulator.FaultFailure, "") }()
			s, ctx := h.w.prepare(h.taking, func(o *Options) { o.Device.Container = keptDevice{o.Device.Container} })
			g.Expect(s.Connect(ctx)).To(Succeed())
			g.Eventually(s.events).Should(ContainElement(And(HaveField("Over()", true),
				HaveField("Reason", Not(BeElementOf(session.EndSocketClosed, session.EndMalformedStanza))))))
			s.Close()
		})
	}
}

// TestAMalformedPairingDoesNotEndTheProcess: it ends the attempt, and the next one is made;
// or whatsmeow ignores it, and the code can still be typed.
func TestAMalformedPairingDoesNotEndTheProcess(t *testing.T) {
	h := newHostile(t, typingClient)
	answer := func(size int) waBinary.Node {
		return element("notification", attrs{"from": types.ServerJID, "id": "1", "type": "link_code_companion_reg"}, element("link_code_companion_reg", nil,
			// The short key is the last thing in the frame: whatsmeow would read on in what follows.
			leaf("link_code_pairing_ref", []byte("ref")), leaf("primary_identity_pub", make([]byte, 32)), leaf("link_code_pairing_wrapped_primary_ephemeral_pub", make([]byte, size))))
	}
	success := func(a attrs, children ...waBinary.Node) waBinary.Node {
		return element("iq", a, element("pair-success", nil, children...))
	}
	fromServer := attrs{"from": types.ServerJID}
	for name, row := range map[string]struct {
		node   waBinary.Node
		reason string
	}{
		"the key of the phone is short":   {answer(79), ""},
		"the key of the phone is empty":   {answer(0), ""},
		"a success without an id":         {success(fromServer), "PairingRefused"},
		"a success that names no device":  {success(attrs{"from": types.ServerJID, "id": "1"}), "PairingRefused"},
		"a success with a strange device": {success(attrs{"from": types.ServerJID, "id": "1"}, element("device", attrs{"jid": "text"})), "PairingRefused"},
	} {
		t.Run(name, func(t *testing.T) {
			g := wait(t)
			s := h.connect(g)
			h.play(g, encode(row.node))
			if row.reason == "" {
				g.Expect(s.events()).To(HaveExactElements(HaveField("Type", EventPairingCode)))
				return
			}
			g.Eventually(s.events).Should(ContainElement(And(HaveField("Over()", true), HaveField("Reason", row.reason))))
			h.close()
		})
	}
}

// TestSettingsOfThePhoneDoNotEndTheProcess: another device of the account may upload what
// whatsmeow panics over.
func TestSettingsOfThePhoneDoNotEndTheProcess(t *testing.T) {
	h := newHostile(t, linkedClient)
	s := h.connect(h.w.g)
	for _, reply := range replies() {
		h.w.simulator.AnswerWith(func(*waBinary.Node) *waBinary.Node {
			copied := clone(reply)
			return &copied
		})
		// As whatsmeow does in a separate goroutine, for a message of the own phone.
		s.internals().HandleAppStateSyncKeyShare(s.ctx, &waE2E.AppStateSyncKeyShare{Keys: []*waE2E.AppStateSyncKey{nil, {}, {KeyID: &waE2E.AppStateSyncKeyId{KeyID: []byte{1}}}}})
	}
	h.w.simulator.AnswerWith(nil)
	h.w.g.Expect(s.ctx.Err()).NotTo(HaveOccurred(), "the connection goes on")
	h.close()
}

// TestMessagesWithAbsurdContents: they are encrypted well, so that they come as far as
// what whatsmeow does with their contents.
func TestMessagesWithAbsurdContents(t *testing.T) {
	w, _, s := linked(t)
	w.hostile = true
	kind := func(k waE2E.ProtocolMessage_Type) *waE2E.ProtocolMessage_Type { return &k }
	protocol := func(p *waE2E.ProtocolMessage) *waE2E.Message { return &waE2E.Message{ProtocolMessage: p} }
	placeholder := waE2E.PeerDataOperationRequestType_PLACEHOLDER_MESSAGE_RESEND
	nested := &waE2E.Message{Conversation: proto.String("nested")}
	for range 500 {
		nested = &waE2E.Message{EphemeralMessage: &waE2E.FutureProofMessage{Message: nested}}
	}
	for name, message := range map[string]*waE2E.Message{
		"nothing":                        {},
		"a protocol message of no kind":  protocol(&waE2E.ProtocolMessage{}),
		"an edit of nothing":             protocol(&waE2E.ProtocolMessage{Type: kind(waE2E.ProtocolMessage_MESSAGE_EDIT)}),
		"keys of settings":               protocol(&waE2E.ProtocolMessage{Type: kind(waE2E.ProtocolMessage_APP_STATE_SYNC_KEY_SHARE), AppStateSyncKeyShare: &waE2E.AppStateSyncKeyShare{Keys: []*waE2E.AppStateSyncKey{{}}}}),
		"a history":                      protocol(&waE2E.ProtocolMessage{Type: kind(waE2E.ProtocolMessage_HISTORY_SYNC_NOTIFICATION), HistorySyncNotification: &waE2E.HistorySyncNotification{}}),
		"mappings":                       protocol(&waE2E.ProtocolMessage{LidMigrationMappingSyncMessage: &waE2E.LIDMigrationMappingSyncMessage{EncodedMappingPayload: []byte{10, 0}}}),
		"an answer of the phone":         protocol(&waE2E.ProtocolMessage{PeerDataOperationRequestResponseMessage: &waE2E.PeerDataOperationRequestResponseMessage{PeerDataOperationRequestType: &placeholder, PeerDataOperationResult: []*waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult{{}, {PlaceholderMessageResendResponse: &waE2E.PeerDataOperationRequestResponseMessage_PeerDataOperationResult_PlaceholderMessageResendResponse{WebMessageInfoBytes: []byte{}}}}}}),
		"sent by the device, to nobody":  {DeviceSentMessage: &waE2E.DeviceSentMessage{}},
		"a sender key outside of groups": {SenderKeyDistributionMessage: &waE2E.SenderKeyDistributionMessage{}},
		"nested 500 deep":                nested,
	} {
		for _, from := range []string{phone, ""} {
			_, err := w.simulator.SendMessage(t.Context(), phone, from, message)
			w.g.Expect(err).NotTo(HaveOccurred(), name)
		}
	}
	w.send("after")
	w.g.Eventually(s.texts).Should(ContainElement("after"))
	w.settled()
	w.g.Expect(slices.ContainsFunc(s.events(), Event.Over)).To(BeFalse(), "the connection goes on")
}

// TestFraming: the frames that whatsmeow would panic over, or misread.
func TestFraming(t *testing.T) {
	message := func(final bool, opcode byte, payload ...byte) []byte {
		if final {
			opcode |= 0x80
		}
		return append([]byte{opcode, byte(len(payload))}, payload...)
	}
	frame := func(payload ...byte) []byte { return append([]byte{0, 0, byte(len(payload))}, payload...) }
	hello := message(true, 2, frame(1, 2, 3)...)
	for name, row := range map[string]struct {
		bytes [][]byte
		wrong string
		hello []byte
		// frames are those after the first one.
		frames int64
	}{
		"a frame in a message":             {bytes: [][]byte{hello}, hello: []byte{1, 2, 3}},
		"more in the first message":        {bytes: [][]byte{message(true, 2, append(frame(1), frame(2)...)...)}, wrong: "after the first frame"},
		"more in a later message":          {bytes: [][]byte{hello, message(true, 2, append(frame(1), frame()...)...), message(true, 2, frame(3)...)}, hello: []byte{1, 2, 3}, frames: 3},
		"an empty frame":                   {bytes: [][]byte{message(true, 2, frame()...)}, hello: []byte{}},
		"an empty message":                 {bytes: [][]byte{message(true, 2), hello}, hello: []byte{1, 2, 3}},
		"a ping before and between":        {bytes: [][]byte{message(true, 9, 1), message(false, 2, 0, 0, 2), message(true, 9), message(true, 0, 7, 8)}, hello: []byte{7, 8}},
		"a text":                           {bytes: [][]byte{message(true, 1, 0, 0, 9, 1), hello}, hello: []byte{1, 2, 3}},
		"a message in two websocket parts": {bytes: [][]byte{message(false, 2, 0, 0), message(true, 0, 1, 9)}, hello: []byte{9}},
		"a frame over two messages":        {bytes: [][]byte{message(true, 2, 0, 0, 5, 1, 2, 3, 4), message(true, 2, 5)}, wrong: "split"},
		"a length over two messages":       {bytes: [][]byte{message(true, 2, 0, 0), message(true, 2, 1, 5)}, wrong: "split"},
		"masked":                           {bytes: [][]byte{{0x82, 0x81, 0, 0, 0, 0, 1}}, wrong: "masked"},
		"giant":                            {bytes: [][]byte{{0x82, 127, 0, 0, 0, 0, 1, 0, 0, 0}}, wrong: "more than"},
		"giant, with the sign bit":         {bytes: [][]byte{{0x82, 127, 255, 255, 255, 255, 255, 255, 255, 255}}, wrong: "more than"},
		"giant in parts":                   {bytes: [][]byte{hello, append([]byte{0x02, 127, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff}, make([]byte, 0x7fffff)...), {0x80, 126, 0xff, 0xff}}, wrong: "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1, 3, 1 << 20} {
				g := NewWithT(t)
				var f framing
				var wrong error
				for part := range slices.Chunk(slices.Concat(row.bytes...), size) {
					for wrong == nil && len(part) > 0 {
						var followed int
						followed, wrong = f.read(part)
						part = part[followed:]
					}
				}
				if row.wrong != "" {
					g.Expect(wrong).To(MatchError(ContainSubstring(row.wrong)))
					continue
				}
				g.Expect(wrong).NotTo(HaveOccurred())
				g.Expect(f.hello).To(Equal(row.hello))
				g.Expect(f.frames).To(Equal(row.frames))
			}
		})
	}
}

func TestDecodeNode(t *testing.T) {
	g := NewWithT(t)
	node := element("message", attrs{"notify": "a\x00b\xffc", "from": types.NewJID("1\x00", "lid")}, leaf("x", []byte{0, 255}))
	got, err := decodeNode(encode(node))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(got.Attrs).To(Equal(attrs{"notify": "a\uFFFDb\uFFFDc", "from": types.NewJID("1\uFFFD", "lid")}))
	g.Expect(got.GetChildByTag("x").Content).To(Equal([]byte{0, 255}))
	for _, frame := range frames() {
		_, err := decodeNode(frame)
		g.Expect(err).To(HaveOccurred(), "%.40x", frame)
	}
	for _, node := range wellFormed() {
		_, err := decodeNode(encode(node))
		g.Expect(err).NotTo(HaveOccurred(), "%s", &node)
	}
}

// TestTheQueueIsBounded: beyond its bounds nothing more is read.
func TestTheQueueIsBounded(t *testing.T) {
	g := NewWithT(t)
	var q nodeQueue
	full, start := q.put(&waBinary.Node{}, 3*maxQueuedBytes)
	g.Expect(full).To(BeNil(), "one node is always taken")
	g.Expect(start).To(BeTrue())
	full, _ = q.put(&waBinary.Node{}, 1)
	g.Expect(full).NotTo(BeClosed())
	changed := q.wait()
	g.Expect(q.take()).NotTo(BeNil())
	g.Expect(changed).To(BeClosed())
	g.Expect(full).To(BeClosed())
	for i := range maxQueued {
		full, start = q.put(&waBinary.Node{Tag: fmt.Sprint(i)}, 1)
		g.Expect(full).To(BeNil())
		g.Expect(start).To(BeFalse())
	}
	full, _ = q.put(&waBinary.Node{}, 1)
	g.Expect(full).NotTo(BeNil())
	for i := range maxQueued {
		g.Expect(q.take().Tag).To(Equal(fmt.Sprint(i)))
	}
	g.Expect(q.take()).To(BeNil())
	g.Expect(q.wait()).To(BeNil())
	_, start = q.put(&waBinary.Node{}, 1)
	g.Expect(start).To(BeTrue())
}

// TestAPanicOfWhatsmeowDoesNotEndTheProcess: a message to a bot's conversation whose content is
// missing is one that whatsmeow panics over. It is refused for good, and the connection
// goes on.
func TestAPanicOfWhatsmeowDoesNotEndTheProcess(t *testing.T) {
	w, _, s := linked(t)
	bot := types.NewJID("13135550002", types.DefaultUserServer)
	w.g.Expect(s.options.Device.MsgSecrets.PutMessageSecret(t.Context(), bot, someone, "target", make([]byte, 32))).To(Succeed())
	w.g.Expect(w.simulator.Play(phone, encode(element("message", attrs{"from": bot, "id": "1", "t": "1700000000", "type": "text"},
		element("enc", attrs{"v": "2", "type": "msmsg"}), element("meta", attrs{"target_id": "target", "target_sender_jid": someone}))))).To(Succeed())
	w.send("after")
	w.g.Eventually(s.texts).Should(Equal([]string{"after"}))
	w.settled()
	w.g.Expect(slices.ContainsFunc(s.events(), Event.Over)).To(BeFalse(), "the connection goes on")
}

// TestTheLastNodeIsNotLost: a server that closes the socket right after it has said why
// is understood, as often as it does.
func TestTheLastNodeIsNotLost(t *testing.T) {
	h := newHostile(t, linkedClient)
	for _, kind := range []simulator.Fault{{Kind: simulator.FaultCloseAtOnce}, {Kind: simulator.FaultFailure, Reason: 418}} {
		_, err := h.w.simulator.Inject(kind)
		h.w.g.Expect(err).NotTo(HaveOccurred())
	}
	for range 20 {
		s, ctx := h.w.prepare(h.taking)
		h.w.g.Expect(s.Connect(ctx)).To(Succeed())
		h.w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("ConnectFailure418"))
		s.Close()
	}
}

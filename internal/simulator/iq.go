package simulator

import (
	"maps"
	"slices"
	"strings"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// The server answers a client's request (an iq) with the children of a result, or
// with an error. It answers unknown requests with error 501, so that no client waits
// forever, and counts them.

// reply is an answer; a code other than 0 makes it an error.
type reply struct {
	children []waBinary.Node
	code     int
	text     string
	// after runs when the answer has been sent.
	after func() error
}

// keepAlive is the only request that is answered both before and after a login.
const keepAlive = "w:p/get"

var (
	done     = reply{}
	notFound = reply{code: 404, text: "item-not-found"}
	badInput = reply{code: 400, text: "bad-request"}
	notYours = reply{code: 403, text: "forbidden"}
)

// answers maps "namespace/type" to the function that answers; the function returns
// false for a request that it does not know. All of them need a login.
var answers = map[string]func(c *conn, iq *waBinary.Node) (reply, bool){
	"encrypt/get":                 (*conn).answerKeys,
	"encrypt/set":                 (*conn).answerUpload,
	"passive/set":                 (*conn).answerPassive,
	"usync/get":                   (*conn).answerUsync,
	"md/set":                      (*conn).answerRemoveDevice,
	"privacy/get":                 always(result(waBinary.Node{Tag: "privacy", Content: privacySettings})),
	"privacy/set":                 (*conn).answerPrivacy,
	"status/get":                  always(notFound), // the client falls back to "my contacts"
	"status/set":                  always(done),
	"blocklist/get":               always(result(waBinary.Node{Tag: "list", Attrs: waBinary.Attrs{"dhash": "0"}})),
	"blocklist/set":               always(result(waBinary.Node{Tag: "list", Attrs: waBinary.Attrs{"dhash": "0"}})),
	"disappearing_mode/set":       always(done),
	"urn:xmpp:whatsapp:dirty/set": always(done),
	"urn:xmpp:whatsapp:push/get":  always(done),
	"urn:xmpp:whatsapp:push/set":  always(done),
	"w:sync:app:state/set":        (*conn).answerAppState,
	"w:m/set":                     (*conn).answerMediaConn,
	"w:g2/get":                    (*conn).answerGroups,
	"w:g2/set":                    always(notYours),
	"w:profile:picture/get":       (*conn).answerPicture,
	"w:profile:picture/set":       always(notYours),
	"w:biz/get":                   (*conn).answerBusiness,
	"w:qr/get":                    always(notFound),
	"w:qr/set":                    always(notYours),
	"w:mex/get":                   (*conn).answerGraphQL,
	"newsletter/get":              always(notFound),
	"newsletter/set":              always(notFound),
	"tos/set":                     always(done),
	"bot/get":                     always(result(waBinary.Node{Tag: "bot", Attrs: waBinary.Attrs{"v": "2"}})),
	"fb:thrift_iq/get":            always(notFound), // the details of an order
	"fbid:devices/get":            always(notFound), // the devices of users of Messenger
}

// answersBeforeLogin is the same map for a client that is not paired.
var answersBeforeLogin = map[string]func(c *conn, iq *waBinary.Node) (reply, bool){
	"md/get": (*conn).answerPairingGet,
	"md/set": (*conn).answerPairingSet,
}

// privacySettings are the settings of a new account.
var privacySettings = func() []waBinary.Node {
	var out []waBinary.Node
	for _, name := range []types.PrivacySettingType{
		types.PrivacySettingTypeGroupAdd, types.PrivacySettingTypeLastSeen, types.PrivacySettingTypeStatus,
		types.PrivacySettingTypeProfile, types.PrivacySettingTypeReadReceipts, types.PrivacySettingTypeOnline,
		types.PrivacySettingTypeCallAdd,
	} {
		out = append(out, waBinary.Node{Tag: "category", Attrs: waBinary.Attrs{"name": string(name), "value": string(types.PrivacySettingAll)}})
	}
	return out
}()

func result(children ...waBinary.Node) reply { return reply{children: children} }

func always(r reply) func(*conn, *waBinary.Node) (reply, bool) {
	return func(*conn, *waBinary.Node) (reply, bool) { return r, true }
}

// handleIQ answers a request, or handles the answer to a request of the server.
func (c *conn) handleIQ(iq *waBinary.Node) error {
	kind, id, namespace := attribute(iq, "type"), attribute(iq, "id"), attribute(iq, "xmlns")
	if kind == "result" || kind == "error" {
		c.srv.checkKnown("answer", iq)
		if c.pairing != nil {
			c.srv.mu.Lock()
			found := c.pairing.scan
			c.srv.mu.Unlock()
			if found != nil && found.id == id {
				c.finishScan(iq, found)
			}
		}
		return nil
	}
	if namespace == "w:p" && kind == "get" { // keep-alive
		c.srv.checkKnown(keepAlive, iq)
		if _, mute := c.srv.active(FaultMute, c.device); mute {
			return nil
		}
		return c.send(waBinary.Node{Tag: "iq", Attrs: fromServer(waBinary.Attrs{"type": "result", "id": id, "t": c.srv.seconds()})})
	}
	if answer := c.srv.scripted(iq); answer != nil {
		return c.send(*answer)
	}
	r, known := reply{code: 501, text: "feature-not-implemented"}, false
	name := namespace + "/" + kind
	answer := answers[name]
	if c.device == nil {
		answer = answersBeforeLogin[name]
	}
	if answer != nil {
		if r2, ok := answer(c, iq); ok {
			r, known = r2, true
			c.srv.checkKnown(name, iq)
		}
	}
	if !known {
		if children := iq.GetChildren(); len(children) > 0 {
			name += "/" + children[0].Tag
		}
		if c.device == nil {
			name += " before the login"
		}
		c.srv.countUnknown(name)
	}
	node := waBinary.Node{Tag: "iq", Attrs: fromServer(waBinary.Attrs{"type": "result", "id": id})}
	if r.code != 0 {
		node.Attrs["type"] = "error"
		node.Content = []waBinary.Node{{Tag: "error", Attrs: waBinary.Attrs{"code": r.code, "text": r.text}}}
	} else if r.children != nil {
		node.Content = r.children
	}
	if err := c.send(node); err != nil {
		return err
	}
	if r.after != nil {
		return r.after()
	}
	return nil
}

// answerKeys returns the number of a device's one-time keys, or the keys of others.
func (c *conn) answerKeys(iq *waBinary.Node) (reply, bool) {
	s := c.srv
	if _, ok := iq.GetOptionalChildByTag("count"); ok {
		s.mu.Lock()
		defer s.mu.Unlock()
		return result(waBinary.Node{Tag: "count", Attrs: waBinary.Attrs{"value": len(c.device.preKeys)}}), true
	}
	wanted, ok := iq.GetOptionalChildByTag("key")
	if !ok {
		return reply{}, false
	}
	list := []waBinary.Node{}
	for _, user := range wanted.GetChildrenByTag("user") {
		jid := jidAttribute(&user, "jid")
		children, err := s.keysOf(jid)
		if err != nil || children == nil {
			children = []waBinary.Node{{Tag: "error", Attrs: waBinary.Attrs{"code": "404", "text": "item-not-found"}}}
		}
		list = append(list, waBinary.Node{Tag: "user", Attrs: waBinary.Attrs{"jid": jid}, Content: children})
	}
	return result(waBinary.Node{Tag: "list", Content: list}), true
}

// keysOf returns the key bundle of a phone or of a linked device, or nil.
func (s *Server) keysOf(jid types.JID) ([]waBinary.Node, error) {
	s.mu.Lock()
	a := s.accountOfLocked(jid)
	if a == nil {
		s.mu.Unlock()
		return nil, nil
	}
	if jid.Device == 0 {
		s.mu.Unlock()
		return a.handset.bundle()
	}
	d := a.devices[jid.Device]
	if d == nil {
		s.mu.Unlock()
		return nil, nil
	}
	nodes := d.bundleNodesLocked()
	low := len(d.preKeys) == lowPreKeys
	s.mu.Unlock()
	if low {
		s.askForPreKeys(d)
	}
	return nodes, nil
}

// answerUpload stores the keys that others need to write to the device.
func (c *conn) answerUpload(iq *waBinary.Node) (reply, bool) {
	list, ok := iq.GetOptionalChildByTag("list")
	if !ok {
		return reply{}, false
	}
	signed, ok := readPreKey(iq.GetChildByTag("skey"))
	if !ok || string(content(iq, "identity")) != string(c.device.identity[:]) {
		return badInput, true
	}
	var keys []preKey
	for _, node := range list.GetChildrenByTag("key") {
		if len(keys) == maxPreKeys {
			break
		}
		k, ok := readPreKey(node)
		if !ok {
			return badInput, true
		}
		keys = append(keys, k)
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	c.device.signed = signed
	c.device.preKeys = append(slices.Clip(c.device.preKeys), keys...)
	return done, true
}

// answerPassive starts or stops the delivery of messages.
func (c *conn) answerPassive(iq *waBinary.Node) (reply, bool) {
	if _, ok := iq.GetOptionalChildByTag("active"); ok {
		return reply{after: c.activate}, true
	}
	if _, ok := iq.GetOptionalChildByTag("passive"); ok {
		c.srv.mu.Lock()
		c.active = false
		c.srv.mu.Unlock()
		return done, true
	}
	return reply{}, false
}

// answerUsync returns which numbers are on WhatsApp, with their devices and LIDs.
func (c *conn) answerUsync(iq *waBinary.Node) (reply, bool) {
	request, ok := iq.GetOptionalChildByTag("usync")
	if !ok {
		return reply{}, false
	}
	query, list := request.GetChildByTag("query"), request.GetChildByTag("list")
	users := []waBinary.Node{}
	for _, user := range list.GetChildrenByTag("user") {
		jid := jidAttribute(&user, "jid")
		asked := content(&user, "contact")
		if len(asked) > 0 {
			jid = types.NewJID(strings.TrimPrefix(strings.TrimSuffix(string(asked), "@"+types.LegacyUserServer), "+"), types.DefaultUserServer)
		}
		if _, bot := user.GetOptionalChildByTag("bot"); bot || jid.User == "" {
			continue // there are no bots
		}
		c.srv.mu.Lock()
		c.srv.checkTokenLocked(c.device.account, jid, &user)
		a := c.srv.accountOfLocked(jid)
		var indices []uint16
		if a != nil {
			indices = slices.Collect(maps.Keys(a.devices))
			if _, ok := query.GetOptionalChildByTag("devices"); ok && a != c.device.account {
				a.watchers[c.device] = struct{}{}
			}
			if jid.Server != types.HiddenUserServer {
				jid = a.jid() // the account's own number, even if the request has an alias
			}
		}
		answer := waBinary.Attrs{"jid": jid}
		if contact := query.GetChildByTag("contact"); attribute(&contact, "addressing_mode") == "lid" && jid.Server == types.DefaultUserServer {
			answer = waBinary.Attrs{"pn_jid": jid}
			if a != nil {
				answer["jid"] = a.lidJID()
			}
		}
		c.srv.mu.Unlock()
		slices.Sort(indices)
		var facts []waBinary.Node
		for _, wanted := range query.GetChildren() {
			switch wanted.Tag {
			case "contact":
				in := waBinary.Attrs{"type": "in"}
				if a == nil {
					in["type"] = "out"
				}
				facts = append(facts, waBinary.Node{Tag: "contact", Attrs: in, Content: slices.Clone(asked)})
			case "devices":
				if a == nil {
					continue
				}
				devices := []waBinary.Node{{Tag: "device", Attrs: waBinary.Attrs{"id": "0"}}}
				for _, index := range indices {
					devices = append(devices, waBinary.Node{Tag: "device", Attrs: waBinary.Attrs{"id": int(index), "key-index": int(index)}})
				}
				facts = append(facts, waBinary.Node{Tag: "devices", Content: []waBinary.Node{{Tag: "device-list", Content: devices}}})
			case "lid":
				if a != nil {
					facts = append(facts, waBinary.Node{Tag: "lid", Attrs: waBinary.Attrs{"val": a.lidJID()}})
				}
			default: // no account has a status, picture, business, bot, disappearing_mode or username
			}
		}
		users = append(users, waBinary.Node{Tag: "user", Attrs: answer, Content: facts})
	}
	return result(waBinary.Node{
		Tag:     "usync",
		Attrs:   waBinary.Attrs{"sid": attribute(&request, "sid"), "mode": attribute(&request, "mode"), "context": attribute(&request, "context"), "index": "0", "last": "true"},
		Content: []waBinary.Node{{Tag: "result"}, {Tag: "list", Content: users}},
	}), true
}

// answerPrivacy accepts changes of the privacy settings without storing them, and stores
// the privacy tokens that an account gives its contacts.
func (c *conn) answerPrivacy(iq *waBinary.Node) (reply, bool) {
	if tokens, ok := iq.GetOptionalChildByTag("tokens"); ok {
		return c.issueTokens(tokens.GetChildren()), true
	}
	_, ok := iq.GetOptionalChildByTag("privacy")
	return done, ok
}

// answerPicture says that an account has no picture.
func (c *conn) answerPicture(iq *waBinary.Node) (reply, bool) {
	picture, ok := iq.GetOptionalChildByTag("picture")
	if !ok {
		return reply{}, false
	}
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	c.srv.checkTokenLocked(c.device.account, jidAttribute(iq, "target"), &picture)
	return notFound, true
}

// answerRemoveDevice unlinks the requesting device (a logout).
func (c *conn) answerRemoveDevice(iq *waBinary.Node) (reply, bool) {
	node, ok := iq.GetOptionalChildByTag("remove-companion-device")
	if !ok {
		return reply{}, false
	}
	if jidAttribute(&node, "jid") != c.device.jid() {
		return notYours, true
	}
	c.srv.unlink(c.device)
	c.srv.count(func(c *counts) { c.logouts++ })
	return reply{after: func() error {
		c.end(nil)
		return nil
	}}, true
}

// answerAppState reports no changes in a collection of the phone's settings. It
// accepts changes and does not store them.
func (c *conn) answerAppState(iq *waBinary.Node) (reply, bool) {
	sync, ok := iq.GetOptionalChildByTag("sync")
	if !ok {
		return reply{}, false
	}
	var collections []waBinary.Node
	for _, collection := range sync.GetChildrenByTag("collection") {
		version := attribute(&collection, "version")
		if version == "" {
			version = "0"
		}
		collections = append(collections, waBinary.Node{Tag: "collection", Attrs: waBinary.Attrs{"name": attribute(&collection, "name"), "version": version}})
	}
	return result(waBinary.Node{Tag: "sync", Content: collections}), true
}

// answerBusiness returns the empty profile of an account without a business.
func (c *conn) answerBusiness(iq *waBinary.Node) (reply, bool) {
	profile, ok := iq.GetOptionalChildByTag("business_profile", "profile")
	if !ok {
		return reply{}, false
	}
	return result(waBinary.Node{Tag: "business_profile", Content: []waBinary.Node{
		{Tag: "profile", Attrs: waBinary.Attrs{"jid": jidAttribute(&profile, "jid")}},
	}}), true
}

// graphQL holds the queries of whatsmeow (newsletter.go and user.go) by their ids, with
// their answers; without an answer the server says that it found nothing. Apps for
// computers ask with other ids than WhatsApp Web.
var graphQL = map[string]string{
	"9152604461510864": `{"data":{}}`, // set the text about the account

	// The channels that it follows: WhatsApp Web, and an app (which has the same id for "follow a channel").
	"6388546374527196": `{"data":{"xwa2_newsletter_subscribed":[]}}`,
	"8621797084555037": `{"data":{"xwa2_newsletter_subscribed":[]}}`,

	// About a channel, recommended channels, all channels, a channel's subscribers; mute,
	// unmute, update, create, unfollow and follow a channel.
	"6563316087068696": "", "7272540469429201": "", "7263823273662354": "", "6190824427689257": "", "9800646650009898": "",
	"6274038279359549": "", "6068417879924485": "", "7150902998257522": "", "6234210096708695": "", "6392786840836363": "",
	"9926858900719341": "",
	// The same from an app.
	"9779843322044422": "", "27256776790637714": "", "25403502652570342": "", "5971669009605755": "", "6104029483058502": "",
	"7839742399440946": "", "27527996220149684": "", "8782612271820087": "",
}

// answerGraphQL answers GraphQL queries.
func (c *conn) answerGraphQL(iq *waBinary.Node) (reply, bool) {
	query, ok := iq.GetOptionalChildByTag("query")
	if !ok {
		return reply{}, false
	}
	id := attribute(&query, "query_id")
	answer, ok := graphQL[id]
	if !ok {
		c.srv.countUnknown("w:mex/get/query " + id)
	}
	if answer == "" {
		return notFound, true
	}
	return result(waBinary.Node{Tag: "result", Content: []byte(answer)}), true
}

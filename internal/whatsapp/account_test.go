package whatsapp

import (
	"context"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// TestSameAccount: the number that people write is not always the number that WhatsApp uses
// for the account.
func TestSameAccount(t *testing.T) {
	for name, row := range map[string]struct {
		phone string
		alias []string
		ask   string
		want  bool
	}{
		"the number itself":                        {phone: "34600111222", ask: "+34600111222", want: true},
		"Brazil, whose ninth digit is left out":    {phone: "551187654321", alias: []string{"5511987654321"}, ask: "+5511987654321", want: true},
		"Mexico, where a 1 is added":               {phone: "5215512345678", alias: []string{"525512345678"}, ask: "+525512345678", want: true},
		"Argentina, where a 9 is added":            {phone: "5491112345678", alias: []string{"541112345678"}, ask: "+541112345678", want: true},
		"the same digits but for one":              {phone: "551187654321", ask: "+551187654322"},
		"another form of another account's number": {phone: "34600111222", alias: []string{"34600111223"}, ask: "+5511987654321"},
		"not a number that WhatsApp can know":      {phone: "34600111222", ask: "+123"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newEnvironment(t)
			for _, alias := range row.alias {
				w.g.Expect(w.simulator.SetAlias(row.phone, alias)).To(Succeed())
			}
			taking := w.take()
			w.pair(taking, row.phone)
			s := w.connect(taking)
			s.event(EventConnected)
			same, err := s.SameAccount(t.Context(), row.ask)
			w.g.Expect(err).NotTo(HaveOccurred())
			w.g.Expect(same).To(Equal(row.want))
			w.settled()
		})
	}
}

func TestSameAccountWithoutAnAnswerIsAnError(t *testing.T) {
	w, taking, s := linked(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.SameAccount(ctx, "+34600111222")
	w.g.Expect(err).To(MatchError(ErrAccountUnknown))

	_, err = w.simulator.Inject(simulator.Fault{Kind: simulator.FaultDrop})
	w.g.Expect(err).NotTo(HaveOccurred())
	s.event(EventDisconnected)
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = s.SameAccount(ctx, "+34600111222")
	w.g.Expect(err).To(MatchError(ErrAccountUnknown))
	s.Close()

	unlinked, _ := w.prepare(taking, func(o *Options) { o.Device.ID = nil })
	_, err = unlinked.SameAccount(t.Context(), "+34600111222")
	w.g.Expect(err).To(MatchError(ErrAccountUnknown))
}

func TestOwnAccount(t *testing.T) {
	own := types.JID{User: "34600111222", Device: 3, Server: types.DefaultUserServer}
	hidden := types.JID{User: "111222333444555", Device: 3, Server: types.HiddenUserServer}
	user := func(kind string, attrs waBinary.Attrs) waBinary.Node {
		return waBinary.Node{Tag: "user", Attrs: attrs, Content: []waBinary.Node{{Tag: "contact", Attrs: waBinary.Attrs{"type": kind}}}}
	}
	for name, row := range map[string]struct {
		list  []waBinary.Node
		jid   types.JID // of the device; empty: own
		lid   types.JID
		want  bool
		fails bool
	}{
		"a number, of a device whose only address is a LID": {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": own.ToNonAD()})}, jid: hidden, fails: true},
		"the LID of such a device":                          {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": hidden.ToNonAD(), "pn_jid": own.ToNonAD()})}, jid: hidden, want: true},
		"another LID than that of such a device":            {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": types.NewJID("9", types.HiddenUserServer)})}, jid: hidden},
		"a number with the digits of such a LID":            {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": types.NewJID(hidden.User, types.DefaultUserServer)})}, jid: hidden, fails: true},
		"the own number":                                    {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": own.ToNonAD()})}, want: true},
		"the own number, of a hosted account":               {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": types.NewJID(own.User, types.HostedServer)})}, want: true},
		"the own LID":                                       {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": hidden.ToNonAD()})}, lid: hidden, want: true},
		"the own LID with the number beside it":             {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": hidden.ToNonAD(), "pn_jid": own.ToNonAD()})}, want: true},
		"another LID":                                       {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": types.NewJID("9", types.HiddenUserServer)})}, lid: hidden},
		"a LID, while the own one is unknown":               {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": hidden.ToNonAD()})}, fails: true},
		"a LID with the digits of the number":               {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": types.NewJID(own.User, types.HiddenUserServer)})}, lid: hidden},
		"another number":                                    {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": types.NewJID("34600111223", types.DefaultUserServer)})}},
		"nobody":                                            {list: []waBinary.Node{user("out", waBinary.Attrs{"jid": own.ToNonAD()})}},
		"no answer":                                         {fails: true},
		"an answer that says neither yes nor no":            {list: []waBinary.Node{user("", waBinary.Attrs{"jid": own.ToNonAD()}), user("x", nil)}, fails: true},
		"a yes without a number":                            {list: []waBinary.Node{user("in", nil), user("in", waBinary.Attrs{"jid": "text"})}, fails: true},
		"a group":                                           {list: []waBinary.Node{user("in", waBinary.Attrs{"jid": types.NewJID(own.User, types.GroupServer)})}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			device := own
			if !row.jid.IsEmpty() {
				device = row.jid
			}
			same, err := ownAccount(&waBinary.Node{Tag: "list", Content: row.list}, device, row.lid)
			if row.fails {
				g.Expect(err).To(MatchError(ErrAccountUnknown))
				return
			}
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(same).To(Equal(row.want))
		})
	}
}

// TestACodeForTheNumberAsPeopleWriteIt: the phone that the spec names with a ninth
// digit is the one that WhatsApp knows without it.
func TestACodeForTheNumberAsPeopleWriteIt(t *testing.T) {
	w := newEnvironment(t)
	w.g.Expect(w.simulator.SetAlias("551187654321", "5511987654321")).To(Succeed())
	s := w.connect(w.take(), func(o *Options) { o.PairPhone = "+5511987654321" })
	_, err := w.simulator.EnterCode(t.Context(), "551187654321", s.event(EventPairingCode).Code)
	w.g.Expect(err).NotTo(HaveOccurred())
	w.g.Expect(s.event(EventPairSuccess).PhoneNumber).To(Equal("+551187654321"))
	s.event(EventDisconnected)
}

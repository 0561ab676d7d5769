package whatsapp

import (
	"testing"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/types"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// These tests receive what the simulator sends, with the real client.

// lid is the LID of the account with a number.
func (w *environment) lid(number string) string {
	w.t.Helper()
	lid, err := w.simulator.LID(number)
	w.g.Expect(err).NotTo(HaveOccurred())
	return lid
}

// addressOf is the address in items of the account with a number.
func (w *environment) addressOf(number string) delivery.Address {
	w.t.Helper()
	return delivery.Address{LID: w.lid(number), Phone: "+" + number}
}

// itemsWith are the items that were accepted with an id.
func (s *testSession) itemsWith(id string) (items []delivery.MessageItem) {
	for _, item := range s.accepted() {
		if item.ID == id {
			items = append(items, item)
		}
	}
	return items
}

// item waits for the only item with an id, and checks its envelope: the key, the addresses and
// that it can be stored.
func (s *testSession) item(id, chat, sender string) delivery.MessageItem {
	s.w.t.Helper()
	g := s.w.g
	g.Eventually(func() []delivery.MessageItem { return s.itemsWith(id) }).Should(HaveLen(1))
	item := s.itemsWith(id)[0]
	from := s.w.addressOf(sender)
	g.Expect(*item.Sender).To(Equal(from))
	g.Expect(item.SessionID).To(Equal("shop"))
	g.Expect(item.FromMe).To(Equal(sender == phone))
	chatKey := chat
	if jid, err := types.ParseJID(chat); err == nil && jid.Server == types.GroupServer {
		g.Expect(item.Chat).To(Equal(delivery.Chat{Group: chat}))
		g.Expect(item.Class).To(Equal(delivery.ClassGroups))
	} else {
		g.Expect(item.Chat).To(Equal(delivery.Chat{Address: s.w.addressOf(chat)}))
		chatKey = s.w.lid(chat)
	}
	g.Expect(item.Key).To(Equal(delivery.MessageKey("shop", chatKey, from.LID, id)))
	g.Expect(item.Timestamp.IsZero()).To(BeFalse())
	_, err := item.Item()
	g.Expect(err).NotTo(HaveOccurred())
	return item
}

// content is an item without its envelope.
func content(item delivery.MessageItem) delivery.MessageItem {
	item.SessionID, item.Key, item.ID, item.Chat, item.Sender, item.FromMe = "", "", "", delivery.Chat{}, nil, false
	item.Timestamp, item.PushName, item.Class = delivery.Time{}, "", ""
	return item
}

// TestEachKindArrives has a row for each kind of message that the simulator sends, between two
// people, in a group, and from the own account's phone.
func TestEachKindArrives(t *testing.T) {
	w, _, s := linked(t)
	group := w.group()
	w.g.Eventually(s.accepted).Should(ContainElement(HaveField("Type", delivery.TypeGroupChange)), "the group was joined")

	file := &simulator.File{Data: []byte("content"), Mime: "x/y", Name: "name.txt", Seconds: 3}
	media := delivery.Media{Mime: "x/y", Size: 7}
	playing := delivery.Media{Mime: "x/y", Size: 7, Seconds: 3}
	card := func(name, number string) delivery.Contact {
		return delivery.Contact{Name: name, VCard: "BEGIN:VCARD\nVERSION:3.0\nN:;" + name + ";;;\nFN:" + name +
			"\nTEL;type=CELL;waid=1555000" + number + ":+1 555 000 " + number + "\nEND:VCARD"}
	}
	type row struct {
		name    string
		request simulator.SendRequest
		want    delivery.MessageItem
	}
	rows := []row{
		{"text", simulator.SendRequest{Text: "hello"}, delivery.MessageItem{Text: "hello"}},
		{"image", simulator.SendRequest{Kind: simulator.KindImage, Text: "look", File: file}, delivery.MessageItem{Text: "look", Media: &media}},
		{"video", simulator.SendRequest{Kind: simulator.KindVideo, Text: "look", File: file}, delivery.MessageItem{Text: "look", Media: &playing}},
		{"voice", simulator.SendRequest{Kind: simulator.KindVoice, File: file}, delivery.MessageItem{Media: &playing}},
		{"audio", simulator.SendRequest{Kind: simulator.KindAudio, File: file}, delivery.MessageItem{Media: &playing}},
		{"document", simulator.SendRequest{Kind: simulator.KindDocument, Text: "read", File: file}, delivery.MessageItem{
			Text: "read", Media: &delivery.Media{Mime: "x/y", Size: 7, Name: "name.txt"},
		}},
		{"sticker", simulator.SendRequest{Kind: simulator.KindSticker, File: file}, delivery.MessageItem{Media: &media}},
		{"location", simulator.SendRequest{Kind: simulator.KindLocation, Text: "Shop", Latitude: 41.5, Longitude: 2.25}, delivery.MessageItem{
			Location: &delivery.Location{Latitude: 41.5, Longitude: 2.25, Name: "Shop"},
		}},
		{"contact", simulator.SendRequest{Kind: simulator.KindContact, Names: []string{"Bob"}}, delivery.MessageItem{Contacts: []delivery.Contact{card("Bob", "0000")}}},
		{"contacts", simulator.SendRequest{Kind: simulator.KindContact, Names: []string{"Bob", "Eve"}}, delivery.MessageItem{
			Contacts: []delivery.Contact{card("Bob", "0000"), card("Eve", "0001")},
		}},
		{"poll", simulator.SendRequest{Kind: simulator.KindPoll, Text: "when?", Options: []string{"today", "never"}}, delivery.MessageItem{
			Text: "when?", Poll: &delivery.Poll{Options: []delivery.PollOption{{Name: "today", Hash: hashOf("today")}, {Name: "never", Hash: hashOf("never")}}},
		}},
		{"order", simulator.SendRequest{Kind: simulator.KindOrder, Text: "please"}, delivery.MessageItem{
			Text: "please", Order: &delivery.Order{ID: "1", Title: "Order", ItemCount: 1},
		}},
		{"product", simulator.SendRequest{Kind: simulator.KindProduct, Text: "Chair"}, delivery.MessageItem{Product: &delivery.Product{ID: "1", Title: "Chair"}}},
		{"forwarded", simulator.SendRequest{Text: "old", Forwarded: true}, delivery.MessageItem{Text: "old", Forwarded: true, ForwardingScore: 1}},
		{"ephemeral", simulator.SendRequest{Text: "soon gone", Ephemeral: true}, delivery.MessageItem{Text: "soon gone", Ephemeral: true, EphemeralSeconds: 86400}},
		{"to open once", simulator.SendRequest{Kind: simulator.KindImage, File: file, ViewOnce: true}, delivery.MessageItem{Media: &media, ViewOnce: true}},
		{"from an advert", simulator.SendRequest{Text: "is it free?", Advert: "https://fb.me/x"}, delivery.MessageItem{
			Text: "is it free?", Referral: &delivery.Referral{SourceURL: "https://fb.me/x", SourceType: "ad", SourceID: "1", Title: "Advert"},
		}},
		{"a mention", simulator.SendRequest{Text: "@you", Mentions: []string{phone}}, delivery.MessageItem{
			Text: "@you", Mentions: []delivery.Address{w.addressOf(phone)},
		}},
	}
	for _, chat := range []struct{ name, from, chat, key string }{
		{"a person", contact, "", contact},
		{"a group", another, group, group},
		{"the own phone", phone, contact, contact},
	} {
		for _, r := range rows {
			t.Run(r.name+" from "+chat.name, func(t *testing.T) {
				g := NewWithT(t)
				request, want := r.request, r.want
				request.From, request.Chat = chat.from, chat.chat
				if request.Kind == "" {
					request.Kind = simulator.KindText
				}
				want.Type = simulatedTypes[request.Kind]
				item := s.item(w.write(request), chat.key, chat.from)
				g.Expect(content(item)).To(Equal(want))
			})
		}

		t.Run("what is about another message, from "+chat.name, func(t *testing.T) {
			g := NewWithT(t)
			send := func(r simulator.SendRequest) delivery.MessageItem {
				r.From, r.Chat = chat.from, chat.chat
				return s.item(w.write(r), chat.key, chat.from)
			}
			first := send(simulator.SendRequest{Text: "first"})
			poll := send(simulator.SendRequest{Kind: simulator.KindPoll, Text: "when?", Options: []string{"today", "never"}})
			for _, r := range []row{
				{"answer", simulator.SendRequest{Text: "second", Quote: first.ID}, delivery.MessageItem{
					Type: delivery.TypeText, Text: "second",
					Quoted: &delivery.Quoted{Key: first.Key, ID: first.ID, Sender: first.Sender, Type: delivery.TypeText, Text: "first"},
				}},
				{"reaction", simulator.SendRequest{Kind: simulator.KindReaction, Target: first.ID, Text: "👍"}, delivery.MessageItem{
					Type: delivery.TypeReaction, TargetKey: first.Key, TargetID: first.ID, Reaction: &delivery.Reaction{Emoji: "👍"},
				}},
				{"vote", simulator.SendRequest{Kind: simulator.KindVote, Target: poll.ID, Options: []string{"never"}}, delivery.MessageItem{
					Type: delivery.TypePollVote, TargetKey: poll.Key, TargetID: poll.ID, PollVote: &delivery.PollVote{Selected: []string{hashOf("never")}},
				}},
				{"edit", simulator.SendRequest{Kind: simulator.KindEdit, Target: first.ID, Text: "better"}, delivery.MessageItem{
					Type: delivery.TypeEdit, TargetKey: first.Key, TargetID: first.ID, Text: "better",
				}},
				{"encrypted edit", simulator.SendRequest{Kind: simulator.KindEdit, Target: first.ID, Text: "best", Encrypted: true}, delivery.MessageItem{
					Type: delivery.TypeEdit, TargetKey: first.Key, TargetID: first.ID, Text: "best",
				}},
				{"revoke", simulator.SendRequest{Kind: simulator.KindRevoke, Target: first.ID}, delivery.MessageItem{
					Type: delivery.TypeRevoke, TargetKey: first.Key, TargetID: first.ID,
				}},
			} {
				g.Expect(content(send(r.request))).To(Equal(r.want), r.name)
			}
		})
	}

	t.Run("live location", func(t *testing.T) {
		g := NewWithT(t)
		item := s.item(w.write(simulator.SendRequest{Kind: simulator.KindLiveLocation, Text: "on my way", Latitude: 1, Longitude: 2}), contact, contact)
		g.Expect(item.Type).To(Equal(delivery.TypeLiveLocation))
		g.Expect(item.Text).To(Equal("on my way"))
		g.Expect(item.Location.Sequence).NotTo(BeZero())
	})
	w.settled()
}

// TestReceiptsCallsAndChangesArrive: what is no message of a person.
func TestReceiptsCallsAndChangesArrive(t *testing.T) {
	w, _, s := linked(t)
	group := w.group()
	ofType := func(kind delivery.MessageType) func() []delivery.MessageItem {
		return func() (items []delivery.MessageItem) {
			for _, item := range s.accepted() {
				if item.Type == kind {
					items = append(items, item)
				}
			}
			return items
		}
	}
	changes := ofType(delivery.TypeGroupChange)
	w.g.Eventually(changes).Should(HaveLen(1))
	joined := changes()[0]
	w.g.Expect(joined.GroupChange.Joined).To(BeTrue())
	w.g.Expect(*joined.GroupChange.Subject).To(Equal("Friends"))
	w.g.Expect(joined.GroupChange.Members).To(ConsistOf(w.addressOf(contact), w.addressOf(another), w.addressOf(phone)))
	w.g.Expect(*joined.Sender).To(Equal(w.addressOf(contact)))

	for _, change := range []simulator.GroupChange{
		{Change: "subject", Value: "Best friends"}, {Change: "ephemeral", Value: "86400"}, {Change: "promote", Members: []string{another}}, {Change: "remove", Members: []string{another}},
	} {
		change.Group = group
		w.g.Expect(w.simulator.ChangeGroup(t.Context(), change)).To(Succeed())
	}
	w.g.Eventually(changes).Should(HaveLen(4), "the time after which messages disappear is not forwarded")
	w.g.Expect(*changes()[1].GroupChange.Subject).To(Equal("Best friends"))
	w.g.Expect(changes()[2].GroupChange.Promoted).To(Equal([]delivery.Address{w.addressOf(another)}))
	w.g.Expect(changes()[3].GroupChange.Removed).To(Equal([]delivery.Address{w.addressOf(another)}))

	calls := ofType(delivery.TypeCall)
	for _, end := range simulator.CallEnds() {
		_, err := w.simulator.Call(t.Context(), simulator.CallRequest{Device: phone, From: contact, End: end})
		w.g.Expect(err).NotTo(HaveOccurred())
	}
	w.acknowledged()
	outcomes := map[string]int{}
	for _, call := range calls() {
		outcomes[call.Call.Outcome]++
		w.g.Expect(*call.Sender).To(Equal(w.addressOf(contact)))
	}
	w.g.Expect(outcomes).To(Equal(map[string]int{delivery.CallMissed: 2, delivery.CallRejected: 2}), "one was accepted on the phone")

	receipts := ofType(delivery.TypeReceipt)
	own := w.lid(phone)
	for _, r := range []struct {
		request simulator.ReceiptRequest
		chat    string
		items   int
	}{
		{simulator.ReceiptRequest{From: []string{contact}, IDs: []string{"M1", "M2"}, Type: "read"}, w.lid(contact), 1},
		{simulator.ReceiptRequest{From: []string{contact}, Chat: group, IDs: []string{"M1"}, Type: "delivered"}, group, 1},
		{simulator.ReceiptRequest{From: []string{contact, another}, Chat: group, IDs: []string{"M1", "M2"}, Type: "read"}, group, 4},
		{simulator.ReceiptRequest{From: []string{contact}, IDs: []string{"M3"}, Type: "retry"}, "", 0},
		{simulator.ReceiptRequest{From: []string{phone}, IDs: []string{"M3"}, Type: "read-self"}, "", 0},
	} {
		before := len(receipts())
		r.request.Device = phone
		_, err := w.simulator.Receipt(t.Context(), r.request)
		w.g.Expect(err).NotTo(HaveOccurred())
		w.acknowledged()
		w.g.Expect(receipts()).To(HaveLen(before+r.items), "%+v", r.request)
		for _, item := range receipts()[before:] {
			w.g.Expect(item.Receipt.Status).To(Equal(r.request.Type))
			for _, target := range item.Receipt.Messages {
				w.g.Expect(target.Key).To(Equal(delivery.MessageKey("shop", r.chat, own, target.ID)), "the key of the account's message")
			}
		}
	}
}

// TestSameMessageAsLIDAndNumber: WhatsApp names a contact by the number in one message and by the
// LID in the next, and the same message so too. Its key is the same.
func TestSameMessageAsLIDAndNumber(t *testing.T) {
	for name, row := range map[string]struct{ first, again string }{
		"first as number": {contact, ""},
		"first as LID":    {"", contact},
	} {
		t.Run(name, func(t *testing.T) {
			w, _, s := linked(t)
			lid := w.lid(contact)
			number := func(from string) string {
				if from == "" {
					return lid
				}
				return from
			}
			id := w.write(simulator.SendRequest{From: number(row.first), Text: "hello"})
			item := s.item(id, contact, contact)
			w.write(simulator.SendRequest{From: number(row.again), Again: id, Alone: true})
			w.g.Eventually(func() []delivery.MessageItem { return s.itemsWith(id) }).Should(HaveLen(2))
			again := s.itemsWith(id)[1]
			w.g.Expect(again.Key).To(Equal(item.Key))
			w.g.Expect(again).To(Equal(item), "also the addresses, although the second one has only one of them")
			w.settled()
		})
	}
}

// TestPhoneAndSenderBothAnswer: a message that cannot be decrypted is asked of its sender and of
// the own phone. Both answer, and all that is handed over has one key.
func TestPhoneAndSenderBothAnswer(t *testing.T) {
	w, _, s := linked(t)
	_, err := w.simulator.SendHistory(t.Context(), phone) // since then the device can write to its phone
	w.g.Expect(err).NotTo(HaveOccurred())
	w.settled()
	id := w.write(simulator.SendRequest{Text: "hello", Malformed: "garbage"})
	texts := func() (n int) {
		for _, item := range s.itemsWith(id) {
			if item.Text == "hello" {
				n++
			}
		}
		return n
	}
	w.g.Eventually(texts).Should(BeNumerically(">=", 1))
	if texts() < 2 { // the other answer is not needed any more: let it come late
		w.fromPhone(id, "hello")
		w.g.Eventually(texts).Should(Equal(2))
	}
	items := s.itemsWith(id)
	w.g.Expect(items[0].Type).To(Equal(delivery.TypeUndecryptable))
	for _, item := range items {
		w.g.Expect(item.Key).To(Equal(delivery.MessageKey("shop", w.lid(contact), w.lid(contact), id)))
	}
	w.settled()
}

// TestTheFirstMessageOfASenderInAGroup has two encrypted parts, of which one is only a key.
func TestTheFirstMessageOfASenderInAGroup(t *testing.T) {
	w, _, s := linked(t)
	group := w.group()
	item := s.item(w.write(simulator.SendRequest{From: another, Chat: group, Text: "hello all"}), group, another)
	w.g.Expect(item.Text).To(Equal("hello all"))
	w.settled()
	w.g.Expect(s.itemsWith(item.ID)).To(HaveLen(1))
}

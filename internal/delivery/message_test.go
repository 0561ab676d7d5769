package delivery

import (
	"encoding/json"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

func TestMessageKey(t *testing.T) {
	g := NewWithT(t)
	key := MessageKey("shop-7", "1@lid", "1@lid", "3EB0")
	g.Expect(key).To(Equal("09dc590c1b3c8a51246e7ab5f25af1a5"), "a change of the keys delivers messages twice")
	for _, other := range []string{
		MessageKey("shop-8", "1@lid", "1@lid", "3EB0"),
		MessageKey("shop-7", "2@lid", "1@lid", "3EB0"),
		MessageKey("shop-7", "1@lid", "2@lid", "3EB0"),
		MessageKey("shop-7", "1@lid", "1@lid", "3EB1"),
		MessageKey("shop-7", "1@lid1", "@lid", "3EB0"),
	} {
		g.Expect(other).NotTo(Equal(key))
	}
}

func TestMessageItem(t *testing.T) {
	g := NewWithT(t)
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	message := MessageItem{
		Numbers: Numbers{Epoch: 7, Seq: 9}, SessionID: "shop-7", Key: "k", ID: "3EB0", Type: TypeText,
		Chat: Chat{Address: Address{LID: "1@lid"}}, Sender: &Address{LID: "1@lid", Phone: "+1"}, Timestamp: Time{at},
		Text: "a < b & \"c\"", Class: ClassGroups,
	}
	item, err := message.Item()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(item.SessionID).To(Equal("shop-7"))
	g.Expect(item.Numbers).To(Equal(Numbers{Epoch: 7, Seq: 9}))
	g.Expect(string(item.Payload)).To(Equal(`{"epoch":7,"seq":9,"session_id":"shop-7","key":"k","id":"3EB0","type":"text",` +
		`"chat":{"lid":"1@lid"},"sender":{"lid":"1@lid","phone":"+1"},"from_me":false,"timestamp":"2026-03-01T12:00:00.000Z","text":"a < b & \"c\""}`))
}

func TestMessageItemKeepsToItsLimits(t *testing.T) {
	tests := []struct {
		name    string
		message MessageItem
		check   func(g *WithT, got MessageItem)
		cut     []string
	}{
		{"a text of the longest length", MessageItem{Text: strings.Repeat("ü", 65536)},
			func(g *WithT, got MessageItem) { g.Expect(got.Text).To(Equal(strings.Repeat("ü", 65536))) }, nil},
		{"a longer text", MessageItem{Text: strings.Repeat("ü", 65537)},
			func(g *WithT, got MessageItem) { g.Expect(got.Text).To(Equal(strings.Repeat("ü", 65536))) }, []string{"text"}},
		{"U+0000 and bytes that are not UTF-8", MessageItem{Text: "a\x00b\xffc\x1bd\ne"},
			func(g *WithT, got MessageItem) { g.Expect(got.Text).To(Equal("ab\uFFFDcd\ne")) }, nil},
		{"control characters of the upper half, and line breaks of other systems", MessageItem{Text: "a\u009b31mb\u0085c\r\nd\re\tf\x7f"},
			func(g *WithT, got MessageItem) { g.Expect(got.Text).To(Equal("a31mbc\nd\ne\tf")) }, nil},
		{"no coordinates", MessageItem{Location: &Location{Latitude: math.NaN(), Longitude: math.Inf(1)}},
			func(g *WithT, got MessageItem) { g.Expect(*got.Location).To(Equal(Location{})) }, nil},
		{"a time before all others", MessageItem{Timestamp: Time{time.Unix(math.MinInt32, 0)}},
			func(g *WithT, got MessageItem) { g.Expect(got.Timestamp.Unix()).To(BeZero()) }, nil},
		{"a time after all others", MessageItem{Timestamp: Time{time.Unix(1<<40, 0)}},
			func(g *WithT, got MessageItem) { g.Expect(got.Timestamp.Year()).To(Equal(9999)) }, nil},
		{"many mentions", MessageItem{Mentions: make([]Address, 2000)},
			func(g *WithT, got MessageItem) { g.Expect(got.Mentions).To(HaveLen(1024)) }, []string{"mentions"}},
		{"a large protobuf", MessageItem{Unsupported: &Unsupported{Protobuf: make([]byte, 64<<10+1)}},
			func(g *WithT, got MessageItem) { g.Expect(got.Unsupported.Protobuf).To(BeEmpty()) }, []string{"unsupported.protobuf"}},
		{"long cards", MessageItem{Contacts: []Contact{{VCard: strings.Repeat("v", 5000)}, {VCard: strings.Repeat("v", 5000)}}},
			func(g *WithT, got MessageItem) { g.Expect(got.Contacts[1].VCard).To(HaveLen(4096)) }, []string{"contacts.vcard"}},
		{"the largest cards together", MessageItem{Contacts: repeated(Contact{VCard: strings.Repeat("\u2028", 4096)}, 256), Text: "t"},
			func(g *WithT, got MessageItem) {
				g.Expect(got.Contacts).To(HaveLen(32))
				g.Expect(got.Text).To(Equal("t"))
			}, []string{"contacts"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			before := tt.message
			item, err := tt.message.Item()
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(len(item.Payload)).To(BeNumerically("<=", MaxMessagePayload))
			var got MessageItem
			g.Expect(json.Unmarshal(item.Payload, &got)).To(Succeed())
			tt.check(g, got)
			g.Expect(got.Cut).To(Equal(tt.cut))
			g.Expect(reflect.DeepEqual(before, tt.message) || math.IsNaN(before.location().Latitude)).To(BeTrue(), "the message itself was changed")
		})
	}
}

func (m MessageItem) location() Location {
	if m.Location == nil {
		return Location{}
	}
	return *m.Location
}

func repeated[T any](v T, n int) []T {
	list := make([]T, n)
	for i := range list {
		list[i] = v
	}
	return list
}

// join is the path of a field of the struct at path.
func join(path string, field reflect.StructField) string {
	switch {
	case field.Anonymous:
		return path
	case path == "":
		return jsonName(field)
	}
	return path + "." + jsonName(field)
}

// TestTheOtherFieldsOfAMessageFit adds up the limits of all fields, except those that are
// shortened when a message is too large.
func TestTheOtherFieldsOfAMessageFit(t *testing.T) {
	g := NewWithT(t)
	const escaped = 6 // bytes of the longest character in JSON: \u2028
	isShortened := map[string]bool{}
	for _, path := range shortened {
		isShortened[path] = true
	}
	var size func(typ reflect.Type, path string, limit int) int
	size = func(typ reflect.Type, path string, limit int) int {
		switch typ.Kind() {
		case reflect.Struct:
			if typ == reflect.TypeFor[Time]() {
				return 32
			}
			total := 2
			for i := range typ.NumField() {
				field := typ.Field(i)
				if field.Tag.Get("json") != "-" {
					total += len(jsonName(field)) + 4 + size(field.Type, join(path, field), limitOf(field))
				}
			}
			return total
		case reflect.Pointer:
			return size(typ.Elem(), path, limit)
		case reflect.Slice:
			if isShortened[path] {
				return 2
			}
			g.Expect(limit).To(BeNumerically(">", 0), "%s has no limit", path)
			return 2 + limit*(1+size(typ.Elem(), path, limit))
		case reflect.String:
			if typ == reflect.TypeFor[Metadata]() {
				return 2 + 16*(6+2*maxMetadata*escaped)
			}
			g.Expect(limit).To(BeNumerically(">", 0), "%s has no limit", path)
			return 2 + limit*escaped
		}
		return 24 // numbers
	}
	g.Expect(size(reflect.TypeFor[MessageItem](), "", 0)).To(BeNumerically("<", MaxMessagePayload))
}

func TestShortenedFieldsExist(t *testing.T) {
	g := NewWithT(t)
	m := MessageItem{Unsupported: &Unsupported{}, GroupChange: &GroupChange{}, Poll: &Poll{}, PollVote: &PollVote{}, Receipt: &Receipt{}}
	for _, path := range shortened {
		g.Expect(func() { halve(reflect.ValueOf(&m).Elem(), path) }).NotTo(Panic())
	}
}

func TestMetadata(t *testing.T) {
	g := NewWithT(t)
	g.Expect(NewMetadata(nil)).To(BeEmpty())
	metadata := NewMetadata(map[string]string{"tenant": "7", "plan": "a <b>\x00"})
	g.Expect(string(metadata)).To(Equal(`{"plan":"a <b>","tenant":"7"}`))
	for _, item := range []any{MessageItem{Metadata: metadata}, StatusItem{Metadata: metadata}, QRItem{Metadata: metadata}} {
		text, err := marshal(item)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(string(text)).To(ContainSubstring(`"metadata":{"plan":"a <b>","tenant":"7"}`))
		g.Expect(text[0:9]).To(BeEquivalentTo(`{"epoch":`), "the cache's script reads the numbers there")
	}
	var read StatusItem
	g.Expect(json.Unmarshal([]byte(`{"metadata": {"tenant": "7"}}`), &read)).To(Succeed())
	g.Expect(read.Metadata).To(Equal(NewMetadata(map[string]string{"tenant": "7"})))
	text, err := json.Marshal(StatusItem{})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(string(text)).NotTo(ContainSubstring("metadata"))
}

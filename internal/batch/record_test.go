package batch

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// contentOf writes items as the scripts do.
func contentOf(items ...delivery.Item) string {
	content := ""
	for _, i := range items {
		record := i.Numbers.String() + class(i.Priority) + millis(start) + millis(i.ExpiresAt) + string(i.Payload)
		content += fmt.Sprintf("%03d%s%08d%s", len(i.SessionID), i.SessionID, len(record), record)
	}
	return content
}

func TestParseContent(t *testing.T) {
	good := contentOf(status("a", 1, delivery.High), code("b.c", 2, start))
	for name, content := range map[string]string{
		"cut in the length":         good[:2],
		"cut in the session":        good[:3],
		"cut in the record":         good[:len(good)-1],
		"a sign in a length":        "+01" + good[3:],
		"no session":                "000" + good[4:],
		"an unknown class":          contentOf(delivery.Item{SessionID: "a", Payload: json.RawMessage("{}")})[:3+1+8+38] + "x" + contentOf(delivery.Item{SessionID: "a", Payload: json.RawMessage("{}")})[3+1+8+39:],
		"letters instead of digits": "001a00000067" + string(make([]byte, 67)),
		"an invalid payload":        contentOf(delivery.Item{SessionID: "a", Payload: json.RawMessage("{")}),
		"numbers out of range":      "001a00000067" + "9999999999999999999" + good[31:31+19] + "n" + millis(start) + millis(start) + "{}",
	} {
		if items, err := parseContent(content); err == nil {
			t.Errorf("%s: read as %d items, want an error", name, len(items))
		}
	}
	items, err := parseContent(good)
	if err != nil || len(items) != 2 || items[1].SessionID != "b.c" || !items[1].ExpiresAt.Equal(start) || items[0].Priority != delivery.High {
		t.Errorf("parseContent = %+v, %v", items, err)
	}
}

func TestParseClaim(t *testing.T) {
	for name, answer := range map[string][]any{
		"too short":                {int64(1)},
		"a text instead of a time": {"1", int64(1), "", int64(0), "", int64(0), int64(0)},
		"no id":                    {int64(1), int64(1), nil, int64(0), "", int64(0), int64(0)},
		"a bad content":            {int64(1), int64(1), "msg", int64(1), "x", int64(0), int64(0)},
	} {
		if _, err := parseClaim(answer); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestParseNumbers(t *testing.T) {
	want := delivery.Numbers{Epoch: 1_800_000_000, Seq: 1<<62 + 12345}
	if got, err := parseNumbers(want.String()); err != nil || got != want {
		t.Errorf("parseNumbers = %v, %v; want %v", got, err, want)
	}
	if _, err := parseNumbers("1"); err == nil {
		t.Error("short numbers are read")
	}
}

// FuzzParseContent: Redis may contain anything; items that can be read stay the same when
// they are written and read again.
func FuzzParseContent(f *testing.F) {
	f.Add(contentOf(status("a", 1, delivery.High), code("b", 2, start)))
	f.Add(contentOf(status("a", 1, delivery.Normal))[:30])
	f.Add("001a00000000")
	f.Add("255")
	f.Fuzz(func(t *testing.T, content string) {
		items, err := parseContent(content)
		if err != nil {
			return
		}
		again, err := parseContent(contentOf(items...))
		if err != nil || len(again) != len(items) {
			t.Fatalf("%q is read, written and not read again: %v", content, err)
		}
		for i := range items {
			a, b := items[i], again[i]
			if a.SessionID != b.SessionID || a.Numbers != b.Numbers || a.Priority != b.Priority ||
				!a.ExpiresAt.Equal(b.ExpiresAt) || string(a.Payload) != string(b.Payload) {
				t.Fatalf("item %d: %+v became %+v", i, a, b)
			}
			if a.SessionID == "" || !json.Valid(a.Payload) || a.ExpiresAt.Before(time.UnixMilli(0)) && !a.ExpiresAt.IsZero() {
				t.Fatalf("item %d should have been refused: %+v", i, a)
			}
		}
	})
}

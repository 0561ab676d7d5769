package status

import "testing"

func TestPhoneNumber(t *testing.T) {
	for jid, want := range map[string]string{
		"34600111222@s.whatsapp.net":      "+34600111222",
		"34600111222:3@s.whatsapp.net":    "+34600111222",
		"34600111222.0:3@s.whatsapp.net":  "+34600111222",
		"34600111222@c.us":                "+34600111222",
		"34600111222:99@hosted":           "+34600111222",
		"123456789012345@lid":             "",
		"123456789012345:3@lid":           "",
		"34600111222@hosted.lid":          "",
		"34600111222-1600000000@g.us":     "",
		"120363000000000000@g.us":         "",
		"34600111222@broadcast":           "",
		"34600111222@newsletter":          "",
		"34600111222@bot":                 "",
		"34600111222@msgr":                "",
		"34600111222":                     "",
		"":                                "",
		"@s.whatsapp.net":                 "",
		"s.whatsapp.net":                  "",
		"0@s.whatsapp.net":                "",
		"1234567890123456@s.whatsapp.net": "",
		"+34600111222@s.whatsapp.net":     "",
		"evil\nname@s.whatsapp.net":       "",
	} {
		if got := PhoneNumber(jid); got != want {
			t.Errorf("PhoneNumber(%q) = %q, want %q", jid, got, want)
		}
	}
}

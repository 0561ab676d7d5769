package status

import "strings"

// phoneServers are the servers of addresses whose user part is a phone number. The
// user part of other servers hides the number (lid, hosted.lid) or is something else
// (g.us, broadcast, newsletter, bot).
var phoneServers = map[string]bool{"s.whatsapp.net": true, "c.us": true, "hosted": true}

// Phone names a phone in a sentence, also where its number is not known.
func Phone(number string) string { return strings.TrimSpace("the phone " + number) }

// maxPhoneDigits is the most digits of a number in E.164.
const maxPhoneDigits = 15

// PhoneNumber returns the phone number, in E.164, of a WhatsApp address such as
// 34600111222:3@s.whatsapp.net; empty if the address contains none. A LID, an address
// that hides the phone number, consists of digits too and must never be shown as one.
func PhoneNumber(jid string) string {
	user, server, _ := strings.Cut(jid, "@")
	user, _, _ = strings.Cut(user, ":") // the device
	user, _, _ = strings.Cut(user, ".") // the agent
	if !phoneServers[server] || user == "" || user[0] == '0' || len(user) > maxPhoneDigits || strings.Trim(user, "0123456789") != "" {
		return ""
	}
	return "+" + user
}

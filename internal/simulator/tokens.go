package simulator

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"slices"
	"strconv"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// Privacy tokens. An account gives a token to each person that it writes to
// ("trusted_contact"); that person's messages carry it (tctoken), which proves that the
// sender is no stranger. A sender without a token proves who it is by an HMAC of the
// recipient's LID with a secret of its account (cstoken), which the phone has sent to
// its devices with the history. WhatsApp refuses some messages that carry neither.

// contact is what one account knows of another. Guarded by Server.mu.
type contact struct {
	// given are the newest tokens that the account gave to the contact.
	given [][]byte
	// wrote is true if the contact has written to one of the account's devices.
	wrote bool
}

const (
	// maxTokens is the number of weeks for which a client uses a token (whatsmeow's tctoken.go).
	maxTokens   = 4
	tokenLength = 16
	saltLength  = 32
	trusted     = "trusted_contact"
)

// contactLocked returns what an account knows of another. The caller holds Server.mu.
func (a *account) contactLocked(other *account) *contact {
	c := a.contacts[other.lid]
	if c == nil {
		c = &contact{}
		a.contacts[other.lid] = c
	}
	return c
}

// issueTokens gives new tokens of a device's account to its contacts.
func (c *conn) issueTokens(tokens []waBinary.Node) reply {
	for i := range tokens {
		at, err := strconv.ParseInt(attribute(&tokens[i], "t"), 10, 64)
		if tokens[i].Tag != "token" || attribute(&tokens[i], "type") != trusted || err != nil {
			return badInput
		}
		c.srv.mu.Lock()
		to := c.srv.accountOfLocked(jidAttribute(&tokens[i], "jid"))
		c.srv.mu.Unlock()
		if to == nil {
			return notFound
		}
		c.srv.giveToken(c.device.account, to, time.Unix(at, 0))
	}
	return done
}

// giveToken gives a token to the devices of a contact.
func (s *Server) giveToken(from, to *account, at time.Time) {
	node := s.tokenStanza(from, to, at)
	s.mu.Lock()
	devices := devicesLocked(to)
	s.mu.Unlock()
	for _, d := range devices {
		s.sendStanza(d, node)
	}
}

// tokenStanza makes a token of an account for a contact, and the notification about it.
func (s *Server) tokenStanza(from, to *account, at time.Time) waBinary.Node {
	token := make([]byte, tokenLength)
	_, _ = rand.Read(token) // never fails
	s.mu.Lock()
	known := from.contactLocked(to)
	known.given = append(known.given, token)
	known.given = known.given[max(0, len(known.given)-maxTokens):]
	s.counts.tokens++
	s.mu.Unlock()
	return waBinary.Node{
		Tag:   "notification",
		Attrs: waBinary.Attrs{"from": from.jid(), "sender_lid": from.lidJID(), "type": "privacy_token"},
		Content: []waBinary.Node{{Tag: "tokens", Content: []waBinary.Node{{
			Tag: "token", Attrs: waBinary.Attrs{"jid": to.jid(), "type": trusted, "t": strconv.FormatInt(at.Unix(), 10)}, Content: token,
		}}}},
	}
}

// tokenLocked returns the kind of the token that a stanza of an account to another carries
// (tctoken, cstoken or nothing), and whether it is valid. The caller holds s.mu.
func tokenLocked(from, to *account, stanza *waBinary.Node) (kind string, valid bool) {
	if token := content(stanza, "tctoken"); token != nil {
		known := to.contacts[from.lid]
		return "tctoken", known != nil && slices.ContainsFunc(known.given, func(given []byte) bool { return bytes.Equal(given, token) })
	}
	if token := content(stanza, "cstoken"); token != nil {
		mac := hmac.New(sha256.New, from.salt)
		mac.Write([]byte(to.lidJID().String()))
		return "cstoken", from.salt != nil && hmac.Equal(token, mac.Sum(nil))
	}
	return "", false
}

// checkTokenLocked counts a token in a request about a contact that the contact did not
// give. The caller holds s.mu.
func (s *Server) checkTokenLocked(from *account, about types.JID, stanza *waBinary.Node) (kind string, valid bool) {
	to := s.accountOfLocked(about)
	if to == nil {
		return "", false
	}
	kind, valid = tokenLocked(from, to, stanza)
	if kind != "" && !valid {
		s.counts.badTokens++
	}
	return kind, valid
}

// saltLocked returns the secret from which the devices of an account make a cstoken. The
// caller holds Server.mu.
func (a *account) saltLocked() []byte {
	if a.salt == nil {
		a.salt = make([]byte, saltLength)
		_, _ = rand.Read(a.salt) // never fails
	}
	return a.salt
}

package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"time"

	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/types"
)

// accountTimeout is how long WhatsApp may take to answer which account has a number.
const accountTimeout = 30 * time.Second

// ErrAccountUnknown: WhatsApp has not answered which account has a phone number.
var ErrAccountUnknown = errors.New("WhatsApp did not say whose account the phone number is")

// SameAccount asks WhatsApp whether a phone number, in E.164, is that of the account
// whose device is connected. The digits alone are not enough: WhatsApp knows Brazilian
// numbers without their ninth digit, Mexican and Argentine ones with a digit that
// people leave out, and others. A number that WhatsApp does not know is another
// account. Without an answer it returns an error, never false.
func (c *Connection) SameAccount(ctx context.Context, phone string) (same bool, err error) {
	defer func() {
		if r := recover(); r != nil {
			same, err = false, fmt.Errorf("%w: the answer is malformed: %v", ErrAccountUnknown, r)
		}
	}()
	if !c.Paired() {
		return false, fmt.Errorf("%w: no device is linked", ErrAccountUnknown)
	}
	if phone != "" && phone == phoneNumber(c.jid) {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, accountTimeout)
	defer cancel()
	// Client.IsOnWhatsApp treats an answer without a type as a no.
	list, err := c.client.DangerousInternals().Usync( //nolint:staticcheck // "deprecated" only says that it is dangerous
		ctx, []types.JID{types.NewJID(phone, types.LegacyUserServer)}, "query", "interactive", []waBinary.Node{{Tag: "contact"}})
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrAccountUnknown, briefError{err})
	}
	return ownAccount(list, c.jid, c.options.Device.GetLID())
}

// ownAccount reads WhatsApp's answer, and compares it with the account's addresses:
// the one with its phone number and the one that hides it.
func ownAccount(list *waBinary.Node, own, hidden types.JID) (bool, error) {
	if own.Server == types.HiddenUserServer || own.Server == types.HostedLIDServer { // the account's number is not known
		own, hidden = types.EmptyJID, own
	}
	answered := false
	for _, user := range list.GetChildrenByTag("user") {
		contact := user.GetChildByTag("contact")
		switch contact.AttrGetter().OptionalString("type") {
		case "in":
		case "out": // no account has this number
			answered = true
			continue
		default:
			continue
		}
		for _, name := range []string{"jid", "pn_jid"} {
			jid := user.AttrGetter().OptionalJIDOrEmpty(name)
			mine := own
			switch jid.Server {
			case types.DefaultUserServer, types.LegacyUserServer, types.HostedServer:
			case types.HiddenUserServer, types.HostedLIDServer:
				mine = hidden
			default:
				continue
			}
			if jid.User == "" || mine.User == "" {
				continue
			}
			answered = true
			if jid.User == mine.User {
				return true, nil
			}
		}
	}
	if !answered {
		return false, ErrAccountUnknown
	}
	return false, nil
}

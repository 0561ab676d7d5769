package whatsapp

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// The maximum lengths of text from outside, in bytes; those of the API are the same or larger.
const (
	maxCode    = 1024
	maxJID     = 128
	maxName    = 128
	maxReason  = 64
	maxMessage = 512
	// maxCodes is how many codes of a connection are kept; WhatsApp sends six.
	maxCodes = 64
)

// Translate returns the meaning of an event of the library, at the time now. It is a
// pure table. Events that say nothing about the connection (messages, receipts,
// single keep-alives) are not translated. EventConnected carries no account,
// because the library's event carries none.
func Translate(evt any, now time.Time) (Event, bool) {
	switch e := evt.(type) {
	case *events.QR:
		var codes []string
		for _, code := range e.Codes {
			// A code that must be cut or cleaned could not be scanned.
			if code != "" && len(codes) < maxCodes && status.Clean(code, maxCode) == code {
				codes = append(codes, code)
			}
		}
		return Event{Type: EventQR, Codes: codes}, len(codes) > 0
	case *events.PairSuccess:
		return Event{Type: EventPairSuccess, JID: address(e.ID), LID: address(e.LID), PhoneNumber: phoneNumber(e.ID)}, true
	case *events.PairError:
		return Event{Type: EventPairError, Reason: session.EndPairingRefused, Message: sentence("the pairing was refused: %v", e.Error)}, true
	case *events.PairPasskeyRequest:
		return passkeyRequest(e.PublicKey, now), true
	case *events.PairPasskeyConfirmation:
		if e.SkipHandoffUX {
			return Event{Type: EventPasskeyConfirmation}, true
		}
		return Event{Type: EventPasskeyConfirmation, Code: status.Clean(e.Code, maxCode)}, true
	case *events.PairPasskeyError:
		return Event{Type: EventPasskeyFailed, Continuation: e.Continuation, Message: sentence("the passkey cannot be used: %v", e.Error)}, true
	case *events.QRScannedWithoutMultidevice:
		return Event{Type: EventPairError, Reason: session.EndNoMultidevice, Message: "the phone's WhatsApp does not know linked devices: update it and scan again"}, true
	case *events.Connected:
		return Event{Type: EventConnected}, true
	case *events.PushNameSetting:
		name := status.Clean(e.Action.GetName(), maxName)
		return Event{Type: EventPushName, PushName: name}, name != ""
	case *events.ManualLoginReconnect:
		return over(EventDisconnected, session.EndStreamError+"515", "WhatsApp asks the device to log in again"), true
	case *events.Disconnected:
		return socketClosed, true
	case *events.StreamError:
		code := reasonPart(e.Code)
		return over(EventDisconnected, session.EndStreamError+code, "WhatsApp ended the connection with code %s", code), true
	case *events.CATRefreshError:
		return over(EventDisconnected, session.EndTokenRefused, "WhatsApp asks for a token that this client does not have"), true
	case *events.StreamReplaced:
		return over(EventReplaced, session.EndReplaced, "the device logged in elsewhere"), true
	case *events.LoggedOut:
		return loggedOut(e), true
	case *events.TemporaryBan:
		banned := over(EventBanned, session.EndTemporaryBan+strconv.Itoa(int(e.Code)), "WhatsApp banned the account for a time: %s", banReason(e.Code))
		if e.Expire > 0 {
			banned.Until = now.Add(e.Expire)
		}
		return banned, true
	case *events.ClientOutdated:
		return over(EventOutdated, session.EndClientOutdated, "WhatsApp refuses this version of the client"), true
	case *events.ConnectFailure:
		failure := over(EventDisconnected, session.EndConnectFailure+strconv.Itoa(int(e.Reason)), "WhatsApp refused the login with code %d", int(e.Reason))
		if text := status.Clean(e.Message, maxMessage/2); text != "" {
			failure.Message += ": " + text
		}
		return failure, true
	default:
		return Event{}, false
	}
}

// socketClosed is the end without an explanation.
var socketClosed = Event{Type: EventDisconnected, Reason: session.EndSocketClosed, Message: "the connection was closed"}

func over(kind EventType, reason, format string, args ...any) Event {
	return Event{Type: kind, Reason: reason, Message: sentence(format, args...)}
}

func loggedOut(e *events.LoggedOut) Event {
	switch {
	case !e.OnConnect:
		return over(EventLoggedOut, session.EndDeviceRemoved, "the device was unlinked on the phone or by WhatsApp")
	case e.Reason == events.ConnectFailureMainDeviceGone: // 403; WhatsApp itself calls it LOCKED
		return over(EventLoggedOut, session.EndAccountLocked, "WhatsApp locked the account, or it moved to another phone")
	case e.Reason == events.ConnectFailureUnknownLogout: // 406; WhatsApp itself calls it BANNED
		return over(EventLoggedOut, session.EndAccountBanned, "WhatsApp banned the account")
	default:
		return over(EventLoggedOut, session.EndLoggedOut, "WhatsApp does not know the device any more: it was unlinked")
	}
}

func banReason(code events.TempBanReason) string {
	switch code {
	case events.TempBanSentToTooManyPeople:
		return "too many messages to people who do not have the number in their address books"
	case events.TempBanBlockedByUsers:
		return "too many people blocked it"
	case events.TempBanCreatedTooManyGroups:
		return "too many groups with people who do not have the number in their address books"
	case events.TempBanSentTooManySameMessage:
		return "the same message to too many people"
	case events.TempBanBroadcastList:
		return "too many messages to a broadcast list"
	default:
		return "code " + strconv.Itoa(int(code))
	}
}

func sentence(format string, args ...any) string {
	return status.Clean(fmt.Sprintf(format, args...), maxMessage)
}

// reasonPart turns a code from outside into a part of a CamelCase reason.
func reasonPart(code string) string {
	code = strings.Map(func(r rune) rune {
		if r >= utf8.RuneSelf || !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z') {
			return -1
		}
		return r
	}, code)
	if code == "" {
		return "Unknown"
	}
	return code[:min(len(code), maxReason/2)]
}

func address(jid types.JID) string {
	if jid.IsEmpty() {
		return ""
	}
	return status.Clean(jid.String(), maxJID)
}

// phoneNumber returns the account's number in E.164; empty for an address without one.
func phoneNumber(jid types.JID) string { return status.PhoneNumber(jid.String()) }

package session

import "time"

// EventType says what happened on a connection.
type EventType string

const (
	// EventQR has the QR codes of an unpaired connection. They are shown one after the
	// other, the first for 60 s, the others for 20 s (whatsmeow's qrchan.go).
	EventQR EventType = "QR"
	// EventCodesReplaced has all codes of EventQR again, with another secret in them: WhatsApp
	// does not accept the former ones any more. A phone that has scanned one must scan again.
	EventCodesReplaced EventType = "CodesReplaced"
	// EventPairingCode has the code of a connection that asked for one (DialSpec.PairPhone).
	// It can be typed on that phone until Until.
	EventPairingCode EventType = "PairingCode"
	// EventCodeRefused: WhatsApp gives no pairing code for the number, because it was asked
	// too often or the number is wrong. The connection has ended. Asking again soon makes
	// WhatsApp refuse for longer.
	EventCodeRefused EventType = "CodeRefused"
	// EventPairSuccess: a phone has linked the device and its keys are stored. WhatsApp then
	// ends the connection with 515, and the device logs in on a new one.
	EventPairSuccess EventType = "PairSuccess"
	// EventPasskeyRequest: WhatsApp asks for the account's passkey (PasskeyOptions), until Until.
	// The codes of the connection cannot be used any more.
	EventPasskeyRequest EventType = "PasskeyRequest"
	// EventPasskeyConfirmation: WhatsApp has accepted the passkey's answer. Code is what a
	// person is to compare with the phone; empty: WhatsApp asks for no confirmation.
	EventPasskeyConfirmation EventType = "PasskeyConfirmation"
	// EventPasskeyFailed: the passkey cannot be asked, or WhatsApp's continuation cannot be used.
	EventPasskeyFailed EventType = "PasskeyFailed"
	// EventPairError: the phone's answer was refused (bad HMAC or signature), or the phone's
	// WhatsApp is too old.
	EventPairError EventType = "PairError"
	// EventConnected: the device is logged in.
	EventConnected EventType = "Connected"
	// EventDisconnected: the connection has ended for a reason that may pass (socket closed,
	// stream error, connect failure, keep-alives without an answer).
	EventDisconnected EventType = "Disconnected"
	// EventLoggedOut: WhatsApp or the phone unlinked the device. The connection has ended.
	EventLoggedOut EventType = "LoggedOut"
	// EventReplaced: another login with the same device replaced this one. The connection has
	// ended.
	EventReplaced EventType = "Replaced"
	// EventBanned: the account is banned until Until. The connection has ended.
	EventBanned EventType = "Banned"
	// EventOutdated: WhatsApp refuses this version of the client. The connection has ended.
	EventOutdated EventType = "Outdated"
	// EventPushName: the account's own name became known or has changed.
	EventPushName EventType = "PushName"
)

// Event is an event of a connection. Text from outside is cleaned and bounded. Fields
// that the type does not use are zero.
type Event struct {
	Type EventType
	// Codes are the QR payloads of EventQR and EventCodesReplaced, in the order in which they
	// are shown.
	Codes []string
	// Code is the code to type on the phone (EventPairingCode), or to compare with the one
	// that the phone shows (EventPasskeyConfirmation).
	Code string
	// PasskeyOptions is the request as JSON, of at most MaxPasskeyJSON bytes (EventPasskeyRequest).
	PasskeyOptions string
	// Continuation: the request was read, but not what WhatsApp sent later (EventPasskeyFailed).
	Continuation bool
	// JID is the device's address (EventPairSuccess, EventConnected).
	JID string
	// LID is the device's address that hides the phone number (EventPairSuccess,
	// EventConnected); empty: WhatsApp has not given one.
	LID string
	// PhoneNumber is the account's, in E.164 (EventPairSuccess, EventConnected).
	PhoneNumber string
	// PushName is the account's own name (EventConnected, EventPushName); empty: unknown.
	PushName string
	// Reason is one of the End constants, some of which have a code after them, e.g.
	// StreamError515 (all events that end the connection).
	Reason string
	// Message is a sentence for people (EventPairError, EventPasskeyFailed, and all events
	// that end the connection).
	Message string
	// Ours: this process ended the connection for its own reason, which says nothing
	// about the session (EventDisconnected).
	Ours bool
	// Until is when the ban ends (EventBanned; zero: WhatsApp did not say), or when the code
	// (EventPairingCode) or the request (EventPasskeyRequest; zero: WhatsApp did not say) expires.
	Until time.Time
}

// Over reports whether the event ends the connection.
func (e Event) Over() bool {
	switch e.Type {
	case EventDisconnected, EventCodeRefused, EventLoggedOut, EventReplaced, EventBanned, EventOutdated:
		return true
	default:
		return false
	}
}

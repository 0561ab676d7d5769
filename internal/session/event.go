package session

import "time"

// EventType says what happened on a connection.
type EventType string

const (
	// EventQR brings the codes of an unpaired connection; each is shown in turn,
	// the first for 60 s, the others for 20 s (whatsmeow's qrchan.go).
	EventQR EventType = "QR"
	// EventPairingCode brings the code of a connection that asked for one
	// (Options.PairPhone). It is typed on that phone, until Until.
	EventPairingCode EventType = "PairingCode"
	// EventCodeRefused: WhatsApp gives the number no code to type: it was asked too
	// often, or the number is wrong. The connection is over, and asking again soon
	// makes it worse.
	EventCodeRefused EventType = "CodeRefused"
	// EventPairSuccess: a phone has linked the device and its keys are stored. WhatsApp
	// ends the connection with 515 after it; the device then logs in on a new one.
	EventPairSuccess EventType = "PairSuccess"
	// EventPairError: the phone's answer was refused (bad HMAC or signature).
	EventPairError EventType = "PairError"
	// EventConnected: the device is logged in.
	EventConnected EventType = "Connected"
	// EventDisconnected: the connection ended for a reason that passes (socket closed,
	// stream error, connect failure that may heal, keep-alives unanswered). The connection is over.
	EventDisconnected EventType = "Disconnected"
	// EventLoggedOut: WhatsApp or the phone unlinked the device. The connection is over.
	EventLoggedOut EventType = "LoggedOut"
	// EventReplaced: another login of the device displaced this one. The connection is over.
	EventReplaced EventType = "Replaced"
	// EventBanned: the account is banned until Until. The connection is over.
	EventBanned EventType = "Banned"
	// EventOutdated: WhatsApp refuses this version of the client. The connection is over.
	EventOutdated EventType = "Outdated"
	// EventPushName: the account's own name became known or changed.
	EventPushName EventType = "PushName"
)

// Event is what has happened on a connection. Text from outside is cleaned and
// bounded. Fields that the type does not use are zero.
type Event struct {
	Type EventType
	// Codes are the QR payloads of EventQR, in the order in which they are to be shown.
	Codes []string
	// Code is what is typed on the phone (EventPairingCode).
	Code string
	// JID is the device's address (EventPairSuccess, EventConnected).
	JID string
	// PhoneNumber is the account's, in E.164 (EventPairSuccess, EventConnected).
	PhoneNumber string
	// PushName is the account's own name (EventConnected, EventPushName); empty: unknown.
	PushName string
	// Reason is one of the End names, with a code where it carries one (all endings), e.g. StreamError515.
	Reason string
	// Message is a sentence for people (all endings, EventPairError).
	Message string
	// Ours: the end was this process's own doing (EventDisconnected), and says nothing of
	// the session.
	Ours bool
	// Until is when a ban ends (EventBanned; zero: WhatsApp did not say), or a code (EventPairingCode).
	Until time.Time
}

// Over reports whether the connection has ended with this event.
func (e Event) Over() bool {
	switch e.Type {
	case EventDisconnected, EventCodeRefused, EventLoggedOut, EventReplaced, EventBanned, EventOutdated:
		return true
	default:
		return false
	}
}

package whatsapp

import "github.com/whatsapp-operator/whatsapp-operator/internal/session"

// Event is a report of the connector about a connection. The state machine of the
// session reads it, so its types live there.
type (
	Event     = session.Event
	EventType = session.EventType
)

// The types of events.
const (
	EventQR            = session.EventQR
	EventCodesReplaced = session.EventCodesReplaced
	EventPairingCode   = session.EventPairingCode
	EventCodeRefused   = session.EventCodeRefused
	EventPairSuccess   = session.EventPairSuccess
	EventPairError     = session.EventPairError
	EventConnected     = session.EventConnected
	EventDisconnected  = session.EventDisconnected
	EventLoggedOut     = session.EventLoggedOut
	EventReplaced      = session.EventReplaced
	EventBanned        = session.EventBanned
	EventOutdated      = session.EventOutdated
	EventPushName      = session.EventPushName

	EventPasskeyRequest      = session.EventPasskeyRequest
	EventPasskeyConfirmation = session.EventPasskeyConfirmation
	EventPasskeyFailed       = session.EventPasskeyFailed
)

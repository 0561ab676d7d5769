package session

import "strings"

// Why a connection ended or could not be opened: the values of Event.Reason. They are
// used in logs, as labels of metrics, and to distinguish failures. The connector uses no
// other names, so that each has its own label.
const (
	// EndSocketClosed is the reason if WhatsApp named none: the node with the reason may have
	// been lost.
	EndSocketClosed       = "SocketClosed"
	EndSilent             = "Silent"
	EndKeepAliveTimeout   = "KeepAliveTimeout"
	EndCancelled          = "Cancelled"
	EndStoreFailed        = "StoreFailed"
	EndReplaced           = "Replaced"
	EndClientOutdated     = "ClientOutdated"
	EndTokenRefused       = "TokenRefused"
	EndDeviceRemoved      = "DeviceRemoved"
	EndAccountLocked      = "AccountLocked"
	EndAccountBanned      = "AccountBanned"
	EndLoggedOut          = "LoggedOut"
	EndPairingRefused     = "PairingRefused"
	EndPairingCodeFailed  = "PairingCodeFailed"
	EndPhoneNumberInvalid = "PhoneNumberInvalid"
	EndNoMultidevice      = "NoMultidevice"
	EndProxyRefused       = "ProxyRefused"
	EndProxyUnreachable   = "ProxyUnreachable"
	EndProxyFailed        = "ProxyFailed"
	EndProxyAuthFailed    = "ProxyAuthFailed"
	EndRefused            = "Refused"
	EndCertificateRefused = "CertificateRefused"
	EndTimeout            = "Timeout"
	EndUnreachable        = "Unreachable"
	EndConnectFailed      = "ConnectFailed"
	EndMalformedFrame     = "MalformedFrame"
	EndMalformedStanza    = "MalformedStanza"
	EndOverloaded         = "Overloaded"
	EndHandlerStuck       = "HandlerStuck"
	// EndInboxUnavailable: the connection was ended because a message could not be stored.
	EndInboxUnavailable = "InboxUnavailable"
	// EndBacklog: it was ended because too many messages wait for Laravel.
	EndBacklog = "Backlog"
)

// These have a code from WhatsApp after them.
const (
	EndStreamError        = "StreamError"
	EndConnectFailure     = "ConnectFailure"
	EndTemporaryBan       = "TemporaryBan"
	EndPairingCodeRefused = "PairingCodeRefused"
)

var (
	endReasons = []string{
		EndSocketClosed, EndSilent, EndKeepAliveTimeout, EndCancelled, EndStoreFailed, EndReplaced, EndClientOutdated, EndTokenRefused,
		EndDeviceRemoved, EndAccountLocked, EndAccountBanned, EndLoggedOut, EndPairingRefused, EndPairingCodeFailed, EndPhoneNumberInvalid,
		EndNoMultidevice, EndProxyRefused, EndProxyUnreachable, EndProxyFailed, EndProxyAuthFailed, EndRefused, EndCertificateRefused, EndTimeout,
		EndUnreachable, EndConnectFailed, EndMalformedFrame, EndMalformedStanza, EndOverloaded, EndHandlerStuck,
		EndInboxUnavailable, EndBacklog,
	}
	endKinds = []string{EndStreamError, EndConnectFailure, EndTemporaryBan, EndPairingCodeRefused}
)

// EndOther is the label of any other reason.
const EndOther = "Other"

// EndLabel returns the label of a metric for a reason: without its code, and always one
// of the constants, so that text from outside adds no labels.
func EndLabel(reason string) string {
	for _, known := range endReasons {
		if reason == known {
			return reason
		}
	}
	for _, kind := range endKinds {
		if strings.HasPrefix(reason, kind) {
			return kind
		}
	}
	return EndOther
}

package session

import "strings"

// Why a connection ended, or could not be opened: Event.Reason, for logs, for
// metrics and for telling one kind of failure from another. The connector uses
// these names and no others, so that each has its own value of the metrics' label.
const (
	// EndSocketClosed is that of an end which nobody has explained: the node that would
	// have done it may be lost.
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
)

// These carry a code of WhatsApp's after them.
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
	}
	endKinds = []string{EndStreamError, EndConnectFailure, EndTemporaryBan, EndPairingCodeRefused}
)

// EndOther is the label of a reason that is none of these.
const EndOther = "Other"

// EndLabel is a reason as the label of a metric: without its code, and one of
// about two dozen, whatever came from outside.
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

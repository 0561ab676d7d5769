package session

import (
	"testing"

	. "github.com/onsi/gomega"
)

// Reasons may contain codes from outside, which must not add labels.
func TestEndLabelsAreBounded(t *testing.T) {
	for reason, want := range map[string]string{
		"SocketClosed": "SocketClosed", "StreamError515": "StreamError", "StreamErrorUnknown": "StreamError",
		"ConnectFailure418": "ConnectFailure", "ConnectFailed": "ConnectFailed", "TemporaryBan101": "TemporaryBan",
		"PairingCodeRefused429": "PairingCodeRefused", "PairingCodeFailed": "PairingCodeFailed", "NoMultidevice": "NoMultidevice",
		"": EndOther, "Something": EndOther,
	} {
		NewWithT(t).Expect(EndLabel(reason)).To(Equal(want), "%q", reason)
	}
}

package whatsapp

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/proto/waSyncAction"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/types/events"
	"google.golang.org/protobuf/proto"
)

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

func TestTranslate(t *testing.T) {
	device := types.JID{User: "4915112345678", Device: 7, Server: types.DefaultUserServer}
	ends := func(kind EventType, reason, message string) Event {
		return Event{Type: kind, Reason: reason, Message: message}
	}
	for name, row := range map[string]struct {
		in   any
		want Event
		not  bool // the event says nothing about the connection
	}{
		"codes to scan": {
			in:   &events.QR{Codes: []string{"2@a,b,c,d", "2@e,f,g,h"}},
			want: Event{Type: EventQR, Codes: []string{"2@a,b,c,d", "2@e,f,g,h"}},
		},
		"codes with a control character or beyond the bound cannot be scanned": {
			in:   &events.QR{Codes: []string{"a\x1b[2J", strings.Repeat("x", 1025), "", "ok"}},
			want: Event{Type: EventQR, Codes: []string{"ok"}},
		},
		"no code": {in: &events.QR{}, not: true},
		"a phone scanned": {in: &events.PairSuccess{ID: device, LID: types.JID{User: "123456789012345", Device: 7, Server: types.HiddenUserServer}, BusinessName: "x"},
			want: Event{Type: EventPairSuccess, JID: "4915112345678:7@s.whatsapp.net", LID: "123456789012345:7@lid", PhoneNumber: "+4915112345678"}},
		"a scanned device whose number is none": {
			in:   &events.PairSuccess{ID: types.JID{User: "evil\nname", Server: types.DefaultUserServer}},
			want: Event{Type: EventPairSuccess, JID: "evil name@s.whatsapp.net"},
		},
		"a pairing that is refused": {
			in:   &events.PairError{Error: whatsmeow.ErrPairInvalidDeviceIdentityHMAC},
			want: ends(EventPairError, "PairingRefused", "the pairing was refused: invalid device identity HMAC in pair success message"),
		},
		"an old phone": {
			in:   &events.QRScannedWithoutMultidevice{},
			want: ends(EventPairError, "NoMultidevice", "the phone's WhatsApp does not know linked devices: update it and scan again"),
		},
		"logged in": {in: &events.Connected{}, want: Event{Type: EventConnected}},
		"the account's name": {
			in:   &events.PushNameSetting{Action: &waSyncAction.PushNameSetting{Name: proto.String("Shop\u202e\x07 42")}},
			want: Event{Type: EventPushName, PushName: "Shop 42"},
		},
		"no name":            {in: &events.PushNameSetting{}, not: true},
		"515":                {in: &events.ManualLoginReconnect{}, want: ends(EventDisconnected, "StreamError515", "WhatsApp asks the device to log in again")},
		"the socket closed":  {in: &events.Disconnected{}, want: ends(EventDisconnected, "SocketClosed", "the connection was closed")},
		"an unknown error":   {in: &events.StreamError{Code: "516"}, want: ends(EventDisconnected, "StreamError516", "WhatsApp ended the connection with code 516")},
		"an error with text": {in: &events.StreamError{Code: "\x1b[31m<bad code>"}, want: ends(EventDisconnected, "StreamError31mbadcode", "WhatsApp ended the connection with code 31mbadcode")},
		"an empty error":     {in: &events.StreamError{}, want: ends(EventDisconnected, "StreamErrorUnknown", "WhatsApp ended the connection with code Unknown")},
		"a token":            {in: &events.CATRefreshError{}, want: ends(EventDisconnected, "TokenRefused", "WhatsApp asks for a token that this client does not have")},
		"replaced":           {in: &events.StreamReplaced{}, want: ends(EventReplaced, "Replaced", "the device logged in elsewhere")},
		"unlinked on the phone": {
			in:   &events.LoggedOut{Reason: events.ConnectFailureLoggedOut},
			want: ends(EventLoggedOut, "DeviceRemoved", "the device was unlinked on the phone or by WhatsApp"),
		},
		"401": {
			in:   &events.LoggedOut{OnConnect: true, Reason: events.ConnectFailureLoggedOut},
			want: ends(EventLoggedOut, "LoggedOut", "WhatsApp does not know the device any more: it was unlinked"),
		},
		"403": {
			in:   &events.LoggedOut{OnConnect: true, Reason: events.ConnectFailureMainDeviceGone},
			want: ends(EventLoggedOut, "AccountLocked", "WhatsApp locked the account, or it moved to another phone"),
		},
		"406": {
			in:   &events.LoggedOut{OnConnect: true, Reason: events.ConnectFailureUnknownLogout},
			want: ends(EventLoggedOut, "AccountBanned", "WhatsApp banned the account"),
		},
		"402": {
			in: &events.TemporaryBan{Code: events.TempBanBlockedByUsers, Expire: 90 * time.Minute},
			want: Event{
				Type: EventBanned, Reason: "TemporaryBan102", Until: noon.Add(90 * time.Minute),
				Message: "WhatsApp banned the account for a time: too many people blocked it",
			},
		},
		"402 without an end": {
			in:   &events.TemporaryBan{Code: 199},
			want: ends(EventBanned, "TemporaryBan199", "WhatsApp banned the account for a time: code 199"),
		},
		"405": {in: &events.ClientOutdated{}, want: ends(EventOutdated, "ClientOutdated", "WhatsApp refuses this version of the client")},
		"another failure": {
			in:   &events.ConnectFailure{Reason: 418},
			want: ends(EventDisconnected, "ConnectFailure418", "WhatsApp refused the login with code 418"),
		},
		"another failure with text": {
			in:   &events.ConnectFailure{Reason: 500, Message: "try\nlater\x00" + strings.Repeat("!", 1000)},
			want: ends(EventDisconnected, "ConnectFailure500", "WhatsApp refused the login with code 500: try later"+strings.Repeat("!", 256-9)),
		},
		"a message":         {in: &events.Message{}, not: true},
		"one lost ping":     {in: &events.KeepAliveTimeout{}, not: true},
		"something unknown": {in: struct{}{}, not: true},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			got, ok := Translate(row.in, noon)
			g.Expect(ok).To(Equal(!row.not))
			if ok {
				g.Expect(got).To(Equal(row.want))
			}
		})
	}
}

func TestProofOfLife(t *testing.T) {
	const period = 20 * time.Second
	was := whatsmeow.KeepAliveIntervalMin
	if was >= period {
		t.Fatalf("the tests have shortened the period: %s", was)
	}
	ago := func(d time.Duration) time.Time { return noon.Add(-d) }
	for name, row := range map[string]struct {
		lost           int
		answered, seen time.Duration
		want           bool
	}{
		"one lost":                        {lost: 1, answered: time.Second, seen: time.Second},
		"three lost, but frames come":     {lost: 3, answered: time.Minute, seen: 0},
		"three lost on a silent link":     {lost: 3, answered: time.Minute, seen: time.Minute, want: true},
		"two lost on a silent link":       {lost: 2, answered: time.Minute, seen: time.Minute},
		"frames, but no answer for 3 min": {lost: 9, answered: 3*time.Minute + time.Second, seen: 0, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			got := silent(&events.KeepAliveTimeout{ErrorCount: row.lost, LastSuccess: ago(row.answered)}, ago(row.seen), noon)
			NewWithT(t).Expect(got).To(Equal(row.want))
		})
	}
}

func TestCodeRefused(t *testing.T) {
	for name, row := range map[string]struct {
		err      error
		kind     EventType
		reason   string
		sentence string
	}{
		"too short":         {whatsmeow.ErrPhoneNumberTooShort, EventCodeRefused, "PhoneNumberInvalid", "correct spec.pairing.phoneNumber"},
		"not international": {whatsmeow.ErrPhoneNumberIsNotInternational, EventCodeRefused, "PhoneNumberInvalid", "correct spec.pairing.phoneNumber"},
		"rate limit":        {whatsmeow.ErrIQRateOverLimit, EventCodeRefused, "PairingCodeRefused429", "too many were asked for"},
		"bad number":        {whatsmeow.ErrIQBadRequest, EventCodeRefused, "PairingCodeRefused400", "check that spec.pairing.phoneNumber is right"},
		"not on WhatsApp":   {whatsmeow.ErrIQNotFound, EventCodeRefused, "PairingCodeRefused404", "its phone uses WhatsApp"},
		"forbidden":         {whatsmeow.ErrIQForbidden, EventCodeRefused, "PairingCodeRefused403", "set spec.pairing.method to QRCode"},
		"outage":            {whatsmeow.ErrIQServiceUnavailable, EventDisconnected, "PairingCodeFailed", "in time"},
		"no answer":         {context.DeadlineExceeded, EventDisconnected, "PairingCodeFailed", "in time"},
		"the socket ended":  {whatsmeow.ErrIQDisconnected, EventDisconnected, "PairingCodeFailed", "in time"},
		"a strange answer":  {&whatsmeow.IQError{}, EventDisconnected, "PairingCodeFailed", "in time"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			got := codeRefused(row.err)
			g.Expect(got.Type).To(Equal(row.kind))
			g.Expect(got.Reason).To(Equal(row.reason))
			g.Expect(got.Message).To(ContainSubstring(row.sentence))
			g.Expect(got.Over()).To(BeTrue())
		})
	}
}

func TestParseProxy(t *testing.T) {
	for _, good := range []string{
		"http://proxy:3128", " https://user:hunter2@proxy.example:443/\n", "socks5://[::1]:1080", "socks5h://proxy", "http://user:%21@10.0.0.1:1",
	} {
		if _, err := ParseProxy(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", "proxy:3128", "ftp://user:hunter2@proxy", "http://", "http://user:hunter2@", "http://user:hunter2@proxy:port", "http://user:hunter2@proxy:",
		"http://user:hunter2@proxy:70000", "http://user:hunter2@proxy:0", "http://proxy/hunter2", "http://proxy?p=hunter2", "http://proxy#hunter2", "http://user:hunter2%zz@proxy", "http:hunter2",
		"http://pro xy:hunter2", "\x00hunter2",
	} {
		_, err := ParseProxy(bad)
		if !errors.Is(err, ErrBadProxy) {
			t.Errorf("%q: %v", bad, err)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: the error shows it", bad)
		}
	}
}

func TestConfig(t *testing.T) {
	root := strings.Repeat("ab", 32)
	for name, row := range map[string]struct {
		in   Config
		want []string
	}{
		"WhatsApp":                     {},
		"a simulator":                  {in: Config{Endpoint: "ws://127.0.0.1:8080", NoiseRoot: root}},
		"a simulator with TLS":         {in: Config{Endpoint: "wss://[::1]:8080", NoiseRoot: root, CAFile: "ca.pem"}},
		"a root without an endpoint":   {in: Config{NoiseRoot: root, CAFile: "ca.pem"}, want: []string{"--whatsapp-noise-root is only", "--whatsapp-ca-file is only"}},
		"an endpoint without a root":   {in: Config{Endpoint: "ws://localhost:1"}, want: []string{"needed with --whatsapp-endpoint"}},
		"an endpoint that is a page":   {in: Config{Endpoint: "https://web.whatsapp.com", NoiseRoot: root}, want: []string{"--whatsapp-endpoint must be"}},
		"an endpoint without a port":   {in: Config{Endpoint: "ws://localhost", NoiseRoot: root}, want: []string{"--whatsapp-endpoint must be"}},
		"an endpoint with a path":      {in: Config{Endpoint: "ws://localhost:1/ws", NoiseRoot: root}, want: []string{"--whatsapp-endpoint must be"}},
		"a short root":                 {in: Config{Endpoint: "ws://localhost:1", NoiseRoot: "abcd"}, want: []string{"64 hexadecimal digits"}},
		"a CA without TLS":             {in: Config{Endpoint: "ws://localhost:1", NoiseRoot: root, CAFile: "ca.pem"}, want: []string{"wss://"}},
		"a long name, and more errors": {in: Config{DeviceName: strings.Repeat("ä", 51), NoiseRoot: "x"}, want: []string{"50 characters", "only for"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			err := row.in.Validate()
			if len(row.want) == 0 {
				g.Expect(err).NotTo(HaveOccurred())
			}
			for _, part := range row.want {
				g.Expect(err).To(MatchError(ContainSubstring(part)))
			}
		})
	}
}

package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/socket"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// ConnectError is a failed attempt to connect, in words for people. It shows
// nothing of a proxy's URL, which is a secret, and has nothing of it in Error.
type ConnectError struct {
	// Reason is a CamelCase word for logs and metrics.
	Reason string
	// Message is a sentence.
	Message string
	cause   error
}

func (e *ConnectError) Error() string { return e.Message }

// Unwrap is the library's error. It may name the proxy: it is for errors.Is and
// errors.As, not for printing.
func (e *ConnectError) Unwrap() error { return e.cause }

// proxyRefusal is a proxy that answers, but with no connection.
type proxyRefusal struct{ status int }

func (e *proxyRefusal) Error() string {
	return fmt.Sprintf("the proxy answered with status %d", e.status)
}

// explain makes an error of ConnectContext one for people.
func explain(err error, proxied bool) error {
	var refusal *proxyRefusal
	var status socket.ErrWithStatusCode
	var network *net.OpError
	say := func(reason, format string, args ...any) error {
		return &ConnectError{Reason: reason, Message: sentence(format, args...), cause: err}
	}
	switch {
	case errors.As(err, &refusal):
		return say(session.EndProxyRefused, "the proxy refused the connection with status %d", refusal.status)
	case errors.As(err, &status):
		return say(session.EndRefused, "WhatsApp refused the connection with HTTP status %d", status.StatusCode)
	case strings.Contains(err.Error(), "failed to verify server cert"):
		return say(session.EndCertificateRefused, "the server's certificate is not signed by WhatsApp's root: something stands between")
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), strings.Contains(err.Error(), "timed out waiting for handshake"):
		return say(session.EndTimeout, "WhatsApp did not answer in time")
	case proxied && errors.As(err, &network) && (network.Op == "dial" || network.Op == "proxyconnect"):
		return say(session.EndProxyUnreachable, "the proxy cannot be reached")
	case proxied:
		return say(session.EndProxyFailed, "the connection through the proxy failed")
	case errors.As(err, &network) && network.Op == "dial":
		return say(session.EndUnreachable, "WhatsApp cannot be reached: %v", network)
	default:
		return say(session.EndConnectFailed, "connecting to WhatsApp failed: %v", err)
	}
}

// codeRefused is what PairPhone's error means. A refusal is one that asking again
// soon does not mend.
func codeRefused(err error) Event {
	var answer *whatsmeow.IQError
	errors.As(err, &answer)
	switch {
	case errors.Is(err, whatsmeow.ErrPhoneNumberTooShort), errors.Is(err, whatsmeow.ErrPhoneNumberIsNotInternational):
		return over(EventCodeRefused, session.EndPhoneNumberInvalid, "the phone number is not an international one: correct spec.pairing.phoneNumber")
	case answer == nil, answer.Code >= 500, answer.Code == 0:
		return over(EventDisconnected, session.EndPairingCodeFailed, "WhatsApp did not give a pairing code in time")
	case answer.Code == 429:
		return over(EventCodeRefused, session.EndPairingCodeRefused+"429",
			"WhatsApp gives no pairing code for this number at present, because too many were asked for: wait some hours, or set spec.pairing.method to QRCode")
	case answer.Code == 400, answer.Code == 404, answer.Code == 406:
		return over(EventCodeRefused, session.EndPairingCodeRefused+strconv.Itoa(answer.Code),
			"WhatsApp gives no pairing code for this number (code %d): check that spec.pairing.phoneNumber is right and that its phone uses WhatsApp, or set spec.pairing.method to QRCode", answer.Code)
	default:
		return over(EventCodeRefused, session.EndPairingCodeRefused+strconv.Itoa(answer.Code),
			"WhatsApp refuses a pairing code with code %d: set spec.pairing.method to QRCode", answer.Code)
	}
}

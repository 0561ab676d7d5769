package whatsapp

import (
	"context"
	"errors"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"

	"go.mau.fi/whatsmeow"
	"go.mau.fi/whatsmeow/socket"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// ConnectError is a failed attempt to connect, described for people. No field shows
// any part of a proxy's URL, which is a secret, and neither does Error.
type ConnectError struct {
	// Reason is a CamelCase word for logs and metrics.
	Reason string
	// Message is a sentence.
	Message string
	cause   error
}

func (e *ConnectError) Error() string { return e.Message }

// Unwrap returns the library's error. It may name the proxy: it is for errors.Is and
// errors.As, not for printing.
func (e *ConnectError) Unwrap() error { return e.cause }

// briefError is an error of the library with a text that is bounded and clean: that of
// whatsmeow's IQError may hold a whole node of WhatsApp's.
type briefError struct{ cause error }

func (e briefError) Error() string { return sentence("%v", e.cause) }

func (e briefError) Unwrap() error { return e.cause }

// attempt is the information about a failed attempt to connect.
type attempt struct {
	// proxy is the session's proxy; nil: none, or the one that HTTPS_PROXY names.
	proxy *url.URL
	// dialled: the proxy, or the server if there is no proxy, has accepted the connection.
	dialled bool
	// simulated: the server is a simulator.
	simulated bool
}

// explain turns an error of an attempt to connect into one for people.
func explain(err error, a attempt) error {
	var status socket.ErrWithStatusCode
	var network *net.OpError
	say := func(reason, format string, args ...any) error {
		return &ConnectError{Reason: reason, Message: sentence(format, args...), cause: err}
	}
	if reason, message := explainProxy(err, a); reason != "" {
		return say(reason, "%s", message)
	}
	switch {
	case errors.As(err, &status):
		return say(session.EndRefused, "WhatsApp refused the connection with HTTP status %d", status.StatusCode)
	case strings.Contains(err.Error(), "failed to verify server cert"):
		return say(session.EndCertificateRefused, "the server's certificate is not signed by WhatsApp's root: something between the worker and WhatsApp answers in its place")
	case timedOut(err):
		return say(session.EndTimeout, "WhatsApp did not answer in time")
	case a.proxy != nil:
		return say(session.EndProxyFailed, "the connection through the proxy failed: check that it lets websockets and TLS to %s pass unchanged", a.target())
	case errors.As(err, &network) && network.Op == "dial":
		return say(session.EndUnreachable, "WhatsApp cannot be reached: %v", network)
	default:
		return say(session.EndConnectFailed, "connecting to WhatsApp failed: %v", err)
	}
}

func timedOut(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
		strings.Contains(err.Error(), "timed out waiting for handshake")
}

// target is where the proxy is asked to connect to.
func (a attempt) target() string {
	if a.simulated {
		return "the endpoint of --whatsapp-endpoint"
	}
	return whatsAppHost + ":443"
}

// codeRefused interprets PairPhone's error. After a refusal, asking again soon does
// not help.
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

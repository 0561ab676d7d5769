package laravel

import (
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

const (
	// maxAnswer bounds how much of an answer is read: 1,000 rejected items with a sentence
	// each take a fifth of it.
	maxAnswer = 1 << 20
	// maxDetail bounds the text of an answer in a Detail or a reason.
	maxDetail = 512
	// maxHost is the greatest length of a DNS name.
	maxHost = 253
	// maxRetryAfter bounds the pause that Laravel may ask for: a mistake there must not stop
	// delivery for a day.
	maxRetryAfter = 5 * time.Minute
)

// statusPageExpired is Laravel's answer to a request without a CSRF token.
const statusPageExpired = 419

const (
	successHint  = "a success must have an empty body, a JSON object or []: answer with response()->noContent() or response()->json([])"
	rejectedHint = `"rejected" cannot be read, so nothing of the batch counts as delivered: answer {"rejected": [{"session_id": "...", "reason": "..."}]}, or leave it out`
)

// errAnswerTooLong says that the body is longer than maxAnswer.
var errAnswerTooLong = errors.New("the answer is too long")

// Classify says what an answer means (docs/architecture.md, "Delivery to Laravel"). It is
// pure. err is set if no answer came (status 0) or if the body could not be read. now is
// needed for a Retry-After that is a date.
func Classify(status int, header http.Header, body []byte, err error, now time.Time) delivery.Answer {
	answer := delivery.Answer{StatusCode: status}
	switch {
	case status == 0 && isConfiguration(err):
		answer.Result, answer.Detail = delivery.Misconfigured, describe(err)
	case status == 0:
		answer.Result, answer.Detail, answer.TimedOut = delivery.Retry, describe(err), timedOut(err)
	case status == http.StatusRequestTimeout, status == http.StatusTooEarly, status == http.StatusTooManyRequests, status >= 500 && status <= 599:
		answer.Result, answer.Detail = delivery.Retry, quote(status, body)
		answer.RetryAfter = retryAfter(header.Get("Retry-After"), now)
	case status == http.StatusBadRequest, status == http.StatusConflict, status == http.StatusUnprocessableEntity:
		return classifyRefusal(answer, header, body, err, now)
	case status == http.StatusRequestEntityTooLarge:
		answer.Result, answer.Detail = delivery.TooLarge, quote(status, body)
		answer.FromProxy = !isObject(body)
	case status >= 200 && status <= 299:
		return classifySuccess(answer, header, body, err)
	case status >= 300 && status <= 399:
		answer.Result = delivery.Misconfigured
		answer.Detail = fmt.Sprintf("Laravel redirects to %s, which is never followed: is the base URL right, and does the route ask for a login?",
			redirectTarget(header.Get("Location")))
	case status == http.StatusProxyAuthRequired:
		answer.Result = delivery.Misconfigured
		answer.Detail = "an HTTP proxy of the environment (HTTP_PROXY) asks for a password, or does not accept the one in its URL: " + quote(status, body)
	case (status == http.StatusUnauthorized || status == http.StatusForbidden) && !isObject(body):
		answer.Result = delivery.Misconfigured
		answer.Detail = "a refusal without a JSON object: Laravel does not accept the token or the signature, or a firewall in front of it blocks the request: " + quote(status, body)
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		answer.Result = delivery.Misconfigured
		answer.Detail = "Laravel does not accept the token or the signature: " + quote(status, body)
	case status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		answer.Result = delivery.Misconfigured
		answer.Detail = "Laravel has no such route: " + quote(status, body)
	case status == statusPageExpired:
		answer.Result = delivery.Misconfigured
		answer.Detail = "Laravel asks for a CSRF token, which only a browser has: move the route to routes/api.php, " +
			"or exempt it with $middleware->validateCsrfTokens(except: [...]) in bootstrap/app.php: " + quote(status, body)
	default:
		answer.Result, answer.Detail = delivery.Misconfigured, quote(status, body)
	}
	return answer
}

// classifyRefusal distinguishes a refusal by the application from one by a proxy in front of
// it. Laravel answers a request that accepts JSON with a JSON object; an ingress that
// expects TLS, a proxy or a firewall answers with HTML or text.
func classifyRefusal(answer delivery.Answer, header http.Header, body []byte, err error, now time.Time) delivery.Answer {
	switch {
	case isObject(body):
		answer.Result, answer.Detail = delivery.Refused, quote(answer.StatusCode, body)
		answer.RetryAfter = retryAfter(header.Get("Retry-After"), now)
	case isNotCompressed(err):
		answer.Result, answer.Detail = delivery.Misconfigured, notCompressed(answer.StatusCode)
	case err != nil && !errors.Is(err, errAnswerTooLong):
		answer.Result, answer.Detail = delivery.Retry, fmt.Sprintf("the answer %d was cut off: %s", answer.StatusCode, describe(err))
		answer.TimedOut = timedOut(err)
	default:
		answer.Result = delivery.Misconfigured
		answer.Detail = "a refusal must have a JSON object as its body; this answer is treated as one from a proxy or an ingress " +
			"in front of Laravel: does it expect TLS, or is the base URL not Laravel's? " + quote(answer.StatusCode, body)
	}
	return answer
}

func notCompressed(status int) string {
	return fmt.Sprintf("the answer %d says that it is compressed with gzip, but it is not: is it compressed twice, or not at all, by PHP (zlib.output_compression) and the web server?", status)
}

// classifySuccess reads the body of a 2xx: a proxy's page or a login page is not a success.
func classifySuccess(answer delivery.Answer, header http.Header, body []byte, err error) delivery.Answer {
	if errors.Is(err, errAnswerTooLong) {
		answer.Result = delivery.Misconfigured
		answer.Detail = fmt.Sprintf("the answer %d is longer than %d bytes", answer.StatusCode, maxAnswer)
		return answer
	}
	if isNotCompressed(err) {
		answer.Result, answer.Detail = delivery.Misconfigured, notCompressed(answer.StatusCode)
		return answer
	}
	if err != nil {
		answer.Result, answer.Detail = delivery.Retry, fmt.Sprintf("the answer %d was cut off: %s", answer.StatusCode, describe(err))
		answer.TimedOut = timedOut(err)
		return answer
	}
	body = trimmed(body)
	// A PHP array without elements is written as [].
	if len(body) == 0 || isEmptyList(body) {
		answer.Result = delivery.Delivered
		return answer
	}
	object, ok := parseObject(body)
	if !ok {
		answer.Result = delivery.Misconfigured
		answer.Detail = successHint
		if encoding := header.Get("Content-Encoding"); encoding != "" {
			answer.Detail += " (this one is encoded as " + clean(encoding, maxHost) + ", which was not asked for)"
		}
		answer.Detail += ": " + quote(answer.StatusCode, body)
		return answer
	}
	rejected, present := field(object, "rejected")
	if data, nested := field(object, "data"); !present && nested { // an API resource wraps its fields
		if object, ok = parseObject(data); ok {
			rejected, present = field(object, "rejected")
		}
	}
	if !present {
		answer.Result = delivery.Delivered
		return answer
	}
	list, unnamed, err := parseRejected(rejected)
	switch {
	case err != nil:
		answer.Result = delivery.Misconfigured
		answer.Detail = rejectedHint + ": " + quote(answer.StatusCode, body)
	case unnamed > 0:
		// The rejected items are found when each item is sent alone.
		answer.Result = delivery.Refused
		answer.Detail = fmt.Sprintf("%d entries of \"rejected\" have no session_id: %s", unnamed, quote(answer.StatusCode, body))
	default:
		answer.Result, answer.Rejected = delivery.Delivered, list
	}
	return answer
}

// retryAfter reads seconds or an HTTP date (RFC 9110, 10.2.3); anything else, and a date in
// the past, is zero.
func retryAfter(value string, now time.Time) time.Duration {
	value = strings.TrimSpace(value)
	if value == "" {
		return 0
	}
	if strings.Trim(value, "0123456789") == "" {
		seconds, err := strconv.ParseInt(value, 10, 64)
		if err != nil || seconds > int64(maxRetryAfter/time.Second) { // only digits: a number out of range is a long time
			return maxRetryAfter
		}
		return time.Duration(seconds) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(0, at.Sub(now)), maxRetryAfter)
}

// proxyRefusal says that the HTTP proxy of the environment refused to connect to Laravel.
type proxyRefusal struct{ status int }

func (e *proxyRefusal) Error() string {
	return fmt.Sprintf("the HTTP proxy answered %d %s", e.status, http.StatusText(e.status))
}

// isConfiguration reports whether an error comes from the configuration: a repetition does not help then.
func isConfiguration(err error) bool {
	var (
		certificate *tls.CertificateVerificationError
		record      tls.RecordHeaderError
		alert       tls.AlertError
		refusal     *proxyRefusal
	)
	switch {
	case errors.As(err, &refusal):
		return refusal.status < 500
	case errors.As(err, &alert):
		return alert != alertInternalError && alert != alertUserCanceled
	default:
		return errors.As(err, &certificate) || errors.As(err, &record) || errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, errNotSent) || isNotHTTP(err)
	}
}

// The TLS alerts that are not about the configuration (RFC 8446, 6).
const alertInternalError, alertUserCanceled tls.AlertError = 80, 90

// isNotHTTP recognizes the answer of a port with another protocol: net/http has no type for
// this error.
func isNotHTTP(err error) bool { return err != nil && strings.Contains(err.Error(), "malformed HTTP") }

// isNotCompressed reports whether the header of an answer says gzip but its body is not
// compressed with it. A repetition does not help then.
func isNotCompressed(err error) bool {
	var corrupt flate.CorruptInputError
	return errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) || errors.As(err, &corrupt)
}

// timedOut reports whether a request whose connection was open got no answer in its time.
func timedOut(err error) bool {
	var op *net.OpError
	opening := errors.As(err, &op) && (op.Op == "dial" || op.Op == "proxyconnect")
	return errors.Is(err, context.DeadlineExceeded) && !opening
}

// describe says what an error means in our own words: Go's errors contain URLs, also that
// of the proxy, and these may contain secrets.
func describe(err error) string {
	var (
		refusal *proxyRefusal
		op      *net.OpError
	)
	switch {
	case err == nil:
		return "no answer"
	case errors.Is(err, errNotSent):
		return clean(err.Error(), maxDetail)
	case errors.Is(err, context.Canceled):
		return "the request was cancelled"
	case errors.As(err, &refusal) && refusal.status == http.StatusProxyAuthRequired:
		return "the HTTP proxy of the environment (HTTPS_PROXY) asks for a password, or does not accept the one in its URL"
	case errors.As(err, &refusal):
		return fmt.Sprintf("the HTTP proxy of the environment (HTTPS_PROXY) does not connect to Laravel: it answers %d %s; name Laravel's host in NO_PROXY if it must not go through the proxy",
			refusal.status, http.StatusText(refusal.status))
	case errors.As(err, &op) && op.Op == "proxyconnect":
		return "the HTTP proxy of the environment (HTTPS_PROXY, HTTP_PROXY) cannot be used: " + describeConnection(op.Err, "the proxy")
	default:
		return describeConnection(err, "Laravel")
	}
}

// describeConnection describes an error of the connection to peer.
func describeConnection(err error, peer string) string {
	var (
		certificate *tls.CertificateVerificationError
		record      tls.RecordHeaderError
		alert       tls.AlertError
		dns         *net.DNSError
		op          *net.OpError
		timeout     interface{ Timeout() bool }
	)
	switch {
	case errors.As(err, &certificate):
		return "the certificate of " + peer + " is not trusted: " + clean(certificate.Err.Error(), maxDetail)
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return peer + " does not speak TLS on this port"
	case errors.As(err, &alert):
		return peer + " refused the TLS handshake: " + clean(alert.Error(), maxDetail)
	case isNotHTTP(err):
		return "the answer is not HTTP: are the scheme and the port of the base URL right?"
	case errors.As(err, &dns) && dns.IsNotFound:
		return "the name of the host of " + peer + " is not known"
	case errors.As(err, &dns):
		return "the name of the host of " + peer + " could not be looked up: DNS did not answer"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "the connection was refused"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "there is no route to " + peer
	case errors.As(err, &op) && op.Op == "dial" && op.Timeout():
		return "the connection to " + peer + " could not be opened in time: does a firewall or a NetworkPolicy drop it?"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the connection broke"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time"
	default:
		return "the connection failed"
	}
}

// quote describes an answer to people: its status, and as much of its text as can be shown.
func quote(status int, body []byte) string {
	text := fmt.Sprintf("%d %s", status, http.StatusText(status))
	if shown := clean(string(body[:min(len(body), 4*maxDetail)]), maxDetail); shown != "" {
		text += ": " + shown
	}
	return text
}

// redirectTarget is a Location without the parts that may be secret.
func redirectTarget(location string) string {
	u, err := url.Parse(location)
	if err != nil || location == "" {
		return "somewhere"
	}
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	return clean(shown.String(), maxDetail)
}

// clean makes foreign text safe for a log, a status and a terminal: no control characters,
// one blank for each run of white space, at most limit bytes.
func clean(text string, limit int) string {
	var b strings.Builder
	blank := false
	for _, r := range strings.ToValidUTF8(text, "") {
		if unicode.IsSpace(r) || !unicode.IsPrint(r) {
			blank = b.Len() > 0
			continue
		}
		size := utf8.RuneLen(r)
		if blank {
			size++
		}
		if b.Len()+size > limit {
			break
		}
		if blank {
			b.WriteByte(' ')
			blank = false
		}
		b.WriteRune(r)
	}
	return b.String()
}

package laravel

import (
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
	// maxAnswer is what is read of an answer. 1,000 rejected items with a
	// sentence each take a fifth of it.
	maxAnswer = 1 << 20
	// maxDetail bounds the text of an answer in a Detail or a reason.
	maxDetail = 512
	// maxHost is the longest name in DNS.
	maxHost = 253
	// maxRetryAfter bounds what Laravel may ask for: a slip there must not
	// stop delivery for a day.
	maxRetryAfter = 5 * time.Minute
)

// statusPageExpired is Laravel's answer to a request without a CSRF token.
const statusPageExpired = 419

const (
	successHint  = "a success must have an empty body, a JSON object or []: answer with response()->noContent() or response()->json([])"
	rejectedHint = `"rejected" cannot be read, so nothing of the batch counts as delivered: answer {"rejected": [{"session_id": "...", "reason": "..."}]}, or leave it out`
)

// errAnswerTooLong is the body's error where it is longer than maxAnswer.
var errAnswerTooLong = errors.New("the answer is too long")

// Classify says what an answer means (docs/architecture.md, "Delivery to Laravel"). It is
// pure. An err stands for a request without an answer (status 0), or for an answer whose
// body could not be read. Now is for a Retry-After that is a date.
func Classify(status int, header http.Header, body []byte, err error, now time.Time) delivery.Answer {
	answer := delivery.Answer{StatusCode: status}
	switch {
	case status == 0 && isConfiguration(err):
		answer.Result, answer.Detail = delivery.Misconfigured, describe(err)
	case status == 0:
		answer.Result, answer.Detail = delivery.Retry, describe(err)
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

// classifyRefusal tells the application's refusal from that of what stands in
// front of it. Laravel answers a request that accepts JSON with a JSON object; an
// ingress that expects TLS, a proxy or a firewall answers with HTML or text.
func classifyRefusal(answer delivery.Answer, header http.Header, body []byte, err error, now time.Time) delivery.Answer {
	switch {
	case isObject(body):
		answer.Result, answer.Detail = delivery.Refused, quote(answer.StatusCode, body)
		answer.RetryAfter = retryAfter(header.Get("Retry-After"), now)
	case err != nil && !errors.Is(err, errAnswerTooLong):
		answer.Result, answer.Detail = delivery.Retry, fmt.Sprintf("the answer %d broke off: %s", answer.StatusCode, describe(err))
	default:
		answer.Result = delivery.Misconfigured
		answer.Detail = "a refusal must have a JSON object as its body; this one is taken for the answer of a proxy or an ingress " +
			"in front of Laravel: does it expect TLS, or is the base URL not Laravel's? " + quote(answer.StatusCode, body)
	}
	return answer
}

// classifySuccess looks into a 2xx: the page of a proxy or a login is not a yes.
func classifySuccess(answer delivery.Answer, header http.Header, body []byte, err error) delivery.Answer {
	if errors.Is(err, errAnswerTooLong) {
		answer.Result = delivery.Misconfigured
		answer.Detail = fmt.Sprintf("the answer %d is longer than %d bytes", answer.StatusCode, maxAnswer)
		return answer
	}
	if err != nil {
		answer.Result, answer.Detail = delivery.Retry, fmt.Sprintf("the answer %d broke off: %s", answer.StatusCode, describe(err))
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
		// Which items are meant shows when each is alone.
		answer.Result = delivery.Refused
		answer.Detail = fmt.Sprintf("%d entries of \"rejected\" have no session_id: %s", unnamed, quote(answer.StatusCode, body))
	default:
		answer.Result, answer.Rejected = delivery.Delivered, list
	}
	return answer
}

// retryAfter reads seconds or an HTTP date (RFC 9110, 10.2.3); what is neither,
// or past, is nothing.
func retryAfter(value string, now time.Time) time.Duration {
	value = strings.TrimSpace(value)
	if value == "" {
		return 0
	}
	if strings.Trim(value, "0123456789") == "" {
		seconds, err := strconv.ParseInt(value, 10, 64)
		if err != nil || seconds > int64(maxRetryAfter/time.Second) { // digits only: out of range is long
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

// isConfiguration tells errors that no repetition mends from those that one may.
func isConfiguration(err error) bool {
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	return errors.As(err, &certificate) || errors.As(err, &record) || errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, errNotSent)
}

// describe puts an error into words of our own: what Go's errors repeat (URLs,
// the proxy's among them) may hold secrets.
func describe(err error) string {
	var (
		certificate *tls.CertificateVerificationError
		record      tls.RecordHeaderError
		dns         *net.DNSError
		timeout     interface{ Timeout() bool }
	)
	switch {
	case err == nil:
		return "no answer"
	case errors.Is(err, errNotSent):
		return clean(err.Error(), maxDetail)
	case errors.Is(err, context.Canceled):
		return "the request was cancelled"
	case errors.As(err, &certificate):
		return "Laravel's certificate is not trusted: " + clean(certificate.Err.Error(), maxDetail)
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return "Laravel does not speak TLS on this port"
	case errors.As(err, &dns) && dns.IsNotFound:
		return "the name of Laravel's host is not known"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "the connection was refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the connection broke"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time"
	default:
		return "the connection failed"
	}
}

// quote is an answer for people: its number, its name, and what can be shown of its text.
func quote(status int, body []byte) string {
	text := fmt.Sprintf("%d %s", status, http.StatusText(status))
	if shown := clean(string(body[:min(len(body), 4*maxDetail)]), maxDetail); shown != "" {
		text += ": " + shown
	}
	return text
}

// redirectTarget leaves out what may be secret.
func redirectTarget(location string) string {
	u, err := url.Parse(location)
	if err != nil || location == "" {
		return "somewhere"
	}
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	return clean(shown.String(), maxDetail)
}

// clean makes text from outside fit for a log, a status and a terminal: no
// control characters, runs of white space as one blank, at most limit bytes.
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

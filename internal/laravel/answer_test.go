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
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func header(key, value string) http.Header {
	h := http.Header{}
	h.Set(key, value)
	return h
}

func TestClassify(t *testing.T) {
	overURL := func(err error) error {
		return &url.Error{Op: "Post", URL: "https://laravel.example/?token=hunter2", Err: err}
	}
	for _, row := range []struct {
		name   string
		status int
		header http.Header
		body   string
		err    error

		result     delivery.Result
		retryAfter time.Duration
		rejected   []delivery.Rejection
		fromProxy  bool
		timedOut   bool
		detail     string
	}{
		{name: "200 with an empty body", status: 200, result: delivery.Delivered},
		{name: "204", status: 204, result: delivery.Delivered},
		{name: "200 with white space", status: 200, body: " \r\n", result: delivery.Delivered},
		{name: "200 with an object", status: 200, body: `{"ok":true}`, result: delivery.Delivered},
		{name: "200 with a byte order mark and an object", status: 200, body: "\xef\xbb\xbf{}", result: delivery.Delivered},
		{name: "202 with rejected items", status: 202, body: `{"rejected":[{"session_id":"a","reason":"no such\u001b[31m tenant"}]}`,
			result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a", Reason: "no such [31m tenant"}}},
		{name: "200 with rejected items that cannot be read", status: 200, body: `{"rejected":"none"}`, result: delivery.Misconfigured, detail: `answer {"rejected": [`},
		{name: "200 with a number of rejected items", status: 200, body: `{"rejected":3}`, result: delivery.Misconfigured, detail: `answer {"rejected": [`},
		{name: "200 with null for rejected items", status: 200, body: `{"rejected":null}`, result: delivery.Delivered},
		{name: "200 with false for rejected items", status: 200, body: `{"rejected":false}`, result: delivery.Delivered},
		{name: "200 with no rejected items", status: 200, body: `{"rejected":[]}`, result: delivery.Delivered},
		{name: "200 with an empty object of rejected items", status: 200, body: `{"rejected":{}}`, result: delivery.Delivered},
		{name: "200 with a filtered PHP array", status: 200, body: `{"rejected":{"3":{"session_id":"a","reason":"no"}}}`,
			result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a", Reason: "no"}}},
		{name: "200 with sessions as keys", status: 200, body: `{"rejected":{"shop-1":"no","b":{"reason":"nor this"},"c":null}}`,
			result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "b", Reason: "nor this"}, {SessionID: "c"}, {SessionID: "shop-1", Reason: "no"}}},
		{name: "200 with a list of sessions", status: 200, body: `{"rejected":["a","b","a"]}`, result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a"}, {SessionID: "b"}}},
		{name: "200 with a single entry outside a list", status: 200, body: `{"rejected":{"session_id":"a","reason":"no"}}`,
			result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a", Reason: "no"}}},
		{name: "200 with a number as session", status: 200, body: `{"rejected":[{"session_id":123,"reason":7}]}`, result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "123", Reason: "7"}}},
		{name: "200 with the lists of a validator", status: 200, body: `{"rejected":[{"session_id":"a","reason":["no","nor"]}]}`,
			result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a", Reason: `["no","nor"]`}}},
		{name: "200 with other letter cases", status: 200, body: `{"Rejected":[{"Session_Id":"a"}]}`, result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a"}}},
		{name: "200 with the fields inside an API resource", status: 200, body: `{"data":{"rejected":[{"session_id":"a"}]}}`, result: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a"}}},
		{name: "200 with an entry that names no session", status: 200, body: `{"rejected":[{"session_id":"a"},{"reason":"who"}]}`, result: delivery.Refused, detail: `1 entries of "rejected" have no session_id`},
		{name: "200 with a position and a reason", status: 200, body: `{"rejected":{"3":"no such tenant"}}`, result: delivery.Refused, detail: "no session_id"},
		{name: "200 with null entries", status: 200, body: `{"rejected":[null,""]}`, result: delivery.Refused, detail: "2 entries"},
		{name: "200 with HTML", status: 200, body: "<!doctype html><h1>Please log in</h1>", result: delivery.Misconfigured, detail: "Please log in"},
		{name: "200 with an empty PHP array", status: 200, body: "[ ]\n", result: delivery.Delivered},
		{name: "200 with a list", status: 200, body: `[{"session_id":"a"}]`, result: delivery.Misconfigured, detail: "response()->noContent()"},
		{name: "200 with null", status: 200, body: `null`, result: delivery.Misconfigured, detail: "response()->noContent()"},
		{name: "200 with OK", status: 200, body: `OK`, result: delivery.Misconfigured, detail: "response()->noContent()"},
		{name: "200 with OK in quotes", status: 200, body: `"OK"`, result: delivery.Misconfigured, detail: "response()->noContent()"},
		{name: "200 with an empty string in quotes", status: 200, body: `""`, result: delivery.Misconfigured, detail: "response()->noContent()"},
		{name: "200 with true", status: 200, body: `true`, result: delivery.Misconfigured, detail: "response()->noContent()"},
		{name: "200 with 1", status: 200, body: `1`, result: delivery.Misconfigured, detail: "response()->noContent()"},
		{name: "200 with an encoding that was not asked for", status: 200, header: header("Content-Encoding", "br"), body: "\x0b\x02", result: delivery.Misconfigured, detail: "encoded as br"},
		{name: "200 in Latin-1", status: 200, body: "{\"ciudad\":\"M\xe1laga\"}", result: delivery.Delivered},
		{name: "200 with half an object", status: 200, body: `{"ok":`, result: delivery.Misconfigured},
		{name: "200 with two objects", status: 200, body: `{}{}`, result: delivery.Misconfigured},
		{name: "200 that is too long", status: 200, body: "{}", err: errAnswerTooLong, result: delivery.Misconfigured, detail: "longer than 1048576"},
		{name: "200 that is cut off", status: 200, body: `{"rej`, err: io.ErrUnexpectedEOF, result: delivery.Retry, detail: "cut off"},
		{name: "302", status: 302, header: header("Location", "https://laravel.example/login?token=hunter2"), result: delivery.Misconfigured, detail: "https://laravel.example/login,"},
		{name: "304", status: 304, result: delivery.Misconfigured, detail: "somewhere"},
		{name: "400 with an object", status: 400, body: "\xef\xbb\xbf {\"message\":\"bad\"}\n", result: delivery.Refused, detail: "400 Bad Request: "},
		{name: "400 from an ingress that expects TLS", status: 400, body: "<html><title>400 The plain HTTP request was sent to HTTPS port</title>", result: delivery.Misconfigured, detail: "expect TLS"},
		{name: "400 without a body", status: 400, result: delivery.Misconfigured, detail: "JSON object"},
		{name: "400 with text", status: 400, body: "bad", result: delivery.Misconfigured, detail: "400 Bad Request: bad"},
		{name: "400 with a list", status: 400, body: "[]", result: delivery.Misconfigured},
		{name: "400 with null", status: 400, body: "null", result: delivery.Misconfigured},
		{name: "400 that is cut off", status: 400, body: `{"mess`, err: io.ErrUnexpectedEOF, result: delivery.Retry, detail: "cut off"},
		{name: "400 that is too long", status: 400, body: `{"mess`, err: errAnswerTooLong, result: delivery.Misconfigured},
		{name: "401", status: 401, result: delivery.Misconfigured, detail: "token"},
		{name: "403", status: 403, body: `{"message":"Forbidden."}`, result: delivery.Misconfigured, detail: "Laravel does not accept the token"},
		{name: "403 of a firewall", status: 403, body: "<html>", result: delivery.Misconfigured, detail: "a firewall in front of it"},
		{name: "404", status: 404, body: "<html>", result: delivery.Misconfigured, detail: "no such route"},
		{name: "405", status: 405, result: delivery.Misconfigured, detail: "no such route"},
		{name: "408", status: 408, result: delivery.Retry},
		{name: "409 with an object", status: 409, header: header("Retry-After", "3"), body: `{"message":"deadlock"}`, result: delivery.Refused, retryAfter: 3 * time.Second, detail: "deadlock"},
		{name: "409 with HTML", status: 409, body: "<html>", result: delivery.Misconfigured},
		{name: "410", status: 410, result: delivery.Misconfigured},
		{name: "413 from a proxy", status: 413, body: "<html>", result: delivery.TooLarge, fromProxy: true},
		{name: "413 from the application", status: 413, body: `{"message":"too large"}`, result: delivery.TooLarge},
		{name: "419, Laravel's expired page", status: 419, body: `{"message":"CSRF token mismatch."}`, result: delivery.Misconfigured, detail: "validateCsrfTokens(except: [...])"},
		{name: "422", status: 422, body: `{"message":"The qr field is required."}`, result: delivery.Refused, detail: "The qr field is required."},
		{name: "425", status: 425, result: delivery.Retry},
		{name: "429 with seconds", status: 429, header: header("Retry-After", "7"), result: delivery.Retry, retryAfter: 7 * time.Second},
		{name: "429 with a date", status: 429, header: header("Retry-After", "Sun, 01 Mar 2026 12:01:30 GMT"), result: delivery.Retry, retryAfter: 90 * time.Second},
		{name: "429 with a date in the past", status: 429, header: header("Retry-After", "Sun, 01 Mar 2026 11:01:30 GMT"), result: delivery.Retry},
		{name: "503 with a pause of a day", status: 503, header: header("Retry-After", "86400"), result: delivery.Retry, retryAfter: maxRetryAfter},
		{name: "503 with a number that is too large", status: 503, header: header("Retry-After", strings.Repeat("9", 40)), result: delivery.Retry, retryAfter: maxRetryAfter},
		{name: "503 with a negative number", status: 503, header: header("Retry-After", "-5"), result: delivery.Retry},
		{name: "503 with garbage", status: 503, header: header("Retry-After", "soon"), result: delivery.Retry},
		{name: "422 with Retry-After", status: 422, header: header("Retry-After", "7"), body: "{}", result: delivery.Refused, retryAfter: 7 * time.Second},
		{name: "500", status: 500, body: strings.Repeat("<p>Whoops</p>\n", 1000), result: delivery.Retry, detail: "500 Internal Server Error: <p>Whoops</p> <p>"},
		{name: "599", status: 599, result: delivery.Retry},
		{name: "600", status: 600, result: delivery.Misconfigured},
		{name: "time-out", err: overURL(context.DeadlineExceeded), result: delivery.Retry, timedOut: true, detail: "no answer in time"},
		{name: "time-out while the connection is opened", err: overURL(&net.OpError{Op: "dial", Err: context.DeadlineExceeded}), result: delivery.Retry, detail: "NetworkPolicy"},
		{name: "200 that drips until the time is over", status: 200, body: "{", err: context.DeadlineExceeded, result: delivery.Retry, timedOut: true, detail: "cut off"},
		{name: "422 that drips until the time is over", status: 422, body: "{", err: context.DeadlineExceeded, result: delivery.Retry, timedOut: true, detail: "cut off"},
		{name: "cancelled", err: overURL(context.Canceled), result: delivery.Retry, detail: "cancelled"},
		{name: "refused", err: overURL(&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}), result: delivery.Retry, detail: "refused"},
		{name: "broken", err: overURL(io.EOF), result: delivery.Retry, detail: "broke"},
		{name: "unknown host", err: overURL(&net.DNSError{Name: "laravel.example", IsNotFound: true}), result: delivery.Retry, detail: "not known"},
		{name: "anything else", err: overURL(errors.New("proxy http://user:hunter2@proxy")), result: delivery.Retry, detail: "the connection failed"},
		{name: "DNS does not answer", err: overURL(&net.DNSError{Name: "laravel.example", IsTimeout: true}), result: delivery.Retry, detail: "DNS did not answer"},
		{name: "no route", err: overURL(&net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}), result: delivery.Retry, detail: "no route to Laravel"},
		{name: "packets that are dropped", err: overURL(&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}), result: delivery.Retry, detail: "NetworkPolicy"},
		{name: "a proxy that does not run", err: overURL(&net.OpError{Op: "proxyconnect", Err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}}), result: delivery.Retry, detail: "HTTPS_PROXY"},
		{name: "a proxy whose name is unknown", err: overURL(&net.OpError{Op: "proxyconnect", Err: &net.DNSError{IsNotFound: true}}), result: delivery.Retry, detail: "the host of the proxy is not known"},
		{name: "a proxy that asks for a password", err: overURL(&proxyRefusal{status: 407}), result: delivery.Misconfigured, detail: "password"},
		{name: "a proxy that does not allow Laravel", err: overURL(&proxyRefusal{status: 403}), result: delivery.Misconfigured, detail: "NO_PROXY"},
		{name: "a proxy that does not reach Laravel", err: overURL(&proxyRefusal{status: 502}), result: delivery.Retry, detail: "502 Bad Gateway"},
		{name: "407 of a proxy in front of plain HTTP", status: 407, body: "<html>", result: delivery.Misconfigured, detail: "password"},
		{name: "a TLS alert", err: overURL(&net.OpError{Op: "remote error", Err: tls.AlertError(40)}), result: delivery.Misconfigured, detail: "handshake failure"},
		{name: "a TLS alert of a machine that is ending", err: overURL(&net.OpError{Op: "remote error", Err: alertInternalError}), result: delivery.Retry, detail: "internal error"},
		{name: "another protocol than HTTP", err: overURL(errors.New(`net/http: HTTP/1.x transport connection broken: malformed HTTP response "\x15\x03\x01"`)), result: delivery.Misconfigured, detail: "not HTTP"},
		{name: "200 that says gzip but is not compressed", status: 200, err: gzip.ErrHeader, result: delivery.Misconfigured, detail: "zlib.output_compression"},
		{name: "200 whose gzip is corrupt", status: 200, err: flate.CorruptInputError(7), result: delivery.Misconfigured, detail: "not"},
		{name: "422 that says gzip but is not compressed", status: 422, err: gzip.ErrHeader, result: delivery.Misconfigured, detail: "the answer 422"},
		{name: "foreign certificate", err: overURL(&tls.CertificateVerificationError{Err: errors.New("unknown authority")}), result: delivery.Misconfigured, detail: "unknown authority"},
		{name: "no TLS", err: overURL(http.ErrSchemeMismatch), result: delivery.Misconfigured, detail: "does not speak TLS"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			answer := Classify(row.status, row.header, []byte(row.body), row.err, now)
			g.Expect(answer.Result).To(Equal(row.result))
			g.Expect(answer.RetryAfter).To(Equal(row.retryAfter))
			g.Expect(answer.Rejected).To(Equal(row.rejected))
			g.Expect(answer.StatusCode).To(Equal(row.status))
			g.Expect(answer.TimedOut).To(Equal(row.timedOut))
			g.Expect(answer.FromProxy).To(Equal(row.fromProxy))
			g.Expect(answer.Detail).To(ContainSubstring(row.detail))
			g.Expect(answer.Detail).NotTo(ContainSubstring("hunter2"))
			if row.result != delivery.Delivered {
				g.Expect(answer.Detail).NotTo(BeEmpty())
			}
			checkAnswer(t, answer)
		})
	}
}

// checkAnswer checks what must be true of every answer.
func checkAnswer(t *testing.T, answer delivery.Answer) {
	t.Helper()
	texts := []string{answer.Detail}
	for _, r := range answer.Rejected {
		texts = append(texts, r.Reason)
	}
	for _, text := range texts {
		if len(text) > maxDetail+400 || !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
			t.Errorf("not safe for a log: %q", text)
		}
	}
	if answer.RetryAfter < 0 || answer.RetryAfter > maxRetryAfter {
		t.Errorf("Retry-After is %s", answer.RetryAfter)
	}
	switch answer.Result {
	case delivery.Delivered, delivery.Retry, delivery.Refused, delivery.TooLarge, delivery.Misconfigured:
	default:
		t.Errorf("unknown result: %q", answer.Result)
	}
	if answer.Result != delivery.Delivered && answer.Rejected != nil {
		t.Error("items of a batch that was not delivered are rejected")
	}
}

func FuzzClassify(f *testing.F) {
	f.Add(200, "", []byte(`{"rejected":[{"session_id":"a","reason":"b"}]}`))
	f.Add(200, "", []byte("<html>"))
	f.Add(302, "https://a:b@c/d?e#f", []byte(nil))
	f.Add(429, "Sun, 01 Mar 2026 12:01:30 GMT", []byte("\x1b[31m\xff"))
	f.Add(503, "18446744073709551616", []byte("{"))
	f.Fuzz(func(t *testing.T, status int, value string, body []byte) {
		h := http.Header{"Retry-After": {value}, "Location": {value}}
		answer := Classify(status, h, body, nil, now)
		checkAnswer(t, answer)
		if answer.Result == delivery.Delivered && (status < 200 || status > 299) {
			t.Errorf("%d  counts as a success", status)
		}
		if answer.Result == delivery.Delivered && len(trimmed(body)) > 0 && !isObject(body) && !isEmptyList(trimmed(body)) {
			t.Errorf("%q  counts as a success", body)
		}
	})
}

func TestRejectedItemsMatchTheBatch(t *testing.T) {
	states := delivery.Batch{Items: []delivery.Item{{SessionID: "Shop-1"}, {SessionID: "b"}, {SessionID: "123"}}}
	messages := delivery.Batch{Kind: delivery.KindMessage, Items: []delivery.Item{
		{SessionID: "Shop-1", Key: "k1"}, {SessionID: "Shop-1", Key: "k2"}, {SessionID: "b", Key: "k3"}, {SessionID: "k2", Key: "k4"},
	}}
	// The placeholder of a message, and the message.
	twice := delivery.Batch{Kind: delivery.KindMessage, Items: []delivery.Item{
		{SessionID: "Shop-1", Key: "k1"}, {SessionID: "b", Key: "k3"}, {SessionID: "Shop-1", Key: "k1"},
	}}
	for _, row := range []struct {
		name     string
		batch    delivery.Batch
		rejected []delivery.Rejection
		want     []delivery.Rejection
		unknown  []string
		// refused is why the batch must be halved until the rejected item is alone.
		refused string
	}{
		{
			name: "sessions", batch: states, unknown: []string{"c"},
			rejected: []delivery.Rejection{{SessionID: "shop-1", Reason: "no"}, {SessionID: "b"}, {SessionID: "Shop-1", Reason: "again"}, {SessionID: "c"}, {SessionID: "123"}},
			want:     []delivery.Rejection{{SessionID: "Shop-1", Reason: "no"}, {SessionID: "b"}, {SessionID: "123"}},
		},
		{
			name: "a key does not matter where there are none", batch: states,
			rejected: []delivery.Rejection{{SessionID: "b", Key: "k", Reason: "no"}}, want: []delivery.Rejection{{SessionID: "b", Reason: "no"}},
		},
		{
			name: "messages by key", batch: messages, unknown: []string{"k9"},
			rejected: []delivery.Rejection{{SessionID: "shop-1", Key: "k2", Reason: "no"}, {Key: "k1"}, {SessionID: "b", Key: "k9"}, {SessionID: "Shop-1", Key: "k1", Reason: "again"}},
			want:     []delivery.Rejection{{SessionID: "Shop-1", Key: "k2", Reason: "no"}, {SessionID: "Shop-1", Key: "k1"}},
		},
		{
			name: "a list of keys", batch: messages,
			rejected: []delivery.Rejection{{SessionID: "k3"}}, want: []delivery.Rejection{{SessionID: "b", Key: "k3"}},
		},
		{
			name: "a session of which the batch has one message", batch: messages,
			rejected: []delivery.Rejection{{SessionID: "B", Reason: "no"}}, want: []delivery.Rejection{{SessionID: "b", Key: "k3", Reason: "no"}},
		},
		{name: "a session of which the batch has several messages", batch: messages, rejected: []delivery.Rejection{{Key: "k3"}, {SessionID: "shop-1"}}, refused: "names session shop-1 and no key, which may mean any of 2 items"},
		{name: "a key that two messages have", batch: twice, rejected: []delivery.Rejection{{Key: "k3"}, {SessionID: "Shop-1", Key: "k1"}}, refused: "names key k1, which may mean any of 2 items"},
		{name: "the same in a list of keys", batch: twice, rejected: []delivery.Rejection{{SessionID: "k1"}}, refused: "names key k1, which may mean any of 2 items"},
		{name: "a session with two messages of one key", batch: twice, rejected: []delivery.Rejection{{SessionID: "shop-1"}}, refused: "which may mean any of 2 items"},
		{name: "the others of that batch", batch: twice, rejected: []delivery.Rejection{{SessionID: "b"}}, want: []delivery.Rejection{{SessionID: "b", Key: "k3"}}},
		{name: "a key that is also the id of a session", batch: messages, rejected: []delivery.Rejection{{SessionID: "k2"}}, refused: "names session k2 and no key, which may mean any of 2 items"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			answer, unknown := inBatch(row.batch, delivery.Answer{Result: delivery.Delivered, StatusCode: 200, Rejected: row.rejected})
			if row.refused != "" {
				g.Expect(answer.Result).To(Equal(delivery.Refused))
				g.Expect(answer.Detail).To(ContainSubstring(row.refused))
			} else {
				g.Expect(answer.Result).To(Equal(delivery.Delivered))
			}
			g.Expect(answer.Rejected).To(Equal(row.want))
			g.Expect(unknown).To(Equal(row.unknown))
		})
	}
}

func TestClean(t *testing.T) {
	g := NewWithT(t)
	g.Expect(clean("\x1b[2J a\u202eb\n\n\tc\xff ", 100)).To(Equal("[2J a b c"))
	g.Expect(clean("héé", 4)).To(Equal("hé"), "cut between characters")
	g.Expect(clean(fmt.Sprint(strings.Repeat("a ", 600)), maxDetail)).To(HaveLen(511))
}

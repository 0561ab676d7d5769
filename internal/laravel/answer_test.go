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

		verdict    delivery.Verdict
		retryAfter time.Duration
		rejected   []delivery.Rejection
		detail     string
	}{
		{name: "200 with an empty body", status: 200, verdict: delivery.Delivered},
		{name: "204", status: 204, verdict: delivery.Delivered},
		{name: "200 with white space", status: 200, body: " \r\n", verdict: delivery.Delivered},
		{name: "200 with an object", status: 200, body: `{"ok":true}`, verdict: delivery.Delivered},
		{name: "200 with a byte order mark and an object", status: 200, body: "\xef\xbb\xbf{}", verdict: delivery.Delivered},
		{name: "202 with rejected items", status: 202, body: `{"rejected":[{"session_id":"a","reason":"no such\u001b[31m tenant"},{"session_id":"","reason":"who"}]}`,
			verdict: delivery.Delivered, rejected: []delivery.Rejection{{SessionID: "a", Reason: "no such [31m tenant"}}},
		{name: "200 with a list of rejected items that is none", status: 200, body: `{"rejected":"none"}`, verdict: delivery.Delivered, detail: "is not a list"},
		{name: "200 with null for rejected items", status: 200, body: `{"rejected":null}`, verdict: delivery.Delivered},
		{name: "200 with HTML", status: 200, body: "<!doctype html><h1>Please log in</h1>", verdict: delivery.Misconfigured, detail: "Please log in"},
		{name: "200 with a list", status: 200, body: `[]`, verdict: delivery.Misconfigured, detail: "JSON object"},
		{name: "200 with null", status: 200, body: `null`, verdict: delivery.Misconfigured},
		{name: "200 with half an object", status: 200, body: `{"ok":`, verdict: delivery.Misconfigured},
		{name: "200 with two objects", status: 200, body: `{}{}`, verdict: delivery.Misconfigured},
		{name: "200 that is too long", status: 200, body: "{}", err: errAnswerTooLong, verdict: delivery.Misconfigured, detail: "longer than 1048576"},
		{name: "200 that breaks off", status: 200, body: `{"rej`, err: io.ErrUnexpectedEOF, verdict: delivery.Retry, detail: "broke off"},
		{name: "302", status: 302, header: header("Location", "https://laravel.example/login?token=hunter2"), verdict: delivery.Misconfigured, detail: "https://laravel.example/login,"},
		{name: "304", status: 304, verdict: delivery.Misconfigured, detail: "somewhere"},
		{name: "400", status: 400, body: "bad", verdict: delivery.Refused, detail: "400 Bad Request: bad"},
		{name: "401", status: 401, verdict: delivery.Misconfigured, detail: "token"},
		{name: "403", status: 403, verdict: delivery.Misconfigured, detail: "token"},
		{name: "404", status: 404, body: "<html>", verdict: delivery.Misconfigured, detail: "no such route"},
		{name: "405", status: 405, verdict: delivery.Misconfigured, detail: "no such route"},
		{name: "408", status: 408, verdict: delivery.Retry},
		{name: "409", status: 409, verdict: delivery.Refused},
		{name: "410", status: 410, verdict: delivery.Misconfigured},
		{name: "413", status: 413, verdict: delivery.TooLarge},
		{name: "419, Laravel's expired page", status: 419, verdict: delivery.Misconfigured},
		{name: "422", status: 422, body: `{"message":"The qr field is required."}`, verdict: delivery.Refused, detail: "The qr field is required."},
		{name: "425", status: 425, verdict: delivery.Retry},
		{name: "429 with seconds", status: 429, header: header("Retry-After", "7"), verdict: delivery.Retry, retryAfter: 7 * time.Second},
		{name: "429 with a date", status: 429, header: header("Retry-After", "Sun, 01 Mar 2026 12:01:30 GMT"), verdict: delivery.Retry, retryAfter: 90 * time.Second},
		{name: "429 with a date that is over", status: 429, header: header("Retry-After", "Sun, 01 Mar 2026 11:01:30 GMT"), verdict: delivery.Retry},
		{name: "503 with a day", status: 503, header: header("Retry-After", "86400"), verdict: delivery.Retry, retryAfter: maxRetryAfter},
		{name: "503 with more seconds than there are", status: 503, header: header("Retry-After", strings.Repeat("9", 40)), verdict: delivery.Retry, retryAfter: maxRetryAfter},
		{name: "503 with a negative number", status: 503, header: header("Retry-After", "-5"), verdict: delivery.Retry},
		{name: "503 with garbage", status: 503, header: header("Retry-After", "soon"), verdict: delivery.Retry},
		{name: "422 with Retry-After", status: 422, header: header("Retry-After", "7"), verdict: delivery.Refused},
		{name: "500", status: 500, body: strings.Repeat("<p>Whoops</p>\n", 1000), verdict: delivery.Retry, detail: "500 Internal Server Error: <p>Whoops</p> <p>"},
		{name: "599", status: 599, verdict: delivery.Retry},
		{name: "600", status: 600, verdict: delivery.Misconfigured},
		{name: "time-out", err: overURL(context.DeadlineExceeded), verdict: delivery.Retry, detail: "no answer in time"},
		{name: "cancelled", err: overURL(context.Canceled), verdict: delivery.Retry, detail: "cancelled"},
		{name: "refused", err: overURL(&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}), verdict: delivery.Retry, detail: "refused"},
		{name: "broken", err: overURL(io.EOF), verdict: delivery.Retry, detail: "broke"},
		{name: "unknown host", err: overURL(&net.DNSError{Name: "laravel.example", IsNotFound: true}), verdict: delivery.Retry, detail: "not known"},
		{name: "anything else", err: overURL(errors.New("proxy http://user:hunter2@proxy")), verdict: delivery.Retry, detail: "the connection failed"},
		{name: "foreign certificate", err: overURL(&tls.CertificateVerificationError{Err: errors.New("unknown authority")}), verdict: delivery.Misconfigured, detail: "unknown authority"},
		{name: "no TLS", err: overURL(http.ErrSchemeMismatch), verdict: delivery.Misconfigured, detail: "does not speak TLS"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			answer := Classify(row.status, row.header, []byte(row.body), row.err, now)
			g.Expect(answer.Verdict).To(Equal(row.verdict))
			g.Expect(answer.RetryAfter).To(Equal(row.retryAfter))
			g.Expect(answer.Rejected).To(Equal(row.rejected))
			g.Expect(answer.StatusCode).To(Equal(row.status))
			g.Expect(answer.Detail).To(ContainSubstring(row.detail))
			g.Expect(answer.Detail).NotTo(ContainSubstring("hunter2"))
			if row.verdict != delivery.Delivered {
				g.Expect(answer.Detail).NotTo(BeEmpty())
			}
			checkAnswer(t, answer)
		})
	}
}

// checkAnswer is what holds for every answer, whatever Laravel says.
func checkAnswer(t *testing.T, answer delivery.Answer) {
	t.Helper()
	texts := []string{answer.Detail}
	for _, r := range answer.Rejected {
		texts = append(texts, r.Reason)
	}
	for _, text := range texts {
		if len(text) > maxDetail+200 || !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
			t.Errorf("not fit for a log: %q", text)
		}
	}
	if answer.RetryAfter < 0 || answer.RetryAfter > maxRetryAfter {
		t.Errorf("Retry-After is %s", answer.RetryAfter)
	}
	switch answer.Verdict {
	case delivery.Delivered, delivery.Retry, delivery.Refused, delivery.TooLarge, delivery.Misconfigured:
	default:
		t.Errorf("no verdict: %q", answer.Verdict)
	}
	if answer.Verdict != delivery.Delivered && answer.Rejected != nil {
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
		if answer.Verdict == delivery.Delivered && (status < 200 || status > 299) {
			t.Errorf("%d is taken for a yes", status)
		}
		trimmed := strings.TrimSpace(strings.TrimPrefix(string(body), "\xef\xbb\xbf"))
		if answer.Verdict == delivery.Delivered && trimmed != "" && !strings.HasPrefix(trimmed, "{") {
			t.Errorf("%q is taken for a yes", body)
		}
	})
}

func TestClean(t *testing.T) {
	g := NewWithT(t)
	g.Expect(clean("\x1b[2J a\u202eb\n\n\tc\xff ", 100)).To(Equal("[2J a b c"))
	g.Expect(clean("héé", 4)).To(Equal("hé"), "cut between characters")
	g.Expect(clean(fmt.Sprint(strings.Repeat("a ", 600)), maxDetail)).To(HaveLen(511))
}

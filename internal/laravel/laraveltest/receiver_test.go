package laraveltest_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// receiver is a receiver with the requests that it has observed.
type receiver struct {
	*laraveltest.Receiver
	t        *testing.T
	observed []laraveltest.Request
}

func start(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{t: t}
	r.Receiver = laraveltest.Start(t, laraveltest.Options{Observe: func(request laraveltest.Request) { r.observed = append(r.observed, request) }})
	return r
}

// post sends a batch as the flusher does; change may make the request invalid.
func (r *receiver) post(path, id string, items any, change func(*http.Request)) int {
	r.t.Helper()
	body, err := json.Marshal(map[string]any{"batch_id": id, "sent_at": delivery.Time{Time: time.Now()}, "items": items})
	NewWithT(r.t).Expect(err).NotTo(HaveOccurred())
	request := httptest.NewRequest(http.MethodPost, path, bytes.NewReader(body))
	request.Header.Set("Authorization", "Bearer "+laraveltest.Token)
	request.Header.Set("Accept", "application/json")
	request.Header.Set("Content-Type", "application/json")
	sign(r.t, request, id, body, time.Now())
	if change != nil {
		change(request)
	}
	w := httptest.NewRecorder()
	r.ServeHTTP(w, request)
	return w.Code
}

func sign(t *testing.T, r *http.Request, id string, body []byte, at time.Time) {
	t.Helper()
	secret, err := laravel.ParseSecret(laraveltest.Secret)
	NewWithT(t).Expect(err).NotTo(HaveOccurred())
	laravel.Sign(r.Header, []laravel.Secret{secret}, id, at, body)
}

func state(session string, status delivery.Status, epoch, seq int64) delivery.StatusItem {
	return delivery.StatusItem{SessionID: session, Status: status, Phase: "Connected", Numbers: delivery.Numbers{Epoch: epoch, Seq: seq}}
}

func TestTheNewestStateOfEachSessionIsKept(t *testing.T) {
	g := NewWithT(t)
	r := start(t)
	g.Expect(r.post(laravel.DefaultStatusPath, "1", []delivery.StatusItem{state("a", delivery.Pending, 1, 1), state("b", delivery.Active, 7, 1)}, nil)).To(Equal(204))
	g.Expect(r.post(laravel.DefaultStatusPath, "2", []delivery.StatusItem{state("a", delivery.Active, 2, 0)}, nil)).To(Equal(204))
	g.Expect(r.Breaches()).To(BeEmpty())
	// These are late: an older epoch with a higher seq, and the same numbers again.
	g.Expect(r.post(laravel.DefaultStatusPath, "3", []delivery.StatusItem{state("a", delivery.Pending, 1, 9), state("b", delivery.Inactive, 7, 1)}, nil)).To(Equal(204))
	g.Expect(r.TakeBreaches()).To(ConsistOf(ContainSubstring("arrived after"), ContainSubstring("sent again in another batch")))
	g.Expect(r.observed[2].Stale).To(Equal(2))

	g.Expect(r.Statuses()).To(HaveLen(2))
	g.Expect(r.Statuses()["a"].Status).To(Equal(delivery.Active))
	g.Expect(r.Status("b").Status).To(Equal(delivery.Active))
	g.Expect(r.Count()).To(Equal(3))
}

func TestABatchIsAcceptedOnce(t *testing.T) {
	g := NewWithT(t)
	r := start(t)
	items := []delivery.QRItem{{SessionID: "a", QR: "code", Numbers: delivery.Numbers{Epoch: 1, Seq: 1}}}
	g.Expect(r.post(laravel.DefaultQRPath, "1", items, nil)).To(Equal(204))
	g.Expect(r.post(laravel.DefaultQRPath, "1", items, nil)).To(Equal(204))
	g.Expect(r.Breaches()).To(BeEmpty())
	g.Expect(r.observed[0].Repeated).To(BeFalse())
	g.Expect(r.observed[1].Repeated).To(BeTrue())
	g.Expect(r.Code("a").QR).To(Equal("code"))
	g.Expect(r.Statuses()).To(BeEmpty(), "a code is not a status")

	items[0].QR = "another code"
	g.Expect(r.post(laravel.DefaultQRPath, "1", items, nil)).To(Equal(204))
	g.Expect(r.TakeBreaches()).To(ConsistOf(ContainSubstring("repeated with other items")))
}

func TestRefusedRequests(t *testing.T) {
	items := []delivery.StatusItem{state("a", delivery.Active, 1, 1)}
	for name, change := range map[string]func(*http.Request){
		"a request without a token":     func(r *http.Request) { r.Header.Del("Authorization") },
		"another token":                 func(r *http.Request) { r.Header.Set("Authorization", "Bearer other") },
		"a request without a signature": func(r *http.Request) { r.Header.Del(laravel.HeaderSignature) },
		"the signature of another id":   func(r *http.Request) { r.Header.Set(laravel.HeaderID, "2") },
		"a signature from yesterday":    func(r *http.Request) { sign(t, r, "1", []byte("{}"), time.Now().Add(-24*time.Hour)) },
		"an answer in HTML may be sent": func(r *http.Request) { r.Header.Set("Accept", "*/*") },
		"the id of another batch": func(r *http.Request) {
			replaceBody(t, r, `{"batch_id":"2","sent_at":"2026-01-01T00:00:00Z","items":[{"session_id":"a"}]}`)
		},
		"a body that is not a batch": func(r *http.Request) { replaceBody(t, r, "[]") },
		"a batch without items": func(r *http.Request) {
			replaceBody(t, r, `{"batch_id":"1","sent_at":"2026-01-01T00:00:00Z","items":[]}`)
		},
		"a batch with an item that is 0": func(r *http.Request) {
			replaceBody(t, r, `{"batch_id":"1","sent_at":"2026-01-01T00:00:00Z","items":[0]}`)
		},
		"a batch with an item without ids": func(r *http.Request) {
			replaceBody(t, r, `{"batch_id":"1","sent_at":"2026-01-01T00:00:00Z","items":[{}]}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			r := start(t)
			g.Expect(r.post(laravel.DefaultStatusPath, "1", items, change)).To(Equal(401))
			g.Expect(r.observed).To(HaveLen(1))
			g.Expect(r.observed[0].Unverified).To(HaveOccurred())
			g.Expect(r.TakeBreaches()).To(HaveLen(1))
			g.Expect(r.Statuses()).To(BeEmpty())
		})
	}
}

// replaceBody gives a request another body, with its signature.
func replaceBody(t *testing.T, r *http.Request, body string) {
	t.Helper()
	r.Body = io.NopCloser(strings.NewReader(body))
	sign(t, r, "1", []byte(body), time.Now())
}

func TestAnythingButABatchIsABreach(t *testing.T) {
	g := NewWithT(t)
	r := start(t)
	g.Expect(r.post("/other", "1", nil, nil)).To(Equal(404))
	g.Expect(r.post(laravel.DefaultStatusPath, "1", nil, func(q *http.Request) { q.Method = http.MethodGet })).To(Equal(404))
	g.Expect(r.TakeBreaches()).To(HaveLen(2))
}

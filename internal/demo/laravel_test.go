package demo

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

const (
	token  = "a-token"
	secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw" // the example of Standard Webhooks
)

// listener is the stand-in under test with the lines that it printed.
type listener struct {
	*standIn
	t       *testing.T
	printed []string
}

func listen(t *testing.T) *listener {
	t.Helper()
	s := &listener{t: t}
	s.standIn = newStandIn(token, key(t), func(line string) { s.printed = append(s.printed, line) })
	return s
}

func key(t *testing.T) laravel.Secret {
	t.Helper()
	k, err := laravel.ParseSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// post sends a batch as the flusher does; change may make the request invalid.
func (s *listener) post(path, id string, items any, change func(*http.Request)) int {
	s.t.Helper()
	body, err := json.Marshal(map[string]any{"batch_id": id, "sent_at": delivery.Time{Time: time.Now()}, "items": items})
	if err != nil {
		s.t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, path, bytes.NewReader(body))
	sign(s.t, r, id, body, time.Now())
	if change != nil {
		change(r)
	}
	w := httptest.NewRecorder()
	s.handler().ServeHTTP(w, r)
	return w.Code
}

func sign(t *testing.T, r *http.Request, id string, body []byte, at time.Time) {
	t.Helper()
	r.Header.Set("Authorization", "Bearer "+token)
	laravel.Sign(r.Header, []laravel.Secret{key(t)}, id, at, body)
}

func state(session string, status delivery.Status, epoch, seq int64) delivery.StatusItem {
	return delivery.StatusItem{SessionID: session, Status: status, Phase: "Connected", Numbers: delivery.Numbers{Epoch: epoch, Seq: seq}}
}

func TestTheStandInKeepsTheNewestStateOfEachSession(t *testing.T) {
	g := NewWithT(t)
	s := listen(t)
	g.Expect(s.post(statusPath, "1", []delivery.StatusItem{state("a", delivery.Pending, 1, 1), state("b", delivery.Active, 7, 1)}, nil)).To(Equal(200))
	g.Expect(s.post(statusPath, "2", []delivery.StatusItem{state("a", delivery.Active, 2, 0)}, nil)).To(Equal(200))
	// These are late: an older epoch with a higher seq, and the same numbers again.
	g.Expect(s.post(statusPath, "3", []delivery.StatusItem{state("a", delivery.Pending, 1, 9), state("b", delivery.Inactive, 7, 1)}, nil)).To(Equal(200))

	got := s.state()
	g.Expect(got.Status["a"].Status).To(Equal(delivery.Active))
	g.Expect(got.Status["b"].Status).To(Equal(delivery.Active))
	g.Expect(got.laravelCounts).To(Equal(laravelCounts{Requests: 3, Items: 5, Stale: 2}))
	g.Expect(s.printed).To(Equal([]string{
		"Laravel ← POST /whatsapp/status/batch  2 in one request: 1 active, 1 pending",
		"Laravel ← POST /whatsapp/status/batch  1 in one request: a is active (Connected)",
		"Laravel ← POST /whatsapp/status/batch  2 in one request: 1 inactive, 1 pending  (2 not newer than what Laravel has)",
	}))
}

func TestTheStandInStoresABatchOnce(t *testing.T) {
	g := NewWithT(t)
	s := listen(t)
	items := []delivery.QRItem{{SessionID: "a", QR: "code", Numbers: delivery.Numbers{Epoch: 1, Seq: 1}}}
	g.Expect(s.post(qrPath, "1", items, nil)).To(Equal(200))
	g.Expect(s.post(qrPath, "1", items, nil)).To(Equal(200))
	g.Expect(s.state().laravelCounts).To(Equal(laravelCounts{Requests: 2, Items: 2, Repeated: 1}))
	g.Expect(s.printed[1]).To(HaveSuffix("a QR code of a  (a repeated batch)"))
	g.Expect(s.state().Status).To(BeEmpty(), "a code is not a state")
}

func TestTheStandInRefuses(t *testing.T) {
	items := []delivery.StatusItem{state("a", delivery.Active, 1, 1)}
	for _, row := range []struct {
		name   string
		change func(*http.Request)
		status int
	}{
		{"a request without a token", func(r *http.Request) { r.Header.Del("Authorization") }, 401},
		{"another token", func(r *http.Request) { r.Header.Set("Authorization", "Bearer other") }, 401},
		{"a request without a signature", func(r *http.Request) { r.Header.Del("webhook-signature") }, 401},
		{"the signature of another id", func(r *http.Request) { r.Header.Set("webhook-id", "2") }, 401},
		{"a signature from yesterday", func(r *http.Request) { sign(t, r, "1", []byte("{}"), time.Now().Add(-24*time.Hour)) }, 401},
		{"a signature of another version", func(r *http.Request) {
			r.Header.Set("webhook-signature", "v2"+r.Header.Get("webhook-signature")[2:])
		}, 401},
		{"a body that is not a batch", func(r *http.Request) {
			*r = *httptest.NewRequest(http.MethodPost, statusPath, bytes.NewReader([]byte("[]"))).WithContext(r.Context())
			sign(t, r, "1", []byte("[]"), time.Now())
		}, 422},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			s := listen(t)
			g.Expect(s.post(statusPath, "1", items, row.change)).To(Equal(row.status))
			g.Expect(s.state().laravelCounts).To(Equal(laravelCounts{Refused: 1}))
			g.Expect(s.state().Status).To(BeEmpty())
		})
	}
}

func TestOneValidSignatureIsEnough(t *testing.T) {
	g := NewWithT(t)
	s := listen(t)
	g.Expect(s.post(statusPath, "1", []delivery.StatusItem{state("a", delivery.Active, 1, 1)}, func(r *http.Request) {
		r.Header.Set("webhook-signature", "v1,AAAA "+r.Header.Get("webhook-signature")+" v1a,BBBB")
	})).To(Equal(200), "while a secret is changed there are two signatures")
}

func TestTheStandInServes(t *testing.T) {
	g := NewWithT(t)
	s := listen(t)
	url, closeServer, err := s.serve()
	g.Expect(err).NotTo(HaveOccurred())
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(url + "/status/Tenant_42.main")
	g.Expect(err).NotTo(HaveOccurred())
	var answer map[string]string
	g.Expect(json.NewDecoder(response.Body).Decode(&answer)).To(Succeed())
	g.Expect(response.Body.Close()).To(Succeed())
	g.Expect(answer).To(Equal(map[string]string{"session_id": "Tenant_42.main", "status": "active"}))
	g.Expect(closeServer()).To(Succeed())
}

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// The old system's paths: one event per request.
const (
	oldQRPath     = "/api/qr"
	oldStatusPath = "/api/status"
)

// request is a request that arrived.
type request struct {
	at    time.Time
	kind  delivery.Kind
	id    string // empty on the old side
	items []key
}

// receiver stands in for Laravel: it answers each request after a delay, and any number of
// requests can run at the same time. PHP has a bounded number of processes, so a real
// Laravel would make many requests of the old side wait. Here the latencies are measured at
// the arrival of a request, so they do not include this.
type receiver struct {
	*laraveltest.Receiver
	answer time.Duration
	token  string
	bytes  atomic.Int64

	mu       sync.Mutex
	requests []request
	faults   []string
}

func newReceiver(c sideConfig, answer time.Duration) (*receiver, error) {
	secret, err := os.ReadFile(c.SecretFile)
	if err != nil {
		return nil, fmt.Errorf("reading the secret: %w", err)
	}
	token, err := os.ReadFile(c.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("reading the token: %w", err)
	}
	r := &receiver{answer: answer, token: string(token)}
	r.Receiver, err = laraveltest.New(laraveltest.Options{
		Token: r.token, Secret: string(secret), AllowResends: true,
		Decide: r.batch, Other: http.HandlerFunc(r.single),
		Listen: func() (net.Listener, error) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			return &countingListener{listener, &r.bytes}, err
		},
	})
	if err != nil {
		return nil, fmt.Errorf("starting the receiver: %w", err)
	}
	return r, nil
}

// wrong returns the faults of the requests.
func (r *receiver) wrong() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append(r.Breaches(), r.faults...)
}

// batch handles a request of our side.
func (r *receiver) batch(incoming laraveltest.Request) laraveltest.Answer {
	got := request{at: incoming.At, kind: incoming.Kind, id: incoming.BatchID}
	for _, item := range incoming.Items {
		got.items = append(got.items, key{got.kind, item.SessionID, item.Numbers})
	}
	r.record(got)
	return laraveltest.Answer{Accept: true, Write: func(w http.ResponseWriter, q *http.Request) { r.reply(w, q, incoming.At) }}
}

// single handles a request of the old side.
func (r *receiver) single(w http.ResponseWriter, incoming *http.Request) {
	got := request{at: time.Now(), kind: delivery.KindStatus}
	if strings.HasPrefix(incoming.URL.Path, oldQRPath) {
		got.kind = delivery.KindQR
	}
	var item struct {
		SessionID string `json:"session_id"`
		delivery.Numbers
	}
	err := json.NewDecoder(incoming.Body).Decode(&item)
	if incoming.Header.Get("Authorization") != "Bearer "+r.token {
		err = errors.New("it has no token")
	}
	if err != nil {
		r.mu.Lock()
		r.faults = append(r.faults, fmt.Sprintf("a request to %s: %v", incoming.URL.Path, err))
		r.mu.Unlock()
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	got.items = []key{{got.kind, item.SessionID, item.Numbers}}
	r.record(got)
	r.reply(w, incoming, got.at)
}

func (r *receiver) record(got request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(r.requests, got)
}

// reply answers with success after the configured time.
func (r *receiver) reply(w http.ResponseWriter, incoming *http.Request, at time.Time) {
	timer := time.NewTimer(r.answer - time.Since(at))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-incoming.Context().Done():
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, "{}")
}

// countingListener counts the bytes that clients send, headers included.
type countingListener struct {
	net.Listener
	bytes *atomic.Int64
}

// Accept implements net.Listener.
func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &countingConn{conn, l.bytes}, nil
}

type countingConn struct {
	net.Conn
	bytes *atomic.Int64
}

// Read implements io.Reader.
func (c *countingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.bytes.Add(int64(n))
	return n, err
}

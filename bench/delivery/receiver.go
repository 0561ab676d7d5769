package main

import (
	"bytes"
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
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

// The old system's paths: one event a request.
const (
	oldQRPath     = "/api/qr"
	oldStatusPath = "/api/status"
)

// request is one that arrived.
type request struct {
	at    time.Time
	kind  delivery.Kind
	id    string // empty: the old system's have none
	items []key
}

// receiver stands in for Laravel: each request takes its time, and any number
// of them run at once. PHP has a bounded number of processes, and so a real
// Laravel makes many requests wait: that would lengthen the old side's
// latencies, which are measured at the arrival here.
type receiver struct {
	answer time.Duration
	secret laravel.Secret
	token  string

	server *http.Server
	url    string
	bytes  atomic.Int64
	failed chan error

	mu       sync.Mutex
	requests []request
	faults   []string
}

func newReceiver(c sideConfig, answer time.Duration) (*receiver, error) {
	text, err := os.ReadFile(c.SecretFile)
	if err != nil {
		return nil, fmt.Errorf("reading the secret: %w", err)
	}
	secret, err := laravel.ParseSecret(string(text))
	if err != nil {
		return nil, fmt.Errorf("reading the secret: %w", err)
	}
	token, err := os.ReadFile(c.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("reading the token: %w", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("opening a port: %w", err)
	}
	r := &receiver{answer: answer, secret: secret, token: string(token), url: "http://" + listener.Addr().String(), failed: make(chan error, 1)}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	go func() { r.failed <- r.server.Serve(&countingListener{listener, &r.bytes}) }()
	return r, nil
}

func (r *receiver) close() error {
	err := r.server.Close()
	if served := <-r.failed; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	if err != nil {
		return fmt.Errorf("closing the receiver: %w", err)
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (r *receiver) ServeHTTP(w http.ResponseWriter, incoming *http.Request) {
	body, err := io.ReadAll(incoming.Body)
	at := time.Now()
	if err != nil {
		return
	}
	got, err := r.read(incoming, body)
	got.at = at
	r.mu.Lock()
	if err != nil {
		r.faults = append(r.faults, err.Error())
	} else {
		r.requests = append(r.requests, got)
	}
	r.mu.Unlock()
	select {
	case <-time.After(r.answer - time.Since(at)):
	case <-incoming.Context().Done():
	}
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	_, _ = io.WriteString(w, "{}")
}

func (r *receiver) read(incoming *http.Request, body []byte) (request, error) {
	if incoming.Header.Get("Authorization") != "Bearer "+r.token {
		return request{}, errors.New("a request has no token")
	}
	got := request{kind: delivery.KindStatus}
	if strings.HasPrefix(incoming.URL.Path, oldQRPath) || incoming.URL.Path == laravel.DefaultQRPath {
		got.kind = delivery.KindQR
	}
	type numbered struct {
		SessionID string `json:"session_id"`
		delivery.Numbers
	}
	var items []numbered
	if strings.HasPrefix(incoming.URL.Path, "/api/") {
		items = make([]numbered, 1)
		if err := json.Unmarshal(body, &items[0]); err != nil {
			return request{}, fmt.Errorf("a request is malformed: %w", err)
		}
	} else {
		if err := laravel.Verify(incoming.Header, []laravel.Secret{r.secret}, time.Now(), laravel.DefaultTolerance, body); err != nil {
			return request{}, fmt.Errorf("a request is not signed: %w", err)
		}
		var envelope struct {
			BatchID string     `json:"batch_id"`
			Items   []numbered `json:"items"`
		}
		if err := json.NewDecoder(bytes.NewReader(body)).Decode(&envelope); err != nil {
			return request{}, fmt.Errorf("a batch is malformed: %w", err)
		}
		got.id, items = envelope.BatchID, envelope.Items
	}
	for _, item := range items {
		got.items = append(got.items, key{got.kind, item.SessionID, item.Numbers})
	}
	return got, nil
}

// countingListener counts what clients send, headers and all.
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

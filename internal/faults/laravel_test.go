//go:build faults

package faults

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

const (
	signingSecret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	bearerToken   = "a-token-for-the-tests"
)

// receiver does what the contract asks of Laravel, and notes every breach of it
// by the sender.
type receiver struct {
	*httptest.Server

	mu       sync.Mutex
	statuses map[string]delivery.StatusItem
	codes    map[string]delivery.QRItem
	batches  map[string]string
	breaches []string
	requests int
}

func newReceiver(t testing.TB) *receiver {
	l := &receiver{statuses: map[string]delivery.StatusItem{}, codes: map[string]delivery.QRItem{}, batches: map[string]string{}}
	l.Server = httptest.NewServer(l)
	t.Cleanup(l.Server.Close)
	return l
}

func (l *receiver) status(sessionID string) delivery.StatusItem {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.statuses[sessionID]
}

// takeBreaches returns what was noted since the last call.
func (l *receiver) takeBreaches() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	breaches := l.breaches
	l.breaches = nil
	return breaches
}

// breach notes one. The caller holds mu.
func (l *receiver) breach(format string, args ...any) {
	l.breaches = append(l.breaches, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (l *receiver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the sender was killed
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests++
	secret, err := laravel.ParseSecret(signingSecret)
	if err != nil {
		l.breach("%v", err)
	}
	// The sender may have been stopped between signing and sending: its age is no breach.
	if err := laravel.Verify(r.Header, []laravel.Secret{secret}, time.Now(), time.Hour, body); err != nil {
		l.breach("%v", err)
	}
	if r.Header.Get("Authorization") != "Bearer "+bearerToken || r.Header.Get("Accept") != "application/json" {
		l.breach("headers: %v", r.Header)
	}
	var envelope struct {
		ID    string            `json:"batch_id"`
		Items []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(body, &envelope); err != nil || envelope.ID == "" || envelope.ID != r.Header.Get(laravel.HeaderID) {
		l.breach("envelope: %s (%v)", body, err)
	}
	items := fmt.Sprintf("%s", envelope.Items)
	if before, known := l.batches[envelope.ID]; known {
		if before != items {
			l.breach("batch %s was repeated with other items", envelope.ID)
		}
		w.WriteHeader(http.StatusNoContent)
		return
	}
	l.batches[envelope.ID] = items
	for _, raw := range envelope.Items {
		l.take(r.URL.Path, raw)
	}
	w.WriteHeader(http.StatusNoContent)
}

// take keeps what is newer. What comes again with the same numbers is no
// breach: a Redis that forgot is told everything once more.
func (l *receiver) take(path string, raw json.RawMessage) {
	switch path {
	case "/qr/batch":
		var item delivery.QRItem
		if err := json.Unmarshal(raw, &item); err != nil {
			l.breach("%v", err)
		}
		last, known := l.codes[item.SessionID]
		switch {
		case !known, item.Newer(last.Numbers):
			l.codes[item.SessionID] = item
		case last.Newer(item.Numbers):
			l.breach("a code of %s came out of order: %s after %s", item.SessionID, item.Numbers, last.Numbers)
		}
	case "/whatsapp/status/batch":
		var item delivery.StatusItem
		if err := json.Unmarshal(raw, &item); err != nil {
			l.breach("%v", err)
		}
		last, known := l.statuses[item.SessionID]
		switch {
		case !known, item.Newer(last.Numbers):
			l.statuses[item.SessionID] = item
		case last.Newer(item.Numbers):
			l.breach("a status of %s came out of order: %s/%s %s after %s/%s %s", item.SessionID,
				item.Status, item.Phase, item.Numbers, last.Status, last.Phase, last.Numbers)
		}
	default:
		l.breach("a request to %s", path)
	}
}

package demo

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

const (
	qrPath     = "/qr/batch"
	statusPath = "/whatsapp/status/batch"
	wantedPath = "/status/{session_id}"
	// maxBody bounds a batch: 50 items of about 2 kB at most.
	maxBody = 4 << 20
)

// standIn replaces the web application. It does what the contract requires: it
// checks token and signature, ignores a batch that it already has and an item that
// is not newer than the stored one, and keeps the last state of each session.
type standIn struct {
	token     string
	secret    laravel.Secret
	printLine func(line string)

	mu       sync.Mutex
	batches  map[string]struct{}
	sessions map[string]*lastState
	counts   laravelCounts
}

// lastState is what Laravel knows of one session.
type lastState struct {
	Status delivery.StatusItem
	QR     delivery.QRItem
}

// laravelCounts count the received requests and items.
type laravelCounts struct {
	// Requests were answered with 2xx; Items are the items in them.
	Requests, Items int64
	// Repeated batches and Stale items were ignored.
	Repeated, Stale int64
	// Refused requests had a wrong token, signature or body.
	Refused int64
}

// laravelState is a copy of what the stand-in knows.
type laravelState struct {
	Status map[string]delivery.StatusItem
	laravelCounts
}

func newStandIn(token string, secret laravel.Secret, printLine func(string)) *standIn {
	return &standIn{token: token, secret: secret, printLine: printLine, batches: map[string]struct{}{}, sessions: map[string]*lastState{}}
}

// serve listens on a free port of the loopback interface.
func (l *standIn) serve() (url string, closeServer func() error, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, fmt.Errorf("listening for the stand-in: %w", err)
	}
	server := &http.Server{Handler: l.handler(), ReadHeaderTimeout: 5 * time.Second}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	return "http://" + listener.Addr().String(), func() error {
		err := server.Close()
		if serving := <-done; !errors.Is(serving, http.ErrServerClosed) {
			err = errors.Join(err, serving)
		}
		return err
	}, nil
}

func (l *standIn) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+qrPath, receive(l, func(known *lastState, item delivery.QRItem) bool {
		if !item.Newer(known.QR.Numbers) {
			return false
		}
		known.QR = item
		return true
	}, describeCodes))
	mux.HandleFunc("POST "+statusPath, receive(l, func(known *lastState, item delivery.StatusItem) bool {
		if !item.Newer(known.Status.Numbers) {
			return false
		}
		known.Status = item
		return true
	}, describeStates))
	mux.HandleFunc("GET "+wantedPath, l.wanted)
	return mux
}

// item is an item of one of the two kinds.
type item interface {
	delivery.QRItem | delivery.StatusItem
}

// receive handles a batch of one kind: keep stores an item if it is newer than the stored
// one, and describe summarizes the batch in a few words.
func receive[T item](l *standIn, keep func(*lastState, T) bool, describe func([]T) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			l.refuse(w, r, http.StatusRequestEntityTooLarge, "the body is too large")
			return
		}
		if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte("Bearer "+l.token)) != 1 {
			l.refuse(w, r, http.StatusUnauthorized, "wrong bearer token")
			return
		}
		if err := laravel.Verify(r.Header, []laravel.Secret{l.secret}, time.Now(), laravel.DefaultTolerance, body); err != nil {
			l.refuse(w, r, http.StatusUnauthorized, "wrong signature")
			return
		}
		var batch struct {
			ID    string `json:"batch_id"`
			Items []T    `json:"items"`
		}
		if err := json.Unmarshal(body, &batch); err != nil || batch.ID == "" {
			l.refuse(w, r, http.StatusUnprocessableEntity, "the body is not a batch")
			return
		}
		stale, repeated := store(l, batch.ID, batch.Items, keep)
		note := ""
		switch {
		case repeated:
			note = "  (a repeated batch)"
		case stale > 0:
			note = fmt.Sprintf("  (%d not newer than what Laravel has)", stale)
		}
		l.printLine(fmt.Sprintf("Laravel ← POST %-22s %2d in one request: %s%s", r.URL.Path, len(batch.Items), describe(batch.Items), note))
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, "{}")
	}
}

// store stores a batch and its items together, as Laravel must do in one transaction.
func store[T item](l *standIn, id string, items []T, keep func(*lastState, T) bool) (stale int, repeated bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts.Requests++
	l.counts.Items += int64(len(items))
	if _, repeated = l.batches[id]; repeated {
		l.counts.Repeated++
		return 0, true
	}
	l.batches[id] = struct{}{}
	for _, i := range items {
		session := sessionOf(i)
		known := l.sessions[session]
		if known == nil {
			known = &lastState{}
			l.sessions[session] = known
		}
		if !keep(known, i) {
			stale++
		}
	}
	l.counts.Stale += int64(stale)
	return stale, false
}

func sessionOf[T item](i T) string {
	switch i := any(i).(type) {
	case delivery.QRItem:
		return i.SessionID
	case delivery.StatusItem:
		return i.SessionID
	}
	return ""
}

func (l *standIn) refuse(w http.ResponseWriter, r *http.Request, status int, why string) {
	l.mu.Lock()
	l.counts.Refused++
	l.mu.Unlock()
	l.printLine(fmt.Sprintf("Laravel ← POST %-22s refused: %s", r.URL.Path, why))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": why})
}

// wanted answers that the tenant wants the session: in the demo this is always so.
func (l *standIn) wanted(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]string{"session_id": r.PathValue("session_id"), "status": string(delivery.Active)})
}

// state returns a copy of what is known.
func (l *standIn) state() laravelState {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := laravelState{Status: make(map[string]delivery.StatusItem, len(l.sessions)), laravelCounts: l.counts}
	for id, known := range l.sessions {
		if known.Status.SessionID != "" {
			s.Status[id] = known.Status
		}
	}
	return s
}

// describeStates summarizes the states of a batch: "2 active, 1 pending".
func describeStates(items []delivery.StatusItem) string {
	counts := map[string]int{}
	for _, i := range items {
		counts[string(i.Status)]++
	}
	if len(items) == 1 {
		return fmt.Sprintf("%s is %s (%s)", items[0].SessionID, items[0].Status, items[0].Phase)
	}
	return list(counts)
}

// describeCodes summarizes the sessions of a batch of codes.
func describeCodes(items []delivery.QRItem) string {
	if len(items) > 1 {
		return fmt.Sprintf("codes of %d sessions", len(items))
	}
	switch i := items[0]; {
	case i.Passkey != nil:
		return "a request for the passkey of " + i.SessionID
	case i.PairingCode != "":
		return "a pairing code of " + i.SessionID
	default:
		return "a QR code of " + i.SessionID
	}
}

// list writes counts as "2 active, 1 pending", in the order of their names.
func list(counts map[string]int) string {
	parts := make([]string, 0, len(counts))
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[name], name))
	}
	return strings.Join(parts, ", ")
}

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
	// maxBody bounds a batch: 50 items of at most some 2 kB.
	maxBody = 4 << 20
)

// standIn replaces the web application. It does what the contract requires: it
// checks token and signature, ignores a batch that it already has and an item that
// is not newer than the stored one, and keeps the last state of each session.
type standIn struct {
	token  string
	secret laravel.Secret
	say    func(line string)

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

// laravelCounts count what came in.
type laravelCounts struct {
	// Requests are all that were answered with 2xx, Items what was in them.
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

func newStandIn(token string, secret laravel.Secret, say func(string)) *standIn {
	return &standIn{token: token, secret: secret, say: say, batches: map[string]struct{}{}, sessions: map[string]*lastState{}}
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

// item is what the two kinds have in common.
type item interface {
	delivery.QRItem | delivery.StatusItem
}

// receive handles a batch of one kind: keep stores an item if it is newer than
// what is known, and describe says in a few words what the batch holds.
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
			l.refuse(w, r, http.StatusUnprocessableEntity, "the body is no batch")
			return
		}
		stale, repeated := take(l, batch.ID, batch.Items, keep)
		note := ""
		switch {
		case repeated:
			note = "  (had it already)"
		case stale > 0:
			note = fmt.Sprintf("  (%d not newer than what Laravel has)", stale)
		}
		l.say(fmt.Sprintf("Laravel ← POST %-22s %2d in one request: %s%s", r.URL.Path, len(batch.Items), describe(batch.Items), note))
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, "{}")
	}
}

// take records a batch and its items together, as Laravel must in one transaction.
func take[T item](l *standIn, id string, items []T, keep func(*lastState, T) bool) (stale int, repeated bool) {
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
	l.say(fmt.Sprintf("Laravel ← POST %-22s refused: %s", r.URL.Path, why))
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

// describeStates says which states a batch holds: "2 active, 1 pending".
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

// describeCodes says which sessions' codes a batch holds.
func describeCodes(items []delivery.QRItem) string {
	if len(items) == 1 {
		return "a QR code of " + items[0].SessionID
	}
	return fmt.Sprintf("QR codes of %d sessions", len(items))
}

// list writes counts as "2 active, 1 pending", in the order of their names.
func list(counts map[string]int) string {
	parts := make([]string, 0, len(counts))
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[name], name))
	}
	return strings.Join(parts, ", ")
}

package benchenv

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

// Laravel is a receiver that does what the contract asks of the application:
// it checks the signature, takes a batch once, and an item only if it is newer.
type Laravel struct {
	url, tokenFile, secretFile string
	token                      string
	secret                     laravel.Secret
	server                     *http.Server
	served                     chan error

	mu       sync.Mutex
	batches  map[string]bool
	statuses map[string]delivery.StatusItem
	faults   []string
}

func newLaravel(dir string) (*Laravel, error) {
	l := &Laravel{
		tokenFile: filepath.Join(dir, "token"), secretFile: filepath.Join(dir, "secret"), token: uuid.NewString(),
		served: make(chan error, 1), batches: map[string]bool{}, statuses: map[string]delivery.StatusItem{},
	}
	secret := uuid.NewString() + uuid.NewString()
	for name, content := range map[string]string{l.tokenFile: l.token, l.secretFile: secret} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			return nil, fmt.Errorf("writing a secret: %w", err)
		}
	}
	var err error
	if l.secret, err = laravel.ParseSecret(secret); err != nil {
		return nil, fmt.Errorf("making a secret: %w", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening in Laravel's place: %w", err)
	}
	l.url = "http://" + listener.Addr().String()
	l.server = &http.Server{Handler: l, ReadHeaderTimeout: time.Minute}
	go func() { l.served <- l.server.Serve(listener) }()
	return l, nil
}

func (l *Laravel) flags() []string {
	return []string{"--laravel-url=" + l.url, "--laravel-token-file=" + l.tokenFile, "--laravel-signing-secret-file=" + l.secretFile}
}

func (l *Laravel) close() error {
	err := l.server.Close()
	if served := <-l.served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	if err != nil {
		return fmt.Errorf("closing the receiver: %w", err)
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (l *Laravel) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if err := l.take(r, body); err != nil {
		l.mu.Lock()
		l.faults = append(l.faults, err.Error())
		l.mu.Unlock()
		w.WriteHeader(http.StatusUnprocessableEntity)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (l *Laravel) take(r *http.Request, body []byte) error {
	if r.Header.Get("Authorization") != "Bearer "+l.token {
		return errors.New("a request has no token")
	}
	if err := laravel.Verify(r.Header, []laravel.Secret{l.secret}, time.Now(), laravel.DefaultTolerance, body); err != nil {
		return fmt.Errorf("a request is not signed: %w", err)
	}
	if r.URL.Path != laravel.DefaultStatusPath {
		return nil // codes, of which nothing is measured here
	}
	var batch struct {
		ID    string                `json:"batch_id"`
		Items []delivery.StatusItem `json:"items"`
	}
	if err := json.Unmarshal(body, &batch); err != nil {
		return fmt.Errorf("a batch is malformed: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.batches[batch.ID] {
		return nil
	}
	l.batches[batch.ID] = true
	for _, item := range batch.Items {
		if known, ok := l.statuses[item.SessionID]; ok && !item.Newer(known.Numbers) {
			l.faults = append(l.faults, "an update of "+item.SessionID+" came after a newer one")
			continue
		}
		l.statuses[item.SessionID] = item
	}
	return nil
}

// Status is what Laravel has heard last of a session.
func (l *Laravel) Status(sessionID string) delivery.StatusItem {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.statuses[sessionID]
}

// Faults are the breaches of the contract that were seen.
func (l *Laravel) Faults() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string{}, l.faults...)
}

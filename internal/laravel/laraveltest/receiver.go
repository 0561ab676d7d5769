// Package laraveltest stands in for the web application that gets the batches. Tests,
// benchmarks and the demo share it.
//
// A Receiver does what the contract asks of the application (docs/laravel.md): it checks
// the token and the signature, accepts a batch once however often it is repeated, and
// ignores an item that is not newer than what it has. A test can give it a function that
// decides how it answers. It records every request, and every breach of the contract by
// the sender: a wrong signature, a batch that is repeated with other items, a session's
// updates out of order, an update that was not accepted and was not sent again. Of messages
// it keeps all, each once by its key.
package laraveltest

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

// Token and Secret are used where Options leave them empty.
const (
	Token  = "a-token-for-the-tests"
	Secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=" //nolint:gosec // of tests only
)

// maxBody bounds what is read of a request: 1,000 items of about 2 kB at most.
const maxBody = 8 << 20

// Request is a request that the receiver got.
type Request struct {
	// N counts the requests, from 1.
	N          int
	At         time.Time
	Method     string
	Path       string
	Proto      string
	Header     http.Header
	Body       []byte
	Kind       delivery.Kind
	BatchID    string
	RawItems   []json.RawMessage
	Items      []Item
	Repeated   bool // the batch was accepted before
	Unverified error
	// Stale counts the items that were ignored, because they are not newer than the stored ones.
	Stale int
}

// Item is an update. Status, QR or Message is set, as Kind says; the others are empty.
type Item struct {
	Kind delivery.Kind
	delivery.Numbers
	SessionID string
	Status    delivery.StatusItem
	QR        delivery.QRItem
	Message   Message
}

// Message is a message with all its fields.
type Message = delivery.MessageItem

// Contains reports whether the request has an item of the session.
func (r Request) Contains(sessionID string) bool {
	return slices.ContainsFunc(r.Items, func(i Item) bool { return i.SessionID == sessionID })
}

// Answer is what the receiver does with a request.
type Answer struct {
	// Accept: the items are accepted before the answer is written, except those of the
	// Rejected sessions, and the messages with the RejectedKeys.
	Accept       bool
	Rejected     []string
	RejectedKeys []string
	// Write writes the answer. Nil: 204.
	Write http.HandlerFunc
}

// Accept accepts the items.
func Accept() Answer { return Answer{Accept: true} }

// AcceptAfter accepts the items and answers after d, or when the request has ended.
func AcceptAfter(d time.Duration) Answer {
	return Answer{Accept: true, Write: func(w http.ResponseWriter, r *http.Request) {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
		}
		w.WriteHeader(http.StatusNoContent)
	}}
}

// AcceptWhen accepts the items and answers when the channel is closed, or when the request has ended.
func AcceptWhen(released <-chan struct{}) Answer {
	return Answer{Accept: true, Write: func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-released:
		case <-r.Context().Done():
		}
		w.WriteHeader(http.StatusNoContent)
	}}
}

// AcceptExcept accepts the items, except those of the given sessions, which it rejects by name.
func AcceptExcept(reason string, sessions ...string) Answer {
	return Answer{Accept: true, Rejected: sessions, Write: func(w http.ResponseWriter, _ *http.Request) {
		list := []delivery.Rejection{}
		for _, session := range sessions {
			list = append(list, delivery.Rejection{SessionID: session, Reason: reason})
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"rejected": list})
	}}
}

// AcceptExceptMessages accepts the items, except the given messages, which it rejects by key.
func AcceptExceptMessages(reason string, messages ...Message) Answer {
	answer := Answer{Accept: true}
	list := []delivery.Rejection{}
	for _, m := range messages {
		list = append(list, delivery.Rejection{SessionID: m.SessionID, Key: m.Key, Reason: reason})
		answer.RejectedKeys = append(answer.RejectedKeys, m.Key)
	}
	answer.Write = func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{"rejected": list})
	}
	return answer
}

// Refuse answers with a status and a body, and accepts nothing.
func Refuse(status int, body string) Answer {
	return Answer{Write: func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}}
}

// AcceptThenDisconnect accepts the items and closes the connection without an answer.
func AcceptThenDisconnect() Answer {
	return Answer{Accept: true, Write: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }}
}

// AcceptThenHang accepts the items and never answers.
func AcceptThenHang() Answer {
	return Answer{Accept: true, Write: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }}
}

// Options of a Receiver. The zero value accepts everything.
type Options struct {
	// Token and Secret are those that the sender uses; empty: the constants.
	Token, Secret string
	// Tolerance is how old a request may be; zero: laravel.DefaultTolerance.
	Tolerance time.Duration
	// Decide chooses the answer to each batch; nil: Accept for all. It may be
	// called from several goroutines at once.
	Decide func(Request) Answer
	// Observe gets each batch after it was accepted or refused; nil: nobody does. It may be
	// called from several goroutines at once.
	Observe func(Request)
	// Other serves the requests that are not batches; nil: such a request is a breach.
	Other http.Handler
	// AllowResends: accepted updates may be sent again, because the test empties Redis.
	AllowResends bool
	// Listen opens the port; nil: a free one of the loopback interface.
	Listen func() (net.Listener, error)
}

// Receiver stands in for the application. Its methods may be called from any goroutine.
type Receiver struct {
	// URL is its base URL.
	URL string

	opts   Options
	secret laravel.Secret
	server *http.Server
	served chan error

	mu          sync.Mutex
	decide      func(Request) Answer
	count       int
	last        Request
	batches     map[string][sha256.Size]byte // id → hash of the items
	accepted    map[string]bool              // ids of batches
	received    map[key]delivery.Numbers
	state       map[key]Item
	acceptedIn  map[key]string       // the batch and the time of state
	notAccepted map[updateKey]string // updates that were received but not accepted yet → their session
	messages    map[string][]Message // session → its accepted messages, in the order in which they came
	keys        map[string]bool      // key of a received message → whether it was accepted
	breaches    []string
	running     map[delivery.Kind]int
	peak        map[delivery.Kind]int
	peakAll     int
}

type key struct {
	kind      delivery.Kind
	sessionID string
}

type updateKey struct {
	key
	delivery.Numbers
	message string // its key
}

// New starts a receiver. Close it when done.
func New(opts Options) (*Receiver, error) {
	if opts.Token == "" {
		opts.Token = Token
	}
	if opts.Secret == "" {
		opts.Secret = Secret
	}
	if opts.Tolerance == 0 {
		opts.Tolerance = laravel.DefaultTolerance
	}
	if opts.Listen == nil {
		opts.Listen = func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }
	}
	secret, err := laravel.ParseSecret(opts.Secret)
	if err != nil {
		return nil, fmt.Errorf("preparing the receiver: %w", err)
	}
	listener, err := opts.Listen()
	if err != nil {
		return nil, fmt.Errorf("opening the receiver's port: %w", err)
	}
	r := &Receiver{
		URL: "http://" + listener.Addr().String(), opts: opts, secret: secret, decide: opts.Decide, served: make(chan error, 1),
		batches: map[string][sha256.Size]byte{}, accepted: map[string]bool{}, received: map[key]delivery.Numbers{}, state: map[key]Item{}, acceptedIn: map[key]string{},
		notAccepted: map[updateKey]string{}, messages: map[string][]Message{}, keys: map[string]bool{}, running: map[delivery.Kind]int{}, peak: map[delivery.Kind]int{},
	}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	go func() { r.served <- r.server.Serve(listener) }()
	return r, nil
}

// T is the part of testing.TB that Start uses. This package does not import testing, because
// the demo is a part of the program.
type T interface {
	Helper()
	Cleanup(func())
	Error(args ...any)
	Fatal(args ...any)
}

// Start starts a receiver that ends with the test.
func Start(t T, opts Options) *Receiver {
	t.Helper()
	r, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// Close stops the receiver and closes its connections.
func (r *Receiver) Close() error {
	err := r.server.Close()
	if served := <-r.served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	r.served <- http.ErrServerClosed // for another call of Close
	if err != nil {
		return fmt.Errorf("closing the receiver: %w", err)
	}
	return nil
}

// Files writes token and secret into a folder and returns the names of the files.
func (r *Receiver) Files(dir string) (token, secret string, err error) {
	token, secret = filepath.Join(dir, "laravel-token"), filepath.Join(dir, "laravel-secret")
	for name, content := range map[string]string{token: r.opts.Token, secret: r.opts.Secret} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			return "", "", fmt.Errorf("writing a secret: %w", err)
		}
	}
	return token, secret, nil
}

// Flags returns the flags with which the program sends to the receiver.
func (r *Receiver) Flags(dir string) ([]string, error) {
	token, secret, err := r.Files(dir)
	return []string{"--laravel-url=" + r.URL, "--laravel-token-file=" + token, "--laravel-signing-secret-file=" + secret}, err
}

// Config returns the configuration with which a client in this process sends to the receiver.
func (r *Receiver) Config(dir string) (laravel.Config, error) {
	token, secret, err := r.Files(dir)
	return laravel.Config{BaseURL: r.URL, TokenFile: token, SigningSecretFiles: []string{secret}}, err
}

// AnswerWith replaces Options.Decide; nil: Accept for all.
func (r *Receiver) AnswerWith(decide func(Request) Answer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.decide = decide
}

// ServeHTTP implements http.Handler.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, incoming *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, incoming.Body, maxBody))
	if err != nil {
		return // the sender has closed the connection
	}
	kind, known := kindOf(incoming.URL.Path)
	if !known && r.opts.Other != nil {
		incoming.Body = io.NopCloser(bytes.NewReader(body))
		r.opts.Other.ServeHTTP(w, incoming)
		return
	}
	request := Request{
		At: time.Now(), Method: incoming.Method, Path: incoming.URL.Path, Proto: incoming.Proto, Header: incoming.Header, Body: body, Kind: kind,
	}
	if !known || incoming.Method != http.MethodPost {
		r.breach("a %s to %s", incoming.Method, incoming.URL.Path)
		w.WriteHeader(http.StatusNotFound)
		return
	}
	request.Unverified = r.verify(incoming.Header, body)
	if err := request.read(); err != nil && request.Unverified == nil {
		request.Unverified = err
	}
	if request.Unverified != nil {
		r.breach("%v", request.Unverified)
	}
	answer := r.handle(&request)
	defer r.ended(kind)
	if r.opts.Observe != nil {
		r.opts.Observe(request)
	}
	if answer.Write == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	answer.Write(w, incoming)
}

// kindOf returns the kind of the batches that go to a path; the base URL may have a path too.
func kindOf(path string) (kind delivery.Kind, known bool) {
	switch {
	case strings.HasSuffix(path, laravel.DefaultQRPath):
		return delivery.KindQR, true
	case strings.HasSuffix(path, laravel.DefaultStatusPath):
		return delivery.KindStatus, true
	case strings.HasSuffix(path, laravel.DefaultMessagePath):
		return delivery.KindMessage, true
	default:
		return "", false
	}
}

func (r *Receiver) verify(header http.Header, body []byte) error {
	if subtle.ConstantTimeCompare([]byte(header.Get("Authorization")), []byte("Bearer "+r.opts.Token)) != 1 {
		return errors.New("a request without the bearer token")
	}
	if err := laravel.Verify(header, []laravel.Secret{r.secret}, time.Now(), r.opts.Tolerance, body); err != nil {
		return err
	}
	if header.Get("Accept") != "application/json" || header.Get("Content-Type") != "application/json" {
		return errors.New("a request that is not JSON or does not accept JSON")
	}
	return nil
}

// read parses the batch.
func (r *Request) read() error {
	var envelope struct {
		ID     string            `json:"batch_id"`
		SentAt *delivery.Time    `json:"sent_at"`
		Items  []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(r.Body, &envelope); err != nil {
		return fmt.Errorf("the body is not a batch: %w", err)
	}
	if envelope.ID == "" || envelope.ID != r.Header.Get(laravel.HeaderID) || envelope.SentAt == nil || len(envelope.Items) == 0 {
		return fmt.Errorf("batch %q has another id in its header, or no time, or no items", envelope.ID)
	}
	r.BatchID, r.RawItems = envelope.ID, envelope.Items
	for _, raw := range envelope.Items {
		item := Item{Kind: r.Kind}
		var err error
		var twice bool
		switch r.Kind {
		case delivery.KindQR:
			err = json.Unmarshal(raw, &item.QR)
			item.SessionID, item.Numbers = item.QR.SessionID, item.QR.Numbers
			twice = r.Contains(item.SessionID)
		case delivery.KindStatus:
			err = json.Unmarshal(raw, &item.Status)
			item.SessionID, item.Numbers = item.Status.SessionID, item.Status.Numbers
			twice = r.Contains(item.SessionID)
		default:
			err = json.Unmarshal(raw, &item.Message)
			item.SessionID, item.Numbers = item.Message.SessionID, item.Message.Numbers
			twice = item.Message.Key == ""
		}
		if err != nil || item.SessionID == "" || twice {
			return fmt.Errorf("batch %s has an item that cannot be read, two states of one session, or a message without a key: %s (%w)", envelope.ID, raw, err)
		}
		r.Items = append(r.Items, item)
	}
	return nil
}

// handle records a request and accepts its items, as the application does in one transaction.
func (r *Receiver) handle(request *Request) Answer {
	r.mu.Lock()
	r.count++
	request.N = r.count
	r.running[request.Kind]++
	r.peak[request.Kind] = max(r.peak[request.Kind], r.running[request.Kind])
	all := 0
	for _, n := range r.running {
		all += n
	}
	r.peakAll = max(r.peakAll, all)
	request.Repeated = r.accepted[request.BatchID]
	r.arrived(*request)
	decide := r.decide
	r.mu.Unlock()

	answer := Accept()
	switch {
	case request.Unverified != nil:
		answer = Refuse(http.StatusUnauthorized, `{"message":"Unauthenticated."}`)
	case decide != nil:
		answer = decide(*request)
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	if answer.Accept {
		r.accept(request, answer)
	}
	r.last = *request
	return answer
}

// arrived checks that a request keeps to the contract. The caller holds mu.
func (r *Receiver) arrived(request Request) {
	if request.Unverified != nil {
		return
	}
	items := sha256.Sum256(fmt.Appendf(nil, "%s", request.RawItems))
	if before, known := r.batches[request.BatchID]; known && before != items {
		r.breachLocked("batch %s is repeated with other items", request.BatchID)
	}
	r.batches[request.BatchID] = items
	for _, item := range request.Items {
		k := key{item.Kind, item.SessionID}
		if item.Kind == delivery.KindMessage {
			r.messageArrived(k, item)
			continue
		}
		if r.received[k].Newer(item.Numbers) {
			r.breachLocked("%s of %s: %s arrived after %s", item.Kind, item.SessionID, item.Numbers, r.received[k])
		}
		r.received[k] = item.Numbers
		if had, known := r.state[k]; known && had.Numbers == item.Numbers && !request.Repeated && !r.opts.AllowResends {
			r.breachLocked("%s of %s: %s was sent again in another batch, %s; it was accepted in %s", item.Kind, item.SessionID, item.Numbers, request.BatchID, r.acceptedIn[k])
		}
		r.notAccepted[updateKey{key: k, Numbers: item.Numbers}] = item.SessionID
	}
}

// messageArrived checks the order of a session's messages. One that came before may come again
// at any time: its batch was halved, or a person replays a dead letter.
func (r *Receiver) messageArrived(k key, item Item) {
	if _, before := r.keys[item.Message.Key]; before {
		return
	}
	if had, any := r.received[k]; any && !item.Newer(had) {
		r.breachLocked("message %s of %s: %s arrived after %s", item.Message.Key, item.SessionID, item.Numbers, had)
	}
	r.received[k] = item.Numbers
	r.keys[item.Message.Key] = false
	r.notAccepted[updateKey{key: k, message: item.Message.Key}] = item.SessionID
}

// replace stores a message in the place of its placeholder; any other message that it has is
// ignored.
func (r *Receiver) replace(request *Request, item Item) {
	stored := r.messages[item.SessionID]
	i := slices.IndexFunc(stored, func(m Message) bool { return m.Key == item.Message.Key })
	if i < 0 || !stored[i].Placeholder() || item.Message.Placeholder() {
		request.Stale++
		return
	}
	stored[i] = item.Message
}

// accept stores the items that are newer than the stored ones. The caller holds mu.
func (r *Receiver) accept(request *Request, answer Answer) {
	for _, item := range request.Items {
		if slices.Contains(answer.Rejected, item.SessionID) || item.Kind == delivery.KindMessage && slices.Contains(answer.RejectedKeys, item.Message.Key) {
			continue
		}
		k := key{item.Kind, item.SessionID}
		if item.Kind == delivery.KindMessage {
			delete(r.notAccepted, updateKey{key: k, message: item.Message.Key})
			if r.keys[item.Message.Key] {
				r.replace(request, item)
				continue
			}
			r.keys[item.Message.Key] = true
			r.messages[item.SessionID] = append(r.messages[item.SessionID], item.Message)
			continue
		}
		delete(r.notAccepted, updateKey{key: k, Numbers: item.Numbers})
		if r.accepted[request.BatchID] {
			continue
		}
		if had, known := r.state[k]; known && !item.Newer(had.Numbers) {
			request.Stale++
			continue
		}
		r.state[k] = item
		r.acceptedIn[k] = request.BatchID + " at " + request.At.Format("15:04:05.000")
	}
	r.accepted[request.BatchID] = true
}

func (r *Receiver) ended(kind delivery.Kind) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running[kind]--
}

func (r *Receiver) breach(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.breachLocked(format, args...)
}

func (r *Receiver) breachLocked(format string, args ...any) {
	r.breaches = append(r.breaches, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// Status is the newest accepted status of a session; zero: none.
func (r *Receiver) Status(sessionID string) delivery.StatusItem {
	return r.newest(delivery.KindStatus, sessionID).Status
}

// Statuses are the newest accepted statuses by session.
func (r *Receiver) Statuses() map[string]delivery.StatusItem {
	r.mu.Lock()
	defer r.mu.Unlock()
	statuses := make(map[string]delivery.StatusItem, len(r.state))
	for k, item := range r.state {
		if k.kind == delivery.KindStatus {
			statuses[k.sessionID] = item.Status
		}
	}
	return statuses
}

// Messages are the accepted messages of a session, in the order in which they came.
func (r *Receiver) Messages(sessionID string) []Message {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.messages[sessionID])
}

// CountMessages is the number of accepted messages of all sessions.
func (r *Receiver) CountMessages() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, messages := range r.messages {
		n += len(messages)
	}
	return n
}

// Code is the newest accepted QR code of a session; zero: none.
func (r *Receiver) Code(sessionID string) delivery.QRItem {
	return r.newest(delivery.KindQR, sessionID).QR
}

func (r *Receiver) newest(kind delivery.Kind, sessionID string) Item {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state[key{kind, sessionID}]
}

// Count is the number of received batches, repetitions included.
func (r *Receiver) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count
}

// Last is the request that was received last; zero: none.
func (r *Receiver) Last() Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// Batches is the number of different batch ids.
func (r *Receiver) Batches() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.batches)
}

// MaxConcurrent is the highest number of requests at the same time: of a kind, or of all ("").
func (r *Receiver) MaxConcurrent(kind delivery.Kind) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if kind == "" {
		return r.peakAll
	}
	return r.peak[kind]
}

// NotAccepted are the sessions of updates that were received, but not accepted at any time.
func (r *Receiver) NotAccepted() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	sessions := slices.Sorted(maps.Values(r.notAccepted))
	return slices.Compact(sessions)
}

// Breaches are the breaches of the contract by the sender.
func (r *Receiver) Breaches() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.breaches)
}

// TakeBreaches returns the breaches since the last call.
func (r *Receiver) TakeBreaches() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	breaches := r.breaches
	r.breaches = nil
	return breaches
}

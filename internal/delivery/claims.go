package delivery

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// What follows is common to the coalescing queue in Redis and the inbox in the database: both
// give out batches by claims, and keep dead letters.

var (
	// ErrClaimLost says that the claim of a batch has ended and another process has
	// claimed it since. Nothing was changed; the other process will finish it.
	ErrClaimLost = errors.New("another process has claimed the batch")
	// ErrDeadLettersFull says that there is no room for another dead letter: the item stays
	// where it waits, and delivery of its kind must stop until a person removes some
	// (docs/architecture.md, "QR and status").
	ErrDeadLettersFull = errors.New("there is no room for another dead letter of this kind")
)

// MinLease is the shortest claim. A request must end 5 s before its claim, so a shorter
// claim would leave no time for it.
const MinLease = 10 * time.Second

// MaxHold bounds how long a batch may be claimed or postponed. Laravel may ask for at
// most 5 minutes; a later time was written before a clock was set back.
const MaxHold = 15 * time.Minute

// Backlog is what waits of one kind. Times are in the caller's clock; zero means
// that there is nothing.
type Backlog struct {
	// Urgent and Normal count the sessions whose item could be claimed now. Of messages,
	// Normal counts those that could be claimed now, up to the size of a full batch.
	Urgent, Normal int
	// Full: what could be claimed now fills a batch by its size in bytes.
	Full bool
	// UrgentSince and NormalSince are when the oldest of each became due.
	UrgentSince, NormalSince time.Time
	// NextDue is when the next item that is not due yet becomes due.
	NextDue time.Time
	// Waiting counts all sessions with an item that is not in flight, due or not.
	Waiting int
	// InFlight counts the sessions with an item in a stored batch.
	InFlight int
	// Unfinished counts the stored batches, claimed or not; Claimable those that
	// are not claimed, so that a process may repeat them now. NextClaimable is when the next
	// of the others may be claimed: its claim ends, or its release was for later.
	Unfinished    int
	Claimable     int
	NextClaimable time.Time
}

// Due counts what could be claimed now, in a new batch.
func (p Backlog) Due() int { return p.Urgent + p.Normal }

// Since is when the oldest of them became due.
func (p Backlog) Since() time.Time {
	if p.UrgentSince.IsZero() || !p.NormalSince.IsZero() && p.NormalSince.Before(p.UrgentSince) {
		return p.NormalSince
	}
	return p.UrgentSince
}

// DeadLetterReason says why an item is a dead letter.
type DeadLetterReason string

const (
	// RefusedAlone: Laravel answered 400, 409 or 422 for the item alone.
	RefusedAlone DeadLetterReason = "Refused"
	// RejectedByName: Laravel accepted the batch and named the item as rejected.
	RejectedByName DeadLetterReason = "Rejected"
	// TooLargeAlone: Laravel answered 413 for the item alone.
	TooLargeAlone DeadLetterReason = "TooLarge"
	// Poison: Laravel answered 5xx for the item alone many times, while it accepted others.
	Poison DeadLetterReason = "Poison"
)

// DeadLetter is an item that Laravel refused for good. It is kept for seven days, and how
// many are kept of a kind is bounded.
type DeadLetter struct {
	// ID is unique in its kind.
	ID   string
	Kind Kind
	// At is when it became a dead letter.
	At        time.Time
	SessionID string
	// Key is that of a message.
	Key string
	Numbers
	BatchID string
	Reason  DeadLetterReason
	// Answer is Laravel's answer.
	Answer  string
	Payload json.RawMessage
}

// ReplayResult is the result of enqueuing the item of a dead letter again.
type ReplayResult int

const (
	// NotFound: there is no such dead letter, or not any more.
	NotFound ReplayResult = 0
	// Replayed: its item waits again, and the dead letter is deleted.
	Replayed ReplayResult = 1
	// Superseded: the queue or Laravel has a newer item of the session. The dead letter is kept.
	Superseded ReplayResult = -3
	// Expired: the QR code has expired. The dead letter is kept.
	Expired ReplayResult = -4
	// Unreadable: the dead letter was written by an older version. It is kept.
	Unreadable ReplayResult = -5
	// OtherNamespace: a session of another namespace has the id now, and would get the
	// message. The dead letter is kept.
	OtherNamespace ReplayResult = -6
)

// maxAnswer bounds how much of Laravel's answer a dead letter keeps.
const maxAnswer = 512

// Text is what a dead letter keeps of the answer: the status and the detail.
func (a Answer) Text() string {
	text := a.Detail
	if a.StatusCode != 0 && !strings.HasPrefix(text, strconv.Itoa(a.StatusCode)) {
		text = strconv.Itoa(a.StatusCode) + " " + text
	}
	return BoundedAnswer(text)
}

// BoundedAnswer is what a dead letter keeps of a text of Laravel.
func BoundedAnswer(text string) string {
	if len(text) > maxAnswer {
		text = text[:maxAnswer]
	}
	return strings.ToValidUTF8(text, "")
}

// Tokens name claims. A claim whose answer was lost may have been executed: the next one uses
// the same token, and gets the batch that the lost one claimed. The zero value is ready.
type Tokens struct {
	mu         sync.Mutex
	unanswered map[Kind][]string
}

// Next returns the token of the next claim of a kind. used: a claim with it had no answer.
func (t *Tokens) Next(kind Kind) (token string, used bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if tokens := t.unanswered[kind]; len(tokens) > 0 {
		t.unanswered[kind] = tokens[1:]
		return tokens[0], true
	}
	return uuid.NewString(), false
}

// Keep keeps the token of a claim that had no answer.
func (t *Tokens) Keep(kind Kind, token string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.unanswered == nil {
		t.unanswered = map[Kind][]string{}
	}
	t.unanswered[kind] = append(t.unanswered[kind], token)
}

// NewBatchID makes a unique id; the ids of one process sort by the time at which they were
// made.
func NewBatchID() string {
	id, err := uuid.NewV7()
	if err != nil { // the system has no source of randomness
		panic(fmt.Errorf("making a batch id: %w", err))
	}
	return "msg_" + id.String()
}

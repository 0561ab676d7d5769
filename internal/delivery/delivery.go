// Package delivery holds the types that the coalescing queue, the flusher and
// the Laravel client share: an update, a batch, and what an answer means for
// it. It is pure: no I/O, and no clock but in the ids of batches.
//
// An update of a session is identified by its Numbers (epoch, seq). The epoch
// is the fencing number of the session's placement, the seq counts the updates
// within it. So it is always known which of two updates of a session is newer,
// even if different processes wrote them.
package delivery

import (
	"encoding/json"
	"fmt"
	"time"
)

// Kind is a kind of update. Each kind has its own queue, and its own path at Laravel.
type Kind string

const (
	// KindQR is for QR codes that wait to be scanned; an expired one is not sent.
	KindQR Kind = "qr"
	// KindStatus is for status changes; they never expire.
	KindStatus Kind = "status"
	// KindMessage is for messages. A newer one does not replace an older one: each is
	// delivered, in the order of its session.
	KindMessage Kind = "message"
)

var (
	// StateKinds are the kinds of which only the newest item of a session counts.
	StateKinds = []Kind{KindQR, KindStatus}
	// Kinds lists every kind.
	Kinds = []Kind{KindQR, KindStatus, KindMessage}
)

// Priority says how soon a status must be delivered to Laravel.
type Priority string

const (
	// High: a connection was lost or is back, or the session is inactive. Delivered within 500 ms.
	High Priority = "high"
	// Normal: everything else. Delivered within 1 s.
	Normal Priority = "normal"
)

// Numbers order the updates of one session.
type Numbers struct {
	// Epoch is the fencing number of the placement under which the update was made.
	Epoch int64 `json:"epoch"`
	// Seq counts the updates within the epoch: starts × 2³² + n.
	Seq int64 `json:"seq"`
}

// Newer reports whether n was made after o.
func (n Numbers) Newer(o Numbers) bool {
	if n.Epoch != o.Epoch {
		return n.Epoch > o.Epoch
	}
	return n.Seq > o.Seq
}

// String is the pair as two zero-padded decimals: Redis scripts compare it
// byte by byte, because Lua's numbers are exact only up to 2⁵³.
func (n Numbers) String() string { return fmt.Sprintf("%019d%019d", n.Epoch, n.Seq) }

// NumbersWidth is the length of Numbers.String.
const NumbersWidth = 38

// FirstSeq is the number before the first update after the start-th time that a holder took
// the device. The manager never takes a device: its start is 0.
func FirstSeq(start int64) int64 { return start << 32 }

// Start says how many times the holder had taken the device; 0 for the manager.
func (n Numbers) Start() int64 { return n.Seq >> 32 }

// StaleError says that Redis refused an update because it has a newer one. Epoch is the
// session's epoch in Redis: updates of the session are accepted again only after a
// placement with a higher epoch.
type StaleError struct{ Epoch int64 }

func (e *StaleError) Error() string {
	return fmt.Sprintf("Redis has a newer update of this session, from epoch %d", e.Epoch)
}

// Stale returns the error for an update with the numbers n that was refused because of
// newest. It returns nil where the refusal is normal: the update arrived after a later one
// of the same author, or it is the manager's and a holder has published under the same epoch.
func (n Numbers) Stale(newest Numbers) error {
	if newest.Epoch > n.Epoch || newest.Epoch == n.Epoch && n.Start() > 0 && newest.Start() > n.Start() {
		return &StaleError{Epoch: newest.Epoch}
	}
	return nil
}

// Item is one session's update, as the queue or the inbox keeps it.
type Item struct {
	SessionID string
	// Key is the identity of a message, the same whenever it is sent; empty for other kinds.
	Key string
	// Placeholder: the message itself may follow, with the same key.
	Placeholder bool
	Numbers
	// Priority decides how long the item may wait. A QR item with High does not wait until
	// the one that Laravel has expires.
	Priority Priority
	// ExpiresAt is when the item becomes useless; zero: never.
	ExpiresAt time.Time
	// Payload is the JSON object that Laravel gets, a QRItem or a StatusItem.
	Payload json.RawMessage
}

// Batch is a claimed set of items, at most one of each session except in the message kind. A
// repeat carries the same ID and exactly the same items.
type Batch struct {
	ID   string
	Kind Kind
	// Items are in the order in which they became due; those of one session are in its order.
	Items []Item
	// Deadline is when the claim ends; a request with it must end 5 s earlier.
	Deadline time.Time
	// Attempt counts the claims of this batch, from 1.
	Attempt int
}

// Result is what an answer means for a batch (docs/architecture.md,
// "Delivery to Laravel").
type Result string

const (
	// Delivered: Laravel has the items, except those it rejected by name.
	Delivered Result = "Delivered"
	// Retry: keep everything and repeat the batch after a backoff.
	Retry Result = "Retry"
	// Refused: an item of the batch is bad; halve the batch until the bad item is alone.
	Refused Result = "Refused"
	// TooLarge: halve the batch.
	TooLarge Result = "TooLarge"
	// Misconfigured: keep everything, stop sending and report it to a person.
	Misconfigured Result = "Misconfigured"
)

// Rejection is an item of a delivered batch that Laravel will never accept.
type Rejection struct {
	SessionID string `json:"session_id"`
	// Key names one of several messages of the session; empty for other kinds.
	Key    string `json:"key,omitempty"`
	Reason string `json:"reason"`
}

// Names reports whether r names the item.
func (r Rejection) Names(item Item) bool { return r.SessionID == item.SessionID && r.Key == item.Key }

// Answer is the outcome of one request.
type Answer struct {
	Result Result
	// RetryAfter is the pause that Laravel asked for, with Retry and Refused; zero: none.
	RetryAfter time.Duration
	// Rejected names items of a Delivered batch that become dead letters.
	Rejected []Rejection
	// StatusCode is the HTTP status; 0: no answer came.
	StatusCode int
	// FromProxy: a TooLarge came from a proxy, not from the application: its body is not a JSON object.
	FromProxy bool
	// TimedOut: the request was sent, but no complete answer arrived within its time-out.
	TimedOut bool
	// Detail is a sentence for people, without secrets and without the body's text beyond 512 bytes.
	Detail string
}

// Time is a time in Laravel's format: RFC 3339 in UTC with milliseconds.
type Time struct{ time.Time }

const timeFormat = "2006-01-02T15:04:05.000Z"

// MarshalJSON writes the time in UTC with milliseconds.
func (t Time) MarshalJSON() ([]byte, error) {
	return []byte(`"` + t.UTC().Format(timeFormat) + `"`), nil
}

// UnmarshalJSON reads any RFC 3339 time.
func (t *Time) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("reading a time: %w", err)
	}
	parsed, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return fmt.Errorf("reading a time: %w", err)
	}
	t.Time = parsed
	return nil
}

// QRItem is what a person needs to link a session: an element of POST /qr/batch, and
// the value of the cache key session:<sid>:qr. It has one of QR, PairingCode and
// Passkey. The numbers come first, because the cache's script reads them at the
// beginning of the text.
type QRItem struct {
	Numbers
	SessionID string `json:"session_id"`
	// QR is the text that the picture shows.
	QR string `json:"qr,omitempty"`
	// PairingCode is typed on the phone.
	PairingCode string `json:"pairing_code,omitempty"`
	// Passkey is what the account's passkey is asked.
	Passkey *Passkey `json:"passkey,omitempty"`
	// Attempt counts the codes of this pairing, from 1.
	Attempt     int32 `json:"attempt"`
	GeneratedAt Time  `json:"generated_at"`
	ExpiresAt   Time  `json:"expires_at"`
	// ReplacesInvalid: WhatsApp does not accept the code before it any more, although that has
	// not expired. So this one does not wait until it has.
	ReplacesInvalid bool `json:"-"`
	// Metadata is the session's spec.metadata.
	Metadata Metadata `json:"metadata,omitempty"`
}

// Passkey is what the passkey of an account is asked while a device is being linked.
type Passkey struct {
	// RequestOptions are the options of navigator.credentials.get, as
	// PublicKeyCredential.parseRequestOptionsFromJSON takes them.
	RequestOptions json.RawMessage `json:"request_options"`
	// ConfirmationCode must be the one that the phone shows; empty: WhatsApp asks for no confirmation.
	ConfirmationCode string `json:"confirmation_code,omitempty"`
}

// Content is the field of q's JSON that a person uses, with its name: two items with the
// same content are the same code.
func (q QRItem) Content() (string, error) {
	var name string
	var value any
	switch {
	case q.Passkey != nil:
		name, value = "passkey", q.Passkey
	case q.PairingCode != "":
		name, value = "pairing_code", q.PairingCode
	default:
		name, value = "qr", q.QR
	}
	text, err := json.Marshal(value)
	if err != nil {
		return "", fmt.Errorf("encoding a QR item: %w", err)
	}
	return `"` + name + `":` + string(text), nil
}

// Item wraps q for the queue.
func (q QRItem) Item() (Item, error) {
	priority := Normal
	if q.ReplacesInvalid {
		priority = High
	}
	payload, err := json.Marshal(q)
	if err != nil {
		return Item{}, fmt.Errorf("encoding a QR item: %w", err)
	}
	return Item{SessionID: q.SessionID, Numbers: q.Numbers, Priority: priority, ExpiresAt: q.ExpiresAt.Time, Payload: payload}, nil
}

// StatusItem is a session's status: an element of POST /whatsapp/status/batch, and
// the value of the cache key session:<sid>:status.
type StatusItem struct {
	Numbers
	SessionID   string   `json:"session_id"`
	Status      Status   `json:"status"`
	Phase       string   `json:"phase"`
	Reason      string   `json:"reason,omitempty"`
	Priority    Priority `json:"priority"`
	JID         string   `json:"jid,omitempty"`
	PhoneNumber string   `json:"phone_number,omitempty"`
	// OccurredAt is when the session got this status.
	OccurredAt Time `json:"occurred_at"`
	// Metadata is the session's spec.metadata.
	Metadata Metadata `json:"metadata,omitempty"`
}

// Item wraps s for the queue.
func (s StatusItem) Item() (Item, error) {
	payload, err := json.Marshal(s)
	if err != nil {
		return Item{}, fmt.Errorf("encoding a status item: %w", err)
	}
	return Item{SessionID: s.SessionID, Numbers: s.Numbers, Priority: s.Priority, Payload: payload}, nil
}

const (
	// CacheTTL is how long the cache keys for a session's status and for the holder of its
	// connection live if they are not written again (docs/architecture.md, "QR and status").
	CacheTTL = 120 * time.Second
	// CacheRefreshInterval is how often a worker writes the keys of its sessions again. Two
	// refreshes in a row may fail: a value written when refresh 0 begins expires after 120 s;
	// refreshes 1 (30 s) and 2 (60 s) fail; refresh 3 begins after 90 s and has ended after
	// 90 s + CacheRefreshTimeout = 105 s. (With 40 s it could end only after 140 s.)
	CacheRefreshInterval = CacheTTL / 4
	// CacheRefreshTimeout bounds one refresh. It is shorter than the interval, so a slow
	// refresh never delays the next one.
	CacheRefreshTimeout = CacheRefreshInterval / 2
)

// Status is what Laravel stores of a session: one of three values.
type Status string

const (
	// Pending: pairing, connecting or reconnecting.
	Pending Status = "pending"
	// Active: connected.
	Active Status = "active"
	// Inactive: a person or Laravel must act.
	Inactive Status = "inactive"
)

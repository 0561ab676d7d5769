package worker

import (
	"context"
	"errors"
	"net/url"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

// Sessions is what the agent and the supervisors need from the API server. No method
// reads a cache. All return in bounded time and are safe for concurrent use.
type Sessions interface {
	// Get reads a session.
	Get(ctx context.Context, key types.NamespacedName) (*v1alpha1.WhatsAppSession, error)
	// HeldNotPlaced lists the sessions whose status.heldBy is the worker and whose
	// status.worker is not.
	HeldNotPlaced(ctx context.Context, worker string) ([]v1alpha1.WhatsAppSession, error)
	// PatchStatus writes status as a merge patch with the resourceVersion of base and
	// returns the written object. If the object has changed since base, the error is a
	// conflict (apierrors.IsConflict).
	PatchStatus(ctx context.Context, base *v1alpha1.WhatsAppSession, status v1alpha1.WhatsAppSessionStatus) (*v1alpha1.WhatsAppSession, error)
}

// Accounts is the store of device keys.
type Accounts interface {
	// Take makes this process the only writer of the session's keys under the epoch.
	// The error is an *EpochBehindError if they were taken under a higher epoch, and
	// ErrNoRecord if the store has no such session.
	Take(ctx context.Context, uid types.UID, epoch int64) (Account, error)
}

// Account is a session whose keys were taken. It is used by one goroutine at a time.
type Account interface {
	// Starts counts the takings of the keys; it is the upper half of every seq.
	Starts() int64
	// JID and PhoneNumber are those of the linked device; empty while there is none.
	JID() string
	PhoneNumber() string
	// Dial reads the device from the store and opens a connection with it. ctx is the
	// context of the whole connection: when it ends, the socket is closed at once. If the
	// store knows a higher epoch, the error is an *EpochBehindError.
	Dial(ctx context.Context, o DialOptions) (Connection, error)
	// Unsettled is how many takings in a row before this one, each by another process, were
	// not settled.
	Unsettled() int32
	// Settle records that the session has not ended this process.
	Settle(ctx context.Context) error
	// Trial is what the previous process recorded before it connected the session, if it died
	// during that trial; 0: it did not.
	Trial() int32
	// RecordTrial records that the session is about to be connected in that trial; 0: the
	// trial is over, and this process is still alive.
	RecordTrial(ctx context.Context, trial int32) error
	// Forget deletes the keys and the record of the session for good.
	Forget(ctx context.Context) error
	// Push stores a message until Laravel has it, behind the session's other ones. It is stored
	// for good when Push returns no error. over names the bound that the session's backlog is
	// over; empty: none. ErrInvalidMessage says that it can never be stored. Push may be called
	// while another method runs.
	Push(ctx context.Context, item delivery.Item) (over string, err error)
}

// Inbox is what the worker asks the database about the messages of its sessions. It is safe for
// concurrent use.
type Inbox interface {
	// Probe writes something. Without an error, messages can be stored.
	Probe(ctx context.Context) error
	// HasRoom reports whether a session that was over that bound (see Account.Push) may be
	// connected again.
	HasRoom(ctx context.Context, sessionID, namespace, bound string) (bool, error)
}

// DialOptions say how to connect.
type DialOptions struct {
	// DeviceName is what the phone shows; empty: the installation's default.
	DeviceName string
	// PairPhone is the phone number, in E.164, on which a person types a pairing code if
	// there is no device yet; empty: QR codes are offered.
	PairPhone string
	// Proxy is the egress; nil: direct.
	Proxy *url.URL
	// Events is called with each event, in order. It must not be called after Close has returned.
	Events func(session.Event)
	// Accept is called with each message, one after another, before it is acknowledged; see
	// whatsapp.Options.
	Accept func(ctx context.Context, item delivery.MessageItem) error
}

// Connection is one login, or one attempt at pairing. Its methods may be called concurrently.
type Connection interface {
	// Paired reports whether the connection logs in a device (true) or offers codes.
	Paired() bool
	// SameAccount asks WhatsApp whether a phone number, in E.164, belongs to the account
	// whose device is connected. Without a clear answer it returns an error.
	SameAccount(ctx context.Context, phone string) (bool, error)
	// AnswerPasskey gives WhatsApp the answer of the account's passkey, and ConfirmPasskey says
	// that a person has compared the codes. The error is a sentence for people.
	AnswerPasskey(ctx context.Context, response string) error
	ConfirmPasskey(ctx context.Context) error
	// Logout unlinks the device at WhatsApp. It succeeds if the device is unlinked already.
	Logout(ctx context.Context) error
	// Close ends the connection and waits, for a few seconds at most, until its socket is closed.
	Close()
}

// EpochBehindError says that the store refused an epoch because it knows a higher one.
type EpochBehindError struct{ Stored int64 }

func (e *EpochBehindError) Error() string { return "the store knows a higher epoch of this session" }

// Proxies finds the proxy of a session.
type Proxies interface {
	// Proxy returns the URL in the session's Secret; nil if the spec names no Secret. A
	// *SetupError says what a person must correct.
	Proxy(ctx context.Context, session *v1alpha1.WhatsAppSession) (*url.URL, error)
}

// ErrNoRecord says that the store has no record of a session: the record was
// deleted, or the manager has not written it yet.
var ErrNoRecord = errors.New("the store has no record of this session")

// SetupError is a mistake in a session's configuration that a person must correct.
// Reason and Message become those of the session's conditions.
type SetupError struct{ Reason, Message string }

func (e *SetupError) Error() string { return e.Message }

// Publisher is what the worker needs from Redis. It is safe for concurrent use. A call
// that is repeated or comes late does no harm, because a publication with lower
// numbers never replaces one with higher numbers.
type Publisher interface {
	// Publish writes the session's cache keys and puts its updates into the queues. A
	// *StaleError says that Redis accepted nothing of the publication, because it has
	// something newer. An earlier publication of the same holder never counts as newer.
	Publish(ctx context.Context, p session.Publication) error
	// Refresh writes the cache keys of many sessions again, in pipelines, before they expire.
	Refresh(ctx context.Context, all []session.Publication) error
}

// StaleError says that Redis refused a publication, because its numbers are not newer
// than those in Redis. Epoch is the epoch in Redis: Redis accepts the session's
// publications again when it is placed with a higher epoch.
type StaleError = delivery.StaleError

// Limiter paces logins and pairings.
type Limiter interface {
	// Wait returns when an attempt may begin, or with ctx's error; an error uses no token.
	Wait(ctx context.Context, login Login) error
	// Free is how many logins by the worker's own address may begin now.
	Free() int
}

// Events records Kubernetes Events of sessions.
type Events interface {
	// Event records an Event; kind is corev1.EventTypeNormal or EventTypeWarning.
	Event(session *v1alpha1.WhatsAppSession, kind, reason, message string)
}

// Membership makes the worker known to the manager by its heartbeats.
type Membership interface {
	// Run joins, and renews the heartbeats until ctx ends. It calls joined once, when the
	// worker may hold sessions, and load at each renewal.
	Run(ctx context.Context, joined func(), load func() (sessions, tokens int)) error
	// Lost is closed when this process must assume that it was declared dead. It must then
	// close all connections, even if the next renewal succeeds.
	Lost() <-chan struct{}
	// Drain marks the Lease at once: the worker takes no more sessions.
	Drain(ctx context.Context) error
	// Leave removes the heartbeats, so that the manager does not wait for their time-out.
	Leave(ctx context.Context) error
}

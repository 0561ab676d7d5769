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

// Sessions is the API server as agent and supervisors need it. All methods are
// uncached and end in bounded time; calls may run concurrently.
type Sessions interface {
	// Get reads a session from the API server itself.
	Get(ctx context.Context, key types.NamespacedName) (*v1alpha1.WhatsAppSession, error)
	// HeldNotPlaced lists the sessions whose heldBy names the worker and whose worker is another, or none.
	HeldNotPlaced(ctx context.Context, worker string) ([]v1alpha1.WhatsAppSession, error)
	// PatchStatus writes status as a merge patch with the resourceVersion of base and
	// returns the object as written. A conflict is an error of that kind.
	PatchStatus(ctx context.Context, base *v1alpha1.WhatsAppSession, status v1alpha1.WhatsAppSessionStatus) (*v1alpha1.WhatsAppSession, error)
}

// Accounts is the store of device keys.
type Accounts interface {
	// Take makes this process the only writer of the session's keys under the epoch.
	// An *EpochBehindError says that a higher epoch has taken them, ErrNoRecord that the
	// store knows no such session.
	Take(ctx context.Context, uid types.UID, epoch int64) (Account, error)
}

// Account is a session whose keys were taken. It is used by one goroutine at a time.
type Account interface {
	// Starts counts the takings of the keys; it is the upper half of every seq.
	Starts() int64
	// JID and PhoneNumber are those of the linked device; empty while there is none.
	JID() string
	PhoneNumber() string
	// Dial reads the device afresh and begins a connection with it. ctx is the
	// connection's life: when it ends, the socket is closed at once. The error of a
	// store that knows a higher epoch is an *EpochBehindError.
	Dial(ctx context.Context, o DialOptions) (Connection, error)
	// Unsettled is how many takings in a row before this one, each by another process,
	// nothing has settled.
	Unsettled() int32
	// Settle says that the session has not ended this process.
	Settle(ctx context.Context) error
	// Trial is the size of the group in which the session was tried when the last process
	// that took it died; 0: it was not being tried.
	Trial() int32
	// RecordTrial records that the session is about to be connected in a group of that
	// size; 0: this process has lived through it.
	RecordTrial(ctx context.Context, size int32) error
	// Forget deletes the keys and the record of the session for good.
	Forget(ctx context.Context) error
}

// DialOptions say how to connect.
type DialOptions struct {
	// DeviceName is what the phone shows; empty: the installation's default.
	DeviceName string
	// PairPhone is the phone, in E.164, on which a code is to be typed if there is no
	// device yet; empty: codes to scan are offered.
	PairPhone string
	// Proxy is the egress; nil: direct.
	Proxy *url.URL
	// Events is called with what happens, in order. It must not be called after Close has returned.
	Events func(session.Event)
}

// Connection is one login, or one attempt at pairing. Its methods may be called concurrently.
type Connection interface {
	// Paired reports whether the connection logs in a device (true) or offers codes.
	Paired() bool
	// SameAccount asks WhatsApp whether a phone number, in E.164, is that of the account
	// whose device is connected. Without a clear answer there is an error.
	SameAccount(ctx context.Context, phone string) (bool, error)
	// Logout unlinks the device at WhatsApp; a device that is unlinked already is a success.
	Logout(ctx context.Context) error
	// Close ends the connection and waits, for a few seconds at most, until its socket is closed.
	Close()
}

// EpochBehindError is the store's refusal of an epoch below the one that it knows.
type EpochBehindError struct{ Stored int64 }

func (e *EpochBehindError) Error() string { return "the store knows a higher epoch of this session" }

// Proxies finds the proxy of a session.
type Proxies interface {
	// Proxy returns the URL in the session's Secret, nil where its spec names none. A
	// *SetupError says what a person must change.
	Proxy(ctx context.Context, session *v1alpha1.WhatsAppSession) (*url.URL, error)
}

// ErrNoRecord says that the store has no record of a session: its keys were
// deleted, or the manager has not written it yet.
var ErrNoRecord = errors.New("the store has no record of this session")

// SetupError is something in a session's setup that a person must correct; it
// becomes the session's reason and message.
type SetupError struct{ Reason, Message string }

func (e *SetupError) Error() string { return e.Message }

// Publisher is Redis as the worker needs it. Calls may run concurrently; a call
// that is repeated, or comes late, does no harm: the numbers decide.
type Publisher interface {
	// Publish writes the session's cache keys and puts its updates into the queues. A
	// *StaleError says that nothing of the publication was taken, because something newer is
	// there already; what was published before by this holder is not newer.
	Publish(ctx context.Context, p session.Publication) error
	// Refresh writes the cache keys of many sessions again, in pipelines, before they expire.
	Refresh(ctx context.Context, all []session.Publication) error
}

// StaleError is Redis's refusal of a publication whose numbers are not newer than
// what it has. Epoch is what it knows of the session: to be heard again, the
// session must be placed above it.
type StaleError = delivery.StaleError

// Limiter paces logins and pairings.
type Limiter interface {
	// Wait returns when an attempt may begin, or with ctx's error; then it has cost nothing.
	Wait(ctx context.Context, login Login) error
	// Free is how many logins may begin at once by the worker's own address.
	Free() int
}

// Events records Events beside the session.
type Events interface {
	// Event records one; kind is corev1.EventTypeNormal or EventTypeWarning.
	Event(session *v1alpha1.WhatsAppSession, kind, reason, message string)
}

// Membership is the worker's place among the workers.
type Membership interface {
	// Run joins, and renews until ctx ends. joined is called once, when the worker may
	// hold sessions. load is asked at each renewal.
	Run(ctx context.Context, joined func(), load func() (sessions, tokens int)) error
	// Lost is closed when this process must assume that it was declared dead: it may hold no
	// connection any more, whatever the next renewal brings.
	Lost() <-chan struct{}
	// Drain publishes at once that the worker takes no more sessions.
	Drain(ctx context.Context) error
	// Leave ends the membership, so that nobody waits for a time-out.
	Leave(ctx context.Context) error
}

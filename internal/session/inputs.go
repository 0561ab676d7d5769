package session

import (
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// Input is something that has happened: one of the types of this file, or an Event.
type Input interface {
	apply(m *Machine, now time.Time)
}

// Step applies an input.
func (m *Machine) Step(in Input, now time.Time) { in.apply(m, now) }

// Observed is the session from the API server. It must not be older than the known
// object.
type Observed struct{ Object *v1alpha1.WhatsAppSession }

func (o Observed) apply(m *Machine, now time.Time) { m.observe(o.Object, now) }

// SameObject replaces the known object by an equal one, so that only one copy stays in
// memory.
type SameObject struct{ Object *v1alpha1.WhatsAppSession }

func (o SameObject) apply(m *Machine, _ time.Time) { m.obj = o.Object }

// Vanished says that the session no longer exists in the API server.
type Vanished struct{}

func (Vanished) apply(m *Machine, _ time.Time) { m.gone = true }

// Drain says that the worker is about to end. It claims nothing any more, and keeps a
// session that it holds until the manager has named another worker.
type Drain struct{}

func (Drain) apply(m *Machine, _ time.Time) { m.draining = true }

// Evict says that the session must be released without waiting for another worker.
type Evict struct{}

func (Evict) apply(m *Machine, _ time.Time) { m.draining, m.evicted = true, true }

// PublishAgain makes the present state be published again, with a new number, after
// Redis lost its data.
type PublishAgain struct{}

func (PublishAgain) apply(m *Machine, _ time.Time) { m.publishAll = true }

// Published says that every publication is in Redis.
type Published struct{}

func (Published) apply(m *Machine, _ time.Time) { m.publishing = false }

// Stale says that Redis refused a publication, because it has something newer of the
// session, with that epoch. It would refuse all further publications of this taking.
type Stale struct{ Epoch int64 }

func (r Stale) apply(m *Machine, now time.Time) {
	if !m.taken || r.Epoch < m.epoch || m.obj.Status.Epoch > r.Epoch { // about an earlier taking, or already placed with a higher epoch
		return
	}
	m.publishAll = true
	m.onEpochBehind(r.Epoch, now)
}

// RetryOutdated makes the session try again if WhatsApp refused its client.
type RetryOutdated struct{}

func (RetryOutdated) apply(m *Machine, now time.Time) { m.retryOutdated(now) }

// ResumeSoon says that a failure that was common to most sessions is over.
type ResumeSoon struct{}

func (ResumeSoon) apply(m *Machine, now time.Time) { m.resumeSoon(now) }

func (e Event) apply(m *Machine, now time.Time) { m.onEvent(e, now) }

// The following inputs are results of operations. Each ends the operation under way.

// TokenResult is the result of OpToken.
type TokenResult struct{ Granted bool }

func (r TokenResult) apply(m *Machine, _ time.Time) {
	m.running = OpNone
	m.token = r.Granted
}

// Device is what the store knows about the session whose keys were taken.
type Device struct {
	// Starts counts the takings of the keys; it is the upper half of every seq.
	Starts int64
	// JID and PhoneNumber are those of the linked device; empty while there is none.
	JID, PhoneNumber string
	// Unsettled is how many takings in a row before this one were not settled.
	Unsettled int32
	// Trial is the trial (Decision.Trial) during which the last process that took the session
	// died; 0: it was not being tried.
	Trial int32
}

// Taken says that the keys were taken under the epoch.
type Taken struct {
	Device
	Epoch int64
}

func (r Taken) apply(m *Machine, now time.Time) {
	m.running = OpNone
	if r.Epoch != m.obj.Status.Epoch || !m.held() {
		return // the session was moved meanwhile: the next taking is under the new epoch
	}
	m.onTaken(r.Device, now)
}

// NoRecord says that the store has no record of the session.
type NoRecord struct{}

func (NoRecord) apply(m *Machine, now time.Time) {
	m.running = OpNone
	if m.logoutWanted() {
		m.forgotten = true
		return
	}
	m.onSetupInvalid(v1alpha1.ReasonRecordMissing,
		"the database has no record of this session, as after a restore of an older backup: its id is claimed again; scan again if the keys were lost", now)
}

// EpochBehind says that the store knows a higher epoch of the session.
type EpochBehind struct{ Stored int64 }

func (r EpochBehind) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onEpochBehind(r.Stored, now)
}

// Failed says that an operation failed for a reason that may pass.
type Failed struct{ Reason, Message string }

func (r Failed) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onFailed(r.Reason, r.Message, now)
}

// SetupInvalid says that an operation failed because of a mistake in the configuration
// that a person must correct.
type SetupInvalid struct{ Reason, Message string }

func (r SetupInvalid) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onSetupInvalid(r.Reason, r.Message, now)
}

// Cancelled says that the operation was cancelled and has changed nothing.
type Cancelled struct{}

func (Cancelled) apply(m *Machine, _ time.Time) { m.running = OpNone }

// Dialed says that a socket is open. Paired: it logs a device in; otherwise it offers
// codes. Cancelled: the cancellation came too late, so the socket must be closed.
type Dialed struct{ Paired, Cancelled bool }

func (r Dialed) apply(m *Machine, now time.Time) {
	m.running = OpNone
	if r.Cancelled {
		m.drop()
		return
	}
	m.onDialed(r.Paired, m.dialing, now)
}

// Closed says that the socket is closed.
type Closed struct{}

func (Closed) apply(m *Machine, _ time.Time) { m.running, m.socket = OpNone, socketNone }

// LogoutResult is the result of OpLogout.
type LogoutResult struct{ Failed bool }

func (r LogoutResult) apply(m *Machine, now time.Time) {
	m.running = OpNone
	switch {
	case m.socket == socketEnded: // the connection's event came first
	case r.Failed:
		m.onLogoutFailed(now)
	default:
		m.onLoggedOut(now)
	}
}

// Verified is WhatsApp's answer to OpVerify.
type Verified struct{ SameAccount bool }

func (r Verified) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onVerified(r.SameAccount, now)
}

// VerifyFailed says that OpVerify got no clear answer.
type VerifyFailed struct{}

func (VerifyFailed) apply(m *Machine, now time.Time) {
	m.running = OpNone
	if m.socket == socketOpen {
		m.backOff(now)
	}
}

// PasskeyAnswered is the result of OpPasskeyAnswer. Why says why WhatsApp did not
// accept the answer; empty: it did.
type PasskeyAnswered struct{ Why string }

func (r PasskeyAnswered) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onPasskeyAnswered(r.Why, now)
}

// PasskeyConfirmed is the result of OpPasskeyConfirm. Why says why WhatsApp did not
// accept the confirmation; empty: it did.
type PasskeyConfirmed struct{ Why string }

func (r PasskeyConfirmed) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onPasskeyConfirmed(r.Why, now)
}

// TrialRecorded is the result of OpTrial.
type TrialRecorded struct{ Failed bool }

func (r TrialRecorded) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onTrialRecorded(r.Failed, now)
}

// Settled is the result of OpSettle.
type Settled struct{ Failed bool }

func (r Settled) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.onSettled(r.Failed, now)
}

// Forgotten says that the keys and the record were deleted.
type Forgotten struct{}

func (Forgotten) apply(m *Machine, _ time.Time) { m.running, m.forgotten = OpNone, true }

// RecordedEvent is a Kubernetes Event to record.
type RecordedEvent struct {
	// Type is corev1.EventTypeNormal or EventTypeWarning.
	Type            string
	Reason, Message string
}

// Warning reports whether a person should act.
func (e RecordedEvent) Warning() bool { return e.Type == corev1.EventTypeWarning }

package session

import (
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// Input is something that has happened. Its types are those of this file, and Event.
type Input interface {
	apply(m *Machine, now time.Time)
}

// Step takes note of an input.
func (m *Machine) Step(in Input, now time.Time) { in.apply(m, now) }

// Observed is the session as the API server has it. An older object than the
// one that is known must not be given.
type Observed struct{ Object *v1alpha1.WhatsAppSession }

func (o Observed) apply(m *Machine, now time.Time) { m.observe(o.Object, now) }

// SameObject replaces the known object by an equal one, so that only one copy is kept.
type SameObject struct{ Object *v1alpha1.WhatsAppSession }

func (o SameObject) apply(m *Machine, _ time.Time) { m.obj = o.Object }

// Vanished says that the API server has the session no more.
type Vanished struct{}

func (Vanished) apply(m *Machine, _ time.Time) { m.gone = true }

// Drain says that the worker is about to end: nothing is claimed any more, and
// what is held waits for its successor.
type Drain struct{}

func (Drain) apply(m *Machine, _ time.Time) { m.draining = true }

// Evict says that the session is given up without waiting for a successor.
type Evict struct{}

func (Evict) apply(m *Machine, _ time.Time) { m.draining, m.evicted = true, true }

// PublishAgain has the present state published again, under a new number: Redis forgot it.
type PublishAgain struct{}

func (PublishAgain) apply(m *Machine, _ time.Time) { m.publishAll = true }

// Published says that everything which was to be published is in Redis.
type Published struct{}

func (Published) apply(m *Machine, _ time.Time) { m.publishing = false }

// Stale says that Redis has refused a publication, because it has something newer
// of the session, of that epoch: nothing of this taking would be heard any more.
type Stale struct{ Epoch int64 }

func (r Stale) apply(m *Machine, now time.Time) {
	if !m.taken || r.Epoch < m.epoch || m.obj.Status.Epoch > r.Epoch { // another taking's, or placed above it already
		return
	}
	m.publishAll = true
	m.behind(r.Epoch, now)
}

// RetryOutdated has the session try again if WhatsApp refused its client.
type RetryOutdated struct{}

func (RetryOutdated) apply(m *Machine, now time.Time) { m.retryOutdated(now) }

// ResumeSoon says that a failure which the session shared with others is over.
type ResumeSoon struct{}

func (ResumeSoon) apply(m *Machine, now time.Time) { m.resumeSoon(now) }

func (e Event) apply(m *Machine, now time.Time) { m.onEvent(e, now) }

// The results of operations. Each ends the operation under way.

// TokenResult is that of OpToken.
type TokenResult struct{ Granted bool }

func (r TokenResult) apply(m *Machine, _ time.Time) {
	m.running = OpNone
	m.token = r.Granted
}

// Device is what the store knows of the device whose keys were taken.
type Device struct {
	// Starts counts the takings of the keys; it is the upper half of every seq.
	Starts int64
	// JID and PhoneNumber are those of the linked device; empty while there is none.
	JID, PhoneNumber string
	// Unsettled is how many takings in a row before this one nothing has settled.
	Unsettled int32
	// Trial is the size of the group in which the session was tried when the last process
	// that took it died; 0: it was not being tried.
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
		return // moved meanwhile: the next taking is under the new epoch
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
	m.refused(v1alpha1.ReasonRecordMissing,
		"the database has no record of this session, as after a restore from an older copy: its id is claimed again; scan again if the keys were lost", now)
}

// EpochBehind says that the store knows a higher epoch of the session.
type EpochBehind struct{ Stored int64 }

func (r EpochBehind) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.behind(r.Stored, now)
}

// Failed says that an operation failed for a reason that may pass.
type Failed struct{ Reason, Message string }

func (r Failed) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.failed(r.Reason, r.Message, now)
}

// SetupInvalid says that an operation failed for something that a person must change.
type SetupInvalid struct{ Reason, Message string }

func (r SetupInvalid) apply(m *Machine, now time.Time) {
	m.running = OpNone
	m.refused(r.Reason, r.Message, now)
}

// Cancelled says that the operation was cancelled and has left nothing behind.
type Cancelled struct{}

func (Cancelled) apply(m *Machine, _ time.Time) { m.running = OpNone }

// Dialed says that a socket is open. Paired: it logs a device in, instead of
// offering codes. Cancelled: too late to stop it, so it is to be closed.
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

// LogoutResult is that of OpLogout.
type LogoutResult struct{ Failed bool }

func (r LogoutResult) apply(m *Machine, now time.Time) {
	m.running = OpNone
	switch {
	case m.socket == socketOver: // the connection's own event came first
	case r.Failed:
		m.failedLogout(now)
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

// VerifyFailed says that WhatsApp did not answer OpVerify, which is no answer.
type VerifyFailed struct{}

func (VerifyFailed) apply(m *Machine, now time.Time) {
	m.running = OpNone
	if m.socket == socketOpen {
		m.backOff(now)
	}
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

// Forgotten says that keys and record are deleted.
type Forgotten struct{}

func (Forgotten) apply(m *Machine, _ time.Time) { m.running, m.forgotten = OpNone, true }

// RecordedEvent is an Event to be recorded beside the session.
type RecordedEvent struct {
	// Type is corev1.EventTypeNormal or EventTypeWarning.
	Type            string
	Reason, Message string
}

// Warning reports whether a person should act.
func (e RecordedEvent) Warning() bool { return e.Type == corev1.EventTypeWarning }

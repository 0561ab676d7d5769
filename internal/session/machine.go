package session

import (
	"cmp"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/backoff"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// The times of a session. docs/architecture.md, "A session's life", has those of the
// backoff.
const (
	backoffFirst = time.Second
	backoffMax   = 2 * time.Minute
	// stableAfter is how long a connection must last for the session to be stable.
	stableAfter = time.Minute
	// replacedPause is how long a session waits after its first replacement by another login.
	replacedPause = 5 * time.Minute
	// firstCode and laterCode are how long WhatsApp accepts the first and each further code
	// (whatsmeow's qrchan.go).
	firstCode = 60 * time.Second
	laterCode = 20 * time.Second
	// loginTimeout is how long a login may take after its socket is open. whatsmeow's
	// handshake alone may take 20 s, and no event comes if the last node is lost.
	loginTimeout = 60 * time.Second
	// pairedTimeout is how long to wait for the 515 that ends a pairing: whatsmeow may lose it.
	pairedTimeout = 15 * time.Second
	// codesTimeout is how long an unpaired connection may take until its first code.
	codesTimeout = 60 * time.Second
	// flushTimeout is how long a release waits for pending publications.
	flushTimeout = time.Second
	// codeRefusedPause is how long WhatsApp is not asked for a pairing code after it refused
	// one: it limits the codes of a number, and also counts refused requests.
	codeRefusedPause = 5 * time.Minute
	// defaultPairingTimeout is spec.pairing.timeout of an object that was created without
	// defaults.
	defaultPairingTimeout = 10 * time.Minute
)

// socket is the state of this process's connection.
type socket string

const (
	socketNone    socket = "none"
	socketPairing socket = "pairing" // open, offers codes
	socketLogin   socket = "login"   // open, the login is under way
	socketOpen    socket = "open"    // logged in
	socketEnded   socket = "ended"   // has ended or was given up, and must be closed
)

// Config is what a new machine needs.
type Config struct {
	// Worker and Process are the names of this worker and this process.
	Worker, Process string
	// Random returns numbers from 0 to 1, for the jitter of pauses.
	Random     func() float64
	Quarantine Quarantine
	// Fleet connects the machine with the other sessions of the worker; nil: there are none.
	Fleet Fleet
	// Pace is that of an earlier machine of the session (Machine.Pace); nil: none.
	Pace *Pace
}

// Fleet is what a machine needs from the other sessions of its worker.
type Fleet interface {
	// Failed records that a session has failed.
	Failed(uid types.UID, now time.Time)
	// Recovered records that a session is stable.
	Recovered(uid types.UID, now time.Time)
	// Common reports whether a failure is common to most sessions at present.
	Common(now time.Time) bool
	// Sessions is how many sessions the worker has.
	Sessions() int
	// Trial reports whether a session that may end its worker may be tried now, in a group
	// of at most that size. See Trials.Begin.
	Trial(uid types.UID, size int32, lasts time.Duration, now time.Time) bool
	// HoldsBack reports whether sessions are held back because WhatsApp refuses this version
	// of the client.
	HoldsBack() bool
}

// noFleet is the Fleet of a session without others.
type noFleet struct{}

func (noFleet) Failed(types.UID, time.Time)                           {}
func (noFleet) Recovered(types.UID, time.Time)                        {}
func (noFleet) Common(time.Time) bool                                 { return false }
func (noFleet) Sessions() int                                         { return 1 }
func (noFleet) Trial(types.UID, int32, time.Duration, time.Time) bool { return true }
func (noFleet) HoldsBack() bool                                       { return false }

// Machine is the state machine of one session in one worker process (see the package's
// documentation). It is not safe for concurrent use.
type Machine struct {
	worker, process string
	// draining: the session is not claimed any more; if it is held, it is released when the
	// manager has named another worker. evicted: it is released without waiting.
	draining, evicted bool
	random            func() float64
	quarantine        Quarantine
	fleet             Fleet
	pace              *Pace
	// restarted: a person has restarted the session since the last Decision.
	restarted bool

	// obj is the newest known object; gone: it no longer exists in the API server.
	obj  *v1alpha1.WhatsAppSession
	gone bool
	// deletionSeen is when this process first saw the deletion; zero: the session is not
	// deleted.
	deletionSeen time.Time

	// hold: this process wants to hold the session. held() is the API server's confirmation.
	hold bool
	// token: the session has a login token.
	token bool
	// releaseBy is until when a release waits for pending publications; zero: no release is
	// under way.
	releaseBy time.Time

	// taken: this process has taken the keys, under epoch.
	taken  bool
	epoch  int64
	starts int64
	// n counts the publications of this taking.
	n int64

	// unsettled is how many takings in a row before this one were not settled. lastTrial is
	// the trial during which the last of those processes died. suspect: the session must be tried. settleAt is when to settle this taking; zero:
	// it is settled, or must not be. settledLast: the settlement before the release was tried.
	unsettled   int32
	lastTrial   int32
	suspect     bool
	settleAt    time.Time
	settledLast bool
	// trialWanted is the trial that OpTrial records (nextTrial), and trial the one that
	// is recorded for this taking; 0: none. trialUntil is when the trial under way ends if
	// this process is still alive; zero: none is under way.
	trialWanted, trial int32
	trialUntil         time.Time

	running Operation
	// paced is the operation that the pace delays.
	paced  Operation
	socket socket
	// dialing is the DialSpec of the dial under way.
	dialing DialSpec
	// dialed is the DialSpec with which the socket was opened.
	dialed DialSpec

	// want is the status to write, except for the fields that only the manager writes.
	want v1alpha1.WhatsAppSessionStatus
	// reason and message explain want.Phase.
	reason, message string

	// retryAt is when to dial again; zero without a socket: only when something else happens.
	retryAt time.Time
	// attempts counts the failures since the last stable connection, for the backoff.
	attempts int
	// assessAt is when to decide whether the session goes into quarantine. No attempt is made
	// before it; zero: there is nothing to decide.
	assessAt time.Time
	// stableAt is when the present connection becomes stable; zero: it is stable, or not
	// logged in yet. stable: it is stable.
	stableAt time.Time
	stable   bool
	// awaits is the reason, EndInboxUnavailable or EndBacklog, for which the session has no
	// connection until InboxReady comes; empty: there is none.
	awaits string
	// watchdog is when a silent socket is given up; zero: never.
	watchdog time.Time
	// verifying is the question that WhatsApp was last asked. same and other are the last
	// questions to which it said yes and no.
	verifying, same, other identity
	// codes are shown next. The code that is shown (or status.pairingCode) expires at
	// codeUntil.
	codes     []string
	code      *delivery.QRItem
	codeUntil time.Time
	codeCount int32
	// codePublished: a code was published since the keys were taken, or one of the holder before
	// may still be in Redis.
	codePublished bool
	// passkey is the request of the account's passkey; passkeyLost: one was lost with the
	// process before.
	passkey     passkey
	passkeyLost bool
	// offers and passkeyRequests count what WhatsApp has offered on this connection, see
	// countOffer, and how often it has asked for the passkey.
	offers, passkeyRequests int
	// pairingFailure is why the last attempt at the present pairing failed; empty: none has.
	pairingFailure string
	// logoutBegun: the first attempt to unlink the device was scheduled.
	logoutBegun bool
	// loggedOut: WhatsApp has confirmed the logout that this process requested.
	loggedOut bool
	// forgotten: the keys and the record were deleted.
	forgotten bool

	// published is the last status published, without its numbers.
	published delivery.StatusItem
	// publishedQR is the last code published.
	publishedQR string
	// publishAll: both must be published again.
	publishAll bool
	// changedAt is when the status last changed for Laravel.
	changedAt time.Time
	// publishing: a publication is under way or pending.
	publishing bool
	// events must be recorded.
	events []RecordedEvent
}

// placed reports whether the session is placed on this worker and has its id.
func (m *Machine) placed() bool {
	return !m.gone && m.obj.Status.Worker == m.worker && m.obj.Status.SessionID != ""
}

// heldHere reports whether this worker is the holder, in this process or an earlier one.
func (m *Machine) heldHere() bool { return !m.gone && m.obj.Status.HeldBy == m.worker }

// held reports whether the API server has confirmed that this process is the holder.
func (m *Machine) held() bool { return m.heldHere() && m.obj.Status.HolderStart == m.process }

// logoutWanted reports whether the session is deleted and its device must be unlinked.
func (m *Machine) logoutWanted() bool {
	return !m.obj.DeletionTimestamp.IsZero() && m.obj.Spec.DeletionPolicy != v1alpha1.DeletionRetain
}

// stays reports whether this worker should hold the session, under the epoch under which
// the keys were taken.
func (m *Machine) stays(now time.Time) bool {
	switch {
	case !m.placed(), m.forgotten, m.taken && m.epoch != m.obj.Status.Epoch:
		return false
	case m.evicted, m.draining && !m.held():
		return false
	case m.want.StoredEpoch >= m.obj.Status.Epoch && m.want.StoredEpoch > 0:
		return false
	case m.logoutWanted() && !now.Before(DeletionDeadline(m.obj, m.deletionSeen)):
		return false
	default:
		return true
	}
}

// observe applies an object, which must not be older than the known one.
func (m *Machine) observe(obj *v1alpha1.WhatsAppSession, now time.Time) {
	wasHeld := m.obj != nil && m.held()
	m.obj, m.gone = obj, false
	switch {
	case obj.DeletionTimestamp.IsZero():
		m.deletionSeen = time.Time{}
	case m.deletionSeen.IsZero():
		m.deletionSeen = now
	}
	if !m.held() {
		if m.taken || wasHeld { // released, or declared lost: it must be claimed again
			m.hold, m.token, m.taken, m.loggedOut = false, false, false, false
			m.releaseBy, m.retryAt, m.assessAt, m.awaits = time.Time{}, time.Time{}, time.Time{}, ""
		}
		if !m.placed() && !m.heldHere() {
			m.hold, m.token = false, false
		}
		m.inherit(now)
		return
	}
	if m.taken && m.epoch == obj.Status.Epoch && obj.DeletionTimestamp.IsZero() {
		m.restart(now)
	}
	switch {
	case !m.logoutWanted():
		m.logoutBegun = false
	case !m.logoutBegun: // the first attempt is made at once; later writes must not shorten the pauses after failures
		m.logoutBegun = true
		m.retryAt = m.logoutFrom(now)
		m.terminating(v1alpha1.ReasonDeleting, unlinking, now)
	}
}

// New returns a machine without an object.
func New(c Config) *Machine {
	fleet := c.Fleet
	if fleet == nil {
		fleet = noFleet{}
	}
	return &Machine{
		worker: c.Worker, process: c.Process, random: c.Random, socket: socketNone,
		quarantine: c.Quarantine.withDefaults(), fleet: fleet, pace: cmp.Or(c.Pace, &Pace{}),
	}
}

// takingMessage is the message while a worker takes the keys of a linked device.
const takingMessage = "the worker is taking the device"

const connectedMessage = "connected to WhatsApp"

// unlinking is the message while a deleted session is logged out.
const unlinking = "the device is being unlinked"

// terminating sets reason and message of a deleted session. Its phase is Terminating,
// whatever fails.
func (m *Machine) terminating(reason, message string, now time.Time) {
	m.phase(v1alpha1.PhaseTerminating, reason, message, now)
}

// stalled reports whether no attempt is made for hours, although the phase usually ends
// without a person.
func (m *Machine) stalled() bool { return m.reason == v1alpha1.ReasonQuarantined }

// inherit computes the status for the claim from the last written status.
func (m *Machine) inherit(now time.Time) {
	m.want = *m.obj.Status.DeepCopy()
	m.want.HideCodes()
	m.passkeyLost = m.passkeyLost || m.obj.Status.Passkey != nil
	m.passkey = passkey{} // its connection is closed at the next step
	m.want = ClampTimes(m.obj, m.want, m.quarantine.Most, now)
	m.attempts = int(m.want.Failures)
	if m.want.StoredEpoch < m.obj.Status.Epoch {
		m.want.StoredEpoch = 0
	}
	switch {
	case m.logoutWanted():
		m.want.Phase, m.reason, m.message = v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, unlinking
	case status.Resting(m.want.Phase):
		m.restoreRest(now)
		m.want = keepRest(m.want)
		m.reason, m.message = status.Reason(m.obj.Status), readyMessage(m.obj.Status)
	case m.restoreRest(now):
	case m.want.JID == "" && !m.pairingOver(now):
		// The status of a new session is written once less. If the store has a device, after
		// a deletion that kept its keys, taking it shows that.
		m.awaitCodes(now)
	default:
		m.want.Phase, m.reason, m.message = v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, takingMessage
	}
	m.want.Conditions = nil // computed at each write
}

func readyMessage(s v1alpha1.WhatsAppSessionStatus) string {
	for _, c := range s.Conditions {
		if c.Type == v1alpha1.ConditionReady {
			return c.Message
		}
	}
	return ""
}

// phase sets the phase, its reason and its message.
func (m *Machine) phase(p v1alpha1.Phase, reason, message string, now time.Time) {
	if m.want.Phase == v1alpha1.PhaseConnected && p != v1alpha1.PhaseConnected {
		m.want.LastDisconnectedTime = at(now)
		m.want.LastDisconnectReason = status.Clean(message, 512)
	}
	m.want.Phase, m.reason, m.message = p, reason, message
}

// restart handles restartedAt.
func (m *Machine) restart(now time.Time) {
	next, result, _ := Restart(m.obj, m.want, now)
	m.want = next
	switch result {
	case RestartNone, RestartWaits:
	case RestartBanned:
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonBanned, RestartBannedMessage(m.want))
	case RestartDone:
		m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonRestarted, "restartedAt changed: the session starts again")
		m.resetFailures()
		m.restarted = true
		m.pace.reset()
		m.codeCount, m.pairingFailure, m.awaits = 0, "", ""
		m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonRestarted, "restartedAt changed", now)
		m.retryAt = now
		if m.socket != socketNone {
			m.drop()
		}
	}
}

// onTaken handles the result of OpTake.
func (m *Machine) onTaken(a Device, now time.Time) {
	m.taken, m.epoch, m.starts, m.n, m.codePublished = true, m.obj.Status.Epoch, a.Starts, 0, a.Starts > 1 && codeMayRemain(m.obj.Status, now)
	m.awaits = ""
	m.setAddress(a.JID, "")
	m.want.PhoneNumber = a.PhoneNumber
	m.retryAt = now
	m.onUnsettled(a.Unsettled, a.Trial, now)
	m.losePasskey(m.passkeyLost && m.want.JID == "")
	m.passkeyLost = false
	switch {
	case m.logoutWanted():
		m.retryAt = m.logoutFrom(now)
	case m.restoreRest(now):
		m.retryAt = m.restUntil()
		m.dialed.PairPhone = m.dialSpec().PairPhone
	case m.want.JID == "":
		if m.pairingOver(now) { // no code was shown while no worker held the session
			m.want.PairingDeadline = nil
		}
		m.awaitCodes(now)
	case m.want.Phase == v1alpha1.PhasePairing: // the store has a device that the status did not show
		m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, takingMessage, now)
	}
	m.restart(now)
	if m.retryAt.IsZero() || now.Before(m.retryAt) { // a token must not be kept for a later attempt
		m.token = false
	}
}

// logoutFrom is when the logout of a deleted session may be tried.
func (m *Machine) logoutFrom(now time.Time) time.Time {
	if m.want.JID != "" && m.want.RetryAfter != nil && (Banned(m.want, now) || endsItsWorker(m.want, now)) {
		return m.want.RetryAfter.Time
	}
	return now
}

// onDialed handles an open socket.
func (m *Machine) onDialed(paired bool, spec DialSpec, now time.Time) {
	m.dialed, m.loggedOut = spec, false
	m.onTrial(now)
	if m.logoutWanted() {
		m.terminating(v1alpha1.ReasonDeleting, unlinking, now)
	}
	switch {
	case paired:
		m.socket, m.watchdog = socketLogin, now.Add(loginTimeout)
	case m.want.JID == "":
		m.socket, m.watchdog = socketPairing, now.Add(codesTimeout)
		m.offers, m.passkeyRequests = 0, 0
	case m.logoutWanted():
		m.onLoggedOut(now)
	default: // WhatsApp unlinked the device while the last connection was being closed
		m.drop()
		endings[EventLoggedOut](m, Event{Message: "WhatsApp has unlinked the device"}, now)
	}
}

// awaitCodes sets the phase until WhatsApp gives the kind of code that the spec asks for.
func (m *Machine) awaitCodes(now time.Time) {
	m.dialed.PairPhone = m.dialSpec().PairPhone
	reason, message := v1alpha1.ReasonWaitingForScan, "waiting for a QR code from WhatsApp"
	if m.dialed.PairPhone != "" {
		reason, message = v1alpha1.ReasonWaitingForCode, "waiting for a pairing code from WhatsApp"
	}
	m.phase(v1alpha1.PhasePairing, reason, message, now)
}

// onCodes ends the rest after a refused code. Earlier failures are reset only when codes
// have been offered for stableAfter, because a server that gives codes and then ends the
// connection is a failure, too.
func (m *Machine) onCodes(now time.Time) {
	if m.want.RetryReason == v1alpha1.ReasonPairingCodeRefused {
		m.want.RetryReason, m.want.RetryAfter = "", nil
	}
	if !m.stable && m.stableAt.IsZero() {
		m.stableAt = now.Add(stableAfter)
	}
}

// beginPairing sets the deadline of the pairing, unless it is set.
func (m *Machine) beginPairing(now time.Time) {
	if m.want.PairingDeadline == nil {
		m.want.PairingDeadline = at(now.Add(pairingTimeout(m.obj)))
	}
}

// pausePairing removes the deadline of a pairing during a rest of hours, in which no codes are
// offered. A device that was scanned keeps it until its first login, see notLinked.
func (m *Machine) pausePairing() {
	if m.want.JID == "" {
		m.want.PairingDeadline = nil
	}
}

// maxFailure bounds the reason of a failed pairing in a longer sentence, in bytes.
const maxFailure = 300

// maxOffers is how often WhatsApp may change on one connection what a person sees: its codes,
// the passkey's request, the code to compare. A person's attempts need some; each is a write
// of the status and of Redis, and an item for Laravel.
const maxOffers = 10

// countOffer counts a change of what a person sees. It returns false if there are too many:
// the connection is given up, and the next one is made after a pause.
func (m *Machine) countOffer(now time.Time) bool {
	m.beginPairing(now) // it expires also where there is never a code
	if m.offers++; m.offers <= maxOffers {
		return true
	}
	m.passkey = passkey{}
	m.drop()
	m.pairingFailure = "WhatsApp changed the codes or the passkey's request more than " + strconv.Itoa(maxOffers) + " times on one connection"
	message := m.pairingFailure + ": the pairing starts again, scan the next code"
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingFailed, message)
	m.onFailed(v1alpha1.ReasonPairingFailed, message, now)
	return false
}

// drop gives the socket up; a rule then closes it.
func (m *Machine) drop() {
	m.socket, m.watchdog, m.stableAt, m.stable = socketEnded, time.Time{}, time.Time{}, false
	m.hideCode()
}

// onFailed handles a failed attempt: it backs off.
func (m *Machine) onFailed(reason, message string, now time.Time) {
	m.backOff(now)
	if m.logoutWanted() {
		m.terminating(v1alpha1.ReasonDeleting, message, now)
		return
	}
	if !m.taken && m.restoreRest(now) { // the rest stays while the store cannot be reached
		return
	}
	p := v1alpha1.PhaseDisconnected
	if m.want.JID == "" {
		p = v1alpha1.PhasePairing
	}
	m.phase(p, reason, message, now)
}

// dialDue reports whether a session without a socket must connect now.
func (m *Machine) dialDue(now time.Time) bool {
	return m.socket == socketNone && m.assessAt.IsZero() && !m.retryAt.IsZero() && !now.Before(m.retryAt)
}

// onLogoutFailed handles a failed logout.
func (m *Machine) onLogoutFailed(now time.Time) {
	m.backOff(now)
	m.message = "the logout failed and is tried again"
	if m.logoutWanted() {
		m.terminating(v1alpha1.ReasonDeleting, m.message, now)
	}
}

// backOff sets the time of the next attempt.
func (m *Machine) backOff(now time.Time) {
	m.attempts++
	pause := backoff.Backoff{First: backoffFirst, Most: backoffMax}.After(m.attempts)
	m.retryAt = now.Add(backoff.FullJitter(pause, m.random()))
}

// onSetupInvalid handles a mistake that a person must correct. The next attempt is made
// after a fixed pause.
func (m *Machine) onSetupInvalid(reason, message string, now time.Time) {
	m.attempts++
	m.retryAt = now.Add(backoffMax / 4)
	if !m.taken && !m.logoutWanted() && m.restoreRest(now) {
		return
	}
	if m.message != message {
		m.recordEvent(corev1.EventTypeWarning, reason, message)
	}
	if m.logoutWanted() {
		m.terminating(reason, message, now)
		return
	}
	m.phase(v1alpha1.PhaseFailed, reason, message, now)
}

// onEpochBehind handles that the store or Redis knows a higher epoch: the session is
// released, so that the manager places it with a higher one.
func (m *Machine) onEpochBehind(stored int64, now time.Time) {
	m.want.StoredEpoch = stored
	m.taken = false
	if m.socket != socketNone {
		m.drop()
	}
	const message = "the database or Redis knows a higher epoch of this session: the manager places it again with a higher one"
	switch {
	case m.logoutWanted():
		m.terminating(v1alpha1.ReasonEpochBehind, message, now)
	case m.restoreRest(now): // the manager needs only storedEpoch
	default:
		m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonEpochBehind, message, now)
	}
}

// setAddress sets the two addresses of the device. An empty lid keeps the known one of the
// same device.
func (m *Machine) setAddress(jid, lid string) {
	if lid != "" || jid != m.want.JID {
		m.want.LID = lid
	}
	m.want.JID = jid
}

// onLoggedOut handles the success of a logout that this process requested.
func (m *Machine) onLoggedOut(now time.Time) {
	m.drop()
	phone := m.want.PhoneNumber
	m.setAddress("", "")
	if m.logoutWanted() {
		m.loggedOut, m.retryAt = true, now
		return
	}
	m.want.PhoneNumber = ""
	m.rest(v1alpha1.ReasonWrongPhone)
	message := status.Phone(phone) + " was linked, but spec.pairing.phoneNumber allows only " + m.obj.Spec.Pairing.PhoneNumber +
		": it has been logged out; change the annotation " + v1alpha1.RestartedAtAnnotation + " and scan with the right phone"
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonWrongPhone, message)
	m.phase(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonWrongPhone, message, now)
}

// rest stops attempts until a person changes restartedAt.
func (m *Machine) rest(reason string) {
	m.resetFailures()
	m.retryAt, m.want.RetryReason = time.Time{}, reason
}

func (m *Machine) recordEvent(kind, reason, message string) {
	m.events = append(m.events, RecordedEvent{kind, reason, message})
}

// showNext shows the next code. It returns false if there is none.
func (m *Machine) showNext(now time.Time) bool {
	if len(m.codes) == 0 {
		m.hideCode()
		return false
	}
	lifetime, first := laterCode, m.code == nil
	if first {
		lifetime = firstCode
	}
	code := m.codes[0]
	m.codes = m.codes[1:]
	m.codeCount++
	m.codeUntil = now.Add(lifetime)
	m.want.QR = &v1alpha1.QRStatus{Code: code, ExpiresAt: metav1.NewTime(m.codeUntil.Truncate(time.Second)), Attempt: m.codeCount}
	m.code = &delivery.QRItem{
		SessionID: m.obj.Status.SessionID, QR: code, Attempt: m.codeCount,
		GeneratedAt: delivery.Time{Time: now}, ExpiresAt: delivery.Time{Time: m.codeUntil},
		ReplacesInvalid: first, // WhatsApp does not accept those of an earlier connection
	}
	return true
}

// replaceCodes shows a code in place of the present one, until that would have expired.
// Laravel gets it with the next batch, because WhatsApp does not accept the one before.
func (m *Machine) replaceCodes(codes []string, now time.Time) {
	shown := len(codes) - len(m.codes) - 1
	if m.code == nil || m.want.QR == nil || shown < 0 || !now.Before(m.codeUntil) {
		return // the time of the codes is over
	}
	m.codes = codes[shown+1:]
	m.codeCount++
	qr, code := *m.want.QR, *m.code
	qr.Code, qr.Attempt = codes[shown], m.codeCount
	code.QR, code.Attempt, code.GeneratedAt, code.ReplacesInvalid = codes[shown], m.codeCount, delivery.Time{Time: now}, true
	m.want.QR, m.code = &qr, &code
	const message = "WhatsApp has replaced the code: a phone that has scanned it must scan the new one, status.qr"
	m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonCodeReplaced, message)
	m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForScan, message, now)
}

func (m *Machine) hideCode() {
	m.losePasskey(!m.passkey.until.IsZero())
	m.codes, m.code, m.codeUntil, m.passkey = nil, nil, time.Time{}, passkey{}
	m.want.HideCodes()
}

// tick does what is due at the time now.
func (m *Machine) tick(now time.Time) {
	if m.stays(now) {
		m.releaseBy, m.settledLast = time.Time{}, false
	}
	m.boundTimes(now)
	if m.held() && m.taken && m.epoch == m.obj.Status.Epoch && m.obj.DeletionTimestamp.IsZero() {
		m.restart(now)
	}
	if !m.stableAt.IsZero() && !now.Before(m.stableAt) {
		m.stableAt, m.stable = time.Time{}, true
		m.resetFailures()
		m.pace.reset()
		m.fleet.Recovered(m.obj.UID, now)
	}
	if !m.assessAt.IsZero() && !now.Before(m.assessAt) {
		m.assess(now)
	}
	if m.socket == socketPairing {
		m.tickPairing(now)
	}
	if !m.watchdog.IsZero() && !now.Before(m.watchdog) {
		m.onEnded(Event{Type: EventDisconnected, Reason: EndSilent, Message: "WhatsApp accepted the connection but did not answer in time"}, now)
	}
	if m.taken && m.want.Phase == v1alpha1.PhasePairing && m.socket == socketNone && m.pairingOver(now) {
		m.expirePairing(now)
	}
}

func (m *Machine) tickPairing(now time.Time) {
	switch {
	case m.want.JID != "": // a phone has scanned a code; WhatsApp ends the connection soon
	case !m.passkey.until.IsZero():
		m.tickPasskey(now)
	case m.pairingOver(now) && !m.logoutWanted():
		m.drop()
		m.expirePairing(now)
	case m.code != nil && !now.Before(m.codeUntil) && !m.showNext(now):
		// The connection has no more codes. The next one has new ones.
		m.drop()
		m.retryAt = now
	}
}

func (m *Machine) pairingOver(now time.Time) bool {
	return m.want.PairingDeadline != nil && !now.Before(m.want.PairingDeadline.Time)
}

func (m *Machine) expirePairing(now time.Time) {
	if m.logoutWanted() {
		return
	}
	m.hideCode()
	m.rest(v1alpha1.ReasonPairingExpired)
	failure := m.pairingFailure
	if failure != "" {
		failure = " (the last attempt: " + strings.TrimSpace(status.Clean(failure, maxFailure)) + ")" // shortened: what follows says what to do
	}
	m.pairingFailure = ""
	message := "no phone was linked within " + pairingTimeout(m.obj).String() + failure + ": change the annotation " + v1alpha1.RestartedAtAnnotation + " to offer codes again"
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingExpired, message)
	m.phase(v1alpha1.PhasePairingExpired, v1alpha1.ReasonPairingExpired, message, now)
}

// wakeTimes returns the times at which tick or decide may do something. Some may be zero
// or in the past.
func (m *Machine) wakeTimes(now time.Time) []time.Time {
	if m.gone {
		return nil
	}
	times := []time.Time{m.releaseBy, m.settleAt, m.trialUntil, m.retryAt, m.assessAt, m.stableAt, m.watchdog, m.codeUntil, m.passkey.until}
	if m.want.PairingDeadline != nil && m.want.Phase == v1alpha1.PhasePairing {
		times = append(times, m.want.PairingDeadline.Time)
	}
	if restartWanted(m.obj, m.want) {
		times = append(times, restartFrom(m.want, now))
	}
	if m.logoutWanted() {
		times = append(times, DeletionDeadline(m.obj, m.deletionSeen))
	}
	return times
}

// explainHoldBack says why a session that must connect is held back.
func (m *Machine) explainHoldBack(now time.Time) {
	switch m.want.Phase {
	case v1alpha1.PhaseConnecting, v1alpha1.PhaseDisconnected, v1alpha1.PhasePairing:
		m.phase(m.want.Phase, v1alpha1.ReasonOutdated,
			"WhatsApp refuses this version of the client: one session tries the newest version, and the others connect when WhatsApp accepts it", now)
	}
}

func (m *Machine) retryOutdated(now time.Time) {
	if m.taken && m.want.Phase == v1alpha1.PhaseOutdated && m.retryAt.IsZero() {
		m.retryAt = now
	}
}

func at(t time.Time) *metav1.Time {
	stamp := metav1.NewTime(t.Truncate(time.Second))
	return &stamp
}

// dialSpec returns the parts of the present spec that a connection depends on.
func (m *Machine) dialSpec() DialSpec {
	d := DialSpec{DeviceName: m.obj.Spec.DeviceName}
	if m.obj.Spec.Proxy != nil {
		d.ProxySecret = m.obj.Spec.Proxy.SecretRef.Name
	}
	if m.obj.Spec.Pairing.Method == v1alpha1.PairingPhoneCode {
		d.PairPhone = m.obj.Spec.Pairing.PhoneNumber
	}
	return d
}

// endings handles the events that end a connection (docs/architecture.md, "A session's
// life").
var endings = map[EventType]func(m *Machine, e Event, now time.Time){
	EventDisconnected: func(m *Machine, e Event, now time.Time) {
		reason := v1alpha1.ReasonReconnecting
		if m.reason == v1alpha1.ReasonPairingFailed { // the connection ends because the pairing was refused
			reason = m.reason
		}
		m.onFailed(reason, e.Message, now)
	},
	EventCodeRefused: func(m *Machine, e Event, now time.Time) {
		m.beginPairing(now) // the pairing expires also if there is never a code
		m.resetFailures()
		m.pairingFailure = e.Message
		m.want.RetryAfter, m.want.RetryReason = at(now.Add(codeRefusedPause)), v1alpha1.ReasonPairingCodeRefused
		m.retryAt = m.want.RetryAfter.Time
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingCodeRefused, e.Message)
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPairingCodeRefused, e.Message, now)
	},
	EventLoggedOut: func(m *Machine, e Event, now time.Time) {
		if m.want.JID == "" {
			m.beginPairing(now) // it expires also where there is never a code
		}
		m.setAddress("", "")
		if m.want.PairingDeadline != nil {
			m.notLinked(e.Message, now)
			return
		}
		m.rest(v1alpha1.ReasonLoggedOut)
		message := e.Message + ": change the annotation " + v1alpha1.RestartedAtAnnotation + " and scan again"
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonLoggedOut, message)
		m.phase(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, message, now)
	},
	EventReplaced: func(m *Machine, _ Event, now time.Time) { m.onReplaced(now) },
	EventBanned: func(m *Machine, e Event, now time.Time) {
		message := m.onBanned(e, now)
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonBanned, message)
		m.phase(v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, message, now)
	},
	EventOutdated: func(m *Machine, _ Event, now time.Time) {
		m.pausePairing()
		m.retryAt = time.Time{}
		message := "WhatsApp refuses this version of the client: upgrade the operator's image"
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonOutdated, message)
		m.phase(v1alpha1.PhaseOutdated, v1alpha1.ReasonOutdated, message, now)
	},
}

// notLinked handles that WhatsApp refuses a connection that offers codes, or does not know a
// device at its first login: the library stores the device before it answers the scan
// (whatsmeow's pair.go, handlePair), so WhatsApp does not get the answer if the connection or
// the process ends between the two. The pairing continues until its deadline.
func (m *Machine) notLinked(why string, now time.Time) {
	m.want.PhoneNumber = ""
	m.pairingFailure = "WhatsApp did not link the device (" + why + ")"
	message := m.pairingFailure + ": scan the next code"
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingFailed, message)
	m.onFailed(v1alpha1.ReasonPairingFailed, message, now)
}

// onEvent handles an event of the present connection.
func (m *Machine) onEvent(e Event, now time.Time) {
	if m.socket == socketNone || m.socket == socketEnded {
		return
	}
	switch e.Type {
	case EventQR:
		if m.want.JID != "" || !m.countOffer(now) {
			return
		}
		m.hideCode()
		m.codes, m.watchdog = e.Codes, time.Time{}
		m.beginPairing(now)
		if m.showNext(now) {
			m.onCodes(now)
			m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForScan, "scan status.qr with the phone: Linked devices, Link a device", now)
		}
	case EventCodesReplaced:
		if m.want.JID == "" && m.countOffer(now) {
			m.replaceCodes(e.Codes, now)
		}
	case EventPairingCode:
		if m.want.JID != "" {
			return
		}
		m.beginPairing(now)
		m.watchdog = time.Time{}
		m.onCodes(now)
		m.hideCode()
		m.want.PairingCode, m.codeUntil = e.Code, e.Until
		m.codeCount++
		m.code = &delivery.QRItem{
			SessionID: m.obj.Status.SessionID, PairingCode: e.Code, Attempt: m.codeCount, ReplacesInvalid: true,
			GeneratedAt: delivery.Time{Time: now}, ExpiresAt: delivery.Time{Time: e.Until},
		}
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForCode,
			"type status.pairingCode on the phone "+m.dialed.PairPhone+": Linked devices, Link a device, Link with phone number instead", now)
	case EventPairSuccess:
		if m.socket != socketPairing { // a linked device is not linked to another account
			return
		}
		m.passkey = passkey{} // it was answered
		m.hideCode()
		m.setAddress(e.JID, e.LID)
		m.want.PhoneNumber = e.PhoneNumber
		// The deadline stays until the first login, see notLinked.
		m.codeCount, m.pairingFailure = 0, ""
		m.watchdog = now.Add(pairedTimeout)
		m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonPaired, status.Phone(e.PhoneNumber)+" linked the device", now)
		m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonPaired, status.Phone(e.PhoneNumber)+" linked the device")
	case EventPasskeyRequest:
		m.onPasskeyRequest(e, now)
	case EventPasskeyConfirmation:
		m.onPasskeyConfirmation(e, now)
	case EventPasskeyFailed:
		m.onPasskeyFailed(e, now)
	case EventPairError:
		if m.want.JID != "" || !m.countOffer(now) {
			return
		}
		m.pairingFailure = e.Message
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingFailed, e.Message)
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPairingFailed, e.Message, now)
	case EventConnected:
		if m.socket == socketLogin { // a connection that offers codes logs nothing in, and one login is enough
			m.onConnected(e, now)
		}
	case EventPushName:
		m.want.PushName = e.PushName
	case EventDisconnected, EventCodeRefused, EventLoggedOut, EventReplaced, EventBanned, EventOutdated:
		m.onEnded(e, now)
	}
}

// onConnected handles a successful login.
func (m *Machine) onConnected(e Event, now time.Time) {
	m.socket, m.watchdog = socketOpen, time.Time{}
	m.setAddress(e.JID, e.LID)
	m.want.PhoneNumber = e.PhoneNumber
	if e.PushName != "" {
		m.want.PushName = e.PushName
	}
	if m.want.LastConnectedTime != nil {
		m.want.Reconnects++
	} else {
		m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonConnected, "connected as "+cmp.Or(e.PhoneNumber, e.JID))
	}
	m.want.LastConnectedTime = at(now)
	m.want.PairingDeadline = nil
	m.stableAt = now.Add(stableAfter)
	switch {
	case m.logoutWanted(), m.wrongPhone():
	case m.unverified():
		m.awaitVerification(now)
	default:
		m.phase(v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, connectedMessage, now)
	}
}

// onEnded handles the end of the present connection.
func (m *Machine) onEnded(e Event, now time.Time) {
	scanned := m.socket == socketPairing && m.want.JID != ""
	lasted := m.stable
	m.drop()
	switch {
	case e.Type == EventLoggedOut && (m.logoutWanted() || m.running == OpLogout):
		m.onLoggedOut(now)
	case e.Type == EventDisconnected && scanned:
		m.retryAt = now // WhatsApp ends the connection with 515 after the scan; the device logs in on a new one
	case m.logoutWanted() && e.Type == EventBanned:
		m.message = m.onBanned(e, now)
	case m.logoutWanted():
		m.onFailed(v1alpha1.ReasonDeleting, e.Message, now)
	case e.Type == EventDisconnected && (e.Reason == EndInboxUnavailable || e.Reason == EndBacklog):
		m.awaitInbox(e, now)
	case e.Type == EventDisconnected && e.Reason == EndStoreFailed:
		// Its own attempts would only make the pauses longer while the database is away.
		m.awaits = EndInboxUnavailable
		endings[e.Type](m, e, now)
	case e.Type == EventDisconnected && !lasted && !e.Ours:
		if m.countFailure(e, now) {
			m.enterQuarantine(now)
			return
		}
		endings[e.Type](m, e, now)
		m.slowDown(now)
	default:
		endings[e.Type](m, e, now)
	}
}

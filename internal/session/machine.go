package session

import (
	"cmp"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// The times of a session's life. docs/architecture.md, "A session's life" has those of the backoff.
const (
	backoffFirst = time.Second
	backoffMost  = 2 * time.Minute
	// stableAfter is how long a connection must last to count as a success.
	stableAfter = time.Minute
	// replacedPause is how long a displaced session leaves the field to the other login.
	replacedPause = 5 * time.Minute
	// firstCode and laterCode are how long WhatsApp accepts a code (whatsmeow's qrchan.go).
	firstCode = 60 * time.Second
	laterCode = 20 * time.Second
	// loginTimeout is how long a login may take from its socket on: whatsmeow's handshake
	// alone may take 20 s, and a final node can be lost, so that no event ever comes.
	loginTimeout = 60 * time.Second
	// pairedTimeout is the watchdog of the 515 that ends a pairing: whatsmeow may lose it.
	pairedTimeout = 15 * time.Second
	// codesTimeout is how long an unpaired connection may take to bring its codes.
	codesTimeout = 60 * time.Second
	// flushTimeout bounds how long a release waits for what is still to be announced.
	flushTimeout = time.Second
	// codeRefusedPause is how long WhatsApp is not asked again for a code to type: it
	// limits how many a number gets, and counts on.
	codeRefusedPause = 5 * time.Minute
	// defaultPairingTimeout is spec.pairing.timeout where the object was made without defaults.
	defaultPairingTimeout = 10 * time.Minute
)

// socket is what this process has of a connection.
type socket string

const (
	socketNone    socket = "none"
	socketPairing socket = "pairing" // open, offers codes
	socketLogin   socket = "login"   // open, the login is under way
	socketOpen    socket = "open"    // logged in
	socketOver    socket = "over"    // ended; to be closed
)

// Config is what a machine needs to know from the start.
type Config struct {
	// Worker and Process are the holder that the machine speaks for.
	Worker, Process string
	// Random returns numbers from 0 to 1, for the jitter of pauses.
	Random     func() float64
	Quarantine Quarantine
	// Fleet is what concerns the other sessions of the worker; nil: there are none.
	Fleet Fleet
	// Pace is what an earlier machine of the session left (Machine.Pace); nil: nothing.
	Pace *Pace
}

// Fleet is what a machine asks of the other sessions of its worker.
type Fleet interface {
	// Failed takes note that a session has failed.
	Failed(uid types.UID, now time.Time)
	// Recovered takes note that a session has had its stable minute.
	Recovered(uid types.UID, now time.Time)
	// Common reports whether most sessions that try fail at present.
	Common(now time.Time) bool
	// Sessions is how many sessions the worker has.
	Sessions() int
	// Trial reports whether a session that may end its worker may be tried now, in a group
	// of at most that size. See Trials.Begin.
	Trial(uid types.UID, size int32, lasts time.Duration, now time.Time) bool
	// HoldsBack reports whether sessions are held back at present, because WhatsApp
	// refuses this version of the client.
	HoldsBack() bool
}

// noFleet is a session without others.
type noFleet struct{}

func (noFleet) Failed(types.UID, time.Time)                           {}
func (noFleet) Recovered(types.UID, time.Time)                        {}
func (noFleet) Common(time.Time) bool                                 { return false }
func (noFleet) Sessions() int                                         { return 1 }
func (noFleet) Trial(types.UID, int32, time.Duration, time.Time) bool { return true }
func (noFleet) HoldsBack() bool                                       { return false }

// Machine is the state machine of one session in one worker process: see the
// package's documentation. It is not safe for concurrent use.
type Machine struct {
	worker, process string
	// draining: nothing is claimed any more, and what is held waits for its successor;
	// evicted: it waits no longer.
	draining, evicted bool
	random            func() float64
	quarantine        Quarantine
	fleet             Fleet
	pace              *Pace
	// restarted: a person has asked for a new beginning since the last Decision.
	restarted bool

	// obj is the newest object known; gone: the API server has it no more.
	obj  *v1alpha1.WhatsAppSession
	gone bool
	// deletionSeen is when the deletion of the session was first seen here; zero: it is not deleted.
	deletionSeen time.Time

	// hold is this process's will to own the device; the API server's confirmation is held().
	hold bool
	// token: a login token is in hand.
	token bool
	// releaseBy bounds the flush before the release; zero: none is under way.
	releaseBy time.Time

	// taken: the store has given the keys to this process under epoch.
	taken  bool
	epoch  int64
	starts int64
	// n counts the publications of this taking.
	n int64

	// unsettled is how many takings before this one nothing has settled, lastTrial the size
	// of the group in which the session was tried when the last of those processes died;
	// suspect: it is to be tried. settleAt is when this taking is settled; zero: it is, or
	// must not be. settledLast: it was tried before the release.
	unsettled   int32
	lastTrial   int32
	suspect     bool
	settleAt    time.Time
	settledLast bool
	// trialWanted is the size of the group that the store is asked to record, trialSize the
	// one that it has recorded for this taking; 0: none. trialUntil is when the trial under
	// way has gone well; zero: none is under way.
	trialWanted, trialSize int32
	trialUntil             time.Time

	running Operation
	// paced is the operation that waits for its pace.
	paced  Operation
	socket socket
	// dialing is the part of the spec that the dial under way began with.
	dialing DialSpec
	// dialed is the part of the spec that the socket was opened with.
	dialed DialSpec

	// want is the status as the holder wants it, but for what only the manager writes.
	want v1alpha1.WhatsAppSessionStatus
	// reason and message explain want.Phase.
	reason, message string

	// retryAt is when to dial again; zero with no socket: never by itself.
	retryAt time.Time
	// attempts counts the failures since the last stable connection, for the backoff.
	attempts int
	// assessAt is when it is decided whether the session goes into quarantine, and no
	// attempt is made before; zero: it is not in question.
	assessAt time.Time
	// stableAt is when the present connection counts as a success; zero: it does already,
	// or has not got so far. stable: it does.
	stableAt time.Time
	stable   bool
	// watchdog is when a silent socket is given up; zero: no watch.
	watchdog time.Time
	// verifying is what WhatsApp was last asked about; same and other are what it last
	// said yes and no to.
	verifying, same, other identity
	// codes wait to be shown; the one shown (or status.pairingCode) expires at codeUntil.
	codes     []string
	code      *delivery.QRItem
	codeUntil time.Time
	codeCount int32
	// codePublished: a code was published since the keys were taken.
	codePublished bool
	// logoutBegun: it was noted that the device is to be unlinked.
	logoutBegun bool
	// loggedOut: WhatsApp has confirmed the logout that was asked for.
	loggedOut bool
	// forgotten: keys and record are deleted.
	forgotten bool

	// published is the last status published, without its numbers.
	published delivery.StatusItem
	// publishedQR is the last code published.
	publishedQR string
	// publishAll: both are to be published again.
	publishAll bool
	// changedAt is when the status last changed for Laravel.
	changedAt time.Time
	// publishing: a publication is under way or waits.
	publishing bool
	// events are Events to be recorded.
	events []RecordedEvent
}

// placed: the manager wants the session here, and it may be opened.
func (m *Machine) placed() bool {
	return !m.gone && m.obj.Status.Worker == m.worker && m.obj.Status.SessionID != ""
}

// heldHere: the API server names this worker as the holder, in whichever process.
func (m *Machine) heldHere() bool { return !m.gone && m.obj.Status.HeldBy == m.worker }

// held: the API server has confirmed that this process is the holder.
func (m *Machine) held() bool { return m.heldHere() && m.obj.Status.HolderStart == m.process }

// logoutWanted: the session is deleted and its device is to be unlinked.
func (m *Machine) logoutWanted() bool {
	return !m.obj.DeletionTimestamp.IsZero() && m.obj.Spec.DeletionPolicy != v1alpha1.DeletionRetain
}

// stays: the session is to be held here, under the epoch that was taken.
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

// observe takes note of an object. An older one than the known one must not be given.
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
		if m.taken || wasHeld { // released, or declared lost: only a fresh claim takes it up again
			m.hold, m.token, m.taken, m.loggedOut = false, false, false, false
			m.releaseBy, m.retryAt, m.assessAt = time.Time{}, time.Time{}, time.Time{}
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
	case !m.logoutBegun: // news is tried at once; what fails then keeps its pauses, whatever else is written
		m.logoutBegun = true
		m.retryAt = m.logoutFrom(now)
		m.terminating(v1alpha1.ReasonDeleting, unlinking, now)
	}
}

// New returns the machine of a session that is not known yet.
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

const connectedMessage = "connected to WhatsApp"

// unlinking is what is said of a deleted session whose logout goes on.
const unlinking = "the device is being unlinked"

// terminating says how the logout of a deleted session goes. The phase stays:
// what fails on the way is no other state.
func (m *Machine) terminating(reason, message string, now time.Time) {
	m.phase(v1alpha1.PhaseTerminating, reason, message, now)
}

// stalled: the session is given up for hours, though its phase usually goes on by itself.
func (m *Machine) stalled() bool { return m.reason == v1alpha1.ReasonQuarantined }

// inherit takes up the status that the last writer left, as the claim is to write it.
func (m *Machine) inherit(now time.Time) {
	m.want = *m.obj.Status.DeepCopy()
	m.want.QR, m.want.PairingCode = nil, ""
	m.want = ClampTimes(m.obj, m.want, m.quarantine.Most, now)
	m.attempts = int(m.want.Failures)
	if m.want.StoredEpoch < m.obj.Status.Epoch {
		m.want.StoredEpoch = 0
	}
	switch {
	case m.logoutWanted():
		m.want.Phase, m.reason, m.message = v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, unlinking
	case status.Resting(m.want.Phase):
		m.recallRest(now)
		m.want = Remember(m.want)
		m.reason, m.message = status.Reason(m.obj.Status), readyMessage(m.obj.Status)
	case m.recallRest(now):
	default:
		m.want.Phase, m.reason, m.message = v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, "the worker is taking the device"
	}
	m.want.Conditions = nil // computed anew at each write
}

func readyMessage(s v1alpha1.WhatsAppSessionStatus) string {
	for _, c := range s.Conditions {
		if c.Type == v1alpha1.ConditionReady {
			return c.Message
		}
	}
	return ""
}

// phase changes the phase and says why.
func (m *Machine) phase(p v1alpha1.Phase, reason, message string, now time.Time) {
	if m.want.Phase == v1alpha1.PhaseConnected && p != v1alpha1.PhaseConnected {
		m.want.LastDisconnectedTime = at(now)
		m.want.LastDisconnectReason = status.Clean(message, 512)
	}
	m.want.Phase, m.reason, m.message = p, reason, message
}

// restart acts upon restartedAt.
func (m *Machine) restart(now time.Time) {
	next, result, _ := Restart(m.obj, m.want, now)
	m.want = next
	switch result {
	case RestartNone, RestartWaits:
	case RestartBanned:
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonBanned, RestartBannedMessage(m.want))
	case RestartDone:
		m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonRestarted, "restartedAt changed: the session begins anew")
		m.resetFailures()
		m.restarted = true
		m.pace.reset()
		m.codeCount = 0
		m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonRestarted, "restartedAt changed", now)
		m.retryAt = now
		if m.socket != socketNone {
			m.drop()
		}
	}
}

// onTaken takes note of the keys.
func (m *Machine) onTaken(a Device, now time.Time) {
	m.taken, m.epoch, m.starts, m.n, m.codePublished = true, m.obj.Status.Epoch, a.Starts, 0, false
	m.want.JID, m.want.PhoneNumber = a.JID, a.PhoneNumber
	m.retryAt = now
	m.takeUnsettled(a.Unsettled, a.Trial, now)
	switch {
	case m.logoutWanted():
		m.retryAt = m.logoutFrom(now)
	case m.recallRest(now):
		m.retryAt = m.restUntil()
		m.dialed.PairPhone = m.dialSpec().PairPhone
	case m.want.JID == "":
		if m.pairingOver(now) { // while nobody held the session and no code was shown
			m.want.PairingDeadline = nil
		}
		m.awaitCodes(now)
	}
	m.restart(now)
	if m.retryAt.IsZero() || now.Before(m.retryAt) { // the token is not for an attempt hours from now
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

// onDialed takes note of an open socket.
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
	case m.logoutWanted():
		m.onLoggedOut(now)
	default: // the logout came while the last connection was being closed
		m.drop()
		endings[EventLoggedOut](m, Event{Message: "WhatsApp has unlinked the device"}, now)
	}
}

// awaitCodes is the time until WhatsApp gives a code of the sort that the spec asks for.
func (m *Machine) awaitCodes(now time.Time) {
	m.dialed.PairPhone = m.dialSpec().PairPhone
	reason, message := v1alpha1.ReasonWaitingForScan, "waiting for a QR code from WhatsApp"
	if m.dialed.PairPhone != "" {
		reason, message = v1alpha1.ReasonWaitingForCode, "waiting for a pairing code from WhatsApp"
	}
	m.phase(v1alpha1.PhasePairing, reason, message, now)
}

// codesCame takes note that WhatsApp gives codes: a refusal of them is over. What
// failed before is forgotten when they have been offered for a minute, because a
// server that gives codes and hangs up is a failure, too.
func (m *Machine) codesCame(now time.Time) {
	if m.want.RetryReason == v1alpha1.ReasonPairingCodeRefused {
		m.want.RetryReason, m.want.RetryAfter = "", nil
	}
	if !m.stable && m.stableAt.IsZero() {
		m.stableAt = now.Add(stableAfter)
	}
}

// beginPairing starts the time for which codes are offered.
func (m *Machine) beginPairing(now time.Time) {
	if m.want.PairingDeadline == nil {
		m.want.PairingDeadline = at(now.Add(pairingTimeout(m.obj)))
	}
}

// drop gives the socket up; the rules close it.
func (m *Machine) drop() {
	m.socket, m.watchdog, m.stableAt, m.stable = socketOver, time.Time{}, time.Time{}, false
	m.hideCode()
}

// failed takes note of an attempt that failed, and backs off.
func (m *Machine) failed(reason, message string, now time.Time) {
	m.backOff(now)
	if m.logoutWanted() {
		m.terminating(v1alpha1.ReasonDeleting, message, now)
		return
	}
	if !m.taken && m.recallRest(now) { // what it rests from is not forgotten for a store that is away
		return
	}
	p := v1alpha1.PhaseDisconnected
	if m.want.JID == "" {
		p = v1alpha1.PhasePairing
	}
	m.phase(p, reason, message, now)
}

// dialDue: a session without a socket is to connect.
func (m *Machine) dialDue(now time.Time) bool {
	return m.socket == socketNone && m.assessAt.IsZero() && !m.retryAt.IsZero() && !now.Before(m.retryAt)
}

// failedLogout takes note of a logout that failed.
func (m *Machine) failedLogout(now time.Time) {
	m.backOff(now)
	m.message = "the logout failed and is repeated"
	if m.logoutWanted() {
		m.terminating(v1alpha1.ReasonDeleting, m.message, now)
	}
}

// backOff sets the next attempt: full jitter over an interval that doubles.
func (m *Machine) backOff(now time.Time) {
	interval := backoffMost
	if m.attempts < 7 {
		interval = min(backoffFirst<<m.attempts, backoffMost)
	}
	m.attempts++
	m.retryAt = now.Add(time.Duration(m.random() * float64(interval)))
}

// refused takes note of something that a person must mend; it is looked at again at the longest backoff.
func (m *Machine) refused(reason, message string, now time.Time) {
	m.attempts++
	m.retryAt = now.Add(backoffMost / 4)
	if !m.taken && !m.logoutWanted() && m.recallRest(now) {
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

// behind takes note that the store, or Redis, knows a higher epoch: the device is
// given up so that the manager places the session above it.
func (m *Machine) behind(stored int64, now time.Time) {
	m.want.StoredEpoch = stored
	m.taken = false
	if m.socket != socketNone {
		m.drop()
	}
	const message = "a higher epoch of the session is known already; the manager places the session above it"
	switch {
	case m.logoutWanted():
		m.terminating(v1alpha1.ReasonEpochBehind, message, now)
	case m.recallRest(now): // the manager reads storedEpoch alone
	default:
		m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonEpochBehind, message, now)
	}
}

// onLoggedOut takes note that the logout that was asked for is done.
func (m *Machine) onLoggedOut(now time.Time) {
	m.drop()
	phone := m.want.PhoneNumber
	m.want.JID = ""
	if m.logoutWanted() {
		m.loggedOut, m.retryAt = true, now
		return
	}
	m.want.PhoneNumber = ""
	m.rest(v1alpha1.ReasonWrongPhone)
	message := "the phone " + phone + " was linked, but spec.pairing.phoneNumber allows only " + m.obj.Spec.Pairing.PhoneNumber +
		": it has been logged out; change the annotation " + v1alpha1.RestartedAtAnnotation + " and scan with the right phone"
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonWrongPhone, message)
	m.phase(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonWrongPhone, message, now)
}

// rest stops the session until a person changes restartedAt.
func (m *Machine) rest(reason string) {
	m.resetFailures()
	m.retryAt, m.want.RetryReason = time.Time{}, reason
}

func (m *Machine) recordEvent(kind, reason, message string) {
	m.events = append(m.events, RecordedEvent{kind, reason, message})
}

// showNext shows the next code; it reports false when none is left.
func (m *Machine) showNext(now time.Time) bool {
	if len(m.codes) == 0 {
		m.hideCode()
		return false
	}
	lifetime := laterCode
	if m.code == nil {
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
	}
	return true
}

func (m *Machine) hideCode() {
	m.codes, m.code, m.codeUntil, m.want.QR, m.want.PairingCode = nil, nil, time.Time{}, nil, ""
}

// tick acts upon the time.
func (m *Machine) tick(now time.Time) {
	if m.stays(now) {
		m.releaseBy, m.settledLast = time.Time{}, false
	}
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
		m.over(Event{Type: EventDisconnected, Reason: EndSilent, Message: "WhatsApp accepted the connection but did not answer in time"}, now)
	}
	if m.want.Phase == v1alpha1.PhasePairing && m.socket == socketNone && m.pairingOver(now) {
		m.expirePairing(now)
	}
}

func (m *Machine) tickPairing(now time.Time) {
	switch {
	case m.want.JID != "": // scanned; the socket is about to end
	case m.pairingOver(now) && !m.logoutWanted():
		m.drop()
		m.expirePairing(now)
	case m.code != nil && !now.Before(m.codeUntil) && !m.showNext(now),
		m.want.PairingCode != "" && !now.Before(m.codeUntil):
		// The codes of a connection run out: the next connection brings new ones.
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
	message := "no phone was linked within " + pairingTimeout(m.obj).String() + ": change the annotation " + v1alpha1.RestartedAtAnnotation + " to offer codes again"
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingExpired, message)
	m.phase(v1alpha1.PhasePairingExpired, v1alpha1.ReasonPairingExpired, message, now)
}

// wakeTimes lists the times at which tick or decide would do something; some may
// be zero or past.
func (m *Machine) wakeTimes(now time.Time) []time.Time {
	if m.gone {
		return nil
	}
	times := []time.Time{m.releaseBy, m.settleAt, m.trialUntil, m.retryAt, m.assessAt, m.stableAt, m.watchdog, m.codeUntil}
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

// heldBack says why a session that is to connect does not yet.
func (m *Machine) heldBack(now time.Time) {
	switch m.want.Phase {
	case v1alpha1.PhaseConnecting, v1alpha1.PhaseDisconnected, v1alpha1.PhasePairing:
		m.phase(m.want.Phase, v1alpha1.ReasonOutdated,
			"WhatsApp refuses this version of the client: the newest is tried with one session, and the others connect when that one is through", now)
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

// dialSpec is what of the spec a connection depends on.
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

// endings says what each end of a connection makes of the session: the table of
// docs/architecture.md, "A session's life".
var endings = map[EventType]func(m *Machine, e Event, now time.Time){
	EventDisconnected: func(m *Machine, e Event, now time.Time) {
		reason := v1alpha1.ReasonReconnecting
		if m.reason == v1alpha1.ReasonPairingFailed { // the connection ends with the refused pairing
			reason = m.reason
		}
		m.failed(reason, e.Message, now)
	},
	EventCodeRefused: func(m *Machine, e Event, now time.Time) {
		m.beginPairing(now) // it must not go on for ever without a code either
		m.resetFailures()
		m.want.RetryAfter, m.want.RetryReason = at(now.Add(codeRefusedPause)), v1alpha1.ReasonPairingCodeRefused
		m.retryAt = m.want.RetryAfter.Time
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingCodeRefused, e.Message)
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPairingCodeRefused, e.Message, now)
	},
	EventLoggedOut: func(m *Machine, e Event, now time.Time) {
		m.want.JID = ""
		m.rest(v1alpha1.ReasonLoggedOut)
		message := e.Message + ": change the annotation " + v1alpha1.RestartedAtAnnotation + " and scan again"
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonLoggedOut, message)
		m.phase(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, message, now)
	},
	EventReplaced: func(m *Machine, _ Event, now time.Time) { m.replaced(now) },
	EventBanned: func(m *Machine, e Event, now time.Time) {
		message := m.ban(e, now)
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonBanned, message)
		m.phase(v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, message, now)
	},
	EventOutdated: func(m *Machine, _ Event, now time.Time) {
		m.retryAt = time.Time{}
		message := "WhatsApp refuses this version of the client: upgrade the operator's image"
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonOutdated, message)
		m.phase(v1alpha1.PhaseOutdated, v1alpha1.ReasonOutdated, message, now)
	},
}

// onEvent takes note of what happened on the present connection.
func (m *Machine) onEvent(e Event, now time.Time) {
	if m.socket == socketNone || m.socket == socketOver {
		return
	}
	switch e.Type {
	case EventQR:
		if m.want.JID != "" {
			return
		}
		m.codes, m.code, m.watchdog = e.Codes, nil, time.Time{}
		m.beginPairing(now)
		if m.showNext(now) {
			m.codesCame(now)
			m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForScan, "scan status.qr with the phone: Linked devices, Link a device", now)
		}
	case EventPairingCode:
		if m.want.JID != "" {
			return
		}
		m.beginPairing(now)
		m.watchdog = time.Time{}
		m.codesCame(now)
		m.want.PairingCode, m.codeUntil = e.Code, e.Until
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForCode,
			"type status.pairingCode on the phone "+m.dialed.PairPhone+": Linked devices, Link a device, Link with phone number instead", now)
	case EventPairSuccess:
		m.hideCode()
		m.want.JID, m.want.PhoneNumber = e.JID, e.PhoneNumber
		m.want.PairingDeadline, m.codeCount = nil, 0
		m.watchdog = now.Add(pairedTimeout)
		m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonPaired, "the phone "+e.PhoneNumber+" linked the device", now)
		m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonPaired, "the phone "+e.PhoneNumber+" linked the device")
	case EventPairError:
		m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonPairingFailed, e.Message)
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPairingFailed, e.Message, now)
	case EventConnected:
		m.connected(e, now)
	case EventPushName:
		m.want.PushName = e.PushName
	case EventDisconnected, EventCodeRefused, EventLoggedOut, EventReplaced, EventBanned, EventOutdated:
		m.over(e, now)
	}
}

func (m *Machine) connected(e Event, now time.Time) {
	m.socket, m.watchdog = socketOpen, time.Time{}
	m.want.JID, m.want.PhoneNumber = e.JID, e.PhoneNumber
	if e.PushName != "" {
		m.want.PushName = e.PushName
	}
	if m.want.LastConnectedTime != nil {
		m.want.Reconnects++
	} else {
		m.recordEvent(corev1.EventTypeNormal, v1alpha1.ReasonConnected, "connected as "+e.PhoneNumber)
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

// over takes note of the end of the present connection.
func (m *Machine) over(e Event, now time.Time) {
	scanned := m.socket == socketPairing && m.want.JID != ""
	lasted := m.stable
	m.drop()
	switch {
	case e.Type == EventLoggedOut && (m.logoutWanted() || m.running == OpLogout):
		m.onLoggedOut(now)
	case e.Type == EventDisconnected && scanned:
		m.retryAt = now // the 515 after the scan: the device logs in on a new connection
	case m.logoutWanted() && e.Type == EventBanned:
		m.message = m.ban(e, now)
	case m.logoutWanted():
		m.failed(v1alpha1.ReasonDeleting, e.Message, now)
	case e.Type == EventDisconnected && !lasted && !e.Ours:
		if m.counted(e, now) {
			m.enterQuarantine(now)
			return
		}
		endings[e.Type](m, e, now)
		m.slowDown(now)
	default:
		endings[e.Type](m, e, now)
	}
}

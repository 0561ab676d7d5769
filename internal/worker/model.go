package worker

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

// The times of a session's life. DESIGN section 4 has those of the backoff.
const (
	backoffFirst = time.Second
	backoffMost  = 2 * time.Minute
	// stableAfter is how long a connection must last to count as a success.
	stableAfter = time.Minute
	// replacedPause is how long a displaced session leaves the field to the other login.
	replacedPause = 5 * time.Minute
	// restartInterval bounds how often restartedAt counts.
	restartInterval = time.Minute
	// logoutTimeout is how long the logout of a deleted session is tried.
	logoutTimeout = 5 * time.Minute
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

// operation is work that blocks; at most one is under way for a session.
type operation string

const (
	opNone   operation = ""
	opToken  operation = "token"  // wait for a login token
	opTake   operation = "take"   // take the keys
	opDial   operation = "dial"   // connect
	opClose  operation = "close"  // close the socket
	opLogout operation = "logout" // unlink the device
	opForget operation = "forget" // delete keys and record
)

// model is all that a supervisor knows of its session. It is pure: the
// supervisor feeds it inputs and carries out what it decides.
type model struct {
	worker, process string
	// draining: nothing is claimed any more, and what is held waits for its successor;
	// evicted: it waits no longer.
	draining, evicted bool
	random            func() float64
	quarantine        Quarantine
	// around is what concerns the other sessions of this worker, too.
	around around
	// restarted: a person has asked for a new beginning since this was last looked at.
	restarted bool

	// obj is the newest object known; gone: the API server has it no more.
	obj  *v1alpha1.WhatsAppSession
	gone bool

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
	// n counts the announcements of this taking.
	n int64

	running operation
	socket  socket
	// dialing is the part of the spec that the dial under way began with.
	dialing dialSpec
	// dialed is the generation-independent part of the spec that the socket was opened with.
	dialed dialSpec

	// want is the status as the holder wants it, but for what only the manager writes.
	want v1alpha1.WhatsAppSessionStatus
	// reason and message explain want.Phase.
	reason, message string

	// retryAt is when to dial again; zero with no socket: never by itself.
	retryAt time.Time
	// attempts counts the failures since the last stable connection, for the backoff.
	attempts int
	// verdictAt is when it is decided whether the session is left alone, and no attempt is
	// made before; zero: it is not in question.
	verdictAt time.Time
	// stableAt is when the present connection counts as a success; zero: it does already.
	stableAt time.Time
	// watchdog is when a silent socket is given up; zero: no watch.
	watchdog time.Time
	// codes wait to be shown; the one shown (or status.pairingCode) expires at codeUntil.
	codes     []string
	code      *delivery.QRItem
	codeUntil time.Time
	codeCount int32
	// codeTold: a code was announced since the keys were taken.
	codeTold bool
	// loggedOut: WhatsApp has confirmed the logout that was asked for.
	loggedOut bool
	// forgotten: keys and record are deleted.
	forgotten bool

	// told is the last status announced, without its numbers.
	told delivery.StatusItem
	// toldQR is the last code announced.
	toldQR string
	// tellAll: both are to be told again.
	tellAll bool
	// changedAt is when the status last changed for Laravel.
	changedAt time.Time
	// telling: an announcement is under way or waits.
	telling bool
	// notes are Events to be recorded.
	notes []note
}

// dialSpec is what of the spec a connection depends on. pairPhone is set where a
// code is to be typed on that phone.
type dialSpec struct{ proxySecret, deviceName, pairPhone string }

type note struct{ kind, reason, message string }

func newModel(worker, process string, random func() float64) *model {
	return &model{
		worker: worker, process: process, random: random, socket: socketNone,
		quarantine: Quarantine{}.orDefault(), around: alone{},
	}
}

// placed: the manager wants the session here, and it may be opened.
func (m *model) placed() bool {
	return !m.gone && m.obj.Status.Worker == m.worker && m.obj.Status.SessionID != ""
}

// heldHere: the API server names this worker as the holder, in whichever process.
func (m *model) heldHere() bool { return !m.gone && m.obj.Status.HeldBy == m.worker }

// held: the API server has confirmed that this process is the holder.
func (m *model) held() bool { return m.heldHere() && m.obj.Status.HolderStart == m.process }

// logoutWanted: the session is deleted and its device is to be unlinked.
func (m *model) logoutWanted() bool {
	return !m.obj.DeletionTimestamp.IsZero() && m.obj.Spec.DeletionPolicy != v1alpha1.DeletionRetain
}

// wrongPhone: the linked account is not the one that the spec allows.
func (m *model) wrongPhone() bool {
	wanted := m.obj.Spec.Pairing.PhoneNumber
	return wanted != "" && m.want.JID != "" && m.want.PhoneNumber != wanted
}

// stays: the session is to be held here, under the epoch that was taken.
func (m *model) stays(now time.Time) bool {
	switch {
	case !m.placed(), m.forgotten, m.taken && m.epoch != m.obj.Status.Epoch:
		return false
	case m.evicted, m.draining && !m.held():
		return false
	case m.want.StoredEpoch >= m.obj.Status.Epoch && m.want.StoredEpoch > 0:
		return false
	case m.logoutWanted() && !now.Before(m.obj.DeletionTimestamp.Add(logoutTimeout)):
		return false
	default:
		return true
	}
}

// done: nothing of the session is left in this process.
func (m *model) done() bool {
	return m.running == opNone && m.socket == socketNone && (m.gone || !m.heldHere() && (!m.placed() || m.draining))
}

// observe takes note of an object. An older one than the known one must not be given.
func (m *model) observe(obj *v1alpha1.WhatsAppSession, now time.Time) {
	m.obj, m.gone = obj, false
	if !m.held() {
		if m.taken { // released, or declared lost: only a fresh claim takes it up again
			m.hold, m.token, m.taken, m.loggedOut = false, false, false, false
			m.releaseBy, m.retryAt, m.verdictAt = time.Time{}, time.Time{}, time.Time{}
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
	if m.logoutWanted() && m.want.Phase != v1alpha1.PhaseTerminating {
		m.retryAt = m.logoutFrom(now)
		m.phase(v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, "the device is being unlinked", now)
	}
}

// stalled: the session is given up for hours, though its phase usually goes on by itself.
func (m *model) stalled() bool { return m.reason == v1alpha1.ReasonQuarantined }

// vanish takes note that the API server has the session no more.
func (m *model) vanish() { m.gone = true }

// inherit takes up the status that the last writer left, as the claim is to write it.
func (m *model) inherit(now time.Time) {
	m.want = *m.obj.Status.DeepCopy()
	m.want.QR, m.want.PairingCode = nil, ""
	m.attempts = int(m.want.Failures)
	if m.want.StoredEpoch < m.obj.Status.Epoch {
		m.want.StoredEpoch = 0
	}
	switch {
	case m.logoutWanted():
		m.want.Phase, m.reason, m.message = v1alpha1.PhaseTerminating, v1alpha1.ReasonDeleting, "the device is being unlinked"
	case resting[m.want.Phase]:
		m.recall(now)
		m.want = status.Remember(m.want)
		m.reason, m.message = status.Reason(m.obj.Status), readyMessage(m.obj.Status)
	case m.recall(now):
	default:
		m.want.Phase, m.reason, m.message = v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, "the worker is taking the device"
	}
	m.want.Conditions = nil // computed anew at each write
}

// resting are the phases in which no attempt is made until a person or a date says so.
var resting = map[v1alpha1.Phase]bool{
	v1alpha1.PhasePairingExpired: true,
	v1alpha1.PhaseLoggedOut:      true,
	v1alpha1.PhaseBanned:         true,
	v1alpha1.PhaseReplaced:       true,
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
func (m *model) phase(p v1alpha1.Phase, reason, message string, now time.Time) {
	if m.want.Phase == v1alpha1.PhaseConnected && p != v1alpha1.PhaseConnected {
		m.want.LastDisconnectedTime = at(now)
		m.want.LastDisconnectReason = status.Clean(message, 512)
	}
	m.want.Phase, m.reason, m.message = p, reason, message
}

// restart acts upon restartedAt.
func (m *model) restart(now time.Time) {
	if !m.restartWanted() || now.Before(m.restartFrom()) {
		return
	}
	m.want.ObservedRestartedAt = m.obj.RestartedAt()
	m.want.RestartedTime = at(now)
	if m.banned(now) {
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonBanned, "restartedAt changed, but WhatsApp bans the account until "+m.want.RetryAfter.UTC().Format(time.RFC3339)+": no attempt is made before")
		return
	}
	m.tell(corev1.EventTypeNormal, v1alpha1.ReasonRestarted, "restartedAt changed: the session begins anew")
	m.uncount()
	m.restarted = true
	m.want.PairingDeadline, m.codeCount = nil, 0
	m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonRestarted, "restartedAt changed", now)
	m.retryAt = now
	if m.socket != socketNone {
		m.drop()
	}
}

// restartWanted: restartedAt has a value that was not acted upon here, whether
// or not that could be written yet.
func (m *model) restartWanted() bool {
	value := m.obj.RestartedAt()
	return value != "" && value != m.want.ObservedRestartedAt
}

// restartFrom is the earliest time at which restartedAt counts again.
func (m *model) restartFrom() time.Time {
	if m.want.RestartedTime == nil {
		return time.Time{}
	}
	return m.want.RestartedTime.Add(restartInterval)
}

// onTaken takes note of the keys.
func (m *model) onTaken(a Account, now time.Time) {
	m.taken, m.epoch, m.starts, m.n, m.codeTold = true, m.obj.Status.Epoch, a.Starts(), 0, false
	m.want.JID, m.want.PhoneNumber = a.JID(), a.PhoneNumber()
	m.retryAt = now
	switch {
	case m.logoutWanted():
		m.retryAt = m.logoutFrom(now)
	case m.recall(now):
		m.retryAt = m.restUntil()
		m.dialed.pairPhone = m.dialSpec().pairPhone
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
func (m *model) logoutFrom(now time.Time) time.Time {
	if m.want.JID != "" && m.banned(now) {
		return m.want.RetryAfter.Time
	}
	return now
}

// onDialed takes note of an open socket.
func (m *model) onDialed(paired bool, spec dialSpec, now time.Time) {
	m.dialed, m.loggedOut = spec, false
	switch {
	case paired:
		m.socket, m.watchdog = socketLogin, now.Add(loginTimeout)
	case m.want.JID == "":
		m.socket, m.watchdog = socketPairing, now.Add(codesTimeout)
	case m.logoutWanted():
		m.onLoggedOut(now)
	default: // the logout came while the last connection was being closed
		m.drop()
		endings[whatsapp.EventLoggedOut](m, whatsapp.Event{Message: "WhatsApp has unlinked the device"}, now)
	}
}

// awaitCodes is the time until WhatsApp gives a code of the sort that the spec asks for.
func (m *model) awaitCodes(now time.Time) {
	m.dialed.pairPhone = m.dialSpec().pairPhone
	reason, message := v1alpha1.ReasonWaitingForScan, "waiting for a QR code from WhatsApp"
	if m.dialed.pairPhone != "" {
		reason, message = v1alpha1.ReasonWaitingForCode, "waiting for a pairing code from WhatsApp"
	}
	m.phase(v1alpha1.PhasePairing, reason, message, now)
}

// beginPairing starts the time for which codes are offered.
func (m *model) beginPairing(now time.Time) {
	if m.want.PairingDeadline == nil {
		m.want.PairingDeadline = at(now.Add(m.pairingTimeout()))
	}
}

// drop gives the socket up; the rules close it.
func (m *model) drop() {
	m.socket, m.watchdog, m.stableAt = socketOver, time.Time{}, time.Time{}
	m.hideCode()
}

// failed takes note of an attempt that failed, and backs off.
func (m *model) failed(reason, message string, now time.Time) {
	m.backOff(now)
	if m.logoutWanted() {
		m.message = message
		return
	}
	if !m.taken && m.recall(now) { // what it rests from is not forgotten for a store that is away
		return
	}
	p := v1alpha1.PhaseDisconnected
	if m.want.JID == "" {
		p = v1alpha1.PhasePairing
	}
	m.phase(p, reason, message, now)
}

// backOff sets the next attempt: full jitter over an interval that doubles.
func (m *model) backOff(now time.Time) {
	interval := backoffMost
	if m.attempts < 7 {
		interval = min(backoffFirst<<m.attempts, backoffMost)
	}
	m.attempts++
	m.retryAt = now.Add(time.Duration(m.random() * float64(interval)))
}

// refused takes note of something that a person must mend; it is looked at again at the longest backoff.
func (m *model) refused(r *Refusal, now time.Time) {
	m.attempts++
	m.retryAt = now.Add(backoffMost / 4)
	if !m.taken && m.recall(now) {
		return
	}
	if m.message != r.Message {
		m.tell(corev1.EventTypeWarning, r.Reason, r.Message)
	}
	m.phase(v1alpha1.PhaseFailed, r.Reason, r.Message, now)
}

// behind takes note that the store knows a higher epoch: the device is given up
// so that the manager places the session above it.
func (m *model) behind(stored int64, now time.Time) {
	m.want.StoredEpoch = stored
	m.taken = false
	if m.socket != socketNone {
		m.drop()
	}
	if m.recall(now) { // the manager looks at storedEpoch alone
		return
	}
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonEpochBehind, "the store knows a higher epoch; the manager places the session again", now)
}

// onLoggedOut takes note that the logout that was asked for is done.
func (m *model) onLoggedOut(now time.Time) {
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
	m.tell(corev1.EventTypeWarning, v1alpha1.ReasonWrongPhone, message)
	m.phase(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonWrongPhone, message, now)
}

// rest stops the session until a person changes restartedAt.
func (m *model) rest(reason string) {
	m.uncount()
	m.retryAt, m.want.RetryReason = time.Time{}, reason
}

func (m *model) tell(kind, reason, message string) {
	m.notes = append(m.notes, note{kind, reason, message})
}

// showNext shows the next code; it reports false when none is left.
func (m *model) showNext(now time.Time) bool {
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

func (m *model) hideCode() {
	m.codes, m.code, m.codeUntil, m.want.QR, m.want.PairingCode = nil, nil, time.Time{}, nil, ""
}

// tick acts upon the time.
func (m *model) tick(now time.Time) {
	if m.stays(now) {
		m.releaseBy = time.Time{}
	}
	if m.held() && m.taken && m.epoch == m.obj.Status.Epoch && m.obj.DeletionTimestamp.IsZero() {
		m.restart(now)
	}
	if !m.stableAt.IsZero() && !now.Before(m.stableAt) {
		m.stableAt = time.Time{}
		m.uncount()
		m.around.recovered(m.obj.UID, now)
	}
	if !m.verdictAt.IsZero() && !now.Before(m.verdictAt) {
		m.judge(now)
	}
	if m.socket == socketPairing {
		m.tickPairing(now)
	}
	if !m.watchdog.IsZero() && !now.Before(m.watchdog) {
		m.over(whatsapp.Event{Type: whatsapp.EventDisconnected, Reason: "Silent", Message: "WhatsApp accepted the connection but did not answer in time"}, now)
	}
	if m.want.Phase == v1alpha1.PhasePairing && m.socket == socketNone && m.pairingOver(now) {
		m.expirePairing(now)
	}
}

func (m *model) tickPairing(now time.Time) {
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

func (m *model) pairingOver(now time.Time) bool {
	return m.want.PairingDeadline != nil && !now.Before(m.want.PairingDeadline.Time)
}

func (m *model) expirePairing(now time.Time) {
	if m.logoutWanted() {
		return
	}
	m.hideCode()
	m.rest(v1alpha1.ReasonPairingExpired)
	message := "no phone was linked within " + m.pairingTimeout().String() + ": change the annotation " + v1alpha1.RestartedAtAnnotation + " to offer codes again"
	m.tell(corev1.EventTypeWarning, v1alpha1.ReasonPairingExpired, message)
	m.phase(v1alpha1.PhasePairingExpired, v1alpha1.ReasonPairingExpired, message, now)
}

func (m *model) pairingTimeout() time.Duration {
	if d := m.obj.Spec.Pairing.Timeout.Duration; d > 0 {
		return d
	}
	return defaultPairingTimeout
}

// wakeAt lists the times at which tick or decide would do something; some may
// be zero or past.
func (m *model) wakeAt() []time.Time {
	if m.gone {
		return nil
	}
	times := []time.Time{m.releaseBy, m.retryAt, m.verdictAt, m.stableAt, m.watchdog, m.codeUntil}
	if m.want.PairingDeadline != nil && m.want.Phase == v1alpha1.PhasePairing {
		times = append(times, m.want.PairingDeadline.Time)
	}
	if m.restartWanted() {
		times = append(times, m.restartFrom())
	}
	if m.logoutWanted() {
		times = append(times, m.obj.DeletionTimestamp.Add(logoutTimeout))
	}
	return times
}

// rendered is the status that this process wants written, and whether it may write one.
func (m *model) rendered(now time.Time) (v1alpha1.WhatsAppSessionStatus, bool) {
	switch {
	case m.gone:
		return v1alpha1.WhatsAppSessionStatus{}, false
	case !m.heldHere() && (!m.hold || m.obj.Status.HeldBy != "" || !m.stays(now)):
		return v1alpha1.WhatsAppSessionStatus{}, false
	case m.heldHere() && !m.hold && m.stays(now): // a former process's hold, until ours is claimed
		return v1alpha1.WhatsAppSessionStatus{}, false
	case m.heldHere() && m.hold && !m.stays(now): // the release tells it, and must not wait behind a report
		return v1alpha1.WhatsAppSessionStatus{}, false
	}
	s := *m.want.DeepCopy()
	from := &m.obj.Status
	s.Worker, s.Epoch, s.Installation, s.SessionID, s.Conditions = from.Worker, from.Epoch, from.Installation, from.SessionID, from.Conditions
	s.HeldBy, s.HolderStart = "", ""
	if m.hold {
		s.HeldBy, s.HolderStart = m.worker, m.process
	}
	s = status.Summarize(s, status.Facts{Generation: m.obj.Generation, Phase: m.want.Phase, Reason: m.reason, Message: m.message, Stalled: m.stalled()}, now)
	return s, !apiequality.Semantic.DeepEqual(*from, s)
}

// announcement is what Redis is to know now, and whether it differs from what was told last.
func (m *model) announcement(now time.Time) (Announcement, bool) {
	if !m.taken || m.gone {
		return Announcement{}, false
	}
	s := status.Summarize(m.want, status.Facts{Phase: m.want.Phase, Reason: m.reason, Message: m.message, Stalled: m.stalled()}, now)
	s.SessionID = m.obj.Status.SessionID
	item := status.Update(s, delivery.Numbers{}, time.Time{})
	code := ""
	if m.code != nil {
		code = m.code.QR
	}
	newStatus, newCode := item != m.told, code != m.toldQR
	if !newStatus && !newCode && !m.tellAll {
		return Announcement{}, false
	}
	if newStatus {
		m.changedAt = now
	}
	m.told, m.toldQR = item, code
	m.n++
	a := m.present()
	a.NewStatus, a.NewQR = newStatus || m.tellAll, newCode || m.tellAll
	m.tellAll = false
	return a, true
}

// present is the announcement of what was told last, under the last number given.
func (m *model) present() Announcement {
	numbers := delivery.Numbers{Epoch: m.epoch, Seq: delivery.FirstSeq(m.starts) + m.n}
	a := Announcement{Status: m.told, Worker: m.worker}
	a.Status.Numbers = numbers
	a.Status.OccurredAt = delivery.Time{Time: m.changedAt}
	if m.code != nil {
		qr := *m.code
		qr.Numbers = numbers
		a.QR = &qr
		m.codeTold = true
	}
	a.QRGone = m.code == nil && m.codeTold
	if m.want.Phase == v1alpha1.PhaseConnected && m.want.LastConnectedTime != nil {
		a.ConnectedSince = m.want.LastConnectedTime.Time
	}
	return a
}

// tellAgain has the present state told again, under a new number: Redis forgot it.
func (m *model) tellAgain() { m.tellAll = true }

func at(t time.Time) *metav1.Time {
	stamp := metav1.NewTime(t.Truncate(time.Second))
	return &stamp
}

// spec is what of the spec a connection depends on.
func (m *model) dialSpec() dialSpec {
	d := dialSpec{deviceName: m.obj.Spec.DeviceName}
	if m.obj.Spec.Proxy != nil {
		d.proxySecret = m.obj.Spec.Proxy.SecretRef.Name
	}
	if m.obj.Spec.Pairing.Method == v1alpha1.PairingPhoneCode {
		d.pairPhone = m.obj.Spec.Pairing.PhoneNumber
	}
	return d
}

// endings says what each end of a connection makes of the session: the table of DESIGN section 4.
var endings = map[whatsapp.EventType]func(m *model, e whatsapp.Event, now time.Time){
	whatsapp.EventDisconnected: func(m *model, e whatsapp.Event, now time.Time) {
		reason := v1alpha1.ReasonReconnecting
		if m.reason == v1alpha1.ReasonPairingFailed { // the connection ends with the refused pairing
			reason = m.reason
		}
		m.failed(reason, e.Message, now)
	},
	whatsapp.EventCodeRefused: func(m *model, e whatsapp.Event, now time.Time) {
		m.beginPairing(now) // it must not go on for ever without a code either
		m.uncount()
		m.want.RetryAfter, m.want.RetryReason = at(now.Add(codeRefusedPause)), v1alpha1.ReasonPairingCodeRefused
		m.retryAt = m.want.RetryAfter.Time
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonPairingCodeRefused, e.Message)
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPairingCodeRefused, e.Message, now)
	},
	whatsapp.EventLoggedOut: func(m *model, e whatsapp.Event, now time.Time) {
		m.want.JID = ""
		m.rest(v1alpha1.ReasonLoggedOut)
		message := e.Message + ": change the annotation " + v1alpha1.RestartedAtAnnotation + " and scan again"
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonLoggedOut, message)
		m.phase(v1alpha1.PhaseLoggedOut, v1alpha1.ReasonLoggedOut, message, now)
	},
	whatsapp.EventReplaced: func(m *model, _ whatsapp.Event, now time.Time) { m.replaced(now) },
	whatsapp.EventBanned: func(m *model, e whatsapp.Event, now time.Time) {
		message := m.ban(e)
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonBanned, message)
		m.phase(v1alpha1.PhaseBanned, v1alpha1.ReasonBanned, message, now)
	},
	whatsapp.EventOutdated: func(m *model, _ whatsapp.Event, now time.Time) {
		m.retryAt = time.Time{}
		message := "WhatsApp refuses this version of the client: upgrade the operator's image"
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonOutdated, message)
		m.phase(v1alpha1.PhaseOutdated, v1alpha1.ReasonOutdated, message, now)
	},
}

// event takes note of what happened on the present connection.
func (m *model) event(e whatsapp.Event, now time.Time) {
	if m.socket == socketNone || m.socket == socketOver {
		return
	}
	switch e.Type {
	case whatsapp.EventQR:
		if m.want.JID != "" {
			return
		}
		m.codes, m.code, m.watchdog = e.Codes, nil, time.Time{}
		m.beginPairing(now)
		if m.showNext(now) {
			m.uncount()
			m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForScan, "scan status.qr with the phone: Linked devices, Link a device", now)
		}
	case whatsapp.EventPairingCode:
		if m.want.JID != "" {
			return
		}
		m.beginPairing(now)
		m.watchdog = time.Time{}
		m.uncount()
		m.want.PairingCode, m.codeUntil = e.Code, e.Until
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonWaitingForCode,
			"type status.pairingCode on the phone "+m.dialed.pairPhone+": Linked devices, Link a device, Link with phone number instead", now)
	case whatsapp.EventPairSuccess:
		m.hideCode()
		m.want.JID, m.want.PhoneNumber = e.JID, e.PhoneNumber
		m.want.PairingDeadline, m.codeCount = nil, 0
		m.watchdog = now.Add(pairedTimeout)
		m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonPaired, "the phone "+e.PhoneNumber+" linked the device", now)
		m.tell(corev1.EventTypeNormal, v1alpha1.ReasonPaired, "the phone "+e.PhoneNumber+" linked the device")
	case whatsapp.EventPairError:
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonPairingFailed, e.Message)
		m.phase(v1alpha1.PhasePairing, v1alpha1.ReasonPairingFailed, e.Message, now)
	case whatsapp.EventConnected:
		m.connected(e, now)
	case whatsapp.EventPushName:
		m.want.PushName = e.PushName
	case whatsapp.EventDisconnected, whatsapp.EventCodeRefused, whatsapp.EventLoggedOut, whatsapp.EventReplaced, whatsapp.EventBanned, whatsapp.EventOutdated:
		m.over(e, now)
	}
}

func (m *model) connected(e whatsapp.Event, now time.Time) {
	m.socket, m.watchdog = socketOpen, time.Time{}
	m.want.JID, m.want.PhoneNumber = e.JID, e.PhoneNumber
	if e.PushName != "" {
		m.want.PushName = e.PushName
	}
	if m.want.LastConnectedTime != nil {
		m.want.Reconnects++
	} else {
		m.tell(corev1.EventTypeNormal, v1alpha1.ReasonConnected, "connected as "+e.PhoneNumber)
	}
	m.want.LastConnectedTime = at(now)
	m.want.PairingDeadline = nil
	m.stableAt = now.Add(stableAfter)
	if !m.logoutWanted() && !m.wrongPhone() {
		m.phase(v1alpha1.PhaseConnected, v1alpha1.ReasonConnected, "connected to WhatsApp", now)
	}
}

// over takes note of the end of the present connection.
func (m *model) over(e whatsapp.Event, now time.Time) {
	scanned := m.socket == socketPairing && m.want.JID != ""
	lasted := m.socket == socketOpen && m.stableAt.IsZero()
	m.drop()
	switch {
	case e.Type == whatsapp.EventLoggedOut && (m.logoutWanted() || m.running == opLogout):
		m.onLoggedOut(now)
	case e.Type == whatsapp.EventDisconnected && scanned:
		m.retryAt = now // the 515 after the scan: the device logs in on a new connection
	case m.logoutWanted() && e.Type == whatsapp.EventBanned:
		m.message = m.ban(e)
	case m.logoutWanted():
		m.failed(v1alpha1.ReasonDeleting, e.Message, now)
	case e.Type == whatsapp.EventDisconnected && !lasted && !e.Ours:
		if m.counted(e, now) {
			m.leaveAlone(now)
			return
		}
		endings[e.Type](m, e, now)
		m.slowDown(now)
	default:
		endings[e.Type](m, e, now)
	}
}

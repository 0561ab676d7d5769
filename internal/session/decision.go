package session

import (
	"time"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// Operation is work that blocks. A session has at most one under way.
type Operation string

// The operations.
const (
	OpNone   Operation = ""
	OpToken  Operation = "token"  // wait for a login token
	OpTake   Operation = "take"   // take the keys
	OpDial   Operation = "dial"   // connect
	OpClose  Operation = "close"  // close the socket
	OpLogout Operation = "logout" // unlink the device
	OpForget Operation = "forget" // delete keys and record
	OpSettle Operation = "settle" // record that the session has not ended its worker
	OpTrial  Operation = "trial"  // record Decision.Trial
	OpVerify Operation = "verify" // ask WhatsApp whether Decision.Phone is the linked account

	OpPasskeyAnswer  Operation = "passkeyAnswer"  // send Decision.PasskeyResponse
	OpPasskeyConfirm Operation = "passkeyConfirm" // confirm that the code on the phone is the right one
)

// DialSpec has the parts of the spec that a connection depends on. PairPhone is the
// phone on which a person types a pairing code; empty: QR codes are offered.
type DialSpec struct{ ProxySecret, DeviceName, PairPhone string }

// Decision is what to do now.
type Decision struct {
	// Cancel: the operation under way is useless now. Its result must still be given to Step.
	Cancel bool
	// Operation must be started, and its result be given to Step. Rule says why.
	Operation Operation
	Rule      string
	// Dial and HasToken belong to OpDial, which uses the login token if there is one.
	Dial     DialSpec
	HasToken bool
	// Phone belongs to OpVerify.
	Phone string
	// PasskeyResponse belongs to OpPasskeyAnswer.
	PasskeyResponse string
	// Trial belongs to OpTrial: the trial in which the session is about to be connected, which
	// is the size of its group or aloneAgain; 0: the process has lived through its trial.
	Trial int32
	// Publication must be published. It replaces an older one that is still pending; nil:
	// nothing has changed.
	Publication *Publication
	// Events must be recorded.
	Events []RecordedEvent
	// Restarted: a person has restarted the session (restartedAt).
	Restarted bool
}

// maxSteps bounds the rules that one Next applies: a rule that only changes the machine
// may make another rule apply.
const maxSteps = 4

// Next returns what to do at the time now.
func (m *Machine) Next(now time.Time) Decision {
	if m.obj == nil {
		return Decision{}
	}
	m.tick(now)
	d := Decision{Cancel: m.cancels(now), Restarted: m.restarted}
	m.restarted = false
	for range maxSteps {
		if d.Rule, d.Operation = m.decide(now); d.Operation != OpNone {
			break
		}
	}
	m.paced = OpNone
	switch {
	case d.Operation == OpNone:
	case d.Operation != OpClose && !m.pace.allows(d.Operation, now): // closing a socket is never delayed
		m.paced, d.Operation = d.Operation, OpNone
	default:
		m.pace.start(d.Operation, now)
		m.running = d.Operation
	}
	if d.Operation == OpDial {
		d.Dial, d.HasToken = m.dialSpec(), m.token
		m.dialing, m.token = d.Dial, false
		if m.fleet.HoldsBack() {
			m.explainHoldBack(now)
		}
	}
	if d.Operation == OpTrial && !m.trialOver(now) {
		d.Trial = m.trialWanted
	}
	switch d.Operation {
	case OpPasskeyAnswer:
		d.PasskeyResponse = m.sendPasskeyAnswer()
	case OpPasskeyConfirm:
		m.passkey.confirm, m.passkey.confirming = false, true
	}
	if d.Operation == OpVerify {
		d.Phone = m.obj.Spec.Pairing.PhoneNumber
		m.verifying = m.identity()
	}
	if p, changed := m.publication(now); changed {
		d.Publication, m.publishing = &p, true
	}
	d.Events, m.events = m.events, nil
	return d
}

// Status returns the status to write, and whether this process must write it.
func (m *Machine) Status(now time.Time) (v1alpha1.WhatsAppSessionStatus, bool) {
	if m.obj == nil {
		return v1alpha1.WhatsAppSessionStatus{}, false
	}
	return m.wantedStatus(now)
}

// Finished reports whether this process no longer has anything of the session.
func (m *Machine) Finished() bool {
	return m.obj != nil && m.running == OpNone && m.socket == socketNone && (m.gone || !m.heldHere() && (!m.placed() || m.draining))
}

// WakeAt is the next time after now at which Next has something to do; zero: not before
// the next input. What was due by now has been done, or waits for an input.
func (m *Machine) WakeAt(now time.Time) (earliest time.Time) {
	if m.obj == nil {
		return earliest
	}
	for _, t := range append(m.wakeTimes(now), m.pace.from(m.paced), m.pace.from(claim)) {
		if t.After(now) && (earliest.IsZero() || t.Before(earliest)) {
			earliest = t
		}
	}
	return earliest
}

// Object is the newest known object; nil: none.
func (m *Machine) Object() *v1alpha1.WhatsAppSession { return m.obj }

// Phase is the session's phase, which may not be written yet.
func (m *Machine) Phase() v1alpha1.Phase { return m.want.Phase }

// Quarantined reports whether the session failed so often that the next attempt is made
// only after hours.
func (m *Machine) Quarantined() bool { return m.stalled() }

// Wanted reports whether this worker should hold the session.
func (m *Machine) Wanted(now time.Time) bool { return m.stays(now) }

// Paired reports whether a device is linked, as far as this process knows.
func (m *Machine) Paired() bool { return m.want.JID != "" }

// Unstable reports whether the session has never been connected, or has failed since
// it was last stable. A session that fails in a loop stays unstable even if it was
// connected once.
func (m *Machine) Unstable() bool { return m.want.LastConnectedTime == nil || m.want.Failures > 0 }

// Pace is for the next machine of the session (Config.Pace).
func (m *Machine) Pace() *Pace { return m.pace }

// Running is the operation under way; OpNone: none.
func (m *Machine) Running() Operation { return m.running }

// Dialing is the DialSpec of the last OpDial.
func (m *Machine) Dialing() DialSpec { return m.dialing }

// Attempts is the number of failures since the last stable connection.
func (m *Machine) Attempts() int { return m.attempts }

// wantedStatus is Status when there is an object.
func (m *Machine) wantedStatus(now time.Time) (v1alpha1.WhatsAppSessionStatus, bool) {
	switch {
	case m.gone:
		return v1alpha1.WhatsAppSessionStatus{}, false
	case !m.heldHere() && (!m.hold || m.obj.Status.HeldBy != "" || !m.stays(now)):
		return v1alpha1.WhatsAppSessionStatus{}, false
	case m.heldHere() && !m.hold && m.stays(now): // held by a former process, until this one has claimed it
		return v1alpha1.WhatsAppSessionStatus{}, false
	case m.heldHere() && m.hold && !m.stays(now): // the release has the same status, and must not wait for another write
		return v1alpha1.WhatsAppSessionStatus{}, false
	}
	s := *m.want.DeepCopy()
	from := &m.obj.Status
	s.Worker, s.Epoch, s.Installation, s.SessionID, s.Conditions = from.Worker, from.Epoch, from.Installation, from.SessionID, from.Conditions
	s.HeldBy, s.HolderStart = "", ""
	if m.hold {
		s.HeldBy, s.HolderStart = m.worker, m.process
	}
	s = status.Summarize(s, m.facts(m.obj.Generation), now)
	return s, !apiequality.Semantic.DeepEqual(*from, s)
}

func (m *Machine) facts(generation int64) status.Facts {
	return status.Facts{Generation: generation, Phase: m.want.Phase, Reason: m.reason, Message: m.message, Stalled: m.stalled()}
}

// Publication is the state of a session that is published to Redis, and from there
// delivered to Laravel. Its parts are written in one round trip if possible.
type Publication struct {
	Status delivery.StatusItem
	// QR is the code that can be scanned now; nil: none.
	QR *delivery.QRItem
	// QRGone: a code that was published by this holder, or by the one before, has expired or was
	// used.
	QRGone bool
	// NewStatus and NewQR: the part must be delivered to Laravel. The cache is written in any
	// case.
	NewStatus, NewQR bool
	// ConnectedSince is zero unless the session is connected.
	ConnectedSince time.Time
	Worker         string
}

// Supersede makes p also deliver what the older publication, which it replaces, may
// not have delivered to Laravel.
func (p *Publication) Supersede(older *Publication) {
	if older == nil {
		return
	}
	p.NewStatus = p.NewStatus || older.NewStatus
	p.NewQR = p.QR != nil && (p.NewQR || older.NewQR)
}

// publication returns the present publication, and whether it must be published.
func (m *Machine) publication(now time.Time) (Publication, bool) {
	if !m.taken || m.gone {
		return Publication{}, false
	}
	s := status.Summarize(m.want, m.facts(0), now)
	s.SessionID = m.obj.Status.SessionID
	item := status.Update(s, delivery.Numbers{}, time.Time{})
	code := ""
	if m.code != nil {
		code, _ = m.code.Content()
	}
	newStatus, newCode := item != m.published, code != m.publishedQR
	if !newStatus && !newCode && !m.publishAll {
		return Publication{}, false
	}
	if newStatus {
		m.changedAt = now
	}
	m.published, m.publishedQR = item, code
	m.n++
	p := m.lastPublication()
	p.NewStatus, p.NewQR = newStatus || m.publishAll, newCode || m.publishAll
	m.publishAll = false
	return p, true
}

// lastPublication is the last publication, with the last number.
func (m *Machine) lastPublication() Publication {
	numbers := delivery.Numbers{Epoch: m.epoch, Seq: delivery.FirstSeq(m.starts) + m.n}
	p := Publication{Status: m.published, Worker: m.worker}
	p.Status.Numbers = numbers
	p.Status.Metadata = delivery.NewMetadata(m.obj.Spec.Metadata)
	p.Status.OccurredAt = delivery.Time{Time: m.changedAt}
	if m.code != nil {
		qr := *m.code
		qr.Numbers, qr.Metadata = numbers, p.Status.Metadata
		p.QR = &qr
		m.codePublished = true
	}
	p.QRGone = m.code == nil && m.codePublished
	if m.want.Phase == v1alpha1.PhaseConnected && m.want.LastConnectedTime != nil {
		p.ConnectedSince = m.want.LastConnectedTime.Time
	}
	return p
}

// codeMayRemain reports whether a code that another process published may still be in Redis.
// That process may have ended before it could remove a code that was used: Laravel would offer
// it until it expires. A request for a passkey lives longest.
func codeMayRemain(s v1alpha1.WhatsAppSessionStatus, now time.Time) bool {
	paired := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionPaired)
	return paired == nil || paired.Status != metav1.ConditionTrue || now.Sub(paired.LastTransitionTime.Time) < passkeyTimeout
}

package session

import (
	"time"

	apiequality "k8s.io/apimachinery/pkg/api/equality"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// Operation is work that blocks; at most one is under way for a session.
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
	OpSettle Operation = "settle" // say that the session has not ended its worker
	OpTrial  Operation = "trial"  // record Decision.Trial
	OpVerify Operation = "verify" // ask WhatsApp whose account Decision.Phone is
)

// DialSpec is what of the spec a connection depends on. PairPhone is set where a
// code is to be typed on that phone.
type DialSpec struct{ ProxySecret, DeviceName, PairPhone string }

// Decision is what is to be done now.
type Decision struct {
	// Cancel: the operation under way is of no use any more. Its result is still awaited.
	Cancel bool
	// Operation is to be started; its result goes into Step. Rule says why.
	Operation Operation
	Rule      string
	// Dial and HasToken belong to OpDial: a login token that is in hand is used up by it.
	Dial     DialSpec
	HasToken bool
	// Phone belongs to OpVerify.
	Phone string
	// Trial belongs to OpTrial: the size of the group in which the session is about to be
	// connected; 0: the process has lived through its trial.
	Trial int32
	// Publication is to be published, in place of an older one that still waits; nil: nothing new.
	Publication *Publication
	// Events are to be recorded.
	Events []RecordedEvent
	// Restarted: a person has asked for a new beginning.
	Restarted bool
}

// mostSteps bounds the rules that one Next carries out: a rule that only changes
// the machine may make way for another.
const mostSteps = 4

// Next acts upon the time and says what is to be done.
func (m *Machine) Next(now time.Time) Decision {
	if m.obj == nil {
		return Decision{}
	}
	m.tick(now)
	d := Decision{Cancel: m.cancels(now), Restarted: m.restarted}
	m.restarted = false
	for range mostSteps {
		if d.Rule, d.Operation = m.decide(now); d.Operation != OpNone {
			break
		}
	}
	m.paced = OpNone
	switch {
	case d.Operation == OpNone:
	case d.Operation != OpClose && !m.pace.allows(d.Operation, now): // a socket is never kept open for it
		m.paced, d.Operation = d.Operation, OpNone
	default:
		m.pace.start(d.Operation, now)
		m.running = d.Operation
	}
	if d.Operation == OpDial {
		d.Dial, d.HasToken = m.dialSpec(), m.token
		m.dialing, m.token = d.Dial, false
		if m.fleet.HoldsBack() {
			m.heldBack(now)
		}
	}
	if d.Operation == OpTrial && !m.trialOver(now) {
		d.Trial = m.trialWanted
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

// Status is the status that this process wants written, and whether it may and
// must write one.
func (m *Machine) Status(now time.Time) (v1alpha1.WhatsAppSessionStatus, bool) {
	if m.obj == nil {
		return v1alpha1.WhatsAppSessionStatus{}, false
	}
	return m.wantedStatus(now)
}

// Finished: nothing of the session is left in this process.
func (m *Machine) Finished() bool {
	return m.obj != nil && m.running == OpNone && m.socket == socketNone && (m.gone || !m.heldHere() && (!m.placed() || m.draining))
}

// WakeAt is the next time after now at which Next has something to do; zero:
// when something happens. What was due by now has been done, or waits for something else.
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

// Object is the newest object known; nil: none is.
func (m *Machine) Object() *v1alpha1.WhatsAppSession { return m.obj }

// Phase is the session's phase as the holder sees it.
func (m *Machine) Phase() v1alpha1.Phase { return m.want.Phase }

// Quarantined: the session failed so often that it is tried only after hours.
func (m *Machine) Quarantined() bool { return m.stalled() }

// Wanted: the session is to be held here.
func (m *Machine) Wanted(now time.Time) bool { return m.stays(now) }

// Paired: a device is linked, as far as is known here.
func (m *Machine) Paired() bool { return m.want.JID != "" }

// Unproven: the session has never been connected, or has failed since its last
// stable minute: to have been connected once does not make the hundredth attempt
// of a loop a good one.
func (m *Machine) Unproven() bool { return m.want.LastConnectedTime == nil || m.want.Failures > 0 }

// Pace is what the next machine of the session is to know, if this one ends.
func (m *Machine) Pace() *Pace { return m.pace }

// Running is the operation under way.
func (m *Machine) Running() Operation { return m.running }

// Dialing is what the last dial began with.
func (m *Machine) Dialing() DialSpec { return m.dialing }

// Attempts counts the failures since the last stable connection.
func (m *Machine) Attempts() int { return m.attempts }

// wantedStatus is Status for a session that is known.
func (m *Machine) wantedStatus(now time.Time) (v1alpha1.WhatsAppSessionStatus, bool) {
	switch {
	case m.gone:
		return v1alpha1.WhatsAppSessionStatus{}, false
	case !m.heldHere() && (!m.hold || m.obj.Status.HeldBy != "" || !m.stays(now)):
		return v1alpha1.WhatsAppSessionStatus{}, false
	case m.heldHere() && !m.hold && m.stays(now): // a former process's hold, until ours is claimed
		return v1alpha1.WhatsAppSessionStatus{}, false
	case m.heldHere() && m.hold && !m.stays(now): // the release says it, and must not wait behind a report
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

// Publication is what Redis, and through it Laravel, is to know of a session.
// Its parts are written in one round trip where possible.
type Publication struct {
	Status delivery.StatusItem
	// QR is the code that waits to be scanned; nil: none does.
	QR *delivery.QRItem
	// QRGone: a code was shown under this holder, and it has expired or was used.
	QRGone bool
	// NewStatus and NewQR: Laravel does not know it yet. The cache is written in any case.
	NewStatus, NewQR bool
	// ConnectedSince is zero unless the session is connected.
	ConnectedSince time.Time
	Worker         string
}

// Supersede keeps what an older publication, which p takes the place of, may not
// have brought to Laravel.
func (p *Publication) Supersede(older *Publication) {
	if older == nil {
		return
	}
	p.NewStatus = p.NewStatus || older.NewStatus
	p.NewQR = p.QR != nil && (p.NewQR || older.NewQR)
}

// publication is what Redis is to know now, and whether it differs from what was published last.
func (m *Machine) publication(now time.Time) (Publication, bool) {
	if !m.taken || m.gone {
		return Publication{}, false
	}
	s := status.Summarize(m.want, m.facts(0), now)
	s.SessionID = m.obj.Status.SessionID
	item := status.Update(s, delivery.Numbers{}, time.Time{})
	code := ""
	if m.code != nil {
		code = m.code.QR
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
	p := m.present()
	p.NewStatus, p.NewQR = newStatus || m.publishAll, newCode || m.publishAll
	m.publishAll = false
	return p, true
}

// present is the publication of what was published last, under the last number given.
func (m *Machine) present() Publication {
	numbers := delivery.Numbers{Epoch: m.epoch, Seq: delivery.FirstSeq(m.starts) + m.n}
	p := Publication{Status: m.published, Worker: m.worker}
	p.Status.Numbers = numbers
	p.Status.OccurredAt = delivery.Time{Time: m.changedAt}
	if m.code != nil {
		qr := *m.code
		qr.Numbers = numbers
		p.QR = &qr
		m.codePublished = true
	}
	p.QRGone = m.code == nil && m.codePublished
	if m.want.Phase == v1alpha1.PhaseConnected && m.want.LastConnectedTime != nil {
		p.ConnectedSince = m.want.LastConnectedTime.Time
	}
	return p
}

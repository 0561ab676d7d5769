package session

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// One account must never end its worker again and again. The store counts the
// takings of a session in a row that nothing has settled, neither a minute of
// life nor an orderly end. That many processes have died soon after they took it,
// but with them died the takings of all their other sessions, too: a thousand
// sessions have the same count, and one of them is the cause.
//
// So a session whose last suspectAfter takings are not settled is only a suspect.
// Suspects of one worker are tried one after the other (Fleet.Trial), and before
// the connection of a suspect is opened, the mark of its trial is in its status,
// confirmed by the API server: retryReason EndsItsWorker without retryAfter. A
// process that takes a session which bears the mark, and which nothing has
// settled, knows that a process has died of it. Only that session rests for
// hours: retryReason EndsItsWorker with retryAfter. Then it is a suspect again.
//
// A trial lasts trialShort at first, so that a thousand suspects are soon through;
// what ends its worker does so at the login, as a rule. Where workers go on dying,
// it lasts as long as a taking needs to be settled, which finds every culprit. The
// price: a process that dies of an earlier, short trial is taken for the fault of
// the session that is tried at that moment.

const (
	// suspectAfter is how many takings in a row must not be settled. A few are no sign
	// yet: a worker that is killed again and again within a minute leaves as many with each
	// of its sessions, and a hundred of them must not be tried one after the other for that.
	suspectAfter = 6
	// trialShort and trialLong are how long the mark stays after the connection is open;
	// the long one from longAfter unsettled takings on.
	trialShort = 10 * time.Second
	trialLong  = settleAfter
	longAfter  = 9
	// trialMargin is the time between two trials: the mark's removal has to be written.
	trialMargin = 2 * time.Second
	// trialPoll is how often a suspect asks whether it may begin.
	trialPoll = time.Second
	// settleAfter is how long a taking must have lasted; up to half of it is added by chance,
	// so that not all sessions of a worker write at once.
	settleAfter = time.Minute
	// settleRetry is the pause after a settlement that failed.
	settleRetry = 30 * time.Second
)

// Trials lets the suspects of a worker begin one after the other. The zero value
// is ready for use.
type Trials struct {
	uid   types.UID
	until time.Time
}

// Begin reports whether the session may be tried now, for a trial of that length. It
// is called again when the session's connection is open, from when on the length counts.
func (t *Trials) Begin(uid types.UID, lasts time.Duration, now time.Time) bool {
	if t.uid != uid && now.Before(t.until) {
		return false
	}
	t.uid, t.until = uid, now.Add(lasts+trialMargin)
	return true
}

// trialLasts is how long the session's trial lasts.
func (m *Machine) trialLasts() time.Duration {
	if m.unsettled < longAfter {
		return trialShort
	}
	return trialLong
}

// marked: the status bears the mark of a trial.
func marked(s v1alpha1.WhatsAppSessionStatus) bool {
	return s.RetryReason == v1alpha1.ReasonEndsItsWorker && s.RetryAfter == nil
}

// suspected takes note of how many takings before the present one were not settled.
func (m *Machine) suspected(unsettled int32, now time.Time) {
	m.unsettled, m.suspect, m.settleAt, m.trialUntil = unsettled, unsettled >= suspectAfter, time.Time{}, time.Time{}
	switch {
	case m.suspect && marked(m.want): // the process that tried it has died
		m.restFromEndingWorkers(now)
	case m.suspect: // its trial is still to come
	default:
		m.settleAt = m.settleTime(now)
		m.unmark()
	}
}

// settleTime is when a taking that has begun now, or whose trial has, is settled.
func (m *Machine) settleTime(now time.Time) time.Time {
	return now.Add(settleAfter + time.Duration(m.random()*float64(settleAfter/2)))
}

// unmark removes what the status says of a trial or of the rest before it.
func (m *Machine) unmark() {
	if m.want.RetryReason == v1alpha1.ReasonEndsItsWorker {
		m.want.RetryReason, m.want.RetryAfter = "", nil
	}
}

// restFromEndingWorkers has the session rest for hours.
func (m *Machine) restFromEndingWorkers(now time.Time) {
	failures := m.quarantine.After + int(min(max(m.unsettled-suspectAfter-1, 0), 16))
	m.want.RetryReason = v1alpha1.ReasonEndsItsWorker
	m.want.RetryAfter = at(roundUp(now.Add(m.quarantine.pause(failures, m.random()))))
	message := EndsItsWorkerMessage(m.want)
	m.recordEvent(corev1.EventTypeWarning, v1alpha1.ReasonEndsItsWorker, message)
	if m.logoutWanted() {
		m.terminating(v1alpha1.ReasonEndsItsWorker, message, now)
		return
	}
	m.phase(v1alpha1.PhaseFailed, v1alpha1.ReasonEndsItsWorker, message, now)
}

// EndsItsWorkerMessage says why a session rests whose connection ended workers.
func EndsItsWorkerMessage(s v1alpha1.WhatsAppSessionStatus) string {
	return fmt.Sprintf("the workers that connected this session died within a minute, at last the one that tried it apart from the others: it is tried again at %s; read the end of that worker's log (kubectl logs --previous) and report it, then change the annotation %s to try at once",
		s.RetryAfter.UTC().Format(time.RFC3339), v1alpha1.RestartedAtAnnotation)
}

// trialDue: a suspect is to connect, and may not yet.
func (m *Machine) trialDue(now time.Time) bool {
	return m.suspect && m.dialDue(now) && !m.trialConfirmed()
}

// trialConfirmed: the API server has the mark, and knows of the restart that asked for the trial.
func (m *Machine) trialConfirmed() bool {
	return marked(m.want) && marked(m.obj.Status) && m.obj.Status.ObservedRestartedAt == m.want.ObservedRestartedAt
}

// beginTrial marks the session when its turn has come.
func (m *Machine) beginTrial(now time.Time) Operation {
	switch {
	case marked(m.want): // it is being written
	case !m.fleet.Trial(m.obj.UID, m.trialLasts(), now):
		m.retryAt = now.Add(time.Duration((1 + m.random()) * float64(trialPoll)))
	default:
		m.want.RetryReason, m.want.RetryAfter = v1alpha1.ReasonEndsItsWorker, nil
		if !m.logoutWanted() && m.want.Phase == v1alpha1.PhaseFailed {
			m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, "the session is tried apart from the others, because the workers that connected it died", now)
		}
	}
	return OpNone
}

// onTrial takes note of a suspect's open connection.
func (m *Machine) onTrial(now time.Time) {
	if !m.suspect {
		return
	}
	m.fleet.Trial(m.obj.UID, m.trialLasts(), now)
	m.trialUntil, m.settleAt = now.Add(m.trialLasts()), m.settleTime(now)
}

// endTrial removes the mark of a session that has lived through its trial.
func (m *Machine) endTrial(now time.Time) {
	if m.trialUntil.IsZero() || now.Before(m.trialUntil) {
		return
	}
	m.trialUntil, m.suspect = time.Time{}, false
	if marked(m.want) {
		m.unmark()
	}
}

// onSettled takes note of a settlement.
func (m *Machine) onSettled(failed bool, now time.Time) {
	if failed {
		m.settleAt = now.Add(settleRetry)
		return
	}
	m.settleAt, m.trialUntil, m.suspect, m.unsettled = time.Time{}, time.Time{}, false, 0
	if marked(m.want) {
		m.unmark()
	}
}

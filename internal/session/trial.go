package session

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// One session must never end its worker again and again. The store counts the
// takings of a session in a row that nothing has settled, neither a minute of
// life nor an orderly end: so many processes have died soon after they took it.
// The takings of all other sessions of those processes were not settled either, so
// a thousand sessions have the same count, and one of them is the cause.
//
// A session with too many unsettled takings is a suspect. Suspects are connected in
// groups (Trials), and the store records the size of the group before the connection
// is opened (OpTrial with a size). If the process survives, the size is deleted (OpTrial
// with 0). If it dies, the next process that takes the session reads the size and connects
// it in a group of an eighth of that, and at last alone. A session that was connected
// alone when its process died is the cause and rests for hours (retryReason
// EndsItsWorker with retryAfter); then it is connected alone again.
//
// So a worker with up to eight sessions finds the cause at the third death and one with a
// thousand at the seventh. Where workers were killed for another reason, their sessions
// are back after eight groups; none rests for fewer than five such deaths in a row, and on
// a worker with up to eight sessions only the one that was on trial at the third.
//
// A trial is short at first, because a session that ends its worker usually does so at the
// login. After more deaths it lasts as long as a taking needs to be settled. The price: if a
// process dies of a session whose short trial has ended, the sessions on trial at that
// moment are blamed.

const (
	// suspectAfter is how many takings in a row must not be settled; on a worker with so
	// few sessions that each can be tried in its own trial, suspectAfterIfFew.
	suspectAfter      = 3
	suspectAfterIfFew = 2
	// trialGroups is into how many groups the suspects are divided.
	trialGroups = 8
	// aloneAgain is recorded, in place of a size, for the trial of a session whose process has
	// died during its trial alone. A program that does not know it reads that there was none.
	aloneAgain = -1
	// How long a trial lasts after the connection is open: that of a group, that of one
	// session alone, and any from longAfter unsettled takings on.
	trialOfGroup = 5 * time.Second
	trialOfOne   = 10 * time.Second
	trialLong    = settleAfter
	longAfter    = 8
	// trialMargin is the time until the end of a trial is recorded.
	trialMargin = 2 * time.Second
	// trialPoll is how often a suspect asks whether it may begin.
	trialPoll = time.Second
	// settleAfter is how long a taking must have lasted; takings are settled at multiples of
	// settleInterval.
	settleAfter    = time.Minute
	settleInterval = settleAfter / 2
	// settleRetry is the pause after a settlement, or a record of a trial, that failed.
	settleRetry = 30 * time.Second
)

// Trials bounds how many suspects of a worker are tried at the same time. The zero
// value is ready for use. It is not safe for concurrent use.
type Trials struct{ tried map[types.UID]trial }

type trial struct {
	size  int32
	until time.Time
}

// Begin reports whether the session may be tried now, in a group of at most that size, for
// a trial of that length. It is called again when the session's connection is open, from
// when on the length counts. Groups of different sizes may be tried at the same time, since
// each gets smaller independently; a single session is tried with no other.
func (t *Trials) Begin(uid types.UID, size int32, lasts time.Duration, now time.Time) bool {
	group, none := int32(0), true
	for other, o := range t.tried {
		switch {
		case !now.Before(o.until):
			delete(t.tried, other)
		case other == uid:
		default:
			none = false
			if o.size == 1 {
				group = size
			} else if o.size <= size {
				group++
			}
		}
	}
	if _, begun := t.tried[uid]; !begun && !none && (size == 1 || group >= size) {
		return false
	}
	if t.tried == nil {
		t.tried = map[types.UID]trial{}
	}
	t.tried[uid] = trial{size: size, until: now.Add(lasts + trialMargin)}
	return true
}

// nextTrial is the trial of a session: the size of its group, or aloneAgain. last is the trial
// during which its process died; 0: it was in none. sessions is how many the worker has.
func nextTrial(last int32, sessions int) int32 {
	switch last {
	case 1, aloneAgain:
		return aloneAgain
	case 0:
		last = int32(min(sessions, 1<<20))
	}
	return max(1, (last+trialGroups-1)/trialGroups)
}

// GroupSize is how many sessions are tried together in a trial.
func GroupSize(trial int32) int32 { return max(1, trial) }

// isCause reports whether a session whose process died during that trial ends its workers.
func isCause(unsettled, trial int32) bool {
	return trial == aloneAgain || trial == 1 && unsettled <= suspectAfter
}

// suspected reports whether a session may be the one that ends its workers.
func suspected(unsettled, last int32, sessions int) bool {
	return unsettled >= suspectAfter || unsettled >= suspectAfterIfFew && (last != 0 || nextTrial(0, sessions) == 1)
}

// trialLasts is how long the session's trial in a group of that size lasts.
func (m *Machine) trialLasts(size int32) time.Duration {
	switch {
	case m.unsettled >= longAfter:
		return trialLong
	case size == 1:
		return trialOfOne
	default:
		return trialOfGroup
	}
}

// onUnsettled handles the number of takings before this one that were not settled, and the
// trial during which the last of those processes died.
func (m *Machine) onUnsettled(unsettled, trial int32, now time.Time) {
	m.unsettled, m.lastTrial = unsettled, trial
	m.trial, m.trialUntil, m.settleAt = 0, time.Time{}, time.Time{}
	m.suspect = unsettled >= suspectAfterIfFew && suspected(unsettled, trial, m.fleet.Sessions())
	rested := m.want.RetryReason == v1alpha1.ReasonEndsItsWorker
	rests := rested && waits(m.want, now) && GroupSize(trial) == 1 && trial != 0
	switch {
	case m.suspect && (rests || !rested && isCause(unsettled, trial)):
		m.restFromEndingWorkers(now)
	case m.suspect: // it waits for its trial
	default:
		m.settleAt = settleTime(now)
		m.forgetRest()
	}
}

// settleTime is when a taking that has begun now, or whose trial has, is settled: at the
// same time as those of other sessions, which the store settles together.
func settleTime(now time.Time) time.Time {
	earliest := now.Add(settleAfter)
	if t := earliest.Truncate(settleInterval); !t.Before(earliest) {
		return t
	}
	return earliest.Truncate(settleInterval).Add(settleInterval)
}

// forgetRest removes what the status says of a rest that is over.
func (m *Machine) forgetRest() {
	if m.want.RetryReason == v1alpha1.ReasonEndsItsWorker {
		m.want.RetryReason, m.want.RetryAfter = "", nil
	}
}

// restFromEndingWorkers makes the session rest for hours.
func (m *Machine) restFromEndingWorkers(now time.Time) {
	m.pausePairing()
	failures := m.quarantine.After + int(min(max(m.unsettled-suspectAfter, 0), 16))
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
	return fmt.Sprintf("the workers that connected this session died within a minute, the last one while it tried this session alone: the next attempt is made at %s; read the end of that worker's log (kubectl logs --previous) and report it, then change the annotation %s to try at once",
		s.RetryAfter.UTC().Format(time.RFC3339), v1alpha1.RestartedAtAnnotation)
}

const trialMessage = "workers died within a minute after they had connected this session among others: it is connected in a small group, to find the session that ended them"

// trialDue: a suspect is to connect, and its trial is not recorded.
func (m *Machine) trialDue(now time.Time) bool {
	return m.suspect && m.trial == 0 && m.dialDue(now)
}

// beginTrial records the trial as soon as another session may be on trial.
func (m *Machine) beginTrial(now time.Time) Operation {
	sessions := m.fleet.Sessions()
	if !suspected(m.unsettled, m.lastTrial, sessions) { // the worker has been given more sessions since
		m.suspect, m.settleAt = false, settleTime(now)
		m.forgetRest()
		return OpNone
	}
	m.forgetRest()
	if !m.logoutWanted() && m.want.Phase != v1alpha1.PhasePairing && m.message != trialMessage {
		m.phase(v1alpha1.PhaseConnecting, v1alpha1.ReasonConnecting, trialMessage, now)
	}
	// The end of an old rest and the restart that asked for this trial are written first:
	// the next process must neither mistake the rest for the result of this trial nor act
	// upon the restart again.
	if m.obj.Status.RetryReason == v1alpha1.ReasonEndsItsWorker || m.obj.Status.ObservedRestartedAt != m.want.ObservedRestartedAt {
		return OpNone
	}
	m.trialWanted = nextTrial(m.lastTrial, sessions)
	size := GroupSize(m.trialWanted)
	if !m.fleet.Trial(m.obj.UID, size, m.trialLasts(size), now) {
		m.retryAt = now.Add(time.Duration((1 + m.random()) * float64(trialPoll)))
		return OpNone
	}
	return OpTrial
}

// trialOver: the process has lived through the session's trial, which is not recorded yet.
func (m *Machine) trialOver(now time.Time) bool {
	return !m.trialUntil.IsZero() && !now.Before(m.trialUntil)
}

// onTrialRecorded handles the result of OpTrial.
func (m *Machine) onTrialRecorded(failed bool, now time.Time) {
	switch {
	case failed && m.trialOver(now):
		m.trialUntil = now.Add(settleRetry)
	case failed:
		m.retryAt = now.Add(time.Duration((1 + m.random()) * float64(trialPoll)))
	case m.trialOver(now):
		m.trialUntil, m.trial, m.lastTrial, m.suspect = time.Time{}, 0, 0, false
	default:
		m.trial, m.settleAt = m.trialWanted, settleTime(now)
	}
}

// onTrial handles the open connection of a suspect.
func (m *Machine) onTrial(now time.Time) {
	if !m.suspect {
		return
	}
	size := GroupSize(m.trial)
	lasts := m.trialLasts(size)
	m.fleet.Trial(m.obj.UID, size, lasts, now)
	if m.trialUntil.IsZero() { // connections that end at once must not delay the settlement again and again
		m.settleAt = settleTime(now)
	}
	m.trialUntil = now.Add(lasts)
}

// onSettled handles the result of OpSettle.
func (m *Machine) onSettled(failed bool, now time.Time) {
	if failed {
		m.settleAt = now.Add(settleRetry)
		return
	}
	m.settleAt, m.trialUntil = time.Time{}, time.Time{}
	m.suspect, m.unsettled, m.lastTrial, m.trial = false, 0, 0, 0
}

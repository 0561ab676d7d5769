package worker

import (
	"cmp"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
)

// Quarantine says when a session that fails again and again is left alone, and
// for how long: attempts in a loop prolong WhatsApp's locks.
type Quarantine struct {
	// After is how many failures in a row, without a stable minute, are enough.
	After int
	// First is the pause then; each further failure doubles it, up to Most. Half of it is by chance.
	First, Most time.Duration
}

// The quarantine where nothing else is configured.
const (
	DefaultQuarantineAfter = 8
	DefaultQuarantineFirst = time.Hour
	DefaultQuarantineMost  = 6 * time.Hour
)

func (q Quarantine) orDefault() Quarantine {
	return Quarantine{
		After: cmp.Or(q.After, DefaultQuarantineAfter),
		First: cmp.Or(q.First, DefaultQuarantineFirst),
		Most:  cmp.Or(q.Most, DefaultQuarantineMost),
	}
}

// pause is how long a session rests after so many failures; chance is from 0 to 1.
func (q Quarantine) pause(failures int, chance float64) time.Duration {
	interval := q.First
	for n := q.After; n < failures && interval < q.Most; n++ {
		interval *= 2
	}
	interval = min(interval, q.Most)
	return interval/2 + time.Duration(chance*float64(interval/2))
}

const (
	// banMargin is added to the end of a ban: the clock of the next holder may be ahead.
	banMargin = 30 * time.Second
	// commonTimeout multiplies the failures after which the pauses become longer while the
	// trouble is common.
	commonTimeout = 4
	// commonPause is the longest pause while the trouble is common: attempts an hour apart
	// would find out of its end long after it.
	commonPause = 15 * time.Minute
	// commonWithin is how long a session counts as failing: longer than that pause.
	commonWithin = 20 * time.Minute
	// commonMoment is within which time connections end that one cause has ended.
	commonMoment = 10 * time.Second
	// verdictDelay is how long the verdict on a session waits for what happens to the
	// others: of those whom one cause fails, one is always the first.
	verdictDelay = commonMoment / 2
	// commonMany is how many sessions must try for half of them to decide. Of fewer all
	// must fail, and one alone says nothing.
	commonMany = 10
)

// troubles tells one session's trouble from everybody's. A few bad minutes of
// WhatsApp or of the network fail all sessions in the same way: if each were
// then left alone for hours, the cure would be the outage.
//
// Those count that try: who fails, and who is connected. A session that rests
// says nothing.
type troubles struct {
	// failed is when a session failed that has had no stable minute since.
	failed map[types.UID]time.Time
	// open are the sessions that are connected.
	open map[types.UID]bool
	// ended is when the connection of a session ended last, however long it had lasted.
	ended map[types.UID]time.Time
}

func (t *troubles) note(uid types.UID, now time.Time) {
	if t.failed == nil {
		t.failed = map[types.UID]time.Time{}
	}
	t.failed[uid] = now
}

func (t *troubles) connected(uid types.UID) {
	if t.open == nil {
		t.open = map[types.UID]bool{}
	}
	t.open[uid] = true
}

func (t *troubles) gone(uid types.UID, now time.Time) {
	if !t.open[uid] {
		return
	}
	delete(t.open, uid)
	if t.ended == nil {
		t.ended = map[types.UID]time.Time{}
	}
	t.ended[uid] = now
}

func (t *troubles) forget(uid types.UID) {
	delete(t.open, uid)
	delete(t.failed, uid)
	delete(t.ended, uid)
}

// common reports whether at least half of those who try have failed lately, or
// have lost their connections in this moment: who had been up for long is soon
// back, and who had just come back has not failed by itself.
func (t *troubles) common(now time.Time) bool {
	return t.most(t.failed, commonWithin, now) || t.most(t.ended, commonMoment, now)
}

// most reports whether those in hit, which forgets them after that time, are at
// least half of them and the connected together.
func (t *troubles) most(hit map[types.UID]time.Time, within time.Duration, now time.Time) bool {
	for uid, when := range hit {
		if now.Sub(when) > within {
			delete(hit, uid)
		}
	}
	failing, tried := len(hit), len(hit)
	for uid := range t.open {
		if _, ok := hit[uid]; !ok {
			tried++
		}
	}
	if tried < commonMany {
		return failing > 1 && failing == tried
	}
	return 2*failing >= tried
}

// counted takes note of the end of a connection that WhatsApp had accepted and
// that had no stable minute, and reports whether the session is to be left alone
// at once, as one that already was. The verdict comes later (judge).
// What never reached WhatsApp does not count: it prolongs no lock, and a network
// that is away for five minutes must not cost hours.
//
// In the same way means for the same reason. An end that nobody explained may be
// any: the last node of a connection, which names the reason, can be lost. Once
// in quarantine, whatever fails goes on with it.
func (m *model) counted(e whatsapp.Event, now time.Time) (enough bool) {
	s := &m.want
	inQuarantine := s.Failures > 0 && s.RetryAfter != nil
	unexplained := e.Reason == whatsapp.ReasonSocketClosed
	m.around.failed(m.obj.UID, now)
	common := m.around.common(now)
	switch {
	case s.Failures == 0, !inQuarantine && !unexplained && s.FailureReason != e.Reason && s.FailureReason != whatsapp.ReasonSocketClosed:
		s.Failures, s.FailureReason, s.RetryAfter, s.RetryReason = 1, e.Reason, nil, ""
	case common: // nobody's own fault
	default:
		s.Failures++
		if !unexplained {
			s.FailureReason = e.Reason
		}
	}
	if !common && (inQuarantine || int(s.Failures) >= m.quarantine.After) {
		m.verdictAt = now.Add(verdictDelay)
	}
	return inQuarantine
}

// judge decides whether a session is left alone that has failed often enough: not
// if the last of its failures has proved to be everybody's. Who had been left
// alone before then rests as for such a failure, not for hours.
func (m *model) judge(now time.Time) {
	m.verdictAt = time.Time{}
	common, inQuarantine := m.around.common(now), m.want.RetryAfter != nil
	switch {
	case !m.taken || m.logoutWanted() || resting[m.want.Phase]:
		return
	case common:
		m.want.Failures--
	}
	if common == inQuarantine { // where not, it is tried soon, or rests already
		m.leaveAlone(now)
	}
}

// leaveAlone puts the session into quarantine, or back into it.
func (m *model) leaveAlone(now time.Time) {
	entered := m.want.RetryAfter == nil
	q := m.quarantine
	if m.around.common(now) {
		q.First, q.Most = min(q.First, commonPause), min(q.Most, commonPause)
	}
	m.want.RetryAfter = at(now.Add(q.pause(int(m.want.Failures), m.random())))
	m.retryAt = m.want.RetryAfter.Time
	if m.want.JID == "" { // no codes are offered meanwhile
		m.want.PairingDeadline = nil
	}
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonQuarantined, status.QuarantineMessage(m.want), now)
	if entered {
		m.tell(corev1.EventTypeWarning, v1alpha1.ReasonQuarantined, m.message)
	}
}

// slowDown makes the pauses of a trouble longer that has been everybody's for long.
func (m *model) slowDown(now time.Time) {
	if m.attempts > commonTimeout*m.quarantine.After && m.around.common(now) {
		m.retryAt = now.Add(time.Duration((1 + m.random()) * float64(min(commonPause, m.quarantine.First)) / 2))
	}
}

// backAgain brings the next attempt of a session forward that others fared
// better than: the trouble that they shared is over. Not all come at once.
func (m *model) backAgain(now time.Time) {
	if !m.verdictAt.IsZero() { // it is given: that failure was everybody's
		m.verdictAt = time.Time{}
		m.want.Failures--
	}
	soon := now.Add(time.Duration(m.random() * float64(backoffMost)))
	if !m.taken || m.socket != socketNone || resting[m.want.Phase] || m.want.RetryReason != "" || m.want.Failures == 0 || !m.retryAt.After(soon) {
		return
	}
	m.retryAt = soon
	if !m.stalled() {
		return
	}
	m.want.RetryAfter = at(soon.Add(time.Second - time.Nanosecond))
	m.retryAt = m.want.RetryAfter.Time
	m.phase(v1alpha1.PhaseDisconnected, v1alpha1.ReasonQuarantined, status.QuarantineMessage(m.want), now)
}

// uncount forgets the failures: the session has had its minute, or a person begins anew.
func (m *model) uncount() {
	m.attempts, m.want.Failures, m.want.FailureReason, m.want.Replacements = 0, 0, "", 0
	m.want.RetryAfter, m.want.RetryReason = nil, ""
	m.verdictAt = time.Time{}
}

// banned: the ban has an end that is still to come.
func (m *model) banned(now time.Time) bool {
	return m.want.RetryAfter != nil && status.Banned(m.want, now)
}

// recall reports whether the session rests, and says of it what the status
// knows: the phase may have been overwritten on the way here (by the loss of a
// worker, by a suspension), but what the next holder must know was not.
func (m *model) recall(now time.Time) bool {
	s := &m.want
	if s.Phase == v1alpha1.PhaseReplaced && s.Replacements == 0 { // as an older version wrote it
		s.Replacements, s.Failures = max(s.Failures, 1), 0
	}
	if s.RetryReason == v1alpha1.ReasonPairingCodeRefused && m.dialSpec().pairPhone == "" { // no code is to be typed any more
		s.RetryReason, s.RetryAfter = "", nil
	}
	if resting[s.Phase] {
		return true
	}
	rest, rests := status.Rest(*s, now)
	if rests {
		s.Phase, m.reason, m.message = rest.Phase, rest.Reason, rest.Message
	}
	return rests
}

// restNear is how soon a rest must end for its session to take a login token along.
const restNear = time.Minute

// restsLong: no attempt is near, so whoever claims the session needs no login token.
func (m *model) restsLong(now time.Time) bool {
	if m.logoutWanted() || m.restartWanted() {
		return false
	}
	_, rests := status.Rest(m.want, now)
	until := m.restUntil()
	return (rests || resting[m.want.Phase]) && (until.IsZero() || until.After(now.Add(restNear)))
}

// restUntil is when a session that rests is tried again; zero: never by itself.
func (m *model) restUntil() time.Time {
	if m.want.RetryAfter == nil || m.want.Phase == v1alpha1.PhaseLoggedOut || m.want.Phase == v1alpha1.PhasePairingExpired {
		return time.Time{}
	}
	return m.want.RetryAfter.Time
}

// replaced stops for a login elsewhere: once for five minutes, then for good.
func (m *model) replaced(now time.Time) {
	m.want.Replacements++
	m.want.Failures, m.want.FailureReason = 0, ""
	m.retryAt, m.want.RetryAfter, m.want.RetryReason = time.Time{}, nil, ""
	if m.want.Replacements == 1 {
		m.retryAt = now.Add(replacedPause)
		m.want.RetryAfter = at(m.retryAt)
	}
	message := status.ReplacedMessage(m.want.Replacements)
	m.tell(corev1.EventTypeWarning, v1alpha1.ReasonReplaced, message)
	m.phase(v1alpha1.PhaseReplaced, v1alpha1.ReasonReplaced, message, now)
}

// ban stops until the ban is over, and returns what is to be said of it. A
// deleted session stops as well: its logout would be an attempt.
func (m *model) ban(e whatsapp.Event) string {
	m.uncount()
	m.retryAt, m.want.RetryReason = time.Time{}, v1alpha1.ReasonBanned
	if e.Until.IsZero() {
		return e.Message + ": WhatsApp did not say until when; change the annotation " + v1alpha1.RestartedAtAnnotation + " to try"
	}
	// Rounded up: not one attempt before, by whichever clock.
	m.want.RetryAfter = at(e.Until.Add(banMargin + time.Second - time.Nanosecond))
	m.retryAt = m.want.RetryAfter.Time
	return e.Message + ": no attempt is made before " + m.want.RetryAfter.UTC().Format(time.RFC3339)
}

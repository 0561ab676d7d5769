package session

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// restartInterval bounds how often restartedAt counts.
const restartInterval = time.Minute

// RestartResult is what became of a change of restartedAt.
type RestartResult string

// The results of Restart.
const (
	RestartNone   RestartResult = ""       // nobody has asked
	RestartWaits  RestartResult = "Waits"  // it is too soon after the last one
	RestartBanned RestartResult = "Banned" // it was noted, but no attempt is made before the ban ends
	RestartDone   RestartResult = "Done"   // the session begins anew
)

// Restart acts upon the annotation restartedAt, for the holder and, where nobody
// holds the session, for the manager. s is the session's status as it is to be
// written; next is what the restart makes of it, but for the phase. from is when
// a restart that waits is due.
func Restart(obj *v1alpha1.WhatsAppSession, s v1alpha1.WhatsAppSessionStatus, now time.Time) (next v1alpha1.WhatsAppSessionStatus, result RestartResult, from time.Time) {
	if !restartWanted(obj, s) {
		return s, RestartNone, time.Time{}
	}
	if from := restartFrom(s, now); now.Before(from) {
		return s, RestartWaits, from
	}
	s.ObservedRestartedAt, s.RestartedTime = obj.RestartedAt(), at(now)
	if s.RetryAfter != nil && Banned(s, now) {
		return s, RestartBanned, time.Time{}
	}
	s.Failures, s.FailureReason, s.Replacements = 0, "", 0
	s.RetryAfter, s.RetryReason, s.PairingDeadline = nil, "", nil
	return s, RestartDone, time.Time{}
}

// restartWanted: restartedAt has a value that was not acted upon.
func restartWanted(obj *v1alpha1.WhatsAppSession, s v1alpha1.WhatsAppSessionStatus) bool {
	value := obj.RestartedAt()
	return value != "" && value != s.ObservedRestartedAt
}

// restartFrom is the earliest time at which restartedAt counts again. A last
// restart in the future was written by a machine whose clock was ahead: it is ignored.
func restartFrom(s v1alpha1.WhatsAppSessionStatus, now time.Time) time.Time {
	if s.RestartedTime == nil || s.RestartedTime.After(now) {
		return time.Time{}
	}
	return s.RestartedTime.Add(restartInterval)
}

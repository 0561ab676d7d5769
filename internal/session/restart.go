package session

import (
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// restartInterval is the shortest time between two restarts.
const restartInterval = time.Minute

// RestartResult is what a change of restartedAt has done.
type RestartResult string

// The results of Restart.
const (
	RestartNone   RestartResult = ""       // restartedAt has not changed
	RestartWaits  RestartResult = "Waits"  // too soon after the last restart
	RestartBanned RestartResult = "Banned" // the value is stored, but no attempt is made before the ban ends
	RestartDone   RestartResult = "Done"   // the session starts again
)

// Restart handles the annotation restartedAt, for the holder and, if no worker holds the
// session, for the manager. s is the status to write, and next the status after the
// restart, except for the phase. from is when a restart that waits is due.
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

// restartWanted reports whether restartedAt has a value that was not handled yet.
func restartWanted(obj *v1alpha1.WhatsAppSession, s v1alpha1.WhatsAppSessionStatus) bool {
	value := obj.RestartedAt()
	return value != "" && value != s.ObservedRestartedAt
}

// restartFrom is the earliest time of the next restart. A last restart in the future was
// written by a machine whose clock is ahead, and is ignored.
func restartFrom(s v1alpha1.WhatsAppSessionStatus, now time.Time) time.Time {
	if s.RestartedTime == nil || s.RestartedTime.After(now) {
		return time.Time{}
	}
	return s.RestartedTime.Add(restartInterval)
}

// Package backoff computes how long to wait before the next attempt.
//
// A pause follows from the number of failures alone, because that number often outlives the
// process: it is in the status of a session, and with a batch in Redis. The pauses of
// wait.Backoff and of client-go's rate limiters are kept in memory, and their random part
// cannot be chosen by a test; here wait.Backoff does the arithmetic, and the caller gives
// the random number. A queue whose failures are forgotten with the process uses a rate
// limiter of client-go.
package backoff

import (
	"cmp"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
)

// Backoff is a pause that grows with each failure in a row.
type Backoff struct {
	// First is the pause after the first failure, Most the longest pause.
	First, Most time.Duration
	// Factor multiplies the pause with each further failure; zero: it doubles.
	Factor float64
}

// After returns the pause after that many failures in a row; fewer than one count as one.
func (b Backoff) After(failures int) time.Duration {
	steps := wait.Backoff{Duration: b.First, Factor: cmp.Or(b.Factor, 2), Steps: failures - 1, Cap: b.Most}
	for steps.Steps > 0 { // zero also when Most is reached
		steps.Step()
	}
	return min(steps.Duration, b.Most)
}

// FullJitter returns a random part of a pause, so that many who failed together do not try
// again together. random is from 0 to 1.
func FullJitter(pause time.Duration, random float64) time.Duration {
	return time.Duration(random * float64(pause))
}

// HalfJitter returns half of a pause and a random part of the other half, where an attempt
// that follows at once would be wrong.
func HalfJitter(pause time.Duration, random float64) time.Duration {
	return pause/2 + FullJitter(pause/2, random)
}

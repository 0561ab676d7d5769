//go:build faults

package faults

import (
	"testing"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// newReceiver starts the receiver in Laravel's place. The sender may be stopped between
// signing and sending, so its age is no breach; nor is what comes again with the same
// numbers: a Redis that forgot is told everything once more.
func newReceiver(t testing.TB) *laraveltest.Receiver {
	return laraveltest.Start(t, laraveltest.Options{Tolerance: time.Hour, MayForget: true, DiscardRequests: true})
}

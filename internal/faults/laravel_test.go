//go:build faults

package faults

import (
	"testing"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// newReceiver starts the stand-in for Laravel. The sender may be stopped between
// signing and sending, so an old signature is no breach. An update that comes again
// with the same numbers is no breach either: when Redis has lost its data, everything
// is published to it once more.
func newReceiver(t testing.TB) *laraveltest.Receiver {
	return laraveltest.Start(t, laraveltest.Options{Tolerance: time.Hour, AllowResends: true})
}

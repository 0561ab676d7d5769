//go:build faults

package faults

import (
	"testing"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// newReceiver starts the stand-in for Laravel. The sender may be paused between signing and
// sending, so an old signature is not a breach. A second update with the same numbers is not
// a breach either: when Redis has lost its data, every present state is published again.
func newReceiver(t testing.TB, observe func(laraveltest.Request)) *laraveltest.Receiver {
	return laraveltest.Start(t, laraveltest.Options{Tolerance: time.Hour, AllowResends: true, Observe: observe})
}

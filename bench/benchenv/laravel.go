package benchenv

import (
	"fmt"

	"github.com/google/uuid"

	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// newLaravel starts a receiver that does what the contract asks of the application. It
// keeps no record of the requests: a benchmark makes too many.
func newLaravel() (*laraveltest.Receiver, error) {
	receiver, err := laraveltest.New(laraveltest.Options{
		Token: uuid.NewString(), Secret: uuid.NewString() + uuid.NewString(), AllowResends: true,
	})
	if err != nil {
		return nil, fmt.Errorf("starting the stand-in for Laravel: %w", err)
	}
	return receiver, nil
}

package app

import (
	"context"
	"errors"
	"fmt"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

// TestAFencedMessageEndsTheConnection: when another process has taken the session, its connection
// ends for that reason, and not because the database is away.
func TestAFencedMessageEndsTheConnection(t *testing.T) {
	away := errors.New("the database is away")
	for _, tt := range []struct {
		name       string
		err, cause error
	}{
		{"stored", nil, nil},
		{"the database is away", away, nil},
		{"the session was taken", fmt.Errorf("storing a message: %w", store.ErrFenced), store.ErrFenced},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := NewWithT(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			a := &account{accounts: &accounts{}, taking: &store.Taking{}}
			options := a.options(worker.DialOptions{Accept: func(context.Context, delivery.MessageItem) error { return tt.err }}, cancel)
			err := options.Accept(ctx, delivery.MessageItem{})
			if tt.err == nil {
				g.Expect(err).NotTo(HaveOccurred())
			} else {
				g.Expect(err).To(MatchError(tt.err))
			}
			if tt.cause == nil {
				g.Expect(context.Cause(ctx)).To(BeNil())
			} else {
				g.Expect(context.Cause(ctx)).To(BeIdenticalTo(tt.cause))
			}
		})
	}
}

// TestASessionWithoutAcceptHasNone: the connector acknowledges every message then.
func TestASessionWithoutAcceptHasNone(t *testing.T) {
	a := &account{accounts: &accounts{}, taking: &store.Taking{}}
	NewWithT(t).Expect(a.options(worker.DialOptions{}, func(error) {}).Accept).To(BeNil())
}

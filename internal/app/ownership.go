package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

const (
	// ownershipInterval is how often a process asks whether store and Redis are still its
	// installation's: a person may say `store adopt` while the former installation runs.
	ownershipInterval = 5 * time.Second
	// ownershipTimeout bounds one such question.
	ownershipTimeout = 2 * time.Second
	// ownershipExitTimeout is how long a process that has lost its store may take to end in
	// order. With the two above it is shorter than the time that the manager of the new
	// installation leaves a former holder.
	ownershipExitTimeout = 5 * time.Second
)

// checkOwnership returns an error where store or Redis belong to another
// installation. What cannot be asked now is asked again later: unknown has the
// reason.
func (d *dependencies) checkOwnership(ctx context.Context) (elsewhere, unknown error) {
	ctx, cancel := context.WithTimeout(ctx, ownershipTimeout)
	defer cancel()
	answers := make(chan error, 2) // side by side: one that hangs must not hide the other's answer
	go func() { answers <- redis.CheckInstallation(ctx, d.redis, d.keys, d.installation) }()
	go func() { answers <- d.store.CheckInstallation(ctx, d.installation) }()
	for range cap(answers) {
		err := <-answers
		var others *redis.OwnedElsewhereError
		switch {
		case err == nil, errors.Is(err, store.ErrOwnedByNobody):
		case errors.Is(err, store.ErrOwnedElsewhere), errors.As(err, &others):
			elsewhere = errors.Join(elsewhere, err)
		default:
			unknown = errors.Join(unknown, err)
		}
	}
	return elsewhere, unknown
}

// watchOwnership ends the process when store or Redis have become another
// installation's: whoever holds connections on must give them up, because the
// manager of the other one takes the sessions over.
func (d *dependencies) watchOwnership(ctx context.Context) error {
	ticker := d.clock.NewTicker(ownershipInterval)
	defer ticker.Stop()
	for {
		elsewhere, unknown := d.checkOwnership(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case elsewhere != nil:
			d.log.Error(elsewhere, "The store has been taken over: this process ends")
			time.AfterFunc(ownershipExitTimeout, func() { os.Exit(1) })
			return fmt.Errorf("asking whose store and Redis are: %w", elsewhere)
		case unknown != nil:
			d.log.V(1).Info("Failed to ask whose store and Redis are; it is asked again", "reason", unknown.Error())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

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
	// ownershipInterval is how often a process checks that its installation still owns the
	// store and Redis: a person may run `store adopt` while the former installation runs.
	ownershipInterval = 5 * time.Second
	// ownershipTimeout is the timeout of one check.
	ownershipTimeout = 2 * time.Second
	// ownershipExitTimeout is how long a process that has lost its store may take to shut
	// down. With the two above it is shorter than the time that the manager of the new
	// installation leaves a former holder.
	ownershipExitTimeout = 5 * time.Second
)

// checkOwnership returns in elsewhere that the store or Redis belong to another
// installation, and in unknown why one of them could not be asked. The caller
// checks again later.
func (d *dependencies) checkOwnership(ctx context.Context) (elsewhere, unknown error) {
	ctx, cancel := context.WithTimeout(ctx, ownershipTimeout)
	defer cancel()
	answers := make(chan error, 2) // in parallel: a server that hangs must not hide the other's answer
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

// watchOwnership ends the process when the store or Redis belong to another
// installation: a worker must then close its connections, because the manager of
// the other installation takes the sessions over.
func (d *dependencies) watchOwnership(ctx context.Context) error {
	ticker := d.clock.NewTicker(ownershipInterval)
	defer ticker.Stop()
	for {
		elsewhere, unknown := d.checkOwnership(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case elsewhere != nil:
			d.log.Error(elsewhere, "Another installation owns the store or Redis now, ending this process")
			time.AfterFunc(ownershipExitTimeout, func() { os.Exit(1) })
			return fmt.Errorf("checking which installation owns the store and Redis: %w", elsewhere)
		case unknown != nil:
			d.log.V(1).Info("Failed to check which installation owns the store and Redis, trying again", "reason", unknown.Error())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

package redis

import (
	"context"
	"errors"
	"fmt"

	goredis "github.com/redis/go-redis/v9"
)

// OwnedElsewhereError says that another installation owns this Redis under this
// prefix: two would take each other's accounts.
type OwnedElsewhereError struct {
	// Found is the id of the installation that owns it.
	Found string
}

// Error says what a person can do.
func (e *OwnedElsewhereError) Error() string {
	return fmt.Sprintf("StoreOwnedElsewhere: this Redis belongs to the installation %q: use another Redis for this one, or give it a --redis-key-prefix, "+
		"or, if the other one is gone for good and this one takes its place, say so with `whatsapp-operator store adopt`", e.Found)
}

// ClaimInstallation records id in a Redis that no installation owns, and returns an
// *OwnedElsewhereError where another id is recorded. It must be called again after
// Redis has lost data.
func ClaimInstallation(ctx context.Context, client goredis.UniversalClient, keys Keys, id string) error {
	found, err := client.Get(ctx, keys.Installation()).Result()
	if errors.Is(err, goredis.Nil) {
		// Only now: a Redis that is full or read-only refuses the command even where it has
		// nothing to do, and a process that is restarted meanwhile must be able to start.
		if err := setIfMissing(ctx, client, keys.Installation(), id); err != nil {
			return fmt.Errorf("claiming Redis for this installation: %w", err)
		}
		found, err = client.Get(ctx, keys.Installation()).Result()
	}
	if err != nil {
		return fmt.Errorf("reading which installation owns Redis: %w", err)
	}
	if found != id {
		return &OwnedElsewhereError{Found: found}
	}
	return nil
}

// CheckInstallation returns an *OwnedElsewhereError where another installation is
// recorded, and claims nothing.
func CheckInstallation(ctx context.Context, client goredis.UniversalClient, keys Keys, id string) error {
	found, err := client.Get(ctx, keys.Installation()).Result()
	switch {
	case errors.Is(err, goredis.Nil): // Redis has lost its data; the process that notices claims it again
		return nil
	case err != nil:
		return fmt.Errorf("reading which installation owns Redis: %w", err)
	case found != id:
		return &OwnedElsewhereError{Found: found}
	}
	return nil
}

// Adopt makes this Redis the installation's, also if another one owns it. Only a person
// may decide that.
func Adopt(ctx context.Context, client goredis.UniversalClient, keys Keys, id string) error {
	if err := client.Set(ctx, keys.Installation(), id, 0).Err(); err != nil {
		return fmt.Errorf("adopting Redis for this installation: %w", err)
	}
	return nil
}

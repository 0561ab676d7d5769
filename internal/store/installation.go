package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"

	"go.mau.fi/util/dbutil"
)

var (
	// ErrOwnedElsewhere: the store belongs to another installation; the error is an *OwnedElsewhereError.
	ErrOwnedElsewhere = errors.New("the store belongs to another installation")
	// ErrOwnedByNobody: no installation has used the store yet.
	ErrOwnedByNobody = errors.New("the store belongs to no installation yet")
)

// OwnedElsewhereError says which installation a store belongs to.
type OwnedElsewhereError struct {
	// Stored is the installation that the store records, Own the one that asked.
	Stored, Own string
}

// Error says what a person can do.
func (e *OwnedElsewhereError) Error() string {
	return fmt.Sprintf("StoreOwnedElsewhere: the store belongs to the installation %q, and this is %q: give this one its own database, "+
		"or, if the other one is gone for good and this one takes its place, say so with `whatsapp-operator store adopt`", e.Stored, e.Own)
}

// Is makes the error an ErrOwnedElsewhere.
func (e *OwnedElsewhereError) Is(target error) bool { return target == ErrOwnedElsewhere }

// Installation is the id of the installation that the store belongs to; empty
// while it belongs to none, also before the store has its tables.
func (s *Store) Installation(ctx context.Context) (string, error) {
	exists, err := s.db.TableExists(ctx, "whatsapp_operator_installation")
	if err != nil {
		return "", fmt.Errorf("reading the installation of the store: %w", err)
	}
	if !exists {
		return "", nil
	}
	var id string
	err = s.db.QueryRow(ctx, "SELECT id FROM whatsapp_operator_installation WHERE one=1").Scan(&id)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("reading the installation of the store: %w", err)
	}
	return id, nil
}

// CheckInstallation refuses a store that is not the installation's, with an
// *OwnedElsewhereError or ErrOwnedByNobody, and changes nothing.
func (s *Store) CheckInstallation(ctx context.Context, id string) error {
	stored, err := s.Installation(ctx)
	switch {
	case err != nil:
		return err
	case stored == "":
		return ErrOwnedByNobody
	case stored != id:
		return &OwnedElsewhereError{Stored: stored, Own: id}
	}
	return nil
}

// SetInstallation assigns the store to the installation, if it belongs to none.
// An *OwnedElsewhereError says that it belongs to another one: then the caller must not
// use the store.
func (s *Store) SetInstallation(ctx context.Context, id string) error {
	if id == "" {
		return errors.New("an installation needs an id")
	}
	stored, err := s.Installation(ctx)
	if err == nil && stored == "" {
		err = s.exec(ctx, "INSERT INTO whatsapp_operator_installation (one, id) VALUES (1, $1) ON CONFLICT (one) DO NOTHING", id)
		if err == nil {
			stored, err = s.Installation(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("setting the installation of the store: %w", err)
	}
	if stored != id {
		return &OwnedElsewhereError{Stored: stored, Own: id}
	}
	return nil
}

// Adopt assigns the store to the installation, also if it belongs to another one, and
// returns the previous installation. Only a person may request it. The store records the
// previous id and the ids in more, so that the sessions with such an id are taken
// over; a second call changes nothing.
func (s *Store) Adopt(ctx context.Context, id string, more ...string) (previous string, err error) {
	if id == "" {
		return "", errors.New("an installation needs an id")
	}
	err = s.transaction(ctx, func(ctx context.Context) error {
		if s.postgres != nil { // if two people adopt at once, the second takes over from the first
			if _, err := s.db.Exec(ctx, "LOCK TABLE whatsapp_operator_installation IN SHARE ROW EXCLUSIVE MODE"); err != nil {
				return err
			}
		}
		if previous, err = s.Installation(ctx); err != nil {
			return err
		}
		if _, err = s.db.Exec(ctx, "INSERT INTO whatsapp_operator_installation (one, id) VALUES (1, $1) ON CONFLICT (one) DO UPDATE SET id=excluded.id", id); err != nil {
			return err
		}
		for _, former := range slices.Concat(more, []string{previous}) {
			if former == "" {
				continue
			}
			if _, err = s.db.Exec(ctx, `INSERT INTO whatsapp_operator_former_installation (id, left_at) VALUES ($1, $2)
				ON CONFLICT (id) DO UPDATE SET left_at=excluded.left_at`, former, s.now()); err != nil {
				return err
			}
		}
		_, err = s.db.Exec(ctx, "DELETE FROM whatsapp_operator_former_installation WHERE id=$1", id)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("adopting the store: %w", err)
	}
	return previous, nil
}

// FormerInstallations are the ids of the installations from which this one, or
// one before it, has taken the store over.
func (s *Store) FormerInstallations(ctx context.Context) ([]string, error) {
	rows, err := s.db.Query(ctx, "SELECT id FROM whatsapp_operator_former_installation ORDER BY left_at, id")
	ids, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList()
	if err != nil {
		return nil, fmt.Errorf("reading the former installations of the store: %w", err)
	}
	return ids, nil
}

package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/util/dbutil"
	"go.mau.fi/whatsmeow/store/sqlstore/upgrades"
)

//go:embed upgrades/*.sql
var upgradeFiles embed.FS

var (
	// schema are our own tables; its length is the version that this build needs.
	schema          = dbutil.BuildUpgradeTable().WithFSPath(upgradeFiles, "upgrades").Finish()
	whatsmeowSchema = upgrades.Table
)

const (
	// migrationLock is the key of PostgreSQL's lock; any key that nothing else uses will do.
	migrationLock = 0x77610001
	// schemaInterval is how often a worker reads the version of the schema.
	schemaInterval = 500 * time.Millisecond
)

// ErrSchemaTooNew: a newer release has migrated the database to a version that
// this release cannot use.
var ErrSchemaTooNew = errors.New("a newer release has migrated the store: upgrade this process")

// Migrate brings the tables of whatsmeow and our own to the version that this
// build needs, all in one transaction under a lock, so several processes may
// call it at once. Only the leader should.
func (s *Store) Migrate(ctx context.Context) error {
	err := s.transactionWithin(ctx, migrateTimeout, func(ctx context.Context) error {
		if s.postgres != nil { // SQLite: the transaction is the lock
			if _, err := s.db.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", migrationLock); err != nil {
				return err
			}
		}
		if err := s.container.Upgrade(ctx); err != nil {
			return err
		}
		return s.own.Upgrade(ctx)
	})
	if errors.Is(err, dbutil.ErrUnsupportedDatabaseVersion) {
		return fmt.Errorf("migrating the store: %w (%w)", ErrSchemaTooNew, err)
	}
	if err != nil {
		return fmt.Errorf("migrating the store: %w", err)
	}
	return s.reportDuplicates(ctx)
}

// reportDuplicates logs which sessions cannot continue, because their ids differ from
// those of others only by case.
func (s *Store) reportDuplicates(ctx context.Context) error {
	duplicates, err := s.Duplicates(ctx)
	if err != nil {
		return err
	}
	for _, r := range duplicates {
		s.log.Info("WARNING: another session holds this session id under other upper and lower case, and came first: "+
			"unlink this one's device on the phone, delete the session and apply it with another spec.sessionID",
			"sessionID", r.SessionID, "namespace", r.Namespace, "jid", r.JID)
	}
	return nil
}

// WaitForSchema returns when the leader has migrated the tables to what this
// build needs. Until then, and when the database does not answer, it waits.
func (s *Store) WaitForSchema(ctx context.Context) error {
	ticker := s.clock.NewTicker(schemaInterval)
	defer ticker.Stop()
	for waiting := false; ; {
		ready, err := s.SchemaReady(ctx)
		switch {
		case ready:
			return nil
		case errors.Is(err, ErrSchemaTooNew):
			return err
		case err != nil:
			s.log.Error(err, "Failed to read the schema version of the store")
		case !waiting:
			waiting = true
			s.log.Info("Waiting until the leader has migrated the store")
		}
		select {
		case <-ticker.C():
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waiting for the schema of the store: %w", ctx.Err()), err)
		}
	}
}

// schemaState is how the tables are for this build.
type schemaState int

const (
	schemaMissing schemaState = iota // there are none
	schemaBehind                     // an older release has made them
	schemaReady
)

// SchemaReady reports whether the leader has migrated the tables to what this build needs.
// With ErrSchemaTooNew this build cannot use them.
func (s *Store) SchemaReady(ctx context.Context) (bool, error) {
	state, err := s.schemaState(ctx)
	return state == schemaReady, err
}

// SchemaBehind reports whether the tables are those of an older release, as after a restore
// of its backup: then they must be migrated again.
func (s *Store) SchemaBehind(ctx context.Context) (bool, error) {
	state, err := s.schemaState(ctx)
	return state == schemaBehind, err
}

func (s *Store) schemaState(ctx context.Context) (schemaState, error) {
	state := schemaReady
	for _, db := range []*dbutil.Database{s.db, s.own} {
		exists, err := db.TableExists(ctx, db.VersionTable)
		if err != nil || !exists {
			return schemaMissing, err
		}
		var version, compat int
		err = db.QueryRow(ctx, "SELECT COALESCE(MAX(version), 0), COALESCE(MAX(compat), 0) FROM "+db.VersionTable).Scan(&version, &compat)
		if err != nil {
			return schemaMissing, err
		}
		if compat > len(db.UpgradeTable) {
			return schemaMissing, ErrSchemaTooNew
		}
		if version == 0 { // a backup is being restored, or a migration is being made: the tables come first
			return schemaMissing, nil
		}
		if version < len(db.UpgradeTable) {
			state = schemaBehind
		}
	}
	return state, nil
}

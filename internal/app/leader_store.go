package app

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/controllers"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

const (
	// cleanInterval is how often data whose retention time has passed is deleted from the store.
	cleanInterval = 6 * time.Hour
	// restoreInterval is how often the leader checks that the tables are not those of an older
	// release: a person may restore a backup of it.
	restoreInterval = 10 * time.Second
	// prepareInterval is how often a new leader tries to prepare a store that does not answer.
	prepareInterval = 2 * time.Second
)

// storeGate returns the gate through which the reconcilers reach the store. warn records an
// Event when the store does not answer any more.
func (d *dependencies) storeGate(warn func(reason, action, message string)) *store.Gate {
	return &store.Gate{Ping: d.store.Probe, Log: d.log.WithName("store"), OnChange: func(away error) {
		metrics.SetStoreAnswers(away == nil)
		if away != nil {
			warn("DatabaseAway", "CheckStore", "the database does not answer, new sessions and deletions wait: "+away.Error())
		}
	}}
}

// keepStore is the leader's work on the store: it migrates the schema, claims the
// store for this installation, and cleans it at intervals. A store that does not
// answer does not end the leader, because neither placement nor delivery needs it.
// A store that this process must not use does.
func (d *dependencies) keepStore(ctx context.Context, gate *store.Gate) error {
	again := d.clock.NewTicker(prepareInterval)
	defer again.Stop()
	for {
		err := d.prepareStore(ctx, gate)
		if err == nil {
			break
		}
		if errors.Is(err, store.ErrSchemaTooNew) || errors.Is(err, store.ErrOwnedElsewhere) {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		gate.Close(err)
		d.log.V(1).Info("Failed to prepare the store, trying again", "after", prepareInterval.String(), "error", err.Error())
		select {
		case <-ctx.Done():
			return nil
		case <-again.C():
		}
	}
	gate.Open()
	var probing sync.WaitGroup
	defer probing.Wait()
	probing.Go(func() { gate.Run(ctx) })
	d.cleanStore(ctx)
	cleaning, restored := d.clock.NewTicker(cleanInterval), d.clock.NewTicker(restoreInterval)
	defer cleaning.Stop()
	defer restored.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-cleaning.C():
			d.cleanStore(ctx)
		case <-restored.C():
			if err := d.migrateRestored(ctx, gate); err != nil {
				return err
			}
		}
	}
}

func (d *dependencies) cleanStore(ctx context.Context) {
	if err := d.store.Clean(ctx); err != nil && ctx.Err() == nil {
		d.log.Error(err, "Failed to clean the store, trying again", "after", cleanInterval.String())
	}
}

// migrateRestored migrates the tables again if somebody has restored a backup of an older
// release. Without any tables it does nothing: a person may be about to restore them, and
// new ones would be in the way. An error is permanent.
func (d *dependencies) migrateRestored(ctx context.Context, gate *store.Gate) error {
	asking, done := context.WithTimeout(ctx, store.TakeTimeout)
	behind, err := d.store.SchemaBehind(asking)
	done()
	if behind {
		d.log.Info("Found the tables of an older release, as after a restore of its backup; migrating them")
		if err = d.prepareStore(ctx, gate); err == nil {
			gate.Open()
		}
	}
	switch {
	case errors.Is(err, store.ErrSchemaTooNew), errors.Is(err, store.ErrOwnedElsewhere):
		return err
	case behind && err != nil && ctx.Err() == nil:
		d.log.Error(err, "Failed to migrate the store, trying again", "after", restoreInterval.String())
	}
	return nil
}

// prepareStore migrates the store and claims it for this installation. When that takes
// longer than a query may, the gate closes, so the waiting reconcilers get an error.
func (d *dependencies) prepareStore(ctx context.Context, gate *store.Gate) error {
	slow := time.AfterFunc(store.QueryTimeout, func() { gate.Close(errors.New("the store is being prepared")) })
	defer slow.Stop()
	asking, done := context.WithTimeout(ctx, store.TakeTimeout)
	err := d.store.Ping(asking)
	done()
	if err != nil {
		return err
	}
	// Never migrate another installation's store.
	if err := d.store.CheckInstallation(ctx, d.installation); err != nil && !errors.Is(err, store.ErrOwnedByNobody) {
		return fmt.Errorf("checking which installation owns the store: %w", err)
	}
	if err := d.store.Migrate(ctx); err != nil {
		return err
	}
	if err := d.store.SetInstallation(ctx, d.installation); err != nil {
		return fmt.Errorf("checking which installation owns the store: %w", err)
	}
	return nil
}

// ids is the store as the session controller knows it.
type ids struct {
	store *store.Store
	gate  *store.Gate
}

// Former implements controllers.IDs.
func (i *ids) Former(ctx context.Context) (former []string, err error) {
	err = i.gate.Do(ctx, func(ctx context.Context) (err error) {
		former, err = i.store.FormerInstallations(ctx)
		return err
	})
	return former, err
}

// Record implements controllers.IDs.
func (i *ids) Record(ctx context.Context, sessionID string) (record *controllers.Record, err error) {
	err = i.gate.Do(ctx, func(ctx context.Context) error {
		r, err := i.store.RecordByID(ctx, sessionID)
		if err != nil {
			return err
		}
		record = &controllers.Record{Namespace: r.Namespace, UID: types.UID(r.UID), JID: r.JID, PhoneNumber: r.PhoneNumber()}
		return nil
	})
	if errors.Is(err, store.ErrNoRecord) {
		return nil, nil
	}
	return record, err
}

// Claim implements controllers.IDs.
func (i *ids) Claim(ctx context.Context, c controllers.Claimant, gone func(types.UID) bool) (bool, error) {
	err := i.gate.Do(ctx, func(ctx context.Context) error {
		_, err := i.store.Claim(ctx, store.Claimant{SessionID: c.SessionID, Namespace: c.Namespace, UID: string(c.UID)},
			func(_ context.Context, uid string) (bool, error) { return gone(types.UID(uid)), nil })
		return err
	})
	if errors.Is(err, store.ErrTaken) {
		return false, nil
	}
	return err == nil, err
}

// Release implements controllers.IDs.
func (i *ids) Release(ctx context.Context, uid types.UID, how controllers.Release) error {
	err := i.gate.Do(ctx, func(ctx context.Context) (err error) {
		switch how {
		case controllers.ReleaseForget:
			err = i.store.DeleteSession(ctx, string(uid))
		case controllers.ReleaseRetain:
			_, err = i.store.Retain(ctx, string(uid))
		case controllers.ReleaseOrphan:
			_, err = i.store.MarkOrphan(ctx, string(uid))
		default:
			err = fmt.Errorf("there is no release %q", how)
		}
		return err
	})
	if errors.Is(err, store.ErrNoRecord) {
		return nil
	}
	return err
}

// keyStoreTimeout is the timeout of a comparison's queries, which read and write all records.
const keyStoreTimeout = time.Minute

// keyStore is the store as the comparison of records and sessions knows it.
type keyStore struct {
	store *store.Store
	// gate is nil for a person's command, which waits for the database.
	gate *store.Gate
}

// await fails at once while the leader's store is unreachable.
func (k *keyStore) await(ctx context.Context) error {
	if k.gate == nil {
		return nil
	}
	return k.gate.Do(ctx, func(context.Context) error { return nil })
}

// KeyRecords implements controllers.KeyStore.
func (k *keyStore) KeyRecords(ctx context.Context) ([]controllers.KeyRecord, error) {
	if err := k.await(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, keyStoreTimeout)
	defer cancel()
	all, err := k.store.Records(ctx)
	if err != nil {
		return nil, err
	}
	records := make([]controllers.KeyRecord, 0, len(all))
	for _, r := range all {
		records = append(records, controllers.KeyRecord{
			SessionID: r.SessionID, Namespace: r.Namespace, UID: types.UID(r.UID), State: controllers.KeyState(r.Keeping),
		})
	}
	return records, nil
}

// Move implements controllers.KeyStore.
func (k *keyStore) Move(ctx context.Context, moves []controllers.KeyMove) error {
	ctx, cancel := context.WithTimeout(ctx, keyStoreTimeout)
	defer cancel()
	var changes []store.KeepingChange
	for _, m := range moves {
		if m.To.Orphaned.IsZero() || !m.State.Orphaned.IsZero() {
			changes = append(changes, store.KeepingChange{UID: string(m.UID), From: store.Keeping(m.State), To: store.Keeping(m.To)})
			continue
		}
		_, err := k.store.OrphanMissing(ctx, string(m.UID), m.State.Missing)
		if err != nil && !errors.Is(err, store.ErrNoRecord) {
			return err
		}
	}
	return k.store.ChangeKeeping(ctx, changes)
}

// orphans finds the keys of sessions that no longer exist.
func (d *dependencies) orphans(gate *store.Gate, warn func(reason, message string)) *controllers.Orphans {
	return &controllers.Orphans{
		Store: &keyStore{store: d.store, gate: gate}, Reader: d.direct, Clock: d.clock, Log: d.log.WithName("orphans"),
		Compared: func(c controllers.KeyComparison) {
			metrics.SetStoreRecords(c.InUse, c.Missing, c.Orphaned, c.Retained, c.Implausible)
		},
		Implausible: func(message string) { warn(controllers.ReasonRecordsImplausible, message) },
	}
}

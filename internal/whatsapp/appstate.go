package whatsapp

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"

	"go.mau.fi/whatsmeow/appstate"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types/events"
)

// errAppStateDone ends whatsmeow's own synchronisation, because this one has run.
var errAppStateDone = errors.New("the connector has synchronised it itself")

// appStates synchronises the phone's settings instead of whatsmeow. whatsmeow does it in
// a goroutine without a recover, and a record that is too short, which another device of
// the account could upload, makes it panic (appstate/hash.go, updateHash). whatsmeow first
// asks here for the current version, and holds its lock meanwhile: the whole
// synchronisation runs during that call, which returns an error.
type appStates struct {
	store.AppStateStore
	connection *Connection
	// mu is held during the synchronisation: whatsmeow holds its lock during all calls except
	// the one for a copy of the settings that the phone has sent.
	mu sync.Mutex
}

// guardStores puts the guards around a device's stores.
func (c *Connection) guardStores(d *store.Device) {
	if d.AppState == nil {
		return
	}
	if _, guarded := d.AppState.(*appStates); !guarded {
		d.AppState = &appStates{AppStateStore: d.AppState, connection: c}
		d.AppStateKeys = appStateKeys{d.AppStateKeys}
		d.EventBuffer = vettedContents{d.EventBuffer}
	}
}

// appStateKeys refuses an empty key: the store would refuse it too, but the first error
// of the store ends the connection, and the message would come again.
type appStateKeys struct{ store.AppStateSyncKeyStore }

// PutAppStateSyncKey implements store.AppStateSyncKeyStore.
func (k appStateKeys) PutAppStateSyncKey(ctx context.Context, id []byte, key store.AppStateSyncKey) error {
	if len(id) == 0 || len(key.Data) == 0 {
		return errors.New("a key of the phone's settings is empty")
	}
	return k.AppStateSyncKeyStore.PutAppStateSyncKey(ctx, id, key)
}

// GetAppStateVersion implements store.AppStateStore.
func (a *appStates) GetAppStateVersion(ctx context.Context, name string) (uint64, [128]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.synchronise(ctx, appstate.WAPatchName(name))
	if err != nil {
		a.connection.options.Log().V(1).Info("Failed to synchronise the phone's settings", "settings", name, "reason", err.Error())
	} else {
		err = errAppStateDone
	}
	return 0, [128]byte{}, err
}

// synchronise is whatsmeow's fetchAppState (appstate.go).
func (a *appStates) synchronise(ctx context.Context, name appstate.WAPatchName) (err error) {
	c := a.connection
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("they are malformed: %v", r)
			c.options.Log().Error(fmt.Errorf("%v", r), "Recovered from a panic of whatsmeow", "in", "the phone's settings", "stack", string(debug.Stack()))
		}
	}()
	if !slices.Contains(appstate.AllPatchNames[:], name) {
		return errors.New("they are of no known kind")
	}
	version, hash, err := a.AppStateStore.GetAppStateVersion(ctx, string(name))
	if err != nil {
		return err
	}
	internals := c.internals()
	state, full := appstate.HashState{Version: version, Hash: hash}, version == 0
	var changes []any
	collected := &changes
	if full {
		collected = nil // as in whatsmeow: the events of a first synchronisation are dropped
	}
	for more, first := true, true; more; first = false {
		patches, err := internals.FetchAppStatePatches(ctx, name, state.Version, full && first)
		switch {
		case err != nil:
			return err
		case patches.Snapshot != nil && (!full || !first):
			return errors.New("all of them came, which was not asked for")
		}
		more = patches.HasMorePatches
		before := state.Version
		if state, err = internals.ApplyAppStatePatches(ctx, name, state, patches, full, collected); err != nil {
			return err
		}
		if more && state.Version <= before {
			return errors.New("there are always more of them")
		}
	}
	if full {
		changes = append(changes, &events.AppStateSyncComplete{Name: name, Version: state.Version})
	}
	for _, change := range changes {
		internals.DispatchEvent(change)
	}
	return nil
}

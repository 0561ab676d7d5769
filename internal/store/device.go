package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/store/sqlstore"
	"go.mau.fi/whatsmeow/types"
	"go.mau.fi/whatsmeow/util/keys"
)

// device wraps whatsmeow's stores of one device, for one connection: it replaces every store
// of that store.Device and its container. It fences the writes and, after the first failure,
// refuses every call.
type device struct {
	store         *Store
	uid           string
	epoch, starts int64
	fail          func(error)
	// opened is the moment when the device was opened, in the order of the shared memory of LIDs.
	opened moment

	lost atomic.Pointer[lostError]

	// keys are whatsmeow's own stores of the device jid; nil until a phone has linked the device.
	keys *sqlstore.SQLStore
	jid  string

	// contacts is held around calls of whatsmeow's contact cache, which holds its mutex
	// during a query. Otherwise a reader that holds that mutex and waits for a connection
	// and the writers that have the connections and wait for the mutex would deadlock.
	contacts sync.Mutex

	migratedMu sync.Mutex
	migrated   map[types.JID]struct{}
}

var (
	_ store.AllStores       = (*device)(nil)
	_ store.DeviceContainer = (*device)(nil)
)

// lostError is the error of every call after the first failure. It is
// context.Canceled, because whatsmeow acknowledges a message that it could not
// store after any other error.
type lostError struct{ cause error }

func (e *lostError) Error() string {
	return fmt.Sprintf("the connection has lost its device store: %v", e.cause)
}

// Unwrap makes the error context.Canceled and its cause.
func (e *lostError) Unwrap() []error { return []error{context.Canceled, e.cause} }

// errNotLinked: whatsmeow asked for keys of a device that no phone has linked.
var errNotLinked = errors.New("no phone has linked the device yet")

// wrap replaces every store of d by f. whatsmeow's container sets the stores
// again when it reads a device and when it stores a device for the first time.
func (f *device) wrap(d *store.Device) {
	if inner, ok := d.Identities.(*sqlstore.SQLStore); ok {
		f.keys, f.jid = inner, inner.JID
	}
	c := cleaned{f}
	d.Identities, d.Sessions, d.PreKeys, d.SenderKeys = f, f, f, f
	d.AppStateKeys, d.AppState, d.Contacts, d.ChatSettings = c, f, c, c
	d.MsgSecrets, d.PrivacyTokens, d.NCTSalt, d.EventBuffer, d.LIDs = c, c, c, c, f
	d.Container = f
}

// lose ends the use of the device and returns the error of every later call.
func (f *device) lose(cause error) error {
	lost := &lostError{cause: cause}
	if f.lost.CompareAndSwap(nil, lost) {
		f.fail(cause)
		return lost
	}
	return f.lost.Load()
}

// usable returns an error after a failure.
func (f *device) usable() error {
	if lost := f.lost.Load(); lost != nil {
		return lost
	}
	if f.keys == nil {
		return f.lose(errNotLinked)
	}
	return nil
}

// read answers from the store, as long as no call has failed.
func read[T any](ctx context.Context, f *device, fn func(ctx context.Context) (T, error)) (T, error) {
	var none T
	if err := f.usable(); err != nil {
		return none, err
	}
	if !nested(ctx) { // a transaction has a time-out already
		var cancel context.CancelFunc
		ctx, cancel = within(ctx, answerTimeout)
		defer cancel()
	}
	got, err := fn(ctx)
	if err != nil {
		return none, f.lose(late(ctx, err))
	}
	return got, nil
}

// fenced runs fn in one transaction with the fence.
func (f *device) fenced(ctx context.Context, how lock, fn func(ctx context.Context) error) error {
	return f.fencedWithin(ctx, answerTimeout, how, fn)
}

func (f *device) fencedWithin(ctx context.Context, timeout time.Duration, how lock, fn func(ctx context.Context) error) error {
	return f.store.transactionWithin(ctx, timeout, func(inner context.Context) error {
		if nested(ctx) { // the transaction of a message, which began with the fence
			return fn(inner)
		}
		jid, err := f.lockRecord(inner, how)
		if err != nil {
			return err
		}
		if jid != f.jid {
			return ErrFenced
		}
		return fn(inner)
	})
}

// write changes keys.
func (f *device) write(ctx context.Context, fn func(ctx context.Context) error) error {
	if err := f.usable(); err != nil {
		return err
	}
	if err := f.fenced(ctx, shared, fn); err != nil {
		return f.lose(err)
	}
	return nil
}

// fencedStatement begins a statement that changes keys on PostgreSQL: the fence is a part of it,
// so one round trip takes the place of four. The statement itself must read the table fence, or
// it would change something although the fence refuses.
//
// Its commit does not wait for the disk. It is for what belongs to a message that is delivered:
// the push of the message waits, and with it all that was committed before; what comes after it
// may be lost in a crash of the database.
const fencedStatement = `WITH fence AS (
	SELECT set_config('synchronous_commit', 'off', true) FROM whatsapp_operator_session WHERE uid=$1 AND epoch=$2 AND starts=$3 AND jid=$4 FOR SHARE
), written AS (%s) SELECT EXISTS (SELECT 1 FROM fence)`

// statement executes one statement that changes keys, see fencedStatement; the first parameter
// of its own is $5. elsewhere is what changes the same keys on SQLite and in a transaction.
func (f *device) statement(ctx context.Context, statement string, elsewhere func(ctx context.Context) error, args ...any) error {
	if f.store.postgres == nil || nested(ctx) {
		return f.write(ctx, elsewhere)
	}
	if err := f.usable(); err != nil {
		return err
	}
	ctx, cancel := within(ctx, answerTimeout)
	defer cancel()
	var allowed bool
	err := f.store.db.QueryRow(ctx, fmt.Sprintf(fencedStatement, statement), append([]any{f.uid, f.epoch, f.starts, f.jid}, args...)...).Scan(&allowed)
	switch {
	case err != nil:
		return f.lose(late(ctx, err))
	case !allowed:
		return f.lose(ErrFenced)
	}
	return nil
}

// writeAndRead changes keys and returns a result.
func writeAndRead[T any](ctx context.Context, f *device, fn func(ctx context.Context) (T, error)) (got T, err error) {
	err = f.write(ctx, func(ctx context.Context) (err error) {
		got, err = fn(ctx)
		return err
	})
	if err != nil {
		var none T
		return none, err
	}
	return got, nil
}

// PutDevice stores the device. For a device that a phone has just linked it
// writes whatsmeow's row and the session's in one transaction.
func (f *device) PutDevice(ctx context.Context, d *store.Device) error {
	if lost := f.lost.Load(); lost != nil {
		return lost
	}
	if d.ID == nil {
		return sqlstore.ErrDeviceIDMustBeSet
	}
	for _, name := range []*string{&d.PushName, &d.BusinessName, &d.Platform, &d.CompanionMetaNonce} {
		if fit := text(*name); fit != *name {
			*name = fit
		}
	}
	linking := f.keys == nil
	err := f.fenced(ctx, exclusive, func(ctx context.Context) error {
		if !linking {
			return f.store.container.PutDevice(ctx, d)
		}
		// WhatsApp gives a number again once its device is unlinked. On a row that
		// exists whatsmeow would update the names only and keep the old keys.
		if err := f.store.lockHolder(ctx, d.ID.String()); err != nil {
			return err
		}
		var exists bool
		if err := f.store.db.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM whatsmeow_device WHERE jid=$1)", d.ID).Scan(&exists); err != nil {
			return err
		}
		if exists {
			if err := f.store.mark(ctx, d.ID.String(), markedReplaced); err != nil {
				return err
			}
		}
		if err := f.store.container.PutDevice(ctx, d); err != nil {
			return err
		}
		_, err := f.store.db.Exec(ctx, "UPDATE whatsapp_operator_session SET jid=$2, missing_since=NULL, orphaned_at=NULL, retained_at=NULL, updated_at=$3 WHERE uid=$1", f.uid, d.ID, f.store.now())
		return err
	})
	if linking {
		// Also after a failure: the device then has whatsmeow's own stores. A device that
		// was linked before keeps our stores, which other goroutines may be reading now.
		f.wrap(d)
	}
	if err != nil {
		return f.lose(err)
	}
	return nil
}

// DeleteDevice only marks the device: whatsmeow calls it whenever WhatsApp reports
// that the device was logged out.
func (f *device) DeleteDevice(ctx context.Context, _ *store.Device) error {
	if err := f.usable(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTimeout)
	defer cancel()
	err := f.fenced(ctx, exclusive, func(ctx context.Context) error {
		return f.store.mark(ctx, f.jid, markedLogout)
	})
	if err != nil {
		return f.lose(err)
	}
	return nil
}

// DoDecryptionTxn is the transaction of a whole message. An error of fn that no
// store has caused comes from Signal: the message is bad, the store has not failed.
func (f *device) DoDecryptionTxn(ctx context.Context, fn func(context.Context) error) error {
	if err := f.usable(); err != nil {
		return err
	}
	var signal error
	err := f.fenced(ctx, shared, func(ctx context.Context) error {
		signal = recovered(func() error { return fn(ctx) })
		return signal
	})
	if err == nil {
		return nil
	}
	if lost := f.lost.Load(); lost != nil {
		return lost
	}
	if signal != nil {
		return signal
	}
	return f.lose(err)
}

// recovered turns a panic into an error: one bad message must not end the process.
func recovered(fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a panic while decrypting a message: %v", r)
		}
	}()
	return fn()
}

// GetBufferedEvent returns the content of a message that was decrypted before.
// whatsmeow delivers that content, or acknowledges a message that was delivered, before
// it writes anything. A process that has lost the session must do neither, so the fence
// is checked if there is such a message.
func (f *device) GetBufferedEvent(ctx context.Context, ciphertextHash [32]byte) (*store.BufferedEvent, error) {
	event, err := read(ctx, f, func(ctx context.Context) (*store.BufferedEvent, error) {
		return f.keys.GetBufferedEvent(ctx, ciphertextHash)
	})
	if err != nil || event == nil {
		return nil, err
	}
	if err := f.fenced(ctx, shared, func(context.Context) error { return nil }); err != nil {
		return nil, f.lose(err)
	}
	return event, nil
}

// DeleteOldBufferedHashes does nothing: the janitor deletes them, see Store.Clean.
func (f *device) DeleteOldBufferedHashes(context.Context) error { return nil }

// MigratePNToLID moves a contact's keys to its other address, once per connection.
func (f *device) MigratePNToLID(ctx context.Context, pn, lid types.JID) error {
	if err := f.usable(); err != nil {
		return err
	}
	// whatsmeow calls this for each message, and caches by the same key.
	key := types.JID{User: pn.User, Server: pn.Server, RawAgent: pn.RawAgent}
	f.migratedMu.Lock()
	_, done := f.migrated[key]
	if !done {
		if f.migrated == nil {
			f.migrated = make(map[types.JID]struct{})
		}
		f.migrated[key] = struct{}{}
	}
	f.migratedMu.Unlock()
	if done {
		return nil
	}
	return f.write(ctx, func(ctx context.Context) error { return f.keys.MigratePNToLID(ctx, pn, lid) })
}

// PutPushName stores a contact's name. whatsmeow calls it for each message.
func (f *device) PutPushName(ctx context.Context, user types.JID, name string) (changed bool, previous string, err error) {
	return f.putName(ctx, user, name, func(c types.ContactInfo) string { return c.PushName }, (*sqlstore.SQLStore).PutPushName)
}

// PutBusinessName stores a contact's business name. whatsmeow calls it for each message.
func (f *device) PutBusinessName(ctx context.Context, user types.JID, name string) (changed bool, previous string, err error) {
	return f.putName(ctx, user, name, func(c types.ContactInfo) string { return c.BusinessName }, (*sqlstore.SQLStore).PutBusinessName)
}

func (f *device) putName(
	ctx context.Context, user types.JID, name string, known func(types.ContactInfo) string,
	put func(*sqlstore.SQLStore, context.Context, types.JID, string) (bool, string, error),
) (changed bool, previous string, err error) {
	if err := f.usable(); err != nil {
		return false, "", err
	}
	f.contacts.Lock()
	defer f.contacts.Unlock()
	contact, err := read(ctx, f, func(ctx context.Context) (types.ContactInfo, error) { return f.keys.GetContact(ctx, user) })
	if err != nil || known(contact) == name {
		return false, "", err
	}
	err = f.write(ctx, func(ctx context.Context) (err error) {
		changed, previous, err = put(f.keys, ctx, user, name)
		return err
	})
	return changed, previous, err
}

func (f *device) PutContactName(ctx context.Context, user types.JID, firstName, fullName string) error {
	f.contacts.Lock()
	defer f.contacts.Unlock()
	return f.write(ctx, func(ctx context.Context) error {
		return f.keys.PutContactName(ctx, user, firstName, fullName)
	})
}

func (f *device) PutAllContactNames(ctx context.Context, contacts []store.ContactEntry) error {
	f.contacts.Lock()
	defer f.contacts.Unlock()
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutAllContactNames(ctx, contacts) })
}

func (f *device) PutManyRedactedPhones(ctx context.Context, entries []store.RedactedPhoneEntry) error {
	f.contacts.Lock()
	defer f.contacts.Unlock()
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutManyRedactedPhones(ctx, entries) })
}

func (f *device) GetContact(ctx context.Context, user types.JID) (types.ContactInfo, error) {
	f.contacts.Lock()
	defer f.contacts.Unlock()
	return read(ctx, f, func(ctx context.Context) (types.ContactInfo, error) { return f.keys.GetContact(ctx, user) })
}

func (f *device) GetAllContacts(ctx context.Context) (map[types.JID]types.ContactInfo, error) {
	f.contacts.Lock()
	defer f.contacts.Unlock()
	return read(ctx, f, func(ctx context.Context) (map[types.JID]types.ContactInfo, error) { return f.keys.GetAllContacts(ctx) })
}

// The map between phone numbers and LIDs belongs to the store, and all sessions share it
// (lids.go). A device that was lost must neither read nor change it.

func (f *device) PutLIDMapping(ctx context.Context, lid, pn types.JID) error {
	return f.PutManyLIDMappings(ctx, []store.LIDMapping{{LID: lid, PN: pn}})
}

func (f *device) PutManyLIDMappings(ctx context.Context, mappings []store.LIDMapping) error {
	if err := f.usable(); err != nil {
		return err
	}
	err := f.store.lids.put(ctx, f.opened, mappings, func(ctx context.Context, fn func(context.Context) error) error {
		return f.fenced(ctx, shared, fn)
	})
	if err != nil {
		return f.lose(err)
	}
	return nil
}

func (f *device) GetPNForLID(ctx context.Context, lid types.JID) (types.JID, error) {
	if lid.Server != types.HiddenUserServer { // the argument is bad, the store has not failed
		return f.store.lids.pnOf(ctx, f.opened, lid)
	}
	return read(ctx, f, func(ctx context.Context) (types.JID, error) { return f.store.lids.pnOf(ctx, f.opened, lid) })
}

func (f *device) GetLIDForPN(ctx context.Context, pn types.JID) (types.JID, error) {
	if pn.Server != types.DefaultUserServer { // the argument is bad, the store has not failed
		return f.store.lids.lidOf(ctx, f.opened, pn)
	}
	return read(ctx, f, func(ctx context.Context) (types.JID, error) { return f.store.lids.lidOf(ctx, f.opened, pn) })
}

func (f *device) GetManyLIDsForPNs(ctx context.Context, pns []types.JID) (map[types.JID]types.JID, error) {
	return read(ctx, f, func(ctx context.Context) (map[types.JID]types.JID, error) {
		return f.store.lids.lidsOf(ctx, f.opened, pns)
	})
}

// The methods below only add the fence.

func (f *device) PutIdentity(ctx context.Context, address string, key [32]byte) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutIdentity(ctx, address, key) })
}

func (f *device) DeleteAllIdentities(ctx context.Context, phone string) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteAllIdentities(ctx, phone) })
}

func (f *device) DeleteIdentity(ctx context.Context, address string) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteIdentity(ctx, address) })
}

func (f *device) IsTrustedIdentity(ctx context.Context, address string, key [32]byte) (bool, error) {
	return read(ctx, f, func(ctx context.Context) (bool, error) { return f.keys.IsTrustedIdentity(ctx, address, key) })
}

func (f *device) GetSession(ctx context.Context, address string) ([]byte, error) {
	return read(ctx, f, func(ctx context.Context) ([]byte, error) { return f.keys.GetSession(ctx, address) })
}

func (f *device) HasSession(ctx context.Context, address string) (bool, error) {
	return read(ctx, f, func(ctx context.Context) (bool, error) { return f.keys.HasSession(ctx, address) })
}

func (f *device) GetManySessions(ctx context.Context, addresses []string) (map[string][]byte, error) {
	return read(ctx, f, func(ctx context.Context) (map[string][]byte, error) { return f.keys.GetManySessions(ctx, addresses) })
}

func (f *device) PutSession(ctx context.Context, address string, session []byte) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutSession(ctx, address, session) })
}

func (f *device) PutManySessions(ctx context.Context, sessions map[string][]byte) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutManySessions(ctx, sessions) })
}

func (f *device) DeleteAllSessions(ctx context.Context, phone string) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteAllSessions(ctx, phone) })
}

func (f *device) DeleteSession(ctx context.Context, address string) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteSession(ctx, address) })
}

func (f *device) GetOrGenPreKeys(ctx context.Context, count uint32) ([]*keys.PreKey, error) {
	if !nested(ctx) { // a wait inside a transaction would keep it open
		select {
		case f.store.prekeys <- struct{}{}:
			defer func() { <-f.store.prekeys }()
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting to make one-time keys: %w", context.Cause(ctx))
		}
	}
	if err := f.usable(); err != nil {
		return nil, err
	}
	var made []*keys.PreKey
	err := f.fencedWithin(ctx, preKeysTimeout, shared, func(ctx context.Context) (err error) {
		made, err = f.keys.GetOrGenPreKeys(ctx, count)
		return err
	})
	if err != nil {
		return nil, f.lose(err)
	}
	return made, nil
}

func (f *device) GenOnePreKey(ctx context.Context) (*keys.PreKey, error) {
	return writeAndRead(ctx, f, func(ctx context.Context) (*keys.PreKey, error) { return f.keys.GenOnePreKey(ctx) })
}

func (f *device) GetPreKey(ctx context.Context, id uint32) (*keys.PreKey, error) {
	return read(ctx, f, func(ctx context.Context) (*keys.PreKey, error) { return f.keys.GetPreKey(ctx, id) })
}

func (f *device) RemovePreKey(ctx context.Context, id uint32) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.RemovePreKey(ctx, id) })
}

func (f *device) MarkPreKeysAsUploaded(ctx context.Context, upToID uint32) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.MarkPreKeysAsUploaded(ctx, upToID) })
}

func (f *device) UploadedPreKeyCount(ctx context.Context) (int, error) {
	return read(ctx, f, func(ctx context.Context) (int, error) { return f.keys.UploadedPreKeyCount(ctx) })
}

func (f *device) PutSenderKey(ctx context.Context, group, user string, session []byte) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutSenderKey(ctx, group, user, session) })
}

func (f *device) GetSenderKey(ctx context.Context, group, user string) ([]byte, error) {
	return read(ctx, f, func(ctx context.Context) ([]byte, error) { return f.keys.GetSenderKey(ctx, group, user) })
}

func (f *device) PutAppStateSyncKey(ctx context.Context, id []byte, key store.AppStateSyncKey) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutAppStateSyncKey(ctx, id, key) })
}

func (f *device) GetAppStateSyncKey(ctx context.Context, id []byte) (*store.AppStateSyncKey, error) {
	return read(ctx, f, func(ctx context.Context) (*store.AppStateSyncKey, error) { return f.keys.GetAppStateSyncKey(ctx, id) })
}

func (f *device) GetAllAppStateSyncKeys(ctx context.Context) ([]*store.AppStateSyncKey, error) {
	return read(ctx, f, func(ctx context.Context) ([]*store.AppStateSyncKey, error) { return f.keys.GetAllAppStateSyncKeys(ctx) })
}

func (f *device) GetLatestAppStateSyncKeyID(ctx context.Context) ([]byte, error) {
	return read(ctx, f, func(ctx context.Context) ([]byte, error) { return f.keys.GetLatestAppStateSyncKeyID(ctx) })
}

func (f *device) PutAppStateVersion(ctx context.Context, name string, version uint64, hash [128]byte) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutAppStateVersion(ctx, name, version, hash) })
}

// GetAppStateVersion returns 0 if nothing usable is stored. whatsmeow fails on a stored
// version 0, which a malformed snapshot can leave; the database has not failed then, and
// settings without a version are read again from the beginning.
func (f *device) GetAppStateVersion(ctx context.Context, name string) (version uint64, hash [128]byte, err error) {
	if err := f.usable(); err != nil {
		return 0, hash, err
	}
	ctx, cancel := within(ctx, answerTimeout)
	defer cancel()
	if version, hash, err = f.keys.GetAppStateVersion(ctx, name); err == nil {
		return version, hash, nil
	}
	var stored int64
	row := f.store.db.QueryRow(ctx, "SELECT version FROM whatsmeow_app_state_version WHERE jid=$1 AND name=$2", f.jid, name)
	if again := row.Scan(&stored); again == nil && stored == 0 {
		return 0, [128]byte{}, nil
	}
	return 0, [128]byte{}, f.lose(late(ctx, err))
}

func (f *device) DeleteAppStateVersion(ctx context.Context, name string) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteAppStateVersion(ctx, name) })
}

func (f *device) PutAppStateMutationMACs(ctx context.Context, name string, version uint64, mutations []store.AppStateMutationMAC) error {
	return f.write(ctx, func(ctx context.Context) error {
		return f.keys.PutAppStateMutationMACs(ctx, name, version, mutations)
	})
}

func (f *device) DeleteAppStateMutationMACs(ctx context.Context, name string, indexMACs [][]byte) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteAppStateMutationMACs(ctx, name, indexMACs) })
}

func (f *device) GetAppStateMutationMAC(ctx context.Context, name string, indexMAC []byte) ([]byte, error) {
	return read(ctx, f, func(ctx context.Context) ([]byte, error) { return f.keys.GetAppStateMutationMAC(ctx, name, indexMAC) })
}

func (f *device) PutMutedUntil(ctx context.Context, chat types.JID, mutedUntil time.Time) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutMutedUntil(ctx, chat, mutedUntil) })
}

func (f *device) PutPinned(ctx context.Context, chat types.JID, pinned bool) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutPinned(ctx, chat, pinned) })
}

func (f *device) PutArchived(ctx context.Context, chat types.JID, archived bool) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutArchived(ctx, chat, archived) })
}

func (f *device) GetChatSettings(ctx context.Context, chat types.JID) (types.LocalChatSettings, error) {
	return read(ctx, f, func(ctx context.Context) (types.LocalChatSettings, error) { return f.keys.GetChatSettings(ctx, chat) })
}

// PutPrivacyTokens stores one token for each contact, the newest: PostgreSQL refuses a
// statement that would change a row twice.
func (f *device) PutPrivacyTokens(ctx context.Context, tokens ...store.PrivacyToken) error {
	newest := make(map[types.JID]store.PrivacyToken, len(tokens))
	for _, token := range tokens {
		user := token.User.ToNonAD()
		if other, ok := newest[user]; !ok || !token.Timestamp.Before(other.Timestamp) {
			newest[user] = token
		}
	}
	if len(newest) == 0 { // no statement for whatsmeow
		return nil
	}
	return f.write(ctx, func(ctx context.Context) error {
		return f.keys.PutPrivacyTokens(ctx, slices.Collect(maps.Values(newest))...)
	})
}

// DeleteExpiredPrivacyTokens writes only if there is such a token: whatsmeow calls it at
// every login.
func (f *device) DeleteExpiredPrivacyTokens(ctx context.Context, cutoff time.Time) (int64, error) {
	found, err := read(ctx, f, func(ctx context.Context) (found bool, err error) {
		err = f.store.db.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM whatsmeow_privacy_tokens WHERE our_jid=$1 AND timestamp<$2)",
			f.jid, cutoff.Unix()).Scan(&found)
		return found, err
	})
	if err != nil || !found {
		return 0, err
	}
	return writeAndRead(ctx, f, func(ctx context.Context) (int64, error) { return f.keys.DeleteExpiredPrivacyTokens(ctx, cutoff) })
}

func (f *device) GetPrivacyToken(ctx context.Context, user types.JID) (*store.PrivacyToken, error) {
	return read(ctx, f, func(ctx context.Context) (*store.PrivacyToken, error) { return f.keys.GetPrivacyToken(ctx, user) })
}

func (f *device) PutBufferedEvent(ctx context.Context, ciphertextHash [32]byte, plaintext []byte, serverTimestamp time.Time) error {
	return f.write(ctx, func(ctx context.Context) error {
		return f.keys.PutBufferedEvent(ctx, ciphertextHash, plaintext, serverTimestamp)
	})
}

func (f *device) ClearBufferedEventPlaintext(ctx context.Context, ciphertextHash [32]byte) error {
	return f.statement(ctx, "UPDATE whatsmeow_event_buffer SET plaintext=NULL FROM fence WHERE our_jid=$4 AND ciphertext_hash=$5",
		func(ctx context.Context) error { return f.keys.ClearBufferedEventPlaintext(ctx, ciphertextHash) }, ciphertextHash[:])
}

func (f *device) PutNCTSalt(ctx context.Context, salt []byte) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.PutNCTSalt(ctx, salt) })
}

func (f *device) GetNCTSalt(ctx context.Context) ([]byte, error) {
	return read(ctx, f, func(ctx context.Context) ([]byte, error) { return f.keys.GetNCTSalt(ctx) })
}

func (f *device) DeleteNCTSalt(ctx context.Context) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteNCTSalt(ctx) })
}

func (f *device) AddOutgoingEvent(ctx context.Context, chat types.JID, id types.MessageID, format string, plaintext []byte) error {
	return f.write(ctx, func(ctx context.Context) error {
		return f.keys.AddOutgoingEvent(ctx, chat, id, format, plaintext)
	})
}

// GetOutgoingEvent returns sql.ErrNoRows, like whatsmeow's implementation, for a message that
// is not stored: the database has not failed then.
func (f *device) GetOutgoingEvent(ctx context.Context, chat, otherChat types.JID, id types.MessageID) (format string, plaintext []byte, err error) {
	type event struct {
		format    string
		plaintext []byte
	}
	found, err := read(ctx, f, func(ctx context.Context) (*event, error) {
		var e event
		var err error
		e.format, e.plaintext, err = f.keys.GetOutgoingEvent(ctx, chat, otherChat, id)
		if errors.Is(err, sql.ErrNoRows) {
			return nil, nil
		}
		return &e, err
	})
	switch {
	case err != nil:
		return "", nil, err
	case found == nil:
		return "", nil, sql.ErrNoRows
	}
	return found.format, found.plaintext, nil
}

func (f *device) DeleteOldOutgoingEvents(ctx context.Context) error {
	return f.write(ctx, func(ctx context.Context) error { return f.keys.DeleteOldOutgoingEvents(ctx) })
}

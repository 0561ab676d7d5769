package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"go.mau.fi/libsignal/signalerror"
	"go.mau.fi/whatsmeow/proto/waAdv"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	waLog "go.mau.fi/whatsmeow/util/log"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

// kinds are the databases that every test runs on; each makes an empty one.
var kinds = map[string]func(t *testing.T) (url string){
	"PostgreSQL": func(t *testing.T) string { return testenv.Postgres(t) },
	"PgBouncer":  func(t *testing.T) string { return testenv.PgBouncer(t) },
	"SQLite":     func(t *testing.T) string { return "sqlite:" + filepath.Join(t.TempDir(), "keys ? # %.db") },
}

// onBoth runs a test on each kind of database, with a migrated store.
func onBoth(t *testing.T, test func(t *testing.T, url string, s *Store)) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			url := make(t)
			s := open(t, url)
			NewWithT(t).Expect(s.Migrate(t.Context())).To(Succeed())
			test(t, url, s)
		})
	}
}

// start is the time at which the tests' clock starts: a whole millisecond, because the store
// keeps milliseconds.
var start = time.UnixMilli(1_700_000_000_000)

// open opens one more store over the same database, as another process would.
func open(t *testing.T, url string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{URL: url, Clock: clocktesting.NewFakeClock(start)}, logr.Discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func never(context.Context, string) (bool, error)  { return false, nil }
func always(context.Context, string) (bool, error) { return true, nil }

func unused(Record) bool { return false }

// failures collects the errors that ended a device's store.
type failures struct {
	mu   sync.Mutex
	seen []error
}

func (f *failures) add(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = append(f.seen, err)
}

func (f *failures) all() []error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]error(nil), f.seen...)
}

// link fills a device as whatsmeow does when a phone links it, and does not store it.
func link(d *store.Device, jid types.JID) {
	d.ID = &jid
	d.LID = types.JID{User: "9" + jid.User, Device: jid.Device, Server: types.HiddenUserServer}
	d.Account = &waAdv.ADVSignedDeviceIdentity{
		Details: []byte("details"), AccountSignature: make([]byte, 64), AccountSignatureKey: make([]byte, 32), DeviceSignature: make([]byte, 64),
	}
}

func jidOf(user string) types.JID {
	return types.JID{User: user, Device: 3, Server: types.DefaultUserServer}
}

// paired claims, takes and links a session.
func paired(t *testing.T, s *Store, id string, jid types.JID) (*Taking, *store.Device, *failures) {
	t.Helper()
	g := NewWithT(t)
	_, err := s.Claim(t.Context(), Claimant{SessionID: id, Namespace: "a", UID: "uid-" + id}, never)
	g.Expect(err).NotTo(HaveOccurred())
	taking, err := s.Take(t.Context(), "uid-"+id, 1)
	g.Expect(err).NotTo(HaveOccurred())
	f := &failures{}
	d, err := taking.Open(t.Context(), f.add)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(d.ID).To(BeNil())
	link(d, jid)
	g.Expect(d.Save(t.Context())).To(Succeed())
	return taking, d, f
}

// fill writes into every table that belongs to a device.
func fill(t *testing.T, d *store.Device) {
	t.Helper()
	g := NewWithT(t)
	ctx := t.Context()
	other := types.JID{User: "4915112345678", Server: types.DefaultUserServer}
	g.Expect(d.Identities.PutIdentity(ctx, "other:1", [32]byte{1})).To(Succeed())
	g.Expect(d.Sessions.PutSession(ctx, "other:1", []byte("session"))).To(Succeed())
	keys, err := d.PreKeys.GetOrGenPreKeys(ctx, 20)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(keys).To(HaveLen(20))
	g.Expect(d.SenderKeys.PutSenderKey(ctx, "group", "other:1", []byte("key"))).To(Succeed())
	g.Expect(d.AppStateKeys.PutAppStateSyncKey(ctx, []byte("id"), store.AppStateSyncKey{Data: []byte("d"), Fingerprint: []byte("f"), Timestamp: 1})).To(Succeed())
	g.Expect(d.AppState.PutAppStateVersion(ctx, "critical", 1, [128]byte{})).To(Succeed())
	g.Expect(d.AppState.PutAppStateMutationMACs(ctx, "critical", 1, []store.AppStateMutationMAC{{IndexMAC: make([]byte, 32), ValueMAC: make([]byte, 32)}})).To(Succeed())
	changed, _, err := d.Contacts.PutPushName(ctx, other, "Ann\x00\xff")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(changed).To(BeTrue())
	g.Expect(d.ChatSettings.PutPinned(ctx, other, true)).To(Succeed())
	g.Expect(d.MsgSecrets.PutMessageSecret(ctx, other, other, "id\x00", []byte("secret"))).To(Succeed())
	g.Expect(d.PrivacyTokens.PutPrivacyTokens(ctx, store.PrivacyToken{User: other, Token: []byte("token"), Timestamp: start})).To(Succeed())
	g.Expect(d.NCTSalt.PutNCTSalt(ctx, []byte("salt"))).To(Succeed())
	g.Expect(d.EventBuffer.PutBufferedEvent(ctx, [32]byte{7}, []byte("plain"), start)).To(Succeed())
	g.Expect(d.EventBuffer.AddOutgoingEvent(ctx, other, "id\x00", "wa", []byte("plain"))).To(Succeed())
	g.Expect(d.LIDs.PutLIDMapping(ctx, types.JID{User: "77", Server: types.HiddenUserServer}, other)).To(Succeed())
}

// tables are those with rows of a device, by the column that names it.
var tables = map[string]string{
	"whatsmeow_device": "jid", "whatsmeow_identity_keys": "our_jid", "whatsmeow_pre_keys": "jid", "whatsmeow_sessions": "our_jid",
	"whatsmeow_sender_keys": "our_jid", "whatsmeow_app_state_sync_keys": "jid", "whatsmeow_app_state_version": "jid",
	"whatsmeow_app_state_mutation_macs": "jid", "whatsmeow_contacts": "our_jid", "whatsmeow_chat_settings": "our_jid",
	"whatsapp_operator_message_secret": "our_jid", "whatsmeow_privacy_tokens": "our_jid", "whatsmeow_event_buffer": "our_jid",
	"whatsmeow_retry_buffer": "our_jid", "whatsmeow_nct_salt": "our_jid",
}

// rows counts the rows that match in every table of a device.
func rows(t *testing.T, s *Store, like string) map[string]int {
	t.Helper()
	counts := map[string]int{}
	for table, column := range tables {
		var n int
		if err := s.db.QueryRow(t.Context(), fmt.Sprintf("SELECT COUNT(*) FROM %s WHERE %s LIKE $1", table, column), like).Scan(&n); err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			counts[table] = n
		}
	}
	return counts
}

func TestEveryTableOfADeviceIsKnown(t *testing.T) {
	g := NewWithT(t)
	s := open(t, kinds["SQLite"](t))
	g.Expect(s.Migrate(t.Context())).To(Succeed())
	names, err := s.strings(t.Context(), "SELECT name FROM sqlite_master WHERE type='table' AND name LIKE 'whatsmeow_%'")
	g.Expect(err).NotTo(HaveOccurred())
	// The secrets of messages are in a table of our own.
	shared := map[string]bool{"whatsmeow_version": true, "whatsmeow_lid_map": true, "whatsmeow_message_secrets": true}
	for _, name := range names {
		_, known := tables[name]
		g.Expect(known || shared[name]).To(BeTrue(), "%s: is it marked and deleted with its device?", name)
	}
}

func TestClaim(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		claim := func(namespace, uid string, gone func(context.Context, string) (bool, error)) (Record, error) {
			return s.Claim(ctx, Claimant{SessionID: "shop-1", Namespace: namespace, UID: uid}, gone)
		}

		r, err := claim("a", "1", never)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r).To(Equal(Record{SessionID: "shop-1", Namespace: "a", UID: "1", Created: start, Updated: start}))
		again, err := claim("a", "1", never)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(again).To(Equal(r), "a second claim changes nothing")

		_, err = claim("b", "2", always)
		g.Expect(err).To(MatchError(ErrTaken), "another namespace never gets it")
		g.Expect(err.Error()).NotTo(ContainSubstring("\"a\""), "the message names no namespace")
		_, err = claim("a", "2", never)
		g.Expect(err).To(MatchError(ErrTaken), "a live object keeps it")
		_, err = claim("a", "2", func(context.Context, string) (bool, error) { return false, errors.New("the API server is away") })
		g.Expect(err).To(MatchError(ContainSubstring("the API server is away")))

		var asked string
		r, err = claim("a", "2", func(_ context.Context, uid string) (bool, error) { asked = uid; return true, nil })
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(asked).To(Equal("1"))
		g.Expect(r.UID).To(Equal("2"))
		_, err = s.Record(ctx, "1")
		g.Expect(err).To(MatchError(ErrNoRecord))
		r, err = s.Record(ctx, "2")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.SessionID).To(Equal("shop-1"))
		_, err = s.Take(ctx, "1", 5)
		g.Expect(err).To(MatchError(ErrNoRecord), "the object that lost the id cannot take it")

		_, err = s.Claim(ctx, Claimant{SessionID: "x"}, never)
		g.Expect(err).To(HaveOccurred())
		_, err = s.RecordByID(ctx, "unknown")
		g.Expect(err).To(MatchError(ErrNoRecord))
	})
}

func TestClaimsAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		var wg sync.WaitGroup
		var won atomic.Int32
		for i := range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				_, err := s.Claim(t.Context(), Claimant{SessionID: "one", Namespace: fmt.Sprint("n", i), UID: fmt.Sprint("u", i)}, always)
				if err == nil {
					won.Add(1)
				} else if !errors.Is(err, ErrTaken) {
					t.Error(err)
				}
			}()
		}
		wg.Wait()
		g.Expect(won.Load()).To(Equal(int32(1)))
	})
}

func TestTake(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, err := s.Take(ctx, "u", 1)
		g.Expect(err).To(MatchError(ErrNoRecord))
		_, err = s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
		g.Expect(err).NotTo(HaveOccurred())

		first, err := s.Take(ctx, "u", 100)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(first.Starts()).To(Equal(int64(1)))
		g.Expect(first.Record.Epoch).To(Equal(int64(100)))

		_, err = s.Take(ctx, "u", 99)
		var behind *EpochBehindError
		g.Expect(errors.As(err, &behind)).To(BeTrue(), "%v", err)
		g.Expect(behind.Stored).To(Equal(int64(100)))

		// The same epoch: the worker was restarted in place.
		second, err := open(t, url).Take(ctx, "u", 100)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(second.Starts()).To(Equal(int64(2)))
		_, err = first.Open(ctx, func(error) {})
		g.Expect(errors.As(err, &behind)).To(BeTrue(), "the first process must not dial any more: %v", err)
		_, err = second.Open(ctx, func(error) {})
		g.Expect(err).NotTo(HaveOccurred())
	})
}

func TestPairingIsOneTransaction(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
		g.Expect(err).NotTo(HaveOccurred())
		taking, err := s.Take(ctx, "u", 1)
		g.Expect(err).NotTo(HaveOccurred())
		f := &failures{}
		d, err := taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		link(d, jidOf("4915100000001"))

		// The process dies after whatsmeow's row and before ours: the second
		// statement fails here, as the commit would.
		g.Expect(s.exec(ctx, "ALTER TABLE whatsapp_operator_session RENAME COLUMN updated_at TO gone")).To(Succeed())
		err = d.Save(ctx)
		g.Expect(err).To(MatchError(context.Canceled))
		g.Expect(f.all()).To(HaveLen(1))
		g.Expect(s.exec(ctx, "ALTER TABLE whatsapp_operator_session RENAME COLUMN gone TO updated_at")).To(Succeed())
		g.Expect(rows(t, s, "%")).To(BeEmpty(), "no device that nothing points to")
		g.Expect(d.Identities.PutIdentity(ctx, "x", [32]byte{})).To(MatchError(context.Canceled), "the wrapper stays in place")

		// The next attempt of the same process pairs, and another process finds it.
		d, err = taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(d.ID).To(BeNil())
		link(d, jidOf("4915100000001"))
		d.PushName = "Shop\x00"
		g.Expect(d.Save(ctx)).To(Succeed())
		fill(t, d)

		other := open(t, url)
		r, err := other.Record(ctx, "u")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(Equal("4915100000001:3@s.whatsapp.net"))
		g.Expect(r.PhoneNumber()).To(Equal("+4915100000001"))
		next, err := other.Take(ctx, "u", 2)
		g.Expect(err).NotTo(HaveOccurred())
		found, err := next.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(found.ID).To(HaveValue(Equal(*d.ID)))
		g.Expect(found.NoiseKey.Priv).To(Equal(d.NoiseKey.Priv))
		session, err := found.Sessions.GetSession(ctx, "other:1")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(session).To(Equal([]byte("session")))
		secret, _, err := found.MsgSecrets.GetMessageSecret(ctx, types.JID{User: "4915112345678", Server: types.DefaultUserServer}, types.JID{User: "4915112345678", Server: types.DefaultUserServer}, "id\x00")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(secret).To(Equal([]byte("secret")))
	})
}

func TestFence(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, f := paired(t, s, "id", jidOf("4915100000001"))
		fill(t, d)

		_, err := open(t, url).Take(ctx, "uid-id", 2)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(f.all()).To(BeEmpty())
		name, err := d.Sessions.GetSession(ctx, "other:1")
		g.Expect(err).NotTo(HaveOccurred(), "the old owner gets no signal")
		g.Expect(name).NotTo(BeEmpty())

		err = d.Sessions.PutSession(ctx, "other:1", []byte("moved by the dead"))
		g.Expect(err).To(MatchError(ErrFenced))
		g.Expect(err).To(MatchError(context.Canceled), "or whatsmeow would acknowledge the message")
		g.Expect(f.all()).To(HaveExactElements(MatchError(ErrFenced)))

		_, err = d.Sessions.GetSession(ctx, "other:1")
		g.Expect(err).To(MatchError(context.Canceled), "reads too")
		_, _, err = d.Contacts.PutPushName(ctx, jidOf("1"), "x")
		g.Expect(err).To(MatchError(context.Canceled))
		_, err = d.LIDs.GetLIDForPN(ctx, jidOf("1"))
		g.Expect(err).To(MatchError(context.Canceled))
		g.Expect(d.LIDs.PutLIDMapping(ctx, types.JID{User: "5", Server: types.HiddenUserServer}, jidOf("1"))).To(MatchError(context.Canceled))
		g.Expect(d.Container.PutDevice(ctx, d)).To(MatchError(context.Canceled))
		g.Expect(d.Container.DeleteDevice(ctx, d)).To(MatchError(context.Canceled), "a logout that the old owner hears of is the successor's")
		g.Expect(d.EventBuffer.DoDecryptionTxn(ctx, func(context.Context) error { t.Error("decrypted"); return nil })).To(MatchError(context.Canceled))
		g.Expect(f.all()).To(HaveLen(1), "reported once")

		stored, err := s.strings(ctx, "SELECT CAST(session AS TEXT) FROM whatsmeow_sessions")
		if s.postgres != nil {
			stored, err = s.strings(ctx, "SELECT convert_from(session, 'UTF8') FROM whatsmeow_sessions")
		}
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(stored).To(HaveExactElements("session"))
	})
}

func TestEveryWriteIsFenced(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		ctx := t.Context()
		jid := jidOf("4915100000009")
		writes := map[string]func(d *store.Device) error{
			"PutIdentity":           func(d *store.Device) error { return d.Identities.PutIdentity(ctx, "a", [32]byte{}) },
			"DeleteAllIdentities":   func(d *store.Device) error { return d.Identities.DeleteAllIdentities(ctx, "a") },
			"DeleteIdentity":        func(d *store.Device) error { return d.Identities.DeleteIdentity(ctx, "a") },
			"PutSession":            func(d *store.Device) error { return d.Sessions.PutSession(ctx, "a", nil) },
			"PutManySessions":       func(d *store.Device) error { return d.Sessions.PutManySessions(ctx, map[string][]byte{"a": nil}) },
			"DeleteAllSessions":     func(d *store.Device) error { return d.Sessions.DeleteAllSessions(ctx, "a") },
			"DeleteSession":         func(d *store.Device) error { return d.Sessions.DeleteSession(ctx, "a") },
			"MigratePNToLID":        func(d *store.Device) error { return d.Sessions.MigratePNToLID(ctx, jid, jid) },
			"GetOrGenPreKeys":       func(d *store.Device) error { _, err := d.PreKeys.GetOrGenPreKeys(ctx, 1); return err },
			"GenOnePreKey":          func(d *store.Device) error { _, err := d.PreKeys.GenOnePreKey(ctx); return err },
			"RemovePreKey":          func(d *store.Device) error { return d.PreKeys.RemovePreKey(ctx, 1) },
			"MarkPreKeysAsUploaded": func(d *store.Device) error { return d.PreKeys.MarkPreKeysAsUploaded(ctx, 1) },
			"PutSenderKey":          func(d *store.Device) error { return d.SenderKeys.PutSenderKey(ctx, "g", "u", []byte{1}) },
			"PutAppStateSyncKey": func(d *store.Device) error {
				return d.AppStateKeys.PutAppStateSyncKey(ctx, []byte{1}, store.AppStateSyncKey{})
			},
			"PutAppStateVersion":    func(d *store.Device) error { return d.AppState.PutAppStateVersion(ctx, "n", 1, [128]byte{}) },
			"DeleteAppStateVersion": func(d *store.Device) error { return d.AppState.DeleteAppStateVersion(ctx, "n") },
			"PutAppStateMutationMACs": func(d *store.Device) error {
				return d.AppState.PutAppStateMutationMACs(ctx, "n", 1, []store.AppStateMutationMAC{{}})
			},
			"DeleteAppStateMutationMACs": func(d *store.Device) error {
				return d.AppState.DeleteAppStateMutationMACs(ctx, "n", [][]byte{{1}})
			},
			"PutPushName":     func(d *store.Device) error { _, _, err := d.Contacts.PutPushName(ctx, jid, "n"); return err },
			"PutBusinessName": func(d *store.Device) error { _, _, err := d.Contacts.PutBusinessName(ctx, jid, "n"); return err },
			"PutContactName":  func(d *store.Device) error { return d.Contacts.PutContactName(ctx, jid, "n", "n") },
			"PutAllContactNames": func(d *store.Device) error {
				return d.Contacts.PutAllContactNames(ctx, []store.ContactEntry{{JID: jid}})
			},
			"PutManyRedactedPhones": func(d *store.Device) error {
				return d.Contacts.PutManyRedactedPhones(ctx, []store.RedactedPhoneEntry{{JID: jid}})
			},
			"PutMutedUntil": func(d *store.Device) error { return d.ChatSettings.PutMutedUntil(ctx, jid, start) },
			"PutPinned":     func(d *store.Device) error { return d.ChatSettings.PutPinned(ctx, jid, true) },
			"PutArchived":   func(d *store.Device) error { return d.ChatSettings.PutArchived(ctx, jid, true) },
			"PutMessageSecrets": func(d *store.Device) error {
				return d.MsgSecrets.PutMessageSecrets(ctx, []store.MessageSecretInsert{{Chat: jid, Sender: jid, ID: "i", Secret: []byte{1}}})
			},
			"PutMessageSecret": func(d *store.Device) error { return d.MsgSecrets.PutMessageSecret(ctx, jid, jid, "i", []byte{1}) },
			"PutPrivacyTokens": func(d *store.Device) error {
				return d.PrivacyTokens.PutPrivacyTokens(ctx, store.PrivacyToken{User: jid, Token: []byte{1}})
			},
			"DeleteExpiredPrivacyTokens": func(d *store.Device) error {
				_, err := d.PrivacyTokens.DeleteExpiredPrivacyTokens(ctx, start)
				return err
			},
			"PutNCTSalt":       func(d *store.Device) error { return d.NCTSalt.PutNCTSalt(ctx, []byte{1}) },
			"DeleteNCTSalt":    func(d *store.Device) error { return d.NCTSalt.DeleteNCTSalt(ctx) },
			"PutBufferedEvent": func(d *store.Device) error { return d.EventBuffer.PutBufferedEvent(ctx, [32]byte{}, nil, start) },
			"AddOutgoingEvent": func(d *store.Device) error {
				return d.EventBuffer.AddOutgoingEvent(ctx, jid, "i", "wa", []byte{1})
			},
			"DeleteOldOutgoingEvents": func(d *store.Device) error { return d.EventBuffer.DeleteOldOutgoingEvents(ctx) },
			"ClearBufferedEventPlaintext": func(d *store.Device) error {
				return d.EventBuffer.ClearBufferedEventPlaintext(ctx, [32]byte{})
			},
			"DoDecryptionTxn": func(d *store.Device) error {
				return d.EventBuffer.DoDecryptionTxn(ctx, func(context.Context) error { return nil })
			},
			"PutLIDMapping": func(d *store.Device) error {
				return d.LIDs.PutLIDMapping(ctx, types.JID{User: "1", Server: types.HiddenUserServer}, jid)
			},
			"PutManyLIDMappings": func(d *store.Device) error {
				return d.LIDs.PutManyLIDMappings(ctx, []store.LIDMapping{{LID: types.JID{User: "1", Server: types.HiddenUserServer}, PN: jid}})
			},
			"PutDevice":    func(d *store.Device) error { return d.Container.PutDevice(ctx, d) },
			"DeleteDevice": func(d *store.Device) error { return d.Container.DeleteDevice(ctx, d) },
		}
		for _, name := range storeMethods(t) {
			if _, writes := writes[name]; !writes && !slices.Contains(reads, name) {
				t.Errorf("whatsmeow's %s is neither known to read only nor tested to be fenced", name)
			}
		}
		taking, d, _ := paired(t, s, "id", jid)
		expired := store.PrivacyToken{User: types.JID{User: "1", Server: types.HiddenUserServer}, Token: []byte{1}, Timestamp: start.Add(-time.Hour)}
		if err := d.PrivacyTokens.PutPrivacyTokens(ctx, expired); err != nil {
			t.Fatal(err)
		}
		for name, write := range writes {
			t.Run(name, func(t *testing.T) {
				g := NewWithT(t)
				f := &failures{}
				d, err := taking.Open(ctx, f.add)
				g.Expect(err).NotTo(HaveOccurred())
				next, err := open(t, url).Take(ctx, "uid-id", 1)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(write(d)).To(And(MatchError(ErrFenced), MatchError(context.Canceled)))
				g.Expect(f.all()).To(HaveLen(1))
				taking = &Taking{Record: next.Record, store: s}
			})
		}
	})
}

// reads are the methods of whatsmeow's stores that change nothing. DeleteOldBufferedHashes is
// the janitor's here, and does nothing.
var reads = []string{
	"IsTrustedIdentity", "GetSession", "HasSession", "GetManySessions", "GetPreKey", "UploadedPreKeyCount", "GetSenderKey",
	"GetAppStateSyncKey", "GetAllAppStateSyncKeys", "GetLatestAppStateSyncKeyID", "GetAppStateVersion", "GetAppStateMutationMAC",
	"GetContact", "GetAllContacts", "GetChatSettings", "GetMessageSecret", "GetPrivacyToken", "GetNCTSalt",
	"GetBufferedEvent", "GetOutgoingEvent", "DeleteOldBufferedHashes", "GetPNForLID", "GetLIDForPN", "GetManyLIDsForPNs",
}

// storeMethods are the methods of every store in whatsmeow's device.
func storeMethods(t *testing.T) []string {
	t.Helper()
	var methods []string
	for field := range reflect.TypeFor[store.Device]().Fields() {
		if field.Type.Kind() != reflect.Interface || field.Type == reflect.TypeFor[waLog.Logger]() {
			continue
		}
		for method := range field.Type.Methods() {
			methods = append(methods, method.Name)
		}
	}
	if len(methods) < len(reads) {
		t.Fatalf("whatsmeow's device has the methods %q only", methods)
	}
	return methods
}

// A new store of whatsmeow's that is not wrapped would write without the fence.
func TestEveryStoreIsWrapped(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
		g.Expect(err).NotTo(HaveOccurred())
		taking, err := s.Take(ctx, "u", 1)
		g.Expect(err).NotTo(HaveOccurred())
		check := func(d *store.Device, when string) {
			for field, value := range reflect.ValueOf(d).Elem().Fields() {
				if field.Type.Kind() != reflect.Interface || field.Type == reflect.TypeFor[waLog.Logger]() {
					continue
				}
				g.Expect(value.Interface()).To(Or(BeAssignableToTypeOf(&device{}), BeAssignableToTypeOf(cleaned{})), "%s of a device %s", field.Name, when)
			}
		}
		d, err := taking.Open(ctx, func(err error) { t.Error(err) })
		g.Expect(err).NotTo(HaveOccurred())
		check(d, "that no phone has linked")
		link(d, jidOf("4915100000001"))
		g.Expect(d.Save(ctx)).To(Succeed())
		check(d, "that a phone has just linked")
		d, err = taking.Open(ctx, func(err error) { t.Error(err) })
		g.Expect(err).NotTo(HaveOccurred())
		check(d, "that was read")
		g.Expect(d.Save(ctx)).To(Succeed())
		check(d, "that was stored again")
	})
}

// Not every error of whatsmeow's stores is a failure of the database.
func TestAnswersThatAreNoFailures(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, f := paired(t, s, "id", jidOf("4915100000001"))

		_, _, err := d.EventBuffer.GetOutgoingEvent(ctx, jidOf("1"), jidOf("2"), "unknown")
		g.Expect(err).To(MatchError(sql.ErrNoRows))
		g.Expect(d.EventBuffer.AddOutgoingEvent(ctx, jidOf("1"), "id", "wa", []byte("text"))).To(Succeed())
		format, text, err := d.EventBuffer.GetOutgoingEvent(ctx, jidOf("2"), jidOf("1"), "id")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(format + string(text)).To(Equal("watext"))

		g.Expect(d.AppState.PutAppStateVersion(ctx, "regular", 0, [128]byte{1})).To(Succeed())
		version, hash, err := d.AppState.GetAppStateVersion(ctx, "regular")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(version).To(BeZero())
		g.Expect(hash).To(BeZero())

		user := types.JID{User: "7", Server: types.HiddenUserServer}
		g.Expect(d.PrivacyTokens.PutPrivacyTokens(ctx,
			store.PrivacyToken{User: user, Token: []byte("new"), Timestamp: start},
			store.PrivacyToken{User: user, Token: []byte("old"), Timestamp: start.Add(-time.Hour)})).To(Succeed())
		token, err := d.PrivacyTokens.GetPrivacyToken(ctx, user)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(token.Token).To(Equal([]byte("new")))
		n, err := d.PrivacyTokens.DeleteExpiredPrivacyTokens(ctx, start)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(n).To(BeZero())
		n, err = d.PrivacyTokens.DeleteExpiredPrivacyTokens(ctx, start.Add(time.Second))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(n).To(BeEquivalentTo(1))

		g.Expect(f.all()).To(BeEmpty())
	})
}

// whatsmeow delivers a message that was decrypted before, and acknowledges one that was
// delivered before, without a write that the fence could refuse.
func TestOnlyTheSuccessorGetsABufferedMessage(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, f := paired(t, s, "id", jidOf("4915100000001"))
		g.Expect(d.EventBuffer.PutBufferedEvent(ctx, [32]byte{1}, []byte("plain"), start)).To(Succeed())
		event, err := d.EventBuffer.GetBufferedEvent(ctx, [32]byte{1})
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(event.Plaintext).To(Equal([]byte("plain")))

		_, err = open(t, url).Take(ctx, "uid-id", 2)
		g.Expect(err).NotTo(HaveOccurred())
		event, err = d.EventBuffer.GetBufferedEvent(ctx, [32]byte{2})
		g.Expect(err).NotTo(HaveOccurred(), "its decryption is refused")
		g.Expect(event).To(BeNil())
		event, err = d.EventBuffer.GetBufferedEvent(ctx, [32]byte{1})
		g.Expect(err).To(And(MatchError(ErrFenced), MatchError(context.Canceled)))
		g.Expect(event).To(BeNil())
		g.Expect(f.all()).To(HaveLen(1))
	})
}

func TestATakerWaitsForTheMessageInFlight(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, f := paired(t, s, "id", jidOf("4915100000001"))
		inside, proceed, done := make(chan struct{}), make(chan struct{}), make(chan error)
		go func() {
			done <- d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
				close(inside)
				<-proceed
				return d.Sessions.PutSession(ctx, "other:1", []byte("moved"))
			})
		}()
		<-inside
		taken := make(chan error)
		successor := open(t, url)
		go func() {
			_, err := successor.Take(ctx, "uid-id", 2)
			taken <- err
		}()
		g.Consistently(taken, "200ms").ShouldNot(Receive())
		close(proceed)
		g.Expect(<-done).To(Succeed())
		g.Expect(<-taken).To(Succeed())
		session, err := d.Sessions.GetSession(ctx, "other:1")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(session).To(Equal([]byte("moved")))
		g.Expect(f.all()).To(BeEmpty())
	})
}

func TestAStoppedWriterDoesNotKeepItsSuccessorWaiting(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	url := testenv.Postgres(t)
	s := open(t, url)
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, d, f := paired(t, s, "id", jidOf("4915100000001"))
	successor := open(t, url)
	err := d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
		// This process stops here. PostgreSQL ends its transaction after 3 s.
		if _, err := successor.Take(context.WithoutCancel(t.Context()), "uid-id", 2); err != nil {
			t.Error(err)
		}
		return d.Sessions.PutSession(ctx, "other:1", []byte("moved"))
	})
	g.Expect(err).To(MatchError(context.Canceled))
	g.Expect(f.all()).To(HaveLen(1))
	g.Expect(rows(t, s, "%")).NotTo(HaveKey("whatsmeow_sessions"))
	var idle int
	g.Expect(successor.db.QueryRow(ctx, "SELECT COUNT(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname=current_database()").Scan(&idle)).To(Succeed())
	g.Expect(idle).To(BeZero())
}

func TestASignalErrorIsNoFailureOfTheStore(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, f := paired(t, s, "id", jidOf("4915100000001"))
		err := d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
			if err := d.Sessions.PutSession(ctx, "other:1", []byte("half done")); err != nil {
				return err
			}
			return fmt.Errorf("decrypting: %w", signalerror.ErrNoSenderKeyForUser)
		})
		g.Expect(err).To(MatchError(signalerror.ErrNoSenderKeyForUser))
		g.Expect(err).NotTo(MatchError(context.Canceled))
		g.Expect(rows(t, s, "%")).NotTo(HaveKey("whatsmeow_sessions"), "rolled back")
		err = d.EventBuffer.DoDecryptionTxn(ctx, func(context.Context) error { panic("bad ciphertext") })
		g.Expect(err).To(MatchError(ContainSubstring("bad ciphertext")))
		g.Expect(err).NotTo(MatchError(context.Canceled))
		g.Expect(f.all()).To(BeEmpty())
		g.Expect(d.Sessions.PutSession(ctx, "other:1", []byte("x"))).To(Succeed(), "the transaction is over and the store is usable")

		_, err = d.LIDs.GetLIDForPN(ctx, types.JID{User: "1", Server: types.GroupServer})
		g.Expect(err).To(HaveOccurred())
		g.Expect(f.all()).To(BeEmpty(), "a bad question is not a failure of the store")
	})
}

func TestALostDatabaseEndsTheConnection(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, _, _ = paired(t, s, "id", jidOf("4915100000001"))
		mine, err := Open(ctx, Config{URL: url}, logr.Discard())
		g.Expect(err).NotTo(HaveOccurred())
		taking, err := mine.Take(ctx, "uid-id", 2)
		g.Expect(err).NotTo(HaveOccurred())
		f := &failures{}
		d, err := taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(mine.Close()).To(Succeed())
		_, err = d.Sessions.GetSession(ctx, "other:1")
		g.Expect(err).To(MatchError(context.Canceled))
		g.Expect(f.all()).To(HaveLen(1))
	})
}

func TestALogoutOnlyMarks(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		jid := jidOf("4915100000001")
		taking, d, f := paired(t, s, "id", jid)
		fill(t, d)
		before := rows(t, s, jid.String())
		g.Expect(before).To(HaveLen(len(tables)), "the test covers every table: %v", before)

		// The connection ends at the same moment.
		ended, cancel := context.WithCancel(ctx)
		cancel()
		stores := d.Container
		g.Expect(d.Delete(ended)).To(Succeed())
		g.Expect(rows(t, s, jid.String())).To(BeEmpty())
		g.Expect(rows(t, s, "4915100000001:3@marked.%")).To(Equal(before), "every row is kept under another name")
		r, err := s.Record(ctx, "uid-id")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(BeEmpty())
		g.Expect(s.Counts(ctx)).To(Equal(Counts{Sessions: 1, Marked: 1}))

		// whatsmeow does not use a deleted device any more; the fence would refuse it too.
		g.Expect(d.Save(ctx)).To(MatchError(store.ErrDeviceDeleted))
		link(d, jid)
		g.Expect(stores.PutDevice(ctx, d)).To(MatchError(ErrFenced))
		g.Expect(f.all()).To(HaveLen(1))

		// The same number is linked again, with its own keys.
		fresh, err := taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(fresh.ID).To(BeNil())
		link(fresh, jid)
		g.Expect(fresh.Save(ctx)).To(Succeed())
		read, err := taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(read.NoiseKey.Priv).To(Equal(fresh.NoiseKey.Priv))
		g.Expect(read.NoiseKey.Priv).NotTo(Equal(d.NoiseKey.Priv))
		g.Expect(s.Counts(ctx)).To(Equal(Counts{Sessions: 1, Devices: 1, Marked: 1}))
	})
}

func TestANumberThatMovesToAnotherSession(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		jid := jidOf("4915100000001")
		_, old, f := paired(t, s, "old", jid)
		fill(t, old)
		_, fresh, _ := paired(t, s, "new", jid)
		fill(t, fresh)

		r, err := s.Record(ctx, "uid-old")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(BeEmpty())
		r, err = s.Record(ctx, "uid-new")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(Equal(jid.String()))
		g.Expect(old.Sessions.PutSession(ctx, "other:1", nil)).To(MatchError(ErrFenced), "the old session has lost the device")
		g.Expect(f.all()).To(HaveLen(1))
	})
}

func TestForget(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		jid := jidOf("4915100000001")
		taking, d, f := paired(t, s, "id", jid)
		fill(t, d)
		g.Expect(d.Delete(ctx)).To(Succeed()) // whatsmeow's Logout does this
		_, other, _ := paired(t, s, "other", jidOf("4915100000002"))
		fill(t, other)

		_, err := open(t, url).Take(ctx, "uid-id", 2)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(taking.Forget(ctx)).To(MatchError(ErrFenced), "a successor's keys are not ours to delete")
		taking, err = s.Take(ctx, "uid-id", 2)
		g.Expect(err).NotTo(HaveOccurred())
		fresh, err := taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		link(fresh, jid)
		g.Expect(fresh.Save(ctx)).To(Succeed())
		fill(t, fresh)
		g.Expect(taking.Forget(ctx)).To(Succeed())
		g.Expect(taking.Forget(ctx)).To(Succeed(), "the answer to the first call may have been lost")

		_, err = s.Record(ctx, "uid-id")
		g.Expect(err).To(MatchError(ErrNoRecord))
		g.Expect(rows(t, s, "4915100000001%")).To(BeEmpty(), "the marked device goes too")
		g.Expect(rows(t, s, "4915100000002%")).To(HaveLen(len(tables)), "another session's keys stay")
		g.Expect(s.DeleteSession(ctx, "uid-id")).To(Succeed(), "a second time is a success")
		g.Expect(s.DeleteSession(ctx, "uid-other")).To(Succeed())
		g.Expect(rows(t, s, "%")).To(BeEmpty())
	})
}

func TestKeysWithoutAResource(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		clock := s.clock.(*clocktesting.FakeClock)
		_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
		fill(t, d)
		_, err := s.Claim(ctx, Claimant{SessionID: "empty", Namespace: "a", UID: "uid-empty"}, never)
		g.Expect(err).NotTo(HaveOccurred())

		kept, err := s.Retain(ctx, "uid-id")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(kept).To(BeTrue())
		kept, err = s.Retain(ctx, "uid-empty")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(kept).To(BeFalse())
		_, err = s.RecordByID(ctx, "empty")
		g.Expect(err).To(MatchError(ErrNoRecord), "an id without keys is free")

		r, err := s.MarkOrphan(ctx, "uid-id")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(Equal("4915100000001:3@s.whatsapp.net"))
		clock.Step(time.Hour)
		again, err := s.MarkOrphan(ctx, "uid-id")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(again.Orphaned).To(Equal(start), "the first time counts")
		g.Expect(s.Records(ctx)).To(HaveExactElements(HaveField("Keeping", Keeping{Orphaned: start})))
		_, err = s.MarkOrphan(ctx, "unknown")
		g.Expect(err).To(MatchError(ErrNoRecord))

		// Applied again in its namespace, it is not an orphan any more.
		_, err = s.Claim(ctx, Claimant{SessionID: "id", Namespace: "b", UID: "uid-b"}, always)
		g.Expect(err).To(MatchError(ErrTaken))
		r, err = s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "uid-2"}, always)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.Orphaned).To(BeZero())
		g.Expect(r.JID).NotTo(BeEmpty())
		clock.Step(KeepOrphans + time.Hour)
		g.Expect(s.Clean(ctx)).To(Succeed())
		_, err = s.Record(ctx, "uid-2")
		g.Expect(err).NotTo(HaveOccurred())

		_, err = s.MarkOrphan(ctx, "uid-2")
		g.Expect(err).NotTo(HaveOccurred())
		clock.Step(KeepOrphans)
		g.Expect(s.Clean(ctx)).To(Succeed())
		_, err = s.Record(ctx, "uid-2")
		g.Expect(err).NotTo(HaveOccurred(), "kept for the whole time")
		clock.Step(time.Millisecond)
		g.Expect(s.Clean(ctx)).To(Succeed())
		_, err = s.Record(ctx, "uid-2")
		g.Expect(err).To(MatchError(ErrNoRecord))
		g.Expect(rows(t, s, "%")).To(BeEmpty())
	})
}

func TestTheJanitor(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		clock := s.clock.(*clocktesting.FakeClock)
		_, gone, _ := paired(t, s, "gone", jidOf("4915100000001"))
		fill(t, gone)
		g.Expect(gone.Delete(ctx)).To(Succeed())
		_, d, _ := paired(t, s, "id", jidOf("4915100000002"))
		clock.Step(KeepMarked)
		g.Expect(s.Clean(ctx)).To(Succeed())
		g.Expect(s.Counts(ctx)).To(Equal(Counts{Sessions: 2, Devices: 1, Marked: 1}))
		clock.Step(time.Millisecond)
		g.Expect(s.Clean(ctx)).To(Succeed())
		g.Expect(s.Counts(ctx)).To(Equal(Counts{Sessions: 2, Devices: 1}))
		g.Expect(rows(t, s, "4915100000001%")).To(BeEmpty())

		// whatsmeow stamps events with the real time.
		g.Expect(d.EventBuffer.DeleteOldBufferedHashes(ctx)).To(Succeed())
		const events = slice + 3
		g.Expect(d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
			for i := range events {
				if err := d.EventBuffer.PutBufferedEvent(ctx, [32]byte{byte(i), byte(i >> 8)}, nil, start); err != nil {
					return err
				}
			}
			return nil
		})).To(Succeed())
		n, err := s.CleanEventBuffer(ctx, time.Now().Add(-time.Hour))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(n).To(BeZero())
		n, err = s.CleanEventBuffer(ctx, time.Now().Add(time.Hour))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(n).To(BeEquivalentTo(events))
	})
}

// A message that was decrypted and not accepted is kept as long as WhatsApp may deliver it again:
// its key is used up, so there is no other copy of it. Of the others only the hash is there.
func TestTheJanitorKeepsWhatWasNotAccepted(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		clock := s.clock.(*clocktesting.FakeClock)
		clock.SetTime(time.Now()) // whatsmeow stamps events with the real time
		_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
		accepted, refused := [32]byte{1}, [32]byte{2}
		g.Expect(d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
			return errors.Join(d.EventBuffer.PutBufferedEvent(ctx, accepted, []byte("hello"), clock.Now()), d.EventBuffer.PutBufferedEvent(ctx, refused, []byte("hello"), clock.Now()))
		})).To(Succeed())
		g.Expect(d.EventBuffer.ClearBufferedEventPlaintext(ctx, accepted)).To(Succeed())
		kept := func() (hashes []string) {
			for name, hash := range map[string][32]byte{"accepted": accepted, "refused": refused} {
				event, err := d.EventBuffer.GetBufferedEvent(ctx, hash)
				g.Expect(err).NotTo(HaveOccurred())
				if event != nil {
					hashes = append(hashes, name)
				}
			}
			return hashes
		}
		for _, step := range []struct {
			days int
			want []string
		}{{13, []string{"accepted", "refused"}}, {17, []string{"refused"}}, {2, nil}} {
			clock.Step(time.Duration(step.days) * 24 * time.Hour)
			g.Expect(s.Clean(ctx)).To(Succeed())
			g.Expect(kept()).To(ConsistOf(step.want))
		}
	})
}

func TestMigration(t *testing.T) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			url := make(t)
			worker := open(t, url)
			waiting := waitForSchema(t.Context(), worker)
			g.Consistently(waiting, "100ms").ShouldNot(Receive())

			// Two leaders at the same time: a former leader may not know yet that it lost the leadership.
			var wg sync.WaitGroup
			for range 4 {
				s := open(t, url)
				wg.Add(1)
				go func() {
					defer wg.Done()
					if err := s.Migrate(t.Context()); err != nil {
						t.Error(err)
					}
				}()
			}
			wg.Wait()
			g.Eventually(func() bool {
				worker.clock.(*clocktesting.FakeClock).Step(schemaInterval)
				select {
				case err := <-waiting:
					g.Expect(err).NotTo(HaveOccurred())
					return true
				default:
					return false
				}
			}).Should(BeTrue())

			// A newer release has changed the tables in a compatible way.
			g.Expect(worker.exec(t.Context(), "UPDATE whatsapp_operator_version SET version=99")).To(Succeed())
			g.Expect(worker.WaitForSchema(t.Context())).To(Succeed())
			g.Expect(worker.Migrate(t.Context())).To(Succeed())
			g.Expect(worker.exec(t.Context(), "UPDATE whatsapp_operator_version SET compat=99")).To(Succeed())
			g.Expect(worker.WaitForSchema(t.Context())).To(MatchError(ErrSchemaTooNew))
			g.Expect(worker.Migrate(t.Context())).To(MatchError(ErrSchemaTooNew))
		})
	}
}

func waitForSchema(ctx context.Context, s *Store) chan error {
	done := make(chan error, 1)
	go func() { done <- s.WaitForSchema(ctx) }()
	return done
}

func TestWaitingForTheSchemaEnds(t *testing.T) {
	g := NewWithT(t)
	s := open(t, kinds["SQLite"](t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g.Expect(s.WaitForSchema(ctx)).To(MatchError(context.Canceled))
}

func TestBadURLs(t *testing.T) {
	for name, url := range map[string]string{
		"nothing":          "",
		"no path":          "sqlite:",
		"another database": "mysql://root:hunter2@localhost/x",
		"a bad port":       "postgres://root:hunter2@localhost:port/x",
		"a bad escape":     "postgres://root:hunter2%zz@localhost/x",
		"a bad option":     "postgres://root:hunter2@localhost/x?sslmode=hunter2",
		"nothing listens":  "postgres://root:hunter2@127.0.0.1:1/x",
		"a missing folder": "sqlite:/nonexistent/hunter1/x.db",
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			s, err := Open(t.Context(), Config{URL: url}, logr.Discard())
			if err == nil {
				err = errors.Join(s.Ping(t.Context()), s.Close())
			}
			g.Expect(err).To(HaveOccurred())
			g.Expect(err.Error()).NotTo(ContainSubstring("hunter2"))
			g.Expect(strings.ContainsAny(err.Error(), "\x00")).To(BeFalse())
			switch name {
			case "nothing listens", "a missing folder": // only the attempt shows it
				g.Expect(Config{URL: url}.Validate()).To(Succeed())
			default:
				g.Expect(Config{URL: url}.Validate()).To(MatchError(ErrBadURL))
			}
		})
	}
}

// TestTheFilesOfAURL: the library reads them when it parses the URL, and its error quotes the URL.
func TestTheFilesOfAURL(t *testing.T) {
	g := NewWithT(t)
	other := filepath.Join(t.TempDir(), "ca.crt")
	g.Expect(os.WriteFile(other, []byte("no certificate"), 0o600)).To(Succeed())
	missing := Config{URL: "postgres://a:1,b:2/c?sslmode=verify-full&sslrootcert=/does/not/exist"}.Validate()
	g.Expect(missing).To(And(MatchError(ContainSubstring("sslrootcert in the URL of the store")), MatchError(fs.ErrNotExist)), "a start waits for the file")
	g.Expect(Config{URL: "postgres://a/c?sslmode=verify-full&sslrootcert=" + other}.Validate()).To(MatchError(ContainSubstring("the file " + other + " holds no certificate")))
	g.Expect(Config{URL: "postgres://a/c?sslmode=never"}.Validate()).To(MatchError(ErrBadURL))
}

func TestMaxConns(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	g.Expect(Config{URL: "mysql://x", MaxConns: -1}.Validate()).To(And(MatchError(ErrBadURL), MatchError(ContainSubstring("--store-max-connections is -1"))), "all errors at once")
	_, err := Open(ctx, Config{URL: "x.db", MaxConns: -1}, logr.Discard())
	g.Expect(err).To(HaveOccurred(), "for database/sql it would be no bound at all")

	s, err := Open(ctx, Config{URL: testenv.Postgres(t), MaxConns: 3}, logr.Discard())
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(s.Close()).To(Succeed()) }()
	g.Expect(s.Migrate(ctx)).To(Succeed())
	most := 0
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 12 {
		_, d, _ := paired(t, s, fmt.Sprint(i), jidOf(fmt.Sprint("491510000", i)))
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 10 {
				err := d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
					var n int
					err := s.db.QueryRow(ctx, "SELECT COUNT(*) FROM pg_stat_activity WHERE datname=current_database() AND backend_type='client backend'").Scan(&n)
					mu.Lock()
					defer mu.Unlock()
					most = max(most, n)
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	g.Expect(most).To(Equal(3))
}

// Readers hold whatsmeow's contact mutex while they wait for a connection to
// the database, writers hold a connection while they wait for the mutex.
func TestManyNamesOverFewConnections(t *testing.T) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			s, err := Open(ctx, Config{URL: make(t), MaxConns: 2}, logr.Discard())
			g.Expect(err).NotTo(HaveOccurred())
			defer func() { g.Expect(s.Close()).To(Succeed()) }()
			g.Expect(s.Migrate(ctx)).To(Succeed())
			var wg sync.WaitGroup
			for i := range 4 {
				_, d, f := paired(t, s, fmt.Sprint("s", i), jidOf(fmt.Sprint("49151000000", i)))
				for j := range 8 {
					wg.Add(1)
					go func() {
						defer wg.Done()
						for k := range 5 {
							user := types.JID{User: fmt.Sprint(j, k), Server: types.DefaultUserServer}
							_, _, err := d.Contacts.PutPushName(ctx, user, "name")
							_, errRead := d.Contacts.GetContact(ctx, types.JID{User: fmt.Sprint(k, j, "x"), Server: types.DefaultUserServer})
							errLID := d.LIDs.PutLIDMapping(ctx, types.JID{User: user.User, Server: types.HiddenUserServer}, user)
							if err := errors.Join(append(f.all(), err, errRead, errLID)...); err != nil {
								t.Error(err)
								return
							}
						}
					}()
				}
			}
			wg.Wait()
		})
	}
}

// Counts are the numbers of a store.
type Counts struct {
	// Sessions are the records, Devices those of them with a linked device, Orphans those
	// without a resource; Marked are the devices that WhatsApp has logged out.
	Sessions, Devices, Orphans, Marked int64
}

// Counts counts the sessions and devices of a store.
func (s *Store) Counts(ctx context.Context) (c Counts, err error) {
	err = s.db.QueryRow(ctx, `SELECT COUNT(*), COUNT(jid), COUNT(orphaned_at),
		(SELECT COUNT(*) FROM whatsapp_operator_marked_device) FROM whatsapp_operator_session`).
		Scan(&c.Sessions, &c.Devices, &c.Orphans, &c.Marked)
	if err != nil {
		return Counts{}, fmt.Errorf("counting the store: %w", err)
	}
	return c, nil
}

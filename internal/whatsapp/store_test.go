package whatsapp

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/appstate"
	waBinary "go.mau.fi/whatsmeow/binary"
	"go.mau.fi/whatsmeow/proto/waE2E"
	"go.mau.fi/whatsmeow/proto/waServerSync"
	"go.mau.fi/whatsmeow/proto/waSyncAction"
	wastore "go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	waLog "go.mau.fi/whatsmeow/util/log"
	"google.golang.org/protobuf/proto"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// onBoth runs a test with the keys in each kind of database.
func onBoth(t *testing.T, test func(t *testing.T, w *environment)) {
	for kind, url := range map[string]func(t *testing.T) string{
		"PostgreSQL": func(t *testing.T) string { return testenv.Postgres(t) },
		"SQLite":     func(t *testing.T) string { return filepath.Join(t.TempDir(), "keys.db") },
	} {
		t.Run(kind, func(t *testing.T) { test(t, newEnvironmentOn(t, url(t))) })
	}
}

// db is a direct connection to the environment's database.
func (w *environment) db() *sql.DB {
	w.t.Helper()
	driver := "sqlite"
	if strings.HasPrefix(w.url, "postgres") {
		driver = "pgx"
	}
	db, err := sql.Open(driver, w.url)
	w.g.Expect(err).NotTo(HaveOccurred())
	w.t.Cleanup(func() { _ = db.Close() })
	return db
}

// ratchets are the keys that a message moves, as they are stored.
func ratchets(w *environment, db *sql.DB) map[string]string {
	w.t.Helper()
	found := map[string]string{}
	for table, query := range map[string]string{
		"session":  "SELECT their_id, session FROM whatsmeow_sessions",
		"prekey":   "SELECT CAST(key_id AS TEXT), key FROM whatsmeow_pre_keys",
		"identity": "SELECT their_id, identity FROM whatsmeow_identity_keys",
		"event":    "SELECT our_jid, ciphertext_hash FROM whatsmeow_event_buffer",
	} {
		func() {
			rows, err := db.QueryContext(w.t.Context(), query)
			w.g.Expect(err).NotTo(HaveOccurred())
			defer func() { _ = rows.Close() }()
			for rows.Next() {
				var name string
				var value []byte
				w.g.Expect(rows.Scan(&name, &value)).To(Succeed())
				found[table+" "+name] = string(value)
			}
			w.g.Expect(rows.Err()).NotTo(HaveOccurred())
		}()
	}
	return found
}

func (w *environment) send(text string) {
	w.t.Helper()
	_, err := w.simulator.Send(w.t.Context(), phone, "", text)
	w.g.Expect(err).NotTo(HaveOccurred())
}

// fixedClock has a fixed time and running timers, for a connection that must not end because
// it is silent.
type fixedClock struct {
	clock.RealClock
	at time.Time
}

func (c fixedClock) Now() time.Time { return c.at }

// valve is a proxy between a connection and the server. After close it keeps what the server
// sends, like the buffers of a process that was stopped.
type valve struct {
	listener net.Listener
	wg       sync.WaitGroup

	mu             sync.Mutex
	client, server net.Conn
	shut           bool
	held           []byte
}

func newValve(t testing.TB, endpoint string) *valve {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	v := &valve{listener: listener}
	v.wg.Add(1)
	go v.serve(strings.TrimPrefix(endpoint, "ws://"))
	t.Cleanup(func() {
		_ = listener.Close()
		v.mu.Lock()
		if v.client != nil {
			_, _ = v.client.Close(), v.server.Close()
		}
		v.mu.Unlock()
		v.wg.Wait()
	})
	return v
}

// endpoint is the address of the valve, for a factory.
func (v *valve) endpoint() string { return "ws://" + v.listener.Addr().String() }

// serve carries the one connection.
func (v *valve) serve(address string) {
	defer v.wg.Done()
	client, err := v.listener.Accept()
	if err != nil {
		return
	}
	server, err := net.Dial("tcp", address)
	if err != nil {
		_ = client.Close()
		return
	}
	v.mu.Lock()
	v.client, v.server = client, server
	v.mu.Unlock()
	v.wg.Add(1)
	go func() {
		defer v.wg.Done()
		_, _ = io.Copy(server, client)
		_, _ = client.Close(), server.Close()
	}()
	buffer := make([]byte, 4096)
	for {
		n, err := server.Read(buffer)
		v.mu.Lock()
		if v.shut {
			v.held = append(v.held, buffer[:n]...)
		} else if n > 0 {
			_, _ = client.Write(buffer[:n])
		}
		v.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// close shuts it.
func (v *valve) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.shut = true
}

// waiting is the number of bytes that it keeps.
func (v *valve) waiting() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.held)
}

// pass forwards the first n bytes that it keeps, and no more.
func (v *valve) pass(n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, _ = v.client.Write(v.held[:n])
	v.held = v.held[n:]
}

// stopped is a connection of a process that stops just after a message has arrived. wake
// continues the process with that message only.
func (w *environment) stopped(taking *store.Taking, text string) (s *testSession, wake func()) {
	w.t.Helper()
	v := newValve(w.t, w.simulator.Endpoint())
	factory, err := Setup(Config{Endpoint: v.endpoint(), NoiseRoot: root(w.simulator)}, logr.Discard())
	w.g.Expect(err).NotTo(HaveOccurred())
	factory.clock = fixedClock{at: time.Now()}
	own := w.factory
	w.factory = factory
	s = w.connect(taking)
	w.factory = own
	s.event(EventConnected)
	w.settled()
	// When this message has arrived, everything that follows a login has arrived as well.
	w.send("hello")
	w.g.Eventually(s.texts).Should(Equal([]string{"hello"}))
	w.settled()
	v.close()
	w.send(text)
	// The answer to the receipt of the first message may come before the second one. It has
	// some 60 bytes, and a message has more than 300.
	w.g.Eventually(v.waiting).Should(BeNumerically(">", 200))
	n := v.waiting()
	return s, func() { v.pass(n) }
}

// An owner that was declared dead wakes up with a message after its successor has logged in,
// while its own connection still works: it moves no key and acknowledges nothing, and the
// successor gets the message.
func TestADeadOwnerWakesUpWithAMessage(t *testing.T) {
	onBoth(t, func(_ *testing.T, w *environment) {
		taking := w.take()
		w.pair(taking, phone)
		db := w.db()
		old, wake := w.stopped(taking, "for the successor")

		successor := w.take()
		refusing := w.connect(successor, func(o *Options) {
			o.Accept = func(context.Context, delivery.MessageItem) error { return errors.New("not yet") }
		})
		refusing.event(EventConnected)
		w.g.Eventually(func() bool { return errors.Is(context.Cause(refusing.ctx), errRefused) }).Should(BeTrue(), "the successor has decrypted it")
		before := ratchets(w, db)
		w.g.Expect(before).NotTo(BeEmpty())

		wake()
		w.g.Expect(old.event(EventDisconnected).Reason).To(Equal("StoreFailed"))
		w.g.Expect(old.texts()).To(Equal([]string{"hello"}))
		w.g.Expect(ratchets(w, db)).To(Equal(before))
		w.g.Expect(w.simulator.Stats().Unacknowledged).To(Equal(1))
		w.g.Expect(w.simulator.Stats().Retries).To(BeZero())
		refusing.Close()

		s := w.connect(successor)
		w.g.Eventually(s.texts).Should(Equal([]string{"for the successor"}))
		w.settled()
		w.g.Expect(w.simulator.Stats().Retries).To(BeZero())
		w.g.Expect(w.simulator.Stats().Doubled).To(BeZero(), "the stopped process did not answer")
	})
}

// The session is deleted while its holder is cut off: a message that the holder gets
// afterwards writes no key.
func TestADeletionWhileTheHolderIsCutOff(t *testing.T) {
	for name, remove := range map[string]func(w *environment) error{
		"by the manager": func(w *environment) error { return w.store.DeleteSession(w.t.Context(), "u") },
		"by a successor": func(w *environment) error { return w.take().Forget(w.t.Context()) },
		"as an orphan":   orphanAndPurge,
		"and claimed anew": func(w *environment) error {
			if err := w.store.DeleteSession(w.t.Context(), "u"); err != nil {
				return err
			}
			_, err := w.store.Claim(w.t.Context(), store.Claimant{SessionID: "shop", Namespace: "a", UID: "another"}, nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, w *environment) {
				taking := w.take()
				w.pair(taking, phone)
				old, wake := w.stopped(taking, "too late")
				w.g.Expect(remove(w)).To(Succeed())
				wake()
				w.g.Expect(old.event(EventDisconnected).Reason).To(Equal("StoreFailed"))
				w.g.Expect(old.texts()).To(Equal([]string{"hello"}))
				w.g.Expect(ratchets(w, w.db())).To(BeEmpty())
				w.g.Expect(w.simulator.Stats().Unacknowledged).To(Equal(1), "nothing is acknowledged without keys")
				w.g.Expect(w.store.Records(t.Context())).NotTo(ContainElement(HaveField("JID", Not(BeEmpty()))))
				w.g.Expect(w.store.Marked(t.Context())).To(BeEmpty())
			})
		})
	}
}

func orphanAndPurge(w *environment) error {
	if _, err := w.store.MarkOrphan(w.t.Context(), "u"); err != nil {
		return err
	}
	_, err := w.store.Purge(w.t.Context(), "shop", func(store.Record) bool { return false })
	return err
}

// PostgreSQL fails in the middle of a message. Wherever the client is at that moment, the
// message comes again at the next login and is acknowledged once.
func TestPostgreSQLFailsInTheMiddleOfAMessage(t *testing.T) {
	server := testenv.PostgresServer(t)
	restarted := func(*sql.Tx) error { server.Restart(); return nil }
	killed := func(*sql.Tx) error { server.Kill(); server.Restart(); return nil }
	cutOff := func(tx *sql.Tx) error { // only those that wait: without the lock they would go on
		_, err := tx.Exec("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname=current_database() AND wait_event_type='Lock'")
		return err
	}
	for name, row := range map[string]struct {
		// table is the table that the message waits for at the failure.
		table string
		end   func(locker *sql.Tx) error
	}{
		"restarted, before the LIDs are read": {table: "whatsmeow_lid_map", end: restarted},
		"cut off, before the LIDs are read":   {table: "whatsmeow_lid_map", end: cutOff},
		"killed, before the ratchet is read":  {table: "whatsmeow_sessions", end: killed},
		"cut off, before the ratchet is read": {table: "whatsmeow_sessions", end: cutOff},
		"restarted, with the ratchet moved":   {table: "whatsmeow_event_buffer", end: restarted},
		"cut off, before the fence":           {table: "whatsapp_operator_session", end: cutOff},
	} {
		t.Run(name, func(t *testing.T) {
			w := newEnvironmentOn(t, fresh(t, server))
			taking := w.take()
			w.pair(taking, phone)
			s := w.connect(taking)
			s.event(EventConnected)
			w.settled()

			// Every access to the table waits until the server has ended.
			db := w.db()
			tx, err := db.BeginTx(context.Background(), nil)
			w.g.Expect(err).NotTo(HaveOccurred())
			_, err = tx.ExecContext(t.Context(), "LOCK TABLE "+row.table+" IN ACCESS EXCLUSIVE MODE")
			w.g.Expect(err).NotTo(HaveOccurred())
			w.send("hello")
			w.g.Eventually(func() (n int, err error) {
				err = tx.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM pg_locks WHERE NOT granted AND relation=$1::regclass", row.table).Scan(&n)
				return n, err
			}).ShouldNot(BeZero())
			w.g.Expect(row.end(tx)).To(Succeed())
			_ = tx.Rollback() // its connection may be gone

			w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("StoreFailed"))
			w.g.Expect(s.texts()).To(BeEmpty())
			w.g.Expect(w.simulator.Stats().Unacknowledged).To(Equal(1))
			w.g.Expect(w.simulator.Stats().Retries).To(BeZero())
			s.Close()

			w.g.Eventually(func() error { return w.store.Ping(t.Context()) }).Should(Succeed())
			next := w.connect(taking)
			w.g.Eventually(next.texts).Should(Equal([]string{"hello"}))
			w.settled()
			w.g.Expect(w.simulator.Stats().Redelivered).To(BeEquivalentTo(1))
			w.g.Expect(w.simulator.Stats().Retries).To(BeZero())
			w.send("and on")
			w.g.Eventually(next.texts).Should(Equal([]string{"hello", "and on"}))
			w.settled()
		})
	}
}

// fresh makes an empty database in the test's own server.
func fresh(t *testing.T, server *testenv.PostgresProcess) string {
	t.Helper()
	g := NewWithT(t)
	db, err := sql.Open("pgx", server.URL())
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(db.Close()).To(Succeed()) }()
	name := "test_" + strings.ToLower(rand.Text())
	_, err = db.ExecContext(t.Context(), "CREATE DATABASE "+name)
	g.Expect(err).NotTo(HaveOccurred())
	return strings.Replace(server.URL(), "/postgres?", "/"+name+"?", 1)
}

// A send while the store refuses is an error, and nothing is sent: whatsmeow would skip the
// recipient and report success.
func TestASendWhileTheStoreRefuses(t *testing.T) {
	for name, refuse := range map[string]func(w *environment, db *sql.DB){
		"the session was taken": func(w *environment, _ *sql.DB) { w.take() },
		"the keys cannot be read": func(w *environment, db *sql.DB) {
			_, err := db.ExecContext(w.t.Context(), "ALTER TABLE whatsmeow_sessions RENAME COLUMN session TO gone")
			w.g.Expect(err).NotTo(HaveOccurred())
		},
		"the identities cannot be read": func(w *environment, db *sql.DB) {
			_, err := db.ExecContext(w.t.Context(), "ALTER TABLE whatsmeow_identity_keys RENAME COLUMN identity TO gone")
			w.g.Expect(err).NotTo(HaveOccurred())
		},
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(_ *testing.T, w *environment) {
				taking := w.take()
				w.pair(taking, phone)
				s := w.connect(taking)
				s.event(EventConnected)
				to := types.NewJID(simulator.DefaultContact, types.DefaultUserServer)
				send := func(text string) error {
					_, err := s.client.SendMessage(s.ctx, to, &waE2E.Message{Conversation: proto.String(text)})
					return err
				}
				w.g.Expect(send("one")).To(Succeed())
				w.g.Eventually(func() ([]simulator.Message, error) { return w.simulator.Received(phone) }).Should(HaveExactElements(HaveField("Text", "one")))

				refuse(w, w.db())
				w.g.Expect(send("two")).NotTo(Succeed())
				w.g.Expect(s.event(EventDisconnected).Reason).To(Equal("StoreFailed"))
				w.g.Expect(send("three")).NotTo(Succeed())
				w.g.Expect(w.simulator.Received(phone)).To(HaveLen(1))
			})
		})
	}
}

// TestTextThatPostgreSQLRefuses: text of a stranger, or of another device of the account, in
// names and addresses ends no connection.
func TestTextThatPostgreSQLRefuses(t *testing.T) {
	onBoth(t, func(t *testing.T, w *environment) {
		const bad, clean = "Ann\x00\xff", "Ann\uFFFD\uFFFD"
		w.hostile = true
		taking := w.take()
		w.pair(taking, phone)
		s := w.connect(taking)
		s.event(EventConnected)
		db := w.db()
		contact := func(column, jid string) func() (name sql.NullString, err error) {
			return func() (name sql.NullString, err error) {
				err = db.QueryRow("SELECT "+column+" FROM whatsmeow_contacts WHERE their_jid=$1", jid).Scan(&name)
				return name, err
			}
		}
		named := func(name string) sql.NullString { return sql.NullString{String: name, Valid: true} }

		// A message of a stranger.
		stranger := types.NewJID("15557654321", types.DefaultUserServer)
		w.g.Expect(w.simulator.Play(phone, encode(element("message",
			attrs{"from": stranger, "id": "1", "t": "1700000000", "type": "text", "notify": bad}, element("unavailable", nil))))).To(Succeed())
		w.g.Eventually(contact("push_name", stranger.String())).Should(Equal(named(clean)))

		// The settings that the phone keeps for its devices: they are encrypted, so they are
		// read only inside the client.
		other := types.NewJID("1555\x00", types.DefaultUserServer)
		key := wastore.AppStateSyncKey{Data: []byte("0123456789abcdef0123456789abcdef")}
		settings := settingsPatch(w, key, appstate.PatchInfo{Type: appstate.WAPatchCriticalUnblockLow, Mutations: slices.Concat(
			[]appstate.MutationInfo{{
				Index: []string{appstate.IndexContact, other.String()}, Version: 2,
				Value: &waSyncAction.SyncActionValue{ContactAction: &waSyncAction.ContactAction{FirstName: proto.String("Ann\x00"), FullName: proto.String("Ann\x00")}},
			}},
			appstate.BuildMute(other, true, time.Hour).Mutations,
			appstate.BuildArchive(other, true, time.Time{}, nil).Mutations, // pins it too
			appstate.BuildSettingPushName("Shop\x00").Mutations)})
		w.simulator.AnswerWith(func(question *waBinary.Node) *waBinary.Node {
			collection, ok := question.GetOptionalChildByTag("sync", "collection")
			if !ok || collection.Attrs["name"] != string(appstate.WAPatchCriticalUnblockLow) {
				return nil
			}
			return &settings
		})
		_, err := w.simulator.SendMessage(t.Context(), phone, phone, &waE2E.Message{ProtocolMessage: &waE2E.ProtocolMessage{
			Type: waE2E.ProtocolMessage_APP_STATE_SYNC_KEY_SHARE.Enum(),
			AppStateSyncKeyShare: &waE2E.AppStateSyncKeyShare{Keys: []*waE2E.AppStateSyncKey{{
				KeyID: &waE2E.AppStateSyncKeyId{KeyID: settingsKey}, KeyData: &waE2E.AppStateSyncKeyData{KeyData: key.Data},
			}}},
		}})
		w.g.Expect(err).NotTo(HaveOccurred())
		w.g.Eventually(contact("first_name", "1555\uFFFD@s.whatsapp.net")).Should(Equal(named("Ann\uFFFD")))
		w.g.Eventually(func() (name string, err error) {
			err = db.QueryRow("SELECT push_name FROM whatsmeow_device").Scan(&name)
			return name, err
		}).Should(Equal("Shop\uFFFD"))

		w.send("after")
		w.g.Eventually(s.texts).Should(ContainElement("after"))
		w.settled()
		w.g.Expect(slices.ContainsFunc(s.events(), Event.Over)).To(BeFalse(), "the connection goes on")
	})
}

var settingsKey = []byte{1, 2, 3, 4, 5, 6}

// settingsStore has the keys that an encoder of settings reads.
type settingsStore struct {
	wastore.AppStateStore
	wastore.AppStateSyncKeyStore
	key wastore.AppStateSyncKey
}

func (s settingsStore) GetAppStateSyncKey(context.Context, []byte) (*wastore.AppStateSyncKey, error) {
	return &s.key, nil
}

func (settingsStore) GetAppStateMutationMAC(context.Context, string, []byte) ([]byte, error) {
	return nil, nil
}

// settingsPatch is a server's answer with the first change of the phone's settings.
func settingsPatch(w *environment, key wastore.AppStateSyncKey, info appstate.PatchInfo) waBinary.Node {
	w.t.Helper()
	kept := settingsStore{key: key}
	encoded, err := appstate.NewProcessor(&wastore.Device{AppStateKeys: kept, AppState: kept}, waLog.Noop).
		EncodePatch(w.t.Context(), settingsKey, appstate.HashState{}, info)
	w.g.Expect(err).NotTo(HaveOccurred())
	var patch waServerSync.SyncdPatch
	w.g.Expect(proto.Unmarshal(encoded, &patch)).To(Succeed())
	patch.Version = &waServerSync.SyncdVersion{Version: proto.Uint64(1)}
	encoded, err = proto.Marshal(&patch)
	w.g.Expect(err).NotTo(HaveOccurred())
	return element("iq", attrs{"type": "result", "from": types.ServerJID}, element("sync", nil,
		element("collection", attrs{"name": string(info.Type), "version": "1"}, element("patches", nil, leaf("patch", encoded)))))
}

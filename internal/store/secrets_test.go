package store

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

var (
	annsPhone = types.JID{User: "4915112345678", Server: types.DefaultUserServer}
	annsLID   = types.JID{User: "77", Server: types.HiddenUserServer}
	aGroup    = types.JID{User: "120363", Server: types.GroupServer}
)

// The secret of a message is found by either address of its chat and of its sender, however
// the message came.
func TestMessageSecrets(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, failures := paired(t, s, "id", jidOf("4915100000001"))
		_, other, _ := paired(t, s, "other", jidOf("4915100000002"))
		g.Expect(d.LIDs.PutLIDMapping(ctx, annsLID, annsPhone)).To(Succeed())
		get := func(d *store.Device, chat, sender types.JID, id string) (string, types.JID) {
			secret, realSender, err := d.MsgSecrets.GetMessageSecret(ctx, chat, sender, id)
			g.Expect(err).NotTo(HaveOccurred())
			return string(secret), realSender
		}
		withDevice := func(jid types.JID) types.JID { jid.Device = 5; return jid }
		g.Expect(d.MsgSecrets.PutMessageSecret(ctx, annsPhone, withDevice(annsPhone), "direct", []byte("s1"))).To(Succeed())
		g.Expect(d.MsgSecrets.PutMessageSecrets(ctx, []store.MessageSecretInsert{
			{Chat: aGroup, Sender: annsLID, ID: "group", Secret: []byte("s2")},
			{Chat: aGroup, Sender: annsLID, ID: "", Secret: []byte("no id")},
			{Chat: aGroup, ID: "nobody", Secret: []byte("no sender")},
			{Chat: aGroup, Sender: annsLID, ID: "group", Secret: []byte("the first one stays")},
		})).To(Succeed())
		for _, chat := range []types.JID{annsPhone, annsLID} {
			for _, sender := range []types.JID{annsPhone, annsLID, withDevice(annsLID)} {
				secret, from := get(d, chat, sender, "direct")
				g.Expect(secret).To(Equal("s1"))
				g.Expect(from).To(Equal(annsPhone), "it is decrypted with the address that the sender used")
			}
		}
		secret, from := get(d, aGroup, annsPhone, "group")
		g.Expect(secret).To(Equal("s2"))
		g.Expect(from).To(Equal(annsLID))

		for _, none := range [][3]any{{annsPhone, annsPhone, "another"}, {aGroup, annsPhone, "direct"}, {annsPhone, aGroup, "direct"}} {
			secret, from = get(d, none[0].(types.JID), none[1].(types.JID), none[2].(string))
			g.Expect(secret).To(BeEmpty())
			g.Expect(from.IsEmpty()).To(BeTrue())
		}
		secret, _ = get(other, annsPhone, annsPhone, "direct")
		g.Expect(secret).To(BeEmpty(), "a secret belongs to the device")
		g.Expect(failures.all()).To(BeEmpty())

		// Thousands at once, as from the history.
		many := make([]store.MessageSecretInsert, 2*slice+3)
		for i := range many {
			many[i] = store.MessageSecretInsert{Chat: aGroup, Sender: annsLID, ID: fmt.Sprint(i), Secret: []byte("many")}
		}
		g.Expect(d.MsgSecrets.PutMessageSecrets(ctx, many)).To(Succeed())
		secret, _ = get(d, aGroup, annsLID, fmt.Sprint(len(many)-1))
		g.Expect(secret).To(Equal("many"))
	})
}

// The janitor deletes the secrets of messages after 90 days. What an older release has stored
// is found before and after the janitor has given it a time, and is deleted 90 days after that.
func TestOldMessageSecretsAreDeleted(t *testing.T) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			clk := clocktesting.NewFakeClock(start)
			s, err := Open(ctx, Config{URL: make(t), Clock: clk}, logr.Discard())
			g.Expect(err).NotTo(HaveOccurred())
			t.Cleanup(func() { g.Expect(s.Close()).To(Succeed()) })
			g.Expect(s.Migrate(ctx)).To(Succeed())
			_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
			_, empty, _ := paired(t, s, "without", jidOf("4915100000002"))
			g.Expect(empty.ID).NotTo(BeNil())
			const older = slice + 3
			for i := range older { // as an older release does
				g.Expect(s.exec(ctx, "INSERT INTO whatsmeow_message_secrets (our_jid, chat_jid, sender_jid, message_id, key) VALUES ($1, $2, $2, $3, $4)",
					d.ID, annsPhone, fmt.Sprint("older", i), []byte("older"))).To(Succeed())
			}
			g.Expect(d.MsgSecrets.PutMessageSecret(ctx, annsPhone, annsPhone, "older0", []byte("again"))).To(Succeed())
			g.Expect(d.MsgSecrets.PutMessageSecret(ctx, annsPhone, annsPhone, "first", []byte("first"))).To(Succeed())
			count := func(table string) (n int) {
				g.Expect(s.db.QueryRow(ctx, "SELECT COUNT(*) FROM "+table).Scan(&n)).To(Succeed())
				return n
			}
			has := func(id string) string {
				secret, _, err := d.MsgSecrets.GetMessageSecret(ctx, annsPhone, annsPhone, id)
				g.Expect(err).NotTo(HaveOccurred())
				return string(secret)
			}
			g.Expect(has("older7")).To(Equal("older"))

			clk.Step(time.Hour)
			g.Expect(s.Clean(ctx)).To(Succeed())
			g.Expect(count("whatsmeow_message_secrets")).To(BeZero())
			g.Expect(count("whatsapp_operator_message_secret")).To(Equal(older + 1))
			g.Expect(has("older7")).To(Equal("older"))
			g.Expect(has("older0")).To(Equal("again"), "the one that is there stays")

			clk.Step(keepSecrets - time.Hour)
			g.Expect(s.Clean(ctx)).To(Succeed())
			g.Expect(has("first")).To(Equal("first"), "90 days are not over")
			clk.Step(time.Millisecond)
			g.Expect(s.Clean(ctx)).To(Succeed())
			g.Expect(has("first")).To(BeEmpty())
			g.Expect(has("older7")).To(Equal("older"), "it has its time since the first run")
			clk.Step(time.Hour)
			g.Expect(s.Clean(ctx)).To(Succeed())
			g.Expect(count("whatsapp_operator_message_secret")).To(BeZero())
		})
	}
}

// Devices are marked and deleted while the janitor moves their secrets: a secret stays
// with its device.
func TestSecretsMoveWhileDevicesAreMarked(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	s := open(t, testenv.Postgres(t))
	g.Expect(s.Migrate(ctx)).To(Succeed())
	const secrets = 4 * slice
	var devices []*store.Device
	for i := range 4 {
		_, d, _ := paired(t, s, fmt.Sprint("s", i), jidOf(fmt.Sprint("491510000000", i)))
		g.Expect(s.exec(ctx, `INSERT INTO whatsmeow_message_secrets (our_jid, chat_jid, sender_jid, message_id, key)
			SELECT $1, 'chat', 'sender', n, 'secret' FROM generate_series(1, $2::int) n`, d.ID, secrets)).To(Succeed())
		devices = append(devices, d)
	}
	var wg sync.WaitGroup
	failed := make(chan error, 16)
	wg.Go(func() { failed <- s.Clean(ctx) })
	wg.Go(func() { failed <- devices[1].Delete(ctx) }) // marked
	wg.Go(func() { failed <- devices[3].Delete(ctx) })
	wg.Go(func() { failed <- s.DeleteSession(ctx, "uid-s2") })
	wg.Wait()
	for range 4 {
		g.Expect(<-failed).To(Succeed())
	}
	g.Expect(s.Clean(ctx)).To(Succeed())
	counts, err := s.strings(ctx, "SELECT COUNT(*)::text FROM whatsapp_operator_message_secret GROUP BY our_jid")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(counts).To(Equal([]string{fmt.Sprint(secrets), fmt.Sprint(secrets), fmt.Sprint(secrets)}))
}

// A process that marks a device locks the device first and then its secrets. The janitor waits for the
// device before it locks a secret, so neither is ended as a deadlock.
func TestTheJanitorLocksTheDeviceFirst(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	url := testenv.Postgres(t)
	s := open(t, url)
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
	g.Expect(s.exec(ctx, "INSERT INTO whatsmeow_message_secrets (our_jid, chat_jid, sender_jid, message_id, key) VALUES ($1, 'chat', 'sender', 'id', 'secret')", d.ID)).To(Succeed())
	tx, err := open(t, url).db.RawDB.BeginTx(ctx, nil)
	g.Expect(err).NotTo(HaveOccurred())
	_, err = tx.ExecContext(ctx, "SELECT jid FROM whatsmeow_device FOR UPDATE")
	g.Expect(err).NotTo(HaveOccurred())
	cleaned := make(chan error, 1)
	go func() { cleaned <- s.Clean(ctx) }()
	g.Eventually(func() (n int, err error) {
		err = tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM pg_locks WHERE NOT granted").Scan(&n)
		return n, err
	}, "10s").Should(Equal(1), "the janitor waits for the device")
	_, err = tx.ExecContext(ctx, "UPDATE whatsmeow_message_secrets SET key='another secret'")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(tx.Commit()).To(Succeed())
	g.Eventually(cleaned, "10s").Should(Receive(Succeed()))
	g.Expect(s.strings(ctx, "SELECT convert_from(secret, 'UTF8') FROM whatsapp_operator_message_secret")).To(Equal([]string{"another secret"}))
}

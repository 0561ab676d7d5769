package store

import (
	"context"
	"testing"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// formerWhatsmeow is the version of whatsmeow's tables in the release before this one.
const formerWhatsmeow = 11

// downgradeWhatsmeow undoes whatsmeow's upgrades 12 to 15 (its store/sqlstore/upgrades).
var downgradeWhatsmeow = []string{
	"DROP INDEX idx_whatsmeow_privacy_tokens_our_jid_timestamp",
	"ALTER TABLE whatsmeow_privacy_tokens DROP COLUMN sender_timestamp",
	"DROP TABLE whatsmeow_retry_buffer",
	"DROP TABLE whatsmeow_nct_salt",
	"ALTER TABLE whatsmeow_device DROP COLUMN companion_meta_nonce",
	"UPDATE whatsmeow_version SET version=11, compat=8",
}

func (s *Store) downgradeWhatsmeow(ctx context.Context) error {
	return s.transaction(ctx, func(ctx context.Context) error {
		for _, statement := range downgradeWhatsmeow {
			if _, err := s.db.Exec(ctx, statement); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestMigrationFromTheFormerRelease(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
		fill(t, d)
		g.Expect(s.downgradeWhatsmeow(ctx)).To(Succeed())

		next := open(t, url)
		g.Expect(next.SchemaReady(ctx)).To(BeFalse(), "a worker waits for the leader")
		g.Expect(next.Migrate(ctx)).To(Succeed())
		g.Expect(next.SchemaReady(ctx)).To(BeTrue())
		taking, err := next.Take(ctx, "uid-id", 2)
		g.Expect(err).NotTo(HaveOccurred())
		f := &failures{}
		read, err := taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(read.NoiseKey.Priv).To(Equal(d.NoiseKey.Priv))
		g.Expect(read.Sessions.GetSession(ctx, "other:1")).To(Equal([]byte("session")))
		g.Expect(read.NCTSalt.PutNCTSalt(ctx, []byte("salt"))).To(Succeed())
		g.Expect(read.EventBuffer.AddOutgoingEvent(ctx, *read.ID, "id", "wa", []byte("text"))).To(Succeed())
		g.Expect(read.Save(ctx)).To(Succeed())
		g.Expect(rows(t, next, "4915100000001%")).To(HaveLen(len(tables)))
		_, fresh, _ := paired(t, next, "fresh", jidOf("4915100000002"))
		fill(t, fresh)
		g.Expect(f.all()).To(BeEmpty())
	})
}

// After a roll-back the former release uses the tables of this one. This works as long as
// they are compatible with the version that it knows. If this test fails for a new version
// of whatsmeow, docs/operate.md has to say so.
func TestARollBack(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		read := func() (version, compat int) {
			g.Expect(s.db.QueryRow(ctx, "SELECT version, compat FROM whatsmeow_version").Scan(&version, &compat)).To(Succeed())
			return version, compat
		}
		version, compat := read()
		g.Expect(version).To(Equal(len(whatsmeowSchema)))
		g.Expect(compat).To(BeNumerically("<=", formerWhatsmeow), "whatsmeow's tables can be used by the former release")

		former := open(t, url)
		former.db.UpgradeTable = whatsmeowSchema[:formerWhatsmeow]
		g.Expect(former.Migrate(ctx)).To(Succeed())
		g.Expect(former.WaitForSchema(ctx)).To(Succeed())
		again, _ := read()
		g.Expect(again).To(Equal(version), "the former release changes nothing")

		// Tables that are not compatible are refused before anything is written.
		g.Expect(s.exec(ctx, "UPDATE whatsmeow_version SET compat=$1", formerWhatsmeow+1)).To(Succeed())
		g.Expect(former.Migrate(ctx)).To(And(MatchError(ErrSchemaTooNew), MatchError(ContainSubstring("upgrade this process"))))
		g.Expect(former.WaitForSchema(ctx)).To(MatchError(ErrSchemaTooNew))
		again, _ = read()
		g.Expect(again).To(Equal(version))
	})
}

// BenchmarkMigration migrates whatsmeow's tables of 10,000 devices with a million privacy
// tokens from the former release, on PostgreSQL:
//
//	go test ./internal/store -run '^$' -bench Migration -benchtime 5x
func BenchmarkMigration(b *testing.B) {
	ctx := b.Context()
	s, err := Open(ctx, Config{URL: testenv.Postgres(b)}, logr.Discard())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if err := s.Migrate(ctx); err != nil {
		b.Fatal(err)
	}
	for _, statement := range []string{
		`INSERT INTO whatsmeow_device (jid, lid, registration_id, noise_key, identity_key, signed_pre_key, signed_pre_key_id, signed_pre_key_sig,
			adv_key, adv_details, adv_account_sig, adv_account_sig_key, adv_device_sig, platform, push_name)
		SELECT (4915100000000 + i) || ':3@s.whatsapp.net', (95100000000 + i) || ':3@lid', i, k, k, k, 1, k || k, k, k, k || k, k, k || k, 'android', 'Shop ' || i
		FROM generate_series(1, 10000) AS i, (SELECT decode(repeat('ab', 32), 'hex') AS k) AS key`,
		`INSERT INTO whatsapp_operator_session (session_id, namespace, uid, jid, created_at, updated_at)
		SELECT 'shop-' || i, 'a', 'uid-' || i, (4915100000000 + i) || ':3@s.whatsapp.net', 0, 0 FROM generate_series(1, 10000) AS i`,
		`INSERT INTO whatsmeow_privacy_tokens (our_jid, their_jid, token, timestamp)
		SELECT (4915100000000 + i) || ':3@s.whatsapp.net', (85100000000 + j) || '@lid', decode(repeat('cd', 16), 'hex'), 1700000000 + j
		FROM generate_series(1, 10000) AS i, generate_series(1, 100) AS j`,
		"ANALYZE",
	} {
		if _, err := s.db.Exec(ctx, statement); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		b.StopTimer()
		if err := s.downgradeWhatsmeow(ctx); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := s.Migrate(ctx); err != nil {
			b.Fatal(err)
		}
	}
}

// A backup that is being restored has its tables before their contents: a migration would be in
// its way. One that is restored must be migrated if an older release has made it.
func TestABackupIsRestored(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		for _, table := range []string{"whatsmeow_version", "whatsapp_operator_version"} {
			g := NewWithT(t)
			ctx := t.Context()
			g.Expect(s.SchemaBehind(ctx)).To(BeFalse(), table)
			g.Expect(s.exec(ctx, "UPDATE "+table+" SET version=version-1")).To(Succeed())
			g.Expect(s.SchemaBehind(ctx)).To(BeTrue(), table)
			g.Expect(s.exec(ctx, "UPDATE "+table+" SET version=version+1")).To(Succeed())
			g.Expect(s.SchemaReady(ctx)).To(BeTrue(), table)

			g.Expect(s.exec(ctx, "CREATE TABLE kept AS SELECT * FROM "+table)).To(Succeed())
			g.Expect(s.exec(ctx, "DELETE FROM "+table)).To(Succeed())
			g.Expect(s.SchemaReady(ctx)).To(BeFalse(), table)
			g.Expect(s.SchemaBehind(ctx)).To(BeFalse(), table)
			g.Expect(s.exec(ctx, "INSERT INTO "+table+" SELECT * FROM kept")).To(Succeed())
			g.Expect(s.exec(ctx, "DROP TABLE kept")).To(Succeed())
		}
	})
}

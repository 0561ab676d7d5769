package store

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-logr/logr"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// bench is a linked device in two ways: with the fence, and with whatsmeow's stores over
// the same database.
type bench struct {
	*Store
	fenced store.AllStores
	bare   store.AllStores
}

// bareStores are whatsmeow's stores.
type bareStores struct {
	store.AllSessionSpecificStores
	store.LIDStore
}

func onBothBench(b *testing.B, run func(b *testing.B, s bench)) {
	for kind, url := range map[string]func(b *testing.B) string{
		"PostgreSQL": func(b *testing.B) string { return testenv.Postgres(b) },
		"SQLite":     func(b *testing.B) string { return filepath.Join(b.TempDir(), "keys.db") },
	} {
		b.Run(kind, func(b *testing.B) {
			s, err := Open(b.Context(), Config{URL: url(b)}, logr.Discard())
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			if err := s.Migrate(b.Context()); err != nil {
				b.Fatal(err)
			}
			if _, err := s.Claim(b.Context(), Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never); err != nil {
				b.Fatal(err)
			}
			taking, err := s.Take(b.Context(), "u", 1)
			if err != nil {
				b.Fatal(err)
			}
			d, err := taking.Open(b.Context(), func(err error) { b.Error(err) })
			if err != nil {
				b.Fatal(err)
			}
			link(d, jidOf("4915100000001"))
			if err := d.Save(b.Context()); err != nil {
				b.Fatal(err)
			}
			own, err := s.container.GetDevice(b.Context(), *d.ID)
			if err != nil {
				b.Fatal(err)
			}
			run(b, bench{
				Store: s, fenced: d.Container.(*device),
				bare: bareStores{own.Identities.(store.AllSessionSpecificStores), own.LIDs},
			})
		})
	}
}

// ways are the two ways that are compared.
func (s bench) ways(b *testing.B, run func(b *testing.B, s store.AllStores)) {
	for _, way := range []struct {
		name   string
		stores store.AllStores
	}{{"bare", s.bare}, {"fenced", s.fenced}} {
		b.Run(way.name, func(b *testing.B) { run(b, way.stores) })
	}
}

// BenchmarkFenceOfOneWrite is a single write: with the fence it needs a transaction and a
// read of the record.
func BenchmarkFenceOfOneWrite(b *testing.B) {
	onBothBench(b, func(b *testing.B, s bench) {
		session := make([]byte, 2000) // what libsignal makes of one
		s.ways(b, func(b *testing.B, d store.AllStores) {
			for b.Loop() {
				if err := d.PutSession(b.Context(), "other:1", session); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

// message does to the store what whatsmeow does for a text from a contact
// (message.go: decryptMessages, bufferedDecrypt), but for the cryptography.
func message(ctx context.Context, d store.AllStores, hash [32]byte, session []byte) error {
	contact := types.JID{User: "4915112345678", Server: types.DefaultUserServer}
	lid := types.JID{User: "77", Server: types.HiddenUserServer}
	if err := d.PutLIDMapping(ctx, lid, contact); err != nil {
		return err
	}
	if err := d.MigratePNToLID(ctx, contact, lid); err != nil {
		return err
	}
	if _, err := d.GetBufferedEvent(ctx, hash); err != nil {
		return err
	}
	err := d.DoDecryptionTxn(ctx, func(ctx context.Context) error {
		if _, err := d.GetSession(ctx, "77_1:0"); err != nil {
			return err
		}
		if _, err := d.IsTrustedIdentity(ctx, "77_1:0", [32]byte{1}); err != nil {
			return err
		}
		if err := d.PutIdentity(ctx, "77_1:0", [32]byte{1}); err != nil {
			return err
		}
		if err := d.PutSession(ctx, "77_1:0", session); err != nil {
			return err
		}
		return d.PutBufferedEvent(ctx, hash, []byte("a text as long as most are"), start)
	})
	if err != nil {
		return err
	}
	if _, _, err := d.PutPushName(ctx, contact, "Ann"); err != nil {
		return err
	}
	return d.ClearBufferedEventPlaintext(ctx, hash)
}

// BenchmarkFenceOfAMessage is everything that the store does for one message.
func BenchmarkFenceOfAMessage(b *testing.B) {
	onBothBench(b, func(b *testing.B, s bench) {
		session := []byte(strings.Repeat("s", 2000))
		var hash [32]byte
		n := 0
		s.ways(b, func(b *testing.B, d store.AllStores) {
			for b.Loop() {
				n++
				hash[0], hash[1], hash[2], hash[3] = byte(n), byte(n>>8), byte(n>>16), byte(n>>24)
				if err := message(b.Context(), d, hash, session); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/store"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Names are saved, messages decrypted and the session taken, all at the same time:
// there is no deadlock (PostgreSQL would end one of them with an error after a
// second), and only the fence refuses anything.
func TestManyWritersOfOneSession(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		ctx := t.Context()
		taking, _, _ := paired(t, s, "id", jidOf("4915100000001"))
		successor := open(t, url)
		var wg sync.WaitGroup
		run := func(f func(i int) error) {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for i := range 20 {
					if err := f(i); err != nil && !errors.Is(err, ErrFenced) {
						t.Error(err)
						return
					}
				}
			}()
		}
		for n := range 4 {
			f := &failures{}
			d, err := taking.Open(ctx, f.add)
			if err != nil {
				t.Fatal(err)
			}
			run(func(i int) error {
				d.PushName = fmt.Sprint("name ", n, i)
				return d.Save(ctx)
			})
			run(func(i int) error {
				return d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
					return d.Sessions.PutSession(ctx, fmt.Sprint("a", n), []byte{byte(i)})
				})
			})
		}
		run(func(i int) error {
			if i < 18 { // late, so that most of the writes are the owner's
				return s.Ping(ctx)
			}
			_, err := successor.Take(ctx, "uid-id", int64(i))
			return err
		})
		wg.Wait()
	})
}

// WhatsApp moves a number to another session while the first session still writes.
func TestANumberMovesWhileItsSessionWrites(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		other := open(t, url)
		jid := jidOf("4915100000001")
		for round := range 5 {
			_, old, f := paired(t, s, fmt.Sprint("old", round), jid)
			var wg sync.WaitGroup
			writing := make(chan struct{}, 1)
			for n := range 4 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for i := 0; ; i++ {
						err := old.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
							select {
							case writing <- struct{}{}:
							default:
							}
							return errors.Join(
								old.Sessions.PutSession(ctx, fmt.Sprint("a", n), []byte{byte(i)}),
								old.Identities.PutIdentity(ctx, fmt.Sprint("new", n, i), [32]byte{}),
							)
						})
						if err != nil {
							if !errors.Is(err, ErrFenced) {
								t.Error(err)
							}
							return
						}
					}
				}()
			}
			<-writing
			_, fresh, failed := paired(t, other, fmt.Sprint("new", round), jid)
			wg.Wait()
			g.Expect(f.all()).To(HaveExactElements(MatchError(ErrFenced)))
			g.Expect(failed.all()).To(BeEmpty())
			g.Expect(fresh.Sessions.PutSession(ctx, "x", []byte("mine"))).To(Succeed())
		}
	})
}

// One worker's clock is a year behind, another's a year ahead.
func TestClocksDoNotMatter(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, _ *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		var last *store.Device
		var f *failures
		for epoch, years := range []int{-1, 1, -2, 2} {
			other := open(t, url)
			other.clock.(*clocktesting.FakeClock).SetTime(start.AddDate(years, 0, 0))
			if epoch == 0 {
				_, last, f = paired(t, other, "id", jidOf("4915100000001"))
				continue
			}
			taking, err := other.Take(ctx, "uid-id", int64(epoch+1))
			g.Expect(err).NotTo(HaveOccurred())
			next := &failures{}
			d, err := taking.Open(ctx, next.add)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(d.Sessions.PutSession(ctx, "a", []byte{byte(epoch)})).To(Succeed())
			g.Expect(last.Sessions.PutSession(ctx, "a", []byte("late"))).To(MatchError(ErrFenced))
			g.Expect(f.all()).To(HaveLen(1))
			last, f = d, next
		}
		g.Expect(last.Sessions.GetSession(ctx, "a")).To(Equal([]byte{3}))
	})
}

// There can be two leaders, because a former leader may not know yet that it lost the
// leadership: the second waits for the first and then finds nothing to do, and the workers
// wait for both.
func TestLeadersMigrateOneAfterTheOther(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	url := testenv.Postgres(t)
	first, second, worker := open(t, url), open(t, url), open(t, url)
	waiting := waitForSchema(ctx, worker)
	inside, proceed, done := make(chan struct{}), make(chan struct{}), make(chan error, 2)
	go func() {
		done <- first.transaction(ctx, func(ctx context.Context) error {
			if err := first.Migrate(ctx); err != nil {
				return err
			}
			close(inside)
			<-proceed
			return nil
		})
	}()
	<-inside
	go func() { done <- second.Migrate(ctx) }()
	g.Eventually(func() (n int, err error) {
		err = worker.db.QueryRow(ctx, "SELECT COUNT(*) FROM pg_locks WHERE locktype='advisory' AND NOT granted").Scan(&n)
		return n, err
	}, "10s").Should(Equal(1), "the second waits for the lock")
	worker.clock.(*clocktesting.FakeClock).Step(schemaInterval)
	g.Consistently(waiting, "100ms").ShouldNot(Receive(), "nothing can be seen before everything is written")
	g.Expect(done).NotTo(Receive())
	close(proceed)
	g.Eventually(done, "30s").Should(Receive(BeNil()))
	g.Eventually(done, "30s").Should(Receive(BeNil()))
	g.Eventually(func() bool {
		worker.clock.(*clocktesting.FakeClock).Step(schemaInterval)
		select {
		case err := <-waiting:
			g.Expect(err).NotTo(HaveOccurred())
			return true
		default:
			return false
		}
	}, "10s").Should(BeTrue())
	var versions int
	g.Expect(worker.db.QueryRow(ctx, "SELECT COUNT(*) FROM whatsapp_operator_version").Scan(&versions)).To(Succeed())
	g.Expect(versions).To(Equal(1))
}

// For a full event buffer the janitor needs one index scan for each slice.
func TestTheEventBufferIsCleanedByItsIndex(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	s := open(t, testenv.Postgres(t))
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
	const events = 20_000
	g.Expect(s.exec(ctx, `INSERT INTO whatsmeow_event_buffer (our_jid, ciphertext_hash, plaintext, server_timestamp, insert_timestamp)
		SELECT $1, sha256(n::text::bytea), NULL, 0, n FROM generate_series(1, $2::int) n`, d.ID, events)).To(Succeed())
	_, err := s.db.RawDB.ExecContext(ctx, "ANALYZE whatsmeow_event_buffer")
	g.Expect(err).NotTo(HaveOccurred())
	plan, err := s.strings(ctx, "EXPLAIN "+strings.ReplaceAll(s.deleteSlice("whatsmeow_event_buffer", "insert_timestamp"), "$1", fmt.Sprint(events/2)))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(strings.Join(plan, "\n")).To(And(
		MatchRegexp(`Index (Only )?Scan using whatsapp_operator_event_buffer_time`), Not(ContainSubstring("Seq Scan"))))
	n, err := s.CleanEventBuffer(ctx, time.UnixMilli(events/2+1))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(n).To(BeEquivalentTo(events / 2))
}

// A client clears a message's plaintext, or a device is marked, while the janitor deletes: it
// leaves out the rows that are locked, and its next run deletes them.
func TestTheJanitorWaitsForNoRow(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	url := testenv.Postgres(t)
	s := open(t, url)
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
	const rows = 2*slice + 3
	tx, err := open(t, url).db.RawDB.BeginTx(ctx, nil)
	g.Expect(err).NotTo(HaveOccurred())
	for _, table := range []struct {
		insert, update string
		clean          func(context.Context, time.Time) (int64, error)
	}{
		{`INSERT INTO whatsmeow_event_buffer (our_jid, ciphertext_hash, plaintext, server_timestamp, insert_timestamp)
			SELECT $1, sha256(n::text::bytea), NULL, 0, n FROM generate_series(1, $2::int) n`,
			"UPDATE whatsmeow_event_buffer SET plaintext=NULL WHERE insert_timestamp=1", s.CleanEventBuffer},
		{`INSERT INTO whatsapp_operator_message_secret (our_jid, chat_jid, sender_jid, message_id, secret, stored_at)
			SELECT $1, 'chat', 'sender', n, 'secret', n FROM generate_series(1, $2::int) n`,
			"UPDATE whatsapp_operator_message_secret SET our_jid=our_jid WHERE stored_at=1", s.CleanSecrets},
	} {
		g.Expect(s.exec(ctx, table.insert, d.ID, rows)).To(Succeed())
		_, err = tx.ExecContext(ctx, table.update)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(table.clean(ctx, time.UnixMilli(rows+1))).To(BeEquivalentTo(rows - 1))
	}
	g.Expect(tx.Commit()).To(Succeed())
	g.Expect(s.CleanEventBuffer(ctx, time.UnixMilli(rows+1))).To(BeEquivalentTo(1))
	g.Expect(s.CleanSecrets(ctx, time.UnixMilli(rows+1))).To(BeEquivalentTo(1))
}

// A worker that is stopped, or whose node is lost, between a taking's statement
// and its commit holds the record's lock and cannot release it.
func TestAStoppedTakingDelaysItsSuccessorForSecondsOnly(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	url := testenv.Postgres(t)
	s, stopped := open(t, url), open(t, url)
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
	g.Expect(err).NotTo(HaveOccurred())
	tx, err := stopped.db.RawDB.BeginTx(ctx, nil)
	g.Expect(err).NotTo(HaveOccurred())
	_, err = tx.ExecContext(ctx, "UPDATE whatsapp_operator_session SET epoch=1, starts=starts+1 WHERE uid='u'")
	g.Expect(err).NotTo(HaveOccurred())

	taking, err := s.Take(ctx, "u", 2)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(taking.Starts()).To(BeEquivalentTo(1), "the other's never was")
	g.Expect(tx.Commit()).NotTo(Succeed())
}

// One-time keys are read and made between two statements. A goroutine that waits for a
// processor has no open transaction, because PostgreSQL would end an idle one.
func TestOneTimeKeysWaitForAProcessorWithoutATransaction(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		_, d, failed := paired(t, s, "id", jidOf("4915100000001"))
		for range cap(s.prekeys) {
			s.prekeys <- struct{}{}
		}
		g.Eventually(func() int { return s.db.RawDB.Stats().InUse }).Should(BeZero())

		ctx, cancel := context.WithCancel(t.Context())
		made := make(chan error, 1)
		go func() {
			_, err := d.PreKeys.GetOrGenPreKeys(ctx, 812)
			made <- err
		}()
		g.Consistently(func() int { return s.db.RawDB.Stats().InUse + len(made) }, "100ms").Should(BeZero())
		cancel()
		g.Eventually(made).Should(Receive(MatchError(context.Canceled)))
		g.Expect(failed.all()).To(BeEmpty(), "nothing was lost")

		<-s.prekeys
		first, err := d.PreKeys.GetOrGenPreKeys(t.Context(), 812)
		g.Expect(err).NotTo(HaveOccurred())
		again, err := d.PreKeys.GetOrGenPreKeys(t.Context(), 812)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(again).To(HaveLen(812))
		g.Expect(again[811].KeyID).To(Equal(first[811].KeyID), "those that were not uploaded are used again")
		for range cap(s.prekeys) - 1 {
			<-s.prekeys
		}
	})
}

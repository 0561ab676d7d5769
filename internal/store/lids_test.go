package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	. "github.com/onsi/gomega"
	"go.mau.fi/whatsmeow/store"
	"go.mau.fi/whatsmeow/types"
	clocktesting "k8s.io/utils/clock/testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

func pnOf(user string) types.JID {
	return types.JID{User: user, Device: 4, Server: types.DefaultUserServer}
}

func lidOf(user string) types.JID {
	return types.JID{User: user, Device: 4, Server: types.HiddenUserServer}
}

func mapping(lid, pn string) store.LIDMapping {
	return store.LIDMapping{LID: lidOf(lid), PN: pnOf(pn)}
}

func TestLIDs(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, f := paired(t, s, "id", jidOf("4915100000001"))
		l := d.LIDs
		g.Expect(l.GetLIDForPN(ctx, pnOf("1"))).To(Equal(types.EmptyJID))
		g.Expect(l.GetPNForLID(ctx, lidOf("91"))).To(Equal(types.EmptyJID))

		g.Expect(l.PutManyLIDMappings(ctx, []store.LIDMapping{
			mapping("90", "1"), mapping("91", "1"), mapping("92", "2"), mapping("\x00", "3"),
			{LID: pnOf("4"), PN: pnOf("5")}, {LID: lidOf("6"), PN: lidOf("7")},
		})).To(Succeed())
		g.Expect(l.GetLIDForPN(ctx, pnOf("1"))).To(Equal(lidOf("91")), "the last one counts, and an unknown number is known at once")
		g.Expect(l.GetPNForLID(ctx, lidOf("91"))).To(Equal(pnOf("1")))
		g.Expect(l.GetPNForLID(ctx, lidOf("90"))).To(Equal(types.EmptyJID))
		for _, warm := range []bool{false, true} {
			got, err := l.GetManyLIDsForPNs(ctx, []types.JID{pnOf("1"), pnOf("2"), pnOf("3"), pnOf("\x00"), lidOf("2"), {User: "2", Device: 9, Server: types.DefaultUserServer}})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(got).To(Equal(map[types.JID]types.JID{
				pnOf("1"): lidOf("91"), pnOf("2"): lidOf("92"),
				{User: "2", Device: 9, Server: types.DefaultUserServer}: {User: "92", Device: 9, Server: types.HiddenUserServer},
			}), "warm: %v", warm)
			s.lids.forget()
		}

		// A number that passes to another account, and an account that gets another number.
		g.Expect(l.PutLIDMapping(ctx, lidOf("93"), pnOf("1"))).To(Succeed())
		g.Expect(l.GetLIDForPN(ctx, pnOf("1"))).To(Equal(lidOf("93")))
		g.Expect(l.GetPNForLID(ctx, lidOf("91"))).To(Equal(types.EmptyJID))
		g.Expect(l.PutLIDMapping(ctx, lidOf("93"), pnOf("2"))).To(Succeed())
		g.Expect(l.GetPNForLID(ctx, lidOf("93"))).To(Equal(pnOf("2")))
		g.Expect(l.GetLIDForPN(ctx, pnOf("1"))).To(Equal(types.EmptyJID))
		g.Expect(l.GetPNForLID(ctx, lidOf("92"))).To(Equal(types.EmptyJID))
		g.Expect(f.all()).To(BeEmpty())
	})
}

// forget empties the cache, as a restart does.
func (l *lids) forget() { l.known.RemoveAll(func(any) bool { return true }) }

func TestLIDsThatAnotherProcessChanges(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		clock := s.clock.(*clocktesting.FakeClock)
		_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
		other := open(t, url)
		_, theirs, _ := paired(t, other, "other", jidOf("4915100000002"))

		g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("1"))).To(Equal(types.EmptyJID))
		g.Expect(theirs.LIDs.PutLIDMapping(ctx, lidOf("91"), pnOf("1"))).To(Succeed())
		clock.Step(lidUnknown + time.Millisecond)
		g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("1"))).To(Equal(lidOf("91")), "the absence of a mapping is cached only for a while")

		g.Expect(theirs.LIDs.PutLIDMapping(ctx, lidOf("92"), pnOf("1"))).To(Succeed())
		clock.Step(lidKnown + time.Millisecond)
		g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("1"))).To(Equal(lidOf("92")), "and so is a mapping")
	})
}

// A session learns a contact's LID on another worker, which moves the contact's keys. Then
// the session moves to this worker, whose cache is older.
func TestLIDsThatASessionHasLearnedElsewhere(t *testing.T) {
	for name, before := range map[string]string{"the contact had no LID": "", "the contact had another LID": "90"} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, url string, here *Store) {
				g := NewWithT(t)
				ctx := t.Context()
				_, neighbour, failed := paired(t, here, "neighbour", jidOf("4915100000002"))
				if before != "" {
					g.Expect(neighbour.LIDs.PutLIDMapping(ctx, lidOf(before), pnOf("1"))).To(Succeed())
				}
				remembered := func(d *store.Device) string {
					lid, err := d.LIDs.GetLIDForPN(ctx, pnOf("1"))
					g.Expect(err).NotTo(HaveOccurred())
					return lid.User
				}
				g.Expect(remembered(neighbour)).To(Equal(before))
				for _, lid := range []string{"90", "91"} {
					g.Expect(neighbour.LIDs.GetPNForLID(ctx, lidOf(lid))).To(Equal(addressed(map[string]string{before: "1"}[lid], 4, types.DefaultUserServer)))
				}

				there := open(t, url)
				_, d, f := paired(t, there, "id", jidOf("4915100000001"))
				pn, lid := types.JID{User: "1", Server: types.DefaultUserServer}, types.JID{User: "91", Server: types.HiddenUserServer}
				g.Expect(d.Sessions.PutSession(ctx, pn.SignalAddress().String(), []byte("session"))).To(Succeed())
				g.Expect(d.LIDs.PutLIDMapping(ctx, lid, pn)).To(Succeed())
				g.Expect(d.Sessions.MigratePNToLID(ctx, pn, lid)).To(Succeed())
				g.Expect(remembered(neighbour)).To(Equal(before), "no key of a session that stayed here depends on it")

				taking, err := here.Take(ctx, "uid-id", 2)
				g.Expect(err).NotTo(HaveOccurred())
				d, err = taking.Open(ctx, f.add)
				g.Expect(err).NotTo(HaveOccurred())
				found, err := d.LIDs.GetLIDForPN(ctx, pn)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(found).To(Equal(lid))
				g.Expect(d.LIDs.GetPNForLID(ctx, lid)).To(Equal(pn))
				g.Expect(d.LIDs.GetPNForLID(ctx, lidOf("90"))).To(Equal(types.EmptyJID))
				g.Expect(d.Sessions.GetSession(ctx, found.SignalAddress().String())).To(Equal([]byte("session")), "the message is decrypted")
				g.Expect(remembered(neighbour)).To(Equal("91"), "the cache is shared")
				g.Expect(append(f.all(), failed.all()...)).To(BeEmpty())
			})
		})
	}
}

func TestLIDsInATransaction(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, f := paired(t, s, "id", jidOf("4915100000001"))
		g.Expect(d.LIDs.PutLIDMapping(ctx, lidOf("91"), pnOf("1"))).To(Succeed())
		inside := func(end error) error {
			return d.EventBuffer.DoDecryptionTxn(ctx, func(ctx context.Context) error {
				if err := d.LIDs.PutManyLIDMappings(ctx, []store.LIDMapping{mapping("92", "1"), mapping("93", "3")}); err != nil {
					return err
				}
				got, err := d.LIDs.GetManyLIDsForPNs(ctx, []types.JID{pnOf("1"), pnOf("3")})
				g.Expect(got).To(Equal(map[types.JID]types.JID{pnOf("1"): lidOf("92"), pnOf("3"): lidOf("93")}), "it sees its own changes")
				return errors.Join(err, end)
			})
		}
		g.Expect(inside(errors.New("a bad message"))).To(MatchError("a bad message"))
		g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("1"))).To(Equal(lidOf("91")), "nothing of it is remembered")
		g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("3"))).To(Equal(types.EmptyJID))
		g.Expect(inside(nil)).To(Succeed())
		g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("1"))).To(Equal(lidOf("92")))
		g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("3"))).To(Equal(lidOf("93")))
		g.Expect(f.all()).To(BeEmpty())
	})
}

func TestLIDsAreBounded(t *testing.T) {
	g := NewWithT(t)
	s := open(t, kinds["SQLite"](t))
	g.Expect(s.Migrate(t.Context())).To(Succeed())
	pns := make([]types.JID, lidEntries+1000)
	for i := range pns {
		pns[i] = pnOf(fmt.Sprint(i))
	}
	got, err := s.lids.lidsOf(t.Context(), 0, pns)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(got).To(BeEmpty())
	g.Expect(s.lids.known.Keys()).To(HaveLen(lidEntries))
	g.Expect(s.container.LIDMap.GetLIDForPN(t.Context(), pns[0])).To(BeZero(), "whatsmeow's own has not been asked")
}

// A slow query of one session must not stop the other sessions.
func TestLIDsHoldNoLockOverAQuery(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	url := testenv.Postgres(t)
	s := open(t, url)
	g.Expect(s.Migrate(ctx)).To(Succeed())
	_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
	g.Expect(d.LIDs.PutLIDMapping(ctx, lidOf("91"), pnOf("1"))).To(Succeed())
	g.Expect(d.LIDs.GetLIDForPN(ctx, pnOf("1"))).To(Equal(lidOf("91")))

	tx, err := open(t, url).db.RawDB.BeginTx(ctx, nil)
	g.Expect(err).NotTo(HaveOccurred())
	_, err = tx.ExecContext(ctx, "LOCK TABLE whatsmeow_lid_map IN ACCESS EXCLUSIVE MODE")
	g.Expect(err).NotTo(HaveOccurred())
	answers := make(chan types.JID)
	var wg sync.WaitGroup
	ask := func(pn types.JID) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			lid, err := d.LIDs.GetLIDForPN(ctx, pn)
			if err != nil {
				t.Error(err)
			}
			answers <- lid
		}()
	}
	ask(pnOf("2"))
	g.Eventually(func() (n int, err error) {
		err = tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM pg_locks WHERE NOT granted").Scan(&n)
		return n, err
	}).Should(Equal(1), "the query waits at the database")
	ask(pnOf("1"))
	g.Eventually(answers).Should(Receive(Equal(lidOf("91"))))
	g.Expect(tx.Rollback()).To(Succeed())
	g.Eventually(answers).Should(Receive(Equal(types.EmptyJID)))
	wg.Wait()
}

// Every session that shares the cache finds a stored mapping at once, whatever was queried
// meanwhile, and no two writers wait for each other.
func TestLIDsOfManySessionsAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		ctx := t.Context()
		var wg sync.WaitGroup
		for i, process := range []*Store{s, open(t, url)} {
			for j := range 3 {
				_, d, f := paired(t, process, fmt.Sprint(i, j), jidOf(fmt.Sprint("491510000", i, j)))
				random := rand.New(rand.NewPCG(uint64(i), uint64(j)))
				wg.Add(1)
				go func() {
					defer wg.Done()
					for k := range 30 {
						var mappings []store.LIDMapping
						for n := range 40 { // contradicting each other, in any order
							mappings = append(mappings, mapping(fmt.Sprint(9, (n+k)%40), fmt.Sprint(n)))
						}
						random.Shuffle(len(mappings), func(a, b int) { mappings[a], mappings[b] = mappings[b], mappings[a] })
						own := fmt.Sprint("own", i, j, k)
						_, errBefore := d.LIDs.GetLIDForPN(ctx, pnOf(own))
						err := d.LIDs.PutManyLIDMappings(ctx, append(mappings, mapping("9"+own, own)))
						found, errAfter := d.LIDs.GetLIDForPN(ctx, pnOf(own))
						if err := errors.Join(append(f.all(), errBefore, err, errAfter)...); err != nil {
							t.Error(err)
							return
						}
						if found.User != "9"+own {
							t.Errorf("%s is stored, found %q", own, found.User)
						}
					}
				}()
			}
		}
		wg.Wait()
	})
}

func TestConflictingWritesOfLIDs(t *testing.T) {
	deadlock := fmt.Errorf("storing: %w", &pgconn.PgError{Code: "40P01"})
	for name, row := range map[string]struct {
		errs  []error
		tries int
		fails bool
	}{
		"once":                         {errs: []error{deadlock, nil}, tries: 2},
		"always":                       {errs: []error{deadlock, deadlock, deadlock, deadlock, deadlock, nil}, tries: lidAttempts, fails: true},
		"a database that is gone":      {errs: []error{errors.New("gone"), nil}, tries: 1, fails: true},
		"nothing goes wrong":           {errs: []error{nil}, tries: 1},
		"a fence that refuses is none": {errs: []error{ErrFenced, nil}, tries: 1, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			s := open(t, kinds["SQLite"](t))
			g.Expect(s.Migrate(t.Context())).To(Succeed())
			tries := 0
			err := s.lids.put(t.Context(), 0, []store.LIDMapping{mapping("91", "1")}, func(context.Context, func(context.Context) error) error {
				tries++
				return row.errs[tries-1]
			})
			g.Expect(err != nil).To(Equal(row.fails))
			g.Expect(tries).To(Equal(row.tries))
		})
	}
}

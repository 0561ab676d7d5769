package store

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func TestIDsThatDifferOnlyByCaseAreOne(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		paired(t, s, "Shop-I", jidOf("4915100000001")) // I: its lower case depends on the language
		for _, id := range []string{"Shop-I", "shop-i", "SHOP-I", "shop-I"} {
			r, err := s.RecordByID(ctx, id)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(r.SessionID).To(Equal("Shop-I"))
			_, err = s.Claim(ctx, Claimant{SessionID: id, Namespace: "b", UID: "u2"}, always)
			g.Expect(err).To(MatchError(ErrTaken))
			_, err = s.Claim(ctx, Claimant{SessionID: id, Namespace: "a", UID: "u2"}, never)
			g.Expect(err).To(MatchError(ErrTaken))
		}
		_, err := s.RecordByID(ctx, "shop_i")
		g.Expect(err).To(MatchError(ErrNoRecord))

		// A session that is applied again in the namespace gets the keys, whatever the case of its id.
		_, err = s.Retain(ctx, "uid-Shop-I")
		g.Expect(err).NotTo(HaveOccurred())
		r, err := s.Claim(ctx, Claimant{SessionID: "shop-i", Namespace: "a", UID: "u3"}, always)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).NotTo(BeEmpty())
		g.Expect(r.UID).To(Equal("u3"))

		_, err = s.MarkOrphan(ctx, "u3")
		g.Expect(err).NotTo(HaveOccurred())
		_, err = s.Purge(ctx, "SHOP-i", unused)
		g.Expect(err).NotTo(HaveOccurred())
		_, err = s.RecordByID(ctx, "Shop-I")
		g.Expect(err).To(MatchError(ErrNoRecord))
	})
}

func TestClaimsAtOnceOfIDsThatDifferOnlyByCase(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		other := open(t, url)
		for round := range 20 {
			ids := [2]string{fmt.Sprint("id-", round), fmt.Sprint("ID-", round)}
			var errs [2]error
			var both sync.WaitGroup
			for i, process := range []*Store{s, other} {
				both.Go(func() {
					_, errs[i] = process.Claim(t.Context(), Claimant{SessionID: ids[i], Namespace: fmt.Sprint("ns", i), UID: fmt.Sprint("u", round, "-", i)}, never)
				})
			}
			both.Wait()
			g.Expect(errs).To(ConsistOf(BeNil(), MatchError(ErrTaken)))
		}
	})
}

// migrateTo makes the tables of an earlier release.
func (s *Store) migrateTo(t *testing.T, version int) {
	t.Helper()
	s.own = s.db.Child("whatsapp_operator_version", schema[:version], nil)
	if err := s.transaction(t.Context(), func(ctx context.Context) error {
		if err := s.container.Upgrade(ctx); err != nil {
			return err
		}
		return s.own.Upgrade(ctx)
	}); err != nil {
		t.Fatal(err)
	}
}

// In a store of an earlier release, ids that differ only by case were different ids.
func TestMigrationOfIDsThatDifferOnlyByCase(t *testing.T) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			url := make(t)
			before := open(t, url)
			before.migrateTo(t, 3)
			for _, row := range []struct {
				id, namespace, uid string
				created, epoch     int64
				orphaned           any
			}{
				{"Foo", "a", "u1", 200, 7, nil},
				{"foo", "b", "u2", 100, 8, nil}, // the oldest
				{"FOO", "c", "u3", 300, 9, nil},
				{"Bar", "a", "u4", 100, 5, 1000}, // older, but nobody's
				{"bar", "b", "u5", 200, 6, nil},
				{"baz", "a", "u6", 100, 1 << 62, nil},
			} {
				g.Expect(before.exec(ctx, `INSERT INTO whatsapp_operator_session (session_id, namespace, uid, created_at, updated_at, epoch, orphaned_at)
					VALUES ($1, $2, $3, $4, $4, $5, $6)`, row.id, row.namespace, row.uid, row.created, row.epoch, row.orphaned)).To(Succeed())
			}

			var lines []string
			s := open(t, url)
			s.log = funcr.New(func(_, args string) { lines = append(lines, args) }, funcr.Options{})
			g.Expect(s.Migrate(ctx)).To(Succeed())
			g.Expect(lines).To(HaveLen(3))
			g.Expect(strings.Join(lines, "\n")).To(And(ContainSubstring(`"sessionID"="Foo"`), ContainSubstring(`"sessionID"="FOO"`), ContainSubstring(`"sessionID"="Bar"`)))

			for id, uid := range map[string]string{"FOO": "u2", "Foo": "u2", "foo": "u2", "BAR": "u5"} {
				r, err := s.RecordByID(ctx, id)
				g.Expect(err).NotTo(HaveOccurred())
				g.Expect(r.UID).To(Equal(uid), id)
			}
			_, err := s.Take(ctx, "u1", 100)
			g.Expect(err).To(MatchError(ErrTaken))
			_, err = s.Claim(ctx, Claimant{SessionID: "Foo", Namespace: "a", UID: "u1"}, always)
			g.Expect(err).To(MatchError(ErrTaken))
			_, err = s.Take(ctx, "u2", 100)
			g.Expect(err).NotTo(HaveOccurred())

			// When the first one is gone, the others hold their ids and keys again.
			g.Expect(s.DeleteSession(ctx, "u2")).To(Succeed())
			_, err = s.Claim(ctx, Claimant{SessionID: "FOO", Namespace: "b", UID: "u7"}, always)
			g.Expect(err).To(MatchError(ErrTaken), "it is the id of another namespace")
			r, err := s.Claim(ctx, Claimant{SessionID: "Foo", Namespace: "a", UID: "u1"}, always)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(r.Duplicate).To(BeFalse())
			g.Expect(r.Epoch).To(BeEquivalentTo(7))
			_, err = s.Claim(ctx, Claimant{SessionID: "FOO", Namespace: "c", UID: "u3"}, always)
			g.Expect(err).To(MatchError(ErrTaken))

			// A duplicate without an owner is found by its exact id.
			r, err = s.Purge(ctx, "Bar", unused)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(r.UID).To(Equal("u4"))

			r, err = s.RecordByID(ctx, "baz")
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(r.Epoch).To(Equal(v1alpha1.MaxEpoch))
		})
	}
}

func TestEpochsHaveAMaximum(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, err := s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "u"}, never)
		g.Expect(err).NotTo(HaveOccurred())
		for _, epoch := range []int64{-1, v1alpha1.MaxEpoch + 1, 1<<63 - 1} {
			_, err = s.Take(ctx, "u", epoch)
			g.Expect(err).To(MatchError(ContainSubstring("the epoch is")))
		}
		first, err := s.Take(ctx, "u", v1alpha1.MaxEpoch)
		g.Expect(err).NotTo(HaveOccurred())
		second, err := s.Take(ctx, "u", v1alpha1.MaxEpoch)
		g.Expect(err).NotTo(HaveOccurred(), "there is no higher epoch: the number of starts distinguishes the takings")
		_, err = first.Open(ctx, func(error) {})
		g.Expect(err).To(HaveOccurred())
		_, err = second.Open(ctx, func(error) {})
		g.Expect(err).NotTo(HaveOccurred())
	})
}

package store

import (
	"testing"
	"time"

	. "github.com/onsi/gomega"
	clocktesting "k8s.io/utils/clock/testing"
)

func TestKeysWhoseResourceIsMissing(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
		fill(t, d)
		_, err := s.Claim(ctx, Claimant{SessionID: "empty", Namespace: "a", UID: "uid-empty"}, never)
		g.Expect(err).NotTo(HaveOccurred())
		missing := Keeping{Missing: start.Add(-time.Hour)}
		keeping := func(id string) Keeping {
			t.Helper()
			r, err := s.RecordByID(ctx, id)
			g.ExpectWithOffset(1, err).NotTo(HaveOccurred())
			return r.Keeping
		}
		g.Expect(s.Unused(ctx)).To(BeEmpty())
		_, err = s.Purge(ctx, "id", unused)
		g.Expect(err).To(MatchError(ErrInUse))
		g.Expect(s.ChangeKeeping(ctx, []KeepingChange{{UID: "uid-id", To: missing}, {UID: "uid-empty", To: missing}, {UID: "unknown", To: missing}})).To(Succeed())
		g.Expect(s.Unused(ctx)).To(HaveLen(2))

		// The session was applied again: the keys are in use, whatever an old comparison found.
		_, err = s.Claim(ctx, Claimant{SessionID: "id", Namespace: "a", UID: "uid-2"}, always)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(keeping("id")).To(BeZero())
		_, err = s.OrphanMissing(ctx, "uid-id", missing.Missing)
		g.Expect(err).To(MatchError(ErrNoRecord))
		_, err = s.OrphanMissing(ctx, "uid-2", missing.Missing)
		g.Expect(err).To(MatchError(ErrNoRecord))

		// The record was retained meanwhile: it is neither missing nor found.
		_, err = s.Retain(ctx, "uid-2")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(s.ChangeKeeping(ctx, []KeepingChange{{UID: "uid-2", To: missing}, {UID: "uid-2", From: missing}})).To(Succeed())
		g.Expect(keeping("id")).To(Equal(Keeping{Retained: start}))
		s.clock.(*clocktesting.FakeClock).Step(10 * KeepOrphans)
		g.Expect(s.Clean(ctx)).To(Succeed())
		g.Expect(keeping("id")).To(Equal(Keeping{Retained: start}), "kept until it is purged")

		g.Expect(s.ChangeKeeping(ctx, []KeepingChange{{UID: "uid-2", From: Keeping{Retained: start}, To: missing}})).To(Succeed())
		r, err := s.OrphanMissing(ctx, "uid-2", missing.Missing)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).NotTo(BeEmpty())
		g.Expect(keeping("id")).To(Equal(Keeping{Orphaned: s.clock.Now()}))
		_, err = s.OrphanMissing(ctx, "uid-empty", missing.Missing)
		g.Expect(err).NotTo(HaveOccurred())
		_, err = s.RecordByID(ctx, "empty")
		g.Expect(err).To(MatchError(ErrNoRecord), "an id without keys is free")

		g.Expect(s.ChangeKeeping(ctx, []KeepingChange{{UID: "uid-2", From: Keeping{Orphaned: s.clock.Now()}, To: Keeping{Retained: start}}})).To(Succeed())
		_, err = s.Purge(ctx, "id", func(Record) bool { return true })
		g.Expect(err).To(MatchError(ErrInUse))
		_, err = s.Purge(ctx, "id", unused)
		g.Expect(err).NotTo(HaveOccurred(), "what is retained can be purged, too")
		g.Expect(rows(t, s, "%")).To(BeEmpty())
	})
}

// Earlier releases did not record which records were retained: none of those may be
// deleted.
func TestMigrationOfRetainedKeys(t *testing.T) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			ctx := t.Context()
			url := make(t)
			before := open(t, url)
			before.migrateTo(t, 4)
			for uid, orphaned := range map[string]any{"u1": nil, "u2": int64(1000)} {
				g.Expect(before.exec(ctx, `INSERT INTO whatsapp_operator_session (session_id, namespace, uid, created_at, updated_at, orphaned_at)
					VALUES ($1, 'a', $1, 1, 2000, $2)`, uid, orphaned)).To(Succeed())
			}
			s := open(t, url)
			g.Expect(s.Migrate(ctx)).To(Succeed())
			g.Expect(s.Records(ctx)).To(ConsistOf(
				And(HaveField("UID", "u1"), HaveField("Keeping", Keeping{Retained: time.UnixMilli(2000)})),
				And(HaveField("UID", "u2"), HaveField("Keeping", Keeping{Orphaned: time.UnixMilli(1000)})),
			))
		})
	}
}

// TestARetainedRecordGoesWithItsLastKeys: its device was logged out before, so only a marked
// device was kept, for 30 days. Otherwise no other namespace could ever use the id.
func TestARetainedRecordGoesWithItsLastKeys(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		lost := func(id, phone string) {
			_, d, _ := paired(t, s, id, jidOf(phone))
			g.Expect(d.Delete(ctx)).To(Succeed())
		}
		retain := func(id string) {
			kept, err := s.Retain(ctx, "uid-"+id)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(kept).To(BeTrue())
		}
		lost("gone", "4915100000001")
		retain("gone")
		lost("used", "4915100000002") // its resource exists
		_, _, _ = paired(t, s, "kept", jidOf("4915100000003"))
		retain("kept")

		n, err := s.DeleteMarked(ctx, start.Add(time.Hour))
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(n).To(BeEquivalentTo(2))
		g.Expect(s.Records(ctx)).To(ConsistOf(HaveField("SessionID", "used"), HaveField("SessionID", "kept")))
		_, err = s.Claim(ctx, Claimant{SessionID: "gone", Namespace: "b", UID: "u"}, never)
		g.Expect(err).NotTo(HaveOccurred(), "the id is free")
	})
}

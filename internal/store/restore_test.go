package store

import (
	"context"
	"errors"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	clocktesting "k8s.io/utils/clock/testing"
)

func TestRestore(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		clock := s.clock.(*clocktesting.FakeClock)
		jid := jidOf("4915100000001")
		taking, d, _ := paired(t, s, "id", jid)
		fill(t, d)
		before := rows(t, s, jid.String())

		_, err := s.Restore(ctx, "nobody", "")
		g.Expect(err).To(MatchError(ErrNoRecord))
		_, err = s.Restore(ctx, "id", "")
		g.Expect(err).To(MatchError(ErrHasDevice))
		g.Expect(d.Delete(ctx)).To(Succeed())
		_, err = s.Restore(ctx, "id", "1:1@s.whatsapp.net")
		g.Expect(err).To(MatchError(ErrNoMark))

		marked, err := s.Marked(ctx)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(marked).To(HaveLen(1))
		marked[0].name = ""
		g.Expect(marked[0]).To(Equal(Marked{SessionID: "id", JID: jid.String(), Reason: markedLogout, At: start, Until: start.Add(KeepMarked)}))

		// The worker offers codes meanwhile: a scan at this moment must not replace the restored device.
		f := &failures{}
		offering, err := taking.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		clock.Step(time.Hour)
		r, err := s.Restore(ctx, "id", "")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(Equal(jid.String()))
		g.Expect(r.Starts).To(Equal(taking.Starts() + 1))
		g.Expect(r.Updated).To(Equal(start.Add(time.Hour)))
		g.Expect(rows(t, s, jid.String())).To(Equal(before), "every row has its name again")
		g.Expect(rows(t, s, "%@marked.%")).To(BeEmpty())
		g.Expect(s.Counts(ctx)).To(Equal(Counts{Sessions: 1, Devices: 1}))
		link(offering, jidOf("4915100000002"))
		g.Expect(offering.Save(ctx)).To(MatchError(ErrFenced))
		_, err = taking.Open(ctx, f.add)
		var behind *EpochBehindError
		g.Expect(errors.As(err, &behind)).To(BeTrue(), "the process that had taken it must take it again: %v", err)

		next, err := s.Take(ctx, "uid-id", 2)
		g.Expect(err).NotTo(HaveOccurred())
		again, err := next.Open(ctx, f.add)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(again.NoiseKey.Priv).To(Equal(d.NoiseKey.Priv))
		g.Expect(again.Sessions.GetSession(ctx, "other:1")).To(Equal([]byte("session")))
		g.Expect(again.Sessions.PutSession(ctx, "other:1", []byte("moved"))).To(Succeed())
		clock.Step(KeepMarked)
		g.Expect(s.Clean(ctx)).To(Succeed())
		g.Expect(s.Counts(ctx)).To(Equal(Counts{Sessions: 1, Devices: 1}), "the janitor leaves it alone")
	})
}

func TestRestoreOfOneOfSeveral(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		clock := s.clock.(*clocktesting.FakeClock)
		one, two := jidOf("4915100000001"), jidOf("4915100000002")
		taking, d, f := paired(t, s, "id", one)
		for _, jid := range []string{"4915100000001", "4915100000002"} {
			g.Expect(d.Delete(ctx)).To(Succeed())
			clock.Step(time.Hour)
			next, err := taking.Open(ctx, f.add)
			g.Expect(err).NotTo(HaveOccurred())
			link(next, jidOf(jid))
			g.Expect(next.Save(ctx)).To(Succeed())
			d = next
		}
		g.Expect(d.Delete(ctx)).To(Succeed()) // lost: one, one again, two
		_, err := s.Restore(ctx, "id", "")
		var ambiguous *AmbiguousError
		g.Expect(errors.As(err, &ambiguous)).To(BeTrue(), "%v", err)
		g.Expect(ambiguous.JIDs).To(Equal([]string{two.String(), one.String()}))

		r, err := s.Restore(ctx, "id", one.String())
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(Equal(one.String()))
		marked, err := s.Marked(ctx)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(marked).To(HaveExactElements(
			And(HaveField("JID", two.String()), HaveField("At", start.Add(2*time.Hour))),
			And(HaveField("JID", one.String()), HaveField("At", start)),
		), "the newest of those with one JID was taken")
	})
}

func TestRestoreOfANumberThatIsLinkedAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		jid := jidOf("4915100000001")
		_, d, _ := paired(t, s, "id", jid)
		g.Expect(d.Delete(t.Context())).To(Succeed())
		_, other, f := paired(t, s, "other", jid)
		_, err := s.Restore(t.Context(), "id", "")
		g.Expect(err).To(MatchError(ErrLinkedElsewhere))
		g.Expect(s.Counts(t.Context())).To(Equal(Counts{Sessions: 2, Devices: 1, Marked: 1}))
		g.Expect(other.Sessions.PutSession(t.Context(), "x", nil)).To(Succeed())
		g.Expect(f.all()).To(BeEmpty())
	})
}

func TestPurgeOfAnOrphan(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		_, d, _ := paired(t, s, "id", jidOf("4915100000001"))
		fill(t, d)
		_, other, _ := paired(t, s, "other", jidOf("4915100000002"))
		fill(t, other)
		g.Expect(s.Unused(ctx)).To(BeEmpty())
		_, err := s.Purge(ctx, "id", unused)
		g.Expect(err).To(MatchError(ErrInUse))
		for _, uid := range []string{"uid-other", "uid-id"} {
			_, err = s.MarkOrphan(ctx, uid)
			g.Expect(err).NotTo(HaveOccurred())
			s.clock.(*clocktesting.FakeClock).Step(time.Second)
		}
		g.Expect(s.Unused(ctx)).To(HaveExactElements(HaveField("SessionID", "id"), HaveField("SessionID", "other")))
		r, err := s.Purge(ctx, "id", unused)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(r.JID).To(Equal("4915100000001:3@s.whatsapp.net"))
		g.Expect(rows(t, s, "4915100000001%")).To(BeEmpty())
		g.Expect(rows(t, s, "4915100000002%")).To(HaveLen(len(tables)))
		_, err = s.Purge(ctx, "id", unused)
		g.Expect(err).To(MatchError(ErrNoRecord))
		g.Expect(d.Sessions.PutSession(ctx, "x", nil)).To(And(MatchError(ErrFenced), MatchError(context.Canceled)))
	})
}

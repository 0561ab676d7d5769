package store

import (
	"errors"
	"sync"
	"testing"

	. "github.com/onsi/gomega"
)

func TestInstallation(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		ctx := t.Context()
		g.Expect(s.CheckInstallation(ctx, "production")).To(MatchError(ErrOwnedByNobody))
		g.Expect(s.Installation(ctx)).To(BeEmpty(), "a read claims nothing")
		g.Expect(s.SetInstallation(ctx, "production")).To(Succeed())
		g.Expect(s.CheckInstallation(ctx, "production")).To(Succeed())
		g.Expect(s.CheckInstallation(ctx, "staging")).To(MatchError(&OwnedElsewhereError{Stored: "production", Own: "staging"}))
		g.Expect(s.SetInstallation(ctx, "production")).To(Succeed())

		staging := open(t, url)
		err := staging.SetInstallation(ctx, "staging")
		g.Expect(err).To(MatchError(ErrOwnedElsewhere))
		var elsewhere *OwnedElsewhereError
		g.Expect(errors.As(err, &elsewhere)).To(BeTrue())
		g.Expect(*elsewhere).To(Equal(OwnedElsewhereError{Stored: "production", Own: "staging"}))
		g.Expect(s.Installation(ctx)).To(Equal("production"))

		previous, err := staging.Adopt(ctx, "staging")
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(previous).To(Equal("production"))
		g.Expect(staging.SetInstallation(ctx, "staging")).To(Succeed())
		g.Expect(s.SetInstallation(ctx, "production")).To(MatchError(ErrOwnedElsewhere))
		g.Expect(s.SetInstallation(ctx, "")).NotTo(Succeed())
	})
}

// TestFormerInstallations follows a store from one installation to the next.
func TestFormerInstallations(t *testing.T) {
	for _, tt := range []struct {
		name    string
		adopted []string
		former  []string
	}{
		{name: "a new store", adopted: []string{"a"}},
		{name: "a move", adopted: []string{"a", "b"}, former: []string{"a"}},
		{name: "the same person, twice", adopted: []string{"a", "b", "b"}, former: []string{"a"}},
		{name: "there and back", adopted: []string{"a", "b", "a"}, former: []string{"b"}},
		{name: "a chain", adopted: []string{"a", "b", "c"}, former: []string{"a", "b"}},
		{name: "a chain and back to its beginning", adopted: []string{"a", "b", "c", "a"}, former: []string{"b", "c"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, _ string, s *Store) {
				g := NewWithT(t)
				previous := ""
				for _, id := range tt.adopted {
					g.Expect(s.Adopt(t.Context(), id)).To(Equal(previous))
					previous = id
				}
				g.Expect(s.CheckInstallation(t.Context(), previous)).To(Succeed())
				g.Expect(s.FormerInstallations(t.Context())).To(ConsistOf(tt.former))
			})
		})
	}
}

// TestAPersonNamesAFormerInstallation: the store does not know that installation.
func TestAPersonNamesAFormerInstallation(t *testing.T) {
	onBoth(t, func(t *testing.T, _ string, s *Store) {
		g := NewWithT(t)
		g.Expect(s.SetInstallation(t.Context(), "b")).To(Succeed())
		g.Expect(s.Adopt(t.Context(), "b", "a", "b")).To(Equal("b"))
		g.Expect(s.FormerInstallations(t.Context())).To(ConsistOf("a"), "an installation is not its own predecessor")
	})
}

// TestTwoAdoptAtOnce: one of them owns the store afterwards, and the other one is recorded as
// its former installation.
func TestTwoAdoptAtOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, url string, s *Store) {
		g := NewWithT(t)
		g.Expect(s.SetInstallation(t.Context(), "a")).To(Succeed())
		var both sync.WaitGroup
		for _, id := range []string{"b", "c"} {
			other := open(t, url)
			both.Go(func() {
				if _, err := other.Adopt(t.Context(), id); err != nil {
					t.Error(err)
				}
			})
		}
		both.Wait()
		owner, err := s.Installation(t.Context())
		g.Expect(err).NotTo(HaveOccurred())
		former, err := s.FormerInstallations(t.Context())
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(append(former, owner)).To(ConsistOf("a", "b", "c"))
	})
}

// TestAStoreWithoutTables has no owner, and a read does not make the tables.
func TestAStoreWithoutTables(t *testing.T) {
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			g := NewWithT(t)
			s := open(t, make(t))
			g.Expect(s.CheckInstallation(t.Context(), "a")).To(MatchError(ErrOwnedByNobody))
		})
	}
}

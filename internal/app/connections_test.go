package app

import (
	"strings"
	"testing"

	. "github.com/onsi/gomega"
)

func TestConnectionsToTheDatabase(t *testing.T) {
	for name, tt := range map[string]struct {
		connections
		want []string
	}{
		"enough":                     {connections{workers: 50, theirs: 400, own: 8, accepted: 416}, nil},
		"one too few":                {connections{workers: 50, theirs: 400, own: 8, accepted: 415}, []string{"50 workers and 2 managers", "416 connections", "accepts 415", "--store-max-connections", "PgBouncer"}},
		"no worker yet":              {connections{own: 8, accepted: 97}, nil},
		"SQLite, or behind a pooler": {connections{workers: 50, theirs: 400, own: 8}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			problem := tt.problem()
			g.Expect(problem == "").To(Equal(tt.want == nil), problem)
			for _, part := range tt.want {
				g.Expect(strings.Contains(problem, part)).To(BeTrue(), "%q in %q", part, problem)
			}
		})
	}
}

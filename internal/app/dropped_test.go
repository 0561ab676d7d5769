package app

import (
	"fmt"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
)

func TestWorkersThatDropMessages(t *testing.T) {
	drop := func(n int) (workers []membership.Member) {
		for i := range n {
			workers = append(workers, membership.Member{Name: fmt.Sprint("worker-", n-i), DropsMessages: true})
		}
		return append(workers, membership.Member{Name: "worker-0"})
	}
	for name, row := range map[string]struct {
		workers []membership.Member
		want    string
	}{
		"no worker":             {nil, ""},
		"none drops them":       {drop(0), ""},
		"one":                   {drop(1), "drop them: worker-1. A rollout"},
		"all that can be named": {drop(3), "drop them: worker-1, worker-2, worker-3. A rollout"},
		"more":                  {drop(5), "drop them: worker-1, worker-2, worker-3 and 2 more. A rollout"},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			problem := droppedProblem(row.workers)
			if row.want == "" {
				g.Expect(problem).To(BeEmpty())
				return
			}
			g.Expect(problem).To(And(ContainSubstring(row.want), ContainSubstring("remove their --drop-messages")))
		})
	}
}

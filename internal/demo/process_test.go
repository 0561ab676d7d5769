package demo

import (
	"os"
	"testing"
	"time"

	. "github.com/onsi/gomega"
)

func start(t *testing.T, role string) *child {
	t.Helper()
	t.Setenv(childRole, role)
	c, err := startChild("worker-1", t.TempDir(), os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { NewWithT(t).Expect(c.stop()).To(Succeed()) })
	return c
}

func TestAChildRunsUntilItIsStopped(t *testing.T) {
	g := NewWithT(t)
	c := start(t, "polite")
	g.Eventually(func() []string { return c.tail(2) }).WithTimeout(30 * time.Second).Should(Equal([]string{"line 2", "ready"}))
	g.Expect(c.ended()).To(Succeed())

	g.Expect(c.stop()).To(Succeed())
	g.Expect(c.err).NotTo(HaveOccurred(), "it ended as it was asked to")
	g.Expect(c.stop()).To(Succeed(), "a second time there is nothing to stop")
}

func TestAChildThatEndsByItselfIsNoticed(t *testing.T) {
	g := NewWithT(t)
	c := start(t, "broken")
	g.Eventually(c.ended).WithTimeout(30 * time.Second).Should(MatchError("the worker-1 ended by itself: exit status 3"))
	g.Expect(c.tail(20)).To(Equal([]string{"cannot go on"}))
}

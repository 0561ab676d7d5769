package process

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"go.uber.org/goleak"
)

// testRole tells this test binary to be a child of one of its own tests.
const testRole = "WHATSAPP_OPERATOR_PROCESS_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(testRole) {
	case "polite": // ends when it is asked to
		asked := make(chan os.Signal, 1)
		signal.Notify(asked, syscall.SIGTERM)
		fmt.Println("line 1\nline 2\nready")
		<-asked
		os.Exit(0)
	case "stubborn": // does not
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		select {}
	case "broken": // ends by itself
		fmt.Println("cannot go on")
		os.Exit(3)
	}
	goleak.VerifyTestMain(m)
}

func start(t *testing.T, role string) (p *Process, tail func() []string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	p, err = Start(Options{Name: "worker-1", Env: []string{testRole + "=" + role}, Output: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p, func() []string { return Tail(log.Name(), 2) }
}

func TestAProcessRunsUntilItIsStopped(t *testing.T) {
	g := NewWithT(t)
	p, tail := start(t, "polite")
	g.Eventually(tail).WithTimeout(30 * time.Second).Should(Equal([]string{"line 2", "ready"}))
	g.Expect(p.Running()).To(Succeed())

	g.Expect(p.Stop(30 * time.Second)).To(Succeed())
	g.Expect(p.Err()).NotTo(HaveOccurred(), "it ended as it was asked to")
	g.Expect(p.Stop(30*time.Second)).To(Succeed(), "a second time there is nothing to stop")
}

func TestAProcessThatDoesNotEndIsKilled(t *testing.T) {
	g := NewWithT(t)
	p, tail := start(t, "stubborn")
	g.Eventually(tail).WithTimeout(30 * time.Second).Should(Equal([]string{"ready"}))
	g.Expect(p.Stop(time.Millisecond)).To(MatchError(ContainSubstring("was killed")))
	g.Expect(p.Done()).To(BeClosed())
	g.Expect(p.Running()).To(MatchError(ContainSubstring("signal: killed")))
}

func TestAProcessThatEndsByItselfIsNoticed(t *testing.T) {
	g := NewWithT(t)
	p, tail := start(t, "broken")
	g.Eventually(p.Running).WithTimeout(30 * time.Second).Should(MatchError("the worker-1 ended by itself: exit status 3"))
	g.Expect(tail()).To(Equal([]string{"cannot go on"}))
}

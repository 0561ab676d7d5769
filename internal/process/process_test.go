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

// testRole makes this test binary run as a child process of one of its tests.
const testRole = "WHATSAPP_OPERATOR_PROCESS_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(testRole) {
	case "ends on SIGTERM":
		received := make(chan os.Signal, 1)
		signal.Notify(received, syscall.SIGTERM)
		fmt.Println("line 1\nline 2\nready")
		<-received
		os.Exit(0)
	case "ignores SIGTERM":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		select {}
	case "ends by itself":
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
	p, tail := start(t, "ends on SIGTERM")
	g.Eventually(tail).WithTimeout(30 * time.Second).Should(Equal([]string{"line 2", "ready"}))
	g.Expect(p.Running()).To(Succeed())

	g.Expect(p.Stop(30 * time.Second)).To(Succeed())
	g.Expect(p.Err()).NotTo(HaveOccurred(), "it ended in order")
	g.Expect(p.Stop(30*time.Second)).To(Succeed(), "a second call has nothing to stop")
}

func TestAProcessThatDoesNotEndIsKilled(t *testing.T) {
	g := NewWithT(t)
	p, tail := start(t, "ignores SIGTERM")
	g.Eventually(tail).WithTimeout(30 * time.Second).Should(Equal([]string{"ready"}))
	g.Expect(p.Stop(time.Millisecond)).To(MatchError(ContainSubstring("was killed")))
	g.Expect(p.Done()).To(BeClosed())
	g.Expect(p.Running()).To(MatchError(ContainSubstring("signal: killed")))
}

func TestAProcessThatEndsByItselfIsReported(t *testing.T) {
	g := NewWithT(t)
	p, tail := start(t, "ends by itself")
	g.Eventually(p.Running).WithTimeout(30 * time.Second).Should(MatchError("the worker-1 ended by itself: exit status 3"))
	g.Expect(tail()).To(Equal([]string{"cannot go on"}))
}

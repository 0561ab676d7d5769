package demo

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// childRole tells this test binary to be a child of one of its own tests.
const childRole = "WHATSAPP_OPERATOR_DEMO_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childRole) {
	case "polite": // ends when it is asked to
		asked := make(chan os.Signal, 1)
		signal.Notify(asked, syscall.SIGTERM)
		fmt.Println("line 1\nline 2\nready")
		<-asked
		os.Exit(0)
	case "broken": // ends by itself
		fmt.Println("cannot go on")
		os.Exit(3)
	}
	goleak.VerifyTestMain(m)
}

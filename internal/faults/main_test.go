//go:build faults

package faults

import (
	"flag"
	"os"
	"testing"
	"time"

	"github.com/go-logr/logr"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/whatsapp-operator/whatsapp-operator/internal/app"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

var (
	sessionCount     = flag.Int("sessions", 120, "how many sessions an environment has")
	environmentCount = flag.Int("environments", 2, "in how many environments the named faults run at the same time")
	onlySmoke        = flag.Bool("smoke", false, "run only the cases of the smoke test")
	walkFor          = flag.Duration("walk", time.Minute, "how long the random walk runs")
)

func TestMain(m *testing.M) {
	testenv.ProgramMain(app.Main)
	ctrllog.SetLogger(logr.Discard()) // the processes print their own logs
	os.Exit(m.Run())
}

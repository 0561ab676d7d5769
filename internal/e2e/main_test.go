//go:build e2e

package e2e

import (
	"flag"
	"os"
	"testing"

	"github.com/go-logr/logr"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
)

var (
	onlySmoke    = flag.Bool("smoke", false, "run only the parts that .ci/run waits for, with 50 sessions")
	sessionCount = flag.Int("sessions", 200, "how many sessions are connected during the upgrade and the faults")
	out          = flag.String("out", "", "file for the figures; empty: they are only logged")
	keep         = flag.Bool("keep", false, "leave the release and the stand-ins in the cluster")
	from         = flag.String("from", "", "commit or tag to upgrade from; empty: the last release that the present commit contains")
	diskOnly     = flag.Bool("use-images", false, "use the archives of an earlier run that are in dist/e2e")
)

// The variables that say which cluster is used.
const (
	// loadVariable is a command that loads the image archive whose path is appended to it.
	loadVariable = "E2E_LOAD_IMAGE"
	// valuesVariable is a file with values for the chart, for example other images of the stores.
	valuesVariable = "E2E_VALUES"
	// nodeVariable is a shell command that stops or starts a part of a node. It gets the
	// variables ACTION (stop, start), PART (kubelet, node) and NODE (the node's name).
	nodeVariable = "E2E_NODE"
	// auditVariable is the API server's audit log, with the metadata of every request by a
	// ServiceAccount.
	auditVariable = "E2E_AUDIT_LOG"
)

func TestMain(m *testing.M) {
	ctrllog.SetLogger(logr.Discard()) // the clients of this package have nothing to add
	os.Exit(m.Run())
}

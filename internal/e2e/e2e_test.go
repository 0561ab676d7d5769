//go:build e2e

package e2e

import (
	"testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// part is a part of the test. The parts run in their order, in one cluster; each prepares what
// it needs, so that it can run alone (RUN=TestE2E/Upgrade).
type part struct {
	name  string
	smoke bool
	run   func(t *testing.T, e *environment)
}

var parts = []part{
	{"Install", true, testInstall},
	{"Manifests", false, testManifests},
	{"Metrics", false, testMetrics},
	{"Codes", false, testCodes},
	{"Upgrade", true, testUpgrade},
	{"Rollback", false, testRollback},
	{"UpgradeFromRelease", false, testUpgradeFromRelease},
	{"Reinstall", false, testReinstall},
	{"Life", true, testLife},
	{"LeastPrivilege", false, testLeastPrivilege}, // of all that has happened before
}

func TestE2E(t *testing.T) {
	e := start(t)
	e.test = t
	e.seed = testenv.Seed(t)
	e.buildImages(t)
	e.packageCharts(t)
	e.results.Sessions = e.sessionCount()
	complete := true
	for _, p := range parts {
		if *onlySmoke && !p.smoke {
			continue
		}
		ran := false
		passed := t.Run(p.name, func(t *testing.T) {
			ran = true
			p.run(t, e)
		})
		complete = complete && ran
		if !passed && p.name == "Install" {
			t.Fatal("what follows needs an installation")
		}
	}
	if complete && !*onlySmoke {
		e.results.write(t, *out)
	}
}

// sessionCount is how many sessions are connected in the parts after the first.
func (e *environment) sessionCount() int {
	if *onlySmoke {
		return firstSessions
	}
	return *sessionCount
}

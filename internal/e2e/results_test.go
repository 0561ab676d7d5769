//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"testing"
)

// results are the figures of a whole run, for example bench/results/e2e.json.
type results struct {
	InstallReady  float64 `json:"install_ready_s"`
	ApplyToQR     float64 `json:"apply_to_qr_p99_s"`
	Apply500ToQR  float64 `json:"apply_500_to_qr_p99_s"`
	UpgradeLost   int     `json:"upgrade_lost"`
	UpgradeDouble int     `json:"upgrade_doubled"`
	UpgradeMoves  float64 `json:"upgrade_moves_per_session"`
	UpgradeGap    float64 `json:"upgrade_gap_p99_s"`
	RollbackLost  int     `json:"rollback_lost"`
	DrainNodeGap  float64 `json:"drain_node_gap_p99_s"`
	Denied        int     `json:"denied"`
	UnusedRules   int     `json:"unused_rules"`
	Sessions      int     `json:"sessions"`
}

// write writes the figures to a file, and to the log.
func (r results) write(t *testing.T, path string) {
	t.Helper()
	text, err := json.MarshalIndent(r, "", "  ")
	must(t, err)
	t.Logf("%s", text)
	if path != "" {
		must(t, os.WriteFile(path, append(text, '\n'), 0o600))
	}
}

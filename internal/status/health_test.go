package status_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

var write = flag.Bool("write", false, "write the statuses that hack/chart tests the health scripts with")

// TestStatusesOfTheHealthScripts: hack/chart, which cannot import this package, tests what Argo CD
// and Flux say of each of these statuses.
func TestStatusesOfTheHealthScripts(t *testing.T) {
	g := NewWithT(t)
	statuses := map[string]v1alpha1.WhatsAppSessionStatus{}
	for name, f := range map[string]status.Facts{
		"Pending":                       {Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonWaitingForPlacement},
		"Pending, no capacity":          {Phase: v1alpha1.PhasePending, Reason: v1alpha1.ReasonNoCapacity, NotPlaced: v1alpha1.ReasonNoCapacity},
		"Pairing, nobody has scanned":   {Phase: v1alpha1.PhasePairing, Reason: v1alpha1.ReasonWaitingForScan},
		"Pairing, a passkey is needed":  {Phase: v1alpha1.PhasePairing, Reason: v1alpha1.ReasonPasskeyRequired},
		"PairingExpired":                {Phase: v1alpha1.PhasePairingExpired, Reason: v1alpha1.ReasonPairingExpired},
		"Connecting":                    {Phase: v1alpha1.PhaseConnecting, Reason: v1alpha1.ReasonConnecting},
		"Connected":                     {Phase: v1alpha1.PhaseConnected, Reason: v1alpha1.ReasonConnected},
		"Disconnected":                  {Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonReconnecting},
		"Disconnected, its worker died": {Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonWorkerLost},
		"Disconnected, in quarantine":   {Phase: v1alpha1.PhaseDisconnected, Reason: v1alpha1.ReasonQuarantined, Stalled: true},
		"Suspended":                     {Phase: v1alpha1.PhaseSuspended, Reason: v1alpha1.ReasonSuspended},
		"LoggedOut":                     {Phase: v1alpha1.PhaseLoggedOut, Reason: v1alpha1.ReasonLoggedOut},
		"LoggedOut, another phone":      {Phase: v1alpha1.PhaseLoggedOut, Reason: v1alpha1.ReasonWrongPhone},
		"Banned":                        {Phase: v1alpha1.PhaseBanned, Reason: v1alpha1.ReasonBanned},
		"Outdated":                      {Phase: v1alpha1.PhaseOutdated, Reason: v1alpha1.ReasonOutdated},
		"Replaced":                      {Phase: v1alpha1.PhaseReplaced, Reason: v1alpha1.ReasonReplaced},
		"Failed":                        {Phase: v1alpha1.PhaseFailed, Reason: v1alpha1.ReasonProxySecretMissing},
		"Failed, it ends its worker":    {Phase: v1alpha1.PhaseFailed, Reason: v1alpha1.ReasonEndsItsWorker, Stalled: true},
		"Failed, another installation":  {Phase: v1alpha1.PhaseFailed, Reason: v1alpha1.ReasonOtherInstallation, Stalled: true},
		"Terminating":                   {Phase: v1alpha1.PhaseTerminating, Reason: v1alpha1.ReasonDeleting},
		"Terminating, the store waits":  {Phase: v1alpha1.PhaseTerminating, Reason: v1alpha1.ReasonDeletionWaits},
	} {
		f.Generation, f.Message = 2, "what to do"
		before := v1alpha1.WhatsAppSessionStatus{SessionID: "shop", Worker: "worker-a"}
		if f.Phase == v1alpha1.PhasePending || f.Phase == v1alpha1.PhaseSuspended {
			before.Worker = ""
		}
		statuses[name] = status.Summarize(before, f, noon)
	}
	statuses["Pending, its id is taken"] = status.ForeignID(v1alpha1.WhatsAppSessionStatus{}, 2, noon)

	content, err := json.MarshalIndent(statuses, "", "  ")
	g.Expect(err).NotTo(HaveOccurred())
	const path = "../../hack/chart/testdata/statuses.json"
	content = append(content, '\n')
	if *write {
		g.Expect(os.WriteFile(path, content, 0o600)).To(Succeed())
	}
	have, err := os.ReadFile(path)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(bytes.Equal(have, content)).To(BeTrue(), "%s is not current: run go test ./internal/status -run %s -write", path, t.Name())
}

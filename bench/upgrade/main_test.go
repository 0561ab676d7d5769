package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func TestRevision(t *testing.T) {
	t.Parallel()
	g := NewWithT(t)
	clone := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "git", append([]string{"-C", clone}, args...)...).CombinedOutput()
		g.Expect(err).NotTo(HaveOccurred(), string(out))
	}
	run("init", "--quiet")
	g.Expect(os.WriteFile(filepath.Join(clone, "a"), []byte("old"), 0o600)).To(Succeed())
	run("add", "a")
	run("-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "--message=Add a file")
	g.Expect(os.WriteFile(filepath.Join(clone, "a"), []byte("new"), 0o600)).To(Succeed())

	commit, err := resolve(t.Context(), clone, "HEAD")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(commit).To(MatchRegexp("^[0-9a-f]{40}$"))
	folder := filepath.Join(t.TempDir(), "older")
	g.Expect(extract(t.Context(), clone, commit, folder)).To(Succeed())
	g.Expect(os.ReadFile(filepath.Join(folder, "a"))).To(BeEquivalentTo("old"), "the committed file, not that of the work tree")

	for _, wrong := range []string{"0123456789012345678901234567890123456789", "v9.9.9", "--help", "HEAD:a"} {
		_, err := resolve(t.Context(), clone, wrong)
		g.Expect(err).To(MatchError(ContainSubstring("git fetch --unshallow")), wrong)
	}
	_, err = resolve(t.Context(), clone, "")
	g.Expect(err).To(MatchError(ContainSubstring("-from is not set")))
}

func TestScanNeeded(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status v1alpha1.WhatsAppSessionStatus
		want   bool
	}{
		"connected":      {v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseConnected}, false},
		"connecting":     {v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseConnecting}, false},
		"disconnected":   {v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseDisconnected}, false},
		"pairing":        {v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhasePairing}, true},
		"expired":        {v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhasePairingExpired}, true},
		"logged out":     {v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseLoggedOut}, true},
		"a QR code":      {v1alpha1.WhatsAppSessionStatus{QR: &v1alpha1.QRStatus{}}, true},
		"a pairing code": {v1alpha1.WhatsAppSessionStatus{PairingCode: "ABCD-EFGH"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			NewWithT(t).Expect(scanNeeded(test.status)).To(Equal(test.want))
		})
	}
}

func TestFailures(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(*result)
		want   string
	}{
		"none":                      {func(*result) {}, ""},
		"a scan":                    {func(r *result) { r.Upgrade.Scans = 1 }, "upgrade: 1 scans, not 0"},
		"a logout":                  {func(r *result) { r.Rollback.Logouts = 1 }, "rollback: 1 logouts, not 0"},
		"a code":                    {func(r *result) { r.Again.Codes = 2 }, "upgrade again: 2 sessions that showed a code, not 0"},
		"an unread message":         {func(r *result) { r.Upgrade.Unread = 1 }, "upgrade: 1 messages without a receipt, not 0"},
		"a message encrypted again": {func(r *result) { r.Upgrade.Retries = 1 }, "upgrade: 1 messages that had to be encrypted again, not 0"},
		"a missing LID":             {func(r *result) { r.Again.LIDs = 9 }, "upgrade again: 9 sessions with a LID in the status, not 10"},
		"no LID in the older one":   {func(r *result) { r.Rollback.LIDs = 0 }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := NewWithT(t)
			r := result{Sessions: 10, Upgrade: step{LIDs: 10}, Rollback: step{LIDs: 10}, Again: step{LIDs: 10}}
			test.change(&r)
			if test.want == "" {
				g.Expect(r.failures()).To(Succeed())
				return
			}
			g.Expect(r.failures()).To(MatchError(test.want))
		})
	}
}

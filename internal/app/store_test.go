package app

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// runStore runs a store command to its end and returns what it printed.
func (s *environment) runStore(code int, args ...string) string {
	s.t.Helper()
	p := s.start("store", append(args, s.common()...)...)
	s.Eventually(p.Done()).Should(BeClosed())
	s.Expect(p.State().ExitCode()).To(Equal(code), p.output())
	return p.output()
}

// TestRestoreAfterMistakenLogout: WhatsApp says that the device was logged out, a
// person has its keys given back, and it logs in without a scan, although the
// worker that saw the logout still holds the session.
func TestRestoreAfterMistakenLogout(t *testing.T) {
	s := newEnvironment(t, testenv.Postgres(t))
	s.manager()
	s.worker("worker-1")
	s.apply("shop")
	s.scan("shop", "+34611000001")
	before := s.phase("shop", v1alpha1.PhaseConnected)
	jid := before.Status.JID
	s.Expect(s.runStore(1, "restore", "shop")).To(And(ContainSubstring("the session has a device"), ContainSubstring("cannot have two")))

	inject := func(f simulator.Fault) {
		f.Device = jid
		_, err := s.simulator.Inject(f)
		s.Expect(err).NotTo(HaveOccurred())
	}
	inject(simulator.Fault{Kind: simulator.FaultFailure, Reason: 401})
	inject(simulator.Fault{Kind: simulator.FaultDrop})
	s.phase("shop", v1alpha1.PhaseLoggedOut)
	_, err := s.simulator.Clear("", "")
	s.Expect(err).NotTo(HaveOccurred())
	devices := s.simulator.Stats().Devices

	s.Expect(s.runStore(0, "marked")).To(MatchRegexp(`SESSION-ID +JID +REASON +SINCE +KEPT-UNTIL\nshop +%s +LoggedOut +20`, jid))
	s.Expect(s.runStore(1, "restore", "nobody")).To(ContainSubstring("store marked"))
	s.Expect(s.runStore(1, "restore", "shop", "--jid=1:1@s.whatsapp.net")).To(ContainSubstring("store marked"))
	s.Expect(s.runStore(0, "restore", "shop", "--jid="+jid)).To(ContainSubstring(v1alpha1.RestartedAtAnnotation))
	s.Expect(s.runStore(0, "marked")).NotTo(ContainSubstring(jid))

	s.change("shop", restart("1"))
	after := s.phase("shop", v1alpha1.PhaseConnected)
	s.Expect(after.Status.JID).To(Equal(jid))
	s.Expect(after.Status.QR).To(BeNil())
	s.Expect(after.Status.Epoch).To(BeNumerically(">", before.Status.Epoch), "the worker that had taken it has lost it")
	s.Expect(s.simulator.Stats().Devices).To(Equal(devices), "no phone has scanned again")
}

func TestKeysWithoutASessionAreListedAndPurged(t *testing.T) {
	s := newEnvironment(t, "sqlite:"+filepath.Join(t.TempDir(), "keys.db"))
	m := s.manager()
	w := s.worker("worker-1")
	s.apply("shop")
	s.scan("shop", "+34611000002")
	jid := s.phase("shop", v1alpha1.PhaseConnected).Status.JID
	s.Expect(s.runStore(1, "purge", "shop", "--yes")).To(ContainSubstring("in use"))
	w.stop()
	m.stop()

	opened, err := store.Open(t.Context(), store.Config{URL: s.store}, logr.Discard())
	s.Expect(err).NotTo(HaveOccurred())
	defer func() { s.Expect(opened.Close()).To(Succeed()) }()
	uid := string(s.get("shop").UID)
	retained := time.Now().Truncate(time.Millisecond)
	s.Expect(opened.ChangeKeeping(t.Context(), []store.KeepingChange{{UID: uid, To: store.Keeping{Retained: retained}}})).To(Succeed())
	s.Expect(s.runStore(1, "purge", "shop", "--yes")).To(ContainSubstring("in use"), "the store has not been compared yet, as after a migration")
	s.Expect(s.runStore(0, "orphans")).To(MatchRegexp(`shop +%s +%s +Retained +20\S+ +-`, s.namespace, jid))
	s.Expect(s.runStore(0, "orphans", "--confirm")).NotTo(ContainSubstring(jid), "it is compared")

	s.change("shop", func(obj *v1alpha1.WhatsAppSession) { obj.Finalizers = nil })
	s.Expect(s.client.Delete(t.Context(), s.get("shop"))).To(Succeed())
	s.Expect(s.runStore(0, "orphans", "--confirm")).To(MatchRegexp(`shop +%s +%s +Missing +20\S+ +-`, s.namespace, jid))
	_, err = opened.MarkOrphan(t.Context(), uid)
	s.Expect(err).NotTo(HaveOccurred())
	s.Expect(s.runStore(0, "orphans")).To(MatchRegexp(`shop +%s +%s +Orphaned +20\S+ +20`, s.namespace, jid))
	s.Expect(s.runStore(1, "purge", "shop")).To(ContainSubstring("--yes"))
	s.Expect(s.runStore(0, "orphans")).To(ContainSubstring(jid), "nothing without a confirmation")
	s.Expect(s.runStore(0, "purge", "shop", "--yes")).To(ContainSubstring("Purged"))
	s.Expect(s.runStore(0, "orphans")).NotTo(ContainSubstring(jid))
	s.Expect(s.runStore(1, "purge", "shop", "--yes")).To(ContainSubstring("store orphans"))
}

// A command that is given the wrong store says so and changes nothing in it.
func TestStoreCommandsClaimNoStore(t *testing.T) {
	s := newEnvironment(t, "")
	opened, err := store.Open(t.Context(), store.Config{URL: s.store}, logr.Discard())
	s.Expect(err).NotTo(HaveOccurred())
	defer func() { s.Expect(opened.Close()).To(Succeed()) }()
	s.Expect(opened.Migrate(t.Context())).To(Succeed())
	commands := [][]string{{"marked"}, {"restore", "shop"}, {"orphans"}, {"purge", "shop", "--yes"}}
	for _, command := range commands {
		s.Expect(s.runStore(1, command...)).To(And(ContainSubstring("belongs to no installation yet"), ContainSubstring("--store")))
		s.Expect(opened.Installation(t.Context())).To(BeEmpty(), "%v", command)
	}

	s.Expect(opened.SetInstallation(t.Context(), "another")).To(Succeed())
	for _, command := range commands {
		s.Expect(s.runStore(1, command...)).To(And(ContainSubstring("StoreOwnedElsewhere"), ContainSubstring("store adopt")))
		s.Expect(opened.Installation(t.Context())).To(Equal("another"), "%v", command)
	}
	s.runStore(0, "adopt")
	s.Expect(s.runStore(0, "marked")).To(ContainSubstring("SESSION-ID"))
}

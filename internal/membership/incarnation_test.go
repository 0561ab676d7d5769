package membership

import (
	"os"
	"path/filepath"
	"testing"

	. "github.com/onsi/gomega"
)

func TestIncarnation(t *testing.T) {
	g := NewWithT(t)
	folder := filepath.Join(t.TempDir(), "state")

	first, err := OpenIncarnation(folder)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(first.Restarted).To(BeFalse())
	g.Expect(first.ID).NotTo(BeEmpty())

	_, err = OpenIncarnation(folder)
	g.Expect(err).To(MatchError(ContainSubstring("--state-dir")), "two processes never share a folder")

	g.Expect(first.Close()).To(Succeed())
	again, err := OpenIncarnation(folder)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(again.Restarted).To(BeTrue())
	g.Expect(again.ID).To(Equal(first.ID), "a restart is the same incarnation")
	g.Expect(again.Close()).To(Succeed())

	// A process crashed while it wrote the file for the first time.
	g.Expect(os.WriteFile(filepath.Join(folder, "incarnation"), []byte(first.ID[:5]), 0o600)).To(Succeed())
	torn, err := OpenIncarnation(folder)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(torn.Restarted).To(BeFalse())
	g.Expect(torn.ID).NotTo(HavePrefix(first.ID[:5]))
	g.Expect(torn.Close()).To(Succeed())
}

package testenv

import (
	"testing"

	. "github.com/onsi/gomega"
)

func TestDataRaces(t *testing.T) {
	g := NewWithT(t)
	report := func(a, b string) string {
		return "WARNING: DATA RACE\nRead at 0x00c000 by goroutine 1:\n  " + a + "\n      /x.go:1 +0x1\n\nPrevious write at 0x00c000 by goroutine 2:\n  " + b + "\n      /y.go:1 +0x1\n"
	}
	library := "go.mau.fi/whatsmeow/socket.(*FrameSocket).SendFrame()"
	ours := "github.com/whatsapp-operator/whatsapp-operator/internal/worker.(*Agent).Start()"
	g.Expect(betweenLibrary(report(library, library))).To(BeTrue())
	g.Expect(betweenLibrary(report(library, ours))).To(BeFalse())
	g.Expect(betweenLibrary(report(ours, library))).To(BeFalse())
	through := func(who string) string {
		return "runtime.closechan()\n      /usr/local/go/src/runtime/chan.go:414 +0x0\n  " + who
	}
	g.Expect(betweenLibrary(report(through("go.mau.fi/whatsmeow.(*Client).cancelResponse()"), "go.mau.fi/whatsmeow.(*Client).receiveResponse()"))).To(BeTrue())
	g.Expect(betweenLibrary(report(through(ours), library))).To(BeFalse())
	g.Expect(betweenLibrary("WARNING: DATA RACE")).To(BeFalse())

	found, libraries := DataRaces("a line\n==================\n" + report(ours, ours) + "==================\n==================\n" + report(library, library) + "==================\n")
	g.Expect(found).To(ConsistOf(ContainSubstring(ours)))
	g.Expect(libraries).To(ConsistOf(ContainSubstring(library)))
}

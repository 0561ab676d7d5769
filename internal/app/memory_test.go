package app

import (
	"runtime/debug"
	"testing"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
)

// TestTheGarbageCollectorKnowsTheContainersLimit: 90 % of it, unless GOMEMLIMIT says otherwise.
func TestTheGarbageCollectorKnowsTheContainersLimit(t *testing.T) {
	g := NewWithT(t)
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	const limit = 64 << 30
	limitMemory(memlimit.Limit(limit), logr.Discard())
	g.Expect(debug.SetMemoryLimit(-1)).To(BeNumerically("~", limit/10*9, 1024))

	debug.SetMemoryLimit(before)
	t.Setenv("GOMEMLIMIT", "1GiB")
	limitMemory(memlimit.Limit(limit), logr.Discard())
	g.Expect(debug.SetMemoryLimit(-1)).To(Equal(before), "the variable was read when the process started")

	t.Setenv("GOMEMLIMIT", "")
	limitMemory(func() (uint64, error) { return 0, memlimit.ErrNoLimit }, logr.Discard())
	g.Expect(debug.SetMemoryLimit(-1)).To(Equal(before))
}

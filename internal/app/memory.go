package app

import (
	"math"
	"runtime"
	"runtime/debug"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/go-logr/logr"
)

// memoryRatio is the part of the container's memory limit that the Go runtime may use before
// it collects garbage all the time. The rest is for what it does not count: the binary's own
// pages, and the memory of the kernel for this container, such as socket buffers.
const memoryRatio = 0.9

// limitMemory makes the garbage collector respect the container's memory limit. Without it, a
// burst of logins can double the heap beyond the limit, and the kernel ends the process. The
// variable GOMEMLIMIT wins. Without a limit nothing changes.
func limitMemory(container memlimit.Provider, log logr.Logger) {
	_, err := memlimit.Set(memlimit.WithRatio(memoryRatio), memlimit.WithProvider(container))
	limit := debug.SetMemoryLimit(-1) // only reads it
	values := []any{"processors", runtime.GOMAXPROCS(0)}
	if limit != math.MaxInt64 {
		values = append(values, "goMemoryLimitMiB", limit>>20)
	}
	if err != nil {
		values = append(values, "reason", err.Error())
	}
	log.Info("Using processors and memory", values...)
}

// Command scale measures the manager with 10,000 sessions that are applied at
// once, and writes bench/results/scale.json.
//
// Everything is real but WhatsApp: the API server, Redis, PostgreSQL, a manager
// as a process of its own, and the workers, each a process with its agent, its
// supervisors and its Lease; only the devices that they connect are made up.
//
//	generator  applies the sessions that load.yaml describes
//	runner     starts the processes and leads the run
//	recorder   notes when each session is placed, held and connected
//	checker    compares the figures with ranges.yaml
//
// The time to place all is the manager's own: while the generator applies the
// sessions no manager runs, so that all of them are there at once, and the time
// is from the start of its process to the last session's worker, seen in the API
// server. The workers know of their sessions, but link hardly any of them until
// all are placed; load.yaml says why.
//
// It is compared with the raw time of the manager's writes: as many of each kind as
// it made, by a bare client with its concurrency, against the same API server,
// when everything else is gone.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/whatsapp-operator/whatsapp-operator/internal/app"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench scale:", err)
		os.Exit(1)
	}
}

// options of the benchmark.
type options struct {
	load, ranges, out string
	sessions          int
	keep              bool
}

func command(ctx context.Context) error {
	if len(os.Args) > 1 && os.Args[1] == "worker" { // a process that the runner has started
		worker := app.NewWorkerCommand(accounts{})
		worker.SetArgs(os.Args[2:])
		return worker.ExecuteContext(ctx)
	}
	var o options
	flag.StringVar(&o.load, "load", "", "file in place of bench/scale/load.yaml")
	flag.StringVar(&o.ranges, "ranges", "", "file in place of bench/scale/ranges.yaml")
	flag.IntVar(&o.sessions, "sessions", 0, "how many sessions, where the load's number is not wanted; the ranges are not checked then")
	flag.StringVar(&o.out, "out", "bench/results/scale.json", "where the figures are written")
	flag.BoolVar(&o.keep, "keep", false, "keep the folder with the logs")
	flag.Parse()
	return run(ctx, o)
}

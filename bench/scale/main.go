// Command scale measures the manager with 10,000 sessions that are applied at
// once, and writes bench/results/scale.json.
//
// Everything except WhatsApp is real: the API server, Redis, PostgreSQL, the manager
// process, and the workers, each a process with its agent, its supervisors and its Lease.
// Only the devices that the workers connect are simulated.
//
//	generator  applies the sessions that load.yaml describes
//	runner     starts the processes and runs the parts
//	recorder   records when each session is placed, held and connected
//	checker    compares the figures with ranges.yaml
//
// The time to place all sessions is the manager's alone. While the generator applies the
// sessions, no manager runs, so that all sessions exist when it starts. The time is from the
// start of its process until the API server has a worker for the last session. The workers
// hold their sessions, but link very few of them until all are placed; load.yaml says why.
//
// The time is compared with the raw time of the manager's writes: when everything else has
// ended, a bare client makes the same number of each kind of write, with the same
// concurrency, at the same API server.
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
	flag.StringVar(&o.load, "load", "", "file to use instead of bench/scale/load.yaml")
	flag.StringVar(&o.ranges, "ranges", "", "file to use instead of bench/scale/ranges.yaml")
	flag.IntVar(&o.sessions, "sessions", 0, "how many sessions, instead of the load's number; the ranges are not checked then")
	flag.StringVar(&o.out, "out", "bench/results/scale.json", "where the figures are written")
	flag.BoolVar(&o.keep, "keep", false, "keep the folder with the logs")
	flag.Parse()
	return run(ctx, o)
}

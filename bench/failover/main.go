// Command failover measures how fast sessions come back when their worker is
// lost, restarted, drained or upgraded, and writes bench/results/failover.json.
//
// Manager and workers are processes of the program as it is shipped, with their own
// API server, Redis and PostgreSQL. This process contains the WhatsApp simulator, which
// records when each device was connected, and a stand-in for Laravel. The parts are run one
// after another with the same sessions:
//
//	rolling  four workers hold them; one by one, a worker of a newer revision
//	         joins and an old one is asked to end
//	drain    one of the four is asked to end
//	collect  all workers but one are asked to end: it then holds all sessions;
//	         three new ones join, which get no sessions
//	restart  that one is killed and started again in its state folder
//	kill     it is killed and not started again
//
// A session's gap is how long its device was not connected, as recorded by the simulator.
// Restart and kill are compared with the raw time of their writes: in the same run, after
// everything else has ended, a bare client makes the same number of status patches with the
// same number of watch events, and takes a device as many times. A session counts as lost if
// Laravel does not have its last state although nothing changes any more.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
)

// result is bench/results/failover.json.
type result struct {
	Sessions    int     `json:"sessions"`
	KillFirst   float64 `json:"kill_first_s"`
	KillLast    float64 `json:"kill_last_s"`
	RestartLast float64 `json:"restart_in_place_last_s"`
	// Silence is the time until the manager moved the first session away from the killed
	// worker: first it must see no heartbeat for 15 s.
	Silence float64 `json:"kill_silence_s"`
	// KillRaw and RestartRaw are how long a bare client needs for the writes of these
	// parts; KillOverRaw is the ratio of the time after the silence.
	KillRaw        float64 `json:"kill_raw_s"`
	KillOverRaw    float64 `json:"kill_over_raw"`
	RestartRaw     float64 `json:"restart_raw_s"`
	RestartOverRaw float64 `json:"restart_over_raw"`
	DrainP50       float64 `json:"drain_gap_p50_s"`
	DrainP99       float64 `json:"drain_gap_p99_s"`
	DrainMax       float64 `json:"drain_gap_max_s"`
	RollingP50     float64 `json:"rolling_gap_p50_s"`
	RollingP99     float64 `json:"rolling_gap_p99_s"`
	RollingMax     float64 `json:"rolling_gap_max_s"`
	RollingMoves   float64 `json:"rolling_moves_per_session"`
	RollingSeconds float64 `json:"rolling_s"`
	// LoginsPerSecond and APIWrites are measured in the part kill: its logins from the first
	// to the last, and its writes to the API server except Leases.
	LoginsPerSecond float64 `json:"logins_per_s"`
	APIWrites       float64 `json:"api_writes"`
	Doubled         int64   `json:"doubled"`
	Lost            int     `json:"lost"`
}

// workers is how many workers hold the sessions.
const workers = 4

type bench struct {
	*benchenv.Fleet
	result
	ctx context.Context //nolint:containedctx // a program's one context
	// restarted and killed are the writes of these parts; nil: the part was not run.
	restarted, killed *writes
}

func main() {
	var sessions int
	var parts, out string
	var keep bool
	flag.IntVar(&sessions, "sessions", 1000, "how many sessions")
	flag.StringVar(&parts, "parts", allParts, "which parts, in this order; restart and kill follow a collect")
	flag.StringVar(&out, "out", "bench/results/failover.json", "where the figures are written")
	flag.BoolVar(&keep, "keep", false, "keep the folder with the logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, sessions, strings.Split(parts, ","), out, keep)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench failover:", err)
		os.Exit(1)
	}
}

const allParts = "rolling,drain,collect,restart,kill"

func run(ctx context.Context, sessions int, names []string, out string, keep bool) (err error) {
	s, err := benchenv.New(ctx, "failover", keep)
	defer func() { err = errors.Join(err, s.Close()) }()
	if err != nil {
		return err
	}
	fleet, err := s.NewFleet(sessions)
	if err != nil {
		return err
	}
	b := &bench{Fleet: fleet, ctx: ctx, result: result{Sessions: sessions}}
	known := map[string]func() error{"rolling": b.roll, "drain": b.drain, "collect": b.collect, "restart": b.restart, "kill": b.kill}
	parts := []func() error{b.start, b.PairAll}
	for _, name := range names {
		if known[name] == nil {
			return fmt.Errorf("there is no part %q", name)
		}
		parts = append(parts, known[name])
	}
	for _, part := range parts {
		if err := part(); err != nil {
			return err
		}
	}
	b.Doubled, b.Lost = b.Simulator.Stats().Doubled, b.Undelivered
	if err := b.raw(); err != nil {
		return err
	}
	b.show()
	if strings.Join(names, ",") == allParts { // figures that were not measured are not written
		if err := benchenv.Write(out, b.result); err != nil {
			return err
		}
	}
	return b.Failures()
}

func (b *bench) start() error {
	if err := b.StartManager(b.Binary); err != nil {
		return err
	}
	benchenv.Print("starting %d workers", workers)
	for range workers {
		if err := b.startWorker(1); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) startWorker(revision int) error { return b.StartWorker(b.Binary, revision) }

func (b *bench) roll() error {
	benchenv.Print("upgrading the %d workers one by one", workers)
	before := b.Observe()
	if err := b.RollWorkers(b.Binary, 2); err != nil {
		return err
	}
	c, err := b.WaitUntilBack(before, true)
	if err != nil {
		return err
	}
	b.RollingSeconds = time.Since(before.At).Seconds()
	b.RollingP50, b.RollingP99, b.RollingMax = benchenv.Percentile(c.Gaps, 50), benchenv.Percentile(c.Gaps, 99), benchenv.Percentile(c.Gaps, 100)
	b.RollingMoves = float64(c.Moves) / float64(b.Sessions)
	return b.WaitUntilDelivered()
}

func (b *bench) drain() error {
	before := b.Observe()
	benchenv.Print("draining one of the %d workers", workers)
	if err := b.StopWorker(); err != nil {
		return err
	}
	c, err := b.WaitUntilBack(before, false)
	if err != nil {
		return err
	}
	if len(c.Gaps) == 0 {
		return errors.New("the drained worker held nothing")
	}
	benchenv.Print("%d sessions moved", len(c.Gaps))
	b.DrainP50, b.DrainP99, b.DrainMax = benchenv.Percentile(c.Gaps, 50), benchenv.Percentile(c.Gaps, 99), benchenv.Percentile(c.Gaps, 100)
	return b.WaitUntilDelivered()
}

// collect moves all sessions to one worker, and starts three others without sessions.
func (b *bench) collect() error {
	benchenv.Print("collecting all sessions on one worker")
	before := b.Observe()
	for len(b.Workers) > 1 {
		if err := b.StopWorker(); err != nil {
			return err
		}
	}
	if _, err := b.WaitUntilBack(before, false); err != nil {
		return err
	}
	for range workers - 1 {
		if err := b.startWorker(2); err != nil {
			return err
		}
	}
	if err := b.WaitUntilDelivered(); err != nil {
		return err
	}
	// The writes that follow the logins of this part must not be counted in the next one.
	return benchenv.Pause(b.ctx, 10*time.Second)
}

func (b *bench) restart() error {
	benchenv.Print("killing the worker and starting it again in its state folder")
	w := b.Workers[0]
	counted, err := b.count()
	if err != nil {
		return err
	}
	before := b.Observe()
	w.Kill()
	restarted, err := b.RunWorker(b.Binary, w.Name, 2)
	if err != nil {
		return err
	}
	b.Workers[0] = restarted
	c, err := b.WaitUntilBack(before, true)
	if err != nil {
		return err
	}
	b.RestartLast = benchenv.Percentile(c.Logins, 100)
	benchenv.Print("the first was back after %.1f s, the last after %.1f s", benchenv.Percentile(c.Logins, 0), b.RestartLast)
	if err := b.WaitUntilDelivered(); err != nil {
		return err
	}
	if b.restarted, err = b.since(counted); err != nil {
		return err
	}
	return benchenv.Pause(b.ctx, 10*time.Second)
}

func (b *bench) kill() error {
	benchenv.Print("killing the worker without a restart")
	counted, err := b.count()
	if err != nil {
		return err
	}
	taken, stop, err := b.firstTaken(b.Workers[0].Name)
	if err != nil {
		return err
	}
	defer stop()
	before := b.Observe()
	b.Workers[0].Kill()
	b.Workers = b.Workers[1:]
	spent, err := benchenv.CPUTimes()
	if err != nil {
		return err
	}
	c, err := b.WaitUntilBack(before, true)
	if err != nil {
		return err
	}
	b.KillFirst, b.KillLast = benchenv.Percentile(c.Logins, 0), benchenv.Percentile(c.Logins, 100)
	select {
	case at := <-taken:
		b.Silence = at.Sub(before.At).Seconds()
	default:
		return errors.New("all sessions are back, but the watch has not seen the first one leave the killed worker")
	}
	b.LoginsPerSecond = float64(c.Moves) / (b.KillLast - b.KillFirst)
	benchenv.Print("the first was back after %.1f s, the last after %.1f s", b.KillFirst, b.KillLast)
	if err := benchenv.PrintCPUTimes(spent); err != nil {
		return err
	}
	if err := b.WaitUntilDelivered(); err != nil {
		return err
	}
	b.killed, err = b.since(counted)
	return err
}

// firstTaken returns a channel that gets the time when the first session is not held by the worker any more.
func (b *bench) firstTaken(worker string) (<-chan time.Time, func(), error) {
	var now v1alpha1.WhatsAppSessionList
	if err := b.Client.List(b.ctx, &now, client.Limit(1)); err != nil {
		return nil, nil, fmt.Errorf("listing the sessions: %w", err)
	}
	held, err := b.Client.Watch(b.ctx, &now, client.MatchingFields{"status.heldBy": worker},
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: now.ResourceVersion}})
	if err != nil {
		return nil, nil, fmt.Errorf("watching the sessions: %w", err)
	}
	taken := make(chan time.Time, 1)
	var watching sync.WaitGroup
	watching.Go(func() {
		defer held.Stop()
		for event := range held.ResultChan() {
			if event.Type == watch.Deleted { // it does not match the selector any more
				taken <- time.Now()
				return
			}
		}
	})
	return taken, func() { held.Stop(); watching.Wait() }, nil
}

func (b *bench) show() {
	fmt.Printf("\n%d sessions, PostgreSQL\n\n", b.Sessions)
	row := func(name, format string, value float64, target string) {
		fmt.Printf("%-56s %10s  %s\n", name, fmt.Sprintf(format, value), target)
	}
	row("killed: the first is back on another worker, s", "%.1f", b.KillFirst, "")
	row("  the last, s", "%.1f", b.KillLast, "≤ 30")
	row("  the first is moved away from the dead worker, s", "%.1f", b.Silence, "")
	row("  logins per second", "%.0f", b.LoginsPerSecond, "")
	row("  API writes", "%.0f", b.APIWrites, "")
	row("  the same writes by a bare client, s", "%.1f", b.KillRaw, "")
	row("  ratio, without the silence", "%.2f", b.KillOverRaw, "≤ 1.5")
	row("restarted in place: the last is back, s", "%.1f", b.RestartLast, "≤ 8")
	row("  the same writes by a bare client, s", "%.1f", b.RestartRaw, "")
	row("  ratio", "%.2f", b.RestartOverRaw, "≤ 1.5")
	row("drained: gap p50, s", "%.2f", b.DrainP50, "")
	row("  p99", "%.2f", b.DrainP99, "")
	row("  max", "%.2f", b.DrainMax, "")
	row("all upgraded one by one: gap p50, s", "%.2f", b.RollingP50, "")
	row("  p99", "%.2f", b.RollingP99, "≤ 2")
	row("  max", "%.2f", b.RollingMax, "")
	row("  moves per session", "%.3f", b.RollingMoves, "1")
	row("  from the first new worker to the last session, s", "%.1f", b.RollingSeconds, "")
	row("doubled connections", "%.0f", float64(b.Doubled), "0")
	row("updates lost at Laravel", "%.0f", float64(b.Lost), "0")
}

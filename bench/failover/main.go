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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
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
	*benchenv.Environment
	result
	ctx       context.Context //nolint:containedctx // a program's one context
	simulator *simulator.Server
	store     string
	manager   *benchenv.Process
	running   []*benchenv.Process // the running workers
	started   int                 // the number of workers started so far
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
	b := &bench{Environment: s, ctx: ctx, result: result{Sessions: sessions}}
	stop, err := b.startSimulator()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	known := map[string]func() error{"rolling": b.roll, "drain": b.drain, "collect": b.collect, "restart": b.restart, "kill": b.kill}
	parts := []func() error{b.start, b.pair}
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
	stats := b.simulator.Stats()
	b.Doubled = stats.Doubled
	if err := b.raw(); err != nil {
		return err
	}
	b.show()
	if strings.Join(names, ",") == allParts { // figures that were not measured are not written
		if err := benchenv.Write(out, b.result); err != nil {
			return err
		}
	}
	switch {
	case b.Doubled > 0:
		return fmt.Errorf("%d connections were doubled: %v", b.Doubled, b.simulator.Doubled())
	case b.Lost > 0:
		return fmt.Errorf("%d updates were lost", b.Lost)
	case len(b.Laravel.Breaches()) > 0:
		return fmt.Errorf("requests to Laravel broke the contract: %s", strings.Join(b.Laravel.Breaches(), "; "))
	case len(stats.Unknown) > 0:
		return fmt.Errorf("the simulator got unknown requests: %v", stats.Unknown)
	}
	return nil
}

func (b *bench) startSimulator() (stop func() error, err error) {
	if b.simulator, err = simulator.New(simulator.Options{}); err != nil {
		return nil, fmt.Errorf("starting the simulator: %w", err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.ctx))
	ended := make(chan error, 1)
	go func() { ended <- b.simulator.Run(ctx) }()
	return func() error {
		cancel()
		if err := <-ended; err != nil {
			return fmt.Errorf("running the simulator: %w", err)
		}
		return nil
	}, nil
}

func (b *bench) start() (err error) {
	if b.store, err = b.Postgres(); err != nil {
		return err
	}
	// No rebalancing: a new worker must not take sessions that are measured.
	if b.manager, err = b.Manager(b.store, "--rebalance=false"); err != nil {
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

// startWorker starts a worker under a new name and waits until the manager counts it as
// live: then it is as ready as a ready pod in a rolling upgrade.
func (b *bench) startWorker(revision int) error {
	b.started++
	w, err := b.worker(fmt.Sprintf("worker-%d", b.started), revision)
	if err != nil {
		return err
	}
	b.running = append(b.running, w)
	return benchenv.WaitUntil(b.ctx, "workers have joined", time.Minute, 50*time.Millisecond, func() (int, int, error) {
		m, err := b.manager.Metrics(b.ctx)
		return int(m.Sum("whatsapp_operator_workers", benchenv.Labels{"state": "live"})), len(b.running), errors.Join(err, w.Running())
	})
}

// worker starts a worker; with a name that was used before, that worker is restarted.
func (b *bench) worker(name string, revision int) (*benchenv.Process, error) {
	args := append([]string{
		"worker", "--name=" + name, "--state-dir=" + filepath.Join(b.Dir, name),
		fmt.Sprintf("--capacity=%d", b.Sessions), fmt.Sprintf("--revision=%d", revision),
		"--pairings-per-second=200", "--pairing-burst=200", // the pairings are not measured
		"--whatsapp-endpoint=" + b.simulator.Info().Endpoint, "--whatsapp-noise-root=" + b.simulator.Info().NoiseRoot,
	}, b.Common(b.store)...)
	return b.StartServing(name, b.Binary, args...)
}

// pair applies the sessions, scans their codes, and waits until all are connected.
func (b *bench) pair() error {
	err := b.Pair(0, b.Sessions, func(ctx context.Context, code, phone string) error {
		_, err := b.simulator.Scan(ctx, code, phone)
		return err
	})
	if err != nil {
		return err
	}
	return b.waitUntilDelivered()
}

// waitUntilDelivered waits until all sessions are connected and Laravel has these states.
// States that Laravel does not receive are counted as lost.
func (b *bench) waitUntilDelivered() error {
	for deadline := time.Now().Add(time.Minute); ; {
		outdated, err := b.outdated()
		if err != nil {
			return err
		}
		if len(outdated) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			benchenv.Print("Laravel has an old status of %d sessions: %s …", len(outdated), outdated[0])
			b.Lost += len(outdated)
			return nil
		}
		if err := benchenv.Pause(b.ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// outdated lists the sessions of which Laravel does not have the present status.
func (b *bench) outdated() (names []string, err error) {
	var list v1alpha1.WhatsAppSessionList
	if err := b.Client.List(b.ctx, &list, client.InNamespace(benchenv.Namespace)); err != nil {
		return nil, fmt.Errorf("listing the sessions: %w", err)
	}
	for i := range list.Items {
		s := &list.Items[i]
		received := b.Laravel.Status(s.SessionID())
		if s.Status.Phase != v1alpha1.PhaseConnected || received.Status != delivery.Active || received.Epoch != s.Status.Epoch {
			names = append(names, s.Name)
		}
	}
	return names, nil
}

// snapshot is the state of the simulator's devices at a time.
type snapshot struct {
	at      time.Time
	devices map[string]simulator.Device
}

func (b *bench) observe() snapshot {
	m := snapshot{at: time.Now(), devices: map[string]simulator.Device{}}
	for _, d := range b.simulator.Devices() {
		m.devices[d.JID] = d
	}
	return m
}

// waitUntilBack waits until all sessions are connected, and returns the changes since the
// snapshot. With all, every session must have logged in since then.
func (b *bench) waitUntilBack(since snapshot, all bool) (change, error) {
	var c change
	err := benchenv.WaitUntil(b.ctx, "sessions are back", 5*time.Minute, 50*time.Millisecond, func() (int, int, error) {
		c = since.compare(b.observe())
		if all {
			return min(c.connected, len(c.logins)), b.Sessions, b.manager.Running()
		}
		return c.connected, b.Sessions, b.manager.Running()
	})
	return c, err
}

// change is the difference between two snapshots.
type change struct {
	connected int
	// moves counts the logins. For each device that has logged in again, logins has the time
	// of its last login, and gaps how long it was not connected.
	moves  int64
	logins []time.Duration
	gaps   []time.Duration
}

// compare is pure.
func (m snapshot) compare(later snapshot) (c change) {
	for jid, d := range later.devices {
		before := m.devices[jid]
		if d.Connected {
			c.connected++
		}
		if d.Logins > before.Logins {
			c.moves += d.Logins - before.Logins
			c.logins = append(c.logins, d.LoggedIn.Sub(m.at))
			c.gaps = append(c.gaps, d.Away-before.Away)
		}
	}
	slices.Sort(c.logins)
	slices.Sort(c.gaps)
	return c
}

// percentile is the smallest value that p percent of the values do not exceed, in seconds;
// 0 without values. The values are sorted.
func percentile(values []time.Duration, p int) float64 {
	if len(values) == 0 {
		return 0
	}
	return values[max(0, (len(values)*p+99)/100-1)].Seconds()
}

// stopTimeout is how long a worker may take to end.
const stopTimeout = 2 * time.Minute

// stopWorker asks the oldest worker to end and waits until it has.
func (b *bench) stopWorker() error {
	w := b.running[0]
	b.running = b.running[1:]
	w.Terminate()
	return w.WaitUntilEnded(b.ctx, stopTimeout)
}

func (b *bench) roll() error {
	benchenv.Print("upgrading the %d workers one by one", workers)
	before := b.observe()
	for range workers {
		if err := b.startWorker(2); err != nil {
			return err
		}
		if err := b.stopWorker(); err != nil {
			return err
		}
	}
	c, err := b.waitUntilBack(before, true)
	if err != nil {
		return err
	}
	b.RollingSeconds = time.Since(before.at).Seconds()
	b.RollingP50, b.RollingP99, b.RollingMax = percentile(c.gaps, 50), percentile(c.gaps, 99), percentile(c.gaps, 100)
	b.RollingMoves = float64(c.moves) / float64(b.Sessions)
	return b.waitUntilDelivered()
}

func (b *bench) drain() error {
	before := b.observe()
	benchenv.Print("draining one of the %d workers", workers)
	if err := b.stopWorker(); err != nil {
		return err
	}
	c, err := b.waitUntilBack(before, false)
	if err != nil {
		return err
	}
	if len(c.gaps) == 0 {
		return errors.New("the drained worker held nothing")
	}
	benchenv.Print("%d sessions moved", len(c.gaps))
	b.DrainP50, b.DrainP99, b.DrainMax = percentile(c.gaps, 50), percentile(c.gaps, 99), percentile(c.gaps, 100)
	return b.waitUntilDelivered()
}

// collect moves all sessions to one worker, and starts three others without sessions.
func (b *bench) collect() error {
	benchenv.Print("collecting all sessions on one worker")
	before := b.observe()
	for len(b.running) > 1 {
		if err := b.stopWorker(); err != nil {
			return err
		}
	}
	if _, err := b.waitUntilBack(before, false); err != nil {
		return err
	}
	for range workers - 1 {
		if err := b.startWorker(2); err != nil {
			return err
		}
	}
	if err := b.waitUntilDelivered(); err != nil {
		return err
	}
	// The writes that follow the logins of this part must not be counted in the next one.
	return benchenv.Pause(b.ctx, 10*time.Second)
}

func (b *bench) restart() error {
	benchenv.Print("killing the worker and starting it again in its state folder")
	w := b.running[0]
	counted, err := b.count()
	if err != nil {
		return err
	}
	before := b.observe()
	w.Kill()
	restarted, err := b.worker(w.Name, 2)
	if err != nil {
		return err
	}
	b.running[0] = restarted
	c, err := b.waitUntilBack(before, true)
	if err != nil {
		return err
	}
	b.RestartLast = percentile(c.logins, 100)
	benchenv.Print("the first was back after %.1f s, the last after %.1f s", percentile(c.logins, 0), b.RestartLast)
	if err := b.waitUntilDelivered(); err != nil {
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
	taken, stop, err := b.firstTaken(b.running[0].Name)
	if err != nil {
		return err
	}
	defer stop()
	before := b.observe()
	b.running[0].Kill()
	b.running = b.running[1:]
	spent, err := benchenv.CPUTimes()
	if err != nil {
		return err
	}
	c, err := b.waitUntilBack(before, true)
	if err != nil {
		return err
	}
	b.KillFirst, b.KillLast = percentile(c.logins, 0), percentile(c.logins, 100)
	select {
	case at := <-taken:
		b.Silence = at.Sub(before.at).Seconds()
	default:
		return errors.New("all sessions are back, but the watch has not seen the first one leave the killed worker")
	}
	b.LoginsPerSecond = float64(c.moves) / (b.KillLast - b.KillFirst)
	benchenv.Print("the first was back after %.1f s, the last after %.1f s", b.KillFirst, b.KillLast)
	if err := benchenv.PrintCPUTimes(spent); err != nil {
		return err
	}
	if err := b.waitUntilDelivered(); err != nil {
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

// Command worker measures what a worker costs compared with bare whatsmeow clients.
//
// In one run, against one simulator, it holds the same number of connected
// sessions first in the real worker (with its store, Redis and an API server)
// and then as bare whatsmeow clients in a bare process on the same kind of
// database, and writes bench/results/worker.json. Both processes are restarted
// after the pairings, so that the garbage of the pairings is not measured.
//
// It also measures the memory of both with 0.5 and 1.5 times as many sessions: the slope
// between is what each further session costs, without the memory that a process needs
// for no session.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/bench/bare"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// options of the benchmark.
type options struct {
	sessions int
	idle     time.Duration
	settle   time.Duration
	out      string
	keep     bool
}

// few and many are the numbers of sessions between which the slope is measured: 500
// and 1,500 by default.
func (o options) few() int  { return max(1, o.sessions/2) }
func (o options) many() int { return o.sessions + max(1, o.sessions/2) }

// result is bench/results/worker.json.
type result struct {
	Sessions      int     `json:"sessions"`
	RSS           float64 `json:"rss_mb"`
	BareRSS       float64 `json:"bare_rss_mb"`
	BareRSSSameGC float64 `json:"bare_rss_same_gc_mb"`
	RSSRatio      float64 `json:"rss_ratio"`
	// SlopeFrom and SlopeTo are the numbers of sessions between which the slopes are measured.
	SlopeFrom            int     `json:"slope_from_sessions"`
	SlopeTo              int     `json:"slope_to_sessions"`
	Slope                float64 `json:"slope_kb_per_session"`
	BareSlope            float64 `json:"bare_slope_kb_per_session"`
	BareSlopeSameGC      float64 `json:"bare_slope_same_gc_kb_per_session"`
	SlopeRatio           float64 `json:"slope_ratio"`
	IdleCPU              float64 `json:"idle_cpu_percent"`
	BareIdleCPU          float64 `json:"bare_idle_cpu_percent"`
	IdleCPURatio         float64 `json:"idle_cpu_ratio"`
	LoginCPU             float64 `json:"login_cpu_ms"`
	BareLoginCPU         float64 `json:"bare_login_cpu_ms"`
	GoroutinesPerSession float64 `json:"goroutines_per_session"`
	Doubled              int64   `json:"doubled"`
	IdleSeconds          float64 `json:"idle_seconds"`
}

func main() {
	var o options
	flag.IntVar(&o.sessions, "sessions", 1000, "how many sessions; the slope is measured from 0.5 to 1.5 times as many")
	flag.DurationVar(&o.idle, "idle", 90*time.Second, "how long the idle CPU is measured")
	flag.DurationVar(&o.settle, "settle", 30*time.Second, "how long to wait before a process is measured")
	flag.StringVar(&o.out, "out", "bench/results/worker.json", "where the figures are written")
	flag.BoolVar(&o.keep, "keep", false, "keep the folder with the logs")
	clients := bare.Flags(flag.CommandLine)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if clients.Database != "" {
		err = bare.Run(ctx, *clients)
	} else {
		err = run(ctx, o)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench worker:", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	*benchenv.Environment
	options
	result
	ctx     context.Context //nolint:containedctx // a program's one context
	control simulator.Control
	info    simulator.Info
}

func run(ctx context.Context, o options) (err error) {
	e, err := benchenv.New(ctx, "worker", o.keep)
	defer func() { err = errors.Join(err, e.Close()) }()
	if err != nil {
		return err
	}
	b := &bench{Environment: e, options: o, ctx: ctx}
	b.Sessions, b.SlopeFrom, b.SlopeTo, b.IdleSeconds = o.sessions, o.few(), o.many(), o.idle.Seconds()
	for _, part := range []func() error{b.start, b.measureWorker, b.measureBare} {
		if err := part(); err != nil {
			return err
		}
	}
	b.RSSRatio, b.IdleCPURatio, b.SlopeRatio = ratio(b.RSS, b.BareRSS), ratio(b.IdleCPU, b.BareIdleCPU), ratio(b.Slope, b.BareSlope)
	doubled, err := b.control.Doubled(ctx)
	if err != nil {
		return fmt.Errorf("reading the doubled connections: %w", err)
	}
	b.Doubled = int64(len(doubled))
	b.show()
	return benchenv.Write(o.out, b.result)
}

// ratio is 0 if a run was too short to measure the bare clients.
func ratio(ours, bare float64) float64 {
	if bare == 0 {
		return 0
	}
	return ours / bare
}

func (r result) show() {
	fmt.Printf("\n%d sessions, SQLite, one simulator, one run\n\n", r.Sessions)
	fmt.Printf("%-36s %12s %12s %8s %8s\n", "", "worker", "bare", "ratio", "target")
	row := func(name, format string, ours, bare float64, target string) {
		fmt.Printf("%-36s %12s %12s %8.2f %8s\n", name, fmt.Sprintf(format, ours), fmt.Sprintf(format, bare), ratio(ours, bare), target)
	}
	row("resident memory, MB", "%.1f", r.RSS, r.BareRSS, "1.15")
	row("  bare with the same GOGC", "%.1f", r.RSS, r.BareRSSSameGC, "")
	row(fmt.Sprintf("memory per session, %d to %d, KB", r.SlopeFrom, r.SlopeTo), "%.1f", r.Slope, r.BareSlope, "1.05")
	row("  bare with the same GOGC", "%.1f", r.Slope, r.BareSlopeSameGC, "")
	row("idle CPU, % of a core", "%.2f", r.IdleCPU, r.BareIdleCPU, "1.15")
	row("CPU per login, ms", "%.2f", r.LoginCPU, r.BareLoginCPU, "")
	fmt.Printf("%-36s %12.1f\n%-36s %12d\n", "goroutines per session", r.GoroutinesPerSession, "doubled connections", r.Doubled)
	fmt.Println("\nThe worker runs as shipped (--gc-percent=25), the bare process with Go's default and, in the rows that say so, with GOGC=25.")
}

// start starts the manager and the simulator, which is a separate process so that its memory
// and CPU time are not part of another figure.
func (b *bench) start() error {
	p, err := b.Start("simulator", b.Binary, nil, "simulator", "--listen=127.0.0.1:0", "--control-listen=127.0.0.1:0")
	if err != nil {
		return err
	}
	err = benchenv.WaitUntil(b.ctx, "simulators are up", time.Minute, 50*time.Millisecond, func() (int, int, error) {
		out, err := p.Output()
		if err != nil {
			return 0, 1, err
		}
		for line := range strings.Lines(out) {
			if url, ok := strings.CutPrefix(strings.TrimSpace(line), "control: "); ok {
				b.control = simulator.Control{URL: url}
				return 1, 1, nil
			}
		}
		return 0, 1, p.Running()
	})
	if err != nil {
		return err
	}
	if b.info, err = b.control.Info(b.ctx); err != nil {
		return fmt.Errorf("reading from the simulator: %w", err)
	}
	_, err = b.Manager(b.store())
	return err
}

func (b *bench) store() string { return "sqlite:" + filepath.Join(b.Dir, "keys.db") }

func (b *bench) startWorker() (*benchenv.Process, error) {
	return b.StartServing("worker", b.Binary, append([]string{"worker", "--name=bench", "--state-dir=" + filepath.Join(b.Dir, "state"),
		fmt.Sprintf("--capacity=%d", b.many()), "--pairings-per-second=200", "--pairing-burst=200",
		"--whatsapp-endpoint=" + b.info.Endpoint, "--whatsapp-noise-root=" + b.info.NoiseRoot}, b.Common(b.store())...)...)
}

// measureWorker pairs sessions up to each of the three numbers, and with each number
// restarts the worker and measures it.
func (b *bench) measureWorker() error {
	w, err := b.startWorker()
	if err != nil {
		return err
	}
	empty, err := b.goroutines(w)
	if err != nil {
		return err
	}
	var few, many float64
	paired := 0
	for _, n := range []int{b.few(), b.sessions, b.many()} {
		if err := b.Pair(paired, n, b.scan); err != nil {
			return err
		}
		paired = n
		benchenv.Print("restarting the worker in place")
		before, err := b.control.Stats(b.ctx)
		if err != nil {
			return fmt.Errorf("reading from the simulator: %w", err)
		}
		w.Kill()
		if w, err = b.startWorker(); err != nil {
			return err
		}
		if err := b.connected(before.Logins, n); err != nil {
			return err
		}
		switch n {
		case b.few():
			few, err = b.memory(w)
		case b.many():
			many, err = b.memory(w)
		default:
			var m figures
			if m, err = b.measure(w, n); err != nil {
				return err
			}
			b.RSS, b.IdleCPU, b.LoginCPU = m.rss, m.idleCPU, m.loginCPU
			var full float64
			full, err = b.goroutines(w)
			b.GoroutinesPerSession = (full - empty) / float64(n)
		}
		if err != nil {
			return err
		}
	}
	b.Slope = b.slope(few, many)
	w.Kill()
	return nil
}

func (b *bench) scan(ctx context.Context, code, phone string) error {
	_, err := b.control.Scan(ctx, code, phone)
	return err
}

// slope is the memory per session between few and many in KB; few and many are in MB.
func (b *bench) slope(few, many float64) float64 {
	return (many - few) * 1024 / float64(b.many()-b.few())
}

// connected waits until n sessions are connected and there are n more logins than since.
func (b *bench) connected(since int64, n int) error {
	return benchenv.WaitUntil(b.ctx, "sessions connected", 5*time.Minute, 200*time.Millisecond, func() (int, int, error) {
		stats, err := b.control.Stats(b.ctx)
		if err != nil || stats.Logins < since+int64(n) {
			return 0, n, err
		}
		return stats.Connected, n, nil
	})
}

type figures struct{ rss, idleCPU, loginCPU float64 }

// memory waits until a process with all its sessions is idle, and then reads its memory in MB.
func (b *bench) memory(p *benchenv.Process) (float64, error) {
	benchenv.Print("all connected; waiting until %s is idle, %s", p.Name, b.settle)
	if err := benchenv.Pause(b.ctx, b.settle); err != nil {
		return 0, err
	}
	rss, _, err := p.RSS()
	return rss, err
}

// measure waits until a process with all its n sessions is idle, measures its idle CPU and
// memory, and then drops every socket and measures the CPU time of the logins.
func (b *bench) measure(p *benchenv.Process, n int) (f figures, err error) {
	benchenv.Print("all connected; measuring the idle CPU for %s", b.idle)
	if err := benchenv.Pause(b.ctx, b.settle); err != nil {
		return f, err
	}
	before, err := p.CPU()
	if err != nil {
		return f, err
	}
	if err := benchenv.Pause(b.ctx, b.idle); err != nil {
		return f, err
	}
	after, err := p.CPU()
	if err != nil {
		return f, err
	}
	f.idleCPU = 100 * (after - before).Seconds() / b.idle.Seconds()
	if f.rss, _, err = p.RSS(); err != nil {
		return f, err
	}
	benchenv.Print("dropping every socket")
	stats, err := b.control.Stats(b.ctx)
	if err != nil {
		return f, fmt.Errorf("reading from the simulator: %w", err)
	}
	if _, err := b.control.Inject(b.ctx, simulator.Fault{Kind: simulator.FaultDrop}); err != nil {
		return f, fmt.Errorf("dropping the sockets: %w", err)
	}
	if err := b.connected(stats.Logins, n); err != nil {
		return f, err
	}
	if err := benchenv.Pause(b.ctx, 5*time.Second); err != nil { // includes the work that follows a login
		return f, err
	}
	back, err := p.CPU()
	if err != nil {
		return f, err
	}
	f.loginCPU = float64((back - after).Milliseconds()) / float64(n)
	return f, nil
}

// measureBare pairs the bare clients, and measures them with each number of sessions and
// with both settings of the garbage collector.
func (b *bench) measureBare() error {
	clients := bare.Options{Database: filepath.Join(b.Dir, "bare.db"), Endpoint: b.info.Endpoint, Root: b.info.NoiseRoot, Control: b.control.URL}
	benchenv.Print("pairing %d bare clients", b.many())
	clients.Pair = b.many()
	pairing, err := b.Start("bare-pairing", "", nil, clients.Args()...)
	if err != nil {
		return err
	}
	if err := pairing.WaitUntilEnded(b.ctx, time.Hour); err != nil {
		return fmt.Errorf("pairing the bare clients: %w", err)
	}
	for _, gc := range []string{"100", "25"} {
		var few, many float64
		for _, n := range []int{b.few(), b.sessions, b.many()} {
			benchenv.Print("connecting %d bare clients with GOGC=%s", n, gc)
			stats, err := b.control.Stats(b.ctx)
			if err != nil {
				return fmt.Errorf("reading from the simulator: %w", err)
			}
			clients.Pair, clients.Connect = 0, n
			p, err := b.Start(fmt.Sprintf("bare-%s-%d", gc, n), "", []string{"GOGC=" + gc}, clients.Args()...)
			if err != nil {
				return err
			}
			if err := b.connected(stats.Logins, n); err != nil {
				return err
			}
			switch {
			case n == b.few():
				few, err = b.memory(p)
			case n == b.many():
				many, err = b.memory(p)
			case gc == "25":
				b.BareRSSSameGC, err = b.memory(p)
			default:
				var m figures
				m, err = b.measure(p, n)
				b.BareRSS, b.BareIdleCPU, b.BareLoginCPU = m.rss, m.idleCPU, m.loginCPU
			}
			if err != nil {
				return err
			}
			p.Kill()
		}
		if gc == "25" {
			b.BareSlopeSameGC = b.slope(few, many)
		} else {
			b.BareSlope = b.slope(few, many)
		}
	}
	return nil
}

// goroutines reads the number of goroutines from a worker's metrics.
func (b *bench) goroutines(p *benchenv.Process) (float64, error) {
	m, err := p.Metrics(b.ctx)
	return m.Sum("go_goroutines", nil), err
}

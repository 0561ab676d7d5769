// Command worker measures what a worker costs beside bare whatsmeow clients.
//
// In one run, against one simulator, it holds the same number of connected
// sessions first in the real worker (with its store, Redis and an API server)
// and then as bare whatsmeow clients in a bare process on the same kind of
// database, and writes bench/results/worker.json. Both processes are started
// anew after the pairings, so that neither carries their garbage.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/bench/stage"
	"github.com/whatsapp-operator/whatsapp-operator/config/crd"
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

// result is bench/results/worker.json.
type result struct {
	Sessions             int     `json:"sessions"`
	RSS                  float64 `json:"rss_mb"`
	BareRSS              float64 `json:"bare_rss_mb"`
	BareRSSSameGC        float64 `json:"bare_rss_same_gc_mb"`
	RSSRatio             float64 `json:"rss_ratio"`
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
	var bare bareOptions
	role := flag.String("role", "", "")
	flag.IntVar(&o.sessions, "sessions", 1000, "how many sessions")
	flag.DurationVar(&o.idle, "idle", 90*time.Second, "how long idleness is measured")
	flag.DurationVar(&o.settle, "settle", 30*time.Second, "how long a process is left alone before it is measured")
	flag.StringVar(&o.out, "out", "bench/results/worker.json", "where the figures are written")
	flag.BoolVar(&o.keep, "keep", false, "keep the folder with the logs")
	flag.StringVar(&bare.database, "bare-database", "", "")
	flag.StringVar(&bare.endpoint, "bare-endpoint", "", "")
	flag.StringVar(&bare.root, "bare-root", "", "")
	flag.StringVar(&bare.control, "bare-control", "", "")
	flag.IntVar(&bare.pair, "bare-pair", 0, "")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if *role == "bare" {
		err = runBare(ctx, bare)
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
	options
	ctx     context.Context //nolint:containedctx // a program's one context
	dir     string
	binary  string
	client  client.Client
	control simulator.Control
	info    simulator.Info
	kube    string
	redis   string
	laravel string
	ends    []func()
}

func run(ctx context.Context, o options) (err error) {
	b := &bench{options: o, ctx: ctx}
	defer func() {
		for i := len(b.ends) - 1; i >= 0; i-- {
			b.ends[i]()
		}
	}()
	if err := b.prepare(); err != nil {
		return err
	}
	r := result{Sessions: o.sessions, IdleSeconds: o.idle.Seconds()}
	if err := b.measureWorker(&r); err != nil {
		return err
	}
	if err := b.measureBare(&r); err != nil {
		return err
	}
	r.RSSRatio, r.IdleCPURatio = r.RSS/r.BareRSS, r.IdleCPU/r.BareIdleCPU
	doubled, err := b.control.Doubled(ctx)
	if err != nil {
		return fmt.Errorf("asking for doubled connections: %w", err)
	}
	r.Doubled = int64(len(doubled))
	show(r)
	return write(o.out, r)
}

func show(r result) {
	fmt.Printf("\n%d sessions, SQLite, one simulator, one run\n\n", r.Sessions)
	fmt.Printf("%-28s %12s %12s %8s %8s\n", "", "worker", "bare", "ratio", "claim")
	row := func(name, format string, ours, bare float64, claim string) {
		fmt.Printf("%-28s %12s %12s %8.2f %8s\n", name, fmt.Sprintf(format, ours), fmt.Sprintf(format, bare), ours/bare, claim)
	}
	row("resident memory, MB", "%.1f", r.RSS, r.BareRSS, "1.15")
	row("  bare with the same GOGC", "%.1f", r.RSS, r.BareRSSSameGC, "")
	row("idle CPU, % of a core", "%.2f", r.IdleCPU, r.BareIdleCPU, "1.15")
	row("CPU a login, ms", "%.2f", r.LoginCPU, r.BareLoginCPU, "")
	fmt.Printf("%-28s %12.1f\n%-28s %12d\n", "goroutines a session", r.GoroutinesPerSession, "doubled connections", r.Doubled)
	fmt.Println("\nThe worker runs as shipped (--gc-percent=50), the bare process with Go's default and, in the second row, with GOGC=50.")
}

func write(path string, r result) error {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the figures: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	if err := os.WriteFile(path, append(content, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	return nil
}

func (b *bench) say(format string, args ...any) {
	fmt.Printf("%s  %s\n", time.Now().Format("15:04:05"), fmt.Sprintf(format, args...))
}

// prepare starts all that both sides use, and the manager.
func (b *bench) prepare() error {
	var err error
	if b.dir, err = os.MkdirTemp("", "bench-worker-"); err != nil {
		return fmt.Errorf("making a folder: %w", err)
	}
	if b.keep {
		b.say("logs are in %s", b.dir)
	} else {
		b.ends = append(b.ends, func() { _ = os.RemoveAll(b.dir) })
	}
	b.binary = filepath.Join(b.dir, "whatsapp-operator")
	b.say("building the program as the image has it")
	if err := stage.Build(b.ctx, b.binary); err != nil {
		return err
	}
	definition, err := crd.WhatsAppSessions()
	if err != nil {
		return err
	}
	b.say("starting API server, Redis, simulator, manager")
	env := &envtest.Environment{CRDs: []*apiextensionsv1.CustomResourceDefinition{definition}}
	config, err := env.Start()
	b.ends = append(b.ends, func() { _ = env.Stop() })
	if err != nil {
		return fmt.Errorf("starting the API server (set KUBEBUILDER_ASSETS, for example to the output of hack/envtest-assets): %w", err)
	}
	config.QPS = -1
	b.kube = filepath.Join(b.dir, "kubeconfig")
	if err := os.WriteFile(b.kube, env.KubeConfig, 0o600); err != nil {
		return fmt.Errorf("writing the kubeconfig: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return fmt.Errorf("registering the kinds: %w", err)
	}
	if b.client, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		return fmt.Errorf("reaching the API server: %w", err)
	}
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	b.ends = append(b.ends, receiver.Close)
	b.laravel = receiver.URL

	port, err := freePort()
	if err != nil {
		return err
	}
	b.redis = net.JoinHostPort("127.0.0.1", port)
	if _, err := b.start("redis", "redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", b.dir,
		"--appendonly", "yes", "--maxmemory-policy", "noeviction"); err != nil {
		return err
	}
	if err := b.startSimulator(); err != nil {
		return err
	}
	for _, name := range []string{"token", "secret"} {
		if err := os.WriteFile(filepath.Join(b.dir, name), []byte("bench-bench-bench-bench-bench-bench"), 0o600); err != nil {
			return fmt.Errorf("writing a secret: %w", err)
		}
	}
	_, err = b.start("manager", b.binary, append([]string{"manager", "--leader-elect=false", "--laravel-url=" + b.laravel,
		"--laravel-token-file=" + filepath.Join(b.dir, "token"), "--laravel-signing-secret-file=" + filepath.Join(b.dir, "secret")},
		b.common("127.0.0.1:0")...)...)
	return err
}

func (b *bench) startSimulator() error {
	log, err := os.Create(filepath.Join(b.dir, "simulator.log"))
	if err != nil {
		return fmt.Errorf("making a log: %w", err)
	}
	cmd := exec.CommandContext(b.ctx, b.binary, "simulator", "--listen=127.0.0.1:0", "--control-listen=127.0.0.1:0")
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("reading from the simulator: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the simulator: %w", err)
	}
	b.ends = append(b.ends, func() { end(cmd); _ = log.Close() })
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if url, ok := strings.CutPrefix(lines.Text(), "control: "); ok {
			b.control = simulator.Control{URL: url}
			b.info, err = b.control.Info(b.ctx)
			if err != nil {
				return fmt.Errorf("asking the simulator: %w", err)
			}
			return nil
		}
	}
	return errors.New("the simulator did not start; run with -keep and see its log")
}

func (b *bench) common(metrics string) []string {
	return []string{
		"--kubeconfig=" + b.kube, "--namespace=default", "--redis=" + b.redis, "--store=sqlite:" + filepath.Join(b.dir, "keys.db"),
		"--metrics-bind-address=" + metrics, "--health-bind-address=127.0.0.1:0",
	}
}

// start runs a program until the end of the benchmark; its output goes to a log.
func (b *bench) start(name, program string, args ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(filepath.Join(b.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a log: %w", err)
	}
	cmd := exec.CommandContext(b.ctx, program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s: %w", name, err), log.Close())
	}
	b.ends = append(b.ends, func() { end(cmd); _ = log.Close() })
	return cmd, nil
}

func end(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func (b *bench) startWorker() (*exec.Cmd, string, error) {
	port, err := freePort()
	if err != nil {
		return nil, "", err
	}
	metrics := net.JoinHostPort("127.0.0.1", port)
	cmd, err := b.start("worker", b.binary, append([]string{"worker", "--name=bench", "--state-dir=" + filepath.Join(b.dir, "state"),
		fmt.Sprintf("--capacity=%d", b.sessions), "--pairings-per-second=200", "--pairing-burst=200",
		"--whatsapp-endpoint=" + b.info.Endpoint, "--whatsapp-noise-root=" + b.info.NoiseRoot}, b.common(metrics)...)...)
	return cmd, metrics, err
}

func (b *bench) measureWorker(r *result) error {
	cmd, metrics, err := b.startWorker()
	if err != nil {
		return err
	}
	empty, err := b.goroutines(metrics)
	if err != nil {
		return err
	}
	if err := b.pair(); err != nil {
		return err
	}
	b.say("starting the worker anew, in place")
	before, err := b.control.Stats(b.ctx)
	if err != nil {
		return fmt.Errorf("asking the simulator: %w", err)
	}
	end(cmd)
	if cmd, metrics, err = b.startWorker(); err != nil {
		return err
	}
	if err := b.connected(before.Logins); err != nil {
		return err
	}
	m, err := b.measure(cmd.Process.Pid)
	if err != nil {
		return err
	}
	r.RSS, r.IdleCPU, r.LoginCPU = m.rss, m.idleCPU, m.loginCPU
	full, err := b.goroutines(metrics)
	if err != nil {
		return err
	}
	r.GoroutinesPerSession = (full - empty) / float64(b.sessions)
	end(cmd)
	return nil
}

// wave is how many sessions are paired at a time: a code lives a minute, and a
// pairing costs a tenth of a second.
const wave = 50

// pair applies the sessions, scans their codes, and waits until all are connected.
func (b *bench) pair() error {
	b.say("applying %d sessions and scanning their codes", b.sessions)
	for first := 0; first < b.sessions; first += wave {
		group, ctx := errgroup.WithContext(b.ctx)
		group.SetLimit(8)
		for i := first; i < min(first+wave, b.sessions); i++ {
			group.Go(func() error { return b.pairOne(ctx, i) })
		}
		if err := group.Wait(); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) pairOne(ctx context.Context, i int) error {
	s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("bench-%05d", i)}}
	if err := b.client.Create(ctx, s); err != nil {
		return fmt.Errorf("applying a session: %w", err)
	}
	scanned := ""
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); {
		if err := b.client.Get(ctx, client.ObjectKeyFromObject(s), s); err != nil {
			return fmt.Errorf("reading a session: %w", err)
		}
		if s.Status.Phase == v1alpha1.PhaseConnected {
			return nil
		}
		if qr := s.Status.QR; qr != nil && qr.Code != scanned {
			scanned = qr.Code
			if _, err := b.control.Scan(ctx, qr.Code, fmt.Sprintf("+3461%07d", i)); err != nil {
				b.say("a code was refused, the next one is scanned: %v", err)
			}
		}
		if err := b.pause(100 * time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("the session %s is still %s after two minutes", s.Name, s.Status.Phase)
}

// connected waits until every session has logged in again since the count was since.
func (b *bench) connected(since int64) error {
	return b.until("sessions connected", 5*time.Minute, func() (int, error) {
		stats, err := b.control.Stats(b.ctx)
		if err != nil || stats.Logins < since+int64(b.sessions) {
			return 0, err
		}
		return stats.Connected, nil
	})
}

func (b *bench) until(what string, patience time.Duration, count func() (int, error)) error {
	deadline, said := time.Now().Add(patience), time.Now()
	for {
		n, err := count()
		if err != nil {
			return err
		}
		if n >= b.sessions {
			return nil
		}
		if time.Since(said) > 15*time.Second {
			b.say("%d of %d %s", n, b.sessions, what)
			said = time.Now()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("only %d of %d %s after %s", n, b.sessions, what, patience)
		}
		if err := b.pause(200 * time.Millisecond); err != nil {
			return err
		}
	}
}

func (b *bench) pause(d time.Duration) error {
	select {
	case <-b.ctx.Done():
		return b.ctx.Err()
	case <-time.After(d):
		return nil
	}
}

type figures struct{ rss, idleCPU, loginCPU float64 }

// measure leaves a process with all its sessions alone, watches its idleness,
// and then drops every socket and counts what coming back costs.
func (b *bench) measure(pid int) (figures, error) {
	var f figures
	b.say("all connected; measuring %s of idleness", b.idle)
	if err := b.pause(b.settle); err != nil {
		return f, err
	}
	before, err := cpu(pid)
	if err != nil {
		return f, err
	}
	if err := b.pause(b.idle); err != nil {
		return f, err
	}
	after, err := cpu(pid)
	if err != nil {
		return f, err
	}
	f.idleCPU = 100 * (after - before).Seconds() / b.idle.Seconds()
	if f.rss, err = rss(pid); err != nil {
		return f, err
	}
	b.say("dropping every socket")
	stats, err := b.control.Stats(b.ctx)
	if err != nil {
		return f, fmt.Errorf("asking the simulator: %w", err)
	}
	if _, err := b.control.Inject(b.ctx, simulator.Fault{Kind: simulator.FaultDrop}); err != nil {
		return f, fmt.Errorf("dropping the sockets: %w", err)
	}
	if err := b.connected(stats.Logins); err != nil {
		return f, err
	}
	if err := b.pause(5 * time.Second); err != nil { // what follows a login belongs to it
		return f, err
	}
	back, err := cpu(pid)
	if err != nil {
		return f, err
	}
	f.loginCPU = float64((back - after).Milliseconds()) / float64(b.sessions)
	return f, nil
}

func (b *bench) measureBare(r *result) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	args := []string{"-role=bare", "-bare-database=" + filepath.Join(b.dir, "bare.db"), "-bare-endpoint=" + b.info.Endpoint,
		"-bare-root=" + b.info.NoiseRoot, "-bare-control=" + b.control.URL}
	b.say("pairing %d bare clients", b.sessions)
	pairing, err := b.start("bare-pairing", self, append(args, fmt.Sprintf("-bare-pair=%d", b.sessions))...)
	if err != nil {
		return err
	}
	if err := pairing.Wait(); err != nil {
		return fmt.Errorf("pairing the bare clients (run with -keep and see bare-pairing.log): %w", err)
	}
	for _, gc := range []string{"100", "50"} {
		b.say("connecting the bare clients with GOGC=%s", gc)
		stats, err := b.control.Stats(b.ctx)
		if err != nil {
			return fmt.Errorf("asking the simulator: %w", err)
		}
		if err := os.Setenv("GOGC", gc); err != nil {
			return fmt.Errorf("setting GOGC: %w", err)
		}
		cmd, err := b.start("bare-"+gc, self, args...)
		if err != nil {
			return err
		}
		if err := b.connected(stats.Logins); err != nil {
			return err
		}
		m, err := b.measure(cmd.Process.Pid)
		if err != nil {
			return err
		}
		if gc == "100" {
			r.BareRSS, r.BareIdleCPU, r.BareLoginCPU = m.rss, m.idleCPU, m.loginCPU
		} else {
			r.BareRSSSameGC = m.rss
		}
		end(cmd)
	}
	return nil
}

// goroutines asks a worker's metrics, once it answers.
func (b *bench) goroutines(address string) (float64, error) {
	for deadline := time.Now().Add(time.Minute); ; {
		n, err := metric(b.ctx, "http://"+address+"/metrics", "go_goroutines")
		if err == nil {
			return n, nil
		}
		if time.Now().After(deadline) {
			return 0, err
		}
		if err := b.pause(200 * time.Millisecond); err != nil {
			return 0, err
		}
	}
}

func metric(ctx context.Context, url, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, fmt.Errorf("asking for metrics: %w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("asking for metrics: %w", err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("there is no metric %s", name)
}

// clockTick is the unit of /proc/PID/stat, 1/100 s on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// cpu is the time that a process has spent, in user and system mode.
func cpu(pid int) (time.Duration, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("reading a process's times: %w", err)
	}
	fields := strings.Fields(string(content[strings.LastIndexByte(string(content), ')')+1:]))
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * clockTick, errors.Join(err1, err2)
}

// rss is a process's resident memory in MB.
func rss(pid int) (float64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("reading a process's memory: %w", err)
	}
	for line := range strings.Lines(string(content)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 64)
			return kb / 1024, err
		}
	}
	return 0, errors.New("the process is gone")
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

// Command failover measures how fast sessions come back when their worker is
// lost, restarted, drained or upgraded, and writes bench/results/failover.json.
//
// Manager and workers are processes of the program as it is shipped, on an API
// server, Redis and PostgreSQL of their own; this process is WhatsApp (the
// simulator, which knows when each device was connected) and Laravel. The same
// sessions go through all parts, one after another:
//
//	rolling  four workers hold them; one by one, a worker of a newer revision
//	         joins and an old one is asked to end
//	drain    one of the four is asked to end
//	gather   all others but one are asked to end: it holds all of them now;
//	         three new ones join, which are given nothing
//	restart  that one is killed and started again in its state folder
//	kill     it is killed for good
//
// A session's gap is the time that its device has been without a connection, as
// the simulator sees it. What is lost are sessions whose last state Laravel has
// not heard when all has come to rest.
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
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/bench/stage"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// result is bench/results/failover.json.
type result struct {
	Sessions       int     `json:"sessions"`
	KillFirst      float64 `json:"kill_first_s"`
	KillLast       float64 `json:"kill_last_s"`
	RestartLast    float64 `json:"restart_in_place_last_s"`
	DrainP50       float64 `json:"drain_gap_p50_s"`
	DrainP99       float64 `json:"drain_gap_p99_s"`
	DrainMax       float64 `json:"drain_gap_max_s"`
	RollingP50     float64 `json:"rolling_gap_p50_s"`
	RollingP99     float64 `json:"rolling_gap_p99_s"`
	RollingMax     float64 `json:"rolling_gap_max_s"`
	RollingMoves   float64 `json:"rolling_moves_per_session"`
	RollingSeconds float64 `json:"rolling_s"`
	// LoginsPerSecond and APIWrites are of the kill: its logins from the first to the
	// last, and the writes at the API server beside the Leases.
	LoginsPerSecond float64 `json:"logins_per_s"`
	APIWrites       float64 `json:"api_writes"`
	Doubled         int64   `json:"doubled"`
	Lost            int     `json:"lost"`
}

// workers is how many hold the sessions.
const workers = 4

type bench struct {
	*stage.Stage
	result
	ctx     context.Context //nolint:containedctx // a program's one context
	phones  *simulator.Server
	store   string
	manager *stage.Process
	fleet   []*stage.Process // the workers that run
	started int              // workers so far
}

func main() {
	var sessions int
	var parts, out string
	var keep bool
	flag.IntVar(&sessions, "sessions", 1000, "how many sessions")
	flag.StringVar(&parts, "parts", allParts, "which parts, in this order; restart and kill follow a gather")
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

const allParts = "rolling,drain,gather,restart,kill"

func run(ctx context.Context, sessions int, names []string, out string, keep bool) (err error) {
	s, err := stage.New(ctx, "failover", keep)
	defer func() { err = errors.Join(err, s.Close()) }()
	if err != nil {
		return err
	}
	b := &bench{Stage: s, ctx: ctx, result: result{Sessions: sessions}}
	stop, err := b.startPhones()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	known := map[string]func() error{"rolling": b.roll, "drain": b.drain, "gather": b.gather, "restart": b.restart, "kill": b.kill}
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
	stats := b.phones.Stats()
	b.Doubled = stats.Doubled
	b.show()
	if strings.Join(names, ",") == allParts { // figures that were not measured are not written
		if err := stage.Write(out, b.result); err != nil {
			return err
		}
	}
	switch {
	case b.Doubled > 0:
		return fmt.Errorf("%d connections were doubled: %v", b.Doubled, b.phones.Doubled())
	case b.Lost > 0:
		return fmt.Errorf("%d updates were lost", b.Lost)
	case len(b.Laravel.Faults()) > 0:
		return fmt.Errorf("Laravel was sent what it must not be: %s", strings.Join(b.Laravel.Faults(), "; "))
	case len(stats.Unknown) > 0:
		return fmt.Errorf("the simulator was asked what it does not know: %v", stats.Unknown)
	}
	return nil
}

func (b *bench) startPhones() (stop func() error, err error) {
	if b.phones, err = simulator.New(simulator.Options{}); err != nil {
		return nil, fmt.Errorf("starting the simulator: %w", err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.ctx))
	ended := make(chan error, 1)
	go func() { ended <- b.phones.Run(ctx) }()
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
	// Nothing is moved for balance: a new worker must not take from what is measured.
	if b.manager, err = b.Manager(b.store, "--rebalance=false"); err != nil {
		return err
	}
	stage.Say("starting %d workers", workers)
	for range workers {
		if err := b.hire(1); err != nil {
			return err
		}
	}
	return nil
}

// hire starts a worker under a new name and waits until the manager counts it:
// it is then as far as a pod that a rolling upgrade calls ready.
func (b *bench) hire(revision int) error {
	b.started++
	w, err := b.worker(fmt.Sprintf("worker-%d", b.started), revision)
	if err != nil {
		return err
	}
	b.fleet = append(b.fleet, w)
	return stage.Until(b.ctx, "workers have joined", time.Minute, 50*time.Millisecond, func() (int, int, error) {
		m, err := b.manager.Metrics(b.ctx)
		return int(m.Sum("whatsapp_operator_workers", stage.Labels{"state": "live"})), len(b.fleet), errors.Join(err, w.Running())
	})
}

// worker starts a worker; under a known name it is the same one restarted.
func (b *bench) worker(name string, revision int) (*stage.Process, error) {
	args := append([]string{
		"worker", "--name=" + name, "--state-dir=" + filepath.Join(b.Dir, name),
		fmt.Sprintf("--capacity=%d", b.Sessions), fmt.Sprintf("--revision=%d", revision),
		"--pairings-per-second=200", "--pairing-burst=200", // the pairings are not measured
		"--whatsapp-endpoint=" + b.phones.Info().Endpoint, "--whatsapp-noise-root=" + b.phones.Info().NoiseRoot,
	}, b.Common(b.store)...)
	return b.Start(name, b.Binary, args...)
}

// wave is how many sessions are paired at a time: a code lives a minute, and a
// pairing costs a tenth of a second.
const wave = 50

// pair applies the sessions, scans their codes, and waits until all are connected.
func (b *bench) pair() error {
	stage.Say("applying %d sessions and scanning their codes", b.Sessions)
	for first := 0; first < b.Sessions; first += wave {
		group, ctx := errgroup.WithContext(b.ctx)
		group.SetLimit(8)
		for i := first; i < min(first+wave, b.Sessions); i++ {
			group.Go(func() error { return b.pairOne(ctx, i) })
		}
		if err := group.Wait(); err != nil {
			return err
		}
	}
	return b.settled()
}

func (b *bench) name(i int) string { return fmt.Sprintf("bench-%05d", i) }

func (b *bench) pairOne(ctx context.Context, i int) error {
	s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: stage.Namespace, Name: b.name(i)}}
	if err := b.Client.Create(ctx, s); err != nil {
		return fmt.Errorf("applying a session: %w", err)
	}
	scanned := ""
	return stage.Until(ctx, "sessions of "+s.Name+" connected", 3*time.Minute, 100*time.Millisecond, func() (int, int, error) {
		if err := b.Client.Get(ctx, client.ObjectKeyFromObject(s), s); err != nil {
			return 0, 1, fmt.Errorf("reading a session: %w", err)
		}
		if s.Status.Phase == v1alpha1.PhaseConnected {
			return 1, 1, nil
		}
		if qr := s.Status.QR; qr != nil && qr.Code != scanned {
			scanned = qr.Code
			if _, err := b.phones.Scan(ctx, qr.Code, fmt.Sprintf("+3461%07d", i)); err != nil {
				stage.Say("a code was refused, the next one is scanned: %v", err)
			}
		}
		return 0, 1, nil
	})
}

// settled waits until everything rests: all are connected, and Laravel knows it.
// What it does not hear is counted as lost.
func (b *bench) settled() error {
	for deadline := time.Now().Add(time.Minute); ; {
		unheard, err := b.unheard()
		if err != nil {
			return err
		}
		if len(unheard) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			stage.Say("Laravel has not heard of %d sessions: %s …", len(unheard), unheard[0])
			b.Lost += len(unheard)
			return nil
		}
		if err := stage.Pause(b.ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// unheard lists the sessions of which Laravel's last word is not the present one.
func (b *bench) unheard() (names []string, err error) {
	var list v1alpha1.WhatsAppSessionList
	if err := b.Client.List(b.ctx, &list, client.InNamespace(stage.Namespace)); err != nil {
		return nil, fmt.Errorf("listing the sessions: %w", err)
	}
	for i := range list.Items {
		s := &list.Items[i]
		heard := b.Laravel.Status(s.SessionID())
		if s.Status.Phase != v1alpha1.PhaseConnected || heard.Status != delivery.Active || heard.Epoch != s.Status.Epoch {
			names = append(names, s.Name)
		}
	}
	return names, nil
}

// moment is what the simulator knew of the devices.
type moment struct {
	at      time.Time
	devices map[string]simulator.Device
}

func (b *bench) look() moment {
	m := moment{at: time.Now(), devices: map[string]simulator.Device{}}
	for _, d := range b.phones.Devices() {
		m.devices[d.JID] = d
	}
	return m
}

// back waits until all are connected, and returns what has become of those that
// have logged in since. all: that is to be every one.
func (b *bench) back(since moment, all bool) (change, error) {
	var c change
	err := stage.Until(b.ctx, "sessions are back", 5*time.Minute, 50*time.Millisecond, func() (int, int, error) {
		c = since.compare(b.look())
		if all {
			return min(c.connected, len(c.logins)), b.Sessions, b.manager.Running()
		}
		return c.connected, b.Sessions, b.manager.Running()
	})
	return c, err
}

// change is what lies between two moments.
type change struct {
	connected int
	// moves counts the logins. logins are the times of the last one of each device that
	// has logged in again, gaps how long it was away.
	moves  int64
	logins []time.Duration
	gaps   []time.Duration
}

// compare is pure.
func (m moment) compare(later moment) (c change) {
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

// percentile is the smallest of the values that p percent of them do not
// exceed, in seconds; 0 without values. They are in order of size.
func percentile(values []time.Duration, p int) float64 {
	if len(values) == 0 {
		return 0
	}
	return values[max(0, (len(values)*p+99)/100-1)].Seconds()
}

// retireTimeout bounds the clean end of a worker.
const retireTimeout = 2 * time.Minute

// retire asks the oldest worker to end and waits until it has.
func (b *bench) retire() error {
	w := b.fleet[0]
	b.fleet = b.fleet[1:]
	if err := w.Ask(); err != nil {
		return err
	}
	return w.Ended(b.ctx, retireTimeout)
}

func (b *bench) roll() error {
	stage.Say("upgrading the %d workers one by one", workers)
	before := b.look()
	for range workers {
		if err := b.hire(2); err != nil {
			return err
		}
		if err := b.retire(); err != nil {
			return err
		}
	}
	c, err := b.back(before, true)
	if err != nil {
		return err
	}
	b.RollingSeconds = time.Since(before.at).Seconds()
	b.RollingP50, b.RollingP99, b.RollingMax = percentile(c.gaps, 50), percentile(c.gaps, 99), percentile(c.gaps, 100)
	b.RollingMoves = float64(c.moves) / float64(b.Sessions)
	return b.settled()
}

func (b *bench) drain() error {
	before := b.look()
	stage.Say("draining one of the %d workers", workers)
	if err := b.retire(); err != nil {
		return err
	}
	c, err := b.back(before, false)
	if err != nil {
		return err
	}
	if len(c.gaps) == 0 {
		return errors.New("the drained worker held nothing")
	}
	stage.Say("%d sessions moved", len(c.gaps))
	b.DrainP50, b.DrainP99, b.DrainMax = percentile(c.gaps, 50), percentile(c.gaps, 99), percentile(c.gaps, 100)
	return b.settled()
}

// gather brings all sessions to one worker, with three empty ones beside it.
func (b *bench) gather() error {
	stage.Say("gathering all sessions on one worker")
	before := b.look()
	for len(b.fleet) > 1 {
		if err := b.retire(); err != nil {
			return err
		}
	}
	if _, err := b.back(before, false); err != nil {
		return err
	}
	for range workers - 1 {
		if err := b.hire(2); err != nil {
			return err
		}
	}
	if err := b.settled(); err != nil {
		return err
	}
	// What the logins left behind is none of the next part's.
	return stage.Pause(b.ctx, 10*time.Second)
}

func (b *bench) restart() error {
	stage.Say("killing the worker and starting it again in its state folder")
	w := b.fleet[0]
	before := b.look()
	w.Kill()
	again, err := b.worker(w.Name, 2)
	if err != nil {
		return err
	}
	b.fleet[0] = again
	c, err := b.back(before, true)
	if err != nil {
		return err
	}
	b.RestartLast = percentile(c.logins, 100)
	stage.Say("the first was back after %.1f s, the last after %.1f s", percentile(c.logins, 0), b.RestartLast)
	if err := b.settled(); err != nil {
		return err
	}
	return stage.Pause(b.ctx, 10*time.Second)
}

func (b *bench) kill() error {
	stage.Say("killing the worker for good")
	counted, err := b.APIServer()
	if err != nil {
		return err
	}
	before := b.look()
	b.fleet[0].Kill()
	spent, err := stage.Spent()
	if err != nil {
		return err
	}
	c, err := b.back(before, true)
	if err != nil {
		return err
	}
	b.KillFirst, b.KillLast = percentile(c.logins, 0), percentile(c.logins, 100)
	b.LoginsPerSecond = float64(c.moves) / (b.KillLast - b.KillFirst)
	stage.Say("the first was back after %.1f s, the last after %.1f s", b.KillFirst, b.KillLast)
	if err := stage.SaySpent(spent); err != nil {
		return err
	}
	if err := b.settled(); err != nil {
		return err
	}
	after, err := b.APIServer()
	if err != nil {
		return err
	}
	b.APIWrites = after.Writes() - counted.Writes()
	after.SayRequests(counted, float64(b.Sessions)/10)
	return nil
}

func (b *bench) show() {
	fmt.Printf("\n%d sessions, PostgreSQL\n\n", b.Sessions)
	row := func(name, format string, value float64, target string) {
		fmt.Printf("%-56s %10s  %s\n", name, fmt.Sprintf(format, value), target)
	}
	row("killed: the first is back elsewhere, s", "%.1f", b.KillFirst, "")
	row("  the last, s", "%.1f", b.KillLast, "≤ 30")
	row("  logins a second", "%.0f", b.LoginsPerSecond, "")
	row("  API writes", "%.0f", b.APIWrites, "")
	row("restarted in place: the last is back, s", "%.1f", b.RestartLast, "≤ 8")
	row("drained: gap p50, s", "%.2f", b.DrainP50, "")
	row("  p99", "%.2f", b.DrainP99, "")
	row("  max", "%.2f", b.DrainMax, "")
	row("all upgraded one by one: gap p50, s", "%.2f", b.RollingP50, "")
	row("  p99", "%.2f", b.RollingP99, "≤ 2")
	row("  max", "%.2f", b.RollingMax, "")
	row("  moves a session", "%.3f", b.RollingMoves, "1")
	row("  from the first new worker to the last session, s", "%.1f", b.RollingSeconds, "")
	row("doubled connections", "%.0f", float64(b.Doubled), "0")
	row("updates lost at Laravel", "%.0f", float64(b.Lost), "0")
}

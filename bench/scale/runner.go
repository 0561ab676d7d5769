package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

// result is bench/results/scale.json.
type result struct {
	Sessions int `json:"sessions"`
	// Applied is how long the generator took, before the manager started.
	Applied float64 `json:"applied_s"`
	Placed  float64 `json:"placed_s"`
	// Connected is the time until the last session was connected, the workers' restart included.
	Connected        float64 `json:"connected_s"`
	RawPatch         float64 `json:"raw_patch_s"`
	PlacedOverRaw    float64 `json:"placed_over_raw"`
	WritesPerSession float64 `json:"manager_writes_per_session"`
	// RSS is the highest memory of the manager, RSSSteady the memory at the end.
	RSS          float64 `json:"manager_rss_mb"`
	RSSSteady    float64 `json:"manager_steady_rss_mb"`
	CPU          float64 `json:"manager_cpu_s"`
	ReconcileP99 float64 `json:"reconcile_p99_ms"`
	SteadyWrites float64 `json:"steady_writes_per_s"`
	Placement    float64 `json:"placement_10000_ms"`
}

// figures are the values that the checker compares.
func (r *result) figures() map[string]float64 {
	return map[string]float64{
		"sessions": float64(r.Sessions), "applied_s": r.Applied, "placed_s": r.Placed, "connected_s": r.Connected,
		"raw_patch_s": r.RawPatch, "placed_over_raw": r.PlacedOverRaw, "manager_writes_per_session": r.WritesPerSession,
		"manager_rss_mb": r.RSS, "manager_steady_rss_mb": r.RSSSteady, "manager_cpu_s": r.CPU,
		"reconcile_p99_ms": r.ReconcileP99, "steady_writes_per_s": r.SteadyWrites, "placement_10000_ms": r.Placement,
	}
}

// sessionController is the manager's controller for sessions.
var sessionController = benchenv.Labels{"controller": "whatsappsession"}

// run is the benchmark.
func run(ctx context.Context, o options) (err error) {
	l, err := readLoad(o.load)
	if err != nil {
		return err
	}
	ranges, err := readRanges(o.ranges)
	if err != nil {
		return err
	}
	if o.sessions > 0 {
		l.Sessions, l.Capacity = o.sessions, o.sessions*21/20/l.Workers+1
	}
	s, err := benchenv.New(ctx, "scale", o.keep)
	defer func() { err = errors.Join(err, s.Close()) }()
	if err != nil {
		return err
	}
	r := &runner{Environment: s, ctx: ctx, load: l}
	r.Sessions = l.Sessions
	r.Placement = milliseconds(placementTime())
	for _, part := range []func() error{r.start, r.place, r.rest, r.raw} {
		if err := part(); err != nil {
			return err
		}
	}
	r.PlacedOverRaw = r.Placed / r.RawPatch
	r.show()
	if err := benchenv.Write(o.out, r.result); err != nil {
		return err
	}
	if o.sessions > 0 {
		return nil
	}
	if wrong := check(r.figures(), ranges); len(wrong) > 0 {
		return fmt.Errorf("out of range:\n  %s", strings.Join(wrong, "\n  "))
	}
	return nil
}

type runner struct {
	*benchenv.Environment
	result
	load     load
	ctx      context.Context //nolint:containedctx // a program's one context
	store    string
	manager  *benchenv.Process
	workers  []*benchenv.Process
	recorder *recorder
	stop     func() // stops the recorder
	written  writes
}

// start starts a manager, which prepares the database, and the workers, waits until all
// workers have joined, and stops the manager.
func (r *runner) start() error {
	store, err := r.Postgres()
	if err != nil {
		return err
	}
	r.store = store
	if r.manager, err = r.Manager(store); err != nil {
		return err
	}
	benchenv.Print("starting %d workers", r.load.Workers)
	if err := r.startWorkers(fmt.Sprintf("--pairings-per-second=%g", r.load.Pairings), "--pairing-burst=1"); err != nil {
		return err
	}
	err = benchenv.WaitUntil(r.ctx, "workers have joined", time.Minute, 200*time.Millisecond, func() (int, int, error) {
		m, err := r.manager.Metrics(r.ctx)
		return int(m.Sum("whatsapp_operator_workers", benchenv.Labels{"state": "live"})), r.load.Workers, err
	})
	if err != nil {
		return err
	}
	r.manager.Terminate()
	return r.manager.WaitUntilEnded(r.ctx, time.Minute)
}

// startWorkers starts the workers. If they already run, it kills them and restarts them in
// place.
func (r *runner) startWorkers(more ...string) error {
	for _, w := range r.workers {
		w.Kill()
	}
	r.workers = nil
	for i := range r.load.Workers {
		name := fmt.Sprintf("worker-%d", i)
		args := append([]string{"worker", "--name=" + name, "--state-dir=" + filepath.Join(r.Dir, name),
			fmt.Sprintf("--capacity=%d", r.load.Capacity)}, r.Common(r.store)...)
		w, err := r.StartServing(name, "", append(args, more...)...)
		if err != nil {
			return err
		}
		r.workers = append(r.workers, w)
	}
	return nil
}

// place applies the sessions, starts the manager and waits until all are placed,
// and then until all are connected.
func (r *runner) place() error {
	g := &generator{load: r.load, client: r.Client, prefix: "scale"}
	if err := g.prepare(r.ctx); err != nil {
		return err
	}
	var err error
	if r.recorder, r.stop, err = record(r.ctx, r.Config, g.prefix); err != nil {
		return err
	}
	benchenv.Print("applying %d sessions", r.load.Sessions)
	begun := time.Now()
	if _, err := g.apply(r.ctx); err != nil {
		return err
	}
	r.Applied = time.Since(begun).Seconds()
	benchenv.Print("applied in %.1f s; starting the manager", r.Applied)
	before, err := r.APIServer()
	if err != nil {
		return err
	}
	spent, err := benchenv.CPUTimes()
	if err != nil {
		return err
	}
	begun = time.Now()
	if r.manager, err = r.Manager(r.store); err != nil {
		return err
	}
	var t progress
	waitUntil := func(what string, timeout time.Duration, count func() int) error {
		return benchenv.WaitUntil(r.ctx, what, timeout, 100*time.Millisecond, func() (int, int, error) {
			if t, err = r.recorder.progress(); err == nil {
				err = r.manager.Running()
			}
			return count(), r.load.Sessions, err
		})
	}
	if err := waitUntil("sessions placed", 20*time.Minute, func() int { return t.placed }); err != nil {
		return err
	}
	r.Placed = t.lastPlaced.Sub(begun).Seconds()
	benchenv.Print("placed in %.1f s", r.Placed)
	if err := benchenv.PrintCPUTimes(spent); err != nil {
		return err
	}
	if err := r.count(before); err != nil {
		return err
	}
	if err := r.startWorkers(); err != nil {
		return err
	}
	if err := waitUntil("sessions connected", 20*time.Minute, func() int { return t.connected }); err != nil {
		return err
	}
	r.Connected = t.lastConnected.Sub(begun).Seconds()
	benchenv.Print("connected in %.1f s", r.Connected)
	return nil
}

// count counts the manager's writes that were not refused, by the manager's own metrics. The
// finalizers among them are counted by the API server, because no worker writes any.
func (r *runner) count(before benchenv.Metrics) error {
	after, err := r.APIServer()
	if err != nil {
		return err
	}
	own, err := r.manager.Metrics(r.ctx)
	if err != nil {
		return err
	}
	after.PrintRequests(before, float64(r.load.Sessions)/100)
	sent := benchenv.Labels{"method": "PATCH", "code": "200"}
	finalizers := benchenv.Labels{"verb": "PATCH", "code": "200", "resource": "whatsappsessions", "subresource": ""}
	all := own.Sum("rest_client_requests_total", sent)
	r.written.finalizer = int(after.Sum("apiserver_request_total", finalizers) - before.Sum("apiserver_request_total", finalizers))
	r.written.status = int(all) - r.written.finalizer
	r.WritesPerSession = all / float64(r.load.Sessions)
	r.ReconcileP99 = 1000 * own.Quantile(0.99, "controller_runtime_reconcile_time_seconds", sessionController, nil)
	for _, code := range []string{"409", "429", "500", "504"} {
		refused := benchenv.Labels{"method": "PATCH", "code": code}
		if n := own.Sum("rest_client_requests_total", refused); n > 0 {
			benchenv.Print("the manager got %s %.0f times", code, n)
		}
	}
	benchenv.Print("the manager wrote %d finalizers and %d statuses", r.written.finalizer, r.written.status)
	return nil
}

// rest waits until everything is idle, and counts the writes that still happen.
func (r *runner) rest() error {
	benchenv.Print("waiting %s, then counting writes for %s", r.load.Settle.Duration, r.load.Steady.Duration)
	if err := benchenv.Pause(r.ctx, r.load.Settle.Duration); err != nil {
		return err
	}
	before, err := r.APIServer()
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := benchenv.Pause(r.ctx, r.load.Steady.Duration); err != nil {
		return err
	}
	after, err := r.APIServer()
	if err != nil {
		return err
	}
	r.SteadyWrites = (after.Writes() - before.Writes()) / time.Since(begun).Seconds()
	if r.RSSSteady, r.RSS, err = r.manager.RSS(); err != nil {
		return err
	}
	spent, err := r.manager.CPU()
	r.CPU = spent.Seconds()
	return err
}

// raw stops everything but the API server and makes the manager's writes again with a bare client.
func (r *runner) raw() error {
	r.stop()
	for _, w := range append(r.workers, r.manager) {
		w.Kill() // their state is not needed any more
	}
	g := &generator{load: r.load, client: r.Client, prefix: "raw"}
	if err := g.prepare(r.ctx); err != nil {
		return err
	}
	benchenv.Print("applying %d sessions for the bare client", r.load.Sessions)
	sessions, err := g.apply(r.ctx)
	if err != nil {
		return err
	}
	benchenv.Print("making the manager's writes with a bare client")
	before, err := benchenv.CPUTimes()
	if err != nil {
		return err
	}
	spent, err := rawPatch(r.ctx, r.Client, sessions, r.written, r.load.Workers)
	if err != nil {
		return err
	}
	r.RawPatch = spent.Seconds()
	return benchenv.PrintCPUTimes(before)
}

func (r *runner) show() {
	fmt.Printf("\n%d sessions on %d workers\n\n", r.load.Sessions, r.load.Workers)
	row := func(name, format string, value float64) { fmt.Printf("%-52s %10s\n", name, fmt.Sprintf(format, value)) }
	row("applied, s", "%.1f", r.Applied)
	row("all placed, s", "%.1f", r.Placed)
	row("  the same writes by a bare client, s", "%.1f", r.RawPatch)
	row("  ratio", "%.2f", r.PlacedOverRaw)
	row("  the manager's writes per session", "%.2f", r.WritesPerSession)
	row("all connected, s", "%.1f", r.Connected)
	row("manager's highest memory, MB", "%.0f", r.RSS)
	row("manager's memory at the end, MB", "%.0f", r.RSSSteady)
	row("manager's CPU time, s", "%.1f", r.CPU)
	row("reconciling a session, p99, ms", "%.1f", r.ReconcileP99)
	row("API writes per second when idle", "%.2f", r.SteadyWrites)
	row("placement of 10,000 on 100 workers, ms", "%.1f", r.Placement)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// placementTime is the median time of a plan for 10,000 new sessions in 50
// namespaces on 100 workers.
func placementTime() time.Duration {
	snapshot := placement.Snapshot{Now: time.Now()}
	for i := range 100 {
		snapshot.Workers = append(snapshot.Workers, placement.Worker{
			Name: fmt.Sprintf("worker-%d", i), Pool: v1alpha1.DefaultPool, Capacity: 200, Tokens: 200, Live: true,
		})
	}
	for i := range 10_000 {
		snapshot.Sessions = append(snapshot.Sessions, placement.Session{
			UID: types.UID(fmt.Sprintf("uid-%d", i)), Namespace: fmt.Sprintf("tenant-%d", i%50), Created: time.Unix(int64(i), 0), Wanted: true,
		})
	}
	times := make([]time.Duration, 21)
	for i := range times {
		begun := time.Now()
		if plan := placement.Make(snapshot); len(plan.Moves) != len(snapshot.Sessions) {
			panic("a plan does not place every session")
		}
		times[i] = time.Since(begun)
	}
	slices.Sort(times)
	return times[len(times)/2]
}

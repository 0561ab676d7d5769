package benchenv

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// Fleet is a manager and workers with a PostgreSQL and a simulated WhatsApp of their own.
type Fleet struct {
	*Environment
	// Size is the number of sessions.
	Size      int
	Simulator *simulator.Server
	// Store is the URL of the database.
	Store   string
	Manager *Process
	// WorkerFlags are added to the flags of each worker.
	WorkerFlags []string
	// Workers are the running ones, the oldest first.
	Workers []*Process
	// Undelivered counts the states that Laravel did not receive.
	Undelivered int
	started     int // the number of workers started so far
}

// NewFleet starts PostgreSQL and the simulator, and no process of the program.
func (e *Environment) NewFleet(sessions int) (*Fleet, error) {
	store, err := e.Postgres()
	if err != nil {
		return nil, err
	}
	return e.NewFleetOver(store, sessions)
}

// NewFleetOver is NewFleet with a database that runs already.
func (e *Environment) NewFleetOver(store string, sessions int) (*Fleet, error) {
	f := &Fleet{Environment: e, Size: sessions, Store: store}
	var err error
	if f.Simulator, err = simulator.New(simulator.Options{}); err != nil {
		return nil, fmt.Errorf("starting the simulator: %w", err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(e.ctx))
	ended := make(chan error, 1)
	go func() { ended <- f.Simulator.Run(ctx) }()
	e.ends = append(e.ends, func() error {
		cancel()
		if err := <-ended; err != nil {
			return fmt.Errorf("running the simulator: %w", err)
		}
		return nil
	})
	return f, nil
}

// StartManager starts a manager of a program.
func (f *Fleet) StartManager(program string) (err error) {
	// No rebalancing: a new worker must not take sessions that are measured.
	f.Manager, err = f.managerOf(program, f.Store, "--rebalance=false")
	return err
}

// StartWorker starts a worker of a program under a new name and waits until the manager
// counts it as live: then it is as ready as a ready pod in a rolling upgrade.
func (f *Fleet) StartWorker(program string, revision int) error {
	f.started++
	w, err := f.RunWorker(program, fmt.Sprintf("worker-%d", f.started), revision)
	if err != nil {
		return err
	}
	f.Workers = append(f.Workers, w)
	return WaitUntil(f.ctx, "workers have joined", time.Minute, 50*time.Millisecond, func() (int, int, error) {
		m, err := f.Manager.Metrics(f.ctx)
		return int(m.Sum("whatsapp_operator_workers", Labels{"state": "live"})), len(f.Workers), errors.Join(err, w.Running())
	})
}

// RunWorker starts a worker; with a name that was used before, that worker is restarted.
func (f *Fleet) RunWorker(program, name string, revision int) (*Process, error) {
	args := append([]string{
		"worker", "--name=" + name, "--state-dir=" + filepath.Join(f.Dir, name),
		fmt.Sprintf("--capacity=%d", f.Size), fmt.Sprintf("--revision=%d", revision),
		"--pairings-per-second=200", "--pairing-burst=200", // the pairings are not measured
		"--whatsapp-endpoint=" + f.Simulator.Info().Endpoint, "--whatsapp-noise-root=" + f.Simulator.Info().NoiseRoot,
	}, f.Common(f.Store)...)
	return f.StartServing(name, program, append(args, f.WorkerFlags...)...)
}

// stopTimeout is how long a worker may take to end.
const stopTimeout = 2 * time.Minute

// StopWorker asks the oldest worker to end and waits until it has.
func (f *Fleet) StopWorker() error {
	w := f.Workers[0]
	f.Workers = f.Workers[1:]
	w.Terminate()
	return w.WaitUntilEnded(f.ctx, stopTimeout)
}

// RollWorkers replaces the workers one by one, as a Deployment with maxSurge 1 and
// maxUnavailable 0 does.
func (f *Fleet) RollWorkers(program string, revision int) error {
	for range len(f.Workers) {
		if err := f.StartWorker(program, revision); err != nil {
			return err
		}
		if err := f.StopWorker(); err != nil {
			return err
		}
	}
	return nil
}

// PairAll applies the sessions, scans their codes, and waits until all are connected and Laravel
// knows it.
func (f *Fleet) PairAll() error {
	err := f.Pair(0, f.Size, func(ctx context.Context, code, phone string) error {
		_, err := f.Simulator.Scan(ctx, code, phone)
		return err
	})
	if err != nil {
		return err
	}
	return f.WaitUntilDelivered()
}

// WaitUntilDelivered waits until all sessions are connected and Laravel has these states.
// States that Laravel does not receive are counted as lost.
func (f *Fleet) WaitUntilDelivered() error {
	for deadline := time.Now().Add(time.Minute); ; {
		outdated, err := f.outdated()
		if err != nil {
			return err
		}
		if len(outdated) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			Print("Laravel has an old status of %d sessions: %s …", len(outdated), outdated[0])
			f.Undelivered += len(outdated)
			return nil
		}
		if err := Pause(f.ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// outdated lists the sessions of which Laravel does not have the present status.
func (f *Fleet) outdated() (names []string, err error) {
	sessions, err := f.List()
	if err != nil {
		return nil, err
	}
	for i := range sessions {
		s := &sessions[i]
		received := f.Laravel.Status(s.SessionID())
		if s.Status.Phase != v1alpha1.PhaseConnected || received.Status != delivery.Active || received.Epoch != s.Status.Epoch {
			names = append(names, s.Name)
		}
	}
	return names, nil
}

// List returns the sessions.
func (f *Fleet) List() ([]v1alpha1.WhatsAppSession, error) {
	var list v1alpha1.WhatsAppSessionList
	if err := f.Client.List(f.ctx, &list, client.InNamespace(Namespace)); err != nil {
		return nil, fmt.Errorf("listing the sessions: %w", err)
	}
	return list.Items, nil
}

// Snapshot is the state of the simulator's devices at a time.
type Snapshot struct {
	At      time.Time
	devices map[string]simulator.Device
}

// Observe takes a snapshot.
func (f *Fleet) Observe() Snapshot { return snapshot(time.Now(), f.Simulator.Devices()) }

func snapshot(at time.Time, devices []simulator.Device) Snapshot {
	s := Snapshot{At: at, devices: map[string]simulator.Device{}}
	for _, d := range devices {
		s.devices[d.JID] = d
	}
	return s
}

// Change is the difference between two snapshots.
type Change struct {
	Connected int
	// Moves counts the logins. For each device that has logged in again, Logins has the time
	// of its last login, and Gaps how long it was not connected.
	Moves  int64
	Logins []time.Duration
	Gaps   []time.Duration
}

// compare is pure.
func (s Snapshot) compare(later Snapshot) (c Change) {
	for jid, d := range later.devices {
		before := s.devices[jid]
		if d.Connected {
			c.Connected++
		}
		if d.Logins > before.Logins {
			c.Moves += d.Logins - before.Logins
			c.Logins = append(c.Logins, d.LoggedIn.Sub(s.At))
			c.Gaps = append(c.Gaps, d.Away-before.Away)
		}
	}
	slices.Sort(c.Logins)
	slices.Sort(c.Gaps)
	return c
}

// WaitUntilBack waits until all sessions are connected, and returns the changes since the
// snapshot. With all, every session must have logged in since then.
func (f *Fleet) WaitUntilBack(since Snapshot, all bool) (Change, error) {
	var c Change
	err := WaitUntil(f.ctx, "sessions are back", 5*time.Minute, 50*time.Millisecond, func() (int, int, error) {
		c = since.compare(f.Observe())
		if all {
			return min(c.Connected, len(c.Logins)), f.Size, f.Manager.Running()
		}
		return c.Connected, f.Size, f.Manager.Running()
	})
	return c, err
}

// Percentile is the smallest value that p percent of the values do not exceed, in seconds;
// 0 without values. The values are sorted.
func Percentile(values []time.Duration, p int) float64 {
	if len(values) == 0 {
		return 0
	}
	return values[max(0, (len(values)*p+99)/100-1)].Seconds()
}

// Failures returns an error if a rule was broken that holds whatever is measured.
func (f *Fleet) Failures() error {
	stats := f.Simulator.Stats()
	switch {
	case stats.Doubled > 0:
		return fmt.Errorf("%d connections were doubled: %v", stats.Doubled, f.Simulator.Doubled())
	case f.Undelivered > 0:
		return fmt.Errorf("%d updates were lost", f.Undelivered)
	case len(f.Laravel.Breaches()) > 0:
		return fmt.Errorf("requests to Laravel broke the contract: %s", strings.Join(f.Laravel.Breaches(), "; "))
	case len(stats.Unknown) > 0:
		return fmt.Errorf("the simulator got unknown requests: %v", stats.Unknown)
	}
	return nil
}

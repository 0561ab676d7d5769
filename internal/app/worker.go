package app

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/kube"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/publish"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

func newWorkerCommand() *cobra.Command {
	return workerCommand(func(whatsApp worker.Accounts) worker.Accounts { return whatsApp })
}

// NewWorkerCommand is the worker command with these accounts instead of WhatsApp's: a
// benchmark holds more sessions than one machine can hold connections.
func NewWorkerCommand(accounts worker.Accounts) *cobra.Command {
	return workerCommand(func(worker.Accounts) worker.Accounts { return accounts })
}

// workerCommand is the worker command with the accounts that a function makes of WhatsApp's.
func workerCommand(accounts func(worker.Accounts) worker.Accounts) *cobra.Command {
	config := &workerConfig{accounts: accounts}
	cmd := configured(&cobra.Command{
		Use:   "worker",
		Short: "Hold the connections of the sessions that are placed here",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return startProcess(cmd, &config.commonConfig, config.complete, func(ctx context.Context, log logr.Logger, p *probes) error {
				return runWorker(ctx, config, p, log.WithValues("worker", config.Name))
			})
		},
	}, checkUnlessMissing(&config.commonConfig, config.complete))
	config.bind(cmd.Flags())
	return cmd
}

// reportLibrary logs and publishes how old the WhatsApp client library is.
func reportLibrary(clk clock.PassiveClock, log logr.Logger) error {
	version, built, err := whatsapp.Library()
	if err != nil {
		log.Info("Failed to determine the age of the WhatsApp client library", "version", version, "reason", err.Error())
		return nil
	}
	log.Info("Using the WhatsApp client library", "version", version, "ageDays", int(clk.Since(built).Hours()/24))
	return metrics.RegisterLibraryAge(built, clk.Now)
}

func runWorker(ctx context.Context, config *workerConfig, probes *probes, log logr.Logger) (err error) {
	if _, set := os.LookupEnv("GOGC"); !set {
		debug.SetGCPercent(config.GCPercent)
	}
	limitMemory(memlimit.FromCgroup, log)
	incarnation, err := membership.OpenIncarnation(config.StateDir)
	if err != nil {
		return err
	}
	defer closing(incarnation, &err)

	d, err := openDependencies(ctx, &config.commonConfig, redis.Worker, processInfo{probes: probes, pod: podOf(&config.commonConfig, config.Name)}, log)
	if err != nil {
		return err
	}
	defer closing(closer(d.close), &err)

	if err := d.awaitOwnStore(ctx); err != nil {
		return err
	}
	if err := d.awaitSessions(ctx, client.MatchingFields{"status.worker": config.Name}); err != nil {
		return err
	}
	if err := reportLibrary(d.clock, log); err != nil {
		return err
	}
	connector, err := whatsapp.Setup(config.WhatsApp, log.WithName("whatsapp"))
	if err != nil {
		return fmt.Errorf("preparing the WhatsApp client: %w", err)
	}

	mgr, err := manager.New(d.rest, manager.Options{
		Scheme: d.scheme, Logger: log, Cache: cacheOptions(config.Name), Metrics: metricsserver.Options{BindAddress: config.MetricsAddress},
		Controller: controllerOptions(), HealthProbeBindAddress: "0",
	})
	if err != nil {
		return fmt.Errorf("preparing the worker: %w", err)
	}

	storeConfig, err := config.storeConfig()
	if err != nil {
		return err
	}
	storeConnections := storeConfig.Connections()
	fence := membership.NewSelfFence(membership.Elapsed)
	revision := kube.NewRevision(d.direct, kube.RevisionOptions{
		Fixed: config.Revision, Namespace: config.Namespace, Pod: config.Name, InPod: config.PodUID != "",
	}, log)
	if err := d.await(ctx, stepRevision, revision.First); err != nil {
		return fmt.Errorf("asking for this worker's revision: %w", err)
	}
	inbox := newWorkerInbox(d.store, config.Backlog.bounds(), d.queue, d.clock, log.WithName("inbox"))
	if config.DropMessages {
		log.Info("WARNING: --drop-messages is set, so messages are acknowledged, counted and dropped: remove it when there is a Laravel application")
	}
	health := worker.NewHealth(d.clock, log.WithName("health"))
	limiter := worker.NewPerEgress(config.Pace, d.clock)
	agent := worker.NewAgent(worker.Options{
		Worker: config.Name, Process: strings.ToLower(rand.Text()), DrainTimeout: config.DrainTimeout, Stop: ctx.Done(), Installation: d.installation,
		Membership: &membership.Membership{
			Renewer: membership.Renewer{
				Client: d.direct, Namespace: config.Namespace, Clock: d.clock, Log: log.WithName("lease"), Revision: revision.Number, Failing: health.Failing,
				Self: membership.Member{
					Release: config.Release, Name: config.Name, Incarnation: incarnation.ID, PodUID: types.UID(config.PodUID), Pool: config.Pool,
					Format: membership.Format, Capacity: config.Capacity, StoreConnections: storeConnections, DropsMessages: config.DropMessages,
				},
			},
			Keys: redis.NewHeartbeat(d.heartbeat, d.keys), SelfFence: fence,
		},
		Sessions:     kube.NewSessions(d.direct),
		Accounts:     config.accounts(&accounts{store: d.store, connector: connector, inbox: inbox, allowed: fence.Check, log: log.WithName("whatsapp")}),
		Proxies:      &kube.Proxies{Client: d.direct, ServiceAccount: config.Namespace + ":" + config.ServiceAccount},
		Publisher:    publish.NewPublisher(d.queue, d.cache),
		Inbox:        inbox,
		DropMessages: config.DropMessages,
		Health:       health,
		Limiter:      limiter,
		Version:      connector,
		Quarantine:   config.Quarantine,
		Outdated:     config.Outdated,
		Events:       &kube.Events{Recorder: mgr.GetEventRecorder("whatsapp-operator-worker")},
		Clock:        d.clock,
		Log:          log.WithName("session"),
	}, mgr.GetCache())
	if err := agent.SetupWithManager(mgr, mgr.GetCache()); err != nil {
		return err
	}
	// The caches must run until the agent has stopped, not only until the signal to shut down:
	// while the agent hands its sessions over, it learns from them which workers take them.
	mgrCtx, stopManager := context.WithCancel(context.WithoutCancel(ctx))
	defer stopManager()
	for _, r := range []everywhere{
		{func(ctx context.Context) error {
			defer stopManager()
			return agent.Start(ctx)
		}},
		{func(ctx context.Context) error { return exitWhenLost(ctx, fence.Lost(), log) }},
		{revision.Run},
		{inbox.run},
	} {
		if err := mgr.Add(r); err != nil {
			return fmt.Errorf("adding the agent: %w", err)
		}
	}
	if err := metrics.RegisterSessions(func() map[string]int {
		counts := map[string]int{}
		for phase, n := range agent.Phases() {
			counts[string(phase)] = n
		}
		return counts
	}); err != nil {
		return fmt.Errorf("registering the metrics: %w", err)
	}
	if err := metrics.RegisterSessionStats(agent.SessionStats); err != nil {
		return fmt.Errorf("registering the metrics: %w", err)
	}
	if err := metrics.RegisterInboxOver(inbox.over); err != nil {
		return fmt.Errorf("registering the metrics: %w", err)
	}
	for _, m := range d.monitors(agent.PublishAgain, nil) {
		if err := mgr.Add(m); err != nil {
			return fmt.Errorf("adding the watch on Redis: %w", err)
		}
	}
	alive := func() error {
		agent.Joined() // waits for the agent's lock: if it is never released, the probe times out
		return agent.Alive()
	}
	probes.started(alive, func() error {
		if !agent.Joined() {
			return errors.New("starting: the worker has not joined yet")
		}
		return nil
	})
	log.Info("Starting", "incarnation", incarnation.ID, "restarted", incarnation.Restarted, "installation", d.installation, "pool", config.Pool, "capacity", config.Capacity)
	if err := mgr.Start(mgrCtx); err != nil {
		return fmt.Errorf("running the worker: %w", err)
	}
	return nil
}

// exitTimeout is how long a worker may take to shut down once it must assume that it was
// declared dead (docs/architecture.md, "Ownership"). Its sockets are closed by then.
const exitTimeout = 1500 * time.Millisecond

// exitWhenLost ends the process when it may no longer hold connections, even while
// requests still wait for a database or a server that does not answer.
func exitWhenLost(ctx context.Context, lost <-chan struct{}, log logr.Logger) error {
	select {
	case <-ctx.Done():
	case <-lost:
	}
	select {
	case <-lost: // also where both came at once
		log.Info("Lost both heartbeats, closing all connections and ending the process")
		time.AfterFunc(exitTimeout, func() { os.Exit(1) })
	default:
	}
	return nil
}

// cacheOptions caches the sessions that are placed on the worker, without their managed
// fields, which only the API server needs. No reader changes an object of the cache, so
// none needs a deep copy.
func cacheOptions(name string) cache.Options {
	return cache.Options{ByObject: map[client.Object]cache.ByObject{
		&v1alpha1.WhatsAppSession{}: {
			Field:     fields.OneTermEqualSelector("status.worker", name),
			Transform: cache.TransformStripManagedFields(),

			UnsafeDisableDeepCopy: ptr.To(true),
		},
	}}
}

package app

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/lease"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

func newWorkerCommand() *cobra.Command {
	config := &workerConfig{}
	cmd := &cobra.Command{
		Use:   "worker",
		Short: "Hold the connections of the sessions that are placed here",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return prepare(cmd, config.complete, &config.commonConfig, func(ctx context.Context, log logr.Logger) error {
				return runWorker(ctx, config, log.WithValues("worker", config.Name))
			})
		},
	}
	config.bind(cmd.Flags())
	return cmd
}

func runWorker(ctx context.Context, config *workerConfig, log logr.Logger) (err error) {
	if _, set := os.LookupEnv("GOGC"); !set {
		debug.SetGCPercent(config.GCPercent)
	}
	incarnation, err := lease.OpenIncarnation(config.StateDir)
	if err != nil {
		return err
	}
	defer closing(incarnation, &err)

	f, err := lay(ctx, &config.commonConfig, log)
	if err != nil {
		return err
	}
	defer closing(closer(f.close), &err)

	log.Info("Waiting for the store's schema")
	if err := f.store.WaitForSchema(ctx); err != nil {
		return fmt.Errorf("waiting for the store's schema: %w", err)
	}
	if err := f.store.SetInstallation(ctx, f.installation); err != nil {
		return fmt.Errorf("asking the store whose it is: %w", err)
	}
	connector, err := whatsapp.Setup(config.WhatsApp, log.WithName("whatsapp"))
	if err != nil {
		return fmt.Errorf("preparing the WhatsApp client: %w", err)
	}

	placed := sessionsWhere("status.worker", config.Name)
	held := sessionsWhere("status.heldBy", config.Name)
	drain := config.DrainTimeout + 15*time.Second
	mgr, err := manager.New(f.rest, manager.Options{
		Scheme: f.scheme, Logger: log, Cache: placed, Metrics: f.metricsOptions(),
		HealthProbeBindAddress: config.HealthAddress, GracefulShutdownTimeout: &drain,
	})
	if err != nil {
		return fmt.Errorf("preparing the worker: %w", err)
	}
	held.Scheme, held.Mapper, held.HTTPClient = f.scheme, mgr.GetRESTMapper(), mgr.GetHTTPClient()
	heldCache, err := cache.New(f.rest, held)
	if err != nil {
		return fmt.Errorf("preparing the second cache: %w", err)
	}
	if err := mgr.Add(heldCache); err != nil {
		return fmt.Errorf("adding the second cache: %w", err)
	}

	limiter := worker.NewPerEgress(config.Pace, f.clock)
	agent := worker.NewAgent(worker.Options{
		Worker: config.Name, Process: strings.ToLower(rand.Text()), DrainTimeout: config.DrainTimeout,
		Membership: &lease.Renewer{
			Client: f.direct, Namespace: config.Namespace, Clock: f.clock, Log: log.WithName("lease"),
			Self: lease.Member{
				Name: config.Name, Incarnation: incarnation.ID, Pool: config.Pool, Revision: config.Revision,
				Format: lease.Format, Capacity: config.Capacity,
			},
		},
		Sessions:   newSessions(f.direct),
		Accounts:   &accounts{store: f.store, connector: connector, log: log.WithName("whatsapp")},
		Proxies:    &proxies{client: f.direct, serviceAccount: config.Namespace + ":" + config.ServiceAccount},
		Announcer:  newAnnouncer(f.queue, f.cache),
		Limiter:    limiter,
		Version:    connector,
		Quarantine: config.Quarantine,
		Outdated:   config.Outdated,
		Events:     &recorder{events: mgr.GetEventRecorder("whatsapp-operator-worker")},
		Clock:      f.clock,
		Log:        log.WithName("session"),
	}, mgr.GetCache(), heldCache)
	if err := agent.SetupWithManager(mgr, mgr.GetCache(), heldCache); err != nil {
		return err
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
	if err := metrics.RegisterLife(agent.Life); err != nil {
		return fmt.Errorf("registering the metrics: %w", err)
	}
	for _, m := range f.monitors(agent.TellAgain) {
		if err := mgr.Add(m); err != nil {
			return fmt.Errorf("adding the watch on Redis: %w", err)
		}
	}
	ready := func(*http.Request) error {
		if !agent.Joined() {
			return fmt.Errorf("the worker has not joined yet")
		}
		return nil
	}
	if err := addChecks(mgr, healthz.Ping, ready); err != nil {
		return err
	}
	log.Info("Starting", "incarnation", incarnation.ID, "restarted", incarnation.Restarted, "installation", f.installation, "pool", config.Pool, "capacity", config.Capacity)
	if err := mgr.Start(ctx); err != nil {
		return fmt.Errorf("running the worker: %w", err)
	}
	return nil
}

// sessionsWhere caches the sessions whose status names this worker, without
// what only the API server needs. Nobody changes what is read from it, so no
// reader gets a copy of its own.
func sessionsWhere(field, name string) cache.Options {
	return cache.Options{ByObject: map[client.Object]cache.ByObject{
		&v1alpha1.WhatsAppSession{}: {
			Field:     fields.OneTermEqualSelector(field, name),
			Transform: cache.TransformStripManagedFields(),

			UnsafeDisableDeepCopy: ptr.To(true),
		},
	}}
}

package app

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	controllerconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/controllers"
	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/liveness"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/publish"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

const (
	// sweepInterval is how often the heartbeats of workers that have long been dead are removed.
	sweepInterval = 10 * time.Minute
	// noLaravelInterval is how often it is reported that nothing is delivered. Kubernetes keeps
	// Events for an hour.
	noLaravelInterval = time.Hour

	// inboxInterval is how often the messages that wait are counted: one row of each session is read.
	inboxInterval = 30 * time.Second

	// How long the manager's loops may make no progress before the liveness probe fails. Each is
	// several times as long as all requests of one step may take when a server does not answer:
	// the observer's reads end after 2 s, a request to an API server that hangs after 45 s, and a
	// command to Redis is tried four times with 5 s each.
	observerStuckTimeout  = time.Minute
	placementStuckTimeout = 3 * time.Minute
	flusherStuckTimeout   = 5 * time.Minute
)

func newManagerCommand() *cobra.Command {
	config := &managerConfig{}
	cmd := configured(&cobra.Command{
		Use:   "manager",
		Short: "Place the sessions on workers, manage their lifecycle, and deliver updates to Laravel",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return startProcess(cmd, &config.commonConfig, config.complete, func(ctx context.Context, log logr.Logger, p *probes) error {
				return runManager(ctx, config, p, log)
			})
		},
	}, checkUnlessMissing(&config.commonConfig, config.complete))
	config.bind(cmd.Flags())
	return cmd
}

func runManager(ctx context.Context, config *managerConfig, probes *probes, log logr.Logger) (err error) {
	limitMemory(memlimit.FromCgroup, log)
	about := podOf(&config.commonConfig, "")
	d, err := openDependencies(ctx, &config.commonConfig, redis.Manager, processInfo{probes: probes, pod: about}, log)
	if err != nil {
		return err
	}
	defer closing(closer(d.close), &err)
	if err := d.awaitUsableSchema(ctx); err != nil {
		return err
	}
	if err := d.awaitResources(ctx); err != nil {
		return err
	}

	mgr, err := manager.New(d.rest, manager.Options{
		Scheme: d.scheme, Logger: log, Cache: controllers.CacheOptions(config.Namespace, config.Release), Metrics: d.metricsOptions(config),
		Controller: controllerOptions(), HealthProbeBindAddress: "0",
		LeaderElection: config.LeaderElect, LeaderElectionID: membership.LeaderLeaseName(config.Release), LeaderElectionNamespace: config.Namespace,
		LeaderElectionReleaseOnCancel: true,
	})
	if err != nil {
		return fmt.Errorf("preparing the manager: %w", err)
	}
	loops := liveness.New(d.clock)
	recorder := mgr.GetEventRecorder(reportingController)
	warn := func(reason, action, message string) {
		recorder.Eventf(about, nil, corev1.EventTypeWarning, reason, action, "%s", status.Clean(message, maxNote))
	}
	observer := &membership.Observer{
		Client: d.direct, Namespace: config.Namespace, Release: config.Release, Keys: redis.NewHeartbeat(d.heartbeat, d.keys),
		Elapsed: membership.Elapsed, Clock: d.clock, Log: log.WithName("observer"), Visibility: metrics.SetHeartbeatsVisible,
		Loop: loops.Watch("observer", observerStuckTimeout),
	}
	gate := d.storeGate(warn)
	ids := &ids{store: d.store, gate: gate}
	sessions, err := controllers.SetupSession(mgr, controllers.SessionOptions{
		Installation: d.installation, IDs: ids, Publisher: publish.NewManagerPublisher(d.queue, d.cache),
		Clock: d.clock, Log: log.WithName("session"),
	})
	if err != nil {
		return err
	}
	if err := controllers.SetupPlacement(mgr, controllers.PlacementOptions{
		Installation: d.installation, Clock: d.clock, Log: log.WithName("placement"), Deaths: observer, Deletions: sessions.Deletions, Namespace: config.Namespace, Release: config.Release,
		RebalanceInterval: config.rebalanceInterval(), RebalanceAfter: config.RebalanceAfter, Loop: loops.Watch("placement", placementStuckTimeout),
	}); err != nil {
		return err
	}
	runnables := []manager.Runnable{
		observer,
		manager.RunnableFunc(func(ctx context.Context) error { return d.sweepWorkers(ctx, observer) }),
		manager.RunnableFunc(func(ctx context.Context) error { return d.keepStore(ctx, gate) }),
		manager.RunnableFunc(func(ctx context.Context) error { return d.watchConnections(ctx, gate, warn) }),
		d.orphans(gate, func(reason, message string) { warn(reason, "CompareKeys", message) }),
		everywhere{d.watchCRD},
		manager.RunnableFunc(func(ctx context.Context) error {
			reportBundledStores(config.BundledStores, log, func(message string) { warn("BundledStores", "CheckStores", message) })
			<-ctx.Done()
			return nil
		}),
	}
	if config.delivers() {
		flushers, closeClient, err := newFlushers(config, d, gate, recorder, about, loops)
		if err != nil {
			return err
		}
		defer closeClient()
		runnables = append(runnables, flushers...)
		runnables = append(runnables, manager.RunnableFunc(func(ctx context.Context) error { return d.watchDroppedMessages(ctx, warn) }))
	} else {
		runnables = append(runnables, manager.RunnableFunc(func(ctx context.Context) error { return d.reportNoLaravel(ctx, warn) }))
	}
	metrics.SetLaravelConfigured(config.delivers())
	publishAgain := func() {
		if err := sessions.PublishAgain(ctx); err != nil && ctx.Err() == nil {
			log.Error(err, "Failed to publish again the sessions that no worker holds")
		}
	}
	fitness := func(problem error) {
		if problem == nil {
			recorder.Eventf(about, nil, corev1.EventTypeNormal, "RedisFit", "CheckRedis", "Redis is fit again")
			return
		}
		warn("RedisNotFit", "CheckRedis", problem.Error())
	}
	for _, m := range d.monitors(publishAgain, fitness) {
		runnables = append(runnables, m)
	}
	for _, r := range runnables {
		if err := mgr.Add(r); err != nil {
			return fmt.Errorf("adding to the manager: %w", err)
		}
	}
	ready := atomic.Bool{}
	if err := mgr.Add(everywhere{func(ctx context.Context) error { return awaitCaches(ctx, mgr.GetCache(), &ready) }}); err != nil {
		return fmt.Errorf("adding to the manager: %w", err)
	}
	probes.started(loops.Check, func() error {
		if !ready.Load() {
			return errors.New("starting: reading the sessions")
		}
		return nil
	})
	log.Info("Starting", "installation", d.installation)
	if err := mgr.Start(ctx); err != nil {
		return fmt.Errorf("running the manager: %w", err)
	}
	return nil
}

// sweepWorkers removes the heartbeats of dead workers at intervals. It runs on the leader.
func (d *dependencies) sweepWorkers(ctx context.Context, observer *membership.Observer) error {
	ticker := d.clock.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
		if err := observer.Sweep(ctx); err != nil && ctx.Err() == nil {
			d.log.Error(err, "Failed to remove the heartbeats of dead workers, trying again", "after", sweepInterval.String())
		}
	}
}

// metricsOptions serve the manager's metrics as configured.
func (d *dependencies) metricsOptions(config *managerConfig) metricsserver.Options {
	o := metricsserver.Options{BindAddress: config.MetricsAddress}
	if config.MetricsSecure {
		o.SecureServing, o.CertDir, o.FilterProvider = true, config.MetricsCertDir, d.filterMetrics
	}
	return o
}

// awaitCaches sets ready when the manager has read the sessions and the workers.
func awaitCaches(ctx context.Context, cached cache.Cache, ready *atomic.Bool) error {
	for _, obj := range []client.Object{&v1alpha1.WhatsAppSession{}, &coordinationv1.Lease{}} {
		_, err := cached.GetInformer(ctx, obj)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // it was asked to end
		case err != nil:
			return fmt.Errorf("reading the sessions and the workers: %w", err)
		}
	}
	ready.Store(true)
	return nil
}

// controllerOptions let a process wait for its caches for as long as it takes: without the
// right to list the sessions, for example, it would otherwise end after two minutes.
func controllerOptions() controllerconfig.Controller {
	return controllerconfig.Controller{CacheSyncTimeout: 365 * 24 * time.Hour}
}

// reportNoLaravel reports, when this manager begins to lead and again each hour, that nothing
// is delivered.
func (d *dependencies) reportNoLaravel(ctx context.Context, warn func(reason, action, message string)) error {
	const message = "no --laravel-url is given: nothing is delivered to Laravel; the newest state of each session waits in Redis, " +
		"and messages are LOST where workers drop them (--drop-messages, which the chart sets) and wait in the database where they do not"
	ticker := d.clock.NewTicker(noLaravelInterval)
	defer ticker.Stop()
	for {
		d.log.Info("WARNING: " + message)
		warn("LaravelNotConfigured", "Deliver", message)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// messageSource is the inbox as the flusher of messages knows it.
type messageSource struct {
	*store.Inbox
	queue *batch.Queue
}

// WakeUps implements batch.Source. The wake-ups go through Redis, which may be away: then the
// flusher reads the inbox a little later.
func (s messageSource) WakeUps(ctx context.Context) <-chan struct{} {
	return s.queue.MessageWakeUps(ctx)
}

// newFlushers joins the queue, the inbox and Laravel. An Event of the manager's pod reports
// when delivery stops and when it resumes.
func newFlushers(config *managerConfig, d *dependencies, gate *store.Gate, recorder events.EventRecorder, about *corev1.Pod, loops *liveness.Loops) ([]manager.Runnable, func(), error) {
	client, err := laravel.New(config.Laravel, d.clock, d.log.WithName("laravel"))
	if err != nil {
		return nil, nil, err
	}
	options := batch.FlusherOptions{
		RequestTimeout: config.Laravel.Timeout,
		OnStopped: func(kind delivery.Kind, reason batch.StopReason, detail string) {
			recorder.Eventf(about, nil, corev1.EventTypeWarning, string(reason), "Deliver", "delivery of %s updates has stopped, nothing is lost: %s", kind, detail)
		},
		OnRecovered: func(kind delivery.Kind) {
			recorder.Eventf(about, nil, corev1.EventTypeNormal, "LaravelRecovered", "Deliver", "delivery of %s updates has resumed", kind)
		},
	}
	states, messages := options, options
	states.MaxItems, states.Parallel, states.Loop = config.BatchSize, config.Parallel, loops.Watch("flusher", flusherStuckTimeout)
	flusher, err := batch.NewFlusher(d.queue, client, d.clock, d.log.WithName("flusher"), states)
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	inbox := store.NewInbox(d.store, store.InboxOptions{Gate: gate})
	messages.Parallel, messages.Loop = config.MessageParallel, loops.Watch("message-flusher", flusherStuckTimeout)
	messageFlusher, err := batch.NewMessageFlusher(messageSource{inbox, d.queue}, client, d.clock, d.log.WithName("message-flusher"), messages)
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	measure := manager.RunnableFunc(func(ctx context.Context) error { return d.measureInbox(ctx, inbox) })
	return []manager.Runnable{flusher, messageFlusher, measure}, client.Close, nil
}

// measureInbox publishes how much waits in the inbox, at intervals. It runs on the leader.
func (d *dependencies) measureInbox(ctx context.Context, inbox *store.Inbox) error {
	defer metrics.ForgetInbox()
	ticker := d.clock.NewTicker(inboxInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
		gauges, err := d.inboxGauges(ctx, inbox)
		if err != nil {
			d.log.V(1).Info("Failed to measure the inbox, trying again", "after", inboxInterval.String(), "error", err.Error())
			continue
		}
		metrics.SetInbox(gauges)
	}
}

func (d *dependencies) inboxGauges(ctx context.Context, inbox *store.Inbox) (g metrics.InboxGauges, err error) {
	usage, err := inbox.Usage(ctx)
	if err != nil {
		return g, err
	}
	oldest, err := inbox.Oldest(ctx)
	if err != nil {
		return g, err
	}
	g.Sessions = len(usage)
	for _, s := range usage {
		g.Messages, g.Bytes = g.Messages+s.Messages, g.Bytes+s.Bytes
	}
	if !oldest.IsZero() {
		g.Oldest = max(0, d.clock.Since(oldest))
	}
	return g, nil
}

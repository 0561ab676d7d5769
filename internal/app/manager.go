package app

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/whatsapp-operator/whatsapp-operator/controllers"
	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/publish"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

const (
	// sweepInterval is how often the heartbeats of workers that have long been dead are removed.
	sweepInterval = 10 * time.Minute
)

func newManagerCommand() *cobra.Command {
	config := &managerConfig{}
	cmd := configured(&cobra.Command{
		Use:   "manager",
		Short: "Place the sessions on workers, manage their lifecycle, and deliver updates to Laravel",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return start(cmd, &config.commonConfig, func(ctx context.Context, log logr.Logger) error {
				return runManager(ctx, config, log)
			})
		},
	}, func([]string) error { return config.complete() })
	config.bind(cmd.Flags())
	return cmd
}

func runManager(ctx context.Context, config *managerConfig, log logr.Logger) (err error) {
	d, err := openDependencies(ctx, &config.commonConfig, redis.Manager, log)
	if err != nil {
		return err
	}
	defer closing(closer(d.close), &err)

	mgr, err := manager.New(d.rest, manager.Options{
		Scheme: d.scheme, Logger: log, Cache: controllers.CacheOptions(config.Namespace, config.Release), Metrics: d.metricsOptions(),
		HealthProbeBindAddress: config.HealthAddress,
		LeaderElection:         config.LeaderElect, LeaderElectionID: membership.LeaderLeaseName(config.Release), LeaderElectionNamespace: config.Namespace,
		LeaderElectionReleaseOnCancel: true,
	})
	if err != nil {
		return fmt.Errorf("preparing the manager: %w", err)
	}
	observer := &membership.Observer{
		Client: d.direct, Namespace: config.Namespace, Release: config.Release, Keys: redis.NewHeartbeat(d.heartbeat, d.keys),
		Elapsed: membership.Elapsed, Clock: d.clock, Log: log.WithName("observer"), Visibility: metrics.SetHeartbeatsVisible,
	}
	gate := d.storeGate()
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
		RebalanceInterval: config.rebalanceInterval(), RebalanceAfter: config.RebalanceAfter,
	}); err != nil {
		return err
	}
	flusher, closeClient, err := newFlusher(config, d, mgr)
	if err != nil {
		return err
	}
	defer closeClient()
	runnables := []manager.Runnable{
		flusher,
		observer,
		manager.RunnableFunc(func(ctx context.Context) error { return d.sweepWorkers(ctx, observer) }),
		manager.RunnableFunc(func(ctx context.Context) error { return d.keepStore(ctx, gate) }),
		d.orphans(gate, func(reason, message string) {
			mgr.GetEventRecorder("whatsapp-operator").Eventf(managerPod(config), nil, corev1.EventTypeWarning, reason, "CompareKeys", "%s", message)
		}),
	}
	publishAgain := func() {
		if err := sessions.PublishAgain(ctx); err != nil && ctx.Err() == nil {
			log.Error(err, "Failed to publish again the sessions that no worker holds")
		}
	}
	fitness := func(problem error) {
		recorder, about := mgr.GetEventRecorder("whatsapp-operator"), managerPod(config)
		if problem == nil {
			recorder.Eventf(about, nil, corev1.EventTypeNormal, "RedisFit", "CheckRedis", "Redis is fit again")
			return
		}
		recorder.Eventf(about, nil, corev1.EventTypeWarning, "RedisNotFit", "CheckRedis", "%s", status.Clean(problem.Error(), 512))
	}
	for _, m := range d.monitors(publishAgain, fitness) {
		runnables = append(runnables, m)
	}
	for _, r := range runnables {
		if err := mgr.Add(r); err != nil {
			return fmt.Errorf("adding to the manager: %w", err)
		}
	}
	if err := addChecks(mgr, healthz.Ping, d.pingRedis); err != nil {
		return err
	}
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

// managerPod is the object of the Events that concern no session: this manager's pod.
func managerPod(config *managerConfig) *corev1.Pod {
	pod, _ := os.Hostname() // a pod's host name is its name; without it the Event names nothing
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: config.Namespace, Name: pod},
	}
}

// newFlusher joins the queue and Laravel. An Event of the manager's pod reports
// when delivery stops and when it resumes.
func newFlusher(config *managerConfig, d *dependencies, mgr manager.Manager) (*batch.Flusher, func(), error) {
	client, err := laravel.New(config.Laravel, d.clock, d.log.WithName("laravel"))
	if err != nil {
		return nil, nil, err
	}
	about := managerPod(config)
	recorder := mgr.GetEventRecorder("whatsapp-operator")
	options := batch.FlusherOptions{
		Parallel: config.Parallel, RequestTimeout: config.Laravel.Timeout,
		OnStopped: func(kind delivery.Kind, reason batch.StopReason, detail string) {
			recorder.Eventf(about, nil, corev1.EventTypeWarning, string(reason), "Deliver", "delivery of %s updates has stopped, nothing is lost: %s", kind, detail)
		},
		OnRecovered: func(kind delivery.Kind) {
			recorder.Eventf(about, nil, corev1.EventTypeNormal, "LaravelRecovered", "Deliver", "delivery of %s updates has resumed", kind)
		},
	}
	options.MaxItems = config.BatchSize
	flusher, err := batch.NewFlusher(d.queue, client, d.clock, d.log.WithName("flusher"), options)
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	return flusher, client.Close, nil
}

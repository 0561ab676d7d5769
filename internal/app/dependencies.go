package app

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	goredis "github.com/redis/go-redis/v9"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/cache"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

// dependencies are the servers that manager and worker need, each checked before it is used.
type dependencies struct {
	config       *commonConfig
	rest         *rest.Config
	scheme       *runtime.Scheme
	direct       client.Client // reads from the API server itself
	installation string
	redis        goredis.UniversalClient
	// heartbeat has separate connections: the workers' heartbeats must not wait behind the
	// requests of a thousand sessions.
	heartbeat  goredis.UniversalClient
	keys       redis.Keys
	durability *redis.Durability
	monitor    *redis.Monitor
	queue      *batch.Queue
	cache      *cache.Cache
	store      *store.Store
	clock      clock.WithTicker
	log        logr.Logger
}

// openDependencies reaches the API server, Redis and the store, and refuses any of
// them that is not fit or that belongs to another installation. The caller closes them.
func openDependencies(ctx context.Context, config *commonConfig, role redis.Role, log logr.Logger) (*dependencies, error) {
	d, err := openUnclaimed(ctx, config, role, log)
	if err != nil {
		return nil, err
	}
	if err := redis.ClaimInstallation(ctx, d.redis, d.keys, d.installation); err != nil {
		return nil, errors.Join(fmt.Errorf("reading which installation owns Redis: %w", err), d.close())
	}
	if err := d.openStore(ctx); err != nil {
		return nil, errors.Join(err, d.close())
	}
	elsewhere, _ := d.checkOwnership(ctx) // a database that does not answer is asked again
	if elsewhere != nil {
		return nil, errors.Join(elsewhere, d.close())
	}
	return d, nil
}

// openUnclaimed reaches the API server and Redis, also where Redis belongs to another
// installation.
func openUnclaimed(ctx context.Context, config *commonConfig, role redis.Role, log logr.Logger) (*dependencies, error) {
	d, err := openCluster(ctx, config, log)
	if err != nil {
		return nil, err
	}
	if err := d.openRedis(ctx, role); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// openCluster reaches the API server, which names the installation.
func openCluster(ctx context.Context, config *commonConfig, log logr.Logger) (_ *dependencies, err error) {
	d := &dependencies{config: config, scheme: runtime.NewScheme(), clock: clock.RealClock{}, log: log}
	// Only the kinds that are used: all of Kubernetes' would cost each worker some megabytes.
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, coordinationv1.AddToScheme, eventsv1.AddToScheme, v1alpha1.AddToScheme,
	} {
		if err := add(d.scheme); err != nil {
			return nil, fmt.Errorf("registering the kinds: %w", err)
		}
	}
	if d.rest, err = config.rest(); err != nil {
		return nil, err
	}
	if d.direct, err = client.New(d.rest, client.Options{Scheme: d.scheme}); err != nil {
		return nil, fmt.Errorf("reaching the API server: %w", err)
	}
	if err := d.identify(ctx); err != nil {
		return nil, err
	}
	return d, nil
}

// checkStore opens the store for a command of a person, once the store has its schema. It refuses
// a store of another installation and claims none: a command with a wrong URL must not
// make that store this installation's.
func checkStore(ctx context.Context, config *commonConfig, log logr.Logger) (*dependencies, error) {
	d, err := openCluster(ctx, config, log)
	if err != nil {
		return nil, err
	}
	if err := d.openStore(ctx); err != nil {
		return nil, errors.Join(err, d.close())
	}
	waiting, done := context.WithTimeout(ctx, config.StartTimeout)
	defer done()
	err = d.awaitStore(ctx)
	if err == nil {
		err = d.store.WaitForSchema(waiting)
	}
	if err == nil {
		err = d.store.CheckInstallation(ctx, d.installation)
	}
	if errors.Is(err, store.ErrOwnedByNobody) {
		err = fmt.Errorf("%w, and this is %q, whose manager claims the store at its first start: is --store right, and are --namespace and --release those of the manager?", err, d.installation)
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func (d *dependencies) close() error {
	var errs []error
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	for _, c := range []goredis.UniversalClient{d.redis, d.heartbeat} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// retryUntilReady repeats what may not be there yet, until it succeeds, fails for
// good or the start's time is over.
func (d *dependencies) retryUntilReady(ctx context.Context, what string, try func(context.Context) (final bool, err error)) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, time.Second, d.config.StartTimeout, true, func(ctx context.Context) (bool, error) {
		final, err := try(ctx)
		if err != nil && !final {
			if last == nil {
				d.log.Info("Waiting", "for", what, "error", err.Error())
			}
			last = err
			return false, nil
		}
		return true, err
	})
	if wait.Interrupted(err) && last != nil && ctx.Err() == nil {
		return fmt.Errorf("%s cannot be reached for %s: %w", what, d.config.StartTimeout, last)
	}
	return err
}

// identify names the installation: cluster, namespace and release.
func (d *dependencies) identify(ctx context.Context) error {
	return d.retryUntilReady(ctx, "the API server", func(ctx context.Context) (bool, error) {
		system := &corev1.Namespace{}
		if err := d.direct.Get(ctx, types.NamespacedName{Name: "kube-system"}, system); err != nil {
			return false, fmt.Errorf("reading the namespace kube-system, whose UID names this cluster: %w", err)
		}
		d.installation = fmt.Sprintf("%s/%s/%s", system.UID, d.config.Namespace, d.config.Release)
		return true, nil
	})
}

// openRedis refuses a Redis that is not fit, or whose user may not do what the role needs.
func (d *dependencies) openRedis(ctx context.Context, role redis.Role) error {
	redis.LogTo(d.log.WithName("redis"))
	config := d.config.Redis
	config.OnRefusal = func(reason redis.Refusal) { metrics.RedisRefusal(string(reason)) }
	var err error
	if d.redis, err = redis.New(config); err != nil {
		return err
	}
	if d.heartbeat, err = redis.New(config); err != nil {
		return err
	}
	d.keys = d.config.Redis.Keys()
	d.durability = redis.NewDurability(d.redis, d.keys, d.config.Redis.Durability)
	d.queue = batch.NewQueue(d.redis, d.keys, d.clock, batch.Options{
		Durability: d.durability, OnExpired: metrics.QueueExpired, OnRepaired: d.queueRepaired,
	})
	d.cache = cache.New(d.redis, d.keys, d.clock)
	d.monitor = &redis.Monitor{
		Client: d.redis, Keys: d.keys, Role: role, User: d.config.Redis.Username, Durability: d.durability, Clock: d.clock,
	}
	return d.retryUntilReady(ctx, "Redis", func(ctx context.Context) (bool, error) {
		report, err := d.monitor.Once(ctx)
		if err != nil {
			var access *redis.AccessError
			return errors.Is(err, redis.ErrNotOffered) || errors.As(err, &access), err
		}
		if err := report.Err(d.config.Redis.AllowVolatile); err != nil {
			return true, err
		}
		for _, problem := range report.Problems {
			d.log.Info("WARNING: this Redis may lose what waits for Laravel; allowed by --allow-volatile-redis", "problem", problem)
		}
		d.log.Info("Redis is fit", "durability", report.Durability.String())
		return true, nil
	})
}

// queueRepaired reports that keys of a queue were deleted, evicted or overwritten.
func (d *dependencies) queueRepaired(kind delivery.Kind, r batch.Repair) {
	metrics.QueueRepaired(kind, r.Discarded, r.Restored)
	log := d.log.WithName("redis").WithValues("kind", string(kind), "discarded", r.Discarded, "restored", r.Restored)
	if r == (batch.Repair{}) {
		log.Info("Found the queue new or emptied: the present state of every session is published again")
		return
	}
	log.Error(nil, "Repaired the queue: keys of it were deleted, evicted or overwritten; the present state of every session is published again")
}

// openStore prepares the connections to the store, which may not answer yet.
func (d *dependencies) openStore(ctx context.Context) error {
	config, err := d.config.storeConfig()
	if err != nil {
		return err
	}
	return d.retryUntilReady(ctx, "the store", func(ctx context.Context) (bool, error) {
		opened, err := store.Open(ctx, config, d.log.WithName("store"))
		if err != nil {
			return errors.Is(err, store.ErrBadURL), err
		}
		d.store = opened
		return true, nil
	})
}

// awaitStore returns when the store answers, for those who can do nothing without it.
func (d *dependencies) awaitStore(ctx context.Context) error {
	return d.retryUntilReady(ctx, "the store", func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, store.TakeTimeout)
		defer cancel()
		return false, d.store.Ping(ctx)
	})
}

// monitors watch Redis and the store for as long as the process runs. publishAgain is called
// when Redis may have lost data, fitness, where set, when Redis becomes unfit, with the
// reason, and when it is fit again. A Redis or a store that has become another
// installation's ends the process.
func (d *dependencies) monitors(publishAgain func(), fitness func(problem error)) []everywhere {
	fit := true // openRedis has checked it
	d.monitor.Report = func(report redis.Report, err error) {
		if err == nil {
			err = report.Err(d.config.Redis.AllowVolatile)
		}
		metrics.SetRedisFit(err == nil)
		if err != nil {
			d.log.Error(err, "Redis is not fit")
		}
		if changed := fit != (err == nil); changed && fitness != nil {
			fitness(err)
		}
		fit = err == nil
	}
	watch := func(life context.Context) error {
		ctx, stop := context.WithCancelCause(life)
		defer stop(nil)
		watcher := &redis.Watcher{Client: d.redis, Keys: d.keys, Clock: d.clock, Log: d.log.WithName("redis"), OnDataLoss: func(reason redis.LossReason) {
			d.log.Info("Redis may have lost data, publishing the present state again", "reason", string(reason))
			var elsewhere *redis.OwnedElsewhereError
			switch err := redis.ClaimInstallation(ctx, d.redis, d.keys, d.installation); {
			case errors.As(err, &elsewhere):
				stop(err)
				return
			case err != nil && ctx.Err() == nil:
				d.log.Error(err, "Failed to read which installation owns Redis")
			}
			publishAgain()
		}}
		if err := watcher.Start(ctx); err != nil {
			return fmt.Errorf("watching Redis: %w", err)
		}
		if life.Err() != nil {
			return nil
		}
		return context.Cause(ctx)
	}
	return []everywhere{{d.monitor.Start}, {watch}, {d.watchOwnership}}
}

// pingRedis is a health check.
func (d *dependencies) pingRedis(r *http.Request) error {
	if err := d.redis.Ping(r.Context()).Err(); err != nil {
		return fmt.Errorf("asking Redis: %w", err)
	}
	return nil
}

// metricsOptions serve the metrics as configured.
func (d *dependencies) metricsOptions() metricsserver.Options {
	return metricsserver.Options{BindAddress: d.config.MetricsAddress}
}

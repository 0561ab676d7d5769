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
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

// foundation is what manager and worker stand on, checked before anything is opened.
type foundation struct {
	config       *commonConfig
	rest         *rest.Config
	scheme       *runtime.Scheme
	direct       client.Client // reads from the API server itself
	installation string
	redis        goredis.UniversalClient
	// heartbeat has connections of its own: the workers' proof of life must not wait behind
	// a thousand sessions.
	heartbeat  goredis.UniversalClient
	keys       redis.Keys
	durability *redis.Durability
	queue      *batch.Queue
	cache      *cache.Cache
	store      *store.Store
	clock      clock.WithTicker
	log        logr.Logger
}

// lay reaches the API server, Redis and the store, and refuses to go on with
// any of them that is not fit, or is another installation's. The caller closes it.
func openFoundation(ctx context.Context, config *commonConfig, log logr.Logger) (*foundation, error) {
	f, err := newFoundation(ctx, config, log)
	if err != nil {
		return nil, err
	}
	if err := redis.ClaimInstallation(ctx, f.redis, f.keys, f.installation); err != nil {
		return nil, errors.Join(fmt.Errorf("asking Redis whose it is: %w", err), f.close())
	}
	if err := f.openStore(ctx); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

// newFoundation reaches the API server and Redis, whosever Redis is.
func newFoundation(ctx context.Context, config *commonConfig, log logr.Logger) (*foundation, error) {
	f, err := openCluster(ctx, config, log)
	if err != nil {
		return nil, err
	}
	if err := f.openRedis(ctx); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

// openCluster reaches the API server, which names the installation.
func openCluster(ctx context.Context, config *commonConfig, log logr.Logger) (_ *foundation, err error) {
	f := &foundation{config: config, scheme: runtime.NewScheme(), clock: clock.RealClock{}, log: log}
	// Only the kinds that are used: all of Kubernetes' would cost each worker some megabytes.
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, coordinationv1.AddToScheme, eventsv1.AddToScheme, v1alpha1.AddToScheme,
	} {
		if err := add(f.scheme); err != nil {
			return nil, fmt.Errorf("registering the kinds: %w", err)
		}
	}
	if f.rest, err = config.rest(); err != nil {
		return nil, err
	}
	if f.direct, err = client.New(f.rest, client.Options{Scheme: f.scheme}); err != nil {
		return nil, fmt.Errorf("reaching the API server: %w", err)
	}
	if err := f.identify(ctx); err != nil {
		return nil, err
	}
	return f, nil
}

// checkStore opens the store for a person's command, once it has its schema. It
// refuses one that is not this installation's, and claims none: a command that is
// given the wrong URL must not make that store this installation's.
func checkStore(ctx context.Context, config *commonConfig, log logr.Logger) (*foundation, error) {
	f, err := openCluster(ctx, config, log)
	if err != nil {
		return nil, err
	}
	if err := f.openStore(ctx); err != nil {
		return nil, errors.Join(err, f.close())
	}
	waiting, done := context.WithTimeout(ctx, config.StartTimeout)
	defer done()
	err = f.store.WaitForSchema(waiting)
	if err == nil {
		err = f.store.CheckInstallation(ctx, f.installation)
	}
	if errors.Is(err, store.ErrOwnedByNobody) {
		err = fmt.Errorf("%w, and this is %q, whose manager claims its store when it first starts: is --store right, and are --namespace and --release those of the manager?", err, f.installation)
	}
	if err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

func (f *foundation) close() error {
	var errs []error
	if f.store != nil {
		errs = append(errs, f.store.Close())
	}
	for _, c := range []goredis.UniversalClient{f.redis, f.heartbeat} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// retryUntilReady repeats what may not be there yet, until it succeeds, fails for
// good or the start's time is over.
func (f *foundation) retryUntilReady(ctx context.Context, what string, try func(context.Context) (final bool, err error)) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, time.Second, f.config.StartTimeout, true, func(ctx context.Context) (bool, error) {
		final, err := try(ctx)
		if err != nil && !final {
			if last == nil {
				f.log.Info("Waiting", "for", what, "error", err.Error())
			}
			last = err
			return false, nil
		}
		return true, err
	})
	if wait.Interrupted(err) && last != nil && ctx.Err() == nil {
		return fmt.Errorf("%s cannot be reached for %s: %w", what, f.config.StartTimeout, last)
	}
	return err
}

// identify names the installation: cluster, namespace and release.
func (f *foundation) identify(ctx context.Context) error {
	return f.retryUntilReady(ctx, "the API server", func(ctx context.Context) (bool, error) {
		system := &corev1.Namespace{}
		if err := f.direct.Get(ctx, types.NamespacedName{Name: "kube-system"}, system); err != nil {
			return false, fmt.Errorf("reading the namespace kube-system, whose UID names this cluster: %w", err)
		}
		f.installation = fmt.Sprintf("%s/%s/%s", system.UID, f.config.Namespace, f.config.Release)
		return true, nil
	})
}

func (f *foundation) openRedis(ctx context.Context) error {
	redis.LogTo(f.log.WithName("redis"))
	var err error
	if f.redis, err = redis.New(f.config.Redis); err != nil {
		return err
	}
	if f.heartbeat, err = redis.New(f.config.Redis); err != nil {
		return err
	}
	f.keys = f.config.Redis.Keys()
	f.durability = redis.NewDurability(f.redis, f.keys, f.config.Redis.Durability)
	f.queue = batch.NewQueue(f.redis, f.keys, f.clock, batch.Options{Durability: f.durability, OnExpired: metrics.QueueExpired})
	f.cache = cache.New(f.redis, f.keys, f.clock)
	return f.retryUntilReady(ctx, "Redis", func(ctx context.Context) (bool, error) {
		report, err := (&redis.Monitor{Client: f.redis, Durability: f.durability}).Once(ctx)
		if err != nil {
			return errors.Is(err, redis.ErrNotOffered), err
		}
		if err := report.Err(f.config.Redis.AllowVolatile); err != nil {
			return true, err
		}
		for _, problem := range report.Problems {
			f.log.Info("WARNING: this Redis may lose what waits for Laravel; allowed by --allow-volatile-redis", "problem", problem)
		}
		f.log.Info("Redis is fit", "durability", report.Durability.String())
		return true, nil
	})
}

func (f *foundation) openStore(ctx context.Context) error {
	config, err := f.config.storeConfig()
	if err != nil {
		return err
	}
	return f.retryUntilReady(ctx, "the store", func(ctx context.Context) (bool, error) {
		opened, err := store.Open(ctx, config, f.log.WithName("store"))
		if err != nil {
			return errors.Is(err, store.ErrBadURL), err
		}
		f.store = opened
		return true, nil
	})
}

// monitors watch Redis for as long as the process runs. forgot is called when
// Redis may have lost what it was given. A Redis that has become another
// installation's ends the process.
func (f *foundation) monitors(forgot func()) []everywhere {
	monitor := &redis.Monitor{Client: f.redis, Durability: f.durability, Clock: f.clock, Report: func(report redis.Report, err error) {
		if err == nil {
			err = report.Err(f.config.Redis.AllowVolatile)
		}
		metrics.RedisFit(err == nil)
		if err != nil {
			f.log.Error(err, "Redis is not fit")
		}
	}}
	watch := func(life context.Context) error {
		ctx, stop := context.WithCancelCause(life)
		defer stop(nil)
		watcher := &redis.Watcher{Client: f.redis, Keys: f.keys, Clock: f.clock, Log: f.log.WithName("redis"), Forgot: func(reason redis.Reason) {
			f.log.Info("Redis may have forgotten: the present state is told again", "reason", string(reason))
			var elsewhere *redis.OwnedElsewhereError
			switch err := redis.ClaimInstallation(ctx, f.redis, f.keys, f.installation); {
			case errors.As(err, &elsewhere):
				stop(err)
				return
			case err != nil && ctx.Err() == nil:
				f.log.Error(err, "Redis could not be asked whose it is")
			}
			forgot()
		}}
		if err := watcher.Start(ctx); err != nil {
			return fmt.Errorf("watching Redis: %w", err)
		}
		if life.Err() != nil {
			return nil
		}
		return context.Cause(ctx)
	}
	return []everywhere{{monitor.Start}, {watch}}
}

// pingRedis is a health check.
func (f *foundation) pingRedis(r *http.Request) error {
	if err := f.redis.Ping(r.Context()).Err(); err != nil {
		return fmt.Errorf("asking Redis: %w", err)
	}
	return nil
}

// metricsOptions serve the metrics as configured.
func (f *foundation) metricsOptions() metricsserver.Options {
	return metricsserver.Options{BindAddress: f.config.MetricsAddress}
}

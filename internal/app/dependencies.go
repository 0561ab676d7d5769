package app

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-logr/logr"
	goredis "github.com/redis/go-redis/v9"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/cache"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

// heartbeatPoolSize bounds the connections for heartbeats to each node of Redis: a renewal or
// an observation uses one at a time.
const heartbeatPoolSize = 4

// dependencies are the servers that manager and worker need, each checked before it is used.
type dependencies struct {
	processInfo
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

// openDependencies reaches the API server, Redis and the store for a manager or a worker,
// and waits while one of them is away, not fit, or another installation's. The store may not
// answer yet. The caller closes them.
func openDependencies(ctx context.Context, config *commonConfig, role redis.Role, p processInfo, log logr.Logger) (*dependencies, error) {
	d, err := openUnclaimed(ctx, config, role, p, log)
	if err != nil {
		return nil, err
	}
	if err := d.claim(ctx); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// claim claims Redis for this installation, and opens the store if that is this one's too.
func (d *dependencies) claim(ctx context.Context) error {
	err := d.await(ctx, stepRedisOwner, func(ctx context.Context) (bool, error) {
		err := redis.ClaimInstallation(ctx, d.redis, d.keys, d.installation)
		var elsewhere *redis.OwnedElsewhereError
		return errors.As(err, &elsewhere) && !d.waitsForever(), err
	})
	if err == nil {
		err = d.openStore(ctx)
	}
	if err != nil {
		return err
	}
	return d.await(ctx, stepStoreOwner, func(ctx context.Context) (bool, error) {
		elsewhere, _ := d.checkOwnership(ctx) // a database that does not answer is asked again
		if elsewhere == nil && ctx.Err() != nil {
			return false, ctx.Err()
		}
		return !d.waitsForever(), elsewhere
	})
}

// awaitUsableSchema waits while a newer release has migrated the store to a schema that this
// program cannot use: it must not lead then. A store that does not answer is asked again by
// the leader.
func (d *dependencies) awaitUsableSchema(ctx context.Context) error {
	return d.await(ctx, stepSchema, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, ownershipTimeout)
		defer cancel()
		if _, err := d.store.SchemaReady(ctx); errors.Is(err, store.ErrSchemaTooNew) {
			return !d.waitsForever(), err
		}
		return true, nil
	})
}

// openUnclaimed reaches the API server and Redis, also where Redis belongs to another
// installation.
func openUnclaimed(ctx context.Context, config *commonConfig, role redis.Role, p processInfo, log logr.Logger) (*dependencies, error) {
	d, err := openCluster(ctx, config, p, log)
	if err != nil {
		return nil, err
	}
	if err := d.openRedis(ctx, role); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// openCluster reaches the API server, which names the installation.
func openCluster(ctx context.Context, config *commonConfig, p processInfo, log logr.Logger) (*dependencies, error) {
	d, err := newDependencies(config, p, log)
	if err != nil {
		return nil, err
	}
	if err := d.identify(ctx); err != nil {
		return nil, err
	}
	return d, nil
}

// newDependencies makes the client of the API server.
func newDependencies(config *commonConfig, p processInfo, log logr.Logger) (_ *dependencies, err error) {
	d := &dependencies{processInfo: p, config: config, scheme: runtime.NewScheme(), clock: clock.RealClock{}, log: log}
	// Only the kinds that are used: all of Kubernetes' would cost each worker some megabytes.
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, coordinationv1.AddToScheme, eventsv1.AddToScheme, v1alpha1.AddToScheme,
		authenticationv1.AddToScheme, authorizationv1.AddToScheme,
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
	return d, nil
}

// checkStore opens the store for a command of a person, once the store has its schema. It refuses
// a store of another installation and claims none: a command with a wrong URL must not
// make that store this installation's.
func checkStore(ctx context.Context, config *commonConfig, log logr.Logger) (*dependencies, error) {
	d, err := openCluster(ctx, config, processInfo{}, log)
	if err != nil {
		return nil, err
	}
	if err := d.openCheckedStore(ctx); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// openCheckedStore opens the store as checkStore does.
func (d *dependencies) openCheckedStore(ctx context.Context) error {
	if err := d.openStore(ctx); err != nil {
		return err
	}
	waiting, done := context.WithTimeout(ctx, d.config.StartTimeout)
	defer done()
	err := d.awaitStore(ctx)
	if err == nil {
		err = d.store.WaitForSchema(waiting)
	}
	if err == nil {
		err = d.store.CheckInstallation(ctx, d.installation)
	}
	if errors.Is(err, store.ErrOwnedByNobody) {
		err = fmt.Errorf("%w, and this is %q, whose manager claims the store at its first start: is --store right, and are --namespace and --release those of the manager?", err, d.installation)
	}
	return err
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

// identify names the installation: cluster, namespace and release.
func (d *dependencies) identify(ctx context.Context) error {
	return d.await(ctx, stepAPIServer, func(ctx context.Context) (bool, error) {
		system := &corev1.Namespace{}
		if err := d.direct.Get(ctx, types.NamespacedName{Name: "kube-system"}, system); err != nil {
			return false, fmt.Errorf("reading the namespace kube-system, whose UID names this cluster: %w", err)
		}
		d.installation = fmt.Sprintf("%s/%s/%s", system.UID, d.config.Namespace, d.config.Release)
		return true, nil
	})
}

// openRedis waits for a Redis that is fit, and whose user may do what the role needs.
func (d *dependencies) openRedis(ctx context.Context, role redis.Role) error {
	redis.LogTo(d.log.WithName("redis"))
	config := d.config.Redis
	config.OnRefusal = func(reason redis.Refusal) { metrics.RedisRefusal(string(reason)) }
	var err error
	if d.redis, err = redis.New(config); err != nil {
		return err
	}
	config.PoolSize = heartbeatPoolSize
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
	return d.await(ctx, stepRedis, func(ctx context.Context) (bool, error) {
		report, err := d.monitor.Once(ctx)
		if err != nil {
			var access *redis.AccessError
			unfit := errors.Is(err, redis.ErrNotOffered) || errors.As(err, &access)
			return unfit && !d.waitsForever(), err
		}
		if err := report.Err(d.config.Redis.AllowVolatile); err != nil {
			return !d.waitsForever(), err
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
	return d.await(ctx, stepStore, func(ctx context.Context) (bool, error) {
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
	return d.await(ctx, stepStore, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, store.TakeTimeout)
		defer cancel()
		return false, d.store.Ping(ctx)
	})
}

// awaitOwnStore returns when the store answers, has the schema that this program needs, and is
// this installation's.
func (d *dependencies) awaitOwnStore(ctx context.Context) error {
	if err := d.awaitStore(ctx); err != nil {
		return err
	}
	err := d.await(ctx, stepSchema, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, store.TakeTimeout)
		defer cancel()
		ready, err := d.store.SchemaReady(ctx)
		if err == nil && !ready {
			err = errors.New("a manager of this release migrates the store, and none has done it yet: check that a manager runs and what its log says")
		}
		return errors.Is(err, store.ErrSchemaTooNew) && !d.waitsForever(), err
	})
	if err != nil {
		return err
	}
	return d.await(ctx, stepStoreOwner, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, store.TakeTimeout)
		defer cancel()
		err := d.store.SetInstallation(ctx, d.installation)
		return errors.Is(err, store.ErrOwnedElsewhere) && !d.waitsForever(), err
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

package app

import (
	"context"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

const (
	// goneAfter is how old a Lease's renewal must be for its worker not to be counted. The
	// clocks of the workers may differ.
	goneAfter = 5 * time.Minute
	// managers is how many managers are counted: they have no Leases of their own.
	managers = 2
)

// connections compares what the processes of an installation may open with what the
// database accepts. It is pure.
type connections struct {
	// workers is how many workers there are, and theirs how many connections they may open.
	workers, theirs int
	// own is how many connections a manager may open.
	own int
	// accepted is how many the database accepts; 0: no limit is known.
	accepted int
}

func (c connections) needed() int { return c.theirs + managers*c.own }

// problem says what to change; empty: nothing.
func (c connections) problem() string {
	if c.accepted == 0 || c.needed() <= c.accepted {
		return ""
	}
	return fmt.Sprintf("%d workers and %d managers may open %d connections to the database, and it accepts %d from this user: "+
		"raise max_connections (or the limit of the role or the database), lower --store-max-connections, or put PgBouncer between them",
		c.workers, managers, c.needed(), c.accepted)
}

// watchConnections warns when the database accepts fewer connections than the processes may
// open: otherwise this shows only under load, when a worker cannot open one.
func (d *dependencies) watchConnections(ctx context.Context, gate *store.Gate, warn func(reason, action, message string)) error {
	return d.watchProblem(ctx, "the connections to the database", "DatabaseConnections", "CheckStore", warn, func(ctx context.Context) (string, error) {
		c, err := d.countConnections(ctx, gate)
		return c.problem(), err
	})
}

func (d *dependencies) countConnections(ctx context.Context, gate *store.Gate) (c connections, err error) {
	config, err := d.config.storeConfig()
	if err != nil {
		return connections{}, err
	}
	c.own = config.Connections()
	if err := gate.Do(ctx, func(ctx context.Context) (err error) {
		c.accepted, err = d.store.ConnectionLimit(ctx)
		return err
	}); err != nil || c.accepted == 0 {
		return connections{}, err
	}
	workers, err := d.workers(ctx)
	if err != nil {
		return connections{}, err
	}
	for _, member := range workers {
		c.workers++
		c.theirs += member.StoreConnections
	}
	return c, nil
}

// workers returns the workers of this release that have renewed their Leases.
func (d *dependencies) workers(ctx context.Context) (workers []membership.Member, err error) {
	leases := &coordinationv1.LeaseList{}
	if err := d.direct.List(ctx, leases, client.InNamespace(d.config.Namespace), client.MatchingLabels(membership.WorkerLabels(d.config.Release))); err != nil {
		return nil, fmt.Errorf("listing the workers' leases: %w", err)
	}
	for i := range leases.Items {
		member, err := membership.FromLease(&leases.Items[i])
		if err == nil && d.clock.Since(member.RenewTime) < goneAfter {
			workers = append(workers, member)
		}
	}
	return workers, nil
}

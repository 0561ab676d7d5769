package lease

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// RenewEvery is how often a worker renews its Lease (DESIGN section 3.5).
	RenewEvery = 3 * time.Second
	// Duration is how long a Lease speaks for its worker.
	Duration = 15 * time.Second
	// attemptPatience bounds one renewal, counted from its sending.
	attemptPatience = 2 * time.Second
)

// errTaken says that another incarnation of the worker renews the Lease.
var errTaken = errors.New("another process has taken over this worker's name: give each worker a name of its own")

// Renewer keeps a worker's Lease. Nobody else writes it.
type Renewer struct {
	// Client must read from the API server itself.
	Client    client.Client
	Namespace string
	// Self is the member as it announces itself; Load, Tokens and RenewTime are filled in.
	Self  Member
	Clock clock.WithTicker
	Log   logr.Logger

	lease    *coordinationv1.Lease
	draining atomic.Bool
	// foreign is the last renewal seen of another incarnation, and since when it has not changed.
	foreign      string
	foreignSince time.Time
	load         func() (sessions, tokens int)
}

// Run joins and renews until ctx ends; joined is called once, after the first
// renewal. A Lease that another incarnation of the same name still renews is
// waited for; one that takes the Lease away ends Run with an error.
func (r *Renewer) Run(ctx context.Context, joined func(), load func() (sessions, tokens int)) error {
	r.load = load
	ticker := r.Clock.NewTicker(RenewEvery)
	defer ticker.Stop()
	member := false
	for {
		err := r.renew(ctx)
		switch {
		case err == nil && !member:
			member = true
			r.Log.Info("Joined", "worker", r.Self.Name, "incarnation", r.Self.Incarnation)
			joined()
		case errors.Is(err, errTaken) && member:
			return err
		case errors.Is(err, errTaken):
			r.Log.Info("Waiting for another incarnation of this worker to fall silent", "worker", r.Self.Name)
		case err != nil && ctx.Err() == nil:
			r.Log.Error(err, "The lease could not be renewed; it is tried again", "worker", r.Self.Name)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// Drain announces at once, not with the next renewal, that the worker takes
// nothing more. It may run beside Run.
func (r *Renewer) Drain(ctx context.Context) error {
	r.draining.Store(true)
	current, err := r.get(ctx)
	if err != nil || current == nil {
		return err
	}
	member, err := FromLease(current)
	if err != nil || member.Incarnation != r.Self.Incarnation {
		return err
	}
	base := current.DeepCopy()
	member.Draining = true
	member.Into(current)
	if err := r.Client.Patch(ctx, current, client.MergeFrom(base)); err != nil {
		return fmt.Errorf("marking the lease as draining: %w", err)
	}
	return nil
}

// Leave deletes the Lease. Run must have ended.
func (r *Renewer) Leave(ctx context.Context) error {
	current, err := r.get(ctx)
	if err != nil || current == nil {
		return err
	}
	member, err := FromLease(current)
	if err != nil || member.Incarnation != r.Self.Incarnation {
		return err
	}
	rv := current.ResourceVersion
	err = r.Client.Delete(ctx, current, client.Preconditions{ResourceVersion: &rv})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("deleting the lease: %w", err)
	}
	return nil
}

func (r *Renewer) get(ctx context.Context) (*coordinationv1.Lease, error) {
	current := &coordinationv1.Lease{}
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: r.Namespace, Name: LeaseName(r.Self.Name)}, current)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("reading the lease: %w", err)
	}
	return current, nil
}

// renew writes the Lease once, with the resourceVersion that it was computed from.
func (r *Renewer) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptPatience)
	defer cancel()
	if r.lease == nil {
		current, err := r.get(ctx)
		if err != nil {
			return err
		}
		if current != nil && !r.mine(current) {
			return errTaken
		}
		r.lease = current
	}
	desired := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: LeaseName(r.Self.Name)}}
	if r.lease != nil {
		desired = r.lease.DeepCopy()
	}
	self := r.Self
	self.Load, self.Tokens = r.load()
	self.Draining = r.draining.Load()
	self.RenewTime, self.Duration = r.Clock.Now(), Duration
	self.Into(desired)

	var err error
	if desired.ResourceVersion == "" {
		err = r.Client.Create(ctx, desired)
	} else {
		err = r.Client.Update(ctx, desired)
	}
	if err != nil {
		r.lease = nil // what is there now is read before the next attempt
		return fmt.Errorf("renewing the lease: %w", err)
	}
	r.lease = desired
	return nil
}

// mine reports whether the Lease may be written: it is this incarnation's, or
// another's that has not changed for its whole duration of our own clock.
func (r *Renewer) mine(current *coordinationv1.Lease) bool {
	member, err := FromLease(current)
	if err == nil && member.Incarnation == r.Self.Incarnation {
		return true
	}
	if r.foreign != current.ResourceVersion {
		r.foreign, r.foreignSince = current.ResourceVersion, r.Clock.Now()
		return false
	}
	return r.Clock.Since(r.foreignSince) >= Duration
}

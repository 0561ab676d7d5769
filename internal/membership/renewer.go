package membership

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
	// RenewInterval is how often a worker renews each of its heartbeats
	// (docs/architecture.md, "Ownership").
	RenewInterval = 3 * time.Second
	// Duration is how long a worker is given new sessions after a renewal of its Lease.
	Duration = 15 * time.Second
	// attemptTimeout bounds one renewal, counted from when it is sent.
	attemptTimeout = 2 * time.Second
)

// errTaken says that another incarnation of the worker renews a heartbeat.
var errTaken = errors.New("another process has taken over this worker's name: give each worker its own name")

// Renewer is the first heartbeat: a worker's Lease. Nobody else writes it.
type Renewer struct {
	// Client must read from the API server itself.
	Client    client.Client
	Namespace string
	// Self describes this worker; the values that change from renewal to renewal are filled
	// in by the Renewer.
	Self Member
	// Revision, where set, is called at each renewal; see Member.Revision.
	Revision func() int64
	// Failing, where set, is called at each renewal; see Member.StoreFailing.
	Failing func() (store, whatsapp bool)
	Clock   clock.WithTicker
	Log     logr.Logger

	// lease is the Lease that was written last; nil: it must be read. Only one goroutine at a
	// time uses it.
	lease    *coordinationv1.Lease
	draining atomic.Bool
	load     func() (sessions, tokens int)
	// acquired is when this process wrote its first renewal.
	acquired time.Time
}

// Drain writes at once, without waiting for the next renewal, that the worker accepts no
// more sessions. It may be called while Run runs.
func (r *Renewer) Drain(ctx context.Context) error {
	r.draining.Store(true)
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	current, err := r.get(ctx)
	if err != nil || current == nil {
		return err
	}
	member, err := FromLease(current)
	if err != nil || !r.isMine(current) {
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

// Leave deletes the Lease. It must not be called while a renewal is in progress.
func (r *Renewer) Leave(ctx context.Context) error {
	current, err := r.get(ctx)
	if err != nil || current == nil {
		return err
	}
	if !r.isMine(current) {
		return nil
	}
	rv := current.ResourceVersion
	err = r.Client.Delete(ctx, current, client.Preconditions{ResourceVersion: &rv})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("deleting the lease: %w", err)
	}
	return nil
}

func (r *Renewer) get(ctx context.Context) (*coordinationv1.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	current := &coordinationv1.Lease{}
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: r.Namespace, Name: LeaseName(r.Self.Release, r.Self.Name)}, current)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("reading the lease: %w", err)
	}
	return current, nil
}

// renew writes the Lease once. It returns errTaken if another incarnation holds the Lease.
func (r *Renewer) renew(ctx context.Context) error {
	if r.lease == nil {
		current, err := r.get(ctx)
		if err != nil {
			return err
		}
		if current != nil && !r.isMine(current) {
			return errTaken
		}
		r.lease = current
	}
	err := r.write(ctx)
	if apierrors.IsConflict(err) { // Drain or a person has changed it
		return r.renew(ctx)
	}
	return err
}

// isMine reads only the Lease's holder: a person may have damaged other fields, and the
// next write repairs them.
func (r *Renewer) isMine(l *coordinationv1.Lease) bool {
	return l.Spec.HolderIdentity != nil && *l.Spec.HolderIdentity == r.Self.Name+"/"+r.Self.Incarnation
}

// write writes the Lease with the resourceVersion that it was computed from.
func (r *Renewer) write(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	desired := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: LeaseName(r.Self.Release, r.Self.Name)}}
	if r.lease != nil {
		desired = r.lease.DeepCopy()
	}
	self := r.Self
	if r.Revision != nil {
		self.Revision = r.Revision()
	}
	if r.Failing != nil {
		self.StoreFailing, self.WhatsAppFailing = r.Failing()
	}
	self.Load, self.Tokens = r.load()
	self.Draining = r.draining.Load()
	self.RenewTime, self.Duration = r.Clock.Now(), Duration
	if r.acquired.IsZero() {
		r.acquired = self.RenewTime
	}
	self.AcquireTime = r.acquired
	self.Into(desired)

	var err error
	if desired.ResourceVersion == "" {
		err = r.Client.Create(ctx, desired)
	} else {
		err = r.Client.Update(ctx, desired)
	}
	if err != nil {
		r.lease = nil // read before the next attempt
		return fmt.Errorf("renewing the lease: %w", err)
	}
	r.lease = desired
	return nil
}

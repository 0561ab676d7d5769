package kube

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

const (
	// ownerRequests and reportRequests limit how many requests to the API server a worker makes
	// at a time. When a thousand sessions come back at once, their requests wait here: in the API
	// server their time-outs would run while they wait.
	ownerRequests  = 28
	reportRequests = 4
	// RequestTimeout bounds one request to the API server, from the moment at which it is sent.
	RequestTimeout = 10 * time.Second
)

// Sessions reads and writes the sessions of one worker; its client must not read
// from a cache.
//
// Claims and releases have priority over reports: a report may be a second late, but a session
// is down until it is claimed. While a claim or a release waits or is in progress, only one
// report is sent at a time.
type Sessions struct {
	client                 client.Client
	owner, reports, single *semaphore.Weighted
	// owning counts the claims, releases and reads that wait or are in progress.
	owning atomic.Int64
}

// NewSessions returns Sessions that use c.
func NewSessions(c client.Client) *Sessions {
	return &Sessions{
		client: c,
		owner:  semaphore.NewWeighted(ownerRequests), reports: semaphore.NewWeighted(reportRequests), single: semaphore.NewWeighted(1),
	}
}

// own calls f, a request that a claim or a release needs, when it is its turn.
func (s *Sessions) own(ctx context.Context, f func(context.Context) error) error {
	s.owning.Add(1)
	defer s.owning.Add(-1)
	return request(ctx, s.owner, f)
}

// report calls f, a request that only reports the state of a session, when it is its turn.
func (s *Sessions) report(ctx context.Context, f func(context.Context) error) error {
	many := false
	err := request(ctx, s.single, func(ctx context.Context) error {
		if many = s.owning.Load() == 0; many {
			return nil
		}
		return f(ctx)
	})
	if err != nil || !many {
		return err
	}
	return request(ctx, s.reports, f)
}

func request(ctx context.Context, turns *semaphore.Weighted, f func(context.Context) error) error {
	if err := turns.Acquire(ctx, 1); err != nil {
		return fmt.Errorf("waiting for a turn at the API server: %w", err)
	}
	defer turns.Release(1)
	ctx, cancel := context.WithTimeout(ctx, RequestTimeout)
	defer cancel()
	return f(ctx)
}

// changesOwner reports whether the write is a claim or a release.
func changesOwner(from, to *v1alpha1.WhatsAppSessionStatus) bool {
	return from.HeldBy != to.HeldBy || from.HolderStart != to.HolderStart
}

// Get implements worker.Sessions.
func (s *Sessions) Get(ctx context.Context, key types.NamespacedName) (*v1alpha1.WhatsAppSession, error) {
	obj := &v1alpha1.WhatsAppSession{}
	if err := s.own(ctx, func(ctx context.Context) error { return s.client.Get(ctx, key, obj) }); err != nil {
		return nil, fmt.Errorf("reading the session: %w", err)
	}
	obj.ManagedFields = nil
	return obj, nil
}

// HeldNotPlaced implements worker.Sessions.
func (s *Sessions) HeldNotPlaced(ctx context.Context, name string) ([]v1alpha1.WhatsAppSession, error) {
	list := &v1alpha1.WhatsAppSessionList{}
	if err := s.own(ctx, func(ctx context.Context) error {
		return s.client.List(ctx, list, client.MatchingFieldsSelector{Selector: fields.AndSelectors(
			fields.OneTermEqualSelector("status.heldBy", name), fields.OneTermNotEqualSelector("status.worker", name),
		)})
	}); err != nil {
		return nil, fmt.Errorf("listing the sessions that this worker holds: %w", err)
	}
	for i := range list.Items {
		list.Items[i].ManagedFields = nil
	}
	return list.Items, nil
}

// PatchStatus implements worker.Sessions.
func (s *Sessions) PatchStatus(ctx context.Context, base *v1alpha1.WhatsAppSession, status v1alpha1.WhatsAppSessionStatus) (*v1alpha1.WhatsAppSession, error) {
	obj := base.DeepCopy()
	obj.Status = status
	patch := client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})
	turn := s.report
	if changesOwner(&base.Status, &status) {
		turn = s.own
	}
	if err := turn(ctx, func(ctx context.Context) error { return s.client.Status().Patch(ctx, obj, patch) }); err != nil {
		return nil, fmt.Errorf("writing the session's status: %w", err)
	}
	obj.ManagedFields = nil
	return obj, nil
}

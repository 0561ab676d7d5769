package app

import (
	"context"
	"fmt"
	"net/url"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

const (
	// ownerRequests and reportRequests bound a worker's requests to the API server at a
	// time: when a thousand sessions come back at once, they wait here and not in the API
	// server, where each would use up its time.
	ownerRequests  = 28
	reportRequests = 4
	// apiTimeout bounds one request, from the moment in which it is sent.
	apiTimeout = 10 * time.Second
)

// sessions is the API server for a supervisor; its client must not read from a cache.
//
// Who owns a device goes before what is told of it: a report that is late by a
// second harms nobody, and a session whose claim is late is down. While anything
// that concerns an owner waits or is under way, there is one report at a time.
type sessions struct {
	client                 client.Client
	owner, reports, single *semaphore.Weighted
	// owning counts the requests that concern an owner and wait or are under way.
	owning atomic.Int64
}

func newSessions(c client.Client) *sessions {
	return &sessions{
		client: c,
		owner:  semaphore.NewWeighted(ownerRequests), reports: semaphore.NewWeighted(reportRequests), single: semaphore.NewWeighted(1),
	}
}

// own calls f, which concerns the owner of a device, when it is its turn.
func (s *sessions) own(ctx context.Context, f func(context.Context) error) error {
	s.owning.Add(1)
	defer s.owning.Add(-1)
	return request(ctx, s.owner, f)
}

// report is own for what is only told.
func (s *sessions) report(ctx context.Context, f func(context.Context) error) error {
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
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	return f(ctx)
}

// changesOwner: the write is a claim or a release.
func changesOwner(from, to *v1alpha1.WhatsAppSessionStatus) bool {
	return from.HeldBy != to.HeldBy || from.HolderStart != to.HolderStart
}

// Get implements worker.Sessions.
func (s *sessions) Get(ctx context.Context, key types.NamespacedName) (*v1alpha1.WhatsAppSession, error) {
	obj := &v1alpha1.WhatsAppSession{}
	if err := s.own(ctx, func(ctx context.Context) error { return s.client.Get(ctx, key, obj) }); err != nil {
		return nil, fmt.Errorf("reading the session: %w", err)
	}
	obj.ManagedFields = nil
	return obj, nil
}

// HeldNotPlaced implements worker.Sessions.
func (s *sessions) HeldNotPlaced(ctx context.Context, name string) ([]v1alpha1.WhatsAppSession, error) {
	list := &v1alpha1.WhatsAppSessionList{}
	if err := s.own(ctx, func(ctx context.Context) error {
		return s.client.List(ctx, list, client.MatchingFieldsSelector{Selector: fields.AndSelectors(
			fields.OneTermEqualSelector("status.heldBy", name), fields.OneTermNotEqualSelector("status.worker", name),
		)})
	}); err != nil {
		return nil, fmt.Errorf("listing what is held: %w", err)
	}
	for i := range list.Items {
		list.Items[i].ManagedFields = nil
	}
	return list.Items, nil
}

// PatchStatus implements worker.Sessions.
func (s *sessions) PatchStatus(ctx context.Context, base *v1alpha1.WhatsAppSession, status v1alpha1.WhatsAppSessionStatus) (*v1alpha1.WhatsAppSession, error) {
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

// proxies reads the Secrets that specs name; its client must not read from a
// cache, which would need the right to list Secrets.
type proxies struct {
	client client.Client
	// serviceAccount is the workers', as NAMESPACE:NAME.
	serviceAccount string
}

// Proxy implements worker.Proxies.
func (p *proxies) Proxy(ctx context.Context, session *v1alpha1.WhatsAppSession) (*url.URL, error) {
	if session.Spec.Proxy == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	name := session.Spec.Proxy.SecretRef.Name
	secret := &corev1.Secret{}
	err := p.client.Get(ctx, types.NamespacedName{Namespace: session.Namespace, Name: name}, secret)
	switch {
	case apierrors.IsNotFound(err):
		return nil, &worker.Refusal{Reason: v1alpha1.ReasonProxySecretMissing, Message: fmt.Sprintf(
			"the Secret %s that spec.proxy.secretRef names does not exist: create it with type %s and the key %s", name, v1alpha1.ProxySecretType, v1alpha1.ProxySecretKey)}
	case apierrors.IsForbidden(err):
		return nil, &worker.Refusal{Reason: v1alpha1.ReasonProxySecretForbidden, Message: fmt.Sprintf(
			"the workers may not read the Secret %s: kubectl -n %s create rolebinding whatsapp-operator-proxy --clusterrole=whatsapp-operator-proxy-reader --serviceaccount=%s",
			name, session.Namespace, p.serviceAccount)}
	case err != nil:
		return nil, fmt.Errorf("reading the proxy's Secret: %w", err)
	case secret.Type != v1alpha1.ProxySecretType:
		return nil, &worker.Refusal{Reason: v1alpha1.ReasonProxySecretInvalid, Message: fmt.Sprintf(
			"the Secret %s is not of type %s: only Secrets of this type are used; create it anew with it", name, v1alpha1.ProxySecretType)}
	}
	proxy, err := whatsapp.ParseProxy(string(secret.Data[v1alpha1.ProxySecretKey]))
	if err != nil {
		return nil, &worker.Refusal{Reason: v1alpha1.ReasonProxySecretInvalid, Message: fmt.Sprintf("the Secret %s, key %s: %v", name, v1alpha1.ProxySecretKey, err)}
	}
	return proxy, nil
}

// recorder tells people by Events beside the session.
type recorder struct{ events events.EventRecorder }

// Event implements worker.Events.
func (r *recorder) Event(session *v1alpha1.WhatsAppSession, kind, reason, message string) {
	r.events.Eventf(session, nil, kind, reason, reason, "%s", message)
}

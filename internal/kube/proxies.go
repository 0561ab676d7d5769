package kube

import (
	"context"
	"fmt"
	"net/url"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/whatsapp"
	"github.com/whatsapp-operator/whatsapp-operator/internal/worker"
)

// Proxies reads the proxies' Secrets that sessions name. Its client must not read from a
// cache, which would need the right to list Secrets.
type Proxies struct {
	Client client.Reader
	// ServiceAccount is the service account of the workers, as NAMESPACE:NAME.
	ServiceAccount string
}

// Proxy implements worker.Proxies.
func (p *Proxies) Proxy(ctx context.Context, session *v1alpha1.WhatsAppSession) (*url.URL, error) {
	if session.Spec.Proxy == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, RequestTimeout)
	defer cancel()
	name := session.Spec.Proxy.SecretRef.Name
	secret := &corev1.Secret{}
	err := p.Client.Get(ctx, types.NamespacedName{Namespace: session.Namespace, Name: name}, secret)
	switch {
	case apierrors.IsNotFound(err):
		return nil, &worker.SetupError{Reason: v1alpha1.ReasonProxySecretMissing, Message: fmt.Sprintf(
			"the Secret %s that spec.proxy.secretRef names does not exist: create it with type %s and the key %s", name, v1alpha1.ProxySecretType, v1alpha1.ProxySecretKey)}
	case apierrors.IsForbidden(err):
		return nil, &worker.SetupError{Reason: v1alpha1.ReasonProxySecretForbidden, Message: fmt.Sprintf(
			"the workers may not read the Secret %s: kubectl -n %s create rolebinding whatsapp-operator-proxy --clusterrole=whatsapp-operator-proxy-reader --serviceaccount=%s",
			name, session.Namespace, p.ServiceAccount)}
	case err != nil:
		return nil, fmt.Errorf("reading the proxy's Secret: %w", err)
	case secret.Type != v1alpha1.ProxySecretType:
		return nil, &worker.SetupError{Reason: v1alpha1.ReasonProxySecretInvalid, Message: fmt.Sprintf(
			"the Secret %s is not of type %s: only Secrets of this type are used; delete it and create it with this type", name, v1alpha1.ProxySecretType)}
	}
	proxy, err := whatsapp.ParseProxy(string(secret.Data[v1alpha1.ProxySecretKey]))
	if err != nil {
		return nil, &worker.SetupError{Reason: v1alpha1.ReasonProxySecretInvalid, Message: fmt.Sprintf("the Secret %s, key %s: %v", name, v1alpha1.ProxySecretKey, err)}
	}
	return proxy, nil
}

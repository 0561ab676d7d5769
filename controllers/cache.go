package controllers

import (
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
)

// CacheOptions limit the manager's cache to what the controllers need: the only Leases are
// those of the release's workers in the operator's namespace, and every object is without
// its managed fields and without kubectl's copy of the manifest.
func CacheOptions(namespace, release string) cache.Options {
	return cache.Options{
		DefaultTransform: slim,
		ByObject: map[client.Object]cache.ByObject{
			&v1alpha1.WhatsAppSession{}: {},
			&coordinationv1.Lease{}: {
				Namespaces: map[string]cache.Config{namespace: {}},
				Label:      labels.SelectorFromSet(membership.WorkerLabels(release)),
			},
		},
	}
}

var stripManagedFields = cache.TransformStripManagedFields()

func slim(in any) (any, error) {
	if obj, ok := in.(client.Object); ok {
		if annotations := obj.GetAnnotations(); annotations[corev1.LastAppliedConfigAnnotation] != "" {
			delete(annotations, corev1.LastAppliedConfigAnnotation)
		}
	}
	return stripManagedFields(in)
}

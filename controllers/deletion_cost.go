package controllers

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// costInterval is how often the deletion cost of the workers' pods is updated.
const costInterval = time.Minute

// deletionCosts sets the deletion cost of each worker's pod to its number of sessions, so
// that a Deployment that is scaled down ends the pods with the fewest sessions first. It is
// a hint: nothing else depends on it, so nothing else fails with it. Only the leader runs it.
type deletionCosts struct {
	namespace    string
	installation string
	clock        clock.WithTicker
	log          logr.Logger
	client       client.Client
	direct       client.Reader // pods are not cached
	members      *members

	// written is the deletion cost of each worker's pod, as far as this process knows.
	written map[string]int
}

// Start updates the pods until ctx ends.
func (d *deletionCosts) Start(ctx context.Context) error {
	ticker := d.clock.NewTicker(costInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
			if err := d.update(ctx); err != nil && ctx.Err() == nil {
				d.log.Error(err, "Failed to write the deletion cost of the workers' pods, trying again")
			}
		}
	}
}

// update writes the costs that have changed noticeably.
func (d *deletionCosts) update(ctx context.Context) error {
	list := &v1alpha1.WhatsAppSessionList{}
	if err := d.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("listing the sessions: %w", err)
	}
	costs := map[string]int{}
	workers, _ := d.members.workers(d.clock.Now())
	for _, w := range workers {
		if w.Live {
			costs[w.Name] = 0
		}
	}
	for i := range list.Items {
		holder := list.Items[i].Status.HeldBy
		if _, live := costs[holder]; live && list.Items[i].Status.Installation == d.installation { // another's worker may have the same name
			costs[holder]++
		}
	}
	for name := range d.written {
		if _, live := costs[name]; !live {
			delete(d.written, name)
		}
	}
	for name, cost := range costs {
		if before, known := d.written[name]; known && !noticeable(before, cost) {
			continue
		}
		if err := d.write(ctx, name, cost); err != nil {
			return err
		}
	}
	return nil
}

// noticeable reports whether a cost has changed by more than a tenth, or from or to zero.
func noticeable(before, now int) bool {
	if before == 0 || now == 0 {
		return before != now
	}
	return 10*max(before-now, now-before) > before
}

// write writes the cost to a worker's pod, unless the pod has about the same cost already.
// A worker may run without a pod.
func (d *deletionCosts) write(ctx context.Context, worker string, cost int) error {
	pod := &metav1.PartialObjectMetadata{}
	pod.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Pod"))
	err := d.direct.Get(ctx, types.NamespacedName{Namespace: d.namespace, Name: worker}, pod)
	if err != nil {
		if client.IgnoreNotFound(err) == nil {
			return nil
		}
		return fmt.Errorf("reading the pod of worker %s: %w", worker, err)
	}
	before, err := strconv.Atoi(pod.Annotations[corev1.PodDeletionCost])
	if err == nil && !noticeable(before, cost) {
		d.written[worker] = before
		return nil
	}
	base := pod.DeepCopy()
	metav1.SetMetaDataAnnotation(&pod.ObjectMeta, corev1.PodDeletionCost, strconv.Itoa(cost))
	err = client.IgnoreNotFound(d.client.Patch(ctx, pod, client.MergeFrom(base)))
	if err != nil {
		return fmt.Errorf("writing the deletion cost of worker %s: %w", worker, err)
	}
	d.written[worker] = cost
	return nil
}

package app

import (
	"context"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// deploymentRevision is where the Deployment controller numbers its ReplicaSets.
	deploymentRevision = "deployment.kubernetes.io/revision"
	// revisionInterval is how often the number is read again: a rollback gives an old
	// ReplicaSet, and so pods that run already, the newest number.
	revisionInterval = 30 * time.Second
)

// revision is the worker's place in the order of versions: a flag's, or the
// number of the Deployment's revision that its pod belongs to.
type revision struct {
	client          client.Reader
	namespace, name string
	fixed           bool
	value           atomic.Int64
	trouble         bool
	log             logr.Logger
}

func newRevision(c client.Reader, config *workerConfig, log logr.Logger) *revision {
	r := &revision{client: c, namespace: config.Namespace, name: config.Name, fixed: config.Revision != 0 || config.PodUID == "", log: log}
	r.value.Store(config.Revision)
	return r
}

func (r *revision) number() int64 { return r.value.Load() }

// first reads the number for the first Lease: a worker of a new revision that did
// not say so would be given sessions that move once more. What will not change
// by waiting is said, and the number is 0.
func (r *revision) first(ctx context.Context) (final bool, err error) {
	if r.fixed {
		return true, nil
	}
	number, err := r.read(ctx)
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		r.log.Error(err, "The revision of this worker's Deployment is not known: a rollout may move sessions twice")
		r.trouble = true
		return true, nil
	}
	r.value.Store(number)
	return err == nil, err
}

// refresh reads the number again; without an answer the old one stays.
func (r *revision) refresh(ctx context.Context) {
	if r.fixed {
		return
	}
	number, err := r.read(ctx)
	switch {
	case err == nil:
		r.value.Store(number)
		r.trouble = false
	case ctx.Err() == nil && !r.trouble:
		r.log.Error(err, "The revision of this worker's Deployment could not be read; it is tried again")
		r.trouble = true
	}
}

// run keeps the number until ctx ends.
func (r *revision) run(ctx context.Context) error {
	ticker := time.NewTicker(revisionInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			r.refresh(ctx)
		}
	}
}

func (r *revision) read(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	pod := &corev1.Pod{}
	if err := r.client.Get(ctx, client.ObjectKey{Namespace: r.namespace, Name: r.name}, pod); err != nil {
		return 0, fmt.Errorf("reading this worker's pod: %w", err)
	}
	owner := metav1.GetControllerOf(pod)
	if owner == nil || owner.Kind != "ReplicaSet" {
		return 0, nil
	}
	set := &appsv1.ReplicaSet{}
	if err := r.client.Get(ctx, client.ObjectKey{Namespace: r.namespace, Name: owner.Name}, set); err != nil {
		return 0, fmt.Errorf("reading this worker's ReplicaSet: %w", err)
	}
	text, found := set.Annotations[deploymentRevision]
	if !found {
		return 0, nil
	}
	number, err := strconv.ParseInt(text, 10, 64)
	if err != nil || number < 0 {
		return 0, fmt.Errorf("the annotation %s of the ReplicaSet %s is no number", deploymentRevision, owner.Name)
	}
	return number, nil
}

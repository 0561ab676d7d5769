package kube

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
	// deploymentRevision is the annotation with which the Deployment controller numbers its
	// ReplicaSets.
	deploymentRevision = "deployment.kubernetes.io/revision"
	// revisionInterval is how often the number is read again: a rollback gives the newest
	// number to an old ReplicaSet, and so to pods that already run.
	revisionInterval = 30 * time.Second
)

// Revision is the number that orders the versions of workers: the value of a flag, or the
// revision of the Deployment that the worker's pod belongs to.
type Revision struct {
	client          client.Reader
	namespace, name string
	fixed           bool
	value           atomic.Int64
	failing         bool
	log             logr.Logger
}

// RevisionOptions say whose revision it is.
type RevisionOptions struct {
	// Fixed is the value of the flag; 0: the Deployment's revision.
	Fixed int64
	// Namespace and Pod name the worker's pod; InPod is false where there is none.
	Namespace, Pod string
	InPod          bool
}

// NewRevision returns the revision of one worker; c must not read from a cache.
func NewRevision(c client.Reader, o RevisionOptions, log logr.Logger) *Revision {
	r := &Revision{client: c, namespace: o.Namespace, name: o.Pod, fixed: o.Fixed != 0 || !o.InPod, log: log}
	r.value.Store(o.Fixed)
	return r
}

// Number is the revision that was read last.
func (r *Revision) Number() int64 { return r.value.Load() }

// First reads the number for the first Lease. Without it a worker of a new revision would be
// treated as an old one, and its sessions would have to move once more. If trying again cannot
// help, First logs the error and the number is 0.
func (r *Revision) First(ctx context.Context) (final bool, err error) {
	if r.fixed {
		return true, nil
	}
	number, err := r.read(ctx)
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		r.log.Error(err, "Failed to find the revision of this worker's Deployment: a rollout may move sessions twice")
		r.failing = true
		return true, nil
	}
	r.value.Store(number)
	return err == nil, err
}

// refresh reads the number again. If that fails, the number does not change.
func (r *Revision) refresh(ctx context.Context) {
	if r.fixed {
		return
	}
	number, err := r.read(ctx)
	switch {
	case err == nil:
		r.value.Store(number)
		r.failing = false
	case ctx.Err() == nil && !r.failing:
		r.log.Error(err, "Failed to read the revision of this worker's Deployment, trying again")
		r.failing = true
	}
}

// Run reads the number again every 30 seconds, until ctx ends.
func (r *Revision) Run(ctx context.Context) error {
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

func (r *Revision) read(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, RequestTimeout)
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
		return 0, fmt.Errorf("the annotation %s of the ReplicaSet %s is not a number", deploymentRevision, owner.Name)
	}
	return number, nil
}

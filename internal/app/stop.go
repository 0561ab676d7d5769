package app

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// stopConfig configures `stop`. Of the common flags it has only those of the API server.
type stopConfig struct {
	commonConfig
	// workers and managers are Deployments.
	workers, managers []string
	timeout           time.Duration
}

func newStopCommand() *cobra.Command {
	config := &stopConfig{}
	cmd := configured(&cobra.Command{
		Use:   "stop",
		Short: "Stop the workers and then the managers of a release, and wait until they have ended",
		Long: `Stop the workers and then the managers of a release, and wait until they have ended.

The chart runs it before an uninstallation. Helm deletes all objects of a release at once:
a worker whose rights and stores are gone can neither hand over its sessions nor write that
they are disconnected.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return startWithCluster(cmd, &config.commonConfig, func(ctx context.Context, c client.Client, log logr.Logger) error {
				return stop(ctx, c, config, log)
			})
		},
	}, func([]string) error { return config.complete() })
	config.bind(cmd.Flags())
	return cmd
}

func (c *stopConfig) bind(f *pflag.FlagSet) {
	c.bindCluster(f)
	f.StringSliceVar(&c.workers, "workers", nil, "Deployments of the workers, which are stopped first")
	f.StringSliceVar(&c.managers, "managers", nil, "Deployments of the managers, which are stopped when no worker is left")
	f.DurationVar(&c.timeout, "timeout", 3*time.Minute, "how long all of it may take; a worker ends within its drain time-out")
}

func (c *stopConfig) complete() error {
	var p problems
	p.join(c.checkCluster())
	if len(c.workers)+len(c.managers) == 0 {
		p.add("nothing is to be stopped: give --workers or --managers")
	}
	for flag, names := range map[string][]string{"workers": c.workers, "managers": c.managers} {
		for _, name := range names {
			if len(validation.IsDNS1123Subdomain(name)) > 0 {
				p.add("--%s is %q: give the names of Deployments", flag, name)
			}
		}
	}
	within(&p, "timeout", c.timeout, time.Second, time.Hour)
	return p.err()
}

// stop scales the Deployments to zero and waits until their pods are gone. It asks the API
// server again when it does not answer.
func stop(ctx context.Context, c client.Client, config *stopConfig, log logr.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, config.timeout)
	defer cancel()
	for _, names := range [][]string{config.workers, config.managers} {
		var left []string
		var last error
		err := wait.PollUntilContextCancel(ctx, time.Second, true, func(ctx context.Context) (bool, error) {
			var pods []string
			var failed error
			for _, name := range names {
				of, err := scaleToZero(ctx, c, client.ObjectKey{Namespace: config.Namespace, Name: name}, log)
				if apierrors.IsForbidden(err) {
					return false, err // another attempt has the same answer
				}
				pods, failed = append(pods, of...), errors.Join(failed, err)
			}
			if ctx.Err() != nil && len(left) > 0 {
				return false, ctx.Err() // a request was cut off; the pods are what a person needs to know
			}
			left, last = pods, failed
			return failed == nil && len(pods) == 0, nil
		})
		switch {
		case err == nil:
			log.Info("Stopped", "deployments", names)
		case wait.Interrupted(err) || errors.Is(err, context.Canceled):
			if last == nil {
				last = fmt.Errorf("these pods have not ended in time: %s", strings.Join(left, ", "))
			}
			err = last
			fallthrough
		default:
			return fmt.Errorf("stopping %s: %w. To uninstall without waiting, give helm uninstall the flag --no-hooks", strings.Join(names, ", "), err)
		}
	}
	return nil
}

// scaleToZero returns the pods of a Deployment that have not ended. An autoscaler may have
// raised the number again since the last call.
func scaleToZero(ctx context.Context, c client.Client, key client.ObjectKey, log logr.Logger) (left []string, err error) {
	deployment := &appsv1.Deployment{}
	if err := c.Get(ctx, key, deployment); apierrors.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("reading the Deployment: %w", err)
	}
	if ptr.Deref(deployment.Spec.Replicas, 1) != 0 {
		log.Info("Scaling to zero", "deployment", key.Name)
		scale := &unstructured.Unstructured{}
		scale.SetGroupVersionKind(appsv1.SchemeGroupVersion.WithKind("Deployment"))
		scale.SetNamespace(key.Namespace)
		scale.SetName(key.Name)
		if err := c.SubResource("scale").Patch(ctx, scale, client.RawPatch(types.MergePatchType, []byte(`{"spec":{"replicas":0}}`))); err != nil {
			return nil, fmt.Errorf("scaling the Deployment to zero: %w", err)
		}
	}
	selector, err := metav1.LabelSelectorAsSelector(deployment.Spec.Selector)
	if err != nil {
		return nil, fmt.Errorf("reading the Deployment's selector: %w", err)
	}
	var pods corev1.PodList
	if err := c.List(ctx, &pods, client.InNamespace(key.Namespace), client.MatchingLabelsSelector{Selector: selector}); err != nil {
		return nil, fmt.Errorf("listing the pods: %w", err)
	}
	for _, pod := range pods.Items {
		// A pod that was evicted stays as Failed until somebody removes it.
		if pod.Status.Phase != corev1.PodFailed && pod.Status.Phase != corev1.PodSucceeded {
			left = append(left, pod.Name)
		}
	}
	slices.Sort(left)
	return left, nil
}

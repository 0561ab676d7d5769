//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

const (
	systemNamespace = "e2e-system"
	crdName         = "whatsappsessions.whatsapp-operator.io"
	// workerCount is the number of workers in all parts but the first.
	workerCount = 3
)

// release is the installation by Helm.
type release struct {
	name string
	// fullname begins the names of its objects.
	fullname string
	// charts are the packaged charts of the versions.
	charts [3]string
	// installed says that it has sessions and stand-ins.
	installed bool
	version   int // index of versions
	values    map[string]any
}

func newRelease() release { return release{name: "e2e", fullname: "e2e-whatsapp-operator"} }

func (r release) manager() string          { return r.fullname + "-manager" }
func (r release) worker() string           { return r.fullname + "-worker" }
func (r release) store(name string) string { return r.fullname + "-" + name }
func (r release) claim(name string) string { return "data-" + r.store(name) + "-0" }
func (r release) labels(component string) client.MatchingLabels {
	return client.MatchingLabels{"app.kubernetes.io/instance": r.name, "app.kubernetes.io/component": component}
}

// packageCharts packages the chart as it is published: its version is that of the image.
func (e *environment) packageCharts(t *testing.T) {
	t.Helper()
	for i := range released {
		e.packageChart(t, e.root, i)
	}
}

func (e *environment) packageChart(t *testing.T, root string, version int) {
	t.Helper()
	name := versions[version]
	e.run(t, nil, "helm", "package", filepath.Join(root, "charts", "whatsapp-operator"), "--version", name, "--app-version", name, "-d", e.dir)
	e.release.charts[version] = filepath.Join(e.dir, "whatsapp-operator-"+name+".tgz")
}

// baseValues name the images; nothing else is set in the first installation.
func baseValues() map[string]any {
	return map[string]any{"image": map[string]any{"repository": repository}}
}

// standinValues connect the release to the stand-ins for WhatsApp and Laravel.
func (e *environment) standinValues() map[string]any {
	return map[string]any{
		"image": map[string]any{"repository": repository},
		"worker": map[string]any{"replicas": workerCount, "extraEnv": []any{
			map[string]any{"name": "WHATSAPP_OPERATOR_WHATSAPP_ENDPOINT", "value": e.standins.endpoint()},
			map[string]any{"name": "WHATSAPP_OPERATOR_WHATSAPP_NOISE_ROOT", "value": e.standins.noiseRoot},
		}},
		"laravel": map[string]any{
			"url": e.standins.laravelURL(), "insecureHTTP": true,
			"tokenSecret": map[string]any{"name": laravelSecret}, "signingSecret": map[string]any{"name": laravelSecret},
		},
	}
}

// helm runs install or upgrade with values, and waits until everything is ready.
func (e *environment) helm(t *testing.T, command string, version int, values map[string]any, flags ...string) {
	t.Helper()
	file := filepath.Join(e.dir, "values.json") // JSON is YAML
	content, err := json.MarshalIndent(values, "", "  ")
	must(t, err)
	must(t, os.WriteFile(file, content, 0o600))
	args := []string{command, e.release.name, e.release.charts[version], "-n", systemNamespace, "--wait", "--timeout=5m"}
	if given := os.Getenv(valuesVariable); given != "" {
		args = append(args, "-f", given)
	}
	args = append(append(args, "-f", file), flags...)
	if _, err := e.try(t.Context(), nil, "helm", args...); err != nil {
		t.Log(e.describePods(t.Context()))
		t.Fatal(err)
	}
	e.release.version, e.release.values = version, values
	e.remember(t)
}

// ownershipFlags are needed where another release, or a person, has installed the resource
// definition: the documented way to give it to this release.
func (e *environment) ownershipFlags(t *testing.T) []string {
	t.Helper()
	crd := crdObject()
	err := e.client.Get(t.Context(), client.ObjectKey{Name: crdName}, crd)
	if apierrors.IsNotFound(err) {
		return nil
	}
	must(t, err)
	owner := crd.GetAnnotations()["meta.helm.sh/release-name"]
	if owner == e.release.name {
		return nil
	}
	t.Logf("The resource definition exists (release %q): --take-ownership", owner)
	return []string{"--take-ownership"}
}

func crdObject() *unstructured.Unstructured {
	crd := &unstructured.Unstructured{}
	crd.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"})
	crd.SetName(crdName)
	return crd
}

func isNoMatch(err error) bool {
	return meta.IsNoMatchError(err) || discovery.IsGroupDiscoveryFailedError(err)
}

// pods returns the pods of a component that are not ending, the oldest first.
func (e *environment) pods(ctx context.Context, component string) ([]corev1.Pod, error) {
	var list corev1.PodList
	if err := e.client.List(ctx, &list, client.InNamespace(systemNamespace), e.release.labels(component)); err != nil {
		return nil, err
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	return pods, nil
}

func podReady(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodRunning && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// waitUntilReady waits until every workload of the release has all its pods, all ready and
// none ending.
func (e *environment) waitUntilReady(t *testing.T) {
	t.Helper()
	if err := testenv.Await(t.Context(), longTimeout, e.notReady); err != nil {
		t.Fatalf("Waiting for the release's pods: %v\n%s", err, e.describePods(t.Context()))
	}
}

func (e *environment) notReady(ctx context.Context) error {
	want := map[string]int{}
	var deployments appsv1.DeploymentList
	var sets appsv1.StatefulSetList
	for _, list := range []client.ObjectList{&deployments, &sets} {
		if err := e.client.List(ctx, list, client.InNamespace(systemNamespace)); err != nil {
			return err
		}
	}
	for i := range deployments.Items {
		d := &deployments.Items[i]
		if d.Status.ObservedGeneration < d.Generation || d.Status.UpdatedReplicas < *d.Spec.Replicas {
			return fmt.Errorf("%s has %d of %d pods of the newest revision", d.Name, d.Status.UpdatedReplicas, *d.Spec.Replicas)
		}
		want[d.Labels["app.kubernetes.io/component"]] += int(*d.Spec.Replicas)
	}
	for i := range sets.Items {
		want[sets.Items[i].Labels["app.kubernetes.io/component"]] += int(*sets.Items[i].Spec.Replicas)
	}
	var pods corev1.PodList
	if err := e.client.List(ctx, &pods, client.InNamespace(systemNamespace), client.HasLabels{"app.kubernetes.io/component"}); err != nil {
		return err
	}
	have := map[string]int{}
	for i := range pods.Items {
		p := &pods.Items[i]
		component := p.Labels["app.kubernetes.io/component"]
		switch {
		case want[component] == 0: // a Job's, a test's
		case p.DeletionTimestamp != nil:
			return fmt.Errorf("%s is ending", p.Name)
		case !podReady(p):
			return fmt.Errorf("%s is not ready", p.Name)
		default:
			have[component]++
		}
	}
	for component, n := range want {
		if have[component] != n {
			return fmt.Errorf("%s has %d pods instead of %d", component, have[component], n)
		}
	}
	return nil
}

// leader returns the name of the leading manager's pod.
func (e *environment) leader(ctx context.Context) (string, error) {
	lease := &coordinationv1.Lease{}
	if err := e.client.Get(ctx, client.ObjectKey{Namespace: systemNamespace, Name: membership.LeaderLeaseName(e.release.name)}, lease); err != nil {
		return "", err
	}
	if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" {
		return "", fmt.Errorf("nobody leads")
	}
	pod, _, _ := strings.Cut(*lease.Spec.HolderIdentity, "_")
	return pod, nil
}

// describePods is what a person would ask first when pods are not ready.
func (e *environment) describePods(ctx context.Context) string {
	ctx = context.WithoutCancel(ctx)
	var b strings.Builder
	for _, args := range [][]string{
		{"get", "pods", "-o", "wide"},
		{"get", "events", "--sort-by=.lastTimestamp", "--field-selector=type!=Normal"},
	} {
		output, err := e.try(ctx, nil, "kubectl", append([]string{"-n", systemNamespace}, args...)...)
		fmt.Fprintln(&b, tail(output, 6_000))
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	return b.String()
}

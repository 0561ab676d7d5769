//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// definitions are the resource definitions of other projects, in their Go modules: what a
// cluster with the Prometheus operator and KEDA knows.
var definitions = []struct{ module, folder, name string }{
	{"github.com/prometheus-operator/prometheus-operator@v0.85.0", "example/prometheus-operator-crd", "servicemonitors.monitoring.coreos.com"},
	{"github.com/prometheus-operator/prometheus-operator@v0.85.0", "example/prometheus-operator-crd", "podmonitors.monitoring.coreos.com"},
	{"github.com/kedacore/keda/v2@v2.21.0", "config/crd/bases", "scaledobjects.keda.sh"},
}

// optionSets are uses of the chart; the chart's own tests have more, without an API server.
var optionSets = []struct{ name, values string }{
	{"no values", ""},
	{"production", "-f charts/whatsapp-operator/values-production.yaml"},
	{"demo", "-f charts/whatsapp-operator/values-demo.yaml"},
	{"network policies", "--set networkPolicy.enabled=true,simulator.enabled=true"},
	{"KEDA and monitors", "--set worker.autoscaling.enabled=true,metrics.serviceMonitor.enabled=true,metrics.serviceMonitor.renderMode=alwaysRender"},
	{"everything", "-f hack/chart/testdata/everything.yaml --api-versions monitoring.coreos.com/v1 --api-versions keda.sh/v1alpha1"},
	{"HPA and two pools", "--set worker.autoscaling.enabled=true,worker.autoscaling.kind=HPA,pools.big.capacity=5000"},
	{"as little as possible", "--set crds.enabled=false,rbac.create=false,rbac.userRoles=false,metrics.enabled=false,manager.podDisruptionBudget.enabled=false,worker.podDisruptionBudget.enabled=false,manager.topologySpread.enabled=false,worker.topologySpread.enabled=false"},
}

// testManifests: the API server accepts the manifests of every option set, without a field
// that it does not know and without a pod that the standard "restricted" forbids.
func testManifests(t *testing.T, e *environment) {
	e.createNamespace(t, systemNamespace, nil)
	e.installDefinitions(t)
	// A pod is refused where its ServiceAccount is missing, and a dry run creates none.
	for _, name := range []string{"dry-run-whatsapp-operator-manager", "wa-manager"} {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: name}}
		must(t, e.client.Create(t.Context(), account))
		t.Cleanup(func() {
			if err := e.client.Delete(context.WithoutCancel(t.Context()), account); err != nil {
				t.Error(err)
			}
		})
	}
	for _, set := range optionSets {
		t.Run(set.name, func(t *testing.T) {
			// The hooks are rendered, too.
			args := append([]string{"template", "dry-run", "charts/whatsapp-operator", "-n", systemNamespace}, strings.Fields(set.values)...)
			file := filepath.Join(t.TempDir(), "manifests.yaml")
			must(t, os.WriteFile(file, []byte(e.run(t, nil, "helm", args...)), 0o600))
			output, err := e.tryAll(t, "kubectl", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", file)
			if err != nil {
				t.Error(err)
			}
			if strings.Contains(output, "Warning:") {
				t.Errorf("The API server warns:\n%s", output)
			}
		})
	}
}

// installDefinitions installs the resource definitions that the cluster does not have.
func (e *environment) installDefinitions(t *testing.T) {
	t.Helper()
	for _, d := range definitions {
		crd := crdObject()
		crd.SetName(d.name)
		err := e.client.Get(t.Context(), client.ObjectKeyFromObject(crd), crd)
		if err == nil {
			continue
		}
		if !apierrors.IsNotFound(err) {
			t.Fatal(err)
		}
		resource, group, _ := strings.Cut(d.name, ".")
		file := filepath.Join(e.moduleFolder(t, d.module), d.folder, fmt.Sprintf("%s_%s.yaml", group, resource))
		e.run(t, nil, "kubectl", "apply", "--server-side", "-f", file)
		e.eventually(t, d.name+" to be served", func(ctx context.Context) error {
			_, err := e.try(ctx, nil, "kubectl", "get", d.name, "-n", systemNamespace)
			return err
		})
		t.Cleanup(func() {
			if _, err := e.tryAll(t, "kubectl", "delete", "crd", d.name); err != nil {
				t.Error(err)
			}
		})
	}
}

// moduleFolder downloads a Go module and returns its folder.
func (e *environment) moduleFolder(t *testing.T, module string) string {
	t.Helper()
	var answer struct{ Dir string }
	must(t, json.Unmarshal([]byte(e.run(t, nil, "go", "mod", "download", "-json", module)), &answer))
	return answer.Dir
}

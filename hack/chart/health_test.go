package main

import (
	_ "embed" // the statuses
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	. "github.com/onsi/gomega"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

func session(generation int64, status map[string]any) map[string]any {
	s := map[string]any{
		"apiVersion": "whatsapp-operator.io/v1alpha1", "kind": "WhatsAppSession",
		"metadata": map[string]any{"name": "shop", "namespace": "shops", "generation": generation}, "spec": map[string]any{},
	}
	if status != nil {
		s["status"] = status
	}
	return s
}

// healthCase is a status and what Argo CD and Flux say of it.
type healthCase struct {
	name       string
	object     map[string]any
	argo, flux string
	message    string
}

// computed is a session with a status that internal/status computes: its test writes the file.
func computed(name string) map[string]any {
	var statuses map[string]map[string]any
	if err := json.Unmarshal(computedStatuses, &statuses); err != nil || statuses[name] == nil {
		panic("testdata/statuses.json has no status " + name)
	}
	s := statuses[name]
	s["observedGeneration"] = int64(s["observedGeneration"].(float64)) // as a client reads it
	return session(2, s)
}

//go:embed testdata/statuses.json
var computedStatuses []byte

// with returns a session with another condition Ready.
func with(s map[string]any, status, reason string) map[string]any {
	for _, c := range list(s, "status", "conditions") {
		if c := c.(map[string]any); c["type"] == "Ready" {
			c["status"], c["reason"] = status, reason
		}
	}
	return s
}

// generation returns a session whose spec was changed.
func generation(s map[string]any, now int64) map[string]any {
	s["metadata"].(map[string]any)["generation"] = now
	return s
}

var healthCases = []healthCase{
	{"new, as the API server stores it", session(1, map[string]any{"observedGeneration": int64(-1)}), "Progressing", "InProgress", "Waiting for the manager to see the session"},
	{"changed, not seen yet", generation(computed("Connected"), 3), "Progressing", "InProgress", "Waiting for the manager to see the change"},
	{"Connected, its worker is silent", with(computed("Connected"), "Unknown", "WorkerSilent"), "Progressing", "InProgress", "WorkerSilent: what to do"},
	{"Pending, its id is taken", computed("Pending, its id is taken"), "Degraded", "Failed", ""},
	{"Pending", computed("Pending"), "Progressing", "InProgress", "WaitingForPlacement: what to do"},
	{"Pending, no capacity", computed("Pending, no capacity"), "Progressing", "InProgress", "NoCapacity: what to do"},
	{"Pairing, nobody has scanned", computed("Pairing, nobody has scanned"), "Suspended", "Current", "WaitingForScan: what to do"},
	{"Pairing, a passkey is needed", computed("Pairing, a passkey is needed"), "Suspended", "Current", "PasskeyRequired: what to do"},
	{"PairingExpired", computed("PairingExpired"), "Suspended", "Current", "PairingExpired: what to do"},
	{"Connecting", computed("Connecting"), "Progressing", "InProgress", "Connecting: what to do"},
	{"Connected", computed("Connected"), "Healthy", "Current", "Connected: what to do"},
	{"Disconnected", computed("Disconnected"), "Progressing", "InProgress", "Reconnecting: what to do"},
	{"Disconnected, its worker died", computed("Disconnected, its worker died"), "Progressing", "InProgress", "WorkerLost: what to do"},
	{"Disconnected, in quarantine", computed("Disconnected, in quarantine"), "Degraded", "Failed", "Quarantined: what to do"},
	{"Suspended", computed("Suspended"), "Suspended", "Current", "Suspended: what to do"},
	{"LoggedOut", computed("LoggedOut"), "Degraded", "Failed", "LoggedOut: what to do"},
	{"LoggedOut, another phone", computed("LoggedOut, another phone"), "Degraded", "Failed", "WrongPhone: what to do"},
	{"Banned", computed("Banned"), "Degraded", "Failed", "Banned: what to do"},
	{"Outdated", computed("Outdated"), "Degraded", "Failed", "Outdated: what to do"},
	{"Replaced", computed("Replaced"), "Degraded", "Failed", "Replaced: what to do"},
	{"Failed", computed("Failed"), "Degraded", "Failed", "ProxySecretMissing: what to do"},
	{"Failed, it ends its worker", computed("Failed, it ends its worker"), "Degraded", "Failed", "EndsItsWorker: what to do"},
	{"Failed, another installation", computed("Failed, another installation"), "Degraded", "Failed", "OtherInstallation: what to do"},
	{"Terminating", computed("Terminating"), "Progressing", "InProgress", "Deleting: what to do"},
	{"Terminating, the store waits", computed("Terminating, the store waits"), "Progressing", "InProgress", "DeletionWaits: what to do"},
}

// TestEveryStatusHasAHealthCase: what internal/status adds is tried here, too.
func TestEveryStatusHasAHealthCase(t *testing.T) {
	g := NewWithT(t)
	var statuses map[string]any
	g.Expect(json.Unmarshal(computedStatuses, &statuses)).To(Succeed())
	for name := range statuses {
		g.Expect(slices.ContainsFunc(healthCases, func(c healthCase) bool { return c.name == name })).To(BeTrue(), name)
	}
}

// TestEveryPhaseHasAHealthCase reads the phases from the resource definition.
func TestEveryPhaseHasAHealthCase(t *testing.T) {
	g := NewWithT(t)
	var definition object
	g.Expect(yaml.Unmarshal(read(t, "config/crd/bases/whatsapp-operator.io_whatsappsessions.yaml"), &definition)).To(Succeed())
	phases := list(list(definition, "spec", "versions")[0], "schema", "openAPIV3Schema", "properties", "status", "properties", "phase", "enum")
	g.Expect(phases).NotTo(BeEmpty())
	for _, p := range phases {
		g.Expect(slices.ContainsFunc(healthCases, func(c healthCase) bool { return get(c.object, "status", "phase") == p })).To(BeTrue(), "no case has the phase %s", p)
	}
}

// TestArgoCDHealth runs the script as Argo CD does: the object is the global variable obj, the
// result a table, and no library but the base is open.
func TestArgoCDHealth(t *testing.T) {
	script := string(read(t, "examples/argocd/health.lua"))
	for _, c := range append([]healthCase{{"without a status", session(1, nil), "Progressing", "", "Waiting for the manager to see the session"}}, healthCases...) {
		t.Run(c.name, func(t *testing.T) {
			g := NewWithT(t)
			state := lua.NewState(lua.Options{SkipOpenLibs: true})
			defer state.Close()
			for name, open := range map[string]lua.LGFunction{lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable} {
				g.Expect(state.CallByParam(lua.P{Fn: state.NewFunction(open), Protect: true}, lua.LString(name))).To(Succeed())
			}
			state.SetGlobal("obj", toLua(state, c.object))
			g.Expect(state.DoString(script)).To(Succeed())
			result, ok := state.Get(-1).(*lua.LTable)
			g.Expect(ok).To(BeTrue(), "the script returns a table")
			g.Expect(result.RawGetString("status").String()).To(Equal(c.argo))
			if c.message == "" {
				c.message = text(list(c.object, "status", "conditions")[0], "reason") + ": " + text(list(c.object, "status", "conditions")[0], "message")
			}
			g.Expect(result.RawGetString("message").String()).To(Equal(c.message))
		})
	}
}

// toLua is a value as Argo CD gives it to a script.
func toLua(state *lua.LState, v any) lua.LValue {
	switch v := v.(type) {
	case map[string]any:
		table := state.CreateTable(0, len(v))
		for key, value := range v {
			table.RawSetString(key, toLua(state, value))
		}
		return table
	case []any:
		table := state.CreateTable(len(v), 0)
		for _, value := range v {
			table.Append(toLua(state, value))
		}
		return table
	case string:
		return lua.LString(v)
	case bool:
		return lua.LBool(v)
	case int64:
		return lua.LNumber(v)
	default:
		return lua.LNil
	}
}

// TestArgoCDConfigMap checks that the ConfigMap has the script that is tested.
func TestArgoCDConfigMap(t *testing.T) {
	g := NewWithT(t)
	var configMap object
	g.Expect(yaml.Unmarshal(read(t, "examples/argocd/argocd-cm.yaml"), &configMap)).To(Succeed())
	g.Expect(text(configMap, "data", "resource.customizations.health.whatsapp-operator.io_WhatsAppSession")).
		To(Equal(string(read(t, "examples/argocd/health.lua"))))
}

// TestFluxHealth evaluates the example's expressions with Flux's own evaluator.
func TestFluxHealth(t *testing.T) {
	g := NewWithT(t)
	var example struct {
		Spec struct {
			HealthCheckExprs []kustomize.CustomHealthCheck `json:"healthCheckExprs"`
		} `json:"spec"`
	}
	g.Expect(yaml.Unmarshal(read(t, "examples/flux/sessions.yaml"), &example)).To(Succeed())
	g.Expect(example.Spec.HealthCheckExprs).To(HaveLen(1))
	g.Expect(example.Spec.HealthCheckExprs[0].APIVersion).To(Equal("whatsapp-operator.io/v1alpha1"))
	g.Expect(example.Spec.HealthCheckExprs[0].Kind).To(Equal("WhatsAppSession"))
	evaluator, err := cel.NewStatusEvaluator(&example.Spec.HealthCheckExprs[0].HealthCheckExpressions)
	g.Expect(err).NotTo(HaveOccurred())
	for _, c := range healthCases {
		t.Run(c.name, func(t *testing.T) {
			g := NewWithT(t)
			result, err := evaluator.Evaluate(t.Context(), &unstructured.Unstructured{Object: c.object})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(result.Status.String()).To(Equal(c.flux))
		})
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("..", "..", path))
	if err != nil {
		t.Fatal(err)
	}
	return content
}

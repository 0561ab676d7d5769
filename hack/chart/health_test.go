package main

import (
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

// condition is TYPE=STATUS/REASON.
func condition(kind, status, reason string) map[string]any {
	return map[string]any{"type": kind, "status": status, "reason": reason, "message": "what to do"}
}

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

func phase(phase string, conditions ...any) map[string]any {
	return session(2, map[string]any{"phase": phase, "observedGeneration": int64(2), "conditions": conditions})
}

var healthCases = []healthCase{
	{"new, as the API server stores it", session(1, map[string]any{"observedGeneration": int64(-1)}), "Progressing", "InProgress", "Waiting for the manager to see the session"},
	{"changed, not seen yet", session(3, map[string]any{"phase": "Connected", "observedGeneration": int64(2), "conditions": []any{condition("Ready", "True", "Connected")}}), "Progressing", "InProgress", "Waiting for the manager to see the change"},
	{"Pending", phase("Pending", condition("Ready", "False", "WaitingForPlacement")), "Progressing", "InProgress", "WaitingForPlacement: what to do"},
	{"Pending, its id is taken", phase("Pending", condition("Ready", "False", "SessionIDTaken"), condition("Stalled", "True", "SessionIDTaken")), "Degraded", "Failed", "SessionIDTaken: what to do"},
	{"Pairing, nobody has scanned", phase("Pairing", condition("Ready", "False", "WaitingForScan"), condition("Reconciling", "True", "WaitingForScan")), "Suspended", "Current", "WaitingForScan: what to do"},
	{"PairingExpired", phase("PairingExpired", condition("Ready", "False", "PairingExpired"), condition("Stalled", "True", "PairingExpired")), "Suspended", "Current", "PairingExpired: what to do"},
	{"Connecting", phase("Connecting", condition("Ready", "False", "Connecting")), "Progressing", "InProgress", "Connecting: what to do"},
	{"Connected", phase("Connected", condition("Ready", "True", "Connected")), "Healthy", "Current", "Connected: what to do"},
	{"Connected, its worker is silent", phase("Connected", condition("Ready", "Unknown", "WorkerSilent")), "Progressing", "InProgress", "WorkerSilent: what to do"},
	{"Disconnected", phase("Disconnected", condition("Ready", "False", "Reconnecting"), condition("Stalled", "False", "Progressing")), "Progressing", "InProgress", "Reconnecting: what to do"},
	{"Disconnected, in quarantine", phase("Disconnected", condition("Ready", "False", "Quarantined"), condition("Stalled", "True", "Quarantined")), "Degraded", "Failed", "Quarantined: what to do"},
	{"Suspended", phase("Suspended", condition("Placed", "False", "Suspended")), "Suspended", "Current", "Suspended: what to do"},
	{"LoggedOut", phase("LoggedOut", condition("Ready", "False", "LoggedOut"), condition("Stalled", "True", "LoggedOut")), "Degraded", "Failed", "LoggedOut: what to do"},
	{"Banned", phase("Banned", condition("Ready", "False", "Banned"), condition("Stalled", "True", "Banned")), "Degraded", "Failed", "Banned: what to do"},
	{"Outdated", phase("Outdated", condition("Ready", "False", "Outdated"), condition("Stalled", "True", "Outdated")), "Degraded", "Failed", "Outdated: what to do"},
	{"Replaced", phase("Replaced", condition("Ready", "False", "Replaced"), condition("Stalled", "True", "Replaced")), "Degraded", "Failed", "Replaced: what to do"},
	{"Failed", phase("Failed", condition("Ready", "False", "ProxySecretMissing"), condition("Stalled", "True", "ProxySecretMissing")), "Degraded", "Failed", "ProxySecretMissing: what to do"},
	{"Terminating", phase("Terminating", condition("Ready", "False", "Deleting")), "Progressing", "InProgress", "Deleting: what to do"},
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

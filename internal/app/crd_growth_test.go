package app

import (
	"bytes"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/whatsapp-operator/whatsapp-operator/config/crd/bases"
)

// definitionFile is the definition's file, from the root of the repository.
const definitionFile = "config/crd/bases/whatsapp-operator.io_whatsappsessions.yaml"

// TestDefinitionOnlyGrows compares the definition with that of the last release: what a stored
// object may hold is neither removed nor narrowed, so that an upgrade and a way back keep every
// object. Before the first release there is nothing to compare with.
func TestDefinitionOnlyGrows(t *testing.T) {
	g := NewWithT(t)
	tag, found := lastRelease(t)
	if !found {
		t.Log("no release is tagged yet: the definition may still change in any way")
		return
	}
	t.Logf("Comparing with the definition of %s", tag)
	g.Expect(narrowedParts(definition(t, git(t, "show", tag+":"+definitionFile)), definition(t, bases.WhatsAppSessions))).To(BeEmpty())
}

// lastRelease returns the newest release that the present commit contains.
func lastRelease(t *testing.T) (tag string, found bool) {
	t.Helper()
	tags := strings.Fields(string(git(t, "tag", "--list", "v[0-9]*", "--merged", "HEAD", "--sort=-version:refname")))
	if len(tags) == 0 {
		return "", false
	}
	return tags[0], true
}

func git(t *testing.T, args ...string) []byte {
	t.Helper()
	var problems bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "git", append([]string{"-C", "../.."}, args...)...)
	cmd.Stderr = &problems
	output, err := cmd.Output()
	if err != nil {
		t.Fatalf("git %s: %v: %s", strings.Join(args, " "), err, problems.String())
	}
	return output
}

func definition(t *testing.T, text []byte) map[string]any {
	t.Helper()
	crd := map[string]any{}
	if err := yaml.Unmarshal(text, &crd); err != nil {
		t.Fatal(err)
	}
	return crd
}

// narrowedParts returns what the definition before allows and now does not: parts that are
// missing, and values that are refused.
func narrowedParts(before, now map[string]any) (narrowed []string) {
	for _, part := range lackingParts(before, now) {
		narrowed = append(narrowed, "it lacks "+part)
	}
	old, _, _ := unstructured.NestedSlice(before, "spec", "versions")
	new, _, _ := unstructured.NestedSlice(now, "spec", "versions")
	for _, v := range old {
		for _, w := range new {
			if asMap(v)["name"] == asMap(w)["name"] {
				narrowed = append(narrowed, narrowedFields("", schemaOf(asMap(v)), schemaOf(asMap(w)))...)
			}
		}
	}
	return narrowed
}

// narrowedFields compares the schema of one field, and of those below it.
func narrowedFields(path string, before, now map[string]any) (narrowed []string) {
	add := func(format string, args ...any) {
		narrowed = append(narrowed, strings.TrimPrefix(path, ".")+" "+fmt.Sprintf(format, args...))
	}
	for _, key := range []string{"type", "format", "pattern", "x-kubernetes-int-or-string", "nullable"} {
		if now[key] != nil && now[key] != before[key] {
			add("has the %s %v instead of %v", key, now[key], before[key])
		}
	}
	for _, key := range []string{"maxLength", "maxItems", "maxProperties", "maximum"} {
		if limit, limited := number(now[key]); limited {
			if was, wasLimited := number(before[key]); !wasLimited || limit < was {
				add("has the %s %v instead of %v", key, now[key], before[key])
			}
		}
	}
	for _, key := range []string{"minLength", "minItems", "minProperties", "minimum"} {
		if limit, limited := number(now[key]); limited {
			if was, wasLimited := number(before[key]); !wasLimited || limit > was {
				add("has the %s %v instead of %v", key, now[key], before[key])
			}
		}
	}
	if now["enum"] != nil && before["enum"] == nil { // lackingParts compares two enumerations
		add("allows only %v", now["enum"])
	}
	required := func(schema map[string]any) []any { list, _ := schema["required"].([]any); return list }
	for _, name := range required(now) {
		if !slices.Contains(required(before), name) {
			add("requires %v", name)
		}
	}
	rules := func(schema map[string]any) (rules []string) {
		list, _ := schema["x-kubernetes-validations"].([]any)
		for _, r := range list {
			rules = append(rules, fmt.Sprint(asMap(r)["rule"]))
		}
		return rules
	}
	for _, rule := range rules(now) {
		if !slices.Contains(rules(before), rule) {
			add("has a new rule, which stored objects may break: %s", rule)
		}
	}
	old, new := asMap(before["properties"]), asMap(now["properties"])
	for _, name := range slices.Sorted(maps.Keys(old)) {
		if new[name] != nil {
			narrowed = append(narrowed, narrowedFields(path+"."+name, asMap(old[name]), asMap(new[name]))...)
		}
	}
	for key, suffix := range map[string]string{"items": "[]", "additionalProperties": ".*"} {
		if asMap(before[key]) != nil && asMap(now[key]) != nil {
			narrowed = append(narrowed, narrowedFields(path+suffix, asMap(before[key]), asMap(now[key]))...)
		}
	}
	return narrowed
}

func number(v any) (float64, bool) {
	switch n := v.(type) {
	case float64:
		return n, true
	case int64:
		return float64(n), true
	}
	return 0, false
}

// TestNarrowedParts changes the definition in the ways that a release must not.
func TestNarrowedParts(t *testing.T) {
	spec := []string{"spec", "versions", "0", "schema", "openAPIV3Schema", "properties", "spec"}
	field := func(path ...string) []string { return append(slices.Clone(spec), path...) }
	for _, row := range []struct {
		name   string
		change func(crd map[string]any)
		want   string
	}{
		{"nothing", func(map[string]any) {}, ""},
		{"a field is new", func(crd map[string]any) { at(crd, field("properties")...)["new"] = map[string]any{"type": "string"} }, ""},
		{"a longer name is allowed", func(crd map[string]any) { at(crd, field("properties", "deviceName")...)["maxLength"] = 60.0 }, ""},
		{"a field is gone", func(crd map[string]any) { delete(at(crd, field("properties")...), "suspend") }, "it lacks .spec.suspend"},
		{"a field has another type", func(crd map[string]any) { at(crd, field("properties", "suspend")...)["type"] = "string" }, "spec.suspend has the type string"},
		{"a field is shorter", func(crd map[string]any) { at(crd, field("properties", "deviceName")...)["maxLength"] = 40.0 }, "spec.deviceName has the maxLength 40"},
		{"a field is longer than before at least", func(crd map[string]any) { at(crd, field("properties", "deviceName")...)["minLength"] = 2.0 }, "spec.deviceName has the minLength 2"},
		{"a field is required", func(crd map[string]any) { at(crd, spec...)["required"] = []any{"deviceName"} }, "spec requires deviceName"},
		{"a value is gone", func(crd map[string]any) { at(crd, field("properties", "deletionPolicy")...)["enum"] = []any{"Logout"} }, "it lacks .spec.deletionPolicy=Retain"},
		{"only some values are allowed", func(crd map[string]any) { at(crd, field("properties", "deviceName")...)["enum"] = []any{"x"} }, "spec.deviceName allows only [x]"},
		{"a rule is new", func(crd map[string]any) {
			at(crd, field("properties", "deviceName")...)["x-kubernetes-validations"] = []any{map[string]any{"rule": "self != 'x'"}}
		}, "spec.deviceName has a new rule"},
		{"the items of a list are fewer", func(crd map[string]any) {
			at(crd, field("properties", "messages", "properties", "ignore")...)["maxItems"] = 1.0
		}, "spec.messages.ignore has the maxItems 1"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			now := definition(t, bases.WhatsAppSessions)
			row.change(now)
			narrowed := narrowedParts(definition(t, bases.WhatsAppSessions), now)
			if row.want == "" {
				g.Expect(narrowed).To(BeEmpty())
			} else {
				g.Expect(narrowed).To(ConsistOf(HavePrefix(row.want)))
			}
		})
	}
}

// at returns the object at a path; a number is the place in a list.
func at(object map[string]any, path ...string) map[string]any {
	for i := 0; i < len(path); i++ {
		if list, ok := object[path[i]].([]any); ok {
			i++
			object = asMap(list[path[i][0]-'0'])
			continue
		}
		object = asMap(object[path[i]])
	}
	return object
}

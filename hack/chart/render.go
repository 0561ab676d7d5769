package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	chartutil "helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

// options say how the chart is rendered.
type options struct {
	values map[string]any
	// release and namespace are by default whatsapp-operator and whatsapp-operator-system.
	release, namespace string
	// apis are further API versions that the cluster knows.
	apis []string
	// version replaces the chart's.
	version string
}

// object is a rendered manifest.
type object map[string]any

func (o object) kind() string { return text(o, "kind") }
func (o object) name() string { return text(o, "metadata", "name") }
func (o object) id() string {
	return o.kind() + " " + text(o, "metadata", "namespace") + "/" + o.name()
}
func (o object) annotation(key string) string {
	return text(o, "metadata", "annotations", key)
}

// copy is a deep copy.
func (o object) copy() object {
	content, err := json.Marshal(o)
	if err != nil {
		panic(err) // it was read from YAML
	}
	var c object
	if err := json.Unmarshal(content, &c); err != nil {
		panic(err)
	}
	return c
}

// each calls f for every "metadata" in the object: its own and those of its templates.
func (o object) each(f func(metadata map[string]any)) {
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if m, ok := v["metadata"].(map[string]any); ok {
				f(m)
			}
			for _, inner := range v {
				walk(inner)
			}
		case []any:
			for _, inner := range v {
				walk(inner)
			}
		}
	}
	walk(map[string]any(o))
}

// get returns a field; nil if there is none.
func get(v any, path ...string) any {
	for _, key := range path {
		switch m := v.(type) {
		case map[string]any:
			v = m[key]
		case object:
			v = m[key]
		default:
			return nil
		}
	}
	return v
}

func text(v any, path ...string) string {
	s, _ := get(v, path...).(string)
	return s
}

func list(v any, path ...string) []any {
	l, _ := get(v, path...).([]any)
	return l
}

// render renders the chart as `helm install` does, and returns its objects in a fixed order
// and its notes.
func render(chart string, o options) (objects []object, notes string, err error) {
	loaded, err := loader.LoadDir(chart)
	if err != nil {
		return nil, "", fmt.Errorf("loading the chart: %w", err)
	}
	if o.version != "" {
		loaded.Metadata.Version, loaded.Metadata.AppVersion = o.version, o.version
	}
	if o.release == "" {
		o.release = "whatsapp-operator"
	}
	if o.namespace == "" {
		o.namespace = namespace
	}
	capabilities := common.DefaultCapabilities.Copy()
	capabilities.APIVersions = append(slices.Clone(capabilities.APIVersions), o.apis...)
	values := o.values
	if values == nil {
		values = map[string]any{}
	}
	all, err := chartutil.ToRenderValues(loaded, values, common.ReleaseOptions{Name: o.release, Namespace: o.namespace, Revision: 1, IsInstall: true}, capabilities)
	if err != nil {
		return nil, "", err
	}
	files, err := engine.Render(loaded, all)
	if err != nil {
		return nil, "", err
	}
	for _, path := range slices.Sorted(maps.Keys(files)) {
		switch {
		case strings.HasSuffix(path, "NOTES.txt"):
			notes = files[path]
			continue
		case strings.HasSuffix(path, ".tpl"):
			continue
		}
		reader := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(files[path])))
		for {
			document, err := reader.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			var one object
			if err == nil {
				// Strict: Helm takes a key that is there twice, Kustomize and Argo CD do not.
				err = sigsyaml.UnmarshalStrict(document, &one)
			}
			if err != nil {
				return nil, "", fmt.Errorf("%s: %w\n%s", path, err, files[path])
			}
			if len(one) > 0 {
				objects = append(objects, one)
			}
		}
	}
	return objects, notes, nil
}

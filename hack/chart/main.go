// Command chart writes what is made from the chart in charts/whatsapp-operator: the files that
// it needs from other folders, the reference of its values, and the manifests for those who
// use no Helm. Its tests check the chart. It is a module of its own, because Helm, Kustomize
// and Flux as libraries must not weigh on the program.
//
//	go run . generate   # make manifests does this
//	go run . install    # prints install.yaml: config/default as one file
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	sigsyaml "sigs.k8s.io/yaml"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 || args[0] != "generate" && args[0] != "install" {
		return fmt.Errorf("give one of the commands generate and install")
	}
	root, err := repository()
	if err != nil {
		return err
	}
	if args[0] == "install" {
		text, err := buildKustomization(filepath.Join(root, "config", "default"))
		if err != nil {
			return err
		}
		_, err = os.Stdout.Write(text)
		return err
	}
	// First the files that templates read.
	files, err := copied(root)
	if err != nil {
		return err
	}
	if err := write(root, files); err != nil {
		return err
	}
	if files, err = derived(root); err != nil {
		return err
	}
	return write(root, files)
}

// repository is the folder above hack/chart, where the command runs.
func repository() (string, error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", fmt.Errorf("finding the repository: %w", err)
	}
	if _, err := os.Stat(filepath.Join(root, chartFolder)); err != nil {
		return "", fmt.Errorf("run it in the folder hack/chart: %w", err)
	}
	return root, nil
}

func write(root string, files map[string][]byte) error {
	for path, content := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // files of the repository, which everybody may read
			return fmt.Errorf("making a folder: %w", err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil { //nolint:gosec // likewise
			return fmt.Errorf("writing a file: %w", err)
		}
	}
	return nil
}

const (
	chartFolder = "charts/whatsapp-operator"
	namespace   = "whatsapp-operator-system"
)

// roles are those of config/rbac that the chart has too.
var roles = []string{"manager", "worker", "viewer", "editor", "proxy_reader", "metrics_reader"}

// copied are the files of other folders that the templates read: Helm reads only files of the chart.
func copied(root string) (map[string][]byte, error) {
	from := map[string]string{chartFolder + "/files/crd.yaml": "config/crd/bases/whatsapp-operator.io_whatsappsessions.yaml"}
	for _, role := range roles {
		from[chartFolder+"/files/roles/"+role+"_role.yaml"] = "config/rbac/" + role + "_role.yaml"
	}
	files := map[string][]byte{}
	for to, path := range from {
		content, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			return nil, fmt.Errorf("copying into the chart: %w", err)
		}
		files[to] = content
	}
	return files, nil
}

// kustomizations are the folders in config that are made from the chart, and their values.
var kustomizations = map[string]map[string]any{
	"config/default": {},
	"config/external-stores": {
		"redis": map[string]any{
			"addresses": []any{"redis.example.com:6379"},
			"tls":       map[string]any{"enabled": true},
			"manager":   map[string]any{"username": "whatsapp-operator-manager", "passwordSecret": map[string]any{"name": "whatsapp-operator-redis-manager"}},
			"worker":    map[string]any{"username": "whatsapp-operator-worker", "passwordSecret": map[string]any{"name": "whatsapp-operator-redis-worker"}},
		},
		"database": map[string]any{"urlSecret": map[string]any{"name": "whatsapp-operator-database"}},
	},
}

// derived are the files that are made from the chart.
func derived(root string) (map[string][]byte, error) {
	files := map[string][]byte{}
	for folder, values := range kustomizations {
		objects, _, err := render(filepath.Join(root, chartFolder), options{values: values})
		if err != nil {
			return nil, err
		}
		var text bytes.Buffer
		text.WriteString("# Written by `make manifests` from charts/whatsapp-operator; change the templates there.\n")
		for _, o := range objects {
			if !inKustomization(o) {
				continue
			}
			content, err := sigsyaml.Marshal(withoutHelm(o))
			if err != nil {
				return nil, fmt.Errorf("writing an object: %w", err)
			}
			text.WriteString("---\n")
			text.Write(content)
		}
		files[folder+"/objects.yaml"] = text.Bytes()
	}
	readme, err := os.ReadFile(filepath.Join(root, chartFolder, "README.md"))
	if err != nil {
		return nil, fmt.Errorf("reading the chart's page: %w", err)
	}
	values, err := os.ReadFile(filepath.Join(root, chartFolder, "values.yaml"))
	if err != nil {
		return nil, fmt.Errorf("reading the values: %w", err)
	}
	rows, err := describeValues(values)
	if err != nil {
		return nil, err
	}
	begin, _, found := strings.Cut(string(readme), marker)
	if !found {
		return nil, fmt.Errorf("the chart's README.md has no line %q", marker)
	}
	files[chartFolder+"/README.md"] = []byte(begin + marker + "\n\n" + valuesTable(rows))
	return files, nil
}

// inKustomization: the resource definition and the roles come from config/crd and
// config/rbac, and what Helm runs for a test or before an uninstallation has no meaning
// without Helm.
func inKustomization(o object) bool {
	if slices.Contains([]string{"test", "pre-delete"}, o.annotation("helm.sh/hook")) {
		return false
	}
	switch o.kind() {
	case "CustomResourceDefinition":
		return false
	case "ClusterRole", "Role":
		return !slices.Contains([]string{
			"whatsapp-operator-manager", "whatsapp-operator-worker", "whatsapp-operator-viewer", "whatsapp-operator-editor",
			"whatsapp-operator-proxy-reader", "whatsapp-operator-metrics-reader",
		}, o.name())
	default:
		return true
	}
}

// withoutHelm removes what has a meaning for Helm only.
func withoutHelm(o object) object {
	o = o.copy()
	o.each(func(metadata map[string]any) {
		for field, drop := range map[string]func(string) bool{
			"labels":      func(key string) bool { return key == "helm.sh/chart" || key == "app.kubernetes.io/managed-by" },
			"annotations": func(key string) bool { return strings.HasPrefix(key, "helm.sh/") },
		} {
			values, _ := metadata[field].(map[string]any)
			for key := range values {
				if drop(key) {
					delete(values, key)
				}
			}
			if len(values) == 0 {
				delete(metadata, field)
			}
		}
	})
	return o
}

func buildKustomization(folder string) ([]byte, error) {
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), folder)
	if err != nil {
		return nil, fmt.Errorf("building %s: %w", folder, err)
	}
	text, err := resources.AsYaml()
	if err != nil {
		return nil, fmt.Errorf("building %s: %w", folder, err)
	}
	return text, nil
}

// marker begins the generated part of the chart's README.md.
const marker = "<!-- The values below are written by `make manifests` from values.yaml. -->"

// value is a leaf of values.yaml.
type value struct{ path, text, description string }

// describeValues lists the leaves of values.yaml with their descriptions, which are the
// comments that begin with "# --".
func describeValues(text []byte) ([]value, error) {
	var document yaml.Node
	if err := yaml.Unmarshal(text, &document); err != nil {
		return nil, fmt.Errorf("reading the values: %w", err)
	}
	var rows []value
	var walk func(prefix string, node *yaml.Node) error
	walk = func(prefix string, node *yaml.Node) error {
		for i := 0; i < len(node.Content); i += 2 {
			key, content := node.Content[i], node.Content[i+1]
			path := strings.TrimPrefix(prefix+"."+key.Value, ".")
			description := description(key.HeadComment)
			if description == "" && content.Kind == yaml.MappingNode && len(content.Content) > 0 {
				if err := walk(path, content); err != nil {
					return err
				}
				continue
			}
			content.HeadComment, content.LineComment, content.FootComment = "", "", ""
			content.Style |= yaml.FlowStyle
			text, err := yaml.Marshal(content)
			if err != nil {
				return fmt.Errorf("writing the value of %s: %w", path, err)
			}
			rows = append(rows, value{path: path, text: strings.TrimSpace(string(text)), description: description})
		}
		return nil
	}
	if len(document.Content) == 0 {
		return nil, fmt.Errorf("values.yaml is empty")
	}
	err := walk("", document.Content[0])
	return rows, err
}

// description is the part of a comment that begins with "# --".
func description(comment string) string {
	var lines []string
	for line := range strings.Lines(comment) {
		line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "#"))
		switch {
		case strings.HasPrefix(line, "-- "):
			lines = []string{strings.TrimPrefix(line, "-- ")}
		case len(lines) > 0 && line != "":
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, " ")
}

func valuesTable(rows []value) string {
	var b strings.Builder
	b.WriteString("| value | default | meaning |\n| --- | --- | --- |\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", r.path, strings.Join(strings.Fields(r.text), " "), strings.ReplaceAll(r.description, "|", "\\|"))
	}
	return b.String()
}

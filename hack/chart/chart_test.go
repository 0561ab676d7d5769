package main

import (
	"bytes"
	_ "embed" // the values
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	kjson "k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

const chart = "../../" + chartFolder

// prometheus and KEDA are APIs that some clusters know.
const (
	prometheus = "monitoring.coreos.com/v1"
	keda       = "keda.sh/v1alpha1"
)

// values reads values written as YAML.
func values(t *testing.T, text string) map[string]any {
	t.Helper()
	v := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// everything sets what no other option set does.
//
//go:embed testdata/everything.yaml
var everything string

// optionSet is a use of the chart.
type optionSet struct {
	name   string
	values func(t *testing.T) map[string]any
	apis   []string
}

func given(text string) func(*testing.T) map[string]any {
	return func(t *testing.T) map[string]any { return values(t, text) }
}

func valuesFile(name string) func(*testing.T) map[string]any {
	return func(t *testing.T) map[string]any { return values(t, string(read(t, chartFolder+"/"+name))) }
}

var optionSets = []optionSet{
	{name: "no values", values: given("")},
	{name: "values-production.yaml", values: valuesFile("values-production.yaml")},
	{name: "values-production.yaml with the Prometheus operator", values: valuesFile("values-production.yaml"), apis: []string{prometheus}},
	{name: "values-demo.yaml", values: valuesFile("values-demo.yaml")},
	{name: "the demo with network policies", values: given("simulator: {enabled: true}\nnetworkPolicy: {enabled: true}")},
	{name: "everything", values: given(everything), apis: []string{prometheus, keda}},
	{name: "network policies with bundled stores", values: given("networkPolicy: {enabled: true}")},
	{name: "external Redis only", values: given("redis: {addresses: [redis.example.com:6379]}")},
	{name: "external database only", values: given("database: {urlSecret: {name: db}}")},
	{name: "Laravel without TLS", values: given("laravel: {url: 'http://laravel.shop', insecureHTTP: true, tokenSecret: {name: l}, signingSecret: {name: l, keys: [old, new]}}")},
	{name: "little", values: given("crds: {enabled: false}\nrbac: {create: false, userRoles: false}\nmetrics: {enabled: false}\nmanager: {podDisruptionBudget: {enabled: false}, topologySpread: {enabled: false}}\nworker: {podDisruptionBudget: {enabled: false}, topologySpread: {enabled: false}}")},
	{name: "labels and names that the chart has too", values: given(`
commonLabels: {whatsapp-operator.io/pool: mine, app.kubernetes.io/name: mine, helm.sh/chart: mine}
worker:
  podLabels: {whatsapp-operator.io/pool: mine, app.kubernetes.io/component: mine}
  podAnnotations: {kubectl.kubernetes.io/default-container: mine}
  extraEnv: [{name: WHATSAPP_OPERATOR_CAPACITY, value: "7"}]
pools: {a-long-pool-name: {}}`)},
	{name: "texts with quotes", values: given(`
redis: {addresses: ["a:1"], mode: sentinel, masterName: "a\"b'c{{d}}#", sentinel: {username: "a\"b", passwordSecret: {name: s}}}
worker: {deviceName: "a \"b\" 'c' {{ d }} # e: f", podAnnotations: {example.com/a: "line\n\"another\""}}`)},
	{name: "simulator without phones and stand-in", values: given("simulator: {enabled: true, phones: {enabled: false}, laravel: {enabled: false}}")},
}

func mustRender(t *testing.T, o options) []object {
	t.Helper()
	objects, _, err := render(chart, o)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// eachOptionSet runs a test for each option set.
func eachOptionSet(t *testing.T, f func(t *testing.T, g *WithT, o options, objects []object)) {
	for _, set := range optionSets {
		t.Run(set.name, func(t *testing.T) {
			o := options{values: set.values(t), apis: set.apis}
			f(t, NewWithT(t), o, mustRender(t, o))
		})
	}
}

// pods returns the pod templates and pods among the objects, by the id of their object.
func pods(objects []object) map[string]map[string]any {
	all := map[string]map[string]any{}
	for _, o := range objects {
		spec, _ := get(o, "spec", "template", "spec").(map[string]any)
		if o.kind() == "Pod" {
			spec, _ = get(o, "spec").(map[string]any)
		}
		if spec != nil {
			all[o.id()] = spec
		}
	}
	return all
}

func find(objects []object, kind, name string) object {
	for _, o := range objects {
		if o.kind() == kind && o.name() == name {
			return o
		}
	}
	return nil
}

func containers(spec map[string]any) (all []map[string]any) {
	for _, field := range []string{"initContainers", "containers"} {
		for _, c := range list(spec, field) {
			all = append(all, c.(map[string]any))
		}
	}
	return all
}

func TestLint(t *testing.T) {
	eachOptionSet(t, func(_ *testing.T, g *WithT, o options, _ []object) {
		version, err := common.ParseKubeVersion("v1.37.2")
		g.Expect(err).NotTo(HaveOccurred())
		for _, message := range lint.RunAll(chart, o.values, namespace, lint.WithKubeVersion(version)).Messages {
			g.Expect(message.Severity).To(BeNumerically("<=", support.InfoSev), message.Error())
		}
	})
}

// TestManifestsAreValid decodes every object strictly: an unknown or repeated field is an
// error, and so is a number where a string belongs.
func TestManifestsAreValid(t *testing.T) {
	strict := kjson.NewSerializerWithOptions(kjson.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, kjson.SerializerOptions{Yaml: true, Strict: true})
	eachOptionSet(t, func(_ *testing.T, g *WithT, _ options, objects []object) {
		ids := map[string]bool{}
		for _, o := range objects {
			g.Expect(ids).NotTo(HaveKey(o.id()), "twice")
			ids[o.id()] = true
			content, err := yaml.Marshal(o)
			g.Expect(err).NotTo(HaveOccurred())
			_, _, err = strict.Decode(content, nil, nil)
			if runtime.IsNotRegisteredError(err) {
				g.Expect(o.kind()).To(BeElementOf("CustomResourceDefinition", "ServiceMonitor", "PodMonitor", "ScaledObject"))
				continue
			}
			g.Expect(err).NotTo(HaveOccurred(), "%s\n%s", o.id(), content)
		}
	})
}

// clusterScoped are the kinds without a namespace.
var clusterScoped = []string{"CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"}

func TestNamesAndLabels(t *testing.T) {
	for _, name := range []string{"a", "whatsapp-operator", strings.Repeat("long-name-", 5) + "end"} {
		for _, set := range optionSets {
			t.Run(name+"/"+set.name, func(t *testing.T) {
				g := NewWithT(t)
				for _, o := range mustRender(t, options{values: set.values(t), apis: set.apis, release: name, namespace: "ops"}) {
					if strings.HasPrefix(o.name(), "extra") || strings.HasSuffix(o.name(), "-extra") {
						continue // the user's own
					}
					g.Expect(len(o.name())).To(BeNumerically("<=", 63), o.id())
					g.Expect(slices.Contains(clusterScoped, o.kind())).To(Equal(get(o, "metadata", "namespace") == nil), o.id())
					if ns := text(o, "metadata", "namespace"); ns != "" {
						g.Expect(ns).To(Equal("ops"))
					}
					for _, label := range []string{"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart"} {
						g.Expect(text(o, "metadata", "labels", label)).NotTo(BeEmpty(), "%s has no label %s", o.id(), label)
					}
					if set.name == "everything" {
						g.Expect(text(o, "metadata", "labels", "team")).To(Equal("messaging"), o.id())
					}
					if selector, ok := get(o, "spec", "selector", "matchLabels").(map[string]any); ok && slices.Contains([]string{"Deployment", "StatefulSet"}, o.kind()) {
						labels := get(o, "spec", "template", "metadata", "labels")
						for key, value := range selector {
							g.Expect(get(labels, key)).To(Equal(value), o.id())
						}
						g.Expect(selector).NotTo(HaveKey("app.kubernetes.io/version"))
						g.Expect(selector).NotTo(HaveKey("team"))
					}
				}
			})
		}
	}
}

// TestPodsAreRestricted checks what Pod Security's level restricted asks for, and what every
// pod of ours has.
func TestPodsAreRestricted(t *testing.T) {
	eachOptionSet(t, func(_ *testing.T, g *WithT, _ options, objects []object) {
		for id, spec := range pods(objects) {
			g.Expect(get(spec, "securityContext", "runAsNonRoot")).To(BeTrue(), id)
			g.Expect(get(spec, "securityContext", "runAsUser")).To(BeNumerically(">", 0), id)
			g.Expect(get(spec, "securityContext", "seccompProfile", "type")).To(Equal("RuntimeDefault"), id)
			g.Expect(get(spec, "enableServiceLinks")).To(BeFalse(), id)
			g.Expect(spec).To(HaveKey("automountServiceAccountToken"), id)
			for _, c := range containers(spec) {
				where := id + " " + text(c, "name")
				g.Expect(get(c, "securityContext", "allowPrivilegeEscalation")).To(BeFalse(), where)
				g.Expect(get(c, "securityContext", "readOnlyRootFilesystem")).To(BeTrue(), where)
				g.Expect(slices.ContainsFunc(list(c, "volumeMounts"), func(m any) bool { return text(m, "mountPath") == "/tmp" })).To(BeTrue(), "%s: libraries write to /tmp", where)
				g.Expect(get(c, "securityContext", "capabilities", "drop")).To(ConsistOf("ALL"), where)
				g.Expect(get(c, "resources", "requests", "cpu")).NotTo(BeNil(), where)
				g.Expect(get(c, "resources", "requests", "memory")).NotTo(BeNil(), where)
				g.Expect(get(c, "resources", "limits", "memory")).NotTo(BeNil(), where)
				g.Expect(get(c, "resources", "limits", "cpu")).To(BeNil(), "%s: throttling delays heartbeats", where)
				g.Expect(text(c, "terminationMessagePolicy")).To(Equal("FallbackToLogsOnError"), where)
				for _, e := range list(c, "env") {
					if get(e, "valueFrom") == nil {
						g.Expect(get(e, "value")).To(BeAssignableToTypeOf(""), "%s: %v", where, e)
					}
				}
				for _, quantity := range []any{get(c, "resources", "requests"), get(c, "resources", "limits")} {
					for _, q := range quantity.(map[string]any) {
						_, err := resource.ParseQuantity(fmt.Sprint(q))
						g.Expect(err).NotTo(HaveOccurred(), where)
					}
				}
			}
			for _, m := range containers(spec) {
				for _, mount := range list(m, "volumeMounts") {
					if text(mount, "name") == "data" && strings.HasPrefix(id, "StatefulSet") {
						continue // its claim
					}
					g.Expect(slices.ContainsFunc(list(spec, "volumes"), func(v any) bool { return text(v, "name") == text(mount, "name") })).To(BeTrue(), "%s mounts %s", id, text(mount, "name"))
				}
			}
		}
	})
}

// TestEverySettingIsAFlag compares the variables and arguments of our containers with the
// reference, which the program writes.
func TestEverySettingIsAFlag(t *testing.T) {
	reference := string(read(t, "docs/reference.md"))
	flagsOf := func(command string) map[string]bool {
		flags := map[string]bool{}
		add := func(section string) {
			_, section, found := strings.Cut(reference, section)
			if !found {
				t.Fatalf("docs/reference.md has no section for %q", command)
			}
			section, _, _ = strings.Cut(section, "\n##")
			for _, row := range regexp.MustCompile("(?m)^\\| `--([a-z0-9-]+)`").FindAllStringSubmatch(section, -1) {
				flags[row[1]] = true
			}
			if strings.Contains(section, "(#common-flags)") {
				_, section, _ = strings.Cut(reference, "### Common flags\n")
				section, _, _ = strings.Cut(section, "\n##")
				for _, row := range regexp.MustCompile("(?m)^\\| `--([a-z0-9-]+)`").FindAllStringSubmatch(section, -1) {
					flags[row[1]] = true
				}
			}
		}
		add("### `whatsapp-operator " + command + "`\n")
		return flags
	}
	tried := map[string]bool{}
	eachOptionSet(t, func(_ *testing.T, g *WithT, _ options, objects []object) {
		for id, spec := range pods(objects) {
			for _, c := range containers(spec) {
				if get(c, "command") != nil {
					continue // a store
				}
				var words, flags []string
				for _, a := range list(c, "args") {
					if strings.HasPrefix(a.(string), "-") {
						name, _, _ := strings.Cut(strings.TrimPrefix(a.(string), "--"), "=")
						flags = append(flags, name)
						continue
					}
					words = append(words, a.(string))
				}
				command := strings.Join(words, " ")
				tried[command] = true
				if command == "deadletter list" || command == "store orphans" {
					g.Expect(reference).To(ContainSubstring("`whatsapp-operator "+command+"`"), id)
				}
				for _, e := range list(c, "env") {
					if name, ours := strings.CutPrefix(text(e, "name"), "WHATSAPP_OPERATOR_"); ours {
						flags = append(flags, strings.ReplaceAll(strings.ToLower(name), "_", "-"))
					}
				}
				known := flagsOf(command)
				for _, f := range flags {
					g.Expect(known[f]).To(BeTrue(), "%s: %s has no flag --%s", id, command, f)
				}
			}
		}
	})
	NewWithT(t).Expect(slices.Sorted(maps.Keys(tried))).To(ConsistOf("manager", "worker", "bootstrap", "stop", "simulator", "demo-phones", "demo-laravel", "deadletter list", "store orphans"))
}

var writeProcesses = flag.Bool("write", false, "write testdata/processes.json")

// TestProcesses: internal/app checks the settings that each option set gives to its processes,
// as they do at their start. It cannot render the chart, so a file has them.
func TestProcesses(t *testing.T) {
	type process struct {
		Args []string          `json:"args"`
		Env  map[string]string `json:"env"`
	}
	// What the pod's own fields are.
	fields := map[string]string{"metadata.namespace": "ops", "metadata.name": "worker-1", "metadata.uid": "1-2-3"}
	processes := map[string]process{}
	eachOptionSet(t, func(t *testing.T, _ *WithT, _ options, objects []object) {
		for id, spec := range pods(objects) {
			for _, c := range containers(spec) {
				args := list(c, "args")
				if len(args) == 0 || !slices.Contains([]any{"manager", "worker", "bootstrap", "stop"}, args[0]) {
					continue
				}
				p := process{Env: map[string]string{}}
				for _, a := range args {
					p.Args = append(p.Args, a.(string))
				}
				for _, e := range list(c, "env") {
					p.Env[text(e, "name")] = text(e, "value") + fields[text(e, "valueFrom", "fieldRef", "fieldPath")]
				}
				processes[strings.TrimPrefix(t.Name(), "TestProcesses/")+": "+id] = p
			}
		}
	})
	g := NewWithT(t)
	content, err := json.MarshalIndent(processes, "", " ")
	g.Expect(err).NotTo(HaveOccurred())
	content = append(content, '\n')
	if *writeProcesses {
		g.Expect(os.WriteFile("testdata/processes.json", content, 0o600)).To(Succeed())
	}
	have, err := os.ReadFile("testdata/processes.json")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(bytes.Equal(have, content)).To(BeTrue(), "testdata/processes.json is not current: run go test . -run TestProcesses -write")
}

func TestRenderedTwiceIsTheSame(t *testing.T) {
	eachOptionSet(t, func(t *testing.T, g *WithT, o options, objects []object) {
		for range 3 {
			g.Expect(mustRender(t, o)).To(Equal(objects))
		}
	})
}

// TestNoRandomnessNoLookup: Argo CD and Flux render without a cluster, and each time anew.
func TestNoRandomnessNoLookup(t *testing.T) {
	forbidden := regexp.MustCompile(`\b(lookup|rand[A-Z][A-Za-z]+|gen[A-Z][A-Za-z]+|derivePassword|htpasswd|bcrypt|uuidv4|now|date[A-Za-z]*|getHostByName|IsUpgrade|IsInstall|Revision)\b`)
	err := filepath.WalkDir(filepath.Join(chart, "templates"), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, action := range regexp.MustCompile(`(?s){{.*?}}`).FindAllString(string(content), -1) {
			if found := forbidden.FindString(action); found != "" && !strings.HasPrefix(strings.TrimLeft(action, "{- "), "/*") {
				t.Errorf("%s uses %s: %s", path, found, action)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSchemaKnowsEveryValue compares the keys of values.yaml with those of the schema, in both
// directions.
func TestSchemaKnowsEveryValue(t *testing.T) {
	g := NewWithT(t)
	var schema map[string]any
	g.Expect(json.Unmarshal(read(t, chartFolder+"/values.schema.json"), &schema)).To(Succeed())
	all := values(t, string(read(t, chartFolder+"/values.yaml")))
	var resolve func(s any) map[string]any
	resolve = func(s any) map[string]any {
		m, _ := s.(map[string]any)
		if ref := text(m, "$ref"); ref != "" {
			m, _ = get(schema, "$defs", strings.TrimPrefix(ref, "#/$defs/")).(map[string]any)
			g.Expect(m).NotTo(BeNil(), ref)
		}
		if all := list(m, "allOf"); all != nil {
			return resolve(all[0]) // the second says only what is required
		}
		return m
	}
	var compare func(path string, value any, s map[string]any)
	compare = func(path string, value any, s map[string]any) {
		properties, structured := s["properties"].(map[string]any)
		if !structured {
			return
		}
		if strings.HasSuffix(path, ".affinity") {
			return // Kubernetes' own
		}
		g.Expect(s["additionalProperties"]).To(BeFalse(), "%s takes unknown keys", path)
		have, ok := value.(map[string]any)
		g.Expect(ok).To(BeTrue(), "%s is not an object in values.yaml", path)
		for key := range have {
			g.Expect(properties).To(HaveKey(key), "the schema does not know %s.%s", path, key)
		}
		for key, inner := range properties {
			if path == "" && key == "global" {
				continue // Helm's own
			}
			if path == "" && key == "pools" {
				continue // a pool has the keys of worker
			}
			g.Expect(have).To(HaveKey(key), "values.yaml has no %s.%s", path, key)
			compare(strings.TrimPrefix(path+"."+key, "."), have[key], resolve(inner))
		}
	}
	compare("", all, schema)
}

func TestEveryValueIsDescribed(t *testing.T) {
	g := NewWithT(t)
	rows, err := describeValues(read(t, chartFolder+"/values.yaml"))
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(len(rows)).To(BeNumerically(">", 100))
	for _, r := range rows {
		g.Expect(r.description).NotTo(BeEmpty(), "%s has no comment that begins with # --", r.path)
	}
}

// TestWrongValuesAreRefused: each with words that say what is wrong.
func TestWrongValuesAreRefused(t *testing.T) {
	for _, row := range []struct{ name, values, want string }{
		{"an unknown value", "replicas: 3", "additional properties 'replicas' not allowed"},
		{"an unknown value of the manager", "manager: {replica: 3}", "additional properties 'replica' not allowed"},
		{"an unknown value of a pool", "pools: {default: {replica: 3}}", "'replica'"},
		{"a text in place of a number", "worker: {replicas: '3'}", "got string, want integer"},
		{"a number in place of a text", "image: {tag: 1.0}", "got number, want string"},
		{"no worker capacity", "worker: {capacity: 0}", "minimum"},
		{"a digest that is a tag", "image: {digest: v1}", "'v1' does not match pattern"},
		{"another Valkey with the chart's digest", "valkey: {image: {tag: '9.0'}}", "valkey.image.digest is still that of 8.1.3"},
		{"another PostgreSQL with the chart's digest", "postgresql: {image: {tag: '18'}}", "postgresql.image.digest is still that of 17.6"},
		{"a label that is none", "commonLabels: {a: '-x'}", "/commonLabels/a"},
		{"a label's name that is none", "commonLabels: {a b: c}", "additional properties 'a b' not allowed"},
		{"an annotation's name that is none", "manager: {podAnnotations: {a b: c}}", "additional properties 'a b' not allowed"},
		{"a repository with a tag", "image: {repository: 'registry:5000/a:v1'}", "/image/repository"},
		{"a variable without a name", "worker: {extraEnv: [{value: a}]}", "missing property 'name'"},
		{"a variable that is a number", "worker: {extraEnv: [{name: A, value: 1}]}", "got number, want string"},
		{"a variable twice", "manager: {extraEnv: [{name: A, value: a}, {name: A, value: b}]}", "manager.extraEnv has an item with the name A"},
		{"a volume that the chart has", "pools: {big: {extraVolumes: [{name: state, emptyDir: {}}]}}", "extraVolumes of the pool big has an item with the name state"},
		{"a mount where the chart has one", "manager: {extraVolumeMounts: [{name: a, mountPath: /tmp/}]}", "manager.extraVolumeMounts has an item with the mountPath /tmp"},
		{"a toleration with a number", "worker: {tolerations: [{key: 1}]}", "/worker/tolerations/0/key"},
		{"no quantity", "worker: {resources: {limits: {memory: lots}}}", "/worker/resources/limits/memory"},
		{"a volume without a size", "valkey: {persistence: {size: '0'}}", "/valkey/persistence/size"},
		{"a line break in a device's name", `worker: {deviceName: "a\nb"}`, "/worker/deviceName"},
		{"a line break in Laravel's URL", `laravel: {url: "https://a\nb"}`, "/laravel/url"},
		{"a line break in the database's URL", `database: {url: "postgres://a:secret\n@b/c"}`, "database.url holds a password"},
		{"a space in the database's URL", "database: {url: 'postgres://b /c'}", "database.url names no server, or holds a space"},
		{"an object without a kind", "extraObjects: [{a: b}]", "missing properties 'apiVersion', 'kind', 'metadata'"},
		{"a peer that allows everybody", "networkPolicy: {metricsFrom: [{}]}", "/networkPolicy/metricsFrom/0"},
		{"a peer that is no address", "networkPolicy: {storesTo: [{ipBlock: {cidr: db.example.com}}]}", "/networkPolicy/storesTo/0/ipBlock/cidr"},
		{"a key that is a folder", "laravel: {signingSecret: {keys: ['..']}}", "/laravel/signingSecret/keys/0"},
		{"a key twice", "laravel: {signingSecret: {keys: [a, a]}}", "items at 0 and 1 are equal"},
		{"one key for user and password", "database: {url: 'postgres://a/b', credentialsSecret: {name: a, userKey: b, passwordKey: b}}", "userKey and passwordKey are the same"},
		{"credentials for the bundled database", "database: {credentialsSecret: {name: a}}", "neither database.url nor database.urlSecret.name is set"},
		{"an authority for the bundled database", "database: {caSecret: {name: a}}", "neither database.url nor database.urlSecret.name is set"},
		{"Sentinels' user for the bundled Redis", "redis: {sentinel: {username: a, passwordSecret: {name: b}}}", "redis.addresses is empty"},
		{"an authority for the bundled Redis", "redis: {tls: {caSecret: {name: a}}}", "redis.addresses is empty"},
		{"several Redis without a mode", "redis: {addresses: ['a:1', 'b:1']}", "set redis.mode to sentinel or cluster"},
		{"a database of a Redis cluster", "redis: {addresses: ['a:1'], mode: cluster, db: 1}", "set redis.db to 0"},
		{"a master's name without Sentinels", "redis: {addresses: ['a:1'], masterName: a}", "redis.mode is standalone"},
		{"Sentinels' user without a password", "redis: {addresses: ['a:1'], mode: sentinel, masterName: a, sentinel: {username: a}}", "redis.sentinel.passwordSecret.name"},
		{"a key prefix with a space", "redis: {keyPrefix: 'a b'}", "/redis/keyPrefix"},
		{"a token without an application", "laravel: {tokenSecret: {name: a}}", "laravel.url is empty"},
		{"one ServiceAccount for all", "manager: {serviceAccount: {name: a}}\npools: {big: {serviceAccount: {name: a}}}", "the workers of the pool big have the same ServiceAccount, a"},
		{"a pool's name that is too long for the release's", "fullnameOverride: a23456789-123456789-123456789-12345678\npools: {a-rather-long-pool: {}}", "names have at most 63 characters"},
		{"an unknown pull policy", "image: {pullPolicy: Sometimes}", "'IfNotPresent', 'Always', 'Never'"},
		{"an unknown mode of Redis", "redis: {addresses: ['a:1'], mode: single}", "'standalone', 'sentinel', 'cluster'"},
		{"a URL in place of host:port", "redis: {addresses: ['redis://a:1']}", "does not match pattern"},
		{"a password in the database's URL", "database: {url: 'postgres://a:secret@b/c'}", "database.url holds a password"},
		{"a password in Laravel's URL", "laravel: {url: 'https://a:secret@b/c'}", "laravel.url holds a user or a password"},
		{"another kind of database", "database: {url: 'mysql://a/b'}", "does not match pattern"},
		{"a password as a parameter", "database: {url: 'postgres://b/c?password=secret'}", "database.url holds a password"},
		{"a name of a pool that is no label", "pools: {Big_Pool: {}}", "the pool Big_Pool: choose a name of at most 20 lower case letters"},
		{"no pool", "pools: {default: null}", "pools is empty: keep at least one"},
		{"no Redis", "valkey: {enabled: false}", "there is no Redis: set redis.addresses"},
		{"no database", "postgresql: {enabled: false}", "there is no database: set database.url"},
		{"two databases", "database: {url: 'postgres://a/b', urlSecret: {name: db}}", "are both set: keep one"},
		{"users for the bundled Redis", "redis: {manager: {username: a, passwordSecret: {name: b}}}", "redis.addresses is empty"},
		{"a user without a password", "redis: {addresses: ['a:1'], worker: {username: a}}", "redis.worker.passwordSecret.name"},
		{"an authority without TLS", "redis: {addresses: ['a:1'], tls: {caSecret: {name: a}}}", "redis.tls.enabled is false"},
		{"Sentinels without a name", "redis: {addresses: ['a:1'], mode: sentinel}", "set redis.masterName"},
		{"Laravel without a token", "laravel: {url: 'https://a'}", "laravel.tokenSecret.name"},
		{"Laravel without a signing secret", "laravel: {url: 'https://a', tokenSecret: {name: a}}", "laravel.signingSecret.name"},
		{"an authority for http", "laravel: {url: 'http://a', insecureHTTP: true, tokenSecret: {name: a}, signingSecret: {name: a}, caSecret: {name: a}}", "laravel.caSecret is set, and laravel.url begins with http://"},
		{"one path for two kinds", "laravel: {qrPath: /a, messagePath: /a}", "give each its own"},
		{"a path with a query", "laravel: {qrPath: '/a?b'}", "/laravel/qrPath"},
		{"a URL with a query", "laravel: {url: 'https://a?b'}", "/laravel/url"},
		{"Laravel over http", "laravel: {url: 'http://a', tokenSecret: {name: a}, signingSecret: {name: a}}", "use https://"},
		{"no ServiceAccount of the manager", "manager: {serviceAccount: {create: false}}", "manager.serviceAccount.name"},
		{"no ServiceAccount of a pool", "pools: {big: {serviceAccount: {create: false}}}", "for the pool big"},
		{"autoscaling upside down", "worker: {autoscaling: {enabled: true, minReplicas: 5, maxReplicas: 2}}", "for the pool default"},
		{"monitors that the cluster does not know", "metrics: {serviceMonitor: {enabled: true, renderMode: failIfMissing}}", "the cluster does not know monitoring.coreos.com/v1"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			_, _, err := render(chart, options{values: values(t, row.values)})
			g.Expect(err).To(MatchError(ContainSubstring(row.want)))
			g.Expect(err.Error()).NotTo(MatchRegexp("secret@|=secret"))
		})
	}
}

func TestWrongReleaseIsRefused(t *testing.T) {
	g := NewWithT(t)
	_, _, err := render(chart, options{release: "shop.one"})
	g.Expect(err).To(MatchError(ContainSubstring("the release's name is shop.one")))
	_, _, err = render(chart, options{release: "1shop"})
	g.Expect(err).To(MatchError(ContainSubstring("that of a Service must begin with a letter")))
	mustRender(t, options{release: "1shop", values: values(t, "fullnameOverride: shop")})
}

// TestNullIsRefused: Helm removes a value that is null, and a template that reads it fails with
// words that only its author understands, or takes it for 0. So does `helm upgrade
// --reuse-values` with the values of a chart that lacks a newer one.
func TestNullIsRefused(t *testing.T) {
	all := values(t, string(read(t, chartFolder+"/values.yaml")))
	var walk func(path []string, v map[string]any)
	walk = func(path []string, v map[string]any) {
		for key, inner := range v {
			path := append(slices.Clone(path), key)
			t.Run(strings.Join(path, "."), func(t *testing.T) {
				var given any
				for _, key := range slices.Backward(path) {
					given = map[string]any{key: given}
				}
				_, _, err := render(chart, options{values: given.(map[string]any)})
				NewWithT(t).Expect(err).To(MatchError(ContainSubstring("missing property '" + key + "'")))
			})
			if settings, ok := inner.(map[string]any); ok && !slices.Contains([]string{"pools", "requests", "limits"}, key) {
				walk(path, settings)
			}
		}
	}
	walk(nil, all)
}

// TestGivenVariablesReplaceOurs: Kubernetes takes no two of the same name.
func TestGivenVariablesReplaceOurs(t *testing.T) {
	g := NewWithT(t)
	objects := mustRender(t, options{values: values(t, `
manager: {extraEnv: [{name: WHATSAPP_OPERATOR_BATCH_SIZE, value: "7"}]}
worker: {extraEnv: [{name: WHATSAPP_OPERATOR_NAME, value: mine}]}`)})
	for name, want := range map[string]any{
		"manager": map[string]any{"name": "WHATSAPP_OPERATOR_BATCH_SIZE", "value": "7"},
		"worker":  map[string]any{"name": "WHATSAPP_OPERATOR_NAME", "value": "mine"},
	} {
		var found []any
		for _, e := range list(containers(pods(objects)["Deployment whatsapp-operator-system/whatsapp-operator-"+name])[0], "env") {
			if text(e, "name") == text(want, "name") {
				found = append(found, e)
			}
		}
		g.Expect(found).To(ConsistOf(want), name)
	}
}

// TestNothingIsTwice: what Kubernetes merges by a key has each key once.
func TestNothingIsTwice(t *testing.T) {
	eachOptionSet(t, func(_ *testing.T, g *WithT, _ options, objects []object) {
		unique := func(where string, items []any, key string) {
			seen := map[string]bool{}
			for _, item := range items {
				g.Expect(seen).NotTo(HaveKey(text(item, key)), where)
				seen[text(item, key)] = true
			}
		}
		for id, spec := range pods(objects) {
			unique(id, list(spec, "volumes"), "name")
			unique(id, list(spec, "containers"), "name")
			for _, c := range containers(spec) {
				unique(id, list(c, "env"), "name")
				unique(id, list(c, "volumeMounts"), "mountPath")
				unique(id, list(c, "ports"), "name")
			}
		}
	})
}

// TestOurLabelsStay: a selector, a policy or the manager reads them.
func TestOurLabelsStay(t *testing.T) {
	g := NewWithT(t)
	for _, set := range optionSets {
		if set.name != "labels and names that the chart has too" {
			continue
		}
		worker := find(mustRender(t, options{values: set.values(t)}), "Deployment", "whatsapp-operator-worker-a-long-pool-name")
		for _, labels := range []any{get(worker, "metadata", "labels"), get(worker, "spec", "template", "metadata", "labels")} {
			g.Expect(labels).To(And(
				HaveKeyWithValue("whatsapp-operator.io/pool", "a-long-pool-name"),
				HaveKeyWithValue("app.kubernetes.io/name", "whatsapp-operator"),
				HaveKeyWithValue("app.kubernetes.io/component", "worker"),
			))
		}
		g.Expect(get(worker, "spec", "template", "metadata", "annotations")).To(HaveKeyWithValue("kubectl.kubernetes.io/default-container", "mine"))
	}
}

// TestJobsRunWhereManagersRun: a hook whose pod finds no node holds up `helm install`.
func TestJobsRunWhereManagersRun(t *testing.T) {
	g := NewWithT(t)
	all := pods(mustRender(t, options{values: values(t, `
manager: {nodeSelector: {a: b}, tolerations: [{key: c, operator: Exists}], affinity: {nodeAffinity: {x: z}, podAffinity: {x: z}}}
valkey: {nodeSelector: {a: b}, tolerations: [{key: c, operator: Exists}]}
postgresql: {nodeSelector: {a: b}, tolerations: [{key: c, operator: Exists}]}
simulator: {enabled: true, nodeSelector: {a: b}, tolerations: [{key: c, operator: Exists}]}
worker: {nodeSelector: {a: b}, tolerations: [{key: c, operator: Exists}]}`)}))
	g.Expect(all).To(HaveLen(9))
	for id, spec := range all {
		g.Expect(get(spec, "nodeSelector")).To(Equal(map[string]any{"a": "b"}), id)
		g.Expect(list(spec, "tolerations")).To(ContainElement(map[string]any{"key": "c", "operator": "Exists"}), id)
		if strings.HasPrefix(id, "Job") || strings.HasPrefix(id, "Pod") {
			g.Expect(get(spec, "affinity")).To(Equal(map[string]any{"nodeAffinity": map[string]any{"x": "z"}}), id)
		}
	}
}

// TestStores: an external store turns its bundled one off, and only that.
// TestUpgradeKeepsTheStoresRunning: a restart of the stores in the middle of a roll-out would
// lengthen each session's gap.
func TestUpgradeKeepsTheStoresRunning(t *testing.T) {
	g := NewWithT(t)
	upgraded := mustRender(t, options{version: "99.0.0"})
	for _, o := range mustRender(t, options{}) {
		if o.kind() == "StatefulSet" {
			g.Expect(get(find(upgraded, "StatefulSet", o.name()), "spec")).To(Equal(get(o, "spec")), o.id())
		}
	}
}

// TestStoresArePinned: by digest, unless a person gives another image.
func TestStoresArePinned(t *testing.T) {
	g := NewWithT(t)
	images := func(text string) (all []string) {
		for id, spec := range pods(mustRender(t, options{values: values(t, text)})) {
			if strings.HasPrefix(id, "StatefulSet") {
				all = append(all, get(containers(spec)[0], "image").(string))
			}
		}
		return all
	}
	g.Expect(images("")).To(ConsistOf(
		MatchRegexp(`^docker\.io/valkey/valkey:[0-9.]+@sha256:[0-9a-f]{64}$`),
		MatchRegexp(`^docker\.io/library/postgres:[0-9.]+@sha256:[0-9a-f]{64}$`),
	))
	g.Expect(images("valkey: {image: {tag: mine, digest: ''}}\npostgresql: {image: {tag: mine, digest: ''}}")).To(ConsistOf(
		"docker.io/valkey/valkey:mine", "docker.io/library/postgres:mine",
	))
}

func TestStores(t *testing.T) {
	for _, row := range []struct {
		values               string
		valkey, postgresql   bool
		bundled, redis, base string
	}{
		{"", true, true, "redis,database", "whatsapp-operator-valkey:6379", "postgres://whatsapp@whatsapp-operator-postgresql:5432/whatsapp?sslmode=disable"},
		{"redis: {addresses: ['a:1', 'b:2'], mode: cluster}", false, true, "database", "a:1,b:2", "postgres://whatsapp@whatsapp-operator-postgresql:5432/whatsapp?sslmode=disable"},
		{"database: {url: 'postgres://db/x?sslmode=verify-full'}", true, false, "redis", "whatsapp-operator-valkey:6379", "postgres://db/x?sslmode=verify-full"},
		{"database: {urlSecret: {name: db}}", true, false, "redis", "whatsapp-operator-valkey:6379", ""},
		{"redis: {addresses: ['a:1']}\ndatabase: {url: 'postgres://db/x'}", false, false, "", "a:1", "postgres://db/x"},
	} {
		t.Run(row.values, func(t *testing.T) {
			g := NewWithT(t)
			objects, notes, err := render(chart, options{values: values(t, row.values)})
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(find(objects, "StatefulSet", "whatsapp-operator-valkey") != nil).To(Equal(row.valkey))
			g.Expect(find(objects, "StatefulSet", "whatsapp-operator-postgresql") != nil).To(Equal(row.postgresql))
			g.Expect(find(objects, "Job", "whatsapp-operator-bootstrap") != nil).To(Equal(row.bundled != ""))
			g.Expect(strings.Contains(notes, "FOR TRYING OUT ONLY")).To(Equal(row.bundled != ""))
			for _, name := range []string{"manager", "worker"} {
				env := environment(find(objects, "Deployment", "whatsapp-operator-"+name))
				g.Expect(env["WHATSAPP_OPERATOR_REDIS"]).To(Equal(row.redis))
				g.Expect(env["WHATSAPP_OPERATOR_STORE"]).To(Equal(row.base))
				if row.valkey {
					g.Expect(env["WHATSAPP_OPERATOR_REDIS_USERNAME"]).To(Equal("whatsapp-operator-" + name))
				}
			}
			g.Expect(environment(find(objects, "Deployment", "whatsapp-operator-manager"))["WHATSAPP_OPERATOR_BUNDLED_STORES"]).To(Equal(row.bundled))
		})
	}
}

func environment(o object) map[string]string {
	env := map[string]string{}
	for _, c := range list(o, "spec", "template", "spec", "containers") {
		for _, e := range list(c, "env") {
			env[text(e, "name")] = text(e, "value")
		}
	}
	return env
}

// TestVolumesOutliveEverything: a volume claim of a StatefulSet can never be changed, so
// nothing in it depends on the chart's version or on labels that a user changes.
func TestVolumesOutliveEverything(t *testing.T) {
	g := NewWithT(t)
	before := mustRender(t, options{})
	after := mustRender(t, options{version: "9.9.9", values: values(t, "commonLabels: {team: other}\npostgresql: {maxConnections: 300}")})
	for _, name := range []string{"whatsapp-operator-valkey", "whatsapp-operator-postgresql"} {
		b, a := find(before, "StatefulSet", name), find(after, "StatefulSet", name)
		for _, field := range []string{"volumeClaimTemplates", "selector", "serviceName"} {
			g.Expect(get(a, "spec", field)).To(Equal(get(b, "spec", field)), name)
		}
		g.Expect(get(b, "spec", "persistentVolumeClaimRetentionPolicy", "whenDeleted")).To(Equal("Retain"))
	}
	for _, o := range before {
		if o.kind() == "Deployment" {
			g.Expect(get(find(after, o.kind(), o.name()), "spec", "selector")).To(Equal(get(o, "spec", "selector")), "a selector cannot be changed")
		}
	}
}

func TestWorkers(t *testing.T) {
	g := NewWithT(t)
	objects := mustRender(t, options{values: values(t, everything), apis: []string{prometheus, keda}})
	worker := find(objects, "Deployment", "wa-worker")
	g.Expect(get(worker, "spec", "replicas")).To(BeNumerically("==", 5))
	g.Expect(get(worker, "spec", "strategy", "rollingUpdate")).To(Equal(map[string]any{"maxSurge": 1.0, "maxUnavailable": 0.0}))
	g.Expect(get(worker, "spec", "template", "spec", "terminationGracePeriodSeconds")).To(BeNumerically("==", 60))
	g.Expect(environment(worker)["WHATSAPP_OPERATOR_DRAIN_TIMEOUT"]).To(Equal("55s"))
	g.Expect(text(worker, "spec", "template", "metadata", "labels", "whatsapp-operator.io/pool")).To(Equal("default"))

	for name, kind := range map[string]string{"wa-worker-big": "ScaledObject", "wa-worker-other": "HorizontalPodAutoscaler"} {
		g.Expect(get(find(objects, "Deployment", name), "spec")).NotTo(HaveKey("replicas"), "the autoscaler decides")
		scaler := find(objects, kind, name)
		g.Expect(scaler).NotTo(BeNil(), name)
		behavior := get(scaler, "spec", "behavior")
		if kind == "ScaledObject" {
			behavior = get(scaler, "spec", "advanced", "horizontalPodAutoscalerConfig", "behavior")
			g.Expect(text(list(scaler, "spec", "triggers")[0], "metadata", "threshold")).To(Equal("700000"))
		}
		g.Expect(list(behavior, "scaleDown", "policies")).To(ConsistOf(map[string]any{"type": "Pods", "value": 1.0, "periodSeconds": 600.0}))
	}
	g.Expect(environment(find(objects, "Deployment", "wa-worker-big"))["WHATSAPP_OPERATOR_CAPACITY"]).To(Equal("1000000"), "not 1e+06")
	g.Expect(find(objects, "ServiceAccount", "mine")).To(BeNil())
	g.Expect(list(find(objects, "ClusterRoleBinding", "wa-worker"), "subjects")).To(HaveLen(3))
	g.Expect(text(list(find(objects, "Deployment", "wa-manager"), "spec", "template", "spec", "containers")[0], "image")).
		To(HaveSuffix("@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"))
}

// TestPodsOfOurProcesses checks what each manager and worker needs from its manifest.
func TestPodsOfOurProcesses(t *testing.T) {
	objects := mustRender(t, options{values: values(t, "worker: {drainTimeoutSeconds: 100}\npools: {default: {}, big: {replicas: 7, capacity: 5}}")})
	for component, row := range map[string]struct {
		object   string
		replicas float64
		grace    float64
		metrics  float64
	}{
		"the manager":     {"whatsapp-operator-manager", 2, 30, 8443},
		"the workers":     {"whatsapp-operator-worker", 2, 105, 8080},
		"a pool's worker": {"whatsapp-operator-worker-big", 7, 105, 8080},
	} {
		t.Run(component, func(t *testing.T) {
			g := NewWithT(t)
			deployment := find(objects, "Deployment", row.object)
			g.Expect(get(deployment, "spec", "replicas")).To(Equal(row.replicas))
			g.Expect(get(deployment, "spec", "revisionHistoryLimit")).To(Equal(3.0))
			spec := pods(objects)[deployment.id()]
			g.Expect(get(spec, "terminationGracePeriodSeconds")).To(Equal(row.grace))
			for _, taint := range []string{"unreachable", "not-ready"} {
				g.Expect(list(spec, "tolerations")).To(ContainElement(map[string]any{
					"key": "node.kubernetes.io/" + taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30.0,
				}), "a pod of a node that is lost is replaced after 30 s")
			}
			selector := get(deployment, "spec", "selector")
			var spread []string
			for _, constraint := range list(spec, "topologySpreadConstraints") {
				spread = append(spread, text(constraint, "topologyKey"))
				g.Expect(get(constraint, "labelSelector")).To(Equal(selector))
			}
			g.Expect(spread).To(ConsistOf("kubernetes.io/hostname", "topology.kubernetes.io/zone"))
			budget := find(objects, "PodDisruptionBudget", row.object)
			g.Expect(get(budget, "spec", "maxUnavailable")).To(Equal(1.0))
			g.Expect(text(budget, "spec", "unhealthyPodEvictionPolicy")).To(Equal("AlwaysAllow"), "a pod that is not ready must not hold up a drain")
			g.Expect(get(budget, "spec", "selector")).To(Equal(selector))

			c := containers(spec)[0]
			g.Expect(list(c, "ports")).To(ConsistOf(
				map[string]any{"name": "health", "containerPort": 8081.0}, map[string]any{"name": "metrics", "containerPort": row.metrics}))
			for probe, path := range map[string]string{"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"} {
				g.Expect(get(c, probe, "httpGet")).To(Equal(map[string]any{"path": path, "port": "health"}), probe)
			}
			from := map[string]any{}
			for _, e := range list(c, "env") {
				from[text(e, "name")] = get(e, "valueFrom")
			}
			g.Expect(from).To(And(
				HaveKeyWithValue("GOMAXPROCS", map[string]any{"resourceFieldRef": map[string]any{"resource": "requests.cpu", "divisor": "1"}}),
				HaveKeyWithValue("POD_NAMESPACE", map[string]any{"fieldRef": map[string]any{"fieldPath": "metadata.namespace"}}),
				HaveKeyWithValue("WHATSAPP_OPERATOR_POD_UID", map[string]any{"fieldRef": map[string]any{"fieldPath": "metadata.uid"}}),
			))
			g.Expect(environment(deployment)["WHATSAPP_OPERATOR_RELEASE"]).To(Equal("whatsapp-operator"))
			for _, v := range list(spec, "volumes") {
				if get(v, "secret") != nil {
					g.Expect(get(v, "secret", "defaultMode")).To(Equal(float64(0o440)), "the pod's group reads the Secret, and nobody else")
				}
			}
			if component == "the manager" {
				return
			}
			g.Expect(text(c, "name")).To(Equal("worker"), "the manager reads the end of the container with this name")
			g.Expect(from).To(HaveKeyWithValue("WHATSAPP_OPERATOR_NAME", map[string]any{"fieldRef": map[string]any{"fieldPath": "metadata.name"}}))
			g.Expect(list(c, "volumeMounts")).To(ContainElement(map[string]any{"name": "state", "mountPath": "/var/lib/whatsapp-operator"}))
			g.Expect(list(spec, "volumes")).To(ContainElement(map[string]any{"name": "state", "emptyDir": map[string]any{}}))
		})
	}
}

// TestOnlyWhoNeedsItHasAToken: the API server's token is mounted where the program asks it.
func TestOnlyWhoNeedsItHasAToken(t *testing.T) {
	g := NewWithT(t)
	objects := mustRender(t, options{values: values(t, "simulator: {enabled: true}")})
	for _, o := range objects {
		if o.kind() == "ServiceAccount" {
			g.Expect(get(o, "automountServiceAccountToken")).To(BeFalse(), o.id())
		}
	}
	var with []string
	for id, spec := range pods(objects) {
		if get(spec, "automountServiceAccountToken") == true {
			with = append(with, strings.TrimPrefix(id[strings.LastIndex(id, "/")+1:], "whatsapp-operator-"))
		}
	}
	g.Expect(with).To(ConsistOf("manager", "worker", "bootstrap", "uninstall", "test", "simulator"))
}

// TestNothingNamesANamespace: every namespace is the release's.
func TestNothingNamesANamespace(t *testing.T) {
	for _, set := range optionSets {
		for _, o := range mustRender(t, options{values: set.values(t), apis: set.apis, namespace: "elsewhere"}) {
			content, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(content), namespace) && o.kind() != "CustomResourceDefinition" {
				t.Errorf("%s of %q names the namespace %s", o.id(), set.name, namespace)
			}
		}
	}
}

// TestMessagesWithoutAnApplication: what nobody would ever take must not fill the inbox, and what
// somebody takes must not be dropped.
func TestMessagesWithoutAnApplication(t *testing.T) {
	for name, row := range map[string]struct {
		values string
		drops  bool
	}{
		"no values":                      {"", true},
		"an application":                 {"laravel: {url: 'https://app.example.com', tokenSecret: {name: t}, signingSecret: {name: s}}", false},
		"the stand-in":                   {"simulator: {enabled: true}", false},
		"the simulator, but no stand-in": {"simulator: {enabled: true, laravel: {enabled: false}}", true},
	} {
		t.Run(name, func(t *testing.T) {
			g := NewWithT(t)
			worker := find(mustRender(t, options{values: values(t, row.values)}), "Deployment", "whatsapp-operator-worker")
			value, drops := environment(worker)["WHATSAPP_OPERATOR_DROP_MESSAGES"]
			g.Expect(drops).To(Equal(row.drops))
			if drops {
				g.Expect(value).To(Equal("true"))
			}
		})
	}
}

// TestMonitorsNeedTheirKinds: without the Prometheus operator they are left out.
func TestMonitorsNeedTheirKinds(t *testing.T) {
	g := NewWithT(t)
	count := func(o options) (n int) {
		for _, m := range mustRender(t, o) {
			if strings.HasSuffix(m.kind(), "Monitor") {
				n++
			}
		}
		return n
	}
	on := "metrics: {serviceMonitor: {enabled: true}}"
	g.Expect(count(options{values: values(t, on)})).To(Equal(0))
	g.Expect(count(options{values: values(t, on), apis: []string{prometheus}})).To(Equal(2))
	g.Expect(count(options{values: values(t, "metrics: {serviceMonitor: {enabled: true, renderMode: alwaysRender}}")})).To(Equal(2))
}

// TestDefinitionIsKept: an uninstall must not delete every session.
func TestDefinitionIsKept(t *testing.T) {
	g := NewWithT(t)
	crd := find(mustRender(t, options{}), "CustomResourceDefinition", "whatsappsessions.whatsapp-operator.io")
	g.Expect(crd.annotation("helm.sh/resource-policy")).To(Equal("keep"))
	crd = find(mustRender(t, options{values: values(t, "crds: {keep: false}")}), "CustomResourceDefinition", "whatsappsessions.whatsapp-operator.io")
	g.Expect(crd.annotation("helm.sh/resource-policy")).To(BeEmpty())
	g.Expect(find(mustRender(t, options{values: values(t, "crds: {enabled: false}")}), "CustomResourceDefinition", crd.name())).To(BeNil())
	var generated object
	g.Expect(yaml.Unmarshal(read(t, "config/crd/bases/whatsapp-operator.io_whatsappsessions.yaml"), &generated)).To(Succeed())
	g.Expect(get(crd, "spec")).To(Equal(get(generated, "spec")))
}

// TestRulesAreTheGeneratedOnes: what the program needs is said once, beside its code.
func TestRulesAreTheGeneratedOnes(t *testing.T) {
	g := NewWithT(t)
	objects := mustRender(t, options{release: "shop", namespace: "ops"})
	for _, role := range roles {
		for _, part := range regexp.MustCompile(`(?m)^---$`).Split(string(read(t, "config/rbac/"+role+"_role.yaml")), -1) {
			var generated object
			g.Expect(yaml.Unmarshal([]byte(part), &generated)).To(Succeed())
			if len(generated) == 0 {
				continue
			}
			name := generated.name()
			if role == "manager" || role == "worker" {
				name = "shop-whatsapp-operator-" + role
			}
			rendered := find(objects, generated.kind(), name)
			g.Expect(rendered).NotTo(BeNil(), "%s %s", generated.kind(), name)
			g.Expect(get(rendered, "rules")).To(Equal(get(generated, "rules")))
		}
	}
}

// TestBootstrapIsLeastPrivileged: the Job reads and changes the Secrets that it makes, no others.
func TestBootstrapIsLeastPrivileged(t *testing.T) {
	eachOptionSet(t, func(_ *testing.T, g *WithT, _ options, objects []object) {
		for _, o := range objects {
			if o.kind() != "Job" || !strings.HasSuffix(o.name(), "-bootstrap") {
				continue
			}
			var made []any
			for _, a := range list(list(o, "spec", "template", "spec", "containers")[0], "args") {
				_, keys, found := strings.Cut(a.(string), "=")
				if !found || strings.HasPrefix(a.(string), "--label=") {
					continue
				}
				for key := range strings.SplitSeq(keys, ",") {
					secret, _, _ := strings.Cut(key, "/")
					if !slices.Contains(made, any(secret)) {
						made = append(made, secret)
					}
				}
			}
			role := find(objects, "Role", o.name())
			g.Expect(list(role, "rules")).To(HaveLen(2))
			g.Expect(list(list(role, "rules")[0], "verbs")).To(ConsistOf("create"))
			g.Expect(list(list(role, "rules")[1], "resourceNames")).To(ConsistOf(made...))
			g.Expect(list(list(role, "rules")[1], "verbs")).To(ConsistOf("get", "patch"))
		}
	})
}

// TestUninstallIsLeastPrivileged: the Job stops exactly the release's workers and managers.
func TestUninstallIsLeastPrivileged(t *testing.T) {
	eachOptionSet(t, func(_ *testing.T, g *WithT, _ options, objects []object) {
		var workers, managers []string
		var role, job object
		for _, o := range objects {
			switch {
			case o.kind() == "Deployment" && text(o, "metadata", "labels", "app.kubernetes.io/component") == "worker":
				workers = append(workers, o.name())
			case o.kind() == "Deployment" && text(o, "metadata", "labels", "app.kubernetes.io/component") == "manager":
				managers = append(managers, o.name())
			case text(o, "metadata", "labels", "app.kubernetes.io/component") == "uninstall":
				g.Expect(o.annotation("helm.sh/hook")).To(Equal("pre-delete"), o.id())
				switch o.kind() {
				case "Role":
					role = o
				case "Job":
					job = o
				}
			}
		}
		var named []any
		for _, name := range slices.Concat(workers, managers) {
			named = append(named, name)
		}
		// One that cannot start must not stop the next installation once it can.
		g.Expect(get(job, "spec", "activeDeadlineSeconds")).To(BeEquivalentTo(180+60), "between the time-outs of the command and of Helm")
		g.Expect(list(list(job, "spec", "template", "spec", "containers")[0], "args")).To(Equal([]any{
			"stop", "--workers=" + strings.Join(workers, ","), "--managers=" + strings.Join(managers, ","), "--timeout=180s",
		}))
		g.Expect(list(role, "rules")).To(HaveLen(3))
		g.Expect(list(list(role, "rules")[0], "resourceNames")).To(ConsistOf(named...))
		g.Expect(list(list(role, "rules")[1], "resourceNames")).To(ConsistOf(named...))
		g.Expect(list(list(role, "rules")[1], "resources")).To(ConsistOf("deployments/scale"))
	})
}

// TestEverySecretExists: a Secret that a pod mounts is made by the bootstrap Job, or named in
// the values.
func TestEverySecretExists(t *testing.T) {
	eachOptionSet(t, func(_ *testing.T, g *WithT, o options, objects []object) {
		var made []string
		for _, role := range objects {
			if role.kind() == "Role" && strings.HasSuffix(role.name(), "-bootstrap") {
				for _, name := range list(list(role, "rules")[1], "resourceNames") {
					made = append(made, name.(string))
				}
			}
		}
		given, err := yaml.Marshal(o.values)
		g.Expect(err).NotTo(HaveOccurred())
		for id, spec := range pods(objects) {
			for _, v := range list(spec, "volumes") {
				if name := text(v, "secret", "secretName"); name != "" && !slices.Contains(made, name) {
					g.Expect(string(given)).To(MatchRegexp(`: `+regexp.QuoteMeta(name)+`\n`), "%s mounts %s", id, name)
				}
			}
		}
	})
}

// TestNetworkPolicies: with default deny, each pod is chosen by a policy, and the ports of a
// pod that others need are let in.
func TestNetworkPolicies(t *testing.T) {
	g := NewWithT(t)
	objects := mustRender(t, options{values: values(t, "networkPolicy: {enabled: true}\nsimulator: {enabled: true}")})
	policies := map[string]object{}
	for _, o := range objects {
		if o.kind() == "NetworkPolicy" {
			policies[text(o, "spec", "podSelector", "matchLabels", "app.kubernetes.io/component")] = o
			g.Expect(list(o, "spec", "policyTypes")).To(ConsistOf("Ingress", "Egress"), o.id())
		}
	}
	for _, o := range objects {
		labels := get(o, "spec", "template", "metadata", "labels")
		if o.kind() == "Pod" {
			labels = get(o, "metadata", "labels")
		}
		if labels != nil {
			g.Expect(policies).To(HaveKey(text(labels, "app.kubernetes.io/component")), o.id())
		}
	}
	from := func(component string) (all []string) {
		for _, rule := range list(policies[component], "spec", "ingress") {
			for _, peer := range list(rule, "from") {
				all = append(all, text(peer, "podSelector", "matchLabels", "app.kubernetes.io/component"))
			}
			g.Expect(list(rule, "from")).NotTo(BeEmpty(), "an empty list lets everybody in")
		}
		return all
	}
	g.Expect(from("valkey")).To(ConsistOf("manager", "worker", "test"))
	g.Expect(from("postgresql")).To(ConsistOf("manager", "worker", "test"))
	g.Expect(from("simulator")).To(ConsistOf("worker"))
	g.Expect(from("laravel")).To(ConsistOf("manager"))
	for _, nobody := range []string{"manager", "worker", "bootstrap", "test"} {
		g.Expect(from(nobody)).To(BeEmpty(), nobody)
	}
	for _, none := range []string{"valkey", "postgresql", "laravel"} {
		g.Expect(list(policies[none], "spec", "egress")).To(BeEmpty(), none)
	}
	objects = mustRender(t, options{values: values(t, string(read(t, chartFolder+"/values-production.yaml")))})
	metrics := find(objects, "NetworkPolicy", "whatsapp-operator-worker")
	g.Expect(list(metrics, "spec", "ingress")).To(HaveLen(1))
	g.Expect(list(list(metrics, "spec", "ingress")[0], "ports")).To(ConsistOf(map[string]any{"port": 8080.0, "protocol": "TCP"}))
}

// TestNetworkPoliciesAllowTheGivenPorts: a port that the values name need not be repeated.
func TestNetworkPoliciesAllowTheGivenPorts(t *testing.T) {
	g := NewWithT(t)
	objects := mustRender(t, options{values: values(t, `
networkPolicy: {enabled: true, storesPorts: [5432, 7001]}
redis: {mode: cluster, addresses: ["a:7000", "[fd00::1]:7001"]}
database: {url: "postgres://user@[fd00::2]:6432,b,c:6433/x?connect_timeout=1:2"}
laravel: {url: "https://app.example.com:8443/a:9/b", tokenSecret: {name: t}, signingSecret: {name: s}}`)})
	ports := func(component string) (all []any) {
		for _, rule := range list(find(objects, "NetworkPolicy", "whatsapp-operator-"+component), "spec", "egress") {
			for _, port := range list(rule, "ports") {
				all = append(all, get(port, "port"))
			}
		}
		return all
	}
	stores := []any{53.0, 53.0, 443.0, 6443.0, 5432.0, 7001.0, 7000.0, 6432.0, 6433.0}
	g.Expect(ports("worker")).To(ConsistOf(stores...))
	g.Expect(ports("manager")).To(ConsistOf(append(stores, 80.0, 443.0, 8443.0)...))
}

func TestNotes(t *testing.T) {
	for _, row := range []struct {
		name, values string
		want         []string
		not          []string
	}{
		{"no values", "", []string{"Next step", "qr default/shop-1", "FOR TRYING OUT ONLY", "laravel.url: nothing is delivered", "networkPolicy.enabled"}, []string{"simulator"}},
		{"production", string(read(t, chartFolder+"/values-production.yaml")), []string{"sentinel-0.redis.example.com:26379", "sentinel, TLS", "postgres://db-a.example.com", "does not know its kinds"}, []string{"TRYING OUT", "laravel.url: nothing", "verify-full: "}},
		{"demo", string(read(t, chartFolder+"/values-demo.yaml")), []string{"a stand-in receives", "no session reaches the real WhatsApp", "forgets every linked device", "restartedAt="}, nil},
		{"a database without TLS", "database: {url: 'postgres://db/x?sslmode=require'}", []string{"sslmode=verify-full: the database's certificate is not checked"}, nil},
		{"a user in the URL", "database: {url: 'postgres://user@db/x'}", []string{"postgres://***@db/x"}, []string{"user@"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			_, notes, err := render(chart, options{values: values(t, row.values)})
			g.Expect(err).NotTo(HaveOccurred())
			for _, want := range row.want {
				g.Expect(notes).To(ContainSubstring(want))
			}
			for _, not := range row.not {
				g.Expect(notes).NotTo(ContainSubstring(not))
			}
		})
	}
}

// TestUninstallSaysWhatIsLeft: the groups of Redis' keys are those that its users may write, and
// what is deleted without Helm keeps sessions, volumes and Secrets.
func TestUninstallSaysWhatIsLeft(t *testing.T) {
	g := NewWithT(t)
	page := string(read(t, "docs/uninstall.md"))
	groups := regexp.MustCompile(`~(\S+)`).FindAllStringSubmatch(string(read(t, chartFolder+"/files/valkey-users.acl")), -1)
	g.Expect(groups).NotTo(BeEmpty())
	for _, group := range groups {
		g.Expect(page).To(ContainSubstring("`" + group[1] + "`"))
	}
	// Without Helm, two commands delete each kind that there is, and nothing else.
	short := map[string]string{
		"Deployment": "deploy", "StatefulSet": "sts", "Service": "svc", "ConfigMap": "cm", "PodDisruptionBudget": "pdb", "Job": "job",
		"ServiceAccount": "sa", "Role": "role", "RoleBinding": "rolebinding", "ClusterRole": "clusterrole", "ClusterRoleBinding": "clusterrolebinding",
	}
	_, commands, found := strings.Cut(page, "delete the rest by its label:")
	g.Expect(found).To(BeTrue())
	commands, _, _ = strings.Cut(commands, "\n6. ")
	var deleted []string
	for _, command := range regexp.MustCompile(`kubectl delete (\S+) `).FindAllStringSubmatch(commands, -1) {
		deleted = append(deleted, strings.Split(command[1], ",")...)
	}
	kinds := map[string]bool{}
	for folder := range kustomizations {
		built, err := buildKustomization("../../" + folder)
		g.Expect(err).NotTo(HaveOccurred())
		for part := range strings.SplitSeq(string(built), "\n---\n") {
			var o object
			g.Expect(yaml.Unmarshal([]byte(part), &o)).To(Succeed())
			if o.kind() == "Namespace" || o.kind() == "CustomResourceDefinition" {
				continue // kept: sessions, keys and volumes would be lost with them
			}
			g.Expect(get(o, "metadata", "labels")).To(HaveKeyWithValue("app.kubernetes.io/instance", "whatsapp-operator"), o.id())
			g.Expect(short).To(HaveKey(o.kind()))
			kinds[short[o.kind()]] = true
		}
	}
	g.Expect(deleted).To(ConsistOf(slices.Collect(maps.Keys(kinds))))
}

// TestDocsKeepNewDefaults: with --reuse-values alone Helm renders the new templates with the
// former version's defaults, and what is new is missing.
func TestDocsKeepNewDefaults(t *testing.T) {
	commands := regexp.MustCompile("helm upgrade [^`\n]*")
	found := 0
	err := filepath.WalkDir("../../docs", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".md" {
			return err
		}
		content, err := os.ReadFile(path)
		for _, command := range commands.FindAllString(string(content), -1) {
			found++
			if strings.Contains(command, " --reuse-values") {
				t.Errorf("%s: %s", path, command)
			}
		}
		return err
	})
	if err != nil || found == 0 {
		t.Fatalf("%d commands were found: %v", found, err)
	}
}

// TestPagesNameExistingValues checks each `a.b` in the pages whose a is a value of the chart.
func TestPagesNameExistingValues(t *testing.T) {
	g := NewWithT(t)
	all := values(t, string(read(t, chartFolder+"/values.yaml")))
	pages, err := filepath.Glob("../../docs/*.md")
	g.Expect(err).NotTo(HaveOccurred())
	path := regexp.MustCompile(`[^A-Za-z0-9./{]([a-z][A-Za-z]*(?:\.[a-z][A-Za-z]*)+)[=,:\x60]`)
	named := 0
	for _, name := range append(pages, "../../README.md", "../../"+chartFolder+"/templates/NOTES.txt") {
		content, err := os.ReadFile(name)
		g.Expect(err).NotTo(HaveOccurred())
		for _, found := range path.FindAllStringSubmatch(string(content), -1) {
			keys := strings.Split(found[1], ".")
			if _, ours := all[keys[0]]; !ours || strings.HasSuffix(found[1], ".md") || strings.HasSuffix(found[1], ".com") {
				continue
			}
			named++
			g.Expect(get(all, keys...)).NotTo(BeNil(), "%s names %s", name, found[1])
		}
	}
	g.Expect(named).To(BeNumerically(">", 10))
}

// TestGeneratedFilesAreCurrent: `make manifests` was run.
func TestGeneratedFilesAreCurrent(t *testing.T) {
	g := NewWithT(t)
	root, err := repository()
	g.Expect(err).NotTo(HaveOccurred())
	for name, generate := range map[string]func(string) (map[string][]byte, error){"copied": copied, "derived": derived} {
		files, err := generate(root)
		g.Expect(err).NotTo(HaveOccurred(), name)
		for path, want := range files {
			have, err := os.ReadFile(filepath.Join(root, path))
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(bytes.Equal(have, want)).To(BeTrue(), "%s is not current: run make manifests", path)
		}
	}
}

// TestKustomizeRendersTheSame compares config/default and config/external-stores with the
// chart: the same objects, but for what has a meaning for Helm only.
func TestKustomizeRendersTheSame(t *testing.T) {
	for folder, v := range kustomizations {
		t.Run(folder, func(t *testing.T) {
			g := NewWithT(t)
			built, err := buildKustomization(filepath.Join("..", "..", folder))
			g.Expect(err).NotTo(HaveOccurred())
			have := map[string]any{}
			for part := range strings.SplitSeq(string(built), "\n---\n") {
				var o object
				g.Expect(yaml.Unmarshal([]byte(part), &o)).To(Succeed())
				if o.kind() != "Namespace" {
					have[o.id()] = normalized(o)
				}
			}
			want := map[string]any{}
			for _, o := range mustRender(t, options{values: v}) {
				if !slices.Contains([]string{"test", "pre-delete"}, o.annotation("helm.sh/hook")) {
					want[o.id()] = normalized(withoutHelm(o))
				}
			}
			g.Expect(slices.Sorted(maps.Keys(have))).To(Equal(slices.Sorted(maps.Keys(want))))
			for id := range want {
				g.Expect(have[id]).To(Equal(want[id]), id)
			}
		})
	}
}

// TestKustomizeExample builds examples/kustomize and compares its Deployments with the chart's:
// the same settings, and each file that a setting names is in a volume of the same Secret.
func TestKustomizeExample(t *testing.T) {
	g := NewWithT(t)
	remote := "github.com/whatsapp-operator/whatsapp-operator/config/external-stores?ref=v0.1.0"
	example := string(read(t, "examples/kustomize/kustomization.yaml"))
	g.Expect(strings.Count(example, remote)).To(Equal(1))
	folder, err := filepath.EvalSymlinks(t.TempDir())
	g.Expect(err).NotTo(HaveOccurred())
	base, err := filepath.Abs("../../config/external-stores")
	g.Expect(err).NotTo(HaveOccurred())
	base, err = filepath.Rel(folder, base) // an absolute path is refused
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(os.WriteFile(filepath.Join(folder, "kustomization.yaml"), []byte(strings.Replace(example, remote, base, 1)), 0o600)).To(Succeed())
	built, err := buildKustomization(folder)
	g.Expect(err).NotTo(HaveOccurred())

	v := values(t, `
image: {repository: registry.example.com/whatsapp-operator}
laravel: {url: "https://app.example.com/api", tokenSecret: {name: whatsapp-operator-laravel}, signingSecret: {name: whatsapp-operator-laravel}}`)
	maps.Copy(v, kustomizations["config/external-stores"])
	v["redis"] = maps.Clone(v["redis"].(map[string]any))
	v["redis"].(map[string]any)["addresses"] = []any{"redis.shop.example.com:6379"}
	charts := mustRender(t, options{values: v})
	compared := 0
	for part := range strings.SplitSeq(string(built), "\n---\n") {
		var o object
		g.Expect(yaml.Unmarshal([]byte(part), &o)).To(Succeed())
		if o.kind() != "Deployment" {
			continue
		}
		compared++
		want := find(charts, "Deployment", o.name())
		g.Expect(get(o, "metadata", "namespace")).To(Equal("whatsapp-operator-system"))
		g.Expect(settingsOf(g, o)).To(Equal(settingsOf(g, want)), o.name())
		container := func(o object) map[string]any {
			return list(o, "spec", "template", "spec", "containers")[0].(map[string]any)
		}
		g.Expect(container(o)["image"]).To(Equal(container(want)["image"]))
	}
	g.Expect(compared).To(Equal(2))
}

// settingsOf are the variables of a Deployment's container. In place of the path of a file that
// is in a Secret it has the Secret and the key.
func settingsOf(g *WithT, o object) map[string]any {
	spec := get(o, "spec", "template", "spec").(map[string]any)
	secrets := map[string]map[string]any{}
	for _, v := range list(spec, "volumes") {
		if secret, ok := v.(map[string]any)["secret"].(map[string]any); ok {
			secrets[v.(map[string]any)["name"].(string)] = secret
		}
	}
	container := list(spec, "containers")[0].(map[string]any)
	all := map[string]any{}
	for _, e := range list(container, "env") {
		variable := e.(map[string]any)
		name := variable["name"].(string)
		all[name] = variable["value"]
		if variable["valueFrom"] != nil {
			all[name] = variable["valueFrom"]
		}
		if !strings.HasSuffix(name, "_FILE") {
			continue
		}
		folder, file := filepath.Split(variable["value"].(string))
		for _, m := range list(container, "volumeMounts") {
			mount := m.(map[string]any)
			if secret := secrets[mount["name"].(string)]; secret != nil && mount["mountPath"] == strings.TrimSuffix(folder, "/") {
				all[name] = fmt.Sprint(secret["secretName"], "/", file, " mode ", secret["defaultMode"])
			}
		}
		g.Expect(all[name]).NotTo(Equal(variable["value"]), "%s names a file that is in no volume", name)
	}
	for name, value := range map[string]string{ // the program's defaults
		"WHATSAPP_OPERATOR_DROP_MESSAGES":                "false",
		"WHATSAPP_OPERATOR_LARAVEL_QR_PATH":              "/qr/batch",
		"WHATSAPP_OPERATOR_LARAVEL_STATUS_PATH":          "/whatsapp/status/batch",
		"WHATSAPP_OPERATOR_LARAVEL_TIMEOUT":              "15s",
		"WHATSAPP_OPERATOR_LARAVEL_MAX_REQUESTS":         "4",
		"WHATSAPP_OPERATOR_LARAVEL_MESSAGE_PATH":         "/whatsapp/messages/batch",
		"WHATSAPP_OPERATOR_LARAVEL_MAX_MESSAGE_REQUESTS": "8",
	} {
		if all[name] == value {
			delete(all, name)
		}
	}
	return all
}

// normalized removes what the files of config/crd and config/rbac do not have: labels that say
// the version and the part.
func normalized(o object) any {
	o = o.copy()
	if slices.Contains([]string{"CustomResourceDefinition", "ClusterRole", "Role"}, o.kind()) {
		labels, _ := get(o, "metadata", "labels").(map[string]any)
		delete(labels, "app.kubernetes.io/component")
		delete(labels, "app.kubernetes.io/version")
	}
	return (&unstructured.Unstructured{Object: o}).Object
}

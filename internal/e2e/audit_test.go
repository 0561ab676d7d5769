//go:build e2e

package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// auditLog is the API server's audit log from the beginning of the test on.
type auditLog struct {
	path   string
	offset int64
	// granted are the rules that the ServiceAccounts of the release had at any time.
	granted map[grant]bool
}

// grant is one verb of one rule of a ServiceAccount.
type grant struct{ account, group, resource, verb, names string }

func (g grant) String() string {
	text := fmt.Sprintf("%s: %s %s", g.account, g.verb, g.resource)
	if g.group != "" {
		text += "." + g.group
	}
	if g.names != "" {
		text += " (" + g.names + ")"
	}
	return text
}

// request is a line of the log.
type request struct {
	Verb       string `json:"verb"`
	RequestURI string `json:"requestURI"`
	User       struct {
		Username string `json:"username"`
	} `json:"user"`
	ObjectRef struct {
		APIGroup    string `json:"apiGroup"`
		Resource    string `json:"resource"`
		Subresource string `json:"subresource"`
		Name        string `json:"name"`
	} `json:"objectRef"`
	Annotations map[string]string `json:"annotations"`
}

// openAudit remembers where the log ends now; nil where none is given.
func openAudit(t *testing.T) *auditLog {
	t.Helper()
	path := os.Getenv(auditVariable)
	if path == "" {
		return nil
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatalf("%s: %v", auditVariable, err)
	}
	return &auditLog{path: path, offset: info.Size(), granted: map[grant]bool{}}
}

// remember adds the rules that a revision of the release gives to its ServiceAccounts. They are
// read from Helm, because those of a hook are deleted when it has run.
func (e *environment) remember(t *testing.T) {
	t.Helper()
	if e.audit == nil {
		return
	}
	var manifests []string
	for _, what := range []string{"manifest", "hooks"} {
		manifests = append(manifests, e.run(t, nil, "helm", "get", what, e.release.name, "-n", systemNamespace))
	}
	roles := map[string][]rbacv1.PolicyRule{}
	var bindings []rbacv1.RoleBinding
	decoder := yaml.NewYAMLOrJSONDecoder(strings.NewReader(strings.Join(manifests, "\n---\n")), 4096)
	for {
		// A role and a binding of the cluster have the same fields as those of a namespace.
		var o struct {
			metav1.TypeMeta   `json:",inline"`
			metav1.ObjectMeta `json:"metadata"`
			Rules             []rbacv1.PolicyRule `json:"rules"`
			RoleRef           rbacv1.RoleRef      `json:"roleRef"`
			Subjects          []rbacv1.Subject    `json:"subjects"`
		}
		var raw runtime.RawExtension
		err := decoder.Decode(&raw)
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		var kind metav1.TypeMeta
		if json.Unmarshal(raw.Raw, &kind) != nil || !strings.HasPrefix(kind.APIVersion, rbacv1.GroupName+"/") {
			continue
		}
		must(t, json.Unmarshal(raw.Raw, &o))
		switch o.Kind {
		case "Role", "ClusterRole":
			roles[o.Kind+"/"+o.Name] = o.Rules
		default:
			bindings = append(bindings, rbacv1.RoleBinding{RoleRef: o.RoleRef, Subjects: o.Subjects})
		}
	}
	for _, b := range bindings {
		for _, s := range b.Subjects {
			e.audit.add(s.Name, roles[b.RoleRef.Kind+"/"+b.RoleRef.Name])
		}
	}
}

func (a *auditLog) add(account string, rules []rbacv1.PolicyRule) {
	for _, r := range rules {
		for _, group := range r.APIGroups {
			for _, resource := range r.Resources {
				for _, verb := range r.Verbs {
					a.granted[grant{account, group, resource, verb, strings.Join(r.ResourceNames, ",")}] = true
				}
			}
		}
	}
}

// read returns what the release's ServiceAccounts were denied, and which of their rules they
// have not used.
func (a *auditLog) read() (denied, unused []string, err error) {
	file, err := os.Open(a.path)
	if err != nil {
		return nil, nil, fmt.Errorf("opening the audit log: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("reading the audit log: %w", err)
	}
	if info.Size() < a.offset {
		return nil, nil, errors.New("the audit log was replaced during the test")
	}
	if _, err := file.Seek(a.offset, io.SeekStart); err != nil {
		return nil, nil, fmt.Errorf("reading the audit log: %w", err)
	}
	left, refused := maps.Clone(a.granted), map[string]int{}
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			continue // the line that is being written
		}
		account, ours := strings.CutPrefix(r.User.Username, "system:serviceaccount:"+systemNamespace+":")
		if !ours {
			continue
		}
		switch r.Annotations["authorization.k8s.io/decision"] {
		case "forbid":
			path, _, _ := strings.Cut(r.RequestURI, "?")
			refused[fmt.Sprintf("%s: %s %s", account, r.Verb, path)]++
		case "allow":
			r.use(account, left)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, nil, fmt.Errorf("reading the audit log: %w", err)
	}
	for what, n := range refused {
		denied = append(denied, fmt.Sprintf("%s (%d times)", what, n))
	}
	for g := range left {
		unused = append(unused, g.String())
	}
	slices.Sort(denied)
	slices.Sort(unused)
	return denied, unused, nil
}

// use removes the rules that allow a request.
func (r request) use(account string, left map[grant]bool) {
	resource := r.ObjectRef.Resource
	if r.ObjectRef.Subresource != "" {
		resource += "/" + r.ObjectRef.Subresource
	}
	for g := range left {
		named := g.names == "" || slices.Contains(strings.Split(g.names, ","), r.ObjectRef.Name)
		if g.account == account && g.group == r.ObjectRef.APIGroup && g.resource == resource && g.verb == r.Verb && named {
			delete(left, g)
		}
	}
}

// seldom are rights that the program needs, but not within the time or the cluster of this
// test, each with the reason.
var seldom = []struct{ right, reason string }{
	{"manager: delete leases.coordination.k8s.io", "the Leases of dead workers are removed after an hour"},
	{"manager: list namespaces", "an API server that does not stream its lists is asked for them"},
	{"manager: patch events", "an Event of the leader election that is repeated is counted in the first one"},
	{"manager: patch events.events.k8s.io", "an Event that is repeated within minutes is counted in the first one"},
	{"worker: patch events.events.k8s.io", "likewise"},
}

// testLeastPrivilege: in the whole run no request of the release was denied, and no right was
// granted that was not used, but for the seldom ones. The figure counts these too.
func testLeastPrivilege(t *testing.T, e *environment) {
	if e.audit == nil {
		t.Fatalf("%s is not set: this part needs the API server's audit log", auditVariable)
	}
	denied, unused, err := e.audit.read()
	must(t, err)
	e.results.Denied, e.results.UnusedRules = len(denied), len(unused) // also those that are excepted below
	unused = slices.DeleteFunc(unused, func(right string) bool {
		for _, s := range seldom {
			if right == e.release.fullname+"-"+s.right {
				t.Logf("not used in this run: %s: %s", right, s.reason)
				return true
			}
		}
		return false
	})
	if len(denied) > 0 {
		t.Errorf("denied:\n%s", strings.Join(denied, "\n"))
	}
	if len(unused) > 0 {
		t.Errorf("granted, but not used:\n%s", strings.Join(unused, "\n"))
	}
}

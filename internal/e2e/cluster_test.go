//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

const (
	// longTimeout bounds a wait for what Kubernetes does with pods and nodes; it is reached
	// only when something is wrong.
	longTimeout = 5 * time.Minute
	// unreachable is the taint of a node whose kubelet does not report.
	unreachable = "node.kubernetes.io/unreachable"
)

// environment is the cluster and what the test has put into it.
type environment struct {
	root   string     // the repository
	dir    string     // for archives and charts
	test   *testing.T // the whole test, whose end removes what a part has prepared for the next
	config *rest.Config
	client client.Client
	kube   kubernetes.Interface

	// stable is the node of the stand-ins, which is never disturbed. other is another node;
	// empty where the cluster has one.
	stable, other string

	standins *standins
	history  *history
	release  release
	sessions []*session
	results  results
	audit    *auditLog
	seed     uint64
}

// start connects to the cluster, and removes what an earlier run has left.
func start(t *testing.T) *environment {
	t.Helper()
	if os.Getenv("KUBECONFIG") == "" {
		t.Fatal("KUBECONFIG is not set: the test needs a cluster on which the operator is not installed, for example one that `kind create cluster` makes")
	}
	if os.Getenv(loadVariable) == "" {
		t.Fatalf("%s is not set: give a command that loads an image archive into every node, for example %s='kind load image-archive'", loadVariable, loadVariable)
	}
	for _, program := range []string{"helm", "kubectl", "go"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%s is not in the PATH: install it", program)
		}
	}
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	must(t, err)
	config.QPS = -1 // the test is not limited, the operator is tested
	scheme := runtime.NewScheme()
	must(t, clientgoscheme.AddToScheme(scheme))
	must(t, v1alpha1.AddToScheme(scheme))
	e := &environment{config: config}
	e.root, err = filepath.Abs("../..")
	must(t, err)
	e.dir = filepath.Join(e.root, "dist", "e2e")
	must(t, os.MkdirAll(e.dir, 0o755))
	e.client, err = client.New(config, client.Options{Scheme: scheme})
	must(t, err)
	e.kube, err = kubernetes.NewForConfig(config)
	must(t, err)
	version, err := e.kube.Discovery().ServerVersion()
	if err != nil {
		t.Fatalf("The cluster of KUBECONFIG does not answer: %v", err)
	}
	e.findNodes(t)
	e.audit = openAudit(t)
	e.release = newRelease()
	t.Logf("Kubernetes %s; the stand-ins run on %s, the other node is %q", version.GitVersion, e.stable, e.other)
	e.removeAll(t)
	t.Cleanup(func() {
		if *keep {
			t.Logf("-keep: namespaces %v are left", namespaces)
			return
		}
		e.removeAll(t)
	})
	return e
}

// findNodes chooses the nodes from those that take pods.
func (e *environment) findNodes(t *testing.T) {
	t.Helper()
	nodes, err := e.kube.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	must(t, err)
	var usable []string
	for i := range nodes.Items {
		n := &nodes.Items[i]
		tainted := slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Effect != corev1.TaintEffectPreferNoSchedule })
		if !n.Spec.Unschedulable && !tainted && nodeReady(n) {
			usable = append(usable, n.Name)
		}
	}
	slices.Sort(usable)
	if len(usable) == 0 {
		t.Fatal("no node of the cluster is Ready and takes pods")
	}
	e.stable = usable[0]
	if len(usable) > 1 {
		e.other = usable[len(usable)-1]
	}
}

func nodeReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// needOther fails where the cluster has one node.
func (e *environment) needOther(t *testing.T) string {
	t.Helper()
	if e.other == "" {
		t.Fatal("this part needs a second node that takes pods")
	}
	return e.other
}

// node stops or starts a part of a node: its kubelet, or all of it.
func (e *environment) node(t *testing.T, action, part, node string) {
	t.Helper()
	command := os.Getenv(nodeVariable)
	if command == "" {
		t.Fatalf("%s is not set: this part needs a shell command that stops and starts a node; CONTRIBUTING.md has examples", nodeVariable)
	}
	t.Logf("%s %s of %s", action, part, node)
	e.run(t, []string{"ACTION=" + action, "PART=" + part, "NODE=" + node}, "sh", "-c", command)
}

// waitForNode waits until a node is Ready, or until it is not.
func (e *environment) waitForNode(t *testing.T, name string, ready bool) {
	t.Helper()
	e.eventually(t, fmt.Sprintf("node %s to have Ready=%t", name, ready), func(ctx context.Context) error {
		n, err := e.kube.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		tainted := slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == unreachable })
		if nodeReady(n) != ready || tainted == ready {
			return fmt.Errorf("Ready is %t, tainted as unreachable is %t", nodeReady(n), tainted)
		}
		return nil
	})
}

// cordon makes a node take no pods, or take them again.
func (e *environment) cordon(t *testing.T, name string, unschedulable bool) {
	t.Helper()
	patch := jsonMergePatch(`{"spec":{"unschedulable":%t}}`, unschedulable)
	must(t, e.client.Patch(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, patch))
}

// run runs a command and returns what it has printed. A failure ends the test.
func (e *environment) run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	output, err := e.try(t.Context(), env, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return output
}

// try runs a command and returns what it has printed on its standard output.
func (e *environment) try(ctx context.Context, env []string, name string, args ...string) (string, error) {
	stdout, _, err := e.command(ctx, env, name, args...)
	return stdout, err
}

// tryAll runs a command, also after the test, and returns all that it has printed.
func (e *environment) tryAll(t *testing.T, name string, args ...string) (string, error) {
	_, all, err := e.command(context.WithoutCancel(t.Context()), nil, name, args...)
	return all, err
}

func (e *environment) command(ctx context.Context, env []string, name string, args ...string) (stdout, all string, err error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = e.root, append(os.Environ(), env...)
	var out bytes.Buffer
	var both lockedBuffer // the two outputs are copied by two goroutines
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, &both), &both
	if err := cmd.Run(); err != nil {
		return out.String(), both.String(), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, tail(both.String(), 4_000))
	}
	return out.String(), both.String(), nil
}

// lockedBuffer is a buffer that several goroutines may write to.
type lockedBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

func tail(s string, most int) string { return s[max(0, len(s)-most):] }

// eventually waits until f succeeds; it ends the test when that takes too long.
func (e *environment) eventually(t *testing.T, what string, f func(context.Context) error) {
	t.Helper()
	if err := testenv.Await(t.Context(), longTimeout, f); err != nil {
		t.Fatalf("Waiting for %s: %v", what, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// namespaces are the namespaces that the test creates and deletes.
var namespaces = []string{systemNamespace, standinNamespace, sessionNamespace, churnNamespace, timingNamespace, tightNamespace}

// createNamespace creates a namespace that accepts pods of the standard "restricted" only.
func (e *environment) createNamespace(t *testing.T, name string, labels map[string]string) {
	t.Helper()
	all := map[string]string{"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
	for key, value := range labels {
		all[key] = value
	}
	err := e.client.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: all}})
	if !apierrors.IsAlreadyExists(err) {
		must(t, err)
	}
}

// removeAll removes what this test, or an earlier run of it, has put into the cluster, except
// the resource definition and the roles for people if another release owns them.
func (e *environment) removeAll(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), longTimeout)
	defer cancel()
	if _, err := e.try(ctx, nil, "helm", "status", e.release.name, "-n", systemNamespace); err == nil {
		if _, err := e.try(ctx, nil, "helm", "uninstall", e.release.name, "-n", systemNamespace, "--wait", "--timeout=3m"); err != nil {
			t.Errorf("Removing the release: %v", err)
		}
	}
	if err := e.dropFinalizers(ctx); err != nil {
		t.Errorf("Removing the sessions: %v", err)
	}
	for _, name := range namespaces {
		err := client.IgnoreNotFound(e.client.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}))
		if err != nil {
			t.Errorf("Deleting namespace %s: %v", name, err)
		}
	}
	for _, o := range []client.Object{
		&rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: standinNamespace}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: standinNamespace}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: standinNamespace + "-prometheus"}},
	} {
		if err := client.IgnoreNotFound(e.client.Delete(ctx, o)); err != nil {
			t.Errorf("Deleting %s: %v", o.GetName(), err)
		}
	}
	err := testenv.Await(ctx, longTimeout, func(ctx context.Context) error {
		for _, name := range namespaces {
			if _, err := e.kube.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
				return errors.Join(fmt.Errorf("%s is still there", name), err)
			}
		}
		return nil
	})
	if err != nil {
		t.Errorf("Waiting until the namespaces are gone: %v", err)
	}
	if err := e.removeDefinition(ctx); err != nil {
		t.Errorf("Removing the resource definition: %v", err)
	}
}

// removeDefinition removes the resource definition that this release has installed, unless
// there are sessions of somebody else.
func (e *environment) removeDefinition(ctx context.Context) error {
	crd := crdObject()
	if err := e.client.Get(ctx, client.ObjectKeyFromObject(crd), crd); err != nil {
		return client.IgnoreNotFound(err)
	}
	var sessions v1alpha1.WhatsAppSessionList
	if err := e.client.List(ctx, &sessions); err != nil {
		return err
	}
	if crd.GetAnnotations()["meta.helm.sh/release-name"] != e.release.name || len(sessions.Items) > 0 {
		return nil
	}
	return client.IgnoreNotFound(e.client.Delete(ctx, crd))
}

// dropFinalizers lets the sessions of this test be deleted without an operator: their devices
// are the simulator's.
func (e *environment) dropFinalizers(ctx context.Context) error {
	for _, namespace := range namespaces {
		var list v1alpha1.WhatsAppSessionList
		if err := e.client.List(ctx, &list, client.InNamespace(namespace)); err != nil {
			if apierrors.IsNotFound(err) || isNoMatch(err) {
				return nil // the resource does not exist
			}
			return err
		}
		for i := range list.Items {
			s := &list.Items[i]
			patch := jsonMergePatch(`{"metadata":{"finalizers":null}}`)
			if err := client.IgnoreNotFound(e.client.Patch(ctx, s, patch)); err != nil {
				return err
			}
		}
	}
	return nil
}

// jsonMergePatch is a merge patch.
func jsonMergePatch(format string, args ...any) client.Patch {
	return client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, format, args...))
}

package app

import (
	"strings"
	"testing"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// TestStop: the workers are stopped first, the managers when no worker is left, with the
// rights of the chart's Job and no other.
func TestStop(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	admin, err := client.New(apiServer.Config, client.Options{Scheme: scheme.Scheme})
	g.Expect(err).NotTo(HaveOccurred())
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "stop-"}}
	g.Expect(admin.Create(ctx, namespace)).To(Succeed())
	container := corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "c"}}}
	for _, name := range []string{"worker", "manager"} {
		labels := map[string]string{"component": name}
		g.Expect(admin.Create(ctx, &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace.Name, Name: name},
			Spec: appsv1.DeploymentSpec{
				Replicas: ptr.To[int32](2), Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: container},
			},
		})).To(Succeed())
		g.Expect(admin.Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace.Name, Name: name, Labels: labels}, Spec: container})).To(Succeed())
	}
	evicted := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace.Name, Name: "evicted", Labels: map[string]string{"component": "worker"}}, Spec: container}
	g.Expect(admin.Create(ctx, evicted)).To(Succeed())
	evicted.Status.Phase = corev1.PodFailed
	g.Expect(admin.Status().Update(ctx, evicted)).To(Succeed())

	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: namespace.Name, Name: "stop"}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{"apps"}, Resources: []string{"deployments"}, ResourceNames: []string{"worker", "manager", "removed"}, Verbs: []string{"get"}},
		{APIGroups: []string{"apps"}, Resources: []string{"deployments/scale"}, ResourceNames: []string{"worker", "manager", "removed"}, Verbs: []string{"patch"}},
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}},
	}}
	limited := serviceAccount(t, admin, role)
	run := func(args ...string) error {
		config, f := &stopConfig{}, pflag.NewFlagSet("stop", pflag.ContinueOnError)
		config.bind(f)
		g.Expect(f.Parse(append([]string{"--kubeconfig=", "--namespace=" + namespace.Name}, args...))).To(Succeed())
		g.Expect(config.complete()).To(Succeed())
		return stop(ctx, limited, config, logr.Discard())
	}
	deployment := func(name string) *appsv1.Deployment {
		d := &appsv1.Deployment{}
		g.Expect(admin.Get(ctx, client.ObjectKey{Namespace: namespace.Name, Name: name}, d)).To(Succeed())
		return d
	}
	replicas := func(name string) func() int32 {
		return func() int32 { return *deployment(name).Spec.Replicas }
	}
	end := func(name string) {
		g.Expect(admin.Delete(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace.Name, Name: name}}, client.GracePeriodSeconds(0))).To(Succeed())
	}

	// A worker that does not end stops the managers from being stopped, and is named.
	g.Expect(run("--workers=worker", "--managers=manager", "--timeout=10s")).To(MatchError(And(
		ContainSubstring("have not ended in time: worker. "), ContainSubstring("--no-hooks"),
	)))
	g.Expect(replicas("worker")()).To(BeZero())
	g.Expect(replicas("manager")()).To(BeEquivalentTo(2))

	// An autoscaler raises the number meanwhile; a Deployment that is gone is no error.
	up := deployment("worker")
	up.Spec.Replicas = ptr.To[int32](1)
	g.Expect(admin.Update(ctx, up)).To(Succeed())
	var running errgroup.Group
	running.Go(func() error { return run("--workers=worker,removed", "--managers=manager", "--timeout=5m") })
	g.Eventually(replicas("worker")).Should(BeZero())
	g.Expect(replicas("manager")()).To(BeEquivalentTo(2))
	end("worker")
	g.Eventually(replicas("manager")).Should(BeZero())
	end("manager")
	g.Expect(running.Wait()).To(Succeed())

	g.Expect(run("--workers=other")).To(MatchError(And(ContainSubstring("forbidden"), ContainSubstring("--no-hooks"))))
}

var wrongForStop = []wrongValue{
	{flag: "kubeconfig", value: "/does/not/exist"},
	{flag: "namespace", value: "Not_A_Namespace"},
	{flag: "verbosity", value: "11"},
	{flag: "workers", value: "A_Name"},
	{flag: "managers", value: "A_Name"},
	{flag: "timeout", value: "0s"},
}

func TestStopFlagsAreChecked(t *testing.T) {
	g := NewWithT(t)
	complete := func(args ...string) error {
		config, f := &stopConfig{}, pflag.NewFlagSet("stop", pflag.ContinueOnError)
		config.bind(f)
		g.Expect(f.Parse(append([]string{"--kubeconfig=", "--namespace=ops"}, args...))).To(Succeed())
		f.VisitAll(func(flag *pflag.Flag) {
			tried := strings.Contains(flag.Name, "kubeconfig")
			for _, wrong := range wrongForStop {
				tried = tried || wrong.flag == flag.Name
			}
			g.Expect(tried).To(BeTrue(), "--%s is in no table of wrong values", flag.Name)
		})
		return config.complete()
	}
	g.Expect(complete("--workers=a")).To(Succeed())
	g.Expect(complete()).To(MatchError(ContainSubstring("nothing is to be stopped")))
	for _, wrong := range wrongForStop {
		g.Expect(complete("--workers=a", "--"+wrong.flag+"="+wrong.value)).To(MatchError(ContainSubstring("--"+wrong.flag)), wrong.flag)
	}
}

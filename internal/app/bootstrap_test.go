package app

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
)

// TestBootstrapCommand runs the command as the chart's Job does: with its arguments, and with
// its Role and no other right.
func TestBootstrapCommand(t *testing.T) {
	g := NewWithT(t)
	ctx := t.Context()
	admin, err := client.New(apiServer.Config, client.Options{Scheme: scheme.Scheme})
	g.Expect(err).NotTo(HaveOccurred())
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "bootstrap-"}}
	g.Expect(admin.Create(ctx, namespace)).To(Succeed())

	role, job := &rbacv1.Role{}, &batchv1.Job{}
	manifests, err := os.ReadFile("../../config/default/objects.yaml")
	g.Expect(err).NotTo(HaveOccurred())
	for _, text := range bytes.Split(manifests, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		g.Expect(yaml.Unmarshal(text, &kind)).To(Succeed())
		switch kind.Kind {
		case "Role":
			g.Expect(yaml.UnmarshalStrict(text, role)).To(Succeed())
		case "Job":
			g.Expect(yaml.UnmarshalStrict(text, job)).To(Succeed())
		}
	}
	g.Expect(role.Rules).NotTo(BeEmpty())
	role.Namespace = namespace.Name
	limited := serviceAccount(t, admin, role)

	parsed := func(args ...string) *bootstrapConfig {
		t.Helper()
		config, f := &bootstrapConfig{}, pflag.NewFlagSet("bootstrap", pflag.ContinueOnError)
		config.bind(f)
		g.Expect(f.Parse(append(args, "--kubeconfig=", "--namespace="+namespace.Name, "--timeout=30s"))).To(Succeed())
		g.Expect(config.complete()).To(Succeed())
		return config
	}
	args := job.Spec.Template.Spec.Containers[0].Args
	g.Expect(args[0]).To(Equal("bootstrap"))
	run := func() error { return bootstrap(ctx, limited, parsed(args[1:]...), logr.Discard()) }
	secret := func(name string) *corev1.Secret {
		t.Helper()
		s := &corev1.Secret{}
		g.Expect(admin.Get(ctx, client.ObjectKey{Namespace: namespace.Name, Name: name}, s)).To(Succeed())
		return s
	}
	const valkey, postgresql = "whatsapp-operator-valkey", "whatsapp-operator-postgresql"

	// Two at once make one Secret.
	var both errgroup.Group
	both.Go(run)
	both.Go(run)
	g.Expect(both.Wait()).To(Succeed())
	first := secret(valkey)
	g.Expect(first.Data).To(And(HaveLen(3), HaveKey("manager"), HaveKey("worker"), HaveKey("laravel")))
	g.Expect(first.Data["manager"]).NotTo(Equal(first.Data["worker"]))
	g.Expect(len(first.Data["manager"])).To(BeNumerically(">=", 50))
	g.Expect(first.Labels).To(HaveKeyWithValue("app.kubernetes.io/instance", "whatsapp-operator"))
	g.Expect(secret(postgresql).Data).To(HaveKey("password"))

	// Nothing is missing: nothing is written.
	g.Expect(run()).To(Succeed())
	g.Expect(secret(valkey).ResourceVersion).To(Equal(first.ResourceVersion))

	// What a person has set stays; what is missing or empty gets a value.
	changed := first.DeepCopy()
	changed.Data["manager"] = []byte("chosen by a person")
	changed.Data["worker"] = nil
	delete(changed.Data, "laravel")
	g.Expect(admin.Update(ctx, changed)).To(Succeed())
	g.Expect(run()).To(Succeed())
	completed := secret(valkey)
	g.Expect(completed.Data).To(HaveKeyWithValue("manager", []byte("chosen by a person")))
	g.Expect(completed.Data["worker"]).NotTo(BeEmpty())
	g.Expect(completed.Data["laravel"]).NotTo(BeEmpty())

	// What cannot be repaired is said at once.
	g.Expect(admin.Delete(ctx, secret(postgresql))).To(Succeed())
	g.Expect(admin.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace.Name, Name: postgresql}, Immutable: ptr.To(true),
	})).To(Succeed())
	g.Expect(run()).To(MatchError(And(ContainSubstring(postgresql), ContainSubstring("immutable"), ContainSubstring("delete it"))))
	g.Expect(bootstrap(ctx, limited, parsed("--password=other/key"), logr.Discard())).To(MatchError(ContainSubstring("forbidden")))

	// The stand-in for Laravel has a signing secret.
	g.Expect(bootstrap(ctx, admin, parsed("--password=laravel/token", "--signing-secret=laravel/signing-secret"), logr.Discard())).To(Succeed())
	_, err = laravel.ParseSecret(string(secret("laravel").Data["signing-secret"]))
	g.Expect(err).NotTo(HaveOccurred())
}

// TestBootstrapGivesUp: a cancelled command ends, and the last error is reported.
func TestBootstrapGivesUp(t *testing.T) {
	g := NewWithT(t)
	unreachable, err := client.New(&rest.Config{Host: "http://127.0.0.1:1"}, client.Options{Scheme: scheme.Scheme})
	g.Expect(err).NotTo(HaveOccurred())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g.Expect(bootstrap(ctx, unreachable, &bootstrapConfig{passwords: []string{"a/b"}, timeout: 1}, logr.Discard())).To(MatchError(ContainSubstring("making the Secret a complete")))
}

var wrongForBootstrap = []wrongValue{
	{flag: "kubeconfig", value: "/does/not/exist"},
	{flag: "namespace", value: "Not_A_Namespace"},
	{flag: "verbosity", value: "11"},
	{flag: "password", value: "name", want: "SECRET/KEY"},
	{flag: "password", value: "Name/key", want: "SECRET/KEY"},
	{flag: "signing-secret", value: "name/a key", want: "SECRET/KEY"},
	{flag: "label", value: "a=b c", want: "--label"},
	{flag: "timeout", value: "0s"},
}

func TestBootstrapFlagsAreChecked(t *testing.T) {
	g := NewWithT(t)
	complete := func(args ...string) error {
		config, f := &bootstrapConfig{}, pflag.NewFlagSet("bootstrap", pflag.ContinueOnError)
		config.bind(f)
		g.Expect(f.Parse(append([]string{"--kubeconfig=", "--namespace=ops"}, args...))).To(Succeed())
		f.VisitAll(func(flag *pflag.Flag) {
			tried := strings.Contains(flag.Name, "kubeconfig")
			for _, wrong := range wrongForBootstrap {
				tried = tried || wrong.flag == flag.Name
			}
			g.Expect(tried).To(BeTrue(), "--%s is in no table of wrong values", flag.Name)
		})
		return config.complete()
	}
	g.Expect(complete("--password=a/b")).To(Succeed())
	g.Expect(complete()).To(MatchError(ContainSubstring("nothing is to be created")))
	for _, wrong := range wrongForBootstrap {
		want := wrong.want
		if want == "" {
			want = "--" + wrong.flag
		}
		g.Expect(complete("--password=a/b", "--"+wrong.flag+"="+wrong.value)).To(MatchError(ContainSubstring(want)), wrong.flag)
	}
}

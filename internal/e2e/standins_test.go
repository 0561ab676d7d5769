//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	standinNamespace = "e2e-standins"
	laravelSecret    = "e2e-laravel"
	// phones scan every code; without them a session shows its codes.
	phones = "phones"
)

// standins are the simulated WhatsApp, the phones and the stand-in for Laravel. They run in a
// namespace of their own on the node that is never disturbed: they outlive the release, and
// what they have counted is in their memory.
type standins struct {
	*environment
	http      *http.Client
	control   simulator.Control
	noiseRoot string
}

func (s *standins) endpoint() string   { return "ws://whatsapp." + standinNamespace + ".svc:7070" }
func (s *standins) laravelURL() string { return "http://laravel." + standinNamespace + ".svc:8000" }

// through is the URL of a port of a Service, reached through the API server: nothing has to be
// forwarded, and no address of the cluster has to be reachable from here.
func (s *standins) through(service, port string) string {
	return s.config.Host + "/api/v1/namespaces/" + standinNamespace + "/services/" + service + ":" + port + "/proxy"
}

// startStandins starts the stand-ins and waits until they answer.
func (e *environment) startStandins(t *testing.T) {
	t.Helper()
	transport, err := rest.HTTPClientFor(e.config)
	must(t, err)
	transport.Timeout = time.Minute
	s := &standins{environment: e, http: transport}
	s.control = simulator.Control{URL: s.through("whatsapp", "control"), HTTP: transport}
	e.standins = s

	e.createNamespace(t, standinNamespace, nil)
	for _, object := range s.objects() {
		must(t, e.client.Create(t.Context(), object))
	}
	e.createLaravelSecret(t, standinNamespace)
	e.run(t, nil, "kubectl", "-n", standinNamespace, "rollout", "status", "deploy/whatsapp", "--timeout=1m")
	e.run(t, nil, "kubectl", "-n", standinNamespace, "rollout", "status", "deploy/laravel", "--timeout=1m")
	e.eventually(t, "the simulator", func(ctx context.Context) error {
		info, err := s.control.Info(ctx)
		s.noiseRoot = info.NoiseRoot
		return err
	})
	e.eventually(t, "the stand-in for Laravel", func(ctx context.Context) error { _, err := s.received(ctx); return err })
}

func (e *environment) createLaravelSecret(t *testing.T, namespace string) {
	t.Helper()
	err := e.client.Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: laravelSecret},
		StringData: map[string]string{"token": laraveltest.Token, "signing-secret": laraveltest.Secret},
	})
	if !apierrors.IsAlreadyExists(err) {
		must(t, err)
	}
}

func (s *standins) objects() []client.Object {
	account := &corev1.ServiceAccount{ObjectMeta: s.meta(phones)}
	role := &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: standinNamespace},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"whatsapp-operator.io"}, Resources: []string{"whatsappsessions"}, Verbs: []string{"list", "watch"}}},
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: standinNamespace},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: standinNamespace},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: standinNamespace, Name: phones}},
	}
	scan := s.deployment(phones, []string{"demo-phones", "--simulator-control=http://whatsapp." + standinNamespace + ".svc:7071", "--scan-after=0s"})
	scan.Spec.Template.Spec.ServiceAccountName = phones
	scan.Spec.Template.Spec.AutomountServiceAccountToken = nil
	scan.Spec.Replicas = new(int32) // until somebody shall scan
	laravel := s.deployment("laravel", []string{
		"demo-laravel", "--listen=:8000",
		"--laravel-token-file=/etc/laravel/token", "--laravel-signing-secret-file=/etc/laravel/signing-secret",
	}, 8000)
	pod := &laravel.Spec.Template.Spec
	secret := corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: laravelSecret}}
	pod.Volumes = append(pod.Volumes, corev1.Volume{Name: "laravel", VolumeSource: secret})
	container := &pod.Containers[0]
	container.VolumeMounts = append(container.VolumeMounts, corev1.VolumeMount{Name: "laravel", MountPath: "/etc/laravel", ReadOnly: true})
	return []client.Object{
		account, role, binding, scan, laravel,
		s.deployment("whatsapp", []string{
			"simulator", "--listen=:7070", "--control-listen=:7071", "--host=whatsapp." + standinNamespace + ".svc", "--seed=e2e",
		}, 7070, 7071),
		s.service("whatsapp", map[string]int32{"whatsapp": 7070, "control": 7071}),
		s.service("laravel", map[string]int32{"http": 8000}),
	}
}

func (*standins) meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: standinNamespace, Name: name, Labels: map[string]string{"app": name}}
}

func (s *standins) deployment(name string, args []string, ports ...int32) *appsv1.Deployment {
	yes, no, replicas := true, false, int32(1)
	container := corev1.Container{
		Name: name, Image: demoRepository + ":" + versions[0], ImagePullPolicy: corev1.PullIfNotPresent, Args: args,
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		VolumeMounts:             []corev1.VolumeMount{{Name: "tmp", MountPath: "/tmp"}}, // the demo's commands write to it
	}
	for _, port := range ports {
		container.Ports = append(container.Ports, corev1.ContainerPort{ContainerPort: port})
	}
	if len(ports) > 0 {
		container.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(ports[0])}}, PeriodSeconds: 1}
	}
	return &appsv1.Deployment{
		ObjectMeta: s.meta(name),
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Strategy: appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType},
			Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": name}},
				Spec: corev1.PodSpec{
					NodeSelector:                 map[string]string{corev1.LabelHostname: s.stable},
					AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
					SecurityContext: &corev1.PodSecurityContext{
						RunAsNonRoot: &yes, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
					},
					Containers: []corev1.Container{container},
					Volumes:    []corev1.Volume{{Name: "tmp", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
				},
			},
		},
	}
}

func (s *standins) service(name string, ports map[string]int32) *corev1.Service {
	service := &corev1.Service{ObjectMeta: s.meta(name), Spec: corev1.ServiceSpec{Selector: map[string]string{"app": name}}}
	for port, number := range ports {
		service.Spec.Ports = append(service.Spec.Ports, corev1.ServicePort{Name: port, Port: number})
	}
	return service
}

// scanCodes makes the phones scan codes, or stop, and waits until they do.
func (s *standins) scanCodes(t *testing.T, scan bool) {
	t.Helper()
	replicas := int32(0)
	if scan {
		replicas = 1
	}
	patch := jsonMergePatch(`{"spec":{"replicas":%d}}`, replicas)
	must(t, s.client.Patch(t.Context(), &appsv1.Deployment{ObjectMeta: s.meta(phones)}, patch))
	s.eventually(t, fmt.Sprintf("phones to scan: %t", scan), func(ctx context.Context) error {
		var pods corev1.PodList
		if err := s.client.List(ctx, &pods, client.InNamespace(standinNamespace), client.MatchingLabels{"app": phones}); err != nil {
			return err
		}
		if len(pods.Items) != int(replicas) || scan && !podReady(&pods.Items[0]) {
			return fmt.Errorf("there are %d pods of phones", len(pods.Items))
		}
		return nil
	})
}

// received is what the stand-in for Laravel has got.
type received struct {
	Requests    int                            `json:"requests"`
	Status      map[string]delivery.StatusItem `json:"status"`
	NotAccepted []string                       `json:"not_accepted"`
	Breaches    []string                       `json:"breaches"`
}

func (s *standins) received(ctx context.Context) (received, error) {
	var r received
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.through("laravel", "http")+"/state", http.NoBody)
	if err != nil {
		return r, fmt.Errorf("making the request: %w", err)
	}
	response, err := s.http.Do(request)
	if err != nil {
		return r, fmt.Errorf("asking the stand-in for Laravel: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return r, fmt.Errorf("the stand-in for Laravel answers %s", response.Status)
	}
	if err := json.NewDecoder(response.Body).Decode(&r); err != nil {
		return r, fmt.Errorf("reading what Laravel has: %w", err)
	}
	return r, nil
}

//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var forwarded = regexp.MustCompile(`^Forwarding from (127\.0\.0\.1:\d+) ->`)

// forward forwards a port of this machine to a pod of the release until the test ends, and
// returns its address.
func (e *environment) forward(t *testing.T, object string, port int) string {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "kubectl", "-n", systemNamespace, "port-forward", "--address=127.0.0.1", object, fmt.Sprintf(":%d", port))
	output, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		stop()
		_ = cmd.Wait() // it was killed
	})
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		if found := forwarded.FindStringSubmatch(lines.Text()); found != nil {
			go func() { _, _ = io.Copy(io.Discard, output) }() // ends with the process
			return found[1]
		}
	}
	t.Fatalf("kubectl port-forward %s has ended", object)
	return ""
}

// serviceAccountToken returns the token of a ServiceAccount that may read the metrics, or not.
func (e *environment) serviceAccountToken(t *testing.T, name string, mayRead bool) string {
	t.Helper()
	create := func(err error) {
		if !apierrors.IsAlreadyExists(err) {
			must(t, err)
		}
	}
	create(e.client.Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: standinNamespace, Name: name}}))
	if mayRead {
		create(e.client.Create(t.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: standinNamespace + "-" + name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "whatsapp-operator-metrics-reader"},
			Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: standinNamespace, Name: name}},
		}))
	}
	token, err := e.kube.CoreV1().ServiceAccounts(standinNamespace).CreateToken(t.Context(), name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	must(t, err)
	return token.Status.Token
}

// get reads a URL whose certificate nobody knows.
func get(ctx context.Context, url, token string) (status int, body string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return 0, "", fmt.Errorf("making the request: %w", err)
	}
	request.Header.Set("Authorization", "Bearer "+token)
	insecure := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // the managers make it themselves
	defer insecure.CloseIdleConnections()
	response, err := (&http.Client{Transport: insecure}).Do(request)
	if err != nil {
		return 0, "", fmt.Errorf("reading the metrics: %w", err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return 0, "", fmt.Errorf("reading the metrics: %w", err)
	}
	return response.StatusCode, string(content), nil
}

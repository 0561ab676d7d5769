package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"k8s.io/client-go/rest"

	"github.com/whatsapp-operator/whatsapp-operator/internal/apiserver"
)

// StartAPIServer starts a Kubernetes API server that knows the project's CRDs,
// for the TestMain of a package: one server serves all its tests, and each test
// uses its own namespaces. The configuration sets no limit on the rate of
// requests. stop must be called before the process ends.
func StartAPIServer() (config *rest.Config, stop func() error, err error) {
	server, err := NewAPIServer()
	if err != nil {
		return nil, nil, err
	}
	return server.Config, server.Close, nil
}

// NewAPIServer is StartAPIServer for a test that kills and restarts its server.
//
// The programs come from $KUBEBUILDER_ASSETS. If it is not set, hack/envtest-assets finds
// them, and may have to build them first.
func NewAPIServer() (*apiserver.Server, error) {
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		root, err := moduleRoot()
		if err != nil {
			return nil, err
		}
		script := exec.Command(filepath.Join(root, "hack", "envtest-assets"))
		script.Stderr = os.Stderr
		out, err := script.Output()
		if err != nil {
			return nil, fmt.Errorf("finding an API server (hack/envtest-assets): %w", err)
		}
		assets = strings.TrimSpace(string(out))
	}
	return apiserver.Start(assets)
}

// moduleRoot is the folder of go.mod; a test runs in the folder of its package.
func moduleRoot() (string, error) {
	folder, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the module: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(folder, "go.mod")); err == nil {
			return folder, nil
		}
		parent := filepath.Dir(folder)
		if parent == folder {
			return "", errors.New("no folder above has a go.mod")
		}
		folder = parent
	}
}

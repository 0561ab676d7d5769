package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// StartAPIServer starts a Kubernetes API server that knows the project's CRDs,
// for the TestMain of a package: one server serves all its tests, each in
// namespaces of its own. The configuration sets no limit on the rate of
// requests. stop must be called before the process ends.
//
// The binaries are those of $KUBEBUILDER_ASSETS; where it is not set,
// hack/envtest-assets is asked, which may build them first.
func StartAPIServer() (config *rest.Config, stop func() error, err error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, nil, err
	}
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		script := exec.Command(filepath.Join(root, "hack", "envtest-assets"))
		script.Stderr = os.Stderr
		out, err := script.Output()
		if err != nil {
			return nil, nil, fmt.Errorf("finding an API server (hack/envtest-assets): %w", err)
		}
		assets = strings.TrimSpace(string(out))
	}
	env := &envtest.Environment{
		BinaryAssetsDirectory: assets,
		CRDDirectoryPaths:     []string{filepath.Join(root, "config", "crd", "bases")},
		ErrorIfCRDPathMissing: true,
	}
	if config, err = env.Start(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("starting the API server of %s: %w", assets, err), env.Stop())
	}
	config.QPS = -1
	return config, env.Stop, nil
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

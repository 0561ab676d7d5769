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
	server, err := NewAPIServer()
	if err != nil {
		return nil, nil, err
	}
	return server.Config, server.Close, nil
}

// APIServer is StartAPIServer for a test that stops and restarts its server.
type APIServer struct {
	// Config reaches the server; it stays right over restarts.
	Config *rest.Config

	env *envtest.Environment
	dir string
}

// NewAPIServer starts a server. It must be closed.
func NewAPIServer() (*APIServer, error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		script := exec.Command(filepath.Join(root, "hack", "envtest-assets"))
		script.Stderr = os.Stderr
		out, err := script.Output()
		if err != nil {
			return nil, fmt.Errorf("finding an API server (hack/envtest-assets): %w", err)
		}
		assets = strings.TrimSpace(string(out))
	}
	dir, err := os.MkdirTemp("", "testenv-apiserver-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for the API server: %w", err)
	}
	s := &APIServer{dir: dir, env: &envtest.Environment{
		BinaryAssetsDirectory: assets,
		CRDDirectoryPaths:     []string{filepath.Join(root, "config", "crd", "bases")},
		ErrorIfCRDPathMissing: true,
	}}
	// A folder that envtest chooses is gone after a stop, and the certificates with it.
	s.env.ControlPlane.GetAPIServer().CertDir = dir
	if s.Config, err = s.env.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the API server of %s: %w", assets, err), s.Close())
	}
	s.Config.QPS = -1
	return s, nil
}

// Stop ends the API server and waits for its end; etcd, with all that the API
// server knew, goes on.
func (s *APIServer) Stop() error {
	if err := s.env.ControlPlane.GetAPIServer().Stop(); err != nil {
		return fmt.Errorf("stopping the API server: %w", err)
	}
	return nil
}

// Start starts the server again after a Stop, on the same port with the same
// certificates, and waits until it serves.
func (s *APIServer) Start() error {
	if err := s.env.ControlPlane.GetAPIServer().Start(); err != nil {
		return fmt.Errorf("starting the API server again: %w", err)
	}
	return nil
}

// Close ends the server and etcd for good.
func (s *APIServer) Close() error {
	return errors.Join(s.env.Stop(), os.RemoveAll(s.dir))
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

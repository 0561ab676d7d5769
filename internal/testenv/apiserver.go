package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

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

// apiServerEnd bounds the wait for a killed server.
const apiServerEnd = 30 * time.Second

// APIServer is StartAPIServer for a test that kills and restarts its server.
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

// Kill ends the API server as a crash does, and waits for its end; etcd, with
// all that the API server knew, goes on. An orderly end would wait a minute for
// clients that do not answer.
func (s *APIServer) Kill() error {
	pid, err := s.pid()
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("killing the API server: %w", err)
	}
	for end := time.Now().Add(apiServerEnd); syscall.Kill(pid, 0) == nil; <-time.After(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("the API server did not end within %s", apiServerEnd)
		}
	}
	return nil
}

// pid finds the process, which envtest does not show, by its folder.
func (s *APIServer) pid() (int, error) {
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, fmt.Errorf("looking for the API server: %w", err)
	}
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err == nil && bytes.Contains(line, []byte("--cert-dir="+s.dir+"\x00")) {
			return strconv.Atoi(filepath.Base(filepath.Dir(name)))
		}
	}
	return 0, errors.New("the API server does not run")
}

// Start starts the server again after a Kill, on the same port with the same
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

// Package apiserver starts a Kubernetes API server with etcd on this machine, with
// the project's CustomResourceDefinition installed: for the demo, the tests and the
// benchmarks.
package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/whatsapp-operator/whatsapp-operator/config/crd"
)

// killTimeout bounds the wait for the end of a server that was killed.
const killTimeout = 30 * time.Second

// Server is an API server with its own etcd.
type Server struct {
	// Config reaches the server as an administrator, without a limit on the rate of
	// requests. It is valid after a restart too.
	Config *rest.Config

	env *envtest.Environment
	dir string
}

// Start starts a server from the programs etcd and kube-apiserver in the folder assets (empty:
// $KUBEBUILDER_ASSETS). The server must be closed.
func Start(assets string) (*Server, error) {
	definition, err := crd.WhatsAppSessions()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "apiserver-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for the API server: %w", err)
	}
	s := &Server{dir: dir, env: &envtest.Environment{
		BinaryAssetsDirectory: assets,
		CRDs:                  []*apiextensionsv1.CustomResourceDefinition{definition},
	}}
	// envtest would delete its own folder, with the certificates, after a stop.
	s.env.ControlPlane.GetAPIServer().CertDir = dir
	if s.Config, err = s.env.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the API server from %q: %w", assets, err), s.Close())
	}
	s.Config.QPS = -1
	return s, nil
}

// WriteKubeconfig writes an administrator's kubeconfig. Its server is at host:port,
// which may be a proxy's; empty: the server itself.
func (s *Server) WriteKubeconfig(path, hostPort string) error {
	url := s.Config.Host
	if hostPort != "" {
		url = "https://" + hostPort
	}
	c := clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"local": {Server: url, CertificateAuthorityData: s.Config.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"admin": {ClientCertificateData: s.Config.CertData, ClientKeyData: s.Config.KeyData}},
		Contexts:       map[string]*clientcmdapi.Context{"local": {Cluster: "local", AuthInfo: "admin"}},
		CurrentContext: "local",
	}
	if err := clientcmd.WriteToFile(c, path); err != nil {
		return fmt.Errorf("writing the kubeconfig: %w", err)
	}
	return nil
}

// Kill ends the API server as a crash does, and waits for its end. etcd, which has all the
// data, continues to run. An orderly end would wait a minute for clients that do not answer.
func (s *Server) Kill() error {
	pid, err := s.pid()
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("killing the API server: %w", err)
	}
	err = wait.PollUntilContextTimeout(context.Background(), 5*time.Millisecond, killTimeout, true, func(context.Context) (bool, error) {
		return syscall.Kill(pid, 0) != nil, nil
	})
	if err != nil {
		return fmt.Errorf("waiting for the end of the API server: %w", err)
	}
	return nil
}

// pid finds the process, which envtest does not return, by its folder.
func (s *Server) pid() (int, error) {
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
	return 0, errors.New("the API server is not running")
}

// Restart starts the server again after a Kill, on the same port with the same
// certificates, and waits until it serves.
func (s *Server) Restart() error {
	if err := s.env.ControlPlane.GetAPIServer().Start(); err != nil {
		return fmt.Errorf("starting the API server again: %w", err)
	}
	return nil
}

// Close ends the server and etcd, and deletes their data.
func (s *Server) Close() error {
	return errors.Join(s.env.Stop(), os.RemoveAll(s.dir))
}

package demo

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/apiserver"
)

// cluster is an API server with etcd, and the sessions in it.
type cluster struct {
	server     *apiserver.Server
	kubeconfig string // path
	assets     string
	client     client.Client

	mu     sync.Mutex
	known  map[string]v1alpha1.WhatsAppSession
	events int64

	stopWatch context.CancelFunc
	watching  sync.WaitGroup
}

// startCluster starts etcd and kube-apiserver from assets, with the resource
// installed, and writes an administrator's kubeconfig into dir.
func startCluster(assets, dir string) (*cluster, error) {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("registering the resource: %w", err)
	}
	c := &cluster{
		assets:     assets,
		kubeconfig: filepath.Join(dir, "kubeconfig"),
		known:      map[string]v1alpha1.WhatsAppSession{},
	}
	var err error
	if c.server, err = apiserver.Start(assets); err != nil {
		return nil, err
	}
	if c.client, err = client.New(c.server.Config, client.Options{Scheme: scheme}); err == nil {
		err = c.server.WriteKubeconfig(c.kubeconfig, "")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("reaching the API server: %w", err), c.server.Close())
	}
	return c, nil
}

// watch keeps the known state of the sessions current, until stop.
func (c *cluster) watch(ctx context.Context) error {
	sessions, err := cache.New(c.server.Config, cache.Options{
		Scheme:            c.client.Scheme(),
		DefaultNamespaces: map[string]cache.Config{namespace: {}},
	})
	if err != nil {
		return fmt.Errorf("watching the sessions: %w", err)
	}
	informer, err := sessions.GetInformer(ctx, &v1alpha1.WhatsAppSession{}, cache.BlockUntilSynced(false))
	if err != nil {
		return fmt.Errorf("watching the sessions: %w", err)
	}
	_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { c.store(o) },
		UpdateFunc: func(_, o any) { c.store(o) },
		DeleteFunc: c.remove,
	})
	if err != nil {
		return fmt.Errorf("watching the sessions: %w", err)
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c.stopWatch = cancel
	c.watching.Go(func() { _ = sessions.Start(running) }) // ends with running
	return nil
}

// store stores a session, and counts the requests that Laravel would have received
// without batches: one for each new QR code and each new state.
func (c *cluster) store(o any) {
	s, ok := o.(*v1alpha1.WhatsAppSession)
	if !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.known[s.Name]
	if s.Status.QR != nil && (before.Status.QR == nil || before.Status.QR.Code != s.Status.QR.Code) {
		c.events++
	}
	if s.Status.Phase != "" && (before.Status.Phase != s.Status.Phase || readyReason(&before) != readyReason(s)) {
		c.events++
	}
	c.known[s.Name] = *s
}

func (c *cluster) remove(o any) {
	if tombstone, ok := o.(toolscache.DeletedFinalStateUnknown); ok {
		o = tombstone.Obj
	}
	if s, ok := o.(*v1alpha1.WhatsAppSession); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.known, s.Name)
	}
}

// sessions returns the sessions by name, and the number of events so far. The caller must
// not change the sessions, because they are shared.
func (c *cluster) sessions() ([]v1alpha1.WhatsAppSession, int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]v1alpha1.WhatsAppSession, 0, len(c.known))
	for _, s := range c.known {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b v1alpha1.WhatsAppSession) int { return strings.Compare(a.Name, b.Name) })
	return list, c.events
}

// apply creates n sessions.
func (c *cluster) apply(ctx context.Context, n int) error {
	width := len(fmt.Sprint(n))
	for i := 1; i <= n; i++ {
		s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("demo-%0*d", width, i)}}
		if err := c.client.Create(ctx, s); err != nil {
			return fmt.Errorf("creating session %s: %w", s.Name, err)
		}
	}
	return nil
}

// kubectl returns the command for kubectl: the one in the API server's folder if no other is installed.
func (c *cluster) kubectl() string {
	if _, err := exec.LookPath("kubectl"); err == nil {
		return "kubectl"
	}
	return filepath.Join(c.assets, "kubectl")
}

func (c *cluster) stop() error {
	if c.stopWatch != nil {
		c.stopWatch()
		c.watching.Wait()
	}
	if err := c.server.Close(); err != nil {
		return fmt.Errorf("stopping the API server: %w", err)
	}
	return nil
}

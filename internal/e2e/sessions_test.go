//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// The namespaces of the sessions.
const (
	// sessionNamespace has the sessions that nobody disturbs.
	sessionNamespace = "e2e-sessions"
	// churnNamespace has those whose states change all the time during an upgrade.
	churnNamespace = "e2e-churn"
	// timingNamespace has those whose first code is timed.
	timingNamespace = "e2e-timing"
	// tightNamespace has those of a pool with little memory.
	tightNamespace = "e2e-tight"
)

const (
	// atOnce bounds concurrent requests of the test.
	atOnce = 16
	// pairTimeout bounds the pairing of all sessions of a call: a pairing costs a tenth of a
	// second of CPU.
	pairTimeout = 10 * time.Minute
)

// session is one that is connected when no fault happens.
type session struct {
	namespace, name string
	jid             string
}

func (s *session) key() client.ObjectKey {
	return client.ObjectKey{Namespace: s.namespace, Name: s.name}
}

// create creates a session as `kubectl apply` does. Its id is unique in the cluster.
func (e *environment) create(ctx context.Context, namespace, name string) error {
	err := e.client.Create(ctx, &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// each calls f for the numbers from first to last-1, many at the same time.
func each(ctx context.Context, first, last int, f func(ctx context.Context, i int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i := first; i < last; i++ {
		group.Go(func() error { return f(ctx, i) })
	}
	return group.Wait()
}

// pair creates sessions until a namespace has n of them, lets the phones scan, and waits until
// all are connected.
func (e *environment) pair(t *testing.T, namespace string, n int) []*session {
	t.Helper()
	var all []*session
	for _, s := range e.sessions {
		if s.namespace == namespace {
			all = append(all, s)
		}
	}
	first := len(all)
	if first >= n {
		return all
	}
	began := time.Now()
	e.standins.scanCodes(t, true)
	for i := first; i < n; i++ {
		all = append(all, &session{namespace: namespace, name: fmt.Sprintf("%s-%04d", namespace, i)})
	}
	must(t, each(t.Context(), first, n, func(ctx context.Context, i int) error { return e.create(ctx, namespace, all[i].name) }))
	err := testenv.Await(t.Context(), pairTimeout, func(ctx context.Context) error {
		byName, err := e.list(ctx, namespace)
		if err != nil {
			return err
		}
		for _, s := range all {
			o := byName[s.name]
			if o == nil || o.Status.Phase != v1alpha1.PhaseConnected {
				return fmt.Errorf("%s is not connected", s.name)
			}
			s.jid = o.Status.JID
		}
		return nil
	})
	if err != nil {
		e.dump(t)
		t.Fatalf("Pairing %d sessions: %v", n-first, err)
	}
	e.sessions = append(e.sessions, all[first:]...)
	e.standins.scanCodes(t, false)
	t.Logf("%d sessions of %s paired in %s", n-first, namespace, time.Since(began).Round(100*time.Millisecond))
	return all
}

// list returns the sessions of a namespace by name.
func (e *environment) list(ctx context.Context, namespace string) (map[string]*v1alpha1.WhatsAppSession, error) {
	var list v1alpha1.WhatsAppSessionList
	if err := e.client.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return nil, err
	}
	byName := make(map[string]*v1alpha1.WhatsAppSession, len(list.Items))
	for i := range list.Items {
		byName[list.Items[i].Name] = &list.Items[i]
	}
	return byName, nil
}

// remove deletes every session of a namespace and waits until they are gone.
func (e *environment) remove(t *testing.T, namespace string) {
	t.Helper()
	must(t, e.client.DeleteAllOf(t.Context(), &v1alpha1.WhatsAppSession{}, client.InNamespace(namespace)))
	e.eventually(t, "the sessions of "+namespace+" to be deleted", func(ctx context.Context) error {
		byName, err := e.list(ctx, namespace)
		if err == nil && len(byName) > 0 {
			err = fmt.Errorf("%d are left", len(byName))
		}
		return err
	})
	kept := e.sessions[:0]
	for _, s := range e.sessions {
		if s.namespace != namespace {
			kept = append(kept, s)
		}
	}
	e.sessions = kept
}

// history is what a watch has seen of the sessions.
type history struct {
	mu sync.Mutex
	// codes is when a session showed its first code.
	codes map[client.ObjectKey]time.Time
	// shown is closed, and replaced, with each first code.
	shown chan struct{}
	// places is the worker of each session, moves how often it was changed.
	places map[types.UID]string
	moves  map[client.ObjectKey]int
	// wrong are broken rules: an epoch that fell, a worker that changed within an epoch.
	wrong  []string
	epochs map[types.UID]int64
}

// watchSessions starts the watch. The resource must be defined.
func (e *environment) watchSessions(t *testing.T) {
	t.Helper()
	h := &history{
		codes: map[client.ObjectKey]time.Time{}, shown: make(chan struct{}),
		places: map[types.UID]string{}, moves: map[client.ObjectKey]int{}, epochs: map[types.UID]int64{},
	}
	informers, err := cache.New(e.config, cache.Options{Scheme: e.client.Scheme()})
	must(t, err)
	informer, err := informers.GetInformer(t.Context(), &v1alpha1.WhatsAppSession{}, cache.BlockUntilSynced(false))
	must(t, err)
	_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { h.see(o) },
		UpdateFunc: func(_, o any) { h.see(o) },
	})
	must(t, err)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- informers.Start(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Watching the sessions: %v", err)
		}
	})
	if !informers.WaitForCacheSync(ctx) {
		t.Fatal("the watch of the sessions did not start")
	}
	e.history = h
}

func (h *history) see(o any) {
	s, ok := o.(*v1alpha1.WhatsAppSession)
	if !ok {
		return
	}
	now, key := time.Now(), client.ObjectKeyFromObject(s)
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.Status.QR != nil {
		if _, known := h.codes[key]; !known {
			h.codes[key] = now
			close(h.shown)
			h.shown = make(chan struct{})
		}
	}
	last, epoch := h.places[s.UID], h.epochs[s.UID]
	if s.Status.Epoch < epoch {
		h.wrong = append(h.wrong, fmt.Sprintf("the epoch of %s fell from %d to %d", key, epoch, s.Status.Epoch))
	}
	h.epochs[s.UID] = s.Status.Epoch
	at := s.Status.Worker
	if at == "" {
		return
	}
	if last != "" && last != at {
		h.moves[key]++
		if s.Status.Epoch == epoch {
			h.wrong = append(h.wrong, fmt.Sprintf("%s went from %q to %q within epoch %d", key, last, at, epoch))
		}
	}
	h.places[s.UID] = at
}

// takeMoves returns how often each session was moved, and which rules were broken, since the
// last call.
func (h *history) takeMoves() (moves map[client.ObjectKey]int, wrong []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	moves, wrong = h.moves, h.wrong
	h.moves, h.wrong = map[client.ObjectKey]int{}, nil
	return moves, wrong
}

// waitForCodes waits until n sessions of a namespace have shown a code, and returns when each did.
func (h *history) waitForCodes(ctx context.Context, namespace string, n int) (map[client.ObjectKey]time.Time, error) {
	for {
		h.mu.Lock()
		codes, shown := map[client.ObjectKey]time.Time{}, h.shown
		for key, at := range h.codes {
			if key.Namespace == namespace {
				codes[key] = at
			}
		}
		h.mu.Unlock()
		if len(codes) >= n {
			return codes, nil
		}
		select {
		case <-ctx.Done():
			return codes, fmt.Errorf("%d of %d sessions have shown a code: %w", len(codes), n, ctx.Err())
		case <-shown:
		}
	}
}

// forgetCodes forgets when the sessions of a namespace showed their codes.
func (h *history) forgetCodes(namespace string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key := range h.codes {
		if key.Namespace == namespace {
			delete(h.codes, key)
		}
	}
}

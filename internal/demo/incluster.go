package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/cache"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// This file has the parts of the demo that run in a cluster, each in its own container,
// where there is a real API server (the chart's simulator.enabled).

// PhonesOptions configure RunPhones.
type PhonesOptions struct {
	Config *rest.Config
	// Control is the URL of the simulator's control API.
	Control string
	// ScanAfter is how long a code is shown before a phone scans it.
	ScanAfter time.Duration
	Log       logr.Logger
}

// RunPhones scans the codes of every session in the cluster with simulated phones, and writes
// to each session as a contact when it is connected, until ctx ends.
func RunPhones(ctx context.Context, o PhonesOptions) error {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return fmt.Errorf("registering the resource: %w", err)
	}
	sessions, err := cache.New(o.Config, cache.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("watching the sessions: %w", err)
	}
	if _, err := sessions.GetInformer(ctx, &v1alpha1.WhatsAppSession{}, cache.BlockUntilSynced(false)); err != nil {
		return fmt.Errorf("watching the sessions: %w", err)
	}
	phones := newPhones(remotePhones{simulator.Control{URL: o.Control}}, o.ScanAfter, func(_ context.Context, s *v1alpha1.WhatsAppSession, _ string) {
		o.Log.Info("A session is asked for a passkey, which these phones do not give", "namespace", s.Namespace, "session", s.Name)
	})
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return sessions.Start(ctx) })
	group.Go(func() error {
		if !sessions.WaitForCacheSync(ctx) {
			return nil // ctx has ended
		}
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			var all v1alpha1.WhatsAppSessionList
			if err := sessions.List(ctx, &all); err != nil && ctx.Err() == nil {
				return fmt.Errorf("listing the sessions: %w", err)
			}
			phones.scan(ctx, all.Items)
			phones.write(ctx, all.Items)
			select {
			case <-ctx.Done():
				return nil
			case <-ticker.C:
			}
		}
	})
	return errors.Join(group.Wait(), phones.close())
}

// remotePhones are those of a simulator in another process.
type remotePhones struct{ simulator.Control }

// AnswerPasskey implements simulated.
func (p remotePhones) AnswerPasskey(phone string, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), scanTimeout)
	defer cancel()
	return p.Control.AnswerPasskey(ctx, phone, request)
}

// LaravelOptions configure RunLaravel.
type LaravelOptions struct {
	// Listen is host:port.
	Listen string
	// TokenFile and SigningSecretFile hold what the manager has, too.
	TokenFile, SigningSecretFile string
	// Out gets a line for each request.
	Out io.Writer
}

// RunLaravel runs the stand-in for the web application until ctx ends. Besides what the
// contract asks for it answers GET /state with what it has received, and GET /healthz.
func RunLaravel(ctx context.Context, o LaravelOptions) error {
	token, err := os.ReadFile(o.TokenFile)
	if err != nil {
		return fmt.Errorf("reading the bearer token: %w", err)
	}
	secret, err := os.ReadFile(o.SigningSecretFile)
	if err != nil {
		return fmt.Errorf("reading the signing secret: %w", err)
	}
	var printing sync.Mutex
	printLine := func(line string) {
		printing.Lock()
		defer printing.Unlock()
		fmt.Fprintln(o.Out, line)
	}
	var receiver atomic.Pointer[laraveltest.Receiver]
	started, err := laraveltest.New(laraveltest.Options{
		Token: strings.TrimSpace(string(token)), Secret: strings.TrimSpace(string(secret)),
		Listen:  func() (net.Listener, error) { return net.Listen("tcp", o.Listen) },
		Observe: func(r laraveltest.Request) { printLine(strings.Join(describe(r), "\n")) },
		Other:   otherRequests(&receiver),
	})
	if err != nil {
		return fmt.Errorf("starting the stand-in for Laravel: %w", err)
	}
	receiver.Store(started)
	printLine("Listening on " + started.URL)
	<-ctx.Done()
	return started.Close()
}

// otherRequests serves what is not a batch.
func otherRequests(receiver *atomic.Pointer[laraveltest.Receiver]) http.Handler {
	answer := func(w http.ResponseWriter, body any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(body) // fails only if the client has closed the connection
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status/{session_id}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, map[string]any{"session_id": r.PathValue("session_id"), "wanted": true})
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("GET /state", func(w http.ResponseWriter, _ *http.Request) {
		l := receiver.Load()
		if l == nil { // it is starting
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		answer(w, map[string]any{"requests": l.Count(), "status": l.Statuses(), "not_accepted": l.NotAccepted(), "breaches": l.Breaches()})
	})
	return mux
}

package app

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/go-logr/logr"
)

// probeTimeout bounds a request of the kubelet.
const probeTimeout = 5 * time.Second

// probes answers the kubelet from the first moment of a process on, also while it waits for
// the API server, Redis or the database. A nil *probes answers nobody.
//
// /healthz fails only when the process itself is stuck: a restart does not bring a server
// back. /readyz fails until the process does its work. Neither asks any server.
type probes struct {
	mu sync.Mutex
	// waiting is what the start waits for; empty: for nothing that can be named.
	waiting string
	// live and ready are checked after the start; nil: it is not over.
	live, ready func() error
}

// serveProbes begins to answer. close ends it.
func serveProbes(ctx context.Context, address string, log logr.Logger) (p *probes, closeServer func() error, err error) {
	p = &probes{}
	if address == "0" {
		return p, func() error { return nil }, nil
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, nil, fmt.Errorf("--health-bind-address: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", answer(p.healthy))
	mux.HandleFunc("/readyz", answer(p.isReady))
	server := &http.Server{Handler: mux, ReadTimeout: probeTimeout, WriteTimeout: probeTimeout, IdleTimeout: time.Minute}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.Error(err, "Failed to serve /healthz and /readyz")
		}
	}()
	return p, func() error {
		err := server.Close()
		<-ended
		return err
	}, nil
}

func answer(check func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := check(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		fmt.Fprintln(w, "ok")
	}
}

// waitFor records what the start waits for.
func (p *probes) waitFor(what string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting = what
}

// started ends the start: the checks decide from now on.
func (p *probes) started(live, ready func() error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.live, p.ready = live, ready
}

func (p *probes) healthy() error {
	p.mu.Lock()
	live := p.live
	p.mu.Unlock()
	if live == nil { // a start that waits is not stuck
		return nil
	}
	return live()
}

func (p *probes) isReady() error {
	p.mu.Lock()
	ready, waiting := p.ready, p.waiting
	p.mu.Unlock()
	switch {
	case ready != nil:
		return ready()
	case waiting != "":
		return fmt.Errorf("starting: waiting for %s", waiting)
	default:
		return errors.New("starting")
	}
}

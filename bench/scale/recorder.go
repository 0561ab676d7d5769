package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// recorder watches the sessions and records when each was first placed, held and connected.
// It decodes only the fields that it needs, to use little CPU time.
type recorder struct {
	prefix  string
	client  rest.Interface
	version string // the last resourceVersion that was read

	mu     sync.Mutex
	states map[string]state
	err    error
}

// state is when a session was first placed, held and connected.
type state struct{ placed, held, connected time.Time }

// watched is the part of a watch event that the recorder reads.
type watched struct {
	Type   string `json:"type"`
	Object struct {
		Metadata struct {
			Name            string `json:"name"`
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
		Status struct {
			Phase  v1alpha1.Phase `json:"phase"`
			Worker string         `json:"worker"`
			HeldBy string         `json:"heldBy"`
		} `json:"status"`
	} `json:"object"`
}

// record watches until ctx ends. The sessions must not exist yet.
func record(ctx context.Context, config *rest.Config, prefix string) (*recorder, func(), error) {
	config = rest.CopyConfig(config)
	config.GroupVersion, config.APIPath = &v1alpha1.GroupVersion, "/apis"
	config.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, nil, fmt.Errorf("connecting to the API server: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &recorder{prefix: prefix, client: client, version: "0", states: map[string]state{}}
	stream, err := r.open(ctx)
	if err != nil {
		cancel()
		return nil, nil, err
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		if err := r.follow(ctx, stream); err != nil && ctx.Err() == nil {
			r.mu.Lock()
			r.err = err
			r.mu.Unlock()
		}
	})
	return r, func() { cancel(); reading.Wait() }, nil
}

// open opens a watch from the last version that was read.
func (r *recorder) open(ctx context.Context) (io.ReadCloser, error) {
	stream, err := r.client.Get().Resource("whatsappsessions").Param("watch", "true").Param("resourceVersion", r.version).Stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("watching the sessions: %w", err)
	}
	return stream, nil
}

// follow reads until ctx ends. The API server may end a watch at any time.
func (r *recorder) follow(ctx context.Context, stream io.ReadCloser) error {
	for {
		err := r.read(stream)
		_ = stream.Close()
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		if stream, err = r.open(ctx); err != nil {
			return err
		}
	}
}

func (r *recorder) read(stream io.Reader) error {
	for decoder := json.NewDecoder(stream); ; {
		var w watched
		if err := decoder.Decode(&w); err != nil {
			return fmt.Errorf("watching the sessions: %w", err)
		}
		if w.Type == "ERROR" {
			return errors.New("the API server does not have the events any more that the recorder has not read")
		}
		r.version = w.Object.Metadata.ResourceVersion
		r.record(&w, time.Now())
	}
}

func (r *recorder) record(w *watched, now time.Time) {
	if !strings.HasPrefix(w.Object.Metadata.Name, r.prefix) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.states[w.Object.Metadata.Name]
	setFirst := func(t *time.Time, reached bool) {
		if reached && t.IsZero() {
			*t = now
		}
	}
	setFirst(&s.placed, w.Object.Status.Worker != "")
	setFirst(&s.held, w.Object.Status.HeldBy != "")
	setFirst(&s.connected, w.Object.Status.Phase == v1alpha1.PhaseConnected)
	r.states[w.Object.Metadata.Name] = s
}

// progress counts the sessions that are placed, held and connected, with the time of the last one.
type progress struct {
	placed, held, connected             int
	lastPlaced, lastHeld, lastConnected time.Time
}

func (r *recorder) progress() (t progress, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	count := func(n *int, last *time.Time, at time.Time) {
		if at.IsZero() {
			return
		}
		*n++
		if at.After(*last) {
			*last = at
		}
	}
	for _, s := range r.states {
		count(&t.placed, &t.lastPlaced, s.placed)
		count(&t.held, &t.lastHeld, s.held)
		count(&t.connected, &t.lastConnected, s.connected)
	}
	return t, r.err
}

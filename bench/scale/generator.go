package main

import (
	"context"
	_ "embed"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// load is the number of sessions and workers, and how they are applied.
type load struct {
	Sessions    int             `json:"sessions"`
	Namespaces  int             `json:"namespaces"`
	Concurrency int             `json:"concurrency"`
	Workers     int             `json:"workers"`
	Capacity    int             `json:"capacity"`
	Pairings    float64         `json:"pairingsPerSecond"`
	Settle      metav1.Duration `json:"settle"`
	Steady      metav1.Duration `json:"steady"`
}

//go:embed load.yaml
var defaultLoad []byte

// readLoad reads a file; an empty path means the embedded one.
func readLoad(path string) (load, error) {
	var l load
	content := defaultLoad
	if path != "" {
		var err error
		if content, err = os.ReadFile(path); err != nil {
			return l, fmt.Errorf("reading the load: %w", err)
		}
	}
	if err := yaml.UnmarshalStrict(content, &l); err != nil {
		return l, fmt.Errorf("reading the load: %w", err)
	}
	return l, nil
}

// generator applies the sessions of a load, spread evenly over its own namespaces.
type generator struct {
	load
	client client.Client
	prefix string
}

func (g *generator) namespace(i int) string {
	return fmt.Sprintf("%s-%02d", g.prefix, i%g.Namespaces)
}

func (g *generator) name(i int) string { return fmt.Sprintf("%s-%05d", g.prefix, i) }

func (g *generator) prepare(ctx context.Context) error {
	for i := range g.Namespaces {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: g.namespace(i)}}
		if err := g.client.Create(ctx, ns); err != nil {
			return fmt.Errorf("making a namespace: %w", err)
		}
	}
	return nil
}

// apply creates all sessions at once and returns them as stored in the API server.
func (g *generator) apply(ctx context.Context) ([]*v1alpha1.WhatsAppSession, error) {
	all := make([]*v1alpha1.WhatsAppSession, g.Sessions)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(g.Concurrency)
	for i := range all {
		group.Go(func() error {
			all[i] = &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: g.namespace(i), Name: g.name(i)}}
			if err := g.client.Create(ctx, all[i]); err != nil {
				return fmt.Errorf("applying a session: %w", err)
			}
			return nil
		})
	}
	return all, group.Wait()
}

package app

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/config/crd/bases"
	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
)

const (
	// crdInterval is how often a running manager compares the installed definition with its own.
	crdInterval = time.Minute
	// maxLacking is how many missing parts an error names.
	maxLacking = 5

	crdName    = "whatsappsessions.whatsapp-operator.io"
	installCRD = "install the one of this release: `whatsapp-operator crd | kubectl apply --server-side -f -`, or `kubectl apply --server-side -k config/crd`"
)

// newCRDCommand prints the definition, for an installation that has only the image.
func newCRDCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "crd",
		Short: "Print the CustomResourceDefinition of this release",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(bases.WhatsAppSessions)
			return err
		},
	}
}

// crdOlderError is a definition that lacks what this program writes. The API server removes
// fields that the definition does not know at each write, and the status says who owns a
// session: a manager must not write with it.
type crdOlderError struct{ lacking []string }

func (e *crdOlderError) Error() string {
	named, more := e.lacking, ""
	if len(named) > maxLacking {
		named, more = named[:maxLacking], fmt.Sprintf(" and %d more", len(e.lacking)-maxLacking)
	}
	return fmt.Sprintf("the installed CustomResourceDefinition %s is older than this manager (%s), it lacks %s%s: %s",
		crdName, Version, strings.Join(named, ", "), more, installCRD)
}

// checkCRD returns an *crdOlderError if the installed definition lacks what this program writes.
func (d *dependencies) checkCRD(ctx context.Context) error {
	installed := &unstructured.Unstructured{}
	installed.SetAPIVersion("apiextensions.k8s.io/v1")
	installed.SetKind("CustomResourceDefinition")
	err := d.direct.Get(ctx, client.ObjectKey{Name: crdName}, installed)
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("the CustomResourceDefinition %s is not installed: %s", crdName, installCRD)
	case err != nil:
		return fmt.Errorf("reading the CustomResourceDefinition %s: %w", crdName, err)
	}
	own := map[string]any{}
	if err := yaml.Unmarshal(bases.WhatsAppSessions, &own); err != nil {
		return fmt.Errorf("reading the embedded CustomResourceDefinition: %w", err)
	}
	if lacking := lackingParts(own, installed.Object); len(lacking) > 0 {
		return &crdOlderError{lacking}
	}
	return nil
}

// watchCRD ends the process if the definition is replaced by an older one: after the restart
// the manager waits, and does not lead, until it is new enough.
func (d *dependencies) watchCRD(ctx context.Context) error {
	ticker := d.clock.NewTicker(crdInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
		var older *crdOlderError
		err := d.checkCRD(ctx)
		switch {
		case errors.As(err, &older):
			return err
		case err != nil && ctx.Err() == nil:
			d.log.V(1).Info("Failed to check the CustomResourceDefinition, trying again", "reason", err.Error())
		}
	}
}

// awaitResources waits until the manager can use its resources: they exist, are not older than
// the program, and may be listed.
func (d *dependencies) awaitResources(ctx context.Context) error {
	err := d.await(ctx, stepCRD, func(ctx context.Context) (bool, error) { return false, d.checkCRD(ctx) })
	if err == nil {
		err = d.awaitSessions(ctx)
	}
	if err != nil {
		return err
	}
	return d.await(ctx, stepLeases, func(ctx context.Context) (bool, error) {
		return false, d.direct.List(ctx, &coordinationv1.LeaseList{}, client.InNamespace(d.config.Namespace), client.MatchingLabels(membership.WorkerLabels(d.config.Release)), client.Limit(1))
	})
}

// awaitSessions waits until the sessions may be listed in this way.
func (d *dependencies) awaitSessions(ctx context.Context, selection ...client.ListOption) error {
	return d.await(ctx, stepSessions, func(ctx context.Context) (bool, error) {
		err := d.direct.List(ctx, &v1alpha1.WhatsAppSessionList{}, append(selection, client.Limit(1))...)
		switch {
		case meta.IsNoMatchError(err), apierrors.IsNotFound(err):
			return false, fmt.Errorf("the CustomResourceDefinition %s is not installed: %s", crdName, installCRD)
		case err != nil:
			return false, fmt.Errorf("listing the sessions: %w", err)
		}
		return false, nil
	})
}

// lackingParts returns what the definition own has and installed lacks: fields, values of
// enumerations, fields that can be selected, the status as a subresource, or a whole version.
func lackingParts(own, installed map[string]any) (lacking []string) {
	ours, _, _ := unstructured.NestedSlice(own, "spec", "versions")
	theirs, _, _ := unstructured.NestedSlice(installed, "spec", "versions")
	for _, v := range ours {
		version := asMap(v)
		name, _ := version["name"].(string)
		i := slices.IndexFunc(theirs, func(t any) bool { return asMap(t)["name"] == name && asMap(t)["served"] == true })
		if i < 0 {
			lacking = append(lacking, "the version "+name)
			continue
		}
		found := asMap(theirs[i])
		if _, has := asMap(version["subresources"])["status"]; has {
			if _, has := asMap(found["subresources"])["status"]; !has {
				lacking = append(lacking, "the subresource status")
			}
		}
		for _, path := range selectable(version) {
			if !slices.Contains(selectable(found), path) {
				lacking = append(lacking, "the selectable field "+path)
			}
		}
		lacking = append(lacking, lackingFields("", schemaOf(version), schemaOf(found))...)
	}
	return lacking
}

func asMap(v any) map[string]any {
	m, _ := v.(map[string]any)
	return m
}

func schemaOf(version map[string]any) map[string]any {
	return asMap(asMap(version["schema"])["openAPIV3Schema"])
}

func selectable(version map[string]any) (paths []string) {
	fields, _ := version["selectableFields"].([]any)
	for _, f := range fields {
		path, _ := asMap(f)["jsonPath"].(string)
		paths = append(paths, path)
	}
	return paths
}

// lackingFields compares the schema of one field, and of those below it.
func lackingFields(path string, own, installed map[string]any) (lacking []string) {
	if preserves, _ := installed["x-kubernetes-preserve-unknown-fields"].(bool); preserves {
		return nil
	}
	ours, theirs := asMap(own["properties"]), asMap(installed["properties"])
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		below := path + "." + name
		if theirs[name] == nil {
			lacking = append(lacking, below)
			continue
		}
		lacking = append(lacking, lackingFields(below, asMap(ours[name]), asMap(theirs[name]))...)
	}
	for key, suffix := range map[string]string{"items": "[]", "additionalProperties": ".*"} {
		if below := asMap(own[key]); below != nil {
			lacking = append(lacking, lackingFields(path+suffix, below, asMap(installed[key]))...)
		}
	}
	if allowed, limited := installed["enum"].([]any); limited {
		values, _ := own["enum"].([]any)
		for _, value := range values {
			if !slices.Contains(allowed, value) {
				lacking = append(lacking, fmt.Sprintf("%s=%v", path, value))
			}
		}
	}
	return lacking
}

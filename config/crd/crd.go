// Package crd has the generated CustomResourceDefinition, for programs that start their own
// API server (the demo, the tests).
package crd

import (
	"fmt"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"

	"github.com/whatsapp-operator/whatsapp-operator/config/crd/bases"
)

// WhatsAppSessions returns the definition of the resource, which `make manifests` writes.
func WhatsAppSessions() (*apiextensionsv1.CustomResourceDefinition, error) {
	definition := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.UnmarshalStrict(bases.WhatsAppSessions, definition); err != nil {
		return nil, fmt.Errorf("reading the embedded CustomResourceDefinition: %w", err)
	}
	return definition, nil
}

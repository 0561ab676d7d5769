// Package crd carries the generated CustomResourceDefinitions inside the binary,
// for those who start an API server of their own (the demo, tests).
package crd

import (
	_ "embed"
	"fmt"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"
)

//go:embed bases/whatsapp-operator.io_whatsappsessions.yaml
var whatsAppSessions []byte

// WhatsAppSessions is the definition of the resource, as `make manifests` wrote it.
func WhatsAppSessions() (*apiextensionsv1.CustomResourceDefinition, error) {
	definition := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.UnmarshalStrict(whatsAppSessions, definition); err != nil {
		return nil, fmt.Errorf("reading the embedded CustomResourceDefinition: %w", err)
	}
	return definition, nil
}

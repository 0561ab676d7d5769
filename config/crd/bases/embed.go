// Package bases embeds the generated CustomResourceDefinition as text, for programs that must
// not contain the types of the API extensions.
package bases

import _ "embed" // for the file below

// WhatsAppSessions is the definition of the resource, which `make manifests` writes.
//
//go:embed whatsapp-operator.io_whatsappsessions.yaml
var WhatsAppSessions []byte

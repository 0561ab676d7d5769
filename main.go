// The whatsapp-operator manages WhatsApp sessions as Kubernetes resources. One
// binary holds every part: `manager`, `worker`, `simulator` and `demo`.
package main

import (
	"os"

	"github.com/whatsapp-operator/whatsapp-operator/internal/app"
)

func main() { os.Exit(app.Main()) }

package kube

import (
	"k8s.io/client-go/tools/events"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// Events records Kubernetes Events for sessions.
type Events struct{ Recorder events.EventRecorder }

// Event implements worker.Events.
func (e *Events) Event(session *v1alpha1.WhatsAppSession, kind, reason, message string) {
	e.Recorder.Eventf(session, nil, kind, reason, reason, "%s", message)
}

package app

import (
	"testing"

	. "github.com/onsi/gomega"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// TestWritesUntilTheFirstCode counts the writes to a session from its creation to its first
// code: where many sessions are applied at once, they decide how long people wait. Each has
// its reason: the finalizer, before the id is claimed in the store; the id; the placement; the
// claim, which must be confirmed before the device is taken; the code.
func TestWritesUntilTheFirstCode(t *testing.T) {
	const writes = 5
	s := newEnvironment(t, "")
	s.manager()
	s.worker("worker-1")
	watching, err := client.NewWithWatch(apiServer.Config, client.Options{Scheme: s.client.Scheme()})
	s.Expect(err).NotTo(HaveOccurred())
	sessions, err := watching.Watch(t.Context(), &v1alpha1.WhatsAppSessionList{}, client.InNamespace(s.namespace))
	s.Expect(err).NotTo(HaveOccurred())
	defer sessions.Stop()
	for _, name := range []string{"a", "b", "c"} { // the first may wait for the worker
		s.apply(name)
		var seen []v1alpha1.WhatsAppSessionStatus
		for shown := false; !shown; {
			var e watch.Event
			s.Eventually(sessions.ResultChan()).Should(Receive(&e))
			if o, ok := e.Object.(*v1alpha1.WhatsAppSession); ok && o.Name == name {
				shown = o.Status.QR != nil
				if e.Type == watch.Modified {
					seen = append(seen, o.Status)
				}
			}
		}
		if name != "a" {
			s.Expect(len(seen)).To(BeNumerically("<=", writes), "%+v", seen)
		}
	}
}

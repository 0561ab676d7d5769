package demo

import (
	"context"
	"os"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// The demo counts the events of the sessions in the API server, which a person can use with kubectl.
func TestClusterCountsTheEventsOfTheSessions(t *testing.T) {
	g := NewWithT(t)
	ctx := context.Background()
	c, err := startCluster(os.Getenv("KUBEBUILDER_ASSETS"), t.TempDir())
	g.Expect(err).NotTo(HaveOccurred())
	defer func() { g.Expect(c.stop()).To(Succeed()) }()
	g.Expect(c.watch(ctx)).To(Succeed())
	g.Expect(c.apply(ctx, 10)).To(Succeed())

	config, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig)
	g.Expect(err).NotTo(HaveOccurred())
	person, err := client.New(config, client.Options{Scheme: c.client.Scheme()})
	g.Expect(err).NotTo(HaveOccurred())
	var s v1alpha1.WhatsAppSession
	g.Expect(person.Get(ctx, client.ObjectKey{Namespace: namespace, Name: "demo-01"}, &s)).To(Succeed())

	events := func() int64 { _, n := c.sessions(); return n }
	step := func(change func(*v1alpha1.WhatsAppSessionStatus)) {
		change(&s.Status)
		g.Expect(person.Status().Update(ctx, &s)).To(Succeed())
	}
	step(func(st *v1alpha1.WhatsAppSessionStatus) { st.Phase = v1alpha1.PhasePairing })
	g.Eventually(events).WithTimeout(30 * time.Second).Should(Equal(int64(1)))
	step(func(st *v1alpha1.WhatsAppSessionStatus) {
		st.QR = &v1alpha1.QRStatus{Code: "1", ExpiresAt: metav1.Now()}
	})
	g.Eventually(events).WithTimeout(30 * time.Second).Should(Equal(int64(2)))
	step(func(st *v1alpha1.WhatsAppSessionStatus) { st.QR, st.Phase = nil, v1alpha1.PhaseConnected })
	g.Eventually(events).WithTimeout(30 * time.Second).Should(Equal(int64(3)))
	step(func(st *v1alpha1.WhatsAppSessionStatus) { st.PushName = "Shop" })

	g.Expect(person.Delete(ctx, &s)).To(Succeed())
	g.Eventually(func() int { list, _ := c.sessions(); return len(list) }).WithTimeout(30 * time.Second).Should(Equal(9))
	g.Expect(events()).To(Equal(int64(3)), "a push name is not an event")
}

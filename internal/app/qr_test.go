package app

import (
	"bytes"
	"context"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// answers is a client that reads a session's next status each time, and then the last one.
type answers struct {
	client.Reader
	statuses []v1alpha1.WhatsAppSessionStatus
	errs     []error // before the statuses
}

func (a *answers) Get(_ context.Context, _ client.ObjectKey, obj client.Object, _ ...client.GetOption) error {
	if len(a.errs) > 0 {
		err := a.errs[0]
		a.errs = a.errs[1:]
		return err
	}
	obj.(*v1alpha1.WhatsAppSession).Status = a.statuses[0]
	if len(a.statuses) > 1 {
		a.statuses = a.statuses[1:]
	}
	return nil
}

func withCode(code string) v1alpha1.WhatsAppSessionStatus {
	return v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhasePairing, QR: &v1alpha1.QRStatus{Code: code, Attempt: 1, ExpiresAt: metav1.NewTime(time.Unix(3600, 0))}}
}

func reason(phase v1alpha1.Phase, kind, reason string) v1alpha1.WhatsAppSessionStatus {
	return v1alpha1.WhatsAppSessionStatus{Phase: phase, Conditions: []metav1.Condition{{Type: kind, Status: metav1.ConditionTrue, Reason: reason, Message: "the message"}}}
}

func TestQRCommandShowsEachCodeOnce(t *testing.T) {
	connected := v1alpha1.WhatsAppSessionStatus{Phase: v1alpha1.PhaseConnected, PhoneNumber: "+34600111222"}
	for _, row := range []struct {
		name    string
		answers answers
		want    []string
		err     string
	}{
		{"two codes and a scan", answers{statuses: []v1alpha1.WhatsAppSessionStatus{{}, withCode("one"), withCode("one"), withCode("two"), connected}},
			[]string{"Waiting for the manager", "01:00:00 UTC", "Connected as +34600111222."}, ""},
		{"an account without a known number", answers{statuses: []v1alpha1.WhatsAppSessionStatus{{Phase: v1alpha1.PhaseConnected, JID: "123456789012345:3@lid"}}},
			[]string{"Connected as 123456789012345:3@lid."}, ""},
		{"a code to type", answers{statuses: []v1alpha1.WhatsAppSessionStatus{{Phase: v1alpha1.PhasePairing, PairingCode: "ABCD-1234"}, connected}},
			[]string{"ABCD-1234"}, ""},
		{"the API server is away for a moment", answers{errs: []error{apierrors.NewServiceUnavailable("away")}, statuses: []v1alpha1.WhatsAppSessionStatus{connected}},
			[]string{"Connected"}, ""},
		{"no such session", answers{errs: []error{apierrors.NewNotFound(corev1.Resource("whatsappsessions"), "shop")}}, nil, "there is no session default/shop: apply it first"},
		{"no right to read", answers{errs: []error{apierrors.NewForbidden(corev1.Resource("whatsappsessions"), "shop", nil)}}, nil, "forbidden"},
		{"expired", answers{statuses: []v1alpha1.WhatsAppSessionStatus{reason(v1alpha1.PhasePairingExpired, v1alpha1.ConditionStalled, v1alpha1.ReasonPairingExpired)}},
			nil, "PairingExpired: the message"},
		{"suspended", answers{statuses: []v1alpha1.WhatsAppSessionStatus{{Phase: v1alpha1.PhaseSuspended}}}, nil, "spec.suspend is true"},
		{"not placed, then connected", answers{statuses: []v1alpha1.WhatsAppSessionStatus{reason(v1alpha1.PhasePending, v1alpha1.ConditionReady, v1alpha1.ReasonNoWorkers), connected}},
			[]string{"Waiting for a code: NoWorkers: the message"}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			var out bytes.Buffer
			err := showCodes(t.Context(), &row.answers, client.ObjectKey{Namespace: "default", Name: "shop"}, &out, time.Millisecond)
			if row.err == "" {
				g.Expect(err).NotTo(HaveOccurred())
			} else {
				g.Expect(err).To(MatchError(ContainSubstring(row.err)))
			}
			for _, want := range row.want {
				g.Expect(out.String()).To(ContainSubstring(want))
			}
		})
	}
	g := NewWithT(t)
	var out bytes.Buffer
	two := answers{statuses: []v1alpha1.WhatsAppSessionStatus{withCode("one"), withCode("one"), withCode("two"), withCode("two"), connected}}
	g.Expect(showCodes(t.Context(), &two, client.ObjectKey{}, &out, time.Millisecond)).To(Succeed())
	g.Expect(bytes.Count(out.Bytes(), []byte("Code 1"))).To(Equal(2), "each code is drawn once")

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	g.Expect(showCodes(ended, &answers{statuses: []v1alpha1.WhatsAppSessionStatus{{}}}, client.ObjectKey{}, &out, time.Millisecond)).To(MatchError(ContainSubstring("run the command again")))
}

func TestQRCommandNeedsANamespaceAndAName(t *testing.T) {
	for _, name := range []string{"shop", "/shop", "default/"} {
		root := NewRootCommand()
		root.SetArgs([]string{"qr", "--kubeconfig=", name})
		NewWithT(t).Expect(root.ExecuteContext(t.Context())).To(MatchError(ContainSubstring("is not NAMESPACE/NAME")), name)
	}
}

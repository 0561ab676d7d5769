package worker

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const (
	me      = "worker-a"
	process = "p1"
	phone   = "+34600111222"
	jid     = "34600111222:7@s.whatsapp.net"
	// pairingCode is a code to type on the phone.
	pairingCode = "ABCD-1234"
)

// newSession returns a session that is placed on the worker me with epoch 100.
func newSession(change ...func(*v1alpha1.WhatsAppSession)) *v1alpha1.WhatsAppSession {
	s := &v1alpha1.WhatsAppSession{
		ObjectMeta: metav1.ObjectMeta{Name: "shop", Namespace: "tenant", UID: "uid-1", ResourceVersion: "1", Generation: 1},
		Status:     v1alpha1.WhatsAppSessionStatus{SessionID: "shop", Worker: me, Epoch: 100},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

// deleted marks a session as deleted.
func deleted(s *v1alpha1.WhatsAppSession) {
	stamp := metav1.NewTime(noon)
	s.DeletionTimestamp = &stamp
}

// byCode makes a session pair with a code that is typed on the phone.
func byCode(s *v1alpha1.WhatsAppSession) {
	s.Spec.Pairing.Method, s.Spec.Pairing.PhoneNumber = v1alpha1.PairingPhoneCode, phone
}

// account is a device in the fake store.
type account struct {
	starts     int64
	jid, phone string
	unsettled  int32
	trial      int32
}

func (a account) Starts() int64       { return a.starts }
func (a account) JID() string         { return a.jid }
func (a account) PhoneNumber() string { return a.phone }
func (a account) Unsettled() int32    { return a.unsettled }
func (a account) Trial() int32        { return a.trial }

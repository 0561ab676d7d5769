package demo

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// whatsApp records the scanned codes and refuses them.
type whatsApp struct {
	mu    sync.Mutex
	codes []string
}

func (w *whatsApp) Scan(_ context.Context, qr, _ string) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.codes = append(w.codes, qr)
	return "", errors.New("that code has just expired")
}

func (w *whatsApp) EnterCode(ctx context.Context, phone, code string) (string, error) {
	return w.Scan(ctx, phone+" types "+code, phone)
}

func (w *whatsApp) scanned() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.codes...)
}

func showing(name, code string) v1alpha1.WhatsAppSession {
	s := v1alpha1.WhatsAppSession{}
	s.Name = name
	if code != "" {
		s.Status.QR = &v1alpha1.QRStatus{Code: code}
	}
	return s
}

func TestPhonesScanEachCodeOnce(t *testing.T) {
	g := NewWithT(t)
	w := &whatsApp{}
	p := newPhones(w, 4*time.Second)
	now := time.Unix(0, 0)
	p.now = func() time.Time { return now }
	scan := func(code string) {
		p.scan(context.Background(), []v1alpha1.WhatsAppSession{showing("a", code), showing("b", "")})
	}

	scan("first")
	now = now.Add(3 * time.Second)
	scan("first")
	g.Expect(w.scanned()).To(BeEmpty(), "the code was not shown for long enough")

	now = now.Add(time.Second)
	scan("first")
	scan("first")
	g.Eventually(w.scanned).Should(Equal([]string{"first"}))

	scan("") // between two codes
	scan("second")
	g.Eventually(w.scanned).Should(Equal([]string{"first", "second"}), "the next code is scanned at once")
	g.Expect(p.close()).To(Succeed())
}

func TestPhonesTypeCodesToo(t *testing.T) {
	g := NewWithT(t)
	w := &whatsApp{}
	p := newPhones(w, 0)
	s := showing("a", "")
	s.Spec.Pairing.PhoneNumber, s.Status.PairingCode = "+34600111222", "ABCD-1234"
	p.scan(context.Background(), []v1alpha1.WhatsAppSession{s})
	g.Eventually(w.scanned).Should(Equal([]string{"+34600111222 types ABCD-1234"}))
	g.Expect(p.close()).To(Succeed())
}

func TestPhonesEndWithTheDemo(t *testing.T) {
	g := NewWithT(t)
	p := newPhones(waiting{}, 0)
	p.scan(context.Background(), []v1alpha1.WhatsAppSession{showing("a", "code")})
	g.Expect(p.close()).To(Succeed())
}

// waiting is a WhatsApp that does not answer.
type waiting struct{}

func (waiting) Scan(ctx context.Context, _, _ string) (string, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

func (w waiting) EnterCode(ctx context.Context, phone, code string) (string, error) {
	return w.Scan(ctx, code, phone)
}

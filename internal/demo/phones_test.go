package demo

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// Many tests share two cores and the race detector, so that Gomega's one second is too short.
func init() { SetDefaultEventuallyTimeout(time.Minute) }

// whatsApp records the scanned codes and refuses them. It records the messages too.
type whatsApp struct {
	mu       sync.Mutex
	codes    []string
	messages []string
	refuses  bool // the messages
}

func (w *whatsApp) Write(_ context.Context, r simulator.SendRequest) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.messages = append(w.messages, r.Device+": "+r.Text)
	if w.refuses {
		return "", errors.New("there is no such device")
	}
	return "1", nil
}

func (w *whatsApp) written() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.messages...)
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

func (w *whatsApp) AnswerPasskey(phone string, request []byte) ([]byte, error) {
	return []byte(phone + " answers " + string(request)), nil
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
	p := newPhones(w, 4*time.Second, nil)
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
	p := newPhones(w, 0, nil)
	s := showing("a", "")
	s.Spec.Pairing.PhoneNumber, s.Status.PairingCode = "+34600111222", "ABCD-1234"
	p.scan(context.Background(), []v1alpha1.WhatsAppSession{s})
	g.Eventually(w.scanned).Should(Equal([]string{"+34600111222 types ABCD-1234"}))
	g.Expect(p.close()).To(Succeed())
}

// linking is a WhatsApp that accepts each code and asks for the passkey.
type linking struct{ whatsApp }

func (*linking) Scan(context.Context, string, string) (string, error) {
	return "15551000001:1@s.whatsapp.net", nil
}

func TestPhonesAnswerForTheirPasskeys(t *testing.T) {
	g := NewWithT(t)
	given := make(chan string, 2)
	p := newPhones(&linking{}, 0, func(_ context.Context, s *v1alpha1.WhatsAppSession, answer string) { given <- s.Name + ": " + answer })
	p.scan(context.Background(), []v1alpha1.WhatsAppSession{showing("a", "code")})
	asked := showing("a", "")
	asked.Status.Passkey = &v1alpha1.PasskeyStatus{RequestOptions: "the request"}
	g.Eventually(func() string { p.mu.Lock(); defer p.mu.Unlock(); return p.by[id(&asked)] }).Should(Equal("15551000001"))
	for range 2 {
		p.scan(context.Background(), []v1alpha1.WhatsAppSession{asked})
	}
	g.Eventually(given).Should(Receive(Equal("a: 15551000001 answers the request")))
	g.Expect(p.close()).To(Succeed())
	g.Expect(given).To(BeEmpty(), "once for a request")
}

func TestTheContactWritesOnceToEachConnectedSession(t *testing.T) {
	g := NewWithT(t)
	w := &whatsApp{refuses: true}
	p := newPhones(w, 0, nil)
	a, b := session("a", v1alpha1.PhaseConnected, "worker-1", "", ""), session("b", v1alpha1.PhasePairing, "worker-1", "", "")
	a.Status.JID, b.Status.JID = "1:1@s.whatsapp.net", "2:1@s.whatsapp.net"
	p.write(context.Background(), []v1alpha1.WhatsAppSession{a, b})
	g.Eventually(w.written).Should(Equal([]string{"1:1@s.whatsapp.net: Hello, is this a?"}))

	w.mu.Lock()
	w.refuses = false
	w.mu.Unlock()
	b.Status.Phase = v1alpha1.PhaseConnected
	want := []string{"1:1@s.whatsapp.net: Hello, is this a?", "1:1@s.whatsapp.net: Hello, is this a?", "2:1@s.whatsapp.net: Hello, is this b?"}
	g.Eventually(func() []string {
		p.write(context.Background(), []v1alpha1.WhatsAppSession{a, b})
		return w.written()
	}).Should(ConsistOf(want), "the message that failed is sent again")
	p.write(context.Background(), []v1alpha1.WhatsAppSession{a, b})
	g.Expect(p.close()).To(Succeed())
	g.Expect(w.written()).To(ConsistOf(want))
}

func TestPhonesEndWithTheDemo(t *testing.T) {
	g := NewWithT(t)
	p := newPhones(waiting{}, 0, nil)
	p.scan(context.Background(), []v1alpha1.WhatsAppSession{showing("a", "code")})
	g.Expect(p.close()).To(Succeed())
}

// waiting is a WhatsApp that does not answer.
type waiting struct{}

func (waiting) Scan(ctx context.Context, _, _ string) (string, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

func (waiting) Write(ctx context.Context, _ simulator.SendRequest) (string, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

func (waiting) AnswerPasskey(string, []byte) ([]byte, error) { return nil, errors.New("no passkey") }

func (w waiting) EnterCode(ctx context.Context, phone, code string) (string, error) {
	return w.Scan(ctx, code, phone)
}

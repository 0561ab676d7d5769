package demo

import (
	"errors"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

func state(session string, status delivery.Status, epoch, seq int64) delivery.StatusItem {
	return delivery.StatusItem{SessionID: session, Status: status, Phase: "Connected", Numbers: delivery.Numbers{Epoch: epoch, Seq: seq}}
}

func TestTheLineOfARequest(t *testing.T) {
	statuses := func(items ...delivery.StatusItem) laraveltest.Request {
		r := laraveltest.Request{Kind: delivery.KindStatus, Path: laravel.DefaultStatusPath}
		for _, i := range items {
			r.Items = append(r.Items, laraveltest.Item{Kind: r.Kind, SessionID: i.SessionID, Status: i})
		}
		return r
	}
	codes := func(items ...delivery.QRItem) laraveltest.Request {
		r := laraveltest.Request{Kind: delivery.KindQR, Path: laravel.DefaultQRPath}
		for _, i := range items {
			r.Items = append(r.Items, laraveltest.Item{Kind: r.Kind, SessionID: i.SessionID, QR: i})
		}
		return r
	}
	repeated, stale, refused := codes(delivery.QRItem{SessionID: "a", QR: "code"}), statuses(state("a", delivery.Pending, 1, 9)), statuses()
	repeated.Repeated, stale.Stale, refused.Unverified = true, 1, errors.New("a request without the bearer token")
	for want, request := range map[string]laraveltest.Request{
		"Laravel ← POST /whatsapp/status/batch    1 in one request: a is active (Connected)":                                       statuses(state("a", delivery.Active, 1, 1)),
		"Laravel ← POST /whatsapp/status/batch    3 in one request: 2 active, 1 pending":                                           statuses(state("a", delivery.Active, 1, 1), state("b", delivery.Pending, 1, 1), state("c", delivery.Active, 1, 1)),
		"Laravel ← POST /qr/batch                 1 in one request: a pairing code of a":                                           codes(delivery.QRItem{SessionID: "a", PairingCode: "ABCD-EFGH"}),
		"Laravel ← POST /qr/batch                 1 in one request: a request for the passkey of a":                                codes(delivery.QRItem{SessionID: "a", Passkey: &delivery.Passkey{}}),
		"Laravel ← POST /qr/batch                 2 in one request: codes of 2 sessions":                                           codes(delivery.QRItem{SessionID: "a", QR: "code"}, delivery.QRItem{SessionID: "b", QR: "code"}),
		"Laravel ← POST /qr/batch                 1 in one request: a QR code of a  (a repeated batch)":                            repeated,
		"Laravel ← POST /whatsapp/status/batch    1 in one request: a is pending (Connected)  (1 not newer than what Laravel has)": stale,
		"Laravel ← POST /whatsapp/status/batch   refused: a request without the bearer token":                                      refused,
	} {
		NewWithT(t).Expect(describe(request)).To(Equal([]string{want}))
	}
}

func TestTheLinesOfMessages(t *testing.T) {
	g := NewWithT(t)
	messages := func(items ...laraveltest.Message) laraveltest.Request {
		r := laraveltest.Request{Kind: delivery.KindMessage, Path: laravel.DefaultMessagePath}
		for _, m := range items {
			r.Items = append(r.Items, laraveltest.Item{Kind: r.Kind, SessionID: m.SessionID, Message: m})
		}
		return r
	}
	hello := laraveltest.Message{SessionID: "a", Type: delivery.TypeText, Text: "Hello\x1b[2J", Sender: &delivery.Address{Phone: "+15550001234", LID: "1234@lid"}}
	image := laraveltest.Message{SessionID: "b", Type: delivery.TypeImage, Sender: &delivery.Address{LID: "1234@lid"}}
	g.Expect(describe(messages(hello))).To(Equal([]string{
		`Laravel ← POST /whatsapp/messages/batch  1 in one request: a has a message from +15550001234: "Hello\x1b[2J"`,
	}))
	g.Expect(describe(messages(hello, image))).To(Equal([]string{
		"Laravel ← POST /whatsapp/messages/batch  2 in one request: messages",
		`          a has a message from +15550001234: "Hello\x1b[2J"`,
		"          b has a message from 1234@lid (image)",
	}))
	var many []laraveltest.Message
	for range maxMessages + 5 {
		many = append(many, hello)
	}
	lines := describe(messages(many...))
	g.Expect(lines).To(HaveLen(1 + maxMessages + 1))
	g.Expect(lines[maxMessages+1]).To(Equal("          … and 5 more"))
}

func TestNewLaravel(t *testing.T) {
	g := NewWithT(t)
	receiver, err := newLaravel(func(...string) {})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(receiver.Close()).To(Succeed())
}

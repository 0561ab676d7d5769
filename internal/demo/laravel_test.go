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
		"Laravel ← POST /whatsapp/status/batch  1 in one request: a is active (Connected)":                                       statuses(state("a", delivery.Active, 1, 1)),
		"Laravel ← POST /whatsapp/status/batch  3 in one request: 2 active, 1 pending":                                           statuses(state("a", delivery.Active, 1, 1), state("b", delivery.Pending, 1, 1), state("c", delivery.Active, 1, 1)),
		"Laravel ← POST /qr/batch               1 in one request: a pairing code of a":                                           codes(delivery.QRItem{SessionID: "a", PairingCode: "ABCD-EFGH"}),
		"Laravel ← POST /qr/batch               1 in one request: a request for the passkey of a":                                codes(delivery.QRItem{SessionID: "a", Passkey: &delivery.Passkey{}}),
		"Laravel ← POST /qr/batch               2 in one request: codes of 2 sessions":                                           codes(delivery.QRItem{SessionID: "a", QR: "code"}, delivery.QRItem{SessionID: "b", QR: "code"}),
		"Laravel ← POST /qr/batch               1 in one request: a QR code of a  (a repeated batch)":                            repeated,
		"Laravel ← POST /whatsapp/status/batch  1 in one request: a is pending (Connected)  (1 not newer than what Laravel has)": stale,
		"Laravel ← POST /whatsapp/status/batch refused: a request without the bearer token":                                      refused,
	} {
		NewWithT(t).Expect(describe(request)).To(Equal(want))
	}
}

func TestNewLaravel(t *testing.T) {
	g := NewWithT(t)
	receiver, err := newLaravel(func(string) {})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(receiver.Close()).To(Succeed())
}

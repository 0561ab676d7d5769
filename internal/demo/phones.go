package demo

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

const (
	// scansAtOnce bounds the phones that scan or write at the same time.
	scansAtOnce = 16
	// scanTimeout bounds one scan, or one message; a client answers within milliseconds.
	scanTimeout = 20 * time.Second
)

// simulated is the part of the simulated WhatsApp that phones need.
type simulated interface {
	Scan(ctx context.Context, qr, phone string) (jid string, err error)
	EnterCode(ctx context.Context, phone, code string) (jid string, err error)
	// AnswerPasskey is what a browser gives for the request of an account's passkey.
	AnswerPasskey(phone string, request []byte) (answer []byte, err error)
	// Write sends a message of a contact.
	Write(ctx context.Context, r simulator.SendRequest) (id string, err error)
}

// contact is the phone number of the person who writes to each session.
const contact = "15550001234"

// phones scan (or type) the code of each session a while after its first code was shown. A
// contact writes to each session when it is connected for the first time.
type phones struct {
	whatsApp simulated
	// give gives the answer of a passkey to a session.
	give  func(ctx context.Context, s *v1alpha1.WhatsAppSession, answer string)
	after time.Duration
	now   func() time.Time

	ctx    context.Context //nolint:containedctx // a scan may run longer than the call that started it
	cancel context.CancelFunc
	group  errgroup.Group

	mu    sync.Mutex
	since map[string]time.Time // when the session's first code was seen
	tried map[string]string    // session → the code that was scanned last
	by    map[string]string    // session → the number of the phone that scanned it
	wrote map[string]bool      // session → the contact has written to it
}

func newPhones(whatsApp simulated, after time.Duration, give func(context.Context, *v1alpha1.WhatsAppSession, string)) *phones {
	p := &phones{
		whatsApp: whatsApp, give: give, after: after, now: time.Now,
		since: map[string]time.Time{}, tried: map[string]string{}, by: map[string]string{}, wrote: map[string]bool{},
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.group.SetLimit(scansAtOnce)
	return p
}

// scan scans the codes of the sessions that have shown codes for long enough. A code is
// scanned once: if this fails because it has just expired, the next one is scanned.
func (p *phones) scan(ctx context.Context, sessions []v1alpha1.WhatsAppSession) {
	for i := range sessions {
		s := &sessions[i]
		phone, code, link := s.Spec.Pairing.PhoneNumber, s.Status.PairingCode, p.whatsApp.EnterCode
		if s.Status.QR != nil {
			code = s.Status.QR.Code
			link = func(ctx context.Context, phone, qr string) (string, error) { return p.whatsApp.Scan(ctx, qr, phone) }
		}
		if s.Status.Passkey != nil {
			code, link = s.Status.Passkey.RequestOptions, p.answer(s)
		}
		if code == "" || ctx.Err() != nil || !p.due(id(s), code) {
			continue
		}
		started := p.group.TryGo(func() error {
			ctx, cancel := context.WithTimeout(p.ctx, scanTimeout)
			defer cancel()
			jid, err := link(ctx, phone, code) // the session's status shows the result
			if number, _, ok := strings.Cut(jid, ":"); err == nil && ok {
				p.mu.Lock()
				p.by[id(s)] = number
				p.mu.Unlock()
			}
			return nil
		})
		if !started {
			return // every phone is busy; try again at the next call
		}
		p.mu.Lock()
		p.tried[id(s)] = code
		p.mu.Unlock()
	}
}

// write makes the contact write to the sessions that are connected, once to each. A message
// that fails is sent at a later call.
func (p *phones) write(ctx context.Context, sessions []v1alpha1.WhatsAppSession) {
	for i := range sessions {
		s := &sessions[i]
		if s.Status.Phase != v1alpha1.PhaseConnected || ctx.Err() != nil || !p.writesTo(id(s)) {
			continue
		}
		r := simulator.SendRequest{Device: s.Status.JID, From: contact, Text: "Hello, is this " + s.Name + "?"}
		started := p.group.TryGo(func() error {
			ctx, cancel := context.WithTimeout(p.ctx, scanTimeout)
			defer cancel()
			if _, err := p.whatsApp.Write(ctx, r); err != nil {
				p.mu.Lock()
				delete(p.wrote, id(s))
				p.mu.Unlock()
			}
			return nil
		})
		if !started {
			p.mu.Lock()
			delete(p.wrote, id(s))
			p.mu.Unlock()
			return // every phone is busy; try again at the next call
		}
	}
}

// writesTo reports whether the contact has not written to a session yet, and records that it does.
func (p *phones) writesTo(session string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := !p.wrote[session]
	p.wrote[session] = true
	return first
}

// id names a session among those of all namespaces.
func id(s *v1alpha1.WhatsAppSession) string { return s.Namespace + "/" + s.Name }

// answer returns what asks the passkey of the phone that has scanned the session's code.
func (p *phones) answer(s *v1alpha1.WhatsAppSession) func(ctx context.Context, phone, request string) (string, error) {
	return func(ctx context.Context, _, request string) (string, error) {
		p.mu.Lock()
		number := p.by[id(s)]
		p.mu.Unlock()
		answer, err := p.whatsApp.AnswerPasskey(number, []byte(request))
		if err == nil {
			p.give(ctx, s, string(answer))
		}
		return "", err
	}
}

func (p *phones) due(session, code string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	first, seen := p.since[session]
	if !seen {
		first = p.now()
		p.since[session] = first
	}
	return p.tried[session] != code && p.now().Sub(first) >= p.after
}

// close cancels the running scans.
func (p *phones) close() error {
	p.cancel()
	if err := p.group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

package demo

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

const (
	// scansAtOnce bounds the phones that scan at the same time.
	scansAtOnce = 16
	// scanTimeout bounds one scan; a client answers within milliseconds.
	scanTimeout = 20 * time.Second
)

// scanner is the part of the simulated WhatsApp that phones need.
type scanner interface {
	Scan(ctx context.Context, qr, phone string) (jid string, err error)
	EnterCode(ctx context.Context, phone, code string) (jid string, err error)
}

// phones scan (or type) the code of each session a while after its first code was shown.
type phones struct {
	whatsApp scanner
	after    time.Duration
	now      func() time.Time

	ctx    context.Context //nolint:containedctx // a scan may run longer than the call that started it
	cancel context.CancelFunc
	group  errgroup.Group

	mu    sync.Mutex
	since map[string]time.Time // when the session's first code was seen
	tried map[string]string    // session → the code that was scanned last
}

func newPhones(whatsApp scanner, after time.Duration) *phones {
	p := &phones{whatsApp: whatsApp, after: after, now: time.Now, since: map[string]time.Time{}, tried: map[string]string{}}
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
		if code == "" || ctx.Err() != nil || !p.due(s.Name, code) {
			continue
		}
		started := p.group.TryGo(func() error {
			ctx, cancel := context.WithTimeout(p.ctx, scanTimeout)
			defer cancel()
			_, _ = link(ctx, phone, code) // the session's status shows the result
			return nil
		})
		if !started {
			return // every phone is busy; try again at the next call
		}
		p.mu.Lock()
		p.tried[s.Name] = code
		p.mu.Unlock()
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

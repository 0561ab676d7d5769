package benchenv

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

const (
	// pairBatch is how many sessions are paired at a time: a code is valid for a minute, and a
	// pairing costs a tenth of a second.
	pairBatch = 50
	// pairTimeout bounds one pairing.
	pairTimeout = 3 * time.Minute
)

// SessionName is the name of the i-th session that Pair applies.
func SessionName(i int) string { return fmt.Sprintf("bench-%05d", i) }

// Pair applies the sessions first to last-1, scans their codes, each with another phone, and
// waits until all are connected.
func (e *Environment) Pair(first, last int, scan func(ctx context.Context, code, phone string) error) error {
	Print("applying %d sessions and scanning their codes", last-first)
	for ; first < last; first += pairBatch {
		group, ctx := errgroup.WithContext(e.ctx)
		group.SetLimit(8)
		for i := first; i < min(first+pairBatch, last); i++ {
			group.Go(func() error { return e.pair(ctx, i, scan) })
		}
		if err := group.Wait(); err != nil {
			return err
		}
	}
	return nil
}

func (e *Environment) pair(ctx context.Context, i int, scan func(ctx context.Context, code, phone string) error) error {
	s := &v1alpha1.WhatsAppSession{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: SessionName(i)}}
	if err := e.Client.Create(ctx, s); err != nil {
		return fmt.Errorf("applying a session: %w", err)
	}
	scanned := ""
	return WaitUntil(ctx, "sessions of "+s.Name+" connected", pairTimeout, 100*time.Millisecond, func() (int, int, error) {
		if err := e.Client.Get(ctx, client.ObjectKeyFromObject(s), s); err != nil {
			return 0, 1, fmt.Errorf("reading a session: %w", err)
		}
		if s.Status.Phase == v1alpha1.PhaseConnected {
			return 1, 1, nil
		}
		if qr := s.Status.QR; qr != nil && qr.Code != scanned {
			scanned = qr.Code
			if err := scan(ctx, qr.Code, fmt.Sprintf("+3461%07d", i)); err != nil {
				Print("a code was refused, scanning the next one: %v", err)
			}
		}
		return 0, 1, nil
	})
}

package worker

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/time/rate"
)

// Pace is how many attempts a second, and how many at once, one egress makes.
type Pace struct {
	LoginsPerSecond, PairingsPerSecond float64
	LoginBurst, PairingBurst           int
}

// PerEgress is a Limiter with a pair of token buckets for each egress:
// WhatsApp sees addresses, not sessions.
type PerEgress struct {
	pace Pace
	mu   sync.Mutex
	by   map[string]*buckets
}

type buckets struct{ logins, pairings *rate.Limiter }

// NewPerEgress returns a limiter of the given pace.
func NewPerEgress(pace Pace) *PerEgress {
	return &PerEgress{pace: pace, by: map[string]*buckets{}}
}

// Wait implements Limiter.
func (p *PerEgress) Wait(ctx context.Context, egress string, pairing bool) error {
	b := p.of(egress)
	limiter := b.logins
	if pairing {
		limiter = b.pairings
	}
	if err := limiter.Wait(ctx); err != nil {
		return fmt.Errorf("waiting for a login token: %w", err)
	}
	return nil
}

// Free implements Limiter.
func (p *PerEgress) Free() int { return max(int(p.of("").logins.Tokens()), 0) }

func (p *PerEgress) of(egress string) *buckets {
	p.mu.Lock()
	defer p.mu.Unlock()
	if b, ok := p.by[egress]; ok {
		return b
	}
	for other, b := range p.by { // a full bucket is as good as a new one
		if b.logins.Tokens() >= float64(p.pace.LoginBurst) && b.pairings.Tokens() >= float64(p.pace.PairingBurst) {
			delete(p.by, other)
		}
	}
	b := &buckets{
		logins:   rate.NewLimiter(rate.Limit(p.pace.LoginsPerSecond), p.pace.LoginBurst),
		pairings: rate.NewLimiter(rate.Limit(p.pace.PairingsPerSecond), p.pace.PairingBurst),
	}
	p.by[egress] = b
	return b
}

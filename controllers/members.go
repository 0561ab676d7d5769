package controllers

import (
	"errors"
	"sync"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
	"github.com/whatsapp-operator/whatsapp-operator/internal/placement"
)

// members is what this process has seen of the workers' Leases. A Lease counts
// as renewed when its renewal is seen to change, by this process's own clock:
// the workers' clocks may differ.
//
// A worker that is not live gets no sessions. That does not mean that it is
// dead: what it holds stays with it.
type members struct {
	clock clock.PassiveClock
	log   logr.Logger

	mu    sync.Mutex
	known map[string]knownMember // by name of the Lease
}

type knownMember struct {
	membership.Member
	seen time.Time
	// since is when the worker was seen to become live.
	since time.Time
	// failingSince is when it was first seen to say that it cannot reach its database or
	// WhatsApp.
	failingSince time.Time
}

func (s knownMember) failing() bool { return s.StoreFailing || s.WhatsAppFailing }

func (s knownMember) expires() time.Time { return s.seen.Add(s.Duration) }

// observe records a Lease and reports whether a plan may change by it.
func (m *members) observe(l *coordinationv1.Lease) bool {
	member, err := membership.FromLease(l)
	if err != nil {
		if !errors.Is(err, membership.ErrNoHolder) {
			m.log.Error(err, "Failed to read a lease of a worker, ignoring it", "lease", l.Name)
		}
		return m.forget(l.Name)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.clock.Now()
	before, known := m.known[l.Name]
	after := knownMember{Member: member, seen: now, since: now}
	switch {
	case !known && member.RenewTime.Before(now):
		after.seen = member.RenewTime
	case known && member.RenewTime.Equal(before.RenewTime) && member.Incarnation == before.Incarnation:
		after.seen = before.seen
	}
	if known && before.Incarnation == member.Incarnation && now.Before(before.expires()) {
		after.since = before.since
	}
	if after.failing() {
		after.failingSince = now
		if before.failing() && before.Incarnation == member.Incarnation {
			after.failingSince = before.failingSince
		}
	}
	m.known[l.Name] = after
	return !known || !now.Before(before.expires()) && now.Before(after.expires()) ||
		before.Incarnation != member.Incarnation || before.Pool != member.Pool || before.Revision != member.Revision ||
		before.Capacity != member.Capacity || before.Draining != member.Draining ||
		before.StoreFailing != member.StoreFailing || before.WhatsAppFailing != member.WhatsAppFailing
}

// forget records that a Lease is gone.
func (m *members) forget(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, known := m.known[name]
	delete(m.known, name)
	return known
}

// workers are the workers as placement sees them, and when the first of the
// live ones will not be live any more; zero: there is none.
func (m *members) workers(now time.Time) (workers []placement.Worker, expires time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.known {
		live := now.Before(s.expires())
		if live && (expires.IsZero() || s.expires().Before(expires)) {
			expires = s.expires()
		}
		workers = append(workers, placement.Worker{
			Name: s.Name, Pool: s.Pool, Revision: s.Revision, Capacity: s.Capacity, Tokens: s.Tokens, Draining: s.Draining, Live: live, Since: s.since,
			Failing: s.failing(), FailingSince: s.failingSince,
		})
	}
	return workers, expires
}

// unreached is what a worker says that it cannot reach, in words; empty: nothing.
func (m *members) unreached(worker string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.known {
		switch {
		case s.Name != worker || !s.failing():
		case !s.WhatsAppFailing:
			return "its database"
		case !s.StoreFailing:
			return "WhatsApp"
		default:
			return "its database and WhatsApp"
		}
	}
	return ""
}

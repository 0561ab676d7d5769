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

// members keeps what the workers' Leases say. A Lease counts as renewed when this process
// sees its renewal time change, by this process's own clock, because the workers' clocks may
// differ.
//
// A worker that is late or not live gets no sessions. It is not dead for that reason: it
// keeps the sessions that it holds.
type members struct {
	clock clock.PassiveClock
	log   logr.Logger

	mu    sync.Mutex
	known map[string]knownMember // by the name of the Lease
}

type knownMember struct {
	membership.Member
	// seen is when the last renewal was seen.
	seen time.Time
	// since is when the worker became live.
	since time.Time
	// failingSince is when its Lease first said that it cannot reach its database or WhatsApp;
	// zero: it can.
	failingSince time.Time
}

func (m knownMember) failing() bool { return m.StoreFailing || m.WhatsAppFailing }

func (m knownMember) expires() time.Time { return m.seen.Add(m.Duration) }

// lateAfter is how long after its last renewal a live worker is late: it has missed two
// renewals in a row by then. It must be well below the time after which a worker is
// declared dead, so that of workers that die together none gets the sessions of another.
const lateAfter = 2*membership.RenewInterval + time.Second

func (m knownMember) late(now time.Time) bool { return !now.Before(m.seen.Add(lateAfter)) }

// observe records a Lease and reports whether a plan may change because of it.
func (m *members) observe(l *coordinationv1.Lease) bool {
	member, err := membership.FromLease(l)
	if err != nil {
		if !errors.Is(err, membership.ErrNoHolder) {
			m.log.Error(err, "Ignoring an invalid lease of a worker", "lease", l.Name)
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
	return !known || before.late(now) && !after.late(now) || !now.Before(before.expires()) && now.Before(after.expires()) ||
		before.Incarnation != member.Incarnation || before.Pool != member.Pool || before.Revision != member.Revision ||
		before.Capacity != member.Capacity || before.Draining != member.Draining ||
		before.StoreFailing != member.StoreFailing || before.WhatsAppFailing != member.WhatsAppFailing
}

// forget records that a Lease is gone, and reports whether it was known.
func (m *members) forget(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, known := m.known[name]
	delete(m.known, name)
	return known
}

// workers returns the workers for a placement snapshot, and when the first of the live
// workers will stop being live; zero: no worker is live.
func (m *members) workers(now time.Time) (workers []placement.Worker, expires time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, known := range m.known {
		live := now.Before(known.expires())
		if live && (expires.IsZero() || known.expires().Before(expires)) {
			expires = known.expires()
		}
		workers = append(workers, placement.Worker{
			Name: known.Name, Pool: known.Pool, Revision: known.Revision, Capacity: known.Capacity, Tokens: known.Tokens, Draining: known.Draining, Live: live, Late: live && known.late(now), Since: known.since,
			Failing: known.failing(), FailingSince: known.failingSince,
		})
	}
	return workers, expires
}

// unreachable returns, in words, what a worker cannot reach by its own report; empty: it
// reaches everything.
func (m *members) unreachable(worker string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, known := range m.known {
		switch {
		case known.Name != worker || !known.failing():
		case !known.WhatsAppFailing:
			return "its database"
		case !known.StoreFailing:
			return "WhatsApp"
		default:
			return "its database and WhatsApp"
		}
	}
	return ""
}

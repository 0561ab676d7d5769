package membership

import (
	"context"
	"errors"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
)

// incarnationOf is the incarnation that wrote a value in Redis, "incarnation/count".
func incarnationOf(value string) string {
	return value[:max(strings.LastIndexByte(value, '/'), 0)]
}

// Membership makes the process a member of the group of workers: it joins when no other
// process of its name can be alive, and then renews both heartbeats, each independently of
// the other, so that it stays a member while one of them cannot be renewed.
type Membership struct {
	Renewer
	// Keys is the second heartbeat.
	Keys Keys
	// SelfFence records each renewal.
	SelfFence *SelfFence

	// silentIncarnation is another incarnation of this name that is already known to be
	// silent: after a join that wrote only one of the heartbeats, the next attempt does not
	// wait for it again.
	silentIncarnation string
}

// Run joins and renews until ctx ends; joined is called once, after the first
// renewal of both heartbeats. If another incarnation has the same name, Run first waits
// until both heartbeats of it are silent. Run returns ErrFenced when this process may not
// hold connections any more, and an error when another incarnation has taken over the
// name.
func (m *Membership) Run(ctx context.Context, joined func(), load func() (sessions, tokens int)) error {
	m.load = load
	if err := m.join(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	m.Log.Info("Joined", "worker", m.Self.Name, "incarnation", m.Self.Incarnation)
	joined()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.SelfFence.Run(ctx, m.Clock) })
	group.Go(func() error { return m.renewPeriodically(ctx, "lease", m.renewLease) })
	group.Go(func() error { return m.renewPeriodically(ctx, "Redis", m.renewKey) })
	return group.Wait()
}

// Lost is closed when this process may not hold connections any more.
func (m *Membership) Lost() <-chan struct{} { return m.SelfFence.Lost() }

// Leave deletes both heartbeats. Run must have ended.
func (m *Membership) Leave(ctx context.Context) error {
	return errors.Join(m.Renewer.Leave(ctx), m.Keys.Remove(ctx, m.Self.Name, m.Self.Incarnation))
}

// join returns when this incarnation has written both heartbeats, or ctx ends.
func (m *Membership) join(ctx context.Context) error {
	ticker := m.Clock.NewTicker(ObserveInterval)
	defer ticker.Stop()
	detector := newFailureDetector()
	waiting := false
	for {
		err := m.tryJoin(ctx, detector)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errTaken):
			if !waiting {
				m.Log.Info("Waiting until another incarnation of this worker is silent", "worker", m.Self.Name)
			}
			waiting = true
		case ctx.Err() == nil:
			m.Log.Error(err, "Failed to join, trying again", "worker", m.Self.Name)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// tryJoin reads both heartbeats and writes them unless another incarnation renews one.
func (m *Membership) tryJoin(ctx context.Context, detector *failureDetector) error {
	name := m.Self.Name
	seen := observation{began: m.SelfFence.Sending()}
	var reading sync.WaitGroup
	var keysErr error
	reading.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		var all map[string]string
		if seen.run, all, keysErr = m.Keys.Read(ctx); keysErr == nil {
			seen.keys = map[string]string{}
			if value, found := all[name]; found {
				seen.keys[name] = value
			}
		}
	})
	lease, leaseErr := m.get(ctx)
	reading.Wait()
	seen.ended = m.SelfFence.Sending()
	foreignLease := false
	if leaseErr == nil {
		seen.leases = map[string]observedLease{}
		if lease != nil {
			foreignLease = !m.isMine(lease)
			seen.leases[name] = observedLease{version: lease.ResourceVersion}
		}
	}
	detector.observe(seen)
	if err := errors.Join(leaseErr, keysErr); err != nil {
		return err
	}
	replacing := ""
	if value, found := seen.keys[name]; found && incarnationOf(value) != m.Self.Incarnation {
		replacing = incarnationOf(value)
	}
	if (foreignLease || replacing != "" && replacing != m.silentIncarnation) && !detector.silent(name) {
		return errTaken
	}
	m.silentIncarnation = replacing
	m.lease = lease
	sent := m.SelfFence.Sending()
	if err := m.write(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	if err := m.Keys.Renew(ctx, name, m.Self.Incarnation, replacing); err != nil {
		return err
	}
	m.SelfFence.Renewed(sent)
	return nil
}

// renewPeriodically renews one heartbeat until ctx ends or another incarnation has taken
// over the name.
func (m *Membership) renewPeriodically(ctx context.Context, what string, renew func(context.Context) error) error {
	ticker := m.Clock.NewTicker(RenewInterval)
	defer ticker.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
		sent := m.SelfFence.Sending()
		err := renew(ctx)
		switch {
		case err == nil:
			m.SelfFence.Renewed(sent)
			if failing {
				m.Log.Info("Renewed a heartbeat again", "heartbeat", what, "worker", m.Self.Name)
			}
			failing = false
		case errors.Is(err, errTaken):
			return err
		case ctx.Err() == nil && !failing:
			m.Log.Error(err, "Failed to renew a heartbeat, trying again", "heartbeat", what, "worker", m.Self.Name)
			failing = true
		}
	}
}

func (m *Membership) renewLease(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	return m.renew(ctx)
}

func (m *Membership) renewKey(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	return m.Keys.Renew(ctx, m.Self.Name, m.Self.Incarnation, "")
}

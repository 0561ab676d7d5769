package membership

import (
	"context"
	"errors"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
)

// incarnationOf is the part of a value in Redis, "incarnation/count", that
// names who wrote it.
func incarnationOf(value string) string {
	return value[:max(strings.LastIndexByte(value, '/'), 0)]
}

// Membership is a worker's place among the workers: it joins when nobody else
// of its name can be alive, and then renews both heartbeats independently of
// each other, so that the loss of one of them changes nothing.
type Membership struct {
	Renewer
	// Keys is the second heartbeat.
	Keys Keys
	// Guard is told of each renewal.
	Guard *Guard

	// outlived is an incarnation whose silence was waited for: a join that got only half
	// of the name does not wait for it again.
	outlived string
}

// Run joins and renews until ctx ends; joined is called once, after the first
// renewal of both heartbeats. Another incarnation of the same name is waited for
// until both of its heartbeats are silent. Run returns ErrFenced when the right
// to hold connections has ended, and an error when another incarnation has
// taken the name.
func (m *Membership) Run(ctx context.Context, joined func(), load func() (sessions, tokens int)) error {
	m.load = load
	if err := m.join(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	m.Log.Info("Joined", "worker", m.Self.Name, "incarnation", m.Self.Incarnation)
	joined()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.Guard.Run(ctx, m.Clock) })
	group.Go(func() error { return m.every(ctx, "lease", m.renewLease) })
	group.Go(func() error { return m.every(ctx, "Redis", m.renewKey) })
	return group.Wait()
}

// Lost is closed when this process may hold no connection any more.
func (m *Membership) Lost() <-chan struct{} { return m.Guard.Lost() }

// Leave takes both heartbeats away. Run must have ended.
func (m *Membership) Leave(ctx context.Context) error {
	return errors.Join(m.Renewer.Leave(ctx), m.Keys.Remove(ctx, m.Self.Name, m.Self.Incarnation))
}

// join returns when both heartbeats are this incarnation's, or ctx ends.
func (m *Membership) join(ctx context.Context) error {
	ticker := m.Clock.NewTicker(LookInterval)
	defer ticker.Stop()
	watch := newWatch()
	waiting := false
	for {
		err := m.tryJoin(ctx, watch)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errTaken):
			if !waiting {
				m.Log.Info("Waiting for another incarnation of this worker to fall silent", "worker", m.Self.Name)
			}
			waiting = true
		case ctx.Err() == nil:
			m.Log.Error(err, "The worker could not join; it is tried again", "worker", m.Self.Name)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// tryJoin looks at both heartbeats and writes them if nobody else's are alive.
func (m *Membership) tryJoin(ctx context.Context, watch *watch) error {
	name := m.Self.Name
	l := look{began: m.Guard.Sending()}
	var reading sync.WaitGroup
	var keysErr error
	reading.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, lookTimeout)
		defer cancel()
		var all map[string]string
		if l.run, all, keysErr = m.Keys.Read(ctx); keysErr == nil {
			l.keys = map[string]string{}
			if value, found := all[name]; found {
				l.keys[name] = value
			}
		}
	})
	lease, leaseErr := m.get(ctx)
	reading.Wait()
	l.ended = m.Guard.Sending()
	foreignLease := false
	if leaseErr == nil {
		l.leases = map[string]leaseSight{}
		if lease != nil {
			foreignLease = !m.isMine(lease)
			l.leases[name] = leaseSight{version: lease.ResourceVersion}
		}
	}
	watch.take(l)
	if err := errors.Join(leaseErr, keysErr); err != nil {
		return err
	}
	replacing := ""
	if value, found := l.keys[name]; found && incarnationOf(value) != m.Self.Incarnation {
		replacing = incarnationOf(value)
	}
	if (foreignLease || replacing != "" && replacing != m.outlived) && !watch.silent(name) {
		return errTaken
	}
	m.outlived = replacing
	m.lease = lease
	sent := m.Guard.Sending()
	if err := m.write(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	if err := m.Keys.Raise(ctx, name, m.Self.Incarnation, replacing); err != nil {
		return err
	}
	m.Guard.Renewed(sent)
	return nil
}

// every renews one heartbeat until ctx ends or the name is another's.
func (m *Membership) every(ctx context.Context, what string, renew func(context.Context) error) error {
	ticker := m.Clock.NewTicker(RenewInterval)
	defer ticker.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
		sent := m.Guard.Sending()
		err := renew(ctx)
		switch {
		case err == nil:
			m.Guard.Renewed(sent)
			if failing {
				m.Log.Info("A heartbeat is renewed again", "heartbeat", what, "worker", m.Self.Name)
			}
			failing = false
		case errors.Is(err, errTaken):
			return err
		case ctx.Err() == nil && !failing:
			m.Log.Error(err, "A heartbeat could not be renewed; it is tried again", "heartbeat", what, "worker", m.Self.Name)
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
	return m.Keys.Raise(ctx, m.Self.Name, m.Self.Incarnation, "")
}

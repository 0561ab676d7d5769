package worker

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/utils/clock"

	"github.com/whatsapp-operator/whatsapp-operator/internal/session"
)

const (
	// inboxInterval is how often something is written to the database while messages are refused.
	inboxInterval = time.Second
	// roomInterval is how often the backlogs are read while too many messages wait: there is a
	// question for each session.
	roomInterval = 5 * inboxInterval
	// inboxTimeout bounds one question to the database.
	inboxTimeout = 5 * time.Second
)

// inboxWatch finds out when sessions can be connected again that were disconnected because of
// their messages. It asks for the whole worker: a thousand sessions must not each try.
type inboxWatch struct {
	inbox  Inbox
	health *Health
	clock  clock.WithTicker
	log    logr.Logger

	mu      sync.Mutex
	waiting map[*supervisor]awaited
	// begun has a value when the first session waits.
	begun chan struct{}
}

// awaited is what a session awaits.
type awaited struct{ reason, sessionID, namespace, bound string }

func newInboxWatch(inbox Inbox, health *Health, clk clock.WithTicker, log logr.Logger) *inboxWatch {
	return &inboxWatch{inbox: inbox, health: health, clock: clk, log: log, waiting: map[*supervisor]awaited{}, begun: make(chan struct{}, 1)}
}

// await makes the session get InboxReady when the cause is over. It may be called again.
func (w *inboxWatch) await(s *supervisor, a awaited) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting[s] = a
	select {
	case w.begun <- struct{}{}:
	default:
	}
}

// forget removes a session that has left the worker, or awaits nothing any more.
func (w *inboxWatch) forget(s *supervisor) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.waiting, s)
}

// all returns the sessions that wait.
func (w *inboxWatch) all() map[*supervisor]awaited {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make(map[*supervisor]awaited, len(w.waiting))
	for s, a := range w.waiting {
		all[s] = a
	}
	return all
}

// run asks the database, while sessions wait, until ctx ends.
func (w *inboxWatch) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.begun:
		}
		w.watch(ctx)
	}
}

// watch returns when no session waits any more, or ctx has ended.
func (w *inboxWatch) watch(ctx context.Context) {
	ticker := w.clock.NewTicker(inboxInterval)
	defer ticker.Stop()
	failed := false
	var nextRoom time.Time
	for {
		all := w.all()
		if len(all) == 0 {
			return
		}
		stored := false
		if asked, err := w.probe(ctx, all); asked {
			stored = err == nil
			switch {
			case ctx.Err() != nil:
				return
			case !stored && !failed:
				w.log.Error(err, "Failed to write to the database; sessions whose messages or keys it did not take stay disconnected until it takes a write")
			case stored && failed:
				w.log.Info("Wrote to the database again, connecting the sessions that waited for it")
			}
			failed = !stored
		}
		now := w.clock.Now()
		room := !now.Before(nextRoom)
		if room {
			nextRoom = now.Add(roomInterval)
		}
		for s, a := range all {
			switch {
			case ctx.Err() != nil:
				return
			case a.reason == session.EndInboxUnavailable && stored, a.reason == session.EndBacklog && room && w.hasRoom(ctx, a):
				w.ready(s, a)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C():
		}
	}
}

// probe writes to the database if messages of a session were refused. Its result counts as an
// attempt of each of these sessions: they make no other, and a worker that cannot reach its
// database must say so, or they would wait here while another worker can reach it.
func (w *inboxWatch) probe(ctx context.Context, all map[*supervisor]awaited) (asked bool, err error) {
	for s, a := range all {
		if a.reason != session.EndInboxUnavailable {
			continue
		}
		if !asked {
			asked, err = true, w.ask(ctx, w.inbox.Probe)
			if err != nil {
				err = fmt.Errorf("%w (%w)", ErrStoreUnreachable, err)
			}
		}
		if ctx.Err() == nil {
			w.health.recordTake(s.uid, err)
		}
	}
	return asked, err
}

// ready informs a session, unless it awaits something else by now.
func (w *inboxWatch) ready(s *supervisor, a awaited) {
	w.mu.Lock()
	still := w.waiting[s] == a
	if still {
		delete(w.waiting, s)
	}
	w.mu.Unlock()
	if still {
		s.post(func() { s.step(session.InboxReady{Reason: a.reason}) })
	}
}

func (w *inboxWatch) hasRoom(ctx context.Context, a awaited) (room bool) {
	err := w.ask(ctx, func(ctx context.Context) (err error) {
		room, err = w.inbox.HasRoom(ctx, a.sessionID, a.namespace, a.bound)
		return err
	})
	if err != nil && ctx.Err() == nil {
		w.log.V(1).Info("Failed to read how many messages wait, trying again", "reason", err.Error())
	}
	return err == nil && room
}

func (w *inboxWatch) ask(ctx context.Context, question func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, inboxTimeout)
	defer cancel()
	return question(ctx)
}

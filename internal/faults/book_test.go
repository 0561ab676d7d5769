//go:build faults

package faults

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

// book is what the resources went through, as a watch sees it. It holds them
// to two rules: an epoch never falls, and a session changes its worker only
// together with its epoch.
type book struct {
	w *world

	mu       sync.Mutex
	sessions map[types.UID]*v1alpha1.WhatsAppSession
	places   map[types.UID]string // the worker where it was placed last
	moves    map[string]int       // by name
	watchers []chan code
}

// code is one that a session shows.
type code struct{ name, code string }

func newBook(w *world) *book {
	b := &book{w: w, sessions: map[types.UID]*v1alpha1.WhatsAppSession{}, places: map[types.UID]string{}, moves: map[string]int{}}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		wait.UntilWithContext(ctx, b.follow, poll) // follow returns when the watch breaks
	}()
	w.atEnd(func() { cancel(); <-ended })
	return b
}

// follow lists and watches. An informer would wait half a minute after an
// outage, and miss what happens meanwhile.
func (b *book) follow(ctx context.Context) {
	list := &v1alpha1.WhatsAppSessionList{}
	if b.w.client.List(ctx, list, client.InNamespace(b.w.namespace)) != nil {
		return
	}
	for i := range list.Items {
		b.see(&list.Items[i])
	}
	watcher, err := b.w.client.Watch(ctx, &v1alpha1.WhatsAppSessionList{}, client.InNamespace(b.w.namespace),
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: list.ResourceVersion}})
	if err != nil {
		return
	}
	defer watcher.Stop()
	for e := range watcher.ResultChan() {
		s, ok := e.Object.(*v1alpha1.WhatsAppSession)
		switch {
		case !ok:
			return
		case e.Type == watch.Deleted:
			b.forget(s)
		default:
			b.see(s)
		}
	}
}

func (b *book) see(s *v1alpha1.WhatsAppSession) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if last, known := b.sessions[s.UID]; known {
		was, is := last.Status, s.Status
		if is.Epoch < was.Epoch {
			b.w.complain("the epoch of %s fell from %d to %d", s.Name, was.Epoch, is.Epoch)
		}
		if is.Worker != was.Worker && is.Epoch == was.Epoch {
			b.w.complain("%s went from %q to %q within epoch %d", s.Name, was.Worker, is.Worker, is.Epoch)
		}
	}
	if at := s.Status.Worker; at != "" {
		if before := b.places[s.UID]; before != "" && before != at {
			b.moves[s.Name]++
		}
		b.places[s.UID] = at
	}
	b.sessions[s.UID] = s
	if qr := s.Status.QR; qr != nil {
		for _, w := range b.watchers {
			select {
			case w <- code{s.Name, qr.Code}:
			default: // nobody scans any more
			}
		}
	}
}

func (b *book) forget(s *v1alpha1.WhatsAppSession) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.sessions, s.UID)
	delete(b.places, s.UID)
}

// codes are the codes that sessions show from now on.
func (b *book) codes() <-chan code {
	b.mu.Lock()
	defer b.mu.Unlock()
	w := make(chan code, 10_000)
	b.watchers = append(b.watchers, w)
	return w
}

// all are the sessions as they were seen last.
func (b *book) all() []*v1alpha1.WhatsAppSession {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]*v1alpha1.WhatsAppSession, 0, len(b.sessions))
	for _, s := range b.sessions {
		all = append(all, s)
	}
	return all
}

// takeMoves returns how often each session was moved since the last call.
func (b *book) takeMoves() map[string]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	moves := b.moves
	b.moves = map[string]int{}
	return moves
}

// absences are how long each device was away from the simulator.
type absences struct {
	w *world

	mu    sync.Mutex
	since map[string]time.Time
	past  []absence
	last  time.Time     // the last look
	stall time.Duration // the longest pause between two looks
}

type absence struct {
	jid  string
	took time.Duration
}

// look is how often the simulator is asked; no absence is known better than that.
const look = 50 * time.Millisecond

func newAbsences(w *world) *absences {
	a := &absences{w: w, since: map[string]time.Time{}}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(look)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				a.look()
			}
		}
	}()
	w.atEnd(func() { close(stop); <-stopped })
	return a
}

func (a *absences) look() {
	devices := a.w.simulator.Devices()
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.last.IsZero() {
		a.stall = max(a.stall, now.Sub(a.last))
	}
	a.last = now
	for _, d := range devices {
		since, away := a.since[d.JID]
		switch {
		case !d.Connected && !away:
			a.since[d.JID] = now
		case d.Connected && away:
			a.past = append(a.past, absence{d.JID, now.Sub(since)})
			delete(a.since, d.JID)
		}
	}
}

// take returns the absences that ended since the last call, the shortest first,
// and for how long this process itself got no turn to look.
func (a *absences) take() (past []time.Duration, stall time.Duration) {
	a.look()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.past {
		past = append(past, p.took)
	}
	stall = a.stall
	a.past, a.stall = nil, 0
	slices.Sort(past)
	return past, stall
}

func percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, len(sorted)*p/100)].Round(10 * time.Millisecond)
}

func describe(sorted []time.Duration) string {
	if len(sorted) == 0 {
		return "nobody was away"
	}
	return fmt.Sprintf("%d absences, p50 %s, p99 %s, max %s", len(sorted), percentile(sorted, 50), percentile(sorted, 99), percentile(sorted, 100))
}

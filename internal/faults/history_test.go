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

// sessionHistory watches the resources. It checks two rules: an epoch never falls, and a
// session changes its worker only together with its epoch.
type sessionHistory struct {
	w *environment

	mu       sync.Mutex
	sessions map[types.UID]*v1alpha1.WhatsAppSession
	places   map[types.UID]string // the last worker of each
	moves    map[string]int       // by name
	changes  map[string][]string  // by name: the last changes of owner and phase, for a person
	watchers []chan code
}

// code is a QR code that a session shows.
type code struct{ name, code string }

func newSessionHistory(w *environment) *sessionHistory {
	h := &sessionHistory{w: w, sessions: map[types.UID]*v1alpha1.WhatsAppSession{}, places: map[types.UID]string{}, moves: map[string]int{}, changes: map[string][]string{}}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		wait.UntilWithContext(ctx, h.follow, poll) // follow returns when the watch breaks
	}()
	w.atEnd(func() { cancel(); <-ended })
	return h
}

// follow lists and watches the resources. An informer would wait half a minute after an
// outage, and miss the changes in that time.
func (h *sessionHistory) follow(ctx context.Context) {
	list := &v1alpha1.WhatsAppSessionList{}
	if h.w.client.List(ctx, list, client.InNamespace(h.w.namespace)) != nil {
		return
	}
	listed := map[types.UID]bool{}
	for i := range list.Items {
		listed[list.Items[i].UID] = true
		h.store(&list.Items[i])
	}
	for _, s := range h.all() {
		if !listed[s.UID] { // it was deleted while there was no watch
			h.remove(s)
		}
	}
	watcher, err := h.w.client.Watch(ctx, &v1alpha1.WhatsAppSessionList{}, client.InNamespace(h.w.namespace),
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
			h.remove(s)
		default:
			h.store(s)
		}
	}
}

func (h *sessionHistory) store(s *v1alpha1.WhatsAppSession) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if last, known := h.sessions[s.UID]; known {
		was, is := last.Status, s.Status
		if is.Epoch < was.Epoch {
			h.w.reportViolation("the epoch of %s fell from %d to %d", s.Name, was.Epoch, is.Epoch)
		}
		if is.Worker != was.Worker && is.Epoch == was.Epoch {
			h.w.reportViolation("%s went from %q to %q within epoch %d", s.Name, was.Worker, is.Worker, is.Epoch)
		}
	}
	if at := s.Status.Worker; at != "" {
		if before := h.places[s.UID]; before != "" && before != at {
			h.moves[s.Name]++
		}
		h.places[s.UID] = at
	}
	if last := h.sessions[s.UID]; last == nil || changed(last, s) {
		h.changes[s.Name] = append(h.changes[s.Name], fmt.Sprintf("%s %s on %q, held by %q, epoch %d: %s",
			time.Now().UTC().Format("15:04:05.000"), s.Status.Phase, s.Status.Worker, s.Status.HeldBy, s.Status.Epoch, describeConditions(s)))
		h.changes[s.Name] = h.changes[s.Name][max(0, len(h.changes[s.Name])-maxChanges):]
	}
	h.sessions[s.UID] = s
	if qr := s.Status.QR; qr != nil {
		for _, w := range h.watchers {
			select {
			case w <- code{s.Name, qr.Code}:
			default: // no code is needed any more
			}
		}
	}
}

// maxChanges is how many changes of a session are kept.
const maxChanges = 12

// changed reports whether a session has another owner or phase than before.
func changed(before, after *v1alpha1.WhatsAppSession) bool {
	was, is := before.Status, after.Status
	return was.Phase != is.Phase || was.Worker != is.Worker || was.HeldBy != is.HeldBy || was.Epoch != is.Epoch
}

func (h *sessionHistory) remove(s *v1alpha1.WhatsAppSession) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.sessions, s.UID)
	delete(h.places, s.UID)
}

// codes returns a channel of the codes that sessions show from now on.
func (h *sessionHistory) codes() <-chan code {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := make(chan code, 10_000)
	h.watchers = append(h.watchers, w)
	return w
}

// all returns the newest known state of each session.
func (h *sessionHistory) all() []*v1alpha1.WhatsAppSession {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]*v1alpha1.WhatsAppSession, 0, len(h.sessions))
	for _, s := range h.sessions {
		all = append(all, s)
	}
	return all
}

// takeMoves returns how often each session was moved since the last call.
func (h *sessionHistory) takeMoves() map[string]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	moves := h.moves
	h.moves = map[string]int{}
	return moves
}

// absences records how long each device was not connected to the simulator.
type absences struct {
	w *environment

	mu    sync.Mutex
	since map[string]time.Time
	past  []absence
	last  time.Time     // the last poll
	stall time.Duration // the longest pause between two polls
}

type absence struct {
	jid  string
	took time.Duration
}

// absencePoll is how often the devices are polled: the precision of every absence.
const absencePoll = 50 * time.Millisecond

func newAbsences(w *environment) *absences {
	a := &absences{w: w, since: map[string]time.Time{}}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(absencePoll)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				a.poll()
			}
		}
	}()
	w.atEnd(func() { close(stop); <-stopped })
	return a
}

func (a *absences) poll() {
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
		case d.Logins == 0: // it is being paired
		case !d.Connected && !away:
			a.since[d.JID] = now
		case d.Connected && away:
			a.past = append(a.past, absence{d.JID, now.Sub(since)})
			delete(a.since, d.JID)
		}
	}
}

// take returns the absences that ended since the last call, the shortest first,
// and the longest time in which this process did not run and could not poll.
func (a *absences) take() (past []time.Duration, stall time.Duration) {
	a.poll()
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
		return "no absences"
	}
	return fmt.Sprintf("%d absences, p50 %s, p99 %s, max %s", len(sorted), percentile(sorted, 50), percentile(sorted, 99), percentile(sorted, 100))
}

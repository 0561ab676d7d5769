// Package liveness finds the loops of a process that are stuck, for its liveness probe. A loop
// is stuck when one of its runs makes no progress for a long time. A loop that waits for
// something to do is not, and neither is one whose requests fail: their time-outs end them.
package liveness

import (
	"fmt"
	"sync"
	"time"

	"k8s.io/utils/clock"
)

// Loops are the loops of a process. A nil *Loops makes loops that are not watched.
type Loops struct {
	clock clock.PassiveClock

	mu  sync.Mutex
	all []*Loop
}

// New returns no loops yet.
func New(clk clock.PassiveClock) *Loops { return &Loops{clock: clk} }

// Loop is one of them. A nil *Loop is not watched.
type Loop struct {
	name    string
	timeout time.Duration
	clock   clock.PassiveClock

	mu   sync.Mutex
	runs map[*Run]time.Time // when each run made its last progress
}

// Run is one run of a loop, from Begin to End. A nil *Run is not watched.
type Run struct{ loop *Loop }

// Watch adds a loop. It is stuck when one of its runs makes no progress for timeout, which must
// be longer than the longest time-out of one of its steps.
func (l *Loops) Watch(name string, timeout time.Duration) *Loop {
	if l == nil {
		return nil
	}
	loop := &Loop{name: name, timeout: timeout, clock: l.clock, runs: map[*Run]time.Time{}}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, loop)
	return loop
}

// Check returns an error that names a loop that is stuck.
func (l *Loops) Check() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, loop := range l.all {
		if err := loop.check(); err != nil {
			return err
		}
	}
	return nil
}

func (l *Loop) check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, last := range l.runs {
		if since := l.clock.Since(last); since > l.timeout {
			return fmt.Errorf("the loop %q has made no progress for %s", l.name, since.Round(time.Second))
		}
	}
	return nil
}

// Begin begins a run. Several runs of a loop may be in progress.
func (l *Loop) Begin() *Run {
	if l == nil {
		return nil
	}
	r := &Run{loop: l}
	r.Progress()
	return r
}

// Progress says that the run makes progress. It may be called from any goroutine until End.
func (r *Run) Progress() {
	if r == nil {
		return
	}
	r.loop.mu.Lock()
	defer r.loop.mu.Unlock()
	r.loop.runs[r] = r.loop.clock.Now()
}

// End ends the run.
func (r *Run) End() {
	if r == nil {
		return
	}
	r.loop.mu.Lock()
	defer r.loop.mu.Unlock()
	delete(r.loop.runs, r)
}

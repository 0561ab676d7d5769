package session

import "time"

// Whatever is fed to a machine, no step is repeated in a hot loop: the first
// few starts of a step are free, further ones wait longer and longer, until the
// session has had a stable minute or a person asks for a new beginning. The
// pauses after failures (backOff) come on top of this; they depend on every
// input's being understood, this does not.
const (
	paceFree  = 3
	paceFirst = time.Second
	paceMost  = 30 * time.Second
	// paceForgets is how long a step must not have been started to be free again.
	paceForgets = 10 * time.Minute
)

// claim is a step that is no operation: the write by which the session is claimed.
const claim Operation = "claim"

// Pace counts how often the steps of a session are started. The zero value is
// ready for use. It outlives the machine: a session that comes and goes is paced, too.
type Pace struct{ steps map[Operation]pacedStep }

type pacedStep struct {
	starts    int
	last      time.Time
	notBefore time.Time
}

// from is the earliest time at which the step may be started.
func (p *Pace) from(op Operation) time.Time { return p.steps[op].notBefore }

// allows reports whether the step may be started now.
func (p *Pace) allows(op Operation, now time.Time) bool { return !now.Before(p.from(op)) }

// start counts the start of a step.
func (p *Pace) start(op Operation, now time.Time) {
	s := p.steps[op]
	if now.Sub(s.last) > paceForgets {
		s = pacedStep{}
	}
	s.starts++
	s.last, s.notBefore = now, now
	if over := s.starts - paceFree; over >= 0 {
		s.notBefore = now.Add(min(paceFirst<<min(over, 10), paceMost))
	}
	if p.steps == nil {
		p.steps = map[Operation]pacedStep{}
	}
	p.steps[op] = s
}

// reset makes all steps free again.
func (p *Pace) reset() { p.steps = nil }

// Forgotten reports whether nothing is left to remember.
func (p *Pace) Forgotten(now time.Time) bool {
	for _, s := range p.steps {
		if now.Sub(s.last) <= paceForgets {
			return false
		}
	}
	return true
}

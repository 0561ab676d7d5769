package session

import "time"

// No sequence of inputs makes a machine repeat a step in a hot loop. The first paceFree
// starts of a step are immediate. Before each further one there is a pause, from
// paceFirst up to paceMax, until the session is stable or a person restarts it. This
// comes in addition to the pauses after failures (backOff), which need every failure to
// be recognized; the pace does not.
const (
	paceFree  = 3
	paceFirst = time.Second
	paceMax   = 30 * time.Second
	// paceReset is after what time without a start the starts of a step are immediate again.
	paceReset = 10 * time.Minute
)

// claim is a step that is not an operation: the write that claims the session.
const claim Operation = "claim"

// Pace counts how often the steps of a session are started. The zero value is ready for
// use. The worker keeps it after the machine has ended, so a session that leaves and
// returns is paced, too.
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
	if now.Sub(s.last) > paceReset {
		s = pacedStep{}
	}
	s.starts++
	s.last, s.notBefore = now, now
	if over := s.starts - paceFree; over >= 0 {
		s.notBefore = now.Add(min(paceFirst<<min(over, 10), paceMax))
	}
	if p.steps == nil {
		p.steps = map[Operation]pacedStep{}
	}
	p.steps[op] = s
}

// reset makes the starts of all steps immediate again.
func (p *Pace) reset() { p.steps = nil }

// Expired reports whether the pace has no effect any more.
func (p *Pace) Expired(now time.Time) bool {
	for _, s := range p.steps {
		if now.Sub(s.last) <= paceReset {
			return false
		}
	}
	return true
}

//go:build faults

package faults

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/process"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

const (
	// restartAfter is how soon a process that has ended is started again.
	restartAfter = time.Second
	// grace is how long a pod that is deleted may take to end.
	grace = 60 * time.Second
	// drainTimeout is the workers' flag --drain-timeout.
	drainTimeout = 50 * time.Second
)

// service is a server that pods talk to.
type service string

const (
	toAPI      service = "API server"
	toRedis    service = "Redis"
	toStore    service = "PostgreSQL"
	toWhatsApp service = "WhatsApp"
)

// pod is a process with its own name, state folder and TCP proxies, and the
// kubelet that starts it again whenever it ends, until the pod is deleted.
type pod struct {
	w       *environment
	name    string
	args    []string
	proxies map[service]*testenv.TCPProxy
	log     *os.File
	deleted chan struct{}
	done    chan struct{} // the kubelet has ended: no process runs and none will

	mu      sync.Mutex
	process *process.Process // the present one, or the last
	ended   chan struct{}    // closed when the end of the present process has been recorded
	again   time.Duration    // the pause before the next start
	paused  bool
	going   bool // it is being deleted
	// leads is when the pod logged that it became the leader; zero: it has not.
	leads time.Time
	rest  []byte // the beginning of a line that is not complete yet
}

// newPod starts a pod. The proxies are made first, so that the arguments can name them.
func (w *environment) newPod(name string, upstream map[service]string, args func(p *pod) []string) *pod {
	log, err := os.Create(filepath.Join(w.dir, name+".log"))
	w.must(err)
	p := &pod{
		w: w, name: name, log: log, proxies: map[service]*testenv.TCPProxy{},
		deleted: make(chan struct{}), done: make(chan struct{}), again: restartAfter,
	}
	for to, address := range upstream {
		p.proxies[to] = testenv.NewTCPProxy(w.root, address)
	}
	p.args = args(p)
	w.mu.Lock()
	w.pods = append(w.pods, p)
	w.mu.Unlock()
	started := make(chan struct{})
	w.kubelets.Go(func() { p.runKubelet(started) })
	<-started
	return p
}

// runKubelet starts the process, and starts it again when it ends, until the pod is deleted.
func (p *pod) runKubelet(started chan<- struct{}) {
	defer close(p.done)
	for {
		run, ended := p.start()
		if started != nil {
			close(started)
			started = nil
		}
		if run == nil {
			return
		}
		<-run.Done()
		p.mu.Lock()
		state, after := run.State(), time.Since(run.Started).Round(10*time.Millisecond)
		pause := time.NewTimer(p.again)
		p.again, p.paused, p.leads = restartAfter, false, time.Time{}
		going := p.going
		p.mu.Unlock()
		close(ended)
		p.w.note("%s ended after %s: %s", p.name, after, state)
		if state.ExitCode() == 2 {
			p.w.reportViolation("%s panicked; see its log", p.name)
		}
		if !going {
			select {
			case <-p.deleted:
			case <-pause.C:
				continue
			}
		}
		pause.Stop()
		return
	}
}

func (p *pod) start() (*process.Process, chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.going {
		return nil, nil
	}
	run, err := testenv.StartProgram(p.name, p, p.args...)
	if err != nil {
		p.w.reportViolation("%v", err)
		return nil, nil
	}
	p.process, p.ended = run, make(chan struct{})
	return run, p.ended
}

// Write takes the process's output.
func (p *pod) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = append(p.rest, b...)
	if end := bytes.LastIndexByte(p.rest, '\n'); end >= 0 {
		if bytes.Contains(p.rest[:end], []byte("uccessfully acquired lease")) {
			p.leads = time.Now()
		}
		p.rest = append([]byte(nil), p.rest[end+1:]...)
	}
	return p.log.Write(b)
}

// lives reports whether a process of the pod exists; it may be paused.
func (p *pod) lives() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended == nil || p.going {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

func (p *pod) leadsSince() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.leads
}

func (p *pod) signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process != nil {
		p.process.Signal(s)
	}
	p.paused = s == syscall.SIGSTOP
}

// pause stops the process with SIGSTOP, as on a frozen machine.
func (p *pod) pause() { p.signal(syscall.SIGSTOP) }

// wake lets it continue.
func (p *pod) wake() { p.signal(syscall.SIGCONT) }

// kill ends the process as a crash does; the kubelet starts it again after a while.
func (p *pod) kill(again time.Duration) {
	p.mu.Lock()
	p.again = again
	ended := p.ended
	p.mu.Unlock()
	p.signal(syscall.SIGKILL)
	<-ended
}

// remove takes the pod away as a lost node does: killed, and never started again.
func (p *pod) remove() {
	p.markDeleted()
	p.signal(syscall.SIGKILL)
	<-p.done
}

// vanish is remove without closing the connections: for the servers they stay
// open, and nothing answers on them.
func (p *pod) vanish() {
	for _, l := range p.proxies {
		l.Hang()
	}
	p.remove()
}

// present returns a channel that is closed when the present process has ended.
func (p *pod) present() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended
}

// shutDown deletes the pod: it asks the process to end, and waits for that, for at
// most the grace period.
func (p *pod) shutDown() {
	p.markDeleted()
	p.signal(syscall.SIGTERM)
	p.signal(syscall.SIGCONT)
	late := time.NewTimer(grace)
	defer late.Stop()
	select {
	case <-p.done:
	case <-late.C:
		p.w.reportViolation("%s did not end within its grace of %s", p.name, grace)
		p.signal(syscall.SIGKILL)
		<-p.done
	}
}

func (p *pod) markDeleted() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.going {
		p.going = true
		close(p.deleted)
	}
}

func (p *pod) restore() {
	for _, l := range p.proxies {
		l.Restore()
	}
	p.wake()
}

// output returns the end of what the pod's processes have printed.
func (p *pod) output(most int) string {
	text, err := os.ReadFile(p.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-most):])
}

// races returns the data races in the pod's output, without those of the library.
func (p *pod) races() []string {
	races, _ := testenv.DataRaces(p.output(1 << 30))
	return races
}

func (p *pod) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	state := ""
	if p.paused {
		state += " paused"
	}
	if p.going {
		state += " deleted"
	}
	if !p.leads.IsZero() {
		state += " leads"
	}
	for to, l := range p.proxies {
		if !l.Open() {
			state += fmt.Sprintf(" without %s", to)
		}
	}
	return p.name + state
}

func (p *pod) isGoing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.going
}

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
	// restartAfter is the delay before an ended process is restarted.
	restartAfter = time.Second
	// grace is how long a deleted pod may take to end.
	grace = 60 * time.Second
	// drainTimeout is the workers' flag --drain-timeout.
	drainTimeout = 50 * time.Second
)

// service is a server that pods connect to.
type service string

const (
	toAPI      service = "API server"
	toRedis    service = "Redis"
	toStore    service = "PostgreSQL"
	toWhatsApp service = "WhatsApp"
	toLaravel  service = "Laravel"
)

// pod is a process with its own name, state folder and TCP proxies, and a kubelet that
// restarts it whenever it ends, until the pod is deleted.
type pod struct {
	w       *environment
	name    string
	args    []string
	proxies map[service]*testenv.TCPProxy
	log     *os.File
	deleted chan struct{}
	done    chan struct{} // closed when the kubelet has ended: no process runs or will be started

	mu             sync.Mutex
	process        *process.Process // the present one, or the last
	ended          chan struct{}    // closed when the end of the present process has been recorded
	restartDelay   time.Duration    // the pause before the next start
	paused         bool
	isBeingDeleted bool // it is being deleted
	// leads is when the pod logged that it became the leader; zero: it is not the leader.
	leads time.Time
	rest  []byte // the beginning of a line that is not complete yet
}

// newPod starts a pod. The proxies are made first, because the arguments contain their addresses.
func (w *environment) newPod(name string, upstream map[service]string, args func(p *pod) []string) *pod {
	log, err := os.Create(filepath.Join(w.dir, name+".log"))
	w.must(err)
	p := &pod{
		w: w, name: name, log: log, proxies: map[service]*testenv.TCPProxy{},
		deleted: make(chan struct{}), done: make(chan struct{}), restartDelay: restartAfter,
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

// runKubelet starts the process, and restarts it when it ends, until the pod is deleted.
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
		pause := time.NewTimer(p.restartDelay)
		p.restartDelay, p.paused, p.leads = restartAfter, false, time.Time{}
		deleting := p.isBeingDeleted
		p.mu.Unlock()
		close(ended)
		p.w.record("%s ended after %s: %s", p.name, after, state)
		if state.ExitCode() == 2 {
			p.w.reportViolation("%s panicked; see its log", p.name)
		}
		if !deleting {
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
	if p.isBeingDeleted {
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

// Write receives the process's output.
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

// isRunning reports whether a process of the pod exists; it may be paused.
func (p *pod) isRunning() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended == nil || p.isBeingDeleted {
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

// resume continues the process.
func (p *pod) resume() { p.signal(syscall.SIGCONT) }

// kill ends the process as a crash does; the kubelet restarts it after the delay.
func (p *pod) kill(delay time.Duration) {
	p.mu.Lock()
	p.restartDelay = delay
	ended := p.ended
	p.mu.Unlock()
	p.signal(syscall.SIGKILL)
	<-ended
}

// remove kills the process, and the pod is deleted, so it is never restarted.
func (p *pod) remove() {
	p.markDeleted()
	p.signal(syscall.SIGKILL)
	<-p.done
}

// vanish removes the pod as a lost node does, without closing the connections: for the
// servers they stay open, and nothing answers on them.
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

// shutDown deletes the pod: it asks the process to end, and waits at most the grace period.
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
	if !p.isBeingDeleted {
		p.isBeingDeleted = true
		close(p.deleted)
	}
}

func (p *pod) restore() {
	for _, l := range p.proxies {
		l.Restore()
	}
	p.resume()
}

// output returns the end of the pod's output.
func (p *pod) output(most int) string {
	text, err := os.ReadFile(p.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-most):])
}

// races returns the data races in the pod's output, except those of libraries.
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
	if p.isBeingDeleted {
		state += " deleted"
	}
	if !p.leads.IsZero() {
		state += " leader"
	}
	for to, l := range p.proxies {
		if !l.Open() {
			state += fmt.Sprintf(" without %s", to)
		}
	}
	return p.name + state
}

func (p *pod) isDeleted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.isBeingDeleted
}

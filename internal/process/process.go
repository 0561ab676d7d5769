// Package process starts programs as child processes and ends them: for the demo, the tests
// and the benchmarks, which all run manager and workers as separate processes. On Linux a
// child is killed when the process that started it ends.
package process

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Options say what is started.
type Options struct {
	// Name is used in messages.
	Name string
	// Program is the path of the program; empty: this program.
	Program string
	Args    []string
	// Env is added to the environment of this process.
	Env []string
	// Output receives standard output and standard error. A file is passed to the child and may
	// be closed after Start.
	Output io.Writer
}

// Process is a child process.
type Process struct {
	Name string
	// Started is when it was started.
	Started time.Time

	cmd  *exec.Cmd
	done chan struct{}
	err  error // the result of Wait; valid after done
}

// Start starts a process in a new process group, so that Ctrl-C reaches only the process that
// started it, which then ends its children in order.
func Start(o Options) (*Process, error) {
	if o.Program == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("finding this program: %w", err)
		}
		o.Program = self
	}
	p := &Process{Name: o.Name, Started: time.Now(), done: make(chan struct{})}
	p.cmd = exec.Command(o.Program, o.Args...) //nolint:noctx // ended by Stop or Kill, in order
	p.cmd.Env = append(os.Environ(), o.Env...)
	p.cmd.Stdout, p.cmd.Stderr = o.Output, o.Output
	p.cmd.SysProcAttr = attributes()
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", o.Name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended and all its output has arrived.
func (p *Process) Done() <-chan struct{} { return p.done }

// State says how the process ended. It is valid when Done is closed.
func (p *Process) State() *os.ProcessState { return p.cmd.ProcessState }

// Err is nil if the process ended with code 0. It is valid when Done is closed.
func (p *Process) Err() error { return p.err }

// Running returns an error if the process has ended.
func (p *Process) Running() error {
	select {
	case <-p.done:
		return fmt.Errorf("the %s ended by itself: %s", p.Name, p.cmd.ProcessState)
	default:
		return nil
	}
}

// Signal sends a signal; to a process that has ended it does nothing.
func (p *Process) Signal(s os.Signal) {
	_ = p.cmd.Process.Signal(s) // the only possible error is that the process has ended
}

// Kill ends the process as a crash does, and waits for its end.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop sends SIGTERM to the process and waits for its end. After timeout it kills the process
// and returns an error.
func (p *Process) Stop(timeout time.Duration) error {
	p.Signal(syscall.SIGTERM)
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-p.done:
		return nil
	case <-timer.C:
		p.Kill()
		return fmt.Errorf("the %s did not end within %s after SIGTERM, and was killed", p.Name, timeout)
	}
}

// Tail returns the last lines of a log.
func Tail(path string, lines int) []string {
	content, err := os.ReadFile(path)
	if err != nil {
		return []string{err.Error()}
	}
	text := strings.TrimSpace(string(content))
	if text == "" {
		return nil
	}
	all := strings.Split(text, "\n")
	return all[max(0, len(all)-lines):]
}

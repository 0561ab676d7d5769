package stage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is a run of the program.
type Process struct {
	// Name is the process's own; its log is Name.log in the stage's folder.
	Name    string
	metrics string
	cmd     *exec.Cmd
	done    chan struct{}
	err     error // of the end; read it after done
}

// Start runs a program until it is ended or the stage is closed. Its metrics
// are on a port of its own.
func (s *Stage) Start(name, program string, args ...string) (*Process, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(s.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a log: %w", err)
	}
	defer log.Close() // the process has its own descriptor
	p := &Process{Name: name, metrics: net.JoinHostPort("127.0.0.1", port), done: make(chan struct{})}
	p.cmd = exec.Command(program, append(args, "--metrics-bind-address="+p.metrics)...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	s.ends = append(s.ends, func() error { p.Kill(); return nil })
	return p, nil
}

// Kill ends the process as a crash does, and waits for its end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it has ended, then
	<-p.done
}

// Ask asks the process to end (SIGTERM) and does not wait.
func (p *Process) Ask() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("ending %s: %w", p.Name, err)
	}
	return nil
}

// Ended waits for the process's end, which is to be a clean one.
func (p *Process) Ended(ctx context.Context, patience time.Duration) error {
	select {
	case <-p.done:
		if p.err != nil {
			return fmt.Errorf("%s ended with an error (run with -keep and see %s.log): %w", p.Name, p.Name, p.err)
		}
		return nil
	case <-time.After(patience):
		return fmt.Errorf("%s did not end within %s", p.Name, patience)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Running returns an error if the process has ended by itself.
func (p *Process) Running() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended by itself (run with -keep and see %s.log): %s", p.Name, p.Name, p.cmd.ProcessState)
	default:
		return nil
	}
}

// RSS is the process's resident memory in MB: now, and at its highest.
func (p *Process) RSS() (now, peak float64, err error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, 0, fmt.Errorf("reading a process's memory: %w", err)
	}
	into := map[string]*float64{"VmRSS": &now, "VmHWM": &peak}
	for line := range strings.Lines(string(content)) {
		name, value, _ := strings.Cut(line, ":")
		if field := into[name]; field != nil {
			kb, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 64)
			if err != nil {
				return 0, 0, fmt.Errorf("reading a process's memory: %w", err)
			}
			*field = kb / 1024
		}
	}
	if now == 0 || peak == 0 {
		return 0, 0, errors.New("the process is gone")
	}
	return now, peak, nil
}

// clockTick is the unit of /proc/PID/stat, 1/100 s on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// CPU is the time that the process has spent, in user and system mode.
func (p *Process) CPU() (time.Duration, error) {
	stat, err := readStat(p.cmd.Process.Pid)
	return stat.spent, err
}

// stat is what the kernel's books have of a process.
type stat struct {
	name   string
	parent int
	spent  time.Duration
}

func readStat(pid int) (s stat, err error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return s, fmt.Errorf("reading a process's times: %w", err)
	}
	text := string(content)
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	s.name = text[open+1 : end]
	fields := strings.Fields(text[end+1:])
	var user, system int64
	var errs [3]error
	s.parent, errs[0] = strconv.Atoi(fields[1])
	user, errs[1] = strconv.ParseInt(fields[11], 10, 64)
	system, errs[2] = strconv.ParseInt(fields[12], 10, 64)
	s.spent = time.Duration(user+system) * clockTick
	return s, errors.Join(errs[:]...)
}

// Spent is the CPU time so far of this process (under the name "") and of those
// that it has started, theirs included, by the name of their program.
func Spent() (map[string]time.Duration, error) {
	folders, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, fmt.Errorf("listing the processes: %w", err)
	}
	all := map[int]stat{}
	for _, folder := range folders {
		pid, err := strconv.Atoi(filepath.Base(folder))
		if err != nil {
			continue
		}
		if s, err := readStat(pid); err == nil { // another has ended meanwhile
			all[pid] = s
		}
	}
	spent := map[string]time.Duration{}
	for pid, s := range all {
		for parent := pid; parent > 1; parent = all[parent].parent {
			if parent != os.Getpid() {
				continue
			}
			if pid == parent {
				s.name = ""
			}
			spent[s.name] += s.spent
			break
		}
	}
	return spent, nil
}

// SaySpent says who has spent the machine's time since before: a run on a machine
// that others use too can be told from a slow one by it.
func SaySpent(before map[string]time.Duration) error {
	after, err := Spent()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if spent := after[name] - before[name]; spent >= time.Second/2 {
			Say("  CPU %6.1f s  %s", spent.Seconds(), cmp.Or(name, "this process"))
		}
	}
	return nil
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

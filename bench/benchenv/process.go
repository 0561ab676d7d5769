package benchenv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/whatsapp-operator/whatsapp-operator/internal/process"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// Process is a process that the benchmark has started.
type Process struct {
	*process.Process
	metrics string // host:port; empty: it serves none
	log     string
}

// Start starts a program, which ends at the latest when the environment is closed; an empty
// path is this program itself. Its log is NAME.log in the environment's folder.
func (e *Environment) Start(name, program string, env []string, args ...string) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(e.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a log: %w", err)
	}
	defer log.Close() // the process has its own descriptor
	p, err := process.Start(process.Options{Name: name, Program: program, Args: args, Env: env, Output: log})
	if err != nil {
		return nil, err
	}
	e.ends = append(e.ends, func() error { p.Kill(); return nil })
	return &Process{Process: p, log: log.Name()}, nil
}

// StartServing is Start for a manager or a worker: its metrics are on a separate port.
func (e *Environment) StartServing(name, program string, args ...string) (*Process, error) {
	address, err := testenv.FreeAddress()
	if err != nil {
		return nil, err
	}
	// Plain metrics, by the variable: an earlier release does not know the flag.
	plain := []string{"WHATSAPP_OPERATOR_METRICS_SECURE=false"}
	p, err := e.Start(name, program, plain, append(args, "--metrics-bind-address="+address)...)
	if err != nil {
		return nil, err
	}
	p.metrics = address
	return p, nil
}

// Terminate asks the process to end (SIGTERM) and does not wait.
func (p *Process) Terminate() { p.Signal(syscall.SIGTERM) }

// WaitUntilEnded waits until the process has ended, and returns an error if it failed.
func (p *Process) WaitUntilEnded(ctx context.Context, timeout time.Duration) error {
	waiting, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	select {
	case <-p.Done():
		if p.Err() != nil {
			return fmt.Errorf("%s ended with an error (run with -keep and see %s): %w", p.Name, filepath.Base(p.log), p.Err())
		}
		return nil
	case <-waiting.Done():
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s did not end within %s", p.Name, timeout)
	}
}

// Running returns an error, with the end of the log, if the process has ended.
func (p *Process) Running() error {
	if err := p.Process.Running(); err != nil {
		return fmt.Errorf("%w:\n  %s", err, strings.Join(process.Tail(p.log, 5), "\n  "))
	}
	return nil
}

// Output is the process's output so far.
func (p *Process) Output() (string, error) {
	content, err := os.ReadFile(p.log)
	if err != nil {
		return "", fmt.Errorf("reading a log: %w", err)
	}
	return string(content), nil
}

// RSS is the process's resident memory in MB: the present and the highest.
func (p *Process) RSS() (now, peak float64, err error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
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
		return 0, 0, errors.New("the process does not exist any more")
	}
	return now, peak, nil
}

// clockTick is the unit of /proc/PID/stat, 1/100 s on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// CPU is the process's CPU time, in user and system mode.
func (p *Process) CPU() (time.Duration, error) {
	stat, err := readStat(p.PID())
	return stat.spent, err
}

// stat is what the kernel records of a process.
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

// CPUTimes is the CPU time so far, by program name, of this process (under the name "") and
// of all processes that it or they have started.
func CPUTimes() (map[string]time.Duration, error) {
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
		if s, err := readStat(pid); err == nil { // otherwise that process has ended
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

// PrintCPUTimes prints how much CPU time each program has used since before: it shows
// whether a run was slow or other programs used the machine.
func PrintCPUTimes(before map[string]time.Duration) error {
	after, err := CPUTimes()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if spent := after[name] - before[name]; spent >= time.Second/2 {
			Print("  CPU %6.1f s  %s", spent.Seconds(), cmp.Or(name, "this process"))
		}
	}
	return nil
}

package demo

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// grace is what a child has to end by itself before it is killed.
const grace = 10 * time.Second

// child is a process of this same program.
type child struct {
	name string
	log  string // path
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended; err is set then
	err  error
}

// startChild starts a process whose output goes to a file in dir. It is in a
// process group of its own, so that Ctrl-C reaches this program alone, which
// then ends its children in order; where the system can, it dies with this
// program however that ends.
func startChild(name, dir, executable string, args ...string) (*child, error) {
	c := &child{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	out, err := os.Create(c.log)
	if err != nil {
		return nil, fmt.Errorf("making the log of %s: %w", name, err)
	}
	defer out.Close()                         // the child has its own descriptor
	c.cmd = exec.Command(executable, args...) //nolint:noctx // ended by stop, gently and in order
	c.cmd.Stdout, c.cmd.Stderr = out, out
	c.cmd.SysProcAttr = childAttributes()
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		c.err = c.cmd.Wait()
		close(c.done)
	}()
	return c, nil
}

// ended returns an error if the child has ended, which it must not by itself.
func (c *child) ended() error {
	select {
	case <-c.done:
		return fmt.Errorf("the %s ended by itself: %s", c.name, c.cmd.ProcessState)
	default:
		return nil
	}
}

// stop ends the child: it is asked to, and killed when its time is up.
func (c *child) stop() error {
	if c.ended() != nil {
		return nil
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("ending %s: %w", c.name, err)
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
		if err := c.cmd.Process.Kill(); err != nil {
			return fmt.Errorf("killing %s: %w", c.name, err)
		}
		<-c.done
	}
	return nil
}

// tail is the end of the child's log.
func (c *child) tail(lines int) []string {
	content, err := os.ReadFile(c.log)
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

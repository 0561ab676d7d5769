package app

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
)

// problems collects all that is wrong with a configuration, each as a sentence that
// says what to change.
type problems []error

func (p *problems) add(format string, args ...any) { *p = append(*p, fmt.Errorf(format, args...)) }

func (p *problems) join(errs ...error) { *p = append(*p, errs...) }

func (p problems) err() error { return errors.Join(p...) }

// within checks that the value of a flag is between least and most. NaN is not.
func within[T cmp.Ordered](p *problems, flag string, value, least, most T) {
	if !(value >= least && value <= most) {
		p.add("--%s is %v: choose %v to %v", flag, value, least, most)
	}
}

// file checks that a file can be read.
func (p *problems) file(flag, path string) {
	f, err := os.Open(path)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		p.add("--%s: the file cannot be read: %w", flag, err)
	}
}

// listenAddress checks an address to listen on: host:port, or 0 for none.
func (p *problems) listenAddress(flag, value string) {
	if value == "0" {
		return
	}
	_, port, err := net.SplitHostPort(value)
	if n, convErr := strconv.Atoi(port); err != nil || convErr != nil || n < 0 || n > 65535 {
		p.add("--%s is %q: give [host]:port, for example :8081, or 0 for none", flag, value)
	}
}

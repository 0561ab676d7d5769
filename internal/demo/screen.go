package demo

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/term"
)

// screen prints the output. On a terminal the table stays at the bottom and is redrawn in
// place, and other lines are printed above it. In a file, a pipe or the log of a CI there
// are only lines; one of them shows the progress whenever it changes. It may be used from
// several goroutines.
type screen struct {
	file     *os.File
	terminal bool

	mu       sync.Mutex
	table    []string // the present lines at the bottom
	progress string   // the last progress line, without a terminal
}

func newScreen(file *os.File) *screen {
	return &screen{file: file, terminal: term.IsTerminal(int(file.Fd()))}
}

// println adds lines above the table.
func (s *screen) println(lines ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := bufio.NewWriter(s.file)
	defer func() { _ = w.Flush() }() // an error cannot be shown anywhere else
	s.erase(w)
	for _, line := range lines {
		fmt.Fprintln(w, line)
	}
	s.draw(w)
}

// show replaces the table.
func (s *screen) show(v view) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := bufio.NewWriter(s.file)
	defer func() { _ = w.Flush() }() // an error cannot be shown anywhere else
	if !s.terminal {
		if p := progress(v); p != s.progress {
			s.progress = p
			fmt.Fprintln(w, p)
		}
		return
	}
	lines := append([]string{""}, table(v)...)
	if slices.Equal(lines, s.table) {
		return
	}
	s.erase(w)
	s.table = lines
	s.draw(w)
}

// close leaves the table in its place: later output is printed below it.
func (s *screen) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table = nil
}

// erase moves to the beginning of the table and clears everything below.
func (s *screen) erase(w *bufio.Writer) {
	if len(s.table) > 0 {
		fmt.Fprintf(w, "\x1b[%dA\r\x1b[J", len(s.table))
	}
}

// draw writes the table. A line is cut at the terminal's width, because a line that wraps
// would not be erased completely.
func (s *screen) draw(w *bufio.Writer) {
	width := 0
	if len(s.table) > 0 {
		width, _, _ = term.GetSize(int(s.file.Fd())) // 0 if it is unknown
	}
	for _, line := range s.table {
		fmt.Fprintln(w, cut(line, width))
	}
}

// cut shortens a line to a width in characters; 0 means no limit.
func cut(line string, width int) string {
	if runes := []rune(line); width > 0 && len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	return line
}

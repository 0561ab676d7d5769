package demo

import (
	"os"
	"path/filepath"
	"testing"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
)

func written(t *testing.T, terminal bool, use func(*screen)) string {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	s := newScreen(file)
	if s.terminal {
		t.Fatal("a file is recognized as a terminal")
	}
	s.terminal = terminal
	use(s)
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestWithoutATerminalThereAreOnlyLines(t *testing.T) {
	v := view{total: 1, laravel: laravelHas()}
	got := written(t, false, func(s *screen) {
		s.show(v)
		s.show(v) // nothing has changed
		s.println("Laravel ← …")
		v.sessions = []v1alpha1.WhatsAppSession{session("demo-1", v1alpha1.PhasePairing, "", "", "")}
		s.show(v)
		s.close()
	})
	NewWithT(t).Expect(got).To(Equal(`0 of 1 sessions: -   |   events in: 0 → requests to Laravel: 0
Laravel ← …
1 of 1 sessions: 1 Pairing   |   events in: 0 → requests to Laravel: 0
`))
}

func TestOnATerminalTheTableStaysAtTheBottom(t *testing.T) {
	v := view{total: 1, laravel: laravelHas()}
	const table = "\nSESSION   PHASE   PHONE   WORKER   READY   LARAVEL\n\n0 of 1 sessions: -   |   events in: 0 → requests to Laravel: 0\n"
	got := written(t, true, func(s *screen) {
		s.show(v)
		s.show(v) // nothing has changed
		s.println("line")
		s.close()
		s.println("after it")
	})
	NewWithT(t).Expect(got).To(Equal(table + "\x1b[4A\r\x1b[Jline\n" + table + "after it\n"))
}

func TestLinesAreCutAtTheTerminalsWidth(t *testing.T) {
	g := NewWithT(t)
	g.Expect(cut("12345", 5)).To(Equal("12345"))
	g.Expect(cut("ñandú-1", 5)).To(Equal("ñand…"))
	g.Expect(cut("12345", 0)).To(Equal("12345"))
}

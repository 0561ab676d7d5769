package testenv

import (
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/whatsapp-operator/whatsapp-operator/internal/process"
)

// asProgram is the variable that makes a test binary run as the program.
const asProgram = "WHATSAPP_OPERATOR_TEST_AS_PROGRAM"

// ProgramMain is called first in a TestMain. In a process that StartProgram has started it
// runs main, the main function of the program, and does not return.
func ProgramMain(main func() int) {
	if os.Getenv(asProgram) != "" {
		os.Exit(main())
	}
}

// StartProgram runs this test binary as the program, with the race detector if the test has
// it. The caller stops it, and checks its output for data races.
func StartProgram(name string, output io.Writer, args ...string) (*process.Process, error) {
	return process.Start(process.Options{
		Name: name, Args: args, Output: output,
		Env: []string{asProgram + "=1", "GORACE=exitcode=0"}, // races are read from the output
	})
}

// DataRaces returns the reports of the race detector in a program's output: those
// to fix, and those within whatsmeow, which this project cannot fix.
func DataRaces(output string) (ours, libraries []string) {
	for report := range strings.SplitSeq(output, "==================") {
		switch {
		case !strings.Contains(report, "DATA RACE"):
		case betweenLibrary(report):
			libraries = append(libraries, report)
		default:
			ours = append(ours, report)
		}
	}
	return ours, libraries
}

var accessOf = regexp.MustCompile(`(?:[Rr]ead|[Ww]rite) at .*\n\s+(?:runtime\.\S+\n\s+\S+ \S+\n\s+)?(\S+)`)

// betweenLibrary reports whether both accesses of a race are in whatsmeow: its socket sends
// and closes without a common lock, and its client closes the channel of a request while the
// answer arrives.
func betweenLibrary(report string) bool {
	accesses := accessOf.FindAllStringSubmatch(report, -1)
	for _, access := range accesses {
		if !strings.HasPrefix(access[1], "go.mau.fi/whatsmeow/socket.") && !strings.HasPrefix(access[1], "go.mau.fi/whatsmeow.(*Client)") {
			return false
		}
	}
	return len(accesses) == 2
}

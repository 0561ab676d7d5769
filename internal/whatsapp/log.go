package whatsapp

import (
	"fmt"
	"strings"

	"github.com/go-logr/logr"
	waLog "go.mau.fi/whatsmeow/util/log"

	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// clientVerbosity is the verbosity from which the library's log is written.
const clientVerbosity = 2

// maxLogLine is the maximum length of a line of the library's log, in bytes.
const maxLogLine = 512

// clientLog passes on the library's warnings and errors. It leaves out lines about single
// received and sent nodes: they hold pairing codes and keys.
type clientLog struct{ log logr.Logger }

// newClientLog returns a logger that costs nothing if its level is off.
func newClientLog(log logr.Logger) waLog.Logger {
	if log = log.V(clientVerbosity); !log.Enabled() {
		return waLog.Noop
	}
	return &clientLog{log: log}
}

// Warnf implements waLog.Logger.
func (l *clientLog) Warnf(format string, args ...any) { l.line("warn", format, args) }

// Errorf implements waLog.Logger.
func (l *clientLog) Errorf(format string, args ...any) { l.line("error", format, args) }

// Infof implements waLog.Logger.
func (l *clientLog) Infof(format string, args ...any) { l.line("info", format, args) }

// Debugf drops the line: many hold a whole node.
func (l *clientLog) Debugf(string, ...any) {}

// Sub implements waLog.Logger.
func (l *clientLog) Sub(module string) waLog.Logger {
	if module == "Recv" || module == "Send" {
		return waLog.Noop
	}
	return l
}

func (l *clientLog) line(level, format string, args []any) {
	args = append([]any(nil), args...)
	for i, arg := range args {
		if node, ok := arg.(string); ok && strings.HasPrefix(node, "<") {
			tag, _, _ := strings.Cut(node, " ")
			args[i] = tag + " …>"
		}
	}
	l.log.Info("Logged by whatsmeow", "level", level, "text", status.Clean(fmt.Sprintf(format, args...), maxLogLine))
}

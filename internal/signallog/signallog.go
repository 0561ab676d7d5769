// Package signallog sets libsignal's logger before the library is used. Without it the
// library creates a default logger when it logs its first line, without a lock, so that two
// connections that begin at the same time would race. Every package through which libsignal
// is used imports this package for that effect only.
package signallog

import "go.mau.fi/libsignal/logger"

func init() {
	var none logger.Loggable = quiet{}
	logger.Setup(&none)
}

// quiet drops every line: errors are returned as well, and a line could contain keys.
type quiet struct{}

func (quiet) Debug(_, _ string)   {}
func (quiet) Info(_, _ string)    {}
func (quiet) Warning(_, _ string) {}
func (quiet) Error(_, _ string)   {}
func (quiet) Configure(string)    {}

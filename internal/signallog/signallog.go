// Package signallog gives libsignal its logger before anybody uses it. The
// library makes a default one at its first line, without a lock, so that two
// connections which begin at the same time would race. It is imported for this
// effect alone by every package that leads to libsignal.
package signallog

import "go.mau.fi/libsignal/logger"

func init() {
	var none logger.Loggable = quiet{}
	logger.Setup(&none)
}

// quiet drops every line: what matters comes back as an error, and the lines
// could name keys.
type quiet struct{}

func (quiet) Debug(_, _ string)   {}
func (quiet) Info(_, _ string)    {}
func (quiet) Warning(_, _ string) {}
func (quiet) Error(_, _ string)   {}
func (quiet) Configure(string)    {}

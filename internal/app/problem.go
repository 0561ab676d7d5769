package app

import (
	"context"
	"time"
)

const (
	// problemInterval is how often the leader looks for a problem. It repeats its warning after
	// problemWarnInterval.
	problemInterval     = time.Minute
	problemWarnInterval = time.Hour
)

// watchProblem warns, in the log and by an Event with that reason and action, when check finds a
// problem or another one than before, and again each hour while it lasts. what names the check in
// the log. An empty problem is none.
func (d *dependencies) watchProblem(ctx context.Context, what, reason, action string, warn func(reason, action, message string), check func(ctx context.Context) (problem string, err error)) error {
	ticker := d.clock.NewTicker(problemInterval)
	defer ticker.Stop()
	last, warned := "", time.Time{}
	for {
		problem, err := check(ctx)
		now := d.clock.Now()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			d.log.V(1).Info("Failed to look for a problem, trying again", "check", what, "reason", err.Error())
		case problem == "" && last != "":
			d.log.Info("The problem is over", "check", what)
			last = ""
		case problem != "" && (problem != last || now.Sub(warned) >= problemWarnInterval):
			d.log.Info("WARNING: " + problem)
			warn(reason, action, problem)
			last, warned = problem, now
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

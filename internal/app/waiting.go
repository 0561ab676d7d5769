package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

const (
	// retryInterval is how often the start tries again what is not there yet.
	retryInterval = time.Second
	// attemptTimeout bounds one attempt; it is longer than what the stores' own time-outs add up to.
	attemptTimeout = 20 * time.Second
	// waitingLogInterval is how often the log repeats what the start waits for, and
	// waitingEventInterval how often an Event does. A new cause is reported after
	// waitingChangeInterval at the earliest.
	waitingLogInterval    = time.Minute
	waitingEventInterval  = 10 * time.Minute
	waitingChangeInterval = 10 * time.Second
	// maxWaitingCauses bounds the causes that one wait remembers.
	maxWaitingCauses = 10
	// schemaTimeout is how long a worker waits for the schema without an Event: in a new
	// installation it starts together with the manager that makes the schema.
	schemaTimeout = 45 * time.Second
	// eventTimeout bounds the request that records an Event during the start.
	eventTimeout = 2 * time.Second
	// maxNote and maxInstance bound an Event's text and the name of the process that records it.
	maxNote, maxInstance = 1024, 128
	// reportingController is the controller that the Events name.
	reportingController = "whatsapp-operator"
)

// The reasons of the Events about a process itself.
const (
	reasonWaitingForAPIServer = "WaitingForAPIServer"
	reasonWaitingForRedis     = "WaitingForRedis"
	reasonWaitingForDatabase  = "WaitingForDatabase"
	reasonWaitingForManager   = "WaitingForManager"
	reasonWaitingForCRD       = "WaitingForCRD"
	reasonOwnedElsewhere      = "StoreOwnedElsewhere"
	reasonStoreTooNew         = "StoreTooNew"
	reasonWaitingEnded        = "WaitingEnded"
)

// processInfo describes a manager or a worker that is being started. The zero value is a person's
// command, which gives up after --start-timeout.
type processInfo struct {
	probes *probes
	// pod is the object of the Events about the process; nil: it records none.
	pod *corev1.Pod
}

// podOf is the pod of this process. `kubectl describe pod` shows only Events with its UID.
func podOf(config *commonConfig, name string) *corev1.Pod {
	if name == "" {
		name, _ = os.Hostname() // a pod's host name is its name; without it the Event names nothing
	}
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: config.Namespace, Name: strings.ToLower(name), UID: types.UID(config.PodUID)},
	}
}

// step is something that the start waits for.
type step struct {
	// name is what it is, for people.
	name string
	// reason is the reason of the Event.
	reason string
	// usual is how long the wait may last in a healthy installation: no Event is recorded before.
	usual time.Duration
}

var (
	stepAPIServer  = step{name: "the API server", reason: reasonWaitingForAPIServer}
	stepCRD        = step{name: "the CustomResourceDefinition", reason: reasonWaitingForCRD}
	stepSessions   = step{name: "the sessions", reason: reasonWaitingForAPIServer}
	stepLeases     = step{name: "the workers' Leases", reason: reasonWaitingForAPIServer}
	stepRevision   = step{name: "this worker's revision", reason: reasonWaitingForAPIServer}
	stepRedis      = step{name: "Redis", reason: reasonWaitingForRedis}
	stepRedisOwner = step{name: "Redis of this installation", reason: reasonWaitingForRedis}
	stepStore      = step{name: "the store", reason: reasonWaitingForDatabase}
	stepStoreOwner = step{name: "a store of this installation", reason: reasonWaitingForDatabase}
	stepSchema     = step{name: "the schema of the store", reason: reasonWaitingForManager, usual: schemaTimeout}
)

// onlyMissingFiles reports whether a configuration is wrong only because files that it names
// do not exist: a Secret may be created, or get another key, later than the pod.
func onlyMissingFiles(err error) bool {
	switch e := err.(type) { //nolint:errorlint // each level is looked at
	case nil:
		return false
	case *fs.PathError:
		return errors.Is(e, fs.ErrNotExist)
	case interface{ Unwrap() []error }:
		all := e.Unwrap()
		for _, err := range all {
			if !onlyMissingFiles(err) {
				return false
			}
		}
		return len(all) > 0
	default:
		return onlyMissingFiles(errors.Unwrap(err))
	}
}

// checkUnlessMissing checks the configuration of a process that waits for missing files.
func checkUnlessMissing(config *commonConfig, complete func() error) func([]string) error {
	return func([]string) error {
		err := complete()
		if config.StartTimeout == 0 && onlyMissingFiles(err) { // startProcess waits for them
			return nil
		}
		return err
	}
}

// awaitFiles waits until the configuration is right, or wrong in another way than by files
// that do not exist. complete is called again each time.
func awaitFiles(ctx context.Context, complete func() error, p *probes, log logr.Logger) error {
	s := step{name: "files that the flags name"}
	p.waitFor(s.name)
	defer p.waitFor("")
	begun := time.Now()
	w := waitReport{step: s, log: log, event: func(context.Context, string, string, string) error {
		return errors.New("the API server has not been asked yet")
	}}
	ticker := time.NewTicker(retryInterval)
	defer ticker.Stop()
	for {
		err := complete()
		if !onlyMissingFiles(err) {
			w.ended(ctx, time.Since(begun))
			return err
		}
		w.failed(ctx, err, time.Now())
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", s.name, ctx.Err())
		case <-ticker.C:
		}
	}
}

// await repeats what may not be possible yet, until it succeeds or fails for good. A process
// waits for as long as it takes, because a restart would only add Kubernetes' pauses between
// restarts, and it says what it waits for. With --start-timeout it gives up after that time.
func (d *dependencies) await(ctx context.Context, s step, try func(context.Context) (final bool, err error)) error {
	d.probes.waitFor(s.name)
	defer d.probes.waitFor("")
	begun := d.clock.Now()
	w := waitReport{step: s, log: d.log, event: d.recordEvent}
	for {
		final, err := d.attempt(ctx, try)
		now := d.clock.Now()
		switch timeout := d.config.StartTimeout; {
		case err == nil:
			w.ended(ctx, now.Sub(begun))
			return nil
		case final:
			return err
		case ctx.Err() != nil:
			return fmt.Errorf("waiting for %s: %w", s.name, ctx.Err())
		case timeout > 0 && now.Sub(begun) >= timeout:
			return fmt.Errorf("%s cannot be reached for %s: %w", s.name, timeout, err)
		}
		w.failed(ctx, err, now)
		timer := d.clock.NewTimer(retryInterval)
		select {
		case <-ctx.Done():
		case <-timer.C():
		}
		timer.Stop()
	}
}

// attempt calls try once. A server that accepts a request and never answers ends no wait.
func (d *dependencies) attempt(ctx context.Context, try func(context.Context) (final bool, err error)) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	return try(ctx)
}

// waitsForever reports whether the start waits for what a person must mend. A command, and a
// process with --start-timeout, fail at once instead.
func (d *dependencies) waitsForever() bool { return d.config.StartTimeout == 0 }

// waitReport reports what the start waits for: in the log, and as Events where the API server
// can be reached. Each cause is reported once, and then at intervals: an error whose text has
// another port or time is the same cause.
type waitReport struct {
	step
	log   logr.Logger
	event func(ctx context.Context, kind, reason, note string) error

	begun            time.Time
	logged, recorded reportedCauses
}

// reportedCauses is when each cause of a wait was last reported.
type reportedCauses struct {
	at   map[string]time.Time
	last time.Time
}

// due reports whether cause must be reported now.
func (r *reportedCauses) due(cause string, now time.Time, interval time.Duration) bool {
	at, known := r.at[cause]
	switch {
	case known:
		return now.Sub(at) >= interval
	case len(r.at) >= maxWaitingCauses: // too many are different: they are all one
		return now.Sub(r.last) >= interval
	default:
		return r.last.IsZero() || now.Sub(r.last) >= waitingChangeInterval
	}
}

func (r *reportedCauses) report(cause string, now time.Time) {
	if r.at == nil {
		r.at = map[string]time.Time{}
	}
	if _, known := r.at[cause]; known || len(r.at) < maxWaitingCauses {
		r.at[cause] = now
	}
	r.last = now
}

// variable matches the parts of an error's text that differ from one attempt to the next:
// ports, addresses, times, durations and ids.
var variable = regexp.MustCompile(`[0-9a-fA-F]*[0-9][0-9a-fA-F.:]*`)

// causeOf returns the same text for errors that have the same cause.
func causeOf(reason string, err error) string {
	return reason + " " + variable.ReplaceAllString(err.Error(), "#")
}

func (w *waitReport) failed(ctx context.Context, err error, now time.Time) {
	if w.begun.IsZero() {
		w.begun = now
	}
	reason := w.reason
	var redisElsewhere *redis.OwnedElsewhereError
	switch {
	case errors.As(err, &redisElsewhere), errors.Is(err, store.ErrOwnedElsewhere):
		reason = reasonOwnedElsewhere
	case errors.Is(err, store.ErrSchemaTooNew):
		reason = reasonStoreTooNew
	}
	cause := causeOf(reason, err)
	if w.logged.due(cause, now, waitingLogInterval) {
		w.log.Error(err, "Waiting during the start", "for", w.name)
		w.logged.report(cause, now)
	}
	if reason == w.reason && now.Sub(w.begun) < w.usual || !w.recorded.due(cause, now, waitingEventInterval) {
		return
	}
	if w.event(ctx, corev1.EventTypeWarning, reason, "waiting for "+w.name+": "+err.Error()) == nil {
		w.recorded.report(cause, now)
	}
}

func (w *waitReport) ended(ctx context.Context, waited time.Duration) {
	if !w.logged.last.IsZero() {
		w.log.Info("Waited during the start", "for", w.name, "waited", waited.Round(time.Second).String())
	}
	if !w.recorded.last.IsZero() {
		if err := w.event(ctx, corev1.EventTypeNormal, reasonWaitingEnded, "the start continues: it does not wait for "+w.name+" any more"); err != nil {
			w.log.V(1).Info("Failed to record an Event", "reason", err.Error())
		}
	}
}

// recordEvent records an Event about this process during its start, when no manager of
// controller-runtime runs that would do it.
func (d *dependencies) recordEvent(ctx context.Context, kind, reason, note string) error {
	if d.pod == nil || d.installation == "" { // a command, or the API server has not answered yet
		return errors.New("no Events can be recorded")
	}
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	now := d.clock.Now()
	err := d.direct.Create(ctx, &eventsv1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: d.pod.Namespace, Name: fmt.Sprintf("%s.%x", d.pod.Name, now.UnixNano())},
		EventTime:           metav1.NewMicroTime(now),
		ReportingController: reportingController, ReportingInstance: status.Clean(d.pod.Name, maxInstance),
		Action: "Start", Reason: reason, Type: kind, Note: status.Clean(note, maxNote),
		Regarding: corev1.ObjectReference{APIVersion: d.pod.APIVersion, Kind: d.pod.Kind, Namespace: d.pod.Namespace, Name: d.pod.Name, UID: d.pod.UID},
	})
	if err != nil {
		return fmt.Errorf("recording an Event: %w", err)
	}
	return nil
}

//go:build faults

package faults

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// missing says which sessions are not as they must be without a fault: connected, on one
// running worker that is the same in the resource and in the simulator.
func (w *environment) missing(ctx context.Context) error {
	var list v1alpha1.WhatsAppSessionList
	if err := w.client.List(ctx, &list, client.InNamespace(w.namespace)); err != nil {
		return err
	}
	byName := map[string]*v1alpha1.WhatsAppSession{}
	for i := range list.Items {
		byName[list.Items[i].Name] = &list.Items[i]
	}
	devices := map[string]simulator.Device{}
	for _, d := range w.simulator.Devices() {
		devices[d.JID] = d
	}
	workers := map[string]*pod{}
	w.mu.Lock()
	for _, p := range w.workers {
		workers[p.name] = p
	}
	w.mu.Unlock()

	byPhone := w.devicesByPhone()
	var problems []string
	for _, n := range w.people.all() {
		if problem := w.unpairedBecause(n, byName[n.name], byPhone[n.phone]); problem != "" {
			problems = append(problems, n.name+": "+problem)
		}
	}
	if len(problems) > 0 {
		return &missingError{problems}
	}
	all := w.allSessions()
	for _, s := range all {
		if problem := w.problem(s, byName[s.name], devices, workers); problem != "" {
			problems = append(problems, s.name+": "+problem)
		}
	}
	if connected := w.simulator.Stats().Connected; len(problems) == 0 && connected != len(all) {
		problems = append(problems, fmt.Sprintf("the simulator has %d connections for %d devices", connected, len(all)))
	}
	if len(problems) == 0 {
		return nil
	}
	return &missingError{problems}
}

// allSessions returns the sessions and the newcomers.
func (w *environment) allSessions() []*session {
	all := slices.Clone(w.sessions)
	for _, n := range w.people.all() {
		all = append(all, n.session)
	}
	return all
}

type missingError struct{ problems []string }

func (e *missingError) Error() string {
	return fmt.Sprintf("%d sessions are not back, for example: %s", len(e.problems), strings.Join(e.problems[:min(3, len(e.problems))], "; "))
}

func (w *environment) problem(s *session, obj *v1alpha1.WhatsAppSession, devices map[string]simulator.Device, workers map[string]*pod) string {
	if obj == nil {
		return "it does not exist"
	}
	status := obj.Status
	device, linked := devices[s.jid]
	at := workers[status.Worker]
	switch {
	case !linked:
		return "its device is not linked any more"
	case status.Phase != v1alpha1.PhaseConnected:
		return fmt.Sprintf("it is %s (worker %q, held by %q)", status.Phase, status.Worker, status.HeldBy)
	case status.JID != s.jid:
		return fmt.Sprintf("its device is %q and was %q", status.JID, s.jid)
	case status.HeldBy != status.Worker:
		return fmt.Sprintf("it is placed on %q, but held by %q", status.Worker, status.HeldBy)
	case at == nil || !at.isRunning():
		return fmt.Sprintf("it is on %q, which does not run", status.Worker)
	case !device.Connected:
		return "it is Connected, but its device is not"
	case !at.proxies[toWhatsApp].Carried(device.Remote):
		return fmt.Sprintf("it is on %s, but its device is connected through %s", status.Worker, w.through(device.Remote))
	}
	return ""
}

// through names the pod whose proxy carried a connection.
func (w *environment) through(remote string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.pods {
		if l := p.proxies[toWhatsApp]; l != nil && l.Carried(remote) {
			return p.name
		}
	}
	return "no pod (" + remote + ")"
}

// caseRun is one run of a case, with the values that the checks compare with.
type caseRun struct {
	name    string
	before  simulator.Stats
	logins  map[string]int64
	began   time.Time
	healed  time.Time
	timeout time.Duration
}

// result is the result of the checks of a case.
type result struct {
	name                 string
	fault, back, stall   time.Duration
	absences             []time.Duration
	moves, mostMoves     int
	logins               int64
	retries, redelivered int64
	messages             messageCounts
	failed               bool
}

func (v result) String() string {
	how := "ok"
	if v.failed {
		how = "FAILED"
	}
	text := fmt.Sprintf("%-6s %-58s fault %5.1fs, all back %5.1fs after; %s; logins %d, moves %d (most %d), messages %d, redelivered %d, retries %d, at Laravel again %d",
		how, v.name, v.fault.Seconds(), v.back.Seconds(), describe(v.absences), v.logins, v.moves, v.mostMoves,
		v.messages.messages, v.redelivered, v.retries, v.messages.again)
	if v.starved() {
		text += fmt.Sprintf("; the test process did not run for %s", v.stall.Round(10*time.Millisecond))
	}
	return text
}

// starved reports whether the test process did not run for so long that a transaction may
// have exceeded its time-out of 3 s, which ends a connection. The case does not intend this
// fault, so more logins are then only logged. All other checks still apply.
func (v result) starved() bool { return v.stall >= time.Second }

// begin records the counters before the fault, while all sessions are connected.
func (w *environment) begin(name string) *caseRun {
	w.record("=== %s", name)
	w.dumped = false
	w.absences.take()
	w.history.takeMoves()
	c := &caseRun{name: name, before: w.simulator.Stats(), logins: map[string]int64{}, began: time.Now(), timeout: recoveryTimeout}
	for _, d := range w.simulator.Devices() {
		c.logins[d.JID] = d.Logins
	}
	return c
}

// loggedIn is the number of logins since the case began, and the highest number of one
// device, of the devices that were linked when it began.
func (c *caseRun) loggedIn(w *environment) (all, most int64) {
	for _, d := range w.simulator.Devices() {
		if before, known := c.logins[d.JID]; known {
			all, most = all+d.Logins-before, max(most, d.Logins-before)
		}
	}
	return all, most
}

// check is called after the faults have ended. It waits until all sessions are back, and
// reports what is wrong.
func (w *environment) check(t *testing.T, c *caseRun) result {
	t.Helper()
	c.healed = time.Now()
	v := result{name: c.name, fault: c.healed.Sub(c.began)}
	var problems []string
	wrong := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }

	err := w.await(c.timeout, w.missing)
	v.back = time.Since(c.healed)
	if err != nil {
		wrong("sessions not back: %v", err)
	}
	w.record("all back: %t", err == nil)
	w.traffic.hold.Lock()
	defer w.traffic.hold.Unlock()
	if err == nil {
		problems = append(problems, w.undelivered(t.Context())...)
		wrongMessages, counts := w.messages.undelivered(w.messages.checked)
		problems, v.messages = append(problems, wrongMessages...), counts
		if err := w.await(time.Minute, w.staleCodes); err != nil {
			wrong("%v", err)
		}
	}
	v.absences, v.stall = w.absences.take()
	for _, n := range w.history.takeMoves() {
		v.moves, v.mostMoves = v.moves+n, max(v.mostMoves, n)
	}
	after := w.simulator.Stats()
	v.logins, v.retries, v.redelivered = after.Logins-c.before.Logins, after.Retries-c.before.Retries, after.Redelivered-c.before.Redelivered

	if n := after.Doubled - c.before.Doubled; n > 0 {
		wrong("doubled connections: %d", n)
		for _, d := range w.simulator.Doubled() {
			if d.At.After(c.began) {
				wrong("  %s at %s: %s while %s", d.Device, d.At.UTC().Format("15:04:05.000"), w.through(d.Newer), w.through(d.Older))
			}
		}
	}
	all, newcomers := len(w.allSessions()), w.people.all()
	paired, loggedOut := after.Pairings-c.before.Pairings, after.Logouts-c.before.Logouts
	if paired-loggedOut != int64(len(newcomers)) {
		wrong("paired: %d, logged out: %d; %d sessions had to be paired", paired, loggedOut, len(newcomers))
	}
	if loggedOut > int64(w.people.recreations()) || after.Devices != all {
		wrong("logged out: %d; %d devices for %d sessions", loggedOut, after.Devices, all)
	}
	if len(after.Unknown) > 0 {
		wrong("the simulator got unknown requests: %v", after.Unknown)
	}
	for _, breach := range w.laravel.TakeBreaches() {
		wrong("Laravel: %s", breach)
	}
	w.mu.Lock()
	problems, w.violations = append(problems, w.violations...), nil
	w.mu.Unlock()
	if v.failed = len(problems) > 0; v.failed {
		t.Errorf("%s", strings.Join(problems[:min(40, len(problems))], "\n"))
		w.dump(t, err)
	}
	t.Log(v.String())
	return v
}

// undelivered checks that every message is acknowledged, that every session can
// decrypt a new one, and that Laravel has every session as Connected.
func (w *environment) undelivered(ctx context.Context) (problems []string) {
	allAcknowledged := func(context.Context) error {
		if n := w.simulator.Stats().Unacknowledged; n > 0 {
			var devices []string
			for _, d := range w.simulator.Devices() {
				if d.Waiting > 0 {
					devices = append(devices, fmt.Sprintf("%s (%d)", d.JID, d.Waiting))
				}
			}
			return fmt.Errorf("%d messages have no receipt: %s", n, strings.Join(devices[:min(5, len(devices))], ", "))
		}
		return nil
	}
	if err := w.await(recoveryTimeout, allAcknowledged); err != nil { // thousands may have waited at a login
		problems = append(problems, err.Error())
	}
	// No keys are lost: every session decrypts a new message without a retry.
	retries := w.simulator.Stats().Retries
	all := w.allSessions()
	for _, s := range all {
		w.traffic.send(ctx, s)
	}
	if err := w.await(time.Minute, allAcknowledged); err != nil {
		problems = append(problems, "at the end: "+err.Error())
	}
	if n := w.simulator.Stats().Retries - retries; n > 0 {
		problems = append(problems, fmt.Sprintf("at the end %d sessions could not decrypt a message", n))
	}
	published := func(context.Context) error {
		var wrong []string
		for _, s := range all {
			if last := w.laravel.Status(s.name); last.Status != delivery.Active || last.Phase != string(v1alpha1.PhaseConnected) {
				wrong = append(wrong, fmt.Sprintf("%s is %s/%s", s.name, last.Status, last.Phase))
			}
		}
		if len(wrong) > 0 {
			return fmt.Errorf("Laravel has a status other than Connected for %d sessions: %s", len(wrong), strings.Join(wrong[:min(5, len(wrong))], ", "))
		}
		return nil
	}
	if err := w.await(time.Minute, published); err != nil {
		problems = append(problems, err.Error())
	}
	return problems
}

// dump prints what a person needs to find the cause of a failure.
func (w *environment) dump(t *testing.T, err error) {
	t.Helper()
	w.dumped = true
	var missing *missingError
	if errors.As(err, &missing) {
		t.Logf("sessions that are not back:\n  %s", strings.Join(missing.problems, "\n  "))
		shown := 0
		for _, s := range w.history.all() {
			if shown < 5 && slices.ContainsFunc(missing.problems, func(p string) bool { return strings.HasPrefix(p, s.Name+":") }) {
				text, _ := json.Marshal(s.Status)
				t.Logf("%s (version %s): %s", s.Name, s.ResourceVersion, text)
				shown++
			}
		}
	}
	w.mu.Lock()
	timeline := strings.Join(w.timeline[max(0, len(w.timeline)-200):], "\n  ")
	w.mu.Unlock()
	t.Logf("timeline:\n  %s", timeline)
	for _, p := range w.allPods() {
		t.Logf("--- %s\n%s", p, p.output(4_000))
	}
	t.Logf("all logs are in %s", w.dir)
}

// mostUnsettled is how many takings of a session in a row may be unsettled when a fault
// begins that may end a worker. A session whose process dies soon after the taking a few times
// more, while it is tried alone, rests for hours (internal/session/trial.go), and it cannot be
// known that these deaths came from outside.
const mostUnsettled = 2

// mayEndWorkers returns an error while another death of a worker would be one too many in a
// row for a session, and nil if the database cannot be asked because a fault has stopped it.
func (w *environment) mayEndWorkers(ctx context.Context) error {
	db, err := sql.Open("pgx", w.store.URL())
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var most int
	err = db.QueryRowContext(ctx, "SELECT COALESCE(max(unsettled), 0) FROM whatsapp_operator_session").Scan(&most)
	switch {
	case err != nil && w.storeDown:
		return nil
	case err != nil:
		return fmt.Errorf("reading the takings: %w", err)
	case most > mostUnsettled:
		return fmt.Errorf("a session has %d takings in a row that are not settled", most)
	}
	return nil
}

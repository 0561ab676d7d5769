//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
	"github.com/whatsapp-operator/whatsapp-operator/internal/testenv"
)

// settleTimeout bounds the time from the end of a fault until every session is connected,
// every message has its receipt, and Laravel has every state.
const settleTimeout = 3 * time.Minute

// measurement is what the simulator and the stand-in for Laravel had counted before a part.
type measurement struct {
	name     string
	began    time.Time
	stats    simulator.Stats
	devices  map[string]simulator.Device
	breaches int
}

// assessment is what they have counted since then.
type assessment struct {
	// lost counts the sessions that are not connected again, the messages without a receipt or
	// encrypted twice, and the states that Laravel does not have.
	lost    int
	doubled int
	// moves of each session; gaps is how long each that was away had no connection, the
	// shortest first; logins of each of these.
	moves  map[client.ObjectKey]int
	gaps   []time.Duration
	logins map[client.ObjectKey]int64
}

// gapP99 is in seconds.
func (v assessment) gapP99() float64 { return percentile(v.gaps, 99).Seconds() }

func percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}

// measure begins a part in which something happens. All sessions must be connected.
func (e *environment) measure(t *testing.T, name string) *measurement {
	t.Helper()
	if err := testenv.Await(t.Context(), settleTimeout, e.notConnected); err != nil {
		e.dump(t)
		t.Fatalf("Before %q: %v", name, err)
	}
	e.history.takeMoves()
	m := &measurement{name: name, began: time.Now(), devices: map[string]simulator.Device{}}
	var err error
	m.stats, err = e.standins.control.Stats(t.Context())
	must(t, err)
	devices, err := e.standins.control.Devices(t.Context())
	must(t, err)
	for _, d := range devices {
		m.devices[d.JID] = d
	}
	received, err := e.standins.received(t.Context())
	must(t, err)
	m.breaches = len(received.Breaches)
	return m
}

// check waits until everything is as it was before, and reports what is not.
func (e *environment) check(t *testing.T, m *measurement) assessment {
	t.Helper()
	v := assessment{logins: map[client.ObjectKey]int64{}}
	var problems []string
	wrong := func(n int, format string, args ...any) {
		v.lost += n
		problems = append(problems, fmt.Sprintf(format, args...))
	}
	healed := time.Now()
	if err := testenv.Await(t.Context(), settleTimeout, e.notConnected); err != nil {
		wrong(notBack(err), "sessions not back: %v", err)
	}
	back := time.Since(healed)

	devices, err := e.standins.control.Devices(t.Context())
	must(t, err)
	now := map[string]simulator.Device{}
	for _, d := range devices {
		now[d.JID] = d
	}
	for _, s := range e.sessions {
		before, is := m.devices[s.jid], now[s.jid]
		if is.Logins > before.Logins && s.namespace == sessionNamespace {
			v.gaps = append(v.gaps, is.Away-before.Away)
			v.logins[s.key()] = is.Logins - before.Logins
		}
	}
	slices.Sort(v.gaps)

	n, err := e.unread(t.Context())
	if err != nil {
		wrong(n, "%v", err)
	}
	if n, err := e.unpublished(t.Context()); err != nil {
		wrong(n, "%v", err)
	}
	after, err := e.standins.control.Stats(t.Context())
	must(t, err)
	if v.doubled = int(after.Doubled - m.stats.Doubled); v.doubled > 0 {
		list, err := e.standins.control.Doubled(t.Context())
		must(t, err)
		wrong(0, "doubled connections: %d, the last %+v", v.doubled, list[len(list)-1])
	}
	if scans := after.Pairings - m.stats.Pairings; scans != 0 {
		wrong(int(scans), "%d phones had to scan again", scans)
	}
	if logouts := after.Logouts - m.stats.Logouts; logouts != 0 {
		wrong(int(logouts), "%d devices were logged out", logouts)
	}
	if len(after.Unknown) > 0 {
		wrong(0, "the simulator got unknown requests: %v", after.Unknown)
	}
	got, err := e.standins.received(t.Context())
	must(t, err)
	for _, breach := range got.Breaches[min(m.breaches, len(got.Breaches)):] {
		wrong(1, "Laravel: %s", breach)
	}
	moves, broken := e.history.takeMoves()
	v.moves = moves
	for _, rule := range broken {
		wrong(0, "%s", rule)
	}
	t.Logf("%s: lasted %.1fs, all back %.1fs later; away %d sessions, p50 %.2fs, p99 %.2fs, longest %.2fs; logins %d, doubled %d, lost %d",
		m.name, healed.Sub(m.began).Seconds(), back.Seconds(), len(v.gaps), percentile(v.gaps, 50).Seconds(), v.gapP99(), percentile(v.gaps, 100).Seconds(),
		after.Logins-m.stats.Logins, v.doubled, v.lost)
	if len(problems) > 0 {
		e.dump(t)
		t.Errorf("%s:\n%s", m.name, strings.Join(problems[:min(20, len(problems))], "\n"))
	}
	return v
}

// notBackError lists sessions that are not connected.
type notBackError struct{ problems []string }

func (e *notBackError) Error() string {
	return fmt.Sprintf("%d sessions are not as they should be, for example: %s", len(e.problems), strings.Join(e.problems[:min(3, len(e.problems))], "; "))
}

func notBack(err error) int {
	var list *notBackError
	if errors.As(err, &list) {
		return len(list.problems)
	}
	return 1
}

// notConnected says which sessions are not connected, in the resource and at the simulator.
func (e *environment) notConnected(ctx context.Context) error {
	devices, err := e.standins.control.Devices(ctx)
	if err != nil {
		return err
	}
	connected := map[string]bool{}
	for _, d := range devices {
		connected[d.JID] = d.Connected
	}
	workers := map[string]bool{}
	pods, err := e.pods(ctx, "worker")
	if err != nil {
		return err
	}
	for i := range pods {
		workers[pods[i].Name] = podReady(&pods[i])
	}
	lists := map[string]map[string]*v1alpha1.WhatsAppSession{}
	var problems []string
	for _, s := range e.sessions {
		if lists[s.namespace] == nil {
			if lists[s.namespace], err = e.list(ctx, s.namespace); err != nil {
				return err
			}
		}
		if problem := s.problem(lists[s.namespace][s.name], connected, workers); problem != "" {
			problems = append(problems, s.name+": "+problem)
		}
	}
	if len(problems) > 0 {
		return &notBackError{problems}
	}
	return nil
}

func (s *session) problem(o *v1alpha1.WhatsAppSession, connected, workers map[string]bool) string {
	if o == nil {
		return "it does not exist"
	}
	is, linked := connected[s.jid]
	switch status := o.Status; {
	case !linked:
		return "its device is not linked any more"
	case status.Phase != v1alpha1.PhaseConnected:
		return fmt.Sprintf("it is %s (%s; worker %q, held by %q)", status.Phase, status.LastDisconnectReason, status.Worker, status.HeldBy)
	case status.JID != s.jid:
		return fmt.Sprintf("its device is %q and was %q", status.JID, s.jid)
	case status.HeldBy != status.Worker:
		return fmt.Sprintf("it is placed on %q, but held by %q", status.Worker, status.HeldBy)
	case !workers[status.Worker]:
		return fmt.Sprintf("it is on %q, which is not ready", status.Worker)
	case !is:
		return "it is Connected, but its device is not"
	}
	return ""
}

// unread sends a message to each session, and says which messages have no receipt: those
// that were sent before, and these. A message that had to be encrypted again was sent to a
// session that had lost its keys.
func (e *environment) unread(ctx context.Context) (int, error) {
	all, err := e.unacknowledged(ctx)
	if err != nil {
		return all, err
	}
	before, err := e.standins.control.Stats(ctx)
	if err != nil {
		return 1, err
	}
	if err := each(ctx, 0, len(e.sessions), func(ctx context.Context, i int) error { return e.send(ctx, e.sessions[i]) }); err != nil {
		return 1, err
	}
	if all, err := e.unacknowledged(ctx); err != nil {
		return all, err
	}
	after, err := e.standins.control.Stats(ctx)
	if err != nil {
		return 1, err
	}
	if n := after.Retries - before.Retries; n > 0 {
		return int(n), fmt.Errorf("%d sessions could not decrypt a message", n)
	}
	return 0, nil
}

func (e *environment) unacknowledged(ctx context.Context) (n int, err error) {
	err = testenv.Await(ctx, settleTimeout, func(ctx context.Context) error {
		stats, err := e.standins.control.Stats(ctx)
		if err != nil {
			return err
		}
		if n = stats.Unacknowledged; n > 0 {
			return fmt.Errorf("%d messages have no receipt", n)
		}
		return nil
	})
	return n, err
}

// messages numbers the messages that contacts send.
var messages atomic.Int64

// send sends a message from one of three contacts; each has its own ratchet with each device.
func (e *environment) send(ctx context.Context, s *session) error {
	n := messages.Add(1)
	if _, err := e.standins.control.Send(ctx, s.jid, fmt.Sprintf("1555000%04d", 1+n%3), fmt.Sprintf("message %d", n)); err != nil {
		return fmt.Errorf("sending a message to %s: %w", s.name, err)
	}
	return nil
}

// unpublished says which sessions' newest state Laravel does not have.
func (e *environment) unpublished(ctx context.Context) (n int, err error) {
	err = testenv.Await(ctx, settleTimeout, func(ctx context.Context) error {
		got, err := e.standins.received(ctx)
		if err != nil {
			n = 1
			return err
		}
		lists := map[string]map[string]*v1alpha1.WhatsAppSession{}
		var problems []string
		for _, s := range e.sessions {
			if lists[s.namespace] == nil {
				if lists[s.namespace], err = e.list(ctx, s.namespace); err != nil {
					n = 1
					return err
				}
			}
			o := lists[s.namespace][s.name]
			if o == nil {
				problems = append(problems, s.name+" does not exist")
				continue
			}
			last := got.Status[s.name]
			if last.Status != delivery.Active || last.Phase != string(o.Status.Phase) || last.JID != o.Status.JID || last.Epoch != o.Status.Epoch {
				problems = append(problems, fmt.Sprintf("%s is %s in epoch %d, and Laravel has %s, %s in epoch %d",
					s.name, o.Status.Phase, o.Status.Epoch, last.Status, last.Phase, last.Epoch))
			}
		}
		for _, s := range got.NotAccepted {
			problems = append(problems, "an update of "+s+" was not repeated after Laravel had refused it")
		}
		if n = len(problems); n > 0 {
			return fmt.Errorf("Laravel does not have %d states, for example: %s", n, strings.Join(problems[:min(3, n)], "; "))
		}
		return nil
	})
	return n, err
}

// dump writes to the test's log what a person needs to find the cause of a failure.
func (e *environment) dump(t *testing.T) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	t.Log(e.describePods(ctx))
	shown := 0
	for _, s := range e.sessions {
		byName, err := e.list(ctx, s.namespace)
		if err != nil {
			t.Log(err)
			break
		}
		if o := byName[s.name]; o != nil && o.Status.Phase != v1alpha1.PhaseConnected && shown < 3 {
			text, _ := json.Marshal(o.Status)
			t.Logf("%s: %s", s.name, text)
			shown++
		}
		if shown >= 3 {
			break
		}
	}
	for _, component := range []string{"manager", "worker"} {
		output, err := e.try(ctx, nil, "kubectl", "-n", systemNamespace, "logs", "--prefix", "--tail=25", "--all-containers",
			"-l", "app.kubernetes.io/instance="+e.release.name+",app.kubernetes.io/component="+component)
		t.Logf("--- %s\n%s", component, tail(output, 12_000))
		if err != nil {
			t.Log(err)
		}
	}
}

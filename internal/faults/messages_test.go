//go:build faults

package faults

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// messages compares the simulator's ledger with what Laravel has (ledger_test.go).
type messages struct {
	w *environment
	// checked is the number of the last entry of the ledger that an earlier case has checked.
	checked int64

	mu       sync.Mutex
	arrivals map[string]int  // key → how often the message was in a request
	again    map[string]bool // ids of the batches that were repeated after they had been accepted
}

func newMessages(w *environment) *messages {
	return &messages{w: w, arrivals: map[string]int{}, again: map[string]bool{}}
}

// observe gets each request of the receiver.
func (m *messages) observe(r laraveltest.Request) {
	if r.Kind != delivery.KindMessage {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, item := range r.Items {
		m.arrivals[item.Message.Key]++
	}
	if r.Repeated {
		m.again[r.BatchID] = true
	}
}

// wasRepeated reports whether a batch came again after it had been accepted.
func (m *messages) wasRepeated(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.again[id]
}

// ledger returns the entries with a higher number, the oldest first.
func (m *messages) ledger(after int64) (all []simulator.LedgerEntry) {
	for {
		part, err := m.w.simulator.Ledger(simulator.LedgerQuery{After: after})
		m.w.must(err)
		if len(part) == 0 {
			return all
		}
		all = append(all, part...)
		after = part[len(part)-1].Number
	}
}

// newest is the number of the newest entry of the ledger.
func (m *messages) newest() int64 {
	all := m.ledger(m.checked)
	if len(all) == 0 {
		return m.checked
	}
	return all[len(all)-1].Number
}

// logs returns what is known of the messages after an entry of the ledger and up to another one,
// by session.
func (m *messages) logs(after, last int64) (logs []messageLog) {
	byDevice := map[string]int{}
	all := m.w.allSessions()
	for _, s := range all {
		byDevice[s.jid] = len(logs)
		logs = append(logs, messageLog{session: s.name})
	}
	for _, e := range m.ledger(after) {
		if i, known := byDevice[e.Device]; known && e.Number <= last && isMessage(e, all[i]) {
			logs[i].ledger = append(logs[i].ledger, e)
		}
	}
	for i := range logs {
		if len(logs[i].ledger) > 0 {
			logs[i].stored = m.stored(logs[i].session)
		}
	}
	return logs
}

// isMessage reports whether Laravel must have an item for an entry: a message, except those of
// the own phone about the device itself, or a receipt.
func isMessage(e simulator.LedgerEntry, s *session) bool {
	return e.Stanza == "message" && (e.Phone != s.phone || e.Chat != e.Sender) || e.Stanza == "receipt" && e.Kind == "read"
}

func (m *messages) stored(session string) (stored []storedMessage) {
	received := m.w.laravel.Messages(session)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range received {
		id := r.ID
		if r.Receipt != nil && len(r.Receipt.Messages) > 0 { // WhatsApp knows a receipt by the message
			id = r.Receipt.Messages[0].ID
		}
		stored = append(stored, storedMessage{Numbers: r.Numbers, Key: r.Key, ID: id, Type: r.Type, Arrivals: m.arrivals[r.Key]})
	}
	return stored
}

// messageCounts are those of a case.
type messageCounts struct {
	// again is how often messages came to Laravel after the first time, pending how many of the
	// problems may end by themselves.
	messages, again, pending int
}

// describedProblems is how many wrong messages are printed with those around them.
const describedProblems = 5

// wrong returns the problems of the messages after an entry of the ledger and up to another one.
func (m *messages) wrong(after, last int64) (problems []string, counts messageCounts) {
	for _, log := range m.logs(after, last) {
		counts.messages += len(log.ledger)
		ids := map[string]bool{}
		for _, e := range log.ledger {
			ids[e.ID] = true
		}
		for _, s := range log.stored {
			if ids[s.ID] {
				counts.again += max(0, s.Arrivals-1)
			}
		}
		for _, p := range log.problems() {
			if !p.final() {
				counts.pending++
			}
			if len(problems) < describedProblems {
				problems = append(problems, log.describe(p)+m.w.history.describe(log.session))
			} else {
				problems = append(problems, fmt.Sprintf("%s: %s of %s: %s", p.rule, log.ledger[p.entry].ID, log.session, p.text))
			}
		}
	}
	return problems, counts
}

// undelivered waits until Laravel has every message after an entry of the ledger and nothing
// waits to be delivered, and returns what is wrong after that. What waits may be a message that
// Laravel has already, under another key.
func (m *messages) undelivered(after int64) (problems []string, counts messageCounts) {
	last := m.newest()
	err := m.w.await(recoveryTimeout, func(ctx context.Context) error {
		waiting, err := m.waiting(ctx) // before the comparison, which then includes them
		if err != nil {
			return err
		}
		problems, counts = m.wrong(after, last)
		if counts.pending > 0 || waiting > 0 {
			return fmt.Errorf("%d messages are not as they must be, and %d wait in the inbox", counts.pending, waiting)
		}
		return nil
	})
	if err != nil && counts.pending == 0 {
		problems = append(problems, err.Error())
	}
	if len(problems) == 0 {
		m.checked = last
	}
	return problems, counts
}

// waiting is how many messages are stored for Laravel.
func (m *messages) waiting(ctx context.Context) (n int, err error) {
	db, err := sql.Open("pgx", m.w.store.URL())
	if err != nil {
		return 0, err
	}
	defer func() { _ = db.Close() }()
	if err := db.QueryRowContext(ctx, "SELECT count(*) FROM whatsapp_operator_inbox").Scan(&n); err != nil {
		return 0, fmt.Errorf("counting the messages in the inbox: %w", err)
	}
	return n, nil
}

// checkAllMessages compares the messages of all cases once more, when an environment ends: one
// may have come again, under another key, after the check of its own case.
func (w *environment) checkAllMessages(t *testing.T) {
	t.Helper()
	w.t = t
	w.traffic.hold.Lock()
	defer w.traffic.hold.Unlock()
	problems, counts := w.messages.undelivered(0)
	if len(problems) > 0 {
		t.Errorf("at the end: %s", strings.Join(problems[:min(40, len(problems))], "\n"))
		w.dump(t, nil)
	}
	t.Logf("%d messages of all cases were compared, %d were at Laravel again", counts.messages, counts.again)
}

// mustArrive waits, while a fault lasts, until Laravel has every message that was sent so far.
func (w *environment) mustArrive(while string) {
	w.t.Helper()
	last := w.messages.newest()
	w.eventually("all messages to arrive while "+while, func(context.Context) error {
		problems, _ := w.messages.wrong(w.messages.checked, last)
		if len(problems) > 0 {
			return fmt.Errorf("%d messages, for example: %s", len(problems), problems[0])
		}
		return nil
	})
	w.record("all messages have arrived while %s", while)
}

// mustBeAcknowledged waits, while a fault lasts, until WhatsApp has an acknowledgement of every
// message that was sent so far.
func (w *environment) mustBeAcknowledged(while string) {
	w.t.Helper()
	last := w.messages.newest()
	w.eventually("all messages to be acknowledged while "+while, func(context.Context) error {
		for _, log := range w.messages.logs(w.messages.checked, last) {
			if i := slices.IndexFunc(log.ledger, func(e simulator.LedgerEntry) bool { return e.Acknowledged.IsZero() }); i >= 0 {
				return fmt.Errorf("%s: %s", log.session, log.line(log.ledger[i]))
			}
		}
		return nil
	})
	w.record("all messages are acknowledged while %s", while)
}

// holdAnswer makes Laravel accept the next batch of messages without an answer, and returns its
// id when it has come.
func (w *environment) holdAnswer() (batch string) {
	held := make(chan string, 1)
	w.laravel.AnswerWith(func(r laraveltest.Request) laraveltest.Answer {
		if r.Kind == delivery.KindMessage && !r.Repeated {
			select {
			case held <- r.BatchID:
				return laraveltest.AcceptThenHang()
			default:
			}
		}
		return laraveltest.Accept()
	})
	w.eventually("a batch of messages", func(context.Context) error {
		select {
		case batch = <-held:
			return nil
		default:
			return fmt.Errorf("none came")
		}
	})
	w.record("Laravel has accepted %s and does not answer", batch)
	return batch
}

// sendWhileAway sends n messages to a session whose device cannot log in.
func (w *environment) sendWhileAway(s *session, n int) {
	w.inject(simulator.Fault{Kind: simulator.FaultRefuse, Device: s.jid})
	w.eventually(s.name+" to be away", func(context.Context) error {
		for _, d := range w.simulator.Devices() {
			if d.JID == s.jid && d.Connected {
				return fmt.Errorf("its device is connected")
			}
		}
		return nil
	})
	for range n {
		w.traffic.hold.Lock()
		w.traffic.send(w.t.Context(), s)
		w.traffic.hold.Unlock()
	}
	w.record("%d messages wait for %s", n, s.name)
}

// describe returns the last changes of a session, each in a line.
func (h *sessionHistory) describe(name string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.changes[name]) == 0 {
		return ""
	}
	return "\n    " + strings.Join(h.changes[name], "\n    ")
}

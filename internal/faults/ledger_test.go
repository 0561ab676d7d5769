package faults

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

// This file compares what the simulator knows of a session's messages with what Laravel has.
// It is pure, and the only file of this package that also `make test` runs.

// storedMessage is a message as the receiver has stored it.
type storedMessage struct {
	delivery.Numbers
	Key, ID string
	Type    delivery.MessageType
	// Arrivals is how often it was in a request.
	Arrivals int
}

// messageLog is everything that is known of the messages of one session.
type messageLog struct {
	session string
	// ledger has the messages that WhatsApp has for the session's device, the oldest first.
	ledger []simulator.LedgerEntry
	// stored has what the receiver has stored of the session, in its order.
	stored []storedMessage
}

// messageProblem is a message that Laravel does not have as it must.
type messageProblem struct {
	rule  string
	entry int // its index in the ledger
	text  string
}

const (
	ruleLost           = "lost"           // acknowledged, but Laravel does not have it
	ruleMissing        = "missing"        // neither acknowledged nor at Laravel
	ruleUnacknowledged = "unacknowledged" // WhatsApp will deliver it again although Laravel has it
	ruleDoubled        = "doubled"        // Laravel has it under two keys
	ruleOtherKey       = "other key"      // Laravel has it under a key that it must not have
	ruleDisordered     = "disordered"     // Laravel got a later message of the session before it
	ruleUnread         = "unread"         // Laravel has only that there is a message
)

// final reports whether nothing that comes later can end the problem.
func (p messageProblem) final() bool {
	return p.rule == ruleDoubled || p.rule == ruleOtherKey || p.rule == ruleDisordered
}

// problems lists what is wrong, in the order of the ledger.
func (l messageLog) problems() (problems []messageProblem) {
	stored := map[string][]storedMessage{}
	position := map[string]int{}
	for i, m := range l.stored {
		if _, known := stored[m.ID]; !known {
			position[m.ID] = i
		}
		stored[m.ID] = append(stored[m.ID], m)
	}
	// latest is where the receiver stored the last of the messages before this one.
	latest, after := -1, ""
	for i, e := range l.ledger {
		report := func(rule, format string, args ...any) {
			problems = append(problems, messageProblem{rule: rule, entry: i, text: fmt.Sprintf(format, args...)})
		}
		found := stored[e.ID]
		if len(found) == 0 {
			if e.Acknowledged.IsZero() {
				report(ruleMissing, "it is not acknowledged, and Laravel does not have it")
			} else {
				report(ruleLost, "it is acknowledged, but Laravel does not have it")
			}
			continue
		}
		if e.Acknowledged.IsZero() {
			report(ruleUnacknowledged, "Laravel has it, but it is not acknowledged")
		}
		keys := map[string]struct{}{}
		for _, m := range found {
			keys[m.Key] = struct{}{}
			if key := l.key(e); key != "" && m.Key != key {
				report(ruleOtherKey, "its key is %s, and must be %s", m.Key, key)
			}
		}
		if len(keys) > 1 {
			report(ruleDoubled, "Laravel has it under %d keys", len(keys))
		}
		if last := (delivery.MessageItem{Type: found[len(found)-1].Type}); last.Placeholder() {
			report(ruleUnread, "Laravel has it as %s only", last.Type)
		}
		if cameAgain(e) {
			continue
		}
		if at := position[e.ID]; at < latest {
			report(ruleDisordered, "Laravel got it before %s", after)
		} else {
			latest, after = at, e.ID
		}
	}
	return problems
}

// key is the key that a message must have, or empty for a receipt. The simulator knows the LID of
// everybody, and always gives it to the device.
func (l messageLog) key(e simulator.LedgerEntry) string {
	if e.Stanza != "message" {
		return ""
	}
	return delivery.MessageKey(l.session, e.Chat, e.Sender, e.ID)
}

// cameAgain reports whether a message was sent again by its sender or by the own phone, which
// comes after later messages.
func cameAgain(e simulator.LedgerEntry) bool {
	return e.Encrypted > 1 || e.Retries > 0 || e.PhoneRequests > 0
}

// aroundProblem is how many messages before and after a wrong one are printed.
const aroundProblem = 3

// describe prints a problem with the messages around it.
func (l messageLog) describe(p messageProblem) string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s: %s of %s: %s", p.rule, l.ledger[p.entry].ID, l.session, p.text)
	first, last := max(0, p.entry-aroundProblem), min(len(l.ledger)-1, p.entry+aroundProblem)
	for i := first; i <= last; i++ {
		mark := " "
		if i == p.entry {
			mark = ">"
		}
		fmt.Fprintf(&text, "\n  %s %s", mark, l.line(l.ledger[i]))
	}
	return text.String()
}

// line is what is known of a message.
func (l messageLog) line(e simulator.LedgerEntry) string {
	at := func(t time.Time) string { return t.Format("15:04:05.000") }
	text := fmt.Sprintf("%d %s %s %s of %s in %s: queued %s, delivered %d times", e.Number, e.Stanza, e.Kind, e.ID, e.Sender, e.Chat, at(e.Queued), e.Delivered)
	if e.Delivered > 0 {
		text += fmt.Sprintf(" (%s to %s)", at(e.FirstDelivered), at(e.LastDelivered))
	}
	if e.Acknowledged.IsZero() {
		text += ", not acknowledged"
	} else {
		text += fmt.Sprintf(", acknowledged %s by %s", at(e.Acknowledged), e.By)
	}
	if cameAgain(e) {
		text += fmt.Sprintf(", encrypted %d times, %d retry receipts, phone asked %d times and answered %d times", e.Encrypted, e.Retries, e.PhoneRequests, e.PhoneAnswers)
	}
	some := false
	for i, m := range l.stored {
		if m.ID == e.ID {
			some = true
			text += fmt.Sprintf("; stored as number %d: %s, key %s, epoch %d, seq %d, in %d requests", i+1, m.Type, m.Key, m.Epoch, m.Seq, m.Arrivals)
		}
	}
	if !some {
		text += "; not stored"
	}
	return text
}

func TestMessageProblems(t *testing.T) {
	start := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	acked := func(id string) simulator.LedgerEntry {
		return simulator.LedgerEntry{ID: id, Stanza: "message", Chat: "1@lid", Sender: "1@lid", Delivered: 1, Acknowledged: start, By: "delivered", Encrypted: 1}
	}
	waiting := func(id string) simulator.LedgerEntry {
		return simulator.LedgerEntry{ID: id, Stanza: "message", Chat: "1@lid", Sender: "1@lid", Encrypted: 1}
	}
	key := func(id string) string { return delivery.MessageKey("s", "1@lid", "1@lid", id) }
	again := func(id string) simulator.LedgerEntry {
		e := acked(id)
		e.Encrypted, e.Retries = 2, 1
		return e
	}
	asked := func(id string) simulator.LedgerEntry {
		e := acked(id)
		e.PhoneRequests = 1
		return e
	}
	text := func(id string) storedMessage {
		return storedMessage{ID: id, Key: key(id), Type: delivery.TypeText, Arrivals: 1}
	}
	as := func(kind delivery.MessageType, id string) storedMessage {
		return storedMessage{ID: id, Key: key(id), Type: kind, Arrivals: 1}
	}
	under := func(key, id string) storedMessage {
		return storedMessage{ID: id, Key: key, Type: delivery.TypeText, Arrivals: 1}
	}
	type entries = []simulator.LedgerEntry
	type stored = []storedMessage
	for _, row := range []struct {
		name   string
		ledger entries
		stored stored
		want   []string
	}{
		{"all messages arrived, in order", entries{acked("1"), acked("2"), acked("3")}, stored{text("1"), text("2"), text("3")}, nil},
		{"a message that the ledger does not have is no problem", entries{acked("1")}, stored{text("a call"), text("1")}, nil},
		{"an acknowledged message is not at Laravel", entries{acked("1"), acked("2")}, stored{text("2")}, []string{"lost 1"}},
		{"a message is neither acknowledged nor at Laravel", entries{acked("1"), waiting("2")}, stored{text("1")}, []string{"missing 2"}},
		{"a message at Laravel is not acknowledged", entries{waiting("1")}, stored{text("1")}, []string{"unacknowledged 1"}},
		{"a message has two keys", entries{acked("1")}, stored{text("1"), under("another", "1")}, []string{"other key 1", "doubled 1"}},
		{"a message has a wrong key", entries{acked("1")}, stored{under("another", "1")}, []string{"other key 1"}},
		{"a receipt may have any key", entries{{ID: "1", Stanza: "receipt", Acknowledged: start}}, stored{{ID: "1", Key: "another", Type: delivery.TypeReceipt}}, nil},
		{"two messages in the wrong order", entries{acked("1"), acked("2"), acked("3")}, stored{text("2"), text("1"), text("3")}, []string{"disordered 2"}},
		{"a message before all others", entries{acked("1"), acked("2"), acked("3")}, stored{text("3"), text("1"), text("2")}, []string{"disordered 3"}},
		{"a message behind all others", entries{acked("1"), acked("2"), acked("3")}, stored{text("2"), text("3"), text("1")}, []string{"disordered 2", "disordered 3"}},
		{"a message that was encrypted again may come later", entries{again("1"), acked("2")}, stored{text("2"), text("1")}, nil},
		{"a message that the phone was asked for may come later", entries{asked("1"), acked("2")}, stored{text("2"), text("1")}, nil},
		{"a message that could not be decrypted is not replaced", entries{again("1")}, stored{as(delivery.TypeUndecryptable, "1")}, []string{"unread 1"}},
		{"a message that was not sent to the device is not replaced", entries{asked("1")}, stored{as(delivery.TypeUnavailable, "1")}, []string{"unread 1"}},
		{"the last version of a message counts", entries{again("1")}, stored{as(delivery.TypeUndecryptable, "1"), text("1")}, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			log := messageLog{session: "s", ledger: row.ledger, stored: row.stored}
			var got []string
			for _, p := range log.problems() {
				got = append(got, p.rule+" "+row.ledger[p.entry].ID)
			}
			NewWithT(t).Expect(got).To(Equal(row.want))
		})
	}
}

func TestAProblemIsPrintedWithTheMessagesAroundIt(t *testing.T) {
	g := NewWithT(t)
	start := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	log := messageLog{session: "s-0001"}
	for n := range 9 {
		log.ledger = append(log.ledger, simulator.LedgerEntry{
			Number: int64(n + 1), ID: fmt.Sprint("M", n+1), Stanza: "message", Kind: "text", Sender: "1@lid", Chat: "1@lid",
			Queued: start, Delivered: 2, FirstDelivered: start, LastDelivered: start.Add(time.Second), Acknowledged: start.Add(2 * time.Second), By: "delivered", Encrypted: 1,
		})
		log.stored = append(log.stored, storedMessage{ID: fmt.Sprint("M", n+1), Key: delivery.MessageKey("s-0001", "1@lid", "1@lid", fmt.Sprint("M", n+1)), Type: delivery.TypeText, Arrivals: 2, Numbers: delivery.Numbers{Epoch: 5, Seq: int64(n)}})
	}
	log.stored = slices.Delete(log.stored, 4, 5)
	problems := log.problems()
	g.Expect(problems).To(HaveLen(1))
	lines := strings.Split(log.describe(problems[0]), "\n")
	g.Expect(lines).To(HaveLen(1 + 7))
	g.Expect(lines[0]).To(Equal("lost: M5 of s-0001: it is acknowledged, but Laravel does not have it"))
	g.Expect(lines[1]).To(Equal("    2 message text M2 of 1@lid in 1@lid: queued 12:00:00.000, delivered 2 times (12:00:00.000 to 12:00:01.000), acknowledged 12:00:02.000 by delivered; stored as number 2: text, key " + log.stored[1].Key + ", epoch 5, seq 1, in 2 requests"))
	g.Expect(lines[4]).To(HavePrefix("  > 5 message text M5 of 1@lid"))
	g.Expect(lines[4]).To(HaveSuffix("; not stored"))
	g.Expect(lines[7]).To(HavePrefix("    8 message text M8"))
}

package demo

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
)

// newLaravel starts the stand-in for the web application, which does what the contract
// requires, and prints each request.
func newLaravel(printLines func(lines ...string)) (*laraveltest.Receiver, error) {
	receiver, err := laraveltest.New(laraveltest.Options{
		Token: randomText(), Secret: "whsec_" + randomText(),
		Observe: func(r laraveltest.Request) { printLines(describe(r)...) },
	})
	if err != nil {
		return nil, fmt.Errorf("starting the stand-in for Laravel: %w", err)
	}
	return receiver, nil
}

// laravelState is what Laravel knows.
type laravelState struct {
	// Status are the newest statuses by session id.
	Status map[string]delivery.StatusItem
	// Requests counts the batches.
	Requests int
	// Messages counts the messages, and HasMessage says which sessions have one.
	Messages   int
	HasMessage map[string]bool
}

// describe is a request as lines of text: one, and one more for each message if there are several.
func describe(r laraveltest.Request) []string {
	line := fmt.Sprintf("Laravel ← POST %-24s ", r.Path)
	if r.Unverified != nil {
		return []string{line + "refused: " + r.Unverified.Error()}
	}
	line += fmt.Sprintf("%2d in one request: %s", len(r.Items), describeItems(r))
	switch {
	case r.Repeated:
		line += "  (a repeated batch)"
	case r.Stale > 0:
		line += fmt.Sprintf("  (%d not newer than what Laravel has)", r.Stale)
	}
	lines := []string{line}
	if r.Kind != delivery.KindMessage || len(r.Items) == 1 {
		return lines
	}
	for i, item := range r.Items {
		if i == maxMessages {
			return append(lines, fmt.Sprintf("          … and %d more", len(r.Items)-i))
		}
		lines = append(lines, "          "+describeMessage(item.Message))
	}
	return lines
}

// maxMessages is how many messages of a request have a line.
const maxMessages = 10

// describeMessage names the session, the sender and the text of a message. The text comes from
// a stranger, so control characters are written as Go writes them.
func describeMessage(m laraveltest.Message) string {
	from := ""
	if m.Sender != nil {
		from = cmp.Or(m.Sender.Phone, m.Sender.LID, m.Sender.Other)
	}
	line := fmt.Sprintf("%s has a message from %s", m.SessionID, orNone(from))
	if m.Type != delivery.TypeText {
		line += " (" + string(m.Type) + ")"
	}
	if m.Text != "" {
		line += fmt.Sprintf(": %q", m.Text)
	}
	return line
}

// describeItems summarizes a batch: one item, or how many there are of each state.
func describeItems(r laraveltest.Request) string {
	one := r.Items[0] // a batch without items is refused
	switch {
	case r.Kind == delivery.KindMessage && len(r.Items) > 1:
		return "messages"
	case r.Kind == delivery.KindMessage:
		return describeMessage(one.Message)
	case r.Kind == delivery.KindQR && len(r.Items) > 1:
		return fmt.Sprintf("codes of %d sessions", len(r.Items))
	case r.Kind == delivery.KindQR && one.QR.Passkey != nil:
		return "a request for the passkey of " + one.SessionID
	case r.Kind == delivery.KindQR && one.QR.PairingCode != "":
		return "a pairing code of " + one.SessionID
	case r.Kind == delivery.KindQR:
		return "a QR code of " + one.SessionID
	case len(r.Items) == 1:
		return fmt.Sprintf("%s is %s (%s)", one.SessionID, one.Status.Status, one.Status.Phase)
	}
	counts := map[string]int{}
	for _, item := range r.Items {
		counts[string(item.Status.Status)]++
	}
	return list(counts)
}

// list writes counts as "2 active, 1 pending", in the order of their names.
func list(counts map[string]int) string {
	parts := make([]string, 0, len(counts))
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[name], name))
	}
	return strings.Join(parts, ", ")
}

package app

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/whatsapp-operator/whatsapp-operator/internal/membership"
)

// namedWorkers is how many workers the warning names.
const namedWorkers = 3

// droppedProblem says which workers drop messages that Laravel would take; empty: none does. It
// is pure.
func droppedProblem(workers []membership.Member) string {
	var names []string
	for _, w := range workers {
		if w.DropsMessages {
			names = append(names, w.Name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	slices.Sort(names)
	more := ""
	if n := len(names) - namedWorkers; n > 0 {
		names, more = names[:namedWorkers], fmt.Sprintf(" and %d more", n)
	}
	return fmt.Sprintf("messages are LOST: --laravel-url is given, but these workers acknowledge messages and drop them: %s%s. "+
		"A rollout that is replacing them ends this; otherwise remove their --drop-messages (the variable WHATSAPP_OPERATOR_DROP_MESSAGES)", strings.Join(names, ", "), more)
}

// watchDroppedMessages warns while workers drop messages although this manager delivers them.
// A person who gives the manager its URL may forget the workers, and nothing else would show that
// messages are missing.
func (d *dependencies) watchDroppedMessages(ctx context.Context, warn func(reason, action, message string)) error {
	return d.watchProblem(ctx, "workers that drop messages", "MessagesDropped", "Deliver", warn, func(ctx context.Context) (string, error) {
		workers, err := d.workers(ctx)
		return droppedProblem(workers), err
	})
}

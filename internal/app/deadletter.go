package app

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"

	"github.com/whatsapp-operator/whatsapp-operator/internal/batch"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

func newDeadLetterCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "deadletter",
		Short: "Work on the updates that Laravel refused for good",
		Long: `Work on the updates that Laravel refused for good.

The present state of their sessions is enqueued again automatically when the application
accepts again: use these commands to inspect dead letters, or to deliver them sooner. Messages
are not enqueued again automatically. Theirs are in the database: give --store or --store-file.`,
	})
	cmd.AddCommand(newDeadLetterListCommand(), newDeadLetterShowCommand(), newDeadLetterReplayCommand(), newDeadLetterDropCommand())
	return cmd
}

// deadLetterQueue is what the commands need of *batch.Queue and *store.Inbox.
type deadLetterQueue interface {
	DeadLetters(ctx context.Context, kind delivery.Kind, visit func(delivery.DeadLetter) bool) error
	Replay(ctx context.Context, kind delivery.Kind, id string) (delivery.ReplayResult, error)
	Drop(ctx context.Context, kind delivery.Kind, ids ...string) (int, error)
}

// allDeadLetters are the dead letters of states, in Redis, and of messages, in the database.
type allDeadLetters struct {
	log    logr.Logger
	states *batch.Queue
	// messages is nil where no database is given.
	messages deadLetterQueue
}

func (a *allDeadLetters) of(kind delivery.Kind) deadLetterQueue {
	if kind == delivery.KindMessage {
		return a.messages
	}
	return a.states
}

func (a *allDeadLetters) DeadLetters(ctx context.Context, kind delivery.Kind, visit func(delivery.DeadLetter) bool) error {
	return a.of(kind).DeadLetters(ctx, kind, visit)
}

func (a *allDeadLetters) Replay(ctx context.Context, kind delivery.Kind, id string) (delivery.ReplayResult, error) {
	result, err := a.of(kind).Replay(ctx, kind, id)
	if err == nil && result == delivery.Replayed && kind == delivery.KindMessage {
		err = a.states.WakeForMessages(ctx)
	}
	if err != nil && result == delivery.Replayed { // it waits already, and the flusher also reads without a wake-up
		a.log.Error(err, "Failed to wake the flusher; what was replayed is delivered some seconds later", "kind", kind, "id", id)
		err = nil
	}
	return result, err
}

func (a *allDeadLetters) Drop(ctx context.Context, kind delivery.Kind, ids ...string) (int, error) {
	return a.of(kind).Drop(ctx, kind, ids...)
}

// deadLetterFilter selects dead letters.
type deadLetterFilter struct {
	kind, sessionID string
	all             bool
	ids             []string
	// mustName: the command changes dead letters, so the user must select them.
	mustName bool
	// withoutMessages: no database is given, so only those of states can be found.
	withoutMessages bool
}

func (f *deadLetterFilter) bind(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.kind, "kind", "", "only those of this kind: qr, status or message")
	cmd.Flags().StringVar(&f.sessionID, "session", "", "only those of this session id")
}

// errNoDatabase says that the dead letters of messages cannot be reached.
var errNoDatabase = errors.New("the dead letters of messages are in the database: set --store or --store-file, as for the manager")

// kinds returns the selected kinds.
func (f *deadLetterFilter) kinds() ([]delivery.Kind, error) {
	switch {
	case f.kind == "" && f.withoutMessages:
		return delivery.StateKinds, nil
	case f.kind == "":
		return delivery.Kinds, nil
	case f.withoutMessages && f.kind == string(delivery.KindMessage):
		return nil, errNoDatabase
	case slices.Contains(delivery.Kinds, delivery.Kind(f.kind)):
		return []delivery.Kind{delivery.Kind(f.kind)}, nil
	default:
		return nil, fmt.Errorf("there is no kind %q: choose one of %v", f.kind, delivery.Kinds)
	}
}

// check returns the mistakes in the filter, before any request is sent.
func (f *deadLetterFilter) check() error {
	_, err := f.kinds()
	if f.mustName {
		err = errors.Join(err, f.named())
	}
	return err
}

// named returns an error where the user has selected no dead letters.
func (f *deadLetterFilter) named() error {
	if len(f.ids) == 0 && f.sessionID == "" && !f.all {
		return errors.New("no dead letter is named: give ids as \"deadletter list\" shows them, --session, or --all")
	}
	return nil
}

// find returns the selected dead letters, the oldest of each kind first. An id that no
// dead letter has is an error.
func (f *deadLetterFilter) find(ctx context.Context, queue deadLetterQueue) ([]delivery.DeadLetter, error) {
	kinds, err := f.kinds()
	if err != nil {
		return nil, err
	}
	var found []delivery.DeadLetter
	missing := slices.Clone(f.ids)
	for _, kind := range kinds {
		err := queue.DeadLetters(ctx, kind, func(l delivery.DeadLetter) bool {
			if (f.sessionID == "" || strings.EqualFold(l.SessionID, f.sessionID)) && (len(f.ids) == 0 || slices.Contains(f.ids, l.ID)) {
				found = append(found, l)
				missing = slices.DeleteFunc(missing, func(id string) bool { return id == l.ID })
			}
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 && f.withoutMessages {
		return nil, fmt.Errorf("there is no dead letter %q of a state: \"deadletter list\" shows those that there are; %w", missing, errNoDatabase)
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("there is no dead letter %q: \"deadletter list\" shows those that there are", missing)
	}
	return found, nil
}

// deadLetterCommand completes a command that works on this installation's dead letters.
func deadLetterCommand(cmd *cobra.Command, filter *deadLetterFilter, run func(ctx context.Context, queue deadLetterQueue, out io.Writer) error) *cobra.Command {
	config := &commonConfig{}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return start(cmd, config, func(ctx context.Context, log logr.Logger) (err error) {
			d, err := openUnclaimed(ctx, config, redis.Manager, processInfo{}, log)
			if err != nil {
				return err
			}
			defer closing(closer(d.close), &err)
			if err := redis.CheckInstallation(ctx, d.redis, d.keys, d.installation); err != nil {
				return fmt.Errorf("reading which installation owns Redis: %w", err)
			}
			all := &allDeadLetters{log: log, states: d.queue}
			if filter.withoutMessages {
				log.Info("The dead letters of messages are not included, because no database is given")
			} else {
				if err := d.openCheckedStore(ctx); err != nil {
					return err
				}
				all.messages = store.NewInbox(d.store, store.InboxOptions{})
			}
			return run(ctx, all, cmd.OutOrStdout())
		})
	}
	config.bind(cmd.Flags())
	filter.bind(cmd)
	return configured(cmd, func(args []string) error {
		filter.ids = args
		filter.withoutMessages = config.StoreURL == "" && config.StoreURLFile == ""
		err := config.completeWithoutStore()
		if !filter.withoutMessages {
			err = errors.Join(err, config.checkStore())
		}
		return errors.Join(err, filter.check())
	})
}

func newDeadLetterListCommand() *cobra.Command {
	filter := &deadLetterFilter{}
	return deadLetterCommand(&cobra.Command{
		Use:   "list",
		Short: "List the dead letters",
		Args:  noArguments,
	}, filter, func(ctx context.Context, queue deadLetterQueue, out io.Writer) error {
		return listDeadLetters(ctx, queue, filter, out)
	})
}

func listDeadLetters(ctx context.Context, queue deadLetterQueue, filter *deadLetterFilter, out io.Writer) error {
	found, err := filter.find(ctx, queue)
	if err != nil {
		return err
	}
	rows := make([][]string, 0, len(found))
	for _, l := range found {
		rows = append(rows, []string{l.ID, string(l.Kind), l.SessionID, stamp(l.At), string(l.Reason), l.Answer})
	}
	return table(out, []string{"ID", "KIND", "SESSION-ID", "SINCE", "REASON", "ANSWER"}, rows)
}

func newDeadLetterShowCommand() *cobra.Command {
	filter := &deadLetterFilter{}
	return deadLetterCommand(&cobra.Command{
		Use:   "show ID",
		Short: "Print a dead letter, with what Laravel was sent and what it answered",
		Args:  oneArgument("the id of a dead letter, as \"deadletter list\" shows it"),
	}, filter, func(ctx context.Context, queue deadLetterQueue, out io.Writer) error {
		return showDeadLetters(ctx, queue, filter, out)
	})
}

func showDeadLetters(ctx context.Context, queue deadLetterQueue, filter *deadLetterFilter, out io.Writer) error {
	found, err := filter.find(ctx, queue)
	if err != nil {
		return err
	}
	for _, l := range found {
		key := ""
		if l.Key != "" {
			key = "key:     " + l.Key + "\n"
		}
		payload := &bytes.Buffer{}
		if err := json.Indent(payload, l.Payload, "", "  "); err != nil {
			payload = bytes.NewBufferString("(it cannot be read)")
		}
		if _, err := fmt.Fprintf(out, "id:      %s\nkind:    %s\nsession: %s\n%ssince:   %s\nbatch:   %s\nreason:  %s\nanswer:  %s\nitem:    %s\n",
			l.ID, l.Kind, l.SessionID, key, stamp(l.At), l.BatchID, l.Reason, l.Answer, payload); err != nil {
			return fmt.Errorf("printing: %w", err)
		}
	}
	return nil
}

func newDeadLetterReplayCommand() *cobra.Command {
	filter := &deadLetterFilter{mustName: true}
	cmd := deadLetterCommand(&cobra.Command{
		Use:   "replay [ID...]",
		Short: "Deliver dead letters again",
		Long: `Deliver dead letters again, with the numbers that they had.

A message is delivered again with the key that it had, after the other messages of its session
that wait. A state is kept as a dead letter, and the command reports it, where the session has
a newer one, which is delivered automatically, or where the QR code has expired.`,
	}, filter, func(ctx context.Context, queue deadLetterQueue, out io.Writer) error {
		return replayDeadLetters(ctx, queue, filter, out)
	})
	cmd.Flags().BoolVar(&filter.all, "all", false, "all of them")
	return cmd
}

func replayDeadLetters(ctx context.Context, queue deadLetterQueue, filter *deadLetterFilter, out io.Writer) error {
	if err := filter.named(); err != nil {
		return err
	}
	found, err := filter.find(ctx, queue)
	if err != nil {
		return err
	}
	rows := make([][]string, 0, len(found))
	for _, l := range found {
		result, err := queue.Replay(ctx, l.Kind, l.ID)
		if err != nil {
			return errors.Join(err, table(out, replayHead, rows))
		}
		rows = append(rows, []string{l.ID, string(l.Kind), l.SessionID, replayResults[result]})
	}
	return table(out, replayHead, rows)
}

var (
	replayHead    = []string{"ID", "KIND", "SESSION-ID", "RESULT"}
	replayResults = map[delivery.ReplayResult]string{
		delivery.Replayed:       "replayed: it waits for its delivery",
		delivery.Superseded:     "not replayed, superseded: the session has a newer update",
		delivery.Expired:        "not replayed, expired: the code cannot be scanned any more",
		delivery.OtherNamespace: "not replayed: a session of another namespace has this id now, and would get the message",
		delivery.NotFound:       "gone: it was replayed or dropped meanwhile",
		delivery.Unreadable:     "not replayed: an older version wrote it without what a replay needs; drop it",
	}
)

func newDeadLetterDropCommand() *cobra.Command {
	filter := &deadLetterFilter{mustName: true}
	cmd := deadLetterCommand(&cobra.Command{
		Use:   "drop [ID...]",
		Short: "Delete dead letters for good",
	}, filter, func(ctx context.Context, queue deadLetterQueue, out io.Writer) error {
		return dropDeadLetters(ctx, queue, filter, out)
	})
	cmd.Flags().BoolVar(&filter.all, "all", false, "all of them")
	return cmd
}

func dropDeadLetters(ctx context.Context, queue deadLetterQueue, filter *deadLetterFilter, out io.Writer) error {
	if err := filter.named(); err != nil {
		return err
	}
	found, err := filter.find(ctx, queue)
	if err != nil {
		return err
	}
	ids := map[delivery.Kind][]string{}
	for _, l := range found {
		ids[l.Kind] = append(ids[l.Kind], l.ID)
	}
	dropped := 0
	for _, kind := range delivery.Kinds {
		for chunk := range slices.Chunk(ids[kind], 500) { // none of messages where there is no database
			n, err := queue.Drop(ctx, kind, chunk...)
			if err != nil {
				return err
			}
			dropped += n
		}
	}
	if _, err := fmt.Fprintf(out, "dropped %d\n", dropped); err != nil {
		return fmt.Errorf("printing: %w", err)
	}
	return nil
}

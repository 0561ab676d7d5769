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
)

func newDeadLetterCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "deadletter",
		Short: "Work on the updates that Laravel refused for good",
		Long: `Work on the updates that Laravel refused for good.

The present state of their sessions is enqueued again automatically when the application
accepts again: use these commands to inspect dead letters, or to deliver them sooner.`,
	})
	cmd.AddCommand(newDeadLetterListCommand(), newDeadLetterShowCommand(), newDeadLetterReplayCommand(), newDeadLetterDropCommand())
	return cmd
}

// deadLetterQueue is what the commands need of *batch.Queue.
type deadLetterQueue interface {
	DeadLetters(ctx context.Context, kind delivery.Kind, visit func(batch.DeadLetter) bool) error
	Replay(ctx context.Context, kind delivery.Kind, id string) (batch.ReplayResult, error)
	Drop(ctx context.Context, kind delivery.Kind, ids ...string) (int, error)
}

// deadLetterFilter selects dead letters.
type deadLetterFilter struct {
	kind, sessionID string
	all             bool
	ids             []string
	// mustName: the command changes dead letters, so the user must select them.
	mustName bool
}

func (f *deadLetterFilter) bind(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.kind, "kind", "", "only those of this kind: qr or status")
	cmd.Flags().StringVar(&f.sessionID, "session", "", "only those of this session id")
}

// kinds returns the selected kinds.
func (f *deadLetterFilter) kinds() ([]delivery.Kind, error) {
	switch {
	case f.kind == "":
		return delivery.Kinds, nil
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
func (f *deadLetterFilter) find(ctx context.Context, queue deadLetterQueue) ([]batch.DeadLetter, error) {
	kinds, err := f.kinds()
	if err != nil {
		return nil, err
	}
	var found []batch.DeadLetter
	missing := slices.Clone(f.ids)
	for _, kind := range kinds {
		err := queue.DeadLetters(ctx, kind, func(l batch.DeadLetter) bool {
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
	if len(missing) > 0 {
		return nil, fmt.Errorf("there is no dead letter %q: \"deadletter list\" shows those that there are", missing)
	}
	return found, nil
}

// deadLetterCommand completes a command that works on this installation's queue.
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
			return run(ctx, d.queue, cmd.OutOrStdout())
		})
	}
	config.bind(cmd.Flags())
	filter.bind(cmd)
	return configured(cmd, func(args []string) error {
		filter.ids = args
		return errors.Join(config.completeWithoutStore(), filter.check())
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
		payload := &bytes.Buffer{}
		if err := json.Indent(payload, l.Payload, "", "  "); err != nil {
			payload = bytes.NewBufferString("(it cannot be read)")
		}
		if _, err := fmt.Fprintf(out, "id:      %s\nkind:    %s\nsession: %s\nsince:   %s\nbatch:   %s\nreason:  %s\nanswer:  %s\nitem:    %s\n",
			l.ID, l.Kind, l.SessionID, stamp(l.At), l.BatchID, l.Reason, l.Answer, payload); err != nil {
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

A dead letter is kept, and the command reports it, where the session has a newer update,
which is delivered automatically, or where the QR code has expired.`,
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
	replayResults = map[batch.ReplayResult]string{
		batch.Replayed:   "replayed: it waits for its delivery",
		batch.Superseded: "not replayed, superseded: the session has a newer update",
		batch.Expired:    "not replayed, expired: the code cannot be scanned any more",
		batch.NotFound:   "gone: it was replayed or dropped meanwhile",
		batch.Unreadable: "not replayed: an older version wrote it without what a replay needs; drop it",
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
		for chunk := range slices.Chunk(ids[kind], 500) {
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

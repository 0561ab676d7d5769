package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/types"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/controllers"
	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
	"github.com/whatsapp-operator/whatsapp-operator/internal/store"
)

func newStoreCommand() *cobra.Command {
	cmd := group(&cobra.Command{Use: "store", Short: "Work on the store of device keys"})
	cmd.AddCommand(newAdoptCommand(), newMarkedCommand(), newRestoreCommand(), newOrphansCommand(), newPurgeCommand())
	return cmd
}

// newAdoptCommand makes this installation the owner of the store and Redis, after a
// person has made sure that the former owner is gone.
func newAdoptCommand() *cobra.Command {
	config := &commonConfig{}
	var former []string
	cmd := configured(&cobra.Command{
		Use:   "adopt",
		Short: "Make the store and Redis this installation's, also if they are another's",
		Long: `Make the store and Redis this installation's, also if they are another's.

Use it after a move to another cluster, namespace or release, when the former
installation is gone for good: stop its manager and its workers first, because
two connections of one account push each other out. Processes of it that still
run end by themselves within seconds, if they reach the store or Redis.

The store remembers its former owners, and the manager takes over the sessions whose
status.installation names one of them. Linked sessions connect without a new scan. A
pairing that has not ended starts again with a new code, because its keys belong to the
connection of the former worker; where a passkey was asked for, the session's Event
PasskeyExpired says so. The command may be repeated.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return start(cmd, config, func(ctx context.Context, log logr.Logger) (err error) {
				d, err := openUnclaimed(ctx, config, redis.Manager, processInfo{}, log)
				if err != nil {
					return err
				}
				defer closing(closer(d.close), &err)
				if err := d.openStore(ctx); err != nil {
					return err
				}
				if err := d.awaitStore(ctx); err != nil {
					return err
				}
				if err := d.store.Migrate(ctx); err != nil { // this installation's manager may not migrate the store before it is adopted
					return err
				}
				previous, err := d.store.Adopt(ctx, d.installation, former...)
				if err != nil {
					return err
				}
				if err := redis.Adopt(ctx, d.redis, d.keys, d.installation); err != nil {
					return fmt.Errorf("%w; the store is adopted: repeat the command", err)
				}
				all, err := d.store.FormerInstallations(ctx)
				if err != nil {
					return err
				}
				log.Info("Adopted: the manager takes over the sessions of the former installations; pairings that have not ended start again with a new code", "installation", d.installation, "previous", previous, "former", all)
				return nil
			})
		},
	}, func([]string) error { return errors.Join(config.complete(), checkInstallationIDs(former)) })
	config.bind(cmd.Flags())
	cmd.Flags().StringSliceVar(&former, "former", nil, "id (CLUSTER/NAMESPACE/RELEASE, as status.installation has it) of an installation whose sessions are taken over, too, where the store does not remember it")
	return cmd
}

// checkInstallationIDs refuses ids that no installation can have.
func checkInstallationIDs(ids []string) error {
	var errs []error
	for _, id := range ids {
		if parts := strings.Split(id, "/"); len(parts) != 3 || slices.Contains(parts, "") {
			errs = append(errs, fmt.Errorf("--former is %q: copy the session's status.installation, CLUSTER/NAMESPACE/RELEASE", id))
		}
	}
	return errors.Join(errs...)
}

// storeCommand completes a command that works on this installation's store.
func storeCommand(cmd *cobra.Command, run func(ctx context.Context, d *dependencies, args []string, out io.Writer) error) *cobra.Command {
	config := &commonConfig{}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return start(cmd, config, func(ctx context.Context, log logr.Logger) (err error) {
			f, err := checkStore(ctx, config, log)
			if err != nil {
				return err
			}
			defer closing(closer(f.close), &err)
			return run(ctx, f, args, cmd.OutOrStdout())
		})
	}
	config.bind(cmd.Flags())
	return configured(cmd, func([]string) error { return config.complete() })
}

func newMarkedCommand() *cobra.Command {
	return storeCommand(&cobra.Command{
		Use:   "marked",
		Short: "List the devices that WhatsApp has logged out and whose keys are still kept",
		Args:  noArguments,
	}, func(ctx context.Context, d *dependencies, _ []string, out io.Writer) error {
		marked, err := d.store.Marked(ctx)
		if err != nil {
			return err
		}
		rows := make([][]string, 0, len(marked))
		for _, m := range marked {
			rows = append(rows, []string{m.SessionID, m.JID, m.Reason, stamp(m.At), stamp(m.Until)})
		}
		return table(out, []string{"SESSION-ID", "JID", "REASON", "SINCE", "KEPT-UNTIL"}, rows)
	})
}

func newRestoreCommand() *cobra.Command {
	var jid string
	cmd := storeCommand(&cobra.Command{
		Use:   "restore SESSION_ID",
		Short: "Give a device that WhatsApp has logged out back to its session",
		Long: `Give a device that WhatsApp has logged out back to its session.

It is of use when the logout was a mistake and WhatsApp still knows the device;
one that was really unlinked is logged out again at its next login. Afterwards
change the annotation ` + v1alpha1.RestartedAtAnnotation + ` of the session: it
then logs in without a scan.`,
		Args: oneArgument("the id of a session"),
	}, func(ctx context.Context, d *dependencies, args []string, _ io.Writer) error {
		record, err := d.store.Restore(ctx, args[0], jid)
		if err != nil {
			return restoreRefused(err)
		}
		d.log.Info("Restored: change the annotation "+v1alpha1.RestartedAtAnnotation+" of the session to have it log in",
			"sessionID", record.SessionID, "namespace", record.Namespace, "jid", record.JID)
		return nil
	})
	cmd.Flags().StringVar(&jid, "jid", "", "the device, where the session has lost several")
	return cmd
}

// restoreRefused adds to the error what a person can do.
func restoreRefused(err error) error {
	var ambiguous *store.AmbiguousError
	switch {
	case errors.Is(err, store.ErrNoRecord):
		return fmt.Errorf("%w: \"store marked\" lists the ids of those that can be restored", err)
	case errors.Is(err, store.ErrHasDevice):
		return fmt.Errorf("%w: it cannot have two; delete the resource with deletionPolicy Logout, or unlink the device on the phone, if the lost one is to take its place", err)
	case errors.Is(err, store.ErrNoMark):
		return fmt.Errorf("%w: \"store marked\" lists those that can be restored; scan again for any other", err)
	case errors.Is(err, store.ErrLinkedElsewhere):
		return fmt.Errorf("%w: WhatsApp has given it away, so the old keys are of no use; scan again", err)
	case errors.As(err, &ambiguous):
		return fmt.Errorf("%w: choose one with --jid", err)
	default:
		return err
	}
}

func newOrphansCommand() *cobra.Command {
	var confirm bool
	cmd := storeCommand(&cobra.Command{
		Use:   "orphans",
		Short: "List the keys whose session does not exist",
		Long: `List the keys whose session does not exist.

A record is Missing for a day after its session was last found, then Orphaned
for 30 days, after which its keys are deleted. Retained keys are those of a
session that was deleted with deletionPolicy Retain; they are kept until the
session is applied again or they are purged.

The manager does nothing with records whose sessions go missing in implausible
numbers, and records an Event. --confirm states that those sessions are really
gone: their keys become orphans a day later, if they are not back by then.`,
		Args: noArguments,
	}, func(ctx context.Context, d *dependencies, _ []string, out io.Writer) error {
		if confirm {
			if err := confirmMissing(ctx, d); err != nil {
				return err
			}
		}
		unused, err := d.store.Unused(ctx)
		if err != nil {
			return err
		}
		rows := make([][]string, 0, len(unused))
		for _, r := range unused {
			rows = append(rows, append([]string{r.SessionID, r.Namespace, r.JID}, keeping(r)...))
		}
		return table(out, []string{"SESSION-ID", "NAMESPACE", "JID", "STATE", "SINCE", "KEPT-UNTIL"}, rows)
	})
	cmd.Flags().BoolVar(&confirm, "confirm", false, "the sessions that are missing are gone for good, however many they are")
	return cmd
}

// keeping is the state of a record without a session, since when, and until when its keys are kept.
func keeping(r store.Record) []string {
	switch {
	case !r.Orphaned.IsZero():
		return []string{"Orphaned", stamp(r.Orphaned), stamp(r.Orphaned.Add(store.KeepOrphans))}
	case !r.Retained.IsZero():
		return []string{"Retained", stamp(r.Retained), ""}
	default:
		return []string{"Missing", stamp(r.Missing), ""}
	}
}

// confirmMissing marks the records without a session as missing, without checking
// whether their number is plausible.
func confirmMissing(ctx context.Context, d *dependencies) error {
	keys := &keyStore{store: d.store}
	records, err := keys.KeyRecords(ctx)
	if err != nil {
		return err
	}
	live, err := controllers.ListLiveSessions(ctx, d.direct)
	if err != nil {
		return err
	}
	c := controllers.CompareKeys(records, live, d.clock.Now(), true)
	if err := keys.Move(ctx, c.Moves); err != nil {
		return err
	}
	d.log.Info("Confirmed the sessions that are missing", "missing", c.Missing)
	return nil
}

func newPurgeCommand() *cobra.Command {
	var confirmed bool
	cmd := storeCommand(&cobra.Command{
		Use:   "purge SESSION_ID",
		Short: "Delete the keys of a session that does not exist for good",
		Long: `Delete the keys of a session that does not exist for good: an orphan's, before
30 days have passed, or those that were retained.

Unlink its device on the phone first: without the keys it can be unlinked there only.`,
		Args: oneArgument("the id of a session"),
	}, func(ctx context.Context, d *dependencies, args []string, _ io.Writer) error {
		if !confirmed {
			return fmt.Errorf("the keys of %s would be deleted for good: add --yes to confirm", args[0])
		}
		record, err := d.purge(ctx, args[0])
		switch {
		case errors.Is(err, store.ErrNoRecord), errors.Is(err, store.ErrInUse):
			return fmt.Errorf("%w: \"store orphans\" lists those that can be purged", err)
		case err != nil:
			return err
		}
		d.log.Info("Purged", "sessionID", record.SessionID, "namespace", record.Namespace, "jid", record.JID)
		return nil
	})
	cmd.Flags().BoolVar(&confirmed, "yes", false, "delete them")
	return cmd
}

// purge deletes the keys of a session that does not exist. The API server is asked
// as well: the store may not have been compared with the sessions yet.
func (d *dependencies) purge(ctx context.Context, sessionID string) (store.Record, error) {
	live, err := controllers.ListLiveSessions(ctx, d.direct)
	if err != nil {
		return store.Record{}, err
	}
	return d.store.Purge(ctx, sessionID, func(r store.Record) bool {
		return live.Has(r.Namespace, r.SessionID, types.UID(r.UID))
	})
}

// stamp formats a time for a table.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// table prints rows in columns; an empty cell is printed as a dash.
func table(out io.Writer, head []string, rows [][]string) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{head}, rows...) {
		for i, cell := range row {
			if cell == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(w, strings.Join(row, "\t")) // Flush has its error
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("printing: %w", err)
	}
	return nil
}

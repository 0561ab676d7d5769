package app

import (
	"context"
	"fmt"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"

	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
)

func newStoreCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "Work on the store of device keys"}
	cmd.AddCommand(newAdoptCommand())
	return cmd
}

// newAdoptCommand makes store and Redis this installation's, after a person has
// made sure that the former owner is gone.
func newAdoptCommand() *cobra.Command {
	config := &commonConfig{}
	cmd := &cobra.Command{
		Use:   "adopt",
		Short: "Make the store and Redis this installation's, whosever they were",
		Long: `Make the store and Redis this installation's, whosever they were.

Use it after a move to another cluster, namespace or release, when the former
installation is certainly gone: two installations on one store take each other's
WhatsApp accounts.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return prepare(cmd, config.complete, config, func(ctx context.Context, log logr.Logger) (err error) {
				f, err := layGround(ctx, config, log)
				if err != nil {
					return err
				}
				defer closing(closer(f.close), &err)
				if err := f.openStore(ctx); err != nil {
					return err
				}
				previous, err := f.store.Adopt(ctx, f.installation)
				if err != nil {
					return fmt.Errorf("adopting the store: %w", err)
				}
				if err := redis.Adopt(ctx, f.redis, f.keys, f.installation); err != nil {
					return err
				}
				log.Info("Adopted", "installation", f.installation, "previous", previous)
				return nil
			})
		},
	}
	config.bind(cmd.Flags())
	return cmd
}

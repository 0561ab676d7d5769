package app

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/whatsapp-operator/whatsapp-operator/internal/redis"
)

// newRedisACLCommand prints what an administrator of Redis must permit.
func newRedisACLCommand() *cobra.Command {
	config := redis.Config{Addresses: []string{"localhost:6379"}} // nothing is connected to
	var mode string
	var waitAOF bool
	cmd := configured(&cobra.Command{
		Use:   "redis-acl [manager|worker|laravel]...",
		Short: "Print the commands that make the ACL users of Redis",
		Long: `Print the commands that make the ACL users of Redis, one for each role.

Put a password in place of PASSWORD, and give the command to redis-cli (on each node of a
cluster) or, without its first two words, to the file of users. The manager's user is also
that of the deadletter and store commands; laravel's may only read the session cache.`,
		ValidArgs: []string{string(redis.Manager), string(redis.Worker), string(redis.Laravel)},
		Args:      cobra.OnlyValidArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			roles := redis.Roles
			if len(args) > 0 {
				roles = nil
				for _, arg := range args {
					roles = append(roles, redis.Role(arg))
				}
			}
			for _, role := range roles {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), redis.ACLUser(role, "whatsapp-operator-"+string(role), config, waitAOF)); err != nil {
					return fmt.Errorf("printing: %w", err)
				}
			}
			return nil
		},
	}, func([]string) error {
		config.Mode = redis.Mode(mode)
		if config.Mode == redis.Sentinel {
			config.Mode = redis.Standalone // each server behind the Sentinels is one
		}
		return config.Validate()
	})
	f := cmd.Flags()
	f.StringVar(&config.KeyPrefix, "redis-key-prefix", "", "prefix of every key")
	f.StringVar(&mode, "redis-mode", string(redis.Standalone), "standalone, sentinel or cluster")
	f.IntVar(&config.DB, "redis-db", 0, "number of the database")
	f.BoolVar(&waitAOF, "waitaof", false, "permit WAITAOF too; servers before Redis 7.2 do not know it and would refuse the user")
	return cmd
}

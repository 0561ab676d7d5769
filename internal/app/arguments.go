package app

import (
	"fmt"

	"github.com/spf13/cobra"
)

// group is a command that only holds others: cobra alone would print the help and report
// success for a name that does not exist.
func group(cmd *cobra.Command) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("there is no command %q: `%s --help` lists those of %q", args[0], cmd.CommandPath(), cmd.CommandPath())
		}
		return cmd.Help()
	}
	return cmd
}

// noArguments is for commands that take flags only.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%q takes no arguments, but got %q: flags begin with --, `%s --help` lists them", cmd.CommandPath(), args[0], cmd.CommandPath())
	}
	return nil
}

// oneArgument is for commands that work on one thing, which what names.
func oneArgument(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%q needs one argument, %s, but got %d", cmd.CommandPath(), what, len(args))
		}
		return nil
	}
}

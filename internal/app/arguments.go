package app

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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

// configured makes a command read its flags from the environment too, and refuse a wrong
// configuration before it runs. check returns all that is wrong.
func configured(cmd *cobra.Command, check func(args []string) error) *cobra.Command {
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		return wrongConfiguration(fromEnvironment(cmd.Flags()), check(args))
	}
	return cmd
}

// wrongConfiguration is the error of a wrong configuration; nil if there are no errors.
func wrongConfiguration(errs ...error) error {
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("the configuration is wrong:\n%w", err)
	}
	return nil
}

// wrongFlags returns everything that is wrong with a command line of which some flag cannot
// be parsed: pflag stops at the first one. root must be new, because flags that are lists
// keep what they were given before.
func wrongFlags(root *cobra.Command, args []string) error {
	cmd, args, err := root.Find(args)
	if err != nil {
		return err
	}
	cmd.InitDefaultHelpFlag() // without it pflag prints the flags
	var errs []error
	set := func(flag *pflag.Flag, value string) error {
		if err := setFlag(cmd.Flags(), flag, value); err != nil {
			errs = append(errs, err)
		}
		return nil // continue with the next flag
	}
	var positional []string
	for {
		err := cmd.Flags().ParseAll(args, set)
		positional = append(positional, cmd.Flags().Args()...)
		if err == nil || errors.Is(err, pflag.ErrHelp) {
			break
		}
		errs = append(errs, err)
		var unknown *pflag.NotExistError
		if !errors.As(err, &unknown) { // a flag without a name, or the last one without its value
			break
		}
		args = args[1+slices.IndexFunc(args, func(arg string) bool { return isFlag(arg, unknown) }):]
	}
	if cmd.PreRunE != nil {
		errs = append(errs, errors.Unwrap(cmd.PreRunE(cmd, positional)))
	}
	errs = append(errs, fmt.Errorf("`%s --help` lists the flags", cmd.CommandPath()))
	return wrongConfiguration(errs...)
}

// setFlag sets a flag, or resets it if the value is wrong: pflag would leave a zero value,
// of which the check would report another mistake.
func setFlag(f *pflag.FlagSet, flag *pflag.Flag, value string) error {
	err := f.Set(flag.Name, value)
	if err != nil {
		return errors.Join(err, flag.Value.Set(flag.DefValue))
	}
	return nil
}

// isFlag reports whether an argument is the flag that does not exist.
func isFlag(arg string, unknown *pflag.NotExistError) bool {
	if shorthands := unknown.GetSpecifiedShortnames(); shorthands != "" {
		return arg == "-"+shorthands
	}
	name, _, _ := strings.Cut(arg, "=")
	return name == "--"+unknown.GetSpecifiedName()
}

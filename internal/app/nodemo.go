//go:build nodemo

package app

import "github.com/spf13/cobra"

func demoCommands() []*cobra.Command { return nil }

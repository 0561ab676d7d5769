//go:build !nodemo

package app

import (
	"github.com/spf13/cobra"

	"github.com/whatsapp-operator/whatsapp-operator/internal/demo"
)

// demoCommands is the demo. The image leaves it out: it has no API server to
// start there, and what starts one makes the program larger by 40 %
// (html/template keeps every exported method of every type that can be reached).
func demoCommands() []*cobra.Command { return []*cobra.Command{newDemoCommand()} }

func newDemoCommand() *cobra.Command {
	options := demo.Defaults()
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run the whole product on this machine, with simulated phones",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo.Run(cmd.Context(), options)
		},
	}
	f := cmd.Flags()
	f.IntVar(&options.Sessions, "sessions", options.Sessions, "how many sessions are applied")
	f.BoolVar(&options.Exit, "exit", options.Exit, "end once every session is Connected and Laravel has every last state; needs no terminal")
	f.StringVar(&options.WhatsApp, "whatsapp", options.WhatsApp, "simulated, or real: scan the codes with a real phone")
	f.StringVar(&options.Redis, "redis", options.Redis, "host:port of a Redis to use instead of the embedded one")
	f.DurationVar(&options.Timeout, "timeout", options.Timeout, "how long --exit waits")
	f.DurationVar(&options.ScanAfter, "scan-after", options.ScanAfter, "how long a code is shown before the simulated phone scans it")
	f.BoolVar(&options.Passkey, "passkey", options.Passkey, "WhatsApp asks each account for its passkey after the scan")
	f.StringVar(&options.Assets, "assets", options.Assets, "folder with etcd and kube-apiserver; empty: $KUBEBUILDER_ASSETS")
	return cmd
}

//go:build !nodemo

package app

import (
	"net/url"
	"time"

	"github.com/spf13/cobra"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"

	"github.com/whatsapp-operator/whatsapp-operator/internal/demo"
)

// demoCommands is the demo. The image leaves it out: it has no API server to
// start there, and what starts one makes the program larger by 40 %
// (html/template keeps every exported method of every type that can be reached).
func demoCommands() []*cobra.Command {
	return []*cobra.Command{newDemoCommand(), newDemoPhonesCommand(), newDemoLaravelCommand()}
}

// newDemoPhonesCommand is the phones of the chart's simulator.
func newDemoPhonesCommand() *cobra.Command {
	config := &commonConfig{}
	options := demo.PhonesOptions{}
	cmd := configured(&cobra.Command{
		Use:   "demo-phones",
		Short: "Scan the codes of every session in the cluster with simulated phones, and write to each as a contact",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options.Log = zap.New(logFormat())
			ctrl.SetLogger(options.Log)
			var err error
			if options.Config, err = config.rest(); err != nil {
				return err
			}
			return demo.RunPhones(cmd.Context(), options)
		},
	}, func([]string) error {
		var p problems
		if config.Kubeconfig != "" {
			p.file("kubeconfig", config.Kubeconfig)
		}
		if u, err := url.Parse(options.Control); err != nil || u.Scheme != "http" || u.Host == "" {
			p.add("--simulator-control is %q: give the URL of the control API, for example http://127.0.0.1:7071", options.Control)
		}
		within(&p, "scan-after", options.ScanAfter, 0, time.Hour)
		return p.err()
	})
	f := cmd.Flags()
	config.bindKubeconfig(f)
	f.StringVar(&options.Control, "simulator-control", "http://127.0.0.1:7071", "URL of the simulator's control API")
	f.DurationVar(&options.ScanAfter, "scan-after", 4*time.Second, "how long a code is shown before the simulated phone scans it")
	return cmd
}

// newDemoLaravelCommand is the stand-in for Laravel of the chart's simulator.
func newDemoLaravelCommand() *cobra.Command {
	options := demo.LaravelOptions{}
	cmd := configured(&cobra.Command{
		Use:   "demo-laravel",
		Short: "Receive batches as Laravel does, and print them",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options.Out = cmd.OutOrStdout()
			return demo.RunLaravel(cmd.Context(), options)
		},
	}, func([]string) error {
		var p problems
		p.listenAddress("listen", options.Listen)
		p.file("laravel-token-file", options.TokenFile)
		p.file("laravel-signing-secret-file", options.SigningSecretFile)
		return p.err()
	})
	f := cmd.Flags()
	f.StringVar(&options.Listen, "listen", "127.0.0.1:8000", "address that the manager connects to; GET /state there answers what was received")
	f.StringVar(&options.TokenFile, "laravel-token-file", "", "file with the bearer token")
	f.StringVar(&options.SigningSecretFile, "laravel-signing-secret-file", "", "file with the Standard Webhooks secret (whsec_…)")
	return cmd
}

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
	f.BoolVar(&options.Exit, "exit", options.Exit, "end once every session is Connected and Laravel has every last state, and a message of each session; needs no terminal")
	f.StringVar(&options.WhatsApp, "whatsapp", options.WhatsApp, "simulated, or real: scan the codes with a real phone")
	f.StringVar(&options.Redis, "redis", options.Redis, "host:port of a Redis to use instead of the embedded one")
	f.DurationVar(&options.Timeout, "timeout", options.Timeout, "how long --exit waits")
	f.DurationVar(&options.ScanAfter, "scan-after", options.ScanAfter, "how long a code is shown before the simulated phone scans it")
	f.BoolVar(&options.Passkey, "passkey", options.Passkey, "WhatsApp asks each account for its passkey after the scan")
	f.StringVar(&options.Assets, "assets", options.Assets, "folder with etcd and kube-apiserver; empty: $KUBEBUILDER_ASSETS")
	return cmd
}

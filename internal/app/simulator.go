package app

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"

	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

func newSimulatorCommand() *cobra.Command {
	options := simulator.Options{}
	var caOut, seed string
	cmd := configured(&cobra.Command{
		Use:   "simulator",
		Short: "Simulate WhatsApp's servers, for trials and load tests without a phone",
		Long: `Simulate WhatsApp's servers and the phones of their users.

Workers are pointed at it with --whatsapp-endpoint and --whatsapp-noise-root (and
--whatsapp-ca-file with --tls), whose values are printed at the start. The HTTP
control API scans codes, sends and shows messages, counts logins and doubled
connections, and injects faults; docs/simulate.md lists its paths.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options.Logger = zap.New(logFormat())
			if seed != "" {
				root := sha256.Sum256([]byte(seed))
				options.RootKey = &root
			}
			server, err := simulator.New(options)
			if err != nil {
				return fmt.Errorf("preparing the simulator: %w", err)
			}
			if caOut != "" {
				if err := os.WriteFile(caOut, server.CA(), 0o600); err != nil {
					return fmt.Errorf("writing the authority's certificate: %w", err)
				}
			}
			if _, err := fmt.Fprintf(cmd.OutOrStdout(), "workers: --whatsapp-endpoint=%s --whatsapp-noise-root=%x\ncontrol: %s\n",
				server.Endpoint(), server.NoiseRoot(), server.ControlURL()); err != nil {
				return fmt.Errorf("printing how to reach the simulator: %w", err)
			}
			return server.Run(cmd.Context())
		},
	}, func([]string) error {
		if caOut != "" && !options.TLS {
			return errors.New("--ca-out is given without --tls, and there is no authority: set --tls too, or leave it out")
		}
		return nil
	})
	f := cmd.Flags()
	f.StringVar(&options.Listen, "listen", "127.0.0.1:7070", "address that workers connect to")
	f.StringVar(&options.ControlListen, "control-listen", "127.0.0.1:7071", "address of the control API; everyone who can reach it controls every simulated phone")
	f.BoolVar(&options.TLS, "tls", false, "serve wss:// with a certificate of a new authority")
	f.StringSliceVar(&options.Hosts, "host", nil, "name or address that the certificate is for; the first is the one in the endpoint")
	f.StringVar(&caOut, "ca-out", "", "file that the new authority's certificate is written to")
	f.StringVar(&seed, "seed", "", "derive the root key from this word, so that workers know the simulator again after a restart")
	return cmd
}

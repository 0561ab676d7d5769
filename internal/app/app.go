// Package app is the program: its commands, their configuration, and the
// place where the packages meet. Each adapter is written against an interface
// that its consumer declares; here the one is handed to the other.
package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
)

// Version of the program; set by the linker.
var Version = "dev"

// NewRootCommand is the program with all its commands.
func NewRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "whatsapp-operator",
		Short:         "WhatsApp sessions as Kubernetes resources",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(newManagerCommand(), newWorkerCommand(), newSimulatorCommand(), newStoreCommand(), newDeadLetterCommand(), newRedisACLCommand(), newCRDCommand(), newBootstrapCommand(), newStopCommand(), newQRCommand(), newVersionCommand())
	root.AddCommand(demoCommands()...)
	return root
}

// execute runs the program with these arguments.
func execute(ctx context.Context, root *cobra.Command, args []string) error {
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(*cobra.Command, error) error { return wrongFlags(NewRootCommand(), args) })
	return root.ExecuteContext(ctx)
}

// Main runs the program and returns its exit code.
func Main() int { return run(NewRootCommand()) }

func run(root *cobra.Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := execute(ctx, root, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "whatsapp-operator:", err)
		return 1
	}
	return 0
}

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), Version)
			return err
		},
	}
}

// start says what the configuration is, and runs a command with a logger.
func start(cmd *cobra.Command, config *commonConfig, run func(context.Context, logr.Logger) error) error {
	return runWithLogger(cmd, newLogger(cmd, config), run)
}

// startWithCluster does the same for a command that uses only the API server.
func startWithCluster(cmd *cobra.Command, config *commonConfig, run func(context.Context, client.Client, logr.Logger) error) error {
	return start(cmd, config, func(ctx context.Context, log logr.Logger) error {
		d, err := newDependencies(config, processInfo{}, log)
		if err != nil {
			return err
		}
		return run(ctx, d.direct, log)
	})
}

// startProcess does the same as start for a manager or a worker, which answers the kubelet's probes
// from now on, and first waits for files that do not exist yet.
func startProcess(cmd *cobra.Command, config *commonConfig, complete func() error, run func(context.Context, logr.Logger, *probes) error) (err error) {
	log := newLogger(cmd, config)
	p, closeProbes, err := serveProbes(cmd.Context(), config.HealthAddress, log)
	if err != nil {
		return err
	}
	defer closing(closer(closeProbes), &err)
	return runWithLogger(cmd, log, func(ctx context.Context, log logr.Logger) error {
		if err := awaitFiles(ctx, complete, p, log); err != nil {
			return wrongConfiguration(err)
		}
		return run(ctx, log, p)
	})
}

// logFormat writes JSON whose times a person can compare with those of Events and of Laravel's
// log; the library's own format is seconds since 1970.
func logFormat() zap.Opts {
	return zap.JSONEncoder(func(c *zapcore.EncoderConfig) {
		c.EncodeTime = func(t time.Time, to zapcore.PrimitiveArrayEncoder) {
			to.AppendString(t.UTC().Format("2006-01-02T15:04:05.000Z07:00"))
		}
	})
}

func newLogger(cmd *cobra.Command, config *commonConfig) logr.Logger {
	log := zap.New(zap.Level(zapcore.Level(-config.Verbosity)), logFormat(), zap.StacktraceLevel(zapcore.PanicLevel))
	ctrl.SetLogger(log)
	klog.SetLogger(log.WithName("kubernetes"))
	log.Info("Configuration", append([]any{"command", cmd.Name(), "version", Version}, settings(cmd)...)...)
	return log
}

func runWithLogger(cmd *cobra.Command, log logr.Logger, run func(context.Context, logr.Logger) error) error {
	err := run(cmd.Context(), log)
	if cmd.Context().Err() != nil && errors.Is(err, context.Canceled) {
		err = nil // it was asked to end
	}
	return err
}

// closer is a close function as an io.Closer.
type closer func() error

func (c closer) Close() error { return c() }

// closing closes c and keeps its error beside *err.
func closing(c io.Closer, err *error) {
	if closeErr := c.Close(); closeErr != nil {
		*err = errors.Join(*err, closeErr)
	}
}

// everywhere is a runnable of every replica, not only of the leader.
type everywhere struct {
	start func(context.Context) error
}

// Start implements manager.Runnable.
func (e everywhere) Start(ctx context.Context) error { return e.start(ctx) }

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (e everywhere) NeedLeaderElection() bool { return false }

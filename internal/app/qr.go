package app

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/mdp/qrterminal/v3"
	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/whatsapp-operator/whatsapp-operator/api/v1alpha1"
	"github.com/whatsapp-operator/whatsapp-operator/internal/status"
)

// qrInterval is how often the session is read while its codes are shown.
const qrInterval = 500 * time.Millisecond

// newQRCommand shows a session's codes where nothing but kubectl is installed: kubectl exec
// runs it in the manager's pod.
func newQRCommand() *cobra.Command {
	config := &commonConfig{}
	var timeout time.Duration
	var key client.ObjectKey
	cmd := configured(&cobra.Command{
		Use:   "qr NAMESPACE/NAME",
		Short: "Show the codes of a session in the terminal until a phone has scanned one",
		Long: `Show the codes of a session in the terminal until a phone has scanned one.

It needs no tools on your machine but kubectl:

  kubectl exec -it -n whatsapp-operator-system deploy/whatsapp-operator-manager -- /whatsapp-operator qr default/shop-7`,
		Args: oneArgument("the namespace and the name of a session, NAMESPACE/NAME"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := newDependencies(config, processInfo{}, logr.Discard())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return showCodes(ctx, d.direct, key, cmd.OutOrStdout(), qrInterval)
		},
	}, func(args []string) error {
		var p problems
		var found bool
		if key.Namespace, key.Name, found = strings.Cut(args[0], "/"); !found || key.Namespace == "" || key.Name == "" {
			p.add("%q is not NAMESPACE/NAME: give both, for example default/shop-7", args[0])
		}
		if config.Kubeconfig != "" {
			p.file("kubeconfig", config.Kubeconfig)
		}
		within(&p, "timeout", timeout, time.Second, 24*time.Hour)
		return p.err()
	})
	config.bindKubeconfig(cmd.Flags())
	cmd.Flags().DurationVar(&timeout, "timeout", time.Hour, "how long to wait for a scan")
	return cmd
}

// errNeedsAPerson: no new code will be shown.
var errNeedsAPerson = errors.New("the session shows no more codes until a person acts")

// showCodes prints each new code, and returns when the session is connected.
func showCodes(ctx context.Context, c client.Reader, key client.ObjectKey, out io.Writer, interval time.Duration) error {
	shown, waiting := "", ""
	err := wait.PollUntilContextCancel(ctx, interval, true, func(ctx context.Context) (bool, error) {
		s := &v1alpha1.WhatsAppSession{}
		if err := c.Get(ctx, key, s); apierrors.IsNotFound(err) {
			return false, fmt.Errorf("there is no session %s: apply it first (kubectl get wa -A lists all)", key)
		} else if apierrors.IsForbidden(err) {
			return false, fmt.Errorf("reading the session: %w", err)
		} else if err != nil {
			return false, nil //nolint:nilerr // the API server is asked again
		}
		text, done, err := describeCode(s)
		if err != nil || done {
			if text != "" {
				fmt.Fprintln(out, text)
			}
			return done, err
		}
		switch code := codeOf(s); {
		case code != "" && code != shown:
			shown, waiting = code, ""
			fmt.Fprintln(out, text)
		case code == "" && text != waiting:
			waiting = text
			fmt.Fprintln(out, text)
		}
		return false, nil
	})
	if wait.Interrupted(err) || errors.Is(err, context.Canceled) {
		return fmt.Errorf("the session %s was not connected in time: run the command again to go on", key)
	}
	return err
}

// codeOf returns the code that a phone can use now; empty: none.
func codeOf(s *v1alpha1.WhatsAppSession) string {
	if s.Status.QR != nil {
		return s.Status.QR.Code
	}
	return s.Status.PairingCode
}

// describeCode returns what a person sees of a session, whether that is the end, and an
// error where no code will follow.
func describeCode(s *v1alpha1.WhatsAppSession) (text string, done bool, err error) {
	ready := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionReady)
	switch {
	case s.Status.Phase == v1alpha1.PhaseConnected:
		return fmt.Sprintf("Connected as %s.", cmp.Or(s.Status.PhoneNumber, s.Status.JID)), true, nil
	case s.Status.Phase == v1alpha1.PhaseSuspended:
		return "", false, fmt.Errorf("%w: spec.suspend is true", errNeedsAPerson)
	case meta.IsStatusConditionTrue(s.Status.Conditions, v1alpha1.ConditionStalled):
		stalled := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.ConditionStalled)
		return "", false, fmt.Errorf("%w: %s: %s", errNeedsAPerson, stalled.Reason, status.Clean(stalled.Message, 512))
	case s.Status.QR != nil:
		var code strings.Builder
		qrterminal.GenerateHalfBlock(s.Status.QR.Code, qrterminal.L, &code)
		return fmt.Sprintf("Code %d, valid until %s UTC. On the phone: Settings, Linked devices, Link a device.\n%s",
			s.Status.QR.Attempt, s.Status.QR.ExpiresAt.UTC().Format(time.TimeOnly), strings.TrimRight(code.String(), "\n")), false, nil
	case s.Status.PairingCode != "":
		return "Type on the phone (Linked devices, Link with phone number instead): " + status.Clean(s.Status.PairingCode, 64), false, nil
	case ready != nil:
		return fmt.Sprintf("Waiting for a code: %s: %s", ready.Reason, status.Clean(ready.Message, 512)), false, nil
	default:
		return "Waiting for the manager to see the session.", false, nil
	}
}

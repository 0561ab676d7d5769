package app

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// bootstrapConfig configures `bootstrap`. Of the common flags it has only those of the API
// server.
type bootstrapConfig struct {
	commonConfig
	// passwords and signingSecrets are values to make, each as SECRET/KEY.
	passwords, signingSecrets []string
	labels                    map[string]string
	timeout                   time.Duration
}

func newBootstrapCommand() *cobra.Command {
	config := &bootstrapConfig{}
	cmd := configured(&cobra.Command{
		Use:   "bootstrap",
		Short: "Create the Secrets that are missing, with random values",
		Long: `Create the Secrets that are missing, with random values.

The chart runs it before each installation and upgrade. A value that exists is never
changed, so the Secrets outlive an upgrade, a rollback and an uninstallation. Templates
with random values, or that look into the cluster, would give other values to Argo CD and
Flux each time they render them.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return startWithCluster(cmd, &config.commonConfig, func(ctx context.Context, c client.Client, log logr.Logger) error {
				return bootstrap(ctx, c, config, log)
			})
		},
	}, func([]string) error { return config.complete() })
	config.bind(cmd.Flags())
	return cmd
}

func (c *bootstrapConfig) bind(f *pflag.FlagSet) {
	c.bindCluster(f)
	f.StringSliceVar(&c.passwords, "password", nil, "SECRET/KEY that gets a random password where it has no value")
	f.StringSliceVar(&c.signingSecrets, "signing-secret", nil, "SECRET/KEY that gets a random Standard Webhooks secret (whsec_…) where it has no value")
	f.StringToStringVar(&c.labels, "label", nil, "label of the Secrets that are created, as KEY=VALUE")
	f.DurationVar(&c.timeout, "timeout", 2*time.Minute, "how long the API server may be unreachable")
}

func (c *bootstrapConfig) complete() error {
	var p problems
	p.join(c.checkCluster())
	if len(c.passwords)+len(c.signingSecrets) == 0 {
		p.add("nothing is to be created: give --password or --signing-secret")
	}
	for flag, values := range map[string][]string{"password": c.passwords, "signing-secret": c.signingSecrets} {
		for _, value := range values {
			name, key, _ := strings.Cut(value, "/")
			if len(validation.IsDNS1123Subdomain(name)) > 0 || len(validation.IsConfigMapKey(key)) > 0 {
				p.add("--%s is %q: give SECRET/KEY, the name of a Secret and of a key in it", flag, value)
			}
		}
	}
	for key, value := range c.labels {
		if len(validation.IsQualifiedName(key)) > 0 || len(validation.IsValidLabelValue(value)) > 0 {
			p.add("--label is %q: give a valid label, KEY=VALUE", key+"="+value)
		}
	}
	within(&p, "timeout", c.timeout, time.Second, time.Hour)
	return p.err()
}

// wanted returns the Secrets by name, and for each of their keys what makes a value.
func (c *bootstrapConfig) wanted() map[string]map[string]func() []byte {
	all := map[string]map[string]func() []byte{}
	add := func(values []string, generate func() []byte) {
		for _, value := range values {
			name, key, _ := strings.Cut(value, "/")
			if all[name] == nil {
				all[name] = map[string]func() []byte{}
			}
			all[name][key] = generate
		}
	}
	add(c.passwords, newPassword)
	add(c.signingSecrets, newSigningSecret)
	return all
}

// newPassword is letters and digits only, which need no quotes in a shell, SQL or a URL;
// 256 bits of it are random.
func newPassword() []byte { return []byte(rand.Text() + rand.Text()) }

// newSigningSecret is a secret as the Standard Webhooks specification writes it.
func newSigningSecret() []byte {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return []byte("whsec_" + base64.StdEncoding.EncodeToString(b))
}

// bootstrap makes every Secret complete. It tries again what the API server does not
// answer, or what another process has changed meanwhile.
func bootstrap(ctx context.Context, c client.Client, config *bootstrapConfig, log logr.Logger) error {
	wanted := config.wanted()
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		var last error
		err := wait.PollUntilContextTimeout(ctx, time.Second, config.timeout, true, func(ctx context.Context) (bool, error) {
			result, err := ensureSecret(ctx, c, client.ObjectKey{Namespace: config.Namespace, Name: name}, wanted[name], config.labels)
			if err == nil {
				log.Info("Checked a Secret", "secret", name, "result", result)
				return true, nil
			}
			if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) || apierrors.IsNotFound(err) || errors.Is(err, errImmutable) {
				return false, err // another attempt has the same answer
			}
			if last == nil {
				log.Info("Failed to check a Secret, trying again", "secret", name, "error", err.Error())
			}
			last = err
			return false, nil
		})
		if err != nil && wait.Interrupted(err) && last != nil {
			err = last
		}
		if err != nil {
			return fmt.Errorf("making the Secret %s complete: %w", name, err)
		}
	}
	return nil
}

// errImmutable: a person must decide what becomes of the Secret.
var errImmutable = errors.New("it is immutable and has no value for every key: delete it, or create it again with all keys")

// ensureSecret creates a Secret, or adds the keys that have no value. It never changes a
// value: a concurrent change is a conflict, and a Secret that was created meanwhile is an
// error; the next attempt reads it.
func ensureSecret(ctx context.Context, c client.Client, key client.ObjectKey, wanted map[string]func() []byte, labels map[string]string) (result string, err error) {
	secret := &corev1.Secret{}
	err = c.Get(ctx, key, secret)
	if apierrors.IsNotFound(err) {
		secret = &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name, Labels: labels},
			Data:       map[string][]byte{},
		}
		for k, generate := range wanted {
			secret.Data[k] = generate()
		}
		return "created", c.Create(ctx, secret)
	}
	if err != nil {
		return "", err
	}
	base := secret.DeepCopy()
	for k, generate := range wanted {
		if len(secret.Data[k]) > 0 {
			continue
		}
		if secret.Data == nil {
			secret.Data = map[string][]byte{}
		}
		secret.Data[k] = generate()
	}
	if maps.EqualFunc(base.Data, secret.Data, slices.Equal) {
		return "complete", nil
	}
	if secret.Immutable != nil && *secret.Immutable {
		return "", errImmutable
	}
	return "completed", c.Patch(ctx, secret, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{}))
}

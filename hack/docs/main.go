// Command docs writes docs/reference.md from the program itself: every command, flag and
// metric. `make docs` runs it, and its test fails if the page is out of date.
package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/whatsapp-operator/whatsapp-operator/internal/app"
	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
)

func main() {
	if err := run("docs/reference.md"); err != nil {
		fmt.Fprintln(os.Stderr, "docs:", err)
		os.Exit(1)
	}
}

func run(path string) error {
	page, err := reference()
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(page), 0o644); err != nil { //nolint:gosec // a page of the repository
		return fmt.Errorf("writing the page: %w", err)
	}
	return nil
}

const introduction = `# Reference: every command, flag and metric

Written by ` + "`make docs`" + ` from the program itself; change the texts there.

Every flag can also be set by a variable: ` + "`--redis-db`" + ` is ` + "`WHATSAPP_OPERATOR_REDIS_DB`" + `. A flag has priority over its variable. All flags are checked at the start, and all faults are reported at once.
`

func reference() (string, error) {
	var b strings.Builder
	b.WriteString(introduction)
	// These variables would change defaults.
	for _, name := range []string{"KUBECONFIG", "POD_NAMESPACE"} {
		if err := os.Unsetenv(name); err != nil {
			return "", fmt.Errorf("clearing a variable: %w", err)
		}
	}
	b.WriteString("\n## Commands\n")
	if err := writeCommands(&b, app.NewRootCommand()); err != nil {
		return "", err
	}
	descriptions, err := describeMetrics()
	if err != nil {
		return "", err
	}
	b.WriteString("\n## Metrics\n\nServed by manager and worker on `--metrics-bind-address`, together with those of [controller-runtime](https://book.kubebuilder.io/reference/metrics-reference) and of the Go runtime. No metric has a label for each session. [operate.md](operate.md#what-to-watch) says which to alert on.\n\n| metric | labels | meaning |\n| --- | --- | --- |\n")
	for _, d := range descriptions {
		labels := "–"
		if len(d.labels) > 0 {
			labels = "`" + strings.Join(d.labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", d.name, labels, cell(d.help))
	}
	return b.String(), nil
}

// writeCommands writes a section for each runnable command, and one for the flags that
// manager and worker share.
func writeCommands(b *strings.Builder, root *cobra.Command) error {
	manager, _, err := root.Find([]string{"manager"})
	if err != nil {
		return fmt.Errorf("looking for the manager: %w", err)
	}
	worker, _, err := root.Find([]string{"worker"})
	if err != nil {
		return fmt.Errorf("looking for the worker: %w", err)
	}
	var common []*pflag.Flag
	manager.Flags().VisitAll(func(f *pflag.Flag) {
		if worker.Flags().Lookup(f.Name) != nil {
			common = append(common, f)
		}
	})
	writeCommand(b, root, common)
	b.WriteString("\n### Common flags\n")
	writeFlags(b, common)
	return nil
}

func writeCommand(b *strings.Builder, c *cobra.Command, common []*pflag.Flag) {
	if c.Runnable() && !c.HasSubCommands() {
		fmt.Fprintf(b, "\n### `%s`\n\n%s\n", strings.TrimSuffix(c.UseLine(), " [flags]"), cmp.Or(c.Long, c.Short+"."))
		var own []*pflag.Flag
		shared := 0
		c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
			switch {
			case f.Hidden, f.Name == "help":
			case slices.ContainsFunc(common, func(o *pflag.Flag) bool { return o.Name == f.Name && o.Usage == f.Usage }):
				shared++
			default:
				own = append(own, f)
			}
		})
		writeFlags(b, own)
		if shared > 0 {
			b.WriteString("\nAnd the [common flags](#common-flags).\n")
		}
	}
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			writeCommand(b, sub, common)
		}
	}
}

func writeFlags(b *strings.Builder, flags []*pflag.Flag) {
	if len(flags) == 0 {
		return
	}
	b.WriteString("\n| flag | default | meaning |\n| --- | --- | --- |\n")
	for _, f := range flags {
		fmt.Fprintf(b, "| `--%s` | %s | %s |\n", f.Name, defaultOf(f), cell(f.Usage))
	}
}

func defaultOf(f *pflag.Flag) string {
	value := f.DefValue
	if f.Value.Type() == "duration" {
		if d, err := time.ParseDuration(value); err == nil {
			value = short(d)
		}
	}
	switch {
	case f.Name == "name":
		return "the host's name" // the real default is that of this machine
	case value == "" || value == "[]":
		return ""
	}
	return "`" + strings.Trim(value, "[]") + "`"
}

// short writes a duration without zeros at its end: 6h and not 6h0m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// cell escapes a text for a table.
func cell(text string) string {
	return strings.ReplaceAll(strings.ReplaceAll(text, "\n", " "), "|", `\|`)
}

type description struct {
	name, help string
	labels     []string
}

// describedAs parses the text of a prometheus.Desc, which has no methods to read its fields.
var describedAs = regexp.MustCompile(`^Desc\{fqName: "([^"]*)", help: "(.*?)",(?: unit: "[^"]*",)? constLabels: \{.*\}, variableLabels: \{(.*)\}\}$`)

// describeMetrics lists the metrics of the product.
func describeMetrics() ([]description, error) {
	// These metrics are registered only in a running worker.
	err := errors.Join(
		metrics.RegisterSessions(func() map[string]int { return nil }),
		metrics.RegisterSessionStats(func() (time.Duration, int) { return 0, 0 }),
		metrics.RegisterLibraryAge(time.Time{}, time.Now),
		metrics.RegisterInboxOver(func() map[string]int { return nil }),
	)
	if duplicate := (prometheus.AlreadyRegisteredError{}); err != nil && !errors.As(err, &duplicate) {
		return nil, err
	}
	registry, ok := ctrlmetrics.Registry.(prometheus.Collector)
	if !ok {
		return nil, errors.New("the registry of metrics cannot list its metrics")
	}
	descriptions := make(chan *prometheus.Desc)
	go func() {
		registry.Describe(descriptions)
		close(descriptions)
	}()
	var all []description
	for d := range descriptions {
		fields := describedAs.FindStringSubmatch(d.String())
		if fields == nil {
			return nil, fmt.Errorf("the description of a metric has an unknown form: %s", d)
		}
		if !strings.HasPrefix(fields[1], "whatsapp_operator_") {
			continue
		}
		one := description{name: fields[1], help: fields[2]}
		if fields[3] != "" {
			one.labels = strings.Split(fields[3], ",")
		}
		all = append(all, one)
	}
	slices.SortFunc(all, func(a, b description) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

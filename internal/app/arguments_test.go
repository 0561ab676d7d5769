package app

import (
	"bytes"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
)

// A command line with a mistake is refused with an error that says what to type, before
// anything is connected to, and never with success.
func TestCommandLinesWithMistakes(t *testing.T) {
	t.Setenv("KUBECONFIG", "")
	t.Setenv("POD_NAMESPACE", "ops")
	for _, row := range []struct {
		name string
		args []string
		want string
	}{
		{"an unknown command", []string{"deadletters"}, `unknown command "deadletters"`},
		{"an unknown command on dead letters", []string{"deadletter", "purge"}, "`whatsapp-operator deadletter --help` lists"},
		{"an unknown command on the store", []string{"store", "list"}, "`whatsapp-operator store --help` lists"},
		{"a flag of another command", []string{"deadletter", "list", "--laravel-url=https://x"}, "`whatsapp-operator deadletter list --help` lists the flags"},
		{"a flag that does not exist", []string{"version", "--verbose"}, "unknown flag: --verbose"},
		{"a flag without a name", []string{"deadletter", "list", "--=x"}, "bad flag syntax: --=x"},
		{"a flag without its value", []string{"deadletter", "list", "--kind"}, "flag needs an argument: --kind"},
		{"an argument too many", []string{"worker", "extra"}, `"whatsapp-operator worker" takes no arguments, but got "extra"`},
		{"a flag without its dashes", []string{"deadletter", "list", "kind=qr"}, "flags begin with --"},
		{"no session to purge", []string{"store", "purge", "--yes"}, "needs one argument, the id of a session"},
		{"two dead letters to show", []string{"deadletter", "show", "1-0", "2-0"}, "needs one argument, the id of a dead letter"},
		{"a kind that does not exist", []string{"deadletter", "list", "--kind=codes"}, `there is no kind "codes"`},
		{"dead letters to drop that are not named", []string{"deadletter", "drop"}, "no dead letter is named"},
		{"dead letters to replay that are not named", []string{"deadletter", "replay", "--kind=qr"}, "no dead letter is named"},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := NewWithT(t)
			root := NewRootCommand()
			out := &bytes.Buffer{}
			root.SetOut(out)
			err := execute(t.Context(), root, row.args)
			g.Expect(err).To(MatchError(ContainSubstring(row.want)))
			g.Expect(err.Error()).NotTo(ContainSubstring("--store"), "dead letters are not in the database")
			g.Expect(out.String()).To(BeEmpty())
		})
	}
}

// A person who corrects a command line corrects all of it in one round.
func TestEverythingWrongIsReportedAtOnce(t *testing.T) {
	t.Setenv("KUBECONFIG", "")
	t.Setenv("POD_NAMESPACE", "ops")
	t.Setenv("WHATSAPP_OPERATOR_REBALANCE_AFTER", "soon")
	t.Setenv("WHATSAPP_OPERATOR_REDIS", "no-port")
	for _, args := range [][]string{
		{"--redis-db=one", "--no-such-flag=1", "--laravel-timeout=long", "--batch-size=0", "-x", "--parallel", "4", "--store=", "--laravel-url=gopher://x"},
		{"--no-such-flag", "-x", "--parallel=4", "--store=", "--laravel-url=gopher://x", "--batch-size", "0", "--laravel-timeout", "long", "--redis-db", "one"},
	} {
		g := NewWithT(t)
		out := &bytes.Buffer{}
		root := NewRootCommand()
		root.SetOut(out)
		root.SetErr(out)
		err := execute(t.Context(), root, append([]string{"manager"}, args...))
		g.Expect(err).To(HaveOccurred())
		for _, want := range []string{
			`invalid argument "one" for "--redis-db"`, "unknown flag: --no-such-flag", `invalid argument "long" for "--laravel-timeout"`, // what pflag refuses
			`unknown shorthand flag: 'x' in -x`, "unknown flag: --parallel",
			"WHATSAPP_OPERATOR_REBALANCE_AFTER has a value that --rebalance-after does not take",
			"--batch-size is 0", "set --store or --store-file", "an address of Redis is not host:port", "URL of Laravel", // what the program refuses
			"`whatsapp-operator manager --help` lists the flags",
		} {
			g.Expect(strings.Count(err.Error(), want)).To(Equal(1), "%q in:\n%s", want, err)
		}
		g.Expect(err.Error()).To(HavePrefix("the configuration is wrong:\n"))
		g.Expect(err.Error()).NotTo(ContainSubstring("--laravel-timeout is"), "each mistake is reported once")
		g.Expect(out.String()).To(BeEmpty())
	}
}
